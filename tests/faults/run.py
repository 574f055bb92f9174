"""`make faults`: many inputs, sequences and kills, and a file that says how many of each were tried
and what came of them.

    python -m tests.faults.run --inputs 1000000 --sequences 10000 --kills 1000

A part that is asked for replaces what the file says of it; the others stay.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from knowedit_kernels.bench.machine import cpu_name
from tests.faults import fuzzing, kills, sequences

RESULT = Path(__file__).with_name("result.json")
PACKAGES = ("knowedit-kernels", "torch", "transformers", "safetensors", "numpy", "pyarrow")
Part = Callable[[int, int, Path, float], dict[str, Any]]


def inputs(count: int, seed: int, folder: Path, until: float) -> dict[str, Any]:
    """So many damaged files."""
    found: Counter[str] = Counter()
    escaped: list[str] = []
    fuzzing.fuzz(count, seed, folder, found, escaped, until)
    outcomes = Counter({end: 0 for end in ("read", "refused", "ESCAPED")})
    for label, times in found.items():
        outcomes[label.rpartition(": ")[2]] += times
    return {
        "tried": sum(found.values()),
        **outcomes,
        "escaped": sorted(set(escaped)),
        "by reader": found,
    }


def undo_sequences(count: int, seed: int, folder: Path, until: float) -> dict[str, Any]:
    """So many sequences, on every layout in turn."""
    done: Counter[str] = Counter()
    failures: list[str] = []
    edits: dict[str, list[str]] = {}
    without: dict[str, dict[str, str]] = {}
    tokenizer = sequences.byte_tokenizer()
    share, states, tried = -(-count // len(sequences.LAYOUTS)), 0, 0
    for left, layout in zip(range(len(sequences.LAYOUTS), 0, -1), sequences.LAYOUTS):
        end = time.monotonic() + (until - time.monotonic()) / left
        model = sequences.model_of(layout, tokenizer)
        made, without[layout] = sequences.computed(model)
        bench = sequences.Workbench(model, [*made, *sequences.synthetic(model)])
        edits[layout] = [edit.method_name for edit in bench.edits]
        for number in range(share):
            if time.monotonic() > end:
                break
            tried += 1
            try:
                bench.run(random.Random(f"{seed} {layout} {number}"), folder / "edited")
            except Exception as error:
                failures.append(f"{layout} {number}: {type(error).__name__}: {error}"[:400])
                bench = sequences.Workbench(
                    sequences.model_of(layout, tokenizer), bench.edits
                )  # the other's weights may be anything
        done, states = done + bench.done, states + len(bench.states)
    return {
        "tried": tried,
        "steps": done,
        "different states": states,
        "failed": failures,
        "edits": edits,
        "not computed": without,
    }


def killed(count: int, seed: int, folder: Path, until: float) -> dict[str, Any]:
    """So many kills, and a quarter as many full disks."""
    return kills.many(count, seed, folder, until)


PARTS: dict[str, Part] = {"inputs": inputs, "sequences": undo_sequences, "kills": killed}


def main() -> int:
    """Run the parts; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for part in PARTS:
        parser.add_argument(f"--{part}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e6, help="a part ends after so many")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    failed = False
    for name, part in PARTS.items():
        if not (count := getattr(given, name)):
            continue
        until = time.monotonic() + 60 * given.minutes
        begun, used = time.perf_counter(), time.process_time()
        with tempfile.TemporaryDirectory(dir=_fast()) as folder:
            found = part(count, given.seed, Path(folder), until)
        found |= {
            "seed": given.seed,
            "seconds": round(time.perf_counter() - begun),
            "CPU seconds": round(time.process_time() - used),
            "processor": cpu_name(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
        }
        known = json.loads(given.output.read_text("utf-8")) if given.output.exists() else {}
        known[name] = found
        given.output.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")
        bad = found.get("escaped") or found.get("failed")
        print(f"{name}: {found['tried']} tried; {len(bad or ())} kinds of failures")
        failed |= bool(bad)
    return int(failed)


def _fast() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
