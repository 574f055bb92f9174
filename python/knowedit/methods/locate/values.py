"""Value optimisation: which hidden state at the subject's last token makes the model say the new
object?

ROME's and MEMIT's objective (Meng et al. 2022, 2023), batched over facts and contexts. The peers
run the whole model over whole prompts for one fact at a time; here one pass caches everything that
cannot change and each step runs only the tokens from the subject's last one on, through the layers
above the edited one (`PartialModel`), with logits at the scored positions only. Facts do not see
each other, so the result is that of the per-fact loop.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.config import Config
from knowedit.io.ranges import Bound, Count, NotNegative, Positive
from knowedit.io.ranks import team
from knowedit.methods.locate.optimisers import Adam, Optimiser, Scale, Seen
from knowedit.models.editable import EditableModel, Outputs
from knowedit.models.families.preset import Preset
from knowedit.models.gates import gates
from knowedit.models.linear import fast_linear
from knowedit.models.partial import Hook, PartialModel, hooked, runs_flat
from knowedit.models.sinks import SINK_RATIO
from knowedit.models.texts import AnswerLoss, KeepLoss, Places, answer_places
from knowedit.models.tokens import Row

#: Written for this package; the bare prompt must come first, it defines the value that is being
#: changed.
DEFAULT_CONTEXTS = (
    "{}",
    "The following was printed in a newspaper. {}",
    "As I was saying to a friend yesterday: {}",
)
ESSENCE = "{} is a"


@dataclass(frozen=True)
class ValueSettings(Config):
    """Hyper-parameters of the value optimisation, named as in the literature.

    Attributes:
        steps: gradient evaluations, the last of which only measures (as the peers count them).
        lr: Adam's step a coordinate, in units of the hidden state. None: calibrated, so that a step
            is about a tenth of the clean state's norm.
        clamp: largest `|delta| / |z0|`.
        sink: a bare prompt's z0 that is so many times as long as the median of its group's rows is
            an attention sink's, and says nothing of how long a value may be: the median does.
        weight_decay: weight of `|delta| / |z0|^2`.
        kl: weight of KL(edited || clean) at the subject's last token of "{subject} is a".
        stop: a fact rests once its loss is below this.
        contexts: templates around the prompt; the first is "{}".
        budget: replayed tokens a batch (memory).
        draft: optimise on a bfloat16 copy of the model (`EditableModel.draft`): up to three times
            as fast on a CPU.
        optimiser: how the values are moved; `lr` is Adam's.
    """

    steps: Count = 25
    lr: Positive | None = 0.5
    clamp: Bound = 0.75
    sink: Bound = SINK_RATIO
    weight_decay: NotNegative = 0.5
    kl: NotNegative = 0.0625
    stop: NotNegative = 0.05
    contexts: tuple[str, ...] = DEFAULT_CONTEXTS
    budget: Count = 2048
    draft: bool = False
    optimiser: Optimiser = field(default_factory=Adam)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not self.contexts
            or self.contexts[0] != "{}"
            or any(c.count("{}") != 1 for c in self.contexts)
        ):
            raise EditError(
                f"contexts must start with '{{}}' and hold '{{}}' once each: {self.contexts}"
            )


#: The numbers of values at an MLP's projection, where no others are given: relative to what it
#: writes by itself, which is much shorter than the hidden state that presets are meant for.
AT_PROJECTION: Mapping[str, Any] = {"lr": None, "clamp": 4.0}


#: A gate that passes on less is shut.
LEAST_GATE = 1e-6


def preset_numbers(preset: Preset, problem: type[Problem]) -> dict[str, Any]:
    """A preset's numbers, by keyword, for values that are planned as `problem` does."""
    return {**preset.values, **({} if preset.fitted else problem.numbers)}


