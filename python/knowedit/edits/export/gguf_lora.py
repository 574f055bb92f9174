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

from torch import Tensor, nn

from knowedit.edits.adapter import low_rank
from knowedit.errors import EditError
from knowedit.io.files import atomic_file, check_free
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.load import accepts_model

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

#: llama.cpp's architectures by transformers' model types.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "phi3": "phi3",
    "starcoder2": "starcoder2",
}
#: Modules that its converters copy row by row, by their last name.
COPIED = {
    *("down_proj", "up_proj", "gate_proj", "gate_up_proj", "c_proj", "c_fc"),  # of the MLP
    *("v_proj", "o_proj", "qkv_proj", "c_attn"),
}
ROTARY = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
INTERLEAVED = {"llama"}  # architectures whose converters reorder the rows of ROTARY


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
    arch = _architecture(model)
    pairs = low_rank(model, edits)
    if experts := [name for name in pairs if split_name(name)[1] is not None]:
        raise EditError(
            f"these edits change {len(experts)} experts' matrices ({experts[0]}, ...), and how "
            "llama.cpp reads those from an adapter is not known here; write the edits into a copy "
            "of the model (`knowedit apply`) and convert that"
        )
    rank = max(change.rank for change in pairs.values())
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], len(model.layers))
    factors = {
        _named(names, name, arch): (_rows(model.hf.config, arch, name, change.U), change.V)
        for name, change in pairs.items()
    }
    try:
        check_free(path)
    except FileExistsError as error:
        raise EditError(str(error)) from error
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(f"{model.name}, edited")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        writer.add_string("knowedit.edits", json.dumps([_said(edit) for edit in edits]))
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


def _architecture(model: EditableModel) -> str:
    """What llama.cpp calls this kind of model. Raises EditError: nothing that is known here."""
    kind = model.hf.config.get_text_config().model_type
    if kind not in ARCHITECTURES:
        raise EditError(
            f"how llama.cpp lays out models of the type {kind!r} is not known here (known: "
            f"{', '.join(ARCHITECTURES)}); write the edit into a copy of the model (`knowedit "
            "apply`) and convert that"
        )
    return ARCHITECTURES[kind]


def _named(names: Any, parameter: str, arch: str) -> str:
    """What llama.cpp calls a parameter. Raises EditError: it has none of its rows."""
    module = parameter.removesuffix(".weight").replace(".language_model", "")
    leaf = module.rpartition(".")[2]
    found = names.get_name(module)
    copied = leaf in COPIED or leaf in ROTARY
    if found is None or not copied or not parameter.endswith(".weight"):
        raise EditError(
            f"llama.cpp holds {parameter} in another way (architecture {arch}), so that a pair of "
            "factors does not fit it; write the edit into a copy of the model (`knowedit apply`) "
            "and convert that"
        )
    return f"{found}.weight"


def _rows(config: Any, arch: str, parameter: str, left: Tensor) -> Tensor:
    """`left` `[out, r]` with its rows as llama.cpp has them: of each head of Llama's queries and
    keys the two rotary halves alternate, where transformers has one behind the other.
    """
    heads = ROTARY.get(parameter.split(".")[-2])
    if heads is None or arch not in INTERLEAVED:
        return left
    count = getattr(config.get_text_config(), heads)
    return left.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)


def _said(edit: Edit) -> dict[str, Any]:
    """What the file says of an edit."""
    facts = [fact.to_dict() for fact in edit.facts]
    return {"key": edit.key, "method": edit.method_name, "facts": facts}
