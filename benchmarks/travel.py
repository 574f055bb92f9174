"""Edits in llama.cpp: six facts that MEMIT wrote, and random queries and keys, as an adapter and
within the file, against transformers with the same weights in float32 (`docs/travel.md`).

    python -m benchmarks.travel [--model NAME ...] [--limit FACTS]

The real models that `knowedit models` lists, those that are here; the results of others stay.
llama.cpp rounds what a quantised matrix is multiplied with to 8 bits, and transformers does not:
both differ without an edit, too. So the same is asked of a copy of the file whose tensors are all
float32, where they must not.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from knowedit.edits.changes import LowRank
from knowedit.edits.edit import Edit
from knowedit.edits.export import gguf_lora
from knowedit.edits.gguf_model import copy_gguf, write_gguf
from knowedit.errors import KnowEditError
from knowedit.facts.fact import Fact
from knowedit.facts.sets import data_dir, load
from knowedit.io.tables import Table
from knowedit.methods.base import statistics_for
from knowedit.methods.registry import make_method
from knowedit.models.copies import COPIES, Copy, copy_of
from knowedit.models.download import gguf_of
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.tokens import join

from . import common
from .llama_cpp import Question, Said, ask, version
from .quality import CORPUS

NAME = "travel"
TOKENS = 10  # that each prompt is gone on with
MOVED = 0.03  # of the norm of each query and key matrix
KEPT = 1e-2  # of a log-probability: what the arithmetic of float32 may differ by


def prompts(facts: Sequence[Fact]) -> list[str]:
    """The facts' own, then two other wordings and two neighbours of each."""
    others = [[*fact.paraphrases[:2], *(n.prompt for n in fact.neighbours[:2])] for fact in facts]
    return [fact.text for fact in facts] + [prompt for two in others for prompt in two]


def of_queries_and_keys(model: EditableModel) -> Edit:
    """A random edit of rank one of every layer's."""
    made, changes = torch.Generator().manual_seed(0), {}
    for name, weight in model.hf.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            change = LowRank(*(torch.randn(n, 1, generator=made) for n in weight.shape))
            change.U.mul_(MOVED * weight.norm() / change.norm)
            changes[name] = change
    return Edit("random", changes, [], model.fingerprint)


def in_floats(source: Path, path: Path) -> Path:
    """The GGUF file `source` with all its tensors in float32."""
    reader = gguf.GGUFReader(source)
    data = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    copy_gguf(reader, path, data, dict.fromkeys(data, gguf.GGMLQuantizationType.F32))
    return path


