"""`knowedit doctor`: the machine, the versions, the kernels that run here, and what is known of a
model.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.io.files import cache_dir, leftovers, size_of
from knowedit.io.lines import named, number_of
from knowedit.io.versions import software_versions
from knowedit.models.calibration import sinks_of
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model
from knowedit.models.presets import preset_for
from knowedit_kernels import SecondMoment, explain, low_rank_update_
from knowedit_kernels.jvp import attention_jvp, rms_norm_jvp, swiglu_jvp
from knowedit_kernels.target_loss import target_loss

_STREAMS = {
    "identity": "added as it is",
    "gate": "through a gate",
    "other": "through a norm or another matrix",
}
VERSIONS = ("torch", "triton", "transformers", "knowedit-kernels")


def diagnose(model: str | None = None) -> dict[str, dict[str, Any]]:
    """Hardware, versions, the implementation each kernel would use here, and what is known of
    `model`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = {"machine": _machine(), "versions": {**software_versions(VERSIONS)}}
    report["kernels"] = {**_kernels(device)}
    if left := _leftovers(model):
        report["left by killed runs"] = {**left}
    if model is not None:
        loaded = load_model(model, say=lambda _: None)
        report["model"] = _model(loaded)
        report["checks"] = _checks(loaded)
    return report


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none seen by torch",
    }


def _leftovers(model: str | None) -> dict[str, str]:
    """Temporary files and folders that nobody writes any more: in the cache, here, beside the model
    and in its folder.
    """
    cache = cache_dir()
    places = {Path.cwd(), *(Path(where) for where, _, _ in os.walk(cache))}
    if model is not None and Path(model).is_dir():
        places |= {Path(model), Path(model).absolute().parent}
    found = {path.absolute() for place in places for path in leftovers(place)}
    return {
        str(path): f"{size_of(path) / 2**20:,.1f} MiB, may be deleted; the next run that writes it "
        "does so"
        for path in sorted(found)
    }


def _experts(loaded: EditableModel) -> dict[str, str]:
    """How many experts the layers have; nothing for a model without any."""
    of_layers = [loaded.layout.experts(layer) for layer in loaded.layout.editable]
    kinds = [f"{e.count} of size {e.width}, {e.top_k} a token" for e in of_layers if e]
    found = {kind: f"{kind} ({number_of(kinds.count(kind), 'layer')})" for kind in kinds}
    return {"routed experts": "; ".join(found.values())} if found else {}


def _model(loaded: EditableModel) -> dict[str, Any]:
    preset = preset_for(loaded)
    sinks = sinks_of(loaded).layers
    return {
        "name": loaded.name,
        "layers": len(loaded.layers),
        "d_ff": loaded.d_ff,
        "dtype": str(loaded.dtype)[6:],
        "edited weight": loaded.layout.pattern,
        "editable layers": loaded.layout.ranges,
        **_experts(loaded),
        "reaches the stream": _streams(loaded),
        "logits": _logits(loaded),
        "fingerprint": loaded.fingerprint,
        "attention sinks": named("layer", sinks) if sinks else "none",
        "default layers": f"{list(preset.layers)} ({preset.origin})",
    }


def _streams(loaded: EditableModel) -> str:
    """How the projections' outputs reach the residual stream, and in how many layers."""
    found = Counter(
        f"x {stream.factor:.4g}" if stream.kind == "factor" else _STREAMS[stream.kind]
        for stream in map(loaded.layout.stream, loaded.layout.editable)
    )
    return "; ".join(f"{how} ({number_of(count, 'layer')})" for how, count in found.items())


def _logits(loaded: EditableModel) -> str:
    head = loaded.layout.head
    cap = f", soft-cap {head.softcap:g}" if head.softcap else ""
    return {
        "plain": "the output embedding's",
        "scaled": f"the output embedding's x {head.scale:.4g}{cap}",
        "own": "made by the model's own forward pass",
    }[head.kind]


def _checks(loaded: EditableModel) -> dict[str, str]:
    """What was tried when the model was opened, against its plain forward pass."""
    return {
        check.name: f"{check.outcome} (off by {check.error:.1e})" for check in loaded.checkup.checks
    }


def _kernels(device: str) -> dict[str, str]:
    """Which implementation each op has run here just now, on small inputs, and why the better ones
    did not.
    """
    found = {}
    for name, (op, run) in _probes(device).items():
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator(device).manual_seed(0)
            run(torch.randn(64, 256, device=device, generator=generator).to(dtype))
            found[f"{name} {str(dtype)[6:]}"] = str(explain(op))
    return found


def _probes(device: str) -> dict[str, tuple[str, Callable[[Tensor], Any]]]:
    """Each op's name, and a call of it on `[64, 256]` values."""

    def moment(x: Tensor) -> None:
        sums = SecondMoment(x.shape[1], device=device)
        sums.update(x)
        sums.sum()

    def update(x: Tensor) -> None:
        low_rank_update_(x.clone(), x[:, :4], x.mT[:, :4].contiguous())

    def attention(x: Tensor) -> None:
        heads = x[:, :128].reshape(1, 2, 64, 64)
        attention_jvp(heads, heads, heads, heads[None], heads[None], heads[None])

    rows = torch.arange(64, device=device)
    return {
        "second moment": ("second_moment_", moment),
        "low-rank update": ("low_rank_update_", update),
        "target loss": ("target_losses", lambda x: target_loss(x, x, rows)),
        "RMSNorm tangents": ("rms_norm_jvp", lambda x: rms_norm_jvp(x, x[0], x[None])),
        "SwiGLU tangents": ("swiglu_jvp", lambda x: swiglu_jvp(x, x, x[None], x[None])),
        "attention tangents": ("attention_jvp", attention),
    }
