"""The launches of the GPU suite's experiments, which a dry run replaces by the reference, give
right sums (unit).
"""

import dataclasses

import pytest
import torch

from benchmarks import gpu_lab
from knowedit_kernels import numerics, testing
from knowedit_kernels.moments import gpu, reference, schedule
from knowedit_kernels.moments.functional import mirror_
from tests.kernels.moment_data import keys as make_keys

LAB = gpu_lab.Lab(
    torch.device("cpu"), "interpreter", gpu_lab.DRY, report=None, rounds=1, deadline=0.0
)
WAYS = [way for way in LAB.ways() if way.variant == "triton"]


def launched(config, keys, launch):
    c = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64)
    for part in keys.split(launch):
        gpu.launch_([c], [part], config)
    testing.grade_moment(mirror_(c), reference.second_moment(keys)).check(numerics.MOMENT)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_way(way):
    launched(way.config, make_keys(300, 136, torch.bfloat16), 200)


@pytest.mark.parametrize("start", ["zero", "centred"])
@pytest.mark.parametrize("chain", gpu_lab.DRY.chains)
def test_every_chain(chain, start):
    base = schedule.config(torch.bfloat16, "exact", 90, gpu_lab.LAUNCH)
    config = dataclasses.replace(base, chain=chain if start == "centred" else 0)
    launched(config, make_keys(700, 40, torch.bfloat16), chain if start == "zero" else 10_000)
