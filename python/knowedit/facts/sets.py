"""Fact sets by name or path: `load("demo")`, `load("counterfact")`, `load("my_facts.jsonl")`.

The embedded set comes with the package. Public data sets are not shipped: they are read from the
folder that the environment variable ``KNOWEDIT_DATA`` names. Their names and files stand with their
formats (`knowedit.facts.formats`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from knowedit.facts.fact import Fact, FactError, check_facts
from knowedit.facts.formats import named_sets, recognise
from knowedit.facts.records import parse_records, read_records
from knowedit.io.names import nearest, spelled

logger = logging.getLogger(__name__)

EMBEDDED = Path(__file__).with_name("embedded.jsonl")
#: The ids of the embedded facts that "demo" is.
DEMO = (
    "capital-france",
    "symbol-gold",
    "language-mexico",
    "continent-egypt",
    "landmark-colosseum",
    "field-wolfgang-amadeus-mozart",
)
SHIPPED = {
    "demo": "six different facts of the embedded set",
    "embedded": "185 counterfactuals with paraphrases, neighbours and questions, written for this "
    "package",
}


@dataclass(frozen=True)
class KnownSet:
    """A set that `load` takes by name.

    Attributes:
        files: the file names it is looked for under, the first one found is read.
        path: the file that is read, or None where there is none.
        size: of that file in bytes, or None.
    """

    name: str
    what: str
    files: tuple[str, ...]
    path: Path | None
    size: int | None

    @property
    def present(self) -> bool:
        return self.path is not None


def data_dir() -> Path | None:
    """The folder of public data that ``KNOWEDIT_DATA`` names; None when it is not set.

    Raises `FactError` when it names no folder.
    """
    named = os.environ.get("KNOWEDIT_DATA")
    if not named:
        return None
    if not Path(named).is_dir():
        raise FactError(
            f"KNOWEDIT_DATA={named!r} is not a folder; point it at the public data or unset it"
        )
    return Path(named)


def known_sets() -> list[KnownSet]:
    """Every set that has a name, the shipped ones first, each with the file it is read from here.

    Raises `FactError` when ``KNOWEDIT_DATA`` names no folder.
    """
    folder = data_dir()
    size = EMBEDDED.stat().st_size
    found = [
        KnownSet(name, what, (EMBEDDED.name,), EMBEDDED, size) for name, what in SHIPPED.items()
    ]
    for named in named_sets():
        path = _first_file(folder, named.files)
        size_here = path.stat().st_size if path else None
        found.append(KnownSet(named.name, named.what, named.files, path, size_here))
    return found


def load(
    name_or_path: str | os.PathLike[str], limit: int | None = None, *, strict: bool = False
) -> list[Fact]:
    """The facts of a set: ``"demo"`` (6), ``"embedded"`` (all of ours), the name of a public set
    (`known_sets`), or the path of a file of facts.

    Public sets hold independent cases, so repeats and contradictions between them are kept and
    counted in a warning (`conflict_free` removes them); a file of your own may hold none, as in
    `read_facts`. Records of a public set that are no usable fact are left out and named in a
    warning.

    Args:
        limit: at most so many facts, from the start.
        strict: refuse a public set with a record that is no usable fact.

    Raises:
        FactError: an unknown name, a missing or a broken file, a limit below 1.
    """
    if limit is not None and limit < 1:
        raise FactError(f"limit must be at least 1, got {limit}; leave it out to load everything")
    name = os.fspath(name_or_path)
    if not Path(name).exists():
        name = spelled(name, [*SHIPPED, *(named.name for named in named_sets())])
    if name in SHIPPED:
        facts = [fact for _, fact in parse_records(read_records(EMBEDDED))]
        if name == "demo":
            by_id = {fact.id: fact for fact in facts}
            facts = [by_id[i] for i in DEMO]
        return facts[:limit]
    records = list(read_records(_path(name)))
    public = bool(records) and recognise(records[0][1]) is not None
    placed = parse_records(records, skip=public and not strict)
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
    where the relation is not named).
    """
    first: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        first.setdefault((fact.subject, fact.relation or fact.prompt), fact)
    return list(first.values())


def _path(name: str) -> Path:
    """The file behind a set's name or a path. Raises `FactError` saying what is known, or where to
    put the file.
    """
    files = {named.name: named.files for named in named_sets()}
    if name not in files:
        if Path(name).exists():
            return Path(name)
        hint = nearest(name, [*SHIPPED, *files], "known sets")
        raise FactError(f"{name!r} is neither a file nor a known set; {hint}")
    folder = data_dir()
    path = _first_file(folder, files[name])
    if path is None:
        raise FactError(
            f"data set {name!r} needs {' or '.join(files[name])} in "
            f"{folder or 'the folder KNOWEDIT_DATA names'}; "
            "put the file there, set KNOWEDIT_DATA to its folder, or use the embedded set"
        )
    return path


def _first_file(folder: Path | None, names: Iterable[str]) -> Path | None:
    if folder is None:
        return None
    return next((folder / name for name in names if (folder / name).is_file()), None)
