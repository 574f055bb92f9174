"""No unproven kernel: on a device where an implementation has not passed its accuracy gate, the
gate runs first.

A pass is remembered on disk for the exact kernel sources, GPU, driver, torch and Triton; a failure
only for this process, with one warning. The caller falls back to the next implementation.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from knowedit_kernels import _device, _native

_verdicts: dict[tuple[str, str], str | None] = {}
_running: set[tuple[str, str]] = set()


def sources_digest(files: Sequence[str]) -> str:
    """A digest of kernel sources named relative to the package: the kernel's version."""
    content = b"\0".join((_native.PACKAGE / name).read_bytes() for name in files)
    return hashlib.sha256(content).hexdigest()[:16]


def verdict_file() -> Path:
    """Where passes are remembered."""
    return _native.cache_root() / "gates.json"


def passes() -> list[dict[str, Any]]:
    """The remembered passes, each {"gate", "version", and the device facts}; a damaged file counts
    as none.
    """
    try:
        recorded = json.loads(verdict_file().read_text())
    except (OSError, ValueError):
        return []
    return recorded if isinstance(recorded, list) else []


def verdicts() -> dict[tuple[str, str], str | None]:
    """What this process found: (gate, device) -> None (passed) or what failed, with figures."""
    return dict(_verdicts)


def unproven(
    name: str,
    files: Sequence[str],
    device: torch.device,
    gate: Callable[[torch.device], str | None],
) -> str | None:
    """None if `gate` passes on `device` (now or earlier), else the reason. `gate` returns what
    failed, or None.
    """
    key = (name, str(device))
    if key in _running:
        return "its accuracy gate is running"
    if key not in _verdicts:
        _running.add(key)
        try:
            _verdicts[key] = _judge(name, files, device, gate)
        finally:
            _running.discard(key)
    return _verdicts[key]


def _judge(
    name: str,
    files: Sequence[str],
    device: torch.device,
    gate: Callable[[torch.device], str | None],
) -> str | None:
    record = {"gate": name, "version": sources_digest(files), **_device.cuda_facts(device).key()}
    if record in passes():
        return None
    try:
        failure = gate(device)
    except (
        Exception
    ) as error:  # a kernel that does not compile or launch must not take the caller down
        failure = f"{type(error).__name__}: {error}"
    if failure is None:
        _remember(record)
        return None
    reason = f"failed its accuracy gate on {record['name']}: {failure}"
    warnings.warn(f"knowedit_kernels: {name} {reason}; falling back", stacklevel=3)
    return reason


def _remember(record: dict[str, Any]) -> None:
    path = verdict_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".gates-")
        with os.fdopen(handle, "w") as file:
            json.dump([*passes(), record], file, indent=1)
        os.replace(scratch, path)
    except OSError as error:  # a read-only cache costs a re-run of the gate, nothing else
        warnings.warn(
            f"knowedit_kernels: cannot remember the gate's verdict in {path} ({error})",
            stacklevel=4,
        )
