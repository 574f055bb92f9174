"""Second moments on a real GPU: the accuracy gate, bit-repeatability, offsets beyond 2^31, and the
whole state (gpu).
"""

import shutil

import pytest
import torch

from knowedit_kernels import _native_cuda, explain, numerics, testing
from knowedit_kernels.moments import SecondMoment, cuda, gpu, schedule
from knowedit_kernels.moments.call import MomentCall
from knowedit_kernels.moments.functional import mirror_
from knowedit_kernels.moments.reference import second_moment
from tests.kernels.moment_data import keys as make_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_gate_passes():
    assert gpu.gate(torch.device("cuda", 0)) is None


hopper = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or not shutil.which("nvcc"),
    reason="the CUDA kernel needs a Hopper GPU and nvcc",
)


@hopper
def test_the_cuda_kernel_passes_its_gate():
    assert cuda.gate_apart(torch.device("cuda", 0)) is None


@hopper
@pytest.mark.parametrize("d, tokens", [(8, 4096), (200, 5001), (1536, 16384), (4096, 20_000)])
def test_the_cuda_kernel_agrees_with_triton_and_repeats(d, tokens):
    assert _native_cuda.load().reason is None
    k = make_keys(tokens, d, torch.bfloat16).cuda()
    sums = [torch.zeros(d, d, dtype=torch.float64, device="cuda") for _ in range(3)]
    for c in sums[:2]:
        cuda.accumulate_(MomentCall([c], [k], "exact"))
    gpu.accumulate_(MomentCall(sums[2:], [k], "exact"))
    assert torch.equal(sums[0].tril(), sums[1].tril())
    testing.grade_moment(mirror_(sums[0]).cpu(), mirror_(sums[2]).cpu()).check(gpu.GATE)


@hopper
def test_the_cuda_kernel_writes_nothing_outside_c():
    k = make_keys(schedule.FEW_TOKENS, 264, torch.bfloat16).cuda()
    guard = testing.guarded(torch.zeros(264, 264, dtype=torch.float64, device="cuda"), row_margin=8)
    cuda.accumulate_(MomentCall([guard.tensor], [k], "exact"))
    guard.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_streaming_on_the_device(dtype):
    k = make_keys(40_000, 1536, dtype)
    mask = torch.rand(len(k), generator=torch.Generator().manual_seed(0)) < 0.9
    results = []
    for batch in (40_000, 3001):
        held = SecondMoment(1536, device="cuda")
        for part, keep in zip(k.cuda().split(batch), mask.split(batch)):
            held.update(part, keep)
        total, audit = held.finalize(audit=True)
        assert explain("second_moment_").chosen in ("cuda", "triton") and audit.ok(), audit
        results.append(total.cpu())
    testing.grade_moment(results[0], second_moment(k, mask)).check(numerics.MOMENT)
    assert torch.equal(*results)


def test_no_larger_error_than_the_float32_sum_it_replaces():
    k = make_keys(32_768, 512, torch.bfloat16)
    expected, c = second_moment(k), torch.zeros(512, 512, dtype=torch.float64, device="cuda")
    gpu.accumulate_(MomentCall([c], [k.cuda()], "exact"))
    plain = torch.zeros(512, 512, device="cuda")
    for part in k.cuda().float().split(3072):
        plain += part.T @ part
    ours = testing.grade_moment(mirror_(c).cpu(), expected)
    assert ours.normwise <= testing.grade_moment(plain.cpu(), expected).normwise


def test_offsets_beyond_two_to_the_31():
    tokens, dim = 2**31 // 4096 + 999, 4096
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    k = torch.ones(tokens, dim, dtype=torch.bfloat16, device="cuda")
    k[:-1, 1:] = 0
    c = torch.zeros(dim, dim, dtype=torch.float64, device="cuda")
    gpu.accumulate_(MomentCall([c], [k], "exact"))
    assert (
        c[0, 0].item() == tokens and c[dim - 1, 0].item() == 1 and c[dim - 1, dim - 1].item() == 1
    )
