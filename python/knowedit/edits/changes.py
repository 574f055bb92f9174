"""What an edit adds to one parameter: a low-rank update, or a dense one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.models.editable import EditableModel
from knowedit.models.experts import slice_name, split_name
from knowedit_kernels.lowrank import Change as RawChange


@dataclass(frozen=True, eq=False)
class LowRank:
    """`U Vᵀ`, of a matrix that maps `in` inputs to `out` outputs, however the model stores it.

    Attributes:
        U: `[out, r]`, float32.
        V: `[in, r]`, float32.
    """

    U: Tensor
    V: Tensor

    @property
    def rank(self) -> int:
        return self.U.shape[1]

    @property
    def norm(self) -> float:
        """Of Frobenius, in float64 and without forming the product."""
        left, right = self.U.double(), self.V.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt())

    @property
    def raw(self) -> RawChange:
        """As the kernels take it: the pair."""
        return self.U, self.V

    def dense(self) -> Tensor:
        """The product `[out, in]`."""
        return self.U @ self.V.T

    def least(self) -> LowRank:
        """The same product at a rank that is no larger than its smaller side: summed up in float64,
        so equal to rounding. Itself where that is so already.
        """
        left, right = self.U.double(), self.V.double()
        if self.rank <= min(len(left), len(right)):
            return self
        if len(left) <= len(right):
            return LowRank(torch.eye(len(left), device=left.device), (right @ left.T).float())
        return LowRank((left @ right.T).float(), torch.eye(len(right), device=left.device))

    def to(self, device: torch.device | str) -> LowRank:
        return LowRank(self.U.to(device), self.V.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """By the names that a file has for them."""
        return {"U": self.U, "V": self.V}

    def __repr__(self) -> str:
        return f"LowRank(rank {self.rank}, [{self.U.shape[0]}, {self.V.shape[0]}])"


@dataclass(frozen=True, eq=False)
class Dense:
    """A change of every entry of a parameter.

    Attributes:
        delta: of the parameter's own shape, as the model stores it; float32.
    """

    delta: Tensor

    @property
    def rank(self) -> None:
        """A dense change has none that is known."""
        return None

    @property
    def norm(self) -> float:
        """Of Frobenius, in float64."""
        return float(self.delta.norm(dtype=torch.float64))

    @property
    def raw(self) -> RawChange:
        """As the kernels take it: the tensor."""
        return self.delta

    def dense(self) -> Tensor:
        return self.delta

    def to(self, device: torch.device | str) -> Dense:
        return Dense(self.delta.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """By the name that a file has for it."""
        return {"delta": self.delta}

    def __repr__(self) -> str:
        return f"Dense({list(self.delta.shape)})"


Change = LowRank | Dense


def change_of(raw: RawChange | Change) -> Change:
    """A change from what the kernels take: a pair `(U, V)`, or a dense tensor."""
    if isinstance(raw, (LowRank, Dense)):
        return raw
    return Dense(raw) if isinstance(raw, Tensor) else LowRank(*raw)


def oversized(changes: Mapping[str, Change]) -> list[str]:
    """A note where factors are of a higher rank than their matrix can have: each fact keeps its
    own, to be taken out again.
    """
    wide = {
        name: change
        for name, change in changes.items()
        if isinstance(change, LowRank) and change.rank > min(len(change.U), len(change.V))
    }
    if not wide:
        return []
    name, widest = max(wide.items(), key=lambda item: item[1].rank)
    rows, columns = len(widest.U), len(widest.V)
    times = widest.rank * (rows + columns) / (rows * columns)
    return [
        f"the edit keeps factors of rank {widest.rank} of {name}, {times:.1f} times as many "
        f"numbers as the matrix has: each fact has its own, so that it can be taken out again; "
        f"exports have rank {min(rows, columns)}"
    ]


def check_fits(name: str, change: Change, stored: tuple[int, ...], transposed: bool) -> None:
    """Raise EditError unless `change` is one of a parameter stored in this shape, `[in, out]` where
    it is `transposed`.
    """
    if isinstance(change, LowRank):
        shape: tuple[int, ...] = (change.U.shape[0], change.V.shape[0])
        shape = shape[::-1] if transposed else shape
    else:
        shape = tuple(change.delta.shape)
    if shape != stored:
        raise EditError(f"{name}: a change of shape {shape} does not fit the parameter's {stored}")


def write_changes(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """The tensors of a file, by name: `NAME.U` and `NAME.V`, or `NAME.delta`. Experts of one
    parameter have a `NAME[expert].V` each, and share its `NAME.U` where they have the same.
    """
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        parameter, expert = split_name(name)
        for part, tensor in change.tensors().items():
            if expert is not None and part == "U":
                if found.setdefault(f"{parameter}.U", tensor) is tensor:
                    continue
                tensor = tensor.clone()  # a file holds no tensor twice
            found[f"{name}.{part}"] = tensor
    return found


def read_changes(tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """The changes of what `write_changes` makes; sorted by name. Raises ValueError for a tensor
    that is of none.
    """
    names = sorted(full.rpartition(".")[0] for full in tensors if full.endswith((".V", ".delta")))
    found: dict[str, Change] = {}
    left = set(tensors)
    for name in names:
        if f"{name}.delta" in tensors:
            used = {f"{name}.delta"}
            found[name] = Dense(tensors[f"{name}.delta"])
        else:
            own, shared = f"{name}.U", f"{split_name(name)[0]}.U"
            left_factor = own if own in tensors else shared
            used = {left_factor, f"{name}.V"}
            found[name] = LowRank(tensors[left_factor], tensors[f"{name}.V"])
        left -= used
    if left:
        raise ValueError(f"the tensor {min(left)} is of no change")
    return found


def changes_of(
    model: EditableModel, factors: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[str, Change]:
    """By parameter, what `{layer: (U [hidden, r], V [width, r])}` adds to the layers' MLP output
    projections; of routed experts to the matrix of each that it changes, all with the same `U`.
    """
    found: dict[str, Change] = {}
    for layer, (left, right) in factors.items():
        name, experts = model.layout.weight_name(layer), model.layout.experts(layer)
        if (beside := model.layout.beside(layer)) is not None:
            right, own = right.split([len(right) - beside.width, beside.width])
            # a copy: a file holds no tensor twice
            found[beside.weight] = LowRank(left.clone(), own.contiguous())
        if experts is None:
            found[name] = LowRank(left, right)
            continue
        for expert, part in enumerate(right.split(experts.width)):
            if bool(part.any()):
                found[slice_name(name, expert)] = LowRank(left, part.contiguous())
    return found


def apart(model: EditableModel, changes: Mapping[str, Change]) -> dict[str, Change]:
    """The same, with a dense change of all experts' matrices, whichever these are, as one of each:
    edits of the whole parameter and of single experts then meet under the same names, and none
    writes to what another has under its own.
    """
    routed = [layer for layer in model.layout.editable if model.layout.experts(layer)]
    holding = {model.layout.weight_name(layer).rpartition(".")[0] for layer in routed}
    found: dict[str, Change] = {}
    for name, change in changes.items():
        held = isinstance(change, Dense) and name.rpartition(".")[0] in holding
        parts = change.delta if held and isinstance(change, Dense) else None
        if parts is None or parts.dim() != 3 or parts.shape != model.stored(name).shape:
            found[name] = change
            continue
        found |= {slice_name(name, expert): Dense(part) for expert, part in enumerate(parts)}
    return found


def factors_of(
    model: EditableModel, changes: Mapping[str, Change], layer: int
) -> tuple[Tensor, Tensor] | None:
    """`(U [hidden, r], V [width, r])` of what `changes` adds to the layer's MLP output projection,
    as `changes_of` takes it; None where that is nothing.

    Raises:
        EditError: the change is dense.
    """
    name, experts = model.layout.weight_name(layer), model.layout.experts(layer)
    beside = model.layout.beside(layer)
    parts: dict[int | None, LowRank] = {}
    for full, change in changes.items():
        parameter, expert = split_name(full)
        if parameter != name and (beside is None or parameter != beside.weight):
            continue
        if not isinstance(change, LowRank):
            raise EditError(
                f"the change of {full} is dense, and has no factors; undo the whole edit instead"
            )
        parts[expert] = change
    if not parts:
        return None
    first = next(iter(parts.values()))
    if experts is None:
        return first.U, first.V
    nothing = first.V.new_zeros(experts.width, first.rank)
    wide = [parts[e].V if e in parts else nothing for e in range(experts.count)]
    if beside is not None:
        wide.append(parts[None].V if None in parts else first.V.new_zeros(beside.width, first.rank))
    return first.U, torch.cat(wide)


def side_by_side(*pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors of a sum, in the order given."""
    left, right = zip(*pairs)
    return torch.cat(left, dim=1), torch.cat(right, dim=1)


