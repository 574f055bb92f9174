"""Key statistics of several layers: one partial pass (ours) against a pass for every layer (the peers).

The same documents, cut into the same pieces, the same tokens counted. Ours is the public call with everything it does
(tokenising, NaN checks, audit, files). The peer is given its tokens for nothing, and the pieces are short, which keeps its
padding low. It sorts groups of 100 documents: with fewer pieces than that it pads more than it would on a real corpus
(20 % instead of 11 % at 6,000 tokens), so such a run says so and its rows carry no target.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.datasets import data_dir
from knowedit.model import EditableModel, load_model
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.text import documents

from . import common, peers
from .common import Check, relative_error

CORPUS = "enwiki_2021_sample_3MB.txt.gz"
SAME = 1e-6  # fp32 sums, ours against the peer's
CLOSE = 2e-2  # sums of keys that a bfloat16 model makes, against the float32 model's: its rounding, not ours
LENGTH = 512


def pieces_of(model: EditableModel, texts: Sequence[str], length: int = LENGTH) -> list[list[int]]:
    """The pieces `key_statistics` makes of `texts`."""
    length = min(length, model.max_length)
    rows = [model.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return [ids[i : i + length] for ids in rows for i in range(0, len(ids), length) if len(ids) - i > 1]


def take(model: EditableModel, source: Path, tokens: int) -> tuple[list[str], int]:
    """The first documents of a corpus that have at least `tokens` countable tokens, and how many they have."""
    texts: list[str] = []
    count = 0
    for text in documents(source):
        texts.append(text)
        count += sum(len(piece) - 1 for piece in pieces_of(model, [text]))
        if count >= tokens:
            break
    return texts, count


def one_pass(model: EditableModel, corpus: Path, layers: Sequence[int], tokens: int) -> KeyStatistics:
    """Ours, from text to files on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return key_statistics(model, layers, corpus, tokens, max_length=LENGTH, directory=folder, progress=False)


def measure(
    report: common.Report, model: EditableModel, half: EditableModel | None, texts: Sequence[str], tokens: int,
    layers: Sequence[int], budgets: Sequence[tuple[str, int]], repeats: int,
) -> None:  # fmt: skip
    """Rows for one thread count. `half`: the same model in bfloat16; `budgets`: (name, n_positions) of the peer."""
    pieces = pieces_of(model, texts)
    kept: dict[str, list[Tensor]] = {}

    def peer(name: str, positions: int) -> None:
        kept[name] = [peers.layer_stats(model, pieces, layer, positions) for layer in layers]

    def ours(name: str, which: EditableModel) -> None:
        found = one_pass(which, corpus, layers, tokens)
        kept[name] = [found[layer].total for layer in layers]

    def worst(name: str, other: str) -> float:
        return max(relative_error(a, b) for a, b in zip(kept[name], kept[other]))

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        runs: dict[str, Callable[[], Any]] = {name: partial(peer, name, n) for name, n in budgets}
        runs["ours fp32"] = partial(ours, "ours fp32", model)
        if half is not None:
            runs["ours bf16"] = partial(ours, "ours bf16", half)

        def warm() -> None:  # fingerprints, the compiled kernels, first allocations
            few = sum(len(piece) - 1 for piece in pieces[:2])
            for which in (model, half) if half is not None else (model,):
                one_pass(which, corpus, layers, few)
            peers.layer_stats(model, pieces[:2], layers[0], budgets[0][1])

        seconds = common.interleave(runs, repeats, warm=warm)
    span = f"statistics, layers {layers[0]}..{layers[-1]}, {tokens} tokens"
    enough = len(pieces) >= peers.SORTED
    if not enough:
        print(f"only {len(pieces)} pieces: the peer pads more than on a real corpus; use more --tokens for a fair ratio")
    details: dict[str, Any] = {
        "layers": list(layers),
        "tokens": tokens,
        "documents": len(texts),
        "pieces": len(pieces),
        "piece": LENGTH,
    }
    for name, positions in budgets:
        padding = 1 - sum(map(len, pieces)) / sum(
            len(batch) * max(map(len, batch)) for batch in peers.padded_batches(pieces, 3 * positions)
        )
        more = {**details, "peer_budget": 3 * positions, "peer_padding": round(padding, 4)}
        same = Check("same sums", worst("ours fp32", name), SAME)
        report.compare(
            f"{span}, fp32 vs {name}", seconds, name, [same], ours="ours fp32", target=4.0 if enough else None, **more
        )
        if half is not None:
            close = Check("sums of a bf16 model", worst("ours bf16", name), CLOSE)
            report.compare(
                f"{span}, bf16 vs {name}", seconds, name, [close], ours="ours bf16", target=7.0 if enough else None, **more
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("statistics", __doc__, 3)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument("--budgets", nargs="+", default=["memit", "easyedit"], choices=["memit", "easyedit"])
    arguments = parser.parse_args(argv)
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    model = load_model(arguments.model, dtype=torch.float32)
    half = load_model(arguments.model, dtype=torch.bfloat16)
    positions = {"memit": 2048, "easyedit": model.max_length}
    budgets = [(f"{name} (3 x {positions[name]})", positions[name]) for name in arguments.budgets]
    texts, tokens = take(model, corpus, 1500 if arguments.quick else arguments.tokens)
    report = common.report("statistics", arguments, model=model.name, corpus=corpus.name)
    for count in arguments.threads:
        with common.threads(count):
            measure(report, model, half, texts, tokens, arguments.layers, budgets, arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