@dataclass(frozen=True)
class Targets:
    """Optimised values, one per group of facts (a group shares a subject, or is a single fact).

    Attributes:
        delta: `[groups, hidden]` what is added to the hidden state, float32.
        value: `[groups, hidden]` the clean hidden state at the bare prompts (mean over the group's
            facts).
        loss: `[groups]` last loss; `nll`: `[groups]` its negative log-likelihood part (nats a
            token).
        steps: `[groups]` updates made.
        lower: `[groups, layers - 1, hidden]` what the layers below the last are to write, where
            each layer has a value of its own (`AtProjections`).
        norm: `[groups]` the length that the MLP's part was brought to, where the target anchors it.
        sink: `[groups]` 1 where the clean state at the bare prompts is an attention sink's.
    """

    delta: Tensor
    value: Tensor
    loss: Tensor
    nll: Tensor
    steps: Tensor
    lower: Tensor | None = None
    norm: Tensor | None = None
    sink: Tensor | None = None

    @property
    def wanted(self) -> Tensor:
        """`[groups, hidden]` float64, the hidden state to reach."""
        return self.value.double() + self.delta.double()

    def select(self, groups: Sequence[int]) -> Targets:
        """Those of some groups."""
        rows: dict[str, Any] = {
            name: part if part is None else part[list(groups)] for name, part in vars(self).items()
        }
        return Targets(**rows)

    def to(self, like: Tensor) -> Targets:
        """The same where `like` is, and of its dtype."""
        rows: dict[str, Any] = {
            name: part if part is None else part.to(like) for name, part in vars(self).items()
        }
        return Targets(**rows)

    def of_layers(self) -> Tensor:
        """`[groups, layers, hidden]` what each layer is to write; one layer, unless each has its
        own.
        """
        last = self.delta[:, None]
        return last if self.lower is None else torch.cat([self.lower, last], 1)


def prompt_rows(
    model: EditableModel, fact: Fact, contexts: Sequence[str], answer: str | None = None
) -> list[Row]:
    """The fact's prompt in each context. A row whose subject is the very first token is left out: a
    causal model's state there is its attention sink, not the subject (unless the bare prompt is all
    there is)."""
    rows = [model.row(context.format(fact.prompt), fact.subject, answer) for context in contexts]
    return [r for r in rows if r.subject != 0] or rows[:1]


def optimise_values(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    layer: int | Sequence[int],
    settings: ValueSettings | None = None,
    *,
    problem: type[Problem] | None = None,
    progress: Callable[[float], None] = lambda groups: None,
    device: torch.device | str = "cpu",
) -> Targets:
    """Optimise one value per group of facts where it is written.

    That is the last layer's output, where an MLP's output is added to the residual as it is; else,
    through whatever stands in between, the output projections of all layers (`problem_of`).

    Args:
        layer: one, or several that write together, ascending.
        problem: where else the values are.
        device: where the targets are kept: the model's own saves the way to the CPU and back.

    Raises:
        EditError: a group is empty, or an answer or subject cannot be tokenised as needed.
    """
    settings = settings or ValueSettings()
    if any(not group for group in groups):
        raise EditError("a group without facts cannot be optimised")
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    model.check_layers(layers)
    problem = problem or problem_of(model, layers)
    model = model.draft() if settings.draft else model
    plans = [Plan.of(model, group, settings) for group in groups]
    return optimise_plans(
        model, plans, layers, settings, problem=problem, progress=progress, device=device
    )


def optimise_plans(
    model: EditableModel,
    plans: Sequence[Plan],
    layer: int | Sequence[int],
    settings: ValueSettings,
    *,
    problem: type[Problem] | None = None,
    progress: Callable[[float], None] = lambda groups: None,
    device: torch.device | str = "cpu",
) -> Targets:
    """Optimise one value per plan, whose rows the caller has tokenised; see `optimise_values`.
    None: values at the layer's output, whatever stands between it and the MLP.
    """
    problem = problem or Problem
    layers = (layer,) if isinstance(layer, int) else tuple(layer)
    count, own = len(plans), problem.each_layer and len(layers) > 1
    lower = torch.zeros(count, len(layers) - 1, model.hidden, device=device) if own else None
    delta, value = torch.zeros(2, count, model.hidden, device=device)
    loss, nll, steps, sink = torch.zeros(4, count, device=device)
    result = Targets(delta, value, loss, nll, steps, lower, sink=sink)
    # another batch costs a CPU as much as some 30 tokens (the weights are read again), of which a
    # padded one, which linear layers leave out, is a fifth, and where texts stand in one row next
    # to nothing; a GPU far more
    padded = model.device.type == "cpu" and (issubclass(problem, AtModules) or not runs_flat(model))
    chunks = _chunks(plans, settings.budget, 160 if padded else settings.budget)
    ranks = team()
    worth = ranks.worth(len(chunks))

    def optimised(batch: Sequence[int]) -> Targets:
        mine = [plans[i] for i in batch]
        with model.evaluating(), fast_linear():  # once, not at every step
            return _optimise(
                model, mine, layers, settings, problem, lambda n: progress(n * worth)
            ).to(delta)

    for batch, part in zip(chunks, ranks.share(chunks, optimised)):
        for whole, piece in zip(vars(result).values(), vars(part).values()):
            if whole is not None:
                whole[batch] = piece.to(whole)
    return result


