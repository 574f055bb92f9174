"""Tiny models of every kind that is written for llama.cpp, with random weights, and the files that
its own converters would make of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from knowedit.edits.llamacpp import ARCHITECTURES, LlamaCpp
from knowedit.models.editable import EditableModel
from tests.conftest import frozen

VOCABULARY = 258
#: What the classes' configurations are told besides: a head wider than its share, few windows.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
MORE: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
    "phi3": {"pad_token_id": 0, "partial_rotary_factor": 1.0},
    "starcoder2": {"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    "gpt2": {
        "n_embd": 64,
        "n_inner": 96,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "num_key_value_heads": 4,
    },
}


def tiny(kind: str, tokenizer: Any) -> EditableModel:
    """A model of the type `kind` with random weights; norms and biases, too, are not what they
    begin as.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | MORE.get(kind, {})))
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    return EditableModel(frozen(hf), tokenizer, name=f"tiny-{kind}")


def write(model: EditableModel, path: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """The model as a file, its matrices in the type `kind`, to which its weights are rounded."""
    config = model.hf.config.get_text_config()
    theirs = LlamaCpp(model)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[theirs.arch], len(model.layers))
    writer = gguf.GGUFWriter(path, theirs.arch)
    _fields(writer, config)
    _tokens(writer, model.tokenizer)
    head_is_tied = config.tie_word_embeddings
    for name, weight in model.hf.named_parameters():
        if head_is_tied and name == "lm_head.weight":
            continue
        module, _, ending = name.rpartition(".")
        called = f"{names.get_name(module)}.{ending}"
        values = weight.detach()
        if values.dim() == 2:
            if model.is_transposed(name):
                values = values.T
            rounded = gguf.dequantize(gguf.quantize(values.contiguous().numpy(), kind), kind)
            values = torch.from_numpy(rounded.copy())
            with torch.no_grad():
                weight.copy_(values.T if model.is_transposed(name) else values)
            rows = theirs.rows(name, values) if "proj" in module else values
            data = gguf.quantize(rows.contiguous().numpy(), kind)
            writer.add_tensor(called, data, raw_dtype=kind)
            continue
        if theirs.arch.startswith("gemma") and "norm" in module:
            values = values + 1  # as it multiplies
        writer.add_tensor(called, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fields(writer: gguf.GGUFWriter, config: Any) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_vocab_size(config.vocab_size)
    epsilons = ("layer_norm_epsilon", "norm_epsilon")
    if epsilon := next((getattr(config, n) for n in epsilons if hasattr(config, n)), None):
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "gpt2":
        return
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _tokens(writer: gguf.GGUFWriter, tokenizer: Any) -> None:
    """As many tokens as the tokenizer has, whole characters all of them: of others llama.cpp's
    server tells no log-probabilities.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)


KINDS = tuple(ARCHITECTURES)
