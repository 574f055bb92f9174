"""Value optimisation (`compute_z` of MEMIT and its family, `compute_v` of ROME).

The host optimises one request at a time, with the whole model on whole prompts at every step. Here
all requests of a call are optimised together, each step running the tokens from the subject's last
one on through the layers above (`methods.locate.values`). Texts, tokens, the looked-up token, the
number of steps and the loss are the host's.
"""

from __future__ import annotations

import ast
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from knowedit.errors import KnowEditError
from knowedit.integrations.discovery import Signature, mentions, read_from, returned, source_of
from knowedit.integrations.hosts import Host
from knowedit.integrations.replacements.base import (
    NotOurs,
    Replacement,
    editable,
    handed_on,
    own_way,
    weights_version,
)
from knowedit.integrations.replacements.requests import current_job, key_of, target_of
from knowedit.integrations.replacements.states import real_places, states_at, tokens_of
from knowedit.methods.locate.values import (
    ESSENCE,
    Plan,
    Problem,
    ValueSettings,
    optimise_plans,
)
from knowedit.models import partial as parts
from knowedit.models.editable import EditableModel
from knowedit.models.tokens import Row

logger = logging.getLogger(__name__)

#: The loss below which all hosts end an optimisation.
STOP = 0.05
#: The hyper-parameters that the hosts' optimisations read. One that reads others is another method
#: under the same name (PMET's `compute_z`, R-ROME's `compute_v`).
SETTINGS = frozenset(
    "clamp_norm_factor fact_token kl_factor layer_module_tmp lm_head_module ln_f_module "
    "mlp_module_tmp rewrite_module_tmp v_loss_layer v_lr v_num_grad_steps v_weight_decay "
    "device".split()
)


def another_method(function: FunctionType, siblings: set[str]) -> str | None:
    """Why the function does something else than we do under its name, or None."""
    if missing := siblings - function.__globals__.keys():
        return f"its module has no {', '.join(sorted(missing))}"
    tree = source_of(function)
    if tree is None:
        return "its source cannot be read"
    if others := read_from(tree, "hparams") - SETTINGS:
        return f"it reads hparams.{', hparams.'.join(sorted(others))}: another method"
    for node in ast.walk(tree):  # `if loss < 5e-2: break`
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == "loss":
            limit = node.comparators[0]
            if not isinstance(limit, ast.Constant) or limit.value != STOP:
                return f"it ends at `{ast.unparse(node)}`, not at a loss of {STOP}"
    return None


def another_value(function: FunctionType) -> str | None:
    """`another_method`, or what is returned is not the clean state plus the delta."""
    if reason := another_method(function, {"find_fact_lookup_idx"}):
        return reason
    tree = source_of(function)
    value = returned(tree) if tree is not None else None
    if not (isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add)):
        what = ast.unparse(value) if value is not None else "something"
        return f"it returns `{what}`, not the clean state plus what was optimised"
    return None


def another_vector(function: FunctionType) -> str | None:
    """`another_method`, for ROME's."""
    return another_method(function, {"find_fact_lookup_idx", "get_module_input_output_at_word"})


#: Numbers of the hosts' hyper-parameters, by our names.
NUMBERS = {
    "steps": "v_num_grad_steps",
    "lr": "v_lr",
    "clamp": "clamp_norm_factor",
    "weight_decay": "v_weight_decay",
    "kl": "kl_factor",
}


def settings_of(hparams: Any) -> ValueSettings:
    """The host's hyper-parameters of the value optimisation as ours.

    Raises:
        NotOurs: one of them is no number, as a file leaves them: YAML reads `5e-1` as a text, and
            a key without a value as None, which to us would mean something.
    """
    given = {ours: getattr(hparams, theirs) for ours, theirs in NUMBERS.items()}
    for ours, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise NotOurs(f"hparams.{NUMBERS[ours]} is {value!r}, not a number")
    return ValueSettings(
        **given,
        sink=math.inf,  # the host takes any state's length
        stop=STOP,
    )


def check_modules(view: EditableModel, hparams: Any, layer: int) -> None:
    """The host's loss must be the model's own: its final norm and head on its last layer.

    Raises:
        NotOurs: it is another one, with the difference.
    """
    last = len(view.layers) - 1
    if max(hparams.v_loss_layer, layer) != last:
        raise NotOurs(f"the loss is taken at layer {hparams.v_loss_layer}, not at the last, {last}")
    if layer == last:
        raise NotOurs("values at the last layer are not optimised by us")
    try:
        named = {
            name: view.hf.get_submodule(name)
            for name in (hparams.layer_module_tmp.format(layer), hparams.ln_f_module)
        }
        head = view.hf.get_parameter(f"{hparams.lm_head_module}.weight")
    except AttributeError as error:
        raise NotOurs(str(error)) from error
    own = view.hf.get_output_embeddings().weight
    if list(named.values()) != [view.layers[layer], view.norm] or head.data_ptr() != own.data_ptr():
        raise NotOurs("layer_module_tmp, ln_f_module or lm_head_module is not the model's own")
    if getattr(view.hf.config, "final_logit_softcapping", None):
        raise NotOurs("the host's loss leaves the model's soft-capping out")


def target_tokens(original: FunctionType, tok: Any, text: str) -> list[int]:
    """Tokens of the target as the host makes them: with or without special ones in front."""
    plain = mentions(original, "add_special_tokens")
    ids = list(
        tok(text, add_special_tokens=False)["input_ids"] if plain else tok(text)["input_ids"]
    )
    if mentions(original, "bos_token_id") and ids[0] in (tok.bos_token_id, tok.unk_token_id):
        ids = ids[1:]
    return ids


def plan_of(
    original: FunctionType,
    tok: Any,
    request: Mapping[str, Any],
    hparams: Any,
    contexts: Sequence[str],
) -> Plan:
    """The rows that the host would run for a request.

    Raises:
        NotOurs: the looked-up token is chosen otherwise than from the subject, lies in the padding
            or behind what is scored.
    """
    subject, strategy = request["subject"], hparams.fact_token
    if not strategy.startswith("subject_"):
        raise NotOurs(f"fact_token={strategy!r}")
    target = target_tokens(original, tok, target_of(request))
    said = tok.decode(target[:-1])
    prompts = [context.format(request["prompt"]) + said for context in contexts] + [ESSENCE]
    rows = tokens_of(tok, [prompt.format(subject) for prompt in prompts])
    find = original.__globals__["find_fact_lookup_idx"]
    lookups = [[find(prompt, subject, tok, strategy, verbose=False)] for prompt in prompts]
    at = [place for (place,) in real_places(rows, lookups, tok.padding_side)]
    firsts = [len(row) - len(target) + 1 for row in rows[:-1]]
    if any(first - 1 < place for first, place in zip(firsts, at)):
        raise NotOurs(f"the subject of {prompts[0]!r} stands behind what is scored")
    # where tokens merge, what is scored is not what is run: the rows of a plan say the one, its
    # inputs the other
    scored = [
        Row(row[:first] + target, place, first) for row, place, first in zip(rows, at, firsts)
    ]
    run = [Row(row, place) for row, place in zip(rows, at)]
    essence = Row(rows[-1], at[-1])
    return Plan(
        [*scored, essence],
        [*run[:-1], Row(rows[-1][: at[-1] + 1], at[-1])],
        [1 / len(scored)] * len(scored),
        [0],
    )


# -- MEMIT and its family


def _make_compute_z(original: FunctionType, host: Host) -> Callable[..., Any]:
    def compute_z(
        model: Any, tok: Any, request: Any, hparams: Any, layer: int, context_templates: Any
    ) -> Tensor:
        try:
            view = editable(model, tok)
            check_modules(view, hparams, layer)
            contexts = [context for group in context_templates for context in group]
            like = handed_on(view.weight(layer)[:0], host)
            return _value_of(original, view, request, hparams, layer, contexts).to(like)
        except (NotOurs, KnowEditError) as reason:
            own_way(original, reason)
            return original(model, tok, request, hparams, layer, context_templates)

    return compute_z


def _value_of(
    original: FunctionType,
    view: EditableModel,
    request: Any,
    hparams: Any,
    layer: int,
    contexts: Sequence[str],
) -> Tensor:
    """The request's value `[hidden]`, float32; the first of a job brings those of all others."""
    known, key, version = current_job(), key_of(request), weights_version(view.hf)
    if known is not None and known.version == version and key in known.values:
        return known.values[key]
    together = known.from_here(key, layer) if known is not None else []
    requests = together or [request]
    plans = [plan_of(original, view.tokenizer, one, hparams, contexts) for one in requests]
    device = view.weight(layer).device  # where the host wants them: they never leave it
    found = optimise_plans(view, plans, layer, settings_of(hparams), device=device)
    logger.info("%d values at layer %d: losses %s", len(plans), layer, found.loss.tolist())
    values = {key_of(one): found.value[i] + found.delta[i] for i, one in enumerate(requests)}
    if known is not None and together:
        known.values, known.version = values, version
    return values[key]


