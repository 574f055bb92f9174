"""Real hosts, as they are and accelerated: CPU-seconds, and how far the results lie apart.

    python -m benchmarks.hosts memit PATH [--limit 8] [--what statistics] [--dataset counterfact]
    python -m benchmarks.hosts alphaedit PATH --limit 32 --host-edits 4

PATH is a checkout of kmeng01/memit or jianghoucheng/AlphaEdit. A copy of its Python files is made
in a temporary folder, with what keeps it from a CPU and from a model of today changed in it
(`CHANGES`); nothing of it is kept. One thread. Texts are the shipped ones, and so are the facts if
no others are named, so figures of quality mean nothing here. The contexts are the host's own.

With --host-edits the host as it is makes only that many of the edits, which it goes through one by
one, and its seconds are scaled to all of them; the results of these are compared.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from knowedit.facts.sets import load
from knowedit.integrations import accelerated
from knowedit.models.load import load_model
from knowedit_kernels import NullSpace

from . import common

#: In the copy: no GPU; layers of transformers 5 give a tensor where they gave a tuple.
CHANGES = {
    '"cuda"': '"cpu"',
    ".cuda()": "",
    "cur_out[0]": "cur_out",
    ".output[0][\n": ".output[\n",
    ".output[0]\n": ".output\n",
    "from matplotlib.style import context\n": "",
}


def copied(path: Path, folder: Path) -> None:
    """The host's Python files and settings in `folder`, changed as above."""
    for file in [*path.rglob("*.py"), path / "globals.yml"]:
        into = folder / file.relative_to(path)
        into.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text("utf-8")
        for old, new in CHANGES.items():
            text = text.replace(old, new)
        into.write_text(text, "utf-8")


def hparams_of(model: Any, folder: Path) -> SimpleNamespace:
    """As the host's files have them for Llama's kind of model."""
    # the hosts find no parameter by its second name
    tied = model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    return SimpleNamespace(
        layers=[4, 5, 6, 7, 8],
        fact_token="subject_last",
        v_num_grad_steps=25,
        v_lr=0.5,
        v_loss_layer=len(model.layers) - 1,
        v_weight_decay=0.5,
        clamp_norm_factor=0.75,
        kl_factor=0.0625,
        mom2_adjustment=True,
        mom2_update_weight=15000,
        mom2_dataset="wikipedia",
        mom2_n_samples=60,
        L2=10,
        nullspace_threshold=2e-2,
        mom2_dtype="float32",
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}",
        mlp_module_tmp="model.layers.{}.mlp",
        attn_module_tmp="model.layers.{}.self_attn",
        ln_f_module="model.norm",
        lm_head_module="model.embed_tokens" if tied else "lm_head",
        stats_dir=str(folder),
    )


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of this process, and what the task returns."""
    start = time.process_time()
    found = task()
    return time.process_time() - start, found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def figures(
    host: float, ours: float, fast: list[torch.Tensor], plain: list[torch.Tensor]
) -> dict[str, float]:
    """Seconds of both, their ratio, and how far the results lie apart."""
    return {
        "host_cpu_s": host,
        "accelerated_cpu_s": ours,
        "ratio": host / ours,
        "largest_relative_difference": max(map(relative, fast, plain)),
    }


def corpus(count: int) -> list[dict[str, str]]:
    """Texts of different lengths made of the shipped facts' sentences."""
    sentences = [f"{fact.text} {fact.target}." for fact in load("embedded")]
    return [
        {"text": " ".join(sentences[(i * 7 + j) % len(sentences)] for j in range(2 + i % 23))}
        for i in range(count)
    ]


