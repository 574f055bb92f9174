"""EasyEdit's own editor, as it is and accelerated: CPU-seconds, and how far its results lie apart.

    python -m benchmarks.easyedit PATH [--algorithm MEMIT --algorithm ROME] [--small] [--limit 4]

PATH is a checkout of zjunlp/EasyEdit. What runs is what a user of it writes: a YAML file of
hyper-parameters (examples/easyedit, as they are), `from_hparams`, `BaseEditor.from_hparams`, which
loads the model from the folder that the file names, and `edit`; with several facts `batch_edit`
where the algorithm has one. Timed is the editing, from the evaluation before it to the one after.

Packages that EasyEdit imports and that are not installed (vision, hosted models) are empty
stand-ins: nothing that is measured calls them. Statistics come from the shipped sentences. They are
collected once, accelerated, and both runs read the files: the host would collect those of the upper
layers when the lower ones have been written. One thread; nothing of the host is kept. Rows go into
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
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml

from knowedit.facts.sets import load
from knowedit.integrations import accelerated
from knowedit.io.tables import Table
from knowedit.models.editable import EditableModel
from knowedit.models.load import load_model

from . import common
from .hosts import corpus, figures, imported, kept_in, timed

#: The hyper-parameters' file of each algorithm, `ALGORITHM.yaml`.
SETTINGS = Path(__file__).resolve().parents[1] / "examples" / "easyedit"
#: Which of them edit several facts at once.
TOGETHER = ("MEMIT", "EMMET", "PMET", "AlphaEdit")


def small() -> EditableModel:
    """The shipped model's tokenizer and depth on a narrow Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = load_model().tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return EditableModel(LlamaForCausalLM(config).eval(), tokenizer)


class Run:
    """An editor of the host's for one algorithm, made from its file in the folder that is worked
    in.
    """

    def __init__(self, host: ModuleType, name: str, limit: int, changes: dict[str, Any]) -> None:
        self.facts = list(load("embedded", limit if name in TOGETHER else 1))
        self.several = len(self.facts) > 1
        kind = getattr(host, f"{name.replace('-', '_')}HyperParams")
        self.hparams = kind.from_hparams(str(SETTINGS / f"{name}.yaml"))
        if self.several:
            self.hparams.batch_size = len(self.facts)
        for key, value in changes.items():
            setattr(self.hparams, key, value)
        self.editor = host.BaseEditor.from_hparams(self.hparams)
        self.said: list[str] = []

    def collect(self) -> None:
        """Write the statistics of all layers of the unedited model."""
        for layer in self.hparams.layers:
            sys.modules["easyeditor.models.rome.layer_stats"].layer_stats(
                self.editor.model,
                self.editor.tok,
                self.hparams.rewrite_module_tmp.format(layer),
                self.hparams.stats_dir,
                self.hparams.mom2_dataset,
                to_collect=["mom2"],
                sample_size=self.hparams.mom2_n_samples,
                precision=self.hparams.mom2_dtype,
                hparams=self.hparams,
            )

    def edit(self) -> list[torch.Tensor]:
        """What the edit leaves in the weights, less what was there before."""
        torch.manual_seed(0)  # for the contexts, which the host samples once
        names = [self.hparams.rewrite_module_tmp.format(layer) for layer in self.hparams.layers]
        weights = [self.editor.model.get_parameter(f"{name}.weight") for name in names]
        before = [weight.detach().clone() for weight in weights]
        prompts = [fact.prompt.format(fact.subject) for fact in self.facts]
        edit = self.editor.batch_edit if self.several else self.editor.edit
        _, model, _ = edit(
            prompts=prompts,
            target_new=[fact.target for fact in self.facts],
            subject=[fact.subject for fact in self.facts],
            ground_truth=[fact.target for fact in self.facts],
            sequential_edit=True,
            verbose=False,
        )
        self.said = [self._greedy(model, prompt) for prompt in prompts]
        return [weight.detach() - old for weight, old in zip(weights, before)]

    def _greedy(self, model: Any, prompt: str) -> str:
        """What the edited model says next, eight tokens."""
        ids = self.editor.tok(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        return str(self.editor.tok.decode(out[0, ids["input_ids"].shape[1] :]))


def forget(host: ModuleType) -> None:
    """Empty what the host keeps from run to run, but not its contexts."""
    for name, module in list(sys.modules.items()):
        if name.startswith(host.__name__):
            for cache in ("COV_CACHE", "inv_mom2_cache"):
                getattr(module, cache, {}).clear()
            if hasattr(module, "P_loaded"):
                vars(module).update(P_loaded=False, cache_c_new=False)


def prepare(folder: Path, model: EditableModel) -> None:
    """Put the model where the files of hyper-parameters name it, as seen from `folder`."""
    named = yaml.safe_load((SETTINGS / "ROME.yaml").read_text("utf-8"))["model_name"]
    model.hf.save_pretrained(folder / named)
    model.tokenizer.save_pretrained(folder / named)


def compared(host: ModuleType, name: str, limit: int, changes: dict[str, Any]) -> dict[str, Any]:
    """A row of the results: one algorithm as it is, then accelerated, each on a model that the host
    loads.
    """

    def run(fast: bool) -> tuple[float, list[torch.Tensor], Run]:
        forget(host)
        one = Run(host, name, limit, changes)
        with accelerated("easyedit") if fast else nullcontext():
            seconds, found = timed(one.edit)
        Path("null_space_project.pt").unlink(missing_ok=True)  # AlphaEdit's, for the next run
        return seconds, found, one

    with accelerated("easyedit"):
        Run(host, name, limit, changes).collect()
    plain_time, plain, as_it_is = run(fast=False)
    fast_time, fast, ours = run(fast=True)
    return {
        "case": f"{name}, {len(ours.facts)} edits",
        **figures(plain_time, fast_time, fast, plain),
        "same_outputs": ours.said == as_it_is.said,
    }


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
    parser.add_argument(
        "--set", action="append", default=[], help="key: value, in place of the file's; in YAML"
    )
    parser.add_argument("--small", action="store_true", help="on a narrow model of random weights")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "easyedit.jsonl")
    parser.add_argument("--quick", action="store_true", help="keep no results")
    options = parser.parse_args()
    keep = kept_in(None if options.quick or options.small else options.output.resolve(), "embedded")
    torch.set_num_threads(1)
    path, folder = options.path.resolve(), Path(tempfile.mkdtemp())
    changes = dict(yaml.safe_load(f"{{{', '.join(options.set)}}}"))
    try:
        prepare(folder, small() if options.small else load_model(dtype="float32"))
        os.chdir(folder)
        sys.path.insert(0, str(path))
        host = imported("easyeditor")
        logging.disable(logging.INFO)
        stats = sys.modules["easyeditor.models.rome.layer_stats"]
        stats.load_dataset = lambda *_, **__: {"train": corpus(60)}  # type: ignore[attr-defined]
        for name in options.algorithm:
            row = compared(host, name, options.limit, changes)
            print(json.dumps(row), flush=True)
            keep(row)
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
