"""Key statistics at scale: time is linear in tokens, memory does not grow with them, two processes
share the work.

Every figure is from a process of its own (under torchrun for two), with one thread each: seconds of
the collection alone, without loading, and the peak of resident memory. What the machine itself
allows two processes is measured beside: two that collect the same each, and share nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from knowedit.cli.options import parse_layers
from knowedit.facts.sets import data_dir
from knowedit.io.ranks import started
from knowedit.models.load import load_model
from knowedit.statistics import key_statistics
from knowedit.statistics.memory import keep_few_compiled_shapes

from . import common
from .statistics import CORPUS

ROOT = Path(__file__).resolve().parent.parent
LINEAR = 0.85  # tokens a second at the fewest tokens over those at the most (start-up costs count)
FLAT = 0.95  # peak memory at the fewest tokens over that at the most
SHARED = 1.8  # speed of two processes over that of one


def worker(model: str, corpus: str, layers: Sequence[int], tokens: int, dtype: str) -> None:
    """Collect once and print what it took, as JSON; one or several ranks."""
    torch.set_num_threads(1)
    keep_few_compiled_shapes()  # as the command does
    with started() as ranks, tempfile.TemporaryDirectory() as folder:
        shared = ranks.gather(folder)[0]
        loaded = load_model(model, dtype=dtype, say=lambda _: None)
        assert loaded.fingerprint
        warm = Path(shared) / "warm"
        key_statistics(loaded, layers, corpus, min(tokens, 200), directory=warm, progress=False)
        ranks.gather(None)
        start = time.perf_counter()
        found = key_statistics(
            loaded, layers, corpus, tokens, directory=Path(shared) / "run", progress=False
        )
        seconds = ranks.gather(time.perf_counter() - start)
        peaks = ranks.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        if ranks.rank == 0:
            count = found[layers[0]].count
            print(
                json.dumps(
                    {
                        "tokens": count,
                        "seconds": max(seconds),
                        "megabytes": max(peaks),
                        "ranks": ranks.size,
                    }
                )
            )


def run(
    ranks: int,
    model: str | Path,
    corpus: Path,
    layers: Sequence[int],
    tokens: int,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What `worker` prints, from `ranks` new processes of one thread each."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "KNOWEDIT_CACHE": os.environ.get("KNOWEDIT_CACHE")
            or str(Path.home() / ".cache" / "knowedit"),
        }
        command = [
            *launcher,
            "benchmarks.scaling",
            "--worker",
            "--model",
            str(model),
            "--corpus",
            str(corpus),
            "--dtype",
            dtype,
            "--tokens",
            str(tokens),
            *(word for layer in layers for word in ("--layer", str(layer))),
        ]
        environment["TMPDIR"] = cache
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("scaling", __doc__, 3, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--layer", action=common.Repeated, default=["4-8"], help="a number or a range"
    )
    parser.add_argument(
        "--tokens", action=common.Repeated, type=int, default=[10_000, 40_000, 160_000, 640_000]
    )
    parser.add_argument(
        "--shared", type=int, default=320_000, help="tokens for two processes against one"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds of two processes against one (default: 3)"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    model, layers, dtype = arguments.model, parse_layers(arguments.layer) or (), arguments.dtype
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    if arguments.worker:
        worker(model, str(corpus), layers, arguments.tokens[0], dtype)
        return 0
    counts, shared, repeats = arguments.tokens, arguments.shared, arguments.repeats
    if arguments.quick:
        counts, shared, repeats = [500, 2000], 2000, 1
    report = common.report(
        "scaling", arguments, model=str(model), corpus=corpus.name, layers=layers, dtype=dtype
    )
    found = []
    for tokens in counts:
        found.append(run(1, model, corpus, layers, tokens, dtype))
        speed = found[-1]["tokens"] / found[-1]["seconds"]
        line = (
            f"{tokens:>9,} tokens  {found[-1]['seconds']:8.1f} s  {speed:8.0f} tokens/s  "
            f"{found[-1]['megabytes']:7.0f} MB"
        )
        report.note(line, case="one process", speed=speed, **found[-1])
    few, many = found[0], found[-1]
    speeds = [f["tokens"] / f["seconds"] for f in found]
    floors = (0.0, 0.0) if arguments.quick else (LINEAR, FLAT)
    span = f"{few['tokens']:,} to {many['tokens']:,} tokens"
    report.floor("linear time", f"speed, {span}", speeds[0] / speeds[-1], floors[0])
    report.floor("flat memory", f"peak, {span}", few["megabytes"] / many["megabytes"], floors[1])
    for kind in dict.fromkeys((dtype, "float32")):
        ratios = []
        for _ in range(repeats):
            one, two = (run(ranks, model, corpus, layers, shared, kind) for ranks in (1, 2))
            with ThreadPoolExecutor(2) as pool:
                apart = list(
                    pool.map(
                        lambda _, kind=kind: run(1, model, corpus, layers, shared, kind), range(2)
                    )
                )
            ratios.append(one["seconds"] / two["seconds"])
            machine = 2 * one["seconds"] / max(found["seconds"] for found in apart)
            report.note(
                f"two processes, {kind}: {ratios[-1]:.2f}x; two that share nothing: {machine:.2f}x",
                case="two processes",
                dtype=kind,
                one=one,
                two=two,
                speedup=ratios[-1],
                machine=machine,
            )
        report.floor(
            "two processes",
            f"speed over one, {shared:,} tokens, {kind}",
            median(ratios),
            0.0 if arguments.quick else SHARED,
            low=min(ratios),
            high=max(ratios),
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
