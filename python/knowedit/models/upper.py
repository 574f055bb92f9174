"""Training through the upper layers only: everything below the first trained one is computed once a
text and kept.

`replay.Suffix` cuts texts at the subject and is bound to its rows; here whole texts are batched
anew at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knowedit.io.progress import bar
from knowedit.models.editable import EditableModel
from knowedit.models.partial import observe
from knowedit.models.tokens import Row, batches

# lengths of batches are multiples: oneDNN compiles a kernel for every new shape of a bfloat16
# product
SHAPES = 8


class Upper:
    """The layers from `first` (at least 1) on, differentiable.

    Args:
        longest: the longest text, in tokens.
    """

    def __init__(self, model: EditableModel, first: int, longest: int) -> None:
        model.check_layers([first])
        self.model, self.first, self.longest = model, first, longest
        self._calls, _, _ = observe(
            model, torch.zeros(1, longest, dtype=torch.long, device=model.device), first - 1
        )

    def run(self, states: Tensor) -> Tensor:
        """Final hidden states (after the last norm) `[B, T, hidden]`. Causal: what stands after a
        text does not matter.
        """
        for block, call in zip(self.model.layers[self.first :], self._calls):
            states = block(states, past_key_values=None, **_cut(call, states.shape[1]))
            states = states[0] if isinstance(states, tuple) else states
        return self.model.norm(states)


def states_of(
    model: EditableModel, inputs: Sequence[list[int]], layer: int, budget: int = 2048
) -> Iterator[tuple[list[int], Tensor]]:
    """Outputs of `layer`, batch by batch: which of the token lists, and their states `[B, T,
    hidden]`, right-padded.
    """
    for group in batches([len(ids) for ids in inputs], budget):
        found: list[Tensor] = []
        ids, _ = model.pad([inputs[i] for i in group])
        model.forward_to(
            layer,
            ids,
            lambda *_: None,
            on_output=lambda _, state, found=found: found.append(state),  # type: ignore[misc]
        )
        yield group, found[0]


def _cut(call: dict[str, Any], length: int) -> dict[str, Any]:
    """A layer's arguments for texts of `length` tokens."""
    result = dict(call, use_cache=False)
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions[:, :length]
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = tuple(part[:, :length] for part in rotary)
    if (mask := call.get("attention_mask")) is not None:
        result["attention_mask"] = mask[:, :, :length, :length]
    if (places := call.get("cache_position")) is not None:
        result["cache_position"] = places[:length]
    return result


@dataclass(frozen=True)
class Batch:
    """Texts that are run together.

    Attributes:
        states: `[B, T, hidden]` in front of the first trained layer.
        line, place, token: `[n]` the scored positions and the tokens that should follow (-1:
            unknown).
        share: `[n]` 1 / scored positions of the text.
        clean: `[n, hidden]` the untouched model's final hidden states there.
    """

    states: Tensor
    line: Tensor
    place: Tensor
    token: Tensor
    share: Tensor
    clean: Tensor


class Texts:
    """Rows with all that is below `first` computed; their answers' tokens are scored (without an
    answer: what comes next).

    Args:
        budget: padded tokens a batch while they are computed.
        clean: also keep the untouched model's final states, which `kl` needs.
    """

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[Row],
        first: int,
        *,
        budget: int = 2048,
        clean: bool = True,
        title: str = "",
        progress: bool = False,
    ) -> None:
        self.rows, self._inputs = (
            rows,
            [row.ids if row.answer is None else row.ids[:-1] for row in rows],
        )
        self.upper = Upper(model, first, max(map(len, self._inputs)))
        self._states: list[Tensor] = [torch.empty(0)] * len(rows)
        self._clean: list[Tensor] = [torch.empty(0)] * len(rows)
        with torch.no_grad(), bar(title, len(rows), "texts", show=progress) as advance:
            for group, states in states_of(model, self._inputs, first - 1, budget):
                final = self.upper.run(states) if clean else None
                for line, i in enumerate(group):
                    length = len(self._inputs[i])
                    # copies: a view would keep the whole batch alive
                    self._states[i] = states[line, :length].clone()
                    if final is not None:
                        self._clean[i] = final[line, self._first(i) : length].clone()
                advance(len(group))

    def __len__(self) -> int:
        return len(self.rows)

    def _first(self, i: int) -> int:
        """The first scored place of row `i`."""
        answer = self.rows[i].answer
        return (len(self._inputs[i]) if answer is None else answer) - 1

    def batch(self, which: Sequence[int]) -> Batch:
        """Some of the rows, padded to the longest and on to a multiple of `SHAPES`."""
        device = self._states[0].device
        states = torch.nn.utils.rnn.pad_sequence([self._states[i] for i in which], batch_first=True)
        room = min(-states.shape[1] % SHAPES, self.upper.longest - states.shape[1])
        states = torch.nn.functional.pad(states, (0, 0, 0, room))
        places = [range(self._first(i), len(self._inputs[i])) for i in which]
        line = [number for number, span in enumerate(places) for _ in span]
        known = [self.rows[i].answer is not None for i in which]
        token = [
            self.rows[i].ids[p + 1] if known[n] else -1
            for n, i in enumerate(which)
            for p in places[n]
        ]
        lines, place, tokens = (
            torch.tensor(x, device=device)
            for x in (line, [p for span in places for p in span], token)
        )
        share = torch.tensor([1 / len(places[number]) for number in line], device=device)
        return Batch(
            states, lines, place, tokens, share, torch.cat([self._clean[i] for i in which])
        )

    def run(self, batch: Batch) -> Tensor:
        """Log-probabilities `[n, vocab]`, float32, at the scored positions of a batch, of the model
        as it now is.
        """
        return (
            self.upper.model.head(self.upper.run(batch.states)[batch.line, batch.place])
            .float()
            .log_softmax(-1)
        )

    def nll(self, batch: Batch) -> Tensor:
        """Mean NLL of each text's tokens, in nats, added up over the batch (an unknown token counts
        0).
        """
        found = self.run(batch).gather(1, batch.token.clamp(min=0)[:, None])[:, 0]
        return -(found * batch.share * (batch.token >= 0)).sum()

    def kl(self, batch: Batch) -> Tensor:
        """Mean KL(untouched || now) over each text's scored positions, in nats, added up over the
        batch.
        """
        with torch.no_grad():
            clean = self.upper.model.head(batch.clean).float().log_softmax(-1)
        found = (clean.exp() * (clean - self.run(batch))).sum(-1)
        return (found * batch.share).sum()


@contextmanager
def probed(
    model: EditableModel, names: Sequence[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Watch linear modules: after a run, `{name: (inputs [B, T, in], probe [B, T, out])}`.

    The probe is zero and is added to the module's output: a gradient with respect to it is that of
    the output. With the inputs it gives the weight's gradient as a sum of outer products over
    tokens, which is never formed.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str):
        def add(_module, inputs, output):
            probe = torch.zeros_like(output, requires_grad=True)
            seen[name] = (inputs[0].detach(), probe)
            return output + probe

        return add

    handles = [model.hf.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
