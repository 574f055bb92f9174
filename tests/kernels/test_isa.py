"""Which skips CI excuses, and that emulated instructions compute what the processor's do (unit)."""

import pytest
import torch

from knowedit_kernels import _native
from knowedit_kernels._native import LACKING
from knowedit_kernels.lowrank import cpu as lowrank
from knowedit_kernels.lowrank.call import UpdateCall
from knowedit_kernels.moments import cpu as moments
from knowedit_kernels.moments.call import MomentCall
from tests.conftest import excused
from tests.kernels import isa
from tests.kernels.isa_emulation import LEVELS, emulated
from tests.kernels.moment_data import keys, multiplies


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
        isa.skip("avx512_bf16", LACKING)
    with pytest.raises(pytest.fail.Exception, match="avx512 is refused, yet this processor has"):
        isa.skip("avx512", LACKING)
    with pytest.raises(pytest.skip.Exception, match="^no compiled kernels"):
        isa.skip("avx512", "no compiled kernels: no compiler")


def test_the_kernels_see_the_instructions_that_the_processor_has():
    native = _native.load()
    assert native.reason is None
    seen = {name for name, level in LEVELS.items() if native.isa >= level}
    assert seen == {name for name, needed in isa.NEEDS.items() if needed <= isa.flags()}


def both(candidate, run):
    """What `run()` returns with the processor's instructions and with emulated ones."""
    if reason := _native.load().refusal(LEVELS[candidate.name]):
        isa.skip(candidate.name, reason)
    real = run()
    with emulated():
        return real, run()


PAIRS = [
    (candidate, dtype)
    for candidate in moments.COMPILED[:4]
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if multiplies(candidate, dtype)
]


@pytest.mark.isa
@pytest.mark.parametrize("precision", ["exact", "fast", "fp64"])
@pytest.mark.parametrize(
    "candidate, dtype", PAIRS, ids=[f"{candidate.name}-{dtype}" for candidate, dtype in PAIRS]
)
def test_emulated_second_moments_have_the_bits_of_the_processor(candidate, dtype, precision):
    """Emulated, AVX-512 takes the kernels of the processors that this one is not like
    (`multiplies_halves` in csrc/cpu/isa.h): those too have the same bits.
    """
    shapes = [(600, 70), (1300, 203), (200, 49), (37, 12), (1, 1)]
    ks = [keys(*shape, dtype) for shape in shapes]
    for k in ks:
        k[:, k.shape[1] // 2] *= 1e-3

    def run():
        cs = [torch.zeros(k.shape[1], k.shape[1], dtype=torch.float64) for k in ks]
        candidate.run(MomentCall(cs, ks, precision))
        return cs

    for real, same in zip(*both(candidate, run)):
        assert torch.equal(real, same)


@pytest.mark.isa
@pytest.mark.parametrize("candidate", lowrank.COMPILED[:2], ids=lambda c: c.name)
def test_emulated_updates_have_the_bits_of_the_processor(candidate):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(50, 130, generator=g).bfloat16()
    U, V = (torch.randint(-16, 16, (size, 6), generator=g) / 64.0 for size in W.shape)

    def run():
        w, sums = W.clone(), torch.zeros(1, 5, dtype=torch.float64)
        candidate.run(UpdateCall([w], [], [U], [V], "stochastic", 5, [], [], True, sums, []))
        return w, sums

    (real, sums), (same, again) = both(candidate, run)
    assert torch.equal(real, same)
    torch.testing.assert_close(again, sums, rtol=1e-6, atol=0)
