"""A GGUF LoRA adapter, as llama.cpp and what is built on it read it: `lora_b lora_a` is the update,
at scale 1.

It fits every GGUF file of the same model, quantised or not. Names are llama.cpp's; matrices that
its converters lay out in another way than transformers does are refused, but for the rotary halves
of Llama's queries and keys, whose rows are put in its order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from knowedit.edits.adapter import low_rank
from knowedit.edits.llamacpp import LlamaCpp
from knowedit.errors import EditError
from knowedit.io.files import atomic_file, check_free
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.load import accepts_model

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit


@accepts_model
def write(model: EditableModel, edits: Sequence[Edit], path: str | Path) -> Path:
    """Write `edits` of `model` as the file of one adapter, in float32. Smaller ranks are filled up
    with zeros: a file has one scale for all.

    Raises:
        EditError: an edit is of another model, some changes are dense or of experts, llama.cpp
            holds a matrix otherwise, has no such model, or the file exists.
    """
    import gguf

    path = Path(path)
    theirs = LlamaCpp(model)
    pairs = low_rank(model, edits)
    if experts := [name for name in pairs if split_name(name)[1] is not None]:
        raise EditError(
            f"these edits change {len(experts)} experts' matrices ({experts[0]}, ...), and how "
            "llama.cpp reads those from an adapter is not known here; write the edits into a copy "
            "of the model (`knowedit apply`) and convert that"
        )
    rank = max(change.rank for change in pairs.values())
    factors = {
        theirs.name(name): (theirs.rows(name, change.U), change.V) for name, change in pairs.items()
    }
    try:
        check_free(path)
    except FileExistsError as error:
        raise EditError(str(error)) from error
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, theirs.arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(f"{model.name}, edited")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_string("knowedit.edits", json.dumps([said_in_file(edit) for edit in edits]))
        for name, (left, right) in factors.items():
            room = (0, rank - left.shape[1])
            left, right = (nn.functional.pad(f.detach().float().cpu(), room) for f in (left, right))
            writer.add_tensor(f"{name}.lora_a", right.T.contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", left.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def said_in_file(edit: Edit) -> dict[str, Any]:
    """What the file says of an edit."""
    facts = [fact.to_dict() for fact in edit.facts]
    return {"key": edit.key, "method": edit.method_name, "facts": facts}
