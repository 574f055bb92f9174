"""The steps of the GPU suite: building, correctness on the device, and experiments E0 to E8, a
short function each.

Every function takes the `Lab`, records rows with predictions beside results, and stops when its
time is up. What is wrong is `red` and fails the suite; what is slower than hoped is only said.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from knowedit_kernels import _native, _native_cuda, explain
from knowedit_kernels.bench import grouped, machine, moments, results, runner, timing
from knowedit_kernels.bench import lowrank as bench_lowrank
from knowedit_kernels.bench import target_loss as bench_loss
from knowedit_kernels.bench.problem import DTYPES, Operation, Provider
from knowedit_kernels.lowrank import gpu as lowrank_gpu
from knowedit_kernels.moments import cuda, gpu, grouped_gpu, schedule
from knowedit_kernels.numerics import truncation_bias
from knowedit_kernels.target_loss import gpu as loss_gpu

from . import common
from .gpu_lab import LAUNCH, Lab, Row, Way, errors, in_words, moment_checks, sum64

HOPPER = 90
OPS = {"moments": "second_moment_", "lowrank": "low_rank_update_", "target_loss": "target_losses"}


def build(lab: Lab) -> None:
    """The CPU library everywhere; the CUDA library where a Hopper can run it. Absent compilers are
    no failure.
    """
    native = _native.load()
    lab.row(
        f"CPU library: {native.reason or f'instruction set {native.isa}'}", reason=native.reason
    )
    start = time.monotonic()
    fits = lab.dry or lab.capability == HOPPER
    reason = (
        _native_cuda.load().reason
        if fits
        else f"for Hopper only, this GPU has capability {lab.capability}"
    )
    red = reason is not None and reason.startswith("nvcc failed")
    seconds = time.monotonic() - start
    lab.row(
        f"CUDA library: {reason or f'ready after {seconds:.0f} s'}",
        red=red,
        reason=reason,
        seconds=seconds,
    )


def e0_ceilings(lab: Lab) -> None:
    """Copy bandwidth and matrix products: what every later row is held against."""
    lab.environment = {**machine.environment(lab.device, DTYPES.values()), "name": lab.name}
    found = lab.environment["ceilings"]
    expected = {"copy": lab.predicted("copy"), "bf16": lab.predicted("bf16")}
    print(results.format_environment(lab.environment))
    said = {
        name: f"predicted {value / 1e12:g} T/s" if value else "no prediction"
        for name, value in expected.items()
    }
    lab.row(
        f"copy {found['copy_gbps']:.0f} GB/s ({said['copy']})",
        predicted=expected["copy"],
        environment=lab.environment,
    )
    lab.row(
        f"bf16 product {found['matmul_tflops']['bfloat16']:.3g} TFLOP/s ({said['bf16']})",
        predicted=expected["bf16"],
    )


def gates(lab: Lab) -> None:
    """The accuracy gate of every GPU implementation; a dry run has no kernel to put through it."""
    found: dict[str, Callable[[torch.device], str | None]] = {
        "moments.triton": gpu.gate,
        "moments.grouped": grouped_gpu.gate,
        "lowrank.triton": lowrank_gpu.gate,
        "target_loss.triton": loss_gpu.gate,
    }
    if lab.capability == HOPPER and _native_cuda.load().reason is None:
        found["moments.cuda"] = partial(cuda.gate_apart, seconds=max(lab.left() / 2, 1))
    for name, gate in found.items():
        if lab.dry:
            lab.row(f"{name}: not run, there is no GPU", case=name)
            continue
        start = time.monotonic()
        try:
            failure = gate(lab.device)
        except (
            Exception
        ) as error:  # one kernel that does not compile or launch must not hide the others' verdicts
            failure = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        lab.row(
            f"{name}: {failure or 'passed'} ({seconds:.0f} s)",
            red=failure is not None,
            case=name,
            failure=failure,
        )
        lab.cuda_proven |= name == "moments.cuda" and failure is None


def correctness(lab: Lab) -> None:
    """Every operation on ragged sizes through its public function, against float64, with
    figures.
    """
    for name in ("bf16", "fp16", "fp32"):
        for d, tokens in lab.sizes.check:
            values = {"d": d, "tokens": tokens, "dtype": name, "precision": "exact"}
            _figures(lab, "moments", moments.OPERATION, values, ["ours-stream"])
        for rounding in ("nearest", "stochastic") if name != "fp32" else ("nearest",):
            values = {
                "rows": 203,
                "d": 1000 if not lab.dry else 90,
                "rank": 7,
                "dtype": name,
                "rounding": rounding,
            }
            _figures(lab, "lowrank", bench_lowrank.OPERATION, values, ["ours"])
        rows, d, vocabulary = (size - 1 for size in lab.sizes.head)
        values = {"rows": min(rows, 37), "d": d, "vocabulary": vocabulary, "dtype": name}
        _figures(lab, "target_loss", bench_loss.OPERATION, values, ["ours"])


def _figures(
    lab: Lab, name: str, operation: Operation, values: Row, providers: Sequence[str]
) -> None:
    """Accuracy alone; the single timing that `measure` takes along is dropped."""
    settings = runner.Settings(lab.device, rounds=1, least=0.0)
    idle = machine.EnergyMeter(lab.device, 0)
    for row in runner.measure(
        name, operation, values, providers, settings, lab.environment["ceilings"], idle
    ):
        kept = {
            key: row[key] for key in ("op", "shape", "provider", "status", "errors") if key in row
        }
        figures = ", ".join(
            f"{key} {value:.1e}" for key, (value, _) in row.get("errors", {}).items()
        )
        ran = explain(OPS[name]).chosen
        line = f"{name} {results.describe(values)}: {row['status']} ({ran}); {figures}"
        lab.row(line, red=row["red"], case="correctness", implementation=ran, **kept)


def device_tests(lab: Lab) -> None:
    """`pytest tests/gpu` in a process of its own (without a GPU all of it is skipped)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        done = subprocess.run(
            command,
            cwd=common.HERE.parent,
            capture_output=True,
            text=True,
            timeout=max(lab.left(), 1),
        )
    except subprocess.TimeoutExpired:
        lab.row("tests/gpu: no result within the time", red=True, case="tests/gpu")
        return
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    red = done.returncode != 0 or not (lab.dry or "passed" in lines[-1])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    lab.row(
        "\n    ".join([f"tests/gpu: {lines[-1]}", *failed]),
        red=red,
        case="tests/gpu",
        failed=failed,
    )


