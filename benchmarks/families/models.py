"""A tiny random model of every type of decoder in transformers, made from its configuration class.

One rule makes nearly all of them: sizes that configurations name are set to small ones, and what a
class derives from its sizes it derives anew. `EXCEPTIONS` holds what the rule gets wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

#: Size, and the names that configurations have for it.
NAMES = {
    258: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size attention_hidden_size "
    "conv_dim conv_dim_out lru_width block_dim token_position_embedding_size hidden_dim",
    48: "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff "
    "dff intermediate_size_mlp shared_intermediate_size mlp_ffn_hidden_size block_ff_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size",
    16: "sliding_window attention_window_size q_lora_rank chunk_size mamba_chunk_size "
    "attention_chunk_size dim_model_base",
    8: "head_dim global_head_dim v_head_dim qk_head_dim kv_lora_rank state_size mamba_d_state "
    "mamba_d_head mamba_headdim ssm_state_size linear_key_head_dim linear_value_head_dim "
    "hidden_size_per_layer_input laurel_rank index_head_dim mamba_head_dim mamba_n_heads "
    "mamba_num_heads linear_head_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads rotary_dim qk_rope_head_dim qk_nope_head_dim mamba_dt_rank "
    "time_step_rank mamba_d_conv adapter_rank linear_num_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts",
    3: "first_k_dense_replace num_dense_layers moe_layer_start_index",
    2: "num_key_value_heads num_global_key_value_heads linear_num_key_heads linear_num_value_heads "
    "num_experts_per_tok moe_topk moe_k mamba_expand num_mem_blocks index_n_heads",
    1: "n_group topk_group n_shared_experts moe_num_shared_experts n_groups n_mamba_groups "
    "mamba_n_groups",
    0: "num_kv_shared_layers rescale_every num_nextn_predict_layers",
    256: "pad_token_id",
    257: "bos_token_id eos_token_id",
    512: "max_position_embeddings n_positions n_ctx max_seq_len context_length",
    64: "index_topk",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}

#: The same for what sees pictures and hears sounds: they are not run.
SENSES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "max_num_tiles": 1,
    "num_global_layers": 1,
    "intermediate_layers_indices": [0],
    "vision_output_dim": 64,
    "supported_aspect_ratios": [[1, 1]],
    "fullatt_block_indexes": [0],
    "mlp_layer_types": ["dense"],
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
}

SLIDING = ["sliding_attention"] * 3 + ["full_attention"]
LINEAR_ATTENTION = ("qwen3_5_text", "qwen3_next")
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
GRANITE = {
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.125,
}
LATENT = {"head_dim": 4, "num_key_value_heads": 4}  # DeepSeek's attention
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
#: Encoders that can be decoders.
BOTH_WAYS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
).split()

#: Types with experts whose first layers have none.
DENSE_FIRST = (
    "axk1 axk2 bailing_hybrid beam deepseek_v32 exaone_moe glm_moe_dsa hy_v3 hy_v4 "
    "kimi_linear laguna mimo_v2_flash"
).split()
DENSE = {"mlp_layer_types": ["dense"] * 3 + ["sparse"]}

#: What a type needs besides its sizes, and multipliers and soft-caps off their neutral values.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{kind: GRANITE for kind in ("granite", "granite_swa", "granitemoe", "granitemoeshared")},
    "hyperclovax": GRANITE | {"logits_scaling": 0.125},
    "granitemoehybrid": GRANITE
    | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0},
    **{kind: DENSE for kind in DENSE_FIRST},
    **{kind: LATENT for kind in ("deepseek_v3", "longcat_flash", "youtu")},
    **{kind: LATENT | DENSE for kind in ("axk1", "axk2", "deepseek_v32", "glm_moe_dsa")},
    **{kind: {"layer_types": SLIDING} for kind in ("exaone4", "olmo3")},
    **{kind: {"layer_types": LINEAR} for kind in LINEAR_ATTENTION},
    "bailing_hybrid": DENSE | {"layer_types": LINEAR, "num_key_value_heads": 4},
    "kimi_linear": DENSE | {"layer_types": LINEAR, "num_key_value_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "glm4_moe_lite": DENSE | {"num_key_value_heads": 4},
    "flint": {"mlp_only_layers": [0, 1, 2]},
    "gemma2": {
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 5.0,
    },
    "vaultgemma": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": SLIDING,
        "altup_num_inputs": 2,
        "final_logit_softcapping": 5.0,
    },
    "gemma4_text": {"layer_types": SLIDING, "final_logit_softcapping": 5.0},
    "gemma4_unified_text": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {
        "logit_scale": 0.0625,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"rope_parameters": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
        "moe_layers": [3],
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 3,
        "use_mamba_kernels": False,
    },
    **{kind: {"is_decoder": True} for kind in BOTH_WAYS},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local"] * 4,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 64,
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": ROPE},
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "per_layer_config": {},
        "layer_types": ["sliding_attention"] * 4,
        **DENSE,
    },
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * 4},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "rope_theta": 1e4, "kv_n_heads": 2},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2},
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention"] * 3 + ["indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "openai-gpt": {"afn": "gelu"},
    "xlm": {"causal": True, "n_langs": 1},
    "xlstm": {"qk_dim_factor": 2.0, "v_dim_factor": 2.0},
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "full_attention", "mlp", "mlp"]},
    "falcon_h1": {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "mamba2": {"num_heads": 8},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_ngroups": 1,
        "num_key_value_heads": 4,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "n_mamba_heads": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"]},
    "minicpm3": {
        "scale_depth": 1.4,
        "scale_emb": 12,
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
    "mllama_text_model": {"num_hidden_layers": 5, "cross_attention_layers": [3]},
    "qwen2_vl_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "qwen2_5_vl_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "qwen3_vl_text": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
}

#: Types that are no text decoders by themselves, are drafts that read another model's cache, or
#: stay too large.
LEFT_OUT = frozenset(
    "blt gemma4_assistant gemma4_unified_assistant git moss_transcribe_diarize musicgen "
    "musicgen_melody phi4_multimodal whisper".split()
)
#: Types with pictures whose text decoders have no type of their own among the causal ones.
WITH_PICTURES = (
    "idefics3 internvl llava mistral3 paligemma qwen2_5_vl qwen2_vl qwen3_vl smolvlm".split()
)


def kinds() -> list[str]:
    """Every model type, by name."""
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return sorted((causal | set(WITH_PICTURES)) - LEFT_OUT)


def build(kind: str, seed: int = 0, **others: Any) -> Any:
    """A model of the type, float32, in evaluation mode and frozen; nothing in it is neutral.

    Args:
        others: set in its text decoder's configuration.
    """
    torch.manual_seed(seed)
    config = config_of(kind, **others)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = auto.from_config(config)
    return off_neutral(model.float(), seed).eval().requires_grad_(False)


def config_of(kind: str, **others: Any) -> Any:
    """The type's configuration with small sizes, its text decoder's likewise."""
    cls = CONFIG_MAPPING[kind]
    parts = {
        name: part
        for name, part in vars(cls()).items()
        if name.endswith("_config") and hasattr(part, "to_dict")
    }
    if "text_config" not in parts:
        return small(cls, kind, **others)
    text = parts.pop("text_config")
    run = ("vision_config", "audio_config") if kind == "dots3_note" else ("vision_config",)
    senses = {name: _sense(part) for name, part in parts.items() if name in run}
    made = small(type(text), text.model_type, **others)
    return cls(text_config=made, pad_token_id=256, **senses)


def small(cls: Any, kind: str, **others: Any) -> Any:
    """A configuration of this class with the sizes that it knows."""
    default = cls()
    aliases: Mapping[str, str] = getattr(cls, "attribute_map", {}) or {}
    known = {*default.to_dict(), *aliases, *cls.__init__.__code__.co_varnames}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    for alias, name in aliases.items():
        if alias in sizes:
            sizes.setdefault(name, sizes.pop(alias))
    return cls(**(sizes | EXCEPTIONS.get(kind, {}) | others))


def _sense(default: Any) -> Any:
    known = default.to_dict()
    return type(default)(**{name: value for name, value in SENSES.items() if name in known})


@torch.no_grad()
def off_neutral(model: Any, seed: int) -> Any:
    """Matrices of one size; vectors that start all alike (norms, biases) moved off that value."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 and "A_log" not in name:
            parameter.copy_(0.25 * noise)
        elif parameter.numel() == 1 or float(parameter.std()) < 1e-6:
            parameter.add_(0.1 * noise)
    # Youtu has the padding's row zeroed when it is loaded
    # (findings/transformers_zeroes_youtus_padding_row_on_load.sh)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    return model


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens, made on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: i for i, piece in enumerate([*alphabet, "<pad>", "<eos>"])}
    made = Tokenizer(models.BPE(pieces, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )
