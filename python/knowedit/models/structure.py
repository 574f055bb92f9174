"""Where the parts an edit needs live in a Hugging Face causal LM, found by structure, not by the
model's name.

What is looked for: the stack of decoder layers, in each layer the *output projection of the MLP*
(the associative memory that locate-then-edit methods write to: `[d_ff] -> [hidden]`), the final
norm and the output head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from knowedit.errors import EditError, ModelError

if TYPE_CHECKING:
    from knowedit.models.editable import EditableModel

_LAYERS = ("model.layers", "transformer.h")
_NORMS = ("norm", "ln_f")
_MLP = ("mlp",)
_PROJECTIONS = ("down_proj", "c_proj", "fc_out")
_ATTENTION = ("self_attn", "attn", "attention")
_READS = (("gate_proj", "up_proj"), ("c_fc",), ("fc_in",), ("fc1",))


@dataclass(frozen=True)
class Layout:
    """Module paths inside a causal LM; `{}` stands for the layer's index."""

    layers: str  #: the ModuleList of decoder layers
    projection: str  #: the MLP's output projection, relative to the model
    norm: str  #: the norm before the head
    transposed: bool  #: True when the projection's weight is `[d_ff, hidden]` (GPT-2's Conv1D)
    d_ff: int
    hidden: int

    def weight_name(self, layer: int) -> str:
        """Name of the edited weight in the model's state dict."""
        return self.projection.format(layer) + ".weight"

    def layer(self, layer: int) -> str:
        """Path of a decoder layer."""
        return f"{self.layers}.{layer}"

    def mlp(self, layer: int) -> str:
        """Path of a layer's MLP."""
        return self.projection.format(layer).rpartition(".")[0]


def detect(model: Any) -> Layout:
    """Find the layout of `model`, or refuse it.

    Raises:
        ModelError: with the reason: an encoder-decoder, a mixture of experts, quantised weights, or
            parts not found.
    """
    config = getattr(model, "config", None)
    kind = type(model).__name__
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
    layers_path = next((p for p in _LAYERS if isinstance(_child(model, p), nn.ModuleList)), None)
    if layers_path is None:
        raise ModelError(
            f"{kind}: no stack of decoder layers at {' or '.join(_LAYERS)}; this architecture "
            f"is not known"
        )
    first = _child(model, layers_path)[0]
    base = layers_path.rsplit(".", 1)[0]
    norm = next((f"{base}.{n}" for n in _NORMS if _child(model, f"{base}.{n}") is not None), None)
    mlp = next((name for name in _MLP if _child(first, name) is not None), None)
    if norm is None or mlp is None:
        raise ModelError(
            f"{kind}: the final norm or a layer's MLP was not found; this architecture is not known"
        )
    if hasattr(_child(first, mlp), "experts"):
        raise ModelError(
            f"{kind} is a mixture of experts; which expert stores a fact is not known, so it is "
            f"refused"
        )
    name = next((p for p in _PROJECTIONS if _child(first, f"{mlp}.{p}") is not None), None)
    if name is None:
        raise ModelError(
            f"{kind}: the MLP has no output projection named {' or '.join(_PROJECTIONS)}"
        )
    projection = _child(first, f"{mlp}.{name}")
    weight = getattr(projection, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        raise ModelError(
            f"{kind}: the weight of {layers_path}.0.{mlp}.{name} is quantised "
            f"({getattr(weight, 'dtype', None)}); "
            "load the model in float32, bfloat16 or float16 to edit it"
        )
    transposed = type(projection).__name__ == "Conv1D"
    if not transposed and not isinstance(projection, nn.Linear):
        raise ModelError(
            f"{kind}: {layers_path}.0.{mlp}.{name} is a {type(projection).__name__}, not a "
            f"linear layer"
        )
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    return Layout(
        layers_path, f"{layers_path}.{{}}.{mlp}.{name}", norm, transposed, in_features, out_features
    )


def attention_of(block: nn.Module) -> nn.Module:
    """The attention of a decoder layer. Raises ModelError when it is not found."""
    found = next(
        (
            module
            for name in _ATTENTION
            if isinstance(module := getattr(block, name, None), nn.Module)
        ),
        None,
    )
    if found is None:
        raise ModelError(
            f"{type(block).__name__}: no attention at {' or '.join(_ATTENTION)}; this "
            f"architecture is not known"
        )
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer as a Llama (`nn.Linear`) or a GPT-2 (`Conv1D`) has it."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(model: Any, name: str) -> bool:
    """Whether the parameter of that name is a matrix stored `[in, out]` (GPT-2's Conv1D)."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "weight" and type(model.get_submodule(owner)).__name__ == "Conv1D"


def linears(model: EditableModel, layer: int, *, mlp: bool = False) -> dict[str, tuple[int, int]]:
    """`{name below model.hf: (in, out)}` of a layer's linear modules, or of its MLP's only."""
    folder = model.layout.mlp(layer) if mlp else model.layout.layer(layer)
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.hf.get_submodule(folder).named_modules():
        if is_linear(module):
            rows, columns = module.weight.shape
            transposed = type(module).__name__ == "Conv1D"
            found[f"{folder}.{name}"] = (rows, columns) if transposed else (columns, rows)
    return found


def mlp_of(model: EditableModel, layer: int) -> Any:
    """A layer's MLP."""
    return model.hf.get_submodule(model.layout.mlp(layer))


def read_modules(model: EditableModel, layer: int) -> dict[str, Any]:
    """The matrices that read the MLP's input at `layer`, by name: gate and up, or one.

    Raises:
        EditError: this MLP is built differently (a fused gate and up, for example).
    """
    path, mlp = model.layout.mlp(layer), mlp_of(model, layer)
    for names in _READS:
        if all(hasattr(mlp, name) for name in names):
            return {f"{path}.{name}": getattr(mlp, name) for name in names}
    known = ", ".join("+".join(names) for names in _READS)
    raise EditError(
        f"{model.name}: the MLP of layer {layer} has none of {known}; its neurons cannot be "
        f"rewritten one by one"
    )


def _child(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module
