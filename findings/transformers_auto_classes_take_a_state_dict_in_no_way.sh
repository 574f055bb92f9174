#!/usr/bin/env bash
# Versions: transformers 5.23.0, torch 2.13.0 on Python 3.11
# Expected: AutoModelForCausalLM.from_pretrained takes a state dictionary "to use instead of a state dictionary loaded
#           from saved weights file ... to create a model from a pretrained configuration but load your own weights"
#           (its docstring), as LlamaForCausalLM.from_pretrained(None, config=..., state_dict=...) does
# Seen:     with a folder: ValueError; with None and a configuration: TypeError; the model's own class: loaded
#           (from_pretrained of a class refuses a name beside a state_dict, and that of an Auto class needs a name)
# Here:     python/knowedit/models/packings.py looks up the model's own class
set -u
folder=$(mktemp -d) || exit 2
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers==5.23.0' 'torch==2.13.0' || exit 2

seen='with a folder: ValueError; with None and a configuration: TypeError; the model'"'"'s own class: loaded'
now=$(cd "$folder" && venv/bin/python - 2>/dev/null <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
model.save_pretrained("saved")
own = model.state_dict()


def outcome(kind, *name, **config):
    try:
        found = kind.from_pretrained(*name, state_dict=own, **config)
    except Exception as error:
        return type(error).__name__
    same = all(torch.equal(value, own[key]) for key, value in found.state_dict().items())
    return "loaded" if same else "other weights"


print(
    f"with a folder: {outcome(AutoModelForCausalLM, 'saved')};",
    f"with None and a configuration: {outcome(AutoModelForCausalLM, None, config=config)};",
    f"the model's own class: {outcome(LlamaForCausalLM, None, config=config)}",
)
PYTHON
)
printf 'seen: %s\nnow:  %s\n' "$seen" "$now"
[ "$now" = "$seen" ] || { echo "CHANGED: read this finding again"; exit 1; }
echo "still so"
