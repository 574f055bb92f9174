"""Random sequences of edits applied, taken back in any order, used in `with` blocks, copied with
their model and written to folders: what the weights hold must be a function of the set of active
edits, and every bit must come back.

Edits are computed once, by every method and on models of several layouts; the sequences only apply
and take back, which takes milliseconds.
"""

from __future__ import annotations

import copy
import logging
import random
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from knowedit.edits.changes import Dense, changes_of
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import restore, save_edited
from knowedit.errors import EditError, KnowEditError
from knowedit.methods.locate.values import ValueSettings
from knowedit.methods.registry import make_method
from knowedit.models.editable import EditableModel
from tests.faults.tally import Tally
from tests.knowedit.edits.test_edit import a_trained_edit, an_edit
from tests.knowedit.methods.helpers import FACTS, SAME, statistics_of, target_of
from tests.knowedit.methods.test_experts import statistics_of as of_experts
from tests.knowedit.models.tiny import build

#: Models by name: family, configuration, dtype. GPT-2 stores its matrices transposed; Mixtral and
#: gpt-oss have routed experts, in both layouts.
LAYOUTS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("llama", {}, torch.float32),
    "llama-bf16": ("llama", {}, torch.bfloat16),
    "llama-tied": ("llama", {"tie_word_embeddings": True}, torch.float32),
    "gpt2": ("gpt2", {}, torch.float32),
    "gpt2-bf16": ("gpt2", {}, torch.bfloat16),
    "mixtral": ("mixtral", {}, torch.float32),
    "gpt-oss-bf16": ("gpt_oss", {}, torch.bfloat16),
}
LAYERS = (1, 2)
#: One of every form of edit; MEND and SERAC need a trained network first.
METHODS = (
    "memit", "rome", "emmet", "pmet", "alphaedit", "metake", "rose", "lora", "ft", "ft-l",
    "neuron-patch",
)  # fmt: skip
OF_ONE_LAYER = {"rome", "ft-l", "neuron-patch"}
OTHER_FACTS = [replace(FACTS[0], target="Nice"), SAME]


class Workbench:
    """A model, edits of it, and the weights of every set of edits seen so far.

    Attributes:
        states: `{keys of the active edits: checksum of all weights}`.
        done: how often each kind of step was taken.
    """

    def __init__(self, model: EditableModel, edits: Sequence[Edit]) -> None:
        self.model, self.edits = model, list(edits)
        self.states = {frozenset[str](): bits(model)}
        self.done: Counter[str] = Counter()

    def check(self, model: EditableModel) -> None:
        """Raise AssertionError when the weights are not those of the active edits, or the two
        records of what is active differ.
        """
        active = frozenset(model.ledger.active)
        found = bits(model)
        assert self.states.setdefault(active, found) == found, sorted(active)
        assert {e.key for e in self.edits if e.is_applied(model)} == active

    def clashes(self, model: EditableModel, edit: Edit) -> bool:
        """Whether an edit must be refused: applied already, or an active one has for itself what it
        wants for itself.
        """
        active = [other for other in self.edits if other.key in model.ledger.active]
        return any(other is edit or other.exclusive & edit.exclusive for other in active)

    def run(self, chance: random.Random, folder: Path, steps: int = 6) -> None:
        """One sequence; raises AssertionError where anything is not as it should be."""
        model = self.model
        for _ in range(steps):
            step = chance.choices(STEPS, WEIGHTS)[0]
            self.done[step.__name__] += 1
            model = step(self, model, chance, folder) or model
            self.check(model)
        for edit in chance.sample(self.edits, len(self.edits)):
            if edit.is_applied(model):
                edit.undo(model)
                self.check(model)
        for used in {id(m): m for m in (model, self.model)}.values():
            for key in chance.sample(used.ledger.active, len(used.ledger.active)):
                next(e for e in self.edits if e.key == key).undo(used)
            self.check(used)
            assert not used.ledger.active and not used.exclusive


def apply(bench: Workbench, model: EditableModel, chance: random.Random, _: Path) -> None:
    """Apply any edit; it is refused exactly where it should be."""
    edit = chance.choice(bench.edits)
    if bench.clashes(model, edit):
        bench.done["refused"] += 1
        _refused(lambda: edit.apply(model))
    else:
        edit.apply(model)
        assert edit.is_applied(model)


def undo(bench: Workbench, model: EditableModel, chance: random.Random, _: Path) -> None:
    """Take back any edit; one that is not applied is refused."""
    edit = chance.choice(bench.edits)
    if edit.is_applied(model):
        edit.undo(model)
    else:
        _refused(lambda: edit.undo(model))


def take_one_back(bench: Workbench, model: EditableModel, chance: random.Random, _: Path) -> None:
    """Take back one that is applied."""
    if applied := [edit for edit in bench.edits if edit.is_applied(model)]:
        chance.choice(applied).undo(model)


def within(bench: Workbench, model: EditableModel, chance: random.Random, folder: Path) -> None:
    """A `with` block, that others are applied and taken back in; half of them end in an error."""
    edit = chance.choice(bench.edits)
    if bench.clashes(model, edit):
        with _Refused(), edit.applied_to(model):
            raise AssertionError("an edit was applied that clashes")
        return
    fails = chance.random() < 0.5
    try:
        with edit.applied_to(model):
            apply(bench, model, chance, folder)
            bench.check(model)
            undo(bench, model, chance, folder)  # perhaps of the block's own edit
            bench.check(model)
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert not edit.is_applied(model)


def cloned(
    _: Workbench, model: EditableModel, chance: random.Random, __: Path
) -> EditableModel | None:
    """Go on with a copy, which has the edits too; or with the same model under a new name for
    it.
    """
    if chance.random() < 0.5:
        return EditableModel(model.hf, model.tokenizer, name=model.name)
    return copy.deepcopy(model)


