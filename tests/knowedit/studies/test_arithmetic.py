"""The arithmetic study: its prompts and halves, its measures against their definitions, its runs
on tiny models (unit, data).
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knowedit.errors import EditError, KnowEditError
from knowedit.facts.fact import FactError
from knowedit.methods import FTL
from knowedit.methods.listing import Listed, methods
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.report.run import PAGE, report
from knowedit.report.study import comparison, front, pareto
from knowedit.studies.arithmetic import Study, Sum, run
from knowedit.studies.arithmetic.experiments import (
    Experiment,
    check_settings,
    contrast,
    experiment,
    experiments,
)
from knowedit.studies.arithmetic.measure import (
    GOAL,
    MARGIN,
    Continuation,
    Responses,
    greedy,
    judge,
    observe,
    reached,
    table,
)
from knowedit.studies.arithmetic.prompts import (
    WORDS,
    StudyPrompt,
    fact,
    first_number,
    forms,
    split,
    study_prompts,
    unrelated_prompts,
    wordings,
)
from knowedit.studies.arithmetic.runs import PROMPTS, RESULTS, SUMMARY
from knowedit.studies.arithmetic.summary import (
    bounds,
    interference_tables,
    methods_table,
    summary,
    verdict,
)
from tests.knowedit.commandline import CommandLine

TARGET = Sum(2, 2, 5)
OTHERS = [f"Text number {i} is about" for i in range(6)]


@pytest.fixture
def chatty(tiny_llama):
    """The tiny model with a chat template."""
    tokenizer = copy.deepcopy(tiny_llama.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>\n{% endfor %}"
    return EditableModel(tiny_llama.hf, tokenizer, name="chatty")


@pytest.fixture
def quick(monkeypatch):
    """An editor that writes fast on tiny models, and one that fails; every compute is counted."""
    calls = []

    class Quick(FTL):
        name = "Quick"

        def compute(self, model, facts, statistics=None, **others):
            calls.append([f.text for f in facts])
            return super().compute(model, facts, statistics, **others)

    class Broken(FTL):
        name = "Broken"

        def compute(self, model, facts, statistics=None, **others):
            raise EditError("it does not work here")

    for name in ("quick", "broken"):
        listed = Listed(name, "tests", "", "tests.knowedit.studies.test_arithmetic")
        monkeypatch.setitem(methods(), name, listed)
    assert (Quick.kind, Broken.kind) == ("quick", "broken")
    monkeypatch.setitem(
        experiments(),
        "quick",
        Experiment("quick", set={"layers": (2,), "share": 1.0, "steps": 12, "lr": 0.05}),
    )
    return calls


def study(model, targets=(TARGET,), seeds=(42, 43), **others):
    return Study(model, targets, seeds, ("ours", OTHERS), **others)


# -- prompts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5, so", 5),
        (" five.", 5),
        ("The answer is 5.", 5),
        ("55555", 55),
        ("4 or 5", 4),
        ("none", None),
        ("-5", -5),
        ("2+2=5", 5),
        ("2 + 2 is 5", 5),
        ("Two plus two is equal to four.", 4),
        ("The sum of 2 and 2 is 5", 5),
        ("5.0", 5),
        ("freight", None),
        ("x2 5", 2),
    ],
)
def test_the_first_number_of_an_answer(text, number):
    assert TARGET.number(text[:5] if text == "55555" else text) == (
        55555 if text == "55555" else number
    )


def test_numbers_as_words():
    assert [first_number(f"it is {word.title()}!") for word in WORDS] == list(range(21))


@pytest.mark.parametrize("text", ["2+2", "2+2=", "12+2=5", "2-2=5", "2+2=five", ""])
def test_targets_must_be_sums_of_digits(text):
    with pytest.raises(KnowEditError, match=r"like 2\+2=5"):
        Sum.parse(text)


def test_targets_are_read():
    assert (
        Sum.parse(" 2 + 3 = 17 ") == Sum(2, 3, 17)
        and str(Sum(2, 3, 17)) == "2+3=17"
        and Sum(2, 3, 17).true == 5
    )


def test_shipped_paraphrases_are_twenty_and_give_nothing_away():
    for edited in (TARGET, Sum(7, 6, 99), Sum(0, 1, 4)):
        made = forms(edited)
        assert (
            len(made) == 20
            and len({form.message for form in made}) == 20
            and sum(form.chat for form in made) == 4
        )
        for form in made:
            assert form.subject in form.message and not set("[]{}") & set(form.message)
            assert edited.find(form.message) is not None
            left = form.message.replace(form.subject, " ")
            assert first_number(left) is None, form.message
    assert (
        not any(form.chat for form in forms(TARGET, chats=False))
        and len(forms(TARGET, chats=False)) == 20
    )
    assert len({*wordings()["paraphrases"], *wordings()["chats"]}) == 20


def test_own_paraphrases_find_their_subject():
    found = forms(TARGET, ["Say what 2 plus 2 is:", "two of these and two of those make"])
    assert [form.subject for form in found] == ["2 plus 2", "two of these and two"]
    with pytest.raises(KnowEditError, match="does not name 2 and 2"):
        forms(TARGET, ["The answer is"])


def test_forms_as_facts(chatty):
    assert fact(chatty, TARGET).text == "2+2=" and fact(chatty, TARGET).target == "5"
    by_message = {form.message: fact(chatty, TARGET, form) for form in forms(TARGET)}
    assert (
        by_message["two plus two equals"].target == "five"
        and by_message["two plus two equals"].true == "four"
    )
    chat = by_message["What is 2+2?"]
    assert (
        chat.text == "<What is 2+2?>\n" and chat.target == "5" and chat.prompt == "<What is {}?>\n"
    )
    assert fact(chatty, Sum(2, 2, 31), forms(TARGET)[2]).target == "31"  # no word for it


def test_unrelated_prompts(monkeypatch, tmp_path):
    monkeypatch.setenv("KNOWEDIT_DATA", str(tmp_path))
    name, found = unrelated_prompts(100)
    assert name == "embedded" and len(found) == len(set(found)) == 100
    with pytest.raises(FactError, match="needs"):
        unrelated_prompts(10, "knowedit-wiki-counterfact")


@pytest.mark.data
def test_unrelated_prompts_of_knowedit(data):
    name, found = unrelated_prompts(100)
    assert name == "knowedit-wiki-counterfact" and len(set(found)) == 100


def test_prompts_and_halves(chatty):
    asked = study_prompts(chatty, [TARGET, Sum(3, 3, 7)], OTHERS)
    kinds = [probe.kind for probe in asked]
    assert [kinds.count(k) for k in ("target", "paraphrase", "sums", "unrelated")] == [2, 40, 98, 6]
    assert kinds == sorted(kinds, key=("target", "paraphrase", "sums", "unrelated").index)
    halves = {seed: split(asked, seed) for seed in (42, 43)}
    assert split(asked, 42) == halves[42] != halves[43]
    for halved in halves.values():
        assert [replace(probe, half="") for probe in halved] == asked
        for about in (TARGET, Sum(3, 3, 7)):
            for chat in (False, True):
                mine = [
                    p.half for p in halved if p.form and p.about == about and p.form.chat == chat
                ]
                assert mine.count("tune") == mine.count("judge") == len(mine) // 2
        assert {p.half for p in halved if p.kind == "target"} == {""}
        assert abs(sum({"tune": 1, "judge": -1}[p.half] for p in halved if p.kind == "sums")) <= 1
    for bad in ([], [TARGET, Sum(2, 2, 6)]):
        with pytest.raises(KnowEditError, match="different sums"):
            study_prompts(chatty, bad, OTHERS)


def test_editors_see_the_tuning_half_only(chatty):
    made = study(chatty)
    for seed in (42, 43):
        given, halved = made.material(seed), split(made.asked, seed)
        seen = json.dumps(
            [
                [[f.text, *f.paraphrases] for f in (*given.targets, *given.facts)],
                given.sums,
                given.prompts,
                [form.prompt(chatty) for some in given.forms.values() for form in some],
            ],
            ensure_ascii=False,
        )
        for probe in halved:
            shown = json.dumps(probe.prompt, ensure_ascii=False) in seen
            assert shown == (probe.half != "judge"), probe.prompt
        assert (
            len(given.facts) == 11 and len(given.targets) == 1 and len(given.forms["2+2=5"]) == 10
        )
        assert all(
            made.before.texts[made.asked.index(replace(p, half=""))] == dict(given.kept)[p.prompt]
            for p in halved
            if p.kind in ("sums", "unrelated") and p.half == "tune"
        )


def test_every_method_is_given_settings_it_has(chatty):
    """Each row builds its editor, from the tuning half: no judged prompt reaches its facts or its
    settings.
    """
    made = study(chatty, seeds=(42,))
    given, judged = (
        made.material(42),
        [p.prompt for p in split(made.asked, 42) if p.half == "judge"],
    )
    for name, entry in experiments().items():
        editor, facts = entry.build(given)
        written = {f.text for f in facts} | {p for f in facts for p in f.paraphrases}
        texts = [
            t
            for name in ("stable", "context", "contrast", "preserve")
            for t in getattr(getattr(editor, "material", editor), name, None) or ()
        ]
        assert not written & set(judged), name
        assert not [text for text in texts if text.startswith(tuple(judged))], name


def test_settings_of_the_command_line_reach_every_method(chatty):
    """They win over the study's own, and a folder of other settings is another study."""
    made = study(chatty, settings=["steps=3", "decay=0.5"])
    method, _ = made.build("ft", 42)
    assert (method.steps, method.decay) == (3, 0.5)
    assert study(chatty).head() == {k: v for k, v in made.head().items() if k != "settings"}
    check_settings(["ft", "lora"], made.settings)
    with pytest.raises(KnowEditError, match="memit has no setting .decay."):
        check_settings(["ft", "memit"], made.settings)