@dataclass(frozen=True)
class Plan:
    """The rows of one value: prompts with answers, then the essence row.

    Attributes:
        rows: `subject` is the lookup token, what is scored begins at `answer`; the last row is the
            essence row, which has none.
        inputs: what is run of each row: nothing is predicted after an answer's last token, nor
            scored after the essence row's subject.
        weights: of each row but the last in the mean NLL; they add up to 1.
        bare: the rows whose clean states define the value that is being changed.
    """

    rows: list[Row]
    inputs: list[Row]
    weights: list[float]
    bare: list[int]

    @classmethod
    def of(cls, model: EditableModel, group: Sequence[Fact], settings: ValueSettings) -> Plan:
        """Each fact of a group in its contexts with the answer; the facts weigh the same."""
        rows: list[Row] = []
        weights: list[float] = []
        bare: list[int] = []
        for fact in group:
            found = prompt_rows(model, fact, settings.contexts, fact.new_answer)
            bare.append(len(rows))
            rows += found
            weights += [1 / (len(group) * len(found))] * len(found)
        essence = model.row(ESSENCE.format(group[0].subject), group[0].subject)
        inputs = [replace(row, ids=row.ids[:-1]) for row in rows]
        inputs.append(replace(essence, ids=essence.ids[: (essence.subject or 0) + 1]))
        return cls([*rows, essence], inputs, weights, bare)

    @property
    def tail(self) -> int:
        """The most tokens that are run of a row."""
        return max(len(r.ids) - (r.subject or 0) for r in self.inputs)


def _chunks(plans: Sequence[Plan], budget: int, spare: int) -> list[list[int]]:
    """Groups of similar tail length: `rows x longest tail` within `budget`, at most `spare` of it
    from longer tails.
    """
    chunks: list[list[int]] = []
    rows = needed = 0
    for i in sorted(range(len(plans)), key=lambda i: plans[i].tail):
        count, tail = len(plans[i].rows), plans[i].tail
        rows, needed = rows + count, needed + count * tail
        if not chunks or rows * tail > budget or rows * tail - needed > spare:
            chunks.append([])
            rows, needed = count, count * tail
        chunks[-1].append(i)
    return chunks


