"""Unit: texts as tokens."""

from __future__ import annotations

import pytest

from knowedit.models.tokens import join


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
    ],
)
def test_a_blank_before_the_answer_where_the_script_has_one(prompt, answer, whole):
    assert join(prompt, answer) == whole


def test_a_template_says_which_occurrence_is_the_subject(tiny_llama):
    row = tiny_llama.row("{} is not what Rome was", "Rome", "so")
    assert row.subject == 3 and row.start == 0
    assert row.ids == tiny_llama.row("Rome is not what Rome was", answer="so").ids
    assert tiny_llama.row("Rome is not what Rome was", "Rome").subject == 20
