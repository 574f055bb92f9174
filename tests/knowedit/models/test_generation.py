"""Greedy is the arg-max and samples are plain, whatever the model's `generation_config` says
(unit).
"""

from __future__ import annotations

import itertools

import pytest
import torch

from knowedit.errors import EditError, ModelError
from knowedit.models.generation import continuations, end_tokens

#: What published models ship: each of these changes what `hf.generate` says.
TASTES = {
    "penalty": {"repetition_penalty": 5.0},
    "n-grams": {"no_repeat_ngram_size": 1},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 0, "top_p": 1.0},
    "suppressed": {"suppress_tokens": list(range(128))},
    "beams": {"num_beams": 3},
    "forced end": {"forced_eos_token_id": 5},
    "stop string": {"stop_strings": ["a"]},
}
PROMPTS = ["Paris is in France and the capital of France is", "2+2=", "abcabcabcabc"]


def by_argmax(model, prompt, tokens):
    """The continuation, one plain forward a token, up to the end of the text."""
    ids, begin = model.row(prompt).ids, len(model.row(prompt).ids)
    with torch.no_grad():
        while len(ids) < begin + tokens and (len(ids) == begin or ids[-1] not in end_tokens(model)):
            ids = [*ids, int(model.hf(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[begin:]


@pytest.fixture(params=TASTES)
def opinionated(request, tiny_llama):
    """A model whose generation_config asks for something else than the arg-max."""
    for name, value in TASTES[request.param].items():
        setattr(tiny_llama.hf.generation_config, name, value)
    return tiny_llama


def test_greedy_is_the_argmax(opinionated):
    own = opinionated.hf.generation_config
    said = continuations(opinionated, PROMPTS, 12)
    assert said == [by_argmax(opinionated, prompt, 12) for prompt in PROMPTS]
    assert opinionated.hf.generation_config is own  # lent, not changed


def test_the_models_own_config_is_an_option(tiny_llama):
    plain = tiny_llama.generate(PROMPTS, 12)
    assert tiny_llama.generate(PROMPTS, 12, as_configured=True) == plain
    tiny_llama.hf.generation_config.suppress_tokens = [
        token for prompt in PROMPTS for token in by_argmax(tiny_llama, prompt, 12)
    ]
    assert tiny_llama.generate(PROMPTS, 12) == plain
    assert tiny_llama.generate(PROMPTS, 12, as_configured=True) != plain


@pytest.mark.parametrize("ends", [True, False])
def test_a_word_that_also_fills_up_rows_is_said(tiny_llama, ends):
    """Whoever sets a padding token where there is none may take an ordinary one, or the end."""
    prompts = PROMPTS[:2]
    said = [by_argmax(tiny_llama, prompt, 6) for prompt in prompts]
    if ends:
        tiny_llama.hf.generation_config.eos_token_id = said[0][3]
        said = [by_argmax(tiny_llama, prompt, 6) for prompt in prompts]
    tiny_llama.tokenizer.pad_token_id = said[0][-1]
    try:
        assert continuations(tiny_llama, prompts, 6) == said
    finally:
        tiny_llama.tokenizer.pad_token = "<pad>"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda model: model.generate("Oslo"), "prompts must be a list of texts, got str 'Oslo'"),
        (lambda model: model.next_logprobs("Oslo"), "prompts must be a list of texts, got str"),
        (lambda model: model.score("Oslo", ["x"]), "prompts must be a list of texts, got str"),
        (lambda model: model.score(["Oslo"], "x"), "answers must be a list of texts, got str 'x'"),
        (lambda model: model.score(["Oslo"], []), "go together, got 1 and 0 of them"),
        (lambda model: model.generate(5), "prompts must be a list of texts, got int 5; put one"),
        (lambda model: model.generate(["a", None]), r"prompts\[1\] must be a text, got NoneType"),
        (lambda model: model.generate(["a"], 0), "max_new_tokens must be a whole number from 1"),
        (lambda model: model.generate(["a"], batch=0), "batch must be a whole number from 1"),
    ],
)
def test_what_cannot_be_asked(tiny_llama, ask, said):
    """One text alone above all: its letters would be answered one by one."""
    with pytest.raises(ModelError, match=said):
        ask(tiny_llama)


def test_samples_are_plain(opinionated):
    texts = list(itertools.islice(opinionated.samples(seed=1, batch=4, length=20), 4))
    first = opinionated.tokenizer.bos_token_id
    with torch.random.fork_rng(), torch.no_grad():  # the same draws, from the softmax itself
        torch.manual_seed(1_000_003)
        ids = torch.full((4, 1), first)
        done = torch.zeros(4, dtype=torch.bool)
        while ids.shape[1] < 20 and not done.all():
            drawn = torch.multinomial(opinionated.hf(ids).logits[:, -1].softmax(-1), 1)[:, 0]
            drawn[done] = opinionated.tokenizer.pad_token_id
            ids = torch.cat([ids, drawn[:, None]], 1)
            done |= torch.isin(drawn, torch.tensor(sorted(end_tokens(opinionated))))
    assert texts == opinionated.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_ends_are_the_configs_or_the_tokenizers(tiny_llama):
    config = tiny_llama.hf.generation_config
    for ends, expected in (
        (7, {7}),
        ([7, 9], {7, 9}),
        (None, {tiny_llama.tokenizer.eos_token_id}),
    ):
        config.eos_token_id = ends
        assert end_tokens(tiny_llama) == expected


def test_a_tokenizer_without_special_tokens(tiny_llama, byte_tokenizer):
    from transformers import PreTrainedTokenizerFast

    from knowedit.models.editable import EditableModel

    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    model = EditableModel(tiny_llama.hf, bare)
    model.hf.generation_config.eos_token_id = None
    assert continuations(model, PROMPTS, 5) == [by_argmax(model, p, 5) for p in PROMPTS]
    with pytest.raises(ModelError, match="no token that starts or ends a text"):
        next(model.samples())


def test_nan_is_no_word(tiny_llama):
    """The arg-max of NaN is some token, whose text would be taken for an answer."""
    with torch.no_grad():
        tiny_llama.weight(2)[0, 0] = float("nan")
    with pytest.raises(ModelError, match="cannot generate.*NaN"):
        tiny_llama.generate(["Rome is in"], 2)


def test_a_prompt_without_tokens_is_refused(tiny_llama):
    with pytest.raises(EditError, match="'' has no tokens"):
        tiny_llama.generate([""], 2)
