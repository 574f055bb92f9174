"""Texts by top-k sampling (`generate_fast`), with `fix="generation"`: the hosts' own loop hands the
model one column of the attention mask beside a cache, which transformers 5 takes for the whole
mask, so that from the second new token on the text does not follow from the model.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from knowedit.integrations.discovery import Signature
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import Replacement
from knowedit.integrations.replacements.states import tokens_of


@torch.no_grad()
def sampled(model: Any, ids: Tensor, top_k: int, longest: int) -> Tensor:
    """Continue rows of one length `[B, T]` to `longest` tokens each, drawing from the `top_k`
    likeliest.
    """
    cache, new = None, ids
    while ids.shape[1] < longest:
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        best = out.logits[:, -1].float().softmax(-1).topk(top_k)
        new = best.indices.gather(1, torch.multinomial(best.values, 1))
        ids = torch.cat([ids, new], 1)
    return ids


def _make(original: FunctionType, host: Host) -> Callable[..., Any]:
    def generate_fast(
        model: Any,
        tok: Any,
        prompts: list[str],
        n_gen_per_prompt: int = 1,
        top_k: int = 5,
        max_out_len: int = 200,
        vanilla_generation: bool = False,
    ) -> list[str]:
        if vanilla_generation:
            return original(
                *(model, tok, prompts, n_gen_per_prompt, top_k, max_out_len, vanilla_generation)
            )
        rows = [row for row in tokens_of(tok, prompts) for _ in range(n_gen_per_prompt)]
        device, texts = next(model.parameters()).device, [""] * len(rows)
        for length in sorted({len(row) for row in rows}):
            group = [i for i, row in enumerate(rows) if len(row) == length]
            ids = torch.tensor([rows[i] for i in group], device=device)
            for i, found in zip(group, sampled(model, ids, top_k, max_out_len).tolist()):
                text = unicodedata.normalize("NFKD", tok.decode(found))
                texts[i] = text.replace("\n\n", " ").replace("<|endoftext|>", "")
        return texts

    return generate_fast


GENERATE = Replacement(
    "follows the model also from the second token on",
    Signature(
        "generate_fast",
        ("model", "tok", "prompts"),
        ("n_gen_per_prompt", "top_k", "max_out_len", "vanilla_generation"),
    ),
    _make,
    fix="generation",
)
