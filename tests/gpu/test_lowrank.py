"""Low-rank updates on a real GPU: the accuracy gate, bit-repeatability, the ledger, offsets beyond
2^31 (gpu).
"""

import pytest
import torch

from knowedit_kernels import explain, numerics
from knowedit_kernels.lowrank import WeightLedger, gpu, low_rank_update_, low_rank_update_many_
from knowedit_kernels.lowrank.reference import grade_update, updated
from tests.kernels.test_lowrank import problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_gate_passes():
    assert gpu.gate(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layers_in_one_launch(dtype):
    layers = [problem(1024, 4096, dtype, rank=24, seed=i) for i in range(3)]
    results = []
    for _ in range(2):
        Ws, Us, Vs = ([x.cuda() for x in part] for part in zip(*layers))
        low_rank_update_many_(Ws, Us, Vs, report=not results)  # the second time without a report
        assert explain("low_rank_update_").chosen == "triton"
        results.append([W.cpu() for W in Ws])
    for first, again, (W, U, V) in zip(*results, layers):
        assert torch.equal(first, again)
        assert not grade_update(first, W, U, V).failures(numerics.UPDATE_NEAREST[dtype])


def test_random_bits_are_those_of_the_cpu():
    g = torch.Generator().manual_seed(0)
    W = (torch.randint(-512, 512, (300, 700), generator=g) / 64).bfloat16()
    U, V = (torch.randint(-16, 16, (size, 6), generator=g) / 64.0 for size in W.shape)
    result = W.cuda()
    low_rank_update_(result, U, V, rounding="stochastic", seed=11)
    assert torch.equal(result.cpu(), updated(W, U, V, 1.0, "stochastic", seed=11))


def test_the_ledger_restores_every_bit():
    W, U, V = problem(2048, 1536, torch.bfloat16)
    weight = W.cuda()
    ledger = WeightLedger({"w": weight})
    for key in "abc":
        ledger.add("w", U * (1 + ord(key) % 3), V, key)
    for key in "bac":
        ledger.remove(key)
    assert torch.equal(weight.cpu().view(torch.int16), W.view(torch.int16))


def test_offsets_beyond_two_to_the_31():
    rows, columns = 2**31 // 8192 + 100, 8192
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of device memory")
    W = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    U, V = torch.zeros(rows, 1), torch.ones(columns, 1)
    U[-1] = 1
    report = low_rank_update_(W, U, V)
    assert report.changed == columns and bool((W[-1] == 1).all()) and not W[-2].any()
