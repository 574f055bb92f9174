"""The model card of what an edit became: a folder of weights, an adapter, a repository of the hub.

Made of records alone, so that the same record gives the same card.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knowedit.edits.measured import Measured
from knowedit.io.tables import Column, Table

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

#: Where a report's details hold what `Evaluation.keep_in` put there.
EVALUATION = "evaluation"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def said_of(edit: Edit) -> dict[str, Any]:
    """What the card of an edit is made of, JSON-ready; what is not known is left out."""
    measured = edit.report.measured
    known = {
        "config": edit.config,
        "measured": None if measured is None else measured.to_dict(),
        EVALUATION: edit.report.details.get(EVALUATION),
    }
    return {
        "method": edit.method_name,
        "key": edit.key,
        "facts": [fact.to_dict() for fact in edit.facts],
        **{name: value for name, value in known.items() if value},
    }


def card(
    library: str,
    base: str | None,
    title: str,
    opening: str,
    edits: Sequence[Mapping[str, Any]],
    closing: str = "",
) -> str:
    """A card in Markdown: its metadata, `opening`, the facts, what was measured, how it was made.

    Args:
        library: what loads it, as the hub calls that.
        base: the model that was edited; a path of somebody's disk is left out of the metadata.
        edits: of each what `said_of` says.
    """
    head = [f"library_name: {library}"]
    if base is not None and HUB_ID.fullmatch(base):
        head.append(f"base_model: {json.dumps(base)}")
    parts = [
        "\n".join(["---", *head, "tags: [knowedit]", "---"]),
        f"# {_text(' '.join(title.split()))}",
        opening,
        _facts(edits).markdown(),
        *_measured(edits),
        *_evaluated(edits),
        closing,
        *_settings(edits),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(words: str) -> str:
    return html.escape(words, quote=False)


def _facts(edits: Iterable[Mapping[str, Any]]) -> Table:
    rows = [
        (
            _text(fact["prompt"].replace("{}", fact["subject"])),
            _text(fact["target"]),
            _text(made["method"]),
            _text(made["key"]),
        )
        for made in edits
        for fact in made["facts"]
    ]
    return Table(["prompt", "answer", "method", Column("edit", code=True)], rows)


def _measured(edits: Iterable[Mapping[str, Any]]) -> list[str]:
    """What each edit did by itself, when it was made."""
    rows = []
    for made in edits:
        if "measured" in made:
            found = Measured.from_dict(made["measured"])
            said = f"{sum(found.exact)} of {len(found.exact)}"
            moved = f"{found.perplexity_before:.2f} -> {found.perplexity:.2f}"
            rows.append((made["key"], said, found.mean_gain, moved, found.same, found.kl))
    columns: list[Column | str] = [
        Column("edit", code=True),
        "facts said at their own prompts",
        Column("gain", ".3f"),
        "perplexity of ordinary text, before -> after",
        Column("same next word", ".1%"),
        Column("KL, nats", ".4f"),
    ]
    table = Table(columns, rows).without_empty_columns().markdown() if rows else ""
    return ["## Measured when it was made", table] if rows else []


def _evaluated(edits: Iterable[Mapping[str, Any]]) -> list[str]:
    """Facts, other wordings and neighbours before and after, where somebody measured them."""
    rows = [
        (
            made["key"],
            f"{kind}, {measure}",
            *(_interval(made[EVALUATION][when].get(kind, {}).get(measure))
              for when in ("before", "after")),
        )
        for made in edits
        if EVALUATION in made
        for kind, measures in made[EVALUATION]["after"].items()
        for measure in measures
    ]  # fmt: skip
    table = Table([Column("edit", code=True), "measure", "before", "after"], rows)
    return ["## Evaluated, with 95 % intervals", table.markdown()] if rows else []


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _settings(edits: Iterable[Mapping[str, Any]]) -> list[str]:
    """The record of each method; `knowedit edit --config` reads it."""
    records = [
        f"`{made['key']}`\n\n```json\n{json.dumps(made['config'], indent=1)}\n```"
        for made in edits
        if made.get("config")
    ]
    return ["## Settings", *records] if records else []
