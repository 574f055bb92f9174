"""MoEEdit's own code (Gu et al. 2026) on a mixture of ours: the same layer, facts and targets.

Its code is read from a folder that the user has (`git clone` of Terence-Gu/MoEEdit); none of it is
here. It was written for lists of experts with a `down_proj` each, as transformers 4 had them; so
the layer is shown to it as such a list, whose matrices lie in the model's own parameters. Nothing
else is changed: its key collection, its projections, its block coordinate descent and its way of
applying the result run as published, with the settings of its Qwen3 configuration.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knowedit.edits.changes import Change, Dense
from knowedit.edits.edit import Edit
from knowedit.facts.fact import Fact
from knowedit.models.editable import EditableModel
from knowedit.models.experts import slice_name

#: Of its configuration for Qwen3-30B-A3B.
SETTINGS = {"lambda_reg": 1.0, "nullspace_threshold": 0.02, "num_passes": 4}


@dataclass(frozen=True)
class Made:
    """What came of it.

    Attributes:
        edit: what it added, each touched expert's matrix.
        projections: CPU seconds for its statistics and null spaces; write: for keys, descent and
            weights.
        kept: share of the key dimensions that its null spaces keep, mean over experts.
    """

    edit: Edit
    projections: float
    write: float
    kept: float


class Listed(nn.Module):
    """A Mixtral block as a list of experts, as transformers 4 held them; its matrices are the
    packed parameters' own.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.top_k = block.gate.top_k
        self.gate = nn.Linear(*block.gate.weight.shape[::-1], bias=False)
        self.gate.weight = block.gate.weight
        packed = block.experts
        self.experts = nn.ModuleList(
            _Expert(gate_up, down)
            for gate_up, down in zip(packed.gate_up_proj, packed.down_proj, strict=True)
        )

    def forward(self, states: Tensor) -> Tensor:
        rows = states.reshape(-1, states.shape[-1])
        chosen, index = self.gate(rows).softmax(-1).topk(self.top_k, dim=-1)
        gates = torch.zeros(len(rows), len(self.experts)).scatter(
            1, index, chosen / chosen.sum(-1, keepdim=True)
        )
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            here = gates[:, number].nonzero()[:, 0]
            if len(here):
                out.index_add_(0, here, expert(rows[here]) * gates[here, number, None])
        return out.view_as(states)


class _Expert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(_linear, (gate, up, down))

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


def _linear(matrix: Tensor) -> nn.Linear:
    """A module of a matrix, which stays where it is in memory."""
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(matrix.data, requires_grad=False)
    return made


def edited(
    folder: Path,
    model: EditableModel,
    layer: int,
    facts: Sequence[Fact],
    targets: Tensor,
    texts: Sequence[str],
) -> Made:
    """The edit that its code makes of a mixture of `mixtures.copies`, which is left as it was.

    Args:
        folder: a clone of its repository.
        targets: `[facts, hidden]` the layer's wanted output at the subjects' last tokens.
        texts: what its covariances are taken from.
    """
    experts, weight = model.layout.experts(layer), model.weight(layer)
    assert experts is not None
    folder, before, home = folder.resolve(), weight.detach().clone(), model.layers[layer]
    block, fingerprint = home.mlp, model.fingerprint
    with contextlib.ExitStack() as held:
        work = held.enter_context(tempfile.TemporaryDirectory())
        held.enter_context(_working_in(work))
        _corpus(Path(work), texts)
        theirs = held.enter_context(_imported(folder))
        config = theirs.config.MoEEditConfig(
            device="cpu",
            layers=[layer],
            num_layers=len(model.layers),
            num_experts=experts.count,
            num_experts_per_tok=experts.top_k,
            d_model=model.hidden,
            d_hidden=experts.width,
            num_samples=len(texts),
            **SETTINGS,
        )
        home.mlp = Listed(block)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                editor = theirs.editor.MoEKnowledgeEditor.from_config(
                    model.hf, model.tokenizer, config
                )
                start = time.process_time()
                editor.compute_projection_matrices(len(texts), use_identity=False)
                projections = time.process_time() - start
                result = theirs.compute_target.TargetVectorResult
                editor.target_results = {
                    number: result(target, 0.0, 1.0, 0, True, [])
                    for number, target in enumerate(targets)
                }
                requests = [
                    theirs.utils.EditRequest(fact.prompt, fact.subject, fact.new_answer, number)
                    for number, fact in enumerate(facts)
                ]
                start = time.process_time()
                editor._edit_single_layer(
                    layer, requests, editor.target_results, 1.0, "bcd", config.num_passes, False
                )
                write = time.process_time() - start
            spaces = editor.layer_data[layer]["projection_matrices"].values()
            kept = float(torch.stack([space.trace() for space in spaces]).mean()) / experts.width
            difference = weight.detach() - before
        finally:
            home.mlp = block
            weight.data.copy_(before)
    name = model.layout.weight_name(layer)
    changes: dict[str, Change] = {
        slice_name(name, number): Dense(part)
        for number, part in enumerate(difference)
        if bool(part.any())
    }
    edit = Edit("MoEEdit", changes, list(facts), fingerprint, setup=model.setup)
    return Made(edit, projections, write, kept)


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    """It reads and writes below the folder that it is started in."""
    was = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(was)


@contextlib.contextmanager
def _imported(folder: Path) -> Iterator[types.SimpleNamespace]:
    """Its modules, under a package's name that is forgotten again."""
    package = types.ModuleType("moe_edit")
    package.__path__ = [str(folder)]
    sys.modules["moe_edit"] = package
    names = ("config", "editor", "compute_target", "utils")
    try:
        yield types.SimpleNamespace(
            **{name: importlib.import_module(f"moe_edit.{name}") for name in names}
        )
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "moe_edit"]:
            del sys.modules[name]


def _corpus(work: Path, texts: Sequence[str]) -> None:
    """The texts where its code looks for a copy of Wikipedia."""
    import pyarrow
    from pyarrow import parquet

    os.environ["HF_DATASETS_CACHE"] = str(work / "cache")
    place = work / "path" / "to" / "wiki"
    place.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": list(texts)}), place / "train-0.parquet")
