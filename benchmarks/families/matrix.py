"""Runs the checks on families, a process for each share of them, and collects a row a family."""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowedit.errors import KnowEditError

if TYPE_CHECKING:  # a process that only collects rows imports no model
    from benchmarks.families.checks import Bench, Check

#: CPU seconds that a family may take: a wall clock would count what else the machine does.
LIMIT = 120

#: Folders of one run, which mean nothing in a table.
FOLDER = re.compile(re.escape(tempfile.gettempdir()) + r"/\w+/")

#: Checks of what a format of others can hold: one that it cannot is refused, which is right.
EXPORTS = ("adapter",)

#: Checks that compute nothing that is float32 by itself, as edits are.
READING = ("keys", "head", "score", "replay", "statistics")

#: What can become of a family, and what a table says of it.
VERDICTS = {
    "right": "every check holds",
    "right but peft": "peft cannot hold the adapter, which is refused; every other check holds",
    "partly": "what is not refused holds",
    "wrong": "a check fails",
    "refused": "refused when it is opened",
    "not built": "no model could be made of it here",
}


def family(kind: str) -> dict[str, Any]:
    """The row of one family: `verdict`, `why`, and by check a `figure`, `refused` or `error`."""
    from benchmarks.families import models
    from benchmarks.families.checks import CHECKS, Bench

    start = time.process_time()
    row: dict[str, Any] = {"kind": kind, "checks": {}}
    try:
        models.build(kind)
    except Exception as error:  # whatever a configuration class or a model raises
        return row | {"verdict": "not built", "why": _said(error)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            bench = Bench(kind, Path(folder))
        except KnowEditError as error:
            return row | {"verdict": "refused", "why": _said(error)}
        except Exception as error:
            return row | {"verdict": "wrong", "why": _said(error)}
        for name, check in CHECKS.items():
            row["checks"][name] = _checked(name, check, bench)
    outcomes = row["checks"].values()
    bad = any("error" in outcome for outcome in outcomes)
    refused = {name for name, outcome in row["checks"].items() if "refused" in outcome}
    held = "partly" if refused - {*EXPORTS} else "right but peft" if refused else "right"
    row["verdict"] = "wrong" if bad else held
    return row | {"seconds": round(time.process_time() - start, 1)}


def _checked(name: str, check: Check, bench: Bench) -> dict[str, Any]:
    """What a check says in float32; where it only reads the model and is off, in float64 with the
    same limit (`float32`: what it was before). What is wrong stays so, and what the model itself
    rounds is gone: some random ones amplify it to 1e-4.
    """
    outcome = _outcome(lambda: check.run(bench), check.limit)
    if "off" in outcome and name in READING:
        again = _outcome(lambda: check.run(bench.wide), check.limit)
        if "figure" in again:
            return {**again, "float32": outcome["off"]}
    return outcome


def _outcome(run: Callable[[], float], limit: float) -> dict[str, Any]:
    try:
        figure = run()
    except TimeoutError:
        raise
    except KnowEditError as error:
        return {"refused": _said(error)}
    except Exception as error:
        return {"error": _said(error)}
    if figure <= limit:
        return {"figure": float(f"{figure:.1e}")}
    off = float(f"{figure:.1e}")
    return {"error": f"off by {off:.1e}, more than {limit:.0e}", "off": off}


def _said(error: Exception) -> str:
    """What an error says, in one line; of one that is not ours, its class and where it was raised
    as well.
    """
    text = " ".join(FOLDER.sub("", str(error)).split())[:300]
    if isinstance(error, KnowEditError):
        return text
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"


def timed(kind: str) -> dict[str, Any]:
    """`family`, which counts as wrong when it takes too long."""

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        return family(kind)
    except TimeoutError:
        why = f"it took more than {LIMIT} CPU seconds"
        return {"kind": kind, "checks": {}, "verdict": "wrong", "why": why}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def quiet() -> None:
    """One thread a process, and nothing printed by what is checked."""
    import torch
    from transformers.utils import logging as theirs

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()


def rows(kinds: Sequence[str], jobs: int) -> Iterator[dict[str, Any]]:
    """The row of each family, as it is done."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, get_context("spawn"), quiet) as pool:
        for done in as_completed([pool.submit(timed, kind) for kind in kinds]):
            yield done.result()
