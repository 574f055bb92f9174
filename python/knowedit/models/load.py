"""Where a model comes from: a name, a folder, or an object that transformers has loaded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ParamSpec, TypeVar

import torch

from knowedit.errors import ModelError
from knowedit.io.progress import no_bars_of_transformers
from knowedit.models.adapters import base_of, merge
from knowedit.models.download import DEFAULT_MODEL, name_of, resolve
from knowedit.models.editable import EditableModel, inside, known_tokenizer
from knowedit.models.evaluating import plain_modes
from knowedit.models.experts import split_name
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.packings import open_unpacked, packing_of
from knowedit.models.quantised import dequantise as as_floats
from knowedit.models.quantised import method_of, reading
from knowedit.models.shards import check_complete, check_floats
from knowedit_kernels._arguments import open_device

P = ParamSpec("P")
R = TypeVar("R")


def load_model(
    name: str | Path | Any = DEFAULT_MODEL,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantise: bool = False,
    say: Callable[[str], None] = print,
) -> EditableModel:
    """Load a causal LM for editing, or take one that is loaded.

    Args:
        name: a hub id, a folder or a GGUF file (dequantised once, into the cache); some models also
            come from the package index when the hub is out of reach, as copies with a name of their
            own (`knowedit models`). A peft adapter is merged into its base. Or a transformers
            model: it is taken as it is, nothing of it is changed, and the arguments about loading
            have no effect.
        tokenizer: a fast tokenizer; default: the one that is saved with the model.
        dtype: as in transformers; float16 is refused on the CPU (its matrix products are ~100x
            slower there).
        device_map: as in transformers.
        attn_implementation: as in transformers; default: "sdpa" where the model's class has it,
            else "eager".
        revision: a branch, tag or commit of the hub's repository.
        trust_remote_code: run code that comes with the model. Never asked for at a prompt: a model
            that needs it is refused.
        dequantise: open a checkpoint with quantised weights as the floats that they stand for
            (`models.quantised`); else it is refused. What is edited is that copy; export the edit
            as an adapter for the quantised model itself.

    Raises:
        ModelError: it cannot be found, loaded or edited; the message has the reason and the remedy.
    """
    if isinstance(tokenizer, (str, Path)):
        raise ModelError(
            f"tokenizer={str(tokenizer)!r} is only a name; pass AutoTokenizer.from_pretrained"
            f"({str(tokenizer)!r})"
        )
    if isinstance(name, EditableModel):
        if tokenizer is not None and tokenizer is not name.tokenizer:
            raise ModelError(f"{name.name} has its tokenizer already; leave tokenizer out")
        return name
    if not isinstance(name, (str, Path)):
        name = inside(name)
        _check_is_model(name)
        if tokenizer is None:
            tokenizer = known_tokenizer(name) or _tokenizer_of(name)
        return EditableModel(name, tokenizer)
    _check_dtype(dtype)
    _check_device(device_map)
    from transformers import AutoConfig

    source = resolve(str(name), revision=revision, code=trust_remote_code, say=say)
    where = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _loading(str(name)):
        adapted = base_of(source, **where)
        weights, there = source, where
        if adapted is not None:
            weights, there = resolve(adapted, say=say), {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(weights, **there)
        if not dequantise:
            check_plain(str(name), config)
        if tokenizer is None:
            tokenizer = _saved_tokenizer(source, weights, where)
        model = _read(
            weights,
            config,
            there,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
        )
        if adapted is not None:
            model = merge(model, source, **where)
            say(f"note: the adapter {name} is merged into its base {adapted}; edits are of both")
    called = name_of(str(name), source)
    return EditableModel(model.eval().requires_grad_(False), tokenizer, name=called)


#: How transformers spreads layers by itself.
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


def _check_device(device_map: Any) -> None:
    """Raise ModelError for the name of a device that is not here, before a model is read for it."""
    if not isinstance(device_map, (str, torch.device)) or str(device_map) in (*SPREAD, "meta"):
        return
    try:
        open_device(device_map)
    except ValueError as error:
        what = str(error).replace("device=", "device_map=", 1)
        raise ModelError(f"{what}; or {', '.join(SPREAD)}, which spread the layers") from None


def _read(weights: str, config: Any, there: dict[str, Any], **options: Any) -> Any:
    """A checkpoint's model; its floats, if it is quantised.

    Args:
        there: where the hub has it, for `from_pretrained`.
    """
    kind = class_for(config)
    if packing_of(config) is not None:
        return open_unpacked(kind, _folder(weights, there), config, **options)
    if method_of(config) is None and Path(weights).is_dir():
        check_floats(Path(weights))
    model, told = kind.from_pretrained(
        weights, output_loading_info=True, **options, **reading(config), **there
    )
    check_complete(weights, model, told)
    if method_of(config) is not None:
        as_floats(model)
    elif not Path(weights).is_dir():  # of the hub: in its cache now
        check_floats(_folder(weights, there, local_files_only=True))
    return model


def _folder(weights: str, there: dict[str, Any], **options: Any) -> Path:
    """A folder's path; of a hub id, that of what is downloaded; `options` of the download."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(weights, revision=there.get("revision"), **options))


