"""What callers hand over by mistake, said with the remedy: things that are no tensors, sizes that
are no whole numbers, devices that are not there.
"""

from __future__ import annotations

from typing import Any

import torch


def need_tensors(**given: Any) -> None:
    """Raises TypeError naming the first argument that is no tensor, and what to give instead."""
    for name, value in given.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, not {_kind(value)}{_remedy(value)}")


def need_lists(**given: Any) -> None:
    """Raises TypeError naming the first argument that is no list or tuple."""
    for name, value in given.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, one for each layer, not {_kind(value)}")


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A size as a number. Raises TypeError unless it is whole, ValueError if it is too small."""
    if not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a whole number, not {_kind(value)} {value!r}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")
    return int(value)


def open_device(device: torch.device | str) -> torch.device:
    """A device by its full name: "cuda" becomes "cuda:0".

    Raises ValueError naming those that are here if torch does not know it or cannot reach it, and
    for the meta device, whose tensors hold no numbers.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):  # an unknown name; a build without it; no such number
        found = None
    if found is None or found.type == "meta":
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        other = torch.accelerator.current_accelerator()
        if other is not None and other.type != "cuda":
            here.append(other.type)
        raise ValueError(f"device={str(device)!r} cannot be used: here is {', '.join(here)}")
    return found


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _remedy(value: Any) -> str:
    if isinstance(value, torch.nn.Module):
        return "; give its .weight"
    if callable(getattr(value, "moment", None)):
        return "; give its .moment()"
    if isinstance(value, (list, tuple, int, float)) or hasattr(value, "__array__"):
        return "; torch.as_tensor makes one of an array or a list"
    return ""