def e1_bias(lab: Lab) -> None:
    """Diagonal bias over chain length: the truncation model on silicon, and what centring leaves of
    it.

    A zero-started chain is a launch of its own with a float64 fold; centred chains run as in the
    library.
    """
    d, tokens = lab.sizes.bias
    keys = moments.gated_keys(tokens, d, lab.device).bfloat16()
    expected = sum64(keys)
    base = schedule.config(torch.bfloat16, "exact", lab.capability, LAUNCH)
    for chain in lab.sizes.chains:
        for start in ("zero", "centred"):
            if lab.left() < 0:
                return lab.row(f"time is up before chain {chain}")
            way = Way(start, "triton", replace(base, chain=0 if start == "zero" else chain))
            c = torch.zeros_like(expected)
            way.sum_(c, keys, chain if start == "zero" else max(chain, LAUNCH))
            checks = moment_checks(c, expected)
            bias = next(check.value for check in checks if check.name == "bias")
            predicted = truncation_bias(chain) if start == "zero" else 5e-8
            # the setting in use must keep its promise; all others are what the experiment is about
            red = (
                start == "centred" and chain == base.chain and not all(check.ok for check in checks)
            )
            said = f"predicted {predicted:+.1e}" if start == "zero" else "predicted below 5e-8"
            line = (
                f"chain {chain:8} from {start:7}: bias {bias:+.1e} ({said}), {in_words(checks[:2])}"
            )
            found = {"start": start, "chain": chain, "bias": bias, "predicted": predicted}
            lab.bias.append(found)
            lab.row(line, red=red, d=d, tokens=tokens, errors=errors(checks), **found)


