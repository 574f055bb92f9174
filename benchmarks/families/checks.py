"""What must hold on every family: each check compares one thing that the package says with what the
plain transformers model does, and returns how far the two are apart.

The plain model is `hf(input_ids)` of one text, with hooks and nothing of the package's around it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.families import models
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import restore, save_edited
from knowedit.errors import EditError
from knowedit.evaluation.tracing.tracing import trace
from knowedit.facts.fact import Fact
from knowedit.methods import MEMIT, MetaKE, Method, NeuronPatch, RoSE
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.locate.targets import HiddenState
from knowedit.methods.locate.task import Runtime
from knowedit.methods.locate.training import TrainingSettings
from knowedit.methods.locate.trainings import ThroughForms, ThroughSolver
from knowedit.methods.locate.values import ValueSettings, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.partial import PartialModel
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.corpus.batching import Piece
from knowedit.statistics.sums import Sums

#: Takes a module's output, returns what takes its place (None: leave it).
Change = Callable[[Tensor], Tensor | None]

FACTS = (
    Fact(prompt="The capital of {} is", subject="France", target="Lyon"),
    Fact(prompt="It is said that {} plays the", subject="Miles Davis", target="violin"),
)
QUICK = {"steps": 12, "lr": None, "clamp": 2.0, "contexts": ("{}",)}


class Wrong(Exception):
    """Something that has no figure is not as it must be."""


@dataclass(frozen=True)
class Check:
    """A check and the most that its figure may be."""

    name: str
    limit: float
    run: Callable[[Bench], float]


#: In the order in which they run.
CHECKS: dict[str, Check] = {}


def check(limit: float) -> Callable[[Callable[[Bench], float]], Callable[[Bench], float]]:
    """Enter a function of a `Bench` into `CHECKS`, under its name."""

    def enter(run: Callable[[Bench], float]) -> Callable[[Bench], float]:
        name = run.__name__.removesuffix("_").replace("_", " ")
        CHECKS[name] = Check(name, limit, run)
        return run

    return enter


class Bench:
    """One model with what several checks need, each made once.

    Attributes:
        kind: the model type. folder: for files.
        model: the family's, ready to be edited.
        layers: two editable layers below the last one (or one), ascending, dense where there are
            such; edits go to the second.
    """

    def __init__(self, kind: str, folder: Path, *, wide: bool = False) -> None:
        self.kind, self.folder = kind, folder
        hf = models.build(kind)
        if wide:
            if hasattr(hf, "set_experts_implementation"):
                hf.set_experts_implementation("eager")  # torch's grouped product has no float64
            hf.double()
        self.model = EditableModel(hf, models.tokenizer(), name=kind)
        parts = self.model.layout.parts
        below = [i for i in self.model.layout.editable if i < len(self.model.layers) - 1]
        below = [i for i in below if parts[i].experts is None] or below
        if not below:
            raise EditError("only the last layer can be edited, and nothing above reads its values")
        self.layers = tuple(below[:3][-2:])
        self.layer = self.layers[-1]
        self.rows = [self.model.row(f.text, f.subject, f.target) for f in FACTS]
        self.bits = {name: bits(t).clone() for name, t in self.model.hf.state_dict().items()}

    @functools.cached_property
    def wide(self) -> Bench:
        """The same model in float64."""
        return Bench(self.kind, self.folder / "float64", wide=True)

    @functools.cached_property
    def corpus(self) -> Path:
        """Forty paragraphs of made-up words of any printable characters, so that every neuron has
        something to fire at.
        """
        draw = torch.randint(33, 127, (40, 40, 5), generator=torch.Generator().manual_seed(0))
        lines = [" ".join("".join(map(chr, word)) for word in line) for line in draw.tolist()]
        path = self.folder / "corpus.txt"
        path.write_text("\n\n".join(lines))
        return path

    @functools.cached_property
    def statistics(self) -> KeyStatistics:
        return key_statistics(
            self.model,
            self.layers,
            self.corpus,
            3000,
            directory=self.folder / "statistics",
            worker=False,
            progress=False,
        )

    @functools.cached_property
    def edit(self) -> Edit:
        """Both facts written by MEMIT."""
        return self.computed(self.memit)

    @property
    def memit(self) -> MEMIT:
        """MEMIT in one layer, with next to no weight on what the statistics say."""
        return MEMIT(layers=(self.layer,), metric=Covariance(gain=0.98), **self.common)

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every method here."""
        return {"target": HiddenState(**QUICK), "allow_sinks": True}

    def computed(self, method: Method) -> Edit:
        statistics = self.statistics if method.needs_statistics else None
        return method.compute(self.model, list(FACTS), statistics, progress=False)

    def module(self, name: str) -> nn.Module:
        return self.model.hf.get_submodule(name)

    def plain(self, ids: Sequence[int], changes: Mapping[str, Change] | None = None) -> Tensor:
        """The model's own logits `[T, vocab]`, with the outputs of some modules looked at or
        changed.
        """
        with torch.no_grad(), changed({self.module(n): f for n, f in (changes or {}).items()}):
            return self.model.hf(input_ids=torch.tensor([list(ids)])).logits[0].float()

    def output(self, name: str, ids: Sequence[int]) -> Tensor:
        """What a module returns in the plain model, `[T, width]`."""
        seen: list[Tensor] = []
        self.plain(ids, {name: lambda y: seen.append(y.detach().clone())})
        return seen[0].reshape(-1, seen[0].shape[-1])

    def keys(self, layer: int, ids: Sequence[int]) -> Tensor:
        """The inputs of a layer's projection in the plain model, `[T, d_ff]`; of routed experts
        each chosen one's, times its gate.
        """
        if self.model.layout.experts(layer) is not None:
            return self._experts_keys(layer, ids)
        seen: list[Tensor] = []
        projection = self.module(self.model.layout.projection(layer))
        handle = projection.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
        try:
            self.plain(ids)
        finally:
            handle.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])

    def _experts_keys(self, layer: int, ids: Sequence[int]) -> Tensor:
        """What the experts' own code multiplies with their output matrices, one after another."""
        experts, hf = self.model.layout.experts(layer), self.model.hf
        assert experts is not None
        module = self.module(self.model.layout.projection(layer))
        products = _Products(getattr(module, experts.weight))
        calls: list[Mapping[str, Any]] = []

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        kept, hf.config._experts_implementation = hf.config._experts_implementation, "eager"
        try:
            with products:
                self.plain(ids)
        finally:
            handle.remove()
            hf.config._experts_implementation = kept
        index, gates = calls[0][experts.index], calls[0][experts.gates]
        wide = torch.zeros(len(index), experts.count, experts.width)
        for expert, keys in products.seen:
            slot, token = torch.where((index == expert).T)
            wide[token, expert] += gates[token, slot, None] * keys
        return wide.flatten(1)

    def at_subjects(self, name: str) -> Tensor:
        """A module's outputs at the subjects of the facts' prompts in the plain model, `[facts,
        width]`.
        """
        return torch.stack([self.output(name, row.ids)[row.subject] for row in self.rows])

    def nll(self) -> float:
        """Nats a token of the facts' answers, by the plain model."""
        total = 0.0
        for row in self.rows:
            found = self.plain(row.ids).log_softmax(-1)
            answer = range(row.answer or 0, len(row.ids))
            total -= float(sum(found[t - 1, row.ids[t]] for t in answer)) / len(answer)
        return total / len(self.rows)

    def restored(self) -> bool:
        """Whether every tensor has the bits that it had at first."""
        return all(
            torch.equal(bits(tensor), self.bits[name])
            for name, tensor in self.model.hf.state_dict().items()
        )


