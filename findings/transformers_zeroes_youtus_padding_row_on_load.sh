#!/usr/bin/env bash
# Versions: transformers 5.23.0, torch 2.13.0 on Python 3.11
# Expected: a model saved and loaded again has the weights that it had ("save_pretrained ... so that it can be
#           re-loaded using from_pretrained", the docstring of PreTrainedModel.save_pretrained)
# Seen:     1.0 in the saved model, 0.0 in the loaded one
#           (its _init_weights zeroes a slice of the embedding, which has lost the mark of a loaded weight)
# Here:     benchmarks/families/models.py zeroes such rows itself, as a trained checkpoint has them
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'torch==2.13.0' || exit 2

seen='1.0 in the saved model, 0.0 in the loaded one'
now=$(cd "$folder" && venv/bin/python - 2>/dev/null <<'PYTHON'
import torch
from transformers import YoutuConfig, YoutuForCausalLM

config = YoutuConfig(
    vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4,
    v_head_dim=4, pad_token_id=3,
)
model = YoutuForCausalLM(config)
with torch.no_grad():
    model.model.embed_tokens.weight[3] = 1.0
model.save_pretrained("saved")
loaded = YoutuForCausalLM.from_pretrained("saved")
one, other = (float(m.model.embed_tokens.weight[3].max()) for m in (model, loaded))
print(f"{one} in the saved model, {other} in the loaded one")
PYTHON
)
printf 'seen: %s\nnow:  %s\n' "$seen" "$now"
[ "$now" = "$seen" ] || { echo "CHANGED: read this finding again"; exit 1; }
echo "still so"
