"""Compiles Triton kernels for real GPUs on a machine without one: `pytest tests/codegen`, a process of its own."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/codegen compiles kernels: run it without TRITON_INTERPRET")
