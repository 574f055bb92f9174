"""Unit: texts as tokens; on the default model's tokenizer, too (model)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from knowedit.errors import ModelError
from knowedit.facts.fact import Answer, Fact, Probe
from knowedit.facts.wordings.forms import Form, in_chat, training_forms
from knowedit.methods.locate.values import prompt_rows
from knowedit.models.tokens import join, tokenise


@pytest.mark.parametrize(
    ("prompt", "answer", "whole"),
    [
        ("The capital is", "Lyon", "The capital is Lyon"),
        ("2+2=", "5", "2+2=5"),
        ("法国的首都是", "里昂", "法国的首都是里昂"),
        ("กรุงเทพอยู่ใน", "ไทย", "กรุงเทพอยู่ในไทย"),
        ("首都是", "Lyon", "首都是 Lyon"),
        ("수도는", "리옹", "수도는 리옹"),
        ("", "Lyon", "Lyon"),
        ("ends in ", "Lyon", "ends in Lyon"),
        ("np.zeros_like(", "shape", "np.zeros_like(shape"),
        ("docs are at https://", "lyon.fr", "docs are at https://lyon.fr"),
        ("the scheme is https:", "//lyon.fr", "the scheme is https://lyon.fr"),
        ("kept in /usr/", "share", "kept in /usr/share"),
        ("half is 1 /", "2", "half is 1 / 2"),
        ('He said "', "no", 'He said "no'),
        ('He said "no" to "', "Rome", 'He said "no" to "Rome'),
        ('He said "no"', "to Rome", 'He said "no" to Rome'),
        ("It is the girls'", "school", "It is the girls' school"),
        ("It wasn't in '", "Rome", "It wasn't in 'Rome"),
        ("the type is List<", "String", "the type is List<String"),
        ("x <", "3", "x < 3"),
        ("x =", "3", "x = 3"),
        ("x==", "3", "x==3"),
        ("He lived 1901-", "1999", "He lived 1901-1999"),
        ("It was -", "or so", "It was - or so"),
        ("It costs $", "5", "It costs $5"),
        ("\u201e", "Lyon", "\u201eLyon"),
        ("Lyon", ", in France", "Lyon, in France"),
        ("Rome", "'s river", "Rome's river"),
        ("He writes for", ".NET", "He writes for .NET"),
        ("x", "!= 3", "x != 3"),
        ("x = torch.", "tensor", "x = torch.tensor"),
        ("import torch\nx = 1\ntorch.", "tensor", "import torch\nx = 1\ntorch.tensor"),
        ("f(np.", "zeros", "f(np.zeros"),
        ("y = a + np.", "pi", "y = a + np.pi"),
        ("call scipy.stats.", "norm", "call scipy.stats.norm"),
        ("see https://www.", "lyon.fr", "see https://www.lyon.fr"),
        ("He lives in Rome.", "it is old", "He lives in Rome. it is old"),
        ("Mr. Smith (of Rome) left.", "he went", "Mr. Smith (of Rome) left. he went"),
        ("x = 5. Then he left.", "so it was", "x = 5. Then he left. so it was"),
        ("for example, e.g.", "apples", "for example, e.g. apples"),
        ("In the U.S.", "it rains", "In the U.S. it rains"),
        ("The domain is", ".fr", "The domain is .fr"),
        ("p->", "next", "p->next"),
        ("def f() ->", "int", "def f() -> int"),
        ("std::", "vector", "std::vector"),
        ("x ==", "3", "x == 3"),
        ("x <=", "3", "x <= 3"),
        ("<b>", "Lyon", "<b>Lyon"),
        ("it ends with </", "div", "it ends with </div"),
        ("#include <a.h>\n#include <", "math.h", "#include <a.h>\n#include <math.h"),
        ("the (\nlanguage C++", "code", "the (\nlanguage C++ code"),
        ("x^", "2", "x^2"),
        ("f(x", "), y", "f(x), y"),
        ("pi is 3.", "14", "pi is 3.14"),
        ("It has 1,", "000 people", "It has 1,000 people"),
        ("In 1999,", "20 men", "In 1999, 20 men"),
        ("It is 12:", "30", "It is 12:30"),
        ("who won season 5", "18 men", "who won season 5 18 men"),
        ("1999", "\u5e74", "1999\u5e74"),
        ("the format is", "%d", "the format is %d"),
        ("er sagt", "\u00bbnein\u00ab", "er sagt \u00bbnein\u00ab"),
        ("and so on", "...", "and so on..."),
        ("It is 20", "\u00b0C", "It is 20\u00b0C"),
        ("It costs \u20b9", "5", "It costs \u20b95"),
        ("He lived 1901\u2013", "1999", "He lived 1901\u20131999"),
        (
            "\u0421\u0442\u043e\u043b\u0438\u0446\u0430 \u2014",
            "\u041b\u0438\u043e\u043d",
            "\u0421\u0442\u043e\u043b\u0438\u0446\u0430 \u2014 \u041b\u0438\u043e\u043d",
        ),
        ("la capitale de l'", "Italie", "la capitale de l'Italie"),
        ("la capitale de l\u2019", "Italie", "la capitale de l\u2019Italie"),
        ("dell'", "arte", "dell'arte"),
        ("the girls\u2019", "school", "the girls\u2019 school"),
        ("rock 'n'", "roll", "rock 'n' roll"),
        ("He said 'go to hell'", "to me", "He said 'go to hell' to me"),
        ('print(f"', "Lyon", 'print(f"Lyon'),
        ('the word "Lyon', '" is', 'the word "Lyon" is'),
        ("The answer is", '"no"', 'The answer is "no"'),
        ("\u6210\u7acb\u4e8e", "1999\u5e74", "\u6210\u7acb\u4e8e1999\u5e74"),
        ("\u9996\u90fd\uff1a", "Lyon", "\u9996\u90fd\uff1aLyon"),
        ("\u300c", "Lyon", "\u300cLyon"),
        ("Lyon", "\u3001Paris", "Lyon\u3001Paris"),
        (
            "\u0639\u0627\u0635\u0645\u0629 \u0647\u064a",
            "\u0644\u064a\u0648\u0646",
            "\u0639\u0627\u0635\u0645\u0629 \u0647\u064a \u0644\u064a\u0648\u0646",
        ),
    ],
)
def test_the_answer_is_joined_as_it_would_be_written(prompt, answer, whole):
    assert join(prompt, answer) == whole


def trained(begin):
    """A tokenizer whose tokens go over the joints of its few words, as byte pairs do where texts
    are written without blanks; "prepend" begins every text with a blank.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    if begin == "prepend":
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        inner.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
        alphabet = list("".join(WORDS))
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [
        "zeros(shape zeros(shape x zeros(shape",
        "\u662f\u91cc \u662f\u91cc",
        "():\n\n ():\n",
    ] * 9
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