def _check_dtype(dtype: Any) -> None:
    """Raise ModelError for what is no kind of floating point number."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ModelError(
            f"dtype must be float32, bfloat16, float16 or auto (as saved), got {dtype!r}"
        )


def class_for(config: Any) -> Any:
    """The class that opens a checkpoint whole: the one that its configuration names where that sees
    pictures, so that they stay in the model; else transformers' own choice for texts; else the one
    that is named.

    Raises:
        ModelError: transformers has none.
    """
    import transformers as theirs

    named = getattr(theirs, next(iter(getattr(config, "architectures", None) or ()), ""), None)
    pictures = theirs.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if named is not None and named is pictures:
        return named
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if remote or type(config) in theirs.MODEL_FOR_CAUSAL_LM_MAPPING:
        return theirs.AutoModelForCausalLM
    if pictures or named:
        return pictures or named
    raise ModelError(
        f"transformers has no class for texts of models of the type {config.model_type!r}; a "
        "decoder-only causal LM is wanted"
    )


def as_served(model: EditableModel, *, trust_remote_code: bool = False) -> Any:
    """The transformers model that others load from where `model` came from: quantised, where that
    is a float copy of quantised weights. For comparisons: it cannot be edited.

    Raises:
        ModelError: it came from nowhere, or cannot be loaded on this machine.
    """
    from transformers import AutoConfig

    where = {"trust_remote_code": trust_remote_code}
    with _loading(model.source):
        config = AutoConfig.from_pretrained(model.source, **where)
        hf = class_for(config).from_pretrained(model.source, dtype="auto", **where)
    return hf.eval().requires_grad_(False)


def check_plain(name: str, config: Any) -> None:
    """Raise ModelError for a checkpoint with quantised weights, before they are read."""
    method = method_of(config)
    if method is not None:
        raise ModelError(
            f"the weights of {name} are quantised ({method}), and an edit would be rounded away in "
            "them; edit the original checkpoint, or a float copy of this one (--dequantise, "
            "load_model(..., dequantise=True)), and export the edit as an adapter for it "
            "(`knowedit export`)"
        )


def _saved_tokenizer(source: str, weights: str, where: dict[str, Any]) -> Any:
    """The tokenizer saved with the model; that of its base (`weights`) where an adapter's folder
    has none.
    """
    from transformers import AutoTokenizer

    bare = weights != source and Path(source).is_dir() and not any(Path(source).glob("tokenizer*"))
    if bare:
        code = where["trust_remote_code"]
        return AutoTokenizer.from_pretrained(weights, trust_remote_code=code)
    return AutoTokenizer.from_pretrained(source, **where)


def as_editable(
    model: EditableModel | str | Path | Any, tokenizer: Any = None, **load: Any
) -> EditableModel:
    """What every function that takes a model makes of it: an `EditableModel` as it is; a
    transformers model with its tokenizer; or a name, loaded (`load`: arguments of `load_model`).

    Raises:
        ModelError: it is none of these, it cannot be edited, or its tokenizer is not found.
    """
    return load_model(model, tokenizer=tokenizer, **load)


def accepts_model(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose argument `model` may also be a transformers model, with the tokenizer saved
    beside it, once given to `load_model`, or given here as `tokenizer=`; modes of torch that
    the caller is in (`no_grad`, `autocast`) do not reach into it. Raises ModelError for anything
    else: a model that is only named would be lost with what was done to it.
    """
    names = list(inspect.signature(function).parameters)
    place = names.index("model")
    called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
    order = f"{called}({', '.join(name for name in names if name != 'self')})"

    @functools.wraps(function)
    def with_editable(*args: P.args, **kwargs: P.kwargs) -> R:
        tokenizer = None if "tokenizer" in names else kwargs.pop("tokenizer", None)
        if "model" in kwargs:
            kwargs["model"] = _loaded(kwargs["model"], tokenizer, order)
        elif len(args) > place:
            given = list(args)
            given[place] = _loaded(args[place], tokenizer, order)
            args = tuple(given)  # type: ignore[assignment]
        with plain_modes():
            return function(*args, **kwargs)

    return with_editable