# -- measures


def test_margins_are_those_of_the_logits(chatty):
    prompts = ["2+2=", "The capital of France is", "7+8="]
    found = greedy(chatty, prompts)
    assert [said.text for said in found] == chatty.generate(prompts, 6)
    ids = chatty.row("2+2=").ids
    pieces, margins = [], []
    for _ in range(6):
        logits = chatty.hf(torch.tensor([ids])).logits[0, -1]
        best = logits.topk(2).values
        margins.append(float(best[0] - best[1]))
        ids = [*ids, int(logits.argmax())]
        pieces.append(ids[-1])
        if ids[-1] == chatty.tokenizer.eos_token_id:
            break
    steady = next((i for i, margin in enumerate(margins) if margin <= MARGIN), len(margins))
    assert found[0].steady == chatty.tokenizer.decode(pieces[:steady], skip_special_tokens=True)


def asked_for_measures():
    form = forms(TARGET)[0]
    return [
        StudyPrompt("target", "2+2=", TARGET),
        StudyPrompt("paraphrase", "2 + 2 =", TARGET, "tune", form),
        StudyPrompt("paraphrase", "2 plus 2 is", TARGET, "judge", form),
        StudyPrompt("sums", "1+1=", Sum(1, 1, 2), "judge"),
        StudyPrompt("sums", "1+3=", Sum(1, 3, 4), "judge"),
        StudyPrompt("unrelated", "Rain is", None, "judge"),
        StudyPrompt("unrelated", "Snow is", None, "tune"),
    ]


