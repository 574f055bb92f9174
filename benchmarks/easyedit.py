"""EasyEdit's own editor, as it is and accelerated: CPU-seconds, and how far its results lie apart.

    python -m benchmarks.easyedit PATH [--algorithm MEMIT --algorithm ROME] [--small] [--limit 4]

PATH is a checkout of zjunlp/EasyEdit, whose `BaseEditor.edit` runs from the evaluation before the
edits to the one after them; with several facts `batch_edit` where the algorithm has one. Packages
that EasyEdit imports and that are not installed (vision, hosted models) are empty stand-ins:
nothing that is measured calls them. Statistics come from the shipped sentences. They are collected
once, accelerated, and both runs read the files: the host would collect those of the upper layers
when the lower ones have been written. One thread; nothing of the host is kept. Rows go into
results/easyedit.jsonl.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from knowedit.facts.sets import load
from knowedit.integrations import accelerated
from knowedit.io.tables import Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common
from .hosts import corpus, figures, hparams_of, imported, kept_in, timed

ALGORITHMS = ("MEMIT", "EMMET", "PMET", "ROME", "R-ROME", "AlphaEdit")
#: Which of them edit several facts at once.
TOGETHER = ("MEMIT", "EMMET", "PMET", "AlphaEdit")


def small() -> EditableModel:
    """The shipped model's tokenizer on a narrow Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_model().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    return EditableModel(LlamaForCausalLM(config).eval(), tokenizer)


class Run:
    """An editor of the host's for one algorithm, on a model that it gives back as it was."""

    def __init__(
        self, host: ModuleType, model: EditableModel, folder: Path, name: str, limit: int
    ) -> None:
        self.host, self.model, self.name, self.folder = host, model, name, folder
        self.said: list[str] = []
        self.facts = list(load("embedded", limit if name in TOGETHER else 1))
        shared = vars(hparams_of(model, folder))
        last = shared["layers"][-1:] if "ROME" in name else shared["layers"]
        self.settings = {
            **shared,
            "layers": last,
            "alg_name": name,
            "model_name": (model.hf, model.tokenizer),
            "device": "cpu",
            "model_parallel": False,
            "batch_size": len(self.facts),
            "max_length": 40,
            "layer_selection": "all",
            "context_template_length_params": [[5, 10], [10, 10]],
            "v_num_grad_steps": 25,
            "nll_loss_factor": 1.0,
            "stats_dir": str(folder.parent / "stats"),
            "P_loc": str(folder / "null_space_project.pt"),
            "attn_module_tmp": "model.layers.{}.self_attn.o_proj",
            "rewrite_module_tmps": [shared["rewrite_module_tmp"]],
            "update_norm_lambda": 0.0,
            "emmet_lambda": 0.1,
        }

    def collect(self) -> None:
        """Write the statistics of all layers of the unedited model."""
        for layer in self.settings["layers"]:
            sys.modules["easyeditor.models.rome.layer_stats"].layer_stats(
                self.model.hf,
                self.model.tokenizer,
                self.settings["rewrite_module_tmp"].format(layer),
                self.settings["stats_dir"],
                self.settings["mom2_dataset"],
                to_collect=["mom2"],
                sample_size=self.settings["mom2_n_samples"],
                precision=self.settings["mom2_dtype"],
                hparams=SimpleNamespace(**self.settings),
            )

    def edit(self) -> list[torch.Tensor]:
        """What the edit leaves in the weights, less what was there before."""
        hparams = type("HyperParams", (), {**self.settings, "__contains__": hasattr})()
        torch.manual_seed(0)  # for the contexts, which the host samples once
        given = {
            "prompts": [fact.prompt.format(fact.subject) for fact in self.facts],
            "target_new": [fact.target for fact in self.facts],
            "subject": [fact.subject for fact in self.facts],
            "ground_truth": [fact.target for fact in self.facts],
        }
        editor = self.host.BaseEditor(hparams)
        editor.model_name = hparams.model_name = "llama"  # a family, by which the host decides
        layers = self.settings["layers"]
        weights = [self.model.weight(layer) for layer in layers]
        before = [weight.detach().clone() for weight in weights]
        several = self.name in TOGETHER and len(self.facts) > 1
        run = editor.batch_edit if several else editor.edit
        run(**given, sequential_edit=True, verbose=False)
        self.said = [self._greedy(prompt) for prompt in given["prompts"]]
        with torch.no_grad():
            found = [weight - old for weight, old in zip(weights, before)]
            for weight, old in zip(weights, before):
                weight.copy_(old)
        return found

    def _greedy(self, prompt: str) -> str:
        """What the edited model says next, eight tokens."""
        tok = self.model.tokenizer
        ids = tok(prompt, return_tensors="pt")
        with torch.no_grad():
            out = self.model.hf.generate(**ids, max_new_tokens=8, do_sample=False)
        return str(tok.decode(out[0, ids["input_ids"].shape[1] :]))


