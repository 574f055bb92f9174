"""The Triton moments under the interpreter: dtype x ragged shape x tail x empty, poisoned and
guarded (unit).
"""

import dataclasses
import re

import pytest
import torch

from knowedit_kernels import numerics, testing
from knowedit_kernels.moments import audit, gpu, reference, schedule
from knowedit_kernels.moments.call import MomentCall, PackCall
from knowedit_kernels.moments.functional import mirror_
from tests.kernels.moment_data import keys as make_keys

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1, 16), (37, 40), (64, 128), (200, 136), (333, 264)]


def small(dtype, tma=False, precision="exact"):
    """A configuration whose chains are short enough that a few hundred tokens need several."""
    config = schedule.config(dtype, precision, 90, schedule.MANY_TOKENS, tma)
    return dataclasses.replace(config, chain=min(config.chain, 128), first=64, tma=tma)


def run(keys, config):
    guard = testing.guarded(
        torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64), row_margin=8
    )
    gpu.launch_([guard.tensor], [keys], config)
    guard.check()
    return mirror_(guard.tensor.clone())


def check(result, keys):
    budget = numerics.MOMENT_FP64 if keys.dtype == torch.float64 else numerics.MOMENT
    testing.grade_moment(result, reference.second_moment(keys)).check(budget)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype, shape):
    keys = make_keys(*shape, dtype)
    check(run(keys, small(dtype)), keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_products_are_exact_for_two_parts(shape):
    keys = make_keys(*shape)
    parts = reference.second_moment(reference.two_parts(keys))
    testing.grade_moment(run(keys, small(torch.float32, precision="fp32")), parts).check(
        numerics.MOMENT
    )


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_descriptors_give_the_same_bits(dtype):
    keys = make_keys(200, 136, dtype)
    assert torch.equal(run(keys, small(dtype, tma=True)), run(keys, small(dtype)))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_default_configurations_keep_the_budget_against_the_true_keys(dtype):
    for tokens in (schedule.FEW_TOKENS - 9, schedule.FEW_TOKENS + 9):
        keys, c = make_keys(tokens, 24, dtype), torch.zeros(24, 24, dtype=torch.float64)
        gpu.accumulate_(MomentCall([c], [keys], "exact"))
        testing.grade_moment(mirror_(c), reference.second_moment(keys)).check(numerics.MOMENT)


@pytest.mark.parametrize("precision", ["fp64", "fast"])
def test_other_precisions(precision):
    keys, c = make_keys(200, 72, torch.bfloat16), torch.zeros(72, 72, dtype=torch.float64)
    gpu.accumulate_(MomentCall([c], [keys], precision))
    # the interpreter rounds where a tensor core truncates, so "fast" is judged by its shape only
    budget = numerics.MOMENT_FP64 if precision == "fp64" else numerics.Budget(1e-5, 1e-5, 1e-5)
    testing.grade_moment(mirror_(c), reference.second_moment(keys)).check(budget)


def test_layers_of_different_lengths_and_shapes_accumulate():
    layers = [
        make_keys(n, d, torch.bfloat16, seed=n) for n, d in ((70, 40), (0, 40), (130, 136), (5, 40))
    ]
    start = [reference.second_moment(make_keys(9, k.shape[1], seed=1)) for k in layers]
    cs = [c.clone() for c in start]
    gpu.accumulate_(MomentCall(cs, layers, "exact"))
    for c, before, keys in zip(cs, start, layers):
        testing.grade_moment(mirror_(c), before + reference.second_moment(keys)).check(
            numerics.MOMENT_FP64
        )


def test_unaligned_memory_is_copied_or_refused():
    store = torch.zeros(1 + 24 * 9, dtype=torch.bfloat16)
    keys = store[1:].view(9, 24).copy_(make_keys(9, 24))
    c = torch.zeros(24, 24, dtype=torch.float64)
    gpu.accumulate_(MomentCall([c], [keys], "fast"))
    testing.grade_moment(mirror_(c), reference.second_moment(keys)).check(
        numerics.Budget(1e-5, 1e-5, 1e-5)
    )
    odd = torch.zeros(24 * 24 + 1, dtype=torch.float64)[1:].view(24, 24)
    assert (
        odd.data_ptr() % 16 == 0
        or gpu.TRITON.verify(MomentCall([odd], [keys], "exact")) == "c does not start on 16 bytes"
    )


def test_token_split_when_tiles_are_few(monkeypatch):
    monkeypatch.setattr(schedule, "splits", lambda programs, tokens, processors: 3)
    keys = [make_keys(100, 40, torch.bfloat16), make_keys(77, 40, torch.bfloat16, seed=1)]
    cs = [torch.zeros(40, 40, dtype=torch.float64) for _ in keys]
    gpu.accumulate_(MomentCall(cs, keys, "exact"))
    for c, key in zip(cs, keys):
        testing.grade_moment(mirror_(c), reference.second_moment(key)).check(numerics.MOMENT_FP64)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (37, 200)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack(dtype, shape, gather):
    keys = make_keys(*shape, dtype)
    rows = torch.arange(0, shape[0], 2) if gather else None
    kept = keys if rows is None else keys[rows]
    guard = testing.guarded(testing.poisoned_empty(*kept.shape, dtype=dtype))
    sums, signs = torch.ones(5, dtype=torch.float64), audit.signs(shape[1])
    with testing.poisoned_allocations():
        gpu.pack_(PackCall(guard.tensor, sums, keys, rows, signs))
    guard.check()
    assert torch.equal(guard.tensor, kept)
    wide = kept.double()
    expected = torch.cat([wide.square().sum()[None], (wide @ signs.T).square().sum(0)])
    assert torch.allclose(sums - 1, expected, rtol=1e-12)


def test_pack_reads_strided_keys_and_leaves_out_when_not_asked():
    keys = make_keys(20, 64)[:, 5:50]
    sums = torch.zeros(5, dtype=torch.float64)
    gpu.pack_(PackCall(None, sums, keys, None, audit.signs(45)))
    assert sums[0].item() == pytest.approx(keys.double().square().sum().item(), rel=1e-12)


@pytest.fixture
def short_gate(monkeypatch):
    """The gate with fewer tokens: the interpreter takes milliseconds per loop iteration."""
    monkeypatch.setattr(schedule, "FEW_TOKENS", 500)
    monkeypatch.setattr(schedule, "MANY_TOKENS", 900)
    monkeypatch.setattr(gpu, "VARIANTS", gpu.VARIANTS[::2])


@pytest.mark.usefixtures("short_gate")
def test_the_gate_passes_the_kernels():
    assert gpu.gate(torch.device("cpu")) is None


@pytest.mark.usefixtures("short_gate")
@pytest.mark.parametrize(
    "fault", ["three products", "off by one", "nothing done", "scrambled copy"]
)
def test_the_gate_rejects_wrong_kernels(fault, monkeypatch):
    if fault == "three products":
        plain = schedule.config
        monkeypatch.setattr(
            schedule, "config", lambda *args: dataclasses.replace(plain(*args), products=3)
        )
    elif fault == "off by one":
        plain_table = schedule.tile_table
        monkeypatch.setattr(schedule, "tile_table", lambda *args: plain_table(*args)[:-1])
    elif fault == "nothing done":
        monkeypatch.setattr(gpu, "launch_", lambda cs, keys, config: None)
    else:
        monkeypatch.setattr(gpu, "pack_", lambda call: call.out.zero_())
    assert re.search("second moment of|is not a copy", gpu.gate(torch.device("cpu")) or "passed")
