"""Measuring whole methods: all facts in one edit (`batch`), each fact in an edit of its own
(`single`), or batch after batch into the same model (`sequential`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from knowedit.edits.edit import Edit
from knowedit.edits.limits import RUINOUS, Limits
from knowedit.errors import KnowEditError
from knowedit.evaluation.ability.ability import Ability
from knowedit.evaluation.baseline import PLAIN, Baseline, Scope, check_whole
from knowedit.evaluation.evaluation import Evaluation, answers_under, in_order
from knowedit.evaluation.evaluation import plain as plain_estimates
from knowedit.evaluation.generation import Figure, Generation
from knowedit.evaluation.interview import ASKED, Said, said_table
from knowedit.evaluation.measures.base import Answer, ModelMeasure, ask, measures
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
from knowedit.io.lines import number_of
from knowedit.io.ranks import team
from knowedit.io.tensors import understood
from knowedit.methods.base import Method, statistics_for
from knowedit.methods.registry import made_by, make_method
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics

PROTOCOLS = ("batch", "single", "sequential")
RESULTS, PROMPTS = "results.json", "prompts.jsonl"
SAMPLE = 200  # facts measured at a step of a sequence


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
        what = f"{number_of(self.facts, 'fact')} from {self.dataset}"
        head = f"{self.method}, {self.protocol} of {what}"
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


def unusual(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `measure`'s arguments that are not as usual."""
    return {name: value for name, value in options.items() if value and value != USUAL.get(name)}


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
    where: Path | None = None,
    scope: Scope = PLAIN,
    folder: Path | None = None,
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
        where: statistics to take instead of collecting them from `corpus`.
        scope: what is measured beside the facts' prompts.
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
    tasks = scope.tasks(whole=protocol != "single")
    facts = conflict_free(load(dataset, strict=strict))[:limit]
    model = load_model(name, dtype=dtype, device_map=device_map, dequantise=dequantise, say=say)
    facts = as_asked(model, facts, join, chat)
    common = {
        **{"protocol": protocol, "batch": batch, "every": every, "seed": scope.seed},
        **{"corpus": plain(corpus), "tokens": tokens, "statistics": plain(where)},
        **scope.to_dict(),
    }
    settings = run_settings(dataset, model, facts, common)
    kept = kept_results(folder, settings)
    options = {
        **{"limit": limit, "batch": batch, "every": every, "seed": scope.seed, "dtype": dtype},
        **{"corpus": plain(corpus), "tokens": tokens, "statistics": plain(where)},
        **{k: v for k, v in scope.to_dict().items() if k != "references"},
        **{"join": join, "chat": chat, "strict": strict, "dequantise": dequantise},
    }
    asked = unusual(options)
    missing = [method for method in made if method_key(method.to_dict()) not in kept]
    for method in missing:  # not only when its turn comes
        if (together := {"batch": facts, "sequential": facts[:batch]}.get(protocol)) is not None:
            method.check_together(model, together)
    if missing:
        statistics = statistics_for(missing, model, corpus, tokens, where, scope.seed)
        baseline = scope.baseline(model, facts, tasks, whole=protocol != "single")
    for number, method in enumerate(made, 1):
        place = f"{method.name}, {number} of {len(made)}"
        if (record := kept.get(method_key(method.to_dict()))) is not None:
            say(f"{place}: kept from {folder}")
            yield record
            continue
        say(f"{place}: computing and measuring")
        told = run(baseline, statistics, method, protocol, dataset, batch=batch, every=every)
        told = replace(
            told, run={**settings, "model": str(name), "asked": asked, **made_by(method)}
        )
        if folder is not None:
            add_to_run(folder, told)
        yield told


def run_settings(
    dataset: str, model: EditableModel, facts: Sequence[Fact], common: Mapping[str, Any]
) -> dict[str, Any]:
    """What all results of one folder agree in: the name of their facts, and a digest of these, the
    model and what else is `common` to them.
    """
    whole = {
        "fingerprint": model.fingerprint,
        "facts": [fact.to_dict() for fact in facts],
        **common,
    }
    digest = hashlib.blake2b(json.dumps(whole).encode(), digest_size=16).hexdigest()
    return {"dataset": dataset, "digest": digest}


