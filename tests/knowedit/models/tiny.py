"""Tiny random models of many families: hidden 32, four layers, and norms, biases and multipliers
off their neutral values, as the benchmarks' matrix of families makes them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.families import models

#: Where the tests need another shape than the matrix: experts in two of four layers.
OTHERS: dict[str, dict[str, Any]] = {"deepseek_v3": {"first_k_dense_replace": 2}}


def build(family: str, **more: Any) -> Any:
    """A transformers model of the family, float32, in evaluation mode and frozen; `more` of its
    configuration.
    """
    return models.build(family, **(OTHERS.get(family, {}) | more))


def plant(model, layer, position, factor=200.0):
    """Make the MLP of `layer` write an attention sink at `position` of every text."""

    def write(_module, _inputs, output):
        scale = torch.ones(output.shape[-2], 1)
        scale[position : position + 1] = factor
        return output * scale

    model.projection(layer).register_forward_hook(write)
