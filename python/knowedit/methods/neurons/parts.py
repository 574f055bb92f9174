"""What a neuron patch is made of: a switch that closes at wanted tokens only, and neurons that can
be spared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.models.editable import EditableModel
from knowedit.models.structure import mlp_of, read_modules
from knowedit_kernels.lowrank import Change


@dataclass(frozen=True)
class Switch:
    """`s(z) = (act(b z) - act(b (z - width))) / (b width)` of scores `z = w.x`: 0 well below 0, 1
    above `width`.

    Attributes:
        score: `[groups, hidden]` w, of the MLP's input x. one: `[hidden]`, with `one.x` = 1 as
            nearly as can be.
        sharpness: b. act: the MLP's activation. gated: it multiplies another linear function of x.
    """

    score: Tensor
    one: Tensor
    sharpness: float
    width: float
    act: Callable[[Tensor], Tensor]
    gated: bool

    @classmethod
    def of(
        cls,
        model: EditableModel,
        layer: int,
        score: Tensor,
        inputs: Sequence[Tensor],
        sharpness: float,
        width: float,
    ) -> Switch:
        """`inputs` `[n, hidden]` each: where `one` is fitted, each set with the same weight (a
        norm's output has no constant coordinate, but nearly constant combinations)."""
        sets = [x.double() for x in inputs]
        square = sum((x.T @ x / len(x) for x in sets), torch.zeros((), dtype=torch.float64))
        eye = torch.eye(score.shape[1], dtype=torch.float64, device=score.device)
        mean = torch.stack([x.mean(0) for x in sets]).sum(0)
        one = torch.linalg.solve(square + 1e-2 * square.diagonal().mean() * eye, mean).float()
        act = activation_of(model, layer, mlp_of(model, layer))
        return cls(score, one, sharpness, width, act, len(read_modules(model, layer)) == 2)

    @property
    def gates(self) -> Tensor:
        """`[2 groups, hidden]` the neurons' first matrix, two rows a group."""
        return self.sharpness * torch.stack(
            [self.score, self.score - self.width * self.one], 1
        ).flatten(0, 1)

    @property
    def ones(self) -> Tensor:
        """`[2 groups, hidden]` what a gated MLP multiplies them by."""
        return self.one.expand(2 * len(self.score), -1)

    def write(self, values: Tensor) -> Tensor:
        """`[2 groups, hidden]` what the neurons write, so that a closed switch writes `values`
        `[groups, hidden]`.
        """
        scaled = values / (self.sharpness * self.width)
        return torch.stack([scaled, -scaled], 1).flatten(0, 1)

    def at(self, x: Tensor) -> Tensor:
        """`[n, groups]` how far each is closed at MLP inputs `[n, hidden]`."""
        fired = self.act(x @ self.gates.T) * ((x @ self.one)[:, None] if self.gated else 1)
        return (fired[:, ::2] - fired[:, 1::2]) / (self.sharpness * self.width)


def check_keys(model: EditableModel, layer: int, inputs: Tensor, keys: Tensor) -> None:
    """Raise EditError where the MLP's keys `[n, d_ff]` are not what its neurons say to its inputs
    `[n, hidden]`: with a norm in between, a neuron that fires would silence all the others.
    """
    mlp, x = mlp_of(model, layer), inputs.to(model.weight(layer))
    with torch.no_grad():
        first, *gated = (module(x) for module in read_modules(model, layer).values())
        said = activation_of(model, layer, mlp)(first) * (gated[0] if gated else 1)
    if (said.float() - keys).norm() > 0.05 * keys.norm():
        raise EditError(
            f"{model.name}: something stands between the neurons of layer {layer} and the MLP's "
            "output projection (a norm?), so they cannot be rewritten one by one; use MEMIT"
        )


def activation_of(model: EditableModel, layer: int, mlp: Any) -> Callable[[Tensor], Tensor]:
    """The MLP's activation. Raises EditError when it is not found."""
    names = ("act_fn", "act", "activation_fn")
    act = next((getattr(mlp, name) for name in names if hasattr(mlp, name)), None)
    if act is None:
        raise EditError(f"{model.name}: the activation of layer {layer}'s MLP was not found")
    return act


def separate(own: Tensor, owner: Tensor, others: Sequence[Tensor], ridge: float) -> Tensor:
    """One direction a group, `w.x >= 1` at its own inputs and `<= -1` at all others, by least
    squared hinge losses.

    Args:
        own: `[n, hidden]`; owner: `[n]` the group of each. Another group's inputs count as others.
        others: `[m, hidden]` each; every set counts as much as a group's own.
        ridge: weight of `|w|^2`, in units of the others' mean square.

    Returns:
        `[groups, hidden]`.
    """
    groups = int(owner.max()) + 1
    mine = (owner[:, None] == torch.arange(groups, device=owner.device)).to(own)  # [n, groups]
    scale = torch.cat(list(others)).square().sum(1).mean()
    direction = torch.zeros(groups, own.shape[1], device=own.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [direction], max_iter=400, history_size=20, line_search_fn="strong_wolfe"
    )

    def missed(z: Tensor) -> Tensor:
        return (1 - z).clamp(min=0).square()

    def loss() -> Tensor:
        optimiser.zero_grad()
        z = own @ direction.T
        total = (missed(z) * mine / mine.sum(0)).sum()
        if groups > 1:
            total = total + (missed(-z) * (1 - mine) / (1 - mine).sum(0)).sum()
        for x in others:
            total = total + missed(-(x @ direction.T)).mean(0).sum()
        total = total + ridge * scale * direction.square().sum()
        total.backward()
        return total

    optimiser.step(loss)
    return direction.detach()


@dataclass(frozen=True)
class Freed:
    """Neurons taken out of service: adding `left @ right.T` to the output projection makes their
    columns zero and has the other neurons take over.

    Attributes:
        neurons: `[m]`; left: `[hidden, m]`; right: `[d_ff, m]`, float32.
        loss: root mean square of what the MLP's output loses, relative to that output's.
    """

    neurons: list[int]
    left: Tensor
    right: Tensor
    loss: float


def free_neurons(
    weight: Tensor, moment: Tensor, count: int, taken: Sequence[int] = (), damp: float = 1e-3
) -> Freed:
    """The `count` neurons whose work the others can do best: the optimal brain surgeon (Hassibi and
    Stork 1993) on the MLP's output, whose Hessian is the keys' second moment C; neuron j costs
    `|w_j|^2 / (C^-1)_jj` once the others make up for it.

    Args:
        weight: `[hidden, d_ff]` the output projection. moment: `[d_ff, d_ff]` float64, the mean of
            k k^T.
        taken: neurons that must stay. damp: added to the diagonal, in units of its mean.

    Raises:
        EditError: more than a quarter of the free ones are wanted.
    """
    width = weight.shape[1]
    if count > (width - len(taken)) // 4:
        left = width - len(taken)
        raise EditError(
            f"{count} neurons are wanted, and {left} of the layer's {width} are free; write "
            f"fewer facts"
        )
    eye = torch.eye(width, dtype=torch.float64, device=moment.device)
    inverse = torch.linalg.inv(moment + damp * moment.diagonal().mean() * eye)
    rest = weight.detach().to(inverse)
    output, lost = float(((rest @ moment) * rest).sum()), 0.0
    barred = torch.zeros(width, dtype=torch.bool, device=moment.device)
    barred[list(taken)] = True
    neurons: list[int] = []
    left_parts: list[Tensor] = []
    right_parts: list[Tensor] = []
    for _ in range(count):
        cost = rest.square().sum(0) / inverse.diagonal().clamp(min=1e-300)
        cost[barred] = torch.inf
        j = int(cost.argmin())
        row = inverse[j].clone()
        left_parts.append(-rest[:, j] / row[j])
        right_parts.append(row)
        neurons.append(j)
        lost += float(cost[j])
        rest = rest + left_parts[-1][:, None] * row
        inverse = inverse - row[:, None] * row / row[j]
        inverse[j], inverse[:, j], barred[j] = 0, 0, True
    left_all, right_all = (torch.stack(parts, 1).float() for parts in (left_parts, right_parts))
    return Freed(neurons, left_all, right_all, (lost / output) ** 0.5)


def patched(model: EditableModel, layer: int, factor: float = 10.0) -> list[int]:
    """Neurons of patches already in the weights, whoever wrote them: their gates are far longer
    than any trained one. They are silent on any text, and would be the first to be freed."""
    module = next(iter(read_modules(model, layer).values()))
    length = (
        (module.weight.T if model.layout.transposed else module.weight).detach().float().norm(dim=1)
    )
    return (length > factor * length.median()).nonzero()[:, 0].tolist()


def rewritten(
    model: EditableModel, layer: int, switch: Switch, freed: Freed, values: Tensor
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, Change]]:
    """The changes of the output projection, by layer, and of other parameters. The other neurons
    take over what the freed ones did, which then write `values` `[groups, hidden]`; and their
    rows in the matrices that read the MLP's input, a gate and a one for what it multiplies."""
    place = torch.nn.functional.one_hot(
        torch.tensor(freed.neurons), model.layout.width(layer)
    ).T.to(values)  # [d_ff, 2 groups]
    left = torch.cat([freed.left.to(values), switch.write(values).T], 1)
    factors = {layer: (left, torch.cat([freed.right.to(values), place], 1))}
    others: dict[str, Change] = {}
    for (name, module), new in zip(read_modules(model, layer).items(), (switch.gates, switch.ones)):
        weight = (module.weight.T if model.layout.transposed else module.weight).detach().float()
        others[f"{name}.weight"] = place, (new - place.T @ weight).T.contiguous()
        if (bias := getattr(module, "bias", None)) is not None:
            others[f"{name}.bias"] = -bias.detach().float() * place.sum(1)
    return factors, others
