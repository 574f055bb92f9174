"""Where the parts an edit needs live in a Hugging Face causal LM, found by structure, not by the
model's name.

What is looked for: the stack of decoder layers; in each layer the *output projection of the MLP*
(the associative memory that locate-then-edit methods write to: `[d_ff] -> [hidden]`) and how its
output reaches the residual stream; the final norm; and how the model makes logits of final states.
`models.probing` runs the model on a few tokens; here its findings become a `Layout`. Where a layer
has routed experts, their output matrices together are that projection (`models.experts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from knowedit.errors import EditError, ModelError
from knowedit.models import probing
from knowedit.models.experts import Experts, holds_experts, recognise, split_name
from knowedit.models.probing import LayerTrace, Linear, Stream, is_linear, size_of
from knowedit.models.quantised import held_as
from knowedit_kernels._memory import overlaps, reach

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

#: Which experts of a layer an edit goes to: those that its router chooses among, the dense MLP
#: beside them that every token passes, or all of these as one.
Which = Literal["routed", "shared", "both"]


@dataclass(frozen=True)
class Part:
    """The parts of one layer whose MLP can be edited.

    Attributes:
        projection: path of the MLP's output projection below the model; of the module that holds
            the experts where the layer has routed ones.
        width: its input size, the key's (`d_ff`); of all experts together, `beside` included.
        stream: how its output reaches the layer's output.
        reads: paths of the linear modules that make the key, in the order in which they run; of
            none for routed experts.
        experts: how the module holds routed experts; None for a dense MLP.
        beside: the shared expert that is edited with the routed ones; its key follows theirs.
    """

    projection: str
    width: int
    stream: Stream
    reads: tuple[str, ...]
    experts: Experts | None = None
    beside: Part | None = None

    @property
    def weight(self) -> str:
        """Name of the edited weight in the model's state dict."""
        return f"{self.projection}.{self.experts.weight if self.experts else 'weight'}"


