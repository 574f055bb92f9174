"""From the bottom up to a module: a forward pass ends as soon as all that is wanted was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError
from knowedit.models.experts import WideProjection
from knowedit.models.probing import first_of
from knowedit.models.tokens import batches

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


class Stop(Exception):
    """Raised inside a forward pass once the last wanted value was read."""


@torch.no_grad()
def read(
    model: EditableModel,
    ids: Tensor,
    *,
    inputs: Mapping[str, Callable[[Any], Any]] | None = None,
    outputs: Mapping[str, Callable[[Tensor], Any]] | None = None,
    positions: Tensor | None = None,
) -> None:
    """One forward pass that ends as soon as all wanted values were read; nothing above runs.

    Args:
        ids: `[B, T]`, right-padded: causal attention never looks at the padding, so no mask is
            needed.
        inputs, outputs: by module name below `hf`, what is called with the module's first input or
            output, `[B, T, width]`; with what routed experts are given (`Routed`) where the module
            holds them. Before the last of `inputs` the pass stops without running the module
            itself.
        positions: `[B, T]`, where several texts stand behind each other in a row: each begins again
            at 0.

    Raises:
        ModelError: the pass ended without reaching a module.
    """
    wanted = {("input", name) for name in inputs or {}}
    wanted |= {("output", name) for name in outputs or {}}
    routed = model.layout.routed

    def done(kind: str, name: str) -> None:
        wanted.discard((kind, name))
        if not wanted:
            raise Stop

    def before(
        name: str, take: Callable[[Any], Any], module: nn.Module, given: Any, named: Any
    ) -> None:
        if name in routed:
            take(WideProjection(module, routed[name]).given(given, named).reshape(*ids.shape))
        else:
            take(_by_text(given[0], ids))
        done("input", name)

    def after(
        name: str, take: Callable[[Tensor], Any], _module: nn.Module, _given: Any, output: Any
    ) -> None:
        take(_by_text(first_of(output), ids))
        done("output", name)

    handles: list[Any] = []
    try:
        for name, take in (inputs or {}).items():
            module = model.hf.get_submodule(name)
            handles.append(
                module.register_forward_pre_hook(partial(before, name, take), with_kwargs=True)
            )
        for name, take in (outputs or {}).items():
            module = model.hf.get_submodule(name)
            handles.append(module.register_forward_hook(partial(after, name, take)))
        model.final_states(ids, positions)
    except Stop:
        return
    finally:
        for handle in handles:
            handle.remove()
    left = ", ".join(sorted(name for _, name in wanted)) or "anything that was asked for"
    raise ModelError(f"{model.name}: the forward pass ended without reaching {left}")


def _by_text(states: Tensor, ids: Tensor) -> Tensor:
    """States of the texts `ids` `[B, T]` as `[B, T, width]`: some MLPs have all tokens in one row,
    and of several streams (Gemma 3n) the first is the model's own.
    """
    if states.dim() > 3:
        return states[(0,) * (states.dim() - 3)]
    return states.reshape(*ids.shape, -1) if states.dim() == 2 else states


def read_keys(
    model: EditableModel,
    ids: Tensor,
    layers: Sequence[int],
    on_key: Callable[[int, Any], Any],
    *,
    positions: Tensor | None = None,
) -> None:
    """`on_key(layer, keys [B, T, d_ff])` for each of `layers` in one pass, which ends before the
    deepest one's projection; `Routed` in place of the keys where a layer has experts; see `read`.
    """
    model.check_layers(layers)
    names = {model.layout.projection(layer): layer for layer in sorted(set(layers))}
    read(
        model,
        ids,
        inputs={name: partial(on_key, layer) for name, layer in names.items()},
        positions=positions,
    )


def layer_outputs(
    model: EditableModel, inputs: Sequence[list[int]], layer: int, budget: int = 2048
) -> Iterator[tuple[list[int], Tensor]]:
    """Outputs of `layer`, batch by batch: which of the token lists, and their states `[B, T,
    hidden]`, right-padded.
    """
    model.check_layers([layer])
    for group in batches([len(ids) for ids in inputs], budget):
        found: list[Tensor] = []
        ids, _ = model.pad([inputs[i] for i in group])
        read(model, ids, outputs={model.layout.layer(layer): found.append})
        yield group, found[0]