class _Products(TorchFunctionMode):
    """While it is entered: which matrix of a parameter was multiplied with what.

    Attributes:
        seen: (number of the matrix, what stood on its left).
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.parameter = parameter
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        matrix = args[1] if len(args) > 1 else None
        known = isinstance(matrix, Tensor) and matrix.dim() == 2
        if known and matrix.untyped_storage().data_ptr() == (
            self.parameter.untyped_storage().data_ptr()
        ):
            self.seen.append((matrix.storage_offset() // self.parameter[0].numel(), args[0]))
        return func(*args, **(kwargs or {}))


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def changed(modules: Mapping[nn.Module, Change]) -> Iterator[None]:
    """Pass the (first) output of each module through a function."""

    def hook(change: Change) -> Callable[..., Any]:
        def run(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            whole = isinstance(output, Tensor)
            found = change(output if whole else output[0])
            return found if whole or found is None else (found, *output[1:])

        return run

    handles = [module.register_forward_hook(hook(change)) for module, change in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest value wanted; infinite for another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


# -- reading the model
# -------------------------------------------------------------------------------------------------


@check(1e-5)
def load(bench: Bench) -> float:
    """Saved and loaded again, it is the same model."""
    folder = bench.folder / "saved"
    bench.model.hf.save_pretrained(folder)
    bench.model.tokenizer.save_pretrained(folder)
    again = load_model(str(folder), say=lambda _: None)
    if again.fingerprint != bench.model.fingerprint:
        raise Wrong("another fingerprint")
    ids = bench.rows[0].ids
    with torch.no_grad():
        logits = again.hf(input_ids=torch.tensor([ids])).logits[0].float()
    return apart(logits, bench.plain(ids))


@check(1e-5)
def keys(bench: Bench) -> float:
    """Keys, and the deepest layer's output, at each text's subject."""
    found, outputs = bench.model.keys(bench.rows, bench.layers, outputs=True)
    assert outputs is not None
    top = bench.model.layout.layer(bench.layer)
    errors = []
    for i, row in enumerate(bench.rows):
        errors += [apart(found[n][i], bench.keys(n, row.ids)[row.subject]) for n in bench.layers]
        errors.append(apart(outputs[i], bench.output(top, row.ids)[row.subject]))
    return max(errors)


@check(1e-5)
def head(bench: Bench) -> float:
    """Logits made of the final hidden states, of padded texts together."""
    ids, mask = bench.model.pad([row.ids for row in bench.rows])
    with torch.no_grad():
        logits = bench.model.head(bench.model.final_states(ids)).float()
    return max(apart(logits[i][mask[i]], bench.plain(row.ids)) for i, row in enumerate(bench.rows))


@check(1e-5)
def score(bench: Bench) -> float:
    """The log-probability of an answer."""
    found = bench.model.score([f.text for f in FACTS], [f.target for f in FACTS])
    nll = -sum(one.logprob for one in found) / len(found)
    return abs(nll - bench.nll()) / bench.nll()


@check(1e-5)
def replay(bench: Bench) -> float:
    """The layers above an edited one, run alone on the tokens from the subject on."""
    model, layer = bench.model, bench.layer
    part = PartialModel(model, bench.rows, layer + 1)
    noise = torch.randn(model.hidden, generator=torch.Generator().manual_seed(1))
    push = 0.5 * float(part.states.std()) * noise
    states = part.states.clone()
    states[..., 0, :] += push
    with torch.no_grad():
        logits = model.head(part.run(states)).float()
    errors = []
    for found, row in zip(logits, bench.rows, strict=True):
        wanted = bench.plain(row.ids, {model.layout.layer(layer): added(push, row.subject)})
        errors.append(apart(found[: len(row.ids) - row.subject], wanted[row.subject :]))
    return max(errors)


def added(push: Tensor, at: int) -> Change:
    """Adds a vector to the hidden states of one token."""

    def change(states: Tensor) -> Tensor:
        states = states.clone()
        states[..., at, :] += push
        return states

    return change


@check(1e-6)
def statistics(bench: Bench) -> float:
    """Second moments of keys, of texts one by one and packed where that is allowed."""
    lengths = (40, 21, 17, 9, 33, 12, 11, 8)
    texts = [
        [(13 * i * (j + 3) + 5 * j) % 250 + 1 for i in range(n)] for j, n in enumerate(lengths)
    ]
    pieces = [Piece(ids, 1) for ids in texts]
    errors = []
    for packed in (False, True):
        sums = Sums(bench.model, bench.layers, "exact", 1024, packed, halves=1)
        sums.add(0, pieces)
        for layer in bench.layers:
            every = torch.cat([bench.keys(layer, ids)[1:] for ids in texts]).double()
            total = sums.moments[0, layer].sum()
            if experts := bench.model.layout.experts(layer):
                of_each = experts.by_expert(every).transpose(0, 1)
                errors.append(apart(total, of_each.mT @ of_each))
            else:
                errors.append(apart(total, every.T @ every))
    return max(errors)


@check(1e-4)
def trace_(bench: Bench) -> float:
    """The clean probability, the corrupted one, and one restored state of a causal trace."""
    model, row = bench.model, bench.model.row(FACTS[0].text, FACTS[0].subject)
    assert row.start is not None and row.subject is not None
    found = trace(model, FACTS[0].text, FACTS[0].subject, samples=2, deviation=0.3)
    embeddings = next(
        n for n, m in model.hf.named_modules() if m is model.hf.get_input_embeddings()
    )
    places = slice(row.start, row.subject + 1)
    size = (2, row.subject + 1 - row.start, model.hf.get_input_embeddings().weight.shape[1])
    noise = found.deviation * torch.randn(size, generator=torch.Generator().manual_seed(0))
    layer = model.layout.layer(bench.layer)
    clean: list[Tensor] = []
    bench.plain(row.ids, {layer: lambda y: clean.append(y.clone())})

    def put_back(states: Tensor) -> Tensor:
        states = states.clone()
        states[..., row.subject, :] = clean[0][..., row.subject, :]
        return states

    def probability(changes: Mapping[str, Change]) -> float:
        return float(bench.plain(row.ids, changes)[-1].softmax(-1)[found.token])

    corrupted, restored_ = 0.0, 0.0
    for one in noise:

        def corrupt(states: Tensor, one: Tensor = one) -> Tensor:
            states = states.clone()
            states[:, places] += one
            return states

        corrupted += probability({embeddings: corrupt}) / 2
        restored_ += probability({embeddings: corrupt, layer: put_back}) / 2
    effect = float(found.effect["hidden"][row.subject, bench.layer])
    wanted = [probability({}), corrupted, restored_ - corrupted]
    said = [found.clean, found.corrupted, effect]
    return max(abs(a - b) for a, b in zip(said, wanted)) / wanted[0]


# -- editing it
# -------------------------------------------------------------------------------------------------


@check(0.02)
def gain(bench: Bench) -> float:
    """The share of the planned change that MEMIT says it realises, at the facts' own prompts."""
    model = bench.model
    groups = [[fact] for fact in FACTS]
    task = bench.memit.prepare(model, groups, bench.statistics, progress=False)
    planned = bench.memit.target.values(task).delta
    return missed_by(bench, bench.edit, {bench.layer: planned})


