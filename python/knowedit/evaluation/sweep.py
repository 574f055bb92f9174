"""Sweeps: several methods, with every combination of some settings, measured alike and shown as one
table.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    dataset: counterfact
    limit: 48
    methods:
      - emmet                                   # as it ships
      - kind: memit                             # with some settings
        merge_subjects: false
      - {kind: alphaedit, grid: {metric.gain: [0.8, 0.9]}}
    grid: {layers: [[5], [4, 5, 6]]}            # for each of them

Every row keeps the whole record of its method, so that any of them can be made again. A method that
fails is a row with its reason; rows are on disk before the next method starts, and are not computed
again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal

from knowedit.errors import ConfigError, KnowEditError, RankError
from knowedit.evaluation import protocols
from knowedit.evaluation.ability.ability import AbilityTasks, headline
from knowedit.evaluation.baseline import Baseline, Scope
from knowedit.evaluation.intervals import Estimate
from knowedit.evaluation.measures.base import FIGURES, fact_measures, model_measures
from knowedit.evaluation.requirements import figures
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.io.config import Config, fields_of
from knowedit.io.documents import read_document
from knowedit.io.files import atomic_file
from knowedit.io.ranges import Count, Whole
from knowedit.io.ranks import team
from knowedit.io.tables import Column, Table
from knowedit.io.tensors import MISREAD, understood
from knowedit.methods.base import Method, statistics_for
from knowedit.methods.registry import made_by, make_method
from knowedit.models.download import DEFAULT_MODEL
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics

FILE = "sweep.json"
FORMAT = "knowedit-sweep/1"
MOST = 10_000  # combinations of a grid


@dataclass(frozen=True)
class Sweep(Config):
    """What is measured.

    Attributes:
        methods: names, or records as `make_method` takes them, which may have a `grid` of their
            own.
        grid: `{setting: values}`; every combination of them changes every method.
        limit: the first so many facts; None: all.
        batch, every, protocol: as `protocols.run`.
        text: held-out text for the perplexity.
        ability, ability_items: tasks of general ability, as `protocols.measure`.
        corpus, tokens, statistics: of the key statistics, as `statistics_for`; one corpus, or a
            list of them.
        strict: as of `facts.sets.load`. dequantise: as of `load_model`.
        seed: of the methods whose records say none, the statistics' corpus and the intervals.
    """

    methods: tuple[Any, ...] = ()
    grid: dict[str, Any] = field(default_factory=dict)
    model: str = DEFAULT_MODEL
    dataset: str = "embedded"
    limit: Count | None = None
    protocol: Literal["batch", "single", "sequential"] = "batch"
    batch: Count = 50
    every: Count = 100
    seed: Whole = 0
    dtype: str = "auto"
    strict: bool = False
    dequantise: bool = False
    corpus: str | tuple[str, ...] | None = None
    tokens: Count | None = None
    statistics: Path | None = None
    text: str | None = None
    ability: tuple[str, ...] = ()
    ability_items: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods:
            raise ConfigError("a sweep needs methods; name at least one, such as memit")
        if isinstance(self.corpus, tuple) and len(self.corpus) == 1:
            object.__setattr__(self, "corpus", self.corpus[0])  # the same run, however it is spelt

    @property
    def scope(self) -> Scope:
        """What is measured beside the facts' prompts."""
        return Scope(self.text, self.seed, ability=self.ability, ability_items=self.ability_items)

    def variants(self) -> list[Variant]:
        """Every method with every combination, in order; the same one once.

        Raises:
            ConfigError: an unknown method or setting, or a grid that is not a list of values.
        """
        found = []
        for entry in self.methods:
            if not isinstance(entry, (str, Mapping)):
                raise ConfigError(f"a method must be a name or a record, got {entry!r}")
            record: dict[str, Any] = {"kind": entry} if isinstance(entry, str) else dict(entry)
            own = record.pop("grid", {})
            start = make_method(record)
            if self.corpus is not None and "corpus" in set(fields_of(type(start))) - set(record):
                start = start.with_settings(corpus=self.corpus)
            unsaid = [place for place in start.seeds() if not _says(record, place)]
            start = start.with_settings(dict.fromkeys(unsaid, self.seed))
            for settings in combinations({**self.grid, **own}):
                try:
                    found.append(Variant(start.with_settings(settings), settings))
                except ConfigError as problem:
                    hint = "a method may have a grid of its own: {kind: memit, grid: ...}"
                    also = f"; {hint}" if len(self.methods) > 1 and not own else ""
                    whose = "" if str(problem).startswith(start.kind) else f"{start.kind}: "
                    raise ConfigError(f"{whose}{problem}{also}") from problem
        return list({json.dumps(v.method.to_dict(), sort_keys=True): v for v in found}.values())


def _says(record: Mapping[str, Any], place: str) -> bool:
    """Whether a method's record has the setting called `place`, such as `material.seed`."""
    first, _, rest = place.partition(".")
    inner = record.get(first)
    return first in record and (not rest or (isinstance(inner, Mapping) and _says(inner, rest)))


