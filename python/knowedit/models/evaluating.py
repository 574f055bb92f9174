"""Run a transformers model as it is meant to be read: evaluation mode, nothing trainable, not
compiled, and in none of the modes that a caller may be in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn

from knowedit_kernels._modes import without_autocast

#: Whether the modes that torch is in are our own.
_plain: ContextVar[bool] = ContextVar("plain", default=False)


@contextmanager
def evaluating(hf: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation mode and its parameters are frozen; afterwards
    both are as they were found. What is compiled (`hf.compile()`) runs as it is written: compiled
    code passes over hooks that it was not compiled with.
    """
    training = [module for module in hf.modules() if module.training]
    trainable = [parameter for parameter in hf.parameters() if parameter.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in trainable:
            parameter.requires_grad_(False)
        with _as_written(hf):
            yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def plain_modes() -> Iterator[None]:
    """Within the block torch computes as it does where no mode is switched on: with gradients where
    they are asked for, and in the dtypes of the weights (no autocast), whatever the caller is in.
    Within another such block, where the modes are our own, it does nothing.
    """
    if _plain.get():
        yield
        return
    token = _plain.set(True)
    try:
        with ExitStack() as modes:
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda"):
                modes.enter_context(without_autocast(device))
            yield
    finally:
        _plain.reset(token)


def _as_written(hf: nn.Module) -> AbstractContextManager[None]:
    if any(module._compiled_call_impl is not None for module in hf.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
