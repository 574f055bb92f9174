"""llm-compressor's `oneshot` with GPTQ, the whole call, on its own Hessians and on `SecondMoment`.

    python -m benchmarks.oneshot [--blocks 6] [--texts 16] [--length 256]

The default model's first blocks are quantised to four bits (W4A16, groups of 64) on calibration
texts, as llm-compressor's users do it: with its own modifier and with
examples/llmcompressor/modifier.py, in turn, each on a fresh copy of the model. One more run adds
the Hessians in float64, and of the same inputs the other two as well: it says how far these are
off, and what weights come of Hessians that are not rounded. Perplexity is of texts that were not
calibrated on. Seconds are CPU-seconds of this process. Needs `pip install llmcompressor`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.facts.sets import data_dir
from knowedit.io.tables import Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit_kernels import SecondMoment

from . import common
from .common import Check, relative_error
from .hessian import LIMIT, calibration_texts
from .sequential import CORPUS

MODIFIER = Path(__file__).resolve().parents[1] / "examples" / "llmcompressor" / "modifier.py"
#: The scheme W4A16, but for its groups of 128, which 576 columns cannot be divided into.
FOUR_BITS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 64,
}
#: The ways, as the page calls them.
THEIRS, OURS, EXACT = "its own, float32", "SecondMoment", "float64"


def modifiers() -> dict[str, Any]:
    """The modifier of each way: a class that counts the CPU-seconds of its Hessians (`spent`) and
    the bytes that they take at most (`held`).
    """
    theirs = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
    helpers = importlib.import_module("llmcompressor.modifiers.gptq.helpers")
    spec = importlib.util.spec_from_file_location("modifier", MODIFIER)
    assert spec is not None and spec.loader is not None
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)

    def counted(kind: Any) -> Any:
        """The class, counting."""

        class Counted(kind):  # type: ignore[misc]
            def calibrate_module(self, *given: Any) -> None:
                start = time.process_time()
                super().calibrate_module(*given)
                Counted.spent += time.process_time() - start

            def compress_modules(self) -> None:
                kept = {id(one): one for one in self._hessians.values()}.values()
                Counted.held = max(Counted.held, sum(map(_bytes, kept)))
                super().compress_modules()

            def summed(self) -> Any:
                start = time.process_time()
                found = super().summed()
                Counted.spent += time.process_time() - start
                return found

        Counted.spent, Counted.held = 0.0, 0  # pydantic would take what the class lists as settings
        return Counted

    class Exact(theirs):  # type: ignore[misc]
        """In float64, with the other two beside it."""

        def calibrate_module(self, module: Any, args: Any, _: Any) -> None:
            rows, width = args[0].flatten(0, -2), module.in_features
            if module not in self._hessians:
                self._hessians[module] = torch.zeros(width, width, dtype=torch.float64)
                self._num_samples[module] = torch.zeros(())
                beside[module] = [helpers.make_empty_hessian(module), SecondMoment(width)]
            self._hessians[module].addmm_(rows.double().T, rows.double(), alpha=2)
            self._num_samples[module] += len(args[0])
            helpers.accumulate_hessian(args[0], module, beside[module][0], torch.zeros(()))
            beside[module][1].update(rows)

        def compress_modules(self) -> None:
            for module, exact in self._hessians.items():
                theirs, ours = beside.pop(module)
                for way, H in ((THEIRS, theirs), (OURS, (2 * ours.sum()).float())):
                    Exact.errors[way] = max(Exact.errors[way], relative_error(H, exact))
                self._hessians[module] = exact.float()
            super().compress_modules()

    beside: dict[Any, list[Any]] = {}
    Exact.errors = {THEIRS: 0.0, OURS: 0.0}
    return {THEIRS: counted(theirs), OURS: counted(ours.MomentGPTQ), EXACT: Exact}


def _bytes(one: Tensor | SecondMoment) -> int:
    return one.nbytes if isinstance(one, Tensor) else 8 * one.dim**2


def quantised(model: EditableModel, kind: Any, ids: Tensor, blocks: int) -> tuple[Any, float]:
    """A copy of the model whose first blocks went through `oneshot`, and the CPU-seconds of it."""
    from datasets import Dataset
    from llmcompressor import oneshot

    first = "|".join(map(str, range(blocks)))
    hf = copy.deepcopy(model.hf)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
    chosen = [rf"re:model\.layers\.({first})\..*_proj"]
    recipe = kind(config_groups={"group_0": {"targets": chosen, "weights": FOUR_BITS}})
    start = time.process_time()
    oneshot(
        model=hf,
        processor=model.tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    return hf, time.process_time() - start


@torch.no_grad()
def perplexity(hf: Any, ids: Tensor) -> float:
    """Of texts `[texts, length]`."""
    return float(torch.stack([hf(row[None], labels=row[None]).loss for row in ids]).mean().exp())


def weights(hf: Any, blocks: int) -> Tensor:
    """Of the quantised layers, in one row."""
    names = [f"model.layers.{index}." for index in range(blocks)]
    return torch.cat(
        [
            weight.detach().flatten()
            for name, weight in hf.named_parameters()
            if name.startswith(tuple(names)) and name.endswith("_proj.weight")
        ]
    )


def measure(
    report: common.Report,
    model: EditableModel,
    ids: Tensor,
    other: Tensor,
    blocks: int,
    rounds: int,
) -> None:
    """One row for each way."""
    kinds = modifiers()
    exact, _ = quantised(model, kinds[EXACT], ids, blocks)
    wanted, right = weights(exact, blocks), perplexity(exact, other)
    del exact
    whole: dict[str, list[float]] = {THEIRS: [], OURS: []}
    spent: dict[str, list[float]] = {THEIRS: [], OURS: []}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for way in whole:
            kinds[way].spent = 0.0
            hf, seconds = quantised(model, kinds[way], ids, blocks)
            whole[way].append(seconds)
            spent[way].append(kinds[way].spent)
            found[way] = {
                "others": float((weights(hf, blocks) != wanted).double().mean()),
                "perplexity": perplexity(hf, other),
            }
    before = perplexity(model.hf, other)
    for way, seconds in spent.items():
        report.compare(
            way,
            {"ours": seconds, "baseline": spent[THEIRS]},
            "baseline",
            [Check("Hessian", kinds[EXACT].errors[way], LIMIT)],
            whole_call=statistics.median(whole[way]),
            cpu_seconds=statistics.median(seconds),
            megabytes=kinds[way].held / 1e6,
            other_weights=found[way]["others"],
            perplexity=found[way]["perplexity"],
            perplexity_of_float64=right,
            perplexity_before=before,
            blocks=blocks,
            tokens=ids.numel(),
            weights=len(wanted),
            compressor=importlib.metadata.version("llmcompressor"),
        )


def table(folder: Path = common.RESULTS) -> str:
    """Markdown of results/oneshot.jsonl, one line a way."""
    header, rows = common.read(folder, "oneshot")
    heads = [
        *("Hessians", "whole call, CPU-s", "of it the Hessians", "times as fast [spread]", "MB"),
        *("error of H", "weights other than of float64", "perplexity"),
    ]
    lines = [
        [
            row["case"],
            f"{row['whole_call']:.1f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['speedup']:.2f}x [{row['spread'][0]:.2f}, {row['spread'][1]:.2f}]",
            f"{row['megabytes']:.0f}",
            f"{row['checks'][0]['value']:.0e}",
            f"{100 * row['other_weights']:.2g} %",
            f"{row['perplexity']:.4f}",
        ]
        for row in rows
    ]
    one = rows[0]
    about = (
        f"{header['model']}, {one['blocks']} blocks in four bits, {one['tokens']:,} tokens, "
        f"llm-compressor {one['compressor']}, one thread. Perplexity on other texts: "
        f"{one['perplexity_before']:.4f} before, {one['perplexity_of_float64']:.4f} with float64 "
        f"Hessians."
    )
    return Table(heads, lines, notes=[about, common.measured_on(header)]).markdown()


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("oneshot", __doc__, repeats=2)
    parser.add_argument("--blocks", type=int, default=6, help="of the model, from the first on")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--length", type=int, default=256, help="tokens a text")
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("llmcompressor") is None:
        raise SystemExit("llm-compressor is not installed: pip install llmcompressor")
    logging.disable(logging.INFO)
    model = load_model(dtype="float32")
    texts, length, blocks = (
        (2, 64, 1) if arguments.quick else (arguments.texts, arguments.length, arguments.blocks)
    )
    corpus = (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    # as many texts again, which no layer is calibrated on
    ids = calibration_texts(model, corpus, 2 * texts, length)
    report = common.report("oneshot", arguments, model=model.name, corpus=corpus.name)
    with common.threads(1):
        rounds = 1 if arguments.quick else arguments.repeats
        measure(report, model, ids[:texts], ids[texts:], blocks, rounds)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
