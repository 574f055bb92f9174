"""`knowedit doctor` and `knowedit inspect`: what is here, and what is in a file."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knowedit.edits import edit, history
from knowedit.edits.export import folder as checkpoint
from knowedit.errors import ConfigError, KnowEditError
from knowedit.io.tensors import format_of, read_file
from knowedit.io.versions import software_versions
from knowedit.methods.learned.mend import network as mend_network
from knowedit.methods.learned.serac import memory as memory_edit
from knowedit.methods.learned.serac import network as serac_network
from knowedit.statistics.files import store

SHOWN = 12  # changed weights listed


def describe(path: Path) -> str:
    """A readable summary of an edit, a statistics file or an edited model's folder.

    Raises:
        KnowEditError: it is none of these, or damaged.
    """
    if path.is_dir():
        record = path / checkpoint.RECORD
        if not record.exists():
            raise KnowEditError(
                f"{path} is not a folder written by `knowedit apply` (it has no "
                f"{checkpoint.RECORD})"
            )
        header, tensors = read_file(record, checkpoint.FORMAT, "an undo record")
        lines = [f"edited model, from {header['model']} (fingerprint {header['fingerprint']})"]
        for made in header["edits"]:
            lines += [
                f"  {made['method']} {made['key']}",
                *(f"    {_fact(fact)}" for fact in made["facts"]),
            ]
        return "\n".join([*lines, f"  undo restores: {', '.join(sorted(tensors))}"])
    kind = format_of(path)
    formats = (edit.FORMAT, *edit.EARLIER, memory_edit.FORMAT, *memory_edit.EARLIER)
    if kind in formats:
        return _edit(edit.Edit.load(path))
    if kind in (mend_network.FORMAT, serac_network.FORMAT):
        return _network(*read_file(path, kind, "a network"))
    if kind in (history.FORMAT, *history.EARLIER):
        return "\n\n".join(map(_edit, history.History.load(path).edits))
    if kind == store.FORMAT:
        return _statistics(store.LayerStatistics.load(path))
    raise KnowEditError(f"{path} is a safetensors file, but not one of ours")


def _fact(fact: dict[str, Any]) -> str:
    return f"{fact['prompt'].replace('{}', fact['subject'])} -> {fact['target']}"


def _edit(made: edit.Edit) -> str:
    report = made.report
    lines = [
        f"{made.method_name} edit {made.key}",
        f"  model fingerprint  {made.fingerprint}",
        f"  facts              {len(made.facts)}",
        *(f"    {_fact(fact.to_dict())}" for fact in made.facts[:20]),
    ]
    for layer, chosen in report.layers.items():
        norm = report.relative_norm.get(layer)
        lines.append(
            f"  layer {layer:<3}          gain {chosen['gain']:.3f}"
            + (f", |delta|/|W| {norm:.3f}" if norm is not None else "")
        )
    for name, change in list(made.changes.items())[:SHOWN]:
        dense = f"dense {list(change.dense().shape)}" if change.rank is None else ""
        lines.append(f"  {name}  {dense or f'rank {change.rank}'}")
    if len(made.changes) > SHOWN:
        lines.append(f"  ... and {len(made.changes) - SHOWN} more weights")
    if made.config:
        lines.append(f"  made by            {_method(made)}")
    if made.software:
        lines.append(
            "  with               " + ", ".join(f"{n} {v}" for n, v in made.software.items())
        )
    return "\n".join(lines + [f"  note: {warning}" for warning in made.warnings])


def _method(made: edit.Edit) -> str:
    """Its settings that are not the defaults, or its name where they were objects."""
    try:
        return repr(made.method())
    except ConfigError:
        return str(made.config["kind"])


def _network(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    report = header["report"]
    return "\n".join(
        [
            f"{header['format'].partition('/')[0].removeprefix('knowedit-').upper()} network",
            f"  model fingerprint  {header['fingerprint']}",
            f"  trained on         {report['facts']['training']} facts, {report['seconds']:.0f} s",
            f"  parameters         {report['trainable_parameters']:,}",
            f"  validation         {report['validation']}",
        ]
    )


def _statistics(found: store.LayerStatistics) -> str:
    recipe = found.recipe
    return "\n".join(
        [
            f"key statistics of {found.module}, {found.model}",
            f"  model fingerprint  {recipe.fingerprint}",
            f"  tokens             {found.count:,} from {recipe.corpus.get('name')}, pieces of "
            f"at most {recipe.max_length}",
            f"  trace of C         {float(found.total.trace()) / found.count:.6g}",
            f"  first/other norm   {found.first_norm / max(found.other_norm, 1e-30):.2f}"
            + ("" if recipe.skip_first else " (first tokens included)"),
            *(
                f"  {name:18} {value}"
                for name, value in found.extra.items()
                if name != "convergence"
            ),
            *(
                f"  {'error of ' + name:18} ±{look[name][0]:.1%} (quartiles {look[name][1]:.1%} "
                f"to {look[name][2]:.1%})"
                for look in found.extra.get("convergence", [])[-1:]
                for name in ("solve", "null_space")
                if name in look
            ),
        ]
    )


def diagnose(model: str | None = None) -> dict[str, dict[str, Any]]:
    """Hardware, versions, the implementation each kernel would use here, and what is known of
    `model`.
    """
    names = ("torch", "triton", "transformers", "knowedit-kernels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, dict[str, Any]] = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else "none seen by torch",
        },
        "versions": {
            **software_versions(names),
        },
    }
    report["kernels"] = _kernels(device)
    if model is not None:
        from knowedit.models.families import preset_for
        from knowedit.models.load import load_model

        loaded = load_model(model, say=lambda _: None)
        preset = preset_for(loaded)
        report["model"] = {
            "name": loaded.name,
            "layers": len(loaded.layers),
            "d_ff": loaded.d_ff,
            "dtype": str(loaded.dtype)[6:],
            "edited weight": loaded.layout.projection,
            "fingerprint": loaded.fingerprint,
            "preset": f"layers {list(preset.layers)}"
            + ("" if preset.measured else f", {preset.origin}: not measured on it"),
        }
    return report


def _kernels(device: str) -> dict[str, str]:
    """Which implementation each op has run here just now, on small inputs, and why the better ones
    did not.
    """
    from knowedit_kernels import SecondMoment, explain, low_rank_update_
    from knowedit_kernels.jvp import attention_jvp, rms_norm_jvp, swiglu_jvp
    from knowedit_kernels.target_loss import target_loss

    def moment(x: Tensor) -> None:
        sums = SecondMoment(x.shape[1], device=device)
        sums.update(x)
        sums.sum()

    def attention(x: Tensor) -> None:
        heads = x[:, :128].reshape(1, 2, 64, 64)
        attention_jvp(heads, heads, heads, heads[None], heads[None], heads[None])

    probes: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
        "second moment": ("second_moment_", moment),
        "low-rank update": (
            "low_rank_update_",
            lambda x: low_rank_update_(x.clone(), x[:, :4], x.mT[:, :4].contiguous()),
        ),
        "target loss": (
            "target_losses",
            lambda x: target_loss(x, x, torch.arange(64, device=device)),
        ),
        "RMSNorm tangents": ("rms_norm_jvp", lambda x: rms_norm_jvp(x, x[0], x[None])),
        "SwiGLU tangents": ("swiglu_jvp", lambda x: swiglu_jvp(x, x, x[None], x[None])),
        "attention tangents": ("attention_jvp", attention),
    }
    kernels = {}
    for name, (op, run) in probes.items():
        for dtype in (torch.float32, torch.bfloat16):
            run(
                torch.randn(
                    64, 256, device=device, generator=torch.Generator(device).manual_seed(0)
                ).to(dtype)
            )
            kernels[f"{name} {str(dtype)[6:]}"] = str(explain(op))
    return kernels
