"""What servers of LoRA adapters do not take: said when one is written, not when it fails to load
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from knowedit.edits.adapter import is_tied, low_rank
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.load import accepts_model

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

#: Ranks that servers make room for (vLLM's choices of `--max-lora-rank`), and their default.
RANKS, DEFAULT = (8, 16, 32, 64, 128, 256, 320), 16
#: Modules that hold several projections in one matrix, by their last name; servers that split or
#: fuse such modules themselves know them by other names.
FUSED = frozenset(
    ("c_attn", "qkv_proj", "query_key_value", "Wqkv", "att_proj", "gate_up_proj", "dense_h_to_4h")
)


@accepts_model
def server_notes(model: EditableModel, edits: Sequence[Edit]) -> list[str]:
    """What servers will not take of the adapter of `edits`, and the way round it; nothing where all
    common ones take it. Raises EditError: there is no such adapter.
    """
    changes = low_rank(model, edits)
    modules = {name: name.removesuffix(".weight").rpartition(".")[2] for name in changes}
    found = _rank(max(change.rank for change in changes.values()))
    if fused := sorted({leaf for leaf in modules.values() if leaf in FUSED}):
        found.append(
            f"{', '.join(fused)} holds several projections in one matrix; a server that splits it "
            "(or knows its parts by other names) ignores or refuses the adapter: ask one prompt "
            "after loading, or serve a folder (`knowedit apply`)"
        )
    if any(split_name(name)[1] is not None for name in changes):
        found.append(
            "it adapts experts as parameters (target_parameters), which peft reads and servers "
            "most often do not; serve a folder (`knowedit apply`)"
        )
    if model.layout.transposed:
        found.append(
            "the layers of this model are stored transposed (fan_in_fan_out), and servers most "
            "often have no adapters for such models; serve a folder (`knowedit apply`)"
        )
    if tied := sorted(name for name in changes if is_tied(model, name)):
        found.append(
            f"{tied[0]} is shared by input and output; peft adapts both, but must not merge the "
            "adapter (the update would be added twice), and servers may adapt one of them or none; "
            "serve a folder (`knowedit apply`)"
        )
    return found


def _rank(rank: int) -> list[str]:
    """Of the rank alone."""
    if rank <= DEFAULT:
        return []
    if rank > RANKS[-1]:
        return [
            f"its rank is {rank}, and servers stop at {RANKS[-1]} (vLLM) or earlier; export fewer "
            "facts, or serve a folder (`knowedit apply`)"
        ]
    room = next(limit for limit in RANKS if limit >= rank)
    return [
        f"its rank is {rank}, and servers make room for {DEFAULT} unless told otherwise; for vLLM: "
        f"--max-lora-rank {room}"
    ]