@dataclass(frozen=True)
class Head:
    """How logits come from final hidden states.

    Attributes:
        kind: "plain", the output embedding's to the bit; "scaled",
            `softcap * tanh(scale * plain / softcap)` to rounding; "own", only the model's own
            forward pass knows.
        scale: of the plain logits.
        softcap: None: none.
    """

    kind: Literal["plain", "scaled", "own"]
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Layout:
    """Where a causal LM's parts are: module paths below it.

    Attributes:
        layers: the ModuleList of decoder layers.
        base: the module that turns tokens into final hidden states.
        norm: the module behind the last layer; "" when there is none, None when it is not one
            module.
        transposed: the projections' weights are `[d_ff, hidden]` (GPT-2's Conv1D).
        hidden: size of the residual stream.
        head: how logits come from final hidden states.
        parts: of each layer that can be edited, by index.
        refused: of every other layer, why.
        mixers: of every layer, paths of its parts that mix tokens (attention, most often).
        mlps: of every layer, paths of what else adds to the stream; experts too.
        shared: of layers with routed experts, those of the dense MLP beside them that every token
            passes, where there is one.
    """

    layers: str
    base: str
    norm: str | None
    transposed: bool
    hidden: int
    head: Head
    parts: Mapping[int, Part]
    refused: Mapping[int, str]
    mixers: Mapping[int, tuple[str, ...]]
    mlps: Mapping[int, tuple[str, ...]]
    shared: Mapping[int, Part] = field(default_factory=dict)

    def of(self, experts: Which) -> Layout:
        """The same with the parts of these experts as those that are edited. Layers without experts
        keep their part; those that have none of the kind are refused.

        Raises:
            EditError: there are no such experts in any layer.
        """
        if experts not in get_args(Which):
            raise EditError(f"experts must be one of {', '.join(get_args(Which))}, got {experts!r}")
        if experts == "routed":
            return self
        if not self.shared:
            raise EditError(
                f"experts={experts!r}: no layer has a shared expert, a dense MLP that every token "
                "passes beside the experts that a router chooses among; take experts='routed'"
            )
        if experts == "both":
            return replace(
                self, parts={i: _joined(part, self.shared.get(i)) for i, part in self.parts.items()}
            )
        dense = {index: part for index, part in self.parts.items() if part.experts is None}
        parts = dict(sorted({**dense, **self.shared}.items()))
        lone = {index: "it has no shared expert" for index in self.parts if index not in parts}
        refused = {index: why for index, why in self.refused.items() if index not in parts} | lone
        return replace(self, parts=parts, refused=refused, shared={})

    def beside(self, layer: int) -> Part | None:
        """The shared expert that is edited with a layer's routed ones; None where none is."""
        return self.part(layer).beside

    @property
    def editable(self) -> tuple[int, ...]:
        """The layers whose MLP can be edited, ascending."""
        return tuple(sorted(self.parts))

    @property
    def ranges(self) -> str:
        """The editable layers in words, such as "0-3, 7"."""
        return _ranges(self.editable)

    @property
    def d_ff(self) -> int:
        """The widest key."""
        return max(part.width for part in self.parts.values())

    def part(self, layer: int) -> Part:
        """The parts of a layer. Raises ModelError, with the reason, when it cannot be edited."""
        if layer not in self.parts:
            raise ModelError(
                f"the MLP of layer {layer} cannot be edited: "
                f"{self.refused.get(layer, 'there is no such layer')}; layers that can: "
                f"{self.ranges}"
            )
        return self.parts[layer]

    def projection(self, layer: int) -> str:
        """Path of the MLP's output projection."""
        return self.part(layer).projection

    def weight_name(self, layer: int) -> str:
        """Name of the edited weight in the model's state dict."""
        return self.part(layer).weight

    def experts(self, layer: int) -> Experts | None:
        """How a layer holds its routed experts; None where its MLP is dense."""
        return self.part(layer).experts

    @property
    def routed(self) -> dict[str, Experts]:
        """The routed experts by the path of the module that holds them."""
        return {p.projection: p.experts for p in self.parts.values() if p.experts is not None}

    def transposes(self, name: str) -> bool | None:
        """Whether one expert's matrix, by its name, is stored `[d, hidden]`. None: it is no
        expert's.
        """
        parameter, expert = split_name(name)
        for part in self.parts.values():
            if part.experts and part.weight == parameter and expert is not None:
                return part.experts.transposed
        return None

    def width(self, layer: int) -> int:
        """Size of the key at a layer (`d_ff`)."""
        return self.part(layer).width

    def stream(self, layer: int) -> Stream:
        """How the output of a layer's projection reaches the residual stream."""
        return self.part(layer).stream

    def layer(self, layer: int) -> str:
        """Path of a decoder layer."""
        return f"{self.layers}.{layer}"

    def mlp(self, layer: int) -> str:
        """Path of what holds a layer's MLP: of the layer itself where its matrices stand there."""
        return self.projection(layer).rpartition(".")[0]

    def tokens_a_rank(self, layer: int) -> int:
        """Tokens that show as many keys as one of them has dimensions: an expert of a routed layer
        sees its share of them only.
        """
        experts = self.experts(layer)
        if experts is None:
            return self.width(layer)
        return math.ceil(experts.width * experts.count / experts.top_k)

    def moment_size(self, layer: int) -> int:
        """Numbers in the second moment of a layer's keys: of each expert's where it has some."""
        experts = self.experts(layer)
        return self.width(layer) * (self.width(layer) if experts is None else experts.width)

    @property
    def pattern(self) -> str:
        """The edited weights' name with `{}` for the layer, as most layers have it."""
        paths = [
            part.weight.replace(f"{self.layer(index)}.", f"{self.layers}.{{}}.", 1)
            for index, part in self.parts.items()
        ]
        return max(paths, key=paths.count)


def _joined(part: Part, shared: Part | None) -> Part:
    """A layer's routed experts with its shared one beside them, where it has both."""
    if part.experts is None or shared is None:
        return part
    return replace(part, width=part.width + shared.width, beside=shared)