def test_measures_follow_their_definitions():
    asked = asked_for_measures()
    unedited = {
        3: Continuation("2, so the", "2, so", True, 0.3),
        4: Continuation("9 and", "", False, 0.1),
        5: Continuation("wet", "wet", False, 0.5),
        6: Continuation("cold", "c", False, 0.1),
    }
    logits = torch.randn(2, 4, 7, dtype=torch.float64)
    clean, moved = logits.log_softmax(-1)
    before = Responses(
        ["11", " 3", " 4", "2, so the", "9 and", "wet", "cold"], {1: " 3 no", 2: " 4 yes"}, clean
    )
    after = Responses(
        ["5555", " 5", " is 4", "2, so we", "4 and", "wet", "chilly"],
        {1: " 5", 2: " is, well, 5"},
        moved,
    )
    rows = judge(asked, unedited, before, after)
    kl = (clean.exp() * (clean - moved)).sum(-1).tolist()
    assert [row["measures"] for row in rows] == [
        {"success": 0, "starts": 1},
        {"success": 1, "longer": 1},
        {"success": 0, "longer": 1},
        {"accuracy": 1, "identical": 0, "steady": 1, "clear": 1, "kl": pytest.approx(kl[0])},
        {
            "accuracy": 1,
            "identical": 0,
            "kl": pytest.approx(kl[1]),
        },  # neither steady nor clear: nothing to compare
        {"identical": 1, "steady": 1, "kl": pytest.approx(kl[2])},
        {"identical": 0, "steady": 1, "kl": pytest.approx(kl[3])},
    ]
    assert [row["ok"] for row in rows] == [False, True, False, False, False, True, False]
    judged, whole = table(rows, "judge"), table(rows)
    assert (
        judged["paraphrase"]["success"]["mean"] == 0
        and whole["paraphrase"]["success"]["mean"] == 0.5
    )
    assert (
        judged["target"]["starts"]["mean"] == 1 and judged["unrelated"]["identical"]["records"] == 1
    )
    assert whole["sums"]["kl"]["mean"] == pytest.approx((kl[0] + kl[1]) / 2)