@check(0.02)
def experts(bench: Bench) -> float:
    """What MEMIT writes into a layer with routed experts, where there is one below the last: the
    same, also for what it says of their keys.
    """
    layout = bench.model.layout
    routed = [i for i in layout.editable[:-1] if layout.experts(i) is not None]
    if not routed:
        return 0.0
    other = copy.copy(bench)
    other.layers, other.layer = (routed[-1],), routed[-1]
    for made in ("statistics", "edit"):  # of the other layers
        vars(other).pop(made, None)
    keys_apart = keys(other)
    if keys_apart > CHECKS["keys"].limit:
        raise Wrong(f"keys of experts are {keys_apart:.1e} apart")
    return max(gain(other), undo(other))


def missed_by(bench: Bench, edit: Edit, plan: Mapping[int, Tensor]) -> float:
    """How far the gain that an edit reports is from what the output of its last layer does, of what
    it would do with the plan's `{layer: [facts, hidden]}` added to the projections' outputs. Raises
    Wrong: the undo leaves other bits.
    """
    layout = bench.model.layout
    place = layout.layer(max(plan))
    clean = bench.at_subjects(place)
    wanted = []
    for i, (row, before) in enumerate(zip(bench.rows, clean, strict=True)):
        seen: list[Tensor] = []
        changes: dict[str, Change] = {
            layout.projection(layer): added(pushes[i], row.subject or 0)
            for layer, pushes in plan.items()
        }
        changes[place] = lambda y, seen=seen: seen.append(y.reshape(-1, y.shape[-1]).clone())
        bench.plain(row.ids, changes)
        wanted.append(seen[0][row.subject] - before)
    with edit.applied_to(bench.model):
        moved = bench.at_subjects(place) - clean
    if not bench.restored():
        raise Wrong("the undo leaves other bits")
    assert edit.report.gain is not None
    return abs(edit.report.gain - share(moved, torch.stack(wanted)))


