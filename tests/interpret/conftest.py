"""Runs Triton kernels on the CPU: `TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 pytest
tests/interpret`.

A process of its own, because Triton reads the flag when a kernel is decorated.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "run as: TRITON_INTERPRET=1 OPENBLAS_NUM_THREADS=1 pytest tests/interpret"
    )

from tests.interpret import bf16

bf16.install()
