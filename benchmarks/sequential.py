"""Sequential editing: a thousand facts written into one model, batch after batch; what is left of
them, and of the model?

CounterFact records of different subjects, batches of 50, over several layers. After every 100
facts: efficacy, exact answers, paraphrases and neighbours of a sample of all facts written so far
that have a paraphrase, perplexity and drift on text that no statistics and no value saw; and exact
answers to the facts so far, batch by batch: to all of them at the end, and to a random sample at
the steps before (`--checked`), so that a step costs the same however many facts there are.
Methods without a look-ahead optimise values for as many steps more. A name with `-free` has no
history: later edits may overwrite earlier keys.

Every batch and every step is on disk before the next one starts, and an interrupted run goes on
from there; what is complete is not computed again. With `--merge` the edits of every step become
one (`Session.compact`), and neither a batch's cost nor what is kept grows with the history.

With `--experts 8` the model is the mixture of `benchmarks.moe`, that many copies of each MLP.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from knowedit.cli.options import parse_layers
from knowedit.errors import KnowEditError
from knowedit.evaluation import intervals
from knowedit.evaluation.measures.base import ask, questions
from knowedit.evaluation.sequence import SequenceMonitor, trajectory_table, write_in_sequence
from knowedit.facts.fact import Fact
from knowedit.facts.sets import conflict_free, data_dir, load
from knowedit.io.files import cache_dir
from knowedit.methods import Method, make_method
from knowedit.methods.listing import methods as listed
from knowedit.methods.locate.trainings import ThroughSolver
from knowedit.methods.session import Session
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.report.plots import save, trajectory
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.corpus.corpus import Corpus

from . import common, mixtures

CORPUS = "enwiki_2021_sample_3MB.txt.gz"
TEXT = "wikitext2_raw_valid.txt.gz"
FACTS = "counterfact-flat"
FREE = "-free"
ONE_PASS = ("one-step", "ultraedit")  # no values are optimised, in layers of their own


def method_for(
    name: str,
    layers: Sequence[int],
    steps: int,
    draft: bool,
    optimiser: str | None = None,
    corpus: Path | None = None,
) -> Method:
    """The method called `name` (with or without `-free`), with its own defaults but for layers,
    steps, precision and, if one is named, the values' optimiser; it reads ordinary text from
    `corpus` where it reads some. The methods of one pass optimise nothing: they run as they ship.
    """
    methods = [known for known, found in listed().items() if found.group in ("locate", "neurons")]
    methods += ONE_PASS
    known = name.removesuffix(FREE)
    if known not in methods:
        raise KnowEditError(
            f"unknown method {name!r}; known: {', '.join(methods)}, each also with {FREE}"
        )
    if known in ONE_PASS:
        return make_method(known)
    settings: dict[str, Any] = {"layers": tuple(layers), "runtime.draft": draft}
    if listed()[known].group == "locate":
        steps += 0 if known == "metake" else ThroughSolver().settings.steps
        settings |= {"target.steps": steps}
    settings |= {"target.optimiser": optimiser} if optimiser else {}
    return make_method(known, settings).with_corpus(corpus)


def recorded(method: Method) -> dict[str, Any]:
    """The method's record for a results file, with its corpus by name: where that lies is no one
    else's affair.
    """
    record = method.to_dict()
    corpus = record.get("corpus")
    return record | ({"corpus": Path(corpus).name} if isinstance(corpus, (str, Path)) else {})


def exact_by_batch(
    model: EditableModel, facts: Sequence[Fact], batch: int, checked: Sequence[int] | None = None
) -> list[list[float]]:
    """1 or 0 for each of the facts `checked` (None: all), by batch: whether every token of its new
    object is the model's first choice now.
    """
    records = range(len(facts)) if checked is None else checked
    asked = [question for record in records for question in questions(record, facts[record])[:1]]
    found: list[list[float]] = [[] for _ in range(0, len(facts), batch)]
    for question, answer in zip(asked, ask(model, asked, progress=False)):
        found[question.record // batch].append(answer.exact)
    return found


def sample_of(written: int, count: int | None, total: int, seed: int) -> list[int] | None:
    """The `count` facts of the first `written` that come first in one random order of all `total`,
    so that a fact that is checked once is checked again as long as there is room; None: all.
    """
    if count is None or written in (total, *range(count + 1)):
        return None
    order = random.Random(seed).sample(range(total), total)
    return sorted([record for record in order if record < written][:count])


def draw_facts(pool: Sequence[Fact], count: int, seed: int) -> list[Fact]:
    """`count` facts of different subjects in random order; a third of them, where there are so
    many, have a paraphrase (in the flat form of CounterFact few do), so that some of every batch
    can be measured."""
    rng, pool = (
        random.Random(seed),
        list({fact.subject: fact for fact in conflict_free(pool)}.values()),
    )
    paraphrased, rest = (
        [fact for fact in pool if bool(fact.paraphrases) == has] for has in (True, False)
    )
    if len(pool) < count:
        raise KnowEditError(
            f"there are only {len(pool)} facts of different subjects, {count} were asked for"
        )
    paraphrased = rng.sample(paraphrased, min(len(paraphrased), max(count // 3, count - len(rest))))
    chosen = paraphrased + rng.sample(rest, count - len(paraphrased))
    return rng.sample(chosen, len(chosen))


def run(
    report: common.Report,
    name: str,
    method: Method,
    monitor: SequenceMonitor,
    statistics: KeyStatistics | None,
    batch: int,
    every: int,
    folder: Path,
    *,
    checked: int | None = None,
    seed: int = 0,
    merge: bool = False,
) -> None:
    """One method, from where the session in `folder` and the report's rows are; the model is left
    as it was found.
    """
    model, facts = monitor.model, monitor.facts
    with Session.open(
        folder, model, method, statistics, protect=not name.endswith(FREE)
    ) as session:
        begin = len(session.history.facts)
        kept = [row for row in report.rows[1:] if row["case"] == name and row["edits"] <= begin]
        report.rows = [row for row in report.rows if row.get("case") != name or row in kept]
        last = kept[-1] if kept else None
        before = {key: (last or {}).get(key, 0.0) for key in ("seconds", "cpu_seconds")}
        measured = None if last is None else last["edits"]
        for step in write_in_sequence(
            session, monitor, batch, every, measured=measured, merge=merge
        ):
            row = replace(
                step,
                seconds=step.seconds + before["seconds"],
                cpu_seconds=step.cpu_seconds + before["cpu_seconds"],
                gain=min(step.gain, 1.0 if last is None else last["gain"]),
            )
            lines = str(trajectory_table([row])).splitlines()
            lines = lines[1 if step.edits else 0 :]  # the heading once
            asked = sample_of(step.edits, checked, len(facts), seed)
            exact = exact_by_batch(model, facts[: step.edits], batch, asked)
            shares = [mean(part) if part else None for part in exact]
            found = [value for part in exact for value in part]
            told = f"  exact {intervals.mean(found, share=True)} of {len(found)}" if found else ""
            report.note(
                "\n".join(f"{name:16} {line}" for line in lines) + told,
                case=name,
                settings=recorded(method) if step.edits else {},
                exact_by_batch=shares,
                exact=mean(found) if found else None,
                checked=len(found),
                **row.to_dict(),
            )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The trajectories of all methods in one picture."""
    trajectories: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        trajectories.setdefault(row["case"], []).append(row)
    save(trajectory(trajectories), path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("sequential", __doc__, 1, timed=False)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--method", action=common.Repeated, default=["memit", "alphaedit", "metake"]
    )
    parser.add_argument(
        "--layer", action=common.Repeated, default=["4-6"], help="edited together (default: 4-6)"
    )
    parser.add_argument(
        "--set", default=FACTS, help=f"a set by its name, or a file (default: {FACTS})"
    )
    parser.add_argument("--limit", type=int, default=1000, help="so many of them")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--every", type=int, default=100, help="facts between two steps")
    parser.add_argument("--sample", type=int, default=100, help="facts measured at a step")
    parser.add_argument(
        "--checked", type=int, help="facts whose exact answer a step looks at (default: all)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge the edits of every step into one"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of facts")
    parser.add_argument("--steps", type=int, default=20, help="of the value optimisation")
    parser.add_argument("--optimiser", help="of the values (default: the method's)")
    parser.add_argument(
        "--experts", type=int, help="edit a mixture of so many copies of each MLP, two a token"
    )
    parser.add_argument(
        "--exact-values",
        action="store_true",
        help="optimise values in float32, not on a bfloat16 copy",
    )
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    parser.add_argument(
        "--corpus", type=Path, help=f"text for the statistics (default: {CORPUS} in KNOWEDIT_DATA)"
    )
    parser.add_argument(
        "--text", type=Path, help=f"held-out text (default: {TEXT} in KNOWEDIT_DATA)"
    )
    parser.add_argument(
        "--state", type=Path, help="folder for the edits so far (default: the cache)"
    )
    parser.add_argument(
        "--picture", type=Path, default=common.HERE.parent / "docs" / "pictures" / "sequential.png"
    )
    parser.add_argument("--draw", action="store_true", help="only draw the results file")
    arguments = parser.parse_args(argv)
    source = arguments.output or common.RESULTS / "sequential.jsonl"
    old = (
        [json.loads(line) for line in source.read_text().splitlines()]
        if source.exists() and not arguments.quick
        else []
    )
    if arguments.draw:
        draw(old[1:], arguments.picture)
        return 0
    if arguments.quick:
        arguments.limit, arguments.batch, arguments.every, arguments.sample, arguments.steps = (
            8,
            2,
            4,
            4,
            3,
        )
        arguments.tokens, arguments.method = 4096, arguments.method[:2]
    data = data_dir() or Path("KNOWEDIT_DATA")
    model = load_model(arguments.model, dtype=torch.float32)
    drawn = draw_facts(load(arguments.set), arguments.limit, arguments.seed)
    facts = [fact for fact in drawn if common.found_in(model, fact)]
    if arguments.experts:
        model = mixtures.copies(model, arguments.experts, active=2)
    layers = parse_layers(arguments.layer) or ()
    methods = {
        name: method_for(
            name,
            layers,
            arguments.steps,
            not arguments.exact_values,
            arguments.optimiser,
            arguments.corpus or data / CORPUS,
        )
        for name in arguments.method
    }
    needed = {
        layer
        for method in methods.values()
        if method.needs_statistics
        for layer in method.statistics_layers(model)
    }
    statistics = (
        key_statistics(model, sorted(needed), arguments.corpus or data / CORPUS, arguments.tokens)
        if needed
        else None
    )
    setting = {
        "edits": arguments.limit,
        **{
            name: getattr(arguments, name) for name in ("batch", "every", "sample", "seed", "steps")
        },
        "layers": "each method's own"
        if {name.removesuffix(FREE) for name in methods} <= {*ONE_PASS}
        else ",".join(arguments.layer),
        "tokens": arguments.tokens,
    }
    if arguments.checked is not None or arguments.merge:
        setting |= {"checked": arguments.checked, "merge": arguments.merge}
    if arguments.set != FACTS:
        setting["facts"] = Path(arguments.set).name
    for name in ("experts", "optimiser"):
        setting |= {name: given} if (given := getattr(arguments, name)) else {}
    if old and old[0].get("setting") != setting:
        raise KnowEditError(
            f"{source} holds a run with {old[0].get('setting')}, not {setting}; give another "
            f"--output"
        )
    report = common.report("sequential", arguments, model=model.name, setting=setting)
    report.rows += old[1:]
    paraphrased = [i for i, fact in enumerate(facts) if fact.paraphrases]
    # A step looks at a sample: asking the unedited model about all of 10,000 facts takes longer.
    paraphrased = paraphrased[:: max(1, len(paraphrased) // (10 * arguments.sample))]
    monitor = SequenceMonitor(
        model,
        facts,
        list(Corpus.parse(arguments.text or data / TEXT).documents()),
        measured=paraphrased,
        sample=arguments.sample,
    )
    digest = hashlib.blake2b(json.dumps(setting).encode(), digest_size=6).hexdigest()
    state = arguments.state or cache_dir("sequential", f"{model.fingerprint[:12]}-{digest}")
    for name, method in methods.items():
        run(
            report,
            name,
            method,
            monitor,
            statistics,
            arguments.batch,
            arguments.every,
            state / name,
            checked=arguments.checked,
            seed=arguments.seed,
            merge=arguments.merge,
        )
    if not arguments.quick:
        draw(report.rows[1:], arguments.picture)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
