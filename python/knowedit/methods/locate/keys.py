"""Groups of facts that share one value and one key: the facts of a subject, or each fact alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from knowedit.facts.fact import Fact
from knowedit.methods.locate.values import prompt_rows
from knowedit.models.editable import EditableModel, Outputs
from knowedit.models.tokens import Row


def group_by_subject(facts: Sequence[Fact], merge: bool) -> list[list[Fact]]:
    """Facts of one subject together (in order of first appearance), or each alone."""
    if not merge:
        return [[fact] for fact in facts]
    groups: dict[str, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(fact.subject, []).append(fact)
    return list(groups.values())


def group_by_wording(facts: Sequence[Fact]) -> list[list[Fact]]:
    """Facts of one `id` (wordings of one thing) or of one subject together, in order of first
    appearance.
    """
    groups: list[list[Fact]] = []
    home: dict[tuple[str, str], int] = {}  # of every subject and id
    for fact in facts:
        near = sorted({home[name] for name in _names(fact) if name in home})
        if not near:
            near = [len(groups)]
            groups.append([])
        for other in near[1:]:
            home |= {name: near[0] for moved in groups[other] for name in _names(moved)}
            groups[near[0]] += groups[other]
            groups[other] = []
        groups[near[0]].append(fact)
        home |= dict.fromkeys(_names(fact), near[0])
    return [group for group in groups if group]


def _names(fact: Fact) -> list[tuple[str, str]]:
    return [("subject", fact.subject), *([("id", fact.id)] if fact.id else [])]


@dataclass(frozen=True)
class GroupKeys:
    """Where groups are written.

    Attributes:
        keys: `[n, d_ff]` float64; `owner`: `[n]` the group of each.
        outputs: `[groups, hidden]` float32, what is written to (the last edited layer's output, or
            its MLP's) at the bare prompts, mean over the facts.
    """

    keys: Tensor
    owner: Tensor
    outputs: Tensor

    def add_up(self, rows: Tensor) -> Tensor:
        """Sum of the rows `[n, m]` of each group, `[groups, m]`: keys that share a residual share
        one read-in, their sum.
        """
        total = torch.zeros(len(self.outputs), rows.shape[1], dtype=rows.dtype, device=rows.device)
        return total.index_add_(0, self.owner.to(rows.device), rows)

    def gain(self, read_in: Tensor) -> Tensor:
        """`[n]` share of its group's residual that each key receives under group read-ins `[groups,
        d_ff]`.
        """
        return (read_in[self.owner.to(read_in.device)] * self.keys.to(read_in)).sum(1)


def group_keys(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    layer: int,
    last: int,
    contexts: Sequence[str],
    *,
    mean: bool = True,
    of_mlp: bool = False,
) -> GroupKeys:
    """The keys of each group at `layer` over its facts and contexts, and the outputs of layer
    `last`, in one pass.

    Args:
        mean: one mean key a group (the published ROME and MEMIT); else every fact's and context's
            own key.
        of_mlp: the outputs are those of the last layer's MLP, not of the layer.
    """
    rows = [[prompt_rows(model, fact, contexts) for fact in group] for group in groups]
    return keys_at(model, rows, layer, last, mean=mean, of_mlp=of_mlp)


def keys_at(
    model: EditableModel,
    rows: Sequence[Sequence[Sequence[Row]]],
    layer: int,
    last: int,
    *,
    mean: bool = True,
    of_mlp: bool = False,
) -> GroupKeys:
    """As `group_keys`, for the rows of each fact of each group; a fact's first row is its bare
    prompt.
    """
    flat = [row for group in rows for fact in group for row in fact]
    owners = [g for g, group in enumerate(rows) for fact in group for _ in fact]
    starts = accumulate((len(fact) for group in rows for fact in group), initial=0)
    where: Outputs = "projection" if of_mlp else True
    keys, outputs = model.keys(flat, sorted({layer, last}), outputs=where)
    assert outputs is not None
    own, owner = keys[layer].double(), torch.tensor(owners, device=keys[layer].device)
    at = torch.tensor(list(starts)[:-1], device=outputs.device)
    now = _mean(outputs[at].double(), owner.to(at)[at], len(rows)).float()
    if mean:
        return GroupKeys(
            _mean(own, owner, len(rows)), torch.arange(len(rows), device=own.device), now
        )
    return GroupKeys(own, owner, now)


def _mean(values: Tensor, owner: Tensor, groups: int) -> Tensor:
    sums = torch.zeros(groups, values.shape[1], dtype=values.dtype, device=values.device)
    return sums.index_add(0, owner, values) / torch.bincount(owner, minlength=groups)[:, None]
