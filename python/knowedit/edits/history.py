"""What sequential editing must remember: the edits written so far, with the keys they were written
at.

A history is an object of the caller, never a global, and belongs to one model. Given to an editor
it adds K Kᵀ of the earlier keys to the metric, so that a later edit leaves their outputs alone.
Memory: the keys, `n x d_ff` float32 a layer beside the edits' own factors, and never a `d_ff x
    d_ff` matrix of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from knowedit.edits.edit import Edit, format_of, read_file
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, check_facts
from knowedit.io.files import atomic_file
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit_kernels.solver import Metric

FORMAT = "knowedit-history/1"


def edits_in(path: str | Path) -> list[Edit]:
    """The edits of a history's file, oldest first, or that of an edit file. Raises EditError: it is
    neither.
    """
    return History.load(path).edits if format_of(path) == FORMAT else [Edit.load(path)]


@dataclass(eq=False)
class History:
    """The committed edits of one model, oldest first.

    Attributes:
        fingerprint: of the unedited model they belong to.
        edits: each with its `keys`.
    """

    fingerprint: str
    edits: list[Edit] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def facts(self) -> list[Fact]:
        """Every fact written so far."""
        return [fact for edit in self.edits for fact in edit.facts]

    def add(self, edit: Edit) -> None:
        """Commit `edit`.

        Raises:
            EditError: it is of another model, is in the history already, or has no keys (an edit
                file does not hold them).
        """
        if edit.fingerprint != self.fingerprint:
            raise EditError(
                f"the {edit.method} edit is of model {edit.fingerprint[:12]}, not "
                f"{self.fingerprint[:12]}"
            )
        if any(edit.key == known.key for known in self.edits):
            raise EditError(f"this {edit.method} edit is in the history already")
        if set(edit.keys) != set(edit.factors):
            raise EditError(
                f"this {edit.method} edit came without its keys; compute it again, or load the "
                f"history it is in"
            )
        self.edits.append(edit)

    def remove(self, edit: Edit) -> None:
        """Forget `edit`. Raises EditError when it is not here."""
        left = [known for known in self.edits if known.key != edit.key]
        if len(left) == len(self.edits):
            raise EditError(f"this {edit.method} edit is not in the history")
        self.edits = left

    def keys(self, layer: int) -> Tensor | None:
        """Columns `[d_ff, n]` float64 whose K Kᵀ is that of every key written at `layer`; at most
        `d_ff` of them.
        """
        found = [edit.keys[layer].cpu().double() for edit in self.edits if layer in edit.keys]
        if not found:
            return None
        rows = torch.cat(found)
        return torch.linalg.qr(rows, mode="r").R.T if len(rows) > rows.shape[1] else rows.T

    def extend(self, metric: Metric, layer: int) -> Metric:
        """`metric` plus K Kᵀ of the keys written at `layer` (AlphaEdit's cache, MEMIT's sequential
        baseline).
        """
        keys = self.keys(layer)
        return metric if keys is None else metric.with_history(keys)

    def check(self, model: EditableModel) -> None:
        """Raise EditError unless every edit here is of `model` and applied to it."""
        if model.fingerprint != self.fingerprint:
            raise EditError(
                f"the history belongs to a model with fingerprint {self.fingerprint[:12]}, but "
                f"{model.name} has "
                f"{model.fingerprint[:12]}: other weights or another dtype; start a new history "
                f"for this model"
            )
        absent = sum(not edit.is_applied(model) for edit in self.edits)
        if absent:
            raise EditError(
                f"{absent} of the history's {len(self)} edits are not applied to {model.name}: "
                f"apply them "
                "(history.replay(model)), or remove them from the history"
            )

    def check_new(self, facts: Sequence[Fact]) -> list[Fact]:
        """`facts`, when they can be written after those written so far.

        Raises:
            FactError: one repeats or contradicts another, or one written before; undo the edit that
                has it first.
        """
        places = [f"history, edit {i}" for i, edit in enumerate(self.edits) for _ in edit.facts]
        places += [f"facts[{i}]" for i in range(len(facts))]
        check_facts([*self.facts, *facts], places=places)
        return list(facts)

    @accepts_model
    def replay(self, model: EditableModel) -> None:
        """Apply the edits that are not applied to `model` yet. Raises EditError when they are of
        another model.
        """
        for edit in self.edits:
            if not edit.is_applied(model):
                edit.apply(model)

    # -- on disk
    # ------------------------------------------------------------------------------------------------  # noqa: E501

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        edits = []
        for number, edit in enumerate(self.edits):
            keys = {f"{layer}.K": key.contiguous().cpu() for layer, key in edit.keys.items()}
            tensors |= {
                f"{number}.{name}": tensor for name, tensor in {**edit.tensors(), **keys}.items()
            }
            edits.append(
                {
                    "method": edit.method,
                    "report": edit.report,
                    "facts": [fact.to_dict() for fact in edit.facts],
                }
            )
        header = {"format": FORMAT, "fingerprint": self.fingerprint, "edits": edits}
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata={"knowedit": json.dumps(header)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a file written by `save`.

        Raises:
            EditError: the file is missing, damaged or of another kind.
        """
        header, tensors = read_file(path, FORMAT, "a history")
        history = cls(header["fingerprint"])
        for number, about in enumerate(header["edits"]):
            own = {
                full.partition(".")[2]: t
                for full, t in tensors.items()
                if full.partition(".")[0] == str(number)
            }
            keys = {
                int(name.removesuffix(".K")): own.pop(name)
                for name in sorted(own)
                if name.endswith(".K")
            }
            edit = Edit.of(about, own, header["fingerprint"])
            edit.keys = keys
            history.edits.append(edit)
        return history