def e2_variants(lab: Lab) -> None:
    """Second moments of bf16 keys by every way; the fastest accurate ones become the tuned
    table.
    """
    ways = lab.ways()
    flat = Way("flat chain", "triton", replace(ways[0].config, chain=0))
    peak = lab.environment["ceilings"]["matmul_tflops"]["bfloat16"]
    for d in lab.sizes.dims:
        if lab.left() < 0:
            return lab.row(f"time is up before d = {d}")
        keys = moments.gated_keys(lab.sizes.tokens, d, lab.device).bfloat16()
        expected, accurate = sum64(keys[:LAUNCH]), []
        for way in ways:
            c = torch.zeros_like(expected)
            try:
                way.add_(c, keys[:LAUNCH])
                checks = moment_checks(c, expected)
            except (
                Exception
            ) as error:  # too much shared memory here, say; only the launcher's own choice must run
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                lab.row(
                    f"d = {d}, {way.name}: {reason}",
                    red=way is ways[0],
                    d=d,
                    way=way.name,
                    failure=reason,
                )
                continue
            right = all(check.ok for check in checks)
            lab.row(
                f"d = {d}, {way.name}: {in_words(checks)}",
                red=not right,
                d=d,
                way=way.name,
                errors=errors(checks),
            )
            accurate += [way] if right else []
        runs = {
            way.name: partial(way.sum_, torch.zeros_like(expected), keys)
            for way in [*accurate, flat]
        }
        seconds = timing.interleave(runs, lab.device, lab.rounds, least=0.0 if lab.dry else 0.02)
        middle = {name: timing.percentile(times, 50) for name, times in seconds.items()}
        for way in sorted(accurate, key=lambda way: middle[way.name]):
            rate = lab.sizes.tokens * d * (d + 1) / middle[way.name] / 1e12
            per_million = middle[way.name] * 1e6 / lab.sizes.tokens
            predicted = (lab.predicted("cuda" if way.variant == "cuda" else "ours") or {}).get(d)
            said = f"predicted {predicted} s" if predicted else "no prediction"
            line = (
                f"{rate:.3g} useful TFLOP/s, {rate / peak:.0%} of peak; {per_million:.4f} s "
                f"per 10^6 tokens ({said})"
            )
            lab.row(
                f"d = {d}, {way.name}: {line}",
                d=d,
                way=way.name,
                variant=way.variant,
                config=asdict(way.config),
                useful_tflops=rate,
                share_of_peak=rate / peak,
                seconds_per_million=per_million,
                predicted=predicted,
            )
        if ways[0] in accurate:
            drain = middle[ways[0].name] / middle[flat.name] - 1
            lab.row(
                f"d = {d}: short chains cost {drain:.1%} over one flat chain (predicted at most "
                f"4%)",
                d=d,
                drain=drain,
            )
        if accurate:
            _choose(lab, d, accurate, middle)


def _choose(lab: Lab, d: int, accurate: Sequence[Way], middle: dict[str, float]) -> None:
    """Remembers the fastest way, and the entry of the tuned table: it always names sizes for the
    Triton kernel too.
    """
    fastest = lab.best[d] = min(accurate, key=lambda way: middle[way.name])
    triton = [way for way in accurate if way.variant == "triton"]
    if triton:
        sizes = asdict(min(triton, key=lambda way: middle[way.name]).config)
        fields = {name: sizes[name] for name in ("tile", "depth", "warps", "stages", "tma")}
        rate = lab.sizes.tokens * d * (d + 1) / middle[fastest.name] / 1e12
        lab.tuned.append({"d": d, "variant": fastest.variant, **fields, "useful_tflops": rate})


def e3_folds(lab: Lab) -> None:
    """The cost of the float64 fold over tokens a launch: time per token is a + b / tokens."""
    d = lab.sizes.dims[-1]
    way = replace(lab.best.get(d, lab.ways()[0]), name="best")
    keys = moments.gated_keys(lab.sizes.tokens, d, lab.device).bfloat16()
    c = torch.zeros(d, d, dtype=torch.float64, device=lab.device)
    runs = {str(fold): partial(way.sum_, c, keys, fold) for fold in lab.sizes.folds}
    seconds = timing.interleave(runs, lab.device, lab.rounds, least=0.0 if lab.dry else 0.02)
    middle = torch.tensor(
        [timing.percentile(times, 50) for times in seconds.values()], dtype=torch.float64
    )
    inverse = torch.tensor([[1.0, 1.0 / fold] for fold in lab.sizes.folds], dtype=torch.float64)
    base = float(torch.linalg.lstsq(inverse, middle[:, None]).solution[0])
    for fold, spent in zip(lab.sizes.folds, middle.tolist()):
        predicted = {8192: 0.14, 16384: 0.07, 32768: 0.035}.get(fold)
        said = f"predicted {predicted:.1%} on an H200" if predicted else "no prediction"
        share = 1 - base / spent
        lab.row(
            f"d = {d}, {fold} tokens a launch: {spent:.3g} s, fold {share:.1%} ({said})",
            d=d,
            fold=fold,
            seconds=spent,
            share=share,
            predicted=predicted,
        )


def _bench(
    lab: Lab,
    name: str,
    operation: Operation,
    values: Row,
    providers: Sequence[str],
    energy: float = 0,
) -> dict[str, Row]:
    """The benchmark's rows of one problem, recorded; by provider. Only a row of ours can be red."""
    settings = runner.Settings(lab.device, lab.rounds, least=0.0 if lab.dry else 0.02)
    meter = machine.EnergyMeter(lab.device, energy)
    rows = runner.measure(
        name, operation, values, providers, settings, lab.environment["ceilings"], meter
    )
    print(f"  {name} {results.describe(values)}\n  {results.HEADINGS}")
    for row in rows:
        fields = {key: value for key, value in row.items() if key != "red"}
        lab.row(
            results.format_row(row), red=row["red"] and row["provider"].startswith("ours"), **fields
        )
    lab.benched += rows
    return {row["provider"]: row for row in rows}