def _loaded(model: Any, tokenizer: Any, order: str) -> EditableModel:
    """The model that a function was given; `order` says how it takes its arguments."""
    if isinstance(model, (str, Path)):
        raise ModelError(
            f"{str(model)!r} is only a name; load it first: load_model({str(model)!r})"
        )
    if not isinstance(model, (EditableModel, torch.nn.Module)):
        raise ModelError(
            f"{order}: the model is a transformers causal LM or what load_model returns, got "
            f"{type(model).__name__}"
        )
    return as_editable(model, tokenizer)


def _check_is_model(found: Any) -> None:
    if not isinstance(found, torch.nn.Module):
        raise ModelError(
            "a model is a transformers causal LM, an EditableModel, or the name or folder of one; "
            f"got {type(found).__name__}"
        )


def _tokenizer_of(hf: Any) -> Any:
    """The tokenizer saved where `hf` was loaded from. Raises ModelError when there is none."""
    from transformers import AutoTokenizer

    source = getattr(hf, "name_or_path", "")
    remedy = f"the tokenizer of this {type(hf).__name__} was not found"
    if not source:
        raise ModelError(f"{remedy}: it was not loaded from a folder or the hub; pass tokenizer=")
    try:
        with _loading(source):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except ModelError as error:
        raise ModelError(f"{remedy} at {source!r}; pass tokenizer=") from error


def config_in(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a folder's model, as transformers has it. Raises ModelError."""
    from transformers import AutoConfig

    with _loading(str(folder)):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def fingerprint_of(
    folder: Path, instead: Mapping[str, torch.Tensor] = {}, trust_remote_code: bool = False
) -> str:
    """The `EditableModel.fingerprint` of a folder's model, of any dtype: no layer is run.

    Args:
        instead: weights, by their names in the model (`NAME[expert]` for one of several), that it
            shall have in place of the folder's.

    Raises:
        ModelError: it cannot be loaded, or has no such weights.
    """
    opened, code = class_for(config_in(folder, trust_remote_code)), trust_remote_code
    with _loading(str(folder)):
        model = opened.from_pretrained(folder, dtype="auto", trust_remote_code=code)
        with torch.no_grad():
            for name, tensor in instead.items():
                path, expert = split_name(name)
                weight = model.get_parameter(path)
                held = weight if expert is None else weight[expert]
                if held.shape != tensor.shape:
                    raise ModelError(f"{name} is {list(held.shape)}, not {list(tensor.shape)}")
                held.copy_(tensor)
        return weights_fingerprint(model)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Without transformers' bar, and with its errors as ours."""
    try:
        with no_bars_of_transformers():
            yield
    except UnpicklingError as error:  # its text says how to run what is in the file
        raise ModelError(
            f"model {name!r} could not be loaded: its weights are a pickle that holds more than "
            "tensors, or is damaged, and is not opened; take a copy in safetensors"
        ) from error
    except Exception as error:  # transformers', safetensors' and torch's own, of many classes
        raise ModelError(f"model {name!r} could not be loaded: {said_by(error)}") from error


def said_by(error: Exception) -> str:
    """What an error of transformers says; of a model's own code, how to run it."""
    said = str(error).strip()
    if "trust_remote_code" not in said:
        return said[:400] or type(error).__name__
    return (
        "it brings Python code of its own, which is run only where it is asked for: "
        "trust_remote_code=True of load_model (and of restore), for code that you have read"
    )
