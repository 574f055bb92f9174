"""What a neuron patch reads: the inputs and keys of an MLP, at the facts' own tokens and at those
of other texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.progress import bar, console, plain_line
from knowedit.models.editable import EditableModel
from knowedit.models.partial import read
from knowedit.models.structure import check_dense
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

    Raises:
        CorpusError: it cannot be read. EditError: it holds less than half of them.
    """
    rows: list[list[int]] = []
    left, length = tokens, min(length, model.max_length)
    start = start_tokens(model.tokenizer)
    source = Corpus.parse(corpus)
    if source.is_self and progress and not console.is_terminal:
        plain_line(
            f"taking {tokens:,} tokens of text from the model itself: sampled once, then kept"
        )
    with bar("texts not to change", tokens, "tokens", show=progress) as advance:
        for text in source.documents(samples=model.samples, seed=seed):
            ids = model.tokenizer(text)["input_ids"][:left]
            if max(ids, default=0) >= model.vocabulary:
                continue
            rows += cut(ids, length, start)
            left -= len(ids)
            advance(len(ids))
            if left <= 0:
                break
    if left > tokens // 2:
        raise EditError(
            f"{corpus} has {tokens - left} tokens, {tokens} are wanted; give a larger corpus or "
            f"ask for fewer"
        )
    return rows


def at_lookup(model: EditableModel, rows: Sequence[Row], layer: int) -> tuple[Tensor, Tensor]:
    """MLP inputs `[n, hidden]` and keys `[n, d_ff]` at the rows' subject tokens, float32."""
    found = {
        i: (x[rows[i].subject], k[rows[i].subject])
        for i, x, k in _observed(model, [row.ids for row in rows], layer)
    }
    inputs, keys = zip(*(found[i] for i in range(len(rows))))
    return torch.stack(inputs), torch.stack(keys)


def everywhere(
    model: EditableModel,
    rows: Sequence[list[int]],
    layer: int,
    advance: Callable[[float], None] = lambda rows: None,
) -> tuple[Tensor, Tensor]:
    """MLP inputs `[n, hidden]` float32 at every token, and the mean of k k^T `[d_ff, d_ff]`
    float64.
    """
    inputs, moment = [], SecondMoment(model.layout.width(layer), device=model.weight(layer).device)
    for _, x, k in _observed(model, rows, layer):
        inputs.append(x)
        moment.update(k)
        advance(1)
    return torch.cat(inputs), moment.moment()


def _observed(
    model: EditableModel, rows: Sequence[list[int]], layer: int, budget: int = 4096
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, MLP inputs, keys) of every row, in batches of similar length. Raises ModelError where
    the layer has routed experts.
    """
    check_dense(model, layer)
    for batch in batches([len(ids) for ids in rows], budget):
        ids, mask = model.pad([rows[i] for i in batch])
        inputs: list[Tensor] = []
        keys: list[Tensor] = []
        read(
            model,
            ids,
            inputs={
                model.layout.part(layer).reads[0]: inputs.append,
                model.layout.projection(layer): keys.append,
            },
        )
        for line, i in enumerate(batch):
            live = mask[line].to(inputs[0].device)
            x, k = (found[0].reshape(*mask.shape, -1)[line] for found in (inputs, keys))
            yield i, x[live].float(), k[live].float()
