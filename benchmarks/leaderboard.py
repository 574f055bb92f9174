"""The leaderboard of `docs/leaderboard.md`: every method in every setting that a results file has,
best first; made from the files, nothing is run.

A setting is one table. Rows of one table that are of other records, another model or another seed
are comparable as far as their intervals allow; where each comes from stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from knowedit.evaluation import intervals
from knowedit.evaluation.intervals import Estimate
from knowedit.io.lines import number_of
from knowedit.io.tables import Table
from knowedit.models.copies import COPIES

from .common import of_model, read
from .portability import SETS

NAME = "leaderboard"
Rates = Mapping[str, Estimate | None]


@dataclass(frozen=True)
class Row:
    """One method in one setting.

    Attributes:
        edits: what was written, and how many together.
        rates: shares by the heading of their column; None: not measured.
        cost: seconds a fact; None: not measured.
        source: the results file, and the day it was measured.
        perplexity: of held-out text, before and after; None: not measured.
    """

    model: str
    method: str
    edits: str
    rates: Rates
    cost: float | None
    source: str
    perplexity: tuple[float, float] | None = None

    @property
    def score(self) -> tuple[float, float]:
        """What it is ordered by: its first rate, then the mean of all."""
        known = [rate.mean for rate in self.rates.values() if rate is not None]
        return (known[0], mean(known)) if known else (0.0, 0.0)


SINGLE = {
    "exact": "efficacy exact",
    "paraphrase": "paraphrase success",
    "unchanged": "neighbourhood unchanged",
}
SAME_SUBJECT = {
    "exact": "cloze exact",
    "question": "question success",
    "chat": "greedy contains",
    "unchanged": "neighbourhood unchanged",
}
ARITHMETIC = {
    "target": ("target", "starts"),
    "paraphrase": ("paraphrase", "success"),
    "sums kept": ("sums", "identical"),
    "unrelated kept": ("unrelated", "identical"),
}
FOLLOWING = {
    "follows": "exact",
    "said": "said",
    "follows, fact in context": "exact in context",
    "the fact": "written",
}


def estimate(found: Mapping[str, Any] | None) -> Estimate | None:
    """An estimate of a results file, which may have only its mean; a share that is the same 0 or 1
    in all records gets the exact binomial interval, which earlier files do not have.
    """
    if found is None:
        return None
    middle, records = found["mean"], found.get("records", 0)
    if middle in (0, 1) and records:
        return intervals.mean([middle] * records, share=True)
    return Estimate(middle, found.get("low", middle), found.get("high", middle), records)


def rates(found: Mapping[str, Any], columns: Mapping[str, str]) -> Rates:
    """The columns of a row that holds estimates by the name of the measure."""
    return {head: estimate(found.get(name)) for head, name in columns.items()}


def source(header: Mapping[str, Any]) -> str:
    """Where a row comes from."""
    return f"`{header['benchmark']}`, {header['environment']['date'][:10]}"


def judged(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """The cases of `benchmarks.quality` and `benchmarks.neuron`: a row a measure."""
    model = header.get("model", "").rpartition("/")[2]
    for case in dict.fromkeys(row["case"] for row in rows if row.get("measure")):
        mine = [row for row in rows if row.get("case") == case]
        found = {r["measure"]: {**r, "mean": r["value"]} for r in mine if r.get("measure")}
        cost = next((row["seconds_a_fact"] for row in mine if "seconds_a_fact" in row), None)
        method, _, edits = case.partition(", ")
        yield Row(model, method, edits, rates(found, SINGLE), cost, source(header))


def learned(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """MEND and SERAC by the size of their batches."""
    model = header.get("model", "").rpartition("/")[2]
    for row in rows:
        if row.get("after"):
            single = row["size"] == 1
            what = f"{row['edits']} single edits" if single else f"batches of {row['size']}"
            found = rates(row["after"], SINGLE)
            cost = row["seconds"] / row["size"]
            yield Row(model, row["method"], what, found, cost, source(header))


def real(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """The pieces of `benchmarks.models`, those of one case together."""
    cases: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        size = row["last"] - row["first"] if row["protocol"] == "batch" else 1
        cases.setdefault((row["model"], row["method"], size), []).append(row)
    for (model, method, size), mine in cases.items():
        count = sum(row["last"] - row["first"] for row in mine)
        what = f"batches of {size}" if size > 1 else f"{count} single edits"
        values = {
            head: [v for row in mine for v in row["after"].get(name, {}).values()]
            for head, name in SINGLE.items()
        }
        found = {head: intervals.mean(v, share=True) if v else None for head, v in values.items()}
        cost = mean(row["cpu_seconds_a_fact"] for row in mine)
        pairs = [row["perplexity"] for row in mine if row["perplexity"]]
        before, after = (mean(pair[i] for pair in pairs) if pairs else 0.0 for i in range(2))
        harm = (before, after) if pairs else None
        yield Row(model, method, what, found, cost, source(header), harm)


def sequences(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """Each method after the last of its facts; exactness over all of them, its interval over
    batches.
    """
    model, setting = header.get("model", "").rpartition("/")[2], header.get("setting", {})
    how = f"in batches of {setting.get('batch', 50)}, layers {setting.get('layers', '4-6')}"
    for method in dict.fromkeys(row["case"] for row in rows):
        row = max((r for r in rows if r["case"] == method), key=lambda r: r["edits"])
        shares = [share for share in row["exact_by_batch"] if share is not None]
        found = {
            f"{kind} {name}": one for kind, m in row["measures"].items() for name, one in m.items()
        }
        clean = min((r for r in rows if r["case"] == method), key=lambda r: r["edits"])[
            "perplexity"
        ]
        spent = row.get("cpu_seconds") or row["seconds"]
        yield Row(
            model,
            method,
            f"{row['edits']} {how}",
            {**rates(found, SINGLE), "exact": intervals.mean(shares) if shares else None},
            spent / row["edits"] if row["edits"] else None,
            source(header),
            (clean, row["perplexity"]),
        )


def same_subject(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """The methods of `benchmarks.rose`, all draws together."""
    model = header.get("model", "").rpartition("/")[2]
    for row in rows:
        if "pooled" in row:
            draws = number_of(len(row["seeds"]), "draw") if "seeds" in row else "all draws"
            mine = [r for r in rows if r["method"] == row["method"] and "seconds" in r]
            cost = mean(r["seconds"] / r["facts"] for r in mine) if mine else None
            found = rates(row["pooled"], SAME_SUBJECT)
            yield Row(model, row["method"], draws, found, cost, source(header))


def arithmetic(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """ "2+2=5": the halves of the prompts that no method was tuned on."""
    model = header["head"].get("model", "").rpartition("/")[2]
    for row in rows:
        if row.get("judge"):
            found = {
                head: estimate(row["judge"].get(kind, {}).get(name))
                for head, (kind, name) in ARITHMETIC.items()
            }
            what = number_of(row["seeds"], "halving")
            yield Row(model, row["method"], what, found, row.get("seconds"), source(header))


def following(header: Mapping[str, Any], rows: list[dict[str, Any]]) -> Iterator[Row]:
    """What follows from written facts (`benchmarks.portability`): a row a set and method."""
    for row in rows:
        found = {head: row["figures"][name] for head, name in FOLLOWING.items()}
        shares = {head: intervals.mean(list(v.values()), share=True) for head, v in found.items()}
        what = f"batch of {row['facts']}, {SETS[row['set']]}"
        cost = row.get("cpu_seconds_a_fact")
        yield Row(row["model"], row["method"], what, shares, cost, source(header))


Reader = Callable[[Mapping[str, Any], list[dict[str, Any]]], Iterator[Row]]


def _only(reader: Reader, single: bool) -> Reader:
    """The rows of `reader` that are of single edits, or the others."""
    return lambda header, rows: (
        row for row in reader(header, rows) if ("single" in row.edits) == single
    )


#: What a table is called, and which results files are read for it, each by which function.
SETTINGS: dict[str, dict[str, Reader]] = {
    "Single edits": {
        name: _only(reader, True)
        for name, reader in (
            ("quality", judged), ("neuron", judged), ("learned", learned), ("models", real)
        )
    },
    "Batches": {
        name: _only(reader, False)
        for name, reader in (
            ("quality", judged), ("neuron", judged), ("learned", learned), ("models", real)
        )
    },
    "One batch after another": dict.fromkeys(
        (
            "sequential",
            "sequential_neuron",
            "sequential_thousands",
            "sequential_one_pass",
            of_model("sequential_thousands", "gemma-3-270m-q4_k_m"),
        ),
        sequences,
    ),
    "One batch after another, in one layer": {"sequential_one_layer": sequences},
    "Several facts of one subject": {
        name: same_subject
        for name in ("rose", *(of_model("rose", copy.name) for copy in COPIES))
    },
    "What follows from a fact": {"portability": following},
    "2+2=5, and nothing else": {"arithmetic": arithmetic, "arithmetic_adds": arithmetic},
}  # fmt: skip


def cell(rate: Estimate | None) -> str:
    """A share in percent with its interval."""
    if rate is None:
        return ""
    return format(Estimate(100 * rate.mean, 100 * rate.low, 100 * rate.high, rate.records), ".0f")


def table(folder: Path) -> str:
    """Markdown: a heading and a table for every setting that has rows."""
    parts = []
    for title, readers in SETTINGS.items():
        present = [name for name in readers if (folder / f"{name}.jsonl").is_file()]
        rows = [row for name in present for row in readers[name](*read(folder, name))]
        if not rows:
            continue
        heads = list(dict.fromkeys(head for row in rows for head in row.rates))
        lines = [
            [
                row.method,
                *(cell(row.rates.get(head)) for head in heads),
                "{:.1f} -> {:.1f}".format(*row.perplexity) if row.perplexity else "",
                "" if row.cost is None else f"{row.cost:.1f}",
                row.edits,
                row.model,
                row.source,
            ]
            for row in sorted(rows, key=lambda row: row.score, reverse=True)
        ]
        columns = ["method", *heads, "perplexity", "s a fact", "edits", "model", "from"]
        found = Table(columns, lines).without_empty_columns()
        parts.append(f"## {title}\n\n{found.markdown()}")
    return "\n\n".join(parts)


def no_picture(folder: Path, path: Path) -> None:
    """The page has none."""
