"""A LoRA adapter, as peft and vLLM read it: `lora_B @ lora_A` is the update, at scale 1.

Dense changes have no place in one; several edits become one adapter of the sum of their ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from knowedit.edits.changes import LowRank
from knowedit.errors import EditError
from knowedit.io.files import atomic_folder, disk_errors
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.load import accepts_model

if TYPE_CHECKING:
    from peft import LoraConfig

    from knowedit.edits.edit import Edit


@accepts_model
def write(model: EditableModel, edits: Sequence[Edit], path: str | Path) -> Path:
    """Write `edits` of `model` as the folder of one adapter.

    Raises:
        EditError: an edit is of another model, some changes are dense, or the folder exists.
    """
    from peft import LoraConfig, TaskType

    for edit in edits:
        if of_experts := [name for name in edit.changes if split_name(name)[1] is not None]:
            raise EditError(
                f"this {edit.method_name} edit changes {len(of_experts)} experts' matrices "
                f"({of_experts[0]}, ...) at one rank for all of them together, which a LoRA "
                "adapter gives each expert in full; write it into a copy of the model instead "
                "(save_edited, `knowedit apply`)"
            )
    pairs = {
        name.removesuffix(".weight"): change for name, change in _low_rank(model, edits).items()
    }
    rank = max(change.rank for change in pairs.values())
    pattern = {name: change.rank for name, change in pairs.items() if change.rank != rank}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model.source,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        fan_in_fan_out=model.layout.transposed,
        target_modules=sorted(pairs),
        rank_pattern=pattern,
        alpha_pattern=pattern,
    )
    if lost := _taken_for_experts(config, model):
        raise EditError(
            f"peft takes targets named {lost[0]} in a {model.hf.config.model_type} model for its "
            "experts' weights, and the adapter would be loaded without this edit; write it into a "
            "copy of the model instead (save_edited, `knowedit apply`)"
        )
    tensors = {}
    for name, change in pairs.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = change.V.T.contiguous().cpu()
        tensors[f"{prefix}.lora_B.weight"] = change.U.contiguous().cpu()
    try:
        with atomic_folder(path) as temporary, disk_errors(path):
            save_file(tensors, temporary / "adapter_model.safetensors")
            config.save_pretrained(str(temporary))
    except FileExistsError as error:
        raise EditError(str(error)) from error
    return Path(path)


def _taken_for_experts(config: LoraConfig, model: EditableModel) -> list[str]:
    """Targets that peft, as it loads the adapter, gives to other weights: in mixtures of experts it
    goes by a module's last name, also in layers that have no experts.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion

        convert = conversion.convert_peft_config_for_transformers
    except (ImportError, AttributeError):  # of another version, which converts nothing by name
        return []
    loaded = copy.deepcopy(config)
    convert(loaded, model.hf, None)
    return sorted(set(config.target_modules or ()) - set(loaded.target_modules or ()))


def _low_rank(model: EditableModel, edits: Sequence[Edit]) -> dict[str, LowRank]:
    """The sum of the edits by parameter. Raises EditError: a dense change."""
    found: dict[str, LowRank] = {}
    for edit in edits:
        edit.check(model)
        changes = edit.by_parameter(model)
        dense = sorted(name for name, change in changes.items() if not isinstance(change, LowRank))
        if dense:
            raise EditError(
                f"this {edit.method_name} edit changes {len(dense)} parameters densely "
                f"({dense[0]}, ...), which no LoRA adapter "
                "can hold; write it into a copy of the model instead (save_edited, `knowedit "
                "apply`)"
            )
        for name, change in changes.items():
            assert isinstance(change, LowRank)
            before = found.get(name)
            found[name] = (
                change
                if before is None
                else LowRank(torch.cat([before.U, change.U], 1), torch.cat([before.V, change.V], 1))
            )
    if not found:
        raise EditError("no edits to export; name at least one that changes weights")
    return found
