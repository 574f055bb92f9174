"""The sm_90a second moment of csrc/cuda: for bf16 and fp16 keys on Hopper, ahead of the Triton
kernel.

Not yet run on a GPU. The gate that it must pass first runs in a process of its own: an unproven
kernel that hangs or faults then costs a fallback, not the caller's process.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from knowedit_kernels import _gate, _native, _native_cuda, testing
from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.moments import gpu, reference, schedule, tuned
from knowedit_kernels.moments.call import MomentCall
from knowedit_kernels.moments.functional import mirror_

# as in csrc/cuda/syrk_layout.h, which a test compares
ROWS, COLUMNS, LAYERS = 128, 192, 16
HOPPER = 90
_GATE_SECONDS = 300


def accumulate_(call: MomentCall) -> None:
    """c += K^T K on the lower triangle of every layer's c [d, d] float64; bf16 or fp16 keys, as in
    `gpu.accumulate_`.
    """
    for group, rows in gpu.groups(call.cs, call.keys):
        d, tokens = rows[0].shape[1], min(map(len, rows))
        config = schedule.config(rows[0].dtype, call.precision, HOPPER, tokens)
        programs = len(schedule.tile_table(d, len(group), ROWS, width=COLUMNS))
        gpu.split_(group, rows, programs, functools.partial(launch_, config=config))


def launch_(cs: Sequence[Tensor], keys: Sequence[Tensor], config: schedule.Config) -> None:
    """Launches over dense keys [tokens, d] of one dtype and d, LAYERS at a time; `cs` of one row
    stride.
    """
    for start in range(0, len(cs), LAYERS):
        some, theirs = list(cs[start : start + LAYERS]), list(keys[start : start + LAYERS])
        d, device = theirs[0].shape[1], theirs[0].device
        table = schedule.tile_table(d, len(some), ROWS, COLUMNS, device)
        torch.ops.knowedit.syrk_cuda_(some, theirs, table, config.chain, config.first)


def gate(device: torch.device) -> str | None:
    """Ragged tokens and channels, more tiles than processors, more layers than a launch holds; what
    failed, or None.
    """
    for d, tokens, layers in (
        (264, schedule.FEW_TOKENS + 37, 40),
        (136, schedule.MANY_TOKENS + 5, 1),
        (1048, 5000, 2),
    ):
        raw = gpu.gate_keys(tokens, d)
        for dtype in (torch.bfloat16, torch.float16):
            keys = raw.to(dtype)
            cs = [torch.zeros(d, d, dtype=torch.float64, device=device) for _ in range(layers)]
            accumulate_(MomentCall(cs, [keys.to(device)] * layers, "exact"))
            lower = [c.tril() for c in cs]
            if not all(torch.equal(lower[0], other) for other in lower):
                return f"layers with the same {dtype} keys [{tokens}, {d}] differ"
            graded = testing.grade_moment(mirror_(cs[0].cpu()), reference.second_moment(keys))
            if failures := graded.failures(gpu.GATE):
                return f"second moment of {dtype} keys [{tokens}, {d}]: {'; '.join(failures)}"
    return None


def gate_apart(device: torch.device, seconds: float | None = None) -> str | None:
    """`gate` in a process of its own; also says when that process crashed or took longer than
    `seconds` (None: 300).
    """
    seconds = seconds or _GATE_SECONDS
    program = (
        "import sys, torch\n"
        "from knowedit_kernels import _native_cuda\n"
        "from knowedit_kernels.moments import cuda\n"
        f"sys.exit(_native_cuda.load().reason or cuda.gate(torch.device({str(device)!r})))"
    )
    path = os.pathsep.join(
        filter(None, (str(_native.PACKAGE.parent), os.environ.get("PYTHONPATH")))
    )
    command, environment = [sys.executable, "-c", program], {**os.environ, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"no result after {seconds:g} seconds"
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return None if done.returncode == 0 else f"{last[0]} (exit status {done.returncode})"


def refusal(capability: tuple[int, int], call: MomentCall) -> str | None:
    """Why the kernel does not apply to these arguments on a GPU of `capability`; None if
    it does.
    """
    if capability != (9, 0):
        return f"for Hopper (9.0) only, this GPU has {capability[0]}.{capability[1]}"
    narrow = all(key.dtype in (torch.bfloat16, torch.float16) for key in call.keys)
    if call.precision == "fp64" or not narrow:
        return "for bfloat16 and float16 keys only"
    if any(key.shape[1] % 8 for key in call.keys):
        return "needs a multiple of 8 channels"
    if call.precision != "fast" and any(len(key) < schedule.FEW_TOKENS for key in call.keys):
        return f"fewer than {schedule.FEW_TOKENS} tokens run in float64"
    if any(c.data_ptr() % 16 or c.stride(0) % 2 or c.stride(1) != 1 for c in call.cs):
        return "c does not start on 16 bytes, or its rows do not"
    return None


def _slower(device: torch.device, keys: Sequence[Tensor]) -> str | None:
    best = tuned.nearest(device, keys[0].shape[1])
    return (
        "measured to be slower than Triton on this GPU"
        if best is not None and best.variant == "triton"
        else None
    )


@functools.cache
def _files() -> list[str]:
    return [
        *map(str, _native_cuda.sources()),
        "moments/cuda.py",
        "moments/gpu.py",
        "moments/schedule.py",
    ]


def _verify(call: MomentCall) -> str | None:
    if not call.keys:
        return None
    device = call.keys[0].device
    reason = refusal(torch.cuda.get_device_capability(device), call)
    reason = reason or _slower(device, call.keys) or _native_cuda.load().reason
    return reason or _gate.unproven("moments.cuda", _files(), device, gate_apart)


CUDA = Candidate("cuda", accumulate_, _verify, device="cuda")
