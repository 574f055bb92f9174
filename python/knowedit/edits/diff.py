"""What differs between two models, or between a model and itself with an edit: read from the files,
a tensor at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import read_record, record_of
from knowedit.edits.journal import edits_in
from knowedit.errors import EditError
from knowedit.io.lines import number_of
from knowedit.io.progress import bar
from knowedit.io.tables import Column, Table
from knowedit.models.checkpoint import Checkpoint
from knowedit.models.experts import split_name

#: Singular values below this share of the largest are not told apart from the Gram matrix's noise.
RESOLUTION = 1e-7
#: A sum of independent roundings has a largest singular value below their size times
#: (sqrt(rows) + sqrt(columns)) but for some per cent.
MARGIN = 1.1


@dataclass(frozen=True)
class WeightDiff:
    """How one parameter differs.

    Attributes:
        weight: its name. shape: as it is stored.
        changed: share of its numbers that differ.
        rank: singular values of the difference above what rounding to the dtype leaves; None for a
            parameter that is no matrix.
        norm: of the difference (Frobenius). relative: over that of the first model's weight.
        largest: difference of one number.
    """

    weight: str
    shape: tuple[int, ...]
    changed: float
    rank: int | None
    norm: float
    relative: float
    largest: float


@dataclass(frozen=True)
class ModelDiff:
    """What differs, and what is recorded of why.

    Attributes:
        first, second: names of what is compared.
        parameters: compared.
        weights: that differ.
        notes: in sentences: other dtypes, shapes, or weights that only one has.
        facts: `{"method", "key", "prompt", "target"}` of what is recorded as written.
    """

    first: str
    second: str
    parameters: int
    weights: list[WeightDiff]
    notes: list[str] = field(default_factory=list)
    facts: list[dict[str, str]] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether all weights have the same bits."""
        return not self.weights and not self.notes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """The weights that differ, then the facts, if any are known."""
        columns: list[str | Column] = [
            "weight",
            "shape",
            Column("changed", ".2%"),
            Column("rank", "d"),
            Column("|D|", ".4g"),
            Column("|D|/|W|", ".3%"),
            Column("largest", ".3g"),
        ]
        rows = [
            (w.weight, " x ".join(map(str, w.shape)), w.changed, w.rank, w.norm, w.relative,
             w.largest)
            for w in self.weights
        ]  # fmt: skip
        title = f"{self.first} -> {self.second}: {len(rows)} of {self.parameters} weights differ"
        found = [Table(columns, rows, title=title, notes=tuple(self.notes))]
        if self.facts:
            written = [(f["prompt"], f["target"], f["method"], f["key"]) for f in self.facts]
            found.append(Table(["prompt", "answer", "method", "edit"], written, title="facts"))
        return found


def diff(first: str | Path, second: str | Path) -> ModelDiff:
    """Compare the weights of the folder `first` with those of the folder `second`, or with itself
    under the edits of the file `second`. No model is loaded; at most two tensors, and what is
    computed from them in float64, are in memory.

    Raises:
        EditError: the edits are of another model. ModelError: a folder is no plain checkpoint.
    """
    base = Checkpoint(first)
    if Path(second).is_dir() and (Path(second) / "config.json").exists():
        return _of_folders(base, Checkpoint(second))
    return _of_edits(base, second)


def _of_folders(base: Checkpoint, other: Checkpoint) -> ModelDiff:
    """Of two checkpoints."""
    weights: list[WeightDiff] = []
    notes = [
        f"{name} is in {one.name} only"
        for one, left in ((base, other), (other, base))
        for name in sorted(set(one.shapes) - set(left.shapes))
    ]
    common = [name for name in base.shapes if name in other.shapes]
    dtypes: dict[str, int] = {}
    with bar("comparing weights", len(common), "weights") as advance:
        for name in common:
            advance()
            if base.shapes[name] != other.shapes[name]:
                notes.append(f"{name}: {list(base.shapes[name])} and {list(other.shapes[name])}")
                continue
            before, after = base.tensor(name), other.tensor(name)
            if before.dtype != after.dtype:
                pair = f"{_short(before)} and {_short(after)}"
                dtypes[pair] = dtypes.get(pair, 0) + 1
            if found := compare(name, before, after):
                weights.append(found)
    notes += [
        f"{number_of(count, 'weight')} {'is' if count == 1 else 'are'} stored as {pair}"
        for pair, count in dtypes.items()
    ]
    return ModelDiff(base.name, other.name, len(common), weights, notes, _recorded(other.folder))


