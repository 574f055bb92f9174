"""Texts on which two ways of running a model are compared, and how far their results are apart."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from knowedit.models.tokens import Row

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel


#: The longest attention window that the texts are made to pass.
WINDOW = 512


#: What was tried, and with which end.
_TRIED: WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = WeakKeyDictionary()


def tried(model: EditableModel, what: Hashable, trial: Callable[[], bool]) -> bool:
    """What `trial` says of the model; tried once, for each dtype and function that it attends
    with.
    """
    known = _TRIED.setdefault(model.hf, {})
    key = what, model.dtype, getattr(model.hf.config, "_attn_implementation", None)
    if key not in known:
        known[key] = trial()
    return known[key]


def check_rows(model: EditableModel) -> tuple[list[Row], list[int]]:
    """Two texts of different lengths, long enough to pass a short attention window, and where in
    them parts begin.
    """
    window = min(
        (
            value
            for name, value in model.hf.config.to_dict().items()
            if "window" in name and isinstance(value, int) and 0 < value <= WINDOW
        ),
        default=8,
    )
    lengths, starts = (window + 12, 9), [window + 5, 2]
    size = len(model.tokenizer)
    rows = [[(7 * i + 3 * n) % max(size - 8, 2) for i in range(1, n + 1)] for n in lengths]
    return [Row(ids) for ids in rows], starts


def off(one: Tensor, other: Tensor) -> float:
    """The relative difference of two results; infinite where either is not finite."""
    found = float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
    return found if found == found else float("inf")
