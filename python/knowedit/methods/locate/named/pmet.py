"""PMET (Li et al., 2024): deltas of the attention's and of the MLP's output are optimised together,
the MLP's is written.

The attention's delta takes up what does not belong into the MLP; it is thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from knowedit.edits.edit import Edit
from knowedit.io.progress import bar
from knowedit.methods.locate.keys import GroupKeys, group_keys
from knowedit.methods.locate.named.memit import MEMIT
from knowedit.methods.locate.task import Task
from knowedit.methods.locate.values import Problem, Targets, ValueSettings, optimise_values
from knowedit.models.editable import EditableModel
from knowedit.models.partial import Suffix
from knowedit.models.structure import attention_of


@dataclass(frozen=True)
class PMET(MEMIT):
    """Metric: the covariance. Targets: one value of the MLP's output per subject, beside one of the
    attention's.
    Spread: residual / square root of the remaining layers.

    Attributes:
        clamp: largest `|delta|` of either, relative to its own clean output; in place of that of
            `values`, which is meant for the much longer hidden state: with 0.75 SmolLM2 says few of
            the new answers. None: that of `values`.
    """

    mean_keys: bool = True
    gain: float = 0.98
    clamp: float | None = 4.0

    name: ClassVar[str] = "PMET"

    def targets(self, task: Task) -> Targets:
        values = self.own_values(task)
        with bar(
            f"{self.name}: optimising values", len(task.groups), "values", show=task.progress
        ) as advance:
            return optimise_values(
                task.model,
                task.groups,
                task.layers[-1],
                values,
                problem=AttentionAndMLP,
                progress=advance,
            )

    def finish(self, task: Task, targets: Targets) -> Edit:
        return super().finish(replace(task, values=self.own_values(task)), targets)

    def own_values(self, task: Task) -> ValueSettings:
        """The task's, with this method's clamp."""
        return task.values if self.clamp is None else replace(task.values, clamp=self.clamp)

    def keys(self, task: Task, layer: int) -> GroupKeys:
        contexts = task.values.contexts
        return group_keys(
            task.model,
            task.groups,
            layer,
            task.layers[-1],
            contexts,
            mean=self.mean_keys,
            of_mlp=True,
        )

    def spread(self, residual: Tensor, remaining: int) -> Tensor:
        return residual / remaining**0.5


class AttentionAndMLP(Problem):
    """Two deltas a group, `[groups, 2, hidden]`: of the attention's and the MLP's output of the
    layer.
    """

    @classmethod
    def at(cls, layer: int, model: EditableModel, plans: Sequence[Any]) -> Problem:
        return cls(plans, Suffix(model, [row for plan in plans for row in plan.inputs], layer - 1))

    def states(self, rows: Tensor) -> Tensor:
        seen: dict[int, Tensor] = {}
        alone = self.suffix.select(rows)

        def see(part: int, output: Tensor) -> Tensor:
            seen[part] = output[:, 0]
            return output

        with torch.no_grad(), self._hooked(see):
            alone.run(alone.hidden)
        return torch.stack([seen[0], seen[1]], 1)

    def run(self, delta: Tensor) -> Tensor:
        each = delta[self.of_row]

        def add(part: int, output: Tensor) -> Tensor:
            return torch.cat(
                [output[:, :1] + each[:, part : part + 1].to(output), output[:, 1:]], 1
            )

        with self._hooked(add):
            return self.suffix.run(self.suffix.hidden)

    @contextmanager
    def _hooked(self, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Pass the outputs of the attention (part 0) and the MLP's projection (part 1) through
        `change`.
        """
        layer = self.suffix.layer + 1

        def hook(part: int) -> Callable[..., Any]:
            def changed(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                return (
                    (change(part, output[0]), *output[1:])
                    if isinstance(output, tuple)
                    else change(part, output)
                )

            return changed

        modules = attention_of(self.model.layers[layer]), self.model.projection(layer)
        handles = [module.register_forward_hook(hook(part)) for part, module in enumerate(modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
