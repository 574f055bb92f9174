"""Every prompt of a run, to be searched and filtered on its page; and what the model says of the
first facts, before and after, side by side.

A run of a thousand facts has some ten thousand prompts. They stand in the page as compact JSON, of
which a small script draws the ones that are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowedit.errors import KnowEditError
from knowedit.io.lines import read_lines
from knowedit.io.tables import Column, Table

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Prompts:
    """The prompts of one run.

    Attributes:
        methods: their names, in the order of the results.
        kinds: of measures, in the order they were asked.
        rows: `[kind, record, prompt, right answer, other answer, before, after of each method]`;
            kind is a number in `kinds`, and a rating is `[p(right), p(other), exact]`: p(other)
            is None without another answer, a rating None where the method was not asked.
    """

    methods: list[str]
    kinds: list[str]
    rows: list[list[Any]]

    @property
    def json(self) -> Markup:
        """The same as JSON that may stand within a script element."""
        from markupsafe import Markup

        text = json.dumps(vars(self), ensure_ascii=False, separators=(",", ":"))
        return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def read_prompts(paths: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> Prompts | None:
    """The prompts of all results in one file, or of each in its own; None where there are none.

    Raises:
        KnowEditError: a file is damaged, or not of these results.
    """
    if not paths or not all(path.is_file() for path in paths):
        return None
    lines: list[Mapping[str, Any]] = []
    path = paths[0]
    try:
        for path in paths:
            found = (text for _, text in read_lines(path, KnowEditError) if text.strip())
            lines += map(json.loads, found)
        return _prompts(lines, results)
    except (ValueError, KeyError, TypeError) as error:
        raise KnowEditError(f"{path} is damaged ({error}); measure again") from error


def _prompts(lines: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]]) -> Prompts:
    """The results' prompts follow each other in the file, as many as each says; results of version
    0.1 do not say it, and have a method each.
    """
    names = apart([result["method"] for result in results])
    kinds: dict[str, int] = {}
    rows: dict[tuple[Any, ...], list[Any]] = {}
    rest = iter(lines)
    for number, result in enumerate(results):
        count = result["evaluation"].get("prompts")
        mine = islice(rest, count) if count is not None else _of(result["method"], lines)
        for line in mine:
            kind = kinds.setdefault(line["kind"], len(kinds))
            place = kind, line["record"], line["prompt"], line["right"], line["wrong"]
            fresh = [*place, _rating(line, "before"), *([None] * len(names))]
            rows.setdefault(place, fresh)[len(place) + 1 + number] = _rating(line, "after")
    return Prompts(names, list(kinds), list(rows.values()))


def _of(method: str, lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [line for line in lines if line["method"] == method]


def _rating(line: Mapping[str, Any], when: str) -> list[Any]:
    other = line[f"p_wrong_{when}"]
    return [
        round(line[f"p_right_{when}"], 4),
        None if other is None else round(other, 4),
        int(line[f"exact_{when}"]),
    ]


def apart(names: Sequence[str]) -> list[str]:
    """The names, numbered where one stands more than once."""
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def _without_template(asked: Sequence[str]) -> list[str]:
    """Prompts of a chat without the lines of the template that all of them begin and end with."""
    first, last = min(asked), max(asked)
    start = first[: _alike(first, last)].rfind("\n") + 1
    ends = [text[start:][::-1] for text in asked]
    first, last = min(ends), max(ends)
    stop = first[: _alike(first, last)].rfind("\n") + 1
    return _without_marks([text[start : len(text) - stop] for text in asked])


#: What templates put around a turn on its own line: <|im_end|>, <end_of_turn>, [INST].
_MARKS = (
    re.compile(r"^\s*(<[^<>\s]+>|\[/?[A-Z_]+\])"),
    re.compile(r"(<[^<>\s]+>|\[/?[A-Z_]+\])\s*$"),
)


def _without_marks(asked: Sequence[str]) -> list[str]:
    """The same without the marks that all of them begin or end with."""
    texts = list(asked)
    for mark in _MARKS:
        found = [mark.search(text) for text in texts]
        while all(found) and len({one[1] for one in found if one}) == 1:
            texts = [mark.sub("", text, count=1).strip() for text in texts]
            found = [mark.search(text) for text in texts]
    return texts


def _alike(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(first, second)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def said_side_by_side(results: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What the model says of the first facts: one table a way to ask, a column a method."""
    methods = apart([result["method"] for result in results])
    heard = [
        {(one["way"], one["record"]): one for one in result.get("said", ())} for result in results
    ]
    every = {key: one for answers in heard for key, one in answers.items()}
    tables = []
    for way in dict.fromkeys(way for way, _ in every):
        mine = {key: one for key, one in every.items() if key[0] == way}
        asked = [one["prompt"] for one in mine.values()]
        if way == "chat" and len(set(asked)) > 1:
            asked = _without_template(asked)
        rows = [
            [
                prompt,
                one["target"],
                one["before"],
                *(answers[key]["after"] if key in answers else None for answers in heard),
            ]
            for prompt, (key, one) in zip(asked, mine.items())
        ]
        columns = ["asked", "new fact", "unedited", *methods]
        tables.append(Table(columns, rows, f"asked as a {way}" if way != "chat" else "in the chat"))
    return tables


def layers(results: Sequence[Mapping[str, Any]]) -> Table:
    """|delta| / |W| and the planned gain of every edited layer."""
    rows = []
    for name, result in zip(apart([r["method"] for r in results]), results):
        report = result["report"]
        gains = report.get("layers", {})
        for layer, norm in report.get("relative_norm", {}).items():
            gain = gains.get(layer, {}).get("gain") if isinstance(gains, Mapping) else None
            rows.append([name, layer, norm, gain])
    columns: list[Column | str] = [
        "method",
        "layer",
        Column("|delta| / |W|", ".3f"),
        Column("gain", ".3f"),
    ]
    return Table(columns, rows).without_empty_columns()
