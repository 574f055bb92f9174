"""Checkpoints with quantised weights, opened as floats: the very weights that the quantised model
multiplies by, so that an edit of them fits it as an adapter.

GPTQ's and AWQ's files are unpacked here (`models.packings`). Where transformers can dequantise as
it reads (FP8, MXFP4, compressed tensors), it does. Everything else is loaded as it is, and each
quantised layer is given the unit vectors: what it makes of them is its weight, whatever the format.
That is exact where only weights are quantised. A layer that rounds its inputs too (LLM.int8) keeps
unit vectors and is near it for others.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError

logger = logging.getLogger(__name__)

#: What an edit can be written into.
EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Unit vectors that a layer is given at once.
ROWS = 1024
#: A layer that rounds its inputs may differ by so much (relative) from its float copy.
NEAR = 0.05


def method_of(config: Any) -> str | None:
    """How the weights of a checkpoint with this configuration are quantised; None: they are not."""
    record = record_of(config)
    if record is None:
        return None
    return _method(record)


def held_as(name: str, tensor: Tensor) -> str | None:
    """What says that the parameter or buffer `name` holds quantised weights: its class, its dtype
    or its name; None: it does not.
    """
    data = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if type(data) is not Tensor:
        return type(data).__name__
    leaf = name.rpartition(".")[2]
    if leaf in ("qweight", "weight_packed") or (
        (leaf == "weight" or isinstance(tensor, nn.Parameter)) and tensor.dtype not in EDITABLE
    ):
        return str(tensor.dtype).removeprefix("torch.")
    return None


def reading(config: Any) -> dict[str, Any]:
    """What to add to `from_pretrained` so that it dequantises as it reads; empty where transformers
    cannot, and `dequantise` has to.
    """
    record = record_of(config)
    if record is None:
        return {}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    kind: Any = AUTO_QUANTIZATION_CONFIG_MAPPING.get(_method(record))
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        return {}
    return {"quantization_config": kind.from_dict({**record, "dequantize": True})}


@torch.no_grad()
def dequantise(hf: Any) -> float:
    """Replace every quantised linear layer of a transformers model by the float one that it stands
    for, in place, in the dtype of the model's other weights.

    Returns:
        the largest relative difference of such a layer from its float copy on random inputs: 0 but
        for rounding, unless the layer rounds its inputs, too.

    Raises:
        ModelError: a layer is no linear one, does not run on this machine, or is not linear.
    """
    floats = (p for p in hf.parameters() if held_as("", p) is None and p.dtype in EDITABLE)
    like = next(floats, torch.empty(0))
    worst = 0.0
    for path, module in list(hf.named_modules()):
        if _quantised(module):
            plain, error = _plain(path, module, like)
            hf.set_submodule(path, plain)
            worst = max(worst, error)
    quantizer = getattr(hf, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(hf)
    elif getattr(hf.config, "quantization_config", None) is not None:
        del hf.config.quantization_config
    if worst > max(1e-4, torch.finfo(like.dtype).eps):  # more than the model's own dtype rounds
        logger.warning(
            "the quantised layers round their inputs, too: they differ by up to %.1g (relative) "
            "from the float copy that is edited",
            worst,
        )
    return worst


def record_of(config: Any) -> dict[str, Any] | None:
    """The `quantization_config` of a model, or of its text decoder."""
    parts = (config, config.get_text_config())
    found = next((q for p in parts if (q := getattr(p, "quantization_config", None))), None)
    if found is None:
        return None
    return found if isinstance(found, dict) else vars(found)


def _method(record: dict[str, Any]) -> str:
    return str(record.get("quant_method", "an unnamed method")).rpartition(".")[2].lower()


def _quantised(module: nn.Module) -> bool:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return any(held_as(name, tensor) for name, tensor in own)


def _plain(path: str, module: Any, like: Tensor) -> tuple[nn.Linear, float]:
    """The float layer, and its relative difference from `module`."""
    kind = type(module).__name__
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        raise ModelError(
            f"{path} is quantised and no linear layer ({kind}), and cannot be dequantised; edit "
            "the original checkpoint"
        )
    width, device = module.in_features, _device(module)
    bias = getattr(module, "bias", None)
    plain = nn.Linear(width, module.out_features, bias is not None, device, like.dtype)
    drawn = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(device, like.dtype)
    module.bias = None  # kept as it is, to the bit
    try:
        for at in range(0, width, ROWS):
            rows = range(at, min(at + ROWS, width))
            units = torch.zeros(len(rows), width, device=device, dtype=like.dtype)
            units[range(len(rows)), rows] = 1
            plain.weight[:, at : at + len(rows)] = module(units).T.to(plain.weight)
        wanted, found = module(drawn).float(), drawn.float() @ plain.weight.float().T
    except (RuntimeError, NotImplementedError, ImportError, ValueError, AssertionError) as error:
        raise ModelError(
            f"{path} ({kind}) does not run on {device}, so its weights cannot be read: {error}"
        ) from error
    finally:
        module.bias = bias
    difference = float((wanted - found).norm() / found.norm().clamp(min=1e-30))
    if not difference < NEAR:
        raise ModelError(
            f"{path} ({kind}) is not near a linear layer: {difference:.2g} from one; edit the "
            "original checkpoint"
        )
    if bias is not None:
        plain.bias.copy_(bias)
    return plain, difference


def _device(module: nn.Module) -> torch.device:
    return next(iter((*module.parameters(), *module.buffers()))).device
