"""The weights of GPTQ's and AWQ's checkpoints, unpacked from the files: the packages that run them
need not be there, nor the device that they run on.

Both hold a linear layer's matrix as integers of a few bits in words of 32 bits, with a scale and a
zero for every output and every group of inputs:

    W[o, i] = (q[i, o] - zero[g(i), o]) * scale[g(i), o].

GPTQ packs the integers of an output's neighbouring inputs into a word, and says in `g_idx` which
group an input is of (act-order); its first format holds zeros less one. AWQ packs eight outputs of
an input, the even ones first; groups are of neighbouring inputs.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from knowedit.errors import ModelError
from knowedit.models.quantised import record_of
from knowedit.models.shards import check_complete, check_floats, read_tensor, tensor_files

WORD = 32  # bits
AWQ_BITS = 4
#: Where in a word AWQ holds the outputs 0 to 7.
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
#: Parts of a packed layer, beside its bias.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def packing_of(config: Any) -> str | None:
    """The layout of a checkpoint with this configuration, if it can be unpacked here: "gptq",
    "gptq_v2" or "awq".
    """
    record = record_of(config) or {}
    method = str(record.get("quant_method", "")).rpartition(".")[2].lower()
    if method in ("gptq", "awq"):
        _check_record(record)
    if method == "gptq":
        layout = str(record.get("checkpoint_format") or record.get("format") or "gptq").lower()
        return layout if layout in ("gptq", "gptq_v2") else None
    version = str(record.get("version") or record.get("format") or "gemm").lower()
    if method == "awq" and version.rpartition(".")[2] == "gemm":
        return "awq" if record.get("bits", AWQ_BITS) == AWQ_BITS else None
    return None


def _check_record(record: Mapping[str, Any]) -> None:
    """Raise ModelError where what is read here of a `quantization_config` is of another kind."""
    wanted: dict[str, tuple[type, ...]] = {
        **dict.fromkeys(("checkpoint_format", "format", "version"), (str, enum.Enum)),
        **dict.fromkeys(("bits", "group_size"), (int,)),
    }
    for name, kinds in wanted.items():
        value = record.get(name)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            what = "a whole number" if kinds == (int,) else "a name"
            raise ModelError(f"config.json: quantization_config.{name} is {value!r}, not {what}")


def read_unpacked(
    folder: Path, layout: str, record: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Tensor]:
    """All tensors of a folder by name, on the CPU; a packed layer's as its `weight` `[out, in]` in
    float32.

    Args:
        record: the configuration's `quantization_config`: `bits`, `group_size`, and `desc_act`,
            where the groups are of inputs in an order of their own, so that `g_idx` is needed.

    Raises:
        ModelError: the folder holds no safetensors, is damaged, or a layer's parts do not fit
            together, or not to the record.
    """
    ordered = layout != "awq" and bool(record.get("desc_act"))
    files, found = tensor_files(folder), {}
    for name, file in files.items():
        path, _, part = name.rpartition(".")
        if f"{path}.qweight" not in files or part not in PARTS:
            if part in ("qzeros", "g_idx"):
                raise ModelError(f"{path} is packed and has no qweight; take it again")
            found[name] = read_tensor(file, name)
        elif part == "qweight":
            if f"{path}.weight" in files:
                raise ModelError(f"{folder} holds {path} packed and as floats; take it again")
            parts = {
                one: read_tensor(files[key], key)
                for one in PARTS
                if (key := f"{path}.{one}") in files
            }
            if ordered and "g_idx" not in parts:
                raise ModelError(f"{path} is packed by act-order and has no g_idx; take it again")
            found[f"{path}.weight"] = _weight(path, layout, parts, record)
    return found


def open_unpacked(kind: Any, folder: Path, config: Any, **options: Any) -> Any:
    """A transformers model of a packed checkpoint's floats.

    Args:
        kind: its class, whose `from_pretrained` takes `options`.
        config: of the checkpoint; `packing_of` knows its layout.

    Raises:
        ModelError: see `read_unpacked`; or the files do not hold what the model has.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    check_floats(folder)
    state = read_unpacked(folder, packing_of(config) or "", record_of(config) or {})
    plain = copy.deepcopy(config)
    for part in (plain, plain.get_text_config()):
        vars(part).pop("quantization_config", None)
    if not hasattr(kind, "config_class"):  # Auto classes take no state_dict
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    hf, told = kind.from_pretrained(
        None, config=plain, state_dict=state, output_loading_info=True, **options
    )
    check_complete(folder, hf, told)
    hf.name_or_path = str(folder)
    if (folder / "generation_config.json").exists():
        hf.generation_config = GenerationConfig.from_pretrained(folder)
    return hf


def _weight(
    path: str, layout: str, parts: Mapping[str, Tensor], record: Mapping[str, Any]
) -> Tensor:
    missing = {"qweight", "qzeros", "scales"} - set(parts)
    if missing:
        raise ModelError(f"{path} is packed and has no {', '.join(sorted(missing))}; take it again")
    try:
        three = parts["qweight"], parts["qzeros"], parts["scales"]
        if layout == "awq":
            found = awq_weight(*three)
        else:
            found = gptq_weight(*three, parts.get("g_idx"), zeros_less_one=layout == "gptq")
        _check_as_recorded(parts, found.shape[1], record)
        return found
    except ValueError as error:
        shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
        raise ModelError(f"{path} cannot be unpacked ({shapes}): {error}") from error


