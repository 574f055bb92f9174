"""From a stock write to the look-ahead and back: what `rose.py` and `metake.py` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from knowedit.edits.edit import relative_norms
from knowedit.facts.fact import Fact
from knowedit.methods.locate.objective import FrozenLayer, Line, Lines, WriteOuts
from knowedit.methods.locate.task import Task, Written
from knowedit.methods.locate.training import Settings, disconnect, state_norms
from knowedit.methods.locate.values import prompt_rows
from knowedit.models.editable import EditableModel

CLOSE = 0.5  # whitened cosine of two keys from which one edit disturbs the other
CROWDED = 0.8  # relative norm from which edits disturb each other at other tokens


def frozen_layers(task: Task, written: Written) -> tuple[dict[int, FrozenLayer], WriteOuts]:
    """What the solvers of a stock write fix at each layer, and its write-outs to start from."""
    norms = state_norms(task.model, task.groups, task.layers)
    layers = {
        layer: FrozenLayer.of(*solved, norms[layer]) for layer, solved in written.solved.items()
    }
    return layers, {layer: left.T.contiguous() for layer, (left, _) in written.factors.items()}


def adopt(written: Written, out: WriteOuts) -> None:
    """Put trained write-outs in the place of the stock ones."""
    written.factors = {
        layer: (out[layer].T.contiguous(), right) for layer, (_, right) in written.factors.items()
    }


def told(
    settings: Settings,
    layers: dict[int, FrozenLayer],
    start: WriteOuts,
    found: WriteOuts,
    bare: Lines,
) -> dict[str, Any]:
    """The look-ahead's part of the report: the disconnect before and after it."""
    before, after = (asdict(disconnect(layers, out, bare)) for out in (start, found))
    return {"used": True, "settings": asdict(settings), "before": before, "after": after}


def answer_lines(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    first: int,
    contexts: Sequence[str],
    budget: int,
) -> Lines:
    """Every fact's answer after its prompt in each context; the weights of a group add up to 1."""
    lines = []
    for number, group in enumerate(groups):
        for fact in group:
            rows = prompt_rows(model, fact, contexts, fact.target)
            lines += [Line(row, number, 1 / (len(group) * len(rows))) for row in rows]
    return Lines(model, lines, first, len(groups), budget=budget)


def closeness(written: Written) -> tuple[float, float]:
    """Whitened cosine of each key with the closest key of another group: the largest, and the mean
    (0 for one group).
    """
    largest, mean = 0.0, 0.0
    for solver, keys in written.solved.values():
        length = solver.S.diagonal().clamp(min=1e-30).sqrt()
        other = (keys.owner[:, None] != keys.owner[None]).to(solver.S.device)
        if bool(other.any()):
            closest = (solver.S / length.outer(length)).masked_fill(~other, -1).amax(1)
            largest, mean = max(largest, float(closest.max())), max(mean, float(closest.mean()))
    return largest, mean


def reasons(task: Task, written: Written) -> list[str]:
    """Why to look ahead; empty where the stock targets do as well."""
    found = []
    if task.history is not None:
        found.append(
            "earlier edits to leave alone"
            if task.history
            else "the first of a sequence, which others will follow"
        )
    cosine = closeness(written)[0]
    if cosine > CLOSE:
        found.append(f"keys of different groups are close (whitened cosine {cosine:.2f})")
    norm = max(relative_norms(task.model, written.factors).values())
    if norm > CROWDED:
        found.append(f"a crowded edit (|delta| / |W| {norm:.2f})")
    return found