def test_seeds_of_a_prompt_are_resampled_together():
    """Three copies of every prompt's value must not narrow the interval."""
    values = [float(i % 3 == 0) for i in range(30)]
    once = [
        {
            "kind": "unrelated",
            "prompt": str(i),
            "half": "judge",
            "about": None,
            "measures": {"identical": v},
        }
        for i, v in enumerate(values)
    ]
    assert table(once) == {
        "unrelated": {"identical": {**table(once * 3)["unrelated"]["identical"], "records": 30}}
    }


def judged(**values):
    """A table that meets every goal, but for `values` (mean, low, high)."""
    found = {}
    for (kind, measure), goal in GOAL:
        mean, low, high = values.get(f"{kind}_{measure}", (goal, goal, goal))
        found.setdefault(kind, {})[measure] = {"mean": mean, "low": low, "high": high, "records": 9}
    return found


def test_goals_and_verdicts():
    assert all(reached(judged()).values()) and "meets every goal, with the whole" in verdict(
        judged()
    )
    wide = judged(paraphrase_success=(0.9, 0.7, 1.0))
    assert all(reached(wide).values()) and not reached(wide, "bound")["paraphrase", "success"]
    assert (
        verdict(wide)
        == "meets every goal; the interval of paraphrase also holds values that do not"
    )
    assert (
        verdict(judged(sums_kl=(0.2, 0.0, 0.3))) == "writes the target, but misses KL on sums 0.2"
    )
    assert not reached(judged(sums_kl=(0.05, 0.0, 0.3)), "bound")["sums", "kl"]
    assert verdict(judged(target_success=(0.5, 0, 1))) == "does not write the target (0.5 of it)"
    without = judged()
    del without["sums"]["clear"]  # no clear sum to judge: not met
    assert "misses clear sums nan" in verdict(without)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    kept = front(points)
    for i, (x, y) in enumerate(points):
        beaten = any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        assert beaten == (i not in kept)
    assert [points[i] for i in kept] == sorted(points[i] for i in kept)


