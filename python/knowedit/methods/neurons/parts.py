"""What a neuron patch is made of: a switch that closes at wanted tokens only, and neurons that can
be spared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.methods.neurons.wiring import Activation, Wiring
from knowedit_kernels.lowrank import Change


@dataclass(frozen=True)
class Switch:
    """`s(z) = sum_i c_i act(b (z - i w / n)) / h` of scores `z = w.x`: 0 well below 0, 1 above the
    width w; a neuron for each of the n + 1 coefficients c, which are those of the n-th difference.
    One is enough where the activation grows linearly (ReLU, SiLU, GELU); where it grows with the
    square, it takes two.

    Attributes:
        score: `[groups, hidden]` w, of the MLP's input x. one: `[hidden]`, with `one.x` = 1 as
            nearly as can be.
        sharpness: b. act: the MLP's activation. gated: it multiplies another linear function of x.
        difference: `[n + 1]` c.
        height: h, the sum far above the width.
    """

    score: Tensor
    one: Tensor
    sharpness: float
    width: float
    act: Activation
    gated: bool
    difference: Tensor
    height: float

    @classmethod
    def of(
        cls,
        wiring: Wiring,
        score: Tensor,
        inputs: Sequence[Tensor],
        sharpness: float,
        width: float,
    ) -> Switch:
        """`inputs` `[n, hidden]` each: where `one` is fitted, each set with the same weight (a
        norm's output has no constant coordinate, but nearly constant combinations).

        Raises:
            EditError: no difference of the activation is a step, or the inputs are all zeros.
        """
        sets = [x.double() for x in inputs]
        square = sum((x.T @ x / len(x) for x in sets), torch.zeros((), dtype=torch.float64))
        _need_numbers("inputs: those of the layer", square)
        eye = torch.eye(score.shape[1], dtype=torch.float64, device=score.device)
        mean = torch.stack([x.mean(0) for x in sets]).sum(0)
        one = torch.linalg.solve(square + 1e-2 * square.diagonal().mean() * eye, mean).float()
        difference, height = step_of(wiring.act, sharpness, width, score)
        gated = wiring.up is not None
        return cls(score, one, sharpness, width, wiring.act, gated, difference, height)

    @property
    def neurons(self) -> int:
        """How many a group takes."""
        return len(self.difference)

    @property
    def gates(self) -> Tensor:
        """`[neurons groups, hidden]` the neurons' first matrix, a row for each neuron of a
        group.
        """
        offsets = torch.linspace(0, self.width, self.neurons).tolist()
        rows = [self.score - offset * self.one for offset in offsets]
        return self.sharpness * torch.stack(rows, 1).flatten(0, 1)

    @property
    def ones(self) -> Tensor:
        """`[neurons groups, hidden]` what a gated MLP multiplies them by."""
        return self.one.expand(self.neurons * len(self.score), -1)

    def write(self, values: Tensor) -> Tensor:
        """`[neurons groups, hidden]` what the neurons write, so that a closed switch writes
        `values` `[groups, hidden]`.
        """
        weights = (self.difference / self.height).to(values)
        return (weights[:, None] * values[:, None]).flatten(0, 1)

    @torch.no_grad()
    def at(self, x: Tensor) -> Tensor:
        """`[n, groups]` how far each is closed at MLP inputs `[n, hidden]`."""
        fired = self.act(x @ self.gates.T) * ((x @ self.one)[:, None] if self.gated else 1)
        weights = (self.difference / self.height).to(fired)
        return fired.unflatten(1, (-1, self.neurons)) @ weights


def step_of(act: Activation, sharpness: float, width: float, like: Tensor) -> tuple[Tensor, float]:
    """The coefficients of the lowest difference of the activation that is a step, 0 far below and
    constant far above `width`, and its height; on the device and with the dtype of `like`.

    Raises:
        EditError: neither the first nor the second is.
    """
    far = width * torch.tensor([-40, -20, 20, 40], dtype=torch.float64, device=like.device)
    for coefficients in ([1.0, -1.0], [1.0, -2.0, 1.0]):
        offsets = torch.linspace(0, width, len(coefficients)).to(far)
        with torch.no_grad():
            steps = act(sharpness * (far[:, None] - offsets)) @ torch.tensor(coefficients).to(far)
        below, under, over, above = steps.tolist()
        off = max(abs(below), abs(under), abs(above - over))
        if off <= 1e-2 * abs(above) and abs(above) > 1e-3 * sharpness * width:
            return torch.tensor(coefficients).to(like), above
    raise EditError(
        "this model's activation grows neither linearly nor with the square, so no switch can be "
        "made of it; use MEMIT"
    )


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


def room(width: int, taken: int) -> int:
    """How many of an MLP's neurons may be given away: a quarter of those that are not taken, and
    never more than half of all in the end, beyond which `patched` would not know them again."""
    return max(0, min((width - taken) // 4, width // 2 - taken))


def _need_numbers(what: str, moment: Tensor) -> None:
    """Raises EditError for a second moment that is 0 or not finite."""
    trace = float(moment.diagonal().sum())
    if not 0 < trace < math.inf:
        raise EditError(
            f"{what} have squares that sum to {trace}: all zeros, or not finite; check the model's "
            "weights, or edit another layer"
        )


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
        EditError: more are wanted than there is room for, or the moment is all zeros.
    """
    _need_numbers("moment: the layer's keys", moment)
    width = weight.shape[1]
    if count > room(width, len(taken)):
        raise EditError(
            f"{count} neurons are wanted, and {width - len(taken)} of the layer's {width} are "
            f"free: {room(width, len(taken))} may be rewritten; write fewer facts"
        )
    eye = torch.eye(width, dtype=torch.float64, device=moment.device)
    inverse = torch.linalg.inv(moment + damp * moment.diagonal().mean() * eye)
    rest = weight.detach().to(inverse)
    output, lost = float(((rest @ moment) * rest).sum()), 0.0
    spread, length = inverse.diagonal().clone(), rest.square().sum(0)
    barred = torch.zeros(width, dtype=torch.bool, device=moment.device)
    barred[list(taken)] = True
    # Neither matrix is updated: what the steps so far change is read off their vectors, so that a
    # step costs a product with a vector and not the writing of d_ff^2 numbers.
    neurons: list[int] = []
    pivots: list[float] = []
    left, right = rest.new_zeros(len(rest), count), rest.new_zeros(width, count)
    for n in range(count):
        cost = length.clamp(min=0) / spread.clamp(min=1e-300)
        cost[barred] = torch.inf
        j = int(cost.argmin())
        before = right[j, :n]
        row = inverse[j] - right[:, :n] @ (before / before.new_tensor(pivots))
        row[neurons] = 0
        column = -(rest[:, j] + left[:, :n] @ before) / row[j]
        across = column @ rest + right[:, :n] @ (column @ left[:, :n])
        length += row * (2 * across + column.square().sum() * row)
        spread -= row.square() / row[j]
        left[:, n], right[:, n], barred[j] = column, row, True
        neurons.append(j)
        pivots.append(float(row[j]))
        lost += float(cost[j])
    return Freed(neurons, left.float(), right.float(), (lost / output) ** 0.5)


def patched(wiring: Wiring, factor: float = 10.0) -> list[int]:
    """Neurons of patches already in the weights, whoever wrote them: their gates are far longer
    than any trained one, of which there are at least half (`room`). They are silent on any text,
    and would be the first to be freed."""
    length = wiring.gate.weight.norm(dim=1)
    return (length > factor * length.median()).nonzero()[:, 0].tolist()


def rewritten(
    wiring: Wiring, switch: Switch, freed: Freed, values: Tensor
) -> tuple[tuple[Tensor, Tensor], dict[str, Change]]:
    """The change of the output projection, `(U [hidden, r], V [d_ff, r])`, and those of other
    parameters. The other neurons take over what the freed ones did, which then write `values`
    `[groups, hidden]`; and their rows in the matrices that read the MLP's input, a gate and a one
    for what it multiplies.
    """
    place = torch.nn.functional.one_hot(torch.tensor(freed.neurons), wiring.gate.count).T.to(
        values
    )  # [d_ff, neurons]
    left = torch.cat([freed.left.to(values), switch.write(values).T], 1)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    biases: dict[str, Tensor] = {}
    for rows, new in zip(wiring.reads, (switch.gates, switch.ones)):
        change = (new - place.T @ rows.weight).T.contiguous()
        pairs.setdefault(rows.name, []).append((rows.embedded(place), change))
        if rows.bias is not None:
            name, change = rows.offset_name, rows.embedded(-rows.bias * place.sum(1))
            biases[name] = biases[name] + change if name in biases else change
    others: dict[str, Change] = {
        name: (torch.cat([left for left, _ in both], 1), torch.cat([right for _, right in both], 1))
        for name, both in pairs.items()
    }
    return (left, torch.cat([freed.right.to(values), place], 1)), others | biases
