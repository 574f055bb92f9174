"""Fact sets by name or path: `load("demo")`, `load("counterfact")`, `load("my_facts.jsonl")`.

Our own embedded set comes with the package. Public data sets are not shipped: they are read from
the folder that the environment variable ``KNOWEDIT_DATA`` names. Each public format has a module
with ``matches(record)`` and ``facts(record, seen)``; formats are told apart by their fields, never
by file name.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from knowedit.facts.fact import Fact, FactError, check_facts, read_records
from knowedit.facts.formats import counterfact, knowedit, known1000, mquake, same_subject, zsre

logger = logging.getLogger(__name__)

FORMATS = (counterfact, same_subject, mquake, zsre, knowedit, known1000)
EMBEDDED = Path(__file__).with_name("embedded.jsonl")
DEMO = (
    "capital-france",
    "symbol-gold",
    "language-mexico",
    "continent-egypt",
    "landmark-colosseum",
    "field-wolfgang-amadeus-mozart",
)

FILES = {  # name -> file names tried in data_dir(), the complete original first
    "counterfact": ("counterfact.json", "counterfact_rome_schema.jsonl.gz"),
    "counterfact-flat": ("counterfact_first2000.jsonl.gz",),
    "same-subject": ("counterfact_same_subject_groups.jsonl.gz",),
    "zsre": ("zsre_mend_eval_portability_gpt4.json", "zsre_eval_portability_first600.jsonl.gz"),
    "knowedit-wiki-counterfact": ("knowedit_wiki_counterfact_train_first900.jsonl.gz",),
    "knowedit-wiki-recent": ("knowedit_wiki_recent_train_570.jsonl.gz",),
    "knowedit-wikibio": ("knowedit_wikibio_test_306.jsonl.gz",),
    "knowedit-zsre": ("knowedit_zsre_test_first800.jsonl.gz",),
    "mquake": ("MQuAKE-CF-3k.json", "mquake_cf3k_2hop_reconstructed_842.jsonl.gz"),
    "known1000": ("known_1000.json", "known_1000_1209.jsonl.gz"),
}


def data_dir() -> Path | None:
    """The folder with public data: ``KNOWEDIT_DATA``, else ``../shared/data`` beside a source
    checkout, else None.

    Raises `FactError` when ``KNOWEDIT_DATA`` names no folder.
    """
    if named := os.environ.get("KNOWEDIT_DATA"):
        if not Path(named).is_dir():
            raise FactError(
                f"KNOWEDIT_DATA={named!r} is not a folder; point it at the public data or unset it"
            )
        return Path(named)
    beside = (Path(__file__).resolve().parent / "../../../../shared/data").resolve()
    return beside if beside.is_dir() else None


def _form(record: dict[str, Any]) -> ModuleType | None:
    return next((form for form in FORMATS if form.matches(record)), None)


def parse(
    records: Iterable[tuple[str, dict[str, Any]]], *, skip: bool = False
) -> list[tuple[str, Fact]]:
    """``(place, record)`` pairs in any known format -> ``(place, fact)`` pairs; our own format is
    the fallback.

    Raises `FactError` with the place for a record that is no usable fact; with `skip` such records
    of a public format are left out and named in one warning. Which forms the answers had is logged.
    """
    placed: list[tuple[str, Fact]] = []
    skipped: list[str] = []
    seen: dict[str, Counter[str]] = {}
    for place, record in records:
        form = _form(record)
        name = form.__name__.rpartition(".")[2] if form else "fact"
        try:
            if form is None:
                placed.append((place, Fact.from_dict(record)))
                continue
            placed += [
                (place, fact) for fact in form.facts(record, seen.setdefault(name, Counter()))
            ]
        except FactError as e:
            if form is None or not skip:
                raise FactError(f"{place}: {e}") from e
            skipped.append(f"{place}: {e}")
        except (KeyError, TypeError, AttributeError) as e:
            raise FactError(f"{place}: broken {name} record ({type(e).__name__}: {e})") from e
    for name, forms in seen.items():
        logger.info(
            "%s format; answers as %s",
            name,
            ", ".join(f"{k} ({n})" for k, n in sorted(forms.items())),
        )
    if skipped:
        logger.warning(
            "left out %d records that cannot be edited: %s", len(skipped), "; ".join(skipped)
        )
    return placed


def load(name_or_path: str | os.PathLike[str], limit: int | None = None) -> list[Fact]:
    """The facts of a set: ``"demo"`` (6), ``"embedded"`` (all of ours), a name in `FILES`, or the
    path of a fact file.

    Public sets hold independent cases, so repeats and contradictions between them are kept and
    counted in a warning (`conflict_free` takes them out); a file of your own is checked whole
    (`knowedit.facts.fact.read_facts`). `limit` keeps the first that many facts. Raises `FactError`
    for an unknown name, a missing or a broken file.
    """
    if limit is not None and limit < 1:
        raise FactError(f"limit must be at least 1, got {limit}; leave it out to load everything")
    name = os.fspath(name_or_path)
    if name in ("demo", "embedded"):
        facts = [fact for _, fact in parse(read_records(EMBEDDED))]
        if name == "demo":
            by_id = {fact.id: fact for fact in facts}
            facts = [by_id[i] for i in DEMO]
        return facts[:limit]
    records = list(read_records(_path(name)))
    public = bool(records) and _form(records[0][1]) is not None
    placed = parse(records, skip=public)
    if not placed:
        raise FactError(f"{name}: holds no facts")
    facts = [fact for _, fact in placed]
    if not public:
        check_facts(facts, name, [place for place, _ in placed])
    elif conflicts := len(facts) - len(conflict_free(facts)):
        logger.warning(
            "%s: %d of %d facts repeat or contradict an earlier one", name, conflicts, len(facts)
        )
    return facts[:limit]


def conflict_free(facts: Iterable[Fact]) -> list[Fact]:
    """`facts` that can be written together: the first of each subject and relation (or prompt,
    where unnamed).
    """
    first: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        first.setdefault((fact.subject, fact.relation or fact.prompt), fact)
    return list(first.values())


def _path(name: str) -> Path:
    """The file behind a set's name or a path. Raises `FactError` saying what is known, or where to
    put the file.
    """
    if name not in FILES:
        if Path(name).exists():
            return Path(name)
        known = ["demo", "embedded", *FILES]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "known sets: " + ", ".join(known)
        raise FactError(f"{name!r} is neither a file nor a known set; {hint}")
    folder = data_dir()
    found = [folder / file for file in FILES[name] if (folder / file).is_file()] if folder else []
    if not found:
        raise FactError(
            f"data set {name!r} needs {' or '.join(FILES[name])} in "
            f"{folder or 'the folder KNOWEDIT_DATA names'}; "
            "put the file there, set KNOWEDIT_DATA to its folder, or use the embedded set"
        )
    return found[0]
