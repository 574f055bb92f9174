"""The machine: what it is, what it can at most do (measured), and what it consumes."""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import knowedit_kernels
from knowedit_kernels import _device, _native
from knowedit_kernels.bench import timing


def cpu_name() -> str:
    """The processor's name from the system, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def environment(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """What a reader needs to judge the figures: device, versions, load, and the measured ceilings
    for `dtypes`.
    """
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "knowedit_kernels": knowedit_kernels.__version__,
        "torch": torch.__version__,
        "triton": _device.triton_version() or "none",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts.update(_device.cuda_facts(device).key())
    else:
        native = _native.load()
        facts["compiled"] = native.reason or f"instruction set {native.isa}"
    return {**facts, "ceilings": ceilings(device, dtypes)}


def _best(run: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Seconds of the fastest of a few calls: a ceiling is what the machine can do when nothing
    disturbs it.
    """
    return min(timing.interleave({"run": run}, device, rounds, least=0.02)["run"])


def ceilings(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """Measured copy bandwidth, bytes read plus written, and matmul rate of random matrices (they
    draw more power than zeros): {"copy_gbps": float, "matmul_tflops": {dtype name: float}}.
    """
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _best(partial(target.copy_, source), device) / 1e9
    rates = {}
    side = 8192 if device.type == "cuda" else 1024
    for dtype in dict.fromkeys(ceiling_dtype(dtype, device) for dtype in dtypes):
        a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
        rates[str(dtype).removeprefix("torch.")] = (
            2 * side**3 / _best(partial(torch.mm, a, b), device) / 1e12
        )
    return {"copy_gbps": copied, "matmul_tflops": rates}


def ceiling_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose matmul is the limit: no CPU multiplies float16, it is widened."""
    return torch.float32 if device.type == "cpu" and dtype == torch.float16 else dtype


class EnergyMeter:
    """Joules per call from NVML's counter. `reason` says why there is none; then `joules` returns
    None.

    The counter advances about every 100 ms, so a measurement repeats the call for `seconds` (5 or
    more are sound).
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.seconds, self.reason, self._handle, self._device = seconds, "", None, device
        if device.type != "cuda":
            self.reason = "no counter for a CPU"
        elif seconds <= 0:
            self.reason = "turned off"
        else:
            try:
                import pynvml

                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._counter()
            except Exception as error:  # the bindings raise their own types, and are optional
                self._handle, self.reason = None, f"NVML: {error}"

    def _counter(self) -> float:
        import pynvml

        return pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def joules(self, run: Callable[[], Any]) -> float | None:
        """Joules of one call, the device's idle power included."""
        if self._handle is None:
            return None
        timing.synchronise(self._device)
        begin, start, calls = self._counter(), time.perf_counter(), 0
        while time.perf_counter() - start < self.seconds:
            for _ in range(4):
                run()
            calls += 4
            timing.synchronise(self._device)
        return (self._counter() - begin) / calls
