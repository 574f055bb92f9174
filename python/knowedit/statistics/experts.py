"""Second moments of routed experts: one for each, over all tokens.

The key of the wide layer (`models.experts`) at a token is `[g_0 k_0 .. g_E k_E]`, zero where an
expert was not chosen; its second moment is taken as block diagonal, `C_j = sum g_j^2 k_j k_j' / N`
with N *all* tokens. What two experts do together is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from knowedit.models.editable import lengths
from knowedit.models.experts import Experts, Routed
from knowedit_kernels import GroupedSecondMoment
from knowedit_kernels.moments.audit import AuditResult
from knowedit_kernels.solver import shrunk_by_count

#: Tokens an expert should have seen for each of its key's dimensions; with fewer it is filled up.
ENOUGH = 2


class ExpertMoment:
    """`SecondMoment` of a layer with routed experts.

    Attributes:
        count: tokens that passed the layer.
        counts: `[E]` int64, tokens that each expert was given.
    """

    def __init__(self, experts: Experts, device: torch.device | str, precision: str) -> None:
        self._sums = GroupedSecondMoment(
            experts.count, experts.width, device=device, precision=precision
        )
        self._tokens = torch.zeros(1, dtype=torch.int64)

    @property
    def count(self) -> int:
        return int(self._tokens)

    @property
    def counts(self) -> Tensor:
        return self._sums.counts

    def update(self, routed: Routed, keep: Tensor) -> Tensor:
        """Add the tokens of `routed` where `keep` is true.

        Returns:
            The lengths of the wide layer's keys at all tokens, in the shape of `keep`.

        Raises:
            ValueError: NaN or infinite keys.
        """
        keys = routed.keys()
        gates = routed.gates.to(keys)
        self._sums.update(
            keys[keep].flatten(0, 1),
            index=routed.index[keep].flatten(),
            weights=gates[keep].flatten(),
        )
        self._tokens += int(keep.sum())
        return (lengths(keys) * gates).norm(dim=-1)

    def sum(self) -> Tensor:
        """`[E, d, d]` float64, of gate times key."""
        return torch.stack([self._sums.matrix(expert) for expert in range(self._sums.groups)])

    def flush(self) -> ExpertMoment:
        """Sum what is waiting."""
        self._sums.flush()
        return self

    def merge(self, other: ExpertMoment) -> ExpertMoment:
        """Add what `other` has seen."""
        self._sums.merge(other._sums)
        self._tokens += other._tokens
        return self

    def all_reduce(self) -> ExpertMoment:
        """Add up all ranks, on every rank."""
        self._sums.all_reduce()
        tokens = self._tokens.to(self._sums.device)
        torch.distributed.all_reduce(tokens)
        self._tokens = tokens.cpu()
        return self

    def audit(self) -> AuditResult:
        """The accumulation error, of all experts together."""
        return self._sums.audit()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on with the same bits."""
        return {**self._sums.state_dict(), "tokens": self._tokens}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> ExpertMoment:
        """Restore `state_dict`."""
        self._sums.load_state_dict({n: part for n, part in state.items() if n != "tokens"})
        self._tokens = state["tokens"].clone()
        return self


def filled(totals: Tensor, counts: Tensor, tokens: int) -> list[Tensor]:
    """`C_j` of every expert, each as if it had seen `ENOUGH` tokens for each dimension: one that
    has seen fewer is filled up with the mean of all experts' tokens.

    Args:
        totals: `[E, d, d]`, `counts`: `[E]` tokens that each was given, `tokens`: that passed.
    """
    pooled, rows = totals.sum(0), int(counts.sum())
    lacking = (ENOUGH * totals.shape[-1] - counts).clamp(min=0)
    return [
        shrunk_by_count(total, pooled, rows, tokens, prior=float(prior))
        for total, prior in zip(totals, lacking, strict=True)
    ]


def rare(counts: Tensor, width: int) -> list[int]:
    """The experts that `filled` fills up."""
    return (counts < ENOUGH * width).nonzero().flatten().tolist()


def moment_of(keys: Tensor, experts: Experts | None) -> Tensor:
    """`E[k kᵀ]` of keys `[n, width]`: `[width, width]`, or `[E, d, d]` of routed experts."""
    if experts is None:
        return keys.T @ keys / len(keys)
    by_expert = experts.by_expert(keys).transpose(0, 1)
    return by_expert.mT @ by_expert / len(keys)