# -- finding it
# -------------------------------------------------------------------------------------------------


def detect(model: Any) -> Layout:
    """Find the layout of `model` with two forward passes on a few tokens, or refuse it.

    Raises:
        ModelError: with the reason: an encoder-decoder, a mixture of experts, quantised weights, or
            parts not found.
    """
    kind = type(model).__name__
    _check(model, kind)
    traced = probing.trace(model)
    probing.check_finite(traced.states, kind)
    layers = [f"{traced.stack}.{index}" for index in range(len(traced.layers))]
    chosen, refused = _projections(model, layers, traced.layers, traced.hidden)
    routed, unknown = _routed(model, layers, traced.layers)
    unknown |= _narrow(model, routed, traced.hidden)
    routed = {index: found for index, found in routed.items() if index not in unknown}
    shared = {index: chosen.pop(index) for index in {*routed, *unknown} & set(chosen)}
    refused = {i: why for i, why in refused.items() if i not in routed} | unknown
    if not {**chosen, **routed}:
        raise ModelError(f"{kind} cannot be edited: {_most(refused)}")
    dense = _dense_parts(model, layers, traced.layers, chosen)
    paths = {layers[index]: path for index, (path, _) in routed.items()}
    reached = probing.streams(model, paths) if paths else {}
    parts = dense | {
        index: Part(
            projection=path,
            width=experts.count * experts.width,
            stream=reached[layers[index]],
            reads=(),
            experts=experts,
        )
        for index, (path, experts) in routed.items()
    }
    transposed = {_is_conv1d(model.get_submodule(part.projection)) for part in parts.values()}
    if len(transposed) > 1:
        raise ModelError(f"{kind}: some projections are stored transposed and some are not")
    return Layout(
        layers=traced.stack,
        base=traced.base,
        norm=traced.norm,
        transposed=transposed.pop(),
        hidden=traced.hidden,
        head=_head(model, traced),
        parts=dict(sorted(parts.items())),
        refused=refused,
        mixers={
            index: _mixers(path, found)
            for index, (path, found) in enumerate(zip(layers, traced.layers, strict=True))
        },
        mlps={
            index: _mlps(model.get_submodule(path), path, found, chosen.get(index))
            for index, (path, found) in enumerate(zip(layers, traced.layers, strict=True))
        },
        shared=_dense_parts(model, layers, traced.layers, shared),
    )


def _narrow(model: Any, routed: Mapping[int, tuple[str, Experts]], hidden: int) -> dict[int, str]:
    """Why layers cannot be edited whose experts write less than the hidden states hold: those are
    several streams, of which a value would be one.
    """
    found = {}
    for index, (path, experts) in routed.items():
        shape = model.get_submodule(path).get_parameter(experts.weight).shape
        out = shape[2] if experts.transposed else shape[1]
        if out != hidden:
            found[index] = (
                f"its experts write {out} numbers, and hidden states hold {hidden}: several "
                "streams, which no method here writes to"
            )
    return found


def _dense_parts(
    model: Any, layers: list[str], traced: list[LayerTrace], chosen: Mapping[int, Linear]
) -> dict[int, Part]:
    """The parts of layers whose projections are linear modules."""
    if not chosen:
        return {}
    reached = probing.streams(model, {layers[i]: chosen[i].path for i in chosen})
    return {
        index: Part(
            projection=linear.path,
            width=linear.width,
            stream=reached[layers[index]],
            reads=_reads(layers[index], traced[index], linear),
        )
        for index, linear in chosen.items()
    }


def _mixers(layer: str, traced: LayerTrace) -> tuple[str, ...]:
    return tuple(f"{layer}.{name}" for name in sorted(traced.mixers))


