"""How llama.cpp calls and lays out the matrices of a model: names are its own, and rows are as
transformers has them, but for the rotary halves of Llama's queries and keys.
"""

from __future__ import annotations

from torch import Tensor

from knowedit.errors import EditError
from knowedit.models.editable import EditableModel

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
ENDS = {"embed_tokens", "lm_head", "wte", "embed_out", "word_embeddings"}  # of the vocabulary
ROTARY = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
INTERLEAVED = {"llama"}  # architectures whose converters reorder the rows of ROTARY


class LlamaCpp:
    """A model's matrices as llama.cpp has them.

    Attributes:
        arch: what it calls this kind of model.

    Raises:
        EditError: it has no such kind, or how it lays one out is not known here.
    """

    def __init__(self, model: EditableModel) -> None:
        import gguf

        self.config = model.hf.config.get_text_config()
        kind = self.config.model_type
        if kind not in ARCHITECTURES:
            raise EditError(
                f"how llama.cpp lays out models of the type {kind!r} is not known here (known: "
                f"{', '.join(ARCHITECTURES)}); write the edit into a copy of the model (`knowedit "
                "apply`) and convert that"
            )
        self.arch = ARCHITECTURES[kind]
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(numbers[self.arch], len(model.layers))

    def name(self, parameter: str) -> str:
        """What llama.cpp calls a parameter. Raises EditError: it has none of its rows."""
        module = parameter.removesuffix(".weight").replace(".language_model", "")
        leaf = module.rpartition(".")[2]
        found = self._names.get_name(module)
        if leaf in ENDS:
            raise EditError(
                f"{parameter} is the embeddings or the head: edits of these are not written for "
                "llama.cpp, which lays them out in another way; write the edit into a copy of the "
                "model (`knowedit apply`) and convert that"
            )
        copied = leaf in COPIED or leaf in ROTARY
        if found is None or not copied or not parameter.endswith(".weight"):
            raise EditError(
                f"llama.cpp holds {parameter} in another way (architecture {self.arch}), and an "
                "edit of it does not fit; write the edit into a copy of the model (`knowedit "
                "apply`) and convert that"
            )
        return f"{found}.weight"

    def rows(self, parameter: str, matrix: Tensor) -> Tensor:
        """`matrix` `[out, any]` with its rows as llama.cpp has them: of each head of Llama's
        queries and keys the two rotary halves alternate, where transformers has one behind the
        other.
        """
        heads = ROTARY.get(parameter.split(".")[-2])
        if heads is None or self.arch not in INTERLEAVED:
            return matrix
        count = getattr(self.config, heads)
        return matrix.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
