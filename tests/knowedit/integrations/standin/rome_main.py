"""ROME: a left vector from the inverse covariance, a right vector from an optimised value."""

from __future__ import annotations

import torch

from . import repr_tools
from .compute_z import find_fact_lookup_idx as find_fact_lookup_idx
from .compute_z import get_module_input_output_at_words, optimised
from .layer_stats import layer_stats

inv_mom2_cache: dict[tuple[str, str], torch.Tensor] = {}
CONTEXTS = ["{}", "Before that, {}", "As they say: {}"]


def get_inv_cov(model, tok, layer_name, mom2_dataset, mom2_n_samples, mom2_dtype, hparams=None):
    if (id(model), layer_name) not in inv_mom2_cache:
        stat = layer_stats(
            model,
            tok,
            layer_name,
            hparams.stats_dir,
            mom2_dataset,
            to_collect=["mom2"],
            sample_size=mom2_n_samples,
            precision=mom2_dtype,
            hparams=hparams,
        )
        inv_mom2_cache[id(model), layer_name] = torch.inverse(stat.mom2.moment()).float()
    return inv_mom2_cache[id(model), layer_name]


def compute_u(model, tok, request, hparams, layer, context_templates):
    key = repr_tools.get_reprs_at_word_tokens(
        model,
        tok,
        [context.format(request["prompt"]) for context in context_templates],
        [request["subject"]] * len(context_templates),
        layer,
        hparams.rewrite_module_tmp,
        "last",
    ).mean(0)
    name = hparams.rewrite_module_tmp.format(layer)
    inverse = get_inv_cov(model, tok, name, "texts", hparams.mom2_n_samples, "float64", hparams)
    u = (inverse.to(device=key.device, dtype=key.dtype) @ key.unsqueeze(1)).squeeze()
    return u / u.norm()


def get_module_input_output_at_word(
    model, tok, layer, context_template, word, module_template, fact_token_strategy
):
    into, out = get_module_input_output_at_words(
        model, tok, layer, [context_template], [word], module_template, fact_token_strategy
    )
    return into[0], out[0]


def compute_v(model, tok, request, hparams, layer, left_vector, context_templates):
    module, target = hparams.mlp_module_tmp.format(layer), request["target_new"]
    clean, delta = optimised(model, tok, request, target, hparams, context_templates, module)
    key, value = get_module_input_output_at_word(
        model,
        tok,
        layer,
        context_template=request["prompt"],
        word=request["subject"],
        module_template=hparams.rewrite_module_tmp,
        fact_token_strategy=hparams.fact_token,
    )
    return (clean + delta - value) / torch.dot(key, left_vector)
