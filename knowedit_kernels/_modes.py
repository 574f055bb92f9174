"""Modes a caller may have switched on, switched off where they would change a result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def lasting(function: _F) -> _F:
    """Decorates what makes or changes tensors that are kept between calls: outside inference mode,
    whose tensors can only be read there, and without gradients.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


def without_autocast(device: str | None) -> contextlib.AbstractContextManager[Any]:
    """Keeps torch.autocast from lowering the products made on a device of this type: an op's
    arithmetic is what it says, wherever it is called. None: no tensor, nothing to do.
    """
    if device is None or not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
