"""What a few tokens tell about a model's parts: two forward passes with hooks, no names of modules.

The first pass runs two copies of a short text. Before each part of a layer the second copy is made
equal to the first but for token 0; a part whose outputs at *later* tokens then differ mixes tokens
(attention, a convolution, a recurrence), and what does not mix tokens is the MLP. The second pass
adds one and two times a random vector to each MLP's output projection in copies of its own, and
looks at what the layer's output makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError
from knowedit.models.evaluating import evaluating

#: Tokens of the probe's text: enough for a convolution or a recurrence to show.
LENGTH = 7

#: Relative differences below these are rounding, by the model's dtype.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Stream:
    """How the MLP projection's output reaches the residual stream.

    Attributes:
        kind: "identity" (added as it is), "factor" (times a constant first), "gate" (times a number
            of each token's own), or "other" (a norm, another matrix: the change at the layer's
            output is not the projection's).
        factor: of a "factor"; 1 for "identity"; else NaN.
    """

    kind: Literal["identity", "factor", "gate", "other"]
    factor: float = 1.0


@dataclass(frozen=True)
class Linear:
    """A call of a linear module: its path, and its input and output sizes."""

    path: str
    width: int
    out: int


@dataclass
class LayerTrace:
    """What ran inside one layer.

    Attributes:
        mixers: names of its children that mix tokens.
        linears: those that saw every token, in the order of their calls.
        runs: how often the layer ran in the one pass.
    """

    mixers: set[str] = field(default_factory=set)
    linears: list[Linear] = field(default_factory=list)
    runs: int = 0


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        stack: path of the list of decoder layers.
        base: path of the module that turns tokens into the final hidden states.
        norm: path of the module between the last layer and these; "" when there is none, None when
            it is not one module.
        states, logits: `[2, LENGTH, ..]` the final hidden states and the model's own logits.
        hidden: size of the residual stream.
        layers: by index.
    """

    stack: str
    base: str
    norm: str | None
    states: Tensor
    logits: Tensor
    hidden: int
    layers: list[LayerTrace]


def first_of(output: Any) -> Any:
    """The first of what a module returns, or all of it."""
    return output[0] if isinstance(output, tuple | list) else output


def states_of(output: Any) -> Tensor:
    """The final hidden states `[B, T, hidden]` among what a base model returns."""
    found = getattr(output, "last_hidden_state", None)
    return first_of(output) if found is None else found


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer as a Llama (`nn.Linear`) or a GPT-2 (`Conv1D`) has it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def size_of(module: Any) -> tuple[int, int]:
    """(in, out) of a linear module."""
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def rounding(dtype: torch.dtype) -> float:
    """The relative difference below which two results of this dtype are the same."""
    return ROUNDING.get(dtype, 3e-2)


def probe_ids(hf: Any, copies: int) -> Tensor:
    """`[copies, LENGTH]` the same ordinary tokens in each row: none that the configuration names
    (padding, images).
    """
    embeddings = hf.get_input_embeddings().weight
    config = hf.config.get_text_config() if hasattr(hf.config, "get_text_config") else hf.config
    named = {
        value
        for part in (hf.config, config)
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    size = min(len(embeddings), getattr(config, "vocab_size", None) or len(embeddings))
    usable = [token for token in range(min(size, 4 * LENGTH + len(named))) if token not in named]
    step = max(1, len(usable) // LENGTH)
    ids = [usable[(number * step) % len(usable)] for number in range(LENGTH)]
    return torch.tensor([ids] * copies, device=embeddings.device)


def check_finite(states: Tensor, name: str) -> None:
    """Raise ModelError for states of a few tokens that hold NaN or infinity."""
    if not states.isfinite().all():
        raise ModelError(
            f"{name} gives hidden states that are not finite (NaN or infinity) on a few tokens: "
            "its weights are damaged, or their dtype is too narrow; load it again, or with another "
            "dtype"
        )


@torch.no_grad()
def run(hf: Any, ids: Tensor) -> Any:
    """One plain forward pass. Raises ModelError with what the model says when it fails."""
    try:
        with evaluating(hf):
            return hf(input_ids=ids, use_cache=False, return_dict=True)
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"{type(hf).__name__}: a forward pass on {ids.shape[1]} tokens failed: "
            f"{type(error).__name__}: {str(error).strip()[:300]}"
        ) from error


# -- the first pass
# -------------------------------------------------------------------------------------------------


def trace(hf: Any) -> Trace:
    """Find the parts of `hf` with one forward pass.

    Raises:
        ModelError: the pass fails, or there is no stack of layers that pass on hidden states.
    """
    ids = probe_ids(hf, 2)
    decoder = _decoder(hf)
    names = {id(module): name for name, module in hf.named_modules()}
    prefix = names[id(decoder)] if decoder is not hf else ""
    stacks = _outermost_lists(decoder, prefix)
    order: list[tuple[str, Any, Any]] = []  # (path, first input, output) as calls end
    layers = {
        f"{path}.{index}": LayerTrace()
        for path, members in stacks.items()
        for index in range(len(members))
    }
    bases = _prefixes(stacks)

    def note(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        order.append((path, _first_states(args, kwargs), output))

    with ExitStack() as hooks:
        for path, members in stacks.items():
            for index, layer in enumerate(members):
                hooks.enter_context(_watched(f"{path}.{index}", layer, layers))
                hooks.enter_context(_noted(f"{path}.{index}", layer, note))
        for path, module in _outside(hf, stacks).items():
            hooks.enter_context(_noted(path, module, note))
        logits = run(hf, ids).logits
    calls = {path: (given, output) for path, given, output in order}
    stack = _stack_of(hf, stacks, calls)
    base = next((path for path in bases if path in calls and stack.startswith(f"{path}.")), None)
    if base is None:
        raise ModelError(f"{type(hf).__name__}: no module below it turns tokens into hidden states")
    output = calls[base][1]
    ran = [layers[f"{stack}.{index}"] for index in range(len(stacks[stack]))]
    last = next(path for path, *_ in reversed(order) if path.rpartition(".")[0] == stack)
    return Trace(
        stack=stack,
        base=base,
        norm=_norm_of(order, last, states_of(output)),
        states=states_of(output),
        logits=logits,
        hidden=first_of(calls[last][1]).shape[-1],
        layers=ran,
    )


def _decoder(hf: Any) -> nn.Module:
    """What holds the text decoder: transformers' own answer where it has layers (some answer with
    their head), or the whole model.
    """
    found = hf.get_decoder() if hasattr(hf, "get_decoder") else None
    if not isinstance(found, nn.Module):
        return hf
    return found if any(isinstance(m, nn.ModuleList) for m in found.modules()) else hf


def _outermost_lists(decoder: nn.Module, prefix: str) -> dict[str, nn.ModuleList]:
    """Lists of modules that stand in no other list, by their path below the whole model."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in decoder.named_modules():
        path = ".".join(filter(None, (prefix, name)))
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found[path] = module
    return found


def _prefixes(paths: Mapping[str, Any]) -> list[str]:
    """The modules around the lists, the outermost first."""
    found = {
        ".".join(path.split(".")[:end]) for path in paths for end in range(1, path.count(".") + 1)
    }
    return sorted(found, key=lambda path: path.count("."))


def _outside(hf: nn.Module, stacks: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Every module below `hf` that is in none of the lists."""
    inside = tuple(f"{path}." for path in stacks)
    return {
        name: module
        for name, module in hf.named_modules()
        if name and name not in stacks and not name.startswith(inside)
    }


@contextmanager
def _noted(path: str, module: nn.Module, note: Any) -> Iterator[None]:
    """Calls `note(path, module, args, kwargs, output)` after each run of the module."""
    handle = module.register_forward_hook(
        lambda *call: note(path, *call),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watched(path: str, layer: nn.Module, layers: Mapping[str, LayerTrace]) -> Iterator[None]:
    """Fills `layers[path]` while the layer runs; the second copy is the first but for token 0
    before each of its children.
    """
    found, handles = layers[path], []

    def entered(_module: nn.Module, _args: Any) -> None:
        found.runs += 1

    def prepared(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        noise = iter([True])
        renewed = tuple(_second_copy(value, noise) for value in args)
        return renewed, {name: _second_copy(value, noise) for name, value in kwargs.items()}

    def compared(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, states = _first_states(args, kwargs), first_of(output)
        copies = _copies(states)
        if given is None or copies is None:
            return
        one, other = copies.float()
        moved = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-30)
        if float(moved[1:].max()) > rounding(states.dtype):
            found.mixers.add(name)

    def called(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = first_of(args) if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor) and given.numel() == 2 * LENGTH * given.shape[-1]:
            found.linears.append(Linear(f"{path}.{name}", *size_of(module)))

    handles.append(layer.register_forward_pre_hook(entered))
    handles.append(layer.register_forward_pre_hook(prepared, with_kwargs=True))
    for name, child in layer.named_children():
        handles.append(child.register_forward_pre_hook(prepared, with_kwargs=True))
        handles.append(
            child.register_forward_hook(
                lambda *call, name=name: compared(name, *call), with_kwargs=True
            )
        )
    for name, module in layer.named_modules():
        if is_linear(module):
            handles.append(
                module.register_forward_hook(
                    lambda *call, name=name: called(name, *call), with_kwargs=True
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies(value: Any) -> Tensor | None:
    """Hidden states as `[2, LENGTH, width]`, or None when it is something else."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
        return None
    if value.shape[:2] == (2, LENGTH) and value.dim() == 3:
        return value
    if value.dim() == 2 and len(value) == 2 * LENGTH:
        return value.view(2, LENGTH, -1)
    return None


def _first_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first argument that holds hidden states."""
    return next((v for v in (*args, *kwargs.values()) if _copies(v) is not None), None)


def _second_copy(value: Any, noise: Iterator[bool]) -> Any:
    """Hidden states with the second copy equal to the first; but for token 0 in the first of a
    call's arguments.
    """
    states = _copies(value)
    if states is None:
        return value
    one = states[0]
    other = one.clone()
    if next(noise, False):
        other[0] += direction(one[0]) * one[0].float().square().mean().sqrt().to(one)
    return torch.stack([one, other]).view_as(value)


def direction(like: Tensor) -> Tensor:
    """A random vector of unit mean square, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    vector = torch.randn(like.shape[-1], generator=generator)
    return (vector / vector.square().mean().sqrt()).to(like)


def _stack_of(hf: Any, stacks: Mapping[str, nn.ModuleList], calls: Mapping[str, Any]) -> str:
    """The list whose members pass on hidden states, each the next one's; the one with most
    parameters. Raises ModelError.
    """

    def passes(path: str, count: int) -> bool:
        ran = [calls[at] for i in range(count) if (at := f"{path}.{i}") in calls]
        outputs = [first_of(output) for _, output in ran]
        shapes = [tuple(y.shape[-3:-1]) if isinstance(y, Tensor) else () for y in outputs]
        if not shapes or any(shape != (2, LENGTH) for shape in shapes):
            return False
        return all(
            given is None or given.shape != before.shape or _same(given[0], before[0])
            for before, (given, _) in zip(outputs, ran[1:])
        )

    sizes = {
        path: sum(parameter.numel() for parameter in members.parameters())
        for path, members in stacks.items()
        if passes(path, len(members))
    }
    if not sizes:
        raise ModelError(
            f"{type(hf).__name__}: no stack of decoder layers was found: no list of modules passes "
            "hidden states [texts, tokens, hidden] on from one to the next"
        )
    return max(sizes, key=sizes.__getitem__)


def _norm_of(order: Sequence[tuple[str, Any, Any]], last: str, states: Tensor) -> str | None:
    """The one module between the output of the last layer and the final states; "": none; None:
    something else.
    """
    at = max(place for place, (path, *_) in enumerate(order) if path == last)
    output = first_of(order[at][2])
    for path, given, found in order[at + 1 :]:
        result = first_of(found)
        if (
            isinstance(given, Tensor)
            and isinstance(result, Tensor)
            and _same(given, output)
            and _same(result, states)
        ):
            return path
    return "" if _same(output, states) else None


def _same(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def calls(hf: Any, paths: Iterable[str]) -> dict[str, tuple[Any, Any, Any]]:
    """What each of these modules was called with, by position and by name, and its output, in one
    forward pass; of modules that did not run nothing.
    """
    found: dict[str, tuple[Any, Any, Any]] = {}

    def note(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found[path] = args, kwargs, output

    with ExitStack() as hooks:
        for path in paths:
            hooks.enter_context(_noted(path, hf.get_submodule(path), note))
        run(hf, probe_ids(hf, 2))
    return found


# -- the second pass
# -------------------------------------------------------------------------------------------------


def streams(hf: Any, layers: Mapping[str, str]) -> dict[str, Stream]:
    """How each layer's projection reaches its output, from one forward pass.

    Args:
        layers: `{path of a layer: path of its projection}`.
    """
    ids, handles = probe_ids(hf, 3), []
    scales: dict[str, float] = {}
    found: dict[str, Stream] = {}

    def level(path: str, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """All copies enter a layer alike, so that each layer is measured by itself."""
        every = (*args, *kwargs.values())
        scales[path] = max((_size(value) for value in every if _is_triple(value)), default=0.0)
        return tuple(map(_alike, args)), {name: _alike(value) for name, value in kwargs.items()}

    def push(path: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        copies = output.view(3, LENGTH, -1)
        scales[path] = max(scales[path], _size(copies))
        steps = torch.arange(3, device=output.device, dtype=output.dtype)[:, None, None]
        return (copies + steps * scales[path] * direction(output)).view_as(output)

    def look(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        states = first_of(output)
        states = states.view(-1, 3, LENGTH, states.shape[-1])[0]
        found[path] = _stream(states, scales[path])

    for path, projection in layers.items():
        layer = hf.get_submodule(path)
        handles += [
            layer.register_forward_pre_hook(
                lambda *call, path=path: level(path, *call), with_kwargs=True
            ),
            hf.get_submodule(projection).register_forward_hook(
                lambda *call, path=path: push(path, *call)
            ),
            layer.register_forward_hook(lambda *call, path=path: look(path, *call)),
        ]
    try:
        run(hf, ids)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_triple(value: Any) -> bool:
    """Whether these are hidden states `[.., 3, LENGTH, width]`."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape[-3:-1] == (3, LENGTH)
    )


def _size(states: Tensor) -> float:
    """The median over tokens of the root mean square of `[.., LENGTH, width]`: without the few
    tokens that carry massive activations.
    """
    return float(states.float().square().mean(-1).sqrt().median())


def _alike(value: Any) -> Any:
    """Hidden states with every copy as the first; other values as they are."""
    return value[..., :1, :, :].expand_as(value).contiguous() if _is_triple(value) else value


def _stream(states: Tensor, size: float) -> Stream:
    """What the layer's outputs `[3, LENGTH, hidden]` say of 0, 1 and 2 times a push of `size`."""
    plain, once, twice = states.double()
    push, loss = (direction(states) * size).double(), rounding(states.dtype)
    moved, more = once - plain, twice - plain
    gates = moved @ push / (push @ push)
    factor = float(gates.median())
    if abs(factor) >= 1e-6 and _follows(moved, more, factor * push, loss):
        return Stream("identity") if abs(factor - 1) < loss / 3 else Stream("factor", factor)
    gated = float(gates.abs().min()) >= 1e-6 and _follows(moved, more, gates[:, None] * push, loss)
    return Stream("gate" if gated else "other", float("nan"))


def _follows(moved: Tensor, more: Tensor, wanted: Tensor, loss: float) -> bool:
    """Whether a push and a double one move the outputs by `wanted` and twice that."""
    return max(_off(moved, wanted), _off(more, 2 * wanted)) <= loss


def _off(moved: Tensor, wanted: Tensor) -> float:
    """How far the changes `[LENGTH, hidden]` are from the wanted ones `[.., hidden]`, relatively;
    the median over tokens.
    """
    return float(((moved - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())