def measured(
    host: str,
    path: Path,
    edits: int,
    what: list[str],
    facts: str,
    host_edits: int | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of one run each."""
    folder = Path(tempfile.mkdtemp())
    try:
        copied(path, folder)
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        bench = Bench(host, folder, edits, facts, host_edits)
        found = {}
        for task in what:
            found[task] = bench.compare(task)
            print(json.dumps({task: found[task]}), flush=True)
        return found
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


class Bench:
    """A host, a model and requests."""

    def __init__(
        self,
        host: str,
        folder: Path,
        edits: int,
        facts: str = "embedded",
        host_edits: int | None = None,
    ) -> None:
        self.host, self.folder = host, folder
        self.host_edits = edits if host_edits is None else min(host_edits, edits)
        module = "memit.memit_main" if host == "memit" else "AlphaEdit.AlphaEdit_main"
        self.main = importlib.import_module(module)
        self.model = load_model(dtype="float32")
        hf, tok = self.model.hf, self.model.tokenizer
        hf.config.n_embd, hf.config.n_positions = self.model.hidden, 2048
        tok.padding_side = "right"
        tok.pad_token = tok.pad_token or tok.eos_token
        self.hparams = hparams_of(self.model, folder)
        count = self.hparams.mom2_n_samples
        stats = importlib.import_module("rome.layer_stats")
        stats.load_dataset = lambda *_, **__: {"train": corpus(count)}  # type: ignore[attr-defined]
        torch.manual_seed(0)  # for the contexts, which the host keeps
        self.main.get_context_templates(hf, tok)
        self.requests = [
            {
                "case_id": i,
                "prompt": fact.prompt,
                "subject": fact.subject,
                "target_new": {"str": fact.target},
            }
            for i, fact in enumerate(load(facts, edits))
        ]
        for layer in self.hparams.layers:  # an edit's time is without its covariances
            name = self.hparams.rewrite_module_tmp.format(layer)
            scale = torch.logspace(-2, 0.5, self.model.d_ff)
            rows = torch.randn(4096, self.model.d_ff) * scale
            key = hf.config._name_or_path.replace("/", "_"), name
            self.main.COV_CACHE[key] = rows.T @ rows / len(rows)

    def compare(self, task: str) -> dict[str, float]:
        """The host as it is, then accelerated."""
        if task == "edit":
            return self._compare_edits()
        plain_time, plain = timed(lambda: self.statistics("plain"))
        with self._accelerated():
            fast_time, fast = timed(lambda: self.statistics("fast"))
        return figures(plain_time, fast_time, fast, plain)

    def _compare_edits(self) -> dict[str, float]:
        """The host's first edits as it makes them; the same and all, accelerated."""
        some, everything = self.requests[: self.host_edits], self.requests
        plain_time, plain = timed(lambda: self.edit(some))
        with self._accelerated():
            fast_time, fast = timed(lambda: self.edit(everything))
            if len(some) < len(everything):
                fast = self.edit(some)
        found = figures(plain_time * len(everything) / len(some), fast_time, fast, plain)
        return {**found, "edits": len(everything), "made_by_the_host": len(some)}

    def _accelerated(self) -> AbstractContextManager[Any]:
        return accelerated(self.host, layers=self.hparams.layers)

    def statistics(self, where: str) -> list[torch.Tensor]:
        """Second moments of all layers, in files of their own."""
        return [
            self.main.layer_stats(
                self.model.hf,
                self.model.tokenizer,
                self.hparams.rewrite_module_tmp.format(layer),
                self.folder / where,
                "wikipedia",
                ["mom2"],
                sample_size=self.hparams.mom2_n_samples,
                precision="float32",
                batch_tokens=1024,
                download=False,
            ).mom2.moment()
            for layer in self.hparams.layers
        ]

    def edit(self, requests: list[dict[str, Any]]) -> list[torch.Tensor]:
        """What is added to the weights, which are given back."""
        hf = self.model.hf
        weights = [self.model.weight(layer) for layer in self.hparams.layers]
        before = [weight.detach().clone() for weight in weights]
        given = hf, self.model.tokenizer, copy.deepcopy(requests), self.hparams
        if self.host == "memit":
            self.main.apply_memit_to_model(*given)
        else:
            covs = [cov.double() for cov in self.main.COV_CACHE.values()]
            bases = [NullSpace(cov, threshold=2e-2) for cov in covs]
            eye = torch.eye(self.model.d_ff)
            stack = torch.stack([base.inverse(eye).float() for base in bases])
            self.main.apply_AlphaEdit_to_model(*given, cache_c=torch.zeros_like(stack), P=stack)
        with torch.no_grad():
            found = [weight - old for weight, old in zip(weights, before)]
            for weight, old in zip(weights, before):
                weight.copy_(old)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("host", choices=("memit", "alphaedit"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--limit", type=int, default=8, help="facts")
    parser.add_argument("--dataset", default="embedded", help="a fact set that knowedit loads")
    parser.add_argument("--what", action=common.Repeated, default=["statistics", "edit"])
    parser.add_argument("--host-edits", type=int, help="edits that the host makes as it is: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, host_edits = options.path.resolve(), options.host_edits
    measured(options.host, path, options.limit, options.what, options.dataset, host_edits)


if __name__ == "__main__":
    main()