COMPUTE_Z = Replacement(
    "all requests of a call together; only the tokens and layers that a value can reach",
    Signature("compute_z", ("model", "tok", "request", "hparams", "layer", "context_templates")),
    _make_compute_z,
    another_value,
)


# -- ROME


class MLPOutput(Problem):
    """Values are outputs of an MLP: what is added to one reaches the layer's output unchanged."""

    module: ClassVar[str]

    def states(self, rows: Tensor) -> Tensor:
        wanted = [row for plan in self.plans for row in plan.inputs]
        chosen = [wanted[i] for i in rows.tolist()]
        ids, _ = self.model.pad([row.ids for row in chosen])
        found: list[Tensor] = []
        parts.read(self.model, ids, outputs={self.module: found.append})
        at = torch.tensor([row.subject or 0 for row in chosen], device=found[0].device)
        return found[0][torch.arange(len(chosen), device=at.device), at][:, None]


def check_added(view: EditableModel, ids: list[int], module: str, layer: int) -> None:
    """Raise NotOurs unless what is added to the MLP's output is added to the layer's output."""
    found: list[Tensor] = []
    batch, _ = view.pad([ids])
    take = {view.layout.layer(layer): found.append}
    parts.read(view, batch, outputs=take)
    shift = 0.1 * found[0].norm(dim=-1, keepdim=True).mean() / found[0].shape[-1] ** 0.5
    with parts.hooked({view.hf.get_submodule(module): lambda _, out: out + shift}):
        parts.read(view, batch, outputs=take)
    if not torch.allclose(found[1] - found[0], shift.expand_as(found[0]), rtol=0.02):
        raise NotOurs(f"what {module} puts out is not simply added to the layer's output")


def _mean_key(view: EditableModel, plan: Plan, module: str) -> tuple[Tensor, Tensor]:
    """The mean key and output of the projection over the contexts, as the left vector's key is
    made.
    """
    rows = plan.inputs[:-1]
    key, value = states_at(
        view,
        [row.ids for row in rows],
        [[row.subject or 0] for row in rows],
        module,
        inputs=True,
        outputs=True,
    )
    assert key is not None and value is not None
    return key.mean(0), value.mean(0)


def _make_compute_v(original: FunctionType, host: Host) -> Callable[..., Any]:
    def compute_v(
        model: Any,
        tok: Any,
        request: Any,
        hparams: Any,
        layer: int,
        left_vector: Tensor,
        context_templates: list[str],
    ) -> Tensor:
        try:
            view = editable(model, tok)
            check_modules(view, hparams, layer)
            plan = plan_of(original, tok, request, hparams, context_templates)
            module = hparams.mlp_module_tmp.format(layer)
            check_added(view, plan.inputs[0].ids, module, layer)
            kind = type("MLPOutputOf", (MLPOutput,), {"module": module})
            device = view.weight(layer).device
            found = optimise_plans(
                view, [plan], layer, settings_of(hparams), problem=kind, device=device
            )
        except (NotOurs, KnowEditError) as reason:
            own_way(original, reason)
            return original(model, tok, request, hparams, layer, left_vector, context_templates)
        if "rome_key" in host.fixes:
            key, value = (
                handed_on(part, host)
                for part in _mean_key(view, plan, hparams.rewrite_module_tmp.format(layer))
            )
        else:
            key, value = original.__globals__["get_module_input_output_at_word"](
                model,
                tok,
                layer,
                context_template=request["prompt"],
                word=request["subject"],
                module_template=hparams.rewrite_module_tmp,
                fact_token_strategy=hparams.fact_token,
            )
        wanted = (found.value[0] + found.delta[0]).to(value)
        return (wanted - value) / torch.dot(key, left_vector.to(key))

    return compute_v


COMPUTE_V = Replacement(
    "only the tokens and layers that the value can reach",
    Signature(
        "compute_v",
        ("model", "tok", "request", "hparams", "layer", "left_vector", "context_templates"),
    ),
    _make_compute_v,
    another_vector,
)
