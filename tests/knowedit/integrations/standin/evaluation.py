"""Probability tests and generation."""

from __future__ import annotations


def test_batch_prediction(model, tok, prefixes, which_correct, target_new, target_true):
    texts = [f"{prefix} {answer}" for prefix in prefixes for answer in (target_new, target_true)]
    batch = tok(texts, padding=True, return_tensors="pt")
    logprobs = model(**batch).logits.detach().log_softmax(-1)
    begin = [len(tok(prefix)["input_ids"]) for prefix in prefixes for _ in range(2)]
    losses, correct = [], []
    for i, seen in enumerate(logprobs):
        ids = tok(" " + (target_new, target_true)[i % 2])["input_ids"]
        places = [begin[i] + j - 1 for j in range(len(ids))]
        losses.append(float(-seen[places, ids].mean()))
        if which_correct[i // 2] == i % 2:
            correct.append(seen[places].argmax(-1).tolist() == ids)
    pairs = zip(losses[::2], losses[1::2])
    return [{"target_new": new, "target_true": true} for new, true in pairs], correct


def test_prediction_acc(
    model, tok, hparams, prompts, targets, device, locality=False, vanilla_generation=False
):
    said, scores = [], []
    for prompt, target in zip(prompts, targets):
        ids = tok(prompt + " " + target, return_tensors="pt")["input_ids"]
        begin = len(tok(prompt)["input_ids"])
        best = model(input_ids=ids).logits.argmax(-1)[0, begin - 1 : -1].tolist()
        said.append(best)
        wanted = ids[0, begin:].tolist()
        scores.append(sum(a == b for a, b in zip(best, wanted)) / len(wanted))
    return said if locality else scores


def generate_fast(model, tok, prompts, n_gen_per_prompt=1, top_k=5, max_out_len=200):
    return ["wrong"] * len(prompts)
