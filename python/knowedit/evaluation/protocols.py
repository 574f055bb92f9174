"""Measuring whole methods: all facts in one edit (`batch`), each fact in an edit of its own
(`single`), or batch after batch into the same model (`sequential`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.edits.limits import RUINOUS, Limits
from knowedit.errors import KnowEditError
from knowedit.evaluation.ability.ability import Ability, AbilityTasks, Marks
from knowedit.evaluation.definitions import check_definition, counted
from knowedit.evaluation.evaluation import Evaluation, evaluate, evaluate_each
from knowedit.evaluation.evaluation import plain as plain_estimates
from knowedit.evaluation.generation import Figure, Generation, References, Writing, summary
from knowedit.evaluation.interview import ASKED, Interview, Said, said_table
from knowedit.evaluation.measures.base import ModelMeasure, measures, model_measures
from knowedit.evaluation.sequence import (
    SequenceMonitor,
    SequenceStep,
    trajectory_table,
    write_in_sequence,
)
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, load
from knowedit.facts.wordings.forms import as_asked
from knowedit.io.config import plain
from knowedit.io.files import atomic_file
from knowedit.methods.base import Method, statistics_for
from knowedit.methods.registry import make_method
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics
from knowedit.statistics.corpus.corpus import Corpus

PROTOCOLS = ("batch", "single", "sequential")
RESULTS, PROMPTS = "results.json", "prompts.jsonl"
SAMPLE = 200  # facts measured at a step of a sequence
HELD_OUT = 400  # documents for the perplexity


@dataclass(frozen=True)
class Result:
    """One method on one data set.

    Attributes:
        protocol: one of `PROTOCOLS`, or of `saved` where no edit was computed.
        seconds: computing the edits, a fact (without loading, statistics and evaluation); None:
            nobody knows.
        side_effects: what each measure of whole models found, by its name; empty for `single`.
        report: of the edit (of the first one for `single` and `sequential`).
        config: the whole method, as `make_method` takes it.
        trajectory: for `sequential`, the model on its way.
        run: what all results of a folder have in common, so that it can be gone on with, the
            `model` as it was named, and what was `asked` beyond the usual (`measure`).
        said: what the edited model says of the first facts, in its own words.
        generation: its free answers and texts, measured; None where none was asked for.
        ability: what the model can do beside the facts; None where that was not asked for.
    """

    model: str
    dataset: str
    method: str
    protocol: str
    facts: int
    evaluation: Evaluation
    side_effects: dict[str, dict[str, Any]]
    seconds: float | None
    report: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    trajectory: list[SequenceStep] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    said: list[Said] = field(default_factory=list)
    generation: Generation | None = None
    ability: Ability | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary; `migrate` brings those of earlier versions to this form."""
        names = ("model", "dataset", "method", "protocol", "facts", "seconds", "side_effects")
        return {
            **{name: getattr(self, name) for name in names},
            "evaluation": self.evaluation.to_dict(),
            "report": self.report,
            "config": self.config,
            "trajectory": [step.to_dict() for step in self.trajectory],
            "run": self.run,
            "said": [one.to_dict() for one in self.said],
            **self._generation(),
            **({"ability": self.ability.to_dict()} if self.ability else {}),
        }

    def _generation(self) -> dict[str, Any]:
        made = self.generation
        if made is None:
            return {}
        parts = {"before": plain_estimates(made.before), "after": plain_estimates(made.after)}
        return {"generation": parts}

    def __str__(self) -> str:
        head = f"{self.method}, {self.protocol} of {self.facts} facts from {self.dataset}"
        head += f", {self.seconds:.2f} s a fact" if self.seconds is not None else ""
        warnings = self.report.get("warnings", [])
        ruinous = [text for text in warnings if text.startswith(RUINOUS)]
        parts = [head, *ruinous, str(self.evaluation), *describe(self.side_effects)]
        parts += [str(said_table(self.said, self.facts))] if self.said else []
        parts += [str(made) for made in (self.ability, self.generation) if made]
        parts += (
            [str(trajectory_table(self.trajectory).without_empty_columns())]
            if self.trajectory
            else []
        )
        return "\n".join(parts + [f"note: {text}" for text in warnings if text not in ruinous])


