"""Groups of facts that share one value and one key: the facts of a subject, or each fact alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .facts import Fact
from .model import EditableModel
from .targets import prompt_rows
from .tokens import Row


def group_by_subject(facts: Sequence[Fact], merge: bool) -> list[list[Fact]]:
    """Facts of one subject together (in order of first appearance), or each alone."""
    if not merge:
        return [[fact] for fact in facts]
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.subject, []).append(fact)
    return list(groups.values())


def group_keys(
    model: EditableModel, groups: Sequence[Sequence[Fact]], layer: int, last: int, contexts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Each group's mean key at `layer` over facts and contexts `[g, d_ff]`, and the mean output of layer `last` at the
    bare prompts `[g, hidden]`, in one pass."""
    rows: list[Row] = []
    owner: list[int] = []
    bare: list[int] = []
    for g, group in enumerate(groups):
        for fact in group:
            found = prompt_rows(model, fact, contexts)
            bare.append(len(rows))
            rows += found
            owner += [g] * len(found)
    keys, outputs = model.keys(rows, sorted({layer, last}), outputs=True)
    assert outputs is not None
    index, bare_index = torch.tensor(owner), torch.tensor(bare)

    def mean(values: Tensor, groups_of: Tensor) -> Tensor:
        values, groups_of = values.double(), groups_of.to(values.device)
        sums = torch.zeros(len(groups), values.shape[1], dtype=values.dtype, device=values.device)
        return sums.index_add(0, groups_of, values) / torch.bincount(groups_of, minlength=len(groups))[:, None]

    return mean(keys[layer], index), mean(outputs[bare_index.to(outputs.device)], index[bare_index]).float()
