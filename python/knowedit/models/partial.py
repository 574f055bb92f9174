"""THE way to run a part of a model: from the bottom up to a module (`read`), or from a layer on
(`PartialModel`), under virtual edits and hooks.

A causal model's hidden states up to an edited layer, and every later layer's keys and values at
earlier tokens, do not depend on what is written at a later token. They are computed once, and each
step of an optimisation runs the few remaining tokens through the few remaining layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from knowedit.errors import ModelError
from knowedit.models.tokens import Row, batches

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

T = TypeVar("T")

#: Takes a module's first input (None: it has none by position) and its output; what it returns
#: takes the output's place, unless it is None.
Hook = Callable[[Any, Tensor], Tensor | None]


# -- hooks and virtual edits
# -------------------------------------------------------------------------------------------------


@contextmanager
def hooked(modules: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Pass the first input and the (first) output of each module through its hook, within the
    block.
    """

    def forward(hook: Hook) -> Callable[..., Any]:
        def changed(_module: nn.Module, inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            found = hook(inputs[0] if inputs else None, first)
            if found is None:
                return None
            return (found, *output[1:]) if isinstance(output, tuple) else found

        return changed

    handles = [module.register_forward_hook(forward(hook)) for module, hook in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded(modules: Sequence[nn.Module] | nn.ModuleList) -> Iterator[list[Tensor]]:
    """The outputs of the modules, in the order in which they run."""
    found: list[Tensor] = []
    with hooked({module: lambda _, output: found.append(output) for module in modules}):
        yield found


def virtual(
    model: EditableModel, factors: Mapping[Any, tuple[Tensor, Tensor]]
) -> AbstractContextManager[None]:
    """Run as if layer `l`'s weight had `U Vᵀ` added (`{l: (U [hidden, r], V [d_ff, r])}`); no
    weight is touched.

    Instead of a layer's number, the name of any linear module below `hf`; each row of the batch can
    have its own pair, `[B, out, r]` and `[B, in, r]`.
    """

    def hook(pair: tuple[Tensor, Tensor]) -> Hook:
        def add(inputs: Tensor, output: Tensor) -> Tensor:
            left, right = (factor.to(output) for factor in pair)
            return output + (inputs @ right) @ left.mT

        return add

    return hooked({_module(model, at): hook(pair) for at, pair in factors.items()})


@contextmanager
def probed(
    model: EditableModel, names: Sequence[str]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Watch linear modules: after a run, `{name: (inputs [B, T, in], probe [B, T, out])}`.

    The probe is zero and is added to the module's output: a gradient with respect to it is that of
    the output. With the inputs it gives the weight's gradient as a sum of outer products over
    tokens, which is never formed.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Hook:
        def add(inputs: Tensor, output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            seen[name] = (inputs.detach(), probe)
            return output + probe

        return add

    with hooked({model.hf.get_submodule(name): hook(name) for name in names}):
        yield seen


class _Calling(nn.Module):
    """A function of a model as a module, so that the model's weights can be exchanged for one
    call.
    """

    def __init__(self, hf: nn.Module, function: Callable[[], Any]) -> None:
        super().__init__()
        self.hf, self.function = hf, function

    def forward(self) -> Any:
        return self.function()


def with_weights(
    model: EditableModel, weights: Mapping[str, Tensor], function: Callable[[], T]
) -> T:
    """What `function` returns with some parameters (by name below `hf`) exchanged for tensors;
    differentiable with respect to these.
    """
    inside = {f"hf.{name}": weight for name, weight in weights.items()}
    with model.evaluating():
        return functional_call(_Calling(model.hf, function), inside, ())


def _module(model: EditableModel, at: str | int) -> nn.Module:
    """A module by name, or the projection of a layer."""
    return model.hf.get_submodule(at) if isinstance(at, str) else model.projection(at)


# -- from the bottom up
# -------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised inside a forward pass once the last wanted value was read."""


@torch.no_grad()
def read(
    model: EditableModel,
    ids: Tensor,
    *,
    inputs: Mapping[str, Callable[[Tensor], Any]] | None = None,
    outputs: Mapping[str, Callable[[Tensor], Any]] | None = None,
    positions: Tensor | None = None,
) -> None:
    """One forward pass that ends as soon as all wanted values were read; nothing above runs.

    Args:
        ids: `[B, T]`, right-padded: causal attention never looks at the padding, so no mask is
            needed.
        inputs, outputs: by module name below `hf`, what is called with the module's first input or
            output, `[B, T, width]`. Before the last of `inputs` the pass stops without running the
            module itself.
        positions: `[B, T]`, where several texts stand behind each other in a row: each begins again
            at 0.

    Raises:
        ModelError: the pass ended without reaching a module.
    """
    wanted = {("input", name) for name in inputs or {}}
    wanted |= {("output", name) for name in outputs or {}}

    def done(kind: str, name: str) -> None:
        wanted.discard((kind, name))
        if not wanted:
            raise _Stop

    def before(name: str, take: Callable[[Tensor], Any], _module: nn.Module, given: Any) -> None:
        take(given[0])
        done("input", name)

    def after(
        name: str, take: Callable[[Tensor], Any], _module: nn.Module, _given: Any, output: Any
    ) -> None:
        take(output[0] if isinstance(output, tuple) else output)
        done("output", name)

    handles: list[Any] = []
    try:
        for name, take in (inputs or {}).items():
            module = model.hf.get_submodule(name)
            handles.append(module.register_forward_pre_hook(partial(before, name, take)))
        for name, take in (outputs or {}).items():
            module = model.hf.get_submodule(name)
            handles.append(module.register_forward_hook(partial(after, name, take)))
        model.final_states(ids, positions)
    except _Stop:
        return
    finally:
        for handle in handles:
            handle.remove()
    left = ", ".join(sorted(name for _, name in wanted)) or "anything that was asked for"
    raise ModelError(f"{model.name}: the forward pass ended without reaching {left}")


def read_keys(
    model: EditableModel,
    ids: Tensor,
    layers: Sequence[int],
    on_key: Callable[[int, Tensor], Any],
    *,
    positions: Tensor | None = None,
) -> None:
    """`on_key(layer, keys [B, T, d_ff])` for each of `layers` in one pass, which ends before the
    deepest one's projection; see `read`.
    """
    model.check_layers(layers)
    names = {model.layout.projection(layer): layer for layer in sorted(set(layers))}
    read(
        model,
        ids,
        inputs={name: partial(on_key, layer) for name, layer in names.items()},
        positions=positions,
    )


def layer_outputs(
    model: EditableModel, inputs: Sequence[list[int]], layer: int, budget: int = 2048
) -> Iterator[tuple[list[int], Tensor]]:
    """Outputs of `layer`, batch by batch: which of the token lists, and their states `[B, T,
    hidden]`, right-padded.
    """
    model.check_layers([layer])
    for group in batches([len(ids) for ids in inputs], budget):
        found: list[Tensor] = []
        ids, _ = model.pad([inputs[i] for i in group])
        read(model, ids, outputs={model.layout.layer(layer): found.append})
        yield group, found[0]


# -- from a layer on
# -------------------------------------------------------------------------------------------------


class Prefix:
    """A read-only stand-in for transformers' cache: the clean prefix's keys and values in front of
    the new ones.

    Attributes:
        keys, values: by layer, `[B, heads, prefix, width]`.
    """

    is_compileable = False

    def __init__(self, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> None:
        self.keys, self.values = keys, values

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], key], 2), torch.cat([self.values[layer], value], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        return next(iter(self.keys.values())).shape[2]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        """The same with every tensor passed through `change`."""
        keys, values = (
            {layer: change(tensor) for layer, tensor in part.items()}
            for part in (self.keys, self.values)
        )
        return Prefix(keys, values)


@dataclass(frozen=True)
class Capture:
    """What one forward pass hands to the layers from `from_layer` on.

    Attributes:
        states: `[B, T, hidden]` the input of the first of them.
        calls: of each, its other arguments.
        cache: `{layer: (keys, values)}`, `[B, heads, T, width]` each.
    """

    model: EditableModel
    from_layer: int
    states: Tensor
    calls: list[dict[str, Any]]
    cache: Prefix


@torch.no_grad()
def capture(
    model: EditableModel, ids: Tensor, from_layer: int, embeddings: Tensor | None = None
) -> Capture:
    """Run the whole model once and keep what the layers from `from_layer` on are called with.

    Args:
        ids: `[B, T]`, right-padded.
        embeddings: `[B, T, hidden]`, in place of those of `ids`.

    Raises:
        ModelError: there is no such layer, or its attention keeps no key/value cache.
    """
    from transformers import DynamicCache

    blocks = list(model.layers)[from_layer:]
    if not blocks:
        raise ModelError(
            f"layer {from_layer - 1} is the last one; values are optimised at a layer below it"
        )
    calls: list[dict[str, Any]] = []
    states: list[Tensor] = []

    def note(block: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        call.pop("kwargs", None)
        state = call.pop("hidden_states")
        if not states:
            states.append(state)
        call.pop("past_key_values", None)
        calls.append(call)

    handles = [b.register_forward_pre_hook(note, with_kwargs=True) for b in blocks]
    try:
        # a cache made without the model's configuration keeps every token, also in sliding-window
        # layers
        text = {"input_ids": ids} if embeddings is None else {"inputs_embeds": embeddings}
        with model.evaluating():
            out = model.base(**text, past_key_values=DynamicCache(), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    cache = getattr(out, "past_key_values", None)
    if cache is None or not hasattr(cache, "layers"):
        raise ModelError(
            f"{model.name}: its layers keep no key/value cache, so a part of them cannot be run "
            f"alone"
        )
    kept = {i: cache.layers[i] for i in range(from_layer, from_layer + len(blocks))}
    keys, values = ({i: getattr(c, part) for i, c in kept.items()} for part in ("keys", "values"))
    return Capture(model, from_layer, states[0], calls, Prefix(keys, values))


class PartialModel:
    """The layers from `from_layer` on and the final norm, on the tokens from each row's
    `from_token` on: what stands in front keeps its clean keys and values. Differentiable; the
    weights may be edited virtually.

    Args:
        model: the model; its weights must not change while this is used.
        rows: tokenised texts.
        from_layer: its input is replaced; 1 or more, as what is below is computed once.
        from_token: by row; None: from each row's `subject` on.

    Attributes:
        states: `[B, Q, hidden]` clean inputs of `from_layer`, token 0 being `from_token`.

    Raises:
        ModelError: the layers cannot be run alone (they do not take a cache or a 4-D mask).
    """

    model: EditableModel
    from_layer: int
    states: Tensor
    _calls: list[dict[str, Any]]
    _prefix: Prefix | None

    def __init__(
        self,
        model: EditableModel,
        rows: Sequence[Row],
        from_layer: int,
        from_token: Sequence[int] | None = None,
    ) -> None:
        self.model, self.from_layer = model, from_layer
        ids, mask = model.pad([r.ids for r in rows])
        starts = [r.subject for r in rows] if from_token is None else list(from_token)
        start = torch.tensor(starts, device=ids.device)
        found = capture(model, ids, from_layer)
        queries, prefix = int((mask.sum(1) - start).max()), int(start.max())
        # [B, Q] global positions, may pass the end
        at = start[:, None] + torch.arange(queries, device=ids.device)
        inside = at < mask.sum(1)[:, None]
        at = at.clamp(max=ids.shape[1] - 1)
        self.states = found.states.gather(1, at[..., None].expand(-1, -1, found.states.shape[-1]))
        before = torch.arange(prefix, device=ids.device)
        columns = torch.cat([before.expand(len(rows), -1), at], 1)  # key positions, global
        live = torch.cat([before < start[:, None], inside], 1)
        causal = (columns[:, None, :] <= at[:, :, None]) & live[:, None, :]
        # a padded query sees itself: with nothing to see its softmax is NaN, and NaN poisons the
        # gradient
        itself = (
            torch.arange(columns.shape[1], device=ids.device)
            == prefix + torch.arange(queries, device=ids.device)[:, None]
        )
        idle = ~inside[:, :, None] & itself
        self._calls = [_sliced(call, at, columns, causal, idle) for call in found.calls]
        self._prefix = found.cache.changed(lambda tensor: tensor[:, :, :prefix])

    @classmethod
    def behind(cls, found: Capture, from_token: int) -> PartialModel:
        """Of a capture of texts of one length, on the tokens from `from_token` on; for any number
        of copies of its rows (`layer`).
        """
        count, length = found.states.shape[:2]
        columns = torch.arange(length, device=found.states.device)[None]
        at = columns[:, from_token:]
        causal = columns[:, None] <= at[..., None]
        idle = torch.zeros_like(causal)
        alike = [_of_rows(call, count, slice(1)) for call in found.calls]  # the same for all rows
        calls = [_sliced(call, at, columns, causal, idle) for call in alike]
        prefix = found.cache.changed(lambda tensor: tensor[:, :, :from_token])
        return cls._of(found.model, found.from_layer, found.states[:, from_token:], calls, prefix)

    @classmethod
    def for_texts(cls, model: EditableModel, from_layer: int, longest: int) -> PartialModel:
        """For whole texts of at most `longest` tokens that are batched anew at every step: `run`
        takes `[B, T, hidden]`. `from_layer` is 1 or more.
        """
        model.check_layers([from_layer])
        ids = torch.zeros(1, longest, dtype=torch.long, device=model.device)
        found = capture(model, ids, from_layer)
        return cls._of(model, from_layer, found.states[:, :0], found.calls, None)

    @classmethod
    def _of(
        cls,
        model: EditableModel,
        from_layer: int,
        states: Tensor,
        calls: list[dict[str, Any]],
        prefix: Prefix | None,
    ) -> PartialModel:
        part = object.__new__(cls)
        part.model, part.from_layer, part.states = model, from_layer, states
        part._calls, part._prefix = calls, prefix
        return part

    def select(self, rows: Tensor) -> PartialModel:
        """The same for some of its rows (`rows`: indices)."""
        calls = [_of_rows(call, len(self.states), rows) for call in self._calls]
        prefix = None if self._prefix is None else self._prefix.changed(lambda t: t[rows])
        return self._of(self.model, self.from_layer, self.states[rows], calls, prefix)

    def run(self, states: Tensor | None = None) -> Tensor:
        """Final hidden states (after the last norm) `[B, Q, hidden]` for inputs of `from_layer`;
        None: the clean ones.
        """
        states = self.states if states is None else states
        with self.model.evaluating():
            for index in range(self.from_layer, len(self.model.layers)):
                states = self._layer(index, states, self._prefix)
            return self.model.norm(states)

    def layer(self, index: int, states: Tensor) -> Tensor:
        """Output of one layer for inputs `[copies * B, Q, hidden]`, copy by copy."""
        prefix = self._prefix
        if prefix is not None:
            keys, values = prefix.keys[index], prefix.values[index]
            copies = len(states) // len(keys)
            keys, values = (tensor.repeat(copies, 1, 1, 1) for tensor in (keys, values))
            prefix = Prefix({index: keys}, {index: values})
        with self.model.evaluating():
            return self._layer(index, states, prefix)

    def _layer(self, index: int, states: Tensor, prefix: Prefix | None) -> Tensor:
        call = self._calls[index - self.from_layer]
        if prefix is None:
            call = _cut(call, states.shape[1])
        out = self.model.layers[index](states, past_key_values=prefix, **call)
        return out[0] if isinstance(out, tuple) else out


def _of_rows(call: Mapping[str, Any], count: int, rows: Tensor | slice) -> dict[str, Any]:
    """A layer's arguments for some rows of `count`."""

    def take(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(take, value))
        return value[rows] if isinstance(value, Tensor) and value.shape[:1] == (count,) else value

    return {name: take(value) for name, value in call.items()}


def _cut(call: Mapping[str, Any], length: int) -> dict[str, Any]:
    """A layer's arguments for texts of `length` tokens."""
    result = dict(call, use_cache=False)
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions[:, :length]
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = tuple(part[:, :length] for part in rotary)
    if (mask := call.get("attention_mask")) is not None:
        result["attention_mask"] = mask[:, :, :length, :length]
    if (places := call.get("cache_position")) is not None:
        result["cache_position"] = places[:length]
    return result


def _sliced(
    call: Mapping[str, Any], at: Tensor, columns: Tensor, causal: Tensor, idle: Tensor
) -> dict[str, Any]:
    """A layer's arguments restricted to the queries at positions `at` and the keys at positions
    `columns`.
    """
    result, rows = dict(call, use_cache=False), at.shape[0]
    if (positions := call.get("position_ids")) is not None:
        result["position_ids"] = positions.expand(rows, -1).gather(1, at)
    if (rotary := call.get("position_embeddings")) is not None:
        result["position_embeddings"] = tuple(
            r.expand(rows, -1, -1).gather(1, at[..., None].expand(-1, -1, r.shape[-1]))
            for r in rotary
        )
    mask, allowed = call.get("attention_mask"), causal[:, None]
    # the layer's own mask: padding, sliding window
    if isinstance(mask, Tensor) and mask.dim() == 4:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = seen.expand(rows, -1, -1, -1)
        seen = seen.gather(2, at[:, None, :, None].expand(-1, seen.shape[1], -1, seen.shape[3]))
        allowed = allowed & seen.gather(
            3, columns[:, None, None, :].expand(-1, seen.shape[1], at.shape[1], -1)
        )
    allowed = allowed | idle[:, None]
    if isinstance(mask, Tensor) and mask.is_floating_point():
        allowed = torch.zeros_like(allowed, dtype=mask.dtype).masked_fill(
            ~allowed, torch.finfo(mask.dtype).min
        )
    result["attention_mask"] = allowed
    return result