def _check_as_recorded(parts: Mapping[str, Tensor], width: int, record: Mapping[str, Any]) -> None:
    """Raise ValueError where a layer of `width` inputs is of other bits or groups than the record
    says. One with settings of single layers ("dynamic") says nothing of the others here.
    """
    if record.get("dynamic"):
        return
    groups, out = parts["scales"].shape
    bits = parts["qzeros"].shape[-1] * WORD // out
    if record.get("bits") not in (None, bits):
        raise ValueError(f"it is of {bits} bits, and config.json says {record['bits']}")
    given = record.get("group_size")
    if given is None:
        return
    size = width if given < 1 else min(given, width)
    largest = int(parts["g_idx"].long().bincount().max()) if "g_idx" in parts else size
    if groups != math.ceil(width / size) or largest != size:
        raise ValueError(
            f"its {width} inputs are in {groups} groups of at most "
            f"{max(largest, math.ceil(width / groups))}, and config.json says {given} to a group"
        )


def gptq_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None = None,
    *,
    zeros_less_one: bool,
) -> Tensor:
    """The matrix `[out, in]` float32 of a layer in GPTQ's layout, of 2, 3, 4 or 8 bits.

    Args:
        qweight: `[in * bits / 32, out]` int32; the bits of an output's inputs one after the other,
            the lowest first.
        qzeros: `[groups, out * bits / 32]` int32, likewise.
        scales: `[groups, out]`.
        g_idx: `[in]` the group of each input; None: groups of neighbours, of the same size.
        zeros_less_one: as the format `gptq` has them (`gptq_v2` does not). A zero of 0 has become
            the largest number; there are readers that carry into its neighbour instead.

    Raises:
        ValueError: the shapes do not fit, or the integers are in other words than of 32 bits.
    """
    _check_words(qweight, qzeros)
    groups, out = scales.shape
    bits = _ratio(qzeros.shape[-1] * WORD, out, "bits of a zero")
    if bits not in (2, 3, 4, 8) or qzeros.shape[0] != groups or qweight.shape[-1] != out:
        raise ValueError(f"{bits} bits, {groups} groups and {out} outputs do not fit together")
    width = _ratio(qweight.shape[0] * WORD, bits, "inputs")
    zero = _stream(qzeros.T, bits).T
    if zeros_less_one:
        zero = (zero + 1) & (2**bits - 1)
    return _scaled(_stream(qweight, bits), zero, scales, _groups(g_idx, width, groups))


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """The matrix `[out, in]` float32 of a layer in AWQ's layout "gemm", of 4 bits.

    Args:
        qweight: `[in, out / 8]` int32.
        qzeros: `[groups, out / 8]` int32.
        scales: `[groups, out]`.

    Raises:
        ValueError: the shapes do not fit, or the integers are in other words than of 32 bits.
    """
    _check_words(qweight, qzeros)
    groups, out = scales.shape
    fits = qweight.shape[-1] * 8 == out and qzeros.shape == (groups, qweight.shape[-1])
    if not fits:
        raise ValueError(f"{groups} groups and {out} outputs do not fit together")
    width = qweight.shape[0]
    return _scaled(_eights(qweight), _eights(qzeros), scales, _groups(None, width, groups))


def _check_words(*packed: Tensor) -> None:
    """Other words are unpacked into other numbers, of shapes that may fit."""
    if other := next((part.dtype for part in packed if part.dtype != torch.int32), None):
        raise ValueError(f"integers are packed into words of int32 here, and these are {other}")


def _scaled(q: Tensor, zero: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """q `[in, out]`, zero and scales `[groups, out]`, group `[in]` -> `[out, in]`."""
    return ((q - zero[group]).float() * scales.float()[group]).T.contiguous()


def _stream(words: Tensor, bits: int) -> Tensor:
    """`[words, n]` -> `[words * 32 / bits, n]` int32, of a stream of bits down each column."""
    at = torch.arange(words.shape[0] * WORD // bits, dtype=torch.int32) * bits
    if WORD % bits:  # a value may begin in one word and end in the next
        own = words.long() & (2**WORD - 1)
        words = own | (torch.cat([own[1:], torch.zeros_like(own[:1])]) << WORD)
    return ((words[at // WORD] >> (at % WORD)[:, None]) & (2**bits - 1)).int()


def _eights(words: Tensor) -> Tensor:
    """`[n, words]` -> `[n, words * 8]` int32, in the order of the outputs."""
    shifts = torch.tensor(AWQ_PLACES, dtype=torch.int32) * AWQ_BITS
    return ((words[..., None] >> shifts) & (2**AWQ_BITS - 1)).flatten(1)


def _groups(g_idx: Tensor | None, width: int, groups: int) -> Tensor:
    """`[in]` the group of each input."""
    if g_idx is None:
        return torch.arange(width) // _ratio(width, groups, "inputs of a group")
    found = g_idx.long()
    whole = not g_idx.is_floating_point() and found.shape == (width,)
    if not whole or bool(((found < 0) | (found >= groups)).any()):
        raise ValueError(f"g_idx is not {width} numbers of {groups} groups")
    sizes = found.bincount(minlength=groups).sort(descending=True).values
    if bool((sizes[:-1] != sizes[0]).any()) or math.ceil(width / int(sizes[0])) != groups:
        raise ValueError(
            f"g_idx puts {int(sizes[0])} inputs into one group and {int(sizes[-1])} into another"
        )
    return found


def _ratio(total: int, part: int, what: str) -> int:
    if part < 1 or total % part:
        raise ValueError(f"{total} / {part} {what} is no whole number")
    return total // part
