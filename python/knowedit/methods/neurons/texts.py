"""What a neuron patch reads: the inputs and keys of an MLP, at the facts' own tokens and at those
of other texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.progress import bar, console, plain_line
from knowedit.models.editable import EditableModel
from knowedit.models.experts import Routed
from knowedit.models.linear import fast_linear
from knowedit.models.partial import read
from knowedit.models.tokens import Row, batches, cut, start_tokens
from knowedit.statistics.corpus.corpus import Corpus, CorpusLike
from knowedit_kernels import SecondMoment


def windows(
    model: EditableModel,
    corpus: CorpusLike,
    tokens: int,
    length: int = 256,
    seed: int = 0,
    *,
    progress: bool = False,
) -> list[list[int]]:
    """About `tokens` tokens of the corpus in rows of at most `length`, each of which starts as the
    tokenizer starts a text; without documents that hold a token which the model does not embed.
    The model samples many texts at once, and no more of them for the last hundredth.

    Raises:
        CorpusError: it cannot be read. EditError: it holds less than half of them.
    """
    rows: list[list[int]] = []
    left, length = tokens, min(length, model.max_length)
    start = start_tokens(model.tokenizer)
    source = Corpus.parse(corpus)
    enough = tokens // 100 if source.is_self else 0
    if source.is_self and progress and not console.is_terminal:
        plain_line(
            f"taking {tokens:,} tokens of text from the model itself: sampled once, then kept"
        )
    with bar("texts not to change", tokens, "tokens", show=progress) as advance:
        samples = partial(model.samples, within=advance.within)
        for text in source.documents(samples=samples, seed=seed):
            ids = model.tokenizer(text)["input_ids"][:left]
            if max(ids, default=0) >= model.vocabulary:
                continue
            rows += cut(ids, length, start)
            left -= len(ids)
            advance(len(ids))
            if left <= enough:
                break
    if left > tokens // 2:
        raise EditError(
            f"{corpus} has {tokens - left} tokens, {tokens} are wanted; give a larger corpus or "
            f"ask for fewer"
        )
    return rows


def at_lookup(
    model: EditableModel, rows: Sequence[Row], layer: int, expert: int | None = None
) -> Seen:
    """The layer's MLP, or one of its experts, at the rows' subject tokens."""
    found: dict[int, Seen] = {}
    for i, given in _observed(model, [row.ids for row in rows], (layer,)):
        found[i] = given[layer].at(torch.tensor([rows[i].subject or 0])).of(expert)
    ordered = [found[i] for i in range(len(rows))]
    return Seen(
        torch.cat([seen.inputs for seen in ordered]),
        torch.cat([seen.keys for seen in ordered]),
        torch.cat([seen.gates for seen in ordered]),
    )


def chosen(model: EditableModel, rows: Sequence[Row], layer: int) -> Tensor:
    """`[rows, E]` gates of a layer's routed experts at the rows' subject tokens; 0: not chosen."""
    experts = model.layout.experts(layer)
    assert experts is not None
    found = torch.zeros(len(rows), experts.count)
    for i, given in _observed(model, [row.ids for row in rows], (layer,)):
        states = given[layer].states
        assert isinstance(states, Routed)
        here = states[rows[i].subject or 0]
        found[i] = found[i].index_add(0, here.index.cpu(), here.gates.float().cpu())
    return found


#: Of each expert (None: the dense MLP) its inputs `[n, hidden]` float32 at every token that it is
#: given, and the mean of k k^T `[d, d]` float64 there, k being the key times its gate.
Inputs = Mapping[int | None, tuple[Tensor, Tensor]]


def everywhere(
    model: EditableModel,
    rows: Sequence[list[int]],
    experts: Mapping[int, Iterable[int | None]],
    advance: Callable[[float], None] = lambda rows: None,
) -> dict[int, Inputs]:
    """What the MLPs of some layers are given at every token, in one pass.

    Args:
        experts: by layer, those that are looked at; None: the dense MLP.

    Returns:
        By layer; an expert that is given no token is left out.
    """
    found: dict[int, dict[int | None, tuple[list[Tensor], SecondMoment]]] = {}
    for layer, chosen in experts.items():
        part, device = model.layout.part(layer), model.weight(layer).device
        width = part.width if part.experts is None else part.experts.width
        found[layer] = {e: (list[Tensor](), SecondMoment(width, device=device)) for e in chosen}
    for _, of_layers in _observed(model, rows, tuple(experts)):
        for layer, given in of_layers.items():
            for expert, (inputs, moment) in found[layer].items():
                seen = given.reaching(expert).of(expert)
                if len(seen.inputs):
                    inputs.append(seen.inputs)
                    gates = 1 if expert is None else seen.gates[:, None]
                    moment.update(seen.keys * gates)
        advance(1)
    return {
        layer: {
            expert: (torch.cat(inputs), moment.moment())
            for expert, (inputs, moment) in of_experts.items()
            if inputs
        }
        for layer, of_experts in found.items()
    }


@dataclass(frozen=True)
class Seen:
    """What an MLP, or one routed expert, is given at some tokens.

    Attributes:
        inputs: `[n, hidden]`, keys: `[n, d]`, both float32.
        gates: `[n]` what its output is multiplied by there: 1, or an expert's gate, which is 0
            where the router did not choose it.
    """

    inputs: Tensor
    keys: Tensor
    gates: Tensor


@dataclass(frozen=True)
class _Given:
    """What a layer's MLP is given in one text.

    Attributes:
        states: `[T, hidden]`, with the `keys` `[T, d_ff]` that it makes of them; or what routed
            experts are given, and no keys.
    """

    states: Tensor | Routed
    keys: Tensor | None = None

    def at(self, tokens: Any) -> _Given:
        """At some of the tokens."""
        return _Given(self.states[tokens], None if self.keys is None else self.keys[tokens])

    def reaching(self, expert: int | None) -> _Given:
        """At the tokens that are given to an expert; all of them to a dense MLP."""
        if expert is None or not isinstance(self.states, Routed):
            return self
        return self.at((self.states.index == expert).any(-1))

    def of(self, expert: int | None) -> Seen:
        """What one expert makes of these tokens, also of those that are not given to it."""
        if not isinstance(self.states, Routed):
            assert self.keys is not None
            return Seen(
                self.states.float(), self.keys.float(), torch.ones_like(self.states[:, 0]).float()
            )
        assert expert is not None
        routed, alone = self.states, torch.full_like(self.states.index[:, :1], expert)
        keys = replace(routed, index=alone, gates=routed.gates[:, :1]).keys()[:, 0]
        gates = (routed.gates * (routed.index == expert)).sum(-1)
        return Seen(routed.states.float(), keys.float(), gates.float())


def _observed(
    model: EditableModel, rows: Sequence[list[int]], layers: Sequence[int], budget: int = 4096
) -> Iterator[tuple[int, dict[int, _Given]]]:
    """(row, what each layer's MLP is given) of every row, in batches of similar length."""
    parts = {layer: model.layout.part(layer) for layer in layers}
    names = {
        layer: [part.projection] if part.experts else [part.reads[0], part.projection]
        for layer, part in parts.items()
    }
    for batch in batches([len(ids) for ids in rows], budget):
        ids, mask = model.pad([rows[i] for i in batch])
        found: dict[int, list[Any]] = {layer: [] for layer in layers}
        with fast_linear():
            wanted = {n: found[layer].append for layer in layers for n in names[layer]}
            read(model, ids, inputs=wanted)
        for layer, part in parts.items():
            if part.experts is None:
                found[layer] = [states.reshape(*mask.shape, -1) for states in found[layer]]
        for line, i in enumerate(batch):
            here = slice(len(rows[i]))
            yield (
                i,
                {
                    layer: _Given(*(states[line] for states in given)).at(here)
                    for layer, given in found.items()
                },
            )
