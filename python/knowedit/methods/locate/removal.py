"""Taking single facts of a history out of the model again, by downdating recursive least squares.

A sequence that was written under one metric `M` is the solution of `Delta H = Y Kᵀ` with
`H = M + K Kᵀ`: all keys `K` and their residuals `Y` together. Without the stale columns `K_s` it is
`Delta' H' = Y Kᵀ - Y_s K_sᵀ` with `H' = H - K_s K_sᵀ`, and hence

    Delta' = Delta + (Delta K_s - Y_s) K_sᵀ H'^-1,

the joint edit that never knew them. `Delta K_s - Y_s` is how far the model now is from the values
that were written at those keys: what the write itself left open, and what later edits added. Both
follow from the factors in the history, so that nothing is run. With several edited layers it holds
at each for the keys that were read there. The values are those that the sequence really wrote: a
later edit that was planned around the stale ones is not planned again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.edits.changes import changes_of, factors_of, relative_norms, side_by_side
from knowedit.edits.edit import Edit
from knowedit.edits.history import History, Place
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.methods.locate.keys import group_by_subject
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics

if TYPE_CHECKING:
    from knowedit.methods.locate.recipe import Recipe


def removal(
    recipe: Recipe,
    model: EditableModel,
    places: Sequence[Place],
    statistics: KeyStatistics | None,
    history: History,
) -> Edit:
    """The edit without facts that takes out the groups at `places`; nothing is applied.

    Raises:
        EditError: one of them was written by a method without keys, under another metric or
            constraint, or by a version that did not record what it takes.
    """
    for place in places:
        _check(recipe, place)
    groups = group_by_subject([place.fact for place in places], True)
    metric = recipe.metric.prepared(
        recipe.prepare(model, groups, statistics, history, progress=False)
    )
    taken: dict[str, tuple[int, ...]] = {}
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for number, edit in reversed(list(enumerate(history.edits))):
        stale = {p.group for p in places if p.edit is edit and p.group is not None}
        if not stale:
            continue
        taken[edit.key] = tuple(sorted(stale))
        mark = Edit(recipe.name, {}, [], history.fingerprint, replaces=dict(taken))
        kept = history.copy()
        kept.edits.append(mark)
        rows = [row for row, owner in enumerate(edit.owners) if owner in stale]
        for layer, keys in edit.keys.items():
            own = _factors(model, edit, layer)
            assert own is not None
            at = keys[rows].T.double()
            left, right = (part[:, : max(edit.groups) + 1] for part in own)  # of the write alone
            later = [_factors(model, other, layer) for other in history.edits[number + 1 :]]
            pairs = [(left, right), *filter(None, later), *filter(None, [found.get(layer)])]
            moved = sum((u.to(at) @ (v.to(at).T @ at) for u, v in pairs), torch.zeros(()).to(at))
            written = left.to(at)[:, [edit.owners[row] for row in rows]]
            base, _ = metric.as_chosen(edit.report.layers[str(layer)]).at(
                statistics or KeyStatistics({}), layer, at
            )
            out = (moved - written).float(), kept.extend(base, layer).inverse(at).to(at).float()
            found[layer] = side_by_side(found[layer], out) if layer in found else out
    norms = relative_norms(model, found)
    report = EditReport(relative_norm={str(layer): norm for layer, norm in norms.items()})
    changes = changes_of(model, found)
    return Edit(recipe.name, changes, [], history.fingerprint, report, replaces=taken)


def after_removal(made: Edit, removed: Edit, model: EditableModel) -> Edit:
    """One edit of both: `made` was computed while `removed` was applied. The write's own factors
    come first, so that its groups are still its columns.
    """
    both: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in range(len(model.layers)):
        parts = [part for edit in (made, removed) if (part := _factors(model, edit, layer))]
        if parts:
            both[layer] = side_by_side(*parts)
    made.changes, made.replaces = changes_of(model, both), removed.replaces
    made.__dict__.pop("key", None)  # it is made from the changes
    made.report.relative_norm = {
        str(layer): norm for layer, norm in relative_norms(model, both).items()
    }
    return made


def _factors(model: EditableModel, edit: Edit, layer: int) -> tuple[Tensor, Tensor] | None:
    return factors_of(model, edit.by_parameter(model), layer)


def _check(recipe: Recipe, place: Place) -> None:
    """Raise EditError unless the fact can be taken out exactly."""
    edit, remedy = place.edit, "undo the whole edit instead"
    what = f"{place.fact.text!r} was written by {edit.method_name}"
    if place.group is None or not edit.owners or not edit.keys:
        raise EditError(
            f"{what}, which does not record the keys of each fact, or they were compacted; {remedy}"
        )
    if recipe.metric.constraint != "soft":
        raise EditError(
            f"{recipe.name} writes under a constraint that has no joint solution to return to; "
            f"{remedy}, or use a method with a soft metric (MEMIT, AlphaEdit)"
        )
    if not recipe.metric.steady:
        raise EditError(
            f"the metric of {recipe.name} changes with the history, so that there is no joint "
            f"solution to return to; {remedy}, or use one without refresh"
        )
    kind = edit.config.get("metric", {}).get("kind", recipe.metric.kind)
    if kind != recipe.metric.kind:
        raise EditError(
            f"{what} under the metric {kind!r}, and is taken out by a method with the same; this "
            f"one has {recipe.metric.kind!r}. Use a session of that method, or {remedy}"
        )
