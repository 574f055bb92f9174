"""States at a word of a text."""

from __future__ import annotations

import torch

from .hooks import inputs_of, outputs_of


def get_words_idxs_in_templates(tok, context_templates, words, subtoken):
    assert subtoken in ("last", "first")
    places = []
    for template, word in zip(context_templates, words):
        before = template.partition("{}")[0]
        start, end = len(tok(before)["input_ids"]), len(tok(before + word)["input_ids"])
        places.append([end - 1 if subtoken == "last" else start])
    return places


def get_reprs_at_word_tokens(
    model, tok, context_templates, words, layer, module_template, subtoken, track="in"
):
    places = get_words_idxs_in_templates(tok, context_templates, words, subtoken)
    texts = [template.format(word) for template, word in zip(context_templates, words)]
    return get_reprs_at_idxs(model, tok, texts, places, layer, module_template, track)


def get_reprs_at_idxs(model, tok, contexts, idxs, layer, module_template, track="in"):
    name = module_template.format(layer)
    batch = tok(contexts, padding=True, return_tensors="pt")
    with torch.no_grad(), inputs_of(model, name) as into, outputs_of(model, name) as out:
        model(**batch)
    found = [
        torch.stack([states[i, places].mean(0) for i, places in enumerate(idxs)])
        for states in (into[0], out[0])
    ]
    return tuple(found) if track == "both" else found[track == "out"]
