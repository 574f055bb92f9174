"""How many tokens fit into a batch, what running out of memory looks like, and whether rows can be
packed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from knowedit.models.editable import EditableModel
from knowedit.models.experts import Routed, as_keys
from knowedit.models.partial import read_keys
from knowedit.statistics.corpus.batching import Piece, batches

logger = logging.getLogger(__name__)

ON_A_CPU = 1024  # tokens: more are no faster there, leave the caches, and slow down other processes
WAITING = 16_384  # keys of a layer that wait on a GPU until they are summed together
PACKED_ERROR = {torch.float32: 1e-4}  # keys of packed texts against the same texts alone, relative
PACKED_ERROR_HALF = 5e-2  # bfloat16 and float16: other kernels round otherwise


def token_budget(model: EditableModel, layers: Sequence[int]) -> int:
    """Tokens a batch, from the memory that is free on the GPUs; `ON_A_CPU` on a CPU.

    A token takes its keys of all `layers` (they are kept until the pass is over), three more
    vectors of the MLP, and about twelve of the hidden size (normed states, queries, keys, values,
    residuals); half of what is free, once the keys that wait to be summed have their place, is
    used.
    """
    devices = {model.weight(layer).device for layer in layers}
    if any(device.type != "cuda" for device in devices):
        return ON_A_CPU
    free = min(map(spare, devices)) - len(layers) * WAITING * model.d_ff * model.dtype.itemsize
    a_token = model.dtype.itemsize * ((len(layers) + 3) * model.d_ff + 12 * model.hidden)
    return max(int(free / 2 / a_token), 256)


def spare(device: torch.device) -> float:
    """Bytes that are free on a GPU, those that torch keeps for itself included; infinite for a
    CPU.
    """
    if device.type != "cuda":
        return float("inf")
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def keep_few_compiled_shapes() -> None:
    """Let oneDNN, which multiplies bfloat16 matrices on CPUs, keep 64 compiled shapes instead of
    1,024, and torch's binding to it 64 of its own instead of 1,024.

    Every batch has a shape of its own, so the kept ones are hardly ever used again, and at about a
    megabyte each they grow a long collection by a gigabyte. For programs to call before their first
    model runs; a value that is set stays.
    """
    for capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, "64")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: torch's own on a GPU, a plain RuntimeError on a
    CPU.
    """
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def packs(model: EditableModel, layer: int) -> bool:
    """Whether texts that stand behind each other in a row have the keys they have alone: tried with
    three short ones.
    """
    size = len(model.tokenizer)
    texts = [
        [(7 * i * (j + 1) + 3 * j) % (size - 2) for i in range(1, n)]
        for j, n in enumerate((23, 12, 9))
    ]
    pieces = [Piece(ids, 0) for ids in texts]
    try:
        alone = torch.cat([_keys(model, layer, [piece], False) for piece in pieces])
        packed = _keys(model, layer, pieces, True)
    except (TypeError, ValueError, RuntimeError) as error:
        logger.warning(
            "texts are not packed: the model does not take their positions (%s)",
            str(error).splitlines()[0],
        )
        return False
    off = float((alone - packed).norm() / alone.norm())
    if not off <= PACKED_ERROR.get(model.dtype, PACKED_ERROR_HALF):
        logger.warning(
            "texts are not packed: the model's attention does not keep them apart (keys differ "
            "by %.1e)",
            off,
        )
        return False
    return True


def _keys(model: EditableModel, layer: int, pieces: Sequence[Piece], packed: bool) -> Tensor:
    """The keys of all pieces, longest piece first, `[tokens, d_ff]` float64."""
    found: dict[int, Tensor] = {}
    for batch in batches(pieces, 1 << 20, packed=packed):
        keys: dict[int, Tensor | Routed] = {}
        positions = None if batch.positions is None else batch.positions.to(model.device)
        ids = batch.ids.to(model.device)
        read_keys(model, ids, [layer], keys.__setitem__, positions=positions)
        for row, column in batch.first.nonzero().tolist():
            size = len(batch.piece_at(row, column).ids)
            found[size] = as_keys(keys[layer][row, column : column + size]).double()
    return torch.cat([found[size] for size in sorted(found, reverse=True)])
