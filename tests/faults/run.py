"""`make faults`: many inputs, sequences, kills and full disks, and a file that says how many of
each were tried and what came of them.

    python -m tests.faults.run --kills 1000 --fills 250 --inputs 1000000 --sequences 10000

Every try is decided by the seed and its number. The file is written on the way, and a run goes on
after what it says was tried, once it has made again what failed; it says how many were tried at
which commit. `--again` begins anew with the parts that are named.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from knowedit_kernels.bench.machine import cpu_name
from tests.faults.fuzzing import Inputs
from tests.faults.kills import Fills, Kills
from tests.faults.sequences import Sequences
from tests.faults.tally import Tally

RESULT = Path(__file__).with_name("result.json")
PACKAGES = ("knowedit-kernels", "torch", "transformers", "safetensors", "numpy", "pyarrow")
OFTEN = 20.0  # seconds between two writings of the result


class Part(Protocol):
    """Tries of one kind."""

    def try_one(self, number: int, seed: int, tally: Tally) -> None:
        """The try of that number; what comes of it is counted."""

    def close(self) -> None:
        """Leave nothing behind."""


PARTS: dict[str, Callable[[Path], Part]] = {
    "kills": Kills, "fills": Fills, "sequences": Sequences, "inputs": Inputs
}  # fmt: skip


def main() -> int:
    """Run the parts; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in PARTS:
        parser.add_argument(f"--{name}", type=int, default=0, help="how many in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="forget what was tried before")
    parser.add_argument("--minutes", type=float, default=1e6, help="a part ends after so many")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    for which in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(which, signal.default_int_handler)
    failed = False
    for name, part in PARTS.items():
        if count := getattr(given, name):
            tally = Tally() if given.again else _read(given.output).get(name, Tally())
            with tempfile.TemporaryDirectory(dir=_fast()) as folder:
                _try(name, part(Path(folder)), count, tally, given)
            print(f"{name}: {tally.tried} tried; {tally.outcomes['FAILED']} failed", flush=True)
            failed |= tally.outcomes["FAILED"] > 0
    return int(failed)


def _try(name: str, part: Part, count: int, tally: Tally, given: argparse.Namespace) -> None:
    """Try, and write the result on the way."""
    begun, used, until = time.monotonic(), _used(), time.monotonic() + 60 * given.minutes
    commit = _commit()

    def well(number: int) -> bool:
        before = tally.outcomes["FAILED"]
        part.try_one(number, given.seed, tally)
        ended = tally.outcomes["FAILED"] == before
        tally.commits[commit] += ended
        return ended

    try:
        for number, what in tally.forget().items():
            if well(int(number)):
                tally.mended[number] = what
            _write(given.output, name, tally, given.seed)
        while tally.tried < count and begun < until:
            well(tally.tried)
            tally.tried += 1
            if time.monotonic() - begun > OFTEN or tally.tried == count:
                tally.seconds += time.monotonic() - begun
                tally.cpu_seconds += _used() - used
                begun, used = time.monotonic(), _used()
                _write(given.output, name, tally, given.seed)
    finally:
        part.close()


def _commit() -> str:
    """The commit that is tried, with a plus where the tree has changes beside the result's."""
    git = ["git", "-C", str(RESULT.parent)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ":/", f":!{RESULT.name}"])
    return f"{head.stdout.strip() or 'unknown'}{'+' if changed.returncode else ''}"


def _used() -> float:
    """Seconds of processor time, of forks that have ended too."""
    every = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in every)


def _read(path: Path) -> dict[str, Tally]:
    known: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return {name: Tally.from_dict(record) for name, record in known.items()}


def _write(path: Path, name: str, tally: Tally, seed: int) -> None:
    tally.about |= {
        "seed": seed,
        "processor": cpu_name(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
    }
    found = {other: one.to_dict() for other, one in {**_read(path), name: tally}.items()}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")


def _fast() -> str | None:
    """A folder in memory, where there is one."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


if __name__ == "__main__":
    sys.exit(main())
