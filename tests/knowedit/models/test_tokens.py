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
    ],
)
def test_the_answer_is_joined_as_it_would_be_written(prompt, answer, whole):
    assert join(prompt, answer) == whole


def test_a_template_says_which_occurrence_is_the_subject(tiny_llama):
    row = tiny_llama.row("{} is not what Rome was", "Rome", "so")
    assert row.subject == 3 and row.start == 0
    assert row.ids == tiny_llama.row("Rome is not what Rome was", answer="so").ids
    assert tiny_llama.row("Rome is not what Rome was", "Rome").subject == 20