def saved(bench: Workbench, model: EditableModel, chance: random.Random, folder: Path) -> None:
    """Write an edited folder and restore it: wholly, or one edit after another."""
    if model.ledger.active:
        return
    edits: list[Edit] = []
    for edit in chance.sample(bench.edits, 3):
        if not any(edit.exclusive & other.exclusive for other in edits):
            edits.append(edit)
    shutil.rmtree(folder, ignore_errors=True)
    save_edited(model, edits, folder)
    if chance.random() < 0.5:
        for edit in chance.sample(edits, len(edits) - 1):
            restore(folder, [edit.key])
    assert restore(folder) == model.fingerprint


STEPS: tuple[Callable[[Workbench, EditableModel, random.Random, Path], Any], ...] = (
    apply, undo, take_one_back, within, cloned, saved,
)  # fmt: skip
WEIGHTS = (8, 2, 4, 3, 0.04, 0.02)


class _Refused:
    """The block must end in an error of ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, EditError)


def _refused(action: Callable[[], object]) -> None:
    try:
        action()
    except EditError:
        return
    raise AssertionError("what should be refused was done")


def bits(model: EditableModel) -> int:
    """A checksum of all of a model's weights."""
    found = 0
    for parameter in model.hf.parameters():
        flat = parameter.detach().contiguous().view(-1).view(torch.uint8)
        found = zlib.crc32(flat.numpy().data, found)
    return found


def byte_tokenizer() -> Any:
    """A tokenizer of 256 byte tokens, as the tests have it."""
    from tests import conftest

    made: Any = conftest.byte_tokenizer
    return made.__wrapped__()


def model_of(layout: str, tokenizer: Any) -> EditableModel:
    """A tiny model with random weights."""
    family, config, dtype = LAYOUTS[layout]
    torch.manual_seed(0)
    return EditableModel(build(family, **config).to(dtype), tokenizer, name=layout)


def synthetic(model: EditableModel) -> list[Edit]:
    """Edits of random numbers in every form there is: low-rank ones of the MLP's projections (of
    some routed experts, where there are any), others anywhere, dense ones of any parameter.
    """
    layer = LAYERS[0] + 1
    experts = model.layout.experts(layer)
    if experts is None:
        made = [an_edit(model, 1), an_edit(model, 2, LAYERS), an_edit(model, 3, (0,))]
        return [*made, a_trained_edit(model, 4), a_trained_edit(model, 5)]
    generator, made = torch.Generator().manual_seed(0), []
    for left_out in range(3):
        left = 0.1 * torch.randn(model.hidden, 2, generator=generator)
        right = torch.randn(experts.count, experts.width, 2, generator=generator)
        right[left_out] = 0
        changes = changes_of(model, {layer: (left, right.flatten(0, 1))})
        name = f"{model.layout.norm}.weight"
        dense = 0.1 * torch.randn(model.hf.get_parameter(name).shape, generator=generator)
        more = {name: Dense(dense)} if left_out == 2 else {}
        made.append(Edit("TEST", {**changes, **more}, FACTS, model.fingerprint))
    return made


def computed(
    model: EditableModel, names: Iterable[str] = METHODS
) -> tuple[list[Edit], dict[str, str]]:
    """An edit or two of every method, and why there is none of the others."""
    values = ValueSettings(steps=2, clamp=4.0)
    routed = model.layout.experts(LAYERS[0]) is not None
    statistics = (of_experts if routed else statistics_of)(model, LAYERS)
    found: list[Edit] = []
    without: dict[str, str] = {}
    for name in names:
        method = make_method(name)
        settings: dict[str, Any] = {"layers": LAYERS[: 1 if name in OF_ONE_LAYER else None]}
        if "steps" in vars(method):
            settings["steps"] = 2
        elif "target" in vars(method):
            settings["target"] = target_of(values, type(method.target))
        if "tokens" in vars(method):
            settings["tokens"] = 64
        for facts in (FACTS[:1], OTHER_FACTS[:1]):
            try:
                made = replace(method, **settings)
                found.append(made.compute(model, facts, statistics, progress=False))
            except KnowEditError as error:
                without[name] = str(error)[:200]
    return found, without


class Sequences:
    """Sequences on every layout in turn; its edits are computed when its turn comes first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, byte_tokenizer()
        self.benches: dict[str, Workbench] = {}
        logging.disable(logging.CRITICAL)  # every second edit contradicts one in force

    def try_one(self, number: int, seed: int, tally: Tally) -> None:
        """The sequence of that number."""
        layout = list(LAYOUTS)[number % len(LAYOUTS)]
        if layout not in self.benches:
            self.benches[layout] = self._bench(layout, tally)
        bench = self.benches[layout]
        before = bench.done.copy()
        try:
            bench.run(random.Random(f"{seed} sequence {number}"), self.folder / "edited")
        except Exception as error:
            tally.fail(number, f"{layout} {number}: {type(error).__name__}: {error}")
            self.benches[layout] = Workbench(
                model_of(layout, self.tokenizer), bench.edits
            )  # the other's weights may be anything
        tally.outcomes.update({f"{layout}: {name}": n for name, n in (bench.done - before).items()})

    def _bench(self, layout: str, tally: Tally) -> Workbench:
        model = model_of(layout, self.tokenizer)
        made, without = computed(model)
        bench = Workbench(model, [*made, *synthetic(model)])
        names = Counter(edit.method_name for edit in bench.edits)
        tally.about[layout] = {"edits": names, "not computed": without}
        return bench

    def close(self) -> None:
        """Let the log speak again."""
        logging.disable(logging.NOTSET)
