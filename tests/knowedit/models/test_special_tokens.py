"""Start and end tokens as each tokenizer's own template has them: in front of every text and
every piece of a document, and never between a prompt and its answer (unit).
"""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import knowedit as ke
from knowedit.errors import EditError, ModelError
from knowedit.evaluation.measures.perplexity import perplexity
from knowedit.methods.neurons.texts import windows
from knowedit.models import generation
from knowedit.models.editable import EditableModel
from knowedit.models.tokens import cut, start_tokens
from knowedit.statistics.corpus.corpus import Corpus
from knowedit.statistics.corpus.windows import Reader

BOS, EOS = 256, 257  # "<pad>" and "<eos>" of the byte tokenizer
TEMPLATES = {"none": ([], []), "bos": ([BOS], []), "eos": ([], [EOS]), "both": ([BOS, EOS], [EOS])}


@pytest.fixture(params=TEMPLATES)
def framed(request, tiny_llama, byte_tokenizer):
    """A model whose tokenizer puts these special tokens around every text, and they."""
    start, end = TEMPLATES[request.param]
    names = {BOS: "<pad>", EOS: "<eos>"}
    inner = copy.deepcopy(byte_tokenizer.backend_tokenizer)
    inner.post_processor = TemplateProcessing(
        single=" ".join([*(names[i] for i in start), "$A", *(names[i] for i in end)]),
        special_tokens=[(name, i) for i, name in names.items()],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>"
    )
    return EditableModel(tiny_llama.hf, tokenizer), start, end


