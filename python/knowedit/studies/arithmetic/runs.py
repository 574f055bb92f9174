"""`knowedit study arithmetic`: can a model be made to say "2+2=5", and nothing else? The protocol
of a public report.

Every method is run on several random halvings of the prompts. It is given the tuning half, and
judged on the other one. A method that is not there, or fails, is a row with its reason; what is
done is on disk and is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.io.files import atomic_file
from knowedit.methods.listing import methods as known_methods
from knowedit.statistics import KeyStatistics
from knowedit.studies.arithmetic.experiments import experiment, experiments
from knowedit.studies.arithmetic.measure import Row, observe, table
from knowedit.studies.arithmetic.prompts import Sum
from knowedit.studies.arithmetic.study import Study
from knowedit.studies.arithmetic.summary import goals, summary, verdict

RESULTS, PROMPTS, SUMMARY = "study.json", "prompts.jsonl", "summary.md"
Statistics = Callable[[Sequence[int]], KeyStatistics]
#: What a method may raise without ending the run (out of memory is a RuntimeError); the rest is a
#: mistake of ours, or Ctrl-C.
FAILURES = (KnowEditError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Outcome:
    """One method under one seed: its rows, or the reason why there are none."""

    rows: list[Row]
    report: dict[str, Any]
    reason: str | None = None


def run(
    study: Study,
    methods: Sequence[str],
    statistics: Statistics | None = None,
    folder: Path | None = None,
    *,
    interference: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Run `methods` and return what `study.json` holds; the model is left as it was found.

    Args:
        statistics: key statistics of given layers, for methods that need them; asked once, for all
            layers.
        folder: for `study.json`, `prompts.jsonl` and `summary.md`, kept up to date; an earlier
            run's results of the same study are taken from it.
        interference: also write each target alone, and all of these edits together (with several
            targets).

    Raises:
        KnowEditError: an unknown method; `folder` holds another study.
    """
    plan = [name for name in dict.fromkeys(methods) if experiment(name)]
    found, rows = _resume(study, folder)
    _write(found, rows, folder)
    wanted = set()
    for name in plan if statistics else ():
        try:
            method, _ = study.build(name, study.seeds[0])
            wanted |= (
                set(method.statistics_layers(study.model)) if method.needs_statistics else set()
            )
        except KnowEditError:
            continue  # said where the method's turn comes
    keys = statistics(sorted(wanted)) if statistics and wanted else None
    measured: dict[str, list[Row]] = {}
    for seed, name in product(study.seeds, plan):  # a whole table early, then its repetitions
        if any((row["method"], row["seed"]) == (name, seed) for row in found["runs"]):
            continue
        outcome = _one(study, name, seed, keys, measured, progress)
        say(f"{name}, seed {seed}: " + (outcome.reason or verdict(table(outcome.rows, "judge"))))
        rows += [{"method": name, "seed": seed, **row} for row in outcome.rows]
        found["runs"].append(
            {"method": name, "seed": seed, "reason": outcome.reason, **outcome.report}
        )
        _write(found, rows, folder)
    for name in plan if interference and len(study.targets) > 1 else ():
        if name not in found["interference"]:
            together = [
                row for row in rows if (row["method"], row["seed"]) == (name, study.seeds[0])
            ]
            found["interference"][name] = _interfere(study, name, keys, together, progress)
            _write(found, rows, folder)
    return found


def _one(
    study: Study,
    name: str,
    seed: int,
    keys: KeyStatistics | None,
    measured: dict[str, list[Row]],
    progress: bool,
) -> Outcome:
    begun = time.perf_counter()
    try:
        method, facts = study.build(name, seed)
        edit = method.compute(
            study.model, facts, keys if method.needs_statistics else None, progress=progress
        )
        seconds = time.perf_counter() - begun
        if (
            edit.key not in measured
        ):  # a method that takes nothing from the halves makes the same edit again
            with edit.applied_to(study.model):
                measured[edit.key] = study.rows(observe(study.model, study.asked))
    except FAILURES as error:
        return Outcome(
            [], {"seconds": time.perf_counter() - begun}, f"{type(error).__name__}: {error}"
        )
    kept = ("trainable", "peak_memory_bytes", "steps", "settings", "warnings")
    found = edit.report.to_dict()
    report = {"seconds": seconds, **{k: _plain(found[k]) for k in kept if k in found}}
    return Outcome(study.halved(measured[edit.key], seed), report)


