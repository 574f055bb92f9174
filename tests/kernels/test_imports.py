"""What importing the kernels needs: torch, numpy and safetensors, and nothing of the pipeline
(unit).
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os
import sys

import knowedit_kernels  # all that a kernel needs is loaded before the rest is forbidden
import knowedit_kernels.integrations

loaded = {name.partition(".")[0] for name in sys.modules}
pipeline = {"knowedit", "transformers", "scipy", "matplotlib", "rich", "typer"}
assert not loaded & pipeline, loaded & pipeline


class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in pipeline:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Forbidden())
import torch

for implementation in ("", "torch"):
    os.environ["KNOWEDIT_IMPL"] = implementation
    moment = knowedit_kernels.SecondMoment(8).update(torch.eye(8))
    metric = knowedit_kernels.Covariance(moment.moment())
    print(knowedit_kernels.EditSolver(metric, torch.ones(8, 1)).gain.item())
try:
    knowedit_kernels.integrations.accelerate
except ImportError as error:
    print(error)
"""


def test_the_kernels_work_with_the_core_alone():
    """With the implementation that suits the machine, and with torch's."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *gains, refusal = done.stdout.splitlines()
    # the moment of the unit vectors is I / 8, so kᵀ C^-1 k = 64 for k = (1, ..., 1)
    assert [float(gain) for gain in gains] == pytest.approx([64 / 65] * 2)
    assert "pip install 'knowedit-kernels[edit]'" in refusal


def test_a_name_that_is_not_there():
    import knowedit_kernels.integrations as door

    with pytest.raises(AttributeError, match="no attribute 'faster'"):
        _ = door.faster
    assert door.accelerate is not None
