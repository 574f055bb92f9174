"""Runs providers on problems and makes the rows: accuracy first, then time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from knowedit_kernels.bench import machine, timing
from knowedit_kernels.bench.problem import Check, Operation, Problem, Provider

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """`check=False` skips the float64 reference, and with it every claim of a speed-up."""

    device: torch.device
    rounds: int = 9
    check: bool = True
    baseline: str = "torch"
    least: float = 0.05


def measure(
    name: str,
    operation: Operation,
    values: dict[str, Any],
    providers: Sequence[str],
    settings: Settings,
    ceilings: dict[str, Any],
    meter: machine.EnergyMeter,
) -> list[Row]:
    """One row per provider for one problem. `status`: "ok", "over budget", "not checked", "failed:
    ..." or why it did not run ("unavailable: ..."); `red` rows are those over budget or failed.
    """
    problem = operation.make(values, settings.device)
    rows: dict[str, Row] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for key in providers:
        row: Row = {"op": name, "shape": problem.shape, "provider": key, "red": False}
        provider = operation.providers.get(key)
        reason = f"{key} has no {name}" if provider is None else provider.refuse(problem.inputs)
        if provider is None or reason is not None:
            rows[key] = {**row, "status": f"unavailable: {reason}"}
            continue
        try:
            run = provider.build(problem.inputs)
            checks = _judge(problem, provider, run, settings)
        except Exception as error:  # one provider's failure must not lose the others' rows
            rows[key] = {
                **row,
                "red": True,
                "status": f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
            }
            continue
        red = not all(check.ok for check in checks)
        status = "over budget" if red else "ok" if checks else "not checked"
        errors = {check.name: [check.value, check.limit] for check in checks}
        rows[key] = {
            **row,
            "about": provider.about,
            "slack": provider.slack,
            "status": status,
            "red": red,
            "errors": errors,
        }
        runs[key] = run
    seconds = timing.interleave(runs, settings.device, settings.rounds, settings.least)
    for key, times in seconds.items():
        rows[key].update(_figures(problem, times, settings.device, ceilings))
        rows[key]["joules"], rows[key]["joules_reason"] = meter.joules(runs[key]), meter.reason
    for key, times in seconds.items():
        base = rows.get(settings.baseline)
        if base and key != settings.baseline and base["status"] == rows[key]["status"] == "ok":
            rows[key]["speedup"], rows[key]["baseline"] = (
                timing.speedup(seconds[settings.baseline], times),
                settings.baseline,
            )
    if "ours" in seconds:
        rows["ours"]["implementation"] = operation.decide(problem).chosen
    return list(rows.values())


def _judge(
    problem: Problem, provider: Provider, run: Callable[[], Any], settings: Settings
) -> list[Check]:
    result = run()
    if not settings.check:
        return []
    return [
        Check(check.name, check.value, check.limit * provider.slack)
        for check in problem.judge(result)
    ]


def _figures(
    problem: Problem, times: Sequence[float], device: torch.device, ceilings: dict[str, Any]
) -> Row:
    middle = timing.percentile(times, 50)
    dtype = str(machine.ceiling_dtype(problem.dtype, device)).removeprefix("torch.")
    useful, gbps = problem.useful / middle / 1e12, problem.traffic / middle / 1e9
    return {
        "rounds": len(times),
        "ms": {f"p{percent}": 1e3 * timing.percentile(times, percent) for percent in (20, 50, 80)},
        "useful_tflops": useful,
        "nominal_tflops": problem.nominal / middle / 1e12,
        "ceiling": dtype,
        "peak_percent": 100 * useful / ceilings["matmul_tflops"][dtype],
        "gbps": gbps,
        "copy_percent": 100 * gbps / ceilings["copy_gbps"],
        "intensity": problem.useful / problem.traffic,
    }
