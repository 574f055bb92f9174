"""What edits do as an adapter on the model that is served: quantised, where the edits were computed
on a float copy of it. Nothing is written into it; the update is added to each layer's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from knowedit.edits.adapter import low_rank
from knowedit.edits.changes import LowRank
from knowedit.edits.measured import outputs
from knowedit.errors import EditError
from knowedit.io.config import Config
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.partial import Hook, hooked

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit


@dataclass(frozen=True)
class Served(Config):
    """Facts on the served model, in the edits' order.

    Attributes:
        gain: by how much the change of the hidden states at each fact's own prompt is that of the
            float copy (1: the same), behind the last edited layer.
        before, after: probability of the new answer, geometric mean over its tokens, without the
            adapter and with it.
        exact: whether every token of it is then the first choice.
    """

    kind = "served"
    gain: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    exact: tuple[bool, ...]

    def __str__(self) -> str:
        gain = sum(self.gain) / len(self.gain)
        before, after = min(self.before), min(self.after)
        return (
            f"on the served model itself: {sum(self.exact)} of {len(self.exact)} facts exact, "
            f"least p(new) {before:.2f} -> {after:.2f}, mean gain {gain:.2f} of the float copy's"
        )


def on_served(model: EditableModel, hf: nn.Module, edits: Sequence[Edit]) -> Served:
    """Ask the edits' facts of `hf`, without the edits and with them beside its weights.

    Args:
        model: of which the edits are; left as it is found.
        hf: a transformers model with the same modules, quantised or not; left as it is found.

    Raises:
        EditError: the edits do not fit an adapter, change routed experts, or have no facts.
    """
    facts, added = [fact for edit in edits for fact in edit.facts], low_rank(model, edits)
    if not facts:
        raise EditError("these edits have no facts to ask the served model for")
    if experts := sorted(name for name in added if split_name(name)[1] is not None):
        raise EditError(
            f"{experts[0]} is one expert's matrix, which a layer's output does not show; load the "
            "adapter where it is served, and ask there"
        )
    prompts, answers = [fact.text for fact in facts], [fact.new_answer for fact in facts]
    seen, last = model.running(hf), _last(model, added)
    beside = {hf.get_submodule(n.removesuffix(".weight")): _adding(c) for n, c in added.items()}
    was, first = outputs(model, facts, last), outputs(seen, facts, last)
    before = seen.score(prompts, answers)
    with hooked(beside):
        after, now = seen.score(prompts, answers), outputs(seen, facts, last)
    own = {model.hf.get_submodule(n.removesuffix(".weight")): _adding(c) for n, c in added.items()}
    with hooked(own):
        wanted = outputs(model, facts, last) - was
    found = ((now - first) * wanted).sum(1) / wanted.square().sum(1).clamp(min=1e-30)
    return Served(
        tuple(found.tolist()),
        tuple(score.probability for score in before),
        tuple(score.probability for score in after),
        tuple(score.exact for score in after),
    )


def _adding(change: LowRank) -> Hook:
    """A layer's output with `U V^T x` added, in the factors' dtype."""

    def add(given: Any, output: Tensor) -> Tensor:
        left, right = change.U.to(output.device), change.V.to(output.device)
        return output + (given.to(right) @ right @ left.T).to(output)

    return add


def _last(model: EditableModel, added: dict[str, LowRank]) -> int:
    """The highest layer with a changed parameter."""
    depth = range(len(model.layers))
    of = [i for i in depth if any(n.startswith(f"{model.layout.layer(i)}.") for n in added)]
    if not of:
        raise EditError("these edits change no layer's weights")
    return max(of)