def share(moved: Tensor, planned: Tensor) -> float:
    """Mean over facts of how far a state went along its planned change, `[n, hidden]` each."""
    return float(((moved * planned).sum(-1) / planned.square().sum(-1)).mean())


@check(0.0)
def undo(bench: Bench) -> float:
    """Applied and taken back, every bit is the first one, and between the two it did something."""
    return written(bench, bench.edit)


@check(0.0)
def file(bench: Bench) -> float:
    """The edit saved and loaded changes the logits by the same bits."""
    path = bench.folder / "edit.safetensors"
    bench.edit.save(path)
    ids = bench.rows[0].ids
    with bench.edit.applied_to(bench.model):
        wanted = bench.plain(ids)
    with Edit.load(path).applied_to(bench.model):
        return float(not torch.equal(bench.plain(ids), wanted))


@check(1e-5)
def folder(bench: Bench) -> float:
    """The edited model's folder, opened by transformers alone; and its undo record."""
    where = save_edited(bench.model, [bench.edit], bench.folder / "edited")
    ids = bench.rows[0].ids
    with bench.edit.applied_to(bench.model):
        wanted = bench.plain(ids)
    again = type(bench.model.hf).from_pretrained(where)
    with torch.no_grad():
        logits = again.eval()(input_ids=torch.tensor([ids])).logits[0].float()
    if restore(where) != bench.model.fingerprint:
        raise Wrong("restored to another model")
    return apart(logits, wanted)


