"""Real hosts, as they are and accelerated: CPU-seconds, and how far the results lie apart.

    python -m benchmarks.hosts memit PATH [--edits 8] [--what edit statistics evaluation]

PATH is a checkout of kmeng01/memit. A copy of its Python files is made in a temporary folder, with
what keeps it from a CPU and from a model of today changed in it (`CHANGES`); nothing of it is kept.
One thread. Texts and facts are the shipped ones, so figures of quality mean nothing here.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from knowedit.facts.sets import load
from knowedit.integrations import accelerated
from knowedit.models.load import load_model

#: In the copy: no GPU; layers of transformers 5 give a tensor where they gave a tuple.
CHANGES = {
    '"cuda"': '"cpu"',
    ".cuda()": "",
    "cur_out[0][0, lookup": "cur_out[0, lookup",
    "cur_out[0][i, idx": "cur_out[i, idx",
    ".output[0][\n": ".output[\n",
    "from matplotlib.style import context\n": "",
}
CONTEXTS = [
    ["{}"],
    [
        "The first thing that was seen. {}",
        "Therefore it has to be said. {}",
        "Because of what came before. {}",
        "I have been told this. {}",
        "You will find it there. {}",
    ],
]


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
        mom2_dtype="float32",
        rewrite_module_tmp="model.layers.{}.mlp.down_proj",
        layer_module_tmp="model.layers.{}",
        mlp_module_tmp="model.layers.{}.mlp",
        attn_module_tmp="model.layers.{}.self_attn",
        ln_f_module="model.norm",
        lm_head_module="lm_head",
        stats_dir=str(folder),
    )


def timed(task: Callable[[], Any]) -> tuple[float, Any]:
    """CPU-seconds of this process, and what the task returns."""
    start = time.process_time()
    found = task()
    return time.process_time() - start, found


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def corpus(count: int) -> list[dict[str, str]]:
    """Texts of different lengths made of the shipped facts' sentences."""
    sentences = [f"{fact.text} {fact.target}." for fact in load("embedded")]
    return [
        {"text": " ".join(sentences[(i * 7 + j) % len(sentences)] for j in range(2 + i % 23))}
        for i in range(count)
    ]


def memit(path: Path, edits: int, what: list[str]) -> dict[str, dict[str, float]]:
    """Figures of one run each."""
    folder = Path(tempfile.mkdtemp())
    try:
        copied(path, folder)
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        return _memit(folder, edits, what)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


def _memit(folder: Path, edits: int, what: list[str]) -> dict[str, dict[str, float]]:
    import rome.layer_stats as stats_module  # of the host
    from memit import memit_main as main

    model = load_model(dtype="float32")
    hf, tok = model.hf, model.tokenizer
    hf.config.n_embd, hf.config.n_positions = model.hidden, 2048
    tok.padding_side = "right"
    tok.pad_token = tok.pad_token or tok.eos_token
    hparams = hparams_of(model, folder)
    stats_module.load_dataset = lambda *_, **__: {"train": corpus(hparams.mom2_n_samples)}
    main.CONTEXT_TEMPLATES_CACHE = CONTEXTS
    requests = [
        {
            "case_id": i,
            "prompt": fact.prompt,
            "subject": fact.subject,
            "target_new": {"str": fact.target},
        }
        for i, fact in enumerate(load("embedded")[:edits])
    ]
    weights = {name: p.detach().clone() for name, p in hf.named_parameters() if "down_proj" in name}

    def statistics(where: str) -> list[torch.Tensor]:
        return [
            main.layer_stats(
                *(hf, tok, hparams.rewrite_module_tmp.format(layer), folder / where),
                "wikipedia",
                ["mom2"],
                sample_size=hparams.mom2_n_samples,
                precision="float32",
                batch_tokens=1024,
                download=False,
            ).mom2.moment()
            for layer in hparams.layers
        ]

    def edit() -> list[torch.Tensor]:
        main.apply_memit_to_model(hf, tok, copy.deepcopy(requests), hparams)
        found = []
        with torch.no_grad():
            for name, old in weights.items():
                parameter = hf.get_parameter(name)
                if not torch.equal(parameter, old):
                    found.append(parameter - old)
                    parameter.copy_(old)
        return found

    results = {}
    tasks = {
        "statistics": lambda way: statistics(way),
        "edit": lambda way: edit(),
    }
    for layer in hparams.layers:  # covariances ready: an edit's time is without them
        name = hparams.rewrite_module_tmp.format(layer)
        rows = torch.randn(4096, model.d_ff) * torch.logspace(-1, 0.5, model.d_ff)
        main.COV_CACHE[hf.config._name_or_path.replace("/", "_"), name] = rows.T @ rows / len(rows)
    for task in what:
        plain_time, plain = timed(lambda task=task: tasks[task]("plain"))
        with accelerated("memit", layers=hparams.layers):
            fast_time, fast = timed(lambda task=task: tasks[task]("fast"))
        results[task] = {
            "host_cpu_s": plain_time,
            "accelerated_cpu_s": fast_time,
            "ratio": plain_time / fast_time,
            "largest_relative_difference": max(map(relative, fast, plain)),
        }
    return results


HOSTS = {"memit": memit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--what", nargs="+", default=["statistics", "edit"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = HOSTS[options.host](options.path.resolve(), options.edits, options.what)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