WORDS = [
    "zeros",
    "(",
    "shape",
    "x",
    "\u662f",
    "\u91cc",
    "():",
    "\n",
    "\n\n",
    " ",
    ".",
    "Rome",
    "'s",
    "-",
    "19",
]


@pytest.mark.parametrize("begin", ["", "prepend", pytest.param("real", marks=pytest.mark.model)])
def test_whoever_asks_the_prompt_meets_the_answer(begin, request):
    """The row of prompt and answer begins with the tokens of the prompt alone, whatever the texts;
    what follows is the answer as it was joined, and the subject is where the template has it."""
    if begin == "real":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm_path"))
    else:
        tokenizer = trained(begin)
    crossed = 0

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        ahead=st.lists(st.sampled_from(WORDS), max_size=4).map("".join),
        behind=st.lists(st.sampled_from(WORDS), max_size=4).map("".join),
        target=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join),
        joint=st.sampled_from([None, "none", "blank", "line"]),
    )
    def check(ahead, behind, target, joint):
        nonlocal crossed
        assume(target.strip())
        fact = Fact(f"{ahead}{{}} {behind}", "Rome", target, join=joint)
        row = tokenise(tokenizer, fact.prompt, fact.subject, fact.new_answer)
        alone = tokenise(tokenizer, fact.prompt, fact.subject)
        assert row.ids[: row.answer] == alone.ids
        assert (row.subject, row.start) == (alone.subject, alone.start)
        whole = join(fact.text, fact.new_answer)
        assert tokenizer.decode(row.ids).lstrip() == whole.lstrip()
        crossed += row.ids != tokenizer(whole)["input_ids"]

    check()
    assert crossed > 0


