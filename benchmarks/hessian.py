"""The Hessian of a layer-wise quantiser or pruner, the inputs' X'X of every linear layer over
calibration texts: as GPTQ, SparseGPT and llm-compressor add it up, and as a `SecondMoment`.

A real calibration loop over the default model: texts of one length go through its first blocks, and
the inputs of every linear layer are added up. The packages keep a running mean in float32 for each
layer: scale what there is, widen and scale the inputs, multiply, add. Some projections have the
same input, and so the same Hessian: some ways add it once. Where llm-compressor is installed, its
own function is one more way. Seconds are CPU-seconds of this
process without those of the model, all ways in turn.
"""

from __future__ import annotations

import functools
import gzip
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.facts.sets import data_dir
from knowedit.io.tables import Table
from knowedit.models import partial as parts
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit_kernels import SecondMoment

from . import common
from .common import Check, relative_error
from .sequential import CORPUS

#: Linear layers whose input is another one's.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
#: Where llm-compressor adds its Hessians, from version 0.14 on.
COMPRESSOR = "llmcompressor.modifiers.gptq.helpers"
#: Share of the mean diagonal that the packages add before they factor.
DAMP = 0.01
#: How far a Hessian may be from the float64 one, relative.
LIMIT = 1e-5


class RunningMean:
    """2 E[x x'] in float32 `[width, width]`, as the packages keep it."""

    def __init__(self, width: int) -> None:
        self.H, self.count = torch.zeros(width, width), 0

    def update(self, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.H *= self.count / (self.count + len(rows))
        self.count += len(rows)
        scaled = (2 / self.count) ** 0.5 * rows.float()
        self.H += scaled.T @ scaled

    def hessian(self) -> Tensor:
        return self.H


class Compressor(RunningMean):
    """By llm-compressor's own function, which adds and divides at the end; it counts texts, we
    tokens.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.module = nn.Linear(width, 1, bias=False, device="meta")
        self.texts = torch.zeros(())
        self.add = importlib.import_module(COMPRESSOR).accumulate_hessian

    def update(self, inputs: Tensor) -> None:
        self.count += inputs[..., 0].numel()
        self.H, self.texts = self.add(inputs, self.module, self.H, self.texts)

    def hessian(self) -> Tensor:
        return self.H / self.count


class Exact(RunningMean):
    """The same in float64: the reference."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.H = self.H.double()

    def update(self, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        self.count += len(rows)
        self.H += rows.T @ rows

    def hessian(self) -> Tensor:
        return 2 / self.count * self.H


class Ours(SecondMoment):
    """A `SecondMoment` under the packages' name and factor."""

    def hessian(self) -> Tensor:
        return 2 * self.moment()


def linears(model: EditableModel, blocks: int) -> dict[str, nn.Linear]:
    """The linear layers of the first blocks, by name below the model."""
    first = tuple(f"{model.layout.layer(index)}." for index in range(blocks))
    return {
        name: module
        for name, module in model.hf.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(first)
    }


def distinct(names: Sequence[str]) -> list[str]:
    """Those whose input no other one has."""
    return [name for name in names if name.rpartition(".")[2] not in SAME_INPUT]


def leader(name: str) -> str:
    """The layer that has the same input and is counted for it."""
    path, _, last = name.rpartition(".")
    return f"{path}.{SAME_INPUT.get(last, last)}"


def calibrate(
    model: EditableModel,
    ids: Tensor,
    batch: int,
    widths: dict[str, int],
    kind: Callable[[int], Any],
) -> tuple[dict[str, Tensor], float]:
    """Hessians by `kind` over all texts `[texts, length]`, and the CPU-seconds that these took:
    from the first inputs to the finished matrices.
    """
    sums = {name: kind(width) for name, width in widths.items()}
    spent = 0.0

    def take(name: str, inputs: Tensor) -> None:
        nonlocal spent
        start = time.process_time()
        sums[name].update(inputs)
        spent += time.process_time() - start

    for part in ids.split(batch):
        parts.read(model, part, inputs={name: functools.partial(take, name) for name in widths})
    start = time.process_time()  # a SecondMoment adds up its last rows when it is asked
    found = {name: one.hessian() for name, one in sums.items()}
    return found, spent + time.process_time() - start


def divisors(H: Tensor) -> Tensor:
    """What GPTQ divides a column's error by: the diagonal of the upper Cholesky factor of the
    damped Hessian's inverse, computed in float64.
    """
    damped = H.double()
    damped = damped + DAMP * damped.diagonal().mean() * torch.eye(len(damped), dtype=damped.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).diagonal()


def calibration_texts(model: EditableModel, path: Path, texts: int, length: int) -> Tensor:
    """`[texts, length]` token ids from the beginning of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        ids = model.tokenizer(file.read(12 * texts * length))["input_ids"]
    if len(ids) < texts * length:
        raise SystemExit(f"{path} has {len(ids)} tokens, not {texts * length}")
    return torch.tensor(ids[: texts * length]).view(texts, length)


def measure(
    report: common.Report, model: EditableModel, ids: Tensor, blocks: int, rounds: int
) -> None:
    """One row for each way."""
    layers = {name: module.in_features for name, module in linears(model, blocks).items()}
    once = {name: layers[name] for name in distinct(list(layers))}
    ways: dict[str, tuple[dict[str, int], Callable[[int], Any]]] = {
        "fp32 running mean, every layer": (layers, RunningMean),
        "SecondMoment, every layer": (layers, Ours),
        "fp32 running mean, every input": (once, RunningMean),
        "SecondMoment, every input": (once, Ours),
    }
    if importlib.util.find_spec("llmcompressor") is not None:
        ways["llm-compressor's own, every layer"] = layers, Compressor
    baseline = next(iter(ways))
    wanted, _ = calibrate(model, ids, 4, once, Exact)
    calibrate(model, ids[:1], 1, once, Ours)  # whatever is compiled at first use
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    found: dict[str, dict[str, Tensor]] = {}
    for _ in range(rounds):
        for way, (widths, kind) in ways.items():
            found[way], spent = calibrate(model, ids, 4, widths, kind)
            seconds[way].append(spent)
    for way, (widths, kind) in ways.items():
        worst = max(relative_error(H, wanted[leader(name)]) for name, H in found[way].items())
        deepest = max(once, key=lambda name: (once[name], name))
        theirs, right = divisors(found[way][deepest]), divisors(wanted[deepest])
        size = 8 if kind is Ours else 4
        report.compare(
            way,
            {"ours": seconds[way], "baseline": seconds[baseline]},
            "baseline",
            [Check("Hessian", worst, LIMIT)],
            tokens=ids.numel(),
            blocks=blocks,
            hessians=len(widths),
            cpu_seconds=statistics.median(seconds[way]),
            megabytes=sum(size * width**2 for width in widths.values()) / 1e6,
            divisors=float(((theirs - right) / right).abs().max()),
        )


def table(folder: Path) -> str:
    """Markdown: one line a way."""
    header, rows = common.read(folder, "hessian")
    lines = [
        [
            row["case"],
            str(row["hessians"]),
            f"{row['cpu_seconds']:.2f}",
            f"{row['speedup']:.2f}x [{row['spread'][0]:.2f}, {row['spread'][1]:.2f}]",
            f"{row['megabytes']:.0f}",
            f"{row['checks'][0]['value']:.0e}",
            f"{row['divisors']:.0e}",
        ]
        for row in rows
    ]
    heads = [
        "way",
        "sums",
        "CPU-seconds",
        "faster [spread]",
        "MB",
        "error of H",
        "of GPTQ's divisors",
    ]
    about = (
        f"{header['model']}, {rows[0]['blocks']} blocks, {rows[0]['tokens']:,} tokens, one thread; "
        f"errors are the largest relative ones against float64."
    )
    return Table(heads, lines, notes=[about, common.measured_on(header)]).markdown()


def no_picture(folder: Path, path: Path) -> None:
    """The page has none."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("hessian", __doc__, repeats=3)
    parser.add_argument("--blocks", type=int, default=3, help="of the model, from the first on")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens a text")
    arguments = parser.parse_args(argv)
    model = load_model(dtype="float32")
    texts, length, blocks = (
        (2, 64, 1) if arguments.quick else (arguments.texts, arguments.length, arguments.blocks)
    )
    corpus = (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    ids = calibration_texts(model, corpus, texts, length)
    report = common.report("hessian", arguments, model=model.name, corpus=corpus.name)
    with common.threads(1):
        measure(report, model, ids, blocks, 1 if arguments.quick else arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
