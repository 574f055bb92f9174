"""Second moments of a model's keys over token lists that are already in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from knowedit.errors import StatisticsError
from knowedit.models.editable import EditableModel
from knowedit.statistics.corpus.batching import Piece
from knowedit.statistics.sums import Moment, Sums

#: What one call of `second_moments` counts at once: enough to put texts of similar length together.
GROUP = 1 << 16


def second_moments(
    model: EditableModel,
    layers: Sequence[int],
    token_lists: Iterable[Sequence[int] | Sequence[Sequence[int]]],
    *,
    skip_first: bool = False,
    precision: str = "exact",
    budget: int | None = None,
) -> dict[int, Moment]:
    """sum(k kᵀ) of the MLP keys of some layers, in one pass over the texts.

    Nothing is cut, dropped or shuffled: each list is run as it is and every token counts.

    Args:
        token_lists: token ids of each text, or groups of such texts; may be a generator.
        skip_first: leave the first token of each text out.
        precision: of the sums, as `SecondMoment` names it: "exact", "fp32", "fp64" or "fast".
        budget: tokens a batch; None: from the memory that is free.

    Returns:
        `{layer: SecondMoment}`, with `.count` tokens each; `ExpertMoment` for routed experts.

    Raises:
        StatisticsError: no token to count; a text is longer than the model's context; NaN keys; a
            text alone does not fit into memory.
        ModelError: no such layer.
    """
    model.check_layers(layers)
    sums = Sums(model, layers, precision, budget, halves=1)
    waiting: list[Piece] = []
    tokens = 0
    for ids in _texts(token_lists):
        if len(ids) > model.max_length:
            raise StatisticsError(
                f"token_lists has a text of {len(ids)} tokens, more than the model's context of "
                f"{model.max_length}; cut it"
            )
        waiting.append(Piece(ids, int(skip_first)))
        tokens += len(ids)
        if tokens >= GROUP:
            sums.add(0, waiting)
            waiting, tokens = [], 0
    if waiting:
        sums.add(0, waiting)
    found = {layer: sums.moment(0, layer) for layer in layers}
    if not all(moment.count for moment in found.values()):
        raise StatisticsError("token_lists has no token to count")
    return found


def _texts(token_lists: Iterable[Sequence[int] | Sequence[Sequence[int]]]) -> Iterable[list[int]]:
    for entry in token_lists:
        if not len(entry):
            continue
        if isinstance(entry[0], Sequence):
            yield from (list(ids) for ids in entry if len(ids))  # type: ignore[arg-type]
        else:
            yield [int(token) for token in entry]  # type: ignore[arg-type]
