"""Linear layers on real tokens only: padding costs nothing where most of the time goes."""

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
    """

    def __init__(self, live: Tensor) -> None:
        super().__init__()
        self.limit(live)

    def limit(self, live: Tensor) -> None:
        """Compute other tokens from now on."""
        self.shape = live.shape
        self.at = live.reshape(-1).nonzero()[:, 0]

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
        rows = args[0].reshape(-1, args[0].shape[-1])
        found = F.linear(rows.index_select(0, self.at), *args[1:])
        whole = found.new_zeros(len(rows), found.shape[-1]).index_copy(0, self.at, found)
        return whole.view(*self.shape, -1)


def packed(live: Tensor) -> AbstractContextManager[Packed | None]:
    """`Packed` where it pays: on a CPU, which computes a padded token as slowly as any other; a GPU
    would wait for the launches.
    """
    if live.device.type != "cpu" or torch.is_autocast_enabled("cpu") or bool(live.all()):
        return nullcontext()
    return Packed(live)