def _check(model: Any, kind: str) -> None:
    """Refuse before anything is run what can be seen from outside. Raises ModelError."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        raise ModelError(f"{kind} is not a Hugging Face transformers model")
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{kind} is an encoder-decoder; only decoder-only causal LMs can be edited"
        )
    if model.get_output_embeddings() is None:
        raise ModelError(
            f"{kind} has no output head; load it as a causal LM (AutoModelForCausalLM)"
        )
    held = (*model.named_parameters(), *model.named_buffers())
    away = [name for name, tensor in held if tensor.is_meta]
    if away:
        raise ModelError(
            f"{len(away)} tensors of {kind} are not in memory ({away[0]}, ...): device_map put "
            "them on the disk or the CPU; use more or larger GPUs, dtype='bfloat16', or "
            "device_map='cpu'"
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            f"{kind} was made within torch.inference_mode(), and no gradient can be taken through "
            "its weights; load it outside"
        )
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ModelError(
            f"{kind} has peft adapters, and an edit of the weights below them would be lost; merge "
            "them first (model = model.merge_and_unload()), or take the model without them "
            "(model.unload())"
        )
    for name, tensor in held:
        if why := held_as(name, tensor):
            raise ModelError(
                f"{kind}: {name} is quantised ({why}), and an edit would be lost in its rounding; "
                "edit a float copy: load_model(..., dequantise=True), --dequantise"
            )


def _projections(
    model: Any, layers: list[str], traced: list[LayerTrace], hidden: int
) -> tuple[dict[int, Linear], dict[int, str]]:
    """The MLP's output projection in each layer, and why there is none in the others."""
    chosen: dict[int, Linear] = {}
    refused: dict[int, str] = {}
    shared = memory_shared(model)
    for index, (path, found) in enumerate(zip(layers, traced, strict=True)):
        linear = _write_out(path, found, hidden)
        if found.runs != 1:
            refused[index] = (
                f"it runs {found.runs} times in one pass, and an edit acts each time"
                if found.runs
                else "it does not run on plain text"
            )
        elif linear is None:
            refused[index] = (
                "it has no MLP output projection, a linear layer onto the hidden states outside "
                f"of what mixes tokens ({', '.join(sorted(found.mixers)) or 'nothing'})"
            )
        elif why := _unwritable(model, f"{linear.path}.weight", shared):
            refused[index] = why
        else:
            chosen[index] = linear
    return chosen, refused