def plain(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_start_and_do_not_end(framed):
    model, start, _ = framed
    assert start_tokens(model.tokenizer) == start
    assert model.row("Paris").ids == [*start, *plain(model, "Paris")]
    row = model.row("The city of Paris is in", "Paris", "France")
    assert row.ids == [*start, *plain(model, "The city of Paris is in France")]
    assert row.answer is not None and row.subject is not None
    assert model.tokenizer.decode(row.ids[row.answer :]) == " France"
    assert model.tokenizer.decode(row.ids[: row.subject + 1]).endswith("Paris")


def test_an_end_token_in_the_text_itself_stays(framed):
    model, start, _ = framed
    assert model.row("one<eos>").ids == [*start, *plain(model, "one"), EOS]


def test_scores_are_of_the_answer_behind_the_prompt(framed):
    model, start, _ = framed
    ids = torch.tensor([[*start, *plain(model, "Paris is in France")]])
    with torch.no_grad():
        logp = model.hf(ids).logits.log_softmax(-1)[0]
    answer = plain(model, " France")
    begin = ids.shape[1] - len(answer)
    expected = sum(float(logp[begin + i - 1, token]) for i, token in enumerate(answer))
    found = model.score(["Paris is in"], ["France"])[0].logprob
    assert found == pytest.approx(expected / len(answer), abs=1e-5)
    following = model.next_logprobs(["Paris is in"])[0]
    assert torch.allclose(following, logp[begin - 1], atol=1e-5)


def test_every_piece_of_a_document_starts_as_the_document_does(framed, tmp_path):
    model, start, end = framed
    text = "The quick brown fox jumps over the lazy dog."
    (tmp_path / "corpus.txt").write_text(text)
    reader = Reader(Corpus.parse(tmp_path / "corpus.txt"), 0, model.tokenizer, 12, True)
    pieces = next(reader.windows()).pieces
    assert all(piece.ids[: len(start)] == start and len(piece.ids) <= 12 for piece in pieces)
    assert all(piece.skip == max(len(start), 1) for piece in pieces)
    body = [i for piece in pieces for i in piece.ids[len(start) :]]
    assert body == [*plain(model, text), *end]
    assert reader._pieces([piece.ids for piece in pieces]) == pieces  # as read from the cache
    rows = windows(model, tmp_path / "corpus.txt", 40, 12)
    assert all(row[: len(start)] == start for row in rows)


def test_perplexity_windows_start_as_the_document_does(framed):
    model, start, end = framed
    text = "The quick brown fox jumps over the lazy dog."
    body, room = [*plain(model, text), *end], 16 - len(start)
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(body), room):
            ids = torch.tensor([[*start, *body[i : i + room]]])
            logp = model.hf(ids).logits[0, :-1].double().log_softmax(-1)
            total -= float(logp.gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
    found = perplexity(model, [text], tokens=1000, window=16)
    assert found == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


def test_statistics_know_the_start_and_others_keep_their_name(framed, tmp_path):
    model, start, _ = framed
    (tmp_path / "corpus.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    made = ke.key_statistics(
        model, 1, tmp_path / "corpus.txt", 100, max_length=32, directory=tmp_path, progress=False
    )
    assert made[1].recipe.start == tuple(start)
    assert ("start" in made[1].recipe.record) == bool(start)
    assert ke.KeyStatistics.load(tmp_path)[1].recipe == made[1].recipe


def test_samples_begin_as_texts_do(framed, monkeypatch):
    model, start, _ = framed
    asked = []
    generate = model.hf.generate
    monkeypatch.setattr(
        model.hf, "generate", lambda **k: asked.append(k["input_ids"]) or generate(**k)
    )
    next(generation.samples(model, batch=2, length=6))
    assert asked[0].tolist() == [start or [EOS]] * 2


def test_pieces_need_room():
    assert cut([7, 1, 2, 3], 3, [7]) == [[7, 1, 2], [7, 3]]
    assert cut([1, 2, 3], 2) == [[1, 2], [3]]
    with pytest.raises(ModelError, match="no room for text behind the 2 tokens"):
        cut([7, 8, 1], 2, [7, 8])


def test_a_tokenizer_with_more_tokens_than_the_model_embeds(tiny_llama, byte_tokenizer):
    more = copy.deepcopy(byte_tokenizer)
    more.add_special_tokens({"pad_token": "<image>"})
    model = EditableModel(tiny_llama.hf, more)
    assert more.pad_token_id == model.vocabulary == 258
    assert model.score(["ab", "abcd"], ["c", "e"]) == tiny_llama.score(["ab", "abcd"], ["c", "e"])
    assert model.generate(["ab", "abcd"], 4) == tiny_llama.generate(["ab", "abcd"], 4)
    with pytest.raises(EditError, match="no embedding for its token '<image>'"):
        model.row("an <image>")
    with pytest.raises(EditError, match="no embedding for its token '<image>'"):
        perplexity(model, ["an <image> of a cat"])
    tiny_llama.hf.resize_token_embeddings(200)
    with pytest.raises(ModelError, match="258 tokens and the model 200"):
        EditableModel(tiny_llama.hf, byte_tokenizer)


def test_documents_with_a_token_that_the_model_does_not_embed_are_left_out(
    tiny_llama, byte_tokenizer, tmp_path
):
    more = copy.deepcopy(byte_tokenizer)
    more.add_tokens(["<image>"])
    model = EditableModel(tiny_llama.hf, more)
    texts = ["a plain document of words", "an <image> of a cat", "another plain document"]
    found = {}
    for name, some in (("all", texts), ("plain", texts[::2])):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(some))
        found[name] = ke.key_statistics(
            model, 1, tmp_path / f"{name}.txt", 45, directory=tmp_path / name, progress=False
        )
    one, other = (statistics[1] for statistics in found.values())
    assert one.count == other.count == 45
    torch.testing.assert_close(one.total, other.total)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_before_any_work(tiny_llama, tmp_path, bad):
    (tmp_path / "corpus.txt").write_text("some text " * 50)
    weight = tiny_llama.hf.get_submodule("model.layers.3.self_attn.k_proj").weight
    weight.data[3, 5] = bad
    with pytest.raises(ModelError, match=r"layers\.3\.self_attn\.k_proj\.weight .*NaN or infinite"):
        ke.key_statistics(tiny_llama, 1, tmp_path / "corpus.txt", 100, directory=tmp_path)