def _optimise(
    model: EditableModel,
    plans: Sequence[Plan],
    layers: tuple[int, ...],
    s: ValueSettings,
    kind: type[Problem],
    progress: Callable[[float], None],
) -> Targets:
    device, count = model.device, len(plans)
    problem = kind.at(layers, model, plans)
    value = problem.mean_bare()  # [groups, parts, hidden], like delta
    norm, sink = problem.lengths(value, s.sink)
    clamp = s.clamp / len(layers) if kind.each_layer else s.clamp
    step_size = s.lr if s.lr is not None else 0.1 * norm / model.hidden**0.5
    lr = torch.as_tensor(step_size).to(norm).expand_as(norm)
    moves = s.optimiser.begin(Scale(norm, lr, clamp, s.stop))
    delta, best = torch.zeros_like(value), torch.zeros_like(value)
    nll, done = torch.zeros(2, count, device=device)
    loss = torch.full((count,), torch.inf, device=device)
    live = torch.arange(count, device=device)  # the groups still in `problem`
    # how often the host may look (a look is a synchronisation), and how few must be left to drop
    # the others
    check, share = (1, 1.0) if device.type == "cpu" else (5, 0.8)
    most = s.optimiser.evaluations(s.steps)
    for step in range(1, most + 1):
        variable = delta[live].requires_grad_()
        each = variable[problem.of_row]
        losses, divergence = problem.evaluate(each)
        part_nll = problem.by_group(losses)
        progress(count / most)
        decay = (s.weight_decay * _safe_norm(variable) / norm[live, :, 0] ** 2).sum(1)
        part = part_nll + s.kl * divergence + decay
        seen = Seen(step, live, variable, each, problem.of_row, problem.by_row(losses), part)
        # once rested, a group stays so
        active = moves.moving(seen) & (done[live] >= step - 1)
        found = part.detach().to(loss)
        worse = found >= loss[live]  # NaN is kept, to be seen
        kept = ~worse if s.optimiser.keeps_best else torch.ones_like(worse)
        at = live[kept]
        best[at], loss[at] = delta[at], found[kept]
        nll[at] = part_nll.detach().to(nll)[kept]
        if step == most:
            break
        moved = variable.detach() + moves.update(seen)
        moved = moved * (clamp * norm[live] / moved.norm(dim=2, keepdim=True)).clamp(max=1)
        delta[live] = torch.where(active[:, None, None], moved, variable.detach())
        done[live] += active.to(done)
        if step % check == 0 and int(active.sum()) < share * len(live):
            live = live[active]
            if not len(live):
                break
            problem = problem.select(active.nonzero()[:, 0].tolist())
    progress(count * (1 - step / most))  # the evaluations that early stopping saved
    lower = best[:, :-1] if kind.each_layer else None
    return Targets(best[:, -1], value[:, -1], loss, nll, done, lower, sink=sink)


def _safe_norm(x: Tensor) -> Tensor:
    """Norms over the last dimension, whose gradient at zero is zero."""
    square = (x * x).sum(-1)
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)


