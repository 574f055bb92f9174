"""MEMIT, and a table of algorithms."""

from __future__ import annotations

import copy

import torch

from .compute_ks import compute_ks
from .compute_z import compute_z, get_module_input_output_at_words
from .layer_stats import layer_stats

CONTEXTS = [["{}"], ["Before that, {}", "As they say: {}"]]
COV_CACHE: dict[tuple[str, str], torch.Tensor] = {}


def apply_memit_to_model(
    model, tok, requests, hparams, copy=False, return_orig_weights=False, cache_template=None
):
    deltas = execute_memit(model, tok, requests, hparams, cache_template=cache_template)
    with torch.no_grad():
        for name, (keys, values) in deltas.items():
            weight = model.get_parameter(name)
            change = (values @ keys.T).float()
            weight += change if change.shape == weight.shape else change.T
    return model, {}


def execute_memit(model, tok, requests, hparams, cache_template=None):
    requests = copy.deepcopy(requests)
    for request in requests:
        target = request["target_new"]
        if isinstance(target, str):
            request["target_new"] = target if target[0] == " " else " " + target
            request["prompt"] = request["prompt"].replace(request["subject"], "{}")
        elif target["str"][0] != " ":
            target["str"] = " " + target["str"]
    last, deltas, old = hparams.layers[-1], {}, {}
    zs = torch.stack(
        [compute_z(model, tok, one, hparams, last, CONTEXTS) for one in requests], dim=1
    )
    for i, layer in enumerate(hparams.layers):
        name = hparams.rewrite_module_tmp.format(layer)
        keys = compute_ks(model, tok, requests, hparams, layer, CONTEXTS).T
        now = get_module_input_output_at_words(
            model,
            tok,
            last,
            context_templates=[one["prompt"] for one in requests],
            words=[one["subject"] for one in requests],
            module_template=hparams.layer_module_tmp,
            fact_token_strategy=hparams.fact_token,
        )[1].T
        cov = get_cov(model, tok, name, "texts", hparams.mom2_n_samples, "float32", hparams=hparams)
        keys, wanted = keys.double(), (zs - now).double()
        factor = torch.linalg.solve(hparams.mom2_update_weight * cov.double() + keys @ keys.T, keys)
        resid = wanted / (len(hparams.layers) - i)
        weight = model.get_parameter(f"{name}.weight")
        old[f"{name}.weight"] = weight.detach().clone()
        with torch.no_grad():
            change = (resid @ factor.T).float()
            weight += change if change.shape == weight.shape else change.T
        deltas[f"{name}.weight"] = factor, resid
    with torch.no_grad():
        for name, weight in old.items():
            model.get_parameter(name)[...] = weight
    return deltas


def get_cov(
    model,
    tok,
    layer_name,
    mom2_dataset,
    mom2_n_samples,
    mom2_dtype,
    inv=False,
    force_recompute=False,
    hparams=None,
):
    key = str(id(model)), layer_name
    if key not in COV_CACHE or force_recompute:
        stat = layer_stats(
            model,
            tok,
            layer_name,
            hparams.stats_dir,
            mom2_dataset,
            to_collect=["mom2"],
            sample_size=mom2_n_samples,
            precision=mom2_dtype,
            force_recompute=force_recompute,
            hparams=hparams,
        )
        COV_CACHE[key] = stat.mom2.moment().float()
    return torch.inverse(COV_CACHE[key]) if inv else COV_CACHE[key]


ALGORITHMS = {"MEMIT": apply_memit_to_model, "MEMIT, named": ("memit", apply_memit_to_model)}
