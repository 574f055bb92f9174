"""Where the facts of a patch go, and what was written into each MLP there."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit.edits.edit import Edit
from knowedit.edits.report import EditReport
from knowedit.errors import EditError
from knowedit.methods.neurons.parts import Freed
from knowedit.models.editable import EditableModel
from knowedit_kernels.lowrank import Change


@dataclass(frozen=True)
class Home:
    """Where a group is written.

    Attributes:
        experts: each of which gets a switch; (None,): the layer's MLP is dense.
        gate: what they write is multiplied by, all together, on average over its wordings.
    """

    experts: tuple[int | None, ...]
    gate: float

    @classmethod
    def of(
        cls, gates: Mapping[int | None, Tensor], known: Container[int | None], layer: int
    ) -> Home:
        """Those of the experts that fire, by their gates `[wordings]`, whose work is `known`.

        Raises:
            EditError: none is.
        """
        if not (experts := tuple(expert for expert in gates if expert in known)):
            raise EditError(
                f"none of the ordinary text's tokens is given to expert {next(iter(gates))} of "
                f"layer {layer}, so that what its neurons do is not known; give more text"
            )
        return cls(experts, float(torch.stack([gates[expert] for expert in experts]).sum(0).mean()))


@dataclass(frozen=True)
class Written:
    """What was written into one MLP.

    Attributes:
        expert: whose it is; None: the layer's MLP is dense.
        freed: the neurons.
        closed: by group, `[wordings]` how far its switch is closed, times the gate.
        leak: the farthest that a switch is closed at another text.
        factors: `(U [hidden, r], V [d, r])` of its output projection.
        changes: by parameter, of all its matrices.
    """

    expert: int | None
    freed: Freed
    closed: Mapping[int, Tensor]
    leak: float
    factors: tuple[Tensor, Tensor]
    changes: Mapping[str, Change]

    def place(self, layer: object) -> str:
        """The MLP in words."""
        return f"{layer}" if self.expert is None else f"{layer} expert {self.expert}"

    def wide(self, model: EditableModel, layer: int) -> tuple[Tensor, Tensor]:
        """The factors of the layer's projection, all experts together."""
        left, right = self.factors
        experts = model.layout.experts(layer)
        if experts is None or self.expert is None:
            return left, right
        whole = right.new_zeros(experts.count, *right.shape)
        whole[self.expert] = right
        return left, whole.flatten(0, 1)


def experts_of(gates: Iterable[Mapping[int | None, Tensor]]) -> list[int | None]:
    """Those that fire for any of the groups."""
    return list(dict.fromkeys(expert for own in gates for expert in own))


def together(edits: Sequence[Edit]) -> Edit:
    """One edit of those of several layers, which have no parameter in common."""
    facts = [fact for edit in edits for fact in edit.facts]
    starts = [sum(len(edit.facts) for edit in edits[:i]) for i in range(len(edits))]
    plan = {}
    for edit, start in zip(edits, starts):
        for layer, own in edit.plan.items():
            plan[layer] = own.new_zeros(len(facts), own.shape[1])
            plan[layer][start : start + len(own)] = own
    reports = [edit.report for edit in edits]
    shares = [len(edit.facts) / len(facts) for edit in edits]
    first = reports[0].details["settings"]
    report = EditReport(
        gain=sum(share * (report.gain or 0.0) for share, report in zip(shares, reports)),
        relative_norm={k: v for report in reports for k, v in report.relative_norm.items()},
        layers={k: v for report in reports for k, v in report.layers.items()},
        planned_nll=sum(s * (report.planned_nll or 0.0) for s, report in zip(shares, reports)),
        steps=[n for r in reports for n in (r.steps if isinstance(r.steps, list) else [])],
        warnings=list(dict.fromkeys(text for report in reports for text in report.warnings)),
        details={
            "settings": {**first, "layers": sorted(plan)},
            "neurons": {k: v for r in reports for k, v in r.details["neurons"].items()},
        },
    )
    return Edit(
        edits[0].method_name,
        {name: change for edit in edits for name, change in edit.changes.items()},
        facts,
        edits[0].fingerprint,
        report,
        {layer: keys for edit in edits for layer, keys in edit.keys.items()},
        frozenset().union(*(edit.exclusive for edit in edits)),
        plan=plan,
    )
