"""SERAC's trained parts (Mitchell et al., "Memory-Based Model Editing at Scale", 2022): which
question is about a stored fact, and how to answer it with that fact in view.

Both stand on the base model, which stays as it is: the scope classifier reads its hidden states at
one layer, the counterfactual model is the base with low-rank additions. The published ones are a
model each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from knowedit.io.tensors import understood, write_file
from knowedit.methods.learned.networks import (
    TrainedNetwork,
    check_fields,
    how_to_train,
    is_number,
    read_network,
)
from knowedit.models.editable import EditableModel
from knowedit.models.partial import layer_outputs
from knowedit.models.tokens import join

FORMAT = "knowedit-serac/1"
# of the classifier: attention heads, numbers a head, size of an embedding
HEADS, WIDTH, SIZE = 8, 64, 256

LowRankAdapter = dict[str, tuple[Tensor, Tensor]]


class Scope(nn.Module):
    """A text's embedding from its hidden states, pooled by attention heads that are each
    trained for something of their own.

    Two texts ask for the same fact as far as their embeddings agree: `logit = scale cos + offset`.
    """

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / shape[0] ** 0.5)

        self.look, self.read, self.mix = (
            random(hidden, HEADS),
            random(hidden, HEADS * WIDTH),
            random(HEADS * WIDTH, SIZE),
        )
        self.log_scale, self.offset = (
            nn.Parameter(torch.tensor(2.5)),
            nn.Parameter(torch.tensor(-6.0)),
        )

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """Unit vectors `[B, SIZE]` of right-padded `states` `[B, T, hidden]` whose rows have
        `lengths` `[B]` tokens.
        """
        x = layer_norm(states.float(), states.shape[-1:])
        real = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        attention = (
            (x @ self.look).masked_fill(~real[..., None], -torch.inf).softmax(1)
        )  # [B, T, heads]
        values = (x @ self.read).unflatten(-1, (HEADS, WIDTH))
        pooled = torch.einsum("bth,bthw->bhw", attention, values).flatten(1)
        return normalize(pooled @ self.mix, dim=-1)

    def logits(self, queries: Tensor, stored: Tensor) -> Tensor:
        """`[queries, stored]`."""
        return self.log_scale.exp() * (queries @ stored.T) + self.offset


@dataclass
class SeracNetwork(TrainedNetwork):
    """Scope classifier and counterfactual model of one base model.

    Attributes:
        layer: whose output the classifier reads.
        adapter: `{linear module: (U [out, r], V [in, r])}` that makes the base the counterfactual
            model.
        threshold: a question is in scope of a stored fact above this logit.
        report: of the training; empty for an untrained one.
    """

    name: ClassVar[str] = "serac"

    scope: Scope
    layer: int
    adapter: LowRankAdapter
    fingerprint: str
    threshold: float = 0.0
    report: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def embed(self, model: EditableModel, prompts: Sequence[str]) -> Tensor:
        """Embeddings `[n, SIZE]` of prompts; one pass through the layers up to `layer`."""
        inputs = [model.row(prompt).ids for prompt in prompts]
        found = torch.empty(len(inputs), SIZE, device=model.device)
        for group, states in layer_outputs(model, inputs, self.layer):
            lengths = torch.tensor([len(inputs[i]) for i in group], device=states.device)
            found[torch.tensor(group, device=found.device)] = self.scope(states, lengths).to(found)
        return found

    @torch.no_grad()
    def best(self, queries: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """Of each query the highest logit above the threshold (positive: in scope) and the stored
        fact, the first of equals.
        """
        return (self.scope.logits(queries, stored) - self.threshold).max(1)

    def header(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "threshold": self.threshold,
            "fingerprint": self.fingerprint,
            **({"setup": self.setup} if self.setup else {}),
            "report": self.report,
        }

    def tensors(self) -> dict[str, Tensor]:
        found = {
            f"scope.{name}": tensor.detach() for name, tensor in self.scope.state_dict().items()
        }
        for name, (left, right) in self.adapter.items():
            found |= {f"adapter.{name}.U": left.detach(), f"adapter.{name}.V": right.detach()}
        return {name: tensor.contiguous().cpu() for name, tensor in found.items()}

    @classmethod
    def of(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SeracNetwork:
        """From `header()` and `tensors()`. Raises an error of any kind for fields
        that are not what they should be.
        """
        check_fields(header, header["report"])
        if header["report"] and "trainable_parameters" not in header["report"]:  # edits tell it
            raise KeyError("report.trainable_parameters")
        if type(header["layer"]) is not int or header["layer"] < 0:
            raise TypeError(f"layer of the network is {header['layer']!r}")
        if not is_number(header["threshold"]):  # nothing is above NaN
            raise TypeError(f"threshold of the network is {header['threshold']!r}")
        state = {
            name.removeprefix("scope."): t
            for name, t in tensors.items()
            if name.startswith("scope.")
        }
        scope = Scope(len(state["look"]), torch.Generator())
        scope.load_state_dict(state)
        names = [
            name[len("adapter.") : -2]
            for name in tensors
            if name.startswith("adapter.") and name.endswith(".U")
        ]
        adapter = {
            name: (tensors[f"adapter.{name}.U"], tensors[f"adapter.{name}.V"])
            for name in sorted(names)
        }
        made = cls(
            scope,
            header["layer"],
            adapter,
            header["fingerprint"],
            header["threshold"],
            header["report"],
        )
        made.setup = header.get("setup", "")
        return made

    def save(self, path: str | Path) -> Path:
        """One safetensors file with a JSON header, written atomically."""
        self.file = write_file(path, self.tensors(), {"format": FORMAT, **self.header()})
        return self.file

    @classmethod
    def read(cls, path: Path, model: EditableModel) -> SeracNetwork:
        header, tensors = read_network("serac", path, model, FORMAT)
        with understood(path, "a SERAC network", remedy=how_to_train("serac", model)):
            network = cls.of(header, tensors).to(model.device)
            model.check_layers([network.layer])
        network.file = path
        network.check(model)
        return network

    def bits(self) -> bytes:
        return super().bits() + repr(self.threshold).encode()

    def to(self, device: torch.device) -> SeracNetwork:
        self.scope.to(device)
        self.adapter = {
            name: (left.to(device), right.to(device))
            for name, (left, right) in self.adapter.items()
        }
        return self


def in_view(prompt: str, target: str, query: str) -> str:
    """What the counterfactual model reads: the stored fact, then the question."""
    return f"New fact: {join(prompt, target)}.\n{query}"
