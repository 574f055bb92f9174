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
from knowedit.evaluation.ability.ability import AbilityTasks
from knowedit.evaluation.definitions import check_definition, counted
from knowedit.evaluation.evaluation import compared
from knowedit.evaluation.generation import Figure, Generation, References, Writing, summary
from knowedit.evaluation.interview import Interview
from knowedit.evaluation.measures.base import answered, ask, model_measures, questions
from knowedit.evaluation.protocols import (
    Result,
    ability_tasks,
    add_to_run,
    held_out,
    kept_results,
    sequence_report,
)
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.facts.wordings.forms import as_asked
from knowedit.io.config import plain
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
    text: Any = None,
    seed: int = 0,
    folder: Path | None = None,
    generate: int = 0,
    references: References | None = None,
    definition: str = "memit",
    ability: Sequence[str] = (),
    ability_items: int | None = None,
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
        text, seed, generate, references, definition, ability, ability_items, join, chat, strict: as
            `protocols.measure`.

    Raises:
        KnowEditError: not one of `files` and `against`; no facts; models that do not share their
            tokens; or what the parts raise.
    """
    if bool(files) == (against is not None):
        raise KnowEditError("name saved edits, or a model to compare with, and not both")
    check_definition(definition)
    tasks = ability_tasks(ability, ability_items)
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
        **{"text": plain(text), "seed": seed, "generate": generate, "references": references},
        "definition": definition,
        **({"ability": list(ability), "ability_items": ability_items} if ability else {}),
    }
    digest = hashlib.blake2b(json.dumps(common).encode(), digest_size=16).hexdigest()
    where = dataset or (name if against else ", ".join(map(str, files)))
    settings = {"dataset": where, "digest": digest}
    if kept := list(kept_results(folder, settings).values()):
        say(f"kept from {folder}")
        return kept[0]
    edited = nullcontext(other) if other is not None else all_applied(edits, model)
    found = compare(
        model,
        edited,
        facts,
        texts=held_out(text),
        seed=seed,
        generate=generate,
        references=references,
        definition=definition,
        ability=tasks,
    )
    told = replace(found, dataset=where, run=settings, **_made_by(edits, other))
    if folder is not None:
        add_to_run(folder, told)
    return told


def compare(
    model: EditableModel,
    edited: Edited,
    facts: Sequence[Fact],
    *,
    texts: Sequence[str] = (),
    seed: int = 0,
    generate: int = 0,
    references: References | None = None,
    definition: str = "memit",
    ability: AbilityTasks | None = None,
    progress: bool = True,
) -> Result:
    """Measure `model`, and then what `edited` yields: the same model while edits are applied to it,
    or another one, with the same tokens (`check_tokens`).
    """
    facts = answered(model, facts)
    asked = [q for record, fact in enumerate(facts) for q in questions(record, fact)]
    watched = model_measures(texts=bool(texts))
    interview = Interview(model, facts, progress=progress)
    writing = Writing(model, facts[:generate], references)
    answers = ask(model, asked, title="answers before the edit", progress=progress)
    seen = {name: measure.observe(model, texts) for name, measure in watched.items()}
    unedited: list[Figure] = writing.read() if generate else []
    marks = [ability.marks(model)] if ability else []
    with edited as changed:
        now = ask(changed, asked, title="answers under the edit", progress=progress)
        effects = {n: m.compare(seen[n], m.observe(changed, texts)) for n, m in watched.items()}
        interview.model = writing.model = changed
        said, written = interview.hear(), writing.read() if generate else []
        marks += [ability.marks(changed)] if ability else []
    return Result(
        model.name,
        "",
        changed.name,
        AGAINST,
        len(facts),
        counted(compared(asked, answers, now, seed), definition),
        effects,
        None,
        {},
        said=said,
        generation=Generation(summary(unedited), summary(written)) if generate else None,
        ability=ability.compare(*marks) if ability else None,
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