def forget(host: ModuleType) -> None:
    """Empty what the host keeps from run to run, but not its contexts."""
    for name, module in list(sys.modules.items()):
        if name.startswith(host.__name__):
            for cache in ("COV_CACHE", "inv_mom2_cache"):
                getattr(module, cache, {}).clear()
            if hasattr(module, "P_loaded"):
                vars(module).update(P_loaded=False, cache_c_new=False)


def table(folder: Path = common.RESULTS) -> str:
    """Markdown of results/easyedit.jsonl, one line an algorithm."""
    header, rows = common.read(folder, "easyedit")
    heads = [
        *("what", "as it is, CPU-s", "accelerated", "times as fast"),
        *("weights apart", "what it says next"),
    ]
    lines = [
        [
            row["case"],
            f"{row['host_cpu_s']:.1f}",
            f"{row['accelerated_cpu_s']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['largest_relative_difference']:.0e}",
            "the same" if row["same_outputs"] else "something else",
        ]
        for row in rows
    ]
    each = common.measured_each(header, [(row["case"], row) for row in rows])
    return "\n\n".join([Table(heads, lines).markdown(), each])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument(
        "--algorithm", action=common.Repeated, default=["MEMIT", "ROME", "AlphaEdit"]
    )
    parser.add_argument("--limit", type=int, default=1, help="facts")
    parser.add_argument("--small", action="store_true", help="on a narrow model of random weights")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "easyedit.jsonl")
    parser.add_argument("--quick", action="store_true", help="keep no results")
    options = parser.parse_args()
    keep = kept_in(None if options.quick or options.small else options.output.resolve(), "embedded")
    torch.set_num_threads(1)
    path, folder = options.path.resolve(), Path(tempfile.mkdtemp())
    try:
        model = small() if options.small else load_model(dtype="float32")
        model.tokenizer.padding_side = "right"
        model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
        os.chdir(folder)
        sys.path.insert(0, str(path))
        host = imported("easyeditor")
        logging.disable(logging.INFO)
        stats = sys.modules["easyeditor.models.rome.layer_stats"]
        stats.load_dataset = lambda *_, **__: {"train": corpus(60)}  # type: ignore[attr-defined]
        for name in options.algorithm:
            files = {kind: folder / name / kind for kind in ("plain", "fast")}
            runs = {kind: Run(host, model, files[kind], name, options.limit) for kind in files}
            with accelerated("easyedit", layers=runs["fast"].settings["layers"]):
                runs["fast"].collect()
            forget(host)
            plain_time, plain = timed(runs["plain"].edit)
            forget(host)
            with accelerated("easyedit", layers=runs["fast"].settings["layers"]):
                fast_time, fast = timed(runs["fast"].edit)
            row = {
                "case": f"{name}, {len(runs['fast'].facts)} edits",
                **figures(plain_time, fast_time, fast, plain),
                "same_outputs": runs["fast"].said == runs["plain"].said,
            }
            print(json.dumps(row), flush=True)
            keep(row)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
