"""One value at a time, on whole prompts."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from . import repr_tools
from .hooks import first, hooked

RUNS: list[str] = []


def find_fact_lookup_idx(prompt, subject, tok, fact_token_strategy, verbose=True):
    kind = fact_token_strategy.removeprefix("subject_")
    return repr_tools.get_words_idxs_in_templates(tok, [prompt], [subject], kind)[0][0]


def get_module_input_output_at_words(
    model, tok, layer, context_templates, words, module_template, fact_token_strategy
):
    kind = fact_token_strategy.removeprefix("subject_")
    return repr_tools.get_reprs_at_word_tokens(
        model, tok, context_templates, words, layer, module_template, kind, "both"
    )


def optimised(model, tok, request, target, hparams, contexts, module):
    """(clean state, delta) at the output of `module`, and the loss before every step."""
    ids = tok(target)["input_ids"]
    prompts = [c.format(request["prompt"]) + tok.decode(ids[:-1]) for c in contexts] + ["{} is a"]
    batch = tok([p.format(request["subject"]) for p in prompts], padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1).tolist()
    at = [find_fact_lookup_idx(p, request["subject"], tok, hparams.fact_token) for p in prompts]
    lines, clean = torch.arange(len(prompts)), []
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)

    def add(module, inputs, output):
        states = first(output)
        if not clean:
            clean.append(states[0, at[0]].detach().clone())
        changed = states.index_put((lines, torch.tensor(at)), delta[None], accumulate=True)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    adam, before = torch.optim.Adam([delta], lr=hparams.v_lr), None
    for step in range(hparams.v_num_grad_steps):
        with hooked(model, module, add):
            logprobs = model(**batch).logits.log_softmax(-1)
        kept = logprobs[-1, at[-1]]
        before = kept.detach() if before is None else before
        said = [
            -logprobs[i, lengths[i] - len(ids) + torch.arange(len(ids)), ids].mean()
            for i in range(len(prompts) - 1)
        ]
        loss = torch.stack(said).mean()
        loss = loss + hparams.kl_factor * F.kl_div(before, kept, log_target=True, reduction="sum")
        loss = loss + hparams.v_weight_decay * delta.norm() / clean[0].norm() ** 2
        if loss < 0.05 or step == hparams.v_num_grad_steps - 1:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        adam.step()
        with torch.no_grad():
            delta *= (hparams.clamp_norm_factor * clean[0].norm() / delta.norm()).clamp(max=1)
    return clean[0], delta.detach()


def compute_z(model, tok, request, hparams, layer, context_templates):
    RUNS.append(request["subject"])
    contexts = [context for group in context_templates for context in group]
    module = hparams.layer_module_tmp.format(layer)
    target = request["target_new"]
    target = target if isinstance(target, str) else target["str"]
    clean, delta = optimised(model, tok, request, target, hparams, contexts, module)
    return clean + delta
