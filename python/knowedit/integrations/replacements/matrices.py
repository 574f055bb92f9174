"""Matrices that remember what they are made of.

A host writes its normal equations as dense algebra: `solve(w * C + K Kᵀ, K)`, `inverse(C) @ k`,
`svd(C)`, `solve(P (K Kᵀ + H) + l I, P K Rᵀ)`. `Symmetric` and `Projector` stand for `C` and `P`
there: they go through the host's own lines, and when it comes to the solve, what is known about
them gives the same answer from a factor that is kept, or in the space of the keys. Anything else
that is done to them happens to the plain tensor. So no line of the host's is replaced, and a fork
that changes some of them keeps its change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit_kernels import Covariance, EditSolver
from knowedit_kernels.solver import cached_covariance

#: How far a product with a random vector may be off, relative, for a matrix to be taken for the
#: product of the factors that it should be made of.
SAME = {torch.float64: 1e-9, torch.float32: 1e-4}


class Remembering(ABC):
    """Base of the stand-ins: whatever is not known here happens to the plain tensor."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The plain tensor."""

    @abstractmethod
    def copy(self, **changes: Any) -> Any:
        """The same, of another dtype or on another device."""

    dtype: torch.dtype
    device: torch.device

    def to(self, *args: Any, **kwargs: Any) -> Any:
        probe = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self.copy(dtype=probe.dtype, device=probe.device)

    def double(self) -> Any:
        return self.copy(dtype=torch.float64)

    def float(self) -> Any:
        return self.copy(dtype=torch.float32)

    def cpu(self) -> Any:
        return self.copy(device=torch.device("cpu"))

    def cuda(self, *args: Any, **kwargs: Any) -> Any:
        return self.to("cuda", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[index]

    def __len__(self) -> int:
        return len(self.dense())

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dense().numpy().__array__(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        known = _KNOWN.get(func)
        if known is not None:
            found = known(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*map(plain, args), **{k: plain(v) for k, v in (kwargs or {}).items()})

    def __matmul__(self, other: Any) -> Any:
        return self.dense() @ plain(other)

    def __rmatmul__(self, other: Any) -> Any:
        return plain(other) @ self.dense()

    def __mul__(self, other: Any) -> Any:
        return self.dense() * plain(other)

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def __add__(self, other: Any) -> Any:
        return self.dense() + plain(other)

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self.dense() - plain(other)

    def __rsub__(self, other: Any) -> Any:
        return plain(other) - self.dense()

    def __truediv__(self, other: Any) -> Any:
        return self.dense() / plain(other)

    def __neg__(self) -> Any:
        return -self.dense()


def plain(value: Any) -> Any:
    """The value with every stand-in in it as a plain tensor."""
    if isinstance(value, Remembering):
        return value.dense()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0)


def _multiple_of_identity(matrix: Tensor) -> float | None:
    """The number if `matrix` is that times the identity."""
    first = float(matrix[0, 0])
    same = bool((matrix.diagonal() == first).all()) and int(matrix.count_nonzero()) in (
        0,
        len(matrix),
    )
    return first if same else None


# -- a covariance


class Symmetric(Remembering):
    """weight * C + shift * I + extra, for a positive definite C.

    Args:
        base: C `[d, d]`, as the host has it.
        extra: a dense matrix that was added, or None.
    """

    def __init__(
        self,
        base: Tensor,
        weight: float = 1.0,
        shift: float = 0.0,
        extra: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.base, self.weight, self.shift, self.extra = base, weight, shift, extra
        self.dtype, self.device = dtype or base.dtype, device or base.device

    def copy(self, **changes: Any) -> Symmetric:
        kept = {name: getattr(self, name) for name in ("weight", "shift", "extra")}
        return Symmetric(
            self.base, **{**kept, "dtype": self.dtype, "device": self.device, **changes}
        )

    def dense(self) -> Tensor:
        found = self.base.to(self.device, self.dtype)
        if self.weight != 1:
            found = self.weight * found
        if self.shift:
            found = found + self.shift * torch.eye(len(found), dtype=self.dtype, device=self.device)
        return found if self.extra is None else found + self.extra.to(found)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def T(self) -> Symmetric:
        return self

    mT = T

    def metric(self) -> Covariance:
        """weight * C + shift * I, factored once. Raises ValueError when it has no factor."""
        return cached_covariance(self.base.to(self.device), self.weight, self.shift / self.weight)

    def __mul__(self, other: Any) -> Any:
        if not _is_number(other) or float(other) <= 0:
            return super().__mul__(other)
        extra = None if self.extra is None else self.extra * other
        by = float(other)
        return self.copy(weight=self.weight * by, shift=self.shift * by, extra=extra)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, Tensor) or other.shape != self.shape:
            return super().__add__(other)
        number = _multiple_of_identity(other)
        if number is not None and number >= 0:
            return self.copy(shift=self.shift + number)
        extra = other if self.extra is None else self.extra + other
        return self.copy(extra=extra, dtype=torch.promote_types(self.dtype, other.dtype))

    def solve(self, right: Tensor) -> Any:
        """This, inverted, times `right`: from the factor, with `extra` = K Kᵀ where K = `right`.
        NotImplemented when it is made of something else.
        """
        if not isinstance(right, Tensor) or right.ndim != 2 or right.shape[1] > len(right):
            return NotImplemented
        try:
            if self.extra is None:
                return self.metric().inverse(right).to(right)
            if not is_product(self.extra, [right]):
                return NotImplemented
            return EditSolver(self.metric(), right).A.mT.to(right)
        except ValueError:  # no factor: the host's own solve may still have an answer
            return NotImplemented

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, descending, and vectors `[d, d]` in columns."""
        values, vectors = torch.linalg.eigh(self.dense().double())
        return values.flip(0).to(self.dtype), vectors.flip(1).to(self.dtype)


class Inverse(Remembering):
    """The inverse of a `Symmetric`, which is never made."""

    def __init__(
        self, of: Symmetric, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        self.of, self.dtype, self.device = of, dtype or of.dtype, device or of.device

    def copy(self, **changes: Any) -> Inverse:
        return Inverse(self.of, **{"dtype": self.dtype, "device": self.device, **changes})

    def dense(self) -> Tensor:
        return torch.linalg.inv(self.of.dense().double()).to(self.device, self.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.of.shape

    @property
    def T(self) -> Inverse:
        return self

    mT = T

    def _times(self, columns: Tensor) -> Tensor:
        return self.of.metric().inverse(columns).to(self.device, self.dtype)

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor) or other.ndim > 2:
            return super().__matmul__(other)
        return self._times(other[:, None])[:, 0] if other.ndim == 1 else self._times(other)

    def __rmatmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor) or other.ndim > 2:
            return super().__rmatmul__(other)
        return (self @ other.mT).mT if other.ndim == 2 else self @ other


def is_product(matrix: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether `matrix` is the sum of F Fᵀ over `factors`, told by a product with a random
    vector.
    """
    probe = torch.randn(
        len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    probe = probe.to(matrix)
    seen = matrix @ probe
    made = torch.zeros_like(seen)
    for factor in factors:
        part = factor.to(matrix)
        made += part @ (part.mT @ probe)
    return bool((seen - made).norm() <= SAME.get(matrix.dtype, 1e-4) * seen.norm())


# -- a projector


class Projectors(Remembering):
    """A stack of projectors `[layers, d, d]`; one of them remembers which it is.

    Args:
        keys: what `compute_ks` gave lately, by layer's place in the stack.
    """

    def __init__(self, stack: Tensor, keys: KeyLog) -> None:
        self.stack, self.keys = stack, keys
        self.dtype, self.device = stack.dtype, stack.device

    def dense(self) -> Tensor:
        return self.stack

    def copy(self, **changes: Any) -> Projectors:
        return Projectors(self.stack.to(**changes), self.keys)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if isinstance(parts[0], int) and all(part == slice(None) for part in parts[1:]):
            return Projector(self.stack[parts[0]], parts[0], self.keys)
        return self.stack[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.stack[index] = plain(value)


class Projector(Remembering):
    """P `[d, d]`."""

    def __init__(self, base: Tensor, place: int, keys: KeyLog) -> None:
        self.base, self.place, self.keys = base, place, keys
        self.dtype, self.device = base.dtype, base.device

    def dense(self) -> Tensor:
        return self.base

    def copy(self, **changes: Any) -> Projector:
        return Projector(self.base.to(**changes), self.place, self.keys)

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor) or other.ndim != 2:
            return super().__matmul__(other)
        if other.shape == self.base.shape:
            return ProjectedSum(self, other)
        return Tall(self.base @ other)


class Tall(Remembering):
    """P K `[d, n]`, which keeps its columns when it is multiplied by Rᵀ."""

    def __init__(self, columns: Tensor, right: Tensor | None = None) -> None:
        self.columns, self.right = columns, right
        self.dtype, self.device = columns.dtype, columns.device

    def dense(self) -> Tensor:
        return self.columns if self.right is None else self.columns @ self.right

    def copy(self, **changes: Any) -> Tensor:
        return self.dense().to(**changes)

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Tensor) and other.ndim == 2 and self.right is None:
            return Tall(self.columns, other)
        return super().__matmul__(other)


class ProjectedSum(Remembering):
    """P S + shift * I, S dense."""

    def __init__(self, projector: Projector, inner: Tensor, shift: float = 0.0) -> None:
        self.projector, self.inner, self.shift = projector, inner, shift
        self.dtype, self.device = inner.dtype, inner.device

    def dense(self) -> Tensor:
        found = self.projector.dense() @ self.inner
        if not self.shift:
            return found
        return found + self.shift * torch.eye(len(found), dtype=found.dtype, device=found.device)

    def copy(self, **changes: Any) -> Tensor:
        return self.dense().to(**changes)

    def __add__(self, other: Any) -> Any:
        number = None
        if isinstance(other, Tensor) and other.shape == self.inner.shape:
            number = _multiple_of_identity(other)
        if number is None:
            return super().__add__(other)
        return ProjectedSum(self.projector, self.inner, self.shift + number)

    def solve(self, right: Any) -> Any:
        """This, inverted, times P K Rᵀ, in the space of the keys; NotImplemented when S is not the
        sum of what the keys say.

        With G all keys and K = G E, `(P G Gᵀ + l I)^-1 P K Rᵀ = P G (l I + Gᵀ P G)^-1 E Rᵀ`.
        """
        if not isinstance(right, Tall) or right.right is None or self.shift <= 0:
            return NotImplemented
        found = self.projector.keys.factors(self.projector.place, self.inner)
        if found is None or right.columns.shape[1] != found[0].shape[1]:
            return NotImplemented
        if sum(part.shape[1] for part in found) >= len(self.inner):
            return NotImplemented
        everything = torch.cat([part.to(self.inner) for part in found], 1)
        projected = torch.cat(
            [right.columns, self.projector.dense() @ everything[:, found[0].shape[1] :]], 1
        )
        wide = everything.double().mT @ projected.double()
        wide.diagonal().add_(self.shift)
        chosen = torch.eye(len(wide), found[0].shape[1], dtype=wide.dtype, device=wide.device)
        small = torch.linalg.solve(wide, chosen).to(projected)
        return projected @ (small @ right.right)


class KeyLog:
    """The keys that the host computed, from which its sums of products are recognised.

    AlphaEdit's cache is the sum of K Kᵀ over the keys of all earlier edits, taken after each. Which
    keys are in it is not assumed: a sum of recorded ones is compared with the matrix.
    """

    def __init__(self) -> None:
        self.layers: list[int] = []
        self._recent: dict[int, list[Tensor]] = {}
        self._summed: dict[int, list[Tensor]] = {}

    def record(self, layer: int, keys: Tensor) -> None:
        """`keys` `[n, d]` of a layer."""
        self._recent.setdefault(layer, []).append(keys.detach().mT)

    def factors(self, place: int, matrix: Tensor) -> list[Tensor] | None:
        """Keys `[d, n]` whose products add up to `matrix`, the newest first; or None."""
        if place >= len(self.layers) or not (recent := self._recent.get(self.layers[place])):
            return None
        layer = self.layers[place]
        *earlier, newest = recent
        summed = self._summed.get(layer, [])
        for added in (earlier[-1:], [], earlier[-2:]):
            if is_product(matrix, [newest, *summed, *added]):
                self._summed[layer] = summed + added
                self._recent[layer] = [newest]
                return [newest, *self._summed[layer]]
        if is_product(matrix, [newest]):  # a new history
            self._summed[layer], self._recent[layer] = [], [newest]
            return [newest]
        return None


# -- what torch is asked to do with them


def _solve(left: Any, right: Any, **options: Any) -> Any:
    known = isinstance(left, (Symmetric, ProjectedSum)) and not options
    return left.solve(right) if known else NotImplemented


def _invert(matrix: Any, **options: Any) -> Any:
    known = isinstance(matrix, Symmetric) and matrix.extra is None and not options
    if not known:
        return NotImplemented
    try:
        matrix.metric()
    except ValueError:
        return NotImplemented
    return Inverse(matrix)


class SVD(NamedTuple):
    """As `torch.linalg.svd` returns it."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def _svd(matrix: Any, full_matrices: bool = True, **options: Any) -> Any:
    """Of a positive definite matrix, its eigenvalues and vectors."""
    if not isinstance(matrix, Symmetric) or options:
        return NotImplemented
    values, vectors = matrix.spectrum()
    if float(values[-1]) < 0:
        return NotImplemented
    return SVD(vectors, values, vectors.mT)


def _matmul(left: Any, right: Any, **options: Any) -> Any:
    """Where the left one is a plain tensor, or `torch.matmul` was called by name."""
    if options:
        return NotImplemented
    if isinstance(left, Remembering):
        return left @ right
    return right.__rmatmul__(left)


def _add(left: Any, right: Any, **options: Any) -> Any:
    if options:
        return NotImplemented
    return left + right if isinstance(left, Remembering) else right + left


def _mul(left: Any, right: Any) -> Any:
    return left * right if isinstance(left, Remembering) else right * left


_KNOWN: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.inverse: _invert,
    torch.linalg.inv: _invert,
    torch.linalg.svd: _svd,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda left, right: _matmul(right, left),
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.mul: _mul,
    torch.mul: _mul,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
}
