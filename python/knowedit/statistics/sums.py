"""What one process has summed: batches of pieces through the model, keys into second moments, two
halves apart.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knowedit.errors import StatisticsError
from knowedit.models.editable import EditableModel, lengths
from knowedit.models.experts import Routed, as_keys, one_by_one
from knowedit.models.linear import fast_linear
from knowedit.models.partial import read_keys
from knowedit.statistics.corpus.batching import Piece, TokenBatch, batches
from knowedit.statistics.experts import ExpertMoment
from knowedit.statistics.memory import is_out_of_memory, packs, token_budget
from knowedit_kernels import SecondMoment, update_together

logger = logging.getLogger(__name__)


@dataclass
class KeyTally:
    """Norms of keys by layer (sum and count at first tokens, sum and count elsewhere), and how much
    was padding.
    """

    norms: dict[str, list[float]]
    padded: int = 0
    text: int = 0

    @classmethod
    def empty(cls, layers: Sequence[int]) -> KeyTally:
        return cls({str(layer): [0.0] * 4 for layer in layers})

    def add(self, other: KeyTally) -> KeyTally:
        for layer, norms in self.norms.items():
            norms[:] = [a + b for a, b in zip(norms, other.norms[layer])]
        self.padded, self.text = self.padded + other.padded, self.text + other.text
        return self


#: The sums of one layer: of its keys, or of each of its experts'.
Moment = SecondMoment | ExpertMoment


def _device(keys: Tensor | Routed) -> torch.device:
    return keys.states.device if isinstance(keys, Routed) else keys.device


class Sums:
    """Second moments of some layers' keys.

    Args:
        budget: tokens a batch; None: from the memory that is free.
        packed: several texts a row; None: on a GPU. Either way only where the model is seen to keep
            them apart.
        halves: how many halves to keep apart, 1 or 2.

    Attributes:
        tally: norms and padding.
        moments: of (half, layer).

    Raises:
        StatisticsError: the sums do not fit into memory.
    """

    def __init__(
        self,
        model: EditableModel,
        layers: Sequence[int],
        precision: str,
        budget: int | None = None,
        packed: bool | None = None,
        halves: int = 2,
    ) -> None:
        self.layers, self.precision = list(layers), precision
        self.model = model.widened()  # bfloat16 where that is slow
        self.tally = KeyTally.empty(layers)
        self.moments: dict[tuple[int, int], Moment] = {}
        try:
            for half, layer in itertools.product(range(halves), self.layers):
                self.moment(half, layer)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            size = 8e-9 * halves * sum(map(model.layout.moment_size, self.layers))
            raise StatisticsError(
                f"the sums of {len(self.layers)} layers take {size:.1f} GB, which do not fit "
                f"into memory beside the model; "
                "collect fewer layers at a time"
                + (", or halves=False (--no-halves), which takes half" if halves > 1 else "")
            ) from error
        self.budget = budget or token_budget(model, layers)
        wanted = model.device.type == "cuda" if packed is None else packed
        self.packed = wanted and packs(model, max(layers))

    def moment(self, half: int, layer: int, device: torch.device | None = None) -> Moment:
        """The sums of one half; empty ones if there are none yet."""
        if (half, layer) not in self.moments:
            device = device or self.model.weight(layer).device
            layout, experts = self.model.layout, self.model.layout.experts(layer)
            self.moments[half, layer] = (
                SecondMoment(layout.width(layer), device=device, precision=self.precision)
                if experts is None
                else ExpertMoment(experts, device, self.precision)
            )
        return self.moments[half, layer]

    def add(self, half: int, pieces: Sequence[Piece]) -> None:
        """Sum the keys of all pieces. A batch that does not fit into memory is cut in two, and so
        are those after it.

        Raises:
            StatisticsError: NaN or infinite keys (layer and text); one piece alone does not fit
                into memory.
        """
        self._run(half, pieces)
        for layer in (
            self.layers
        ):  # a window's blocks are its own, whatever comes before or after it on this rank
            self.moment(half, layer).flush()

    def _run(self, half: int, pieces: Sequence[Piece]) -> None:
        again: list[Piece] = []
        for batch in batches(pieces, self.budget, packed=self.packed):
            lowered = batch.ids.numel() > self.budget  # since these batches were made
            if lowered and len(batch.pieces) > 1:
                again += batch.pieces
            elif keys := self._keys(batch):
                self._count(half, batch, keys)
            else:
                self.budget = max(batch.ids.numel() // 2, 1)
                logger.warning(
                    "out of memory: batches of at most %d tokens from here on", self.budget
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                again += batch.pieces
        if again:
            self._run(half, again)

    def _keys(self, batch: TokenBatch) -> dict[int, Tensor | Routed]:
        """Keys `[rows, width, d_ff]` of all layers, or what their experts are given, summed only
        when the whole pass has succeeded; {} for want of memory.
        """
        keys: dict[int, Tensor | Routed] = {}
        device = self.model.device
        try:
            positions = None if batch.positions is None else batch.positions.to(device)
            with fast_linear(), one_by_one(self.model.hf):
                ids, take = batch.ids.to(device), keys.__setitem__
                read_keys(self.model, ids, self.layers, take, positions=positions)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.pieces) == 1:
                raise StatisticsError(
                    f"a text of {batch.ids.numel()} tokens alone does not fit into memory "
                    f"({str(error)[:120]}); "
                    "use a smaller max_length"
                ) from error
            return {}
        return keys

    def _count(self, half: int, batch: TokenBatch, keys: dict[int, Tensor | Routed]) -> None:
        for device in {_device(key) for key in keys.values()}:
            here = [layer for layer in self.layers if _device(keys[layer]) == device]
            keep, first = batch.keep.to(device), batch.first.to(device)
            try:
                norms = self._update(half, {layer: keys[layer] for layer in here}, keep)
            except ValueError as error:
                raise self._complaint(batch, keys, error) from error
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise StatisticsError(
                    f"out of memory while the keys of {batch.tokens} tokens were summed; give a "
                    f"budget (--budget) below "
                    "that and start again: what was checkpointed is kept"
                ) from error
            counts = int(batch.first.sum()), int((batch.keep & ~batch.first).sum())
            for layer in here:
                norm = norms[layer].double()
                at_first, elsewhere = torch.stack(
                    [norm[first].sum(), norm[keep & ~first].sum()]
                ).tolist()
                tally = self.tally.norms[str(layer)]
                seen = (at_first, counts[0], elsewhere, counts[1])
                tally[:] = [before + now for before, now in zip(tally, seen)]
        self.tally.padded += batch.ids.numel()
        self.tally.text += batch.tokens

    def _update(
        self, half: int, keys: Mapping[int, Tensor | Routed], keep: Tensor
    ) -> dict[int, Tensor]:
        """Sum the keys of some layers, dense ones together; their lengths `[rows, width]`."""
        norms: dict[int, Tensor] = {}
        dense: list[SecondMoment] = []
        plain: list[Tensor] = []
        for layer, key in keys.items():
            moment = self.moment(half, layer, _device(key))
            if isinstance(moment, ExpertMoment):
                assert isinstance(key, Routed)
                with fast_linear():  # the experts make their keys
                    norms[layer] = moment.update(key, keep)
            else:
                assert isinstance(key, Tensor)
                dense.append(moment)
                plain.append(key)
                norms[layer] = lengths(key)
        if dense:
            update_together(dense, plain, keep)
        return norms

    def _complaint(
        self, batch: TokenBatch, keys: dict[int, Tensor | Routed], error: ValueError
    ) -> StatisticsError:
        """Which layer, which text."""
        for layer in self.layers:
            bad = ~as_keys(keys[layer]).isfinite().all(-1).cpu() & batch.keep
            if bad.any():
                row, column = bad.nonzero()[0].tolist()
                text = self.model.tokenizer.decode(batch.piece_at(row, column).ids)[:80]
                return StatisticsError(
                    f"layer {layer} has NaN or infinite keys at the text {text!r}: {error}"
                )
        return StatisticsError(str(error))
