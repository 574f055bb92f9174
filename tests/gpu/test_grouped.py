"""The experts' moments on a real GPU: the accuracy gate, repeated bits, uneven routing, the state
(gpu).
"""

import pytest
import torch

from knowedit_kernels import explain, numerics, testing
from knowedit_kernels.moments import GroupedSecondMoment, gpu, grouped_gpu, sort_rows, triangle
from knowedit_kernels.moments.call import GroupedCall
from knowedit_kernels.moments.reference import grouped_moment
from tests.kernels.moment_data import keys as make_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_gate_passes():
    assert grouped_gpu.gate(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_uneven_groups_and_repeated_bits(dtype, weighted):
    counts = torch.tensor([60_000, 0, 5000, 300, 7, 4096, 1])
    n, d = int(counts.sum()), 768
    keys = make_keys(n, d, dtype).cuda()
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0)).cuda() if weighted else None
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    sums = []
    for _ in range(2):
        c = torch.zeros(len(counts), triangle.size(d), dtype=torch.float64, device="cuda")
        grouped_gpu.accumulate_(GroupedCall(c, keys, None, offsets, weights, "exact"))
        sums.append(c)
    assert torch.equal(*sums)
    for group, exact in enumerate(grouped_moment(keys, offsets, weights)):
        ours = triangle.symmetric(sums[0][group], d)
        testing.grade_moment(ours, exact).check(gpu.GATE, f"group {group}")


def test_the_state_routes_audits_and_says_what_ran():
    keys = make_keys(20_000, 136, torch.bfloat16).cuda()
    index = torch.randint(0, 6, (20_000,), generator=torch.Generator().manual_seed(0)).cuda()
    moment = GroupedSecondMoment(6, 136, device="cuda")
    for rows, some in zip(keys.split(3000), index.split(3000)):
        moment.update(rows, index=some)
    order, offsets = sort_rows(index, 6)
    for group, exact in enumerate(grouped_moment(keys[order], offsets)):
        testing.grade_moment(moment.matrix(group), exact).check(numerics.MOMENT)
    assert moment.audit().ok() and explain("grouped_moment_").chosen == "triton"
