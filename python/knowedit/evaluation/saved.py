"""Measuring what is there already: edits from files, or an edited model against the one that it was
made of. Nothing is computed anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import facts_in
from knowedit.edits.history import History
from knowedit.edits.journal import edits_in
from knowedit.errors import KnowEditError
from knowedit.evaluation.baseline import PLAIN, Baseline, Scope
from knowedit.evaluation.measures.base import ask
from knowedit.evaluation.protocols import (
    Result,
    add_to_run,
    kept_results,
    sequence_report,
    unusual,
)
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.facts.wordings.forms import as_asked
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

#: What results say in place of a protocol.
SAVED, AGAINST = "saved edit", "comparison"
Edited = AbstractContextManager[EditableModel]


def measure_saved(
    name: str,
    files: Sequence[Path] = (),
    against: str | None = None,
    dataset: str | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    *,
    device_map: Any = None,
    scope: Scope = PLAIN,
    folder: Path | None = None,
    join: str | None = None,
    chat: bool = False,
    strict: bool = False,
    dequantise: bool = False,
    say: Callable[[str], None] = print,
) -> Result | dict[str, Any]:
    """Load everything and measure; what `knowedit eval --edit` and `--against` call.

    Args:
        files: edits, histories or sessions, to be measured together on model `name`.
        against: instead of `files`, the model of which `name` is an edited copy.
        dataset: the facts; None: those that the edits or the edited folder record.
        folder: for the result; one that it has is not measured again, but returned as its record.
        dtype, device_map, dequantise: of both models.
        scope, join, chat, strict: as `protocols.measure`.

    Raises:
        KnowEditError: not one of `files` and `against`; no facts; models that do not share their
            tokens; or what the parts raise.
    """
    if bool(files) == (against is not None):
        raise KnowEditError("name saved edits, or a model to compare with, and not both")
    tasks = scope.tasks()
    edits = [edit for file in files for edit in edits_in(file)]
    if files and not edits:
        raise KnowEditError(f"{', '.join(map(str, files))} holds no edit; write one first")
    recorded = _standing(edits) if files else facts_in(name)
    if dataset is None and not recorded:
        raise KnowEditError(f"{name} does not say which facts were written; give --dataset")
    facts = (conflict_free(load(dataset, strict=strict)) if dataset else recorded)[:limit]
    options = {"dtype": dtype, "device_map": device_map, "dequantise": dequantise, "say": say}
    model = load_model(against or name, **options)
    other = load_model(name, **options) if against else None
    if other is not None:
        check_tokens(model, other)
    facts = as_asked(model, facts, join, chat)
    common = {
        "models": [model.fingerprint, other and other.fingerprint],
        "edits": [edit.key for edit in edits],
        "facts": [fact.to_dict() for fact in facts],
        **scope.to_dict(),
    }
    digest = hashlib.blake2b(json.dumps(common).encode(), digest_size=16).hexdigest()
    where = dataset or (name if against else ", ".join(map(str, files)))
    settings = {"dataset": where, "digest": digest}
    if kept := list(kept_results(folder, settings).values()):
        say(f"kept from {folder}")
        return kept[0]
    edited = nullcontext(other) if other is not None else all_applied(edits, model)
    found = compare(scope.baseline(model, facts, tasks), edited)
    asked = {
        **{"edit": [str(file) for file in files], "against": against, "dataset": dataset},
        **{"limit": limit, "seed": scope.seed, "dtype": dtype},
        **{k: v for k, v in scope.to_dict().items() if k != "references"},
        **{"join": join, "chat": chat, "strict": strict, "dequantise": dequantise},
    }
    run = {**settings, "model": str(name), "asked": unusual(asked)}
    told = replace(found, dataset=where, run=run, **_made_by(edits, other))
    if folder is not None:
        add_to_run(folder, told)
    return told


def compare(baseline: Baseline, edited: Edited, progress: bool = True) -> Result:
    """Measure what `edited` yields: the model of `baseline` while edits are applied to it, or
    another one, with the same tokens (`check_tokens`).
    """
    model, facts = baseline.model, len(baseline.facts)
    with edited as changed:
        answers = ask(changed, baseline.asked, title="answers under the edit", progress=progress)
        whole = baseline.whole(changed)
    return Result(
        model.name,
        "",
        changed.name,
        AGAINST,
        facts,
        baseline.evaluation(answers),
        seconds=None,
        report={},
        **whole,
    )


@contextmanager
def all_applied(edits: Sequence[Edit], model: EditableModel) -> Iterator[EditableModel]:
    """Within the block all of them are applied."""
    with ExitStack() as applied:
        for edit in edits:
            applied.enter_context(edit.applied_to(model))
        yield model


def _standing(edits: Sequence[Edit]) -> list[Fact]:
    """The facts of the edits that no later one takes out."""
    return History(edits[0].fingerprint, list(edits)).facts


def _made_by(edits: Sequence[Edit], other: EditableModel | None) -> dict[str, Any]:
    """What a result says of how its edits were made, as far as their files do."""
    if other is not None:
        return {"method": other.name, "protocol": AGAINST}
    names = dict.fromkeys(edit.method_name for edit in edits)
    return {"method": " + ".join(names), "protocol": SAVED, "report": sequence_report(edits)}


def check_tokens(model: EditableModel, other: EditableModel) -> None:
    """Raise KnowEditError for two models whose answers cannot be compared token for token."""
    if model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise KnowEditError(
            f"{other.name} and {model.name} have other tokens, so that no probability can be "
            "compared; name the model that the edited one was made of"
        )
