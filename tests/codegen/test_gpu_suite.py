"""Every block size that the GPU suite tries, and so every one a tuned table can name, compiles to a
sound kernel (unit).
"""

import dataclasses

import pytest
import torch
import triton.language as tl

from benchmarks import gpu_lab
from knowedit_kernels.moments import schedule
from knowedit_kernels.moments.triton import second_moment_kernel
from tests.codegen.compiler import MMA, compile_for

LAB = gpu_lab.Lab(torch.device("cpu"), "compiler", gpu_lab.DRY, report=None, rounds=1, deadline=0.0)
WAYS = [way for way in LAB.ways() if way.variant == "triton"]


def build(architecture, config, dim):
    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    table, tokens = meta(8, dtype=torch.int64), meta(8, dtype=torch.int32)
    args = (table, table, tokens, meta(528, 4, dtype=torch.int32), dim, dim, dim)
    return compile_for(
        second_moment_kernel, architecture, *args, KEY=tl.bfloat16, EVEN=True, **config.constants()
    )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@pytest.mark.parametrize("architecture", [90, 100])
def test_every_way(architecture, way):
    build(architecture, way.config, 4096).check(mma=MMA[architecture])


@pytest.mark.parametrize("chain", [0, gpu_lab.Sizes().chains[0], gpu_lab.Sizes().chains[-1]])
def test_the_shortest_and_longest_chains(chain):
    config = dataclasses.replace(
        schedule.config(torch.bfloat16, "exact", 90, gpu_lab.LAUNCH), chain=chain
    )
    build(90, config, gpu_lab.Sizes().bias[0]).check(mma=MMA[90])
