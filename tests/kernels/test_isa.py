"""Instruction sets that a processor lacks: what CI excuses, and that the emulation is the same arithmetic."""

import types

import pytest
import torch

from knowedit_kernels import _native
from knowedit_kernels.lowrank import cpu as lowrank
from knowedit_kernels.moments import cpu as moments
from tests import conftest
from tests.kernels.isa_emulation import LEVELS, emulated, parameters
from tests.kernels.moment_data import keys


@pytest.mark.parametrize(
    "marker, reason, lacking, excused",
    [
        (("isa", "avx512"), _native.LACKING, True, True),
        (("isa", "avx512"), _native.LACKING, False, False),  # it has the instructions: the kernels are wrong
        (("isa", "avx512"), "no compiled kernels: no compiler", True, False),
        (("slow",), _native.LACKING, True, False),
        (("gpu",), "no CUDA device", False, True),
    ],
)
def test_only_a_skip_for_lack_of_instructions_is_excused(marker, reason, lacking, excused, monkeypatch):
    name, *args = marker
    mark = getattr(pytest.mark, name)(*args).mark
    item = types.SimpleNamespace(get_closest_marker=lambda wanted: mark if wanted == name else None)
    monkeypatch.setattr(conftest, "processor_has", lambda isa: not lacking)
    assert conftest.is_excused(item, f"Skipped: {reason}") is excused


def test_the_kernels_see_the_instructions_that_the_processor_has():
    native = _native.load()
    assert native.reason is None
    assert {name: native.isa >= level for name, level in LEVELS.items()} == {
        name: conftest.processor_has(name) for name in LEVELS
    }


def both(candidate, run):
    """What `run()` returns with the processor's instructions and with emulated ones."""
    if reason := _native.load().refusal(LEVELS[candidate.name]):
        pytest.skip(reason)
    real = run()
    with emulated():
        return real, run()


@pytest.mark.parametrize("candidate", parameters(*moments.COMPILED[:3]))
def test_emulated_second_moments_have_the_bits_of_the_processor(candidate):
    k = keys(600, 70).bfloat16()

    def run():
        c = torch.zeros(70, 70, dtype=torch.float64)
        candidate.run([c], [k], "exact")
        return c

    assert torch.equal(*both(candidate, run))


@pytest.mark.parametrize("candidate", parameters(*lowrank.COMPILED[:2]))
def test_emulated_updates_have_the_bits_of_the_processor(candidate):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(50, 130, generator=g).bfloat16()
    U, V = (torch.randint(-16, 16, (size, 6), generator=g) / 64.0 for size in W.shape)  # exact in any order

    def run():
        w, sums = W.clone(), torch.zeros(1, 5, dtype=torch.float64)
        candidate.run([w], [], [U], [V], "stochastic", 5, [], [], True, sums, [])
        return torch.cat([w.double().flatten(), sums[0]])

    assert torch.equal(*both(candidate, run))
