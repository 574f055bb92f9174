"""`Edit`: a small, reversible change of a model's weights, with everything needed to check it, to
undo it, and to make it again.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from knowedit.edits import hub
from knowedit.edits.changes import Change, apart, check_fits, read_changes, write_changes
from knowedit.edits.export.listing import export_format
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.facts.fact import Fact, asked_for, differ
from knowedit.io.lines import number_of
from knowedit.io.tensors import read_file, understood, write_file
from knowedit.models.checkpoint import Checkpoint
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.fingerprint import difference
from knowedit.models.load import accepts_model
from knowedit_kernels.lowrank import LedgerError

if TYPE_CHECKING:
    from knowedit.methods.base import Method

logger = logging.getLogger(__name__)

FORMAT = "knowedit-edit/3"
#: Read, and brought to today's form by `migrate`; the second version had no matrices of experts.
EARLIER = ("knowedit-edit/1", "knowedit-edit/2")
#: As `models.fingerprint.setup_of` writes it; empty in files of earlier versions.
SETUP = re.compile("([0-9a-f]{12}-[0-9a-f]{8})?")


@dataclass(eq=False, repr=False)
class Edit:
    """What is added to each changed parameter of a model.

    Attributes:
        method_name: of the method that made it; `method()` rebuilds the method itself.
        changes: `{parameter: LowRank or Dense}`, parameters as in `model.hf.named_parameters()`; an
            expert's matrix in a parameter that holds all of them is `NAME[expert]`. A file of the
            first version names an MLP output projection by its layer's number; `by_parameter` has
            the names.
        facts: what it writes.
        fingerprint: of the unedited model it belongs to.
        report: what the method measured and chose.
        keys: `{layer: [n, d_ff]}` float32, where it was written; for a `History`, and not saved
            with the edit.
        carried: running quantities of the sequence up to and with this edit, for the next of the
            method; kept by a `History`, and not saved with the edit.
        written: when it was committed to a session that is kept on disk, ISO 8601 in UTC.
        plan: `{layer: [facts, hidden]}` what was to be added to the output of the layers' MLP
            projections at the facts' own prompts, to measure its gain; not saved.
        key_layers: the layers that have `keys`, also where those were not saved.
        groups: of every fact, the number of the group that it was written with: facts of a group
            share a value, a column of `U`. Empty for methods that write no keys.
        owners: of every row of `keys`, its group.
        replaces: `{key of an earlier edit: numbers of its groups}` whose facts this edit takes out
            of the model, to correct or to forget them.
        exclusive: names of what it has for itself: no two edits in force may share one.
        config: the whole record of the method that made it.
        software: versions of what computed it.
        statistics: identity of the key statistics it was computed with, by layer.
        setup: of the model's configuration and tokenizer; empty in a file of an earlier version.
    """

    method_name: str
    changes: dict[str, Change]
    facts: list[Fact]
    fingerprint: str
    report: EditReport = field(default_factory=EditReport)
    keys: dict[int, Tensor] = field(default_factory=dict)
    exclusive: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
    key_layers: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    owners: tuple[int, ...] = ()
    replaces: dict[str, tuple[int, ...]] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)
    written: str = ""
    plan: dict[int, Tensor] = field(default_factory=dict)
    setup: str = ""

    format: ClassVar[str] = FORMAT
    earlier: ClassVar[tuple[str, ...]] = EARLIER

    def __repr__(self) -> str:
        first = f"{self.facts[0].text!r} -> {self.facts[0].target!r}" if self.facts else ""
        names = list(self.changes)
        some = "".join(f"\n    {name}: {self.changes[name]!r}" for name in names[:3])
        more = [f" ... and {len(found) - n} more" if len(found) > n else ""
                for found, n in ((self.facts, 1), (names, 3))]  # fmt: skip
        gain = "" if self.report.gain is None else f"gain {self.report.gain:.3f}, "
        return (
            f"Edit({self.key}, of model {self.fingerprint[:12]}\n"
            f"  {number_of(len(self.facts), 'fact')}: {_short(first)}{more[0]}\n"
            f"  {number_of(len(names), 'parameter')}:{some}{more[1]}\n"
            f"  {gain}{number_of(len(self.warnings), 'warning')})"
        )

    @property
    def warnings(self) -> list[str]:
        return list(self.report.warnings)

    @cached_property
    def key(self) -> str:
        """A name made from the method and the changes' bits."""
        digest = hashlib.blake2b(digest_size=8)
        for name, change in sorted(self.changes.items()):
            digest.update(name.encode())
            for part in change.tensors().values():
                digest.update(part.contiguous().cpu().numpy().tobytes())
        return f"{self.method_name}-{digest.hexdigest()}"

    def method(self) -> Method:
        """The method that made it, with the same settings: `edit.method().compute(model,
        edit.facts, statistics)` computes the same edit again.

        Raises:
            EditError: it records no settings (a file of the first version, or made by hand).
            ConfigError: a setting was an object, which the record only refers to.
        """
        if not self.config:
            raise EditError(
                f"this {self.method_name} edit does not record the settings it was made with (a "
                f"file of the first version?); compute it again with the method's name and settings"
            )
        # the one import that goes up: an edit holds the record of a method, and knows none
        from knowedit.methods.registry import make_method

        return make_method(self.config)

    def delta(self, at: int | str, model: EditableModel | None = None) -> Tensor:
        """The dense update of a parameter, or of a layer's MLP output projection: low-rank ones
        `[out, in]`, dense ones as the model stores them; float32.

        Args:
            at: the parameter's name or the layer's number.
            model: says which parameter a layer's projection is; not needed where the edit changes
                one parameter of the layer only.

        Raises:
            EditError: it does not change that, or several parameters of the layer.
        """
        changes: Mapping[str, Change] = self.changes
        if model is not None:
            changes = {**self.by_parameter(model), **self.changes}
            at = model.layout.weight_name(at) if isinstance(at, int) else at
        found = [name for name in changes if name == at]
        if isinstance(at, int):
            found = [name for name in changes if str(at) in name.split(".")]
        if len(found) != 1:
            known = ", ".join(list(changes)[:4]) + (", ..." if len(changes) > 4 else "")
            raise EditError(
                f"this {self.method_name} edit changes {len(found) or 'no'} "
                f"parameter{'s' * bool(found)} at {at!r}; name one of those it changes: {known}"
            )
        return changes[found[0]].dense()

    @accepts_model
    def by_parameter(self, model: EditableModel) -> dict[str, Change]:
        """`changes` with every parameter's name in `model.hf`, those of a file of the first version
        too; of a parameter that holds experts' matrices each by itself, as other edits have them.
        """
        named = {
            model.layout.weight_name(int(name)) if name.isdecimal() else name: change
            for name, change in self.changes.items()
        }
        return apart(model, named)

    def keys_without(self, groups: Collection[int], layer: int) -> Tensor:
        """Of its keys at `layer` those of other groups than these, `[n, d_ff]`."""
        keys = self.keys[layer]
        return keys[[owner not in groups for owner in self.owners]] if groups else keys

    # -- on a model ------------------------------------------------------------------------------

    @accepts_model
    def check(self, model: EditableModel) -> None:
        """Raise EditError when this edit was made for another model."""
        self.check_made_for(model)
        changes = self.by_parameter(model) if self.changes else {}
        parameters = {name for name, _ in model.hf.named_parameters()}
        if unknown := sorted({split_name(name)[0] for name in changes} - parameters):
            raise EditError(f"{model.name} has no parameter {', '.join(unknown)}")
        for name, change in changes.items():
            check_fits(name, change, tuple(model.stored(name).shape), model.is_transposed(name))

    def check_made_for(self, model: EditableModel | Checkpoint) -> None:
        """Raise EditError when it was made for other weights, another configuration or tokenizer:
        of a loaded model, or of a folder that is only read.
        """
        if other := difference(model, self.fingerprint, self.setup):
            raise EditError(
                f"this {self.method_name} edit was made for a model with fingerprint "
                f"{self.fingerprint[:12]}, but {model.name} "
                f"has {model.fingerprint[:12]}: {other}; compute the edit again for this model"
            )

    @accepts_model
    def is_applied(self, model: EditableModel) -> bool:
        return self.key in model.ledger.active

    @accepts_model
    def apply(self, model: EditableModel) -> None:
        """Write it into the model's weights, rounded once to their dtype together with every other
        active edit.

        Raises:
            EditError: it is already applied, belongs to another model, or shares something
                exclusive with another edit in force.
        """
        self.check(model)
        if self.is_applied(model):
            raise EditError(
                f"this {self.method_name} edit is already applied to {model.name}; undo it first"
            )
        if model.router is not None:
            raise EditError(
                f"{model.name} has memory edits, which are of its unedited weights; undo them first"
            )
        for key in model.ledger.active:  # reset() may have taken some that are still in the record
            if shared := sorted(model.exclusive.get(key, frozenset()) & self.exclusive):
                raise EditError(
                    f"this {self.method_name} edit and {key} both rewrite {shared[0]}"
                    + (f" and {len(shared) - 1} more" if len(shared) > 1 else "")
                    + ", and both would be lost: compute them together, or this one while the "
                    "other is applied"
                )
        raw = {name: change.raw for name, change in self.by_parameter(model).items()}
        if self.exclusive:  # before anything is written: it says nothing of an edit not in force
            model.exclusive[self.key] = self.exclusive
        try:
            model.ledger.add_many(self.key, model.register(raw))
        except (LedgerError, ValueError) as error:
            raise EditError(f"the {self.method_name} edit could not be applied: {error}") from error
        self._tell(model)

    def _tell(self, model: EditableModel) -> None:
        """Warn of facts that another edit in force answers otherwise."""
        active = set(model.ledger.active)
        for fact in self.facts:
            others = {}
            for what in asked_for(fact):
                key, said = model.told.get(what, (self.key, fact))
                if key in self.replaces or key not in active:
                    said = fact
                if differ(said.target, fact.target):
                    others[key] = said
                elif said is fact:
                    model.told[what] = self.key, fact
            for key, said in others.items():
                logger.warning(
                    "%r says %r, and the edit %s, which is in force too, says %r after %r: one of "
                    "them is lost; undo one, or correct the fact in a history",
                    fact.text, fact.target, key, said.target, said.text,
                )  # fmt: skip

    @accepts_model
    def undo(self, model: EditableModel) -> None:
        """Take it back. With no edit left every bit is what it was; edits may be undone in any
        order.

        Raises:
            EditError: it is not applied to this model, or something else has changed the weights
                since.
        """
        if not self.is_applied(model):
            raise EditError(f"this {self.method_name} edit is not applied to {model.name}")
        try:
            model.follow_parameters()
            model.ledger.remove(self.key)
        except LedgerError as error:
            raise EditError(f"the {self.method_name} edit could not be undone: {error}") from error
        model.restored(self.by_parameter(model))
        model.exclusive.pop(self.key, None)

    @accepts_model
    @contextmanager
    def applied_to(self, model: EditableModel) -> Iterator[EditableModel]:
        """Apply within a `with` block; undone at its end, also after an error. Where both the block
        and the undo fail, the block's error is the one that is raised, with a note on the other.
        """
        before = self.is_applied(model)
        try:
            self.apply(model)
            yield model
        except BaseException as error:
            try:
                self._leave(model, before)
            except EditError as problem:
                error.add_note(f"and then: {problem}")
            raise
        else:
            self._leave(model, before)

    def _leave(self, model: EditableModel, before: bool) -> None:
        """Undo it unless it was applied before, or could not be; a Ctrl-C meanwhile waits for
        that.
        """
        try:
            if not before and self.is_applied(model):
                self.undo(model)
        except KeyboardInterrupt:
            if not before and self.is_applied(model):
                self.undo(model)
            raise

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the changes and a JSON header to one safetensors file, atomically."""
        header = {"format": self.format, "fingerprint": self.fingerprint, **self.record()}
        return write_file(path, self.tensors(), header)

    def record(self) -> dict[str, Any]:
        """All but the tensors and the model's fingerprint, JSON-ready; `of` reads it."""
        return {
            "method": self.method_name,
            "facts": [fact.to_dict() for fact in self.facts],
            "report": self.report.record(),
            "key_layers": sorted({*self.key_layers, *self.keys}),
            "exclusive": sorted(self.exclusive),
            "config": self.config,
            "software": self.software,
            "statistics": self.statistics,
            **{
                name: found
                for name in ("setup", "groups", "owners", "replaces", "written")
                if (found := getattr(self, name))
            },
        }

    def tensors(self) -> dict[str, Tensor]:
        """The changes as a file holds them: `U` and `V`, or `delta`, of each parameter; a `U` that
        experts of one parameter share once, under the parameter's own name.
        """
        return write_changes(self.changes)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a file written by `save`, of this version or an earlier one.

        Raises:
            EditError: the file is missing, damaged or of another kind.
        """
        kinds = (cls, *cls.__subclasses__())
        known = {form: kind for kind in kinds for form in (kind.format, *kind.earlier)}
        header, tensors = read_file(path, tuple(known), "an edit")
        kind = known[header["format"]]
        with understood(path, "an edit"):
            if header["format"] != kind.format:
                header = kind.migrate(header, tensors)
            return kind.of(header, tensors, header["fingerprint"])

    @classmethod
    def migrate(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The record of an earlier version's file as today's `record` has it. In the first the
        neurons that NeuronPatch took stood in the report, and layers that have factors had keys.
        """
        if "key_layers" in record:
            return dict(record)
        names = {full.rpartition(".")[0] for full in tensors}
        neurons = record["report"].get("neurons", {})
        exclusive = [f"layer {layer} neuron {n}" for layer in neurons for n in neurons[layer]]
        new = {"key_layers": sorted(int(name) for name in names if name.isdecimal())}
        return {**record, **new, "exclusive": exclusive}

    @classmethod
    def of(cls, record: Mapping[str, Any], tensors: Mapping[str, Tensor], fingerprint: str) -> Edit:
        """From `record()` and `tensors()`."""
        check_origin(record, fingerprint)
        return cls(
            method_name=record["method"],
            changes=read_changes(tensors),
            facts=[Fact.from_dict(fact) for fact in record["facts"]],
            fingerprint=fingerprint,
            report=EditReport.from_dict(record["report"]),
            exclusive=frozenset(record.get("exclusive", ())),
            config=record.get("config", {}),
            software=record.get("software", {}),
            statistics=record.get("statistics", {}),
            key_layers=tuple(record.get("key_layers", ())),
            groups=tuple(record.get("groups", ())),
            owners=tuple(record.get("owners", ())),
            replaces={key: tuple(which) for key, which in record.get("replaces", {}).items()},
            setup=record.get("setup", ""),
            written=record.get("written", ""),
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write it with a model card into a folder, as `push_to_hub` uploads it."""
        return hub.write_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload it with a model card (its facts, method, settings and measures) to the Hugging
        Face hub; `options` as of `edits.hub.push`: commit_message, private, token, revision,
        create_pr. Returns the hub's `CommitInfo`. Raises EditError.
        """
        return hub.push(self, repo_id, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Edit:
        """Load one from a repository of the hub, a folder or a file; `options` as of
        `edits.hub.find`: revision, token, cache_dir, local_files_only.

        Raises:
            EditError: there is none, or it is damaged.
        """
        return cls.load(hub.find(name, **options))

    @accepts_model
    def export(self, path: str | Path, model: EditableModel, format: str = "peft") -> Path:
        """Write it in another program's format, a name of `export.listing.formats()`.

        Raises:
            EditError: an unknown format, or one that cannot hold this edit.
        """
        return export_format(format)(model, [self], path)


def check_origin(record: Mapping[str, Any], fingerprint: Any) -> None:
    """Raise TypeError where what says which model an edit is of, and what made it, is of another
    kind.
    """
    method, setup = record["method"], record.get("setup", "")
    for name, value in (("fingerprint", fingerprint), ("method", method), ("setup", setup)):
        if not isinstance(value, str) or (name == "setup" and not SETUP.fullmatch(value)):
            raise TypeError(f"{name} is {value!r}")


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