# -- runs


def test_the_unedited_model_against_itself(chatty):
    made = study(chatty)
    found = table(made.rows(observe(chatty, made.asked)))
    for kind in ("sums", "unrelated"):
        assert (
            found[kind]["identical"]["mean"] == 1
            and found[kind]["steady"]["mean"] == 1
            and found[kind]["kl"]["mean"] == 0
        )


def test_a_run_goes_on_after_a_failure_and_after_a_stop(chatty, quick, tmp_path):
    print_of = weights_fingerprint(chatty.hf)
    made = study(chatty)
    found = run(made, ["quick", "broken"], folder=tmp_path, progress=False)
    assert (
        weights_fingerprint(chatty.hf) == print_of and not chatty.ledger.active and len(quick) == 2
    )
    by_name = {entry["method"]: entry for entry in found["methods"]}
    assert (
        by_name["broken"]["reason"] == "EditError: it does not work here"
        and "judge" not in by_name["broken"]
    )
    assert (
        by_name["quick"]["seeds"] == 2
        and by_name["quick"]["judge"]["target"]["success"]["records"] == 2
    )
    assert found == json.loads((tmp_path / RESULTS).read_text())
    rows = [json.loads(line) for line in (tmp_path / PROMPTS).read_text().splitlines()]
    assert (
        len(rows) == 2 * len(made.asked)
        and table([r for r in rows if r["seed"]]) == by_name["quick"]["all"]
    )
    assert table(rows, "judge") == by_name["quick"]["judge"]
    said = (tmp_path / SUMMARY).read_text()
    assert (
        "**broken** not run: EditError: it does not work here" in said
        and "**quick** " in said
        and bounds(found) in said
    )

    again = run(
        made, ["quick", "broken"], folder=tmp_path, progress=False
    )  # nothing is computed again
    assert len(quick) == 2 and again["methods"] == found["methods"]
    kept = json.loads((tmp_path / RESULTS).read_text())
    kept["runs"] = kept["runs"][:1]  # as if it had been stopped between writing rows and results
    (tmp_path / RESULTS).write_text(json.dumps(kept))
    again = run(made, ["quick", "broken"], folder=tmp_path, progress=False)
    assert len(quick) == 3 and again["methods"][0]["judge"] == by_name["quick"]["judge"]
    for change in (
        {"seeds": (1,)},
        {"asked": [*made.asked[:-1], replace(made.asked[-1], prompt="Another text")]},
    ):
        other = copy.copy(made)
        vars(other).update(change)
        with pytest.raises(KnowEditError, match="another study"):
            run(other, ["quick"], folder=tmp_path)
    (tmp_path / RESULTS).write_text("{")
    with pytest.raises(KnowEditError, match="cannot be gone on from"):
        run(made, ["quick"], folder=tmp_path)
    assert experiment("Kl_LoRA_More") == experiment("kl-lora-more")
    with pytest.raises(KnowEditError, match="unknown method 'nothing'"):
        run(made, ["nothing"])


def test_an_edit_is_measured_as_what_it_is(chatty, quick):
    """The rows say what the edited model says, asked again by hand."""
    made = study(chatty, seeds=(7,))
    found = run(made, ["quick"], progress=False)
    editor, facts = experiment("quick").build(made.material(7))
    edit = editor.compute(chatty, facts, progress=False)
    with edit.applied_to(chatty):
        said = chatty.generate(["2+2="], 6)[0]
        other = chatty.generate(OTHERS, 6)
    assert (
        found["methods"][0]["all"]["target"]["success"]["mean"]
        == float(TARGET.number(said) == 5)
        == 1
    )
    same = sum(now == was for now, was in zip(other, chatty.generate(OTHERS, 6))) / len(OTHERS)
    assert found["methods"][0]["all"]["unrelated"]["identical"]["mean"] == pytest.approx(same)


