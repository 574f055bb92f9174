"""MEND (Mitchell et al. 2022): turn a fact's gradient into an edit by a trained hyper-network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from knowedit.edits.changes import change_of, relative_norm
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.edits.report import EditReport
from knowedit.facts.fact import Fact
from knowedit.io.memory import peak_memory
from knowedit.io.ranges import Positive
from knowedit.methods.learned.mend.network import MendNetwork, Tokens, token_factors
from knowedit.methods.learned.method import LearnedMethod
from knowedit.methods.learned.networks import NetworkFile
from knowedit.models.editable import EditableModel
from knowedit.models.texts import Texts
from knowedit.statistics import KeyStatistics

AT_ONCE = 64  # facts in a backward pass
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are left out


@dataclass(frozen=True)
class MEND(LearnedMethod):
    """Update: a learned map of the gradient's token factors. Weights: the MLPs of the last layers.
    Several facts: summed.

    Attributes:
        network: a trained network or its file; None: the one in the cache folder (`knowedit train
            mend MODEL`).
        scale: factor of the update.
    """

    network: MendNetwork | NetworkFile | str | Path | None = None
    scale: Positive = 1.0

    name: ClassVar[str] = "MEND"
    network_class = MendNetwork

    def _compute(
        self,
        model: EditableModel,
        facts: list[Fact],
        statistics: KeyStatistics | None,
        history: History | None,
        progress: bool,
    ) -> Edit:
        network = self.network
        assert isinstance(network, MendNetwork)  # see LearnedMethod.compute
        start = time.perf_counter()
        rows = [model.row(fact.text, answer=fact.new_answer) for fact in facts]
        with peak_memory(model.device) as peak:
            texts = Texts(model, rows, network.first, clean=False)
            chunks = (
                range(at, min(at + AT_ONCE, len(facts))) for at in range(0, len(facts), AT_ONCE)
            )
            tokens = [token_factors(texts, texts.batch(chunk), network.weights) for chunk in chunks]
            with torch.no_grad():
                pairs = {name: self._pair(network, name, tokens) for name in network.weights}
            seconds, memory = time.perf_counter() - start, peak()
        names = {model.layout.weight_name(layer): layer for layer in model.layout.editable}
        changes = {f"{name}.weight": pair for name, pair in pairs.items()}
        parameters = dict(model.hf.named_parameters())
        report = EditReport(
            relative_norm={
                str(names.get(n, n)): relative_norm(parameters[n], pair)
                for n, pair in changes.items()
            },
            seconds=seconds,
            details={
                "settings": {"weights": list(network.weights), "scale": self.scale},
                "ranks": {name: pair[0].shape[1] for name, pair in changes.items()},
                "peak_memory_bytes": memory,
                "trainable_parameters": network.trainable,
            },
        )
        keys = {
            names[n]: torch.cat([part[n.removesuffix(".weight")][0] for part in tokens])
            for n in changes
            if n in names
        }
        named = {name: change_of(pair) for name, pair in changes.items()}
        return Edit(self.name, named, facts, model.fingerprint, report, keys)

    def _pair(self, network: MendNetwork, name: str, tokens: list[Tokens]) -> tuple[Tensor, Tensor]:
        parts = [network.factors({name: part[name]})[name] for part in tokens]
        left, right = (torch.cat(factors, 1) for factors in zip(*parts))
        return compressed(self.scale * left, right)


def compressed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """`U [out, r]`, `V [in, r]` of the product `left rightᵀ` at its numerical rank."""
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, sizes, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    rank = max(1, int((sizes > NEGLIGIBLE * sizes[0]).sum()))
    return (q_left @ (u * sizes)[:, :rank]).contiguous(), (q_right @ vt[:rank].T).contiguous()
