"""`Fact`: what to write into a model, and the probes that show what writing it did. Reading,
checking, writing files.

A fact file has one JSON object a line (``.jsonl``), one JSON list (``.json``) or a header and rows
(``.csv``; a cell with several values is a JSON list), each also as ``.gz``. Only ``prompt``,
``subject`` and ``target`` are required::

    {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"}
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from knowedit.errors import KnowEditError
from knowedit.io.files import atomic_file
from knowedit.io.lines import kind, read_lines
from knowedit.models.tokens import last_place

logger = logging.getLogger(__name__)

ALIASES = {
    "target_new": "target",
    "target_true": "true",
    "ground_truth": "true",
    "neighbors": "neighbours",
}
LISTS = ("paraphrases", "neighbours", "questions", "instructions", "portability")
PROBES = ("neighbours", "portability")
FORMATS = (".jsonl", ".json", ".csv")


class FactError(KnowEditError):
    """A fact, or a file of facts, that cannot be used; the message says where, why and what to
    do.
    """


def _text(name: str, value: object) -> str:
    """`value` without surrounding blanks, when it is a non-empty string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise FactError(
            f"{name} must be a string, got {type(value).__name__} {value!r}; put it in quotes"
        )
    if not value.strip():
        raise FactError(f"{name} is empty; give it a text or leave the fact out")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise FactError(
            f"{name} {value!r} holds an unpaired surrogate; write the character itself"
        ) from e
    return re.sub(r"[^\S\n]+\Z", "", value) if name == "prompt" else value.strip()


def _wording(name: str, value: object) -> str:
    text = _text(name, value)
    if "{}" in text:
        raise FactError(
            f"{name} {text!r} still holds '{{}}'; write it out with its subject filled in"
        )
    return text


@dataclass(frozen=True)
class Probe:
    """A full prompt and, where known, the text that rightly follows it."""

    prompt: str
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _wording("probe prompt", self.prompt))
        if self.answer is not None:
            object.__setattr__(self, "answer", _text("probe answer", self.answer))


@dataclass(frozen=True)
class Fact:
    """One piece of knowledge to write: after `prompt` with `subject` in its place, the model shall
    say `target`.

    Surrounding blanks are stripped (a trailing blank changes how the next word is tokenised; a
    prompt keeps a last newline, which belongs to a chat's template). Raises `FactError` naming the
    field for anything that is empty, of the wrong type, or for a prompt without exactly one ``{}``.
    """

    prompt: str  # template with exactly one "{}"; `Fact.parse` also takes the prompt written out
    subject: str
    target: str  # the new object, without a leading blank
    true: str | None = None  # what is true today
    paraphrases: tuple[str, ...] = ()  # full prompts, subject filled in; the object follows
    neighbours: tuple[
        Probe, ...
    ] = ()  # what must not change, with today's answers; mostly other subjects
    questions: tuple[str, ...] = ()  # "What is the capital of France?"
    instructions: tuple[str, ...] = ()  # "Complete the sentence with the missing words only: ..."
    relation: str | None = None
    id: str | None = None
    portability: tuple[Probe, ...] = ()  # what follows from the new fact: aliases, further hops

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target", "true", "relation", "id"):
            value = getattr(self, name)
            if value is not None or name in ("prompt", "subject", "target"):
                object.__setattr__(self, name, _text(name, value))
        for name in LISTS:
            values = getattr(self, name)
            if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
                raise FactError(f"{name} must be a list, got {type(values).__name__} {values!r}")
            probes = name in PROBES
            for value in values:
                if probes and not isinstance(value, Probe):
                    raise FactError(
                        f"{name} must hold Probe objects, got {type(value).__name__} {value!r}"
                    )
            object.__setattr__(
                self, name, tuple(v if probes else _wording(name, v) for v in values)
            )
        if (holes := self.prompt.count("{}")) != 1:
            raise FactError(
                f"prompt {self.prompt!r} has {holes} places '{{}}' for the subject, it needs "
                f"exactly one"
                + (
                    "; Fact.parse accepts a prompt with the subject written out"
                    if not holes
                    else ""
                )
            )

        if last_place(self.subject, self.text) != self.prompt.index("{}"):
            raise FactError(
                f"subject {self.subject!r} stands behind the '{{}}' of {self.prompt!r} again; "
                f"reword the prompt"
            )

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @classmethod
    def parse(cls, prompt: str, subject: str, target: str, **others: Any) -> Fact:
        """Like ``Fact(...)``, but `prompt` may be written out: the last occurrence of `subject`
        becomes ``{}``.

        The last one that stands as a word of its own, where there is one ("Iran" rather than
        "Iranian"). Raises `FactError` when the prompt has neither ``{}`` nor the subject.
        """
        if isinstance(prompt, str) and "{}" not in prompt:
            name = re.escape(_text("subject", subject))
            found = [*re.finditer(rf"(?<!\w){name}(?!\w)", prompt)] or [*re.finditer(name, prompt)]
            if not found:
                raise FactError(
                    f"subject {subject!r} does not occur in prompt {prompt!r}; spell both "
                    f"alike, or put '{{}}' "
                    "where the subject stands"
                )
            prompt = prompt[: found[-1].start()] + "{}" + prompt[found[-1].end() :]
        return cls(prompt, subject, target, **others)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary without the fields left empty; `from_dict` reads it back
        equal.
        """
        record: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in PROBES:
                value = [
                    {"prompt": p.prompt} | ({"answer": p.answer} if p.answer else {}) for p in value
                ]
            if value:
                record[field.name] = list(value) if isinstance(value, tuple) else value
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """Read `to_dict`'s form; also the names ``target_new``, ``target_true``, ``ground_truth``,
        ``neighbors``, objects ``{"str": ...}`` for answers, and plain strings where a list or a
        probe is expected.

        Raises `FactError` for unknown, missing or doubly named fields and for what `Fact` refuses.
        """
        if not isinstance(record, Mapping):
            raise FactError(f"a fact must be a JSON object, got {type(record).__name__} {record!r}")
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in record.items():
            name = ALIASES.get(key, key)
            if name not in known:
                near = difflib.get_close_matches(str(key), [*known, *ALIASES], n=1)
                hint = f"did you mean {near[0]!r}?" if near else "known fields: " + ", ".join(known)
                raise FactError(f"unknown field {key!r}; {hint}")
            if name in values:
                raise FactError(f"field {name!r} is given twice (as {key!r} too); keep one")
            if isinstance(value, Mapping) and "str" in value:
                value = value["str"]
            if name in LISTS:
                value = [value] if isinstance(value, (str, Mapping)) else value
                if name in PROBES and isinstance(value, Sequence):
                    value = [_probe(name, v) for v in value]
            values[name] = value
        if missing := [name for name in ("prompt", "subject", "target") if name not in values]:
            raise FactError(
                f"missing field {', '.join(map(repr, missing))}; a fact needs prompt, subject "
                f"and target"
            )
        return cls.parse(
            **{
                k: v
                for k, v in values.items()
                if v is not None or k in ("prompt", "subject", "target")
            }
        )


def _probe(name: str, value: object) -> Probe:
    if isinstance(value, Probe):
        return value
    if isinstance(value, str):
        return Probe(value)
    if isinstance(value, Mapping) and "prompt" in value and set(value) <= {"prompt", "answer"}:
        return Probe(value["prompt"], value.get("answer"))
    raise FactError(f'{name} must hold strings or {{"prompt": ..., "answer": ...}}, got {value!r}')


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(place, record)`` of a ``.jsonl``, ``.json`` or ``.csv`` file (also ``.gz``), `place`
    as ``file:line``.

    Raises `FactError` for another kind of file, broken JSON, a record that is no object, and bad
    encoding.
    """
    path = Path(path)
    suffix = kind(path)
    if suffix not in FORMATS:
        raise FactError(
            f"{path}: unknown kind of file; facts are read from {', '.join(FORMATS)}, each also "
            f"as .gz"
        )
    lines = read_lines(path, FactError)
    records: Iterator[tuple[str, Any]]
    if suffix == ".jsonl":
        records = (
            (f"{path}:{n}", _json(f"{path}:{n}", line.rstrip("\r\n")))
            for n, line in lines
            if line.strip()
        )
    elif suffix == ".json":
        listed = _json(str(path), "".join(line for _, line in lines))
        if not isinstance(listed, list):
            raise FactError(
                f"{path}: must hold a JSON list of facts; for one object a line name the file "
                f".jsonl"
            )
        records = ((f"{path}: record {n}", record) for n, record in enumerate(listed, 1))
    else:
        records = _csv_records(path, "".join(line for _, line in lines))
    for place, record in records:
        if not isinstance(record, dict):
            raise FactError(f"{place}: a fact must be a JSON object, got {type(record).__name__}")
        yield place, record


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        where = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        raise FactError(f"{place}: not valid JSON at {where} ({e.msg})") from e
    except (RecursionError, ValueError) as e:  # nested too deeply; an integer too long to convert
        raise FactError(f"{place}: JSON that cannot be read ({e})") from e


def _csv_records(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1  # where the row starts: a quoted cell may span lines
    try:
        for row in rows:
            place, line = f"{path}:{line}", rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise FactError(f"{place}: a column is named twice in {header}")
                continue
            if len(row) != len(header):
                raise FactError(
                    f"{place}: {len(row)} cells under {len(header)} columns; put cells with "
                    f"commas in quotes"
                )
            required = ("prompt", "subject", "target")
            cells = {
                k: v for k, v in zip(header, row) if v.strip() or ALIASES.get(k, k) in required
            }
            lists = {
                k: _json(place, v)
                for k, v in cells.items()
                if ALIASES.get(k, k) in LISTS and v.startswith("[")
            }
            yield place, {**cells, **lists}
    except csv.Error as e:
        raise FactError(f"{path}:{line}: broken CSV ({e})") from e


def read_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """The facts of a file (module docstring), checked by `check_facts`.

    Files in a public format, such as either CounterFact schema, are recognised by their fields and
    read by `knowedit.facts.sets`. Raises `FactError` with file and line.
    """
    from knowedit.facts import (
        sets as datasets,  # above this module in the import order: it is built on Fact
    )

    placed = datasets.parse(read_records(path))
    if not placed:
        raise FactError(f"{path}: holds no facts")
    return check_facts([fact for _, fact in placed], str(path), [place for place, _ in placed])


def check_facts(
    facts: Sequence[Fact], source: str = "facts", places: Sequence[str] | None = None
) -> list[Fact]:
    """`facts` as a list, when they can be written together.

    `places` says where each one stands, for the messages (default ``source[i]``). Raises
    `FactError` naming both places for an exact repeat (same prompt, subject, target) and for a
    contradiction (same prompt and subject, another target). A target equal to the present answer is
    allowed and logged as a warning: editing it changes little.
    """
    seen: dict[tuple[str, str], int] = {}
    for i, fact in enumerate(facts):
        place = places[i] if places else f"{source}[{i}]"
        if not isinstance(fact, Fact):
            raise FactError(
                f"{place}: must be a Fact, got {type(fact).__name__}; Fact.from_dict reads "
                f"dictionaries"
            )
        first = seen.setdefault((fact.prompt, fact.subject), i)
        if first != i:
            before, other = facts[first].target, places[first] if places else f"{source}[{first}]"
            what = (
                "repeats"
                if before == fact.target
                else f"says {fact.target!r}, which contradicts {before!r} of"
            )
            raise FactError(f"{place}: {fact.text!r} {what} {other}; remove one of the two")
        if fact.target == fact.true:
            logger.warning(
                "%s: target %r is already the true answer of %r", place, fact.target, fact.text
            )
    return list(facts)


def write_facts(path: str | os.PathLike[str], facts: Sequence[Fact]) -> None:
    """Write `facts` to a ``.jsonl``, ``.json`` or ``.csv`` file (also ``.gz``), atomically;
    `read_facts` reads it back.

    Raises `FactError` for another kind of file, OSError when the disk refuses.
    """
    path = Path(path)
    suffix = kind(path)
    records = [fact.to_dict() for fact in facts]
    if suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    elif suffix == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1) + "\n"
    elif suffix == ".csv":
        columns = [
            field.name for field in fields(Fact) if any(field.name in record for record in records)
        ]
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, columns)
        writer.writeheader()
        for record in records:
            cells = {
                k: json.dumps(v, ensure_ascii=False) if k in LISTS else v for k, v in record.items()
            }
            writer.writerow(cells)
        text = out.getvalue()
    else:
        raise FactError(
            f"{path}: unknown kind of file; facts are written to {', '.join(FORMATS)}, each "
            f"also as .gz"
        )
    data = text.encode()
    with atomic_file(
        path
    ) as temporary:  # no time stamp in the archive: equal facts give equal bytes
        temporary.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
