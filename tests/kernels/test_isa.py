"""Which skips CI excuses (unit)."""

import pytest

from tests.conftest import excused
from tests.kernels import isa


@pytest.mark.parametrize(
    "markers, reason, fine",
    [
        ({"gpu"}, "no CUDA device", True),
        ({"isa"}, "Skipped: missing instruction set: avx512 needs avx512f", True),
        ({"isa"}, "Skipped: no compiled kernels: no compiler", False),
        (set(), "Skipped: missing instruction set: avx512 needs avx512f", False),
        ({"model"}, "the model is not here", False),
    ],
)
def test_only_a_missing_instruction_set_is_excused(markers, reason, fine):
    assert excused(markers, reason) is fine


def test_the_flags_decide_and_not_the_kernel(monkeypatch):
    monkeypatch.setattr(isa, "flags", lambda: isa.AVX512)
    with pytest.raises(
        pytest.skip.Exception, match="missing instruction set: avx512_bf16 needs avx512_bf16"
    ):
        isa.skip("avx512_bf16", isa.REFUSAL)
    with pytest.raises(pytest.fail.Exception, match="avx512 is refused, yet this processor has"):
        isa.skip("avx512", isa.REFUSAL)
    with pytest.raises(pytest.skip.Exception, match="^no compiled kernels"):
        isa.skip("avx512", "no compiled kernels: no compiler")
