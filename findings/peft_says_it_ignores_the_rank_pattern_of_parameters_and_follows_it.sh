#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0: a LoRA adapter of `target_parameters` warns that its `rank_pattern`
# is ignored, and follows it.
#
# `rank_pattern` gives single parameters another rank than `r`. For parameters (the experts of a mixture are
# 3-D parameters, not modules) `LoraConfig` is expected to do what it says. Seen: peft warns that the pattern
# is ignored, and still builds the adapter with the pattern's rank, so that a reader who believes the
# warning and drops the pattern gets an adapter of other shapes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$work/venv/bin/python" - <<'PY'
import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
config = MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
)
target = "model.layers.0.mlp.experts.down_proj"
lora = LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=[target],
                  rank_pattern={target: 5}, task_type="CAUSAL_LM")
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = get_peft_model(MixtralForCausalLM(config), lora)
told = [str(w.message) for w in said if "rank_pattern" in str(w.message)]
shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if ".lora_" in n}
print("warned:", told)
print("shapes:", shapes)
experts = config.num_local_experts
assert any("ignored" in text for text in told), told
assert all(5 * experts in shape for shape in shapes.values()), shapes
print("as described: the pattern is said to be ignored, and is followed")
PY
