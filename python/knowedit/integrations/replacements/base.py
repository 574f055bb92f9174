"""What a replacement is, and the editable view of a host's model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from knowedit.errors import KnowEditError
from knowedit.integrations.discovery import Signature
from knowedit.integrations.hosts import Host
from knowedit.models.editable import EditableModel, at_least_float32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Replacement:
    """A kind of function that can be replaced.

    Attributes:
        what: in a few words, what the replacement does differently.
        signature: what the host's function looks like.
        make: the replacement, from the host's function and the host.
        check: a further reason to leave a function alone, or None.
        fix: only with this correction switched on.
        common: other functions have such names too, so that a different signature is nothing to
            report.
    """

    what: str
    signature: Signature
    make: Callable[[FunctionType, Host], Callable[..., Any]]
    check: Callable[[FunctionType], str | None] = lambda function: None
    fix: str | None = None
    common: bool = False

    def wanted(self, host: Host) -> bool:
        return self.fix is None or self.fix in host.fixes

    def refusal(self, function: FunctionType) -> str | None:
        """Why the function cannot be replaced, or None."""
        return self.signature.difference(function) or self.check(function)


class NotOurs(Exception):
    """Raised where the host's own function must run; says why."""


def editable(hf: nn.Module, tokenizer: Any) -> EditableModel:
    """The host's model as ours, made anew for each call (milliseconds): what is kept would keep the
    model, and a host that loads one for each fact would fill the memory.

    Raises:
        NotOurs: it cannot be handled by us.
    """
    try:
        return EditableModel(hf, tokenizer)
    except KnowEditError as error:
        raise NotOurs(str(error)) from error


def handed_on(states: Tensor, host: Host) -> Tensor:
    """States or values as the host gets them: of the model's dtype, or with `fix="half"` float32
    at least.
    """
    return at_least_float32(states) if "half" in host.fixes else states


def own_way(original: FunctionType, reason: object) -> None:
    """Note that the host's own function runs, once for each reason."""
    text = f"{original.__module__}.{original.__name__} runs as it is: {reason}"
    if text not in _NOTED:
        _NOTED.add(text)
        logger.warning("%s", text)


_NOTED: set[str] = set()


def forget_notes() -> None:
    """Note everything again."""
    _NOTED.clear()


def weights_version(hf: nn.Module) -> tuple[int, ...]:
    """Changes whenever a parameter is written in place or exchanged."""
    return tuple(n for p in hf.parameters() for n in (p._version, p.data_ptr()))
