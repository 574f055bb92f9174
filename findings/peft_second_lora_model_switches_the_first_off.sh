#!/usr/bin/env bash
# Versions: peft 0.21.2, transformers 5.23.0, torch 2.13.0 on Python 3.11
# Expected: an adapter that is put beside an active one, and whose B is zero, changes nothing: B starts
#           at zero so that a new adapter is the identity, and PeftModel.add_adapter says "The new
#           adapter is not automatically set as the active adapter".
# Seen:     LoraModel(model, config, "second") makes "second" the only active adapter of every layer
#           that both touch. The first one's update is gone from the output without a word, so what
#           is trained next is trained on another model than the user had.
# Here:     python/knowedit/methods/gradient/trainable.py (LoRAAdapter)
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'peft==0.21.2' 'transformers==5.23.0' 'torch==2.13.0' || exit 2

seen="first adapter moves the logits: True; after a second, zero one: as without any: True; active: ['second']"
now=$(cd "$folder" && venv/bin/python -W ignore - 2>/dev/null <<'PYTHON'
import torch
from peft import LoraConfig, LoraModel
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)).eval()


@torch.no_grad()
def logits():
    return model(torch.arange(8)[None]).logits.clone()


bare = logits()
LoraModel(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "first")
one = logits()
LoraModel(model, LoraConfig(r=2, target_modules=["q_proj"]), "second")  # B is zero
two = logits()
print(
    f"first adapter moves the logits: {not torch.equal(one, bare)}; "
    f"after a second, zero one: as without any: {torch.equal(two, bare)}; "
    f"active: {model.model.layers[0].self_attn.q_proj.active_adapters}"
)
PYTHON
)
printf 'seen: %s\nnow:  %s\n' "$seen" "$now"
[ "$now" = "$seen" ] || { echo "CHANGED: read this finding again"; exit 1; }
echo "still so"
