"""How far an edit moves what the routers of later layers choose: experts that a token no longer
reaches are knowledge that it no longer has, whatever the edited layer itself still does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knowedit.facts.wordings.ordinary import held_out
from knowedit.io.config import Config
from knowedit.models.editable import EditableModel
from knowedit.models.experts import Routed
from knowedit.models.partial import read_keys
from knowedit.models.tokens import batches

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

NEIGHBOURS = 3  # prompts a fact that are looked at

#: By layer, `[tokens, top_k]` the experts of each token, in rising order.
Sets = dict[int, Tensor]


@dataclass(frozen=True)
class Rerouted(Config):
    """Shares of tokens whose set of experts is another one, mean over the layers above the first
    edited one.

    Attributes:
        facts: of the edited facts' prompts.
        neighbours: of the facts' neighbour prompts; None: they have none.
        text: of ordinary text.
        layers: those looked at.
    """

    facts: float
    neighbours: float | None
    text: float
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        near = "" if self.neighbours is None else f", of neighbours' {self.neighbours:.1%}"
        return (
            f"other experts at {len(self.layers)} later layers for {self.facts:.1%} of the facts' "
            f"tokens{near}, of ordinary text's {self.text:.1%}"
        )


@dataclass(frozen=True)
class Routing:
    """What routers choose, as a model is.

    Attributes:
        layers: with routed experts, above the first that an edit changes.
        sets: of each of the groups of prompts.
    """

    prompts: tuple[tuple[str, ...], ...]
    layers: tuple[int, ...]
    sets: tuple[Sets, ...]

    @classmethod
    def of(cls, model: EditableModel, edit: Edit) -> Routing:
        """Of the unedited model, at the layers and prompts that `edit` asks for; at no layers where
        none has routed experts.
        """
        model = model.editing("routed")
        near = [p.prompt for fact in edit.facts for p in fact.neighbours[:NEIGHBOURS]]
        prompts = tuple(fact.text for fact in edit.facts), tuple(near), tuple(held_out())
        layers = _later(model, edit)
        return cls(prompts, layers, tuple(_sets(model, group, layers) for group in prompts))

    def against(self, model: EditableModel) -> Rerouted | None:
        """How far it is from the model as it now is; None where there are no such layers."""
        if not self.layers:
            return None
        model = model.editing("routed")
        now = (_sets(model, group, self.layers) for group in self.prompts)
        facts, near, text = (_changed(*pair) for pair in zip(self.sets, now, strict=True))
        return Rerouted(facts, near if self.prompts[1] else None, text, self.layers)


def _later(model: EditableModel, edit: Edit) -> tuple[int, ...]:
    """The layers with routed experts above the first edited one."""
    layout = model.layout
    routed = [layer for layer in layout.editable if layout.experts(layer) is not None]
    changed = edit.by_parameter(model) if routed and edit.changes else {}
    edited = [
        layer
        for layer in range(len(model.layers))
        if any(name.startswith(f"{layout.layer(layer)}.") for name in changed)
    ]
    return tuple(layer for layer in routed if edited and layer > edited[0])


def _sets(model: EditableModel, prompts: Sequence[str], layers: Sequence[int]) -> Sets:
    """The experts of every token of the prompts, in one pass."""
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    rows = [model.row(prompt).ids for prompt in prompts] if layers else []

    def take(mask: Tensor, layer: int, routed: Routed) -> None:
        found[layer].append(routed.index[mask.to(routed.index.device)].sort(-1).values.cpu())

    for batch in batches([len(ids) for ids in rows], 4096):
        ids, mask = model.pad([rows[i] for i in batch])
        read_keys(model, ids, layers, partial(take, mask))
    return {layer: torch.cat(parts) for layer, parts in found.items() if parts}


def _changed(before: Sets, now: Sets) -> float:
    """The share of tokens with another set, mean over the layers."""
    shares = [float((before[layer] != now[layer]).any(-1).double().mean()) for layer in before]
    return sum(shares) / max(len(shares), 1)
