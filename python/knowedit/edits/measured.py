"""What an edit really does, measured on the edited model: at its own facts, and on ordinary text.

A method plans and predicts; what comes of it depends on all that the plan leaves out (norms behind
the projection, other keys, rounding). So the edit is applied, looked at, and taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from knowedit.edits.routing import Rerouted, Routing
from knowedit.facts.fact import Fact
from knowedit.facts.wordings.forms import occurs
from knowedit.facts.wordings.ordinary import held_out, passages
from knowedit.io.config import Config
from knowedit.io.tables import figure
from knowedit.models.editable import EditableModel
from knowedit.models.partial import Hook, hooked, read
from knowedit.models.tokens import batches

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

WIDTH = 12  # tokens read of each short text, all as one batch without padding
PASSAGE = 32  # and of each passage

#: What is to be added to the output of layers' MLP projections: `{layer: [facts, hidden]}`.
Plan = Mapping[int, Tensor]


@dataclass(frozen=True)
class Measured(Config):
    """What the edited model does.

    Attributes:
        gain: of each fact, the share of the planned change that appears at the output of the last
            edited layer, at the subject's last token of the fact's own prompt; empty where nothing
            was planned there.
        probability: of each fact, p(new) at its own prompt (geometric mean over the tokens).
        exact: of each fact, whether its own prompt is answered with the new object.
        perplexity_before, perplexity: of ordinary text, of the model as it was and edited.
        kl: mean KL(before || edited) of the next token there, nats.
        same: share of its places with the same most likely next token.
        tokens: of ordinary text.
        routing: of later layers with routed experts; None: there are none.
    """

    gain: tuple[float, ...] = ()
    probability: tuple[float, ...] = ()
    exact: tuple[bool, ...] = ()
    perplexity_before: float = 1.0
    perplexity: float = 1.0
    kl: float = 0.0
    same: float = 1.0
    tokens: int = 0
    routing: Rerouted | None = None

    @property
    def mean_gain(self) -> float | None:
        return sum(self.gain) / len(self.gain) if self.gain else None

    @property
    def perplexity_ratio(self) -> float:
        """Of the perplexity after to that before."""
        return self.perplexity / self.perplexity_before

    def __str__(self) -> str:
        said = f"{sum(self.exact)} of {len(self.exact)} facts are said at their own prompts"
        gain = "" if self.mean_gain is None else f", gain {self.mean_gain:.3f}"
        return (
            f"{said}{gain}; ordinary text: perplexity {self.perplexity_before:.2f} -> "
            f"{self.perplexity:.2f}, same next word {self.same:.0%}, "
            f"KL {figure(self.kl, '.4f')} nats"
            + ("" if self.routing is None else f"; {self.routing}")
        )


@torch.no_grad()
def measure(model: EditableModel, edit: Edit, plan: Plan | None = None) -> Measured:
    """Apply `edit` to `model`, measure, and take it back, which restores every bit.

    Of ordinary text it reads a passage more with every further fact: the look costs a like part of
    every edit, and where many small harms add up it is exact enough to see them.

    Args:
        plan: what the edit was to add; its gain is measured against this.

    Raises:
        EditError: it cannot be applied.
    """
    facts, routing = edit.facts, Routing.of(model, edit)
    more = _passages(facts)
    clean = _ordinary(model, more)
    before = outputs(model, facts, max(plan)) if plan else None
    planned = outputs(model, facts, max(plan), plan) if plan else None
    with edit.applied_to(model):
        scores = model.score([fact.text for fact in facts], [fact.new_answer for fact in facts])
        now = _Ordinary.of(model, more)
        after = outputs(model, facts, max(plan)) if plan else None
        rerouted = routing.against(model)
    gain: list[float] = []
    if before is not None and planned is not None and after is not None:
        wanted = planned - before
        found = ((after - before) * wanted).sum(1) / wanted.square().sum(1).clamp(min=1e-30)
        gain = found.tolist()
    return Measured(
        tuple(gain),
        tuple(score.probability for score in scores),
        tuple(score.exact for score in scores),
        tokens=len(now.following),
        routing=rerouted,
        **clean.against(model, now),
    )


def outputs(
    model: EditableModel, facts: Sequence[Fact], layer: int, plan: Plan | None = None
) -> Tensor:
    """`[facts, hidden]` float32, the layer's output at the subjects of the bare prompts; with what
    is planned added there.
    """
    rows = [model.row(fact.prompt, fact.subject) for fact in facts]
    ends = [row.subject or 0 for row in rows]
    found = torch.empty(len(rows), model.hidden)
    for batch in batches([end + 1 for end in ends], 4096):
        ids, _ = model.pad([rows[i].ids[: ends[i] + 1] for i in batch])
        lines, at = torch.arange(len(batch)), torch.tensor([ends[i] for i in batch])

        def added(delta: Tensor, lines: Tensor = lines, at: Tensor = at) -> Hook:
            def add(_: Tensor, output: Tensor) -> Tensor:
                places = lines.to(output.device), at.to(output.device)
                whole = output.reshape(len(lines), -1, output.shape[-1])  # OPT has texts in a row
                return whole.index_put(places, delta.to(output), accumulate=True).view_as(output)

            return add

        outputs: list[Tensor] = []
        changes = {model.projection(k): added(delta[batch]) for k, delta in (plan or {}).items()}
        with hooked(changes):
            read(model, ids, outputs={model.layout.layer(layer): outputs.append})
        found[batch] = outputs[0][lines, at].to(found)
    return found


@dataclass(frozen=True)
class _Ordinary:
    """A model on the shipped ordinary text.

    Attributes:
        states: `[n, hidden]` final hidden states at every token but the texts' last ones.
        following: `[n]` the tokens that follow.
    """

    states: Tensor
    following: Tensor

    @classmethod
    def of(cls, model: EditableModel, more: Sequence[str] = ()) -> _Ordinary:
        """Read the short texts and the passages `more`."""
        states, following = [], []
        for texts, width in ((held_out(), WIDTH), (more, PASSAGE)):
            room = model.max_length // 2  # letters: none has more than two tokens
            rows = [model.row(text[:room]).ids[: min(width, model.max_length)] for text in texts]
            for batch in batches([len(row) for row in rows], 512):
                ids, mask = model.pad([rows[i] for i in batch])
                places = mask[:, 1:]
                states.append(model.final_states(ids)[:, :-1][places])
                following.append(ids[:, 1:][places])
        return cls(torch.cat(states), torch.cat(following))

    def against(self, model: EditableModel, now: _Ordinary) -> dict[str, float]:
        """This model's and another one's perplexity, the mean KL(this || now) in nats, and the
        share of places with the same most likely token.
        """
        parts, columns = [], (self.states, now.states, self.following)
        for mine, other, token in zip(*(column.split(64) for column in columns)):
            before, after = model.logprobs(mine), model.logprobs(other)
            at = token[:, None].to(before.device)
            nll = [-logp.gather(1, at)[:, 0] for logp in (before, after)]
            kl = (before.exp() * (before - after)).sum(-1)
            same = (before.argmax(-1) == after.argmax(-1)).to(kl)
            parts.append(torch.stack([*nll, kl, same], 1))
        was, then, divergence, share = torch.cat(parts).double().mean(0).tolist()
        found = {"perplexity_before": was, "perplexity": then}
        return {n: math.exp(min(x, 700)) for n, x in found.items()} | {
            "kl": divergence,
            "same": share,
        }


def _passages(facts: Sequence[Fact]) -> tuple[str, ...]:
    """One for every fact but the first, none about a fact's subject."""
    subjects = {fact.subject for fact in facts}
    free = [text for text in passages() if not any(occurs(name, text) for name in subjects)]
    return tuple(free[: len(facts) - 1])


#: The last one measured of each model without a new edit: which edits were in force and which
#: passages were read; and what it said.
_CLEAN: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], _Ordinary]] = WeakKeyDictionary()


def _ordinary(model: EditableModel, more: tuple[str, ...]) -> _Ordinary:
    """The model as it is now on ordinary text; measured once for each set of edits in force."""
    now = (more, model.fingerprint, *model.ledger.active)
    known = _CLEAN.get(model.hf)
    if known is None or known[0] != now:
        known = _CLEAN[model.hf] = now, _Ordinary.of(model, more)
    return known[1]
