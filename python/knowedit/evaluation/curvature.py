"""The loss around an optimised value: how far it may be pushed, how sharply it rises, which way each fact pulls.

RoSE's diagnosis (arXiv 2603.15518, abstract): facts of one subject have near-orthogonal gradients, their joint value ends
in a sharp minimum, and prompts then push it further than it tolerates. The measures below are our definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..facts import Fact
from ..model import EditableModel
from ..replay import Suffix

Loss = Callable[[Tensor], Tensor]


class Recall:
    """Facts on one cached suffix of the model: hidden states at the subject of the bare prompts in, recall out.

    Attributes:
        clean: `[facts, hidden]` float32, the unedited states at the output of `layer`.
    """

    def __init__(self, model: EditableModel, facts: Sequence[Fact], layer: int) -> None:
        rows = [model.row(fact.text, fact.subject, fact.target) for fact in facts]
        self.model = model
        self.suffix = Suffix(model, [type(r)(r.ids[:-1], r.subject, r.answer) for r in rows], layer)
        self.clean = self.suffix.hidden[:, 0].float()
        self.spans = [
            [(i - 1 - (r.subject or 0), r.ids[i]) for i in range(r.answer or 0, len(r.ids))] for r in rows
        ]  # fmt: skip

    def __call__(self, states: Tensor, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean NLL of each object's tokens (nats), and whether each token is the arg-max.

        Args:
            states: `[n, hidden]` in place of the facts' states; rows: the fact of each (default: all, in order).
        """
        rows = list(range(len(self.spans))) if rows is None else rows
        part = self.suffix.select(torch.tensor(rows, device=states.device))
        final = part.run(torch.cat([states[:, None].to(part.hidden.dtype), part.hidden[:, 1:]], 1))
        scored = [(n, place, token) for n, row in enumerate(rows) for place, token in self.spans[row]]
        line, place, token = (torch.tensor(column, device=states.device) for column in zip(*scored))
        logp = self.model.head(final[line, place]).float().log_softmax(-1)
        count = torch.bincount(line, minlength=len(rows))
        zeros = torch.zeros(len(rows), device=states.device)
        nll = zeros.index_add(0, line, -logp.gather(1, token[:, None])[:, 0]) / count
        hits = zeros.index_add(0, line, (logp.argmax(-1) == token).float())
        return nll, hits == count


def tolerance(
    recalled: Callable[[Tensor, list[int]], Tensor],
    values: Tensor,
    *,
    share: float = 0.9,
    directions: int = 32,
    largest: float = 2.0,
    steps: int = 7,
    seed: int = 0,
) -> Tensor:
    """The largest radius, as a fraction of `|value|`, at which `share` of random directions leave a fact recalled.

    Args:
        recalled: (states `[n, hidden]`, fact of each) -> `[n]` bool.
        values: `[facts, hidden]` the optimised values v*.

    Returns:
        `[facts]` float32 in 0..`largest`, by bisection to `largest / 2**steps`; 0 where v* itself is not recalled.
    """
    generator = torch.Generator().manual_seed(seed)
    rays = torch.randn(directions, values.shape[1], generator=generator).to(values)
    rays = rays / rays.norm(dim=1, keepdim=True)
    result = torch.zeros(len(values))
    for fact, value in enumerate(values):
        if not bool(recalled(value[None], [fact])[0]):
            continue
        low, high = 0.0, largest
        for step in range(steps + 1):
            radius = largest if step == 0 else (low + high) / 2
            held = recalled(value + radius * value.norm() * rays, [fact] * directions)
            if float(held.float().mean()) >= share:
                low = radius
                if step == 0:
                    break
            else:
                high = radius
        result[fact] = low
    return result


def gradients(loss: Loss, at: Tensor) -> Tensor:
    """`[n, hidden]` gradient of each row's loss; `loss` maps `[n, hidden]` to `[n]`, rows independent."""
    variable = at.detach().requires_grad_()
    return torch.autograd.grad(loss(variable).sum(), variable)[0]


def top_curvature(loss: Loss, at: Tensor, *, steps: int = 12, seed: int = 0) -> Tensor:
    """`[n]` Hessian eigenvalue of largest size of each row's loss at `at`, by power iteration (a Rayleigh quotient)."""
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(seed)).to(at)
    value = torch.zeros(len(at))
    with _products(loss, at) as product:
        for _ in range(steps):
            direction = direction / direction.norm(dim=1, keepdim=True)
            bent = product(direction)
            value, direction = (direction * bent).sum(1), bent
    return value


def mean_curvature(loss: Loss, at: Tensor, *, probes: int = 8, seed: int = 0) -> Tensor:
    """`[n]` trace of the Hessian over its size: Hutchinson's estimate from `probes` random sign vectors."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(at), device=at.device)
    with _products(loss, at) as product:
        for _ in range(probes):
            signs = torch.randint(0, 2, at.shape, generator=generator).to(at) * 2 - 1
            total += (signs * product(signs)).sum(1)
    return total / (probes * at.shape[1])


class _products:
    """Hessian-vector products at one point; the first gradient is shared. Fused attention has no second derivative."""

    def __init__(self, loss: Loss, at: Tensor) -> None:
        self.loss, self.at, self.kernel = loss, at.detach().requires_grad_(), sdpa_kernel(SDPBackend.MATH)

    def __enter__(self) -> Callable[[Tensor], Tensor]:
        self.kernel.__enter__()
        (first,) = torch.autograd.grad(self.loss(self.at).sum(), self.at, create_graph=True)
        return lambda direction: torch.autograd.grad(first, self.at, direction, retain_graph=True)[0]

    def __exit__(self, *error: object) -> None:
        self.kernel.__exit__(*error)