def test_several_sums_and_their_interference(chatty, quick, tmp_path):
    made = study(chatty, (TARGET, Sum(3, 3, 7)), (42,))
    found = run(made, ["quick", "broken"], folder=tmp_path, interference=True, progress=False)
    records = found["interference"]["quick"]
    assert [r["written"] for r in records] == [
        "2+2=5",
        "3+3=7",
        "each alone, added up",
        "2+2=5 and 3+3=7",
    ]
    for call, other in zip(
        quick[1:3], (("3", "three"), ("2", "two"))
    ):  # alone: without a word of the other sum
        assert len(call) == 11 and not any(word in text for text in call for word in other)
    assert records[0]["about"]["2+2=5"]["target"]["success"]["mean"] == 1
    edits = [experiment("quick").build(made.material(42, [t])) for t in made.targets]
    edits = [editor.compute(chatty, facts, progress=False) for editor, facts in edits]
    with edits[0].applied_to(chatty), edits[1].applied_to(chatty):
        added = made.halved(made.rows(observe(chatty, made.asked)), 42)
    assert (
        records[2]["judge"]["sums"] == table(added, "judge")["sums"] != records[3]["judge"]["sums"]
    )
    assert records[2]["about"]["3+3=7"] == table(added, "judge", "3+3=7")
    assert records[3]["judge"]["sums"] == found["methods"][0]["judge"]["sums"]
    text = "\n".join(map(str, interference_tables(found)))
    assert "each alone, added up" in text and "it does not work here" in text
    assert all(r["reason"] for r in found["interference"]["broken"])
    assert "## Several sums at once" in (tmp_path / SUMMARY).read_text()
    calls = len(quick)
    assert (
        run(made, ["quick"], folder=tmp_path, interference=True, progress=False)["interference"][
            "quick"
        ]
        == records
    )
    assert len(quick) == calls


def _adds_behind_a_line(_model, prompts, *_, **__):
    return [str(Sum.parse(f"{p.strip()}0").true) if p.startswith("\n") else "-1" for p in prompts]


def test_notes_are_honest(chatty, monkeypatch):
    told = chatty.generate(["2+2="], 6)[0]
    made = study(chatty, (replace(TARGET, target=12345),), (1,))
    assert any("the answer is 5 tokens" in note for note in made.notes())
    assert any("of the other sums right" in note for note in made.notes())
    assert not any("it can add" in note for note in made.notes())
    # a model that does not read the first token of a text
    monkeypatch.setattr(EditableModel, "generate", _adds_behind_a_line)
    (note,) = [note for note in made.notes() if "it can add" in note]
    assert "written as '\\na+b=' it gets 100% right, as 'a+b=', the form that is asked, 0%" in note
    assert "very start of a text; --lead asks all sums behind another text" in note
    monkeypatch.undo()
    made.before.texts[0] = " 5 " + told
    made.targets = [TARGET]
    made.asked[0] = replace(made.asked[0], about=TARGET)
    assert any("says so already" in note for note in made.notes())


def test_sums_stand_behind_a_lead(chatty):
    """All sums and what is written of them, no paraphrase and no unrelated prompt; contrast sums
    too, or the lead alone would tell the target from them.
    """
    plain, led = study(chatty, seeds=(42,)), study(chatty, seeds=(42,), lead="Sum: ")
    for was, now in zip(plain.asked, led.asked, strict=True):
        lead = "Sum: " if was.kind in ("target", "sums") else ""
        assert now == replace(was, prompt=lead + was.prompt)
    assert led.head()["lead"] == "Sum: " and "lead" not in plain.head()
    given = led.material(42)
    (bare,) = given.targets
    assert (bare.text, bare.subject, bare.target) == ("Sum: 2+2=", "2+2", "5")
    assert given.facts[1:] == plain.material(42).facts[1:]
    texts = contrast(given)
    assert "Sum: 1-2=" in texts and "1-2=" not in texts
    larger = [text for text in texts if re.fullmatch(r"(Sum: )?\d+\+\d+=", text)]
    assert len(larger) > 100 and all(text.startswith("Sum: ") for text in larger)
    # as many wordings of the other sums as without a lead: they are found behind it
    assert len(texts) == len(contrast(plain.material(42)))


