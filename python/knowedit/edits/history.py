"""What sequential editing must remember: the edits written so far, with the keys they were written
at.

A history is an object of the caller, never a global, and belongs to one model. Given to a method
it adds K Kᵀ of the earlier keys to the metric, so that a later edit leaves their outputs alone.
Memory: the keys, `n x d_ff` float32 a layer beside the edits' own factors; `compact` brings both
down to what does not grow, a matrix of the weight's size and at most a `d_ff x d_ff` one a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.edits.merging import merged
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, as_facts, check_facts
from knowedit.io.lines import number_of
from knowedit.io.tensors import read_file, understood, write_file
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.fingerprint import difference
from knowedit.models.load import accepts_model
from knowedit_kernels.solver import Metric

FORMAT = "knowedit-history/4"
EARLIER = (
    "knowedit-history/1",
    "knowedit-history/2",
    "knowedit-history/3",  # had no folded keys
)  # read, and brought to today's form by `migrate`


class Place(NamedTuple):
    """Where a fact of a history stands: in an edit, and in which of its groups (None: the edit has
    none).
    """

    fact: Fact
    edit: Edit
    group: int | None


@dataclass(eq=False, repr=False)
class History:
    """The committed edits of one model, oldest first.

    Attributes:
        fingerprint: of the unedited model they belong to.
        edits: each with its `keys`.
        folded: so many of the first edits have given up their keys (`compact`).
        state: `{layer: [at most d_ff, d_ff]}` float64, rows whose `Rᵀ R` is the `K Kᵀ` of theirs.
    """

    fingerprint: str
    edits: list[Edit] = field(default_factory=list)
    folded: int = 0
    state: dict[int, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        last = "".join(
            f"\n  {edit.key}: {number_of(len(edit.facts), 'fact')}" for edit in self.edits[-5:]
        )
        more = f"\n  (the last 5 of {len(self)})" if len(self) > 5 else ""
        return (
            f"History(of model {self.fingerprint[:12]}: {number_of(len(self), 'edit')}, "
            f"{number_of(len(self.facts), 'fact')}{last}{more})"
        )

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def facts(self) -> list[Fact]:
        """Every fact written so far that no later edit has taken out."""
        return [place.fact for place in self.standing()]

    def standing(self) -> list[Place]:
        """Where each of `facts` was written."""
        gone = self.replaced()
        return [
            Place(fact, edit, edit.groups[i] if edit.groups else None)
            for edit in self.edits
            for i, fact in enumerate(edit.facts)
            if not edit.groups or edit.groups[i] not in gone.get(edit.key, ())
        ]

    def replaced(self) -> dict[str, set[int]]:
        """`{edit's key: numbers of its groups}` that later edits have taken out."""
        gone: dict[str, set[int]] = {}
        for edit in self.edits:
            for key, groups in edit.replaces.items():
                gone.setdefault(key, set()).update(groups)
        return gone

    def find(self, facts: Sequence[Fact]) -> list[Place]:
        """Where the facts stand that say something of the same prompts and subjects, and those
        that were written in one group with them; in the order of writing.
        """
        asked = {(fact.prompt, fact.subject) for fact in facts}
        standing = self.standing()
        found = [p for p in standing if (p.fact.prompt, p.fact.subject) in asked]
        groups = {(p.edit.key, p.group) for p in found if p.group is not None}
        return [p for p in standing if p in found or (p.edit.key, p.group) in groups]

    def followed_by(self, edit: Edit) -> History:
        """A history with `edit` behind these edits; this one stays as it is."""
        longer = self.copy()
        longer.add(edit)
        return longer

    def copy(self) -> History:
        """The same edits in a history of its own."""
        return History(self.fingerprint, list(self.edits), self.folded, dict(self.state))

    def add(self, edit: Edit) -> None:
        """Commit `edit`.

        Raises:
            EditError: it is of another model, is in the history already, or has no keys (an edit
                file does not hold them).
        """
        if edit.fingerprint != self.fingerprint:
            raise EditError(
                f"the {edit.method_name} edit is of model {edit.fingerprint[:12]}, not "
                f"{self.fingerprint[:12]}"
            )
        if any(edit.key == known.key for known in self.edits):
            raise EditError(f"this {edit.method_name} edit is in the history already")
        if set(edit.key_layers) - set(edit.keys):
            raise EditError(
                f"this {edit.method_name} edit came without its keys; compute it again, or load "
                f"the history it is in"
            )
        self.edits.append(edit)

    def remove(self, edit: Edit) -> None:
        """Forget `edit`. Raises EditError: it is not here, or a later edit replaces some of it."""
        left = [known for known in self.edits if known.key != edit.key]
        if len(left) == len(self.edits):
            raise EditError(f"this {edit.method_name} edit is not in the history")
        if later := next((known for known in left if edit.key in known.replaces), None):
            raise EditError(
                f"{later.key} corrects or forgets facts of this {edit.method_name} edit; undo it "
                "first"
            )
        if edit.key in {known.key for known in self.edits[: self.folded]}:
            raise EditError(
                f"this {edit.method_name} edit was compacted, and its keys cannot be told from "
                "others any more; go back to a copy of the history from before that"
            )
        self.edits = left

    def keys(self, layer: int) -> Tensor | None:
        """Columns `[d_ff, n]` float64 whose K Kᵀ is that of every key written at `layer` for facts
        that stand; at most `d_ff` of them.
        """
        gone = self.replaced()
        found = [self.state[layer]] if layer in self.state else []
        found += [
            edit.keys_without(gone.get(edit.key, ()), layer).cpu().double()
            for edit in self.edits
            if layer in edit.keys
        ]
        if not sum(map(len, found)):
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
        """Raise EditError unless every edit here is of `model`, and of the experts that it is seen
        with, and applied to it.
        """
        setups = {edit.setup for edit in self.edits} or {""}
        found = (difference(model, self.fingerprint, setup) for setup in sorted(setups))
        if other := next(filter(None, found), None):
            raise EditError(
                f"the history belongs to a model with fingerprint {self.fingerprint[:12]}, but "
                f"{model.name} has {model.fingerprint[:12]}: {other}; start a new history for this "
                "model"
            )
        for edit in self.edits:
            layers = set(edit.keys) & set(model.layout.parts)
            names = {split_name(name)[0] for name in edit.by_parameter(model)} if layers else set()
            for layer in layers:
                same = edit.keys[layer].shape[1] == model.layout.width(layer)
                if model.layout.weight_name(layer) not in names or not same:
                    raise EditError(
                        f"an edit of the history changes {sorted(names)[0]}, and this one would "
                        f"change {model.layout.weight_name(layer)}, whose keys are others; write "
                        "all edits of a history with the same `experts`, or start a new one"
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
            FactError: one repeats or contradicts another, or one written before; correct that one
                (`Session.correct`), or undo the edit that has it.
        """
        facts = as_facts(facts)
        numbers = {edit.key: number for number, edit in enumerate(self.edits)}
        standing = self.standing()
        places = [f"history, edit {numbers[place.edit.key]}" for place in standing]
        places += [f"facts[{i}]" for i in range(len(facts))]
        check_facts([*(place.fact for place in standing), *facts], places=places)
        return facts

    @accepts_model
    def replay(self, model: EditableModel) -> None:
        """Apply the edits that are not applied to `model` yet. Raises EditError when they are of
        another model.
        """
        for edit in self.edits:
            if not edit.is_applied(model):
                edit.apply(model)

    @accepts_model
    def compact(self, model: EditableModel, keep: int = 0) -> None:
        """Merge all but the last `keep` edits into one, and their keys into at most `d_ff` a layer:
        what is kept then, and what later edits cost, no longer depends on how many they were.
        Recursive least squares goes on as if nothing had happened; the weights are the same but for
        a rounding of float32. The merged facts stay known, but cannot be undone, corrected or
        forgotten one by one any more.

        Raises:
            EditError: an edit that stays corrects one that is to be merged, or one cannot be merged
                or is not applied; nothing is changed then.
        """
        self.check(model)
        count = len(self) - keep
        old, left = self.edits[:count], self.edits[count:]
        if not old or (count == 1 and self.folded):
            return
        taken = {key for edit in left for key in edit.replaces}
        if any(edit.key in taken for edit in old):
            raise EditError(
                "an edit that is to stay corrects or forgets facts of one that is to be merged; "
                "keep fewer, or more"
            )
        layers = sorted({layer for edit in old for layer in edit.keys} | set(self.state))
        before = History(self.fingerprint, old, self.folded, self.state)
        state = {layer: keys.T for layer in layers if (keys := before.keys(layer)) is not None}
        one = merged(old, before.facts, model)
        one.key_layers, one.carried = tuple(layers), old[-1].carried
        try:
            for edit in old:
                edit.undo(model)
            one.apply(model)
        except BaseException:
            if one.is_applied(model):
                one.undo(model)
            self.replay(model)
            raise
        self.edits, self.folded, self.state = [one, *left], 1, state

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, atomically."""
        tensors: dict[str, Tensor] = {}
        for number, edit in enumerate(self.edits):
            if edit.format != Edit.format:  # of a class of its own, with tensors of its own
                raise EditError(
                    f"a {edit.method_name} edit cannot be part of a history's file; save the edit "
                    f"itself"
                )
            keys = {f"{layer}.K": key for layer, key in edit.keys.items()}
            keys |= {f"{name}.carried": moments for name, moments in edit.carried.items()}
            tensors |= {
                f"{number}.{name}": tensor for name, tensor in {**edit.tensors(), **keys}.items()
            }
        tensors |= {f"state.{layer}": rows.contiguous() for layer, rows in self.state.items()}
        records = [edit.record() for edit in self.edits]
        header: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "edits": records,
        }
        header |= {"folded": self.folded} if self.folded else {}
        return write_file(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a file written by `save`, of this version or an earlier one.

        Raises:
            EditError: the file is missing, damaged or of another kind.
        """
        header, tensors = read_file(path, (FORMAT, *EARLIER), "a history")
        with understood(path, "a history"):
            history = cls(header["fingerprint"], folded=header.get("folded", 0))
            if not isinstance(history.fingerprint, str) or type(history.folded) is not int:
                raise TypeError(
                    f"fingerprint is {history.fingerprint!r}, folded {history.folded!r}"
                )
            history.state = {
                int(name.removeprefix("state.")): rows
                for name, rows in tensors.items()
                if name.startswith("state.")
            }
            for number, record in enumerate(header["edits"]):
                own = {
                    full.partition(".")[2]: tensor
                    for full, tensor in tensors.items()
                    if full.partition(".")[0] == str(number)
                }
                keys = {
                    int(name.removesuffix(".K")): own.pop(name)
                    for name in sorted(own)
                    if name.endswith(".K")
                }
                carried = {
                    name.removesuffix(".carried"): own.pop(name)
                    for name in sorted(own)
                    if name.endswith(".carried")
                }
                record = record if header["format"] == FORMAT else cls.migrate(record, own)
                edit = Edit.of(record, own, header["fingerprint"])
                edit.keys, edit.carried = keys, carried
                history.edits.append(edit)
        return history

    @classmethod
    def migrate(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The record of an edit in a history of the first version, as `Edit.record` has it now."""
        return Edit.migrate(record, tensors)
