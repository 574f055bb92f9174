"""Groups of facts that share one value and one key: the facts of a subject, or each fact alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class GroupKeys:
    """Where groups are written.

    Attributes:
        keys: `[n, d_ff]` float64; `owner`: `[n]` the group of each.
        outputs: `[groups, hidden]` float32, the last edited layer's output at the bare prompts, mean over the facts.
    """

    keys: Tensor
    owner: Tensor
    outputs: Tensor

    def add_up(self, rows: Tensor) -> Tensor:
        """Sum of the rows `[n, m]` of each group, `[groups, m]`: keys that share a residual share one read-in, their sum."""
        total = torch.zeros(len(self.outputs), rows.shape[1], dtype=rows.dtype, device=rows.device)
        return total.index_add_(0, self.owner.to(rows.device), rows)

    def gain(self, read_in: Tensor) -> Tensor:
        """`[n]` share of its group's residual that each key receives under group read-ins `[groups, d_ff]`."""
        owner = self.owner.to(read_in.device)
        return (read_in @ self.keys.T.to(read_in)).gather(0, owner[None])[0]


def group_keys(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    layer: int,
    last: int,
    contexts: Sequence[str],
    *,
    mean: bool = True,
) -> GroupKeys:
    """The keys of each group at `layer` over its facts and contexts, and the outputs of layer `last`, in one pass.

    Args:
        mean: one mean key a group (the published ROME and MEMIT); else every fact's and context's own key.
    """
    rows: list[Row] = []
    owners: list[int] = []
    bare: list[int] = []
    for g, group in enumerate(groups):
        for fact in group:
            found = prompt_rows(model, fact, contexts)
            bare.append(len(rows))
            rows += found
            owners += [g] * len(found)
    keys, outputs = model.keys(rows, sorted({layer, last}), outputs=True)
    assert outputs is not None
    own, owner = keys[layer].double(), torch.tensor(owners, device=keys[layer].device)
    at = torch.tensor(bare, device=outputs.device)
    now = _mean(outputs[at].double(), owner.to(at)[at], len(groups)).float()
    if mean:
        return GroupKeys(_mean(own, owner, len(groups)), torch.arange(len(groups), device=own.device), now)
    return GroupKeys(own, owner, now)


def _mean(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    sums = torch.zeros(groups, values.shape[1], dtype=values.dtype, device=values.device)
    return sums.index_add(0, owner, values) / torch.bincount(owner, minlength=groups)[:, None]
