"""AlphaEdit twice: projectors and caches as arguments, and as names of the module."""

from __future__ import annotations

import torch

from . import memit_main
from .compute_ks import compute_ks
from .compute_z import compute_z, get_module_input_output_at_words

P = None
cache_c = None


def get_project(model, tok, layer, hparams):
    cov = memit_main.get_cov(
        model,
        tok,
        hparams.rewrite_module_tmp.format(layer),
        "texts",
        hparams.mom2_n_samples,
        "float32",
        hparams=hparams,
    ).cpu()
    left, sizes, _ = torch.linalg.svd(cov, full_matrices=False)
    small = (sizes < hparams.nullspace_threshold).nonzero(as_tuple=True)[0]
    return left[:, small] @ left[:, small].T


def _write(model, tok, requests, hparams, projectors, cache):
    last, contexts = hparams.layers[-1], memit_main.CONTEXTS
    zs = torch.stack(
        [compute_z(model, tok, one, hparams, last, contexts) for one in requests], dim=1
    )
    for i, layer in enumerate(hparams.layers):
        name = hparams.rewrite_module_tmp.format(layer)
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        now = get_module_input_output_at_words(
            model,
            tok,
            last,
            context_templates=[one["prompt"] for one in requests],
            words=[one["subject"] for one in requests],
            module_template=hparams.layer_module_tmp,
            fact_token_strategy=hparams.fact_token,
        )[1].T
        resid = (zs - now) / (len(hparams.layers) - i)
        projector = projectors[i, :, :].to(keys.device).float()
        change = torch.linalg.solve(
            projector @ (keys @ keys.T + cache[i, :, :]) + hparams.L2 * torch.eye(len(keys)),
            projector @ keys @ resid.T,
        )
        weight = model.get_parameter(f"{name}.weight")
        with torch.no_grad():
            weight += change if change.shape == weight.shape else change.T
    for i, layer in enumerate(hparams.layers):
        keys = compute_ks(model, tok, requests, hparams, layer, contexts).T
        cache[i, :, :] += keys.cpu() @ keys.cpu().T


def apply_AlphaEdit_to_model(
    model, tok, requests, hparams, cache_template=None, cache_c=None, P=None
):
    _write(model, tok, requests, hparams, P, cache_c)
    return model, cache_c


def execute_AlphaEdit(model, tok, requests, hparams, cache_template=None):
    _write(model, tok, requests, hparams, P, cache_c)
    return {}


def apply_AlphaEdit_in_place(model, tok, requests, hparams):
    """As EasyEdit has it: projectors and cache are names of the module."""
    _write(model, tok, requests, hparams, P, cache_c)
    return model, {}
