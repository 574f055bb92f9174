"""Compiles Triton kernels for real GPUs on a machine without one: `pytest tests/codegen`, a process
of its own.
"""

import os
import shutil

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/codegen compiles kernels: run it without TRITON_INTERPRET")

# nothing is skipped: without nvcc there is nothing to compile
collect_ignore = [] if shutil.which("nvcc") else ["test_cuda.py"]
