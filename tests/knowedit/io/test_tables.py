"""Unit: one table in six forms."""

from __future__ import annotations

import csv
import io
import json
import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knowedit.evaluation.intervals import Estimate
from knowedit.io.tables import Column, Table, figure

SPAN = Estimate(0.5, 0.25, 0.75, 9)
TABLE = Table(
    ["method", Column("rate", ".2f"), Column("n"), "said"],
    [["a|b", SPAN, 3, "<i>\nx"], ["ROME", None, 12, ""], ["MEMIT", math.nan, 5, "y"]],
    "What <happened>",
    ["a note & more"],
)


def test_what_rounds_to_zero_has_no_minus():
    """Alone and in an interval; text stays as it is."""
    shown = Column("rate", ".3f").show
    assert [shown(x) for x in (-0.0, -4e-4, -6e-4, 4e-4, 0.0)] == [
        "0.000", "0.000", "-0.001", "0.000", "0.000",
    ]  # fmt: skip
    assert shown(Estimate(-1e-9, -0.25, -0.0, 3)) == "0.000 [-0.250, 0.000]"
    assert figure(-0.001, "+.0%") == "0%" and figure(-0.2, "+.0%") == "-20%"
    assert shown("-0.000") == "-0.000" and Column("n").show(-1) == "-1"


def test_text_lines_up_and_numbers_stand_right():
    assert str(TABLE).splitlines() == [
        "What <happened>",
        "method               rate   n  said",
        "a|b     0.50 [0.25, 0.75]   3  <i>",
        "                               x",
        "ROME                       12",
        "MEMIT                       5  y",
        "a note & more",
    ]
    assert max(map(len, TABLE.text(width=30).splitlines())) <= 30


def test_markdown_escapes_what_would_break_a_row():
    assert TABLE.markdown().splitlines() == [
        "**What <happened>**",
        "",
        "| method | rate | n | said |",
        "|---|---:|---:|---|",
        "| a\\|b | 0.50 [0.25, 0.75] | 3 | <i><br>x |",
        "| ROME |  | 12 |  |",
        "| MEMIT |  | 5 | y |",
        "",
        "a note & more",
    ]


def test_html_is_escaped_and_well_formed():
    found = ET.fromstring(f"<div>{TABLE.html()}</div>")
    assert [cell.text for cell in found.iter("td")][:4] == ["a|b", str_of(SPAN), "3", "<i>\nx"]
    assert [cell.get("class") for cell in found.iter("th")] == [None, "num", "num", None]
    assert next(found.iter("caption")).text == "What <happened>"
    assert next(found.iter("p")).text == "a note & more" and TABLE.__html__() == TABLE.html()


def str_of(span):
    return f"{span:.2f}"


def test_latex_escapes_what_it_would_read_otherwise():
    assert TABLE.latex().splitlines() == [
        "% What <happened>",
        "% a note & more",
        r"\begin{tabular}{lrrl}",
        r"\toprule",
        r"method & rate & n & said \\",
        r"\midrule",
        r"a\textbar{}b & 0.50 {\footnotesize [0.25, 0.75]} & 3 & \textless{}i\textgreater{} x \\",
        r"ROME &  & 12 &  \\",
        r"MEMIT &  & 5 & y \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    odd = Table(["a_b"], [["[x] 5% of \\n~"], [-0.5], [Estimate(-0.5, -1.0, 0.0, 3)], ["x-1"]])
    assert odd.latex().splitlines()[2:7] == [
        r"a\_b \\",
        r"\midrule",
        r"{}[x] 5\% of \textbackslash{}n\textasciitilde{} \\",
        r"$-$0.5 \\",
        r"$-$0.500 {\footnotesize [$-$1.000, 0.000]} \\",
    ]
    assert odd.latex().splitlines()[7] == r"x-1 \\"
    starred = Table(["[n]"], [["*best"]]).latex().splitlines()
    assert starred[2] == r"{}[n] \\" and starred[4] == r"{}*best \\"


def test_json_keeps_the_values():
    found = json.loads(json.dumps(TABLE.to_dict(), allow_nan=False))
    assert found["columns"] == ["method", "rate", "n", "said"] and found["title"] == TABLE.title
    assert found["rows"][0][1] == {"mean": 0.5, "low": 0.25, "high": 0.75, "records": 9}
    assert [row[1] for row in found["rows"][1:]] == [None, None]


def test_csv_keeps_the_values_and_the_ends_of_intervals():
    head, first, second, _ = csv.reader(io.StringIO(TABLE.csv(), newline=""))
    assert head == ["method", "rate", "rate low", "rate high", "n", "said"]
    assert first == ["a|b", "0.5", "0.25", "0.75", "3", "<i>\nx"]
    assert second == ["ROME", "", "", "", "12", ""]


def test_code_is_in_a_fixed_width_font():
    table = Table([Column("map", code=True)], [["░ ▒"]])
    assert '<td class="code">░ ▒</td>' in table.html() and "| `░ ▒` |" in table.markdown()


def test_columns_without_a_value_can_be_left_out():
    table = Table(["a", "b", "c"], [[1, None, ""], [2, math.nan, "x"]]).without_empty_columns()
    assert [column.header for column in table.heads] == ["a", "c"]
    assert table.cells() == [["1", ""], ["2", "x"]]


def test_records_side_by_side():
    table = Table.from_columns("layer", ["rank", "gain"], [("5", [2, 0.5]), ("6", [3, 0.25])])
    assert table.cells() == [["rank", "2", "3"], ["gain", "0.5", "0.25"]]
    assert [column.header for column in table.heads] == ["layer", "5", "6"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="2 columns, but a row of 1"):
        Table(["a", "b"], [["x"]])


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2)))
def test_any_text_stays_in_its_cell(rows):
    table = Table(["a", "b"], rows)
    assert table.cells() == rows
    assert [*csv.reader(io.StringIO(table.csv(), newline=""))][1:] == rows
    assert len(table.markdown().splitlines()) == 2 + len(rows)


def test_many_intervals_stand_below_their_means_on_a_page():
    few = Table([*"abcd"], [[SPAN] * 4]).html()
    assert few.count(">0.500 [0.250, 0.750]<") == 4 and "dense" not in few
    many = Table(["method", *"abcde"], [["a [b", *[SPAN] * 5]]).html()
    assert many.count(">0.500\n[0.250, 0.750]<") == 5 and '<table class="dense">' in many
    assert ">a [b<" in many