class Problem:
    """The rows of some groups on one partial model: deltas in, NLL and KL out.

    Here a row's delta is added to the last layer's output. A subclass may add several vectors
    `[rows, parts, hidden]` in other places; the last part is the one that is written, or each part
    by a layer of its own (`each_layer`).

    Attributes:
        numbers: what other numbers than a preset's suit its values.
    """

    each_layer: ClassVar[bool] = False
    numbers: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def at(cls, layers: tuple[int, ...], model: EditableModel, plans: Sequence[Plan]) -> Problem:
        """The problem of these plans for values at `layers`."""
        return cls(plans, PartialModel(model, _inputs(plans), layers[-1] + 1, alike=True), layers)

    def __init__(
        self,
        plans: Sequence[Plan],
        part: PartialModel,
        layers: tuple[int, ...],
        clean: Tensor | None = None,
    ) -> None:
        self.plans, self.part, self.layers, self.model = plans, part, layers, part.model
        scored: list[tuple[int, int, int]] = []  # row, place, token
        owner: list[int] = []
        weight: list[float] = []
        shares: list[float] = []  # of each token in its row's mean
        essence, bare, at = [], [], 0
        for group, plan in enumerate(plans):
            bare += [(group, at + b) for b in plan.bare]
            for row, share in zip(plan.rows, plan.weights):
                found = answer_places(row, at, row.subject or 0)
                scored += found
                owner += [group] * len(found)
                weight += [share / len(found)] * len(found)
                shares += [1 / len(found)] * len(found)
                at += 1
            essence.append(at)
            at += 1
        device = self.model.device
        self.places = Places.of(scored, device)
        self.owner, self.weight, self.share = (
            torch.tensor(x, device=device) for x in (owner, weight, shares)
        )
        self.bare_owner, self.bare = (torch.tensor(column, device=device) for column in zip(*bare))
        self.essence = torch.tensor(essence, device=device)
        self.of_row = torch.tensor(
            [g for g, plan in enumerate(plans) for _ in plan.rows], device=device
        )
        if clean is None:
            with torch.no_grad():
                final = part.select(self.essence).run()
                clean = self.model.logprobs(final[:, 0])
        last = Places.of([(row, 0, -1) for row in essence], device)
        # one distribution a group: kept as it is, and not made anew at each step
        self.keep = KeepLoss(self.model, last, clean, logprobs=True, reverse=True)

    def select(self, groups: Sequence[int]) -> Problem:
        """The same problem for some of its groups."""
        kept = torch.tensor(groups, device=self.of_row.device)
        rows = torch.isin(self.of_row, kept).nonzero()[:, 0]
        plans = [self.plans[g] for g in groups]
        return type(self)(plans, self.part.select(rows), self.layers, self.keep.clean[kept])

    def mean_bare(self) -> Tensor:
        """`[groups, parts, hidden]` clean states at the subject of the bare prompts, float32; of a
        float64 model float64.
        """
        states = self.states(self.bare)
        return self._mean(states.to(torch.promote_types(states.dtype, torch.float32)))

    def _mean(self, each: Tensor) -> Tensor:
        """`[groups, ..]` means over a group's bare prompts of `[bare, ..]`."""
        sums = each.new_zeros(len(self.plans), *each.shape[1:])
        sums.index_add_(0, self.bare_owner, each)
        return sums / torch.bincount(self.bare_owner, minlength=len(self.plans))[:, None, None]

    def lengths(self, value: Tensor, sink: float) -> tuple[Tensor, Tensor]:
        """`[groups, parts, 1]` how long the clean states `value` are; of one that is more than
        `sink` times as long as the median of its group's rows, that median. And `[groups]` whether
        a group has such a one.
        """
        prompts = torch.ones_like(self.of_row, dtype=torch.bool)
        prompts[self.essence] = False
        each = self.states(prompts.nonzero()[:, 0]).to(value).norm(dim=2, keepdim=True)
        return self._held(value.norm(dim=2, keepdim=True), each, sink)

    def _held(self, norm: Tensor, each: Tensor, sink: float) -> tuple[Tensor, Tensor]:
        """As `lengths`, from the groups' lengths and `[prompts, parts, 1]` those of all prompts."""
        owner = [number for number, plan in enumerate(self.plans) for _ in plan.rows[:-1]]
        of = torch.tensor(owner, device=each.device)
        usual = torch.stack([each[of == g].median(0).values for g in range(len(self.plans))])
        far = norm > sink * usual
        return torch.where(far, usual, norm), far.any(1)[:, 0]

    @classmethod
    def state_lengths(cls, model: EditableModel, rows: Sequence[Row], layer: int) -> Tensor:
        """`[n]` length of the layer's output at each row's subject token; seen from where a value
        is written, if that is elsewhere.
        """
        return _outputs(model, rows, layer, True).norm(dim=1)

    def states(self, rows: Tensor) -> Tensor:
        """`[rows, parts, hidden]` what a delta is added to."""
        return self.part.states[rows, :1]

    def run(self, each: Tensor) -> Tensor:
        """Final hidden states of every row under its own delta, `[rows, parts, hidden]`."""
        states = self.part.states
        lifted = states[:, :1] + each.to(states.dtype)
        return self.part.run(torch.cat([lifted, states[:, 1:]], 1), unseen=True)

    def evaluate(self, each: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of each answer's tokens (nats), and KL(edited || clean) at each group's essence row,
        where every row has its own delta `[rows, parts, hidden]`.
        """
        final = self.run(each)
        answers, essence = self.places, self.keep.places
        # together, as the head's weight is read once for all
        logits = answers.and_then(essence).logits(self.model, final)
        said, kept = logits.split([len(answers), len(essence)])
        return AnswerLoss(answers)(said), self.keep(kept)

    def by_group(self, losses: Tensor) -> Tensor:
        """`[groups]` mean NLL of the answers, nats a token, by the rows' weights."""
        weighted = losses * self.weight
        return weighted.new_zeros(len(self.plans)).index_add(0, self.owner, weighted)

    def by_row(self, losses: Tensor) -> Tensor:
        """`[rows]` mean NLL of each row's answer, nats a token; 0 for essence rows."""
        shared = losses * self.share
        return shared.new_zeros(len(self.of_row)).index_add(0, self.places.line, shared)


class AtModules(Problem):
    """Deltas that are added to the outputs of modules, one a module; the partial model begins at
    the lowest of their layers.
    """

    @classmethod
    def at(cls, layers: tuple[int, ...], model: EditableModel, plans: Sequence[Plan]) -> Problem:
        return cls(plans, PartialModel(model, _inputs(plans), layers[0], alike=True), layers)

    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """In the order of the parts."""

    def states(self, rows: Tensor) -> Tensor:
        seen: dict[int, Tensor] = {}

        def see(part: int, output: Tensor) -> None:
            seen[part] = output.reshape(len(rows), -1, output.shape[-1])[:, 0]

        with torch.no_grad(), self._hooked(see):
            self.part.select(rows).run()
        return torch.stack([seen[part] for part in sorted(seen)], 1)

    def run(self, each: Tensor) -> Tensor:
        def add(part: int, output: Tensor) -> Tensor:
            texts = output.reshape(len(each), -1, output.shape[-1])  # experts have them in a row
            lifted = texts[:, :1] + each[:, part : part + 1].to(output)
            return torch.cat([lifted, texts[:, 1:]], 1).view_as(output)

        with self._hooked(add):
            return self.part.run()

    def _hooked(
        self, change: Callable[[int, Tensor], Tensor | None]
    ) -> AbstractContextManager[None]:
        """Pass the outputs of the modules through `change`, with the number of the part."""

        def hook(part: int) -> Hook:
            return lambda _, output: change(part, output)

        return hooked({module: hook(part) for part, module in enumerate(self.modules())})


class AtProjections(AtModules):
    """One delta a layer, added to the output of its MLP's projection and planned together: what is
    planned is what will be written, through whatever norm, gate or factor follows it.
    """

    each_layer = True
    numbers = AT_PROJECTION

    @classmethod
    def state_lengths(cls, model: EditableModel, rows: Sequence[Row], layer: int) -> Tensor:
        written = _outputs(model, rows, layer, "projection").norm(dim=1)
        return written * (AT_PROJECTION["clamp"] / ValueSettings.clamp)

    def modules(self) -> Sequence[nn.Module]:
        return [self.model.projection(layer) for layer in self.layers]


class AtGates(AtProjections):
    """The same where only a number follows each projection, a gate's or a factor: what a value is
    measured by is the layer's output, as at `Problem`, seen from the projection. What an MLP writes
    by itself may be a small part of that.
    """

    numbers: ClassVar[Mapping[str, Any]] = {"lr": None}

    @classmethod
    def state_lengths(cls, model: EditableModel, rows: Sequence[Row], layer: int) -> Tensor:
        states, passed = (
            _outputs(model, rows, layer, True).norm(dim=1),
            gates(model, rows, layer)[0],
        )
        if not bool((passed.abs() >= LEAST_GATE).all()):
            raise EditError(
                f"the gate behind layer {layer}'s MLP is shut at some of the facts' subjects (it "
                f"passes on {float(passed.abs().min()):.1e} of what is written): nothing that is "
                "written there arrives; edit another layer"
            )
        return states / passed.abs().to(states)

    def lengths(self, value: Tensor, sink: float) -> tuple[Tensor, Tensor]:
        rows = [row for plan in self.plans for row in plan.rows[:-1]]
        parts = [self.state_lengths(self.model, rows, layer) for layer in self.layers]
        each = torch.stack(parts, 1)[..., None].to(value)
        bare = self.bare - self.bare_owner  # among the prompts: each group has an essence row more
        return self._held(self._mean(each[bare]), each, sink)


def problem_of(model: EditableModel, layers: Sequence[int]) -> type[Problem]:
    """Where values are planned: at the last layer's output, which costs least, if every layer adds
    what its MLP's projection writes to the residual as it is; else at the projections.
    """
    kinds = {model.layout.stream(layer).kind for layer in layers}
    if kinds == {"identity"}:
        return Problem
    return AtProjections if "other" in kinds else AtGates


def _outputs(model: EditableModel, rows: Sequence[Row], layer: int, where: Outputs) -> Tensor:
    """`[n, hidden]` the layer's output, or its projection's, at the rows' subject tokens."""
    found = model.keys(rows, [layer], outputs=where)[1]
    assert found is not None
    return found


def _inputs(plans: Sequence[Plan]) -> list[Row]:
    return [row for plan in plans for row in plan.inputs]
