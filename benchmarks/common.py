"""Shared by the benchmarks: environment header, interleaved timing, accuracy budgets, and JSON
lines of results.

A speed-up is the median over rounds of (baseline's seconds / ours) *within* a round: both run
alternately, so a machine that slows down for a while slows both. A row that misses its accuracy
budget prints no speed-up and fails the run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from knowedit.edits.edit import Edit
from knowedit.edits.measured import Measured, measure
from knowedit.errors import KnowEditError
from knowedit.evaluation.evaluation import Estimates
from knowedit.facts.fact import Fact
from knowedit.io.files import atomic_file
from knowedit.methods import base
from knowedit.methods.base import Method
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
#: Public data beside the checkout, where a developer keeps it.
DATA = HERE.parents[1] / "shared" / "data"
if DATA.is_dir():
    os.environ.setdefault("KNOWEDIT_DATA", str(DATA))


def environment() -> dict[str, Any]:
    """What a reader needs to judge the figures: machine, load, versions, date."""
    versions = {}
    for name in ("torch", "transformers", "triton", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    commit = ""
    if shutil.which("git"):
        describe = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(
            describe, cwd=HERE, capture_output=True, text=True, check=False
        ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16": "avx512_bf16" in _cpu_info("flags"),
        "python": platform.python_version(),
        **versions,
        "commit": commit or "unknown",
    }


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next(
        (
            line.partition(":")[2].strip()
            for line in lines
            if line.partition(":")[0].strip() == field
        ),
        "",
    )


def _cpu_name() -> str:
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    family, model = _cpu_info("cpu family"), _cpu_info("model")
    return f"{name} (family {family}, model {model})" if family else name


def _cpu_seconds() -> tuple[float, float, float]:
    """Now: wall clock, processor seconds of the whole machine (stolen ones included), and those of
    this process.
    """
    try:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(
            int, Path("/proc/stat").read_text().split()[1:9]
        )
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        busy = math.nan
    mine = os.times()
    return time.monotonic(), busy, mine.user + mine.system


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    least: float = 0.05,
    warm: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call of each run, one list entry a round; every round times all of them, in
    alternating order.

    The first call of each is not timed (caches, lazy initialisation); short runs are repeated
    within a round until they take `least` seconds. Runs of many seconds give a short `warm` to call
    instead, and are called once a round. `clock`: what counts as time.
    """
    calls = dict.fromkeys(runs, 1)
    if warm is not None:
        warm()
    for name, run in runs.items() if warm is None else ():
        start = clock()
        run()
        calls[name] = max(1, math.ceil(least / max(clock() - start, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs) if turn % 2 == 0 else reversed(list(runs)):
            start = clock()
            for _ in range(calls[name]):
                runs[name]()
            seconds[name].append((clock() - start) / calls[name])
    return seconds


@dataclass(frozen=True)
class Check:
    """One measured error and the most it may be; NaN is too much."""

    name: str
    value: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1e} ({'<=' if self.ok else 'OVER'} {self.limit:.0e})"


def processor_time() -> Callable[[], float]:
    """The clock for work that stays in this process: with one thread the processor time, from which
    other programs take less than from the time on the wall; with several the latter.
    """
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """||result - reference|| / ||reference|| in float64."""
    reference = reference.double()
    return float((result.double() - reference).norm() / reference.norm())


def flat(table: Estimates) -> dict[str, dict[str, float]]:
    """`{kind: {measure: Estimate}}` as a row has it, `{"kind measure": {"mean", "low", ...}}`."""
    return {f"{k} {m}": asdict(e) for k, row in table.items() for m, e in row.items()}


def read(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of the results file called `name`."""
    return read_file(folder / f"{name}.jsonl")


def read_all(folder: Path, name: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The same of every processor that `name` was measured on: `NAME.jsonl`, then
    `NAME.PROCESSOR.jsonl`. Empty where there is none.
    """
    paths = [folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}.*.jsonl"))]
    return [read_file(path) for path in paths if path.is_file()]


def of_this_processor(path: Path) -> Path:
    """`path`; or, where that has what another processor did, the one beside it that is named after
    this one.
    """
    here = _cpu_name()
    if not path.is_file() or read_file(path)[0]["environment"]["cpu"] == here:
        return path
    plain = re.sub(r"[^a-z0-9]+", "-", here.lower().replace("(r)", "")).strip("-")
    return path.with_suffix(f".{plain}{path.suffix}")


def read_file(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a results file."""
    header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return header, rows


def timed_edit(
    method: Method, model: EditableModel, facts: Sequence[Fact], statistics: KeyStatistics | None
) -> tuple[Edit, float, float]:
    """The edit, the CPU seconds of the whole call, and how many of them were the look at the edited
    model that every method takes.
    """
    look = 0.0

    def measured(*given: Any) -> Measured:
        nonlocal look
        start = time.process_time()
        found = measure(*given)
        look += time.process_time() - start
        return found

    with mock.patch.object(base, "measure", measured):
        start = time.process_time()
        edit = method.compute(model, facts, statistics, progress=False)
        return edit, time.process_time() - start, look


def found_in(model: EditableModel, fact: Fact) -> bool:
    """Whether the subject ends where a token does, so that the fact can be written."""
    try:
        return model.row(fact.prompt, fact.subject) is not None
    except KnowEditError:
        return False


def of_model(name: str, model: str | None) -> str:
    """How the results of the benchmark `name` on `model` are called; None: its usual model."""
    return f"{name}_{model}" if model else name


def measured_on(header: Mapping[str, Any]) -> str:
    """Where and when a results file was measured, in one sentence."""
    machine = header["environment"]
    return (
        f"`python -m benchmarks.{header['benchmark']}`: {machine['cpu']}, {machine['cores']} "
        f"cores, torch {machine['torch']}, {machine['date'][:10]}."
    )


def measured_each(header: Mapping[str, Any], rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """`measured_on` of rows, each with what the table calls it, that may have been measured on
    several machines: those with an `environment` of their own elsewhere than the header says. A
    paragraph a machine; on one alone no row is named.
    """
    where: dict[str, dict[str, None]] = {}
    for name, row in rows:
        machine = row.get("environment", header["environment"])
        where.setdefault(measured_on({**header, "environment": machine}), {})[name] = None
    if len(where) == 1:
        return next(iter(where))
    return "\n\n".join(f"{'; '.join(names)}: {machine}" for machine, names in where.items())


def percent(value: float | None) -> str:
    """A share in whole percent; empty where there is none."""
    return "" if value is None else f"{100 * value:.0f}"


class Report:
    """Collects rows, prints them as they come, and keeps the JSON-lines file (environment first) up
    to date.

    Args:
        name: of the benchmark; also of its file in `results/`.
        output: another file; None writes nothing.
    """

    def __init__(self, name: str, output: Path | None, **header: Any) -> None:
        self.output, self.failed, self._before = output, False, _cpu_seconds()
        self.rows: list[dict[str, Any]] = [
            {"benchmark": name, "environment": environment(), **header}
        ]
        machine = self.rows[0]["environment"]
        print(
            f"{name}: {machine['cpu']}, {machine['cores']} cores, load {machine['load']}, torch "
            f"{machine['torch']}, "
            f"{machine['date']}, commit {machine['commit']}"
        )

    def compare(
        self,
        case: str,
        seconds: Mapping[str, Sequence[float]],
        baseline: str,
        checks: Sequence[Check],
        *,
        ours: str = "ours",
        target: float | None = None,
        control: bool = False,
        **details: Any,
    ) -> None:
        """A row: `ours` against `baseline`. A `control` is a wrong way whose checks must fail, or
        the run does.
        """
        ok = all(check.ok for check in checks)
        self.failed |= ok if control else not ok
        ratios = [b / o for b, o in zip(seconds[baseline], seconds[ours])]
        row = {
            "case": case,
            "threads": torch.get_num_threads(),
            "provider": ours,
            "baseline": baseline,
            "seconds": statistics.median(seconds[ours]),
            "baseline_seconds": statistics.median(seconds[baseline]),
            "rounds": len(ratios),
            "checks": [{**asdict(c), "ok": c.ok} for c in checks],
            "accurate": ok,
        }
        if ok:
            row["speedup"], row["spread"] = statistics.median(ratios), [min(ratios), max(ratios)]
        if target is not None:
            row["target"] = target
        if control:
            row["control"] = True
        self._add({**row, **details}, _verdict(row))

    def floor(self, case: str, measure: str, value: float, floor: float, **details: Any) -> None:
        """A quality row: `value` must reach `floor`."""
        ok = value >= floor - 1e-12
        self.failed |= not ok
        row = {
            "case": case,
            "measure": measure,
            "value": value,
            "floor": floor,
            "reached": ok,
            **details,
        }
        between = f" [{details['low']:.3f}, {details['high']:.3f}]" if "low" in details else ""
        self._add(
            row,
            f"{case:24} {measure:24} {value:.3f}{between}  floor {floor:.3f}  "
            f"{'pass' if ok else 'FAIL'}",
        )

    def note(self, line: str, **row: Any) -> None:
        """A row without a verdict."""
        self._add(row, line)

    def finish(self) -> int:
        """The exit code."""
        if self.failed:
            print("FAILED: a row misses its accuracy budget, its floor, or a control passed")
        return int(self.failed)

    def _add(self, row: dict[str, Any], line: str) -> None:
        self.rows.append({**row, "others": self._others()})
        print(line, flush=True)
        if self.output is not None:
            with atomic_file(self.output) as path:
                path.write_text("".join(json.dumps(r) + "\n" for r in self.rows), encoding="utf-8")

    def _others(self) -> float | None:
        """Share of the machine's processors that other programs used since the last row: above 0.1,
        measure again.
        """
        before, self._before = self._before, _cpu_seconds()
        wall, busy, mine = (now - then for now, then in zip(self._before, before))
        share = (busy - mine) / max(wall, 0.05) / (os.cpu_count() or 1)
        return None if math.isnan(share) else round(max(share, 0.0), 3)


def _verdict(row: Mapping[str, Any]) -> str:
    times = (
        f"{row['provider']} {row['seconds'] * 1e3:.3g} ms, {row['baseline']} "
        f"{row['baseline_seconds'] * 1e3:.3g} ms"
    )
    errors = "; ".join(str(Check(c["name"], c["value"], c["limit"])) for c in row["checks"])
    if not row["accurate"]:
        gain = "rejected, as it must be" if row.get("control") else "MISSES ITS ACCURACY BUDGET"
    else:
        low, high = row["spread"]
        gain = f"{row['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
        if "target" in row:
            gain += (
                f" (target {row['target']:g}x: "
                f"{'met' if row['speedup'] >= row['target'] else 'SHORT'})"
            )
    return f"{row['case']:44} {row['threads']} thr  {gain}  {times}  {errors}"


#: How the help of a repeatable option begins; its default follows.
REPEATED = "repeatable (default:"


class Repeated(argparse.Action):
    """An option with one value that may be given several times: the list of what was given, which
    replaces the default.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: Any,
        option: str | None = None,
    ) -> None:
        so_far = getattr(namespace, self.dest)
        kept = [] if so_far is self.default else so_far
        setattr(namespace, self.dest, [*kept, value])


def parser(
    name: str, description: str | None, repeats: int, *, timed: bool = True
) -> argparse.ArgumentParser:
    """The arguments every script has."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that it runs; writes no results file",
    )
    made.add_argument(
        "--output", type=Path, help=f"results file (default: benchmarks/results/{name}.jsonl)"
    )
    if timed:
        made.add_argument(
            "--threads", action=Repeated, type=int, default=[1, 2], help=f"{REPEATED} 1, 2)"
        )
        made.add_argument(
            "--repeats", type=int, default=repeats, help=f"timed rounds (default: {repeats})"
        )
    return made


def report(
    name: str,
    arguments: argparse.Namespace,
    *,
    by_processor: bool = False,
    of: str | None = None,
    **header: Any,
) -> Report:
    """The report a parsed command line asks for; `by_processor`: other processors' results stay;
    `of`: a model that has a file of its own.
    """
    default = None if arguments.quick else RESULTS / f"{of_model(name, of)}.jsonl"
    if default and by_processor:
        default = of_this_processor(default)
    return Report(name, arguments.output or default, **header)