def memory_shared(model: Any) -> dict[str, str]:
    """Parameters whose memory is that of another one, too, wholly or in part: the other's name."""
    spans = sorted(
        (str(parameter.device), *reach(parameter), name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.numel() and parameter.layout == torch.strided
        if not parameter.is_meta and type(parameter.data) is Tensor
    )
    found: dict[str, str] = {}
    on, furthest, owner = "", 0, ""
    for device, begin, end, name in spans:
        if device == on and begin < furthest:
            found[name] = owner
            found.setdefault(owner, name)
        if device != on or end > furthest:
            on, furthest, owner = device, end, name
    return found


def _unwritable(model: Any, name: str, shared: Mapping[str, str]) -> str | None:
    """Why an edit of this weight would not be what is computed, or would be more than that."""
    owner, _, leaf = name.rpartition(".")
    parameter = model.get_submodule(owner)._parameters.get(leaf)
    if parameter is None:
        return (
            f"{name} is no parameter: it is made of others (a parametrization, weight_norm, "
            "pruning); make it one first (torch.nn.utils.parametrize.remove_parametrizations, "
            "prune.remove)"
        )
    if name in shared:
        return f"it shares its weight with {shared[name]}"
    if overlaps(parameter):
        return f"entries of {name} share memory; make it contiguous first"
    return None


def _write_out(path: str, traced: LayerTrace, hidden: int) -> Linear | None:
    """The linear module outside of what mixes tokens that makes hidden states of the widest input,
    which another linear module must have made; the last one of several.
    """
    inside = [
        linear
        for linear in _beside_mixers(path, traced)
        if linear.out == hidden and _reads(path, traced, linear)
    ]
    return max(reversed(inside), key=lambda linear: linear.width, default=None)


def _reads(path: str, traced: LayerTrace, write: Linear) -> tuple[str, ...]:
    """The linear modules beside a projection, and before it, whose outputs have the key's size, or
    twice it.
    """
    every = _beside_mixers(path, traced)
    made = [
        linear.path
        for linear in every[: every.index(write)]
        if linear.out in (write.width, 2 * write.width)
    ]
    home = write.path.rpartition(".")[0] + "."
    return tuple([name for name in made if name.startswith(home)] or made)


def _mlps(layer: nn.Module, path: str, traced: LayerTrace, write: Linear | None) -> tuple[str, ...]:
    """What holds a layer's projection, the projection itself where it stands in the layer; where
    there is none, the children with matrices that mix no tokens.
    """
    if write is not None:
        home = write.path.rpartition(".")[0]
        return (write.path if home == path else home,)
    return tuple(
        f"{path}.{name}"
        for name, child in layer.named_children()
        if name not in traced.mixers and any(p.dim() > 1 for p in child.parameters())
    )


def _beside_mixers(path: str, traced: LayerTrace) -> list[Linear]:
    """A layer's linear modules that are in no part that mixes tokens."""
    mixers = tuple(f"{path}.{name}." for name in traced.mixers)
    return [linear for linear in traced.linears if not f"{linear.path}.".startswith(mixers)]


def _routed(
    model: Any, layers: list[str], traced: list[LayerTrace]
) -> tuple[dict[int, tuple[str, Experts]], dict[int, str]]:
    """In each layer with routed experts, the path of what holds them, and how; and why they cannot
    be edited in the others.
    """
    named = {
        index: name
        for index, (path, found) in enumerate(zip(layers, traced, strict=True))
        if found.runs == 1 and (name := _experts(model.get_submodule(path), found.mixers))
    }
    paths = {
        f"{layers[index]}.{name}": index
        for index in named
        for name, module in model.get_submodule(layers[index]).named_modules()
        if holds_experts(module) and name.partition(".")[0] not in traced[index].mixers
    }
    routed: dict[int, tuple[str, Experts]] = {}
    refused = {
        index: f"its {name} is a mixture of experts that are not held in one parameter"
        for index, name in named.items()
    }
    shared = memory_shared(model) if paths else {}
    for path, (args, kwargs, output) in (probing.calls(model, paths) if paths else {}).items():
        try:
            found = recognise(model.get_submodule(path), args, kwargs, output)
            if why := _unwritable(model, f"{path}.{found.weight}", shared):
                refused[paths[path]] = why
            else:
                routed[paths[path]] = path, found
        except ModelError as error:
            refused[paths[path]] = f"its experts ({path}) cannot be taken apart: {error}"
    return routed, {i: why for i, why in refused.items() if i not in routed}


def _experts(layer: nn.Module, mixers: set[str]) -> str | None:
    """Name of what holds several matrices of which a token uses some, or None."""
    for name, module in layer.named_modules():
        if name.partition(".")[0] in mixers:
            continue
        if name.rpartition(".")[2] in ("experts", "router", "moe"):
            return name
        if holds_experts(module):
            return name or "weight"
    return None


def _most(reasons: Mapping[int, str]) -> str:
    """The reason that most layers have."""
    every = list(reasons.values())
    return max(every, key=every.count)


def _ranges(layers: tuple[int, ...]) -> str:
    """Numbers in words: "0-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs) or "none"


@torch.no_grad()
def _head(model: Any, traced: probing.Trace) -> Head:
    """How the model makes logits: compared with the output embedding's, and with the model's own
    forward pass around given states, which must give its own logits again.

    Raises:
        ModelError: it does not.
    """
    head = model.get_output_embeddings()
    fits = head.weight.shape[-1] == traced.states.shape[-1]
    plain = head(traced.states) if fits else None
    if plain is not None and torch.equal(plain, traced.logits):
        return Head("plain")
    again = own_head(model, traced.base, traced.states)
    off = float((again - traced.logits).abs().max() / traced.logits.abs().max().clamp(min=1e-30))
    if not off <= probing.rounding(traced.states.dtype):
        raise ModelError(
            f"{type(model).__name__}: logits of its final hidden states differ from those of the "
            f"whole model by {off:.1e} of the largest; what it does between them is not known"
        )
    found = None if plain is None else _scaled(model, plain, traced.logits)
    return found or Head("own")


def _scaled(model: Any, plain: Tensor, logits: Tensor) -> Head | None:
    """The scale and soft-cap between the output embedding's logits and the model's, if that is all;
    a soft-cap is looked for among the configuration's numbers and believed when it fits.
    """
    config = model.config.get_text_config().to_dict()
    caps = [v for name, v in config.items() if "cap" in name and isinstance(v, float | int) and v]
    one, other = plain.double(), logits.double()
    for cap in (None, *caps):
        if cap is not None and float(other.abs().max()) > cap:
            continue
        straight = other if cap is None else cap * torch.atanh((other / cap).clamp(-0.99, 0.99))
        inside = torch.ones_like(other) if cap is None else (other.abs() < 0.9 * cap).double()
        scale = float((one * straight * inside).sum() / (one * one * inside).sum())
        made = scale * one if cap is None else cap * torch.tanh(scale * one / cap)
        if float((made - other).abs().max() / other.abs().max()) < probing.rounding(plain.dtype):
            return Head("scaled", scale, cap)
    return None


class _OnlyStates(tuple):
    """What a base model returns, with final hidden states and nothing else."""

    def __new__(cls, states: Tensor) -> _OnlyStates:
        return super().__new__(cls, (states,))

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def own_head(hf: Any, base: str, states: Tensor) -> Tensor:
    """Logits `[.., vocab]` that the model's own forward pass makes of final states
    `[.., hidden]`: whatever turns tokens into states is left out.
    """
    inner = hf.get_submodule(base)
    rows = states.reshape(1, -1, states.shape[-1])
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    kept = inner.__dict__.get("forward")
    inner.forward = lambda *_args, **_kwargs: _OnlyStates(rows)
    try:
        logits = hf(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        if kept is None:
            del inner.forward
        else:
            inner.forward = kept
    return logits.reshape(*states.shape[:-1], logits.shape[-1])


# -- what others ask
# -------------------------------------------------------------------------------------------------
def attention_of(model: EditableModel, layer: int) -> nn.Module:
    """The attention of a layer: what mixes tokens there. Raises ModelError when that is not one
    module.
    """
    found = model.layout.mixers.get(layer, ())
    if len(found) != 1:
        raise ModelError(
            f"{model.name}: layer {layer} has {len(found)} modules that mix tokens"
            f"{' (' + ', '.join(found) + ')' if found else ''}, where one attention is wanted"
        )
    return model.hf.get_submodule(found[0])


def is_transposed(model: Any, name: str) -> bool:
    """Whether the parameter of that name is a matrix stored `[in, out]` (GPT-2's Conv1D)."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and _is_conv1d(model.get_submodule(owner))


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def linears(model: EditableModel, layer: int, *, mlp: bool = False) -> dict[str, tuple[int, int]]:
    """`{name below model.hf: (in, out)}` of a layer's linear modules, or of its MLP's only. Raises
    ModelError where these are routed experts'.
    """
    if mlp:
        part = model.layout.part(layer)
        check_dense(model, layer)
        paths = [*part.reads, part.projection]
    else:
        folder = model.layout.layer(layer)
        paths = [
            f"{folder}.{name}"
            for name, module in model.hf.get_submodule(folder).named_modules()
            if is_linear(module)
        ]
    return {path: size_of(model.hf.get_submodule(path)) for path in paths}


def check_dense(model: EditableModel, layer: int) -> None:
    """Raise ModelError for a layer whose MLP is made of routed experts."""
    layout = model.layout
    if layout.experts(layer) is not None:
        dense = [other for other in layout.editable if layout.experts(other) is None]
        others = f", or one of the dense layers {_ranges(tuple(dense))}" if dense else ""
        raise ModelError(
            f"{model.name}: layer {layer} has routed experts, and this works on the matrices of a "
            f"dense MLP; use MEMIT, or another method that locates and edits{others}"
        )
