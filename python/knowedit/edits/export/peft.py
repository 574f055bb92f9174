"""A LoRA adapter, as peft and vLLM read it: `lora_B @ lora_A` is the update, at scale 1.

Dense changes have no place in one; several edits become one adapter of the sum of their ranks. Of
routed experts peft adapts the whole parameter, at one rank for every expert. An embedding's factors
have names and an orientation of their own; one that is the head too is adapted at both places.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from knowedit.edits.adapter import is_tied, low_rank
from knowedit.edits.card import card, said_of
from knowedit.edits.changes import LowRank
from knowedit.errors import EditError
from knowedit.io.files import atomic_folder, disk_errors
from knowedit.models.editable import EditableModel
from knowedit.models.experts import slice_name, split_name
from knowedit.models.load import accepts_model

if TYPE_CHECKING:
    from peft import LoraConfig

    from knowedit.edits.edit import Edit


class Pair(NamedTuple):
    """What a target is given: `B @ A`; of experts for each expert, in peft's order."""

    A: Tensor
    B: Tensor
    rank: int
    embedding: bool = False


@accepts_model
def write(model: EditableModel, edits: Sequence[Edit], path: str | Path) -> Path:
    """Write `edits` of `model` as the folder of one adapter.

    Raises:
        EditError: an edit is of another model, some changes are dense, or the folder exists.
    """
    from peft import LoraConfig, TaskType

    found = low_rank(model, edits)
    whole = {name: change for name, change in found.items() if split_name(name)[1] is None}
    dense = dict(_of_module(model, name, change) for name, change in whole.items())
    experts = {name: _of_experts(model, name, found) for name in _stacks(found)}
    pairs = dense | experts
    rank = max(pair.rank for pair in pairs.values())
    pattern = {name: pair.rank for name, pair in pairs.items() if pair.rank != rank}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=model.source,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        fan_in_fan_out=model.layout.transposed,
        target_modules=sorted(dense),
        target_parameters=sorted(experts) or None,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        **_tying(model, whole),
    )
    if lost := _taken_for_experts(config, model):
        raise EditError(
            f"peft takes targets named {lost[0]} in a {model.hf.config.model_type} model for its "
            "experts' weights, and the adapter would be loaded without this edit; write it into a "
            "copy of the model instead (save_edited, `knowedit apply`)"
        )
    tensors = {}
    for name, pair in pairs.items():
        module = name.rpartition(".")[0] if name in experts else name
        factor = "lora_embedding_{}" if pair.embedding else "lora_{}.weight"
        for side, tensor in (("A", pair.A), ("B", pair.B)):
            key = f"base_model.model.{module}.{factor.format(side)}"
            tensors[key] = tensor.contiguous().cpu()
    try:
        with atomic_folder(path) as temporary, disk_errors(path):
            save_file(tensors, temporary / "adapter_model.safetensors")
            config.save_pretrained(str(temporary))
            (temporary / "README.md").write_text(_card(model, edits), encoding="utf-8")
    except FileExistsError as error:
        raise EditError(str(error)) from error
    return Path(path)


def _card(model: EditableModel, edits: Sequence[Edit]) -> str:
    """The adapter's model card."""
    opening = f"A LoRA adapter, to be used at scale 1, for the model `{model.fingerprint}` only:"
    return card("peft", model.name, f"{model.name}, edited", opening, [*map(said_of, edits)])


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


def _of_module(model: EditableModel, name: str, change: LowRank) -> tuple[str, Pair]:
    """The module that peft adapts for a parameter, and its factors: of an embedding `[tokens, d]`,
    whose rows peft looks up, `A` `[r, tokens]` and `B` `[d, r]`.
    """
    module = name.removesuffix(".weight")
    if is_tied(model, name):  # the head follows the embedding
        module = _path(model, model.hf.get_input_embeddings())
    if isinstance(model.hf.get_submodule(module), nn.Embedding):
        return module, Pair(change.U.T, change.V, change.rank, embedding=True)
    return module, Pair(change.V.T, change.U, change.rank)


def _path(model: EditableModel, module: nn.Module) -> str:
    """Where a module is in the model."""
    return next(path for path, found in model.hf.named_modules() if found is module)


def _tying(model: EditableModel, names: Iterable[str]) -> dict[str, Any]:
    """The setting by which peft adapts the head as it does the embedding, where both are one matrix
    and are edited.

    Raises:
        EditError: this peft does not do so for such an embedding, and would adapt one of them only.
    """
    from peft import LoraConfig
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    tied = sorted(name for name in names if is_tied(model, name))
    if not tied:
        return {}
    module = _path(model, model.hf.get_input_embeddings())
    known = module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    if not known or "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        raise EditError(
            f"{tied[0]} is shared by input and output, and of these this version of peft would "
            "adapt one only; write a copy of the model instead (save_edited, `knowedit apply`)"
        )
    return {"ensure_weight_tying": True}


def _stacks(found: Mapping[str, LowRank]) -> list[str]:
    """The parameters of which some experts' matrices are changed."""
    return sorted({split_name(name)[0] for name in found if split_name(name)[1] is not None})


def _of_experts(model: EditableModel, name: str, found: Mapping[str, LowRank]) -> Pair:
    """The factors that peft gives all experts of a parameter `[E, .., ..]`, at the largest rank of
    any: `A` `[E * r, in]`, expert by expert, and `B` `[out, r * E]`, rank by rank; zero for an
    expert that is not changed. What `in` is goes by the module's `is_transposed`, as in peft.

    Raises:
        EditError: this peft has no targets that are parameters.
    """
    from peft import LoraConfig

    if "target_parameters" not in LoraConfig.__dataclass_fields__:
        raise EditError(
            f"{name} holds the matrices of several experts, and this version of peft adapts "
            "modules only; update peft, or write a copy of the model instead (save_edited, "
            "`knowedit apply`)"
        )
    stack = model.stored(name)
    changes = {e: c for e in range(len(stack)) if (c := found.get(slice_name(name, e)))}
    rank = max(change.rank for change in changes.values())
    first, second = (next(iter(changes.values())).U.new_zeros(len(stack), n, rank)
                     for n in stack.shape[1:])  # fmt: skip
    for expert, change in changes.items():
        turned = model.is_transposed(slice_name(name, expert))
        left, right = (change.V, change.U) if turned else (change.U, change.V)
        first[expert, :, : change.rank], second[expert, :, : change.rank] = left, right
    module = model.hf.get_submodule(name.rpartition(".")[0])
    if getattr(module, "is_transposed", False):  # stored as (in, out)
        first, second = second, first
    A, B = second.mT.flatten(0, 1), first.permute(1, 2, 0).flatten(1)
    return Pair(A, B, rank)
