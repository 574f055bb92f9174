"""Mixtures of experts that know things, made from a dense Llama: none comes from a package index.

`copies` and `in_gpt_oss` say what the dense model says, whatever their routers choose: each MLP is
copied into several experts, and their gates add up to 1. In `slices` each expert has neurons of its
own, beside a shared expert that every token passes, as in DeepSeek's and Qwen2's; its routers are
fitted on text, and what is left out costs perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from knowedit.models.editable import EditableModel
from knowedit.models.partial import hooked
from knowedit.models.tokens import batches

#: What a mixture's configuration takes over from the dense model's.
KEPT = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads max_position_embeddings rms_norm_eps rope_parameters hidden_act "
    "tie_word_embeddings pad_token_id bos_token_id eos_token_id"
).split()

#: Standard deviation of a random router's weights.
SPREAD = 0.3

#: An attention sink's logit that no token notices.
NO_SINK = -1e4

#: Makes a parameter's values from its name: of the tensors that the dense model has not.
Rule = Callable[[str], Tensor]


def copies(dense: EditableModel, experts: int, active: int, seed: int = 0) -> EditableModel:
    """Mixtral's layers: each MLP copied into `experts` experts, of which a random router picks
    `active` for a token.
    """
    config = MixtralConfig(
        **_kept(dense),
        num_local_experts=experts,
        num_experts_per_tok=active,
        sliding_window=None,
    )
    given, router = dense.hf.state_dict(), _random_router(dense, experts, seed)

    def rule(name: str) -> Tensor:
        mlp, _, part = name.partition(".mlp.")
        if part == "gate.weight":
            return router()
        gate, up, down = (given[f"{mlp}.mlp.{which}_proj.weight"] for which in _PARTS)
        whole = down if part == "experts.down_proj" else torch.cat([gate, up])
        return whole.expand(experts, *whole.shape)

    return _filled(MixtralForCausalLM(config), dense, rule, f"{experts} experts of {dense.name}")


def in_gpt_oss(dense: EditableModel, experts: int, active: int, seed: int = 0) -> EditableModel:
    """The same copies in gpt-oss's layout: matrices `[E, in, out]`, gate and up interleaved, every
    expert with biases, a softmax over the chosen logits, and attention sinks.

    Its activation is `(up + 1) * gate * sigmoid(alpha gate)`: SiLU with alpha 1 and a bias of -1.
    """
    config = GptOssConfig(
        **_kept(dense),
        head_dim=dense.hidden // dense.hf.config.num_attention_heads,
        num_local_experts=experts,
        num_experts_per_tok=active,
        attention_bias=False,
        sliding_window=dense.max_length,  # of no layer, and yet it must be a number
        layer_types=["full_attention"] * len(dense.layers),
        swiglu_alpha=1.0,
        swiglu_limit=1e4,
    )
    given, router = dense.hf.state_dict(), _random_router(dense, experts, seed)
    heads = dense.hf.config.num_attention_heads

    def rule(name: str) -> Tensor:
        mlp, _, part = name.partition(".mlp.")
        if name.endswith(".sinks"):
            return torch.full((heads,), NO_SINK)
        if part == "router.weight":
            return router()
        if part == "router.bias":
            return torch.zeros(experts)
        gate, up, down = (given[f"{mlp}.mlp.{which}_proj.weight"] for which in _PARTS)
        whole = {
            "experts.gate_up_proj": torch.stack([gate.T, up.T], -1).flatten(-2),
            "experts.gate_up_proj_bias": torch.tensor([0.0, -1.0]).repeat(len(up)),
            "experts.down_proj": down.T,
            "experts.down_proj_bias": torch.zeros(len(down)),
        }[part]
        return whole.expand(experts, *whole.shape)

    name = f"{experts} experts of {dense.name} in gpt-oss's layout"
    return _filled(GptOssForCausalLM(config), dense, rule, name)


def slices(
    dense: EditableModel,
    texts: Sequence[str],
    experts: int,
    active: int,
    shared: float = 0.5,
    seed: int = 0,
) -> EditableModel:
    """Qwen2-MoE's layers: the neurons that write most in a shared expert behind a gate of its own,
    the others in slices, one an expert, of which a fitted router picks `active` for a token.

    Args:
        texts: what neurons are judged and routers are fitted on.
        shared: share of the neurons in the shared expert.
    """
    width = dense.hf.config.intermediate_size
    each = int(width * (1 - shared)) // experts
    config = Qwen2MoeConfig(
        **_kept(dense),
        num_experts=experts,
        num_experts_per_tok=active,
        norm_topk_prob=True,
        moe_intermediate_size=each,
        shared_expert_intermediate_size=width - each * experts,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        qkv_bias=False,
    )
    hf = Qwen2MoeForCausalLM(config)
    inputs = _inputs(dense, texts)
    for layer, of_dense in zip(hf.model.layers, dense.layers, strict=True):
        _slice(layer.mlp, of_dense.mlp, inputs.pop(0), seed)
    done = {name for name, _ in hf.named_parameters() if ".mlp." in name}
    made = hf.state_dict()
    return _filled(
        hf,
        dense,
        lambda name: made[name].clone(),
        f"{experts} slices and a shared expert of {dense.name}",
        done,
    )


# -- parts
# -------------------------------------------------------------------------------------------------

_PARTS = ("gate", "up", "down")


def _kept(dense: EditableModel) -> dict[str, Any]:
    """What the dense model's configuration says of what a mixture shares with it."""
    old = dense.hf.config.to_dict()
    return {name: old[name] for name in KEPT if name in old}


