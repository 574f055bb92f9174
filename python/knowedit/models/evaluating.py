"""Run a transformers model as it is meant to be read: evaluation mode, nothing trainable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(hf: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and its parameters are frozen; afterwards
    both are as they were found.
    """
    training = [module for module in hf.modules() if module.training]
    trainable = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)
