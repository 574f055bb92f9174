"""Unit: general ability before and after; the bundled items, and lm-eval: the package itself where
it is installed, else a stand-in that asks and answers as it does.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.errors import KnowEditError
from knowedit.evaluation.ability import ability, harness
from knowedit.evaluation.ability.ability import AbilityTasks, evaluate_ability, headline
from knowedit.evaluation.ability.harness import Harness, Replies
from knowedit.evaluation.ability.items import Item, bundled, chance, marks
from knowedit.evaluation.baseline import Baseline, Scope
from knowedit.evaluation.protocols import RESULTS, run, write_run
from knowedit.evaluation.saved import compare
from knowedit.facts.fact import Fact
from knowedit.facts.sets import load
from knowedit.methods.registry import make_method
from knowedit.report.run import _ability, _trajectory
from tests.knowedit.methods.test_locate import FACTS, statistics_of

ITEM = Item("knowledge", "The sky is", "blue", ("square", "a loud noise"))


def an_edit(model):
    torch.manual_seed(0)
    change = LowRank(9 * torch.randn(32, 1), torch.randn(48, 1))
    fact = Fact("The capital of {} is", "France", "Lyon")
    return Edit("TEST", {model.layout.weight_name(1): change}, [fact], model.fingerprint)


def test_the_bundled_items_are_well_formed():
    assert {task: len(items) for task, items in bundled().items()} == {
        "knowledge": 40,
        "cloze": 40,
        "reading": 40,
        "sentiment": 40,
    }
    assert [chance(items) for items in bundled().values()] == [0.25, 0.25, 0.25, 0.5]
    every = [item for items in bundled().values() for item in items]
    assert len({item.prompt for item in every}) == 160
    assert all(
        len({c.strip().lower() for c in item.choices}) == len(item.choices) for item in every
    )
    assert sum(item.answer == "positive" for item in bundled()["sentiment"]) == 20
    facts = {(fact.subject, fact.true) for fact in load("embedded") if fact.true}
    assert not [
        item for item in every for s, true in facts if s in item.prompt and true in item.choices
    ]


def test_marks_by_hand(tiny_llama):
    """The choice is the likeliest answer a token; p(right) its share among all of them."""
    other = Item("cloze", "Ice is", "hot", ("cold",))
    found = marks(tiny_llama, [ITEM, other])
    for n, item in enumerate((ITEM, other)):
        rated = []
        for choice in item.choices:
            row = tiny_llama.row(item.prompt, answer=choice)
            logp = tiny_llama.hf(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            tokens = range(row.answer, len(row.ids))
            rated.append(np.mean([float(logp[t - 1, row.ids[t]]) for t in tokens]))
        assert found["accuracy"][n] == (rated[0] > max(rated[1:]))
        share = math.exp(rated[0]) / sum(map(math.exp, rated))
        assert found["p(right)"][n] == pytest.approx(share, rel=1e-4)
    same = Item("cloze", "Ice is", "hot", ("hot ",))
    assert marks(tiny_llama, [same])["accuracy"] == [0.0]  # as likely is not likelier


def test_before_after_and_the_change_of_the_same_items(tiny_llama):
    edit = an_edit(tiny_llama)
    found = evaluate_ability(tiny_llama, edit, ["sentiment", "cloze"], limit=6)
    assert not tiny_llama.ledger.active
    assert list(found.after) == ["cloze", "sentiment", "all"]
    assert found.chance == {"cloze": 0.25, "sentiment": 0.5, "all": pytest.approx(0.375)}
    items = [*bundled()["cloze"][:6], *bundled()["sentiment"][:6]]
    was = marks(tiny_llama, items)["p(right)"]
    with edit.applied_to(tiny_llama):
        now = marks(tiny_llama, items)["p(right)"]
    for name, values in {"before": was, "after": now, "change": now - was}.items():
        told = getattr(found, name)["all"]["p(right)"]
        assert told.mean == pytest.approx(values.mean(), abs=1e-6) and told.records == 12
        assert headline(found.to_dict(), name) == getattr(found, name)["all"]["accuracy"]
    assert found.change["all"]["p(right)"].mean != 0
    assert "chance" in str(found) and "0.375" in str(found)
    tasks = AbilityTasks(["sentiment", "cloze"], 6)
    baseline = Baseline(tiny_llama, FACTS[:1], ability=tasks, progress=False)
    saved = compare(baseline, edit.applied_to(tiny_llama), progress=False)
    assert saved.ability == found


def test_no_change_of_few_items_is_not_certain():
    none = ability._change(np.zeros(10), "accuracy")
    assert (none.mean, none.high) == (0, pytest.approx(1 - 0.025**0.1)) and none.low == -none.high
    some = ability._change(np.array([1.0, -1.0, 0.0, 0.0]), "accuracy")
    assert some.mean == 0 and some.low < 0 < some.high


def test_in_a_sequence_and_in_reports(tiny_llama, tmp_path):
    method = make_method({"kind": "memit", "layers": [1], "target": {"steps": 1}})
    scope = Scope(ability=("cloze", "sentiment"), ability_items=3)
    baseline = scope.baseline(tiny_llama, FACTS[:4], scope.tasks(), progress=False)
    statistics = statistics_of(tiny_llama, [1])
    found = run(baseline, statistics, method, "sequential", batch=2, every=2, progress=False)
    steps = [step.measures["ability"]["accuracy"] for step in found.trajectory]
    assert steps[0] == found.ability.before["all"]["accuracy"] and steps[0].records == 6
    assert steps[-1] == found.ability.after["all"]["accuracy"]
    write_run(tmp_path, [found])
    (record,) = json.loads((tmp_path / RESULTS).read_text())
    assert record["ability"]["chance"] == {"cloze": 0.25, "sentiment": 0.5, "all": 0.375}
    values, changes, by_chance = _ability({"MEMIT": record["ability"]})
    assert values.heads[2].header == "unedited" and "change, item by item" in str(changes)
    assert by_chance == "by chance: cloze 0.250, sentiment 0.500, all 0.375"
    assert "general ability" in str(found)
    assert "general ability" in str(_trajectory("MEMIT", record["trajectory"]))


@pytest.mark.parametrize(
    "names, limit, whole, message",
    [
        (["clozes"], None, True, "unknown task 'clozes'; did you mean 'cloze'"),
        (["all"], None, False, "the protocol batch or sequential"),
        ([], 3, True, "give --ability all"),
    ],
)
def test_what_cannot_be_measured_is_refused(names, limit, whole, message):
    with pytest.raises(KnowEditError, match=message):
        Scope(ability=names, ability_items=limit).tasks(whole)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KnowEditError, match=r"'arc_easy' is one of lm-eval, .*\[ability\]"):
        AbilityTasks(["lm-eval:arc_easy"])


class StandIn:
    """As much of lm-eval 0.4 as is asked of it: multiple choice from a JSON file, and texts."""

    class LM:
        def __init__(self):
            self.rank, self.world_size = 0, 1

    class TaskManager:
        def __init__(self, include_defaults=True):
            assert not include_defaults  # its index takes seconds: only where a name is looked up

    @staticmethod
    def simple_evaluate(model, tasks, task_manager, limit, bootstrap_iters, log_samples):
        assert isinstance(model, StandIn.LM) and bootstrap_iters == 0 and log_samples
        (file,) = tasks
        config = yaml.safe_load(Path(file).read_text())
        name = config["task"]
        with open(config["dataset_kwargs"]["data_files"]["test"]) as lines:
            docs = [json.loads(line) for line in lines][:limit]
        samples = []
        for doc in docs:
            asked = [(doc["question"], f" {choice}") for choice in doc["choices"]]
            found = model.loglikelihood([SimpleNamespace(args=pair) for pair in asked])
            best = float(np.argmax([logprob for logprob, _ in found]) == doc["gold"])
            sample = {"filter": "none", "metrics": ["acc", "mcc"], "arguments": asked}
            samples.append({**sample, "acc": best, "mcc": (doc["gold"], best)})
        figures = {"acc,none": np.mean([sample["acc"] for sample in samples]), "mcc,none": 0.5}
        return {
            "results": {name: figures},
            "samples": {name: samples},
            "configs": {name: {"output_type": config["output_type"]}},
        }


@pytest.fixture
def lm_eval(monkeypatch):
    """The package, or its stand-in."""
    if importlib.util.find_spec("lm_eval") is not None:
        return
    package, api, model, tasks = (ModuleType(n) for n in ("lm_eval", "api", "model", "tasks"))
    package.simple_evaluate, model.LM = StandIn.simple_evaluate, StandIn.LM
    tasks.TaskManager = StandIn.TaskManager
    package.__spec__ = importlib.util.spec_from_loader("lm_eval", None)
    modules = {"": package, ".api": api, ".api.model": model, ".tasks": tasks}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)


def test_a_task_of_lm_eval_in_the_same_table(tiny_llama, tmp_path, lm_eval):
    docs = [
        {"question": "The sky is", "choices": ["blue", "square", "loud"], "gold": 0},
        {"question": "Ice is", "choices": ["hot", "cold"], "gold": 1},
        {"question": "A cat says", "choices": ["moo", "meow"], "gold": 1},
    ]
    (tmp_path / "tiny.jsonl").write_text("\n".join(map(json.dumps, docs)))
    metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "tiny.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [*metrics, {"metric": "mcc"}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(task))
    edit = an_edit(tiny_llama)
    names = ["sentiment", f"lm-eval:{tmp_path / 'tiny.yaml'}"]
    found = evaluate_ability(tiny_llama, edit, names, limit=2)
    assert list(found.after) == ["sentiment", "lm-eval:tiny_choice"]
    assert found.chance["lm-eval:tiny_choice"] == pytest.approx((1 / 3 + 1 / 2) / 2)

    def right(doc):
        sums = []
        for choice in doc["choices"]:
            (score,) = tiny_llama.score([doc["question"]], [choice])
            sums.append(score.logprob * len(score.choices))
        return int(np.argmax(sums)) == doc["gold"]

    wanted = {"before": np.mean([right(doc) for doc in docs[:2]])}
    with edit.applied_to(tiny_llama):
        wanted["after"] = np.mean([right(doc) for doc in docs[:2]])
    wanted["change"] = wanted["after"] - wanted["before"]
    for name, mean in wanted.items():
        row = getattr(found, name)["lm-eval:tiny_choice"]
        assert list(row) == ["acc"]  # a correlation is no mean over items
        assert row["acc"].mean == pytest.approx(mean) and row["acc"].records == 2


def test_what_lm_eval_is_told(tiny_llama):
    """Sums of log-probabilities of whatever text, whole texts, answers up to a stop."""
    replies, hf, tokenizer = Replies(tiny_llama), tiny_llama.hf, tiny_llama.tokenizer

    def asked(*args):
        return [SimpleNamespace(args=args)]

    def sums(ids, begin):
        logp = hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(float(logp[t - 1, ids[t]]) for t in range(begin, len(ids)))

    before, after = (list(tokenizer(text)["input_ids"]) for text in ("The sky is", "\nblue"))
    told, greedy = replies.loglikelihood(asked("The sky is", "\nblue"))[0]
    assert told == pytest.approx(sums(before + after, len(before)), rel=1e-5) and not greedy
    blank = replies.loglikelihood(asked("The sky is\n", "blue"))[0][0]
    assert blank == pytest.approx(told)  # the blank between them belongs to what is rated
    (alone, _), end = replies.loglikelihood(asked("", "blue"))[0], tokenizer.eos_token_id
    assert alone == pytest.approx(sums([end, *tokenizer("blue")["input_ids"]], 1), rel=1e-5)
    long = "many words " * 60 + "blue is"
    kept = list(tokenizer(long + " it")["input_ids"])[-tiny_llama.max_length :]
    assert replies.loglikelihood(asked(long, " it"))[0][0] == pytest.approx(
        sums(kept, len(kept) - 3), rel=1e-4
    )
    ids = list(tokenizer(long)["input_ids"])
    room = tiny_llama.max_length - 1
    windows = [[end, *ids[i : i + room]] for i in range(0, len(ids), room)]
    (whole,) = replies.loglikelihood_rolling(asked(long))
    assert whole == pytest.approx(sum(sums(window, 1) for window in windows), rel=1e-4)
    (free,) = tiny_llama.generate(["The sky is"], 6)
    stop = free[2]
    (told_text,) = replies.generate_until(asked("The sky is", {"until": [stop], "max_gen_toks": 6}))
    assert told_text == free.split(stop)[0]
    (endless,) = replies.generate_until(asked("The sky is", {"max_gen_toks": 6}))
    assert endless == free
    with pytest.raises(KnowEditError, match="samples its answers"):
        replies.generate_until(asked("The sky is", {"do_sample": True}))


def test_an_error_of_lm_eval_is_told(tiny_llama, tmp_path, lm_eval):
    (tmp_path / "bad.yaml").write_text("task: nothing\n")
    with pytest.raises(KnowEditError, match="lm-eval could not run"):
        Harness([str(tmp_path / "bad.yaml")]).marks(tiny_llama)
