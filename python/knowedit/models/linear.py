"""float32 linear layers, dense and of experts, by oneDNN where MKL, which torch multiplies with, is
slow: on CPUs that are not Intel's.

MKL leaves out AVX-512 there: 97 GFLOP/s on one core of an EPYC (family 26) where oneDNN reaches
210. Which of the two runs follows from the processor alone, so that the same machine gives the same
bits every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class OneDNNLinear(TorchFunctionMode):
    """While it is entered, `F.linear` of float32 CPU tensors goes to oneDNN, and so does each
    expert's part of a `grouped_mm`: with gradients of the inputs; where the weight or the bias
    wants one, it goes its usual way.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func is F.linear and not named and _is_layer(*args) and _is_usual(args[1:]):
            return _linear(*args)
        if func is GROUPED and _is_by_expert(args, named) and _is_usual(args[1:]):
            return _by_expert(args[0], args[1], named["offs"])
        return func(*args, **named)


#: The product of rows that are sorted by expert with each expert's matrix.
GROUPED = getattr(torch, "_grouped_mm", None)


def _is_layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """States `[.., in]`, a matrix `[out, in]` of some numbers, and a bias `[out]`, if any."""
    return (
        all(map(_plain, (x, weight)))
        and weight.dim() == 2
        and weight.numel() > 0
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or (_plain(bias) and bias.shape == weight.shape[:1]))
    )


def _is_by_expert(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Rows `[n, in]`, matrices `[E, in, out]`, and `[E]` where each expert's rows end."""
    if len(args) != 2 or [n for n, given in kwargs.items() if given is not None] != ["offs"]:
        return False
    (x, weight), ends = args, kwargs["offs"]
    return (
        all(map(_plain, args))
        and (x.dim(), weight.dim()) == (2, 3)
        and weight.numel() > 0
        and x.shape[1] == weight.shape[1]
        and ends.dtype == torch.int32
        and ends.shape == weight.shape[:1]
    )


def _is_usual(weights: Sequence[Tensor | None]) -> bool:
    """Nothing wants a gradient of weights, another dtype or a derivative forwards."""
    return not (
        (torch.is_grad_enabled() and any(map(_trained, weights)))
        or torch.is_autocast_enabled("cpu")
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`[n, out]`; rows behind the last expert's, which are no one's, are zeros."""
    stops = ends.tolist()
    parts = [
        _linear(x[start:stop], weight[expert].mT)
        for expert, (start, stop) in enumerate(zip([0, *stops], stops))
        if stop > start
    ]
    rest = x.new_zeros(len(x) - (stops[-1] if stops else 0), weight.shape[2])
    return torch.cat([*parts, rest])


class _Fixed(torch.autograd.Function):
    """A linear layer whose weight and bias stay as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return _Fixed.apply(gradient, weight.mT), None, None


def _linear(x: Tensor, *fixed: Any) -> Tensor:
    """A linear layer of a weight, and a bias, that stay as they are."""
    if not torch.is_grad_enabled() or not any(map(_trained, (x, *fixed))):
        return _product(x, *fixed)
    # rows, as torch lets no one write into a view that a function of ours returns
    return _Fixed.apply(x.reshape(-1, x.shape[-1]), *fixed).view(*x.shape[:-1], len(fixed[0]))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def fast_linear() -> AbstractContextManager[Any]:
    """`OneDNNLinear` where it helps, else nothing."""
    return OneDNNLinear() if _helps() else nullcontext()


@lru_cache(1)
def _helps() -> bool:
    """AVX-512 on a CPU of another maker than Intel, and a torch that has the operator."""
    if (
        not hasattr(torch.ops.mkldnn, "_linear_pointwise")
        or "AVX512" not in torch.backends.cpu.get_cpu_capability()
    ):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
    )


def _trained(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad
