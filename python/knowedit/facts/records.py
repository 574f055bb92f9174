"""Files of facts: one JSON object a line (``.jsonl``), one JSON list (``.json``), or a header and
rows (``.csv``; a cell with several values is a JSON list), each also as ``.gz``.

Only ``prompt``, ``subject`` and ``target`` are required::

    {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon", "true": "Paris"}

Every error names the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from knowedit.facts.fact import ALIASES, LISTS, REQUIRED, Fact, FactError, check_facts
from knowedit.facts.formats import recognise
from knowedit.io.files import atomic_file
from knowedit.io.lines import kind, number_of, read_lines

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv")


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``(place, record)`` of a ``.jsonl``, ``.json`` or ``.csv`` file (also ``.gz``), `place`
    as ``file:line``.

    Raises `FactError` for another kind of file, broken JSON, a record that is no object, and bad
    encoding.
    """
    path = Path(path)
    suffix = kind(path)
    if suffix not in SUFFIXES:
        raise FactError(
            f"{path}: unknown kind of file; facts are read from {', '.join(SUFFIXES)}, each also "
            f"as .gz"
        )
    lines = read_lines(path, FactError)
    records: Iterator[tuple[str, Any]]
    if suffix == ".jsonl":
        records = (
            (f"{path}:{n}", _parse_json(f"{path}:{n}", line.rstrip("\r\n")))
            for n, line in lines
            if line.strip()
        )
    elif suffix == ".json":
        listed = _parse_json(str(path), "".join(line for _, line in lines))
        if not isinstance(listed, list):
            raise FactError(
                f"{path}: must hold a JSON list of facts; for one object a line name the file "
                ".jsonl"
            )
        records = ((f"{path}: record {n}", record) for n, record in enumerate(listed, 1))
    else:
        records = _csv_records(path, "".join(line for _, line in lines))
    for place, record in records:
        if not isinstance(record, dict):
            raise FactError(f"{place}: a fact must be a JSON object, got {type(record).__name__}")
        yield place, record


def _parse_json(place: str, text: str) -> Any:
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
                    "commas in quotes"
                )
            cells = {
                k: v for k, v in zip(header, row) if v.strip() or ALIASES.get(k, k) in REQUIRED
            }
            lists = {
                k: _parse_json(place, v)
                for k, v in cells.items()
                if ALIASES.get(k, k) in LISTS and v.startswith("[")
            }
            yield place, {**cells, **lists}
    except csv.Error as e:
        raise FactError(f"{path}:{line}: broken CSV ({e})") from e


def parse_records(
    records: Iterable[tuple[str, dict[str, Any]]], *, skip: bool = False
) -> list[tuple[str, Fact]]:
    """``(place, record)`` pairs in any known format as ``(place, fact)`` pairs, in their order.

    A record that no public format recognises is read by `Fact.from_dict`. Which forms the answers
    had is logged.

    Args:
        skip: leave out records of a public format that are no usable fact, and name them in one
            warning.

    Raises:
        FactError: a record that is no usable fact (without `skip`), or one that is broken; with its
            place.
    """
    placed: list[tuple[str, Fact]] = []
    skipped: list[str] = []
    answer_forms: dict[str, Counter[str]] = {}
    for place, record in records:
        form = recognise(record)
        try:
            if form is None:
                placed.append((place, Fact.from_dict(record)))
            else:
                forms = answer_forms.setdefault(form.name, Counter())
                placed += [(place, fact) for fact in form.facts(record, forms)]
        except (LookupError, TypeError, AttributeError, ValueError) as e:  # FactError too
            problem = f"{place}: {_problem(form.name if form else 'fact', e)}"
            if form is None or not skip:
                raise FactError(problem) from e
            skipped.append(problem)
    for name, forms in answer_forms.items():
        counts = ", ".join(f"{form} ({count})" for form, count in sorted(forms.items()))
        logger.info("%s format; answers as %s", name, counts)
    if skipped and not placed:
        raise FactError(skipped[0])
    if skipped:
        logger.warning(
            "left out %s that cannot be edited (--strict stops there): %s",
            number_of(len(skipped), "record"),
            "; ".join(skipped),
        )
    return placed


def _problem(form: str, error: Exception) -> str:
    """Why a record of that form is none."""
    if isinstance(error, FactError):
        return str(error)
    if isinstance(error, KeyError):
        return f"{form} record without {error}"
    return f"{form} record with a field of another kind than it should be ({error})"


def read_facts(path: str | os.PathLike[str]) -> list[Fact]:
    """The facts of a file (see the module's docstring), checked by `check_facts`.

    Records in a public format, such as either CounterFact schema, are recognised by their fields
    (`knowedit.facts.formats`).

    Raises:
        FactError: with file and line, for anything that cannot be read or written together.
    """
    placed = parse_records(read_records(path))
    if not placed:
        raise FactError(f"{path}: holds no facts")
    return check_facts([fact for _, fact in placed], str(path), [place for place, _ in placed])


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
            f"{path}: unknown kind of file; facts are written to {', '.join(SUFFIXES)}, each "
            "also as .gz"
        )
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)  # no time stamp: equal facts give equal bytes
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
