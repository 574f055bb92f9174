"""MEND's hyper-network (Mitchell et al., "Fast Model Editing at Scale", 2022): from a gradient to
an edit.

The gradient of a linear layer's weight is a sum of outer products `delta xᵀ` over tokens. Each pair
(x, delta) is normalised and goes through a small residual network that starts as the identity; what
comes out is the pair of a better update. One network serves all weights of a shape; a weight has
its own scales, offsets, normalisation and rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from knowedit.errors import EditError
from knowedit.io.tensors import understood, write_file
from knowedit.methods.learned.networks import (
    TrainedNetwork,
    check_fields,
    how_to_train,
    read_network,
)
from knowedit.models.editable import EditableModel
from knowedit.models.partial import probed
from knowedit.models.structure import linears
from knowedit.models.texts import Batch, Texts

FORMAT = "knowedit-mend/1"
DEPTH = 2  # residual layers, as published
TINY = 1e-8
# rates must learn faster than the rest, which Adam moves by one step size (published: 100)
RATE_SPEED = 30.0

#: Token factors of a batch's weight gradients: inputs `[n, in]`, gradients of the output `[n,
#: out]`, and whose they are `[n]`.
Tokens = dict[str, tuple[Tensor, Tensor, Tensor]]


class Mixer(nn.Module):
    """The network of one shape of weights.

    Args:
        width: inputs and outputs of the weight together.
        weights: how many weights share it.
        rank: of its two matrices, `width -> rank -> width`.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int, weights: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = (6 / (width + rank)) ** 0.5  # Xavier
        self.down = nn.Parameter(
            (2 * torch.rand(DEPTH, width, rank, generator=generator) - 1) * bound
        )
        self.up = nn.Parameter(torch.zeros(DEPTH, rank, width))  # zero: the identity at first
        self.bias = nn.Parameter(torch.zeros(DEPTH, width))
        self.scale = nn.Parameter(torch.ones(DEPTH, weights, width))
        self.shift = nn.Parameter(torch.zeros(DEPTH, weights, width))
        self.log_rate = nn.Parameter(torch.zeros(weights))
        self.register_buffer("mean", torch.zeros(weights, width))
        self.register_buffer("deviation", torch.ones(weights, width))

    def forward(self, weight: int, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of `weight`'s update, a row a token: `U [n, out]`, `V [n, in]`, the update being
        `Uᵀ V`.
        """
        z = (torch.cat([x, delta], 1).float() - self.mean[weight]) / self.deviation[weight]
        for i in range(DEPTH):
            y = (z @ self.down[i] @ self.up[i] + self.bias[i]) * self.scale[i, weight] + self.shift[
                i, weight
            ]
            # clamp, unlike relu, passes the gradient at exactly 0, where the identity starts
            z = z + (y.clamp(min=0) if i < DEPTH - 1 else y)
        right, left = z.split([x.shape[1], delta.shape[1]], 1)
        return -(RATE_SPEED * self.log_rate[weight]).exp() * left, right


@dataclass
class MendNetwork(TrainedNetwork):
    """A hyper-network for some weights of one model.

    Attributes:
        weights: names of the linear modules it edits, below `model.hf`: the MLPs of `layers`.
        mixers: by shape `"in x out"`; `places` says which one and which of its numbers is a
            weight's.
        fingerprint: of the model it was trained for.
        report: of the training; empty for an untrained one.
    """

    name: ClassVar[str] = "mend"

    weights: tuple[str, ...]
    layers: tuple[int, ...]
    mixers: nn.ModuleDict
    places: dict[str, tuple[str, int]]
    fingerprint: str
    report: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(
        cls, model: EditableModel, layers: Sequence[int], rank: int, seed: int = 0
    ) -> MendNetwork:
        """An untrained network for the MLP weights of `layers`. Raises EditError for layer 0,
        ModelError for unknown ones.
        """
        model.check_layers(layers)
        if not layers or min(layers) < 1:
            raise EditError(f"MEND edits layers from 1 on, got {list(layers)}")
        if rank < 1:
            raise EditError(f"rank must be positive, got {rank}")
        sizes = _sizes(model, layers)
        mixers, places = _mixers(sizes, rank, seed)
        made = cls(
            tuple(sizes), tuple(sorted(layers)), mixers.to(model.device), places, model.fingerprint
        )
        made.setup = model.setup
        return made

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.mixers.named_parameters())

    @property
    def first(self) -> int:
        """The lowest edited layer."""
        return self.layers[0]

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.mixers.parameters())

    def factors(
        self, tokens: Tokens, groups: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """`{weight: (U, V)}` of the update: of all tokens together `[out, n]`, `[in, n]`; or, where
        `groups` has a number for every owner, one update for each group, `[groups, out, most
        tokens]` and `[groups, in, most tokens]`, zero-padded."""
        made = {}
        for name, (x, delta, owner) in tokens.items():
            shape, index = self.places[name]
            left, right = self.mixers[shape](index, x, delta)
            if groups is not None:
                left, right = _padded(groups[owner], int(groups.max()) + 1, left, right)
            made[name] = left.mT, right.mT
        return made

    def start_at(self, rate: float) -> None:
        """Set every weight's rate."""
        with torch.no_grad():
            for mixer in self.mixers.values():
                mixer.log_rate.fill_(math.log(rate) / RATE_SPEED)  # type: ignore[operator]

    def normalise(self, sums: Mapping[str, Tensor]) -> None:
        """Set mean and deviation of every weight's (x, delta) from `[3, in + out]` float64: count,
        sum, sum of squares.
        """
        for name, (count, total, square) in sums.items():
            shape, index = self.places[name]
            mean = total / count
            mixer: Any = self.mixers[shape]
            mixer.mean[index] = mean
            mixer.deviation[index] = (square / count - mean**2).clamp(min=0).sqrt() + TINY

    def tensors(self) -> dict[str, Tensor]:
        return {name: t.contiguous().cpu() for name, t in self.mixers.state_dict().items()}

    def save(self, path: str | Path) -> Path:
        """One safetensors file with a JSON header, written atomically."""
        header = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            **({"setup": self.setup} if self.setup else {}),
            "layers": self.layers,
            "report": self.report,
        }
        self.file = write_file(path, self.tensors(), header)
        return self.file

    @classmethod
    def read(cls, path: Path, model: EditableModel) -> MendNetwork:
        header, tensors = read_network("mend", path, model, FORMAT)
        with understood(path, "a MEND network", remedy=how_to_train("mend", model)):
            check_fields(header, header["report"])
            model.check_layers(header["layers"])
            down = next(tensor for name, tensor in tensors.items() if name.endswith(".down"))
            sizes = _sizes(model, header["layers"])
            mixers, places = _mixers(sizes, down.shape[2], 0)
            mixers.load_state_dict(tensors)
            network = cls(
                tuple(sizes),
                tuple(header["layers"]),
                mixers.to(model.device),
                places,
                header["fingerprint"],
                header["report"],
            )
        network.file, network.setup = path, header.get("setup", "")
        return network


