"""`make versions`: the package beside other versions of torch and transformers.

    python -m tests.versions [--pair 2.9.1:5.5.4 ...] [--with ENVIRONMENT ...] [--keep]

For each pair an environment of its own is made, the package is installed into it as a user would,
and the tests that meet torch and transformers run on what was installed, from a copy of the tests
that lies away from the sources. `--with` runs them in environments that exist, and installs
nothing but the package there. What came of each pair goes into `tests/versions.json`; the table is
printed. A CUDA build of torch takes 7 GB while its turn lasts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knowedit.io.tables import Table

HERE = Path(__file__).resolve().parent
RESULT = HERE / "versions.json"
#: The first is what EasyEdit pins, then what CI runs, then the newest.
PAIRS = ("2.9.1:5.5.4", "2.10.0:5.10.4", "2.11.0:5.15.1", "2.13.0:5.23.0", "2.15.0:5.24.0")
#: What meets torch and transformers: each kernel, and the hosts' functions on stand-ins.
TESTS = (
    "tests/kernels/test_imports.py",
    "tests/kernels/test_dispatch.py",
    "tests/kernels/test_moments.py",
    "tests/kernels/test_lowrank.py",
    "tests/kernels/test_ledger.py",
    "tests/kernels/test_solver.py",
    "tests/kernels/test_target_loss.py",
    "tests/kernels/test_jvp.py",
    "tests/knowedit/models/test_flat.py",
    "tests/knowedit/models/test_linear.py",
    "tests/knowedit/integrations",
)
TOOLS = ("pytest>=9", "pytest-timeout", "pytest-benchmark", "hypothesis")
PACKAGES = ("torch", "transformers", "numpy", "safetensors")
#: Printed by the environment itself: its versions, and which kernel of the CPU would run.
ABOUT = f"""
import json, platform
from importlib.metadata import version
from knowedit_kernels import _native
found = _native.load()
print(json.dumps({{
    "python": platform.python_version(),
    **{{name: version(name) for name in {PACKAGES}}},
    "compiled": found.reason is None,
    "reason": found.reason,
}}))
"""


class Environment:
    """A virtual environment.

    Args:
        folder: where it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"

    def install(self, *what: str) -> None:
        """By pip; raises CalledProcessError with what pip said on standard error."""
        command = [self.python, "-m", "pip", "install", "--quiet", "--no-compile", *what]
        subprocess.run(command, check=True)

    def about(self) -> dict[str, Any]:
        """Versions of what is installed, and whether the compiled kernels load."""
        return dict(json.loads(self._said(["-c", ABOUT]).splitlines()[-1]))

    def tested(self, tests: Sequence[str], folder: Path) -> dict[str, Any]:
        """Counts of pytest's last line, and the names of what failed."""
        said = self._said(["-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], folder)
        counts = counts_of(said)
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        return {**counts, "names": failed, **({} if counts else {"said": said[-900:]})}

    def _said(self, arguments: Sequence[str], folder: Path | None = None) -> str:
        """What a run printed, in `folder` or away from the sources; one thread."""
        with tempfile.TemporaryDirectory() as empty:
            environment = {
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            }
            command = [str(self.python), *arguments]
            done = subprocess.run(
                command, cwd=folder or empty, env=environment, text=True, capture_output=True
            )
        return done.stdout or done.stderr


def counts_of(said: str) -> dict[str, int]:
    """`{"passed": 12, "failed": 1}` of "... 1 failed, 12 passed in 3.1s"."""
    last = said.strip().splitlines()[-1:]
    return {
        what: int(number)
        for number, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", "".join(last))
    }


def wheel(folder: Path) -> str:
    """The package as it is installed, made once for all environments."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder]
    subprocess.run([*command, HERE.parent], check=True)
    (found,) = folder.glob("*.whl")
    return str(found)


def copied(folder: Path) -> Path:
    """A folder with the tests and pytest's settings, and none of the sources."""
    shutil.copytree(HERE, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE.parent / "pyproject.toml", folder)
    return folder


def made(pair: str, package: str, folder: Path) -> Environment:
    """A fresh environment of the pair "TORCH:TRANSFORMERS" with the package and test tools."""
    torch, transformers = pair.split(":")
    venv.create(folder, with_pip=True, clear=True)
    found = Environment(folder)
    found.install(f"torch=={torch}", f"transformers=={transformers}", f"{package}[edit]", *TOOLS)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, one line a pair of versions, the oldest torch first."""
    heads = ["torch", "transformers", "numpy", "kernels of the CPU", "passed", "skipped", "failed"]
    lines = [
        [
            row["torch"],
            row["transformers"],
            row["numpy"],
            "compiled" if row["compiled"] else "torch's",
            str(row.get("passed", 0)),
            str(row.get("skipped", 0)),
            ", ".join(row["names"]) or str(row.get("failed", 0)),
        ]
        for row in sorted(rows, key=lambda row: numbers(row["torch"]))
    ]
    return Table(heads, lines).markdown()


def numbers(version: str) -> list[int]:
    """`[2, 13, 0]` of "2.13.0+cpu", for sorting."""
    return [int(part) for part in version.partition("+")[0].split(".")]


def main() -> int:
    """Test each pair; 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pair", action="append", help="TORCH:TRANSFORMERS, may be repeated")
    parser.add_argument("--with", action="append", type=Path, dest="existing", help="a folder")
    parser.add_argument("--keep", action="store_true", help="the environments that are made")
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    pairs = given.pair or ([] if given.existing else PAIRS)
    place = Path(tempfile.mkdtemp(prefix="versions"))
    package, tests = wheel(place / "wheel"), copied(place / "copy")
    known = json.loads(given.output.read_text("utf-8")) if given.output.exists() else []

    def test(environment: Environment) -> None:
        row = {**environment.about(), **environment.tested(given.tests, tests)}
        known[:] = [one for one in known if one["torch"] != row["torch"]] + [row]
        known.sort(key=lambda one: numbers(one["torch"]))
        given.output.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
        print(json.dumps(row), flush=True)

    try:
        for folder in given.existing or ():
            environment = Environment(folder)
            environment.install("--no-deps", "--force-reinstall", package)
            test(environment)
        for pair in pairs:
            folder = place / pair.replace(":", "-")
            test(made(pair, package, folder))
            if not given.keep:
                shutil.rmtree(folder)
    finally:
        if not given.keep:
            shutil.rmtree(place, ignore_errors=True)
    print(table(known))
    return int(any(row.get("failed") or row.get("errors") or "said" in row for row in known))


if __name__ == "__main__":
    sys.exit(main())