@dataclass(frozen=True)
class Variant:
    """A method, and the settings of the grid that made it."""

    method: Method
    settings: dict[str, Any]


def combinations(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One setting a name, in every combination; one empty one for an empty grid. Raises
    ConfigError.
    """
    for name, values in grid.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise ConfigError(f"grid.{name} must be a list of values, got {values!r}")
    if (count := prod(map(len, grid.values()))) > MOST:
        raise ConfigError(f"the grid has {count:,} combinations, more than {MOST:,}; ask for fewer")
    for chosen in product(*grid.values()):
        yield dict(zip(grid, chosen))


def read_sweep(path: Path) -> Sweep:
    """A sweep from a YAML or JSON file. Raises ConfigError, which names the file, for one that is
    none.
    """
    record = read_document(path)
    with understood(path, "a sweep", ConfigError, "mend it"):
        try:
            sweep = Sweep.from_dict(record if record is not None else {})
            sweep.variants()
        except KnowEditError as problem:  # somebody's typing, and no question of versions
            raise ConfigError(f"{path}: {problem}") from problem
    return sweep


def run_sweep(
    sweep: Sweep, folder: Path | None = None, *, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Load everything and measure every method; returns what `sweep.json` holds.

    Args:
        folder: for `sweep.json`, kept up to date; rows that it has are not computed again.

    Raises:
        KnowEditError: an unknown name anywhere, before anything is loaded; `folder` holds another
            sweep.
    """
    methods = [variant.method for variant in sweep.variants()]
    if sweep.statistics is not None and not any(method.needs_statistics for method in methods):
        raise ConfigError(f"no method here reads statistics; leave {sweep.statistics} out")
    ability = sweep.scope.tasks(whole=sweep.protocol != "single")
    facts = conflict_free(load(sweep.dataset, strict=sweep.strict))[: sweep.limit]
    model = load_model(sweep.model, dtype=sweep.dtype, dequantise=sweep.dequantise, say=say)
    able = [method for method in methods if _fits(method, model)]
    statistics = statistics_for(
        able, model, sweep.corpus, sweep.tokens, sweep.statistics, sweep.seed
    )
    return measure_sweep(sweep, model, facts, statistics, folder, ability=ability, say=say)


def _fits(method: Method, model: EditableModel) -> bool:
    """Whether the model has the layers whose statistics the method reads; else its row says why."""
    try:
        return all(0 <= layer < len(model.layers) for layer in method.statistics_layers(model))
    except KnowEditError:
        return False


def measure_sweep(
    sweep: Sweep,
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None = None,
    folder: Path | None = None,
    *,
    ability: AbilityTasks | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """As `run_sweep`, of what is loaded already; the model is left as it was found."""
    ranks = team()  # files are the first one's
    record = ranks.first(lambda: _resume(sweep, folder))
    done = {json.dumps(row["config"], sort_keys=True): row for row in record["rows"]}
    record["rows"] = []
    baseline: Baseline | None = None  # measured for the first row that needs it
    variants = sweep.variants()
    for number, variant in enumerate(variants, 1):
        method = variant.method
        kept = done.get(json.dumps(method.to_dict(), sort_keys=True))
        place = f"{label({'method': method.name, 'settings': variant.settings})}, {number} of "
        place += str(len(variants))
        if kept is not None:
            say(f"{place}: kept from {folder}")
        else:
            say(f"{place}: computing and measuring")
            baseline = baseline or sweep.scope.baseline(
                model, facts, ability, whole=sweep.protocol != "single", progress=progress
            )
            kept = {
                "method": method.name,
                "settings": variant.settings,
                "config": method.to_dict(),
                "reason": None,
                "result": None,
                **made_by(method),
            }
            try:
                found = protocols.run(
                    baseline,
                    statistics if method.needs_statistics else None,
                    method,
                    sweep.protocol,
                    sweep.dataset,
                    batch=sweep.batch,
                    every=sweep.every,
                    progress=progress,
                )
                if folder is not None:
                    file = prompts_file(folder, kept["config"])
                    ranks.first(partial(protocols.write_prompts, file, found))
                kept["result"] = json.loads(json.dumps(found.to_dict()))  # as a file has it
            except RankError:
                raise
            except KnowEditError as error:
                kept["reason"] = f"{type(error).__name__}: {error}"
            if kept["reason"]:
                say(f"{place}: {kept['reason']}")
        record["rows"].append(kept)
        done.pop(json.dumps(kept["config"], sort_keys=True), None)
        if folder is not None:  # with those whose turn comes later: an interruption keeps them
            whole = record | {"rows": [*record["rows"], *done.values()]}
            ranks.first(partial(_write, folder / FILE, whole))
    return record


def _write(file: Path, record: Mapping[str, Any]) -> None:
    with atomic_file(file) as path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def prompts_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """Where the single prompts of a method's row are: rows come and go, as the grid says."""
    key = protocols.method_key(config).encode()
    return folder / f"prompts-{hashlib.blake2b(key, digest_size=6).hexdigest()}.jsonl"


def rows_kept(folder: Path | None) -> int:
    """How many rows with results a folder has."""
    if folder is None or not (folder / FILE).is_file():
        return 0
    rows = json.loads((folder / FILE).read_text(encoding="utf-8"))["rows"]
    return sum(row["reason"] is None for row in rows)


def _resume(sweep: Sweep, folder: Path | None) -> dict[str, Any]:
    """The record so far; methods and grid may have changed since, what failed is tried again."""
    fresh: dict[str, Any] = {"format": FORMAT, "sweep": sweep.to_dict(), "rows": []}
    if folder is None or not (folder / FILE).is_file():
        return fresh
    apart = ("methods", "grid")
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        rows = [row for row in kept["rows"] if row["reason"] is None]
        if not all(isinstance(row["config"], dict) and row["result"] for row in rows):
            raise ValueError("a row has no method or no result")
        str(table({**kept, "rows": rows})), list(map(figures, results({**kept, "rows": rows})))
        known = Sweep.from_dict(kept["sweep"]).to_dict()
        same = all(known[k] == v for k, v in fresh["sweep"].items() if k not in apart)
    except (OSError, *MISREAD) as error:
        raise KnowEditError(
            f"{folder / FILE} cannot be gone on from ({error}); choose another folder"
        ) from error
    if not same:
        raise KnowEditError(
            f"{folder} holds a sweep of other facts or another model; choose another folder"
        )
    return fresh | {"rows": rows}


def label(row: Mapping[str, Any]) -> str:
    """A row's method and what the grid set in it."""
    settings = (f"{name}={json.dumps(value)}" for name, value in row["settings"].items())
    return " ".join([row["method"], *settings])


def table(record: Mapping[str, Any]) -> Table:
    """One row a method, below that of the unedited model: the settings of the grid, and what each
    measure shows, where any row has it; what the columns are and reasons of failures below.
    """
    rows = [row for row in record["rows"] if row["result"]]
    if rows:
        rows = [_unedited(rows[0]["result"]), *rows]
    settings = list(dict.fromkeys(name for row in record["rows"] for name in row["settings"]))
    after = [row["result"]["evaluation"]["after"] for row in rows]
    effects = [row["result"]["side_effects"] for row in rows]
    columns, values = [Column("method")], [[row["method"] for row in rows]]
    for name in settings:
        columns.append(Column(name, align="right"))
        found = [row["settings"].get(name) for row in rows]
        values.append([None if value is None else json.dumps(value) for value in found])
    for kind, of_facts in fact_measures().items():
        for figure in of_facts.shown:
            estimates = [rates.get(kind, {}).get(figure) for rates in after]
            columns.append(Column(f"{kind} {figure}", ".3f", "right"))
            values.append([e and Estimate(**e) for e in estimates])
    for name, of_model in model_measures().items():
        for figure, form in of_model.shown.items():
            columns.append(Column(f"{name} {figure}", form, "right"))
            values.append([found.get(name, {}).get(figure) for found in effects])
    for when in ("after", "change"):
        columns.append(Column(f"ability {when}", ".3f", "right"))
        values.append([headline(row["result"].get("ability"), when) for row in rows])
    columns.append(Column("s a fact", ".2f", "right"))
    values.append([row["result"]["seconds"] for row in rows])
    made = Table(columns, list(zip(*values)))
    made = made.without_empty_columns() if rows else made
    heads = {column.header for column in made.heads}
    known = {**fact_measures(), **model_measures()}
    said = [f"{name}: {one.about}" for name, one in known.items() if _is_in(name, heads)]
    said += [f"{name}: {what}" for name, what in FIGURES.items() if _is_in(name, heads, last=True)]
    legend = ["; ".join(said) + "."] if said else []
    return replace(made, notes=[*legend, *failures(record)])


def _is_in(word: str, heads: Iterable[str], *, last: bool = False) -> bool:
    """Whether a heading of two words has this one as its first, or its last."""
    return any(head.split()[-1 if last else 0] == word for head in heads if " " in head)


def _unedited(result: Mapping[str, Any]) -> dict[str, Any]:
    """A row for the model before any edit."""
    before = {**result, "side_effects": {}, "ability": None, "seconds": None}
    before["evaluation"] = {"after": result["evaluation"]["before"]}
    return {"method": "unedited", "settings": {}, "result": before}


def failures(record: Mapping[str, Any]) -> list[str]:
    """The rows that could not be measured, each with its reason."""
    return [f"{label(row)}: {row['reason']}" for row in record["rows"] if row["reason"]]


def results(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows that have one as records of `Result.to_dict`, each called by its label, with what
    `knowedit eval` is to be told to measure it again.
    """
    head = record["sweep"]
    names = ("limit", "batch", "every", "seed", "dtype", "corpus", "tokens", "statistics", "text")
    more = ("ability", "ability_items", "strict", "dequantise")
    asked = {name: head.get(name) for name in (*names, *more)}
    run = {"model": head["model"], "asked": protocols.unusual(asked)}
    rows = [row for row in record["rows"] if row["result"]]
    own = [{"own": row["own"]} if "own" in row else {} for row in rows]
    return [
        {**row["result"], "method": label(row), "run": {**run, **file}}
        for row, file in zip(rows, own)
    ]