def token_factors(texts: Texts, batch: Batch, weights: Sequence[str]) -> Tokens:
    """The gradients of each text's mean NLL with respect to `weights`, as factors a token; tokens
    without any are left out.
    """
    with torch.enable_grad(), probed(texts.model, weights) as seen:
        loss = texts.nll(batch)
        found = torch.autograd.grad(loss, [seen[name][1] for name in weights])
    tokens = {}
    for name, delta in zip(weights, found):
        owner, place = delta.any(-1).nonzero(as_tuple=True)
        tokens[name] = seen[name][0][owner, place].float(), delta[owner, place].float(), owner
    return tokens


def _sizes(model: EditableModel, layers: Sequence[int]) -> dict[str, tuple[int, int]]:
    return {
        name: size
        for layer in sorted(layers)
        for name, size in linears(model, layer, mlp=True).items()
    }


def _mixers(
    sizes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> tuple[nn.ModuleDict, dict[str, tuple[str, int]]]:
    places: dict[str, tuple[str, int]] = {}
    counts: dict[tuple[int, int], int] = {}
    for name, (width_in, width_out) in sizes.items():
        index = counts.get((width_in, width_out), 0)
        places[name], counts[width_in, width_out] = (f"{width_in}x{width_out}", index), index + 1
    generator = torch.Generator().manual_seed(seed)
    mixers = {f"{i}x{o}": Mixer(i + o, count, rank, generator) for (i, o), count in counts.items()}
    return nn.ModuleDict(mixers), places


def _padded(group: Tensor, groups: int, *rows: Tensor) -> list[Tensor]:
    """Rows `[n, width]` as `[groups, most of a group, width]`."""
    group, order = group.sort(stable=True)
    counts = group.bincount(minlength=groups)
    place = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group]
    size = len(counts), int(counts.max())
    return [
        row.new_zeros(*size, row.shape[1]).index_put((group, place), row[order]) for row in rows
    ]