def _interfere(
    study: Study, name: str, keys: KeyStatistics | None, together: Sequence[Row], progress: bool
) -> list[dict[str, Any]]:
    """Each target written alone, all of those edits at once, and all targets in one edit
    (`together`), first seed.
    """
    alone: list[Edit] = []

    def ask(edits: Sequence[Edit]) -> Sequence[Row]:
        with ExitStack() as stack:
            for edit in edits:
                stack.enter_context(edit.applied_to(study.model))
            return study.halved(study.rows(observe(study.model, study.asked)), study.seeds[0])

    def single(target: Sum) -> Sequence[Row]:
        method, facts = study.build(name, study.seeds[0], [target])
        alone.append(
            method.compute(
                study.model, facts, keys if method.needs_statistics else None, progress=progress
            )
        )
        return ask(alone[-1:])

    def added() -> Sequence[Row]:
        if len(alone) < len(study.targets):
            raise KnowEditError("not every target could be written alone")
        return ask(alone)

    def joint() -> Sequence[Row]:
        if not together:
            raise KnowEditError("they could not be written in one edit")
        return together

    cases: dict[str, Callable[[], Sequence[Row]]] = {
        str(t): partial(single, t) for t in study.targets
    }
    cases |= {"each alone, added up": added, " and ".join(map(str, study.targets)): joint}
    made: list[dict[str, Any]] = []
    for written, rows_of in cases.items():
        record: dict[str, Any] = {"written": written, "reason": None}
        try:
            rows = rows_of()
            record["about"] = {str(t): table(rows, "judge", str(t)) for t in study.targets}
            record["judge"] = {
                k: v for k, v in table(rows, "judge").items() if k in ("sums", "unrelated")
            }
        except FAILURES as error:
            record["reason"] = f"{type(error).__name__}: {error}"
        made.append(record)
    return made


def _resume(study: Study, folder: Path | None) -> tuple[dict[str, Any], list[Row]]:
    """The results so far, and their rows."""
    before = study.rows(study.before)
    fresh = {
        "head": study.head(),
        "notes": study.notes(),
        "unedited": table(before),
        "runs": [],
        "interference": {},
    }
    if folder is None or not (folder / RESULTS).is_file():
        return fresh, []
    try:
        kept = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        rows = [
            json.loads(line) for line in (folder / PROMPTS).read_text(encoding="utf-8").splitlines()
        ]
        same, done = (
            kept["head"] == fresh["head"],
            {(r["method"], r["seed"]) for r in kept["runs"] if r["reason"] is None},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KnowEditError(
            f"{folder / RESULTS} cannot be gone on from ({error}); choose another folder"
        ) from error
    if not same:
        raise KnowEditError(
            f"{folder} holds another study (model, targets, seeds or prompts differ); choose "
            f"another folder"
        )
    runs = [
        r for r in kept["runs"] if (r["method"], r["seed"]) in done
    ]  # what failed is tried again
    fresh["interference"] = kept["interference"]
    return fresh | {"runs": runs}, [row for row in rows if (row["method"], row["seed"]) in done]


def runs_kept(folder: Path | None) -> int:
    """How many runs with results a folder has."""
    if folder is None or not (folder / RESULTS).is_file():
        return 0
    runs = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["runs"]
    return sum(run["reason"] is None for run in runs)


def _write(found: dict[str, Any], rows: Sequence[Row], folder: Path | None) -> None:
    """Tables from the rows, and everything to disk, the rows first: a run is in `study.json` only
    with its rows.
    """
    order = {name: i for i, name in enumerate(dict.fromkeys([*experiments(), *known_methods()]))}
    found["runs"].sort(key=lambda run: (order.get(run["method"], len(order)), run["seed"]))
    found["methods"] = []
    for name in dict.fromkeys(run["method"] for run in found["runs"]):
        mine = [row for row in rows if row["method"] == name]
        runs = [run for run in found["runs"] if run["method"] == name]
        reason = next((run["reason"] for run in runs if run["reason"]), None)
        tables = (
            {half: table(mine, half) for half in ("judge", "tune")} | {"all": table(mine)}
            if mine
            else {}
        )
        done = [run for run in runs if not run["reason"]]
        entry = {"method": name, "seeds": len(done), "reason": reason, **tables}
        if done:
            entry["seconds"] = sum(run["seconds"] for run in done) / len(done)
            entry |= {
                k: max(run[k] for run in done)
                for k in ("trainable", "peak_memory_bytes")
                if k in done[0]
            }
            entry |= {"verdict": verdict(tables["judge"]), "goals": goals(tables["judge"])}
        found["methods"].append(entry)
    if folder is None:
        return
    for name, text in (
        (PROMPTS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)),
        (RESULTS, json.dumps(found, ensure_ascii=False, indent=1) + "\n"),
        (SUMMARY, summary(found)),
    ):
        with atomic_file(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    """As JSON has it: what is no number, text, list or mapping becomes its text; long lists are
    counted.
    """
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value] if len(value) <= 20 else f"{len(value)} entries"
    return (
        value
        if value is None or isinstance(value, (bool, int, float, str))
        else str(type(value).__name__)
    )
