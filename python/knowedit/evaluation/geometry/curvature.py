"""The loss around an optimised value: how far it may be pushed, how sharply it rises, which way
each fact pulls.

RoSE's diagnosis (arXiv 2603.15518, abstract): facts of one subject have near-orthogonal gradients,
their joint value ends in a sharp minimum, and prompts then push it further than it tolerates. The
measures below are our definitions; `landscape` takes all of them at one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.methods.locate.values import Problem, ValueSettings, optimise_values, problem_of
from knowedit.models.editable import EditableModel
from knowedit.models.partial import PartialModel
from knowedit.models.texts import AnswerLoss, Places, answer_places

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Landscape:
    """The optimised values of some subjects' facts at one layer; `joint`: one value a subject,
    `alone`: one a fact.

    Attributes:
        delta: `[subjects, hidden]` float32, the joint shifts; room: `[facts]`, tolerance times
            ``|v*|`` of the joint values.
        gradient_cosine: of the facts' losses pairwise within subjects, at the clean and at the
            joint values.
        delta_cosine: of the shifts optimised alone, likewise. Both are NaN when every subject has
            one fact.
        shift: mean ``|delta| / |h|``; nll: mean loss at the values, nats a token.
        tolerance: mean radius (`tolerance`), in ``|v*|``; weakest: mean over subjects of the least
            of its facts.
        sharpness: mean top Hessian eigenvalue times ``|v*|^2``; roughness: mean of all eigenvalues
            times ``|v*|^2``.
    """

    delta: Tensor
    room: Tensor
    gradient_cosine: dict[str, float]
    delta_cosine: float
    shift: dict[str, float]
    nll: dict[str, float]
    tolerance: dict[str, float]
    weakest: dict[str, float]
    sharpness: dict[str, float]
    roughness: dict[str, float]


def landscape(
    model: EditableModel,
    groups: Sequence[Sequence[Fact]],
    layer: int,
    values: ValueSettings | None = None,
    *,
    seed: int = 0,
) -> Landscape:
    """Optimise the values of `groups` (the facts of one subject each) together and alone, and look
    around them.

    Raises:
        EditError: values are not planned at this layer's output.
    """
    if problem_of(model, [layer]) is not Problem:
        raise EditError(
            f"{model.name}: something stands between the MLP of layer {layer} and the layer's "
            "output, where the geometry of values is measured; ask for none (edited=0, --edited 0)"
        )
    facts = [fact for group in groups for fact in group]
    recall = Recall(model, facts, layer)
    clean = recall.clean
    owner = torch.tensor([g for g, group in enumerate(groups) for _ in group], device=clean.device)
    pairs = [(i, j) for i, j in combinations(range(len(facts)), 2) if owner[i] == owner[j]]
    alone, joint = (
        optimise_values(model, [[f] for f in facts], layer, values),
        optimise_values(model, groups, layer, values),
    )
    base, delta = joint.value.to(clean), joint.delta.to(clean)
    points = {"alone": clean + alone.delta.to(clean), "joint": clean + delta[owner]}

    def loss(states: Tensor) -> Tensor:
        return recall(states)[0]

    def together(
        states: Tensor,
    ) -> Tensor:  # by subject: its facts' mean loss as a function of its value
        nll = loss(clean + (states - base)[owner])
        return torch.zeros(len(states), device=nll.device).index_add(
            0, owner, nll
        ) / torch.bincount(owner)

    with torch.no_grad():
        radius = {
            name: tolerance(lambda s, rows: recall(s, rows)[1], point, seed=seed)
            for name, point in points.items()
        }
        nll = {name: float(loss(point).mean()) for name, point in points.items()}
    minima = {"alone": (loss, points["alone"]), "joint": (together, base + delta)}
    square = {name: at.norm(dim=1).square() for name, (_, at) in minima.items()}
    weakest = {
        n: [float(r[owner.cpu() == g].min()) for g in range(len(groups))] for n, r in radius.items()
    }
    return Landscape(
        delta=delta.cpu(),
        room=radius["joint"] * points["joint"].norm(dim=1).cpu(),
        gradient_cosine={
            n: _cosine(gradients(loss, at), pairs)
            for n, at in (("clean", clean), ("joint", points["joint"]))
        },
        delta_cosine=_cosine(alone.delta, pairs),
        shift={
            n: float(((point - clean).norm(dim=1) / clean.norm(dim=1)).mean())
            for n, point in points.items()
        },
        nll=nll,
        tolerance={n: float(r.mean()) for n, r in radius.items()},
        weakest={n: sum(least) / len(least) for n, least in weakest.items()},
        sharpness={
            n: float((top_curvature(f, at, seed=seed) * square[n]).mean())
            for n, (f, at) in minima.items()
        },
        roughness={
            n: float((mean_curvature(f, at, seed=seed) * square[n]).mean())
            for n, (f, at) in minima.items()
        },
    )


class Recall:
    """Facts on one cached suffix of the model: hidden states at the subject of the bare prompts in,
    recall out.

    Attributes:
        clean: `[facts, hidden]` float32, the unedited states at the output of `layer`.
    """

    def __init__(self, model: EditableModel, facts: Sequence[Fact], layer: int) -> None:
        rows = [model.row(fact.prompt, fact.subject, fact.new_answer) for fact in facts]
        self.model = model
        self.rows = rows
        self.part = PartialModel(model, [replace(r, ids=r.ids[:-1]) for r in rows], layer + 1)
        self.clean = self.part.states[:, 0].float()

    def __call__(self, states: Tensor, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean NLL of each object's tokens (nats), and whether each token is the arg-max.

        Args:
            states: `[n, hidden]` in place of the facts' states; rows: the fact of each (default:
                all, in order).
        """
        rows = list(range(len(self.rows))) if rows is None else rows
        part = self.part.select(torch.tensor(rows, device=states.device))
        final = part.run(torch.cat([states[:, None].to(part.states.dtype), part.states[:, 1:]], 1))
        scored = [
            place
            for line, row in enumerate(rows)
            for place in answer_places(self.rows[row], line, self.rows[row].subject or 0)
        ]
        places = Places.of(scored, states.device)
        logits = places.logits(self.model, final)
        hits = logits.detach().argmax(-1) == places.token
        nll = places.means(AnswerLoss(places)(logits))
        return nll, places.smallest(hits.float()) == 1


