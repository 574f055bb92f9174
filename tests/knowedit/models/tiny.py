"""Tiny random models of many families, made from their configurations: hidden 32, four layers, and
norms, biases and multipliers off their neutral values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

#: Names that configurations use for the same few sizes; each takes those that it knows.
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": 16,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 257,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_inner": 48,
    "n_positions": 256,
    "rotary_dim": 4,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "word_embed_proj_dim": 32,
}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: What else each family needs; a family's MLP width is 48 where its configuration has one.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gptj": {},
    "gpt_neo": {
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "codegen": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {
        "residual_multiplier": 0.22,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "attention_multiplier": 0.125,
    },
    "cohere": {"logit_scale": 0.0625},
    "olmo2": {},
    "bloom": {},
    "falcon": {},
    "nemotron": {},
    "opt": {"hidden_size": 32},
    "phi3": {"rope_parameters": None},
    "lfm2": {
        "layer_types": ["conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "deepseek_v3": {
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.22,
    },
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def build(family: str, **more: Any) -> Any:
    """A transformers model of the family, float32, in evaluation mode and frozen; `more` of its
    configuration.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    cls = CONFIG_MAPPING[family]
    if family == "gemma3":
        config = cls(text_config=_sized("gemma3_text").to_dict(), vision_config=VISION)
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(_sized(family, more))
    return _off_neutral(model.float()).eval().requires_grad_(False)


def _sized(family: str, more: Mapping[str, Any] = {}) -> Any:
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    known = {*cls().to_dict(), *cls.attribute_map}
    given = {name: size for name, size in SIZES.items() if name in known}
    twice = {name for name, other in cls.attribute_map.items() if name != other and other in given}
    sizes = {name: size for name, size in given.items() if name not in twice}
    return cls(**(sizes | FAMILIES[family] | dict(more)))


def _off_neutral(model: Any) -> Any:
    """Matrices of a plain size; vectors moved off where they start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.copy_(0.25 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model


def plant(model, layer, position, factor=200.0):
    """Make the MLP of `layer` write an attention sink at `position` of every text."""

    def write(_module, _inputs, output):
        scale = torch.ones(output.shape[-2], 1)
        scale[position : position + 1] = factor
        return output * scale

    model.projection(layer).register_forward_hook(write)