def _target(lab: Lab, what: str, value: float, target: float, unit: str = "x") -> None:
    verdict = "met" if value >= target else "SHORT"
    judged: Row = {} if lab.dry else {"target": target, "met": value >= target}
    line = (
        f"{what}: {value:.3g}{unit}, target {target:g}{unit}: "
        f"{'sizes too small to judge' if lab.dry else verdict}"
    )
    lab.row(line, what=what, value=value, **judged)


def e8_experts(lab: Lab) -> None:
    """The experts' moments in one launch against our dense kernel and a loop over the experts."""
    experts, d, rows = lab.sizes.mixture
    for routing, weights in (("even", "none"), ("even", "gates"), ("uneven", "gates")):
        if lab.left() < 0:
            return lab.row(f"time is up before {routing} routing with {weights}")
        values = {"experts": experts, "d": d, "rows": rows, "dtype": "bf16"}
        found = _bench(
            lab,
            "grouped",
            grouped.OPERATION,
            {**values, "routing": routing, "weights": weights},
            ["ours", "ours-stream", "dense", "torch"],
        )
        for peer, target in (("dense", 0.9), ("torch", 5.0)):
            if "ms" in found["ours"] and "ms" in found[peer]:
                ratio = found[peer]["ms"]["p50"] / found["ours"]["ms"]["p50"]
                _target(lab, f"{routing} routing, weights {weights}, over {peer}", ratio, target)


def e4_lowrank(lab: Lab) -> None:
    """Low-rank updates of a bf16 weight against copy bandwidth and torch's composition."""
    rows, d = lab.sizes.update
    for rank in lab.sizes.ranks:
        values = {"rows": rows, "d": d, "rank": rank, "dtype": "bf16", "rounding": "nearest"}
        found = _bench(
            lab,
            "lowrank",
            bench_lowrank.OPERATION,
            values,
            ["ours", "ours-kernel", "torch", "rome"],
        )
        for provider in ("ours", "ours-kernel"):
            if "copy_percent" in found[provider]:
                _target(
                    lab,
                    f"{provider}, rank {rank}, of copy bandwidth",
                    found[provider]["copy_percent"],
                    85,
                    "%",
                )
        if (predicted := lab.predicted("update")) and "ms" in found["ours"]:
            lab.row(
                f"{found['ours']['ms']['p50'] * 1e3:.0f} us (predicted {predicted * 1e6:.0f})",
                predicted=predicted,
            )


def e5_target_loss(lab: Lab) -> None:
    """The target loss, forward and backward, against full logits in float32 and in the model's
    dtype.
    """
    rows, d, vocabulary = lab.sizes.head
    values = {"rows": rows, "d": d, "vocabulary": vocabulary, "dtype": "bf16"}
    found = _bench(lab, "target_loss", bench_loss.OPERATION, values, ["ours", "torch", "rome"])
    if (predicted := lab.predicted("loss")) and "ms" in found["ours"]:
        lab.row(
            f"{found['ours']['ms']['p50']:.3g} ms (predicted {predicted * 1e3:g})",
            predicted=predicted,
        )


def e6_counters(lab: Lab) -> None:
    """Hardware counters of the best way from Nsight Compute, where it is installed and allowed."""
    d = lab.sizes.dims[-1]
    way = lab.best.get(d, lab.ways()[0])
    if lab.dry:
        profile(d, way.variant, asdict(way.config), lab.sizes.tokens, "cpu")
        return lab.row("ncu: not run, there is no GPU")
    if (ncu := shutil.which("ncu")) is None:
        return lab.row("ncu is not installed: no counters")
    program = (
        f"from benchmarks.gpu_experiments import profile; profile({d}, {way.variant!r}, "
        f"{asdict(way.config)!r})"
    )
    command = [
        ncu,
        "--csv",
        "--launch-skip",
        "1",
        "--launch-count",
        "1",
        "--kernel-name",
        "regex:second_moment|syrk",
        "--section",
        "SpeedOfLight",
        "--section",
        "MemoryWorkloadAnalysis",
        "--section",
        "Occupancy",
        sys.executable,
        "-c",
        program,
    ]
    try:
        done = subprocess.run(
            command,
            cwd=common.HERE.parent,
            capture_output=True,
            text=True,
            timeout=max(lab.left(), 1),
        )
    except subprocess.TimeoutExpired:
        return lab.row("ncu: no result within the time")
    if counters := counters_of(done.stdout):
        said = "\n    ".join(f"{name}: {value}" for name, value in counters.items())
        return lab.row(
            f"d = {d}, {way.name}, shared memory predicted near 75% of its bandwidth\n    {said}",
            counters=counters,
        )
    lab.row(f"ncu gave no counters: {' '.join((done.stdout + done.stderr).split())[-400:]}")


