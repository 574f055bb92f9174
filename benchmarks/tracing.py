"""Causal tracing: the suffixes of all places at once (ours) against a whole forward pass a place,
as ROME's code has it.

The peer costs the same at every place, so it is timed on some of them, spread evenly; ours runs
all. The prediction is arithmetic: token-layers of both, a token at the head counted as the layers
that have as many weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knowedit.evaluation.tracing.tracing import KINDS, Trace, trace
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common
from .common import Check

SAME = 1e-5
PROMPTS = (
    ("The Eiffel Tower is in", "The Eiffel Tower"),
    ("The Colosseum is located in the city of", "The Colosseum"),
)
Place = tuple[str, int, int]  # kind, token, layer


def naive(model: EditableModel, found: Trace, places: Sequence[Place]) -> Tensor:
    """Indirect effects `[places]` the published way: for each place one pass of a clean row and all
    corrupted rows through the whole model, clean outputs copied over, logits of every token;
    `found` names the prompt, the noise and the answer."""
    (begin, end), samples, depth = found.subject, found.samples, len(model.layers)
    ids, _ = model.pad([model.row(found.prompt).ids])
    draw = torch.randn(
        samples, end - begin, model.hidden, generator=torch.Generator().manual_seed(found.seed)
    )

    def corrupt(_module, _inputs, output):
        output[1:, begin:end] += (found.deviation * draw).to(output)

    def restore(token: int):
        def hook(_module, _inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            states[1:, token] = states[0, token]

        return hook

    effects = []
    for kind, token, layer in [("hidden", 0, -1), *places]:  # the first one restores nothing
        width = found.window
        window = range(max(0, layer - width // 2), min(depth, layer - width // 2 + width))
        restored = [
            _module(model, kind, i) for i in ([layer] if kind == "hidden" else window) if i >= 0
        ]
        handles = [model.hf.get_input_embeddings().register_forward_hook(corrupt)]
        handles += [module.register_forward_hook(restore(token)) for module in restored]
        try:
            with torch.no_grad():
                logits = (
                    model.hf(ids.repeat(samples + 1, 1), use_cache=False).logits[1:, -1].float()
                )
        finally:
            for handle in handles:
                handle.remove()
        effects.append(logits.softmax(-1)[:, found.token].mean())
    return torch.stack(effects[1:]) - effects[0]


def _module(model: EditableModel, kind: str, layer: int) -> nn.Module:
    block = model.layers[layer]
    if kind == "hidden":
        return block
    return block.mlp if kind == "mlp" else getattr(block, "self_attn", None) or block.attn  # type: ignore[return-value]


def predicted(model: EditableModel, found: Trace) -> float:
    """Token-layers of the published way over ours, all kinds."""
    depth, length, samples, (begin, _) = (
        len(model.layers),
        len(found.tokens),
        found.samples,
        found.subject,
    )
    a_layer = sum(p.numel() for p in model.layers[0].parameters())
    head = model.hf.get_output_embeddings().weight.numel() / a_layer
    kinds = len(found.effect)
    theirs = kinds * (length - begin) * depth * (samples + 1) * length * (depth + head)
    ours = 0.0
    for kind in found.effect:
        for layer in range(depth):
            left = depth - (layer + 1 if kind == "hidden" else max(0, layer - found.window // 2))
            ours += sum(samples * ((length - at) * left + head) for at in range(begin, length))
    return theirs / ours


def measure(
    report: common.Report, model: EditableModel, text: tuple[str, str], step: int, repeats: int
) -> None:
    """One row: seconds for all places of all kinds; the peer on every `step`-th place, scaled."""
    found = trace(model, *text)
    (begin, _), depth = found.subject, len(model.layers)
    places = [
        (kind, at, layer)
        for kind in KINDS
        for at in range(begin, len(found.tokens))
        for layer in range(depth)
    ]
    some = places[step // 2 :: step]
    theirs: list[Tensor] = []

    def ours() -> None:
        trace(model, *text)

    def peer() -> None:
        theirs[:] = [naive(model, found, some)]

    seconds = common.interleave(
        {"peer": peer, "ours": ours}, repeats, warm=lambda: naive(model, found, some[:1])
    )
    seconds["peer"] = [s * len(places) / (len(some) + 1) for s in seconds["peer"]]
    error = max(abs(float(found.effect[k][t, i] - e)) for (k, t, i), e in zip(some, theirs[0]))
    ratio = predicted(model, found)
    report.compare(
        f"causal trace, {len(found.tokens)} tokens, {len(places)} places",
        seconds,
        "peer",
        [Check("same effects", error, SAME)],
        prompt=text[0],
        samples=found.samples,
        timed_places=len(some) + 1,
    )
    report.note(f"  predicted from token-layers: {ratio:.1f}x", case="prediction", predicted=ratio)


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser("tracing", __doc__, 3)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument(
        "--step", type=int, default=15, help="the peer is timed on every so many-th place"
    )
    arguments = parser.parse_args(argv)
    model = load_model(arguments.model, dtype=torch.float32)
    report = common.report("tracing", arguments, model=model.name)
    for threads in arguments.threads:
        with common.threads(threads):
            for text in PROMPTS[: 1 if arguments.quick else None]:
                step = 200 if arguments.quick else arguments.step
                measure(report, model, text, step, 1 if arguments.quick else arguments.repeats)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
