"""Hidden states at chosen tokens (`get_reprs_at_idxs`): what keys, current outputs and ROME's left
vector are read with.

The host runs the whole model and its head on whole prompts to read one module in the middle. Here a
prompt ends at its last wanted token, prompts of similar length are run together, and the pass stops
at the module. Within one call of an entry point it also begins where the last one left off: of the
layers below, only those that were written since are run again (`Kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import ModelError
from knowedit.integrations.discovery import Signature
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import (
    NotOurs,
    Replacement,
    editable,
    handed_on,
    own_way,
)
from knowedit.integrations.replacements.kept import Kept, layer_of
from knowedit.integrations.replacements.requests import current_job
from knowedit.models import partial as parts
from knowedit.models.editable import EditableModel
from knowedit.models.linear import fast_linear
from knowedit.models.packed import beginnings, packed
from knowedit.models.tokens import batches

#: Prompts that the hosts pad together.
GROUP = 128
#: Padded tokens a batch.
BUDGET = 4096


def tokens_of(tok: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, as the host's tokenizer makes them, without padding."""
    return [list(ids) for ids in tok(list(texts))["input_ids"]]


def real_places(
    rows: Sequence[Sequence[int]], idxs: Sequence[Sequence[int]], side: str
) -> list[list[int]]:
    """Places in each row, 0 and more, for the host's places in rows padded to one length.

    Raises:
        NotOurs: a place is in the padding, or padding stands in front.
    """
    width = max(map(len, rows))
    if side == "left" and any(len(row) < width for row in rows):
        raise NotOurs("prompts of different lengths are padded on the left")
    found = [[i + width if i < 0 else i for i in places] for places in idxs]
    if any(not 0 <= i < len(row) for row, places in zip(rows, found) for i in places):
        raise NotOurs("a state is read in the padding")
    return found


@torch.no_grad()
def states_at(
    model: EditableModel,
    rows: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    module: str,
    *,
    inputs: bool,
    outputs: bool,
    kept: Kept | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """A module's input and output, averaged over each row's places: `[rows, width]` each, or None
    where not asked for; of the model's dtype, on the module's device.

    Args:
        kept: states of an earlier call, where the pass may begin; those in front of a layer whose
            projection is read are kept in it.

    Raises:
        NotOurs: the pass does not reach the module with an input.
    """
    found: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
    texts = [tuple(row[: max(where) + 1]) for row, where in zip(rows, places)]

    def take(into: dict[int, Tensor], group: list[int], states: Tensor) -> None:
        for line, i in enumerate(group):
            into[i] = states[line, list(places[i])].mean(0)

    layer = layer_of(model, module) if kept is not None else None
    begin = kept if kept is not None and kept.reach(model, texts, layer) else None
    moves = layer is not None and layer > 0 and module == model.layout.projection(layer)
    entering: dict[tuple[int, ...], Tensor] = {}

    def enter(group: list[int], states: Tensor) -> None:
        for line, i in enumerate(group):
            entering[texts[i]] = states[line, : len(texts[i])].clone()

    for group in batches([len(text) for text in texts], BUDGET):
        readers: list[dict[str, Callable[[Tensor], Any]]] = [
            {module: partial(take, into, group)} if asked else {}
            for into, asked in zip(found, (inputs, outputs))
        ]
        try:
            ids, mask = model.pad([list(texts[i]) for i in group])
            once = beginnings([texts[i] for i in group], ids.shape[1])
            packing = packed(mask.bool(), once) if model.replays else nullcontext()
            with fast_linear(), packing:
                if begin is not None and layer is not None:
                    part, states = begin.run(model, [texts[i] for i in group], layer)
                    enter(group, states)
                    with _reading(model, *readers):
                        part.layer(layer, states)
                    continue
                if moves and layer is not None:
                    readers[1][model.layout.layer(layer - 1)] = partial(enter, group)
                parts.read(model, ids, inputs=readers[0], outputs=readers[1])
        except (ModelError, IndexError, AttributeError) as error:
            raise NotOurs(f"{module} cannot be read: {error}") from error
    if moves and kept is not None and layer is not None:
        kept.move(model, layer, entering)
    order = range(len(rows))
    stacked = [torch.stack([into[i] for i in order]) if into else None for into in found]
    return stacked[0], stacked[1]


def _reading(
    model: EditableModel,
    inputs: dict[str, Callable[[Tensor], Any]],
    outputs: dict[str, Callable[[Tensor], Any]],
) -> AbstractContextManager[None]:
    """Hand the module's first input and its output on, by its name."""

    def hook(name: str) -> parts.Hook:
        def see(given: Any, output: Tensor) -> None:
            if name in inputs:
                inputs[name](given)
            if name in outputs:
                outputs[name](output)

        return see

    names = inputs.keys() | outputs.keys()
    return parts.hooked({model.hf.get_submodule(name): hook(name) for name in names})


def _make(original: FunctionType, host: Host) -> Callable[..., Any]:
    def get_reprs_at_idxs(
        model: Any,
        tok: Any,
        contexts: list[str],
        idxs: list[list[int]],
        layer: int,
        module_template: str,
        track: str = "in",
    ) -> Any:
        try:
            view = editable(model, tok)
            rows = tokens_of(tok, contexts)
            places = []
            for at in range(0, len(rows), GROUP):
                here = slice(at, at + GROUP)
                places += real_places(rows[here], idxs[here], tok.padding_side)
            into, out = states_at(
                view,
                rows,
                places,
                module_template.format(layer),
                inputs=track in ("in", "both"),
                outputs=track in ("out", "both"),
                kept=known.states if (known := current_job()) else None,
            )
        except NotOurs as reason:
            own_way(original, reason)
            return original(model, tok, contexts, idxs, layer, module_template, track)
        into, out = (None if part is None else handed_on(part, host) for part in (into, out))
        if track == "both":
            return into, out
        return into if track == "in" else out

    return get_reprs_at_idxs


STATES = Replacement(
    "prompts end at the token that is read, and the pass at the module",
    Signature(
        "get_reprs_at_idxs",
        ("model", "tok", "contexts", "idxs", "layer", "module_template"),
        ("track",),
    ),
    _make,
)
