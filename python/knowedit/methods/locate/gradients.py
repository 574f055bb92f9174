"""Second moments of the gradients at a layer's output: how the loss on ordinary text curves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.models.editable import EditableModel
from knowedit.models.partial import probed
from knowedit.models.tokens import batches
from knowedit_kernels import SecondMoment


def gradient_moments(
    model: EditableModel,
    layers: Sequence[int],
    texts: Sequence[Sequence[int]],
    *,
    budget: int = 2048,
) -> dict[int, Tensor]:
    """`{layer: E[g g^T] [hidden, hidden]}` float64, where g is the gradient, with respect to the
    output of the layer's MLP projection at a token, of the summed NLL (nats) of the tokens that
    follow it in its text. A text's first token, often a sink of attention, and its last, which
    nothing follows, do not count.

    Args:
        texts: tokens of each.
        budget: padded tokens a run.

    Raises:
        EditError: layers with routed experts; fewer tokens than the output is wide, which would
            make directions flat that were only not seen.
    """
    if mixed := [layer for layer in layers if model.layout.experts(layer) is not None]:
        raise EditError(
            f"the curvature at the output of routed experts (layer {mixed[0]}) is not known; take "
            "another metric, or edit experts='shared'"
        )
    if (count := sum(max(len(ids) - 2, 0) for ids in texts)) < model.hidden:
        raise EditError(
            f"{count} tokens are too few for the curvature of {model.hidden} outputs; give more: "
            "metric.tokens, metric.corpus"
        )
    names = [model.layout.weight_name(layer).removesuffix(".weight") for layer in layers]
    moments = {name: SecondMoment(model.hidden, device=model.device) for name in names}
    for batch in batches([len(ids) for ids in texts], budget):
        ids, mask = model.pad([texts[i] for i in batch])
        with model.evaluating(), torch.enable_grad(), probed(model, names) as seen:
            logp = model.logprobs(model.final_states(ids)[:, :-1])
            found = logp.gather(-1, ids[:, 1:, None].to(logp.device))[..., 0]
            loss = -(found * mask[:, 1:].to(found)).sum()
            gradients = torch.autograd.grad(loss, [seen[name][1] for name in names])
        keep = mask.clone()
        keep[:, 0] = False
        keep[torch.arange(len(keep), device=keep.device), mask.sum(1) - 1] = False
        for name, gradient in zip(names, gradients):
            moments[name].update(gradient.float(), keep.to(gradient.device))
    return {layer: moments[name].moment() for layer, name in zip(layers, names)}