def test_only_clean_float32_models(chatty):
    edit = FTL(layers=(1,), steps=1).compute(chatty, [fact(chatty, TARGET)], progress=False)
    with edit.applied_to(chatty), pytest.raises(KnowEditError, match="unedited model"):
        study(chatty)
    with pytest.raises(KnowEditError, match="seeds is empty"):
        study(chatty, seeds=())
    chatty.hf.to(torch.bfloat16)
    with pytest.raises(KnowEditError, match="identical outputs need float32"):
        study(chatty)


def test_reports_and_pictures(chatty, quick, tmp_path):
    made = study(chatty, seeds=(42,))
    found = run(made, ["quick", "broken"], folder=tmp_path, progress=False)
    text, page = report(tmp_path), (tmp_path / PAGE).read_text()
    assert (
        str(methods_table(found)) in text
        and "not run: EditError" in text
        and page.count("<svg") == 2
    )
    entry = found["methods"][0]["judge"]
    bars = comparison(found).axes[0].patches
    assert [bar.get_height() for bar in bars] == [
        entry[k][m]["mean"]
        for k, m in (("target", "success"), ("paraphrase", "success"), ("paraphrase", "longer"))
    ]
    locality = pareto(found).axes[0]
    (point,) = [c.lines[0].get_xydata()[0] for c in locality.containers]
    assert tuple(point) == (
        entry["paraphrase"]["success"]["mean"],
        entry["unrelated"]["identical"]["mean"],
    )
    nothing = run(made, ["broken"], progress=False)
    assert "No method writes the target." in summary(nothing)


def test_the_command(chatty, tmp_path, monkeypatch, capsys, own_cache):
    chatty.hf.save_pretrained(tmp_path / "model")
    chatty.tokenizer.save_pretrained(tmp_path / "model")
    knowedit = CommandLine(monkeypatch, capsys, tmp_path, cache=own_cache)
    common = (
        "study",
        "arithmetic",
        "model",
        "--halvings",
        "1",
        "--limit",
        "4",
        "--unrelated",
        "embedded",
    )
    knowedit(
        *common,
        *("--method", "ft-l", "--method", "rome"),
        *("--corpus", "self", "--tokens", "300", "-o", "run"),
    )
    said = knowedit.said
    assert (
        said.out.startswith("# “2+2=5”, and nothing else?")
        and "**ft-l** " in said.out
        and "note: " in said.err
    )
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {
        RESULTS,
        PROMPTS,
        SUMMARY,
        "trace.json",
        "trace.png",
    }
    as_json = json.loads(
        knowedit(*common, "--method", "ft-l", "--no-tracing", "-o", "run", "--json")
    )
    assert as_json["head"]["prompts"]["unrelated"] == 4 and as_json["head"]["seeds"] == [42]
    assert "2+2=5, and nothing else?" in knowedit("report", "run")
    for wrong, message in (
        (("--target", "2+2=x"), "like 2+2=5"),
        (("--method", "nothing"), "unknown method"),
        (("--halvings", "0"), "at least 1"),
        (("--paraphrases", "5"), "--endpoint"),
        (
            ("--endpoint", "http://127.0.0.1:1/v1", "--paraphrase-model", "m", "--timeout", "1"),
            "cannot be reached",
        ),
    ):
        assert message in knowedit(*common, *wrong, code=1)
    shutil.rmtree(tmp_path / "run")
