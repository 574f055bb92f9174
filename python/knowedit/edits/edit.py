"""`Edit`: a small, reversible change of a model's weights, with everything needed to check and to
undo it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.files import atomic_file, atomic_folder
from knowedit.models.editable import EditableModel
from knowedit.models.load import accepts_model
from knowedit_kernels.lowrank import Change, LedgerError

FORMAT = "knowedit-edit/1"


@dataclass(eq=False)
class Edit:
    """An update of a model's weights: low-rank ones `W_l += U_l V_lᵀ` of MLP output projections,
    and any others.

    Attributes:
        method: name of the editor that made it.
        factors: `{layer: (U [hidden, r], V [d_ff, r])}`, float32; rank r is the number of written
            keys.
        others: `{parameter: change}` of gradient methods: `(U [out, r], V [in, r])`, or a dense
            delta of the parameter's shape, float32; parameters as in `model.hf.named_parameters()`.
        facts: what it writes.
        fingerprint: of the unedited model it belongs to.
        report: what the editor measured and chose: `gain` (share of each planned change realised at
            the edited keys), `relative_norm` (|delta| / |W| per layer), `settings`, `warnings`.
        config: the whole record of the method that made it; `method()` rebuilds it.
        keys: `{layer: [n, d_ff]}` float32, where it was written; for a `History`, and not saved
            with the edit.
    """

    method: str
    factors: dict[int, tuple[Tensor, Tensor]]
    facts: list[Fact]
    fingerprint: str
    report: dict[str, Any] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict, repr=False)
    others: dict[str, Change] = field(default_factory=dict, repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)

    format: ClassVar[str] = FORMAT

    @property
    def warnings(self) -> list[str]:
        return list(self.report.get("warnings", []))

    @cached_property
    def key(self) -> str:
        """A name made from the method and the factors' bits."""
        digest = hashlib.blake2b(digest_size=8)
        for name, change in [*sorted(self.factors.items()), *sorted(self.others.items())]:
            digest.update(str(name).encode())
            for part in [change] if isinstance(change, Tensor) else change:
                digest.update(part.contiguous().cpu().numpy().tobytes())
        return f"{self.method}-{digest.hexdigest()}"

    @property
    def neurons(self) -> set[tuple[str, int]]:
        """(layer, neuron) of those it rewrites (NeuronPatch); no two edits in force may rewrite the
        same.
        """
        return {
            (layer, neuron)
            for layer, found in self.report.get("neurons", {}).items()
            for neuron in found
        }

    def delta(self, layer: int) -> Tensor:
        """The dense update of `layer`, `[hidden, d_ff]` float32."""
        left, right = self.factors[layer]
        return left @ right.T

    @accepts_model
    def changes(self, model: EditableModel) -> dict[str, Change]:
        """Every changed weight by its parameter's name in `model.hf`."""
        return {
            model.layout.weight_name(layer): pair for layer, pair in self.factors.items()
        } | self.others

    # -- on a model
    # ---------------------------------------------------------------------------------------------

    @accepts_model
    def check(self, model: EditableModel) -> None:
        """Raise EditError when this edit was made for another model."""
        if model.fingerprint != self.fingerprint:
            raise EditError(
                f"this {self.method} edit was made for a model with fingerprint "
                f"{self.fingerprint[:12]}, but {model.name} "
                f"has {model.fingerprint[:12]}: other weights or another dtype; compute the "
                f"edit again for this model"
            )
        for layer, (left, right) in self.factors.items():
            if left.shape[0] != model.hidden or right.shape[0] != model.d_ff:
                raise EditError(
                    f"layer {layer}: factors of shape {tuple(left.shape)}, {tuple(right.shape)} "
                    f"do not fit"
                )
        unknown = sorted(set(self.others) - {name for name, _ in model.hf.named_parameters()})
        if unknown:
            raise EditError(f"{model.name} has no parameter {', '.join(unknown)}")

    @accepts_model
    def is_applied(self, model: EditableModel) -> bool:
        return self.key in model.ledger.active

    @accepts_model
    def apply(self, model: EditableModel) -> None:
        """Write it into the model's weights, rounded once to their dtype together with every other
        active edit.

        Raises:
            EditError: it is already applied, belongs to another model, or rewrites a neuron that
                another edit rewrites.
        """
        self.check(model)
        if self.is_applied(model):
            raise EditError(
                f"this {self.method} edit is already applied to {model.name}; undo it first"
            )
        if model.router is not None:
            raise EditError(
                f"{model.name} has memory edits, which are of its unedited weights; undo them first"
            )
        active = model.ledger.active  # reset() may have taken some
        shared = [
            key
            for key, theirs in model.rewritten.items()
            if key in active and theirs & self.neurons
        ]
        if shared:
            raise EditError(
                f"this {self.method} edit rewrites neurons that {shared[0]} rewrites too, and "
                f"both would be lost: compute them "
                "together, or this one while the other is applied"
            )
        try:
            model.ledger.add_many(self.key, model.register(self.changes(model)))
        except (LedgerError, ValueError) as error:
            raise EditError(f"the {self.method} edit could not be applied: {error}") from error
        if self.neurons:
            model.rewritten[self.key] = self.neurons

    @accepts_model
    def undo(self, model: EditableModel) -> None:
        """Take it back. With no edit left every bit is what it was; edits may be undone in any
        order.

        Raises:
            EditError: it is not applied to this model, or something else has changed the weights
                since.
        """
        if not self.is_applied(model):
            raise EditError(f"this {self.method} edit is not applied to {model.name}")
        try:
            model.ledger.remove(self.key)
        except LedgerError as error:
            raise EditError(f"the {self.method} edit could not be undone: {error}") from error
        model.rewritten.pop(self.key, None)

    @accepts_model
    @contextmanager
    def applied_to(self, model: EditableModel) -> Iterator[EditableModel]:
        """Apply within a `with` block; undone at its end, also after an error."""
        self.apply(model)
        try:
            yield model
        finally:
            self.undo(model)

    # -- on disk
    # ------------------------------------------------------------------------------------------------  # noqa: E501

    def save(self, path: str | Path) -> Path:
        """Write the factors and a JSON header to one safetensors file, atomically."""
        header = {
            "format": FORMAT,
            "method": self.method,
            "fingerprint": self.fingerprint,
            "report": self.report,
            "config": self.config,
            "facts": [fact.to_dict() for fact in self.facts],
        }
        with atomic_file(path) as temporary:
            save_file(self.tensors(), temporary, metadata={"knowedit": json.dumps(header)})
        return Path(path)

    def tensors(self) -> dict[str, Tensor]:
        """The changes as a file holds them: `U` and `V`, or `delta`, of each layer or parameter."""
        found: dict[str, Tensor] = {}
        for name, change in [*self.factors.items(), *self.others.items()]:
            parts = (
                {"delta": change}
                if isinstance(change, Tensor)
                else {"U": change[0], "V": change[1]}
            )
            found |= {f"{name}.{part}": tensor.contiguous().cpu() for part, tensor in parts.items()}
        return found

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read a file written by `save`.

        Raises:
            EditError: the file is missing, damaged or of another kind.
        """
        kinds = {kind.format: kind for kind in (cls, *cls.__subclasses__())}
        header, tensors = read_file(path, tuple(kinds), "an edit")
        return kinds[header["format"]].of(header, tensors, header["fingerprint"])

    @classmethod
    def of(cls, about: dict[str, Any], tensors: Mapping[str, Tensor], fingerprint: str) -> Edit:
        """From `tensors()` and a header with `method`, `facts` and `report`."""
        changes: dict[str, Change] = {}
        for name in sorted({full.rpartition(".")[0] for full in tensors}):
            dense = tensors.get(f"{name}.delta")
            changes[name] = (tensors[f"{name}.U"], tensors[f"{name}.V"]) if dense is None else dense
        return cls(
            method=about["method"],
            factors={
                int(name): changes[name]  # type: ignore[misc]
                for name in sorted(filter(str.isdecimal, changes), key=int)
            },
            others={name: change for name, change in changes.items() if not name.isdecimal()},
            facts=[Fact.from_dict(fact) for fact in about["facts"]],
            fingerprint=fingerprint,
            report=about["report"],
            config=about.get("config", {}),
        )

    def to_peft(self, folder: str | Path, model: EditableModel) -> Path:
        """Write the edit as a LoRA adapter (peft, vLLM): `lora_B @ lora_A` is the update, scale 1.

        Raises:
            EditError: some of its changes are dense.
        """
        self.check(model)
        changes = self.changes(model)
        dense = sorted(name for name, change in changes.items() if isinstance(change, Tensor))
        if dense:
            raise EditError(
                f"this {self.method} edit changes {len(dense)} parameters densely ({dense[0]}, "
                f"...), which no LoRA adapter "
                "can hold; write it into a copy of the model instead (save_edited, `knowedit "
                "apply`)"
            )
        pairs = {name.removesuffix(".weight"): change for name, change in changes.items()}
        ranks = {name: left.shape[1] for name, (left, _) in pairs.items()}
        rank = max(ranks.values())
        pattern = {name: other for name, other in ranks.items() if other != rank}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model.name,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "fan_in_fan_out": model.layout.transposed,
            "target_modules": sorted(pairs),
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
        }
        tensors = {}
        for name, (left, right) in pairs.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = right.T.contiguous().cpu()
            tensors[f"{prefix}.lora_B.weight"] = left.contiguous().cpu()
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / "adapter_model.safetensors")
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=1))
        return Path(folder)


def relative_norms(
    model: EditableModel, factors: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, float]:
    """`|U Vᵀ|_F / |W|_F` per layer, without forming the product."""
    return {layer: relative_norm(model.weight(layer), pair) for layer, pair in factors.items()}


def relative_norm(weight: Tensor, change: Change) -> float:
    """`|change|_F / |weight|_F`."""
    if isinstance(change, Tensor):
        size = change.norm(dtype=torch.float64)
    else:
        left, right = (factor.double() for factor in change)
        size = ((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt()
    return float(size.cpu() / weight.detach().norm(dtype=torch.float64).cpu())


def format_of(path: str | Path) -> str | None:
    """What kind of file of ours it is; None: another's safetensors file. Raises EditError: missing
    or damaged.
    """
    if not Path(path).is_file():
        raise EditError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {}).get("knowedit", "{}")).get("format")
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise EditError(
            f"{path} is damaged or not a safetensors file ({error}); make it again"
        ) from error


def read_file(
    path: str | Path, kind: str | tuple[str, ...], what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A safetensors file of ours: its JSON header and tensors.

    Raises:
        EditError: missing, damaged, or not of `kind` (one of several).
    """
    kinds, found = (kind,) if isinstance(kind, str) else kind, format_of(path)
    if found not in kinds:
        raise EditError(
            f"{path} is not {what} of this version (format {found!r}, expected {kinds[0]!r})"
        )
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["knowedit"]), {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
        }