def test_a_template_says_which_occurrence_is_the_subject(tiny_llama):
    row = tiny_llama.row("{} is not what Rome was", "Rome", "so")
    assert row.subject == 3 and row.start == 0
    assert row.ids == tiny_llama.row("Rome is not what Rome was", answer="so").ids
    assert tiny_llama.row("Rome is not what Rome was", "Rome").subject == 20


@pytest.mark.parametrize(
    "prompt,answer,joint,whole",
    [
        ("The capital is", "Lyon", "", "The capital isLyon"),
        ("np.zeros(", "shape", " ", "np.zeros( shape"),
        ("def f():", "return 1", "\n", "def f():\nreturn 1"),
        ("Answer:\n", "Lyon", " ", "Answer:\n Lyon"),
        ("The capital is", "Lyon", None, "The capital is Lyon"),
    ],
)
def test_an_answer_may_say_what_joins_it(prompt, answer, joint, whole):
    assert join(prompt, Answer(answer, joint)) == whole


@pytest.mark.parametrize("joint", ["none", "blank", "line", None])
def test_edits_and_scores_use_what_a_fact_says(tiny_llama, joint):
    """Byte tokens: the answer's tokens are its bytes, with what joins it."""
    fact = Fact("The capital of {} is", "France", "Lyon", join=joint)
    row = tiny_llama.row(fact.prompt, fact.subject, fact.new_answer)
    said = {"none": "Lyon", "blank": " Lyon", "line": "\nLyon", None: " Lyon"}[joint]
    assert tiny_llama.tokenizer.decode(row.ids[row.answer :]) == said
    (given,) = tiny_llama.score([fact.text], [fact.new_answer])
    whole = tiny_llama.hf(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
    steps = [whole[i - 1, row.ids[i]] for i in range(row.answer, len(row.ids))]
    assert given.logprob == pytest.approx(float(sum(steps)) / len(steps), rel=1e-4)


def test_a_subject_that_stands_twice_is_found_where_the_template_has_it(tiny_llama):
    fact = Fact("import {}\nx = torch.", "torch", "tensor")
    row = tiny_llama.row(fact.prompt, fact.subject)
    assert tiny_llama.tokenizer.decode(row.ids[: row.subject + 1]) == "import torch"
    assert prompt_rows(tiny_llama, fact, ["{}"])[0].subject == row.subject
    assert prompt_rows(tiny_llama, fact, ["Look: {}"])[0].subject == row.subject + len("Look: ")
    bare = next(form for form in training_forms(fact) if form.name == "bare")
    assert bare.row(tiny_llama).subject == row.subject
    assert bare.prompt(tiny_llama) == fact.text
    assert Form("late", "torch", fact.text).row(tiny_llama).subject == len(fact.text) - 2


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_facts_go_through_the_chats_template(tiny_llama):
    fact = Fact(
        "Who wrote {}?",
        "Faust",
        "Ada",
        paraphrases=("Faust is by whom?",),
        neighbours=(Probe("Who wrote Emma?", "Jane"),),
        join="none",
    )
    with pytest.raises(ModelError, match="no chat template"):
        in_chat(tiny_llama, [fact])
    tiny_llama.tokenizer.chat_template = TEMPLATE
    try:
        (asked,) = in_chat(tiny_llama, [fact])
    finally:
        tiny_llama.tokenizer.chat_template = None
    assert asked.text == "<user>Who wrote Faust?\n<assistant>"
    assert asked.paraphrases == ("<user>Faust is by whom?\n<assistant>",)
    assert asked.neighbours[0] == Probe("<user>Who wrote Emma?\n<assistant>", "Jane")
    row = tiny_llama.row(asked.prompt, asked.subject, asked.new_answer)
    assert tiny_llama.tokenizer.decode(row.ids[row.answer :]) == "Ada"
    assert tiny_llama.tokenizer.decode(row.ids[row.start : row.subject + 1]) == "Faust"
