"""Factors of plain matrices, kept: the same matrix is factored once, whoever passes it again."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from knowedit_kernels._modes import without_autocast
from knowedit_kernels.solver.metrics import Covariance

#: How many factors are kept; each takes as much memory as its matrix in float64.
KEPT = 16

_FACTORS: OrderedDict[str, Covariance] = OrderedDict()


def content_of(C: Tensor) -> str:
    """A digest of a square matrix's contents: of its product with a fixed vector and its diagonal.

    Two matrices that differ by more than rounding differ in it; one pass over the matrix.
    """
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(C.shape[-1], generator=generator, dtype=torch.float64, device="cpu")
    with without_autocast(C.device.type):
        seen = torch.cat([C @ probe.to(C), C.diagonal()]).double().cpu()
    digest = hashlib.sha256(seen.numpy().tobytes())
    digest.update(repr((tuple(C.shape), C.dtype, C.device)).encode())
    return digest.hexdigest()


def cached_covariance(C: Tensor, weight: float = 1.0, shift: float = 0.0) -> Covariance:
    """The metric weight * (C + shift * I), whose factor is made once for each C and shift.

    C: [m, m], float32 or float64, and is not kept. Raises ValueError as ``Covariance``.
    """
    key = f"{content_of(C)} {shift!r}"
    if key not in _FACTORS:
        mean = float(C.diagonal().double().mean())
        _FACTORS[key] = Covariance(C, ridge=shift / mean if shift else 0.0)
        while len(_FACTORS) > KEPT:
            _FACTORS.popitem(last=False)
    _FACTORS.move_to_end(key)
    return _FACTORS[key].with_weight(weight)


def forget_factors() -> None:
    """Free the memory of all factors that are kept."""
    _FACTORS.clear()
