"""Several edits as one, whose size does not depend on how many they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from knowedit.edits.changes import Change, Dense, LowRank, relative_norm, side_by_side
from knowedit.edits.edit import Edit
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.models.editable import EditableModel


def merged(edits: Sequence[Edit], facts: Sequence[Fact], model: EditableModel) -> Edit:
    """The sum of the changes, as one edit that says `facts` and has no keys.

    A matrix whose factors together are as many numbers as the matrix itself becomes dense, so that
    the edit never needs more than the weights that it changes. It equals the edits but for one
    rounding to float32 for each number.

    Raises:
        EditError: an edit is of a class of its own (SERAC's memory), which has no sum.
    """
    for edit in edits:
        if edit.format != Edit.format:
            raise EditError(f"a {edit.method_name} edit cannot be merged with others")
    named = [edit.by_parameter(model) for edit in edits]
    changes: dict[str, Change] = {}
    for name in sorted({name for one in named for name in one}):
        changes[name] = _sum([one[name] for one in named if name in one], model, name)
    names = list(dict.fromkeys(edit.method_name for edit in edits))
    first, last = edits[0].report.measured, edits[-1].report.measured
    report = EditReport(
        relative_norm={
            name: relative_norm(weight, change)
            for name, change in changes.items()
            if (weight := model.stored(name)).ndim > 1  # biases may be all zeros
        },
        measured=None
        if first is None or last is None
        else replace(last, perplexity_before=first.perplexity_before, gain=()),
        details={"merged": sum(edit.report.details.get("merged", 1) for edit in edits)},
    )
    return Edit(
        " + ".join(names),
        changes,
        list(facts),
        edits[0].fingerprint,
        report,
        exclusive=frozenset().union(*(edit.exclusive for edit in edits)),
        software=edits[-1].software,
        statistics=edits[-1].statistics,
        setup=edits[-1].setup,
        written=edits[-1].written,
    )


def _sum(changes: Sequence[Change], model: EditableModel, name: str) -> Change:
    low = [change for change in changes if isinstance(change, LowRank)]
    if len(low) == len(changes):
        rows, columns = low[0].U.shape[0], low[0].V.shape[0]
        if sum(change.rank for change in low) * (rows + columns) < rows * columns:
            return LowRank(*side_by_side(*(change.raw for change in low)))  # type: ignore[arg-type]
    total = torch.zeros(model.stored(name).shape, dtype=torch.float64)
    for change in changes:
        part = change.dense().cpu() if isinstance(change, Dense) else _product(change)
        turned = isinstance(change, LowRank) and model.is_transposed(name)
        total += part.T if turned else part
    return Dense(total.float())


def _product(change: LowRank) -> torch.Tensor:
    return change.U.cpu().double() @ change.V.cpu().double().T
