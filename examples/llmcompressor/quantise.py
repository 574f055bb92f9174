"""A folder's model in four bits by llm-compressor's `oneshot`, on Hessians of `SecondMoment`.

python quantise.py MODEL texts.txt OUTPUT

`texts.txt` has a calibration text a paragraph. Needs `pip install llmcompressor`, and no GPU.
"""

import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from modifier import MomentGPTQ
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, texts, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
paragraphs = [text for text in Path(texts).read_text("utf-8").split("\n\n") if text.strip()]
rows = [dict(tokenizer(text, truncation=True, max_length=2048)) for text in paragraphs]
four_bits = {"num_bits": 4, "strategy": "group", "group_size": 64}  # W4A16 has groups of 128
oneshot(
    model=model,
    processor=tokenizer,
    dataset=Dataset.from_list(rows),
    recipe=MomentGPTQ(
        config_groups={"linear": {"targets": ["Linear"], "weights": four_bits}}, ignore=["lm_head"]
    ),
    max_seq_length=2048,
    num_calibration_samples=len(rows),
)
model.save_pretrained(output, save_compressed=True)
tokenizer.save_pretrained(output)