@check(1e-5)
def adapter(bench: Bench) -> float:
    """The edit as a LoRA adapter, in peft."""
    from peft import PeftModel

    where = bench.edit.export(bench.folder / "adapter", bench.model, "peft")
    ids = bench.rows[0].ids
    with bench.edit.applied_to(bench.model):
        wanted = bench.plain(ids)
    adapted = PeftModel.from_pretrained(copy.deepcopy(bench.model.hf), str(where)).eval()
    with torch.no_grad():
        return apart(adapted(input_ids=torch.tensor([ids])).logits[0].float(), wanted)


@check(0.02)
def metake(bench: Bench) -> float:
    """MetaKE trained through the solver: the share of what it was to write that it says it has
    written, and every bit comes back.
    """
    training = ThroughSolver(when="always", settings=TrainingSettings(steps=4))
    method = MetaKE(layers=(bench.layer,), training=training, **bench.common)
    edit = bench.computed(method)
    return max(written(bench, edit), missed_by(bench, edit, edit.plan))


@check(0.02)
def rose(bench: Bench) -> float:
    """RoSE over two layers: the same."""
    forms = ThroughForms()
    training = replace(forms, settings=replace(forms.settings, steps=2))
    method = RoSE(layers=bench.layers, training=training, **bench.common)
    edit = bench.computed(method)
    return max(written(bench, edit), missed_by(bench, edit, edit.plan))


def written(bench: Bench, edit: Edit) -> float:
    """1 unless an edit can be undone to the bit. Raises Wrong: it does nothing."""
    ids = bench.rows[0].ids
    before = bench.plain(ids)
    with edit.applied_to(bench.model):
        after = bench.plain(ids)
    if apart(after, before) < 1e-3:
        raise Wrong("the edit does nothing")
    return float(not bench.restored())


@check(0.02)
def neurons(bench: Bench) -> float:
    """NeuronPatch: what the rewritten neurons write at the facts, against the gain that it says."""
    values = ValueSettings(**QUICK)
    method = NeuronPatch(
        layers=(bench.layer,),
        target=HiddenState.of(values),
        runtime=Runtime(),
        corpus=str(bench.corpus),
        tokens=1500,
    )
    edit = bench.computed(method)
    planned = optimise_values(bench.model, [[fact] for fact in FACTS], bench.layer, values).delta
    return missed_by(bench, edit, {bench.layer: planned})