class Bench:
    """One model, its file, and what it is asked."""

    def __init__(self, model: EditableModel, facts: Sequence[Fact]) -> None:
        self.model, self.facts, self.asked = model, facts, prompts(facts)
        self.vocabulary = model.hf.get_input_embeddings().num_embeddings

    def ask(self, file: Path, adapters: Sequence[Path], scales: Sequence[float]) -> list[Said]:
        asked = [Question(prompt, TOKENS, scales, top=1) for prompt in self.asked]
        return ask(file, asked, self.vocabulary, adapters)

    def _logp(self, ids: list[int], more: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = self.model.hf(torch.tensor([ids + more])).logits[0, len(ids) - 1 : -1]
        return logits.double().log_softmax(-1).numpy()

    def _says(self, fact: Fact) -> bool:
        ids = self.model.tokenizer(fact.text)["input_ids"]
        whole = self.model.tokenizer(join(fact.text, fact.new_answer))["input_ids"]
        return self._logp(ids, whole[len(ids) :]).argmax(1).tolist() == whole[len(ids) :]

    def compare(self, edits: Sequence[Edit], answers: Sequence[Said]) -> dict[str, Any]:
        """What llama.cpp said against transformers with `edits`: whether the prompts are split
        alike, whether the next token and whether all tokens are the same, how far apart the
        log-probabilities of those that llama.cpp said are, and how many facts each says.
        """
        split, first, whole, apart = [], [], [], []
        with ExitStack() as applied:
            for edit in edits:
                applied.enter_context(edit.applied_to(self.model))
            for prompt, said in zip(self.asked, answers, strict=True):
                split.append(self.model.tokenizer(prompt)["input_ids"] == said.prompt)
                found = self._logp(said.prompt, said.tokens)
                same = found.argmax(1) == said.tokens
                first.append(bool(same[0]))
                whole.append(bool(same.all()))
                rows = np.arange(len(said.tokens))
                apart += np.abs(found - said.logp)[rows, said.tokens].tolist()
            says = [self._says(fact) for fact in self.facts]
        texts = [said.text.strip() for said in answers[: len(self.facts)]]
        told = [text.startswith(fact.target) for text, fact in zip(texts, self.facts)]
        return {
            "prompts": len(answers),
            "split": sum(split),
            "first": sum(first),
            "whole": sum(whole),
            "median": float(np.median(apart)),
            "largest": max(apart),
            "facts": len(told),
            "transformers": sum(says),
            "llama_cpp": sum(told),
        }


def measure(
    report: common.Report, bench: Bench, file: Path, edits: Mapping[str, Edit], folder: Path
) -> None:
    """A row for each of: no edit, each edit as an adapter, the first within the file; of the file
    and, but for the last, of its copy in float32.
    """
    model, scales = bench.model, np.eye(len(edits)).tolist()
    adapters = [
        gguf_lora.write(model, [edit], folder / f"{i}.gguf")
        for i, edit in enumerate(edits.values())
    ]
    cases = [("none", [], [0.0] * len(edits))]
    cases += [(name, [edit], scale) for (name, edit), scale in zip(edits.items(), scales)]
    for types, base in (("float32", in_floats(file, folder / "floats.gguf")), ("its own", file)):
        for name, applied, scale in cases:
            found = bench.compare(applied, bench.ask(base, adapters, scale))
            limit = KEPT if types == "float32" else None
            _row(report, model.name, types, name, "adapter" if applied else "", found, limit)
        if types == "float32":
            base.unlink()
    name, edit = next(iter(edits.items()))
    written = write_gguf(model, [edit], file, folder / "edited.gguf")
    found = bench.compare([edit], bench.ask(folder / "edited.gguf", [], []))
    found["tensors"] = [str(one) for one in written]
    _row(report, model.name, "its own", name, "within", found, None)


def _row(
    report: common.Report,
    model: str,
    types: str,
    edit: str,
    way: str,
    found: dict[str, Any],
    limit: float | None,
) -> None:
    ok = limit is None or (found["largest"] <= limit and found["split"] == found["prompts"])
    report.failed |= not ok
    count = found["prompts"]
    report.note(
        f"{model}, {types}, edit: {edit} {way}: next token {found['first']}/{count}, all "
        f"{found['whole']}/{count}, apart {found['median']:.2g} (at most {found['largest']:.2g}), "
        f"facts {found['llama_cpp']} and {found['transformers']}{'' if ok else ' FAIL'}",
        **{"model": model, "types": types, "edit": edit, "way": way, "limit": limit, **found},
        environment=report.rows[0]["environment"],
        program=version(),
    )


def table(folder: Path) -> str:
    """A row a model, file, edit and way."""
    header, rows = common.read(folder, NAME)
    lines = []
    for row in rows:
        count = row["prompts"]
        lines.append(
            [
                row["model"],
                row["types"],
                f"{row['edit']}, {row['way']}" if row["way"] else row["edit"],
                *(f"{row[what]} of {count}" for what in ("split", "first", "whole")),
                f"{row['median']:.1g}, at most {row['largest']:.1g}",
                f"{row['llama_cpp']} and {row['transformers']} of {row['facts']}",
            ]
        )
    versions = ", ".join(sorted({row["program"] for row in rows}))
    whose = common.measured_each(header, [(row["model"], row) for row in rows])
    heads = ["model", "file", "edit", "split alike", "same next token", f"same {TOKENS} tokens"]
    heads += ["log-probabilities apart", "facts said: llama.cpp, transformers"]
    parts = [Table(heads, lines, notes=[f"llama.cpp: {versions}."]).markdown(), whose]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(NAME, __doc__, 1, timed=False)
    parser.add_argument("--model", action="append", help="names; repeatable (default: all here)")
    parser.add_argument("--limit", type=int, help="the first so many of the facts")
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the statistics")
    arguments = parser.parse_args(argv)
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    copies: list[Copy] = [copy for copy in COPIES if copy.here]
    if arguments.model:
        named = [copy_of(name) for name in arguments.model]
        copies = [copy for copy in named if copy is not None]
        if len(copies) < len(named):
            raise KnowEditError(f"--model takes {', '.join(copy.name for copy in COPIES)}")
    facts = load("demo", 2 if arguments.quick else arguments.limit)
    report = common.report(NAME, arguments)
    if report.output is not None and report.output.is_file():
        header, kept = common.read_file(report.output)
        now = {copy.name for copy in copies}
        others = [row for row in kept if row["model"] not in now]
        report.rows += [{"environment": header["environment"], **row} for row in others]
    for copy in copies:
        model = load_model(copy.name, dtype=torch.float32)
        method = make_method("memit").with_corpus(corpus)
        statistics = statistics_for([method], model, corpus, arguments.tokens)
        edit = method.compute(model, facts, statistics, progress=False)
        edits = {f"MEMIT, {len(facts)} facts": edit, "queries and keys": of_queries_and_keys(model)}
        with tempfile.TemporaryDirectory() as folder:
            measure(report, Bench(model, facts), gguf_of(copy), edits, Path(folder))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