def describe(side_effects: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line a measure of the whole model; measures that are no longer known are left out."""
    known = measures()
    return [
        measure.describe(dict(found))
        for name, found in side_effects.items()
        if isinstance(measure := known.get(name), ModelMeasure)
    ]


def migrate(record: Mapping[str, Any]) -> dict[str, Any]:
    """`Result.to_dict`'s form of a record of any version.

    Raises:
        KeyError: the record is none of ours.
    """
    found = dict(record)
    if "side_effects" not in found:  # version 0.1: the drift alone
        moved = found.pop("drift")
        found["side_effects"] = {"drift": moved} if moved else {}
        found["trajectory"] = found.pop("course", [])
        found["config"] = {}
    return found


#: Values of `measure`'s arguments that need not be said.
USUAL = {"batch": 50, "every": 100, "dtype": "auto", "definition": "memit"}


def measure(
    name: str,
    dataset: str,
    methods: Sequence[str | Mapping[str, Any] | Method],
    limit: int | None,
    protocol: str,
    corpus: Any,
    tokens: int | None,
    dtype: str = "auto",
    *,
    device_map: Any = None,
    batch: int = 50,
    every: int = 100,
    text: Any = None,
    where: Path | None = None,
    seed: int = 0,
    folder: Path | None = None,
    generate: int = 0,
    references: References | None = None,
    definition: str = "memit",
    ability: Sequence[str] = (),
    ability_items: int | None = None,
    join: str | None = None,
    chat: bool = False,
    strict: bool = False,
    dequantise: bool = False,
    say: Callable[[str], None] = print,
) -> Iterator[dict[str, Any] | Result]:
    """Load everything and measure each method, one after the other; what `knowedit eval` calls.

    Args:
        methods: as `make_method` takes them; those that read ordinary text read the corpus.
        batch, every: of `sequential`: facts an edit, and facts between two steps.
        text: held-out text for the perplexity (as `corpus`).
        where: statistics to take instead of collecting them from `corpus`.
        seed: of the statistics' corpus and of the intervals.
        generate, references, definition: as `run`.
        ability, ability_items: tasks of general ability, and at most so many items of each, as
            `AbilityTasks` takes them.
        folder: for the results, on disk before the next method starts; those that it has are not
            measured again, but yielded as their records.
        join, chat: as of `forms.as_asked`.
        strict: as of `facts.sets.load`. dequantise: as of `load_model`.

    Raises:
        KnowEditError: an unknown method, protocol or data set; a folder with results of other
            facts, another model or other settings; or what the parts raise.
    """
    made = [make_method(method).with_corpus(corpus) for method in methods]
    check_protocol(protocol)
    check_definition(definition)
    tasks = ability_tasks(ability, ability_items, protocol)
    facts = conflict_free(load(dataset, strict=strict))[:limit]
    model = load_model(name, dtype=dtype, device_map=device_map, dequantise=dequantise, say=say)
    facts = as_asked(model, facts, join, chat)
    common = {
        "fingerprint": model.fingerprint,
        "facts": [fact.to_dict() for fact in facts],
        **{"protocol": protocol, "batch": batch, "every": every, "seed": seed},
        **{"corpus": plain(corpus), "tokens": tokens, "statistics": plain(where)},
        "text": plain(text),
        **({"generate": generate, "references": references} if generate else {}),
        **({"definition": definition} if definition != "memit" else {}),
        **({"ability": list(ability), "ability_items": ability_items} if ability else {}),
    }
    digest = hashlib.blake2b(json.dumps(common).encode(), digest_size=16).hexdigest()
    settings = {"dataset": dataset, "digest": digest}
    kept = kept_results(folder, settings)
    options = {
        **{"limit": limit, "batch": batch, "every": every, "seed": seed, "dtype": dtype},
        **{"corpus": plain(corpus), "tokens": tokens, "statistics": plain(where)},
        **{"text": plain(text), "generate": generate, "definition": definition},
        **{"ability": list(ability), "ability_items": ability_items, "join": join, "chat": chat},
        **{"strict": strict, "dequantise": dequantise},
    }
    asked = {k: v for k, v in options.items() if v and v != USUAL.get(k)}
    missing = [method for method in made if method_key(method.to_dict()) not in kept]
    statistics = statistics_for(missing, model, corpus, tokens, where, seed) if missing else None
    texts = held_out(text)
    for number, method in enumerate(made, 1):
        place = f"{method.name}, {number} of {len(made)}"
        if (record := kept.get(method_key(method.to_dict()))) is not None:
            say(f"{place}: kept from {folder}")
            yield record
            continue
        say(f"{place}: computing and measuring")
        told = run(
            model,
            facts,
            statistics,
            method,
            protocol,
            dataset,
            batch=batch,
            every=every,
            texts=texts,
            seed=seed,
            generate=generate,
            references=references,
            definition=definition,
            ability=tasks,
        )
        told = replace(told, run={**settings, "model": str(name), "asked": asked})
        if folder is not None:
            add_to_run(folder, told)
        yield told


def method_key(config: Mapping[str, Any]) -> str:
    """One text for the same method with the same settings."""
    return json.dumps(config, sort_keys=True)


def kept_results(folder: Path | None, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records in a folder of results, by `method_key`.

    Raises:
        KnowEditError: they are of another run.
    """
    records = _records(folder) if folder is not None else []
    if any(_of_the_run(record) != settings for record in records):
        raise KnowEditError(
            f"{folder} holds results of other facts, another model or other settings; choose "
            f"another folder"
        )
    return {method_key(record["config"]): record for record in records}


def _of_the_run(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two results of one folder agree in: the digest stands for all that is measured."""
    run = record.get("run", {})
    return {name: run[name] for name in ("dataset", "digest") if name in run}


def _records(folder: Path) -> list[dict[str, Any]]:
    path = folder / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise KnowEditError(f"{path} is damaged ({error}); choose another folder") from error
    return list(found)


def add_to_run(folder: Path, result: Result) -> None:
    """Add a result to those of a folder: its prompts first, then its summary, which counts."""
    records, path = _records(folder), folder / PROMPTS
    lines = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []
    kept = lines[: sum(record["evaluation"]["prompts"] for record in records)]
    _write(path, "".join([*kept, *_prompt_lines(result)]))
    _write(folder / RESULTS, _summaries([*records, result.to_dict()]))


def check_protocol(name: str) -> None:
    """Raises KnowEditError for an unknown one."""
    if name not in PROTOCOLS:
        raise KnowEditError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")


def ability_tasks(
    names: Sequence[str], limit: int | None, protocol: str = "batch"
) -> AbilityTasks | None:
    """The tasks of those names; None for none.

    Raises:
        KnowEditError: an unknown task, items without a task, or each fact in an edit of its own,
            whose model is many.
    """
    if names:
        _check_whole(protocol)
        return AbilityTasks(names, limit)
    if limit is not None:
        raise KnowEditError("items of general ability need tasks; give --ability all")
    return None


def _check_whole(protocol: str) -> None:
    """Raise KnowEditError for the protocol whose edited models are many."""
    if protocol == "single":
        raise KnowEditError(
            "general ability is that of a model with all facts in it; measure it with the "
            "protocol batch or sequential"
        )


def held_out(text: Any) -> list[str]:
    """The documents of a corpus that the perplexity is measured on; none without one."""
    return list(islice(Corpus.parse(text).documents(), HELD_OUT)) if text else []


def run(
    model: EditableModel,
    facts: Sequence[Fact],
    statistics: KeyStatistics | None,
    method: Method,
    protocol: str = "batch",
    dataset: str = "",
    *,
    batch: int = 50,
    every: int = 100,
    texts: Sequence[str] = (),
    seed: int = 0,
    generate: int = 0,
    references: References | None = None,
    definition: str = "memit",
    ability: AbilityTasks | None = None,
    progress: bool = True,
) -> Result:
    """Compute and measure one method; the model is left as it was found.

    Args:
        generate: also let the model write about the first so many facts (`evaluation.generation`).
        references: texts by object, for the consistency of what it writes.
        definition: whose figures stand beside the usual ones (`evaluation.definitions`).
        ability: tasks of general ability, for `batch` and `sequential`; the bundled ones also at
            every step of a sequence.
        dataset: its name, for the record.
        texts: held-out documents, for measures that need some.
        seed: of the intervals.

    Raises:
        KnowEditError: an unknown protocol, no facts, or what the method raises.
    """
    check_protocol(protocol)
    check_definition(definition)
    if ability is not None:
        _check_whole(protocol)
    if not facts:
        raise KnowEditError("there are no facts to measure; give at least one")
    trajectory: list[SequenceStep] = []
    effects: dict[str, dict[str, Any]] = {}
    asked = Interview(model, facts, progress=progress)
    said: list[Said] = []
    writing, written = Writing(model, facts[:generate], references), list[Figure]()
    unedited = writing.read() if generate else []
    marks: list[Marks] = [ability.marks(model)] if ability else []
    if protocol == "single":
        edits = _Timed(lambda: method.compute_each(model, facts, statistics, progress=progress))

        def heard() -> Iterator[Edit]:
            for record, edit in enumerate(edits):
                if record < max(ASKED, generate):
                    with edit.applied_to(model):
                        said.extend(asked.hear(record))
                        written.extend(writing.read(record) if record < generate else ())
                yield edit

        evaluation = evaluate_each(model, heard(), facts, seed=seed, progress=progress)
        seconds, report = edits.seconds, edits.report
    else:
        watched = model_measures(texts=bool(texts))
        before = {name: m.observe(model, texts) for name, m in watched.items()}

        def moved() -> dict[str, dict[str, Any]]:
            return {n: m.compare(before[n], m.observe(model, texts)) for n, m in watched.items()}

        if protocol == "sequential":
            monitor = SequenceMonitor(
                model,
                facts,
                texts,
                sample=SAMPLE,
                ability=ability,
                seed=seed,
                progress=progress,
            )
            with Session(method, model, statistics) as session:
                trajectory += write_in_sequence(session, monitor, batch, every, progress=progress)
                evaluation, effects = monitor.evaluation(progress=progress), moved()
                said += asked.hear()
                written += writing.read() if generate else []
                marks += [ability.marks(model)] if ability else []
                seconds, report = trajectory[-1].seconds, sequence_report(session.history.edits)
        else:
            start = time.perf_counter()
            edit = method.compute(model, facts, statistics, progress=progress)
            seconds, report = time.perf_counter() - start, edit.report.to_dict()
            with edit.applied_to(model):
                effects = moved()
                said += asked.hear()
                written += writing.read() if generate else []
                marks += [ability.marks(model)] if ability else []
            evaluation = evaluate(model, edit, facts, seed=seed, progress=progress)
    return Result(
        model.name,
        dataset,
        method.name,
        protocol,
        len(facts),
        counted(evaluation, definition),
        effects,
        seconds / len(facts),
        report,
        method.to_dict(),
        trajectory,
        said=said,
        generation=Generation(summary(unedited), summary(written)) if generate else None,
        ability=ability.compare(*marks) if ability else None,
    )


def sequence_report(edits: Sequence[Edit]) -> dict[str, Any]:
    """The first edit's report, and by what all of them together pass the limits."""
    reports = [edit.report for edit in edits]
    ruinous = Limits().broken(reports[-1], reports[:-1])
    found = reports[0].to_dict()
    known = [text for text in found["warnings"] if not text.startswith(RUINOUS)]
    return {**found, "warnings": [f"{RUINOUS}: {text}" for text in ruinous] + known}


class _Timed:
    """Edits computed one by one, with the seconds that this took and the first one's report; no
    edit is kept.
    """

    def __init__(self, compute: Callable[[], Iterable[Edit]]) -> None:
        self.compute, self.seconds = compute, 0.0
        self.report: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Edit]:
        start = time.perf_counter()
        for edit in self.compute():
            self.seconds += time.perf_counter() - start
            self.report = self.report or edit.report.to_dict()
            yield edit
            start = time.perf_counter()


def write_run(folder: Path, results: Sequence[Result]) -> None:
    """`results.json` with the summaries and `prompts.jsonl` with every single prompt, each written
    whole.
    """
    _write(folder / RESULTS, _summaries([result.to_dict() for result in results]))
    _write(folder / PROMPTS, "".join(line for r in results for line in _prompt_lines(r)))


def _prompt_lines(result: Result) -> list[str]:
    rows = ({"method": result.method, **row} for row in result.evaluation.rows())
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def _summaries(records: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(records), indent=1) + "\n"


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as path:
        path.write_text(text, encoding="utf-8")