def method_key(config: Mapping[str, Any]) -> str:
    """One text for the same method with the same settings."""
    return json.dumps(config, sort_keys=True)


def kept_results(folder: Path | None, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The records in a folder of results, by `method_key`; of several ranks the first reads them.

    Raises:
        KnowEditError: they are of another run.
    """
    records = team().first(lambda: _records(folder)) if folder is not None else []
    if any(_of_the_run(record) != settings for record in records):
        raise KnowEditError(
            f"{folder} holds results of other facts, another model or other settings (--protocol, "
            "--seed, --corpus, --tokens or what else is measured); choose another folder"
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
    except (ValueError, RecursionError) as error:
        raise KnowEditError(f"{path} is damaged ({error}); choose another folder") from error
    with understood(path, "results", KnowEditError, "choose another folder"):
        if not isinstance(found, list):
            raise TypeError("it is no list of results")
        for record in found:
            texts = record["model"], record["method"]
            prompts = record["evaluation"]["prompts"]
            if not all(isinstance(text, str) for text in texts):
                raise TypeError(f"model and method are texts, not {texts}")
            if type(prompts) is not int or prompts < 0:
                raise TypeError(f"evaluation.prompts is {prompts!r}")
            if not all(isinstance(record.get(name, {}), dict) for name in ("config", "run")):
                raise TypeError("config and run are records")
    return found


def count_results(folder: Path | None) -> int:
    """How many results a folder has."""
    return 0 if folder is None else len(_records(folder))


def add_to_run(folder: Path, result: Result) -> None:
    """Add a result to those of a folder: its prompts first, then its summary, which counts. Of
    several ranks the first does it.
    """

    def write() -> None:
        records, path = _records(folder), folder / PROMPTS
        lines = path.read_text(encoding="utf-8").splitlines(True) if path.is_file() else []
        kept = lines[: sum(record["evaluation"]["prompts"] for record in records)]
        _write(path, "".join([*kept, *_prompt_lines(result)]))
        _write(folder / RESULTS, _summaries([*records, result.to_dict()]))

    team().first(write)


def check_protocol(name: str) -> None:
    """Raises KnowEditError for an unknown one."""
    if name not in PROTOCOLS:
        raise KnowEditError(f"unknown protocol {name!r}; known: {', '.join(PROTOCOLS)}")


def run(
    baseline: Baseline,
    statistics: KeyStatistics | None,
    method: Method,
    protocol: str = "batch",
    dataset: str = "",
    *,
    batch: int = 50,
    every: int = 100,
    progress: bool = True,
) -> Result:
    """Compute and measure one method on the facts of `baseline`; the model is left as it was found.

    Args:
        baseline: of the unedited model; the same one serves every method. For `single` one that
            does not measure the model as a whole will do.
        dataset: its name, for the record.
        batch, every: of `sequential`: facts an edit, and facts between two steps.

    Raises:
        KnowEditError: an unknown protocol, general ability of many models, or what the method
            raises.
    """
    check_protocol(protocol)
    if baseline.ability is not None:
        check_whole(protocol != "single")
    method.read_ahead(baseline.model, progress)
    given = (baseline, statistics, method, progress)
    if protocol == "batch":
        measured = _batch(*given)
    elif protocol == "single":
        measured = _single(*given)
    else:
        measured = _sequential(*given, batch, every)
    return Result(
        baseline.model.name,
        dataset,
        method.name,
        protocol,
        len(baseline.facts),
        config=method.to_dict(),
        **measured,
    )


def _batch(
    baseline: Baseline, statistics: KeyStatistics | None, method: Method, progress: bool
) -> dict[str, Any]:
    """All facts in one edit: what a `Result` says of it."""
    model, start = baseline.model, time.perf_counter()
    edit = method.compute(model, baseline.facts, statistics, progress=progress)
    seconds = time.perf_counter() - start
    with edit.applied_to(model):
        answers = ask(model, baseline.asked, title="answers under the edit", progress=progress)
        whole = baseline.whole(model)
    return {
        "evaluation": baseline.evaluation(answers),
        "seconds": seconds / len(baseline.facts),
        "report": edit.report.to_dict(),
        **whole,
    }


def _single(
    baseline: Baseline, statistics: KeyStatistics | None, method: Method, progress: bool
) -> dict[str, Any]:
    """Each fact in an edit of its own; no edit is kept."""
    model, facts, ranks = baseline.model, baseline.facts, team()
    mine = range(ranks.rank, len(facts), ranks.size)
    edits = _Timed(
        lambda: method.compute_each(model, facts, statistics, which=mine, progress=progress)
    )
    said, written = list[Said](), list[Figure]()

    def heard() -> Iterator[Edit]:
        for record, edit in zip(mine, edits):
            if record < max(ASKED, baseline.generate):
                with edit.applied_to(model):
                    said.extend(baseline.heard(model, record))
                    written.extend(baseline.read(model, record))
            yield edit

    def measured() -> _Share:
        found = answers_under(
            model, heard(), baseline.asked, baseline.answers, mine, progress=progress
        )
        return _Share(found, said, written, edits.seconds, edits.report)

    edits.begin()
    parts = ranks.each(measured)
    return {
        "evaluation": baseline.evaluation(in_order(part.answers for part in parts)),
        "side_effects": {},
        "seconds": max(part.seconds for part in parts) / len(facts),
        "report": parts[0].report,
        "said": sorted((one for part in parts for one in part.said), key=lambda one: one.record),
        "generation": baseline.generation(
            sorted((one for part in parts for one in part.written), key=lambda one: one.record)
        ),
    }


@dataclass(frozen=True)
class _Share:
    """What one rank has measured of single edits: the answers by number, words, texts and seconds,
    and the report of its first edit.
    """

    answers: dict[int, Answer]
    said: list[Said]
    written: list[Figure]
    seconds: float
    report: dict[str, Any]


def _sequential(
    baseline: Baseline,
    statistics: KeyStatistics | None,
    method: Method,
    progress: bool,
    batch: int,
    every: int,
) -> dict[str, Any]:
    """Batch after batch into the same model."""
    model = baseline.model
    monitor = SequenceMonitor(
        model,
        baseline.facts,
        baseline.texts,
        sample=SAMPLE,
        ability=baseline.ability,
        asked=(baseline.asked, baseline.answers),
        seed=baseline.seed,
        progress=progress,
    )
    with Session(method, model, statistics) as session:
        steps = list(write_in_sequence(session, monitor, batch, every, progress=progress))
        answers = ask(model, baseline.asked, title="after", progress=progress)
        return {
            "evaluation": baseline.evaluation(answers),
            "seconds": steps[-1].seconds / len(baseline.facts),
            "report": sequence_report(session.history.edits),
            "trajectory": steps,
            **baseline.whole(model),
        }


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
        self.edits: Iterable[Edit] = ()
        self.report: dict[str, Any] = {}

    def begin(self) -> None:
        """What is computed for all of them together."""
        start = time.perf_counter()
        self.edits = self.compute()
        self.seconds += time.perf_counter() - start

    def __iter__(self) -> Iterator[Edit]:
        start = time.perf_counter()
        for edit in self.edits:
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


def write_prompts(file: Path, result: Result) -> None:
    """Every single prompt of one result, written whole."""
    _write(file, "".join(_prompt_lines(result)))


def _prompt_lines(result: Result) -> list[str]:
    rows = ({"method": result.method, **row} for row in result.evaluation.rows())
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def _summaries(records: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(records), indent=1) + "\n"


def _write(file: Path, text: str) -> None:
    with atomic_file(file) as path:
        path.write_text(text, encoding="utf-8")
