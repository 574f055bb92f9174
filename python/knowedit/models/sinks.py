"""Attention sinks: the layers whose MLP writes a massive activation into the residual stream.

Many models park attention on a token that means nothing - the first one, a comma - and mark it with
a state a hundred times as long as the others. The MLPs of a few layers write that mark, or take it
out again; a change of such a projection moves the mark, and with it every text (Sun et al. 2024,
"Massive activations in large language models"). What tells these layers from the others is what
they *write*: the length of a key says little (Qwen2.5's layer 2: 9 times the others' key, 300 times
their output).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit.facts.wordings.ordinary import sentences
from knowedit.io.config import Config
from knowedit.models.editable import EditableModel
from knowedit.models.partial import Hook, hooked
from knowedit.models.tokens import batches

#: A layer that writes so many times the median length at any token carries an attention sink.
SINK_RATIO = 10.0
#: Tokens run together, and read of each text; a sink stands near a text's beginning.
BUDGET, WIDTH = 2048, 24


@dataclass(frozen=True)
class Sinks(Config):
    """How uneven the layers' states are over the tokens of ordinary text, a number a layer.

    Attributes:
        written: the largest norm of what the MLP's projection writes at one token, over the median
            of all tokens; 0 for a layer without such a projection.
        residual: the same of the layer's output, which keeps what lower layers have written.
    """

    written: tuple[float, ...]
    residual: tuple[float, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that carry a sink, ascending."""
        return tuple(layer for layer in range(len(self.written)) if self.at(layer))

    def at(self, layer: int) -> bool:
        """Whether `layer` carries a sink."""
        return self.written[layer] > SINK_RATIO


@torch.no_grad()
def measure_sinks(model: EditableModel) -> Sinks:
    """Read the shipped ordinary sentences, each from its beginning, at every position."""
    rows = [model.row(text).ids[: min(WIDTH, model.max_length)] for text in sentences()]
    written: dict[int, list[Tensor]] = {layer: [] for layer in model.layout.editable}
    residual: dict[int, list[Tensor]] = {layer: [] for layer in range(len(model.layers))}
    for batch in batches([len(ids) for ids in rows], BUDGET):
        ids, mask = model.pad([rows[i] for i in batch])

        def norms(into: list[Tensor], mask: Tensor = mask) -> Hook:
            def see(_: Tensor, output: Tensor) -> None:
                # of several residual streams the longest
                lengths = output.float().norm(dim=-1).reshape(-1, *mask.shape).amax(0)
                into.append(lengths[mask.to(lengths.device)])

            return see

        hooks = {model.projection(layer): norms(into) for layer, into in written.items()}
        hooks |= {model.layers[layer]: norms(into) for layer, into in residual.items()}
        with hooked(hooks):
            model.final_states(ids)
    depth = range(len(model.layers))
    return Sinks(
        tuple(_largest(written[layer]) if layer in written else 0.0 for layer in depth),
        tuple(_largest(residual[layer]) for layer in depth),
    )


def _largest(lengths: list[Tensor]) -> float:
    """The largest over the median; 0 for a layer that does not run."""
    if not lengths:
        return 0.0
    found = torch.cat(lengths)
    return float(found.max() / found.median().clamp(min=torch.finfo(found.dtype).tiny))
