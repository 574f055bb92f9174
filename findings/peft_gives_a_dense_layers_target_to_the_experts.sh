#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: in a mixture of experts whose first layers are dense, an adapter for
# the full path of a dense layer's `down_proj` is loaded onto the experts of the other layers instead.
#
# GLM-4-MoE (as DeepSeek, dots.1 and others) has plain MLPs in its first layers. A LoRA adapter whose
# `target_modules` holds "model.layers.0.mlp.down_proj" fits that layer alone. Expected: the adapter sits
# there after loading, as in a model without experts. Seen: peft goes by the last part of the name, takes it
# for the experts' old name, and moves it to `target_parameters`: the dense layer gets no adapter, all
# experts of the other layers get fresh ones, and the loaded model answers as the base model. All that says
# so is a warning about missing adapter keys.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - "$work/adapter" <<'PY'
import copy
import sys

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
torch.manual_seed(0)
config = Glm4MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, pad_token_id=0,
)
base = Glm4MoeForCausalLM(config).eval()
target = "model.layers.0.mlp.down_proj"
assert isinstance(base.get_submodule(target), torch.nn.Linear)
lora = LoraConfig(r=2, lora_alpha=2, target_modules=[target], task_type="CAUSAL_LM", inference_mode=True)
lora.save_pretrained(sys.argv[1])
name = f"base_model.model.{target}"
save_file(
    {f"{name}.lora_A.weight": torch.randn(2, 48), f"{name}.lora_B.weight": torch.randn(32, 2)},
    f"{sys.argv[1]}/adapter_model.safetensors",
)
loaded = PeftModel.from_pretrained(copy.deepcopy(base), sys.argv[1]).eval()
places = sorted(n.partition(".lora_A")[0] for n, _ in loaded.named_parameters() if ".lora_A." in n)
ids = torch.arange(1, 9)[None]
with torch.no_grad():
    moved = (loaded(input_ids=ids).logits - base(input_ids=ids).logits).abs().max().item()
print("asked for:", target)
print("adapters sit at:", places)
print("largest change of a logit:", moved)
assert places == ["base_model.model.model.layers.1.mlp.experts"], places
assert moved == 0.0
print("as described: the dense layer's adapter is lost")
PY
