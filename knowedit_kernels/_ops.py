"""Every op of the package: its schema and what it returns for fake tensors. The one page to read first.

An op is defined here once. A *dispatched* op is a public entry: it goes through `_dispatch`, which
picks an implementation registered by the op's folder. A *compiled* op has its kernel in `csrc`,
which fills in the CPU or CUDA key when the extension is loaded; call it only behind a verifier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from knowedit_kernels import _dispatch

LIBRARY = torch.library.Library("knowedit", "DEF")


def _mutates_only(*args: Any, **kwargs: Any) -> None:
    """The fake of an op that returns nothing: its effect is on its arguments, whose metadata stay."""


def _define(schema: str, fake: Callable[..., Any] = _mutates_only, *, compiled: bool = False) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    if not compiled:
        LIBRARY.impl(name, functools.partial(_dispatch.run, name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"knowedit::{name}", fake, lib=LIBRARY)


# moments: c += keys^T keys over the rows whose mask is true. c [d, d] float64; keys [tokens, d]; mask [tokens] bool
_define("second_moment_(Tensor(a!) c, Tensor keys, Tensor? mask=None) -> ()")
# the lower triangle only, dense rows; isa as in csrc/cpu/isa.h (0 portable, 1 AVX-512, 2 AVX-512 BF16)
_define("syrk_(Tensor(a!) c, Tensor keys, int isa) -> ()", compiled=True)
