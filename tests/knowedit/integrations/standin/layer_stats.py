"""Second moments of one module's inputs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from .hooks import inputs_of
from .sums import Combined, SecondMoment, tally

TEXTS: list[str] = []
PASSES: list[str] = []


class Tokens:
    def __init__(self, texts, tokenizer, longest):
        self.texts, self.tokenizer, self.longest = texts, tokenizer, longest

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        ids = self.tokenizer(self.texts[i], truncation=True, max_length=self.longest)["input_ids"]
        return {"input_ids": torch.tensor(ids)}


def pad(items):
    ids = [item["input_ids"] for item in items]
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask}


def layer_stats(
    model,
    tokenizer,
    layer_name,
    stats_dir,
    ds_name,
    to_collect,
    model_name=None,
    sample_size=None,
    precision=None,
    batch_tokens=None,
    download=True,
    progress=None,
    force_recompute=False,
    hparams=None,
):
    precision = precision or "float64"
    name = model_name or "tiny"
    suffix = f"_{precision}_mom2" + (f"_{sample_size}" if sample_size else "")
    file = Path(stats_dir) / name / f"{ds_name}_stats" / f"{layer_name}{suffix}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    stat = Combined(mom2=SecondMoment())
    loader = tally(
        stat,
        Tokens(TEXTS, tokenizer, batch_tokens or 40),
        cache=None if force_recompute else file,
        sample_size=sample_size,
        batch_size=10,
        collate_fn=pad,
        random_sample=1,
    )
    with torch.no_grad():
        for batch in loader:
            PASSES.append(layer_name)
            with inputs_of(model, layer_name) as seen:
                model(**batch)
            rows = seen[0][batch["attention_mask"].bool()]
            stat.add(rows.to(getattr(torch, precision)))
    return stat