def counters_of(text: str) -> dict[str, str]:
    """Metric -> "value unit" from ncu's comma-separated output, whatever the program printed around
    it.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(lines[first:])
    return {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row.get("Metric Name")
    }


def profile(
    d: int, variant: str, config: dict[str, Any], tokens: int = LAUNCH, device: str = "cuda"
) -> None:
    """Three launches for a profiler."""
    if variant == "cuda" and device == "cuda" and (reason := _native_cuda.load().reason):
        raise RuntimeError(reason)
    way = Way("profiled", variant, schedule.Config(**config))
    keys = moments.gated_keys(tokens, d, torch.device(device)).bfloat16()
    c = torch.zeros(d, d, dtype=torch.float64, device=device)
    for _ in range(3):
        way.add_(c, keys)
    timing.synchronise(keys.device)


def e7_peers(lab: Lab) -> None:
    """Ours against torch's best composition, ROME's float32, quack and cuBLAS; the issue's targets
    at d = 14336.
    """
    names = ["ours", "ours-stream", "ours-tuned", "torch", "rome", "quack", "cublas"]
    for d in reversed(lab.sizes.dims):  # the targets' size first
        if lab.left() < 0:
            return lab.row(f"time is up before d = {d}")
        best = lab.best.get(d, lab.ways()[0])
        tuned = Provider(f"the fastest of E2: {best.name}", partial(_tuned, best))
        operation = replace(
            moments.OPERATION, providers={**moments.OPERATION.providers, "ours-tuned": tuned}
        )
        values = {"d": d, "tokens": lab.sizes.tokens, "dtype": "bf16", "precision": "exact"}
        rows = _bench(lab, "moments", operation, values, names, energy=0 if lab.dry else 2)
        for name in ("ours", "ours-tuned", "torch", "rome"):
            if (
                predicted := (lab.predicted("ours" if name == "ours-tuned" else name) or {}).get(d)
            ) and "ms" in rows[name]:
                per_million = rows[name]["ms"]["p50"] * 1e3 / lab.sizes.tokens
                line = (
                    f"d = {d}, {name}: {per_million:.4f} s per 10^6 tokens (predicted {predicted})"
                )
                lab.row(
                    line, d=d, provider=name, seconds_per_million=per_million, predicted=predicted
                )
        if d == lab.sizes.dims[-1]:
            _targets(lab, rows)


def _tuned(way: Way, inputs: moments.Inputs) -> Callable[[], torch.Tensor]:
    d = inputs.keys.shape[1]
    c = torch.zeros(d, d, dtype=torch.float64, device=inputs.keys.device)

    def run() -> torch.Tensor:
        way.sum_(c, inputs.keys)
        return c

    return run


def _targets(lab: Lab, rows: dict[str, Row]) -> None:
    """Issue targets; only rows within their accuracy budget have a ratio."""
    for name in ("ours", "ours-tuned"):
        if rows[name]["status"] != "ok":
            continue
        for peer, target in (("torch", 1.7), ("rome", 20.0)):
            if rows[peer]["status"] == "ok":
                _target(
                    lab,
                    f"{name} over {peer}",
                    rows[peer]["ms"]["p50"] / rows[name]["ms"]["p50"],
                    target,
                )
        _target(
            lab,
            f"{name}, useful share of the measured bf16 peak",
            rows[name]["peak_percent"],
            60,
            "%",
        )
        if rows["rome"].get("errors"):
            mine, theirs = (rows[key]["errors"]["normwise"][0] for key in (name, "rome"))
            line = (
                f"{name}: normwise error {mine:.1e}, ROME's float32 {theirs:.1e} (target: no "
                f"larger)"
            )
            lab.row(line, red=not mine <= theirs and not lab.dry, errors=[mine, theirs])


def tuned_table(lab: Lab) -> str:
    """The file that `knowedit_kernels.moments.tuned` reads."""
    measured = {
        "device": lab.name,
        "torch": torch.__version__,
        "date": lab.report.rows[0]["environment"]["date"],
    }
    return json.dumps({**measured, "second_moment": lab.tuned}, indent=1) + "\n"
