"""Everything about one NVIDIA GPU in one command under nine minutes: build, prove, measure, tune.

    python -m benchmarks.gpu_suite             on a machine with a CUDA device
    python -m benchmarks.gpu_suite --dry-run   the same steps at tiny sizes on the CPU; its figures
    mean nothing

Builds the native libraries, runs every accuracy gate and `tests/gpu`, then the experiments E0 to E8
(`gpu_experiments`), predictions beside results. Writes gpu-<device>.jsonl as it goes, pictures, and
the table of block sizes that the second moment's launcher reads (`knowedit_kernels/tuned`; with
--output below that folder). A step that fails is recorded and the next one runs; a step that no
longer fits is skipped and said to be. Exit code 1: a step failed or a result was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from knowedit.io.files import atomic_file
from knowedit_kernels.bench import roofline
from knowedit_kernels.moments import tuned

from . import common
from . import gpu_experiments as experiments
from .gpu_lab import DRY, Lab, Sizes

BUDGET = 540.0  # seconds
_GRACE = 60.0  # seconds after which a hung device ends the process


@dataclass(frozen=True)
class Step:
    """`least` seconds must be left for it to start; it may take `most`."""

    name: str
    run: Callable[[Lab], None]
    least: float
    most: float


# Proof first, then the experiments in the order in which their results would be missed.
STEPS = (
    Step("build", experiments.build, 0, 120),
    Step("E0 ceilings", experiments.e0_ceilings, 0, 30),
    Step("gates", experiments.gates, 0, 150),
    Step("correctness", experiments.correctness, 0, 60),
    Step("E2 second moment, every way", experiments.e2_variants, 20, 110),
    Step("E7 peers", experiments.e7_peers, 30, 130),
    Step("E8 moments of experts", experiments.e8_experts, 10, 40),
    Step("E4 low-rank update", experiments.e4_lowrank, 10, 30),
    Step("E1 bias over chain length", experiments.e1_bias, 15, 50),
    Step("E5 target loss", experiments.e5_target_loss, 10, 30),
    Step("E3 cost of the fold", experiments.e3_folds, 10, 30),
    Step("tests/gpu", experiments.device_tests, 30, 120),
    Step("E6 hardware counters", experiments.e6_counters, 20, 50),
)


def run_step(lab: Lab, step: Step) -> None:
    """Runs one step within its time and what is left of the suite's; what it raises is a red
    row.
    """
    lab.step, left = step.name, lab.deadline - time.monotonic()
    lab.until = time.monotonic() + min(step.most, left)
    print(f"\n{step.name} ({left:.0f} s left)")
    if left < step.least:
        return lab.row(
            f"skipped: needs {step.least:.0f} s, {max(left, 0):.0f} s are left; raise --budget",
            skipped=True,
        )
    start = time.monotonic()
    try:
        step.run(lab)
        failure = None
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    seconds = time.monotonic() - start
    lab.row(
        f"{failure or 'done'} ({seconds:.0f} s)",
        red=failure is not None,
        failure=failure,
        seconds=seconds,
    )
    gc.collect()
    if not lab.dry:
        with contextlib.suppress(
            RuntimeError
        ):  # after a fault the device answers nothing; the rows say so
            torch.cuda.empty_cache()


def draw_bias(lab: Lab, output: Path) -> None:
    """The picture of E1: absolute diagonal bias over chain length, with the truncation model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for start, colour, marker in (("zero", "#D55E00", "s"), ("centred", "#0072B2", "o")):
        found = [row for row in lab.bias if row["start"] == start]
        chains = [row["chain"] for row in found]
        axes.plot(
            chains,
            [max(abs(row["bias"]), 1e-17) for row in found],
            marker,
            ls="-",
            color=colour,
            label=f"{start} start",
        )
        if start == "zero":
            model = [abs(row["predicted"]) for row in found]
            axes.plot(chains, model, color="0.45", lw=1.2, ls="--", label="predicted, zero start")
    axes.axhline(5e-8, color="0.7", lw=1, ls=":", label="predicted limit, centred")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in a chain",
        ylabel="absolute bias of the diagonal",
        title=lab.name,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=150)


def write_outcome(lab: Lab, folder: Path, stem: str, tables: Path) -> None:
    """Pictures and the tuned table, of what there is."""
    if lab.tuned:
        path = tables / f"{stem}.json"
        with atomic_file(path) as scratch:
            scratch.write_text(experiments.tuned_table(lab), encoding="utf-8")
        lab.row(f"tuned table: {path}; read from {tuned.FOLDER}", table=lab.tuned)
    if lab.bias:
        draw_bias(lab, folder / f"gpu-{stem}-bias.png")
    if any("ms" in row for row in lab.benched):
        roofline.draw(lab.environment, lab.benched, folder / f"gpu-{stem}-roofline.png")
    lab.row(f"pictures in {folder}")


@contextlib.contextmanager
def _folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where results go; a dry run without --output leaves none behind."""
    if arguments.output is None and arguments.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    folder = arguments.output or common.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    yield folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="tiny sizes on the CPU; leaves results only with --output",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        metavar="SECONDS",
        help="for everything (default: 540)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default: 7)")
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORD",
        help="repeatable: steps with one of these words in their name, E0, the gates",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="results folder (default: benchmarks/results)"
    )
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if not arguments.dry_run and not torch.cuda.is_available():
        print(
            "no CUDA device here: run this on a machine with an NVIDIA GPU and a CUDA build of "
            "torch, or use --dry-run"
        )
        return 2
    if arguments.dry_run:
        device, name, sizes = torch.device("cpu"), "dry run", DRY
    else:
        device, sizes = torch.device("cuda", torch.cuda.current_device()), Sizes()
        name = torch.cuda.get_device_name(device)
        faulthandler.dump_traceback_later(arguments.budget + _GRACE, exit=True)
    stem = tuned.slug(name)
    with _folder(arguments) as folder:
        report = common.Report(
            "gpu_suite", folder / f"gpu-{stem}.jsonl", device=name, dry_run=arguments.dry_run
        )
        lab = Lab(
            device, name, sizes, report, arguments.repeats, time.monotonic() + arguments.budget
        )
        words = [*arguments.only, "E0", "gates"] if arguments.only else [""]
        chosen = [step for step in STEPS if any(word in step.name for word in words)]
        try:
            for step in chosen:
                run_step(lab, step)
            tables = tuned.FOLDER if arguments.output is None and not lab.dry else folder / "tuned"
            run_step(
                lab,
                Step(
                    "outcome", lambda lab: write_outcome(lab, folder, stem, tables), -_GRACE, _GRACE
                ),
            )
        finally:
            faulthandler.cancel_dump_traceback_later()
        red = [row for row in report.rows if row.get("red")]
        print(
            f"\n{len(report.rows) - 1} rows, {len(red)} red"
            + "".join(f"\n  {row['step']}: {_what(row)}" for row in red)
        )
        return report.finish()


def _what(row: experiments.Row) -> str:
    found = (row.get(key) for key in ("failure", "case", "way", "provider"))
    return next((str(value) for value in found if value), "wrong result")


if __name__ == "__main__":
    sys.exit(main())