def tolerance(
    recalled: Callable[[Tensor, list[int]], Tensor],
    values: Tensor,
    *,
    share: float = 0.9,
    directions: int = 16,
    largest: float = 1.0,
    steps: int = 6,
    budget: int = 256,
    seed: int = 0,
) -> Tensor:
    """The largest radius, as a fraction of `|value|`, at which `share` of random directions leave a
    fact recalled.

    Args:
        recalled: (states `[n, hidden]`, fact of each) -> `[n]` bool.
        values: `[facts, hidden]` the optimised values v*.
        budget: states asked for at once (memory).

    Returns:
        `[facts]` float32 in 0..`largest`, by bisection to `largest / 2**steps`; 0 where v* itself
        is not recalled.
    """
    generator = torch.Generator().manual_seed(seed)
    rays = torch.randn(directions, values.shape[1], generator=generator).to(values)
    rays = rays / rays.norm(dim=1, keepdim=True)
    result = torch.zeros(len(values), device=values.device)
    live = recalled(values, list(range(len(values)))).nonzero()[:, 0]
    for part in live.split(max(1, budget // directions)) if len(live) else ():
        facts = part.repeat_interleave(directions).tolist()
        at, scale = values[part, None], values[part].norm(dim=1)
        low, high = torch.zeros_like(scale), torch.full_like(scale, largest)
        for step in range(steps + 1):
            radius = high if step == 0 else (low + high) / 2
            pushed = at + (radius * scale)[:, None, None] * rays
            held = (
                recalled(pushed.flatten(0, 1), facts).view(len(part), directions).float().mean(1)
                >= share
            )
            low, high = torch.where(held, radius, low), torch.where(held, high, radius)
        result[part] = low
    return result.cpu()


def gradients(loss: Loss, at: Tensor) -> Tensor:
    """`[n, hidden]` gradient of each row's loss; `loss` maps `[n, hidden]` to `[n]`, rows
    independent.
    """
    variable = at.detach().requires_grad_()
    return torch.autograd.grad(loss(variable).sum(), variable)[0]


def top_curvature(loss: Loss, at: Tensor, *, steps: int = 8, seed: int = 0) -> Tensor:
    """`[n]` Hessian eigenvalue of largest size of each row's loss at `at`, by power iteration (a
    Rayleigh quotient).
    """
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed)).to(at)
    value = torch.zeros(len(at), device=at.device)
    with _products(loss, at) as product:
        for _ in range(steps):
            direction = direction / direction.norm(dim=1, keepdim=True)
            bent = product(direction)
            value, direction = (direction * bent).sum(1), bent
    return value


def mean_curvature(loss: Loss, at: Tensor, *, probes: int = 4, seed: int = 0) -> Tensor:
    """`[n]` trace of the Hessian over its size: Hutchinson's estimate from `probes` random sign
    vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(at), device=at.device)
    with _products(loss, at) as product:
        for _ in range(probes):
            signs = torch.randint(0, 2, at.shape, generator=generator).to(at) * 2 - 1
            total += (signs * product(signs)).sum(1)
    return total / (probes * at.shape[1])


@contextmanager
def _products(loss: Loss, at: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """Hessian-vector products at one point; the first gradient is shared. Fused attention has no
    second derivative.
    """
    variable = at.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(loss(variable).sum(), variable, create_graph=True)
        yield lambda direction: torch.autograd.grad(first, variable, direction, retain_graph=True)[
            0
        ]


def _cosine(vectors: Tensor, pairs: Sequence[tuple[int, int]]) -> float:
    """Mean cosine over pairs of rows; NaN without pairs."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs) if pairs else float("nan")
