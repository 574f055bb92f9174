"""Mean keys: each group of contexts weighs the same."""

from __future__ import annotations

import torch

from .compute_z import get_module_input_output_at_words


def compute_ks(model, tok, requests, hparams, layer, context_templates):
    keys = []
    for request in requests:
        groups = []
        for group in context_templates:
            found = get_module_input_output_at_words(
                model,
                tok,
                layer,
                [context.format(request["prompt"]) for context in group],
                [request["subject"]] * len(group),
                hparams.rewrite_module_tmp,
                hparams.fact_token,
            )[0]
            groups.append(found.mean(0))
        keys.append(torch.stack(groups).mean(0))
    return torch.stack(keys)
