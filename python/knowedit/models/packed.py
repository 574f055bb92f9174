"""Linear layers on real tokens only, and on what texts begin with in common once: padding and
repetition cost nothing where most of the time goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Packed(TorchFunctionMode):
    """While it is entered, `F.linear` of states `[B, T, in]` computes the live tokens and gives
    zeros at the others; differentiable. Nothing a causal model says at a live token depends on
    tokens that are not. Other dtypes than float32 and float64 are left alone: a bfloat16 product
    compiles a kernel for every number of tokens.

    Args:
        live: `[B, T]` bool, which tokens of the batch that is run.
        alike: `[B, T]` equal numbers where tokens and all that stands in front of them are equal
            (`beginnings`): these are computed once. None: no two are.
    """

    def __init__(self, live: Tensor, alike: Tensor | None = None) -> None:
        super().__init__()
        self.alike = alike
        self._last: tuple[Tensor, Any, Tensor] | None = None  # states, when, and their live rows
        self.limit(live)

    def limit(self, live: Tensor) -> None:
        """Compute other tokens from now on, of those that were computed before."""
        self.shape, self._last = live.shape, None
        wanted = live.reshape(-1).nonzero()[:, 0]
        self.at, self.source = wanted, None
        if self.alike is None:
            return
        kinds, kind = self.alike.reshape(-1)[wanted].unique(return_inverse=True)
        if len(kinds) == len(wanted):
            return
        # one of each kind: whichever is written last
        self.at = wanted.new_empty(len(kinds)).index_copy(0, kind, wanted)
        self.source = wanted.new_full((live.numel(),), len(kinds)).index_copy(0, wanted, kind)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        plain = func is not F.linear or kwargs or args[0].shape[:-1] != self.shape
        if plain or args[0].dtype not in (torch.float32, torch.float64):
            return func(*args, **(kwargs or {}))
        found = F.linear(self._rows(args[0]), *args[1:])
        count = self.shape.numel() if self.source is None else 1
        nothing = found.new_zeros(count, found.shape[-1])
        if self.source is None:
            whole = nothing.index_copy_(0, self.at, found)
        else:
            whole = torch.cat([found, nothing]).index_select(0, self.source)
        return whole.view(*self.shape, -1)

    def _rows(self, states: Tensor) -> Tensor:
        """`[live, in]`: once for layers that are given the same states, as queries, keys and values
        are.
        """
        when = None if states.is_inference() else states._version, torch.is_grad_enabled()
        if self._last is None or self._last[0] is not states or self._last[1] != when:
            rows = states.reshape(-1, states.shape[-1]).index_select(0, self.at)
            self._last = states, when, rows
        return self._last[2]


def packed(live: Tensor, alike: Tensor | None = None) -> AbstractContextManager[Packed | None]:
    """`Packed` where it pays: on a CPU, which computes a padded token as slowly as any other; a GPU
    would wait for the launches.
    """
    if live.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return nullcontext()
    if bool(live.all()) and (alike is None or alike.unique().numel() == alike.numel()):
        return nullcontext()
    return Packed(live, alike)


def beginnings(texts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Of each token of right-padded texts a number, `[B, length]`: equal where two texts are equal
    up to there, and with them a causal model's states. Padding: -1.
    """
    known: dict[tuple[int, int], int] = {}
    found = torch.full((len(texts), length), -1)
    for line, text in enumerate(texts):
        before = -1
        for place, token in enumerate(text):
            before = known.setdefault((before, token), len(known))
            found[line, place] = before
    return found