def relative_norms(
    model: EditableModel, factors: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, float]:
    """`|U Vᵀ|_F / |W|_F` of the MLP's output projection, per layer; of all experts together where
    it has routed ones.

    Raises:
        EditError: that projection is all zeros.
    """
    return {
        layer: _relative(
            LowRank(*pair).norm,
            float(torch.stack(_norms(model, layer)).norm()),
            f"layer {layer}: the MLP's output projection",
        )
        for layer, pair in factors.items()
    }


def _norms(model: EditableModel, layer: int) -> list[Tensor]:
    """Of all that a layer's projection consists of, float64."""
    beside = model.layout.beside(layer)
    weights = [model.weight(layer), *([] if beside is None else [model.stored(beside.weight)])]
    return [weight.detach().norm(dtype=torch.float64) for weight in weights]


def relative_norm(weight: Tensor, change: RawChange | Change) -> float:
    """`|change|_F / |weight|_F`.

    Raises:
        EditError: the weight is all zeros.
    """
    norm = float(weight.detach().norm(dtype=torch.float64))
    return _relative(change_of(change).norm, norm, f"a weight {list(weight.shape)} to be edited")


def _relative(change: float, weight: float, what: str) -> float:
    """One norm by the other; raises EditError where that of the weight, `what`, is 0."""
    if not weight:
        raise EditError(
            f"{what} is all zeros, so nothing can be said of how large a change of it is; check "
            "the model's weights, or edit another layer"
        )
    return change / weight
