"""Unit: every prompt of a run reaches its page, under the method that answered it, as data that no
text of a model can leave.
"""

from __future__ import annotations

import json

import pytest

from knowedit.errors import KnowEditError
from knowedit.evaluation.protocols import PROMPTS
from knowedit.report.prompts import apart, layers, read_prompts, said_side_by_side


def line(prompt, p, *, kind="efficacy", record=0, wrong="Paris", method="MEMIT"):
    """A line of prompts.jsonl, whose right answer has probability `p` after the edit."""
    before = {"p_right_before": 0.12345, "p_wrong_before": wrong and 0.5, "exact_before": False}
    after = {"p_right_after": p, "p_wrong_after": wrong and 1 - p, "exact_after": p > 0.5}
    what = {"record": record, "kind": kind, "prompt": prompt, "right": "Lyon", "wrong": wrong}
    return {"method": method, **what, **before, **after}


def result(method, prompts, **others):
    return {"method": method, "evaluation": {"prompts": prompts}, **others}


def written(folder, lines):
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in lines)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_prompts_stand_once_with_a_rating_for_each_result(tmp_path):
    lines = [line("a", 0.9), line("b", 0.25, kind="paraphrase"), line("a", 0.75), line("c", 1.0)]
    found = read_prompts(
        [written(tmp_path, lines) / PROMPTS], [result("MEMIT", 2), result("MEMIT", 2)]
    )
    assert found.methods == ["MEMIT (1)", "MEMIT (2)"]
    assert found.kinds == ["efficacy", "paraphrase"]
    before = [0.1235, 0.5, 0]
    assert found.rows == [
        [0, 0, "a", "Lyon", "Paris", before, [0.9, 0.1, 1], [0.75, 0.25, 1]],
        [1, 0, "b", "Lyon", "Paris", before, [0.25, 0.75, 0], None],
        [0, 0, "c", "Lyon", "Paris", before, None, [1.0, 0.0, 1]],
    ]


def test_no_text_ends_the_script_that_holds_it(tmp_path):
    nasty = "</script><img src=x onerror=alert(1)> & \u2028 <!--"
    found = read_prompts(
        [written(tmp_path, [line(nasty, 0.5, wrong=None)]) / PROMPTS], [result("<b>", 1)]
    )
    assert "<" not in found.json and "&" not in found.json
    again = json.loads(found.json)
    assert again["rows"][0][2] == nasty and again["methods"] == ["<b>"]
    assert again["rows"][0][4] is None and again["rows"][0][6][1] is None


def test_a_damaged_file_is_named_and_a_missing_one_is_no_fault(tmp_path):
    assert read_prompts([tmp_path / PROMPTS], [result("MEMIT", 1)]) is None
    (tmp_path / "prompts.jsonl").write_text('{"kind": "efficacy"}\n')
    with pytest.raises(KnowEditError, match=r"prompts\.jsonl is damaged"):
        read_prompts([tmp_path / PROMPTS], [result("MEMIT", 1)])


def test_answers_stand_side_by_side_a_table_a_way():
    def said(way, after):
        texts = {"prompt": "p", "target": "Lyon", "before": "Paris", "after": after}
        return {"record": 0, "way": way, **texts}

    both = [result("A", 0, said=[said("chat", "x"), said("prompt", "y")])]
    both.append(result("B", 0, said=[said("chat", "z")]))
    chat, prompt = said_side_by_side(both)
    assert chat.rows == [["p", "Lyon", "Paris", "x", "z"]]
    assert prompt.rows == [["p", "Lyon", "Paris", "y", None]]
    assert apart(["A", "B", "A"]) == ["A (1)", "B", "A (2)"]


def test_norms_of_every_layer():
    report = {"relative_norm": {"5": 0.25}, "layers": {"5": {"gain": 0.9}}}
    assert layers([result("A", 0, report=report)]).cells() == [["A", "5", "0.250", "0.900"]]
    assert layers([result("A", 0, report={})]).rows == []


def test_the_chat_template_stands_once():
    def chat(text):
        return f"<s>Be kind.\n<user>\n{text}<end>\n<assistant>\n"

    said = [
        {"way": "chat", "record": i, "prompt": chat(text), "target": "b", "before": "", "after": ""}
        for i, text in enumerate(("What is it?", "Where is it?"))
    ]
    (table,) = said_side_by_side([{**result("MEMIT", 0), "said": said}])
    assert [row[0] for row in table.rows] == ["What is it?", "Where is it?"]
    (table,) = said_side_by_side([{**result("MEMIT", 0), "said": said[:1]}])
    assert table.rows[0][0] == chat("What is it?")
