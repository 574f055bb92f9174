"""Key statistics of several layers: one partial pass (ours) against a pass for every layer (the
peers).

The same documents, cut into the same pieces, the same tokens counted. Ours is the public call with
everything it does (tokenising, NaN checks, two halves, audit, files). The peer is given its tokens
for nothing. MEMIT's batching gets pieces of 512 tokens, which keeps its padding low; EasyEdit's is
run as it ships, with pieces as long as the model's context and batches of three contexts, and ours
on the same pieces. The peer sorts groups of 100 documents: with fewer pieces than that it pads more
than on a real corpus (20 % instead of 11 % at 6,000 tokens), so such a run says so and carries no
target.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.cli.options import parse_layers
from knowedit.facts.sets import data_dir
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.corpus.corpus import Corpus

from . import common, peers
from .common import Check, relative_error

CORPUS = "enwiki_2021_sample_3MB.txt.gz"
SAME = 1e-6  # fp32 sums, ours against the peer's
# sums of keys that a bfloat16 model makes, against the float32 model's: its rounding, not ours
CLOSE = 2e-2
LENGTH = 512


@dataclass(frozen=True)
class Peer:
    """One peer's batching: its name, the `n_positions` that makes its budget, the tokens of its
    longest pieces.
    """

    name: str
    positions: int
    length: int = LENGTH
    targets: tuple[float, float] = (4.0, 7.0)  # float32, bfloat16


def pieces_of(model: EditableModel, texts: Sequence[str], length: int = LENGTH) -> list[list[int]]:
    """The pieces `key_statistics` makes of `texts`."""
    length = min(length, model.max_length)
    rows = [model.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    return [
        ids[i : i + length]
        for ids in rows
        for i in range(0, len(ids), length)
        if len(ids[i : i + length]) > 1
    ]


def take(model: EditableModel, source: Path, tokens: int) -> tuple[list[str], int]:
    """The first documents of a corpus that have at least `tokens` countable tokens, and how many
    they have.
    """
    texts: list[str] = []
    count = 0
    for text in Corpus.parse(source).documents():
        texts.append(text)
        count += sum(len(piece) - 1 for piece in pieces_of(model, [text]))
        if count >= tokens:
            break
    return texts, count


def one_pass(
    model: EditableModel, corpus: Path, layers: Sequence[int], tokens: int, length: int = LENGTH
) -> KeyStatistics:
    """Ours, from text to files on disk."""
    with tempfile.TemporaryDirectory() as folder:
        return key_statistics(
            model, layers, corpus, tokens, max_length=length, directory=folder, progress=False
        )


def measure(
    report: common.Report,
    model: EditableModel,
    half: EditableModel | None,
    texts: Sequence[str],
    layers: Sequence[int],
    peer: Peer,
    repeats: int,
) -> None:
    """Rows against one peer for one thread count. `half`: the same model in bfloat16."""
    pieces = pieces_of(model, texts, peer.length)
    tokens = sum(len(piece) - 1 for piece in pieces)
    kept: dict[str, list[Tensor]] = {}

    def theirs() -> None:
        kept[peer.name] = [
            peers.layer_stats(model, pieces, layer, peer.positions) for layer in layers
        ]

    def ours(name: str, which: EditableModel) -> None:
        found = one_pass(which, corpus, layers, tokens, peer.length)
        kept[name] = [found[layer].total for layer in layers]

    def worst(name: str) -> float:
        return max(relative_error(a, b) for a, b in zip(kept[name], kept[peer.name]))

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        corpus.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
        )
        runs: dict[str, Callable[[], Any]] = {
            peer.name: theirs,
            "ours fp32": partial(ours, "ours fp32", model),
        }
        if half is not None:
            runs["ours bf16"] = partial(ours, "ours bf16", half)

        def warm() -> None:  # fingerprints, the compiled kernels, first allocations
            few = sum(len(piece) - 1 for piece in pieces[:2])
            for which in (model, half) if half is not None else (model,):
                one_pass(which, corpus, layers, few, peer.length)
            peers.layer_stats(model, pieces[:2], layers[0], peer.positions)

        seconds = common.interleave(runs, repeats, warm=warm)
    enough = len(pieces) >= peers.SORTED
    if not enough:
        print(
            f"only {len(pieces)} pieces: the peer pads more than on a real corpus; use more "
            f"--tokens for a fair ratio"
        )
    padded = sum(
        len(batch) * max(map(len, batch))
        for batch in peers.padded_batches(pieces, 3 * peer.positions)
    )
    details: dict[str, Any] = {
        "layers": list(layers),
        "tokens": tokens,
        "documents": len(texts),
        "pieces": len(pieces),
        "piece": peer.length,
        "peer_budget": 3 * peer.positions,
        "peer_padding": round(1 - sum(map(len, pieces)) / padded, 4),
    }
    checks = {"ours fp32": Check("same sums", worst("ours fp32"), SAME)}
    if half is not None:
        checks["ours bf16"] = Check("sums of a bf16 model", worst("ours bf16"), CLOSE)
    for (name, check), target in zip(checks.items(), peer.targets):
        case = (
            f"statistics, layers {layers[0]}..{layers[-1]}, {tokens} tokens, {name[5:]} vs "
            f"{peer.name}"
        )
        report.compare(
            case,
            seconds,
            peer.name,
            [check],
            ours=name,
            target=target if enough else None,
            **details,
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("statistics", __doc__, 3)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--layer", action=common.Repeated, default=["5-9"], help="a number or a range"
    )
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--corpus", type=Path, help=f"text (default: {CORPUS} in KNOWEDIT_DATA)")
    parser.add_argument(
        "--peer",
        action=common.Repeated,
        default=["memit", "easyedit"],
        choices=["memit", "easyedit"],
    )
    arguments = parser.parse_args(argv)
    layers = parse_layers(arguments.layer) or ()
    corpus = arguments.corpus or (data_dir() or Path("KNOWEDIT_DATA")) / CORPUS
    model = load_model(arguments.model, dtype=torch.float32)
    half = load_model(arguments.model, dtype=torch.bfloat16)
    context = model.max_length
    known = {
        "memit": Peer("memit (3 x 2048)", 2048),
        "easyedit": Peer(f"easyedit (3 x {context})", context, context, targets=(10.0, 10.0)),
    }
    texts, _ = take(model, corpus, 1500 if arguments.quick else arguments.tokens)
    report = common.report("statistics", arguments, model=model.name, corpus=corpus.name)
    for count in arguments.threads:
        with common.threads(count):
            for name in arguments.peer:
                measure(report, model, half, texts, layers, known[name], arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
