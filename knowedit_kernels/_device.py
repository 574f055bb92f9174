"""Facts about a device that decide what may run on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DeviceFacts:
    """What an accuracy gate's verdict depends on, apart from the kernel itself."""

    name: str
    capability: str
    driver: str
    torch: str
    triton: str

    def key(self) -> dict[str, Any]:
        """A JSON-able record, equal exactly when a cached verdict may be reused."""
        return asdict(self)


def triton_version() -> str | None:
    """The installed Triton's version without importing it, or None."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_facts(device: torch.device | str | int = "cuda") -> DeviceFacts:
    """The facts of a CUDA device. Raises RuntimeError when torch sees none."""
    if not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: torch.cuda.is_available() is False")
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        driver=_driver_version(),
        torch=torch.__version__,
        triton=triton_version() or "none",
    )


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a CUDA device the current one, which is where Triton launches; does nothing for other
    devices.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Launches a Triton kernel where its tensors are. The only place that may: Triton launches on
    the current device, which need not be theirs when a model is spread over several.
    """
    with current(device):
        kernel[grid](*arguments, **options)


def tables(
    device: torch.device, *columns: tuple[torch.dtype, Sequence[int]]
) -> tuple[torch.Tensor, ...]:
    """Lists of integers as tensors on a device, all in one copy; each starts on 16 bytes."""
    sizes = [-(-len(numbers) * dtype.itemsize // 16) * 16 for dtype, numbers in columns]
    host = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
    parts = [
        part.view(dtype)[: len(numbers)]
        for part, (dtype, numbers) in zip(host.split(sizes), columns)
    ]
    for part, (dtype, numbers) in zip(parts, columns):
        part.copy_(torch.tensor(numbers, dtype=dtype, device="cpu"))
    moved = host.to(device)
    return tuple(
        part.view(dtype)[: len(numbers)]
        for part, (dtype, numbers) in zip(moved.split(sizes), columns)
    )


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 elsewhere."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def _driver_version() -> str:
    """NVIDIA driver version from NVML; the CUDA runtime version where NVML's bindings are
    absent.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
        return version if isinstance(version, str) else version.decode()
    except Exception:  # the bindings raise their own types, and are optional
        return f"cuda {torch.version.cuda}"
