"""A model of transformers gets forward-mode derivatives by registering our attention; its own fused
one refuses (unit).
"""

import pytest
import torch
from torch.func import jvp, vmap
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from knowedit_kernels.jvp import attention


def registered(module, query, key, value, mask, scaling=None, **_):
    return attention(query, key, value, scale=scaling).transpose(1, 2), None


def test_tangents_of_a_whole_llama():
    AttentionInterface.register("knowedit_jvp", registered)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    embedded, along = torch.randn(1, 7, 32).double(), torch.randn(5, 1, 7, 32).double()

    def logits(embedded):
        return model(inputs_embeds=embedded, use_cache=False).logits

    def tangents(implementation):
        model.set_attn_implementation(implementation)
        return vmap(lambda t: jvp(logits, (embedded,), (t,))[1])(along)

    wanted = tangents("eager")  # transformers' own softmax and norms are float32 inside
    assert float((tangents("knowedit_jvp") - wanted).norm() / wanted.norm()) <= 1e-6
    with pytest.raises(NotImplementedError, match="forward AD"):
        tangents("sdpa")
