"""What several test modules share: texts, a naive collection, a peer's file, a saved model."""

import numpy as np
import torch

from knowedit.statistics.corpus.corpus import Corpus

MODULE = "model.layers.1.mlp.down_proj"
WORDS = (
    "the quick brown fox jumps over a lazy dog while seven wizards quietly mix strange potions"
).split()


def varied_texts(count):
    """Documents of very different lengths, as a text file has them."""
    return "\n\n".join(
        " ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + (i * 7) % 29))
        for i in range(1, count + 1)
    )


def save_model(model, folder):
    """The model and its tokenizer in a folder, for a process of its own; returns the folder."""
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def naive(model, corpus, layer, max_length):
    """Sum and count of the keys, one document at a time through the whole model, first tokens left
    out.
    """
    keys = []
    handle = model.projection(layer).register_forward_pre_hook(
        lambda _m, x: keys.append(x[0][0, 1:].double())
    )
    for text in Corpus.parse(corpus).documents():
        ids = model.tokenizer(text)["input_ids"]
        for i in range(0, len(ids), max_length):
            if len(ids) - i > 1:
                model.hf(input_ids=torch.tensor([ids[i : i + max_length]]))
    handle.remove()
    found = torch.cat(keys)
    return found.T @ found, len(found)


def peer_file(path, total, count=4000, **members):
    """As the peers write it: numpy.savez with these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {
        "mom2.constructor": "x.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": total,
        "sample_size": 100,
        **members,
    }
    np.savez(path, **members)
    return path


def rounds_that_stop_at(real, windows):
    """`Collection._round` in place of `real`: interrupted once so many windows are done."""

    def stops(self, *arguments):
        if self.state.windows >= windows:
            raise KeyboardInterrupt
        real(self, *arguments)

    return stops