def _of_edits(base: Checkpoint, path: str | Path) -> ModelDiff:
    """Of a checkpoint and edits of it: what they add, before it is rounded to the weights'
    dtype.
    """
    edits = edits_in(path)
    for edit in edits:
        edit.check_made_for(base)
    if experts := [name for edit in edits for name in edit.changes if split_name(name)[1]]:
        raise EditError(
            f"{experts[0]} is one expert's matrix; apply the edits and compare the two folders"
        )
    sums: dict[str, list[Edit]] = {}
    for edit in edits:
        for name in edit.changes:
            sums.setdefault(name, []).append(edit)
    weights = []
    for name, made in sums.items():
        weight = base.tensor(name).double()
        turned = base.is_transposed(name)
        total = torch.zeros_like(weight)
        for edit in made:
            delta = edit.delta(name).double()
            total += delta.T if turned and delta.shape != weight.shape else delta
        weights += [found for found in [_described(name, weight, total, 0.0)] if found]
    return ModelDiff(base.name, str(path), len(base.shapes), weights, [], list(_facts(edits)))


def compare(name: str, before: Tensor, after: Tensor) -> WeightDiff | None:
    """How a tensor differs from an earlier one of its shape; None where no number does. A singular
    value of the difference counts where rounding to the coarser dtype does not explain it.
    """
    if before.dtype == after.dtype and torch.equal(before, after):
        return None
    coarse = max((before.dtype, after.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    rounding = torch.finfo(coarse).eps / 12**0.5 * after.double().square().mean().sqrt()
    delta = after.double() - before.double()
    return _described(name, before.double(), delta, float(rounding))


def _described(name: str, weight: Tensor, delta: Tensor, rounding: float) -> WeightDiff | None:
    """The figures of a difference; None where it is nothing.

    Args:
        rounding: root mean square of what rounding adds to each number of `delta`.
    """
    changed = float((delta != 0).double().mean())
    if not changed:
        return None
    norm = float(delta.norm())
    return WeightDiff(
        weight=name,
        shape=tuple(delta.shape),
        changed=changed,
        rank=_rank(delta, rounding) if delta.dim() == 2 else None,
        norm=norm,
        relative=norm / max(float(weight.norm()), torch.finfo(torch.float64).tiny),
        largest=float(delta.abs().max()),
    )


def _rank(delta: Tensor, rounding: float) -> int:
    """Singular values of a matrix above the noise of rounding, from its smaller Gram matrix."""
    rows, columns = delta.shape
    gram = delta @ delta.T if rows <= columns else delta.T @ delta
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    noise = MARGIN * rounding * (rows**0.5 + columns**0.5)
    return int((values > max(noise, RESOLUTION * float(values.max()))).sum())


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _recorded(folder: Path) -> list[dict[str, str]]:
    """The facts that the folder's undo record names, if it has one."""
    try:
        header = read_record(record_of(folder))[0]
    except EditError:
        return []
    return [
        _fact(made["method"], made["key"], fact)
        for made in header["edits"]
        for fact in made["facts"]
    ]


def _facts(edits: list[Edit]) -> Iterator[dict[str, str]]:
    for edit in edits:
        for fact in edit.facts:
            yield _fact(edit.method_name, edit.key, fact.to_dict())


def _fact(method: str, key: str, fact: dict[str, Any]) -> dict[str, str]:
    prompt = fact["prompt"].replace("{}", fact["subject"])
    return {"method": method, "key": key, "prompt": prompt, "target": fact["target"]}