def _random_router(dense: EditableModel, experts: int, seed: int) -> Callable[[], Tensor]:
    """Makes one router's weights `[E, hidden]` after another."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: SPREAD * torch.randn(experts, dense.hidden, generator=generator)


@torch.no_grad()
def _filled(
    hf: Any, dense: EditableModel, rule: Rule, name: str, own: set[str] | None = None
) -> EditableModel:
    """The mixture with the dense model's tensors where it has such of the same name and shape, and
    what the rule makes elsewhere.

    Args:
        own: names that are the rule's although the dense model may have such.
    """
    given = dense.hf.state_dict()
    for key, tensor in hf.state_dict().items():
        same = key in given and given[key].shape == tensor.shape and key not in (own or set())
        tensor.copy_(given[key] if same else rule(key))
    return EditableModel(hf.eval().requires_grad_(False), dense.tokenizer, name=name)


def _inputs(dense: EditableModel, texts: Sequence[str], length: int = 256) -> list[Tensor]:
    """By layer, what its MLP is given at every token of the texts but the first, `[n, hidden]`."""
    found: list[list[Tensor]] = [[] for _ in dense.layers]
    rows = [dense.row(text).ids[:length] for text in texts]
    for batch in batches([len(row) for row in rows], 2048):
        ids, mask = dense.pad([rows[i] for i in batch])
        mask = mask.clone()
        mask[:, 0] = False  # an attention sink's outliers would outweigh every other token

        def keep(into: list[Tensor], mask: Tensor = mask) -> Any:
            return lambda given, _: into.append(given[mask].clone())

        hooks = {layer.mlp: keep(into) for layer, into in zip(dense.layers, found, strict=True)}
        with torch.no_grad(), hooked(hooks):
            dense.final_states(ids)
    return [torch.cat(parts) for parts in found]


@torch.no_grad()
def _slice(block: Any, mlp: Any, x: Tensor, seed: int) -> None:
    """Fill a Qwen2-MoE block with the neurons of a dense MLP, and fit its router and the shared
    expert's gate at inputs `[n, hidden]`.
    """
    gate, up, down = (getattr(mlp, f"{part}_proj").weight for part in _PARTS)
    keys = F.silu(x @ gate.T) * (x @ up.T)
    lengths = down.norm(dim=0)
    order = (keys.square().mean(0).sqrt() * lengths).argsort(descending=True)
    shared = block.shared_expert
    count, each = len(shared.gate_proj.weight), block.experts.down_proj.shape[-1]
    common, rest = order[:count], order[count:]
    rest = rest[_along_first_axis(keys[:, rest] * lengths[rest])].reshape(-1, each)
    shared.gate_proj.weight.copy_(gate[common])
    shared.up_proj.weight.copy_(up[common])
    shared.down_proj.weight.copy_(2 * down[:, common])  # its gate begins at sigmoid(0) = 1/2
    top_k = block.gate.top_k
    block.experts.gate_up_proj.copy_(torch.cat([gate[rest], up[rest]], 1))
    # gates add up to 1: with equal ones each chosen slice writes what it wrote before
    block.experts.down_proj.copy_(top_k * down.T[rest].transpose(1, 2))
    outputs = torch.stack([keys[:, one] @ down[:, one].T for one in rest], 1)  # [n, E, hidden]
    wanted = outputs.sum(1) + keys[:, common] @ down[:, common].T
    with torch.enable_grad():
        router, own = fitted_router(
            x, top_k * outputs, 2 * keys[:, common] @ down[:, common].T, wanted, top_k, seed
        )
    block.gate.weight.copy_(router)
    block.shared_expert_gate.weight.copy_(own)


def _along_first_axis(writes: Tensor) -> Tensor:
    """An order of neurons, by their loading on the first principal axis of what they write
    `[n, neurons]`: neurons that fire together come to stand together.
    """
    centred = (writes - writes.mean(0)) / writes.std(0).clamp(min=1e-12)
    axis = torch.linalg.eigh((centred.T @ centred).double())[1][:, -1]
    return axis.argsort()


def fitted_router(
    x: Tensor,
    outputs: Tensor,
    shared: Tensor,
    wanted: Tensor,
    top_k: int,
    seed: int = 0,
    steps: int = 150,
    batch: int = 512,
) -> tuple[Tensor, Tensor]:
    """A router `[E, hidden]` and a shared expert's gate `[1, hidden]`, by least squares on what the
    layer writes.

    Args:
        x: `[n, hidden]` inputs; outputs: `[n, E, hidden]` what each expert writes with gate 1;
            shared: `[n, hidden]` the shared expert's, likewise; wanted: `[n, hidden]`.
    """
    generator = torch.Generator().manual_seed(seed)
    # experts that write much are to be chosen: the first guess is linear in the logarithm
    sizes = outputs.norm(dim=-1).clamp(min=1e-6).log()
    ridge = 1e-2 * x.square().mean() * len(x) * torch.eye(x.shape[1])
    router = torch.linalg.solve(x.T @ x + ridge, x.T @ (sizes - sizes.mean())).T.contiguous()
    own = torch.zeros(1, x.shape[1])
    weights = [nn.Parameter(router), nn.Parameter(own)]
    adam = torch.optim.Adam(weights, lr=3e-3)
    for _ in range(steps):
        at = torch.randint(len(x), (batch,), generator=generator)
        probabilities = (x[at] @ weights[0].T).softmax(-1)
        chosen, index = probabilities.topk(top_k, dim=-1)
        gates = torch.zeros_like(probabilities).scatter(
            1, index, chosen / chosen.sum(-1, keepdim=True)
        )
        made = torch.einsum("ne,neh->nh", gates, outputs[at])
        made = made + torch.sigmoid(x[at] @ weights[1].T) * shared[at]
        loss = (made - wanted[at]).square().sum() / wanted[at].square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return weights[0].detach(), weights[1].detach()
