"""Real hosts, as they are and accelerated: CPU-seconds, and how far the results lie apart.

    python -m benchmarks.hosts memit PATH --limit 32 --host-edits 4 [--dataset counterfact]
    python -m benchmarks.hosts memit PATH --what statistics --what rome --what evaluation
    python -m benchmarks.hosts alphaedit PATH --limit 80 --batch 8 --host-edits 8

PATH is a checkout of kmeng01/memit or jianghoucheng/AlphaEdit. A copy of its Python files is made
in a temporary folder, with what keeps it from a CPU and from a model of today changed in it
(`CHANGES`); nothing of it is kept. One thread. Texts are the shipped ones, and so are the facts if
no others are named, so figures of quality mean nothing here. The contexts are the host's own.

With --count nothing is timed: the multiplications in products of matrices are counted instead, of
the first edit alone, as the host is and accelerated. Their ratio is what can be won on a CPU
by leaving out what need not be computed.

With --host-edits the host as it is makes only that many of the edits, which it goes through one by
one, and its seconds are scaled to all of them; the results of these are compared.

`--what rounding` tells how much of a difference is rounding: of all edits the one whose float32
result is furthest from its float64 result, by the host as it is in float32 and in float64.

Rows are kept in results/hosts.jsonl; a figure of the same case replaces the earlier one.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.abc
import importlib.machinery
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch.utils.flop_counter import FlopCounterMode

from knowedit.facts.sets import load
from knowedit.integrations import accelerated
from knowedit.io.files import atomic_file
from knowedit.io.tables import Table
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


def multiplications(task: Callable[[], Any]) -> float:
    """How many of them a task makes in products of matrices; attention's are not counted, they are
    few for short texts.
    """
    known = {
        torch.ops.knowedit.second_moment_: _of_moments,
        torch.ops.mkldnn._linear_pointwise: _of_a_linear_layer,
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        task()
    return counter.get_total_flops() / 2


def _of_moments(_: Any, keys: Sequence[torch.Size], *rest: Any, **named: Any) -> int:
    """A moment is symmetric: half of it is computed. (The counter's unit is two operations.)"""
    return sum(rows * width * (width + 1) for rows, width in keys)


def _of_a_linear_layer(x: torch.Size, weight: torch.Size, *rest: Any, **named: Any) -> int:
    return 2 * x.numel() * weight[0]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def figures(
    host: float, ours: float, fast: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """Seconds of both, their ratio, and how far the results lie apart."""
    return {
        "host_cpu_s": host,
        "accelerated_cpu_s": ours,
        "ratio": host / ours,
        "largest_relative_difference": max(map(relative, fast, plain)),
    }


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives an empty module in place of one that the host imports, that is not installed and that
    nothing measured calls.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        wanted = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__all__ = [], spec, []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def imported(name: str, tries: int = 60) -> ModuleType:
    """A host's module, with stand-ins for what it imports and is not there."""
    missing: list[str] = []
    finder = Missing(missing)
    sys.meta_path.append(finder)
    own = name.partition(".")[0]
    for _ in range(tries):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == own:
                raise
            missing.append(str(error.name).partition(".")[0])
            for known in [known for known in sys.modules if known.partition(".")[0] == own]:
                del sys.modules[known]
    raise SystemExit(f"{name} cannot be imported; missing: {', '.join(missing)}")


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
    batch: int | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda row: None,
    count: bool = False,
) -> dict[str, dict[str, Any]]:
    """Figures of one run each; `keep` is given each as a row of the results."""
    folder = Path(tempfile.mkdtemp())
    try:
        copied(path, folder)
        sys.path.insert(0, str(folder))
        os.chdir(folder)
        bench = Bench(host, folder, edits, facts, host_edits, batch)
        found = {}
        for task in what:
            found[task] = bench.count(task) if count else bench.compare(task)
            print(json.dumps({task: found[task]}), flush=True)
            keep({"case": bench.title(task), **found[task]})
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
        batch: int | None = None,
    ) -> None:
        self.host, self.folder, self.facts = host, folder, list(load(facts, edits))
        self.batch = batch or edits
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
            for i, fact in enumerate(self.facts)
        ]
        self.rome: Any = None  # its module, once it was asked for
        for layer in self.hparams.layers:  # an edit's time is without its covariances
            name = self.hparams.rewrite_module_tmp.format(layer)
            scale = torch.logspace(-2, 0.5, self.model.d_ff)
            rows = torch.randn(4096, self.model.d_ff) * scale
            key = hf.config._name_or_path.replace("/", "_"), name
            self.main.COV_CACHE[key] = rows.T @ rows / len(rows)

    def title(self, task: str) -> str:
        """What a task measures, for people."""
        host = {"memit": "memit", "alphaedit": "AlphaEdit"}[self.host]
        batches = f"{len(self.facts) // self.batch} x {self.batch}"
        edits = batches if self.batch < len(self.facts) else f"{len(self.facts)}"
        return {
            "statistics": f"{host}: statistics of {len(self.hparams.layers)} layers",
            "edit": f"{host}: {edits} edits",
            "rome": f"{host}: ROME, {len(self.facts)} edits",
            "evaluation": f"{host}: probability tests, {len(self.facts)} records",
            "rounding": f"{host}: rounding of one edit",
        }[task]

    def compare(self, task: str) -> dict[str, Any]:
        """The host as it is, then accelerated."""
        if task == "rounding":
            return self._rounding()
        if task == "statistics":
            plain_time, plain = timed(lambda: self.statistics("plain"))
            with self._accelerated():
                fast_time, fast = timed(lambda: self.statistics("fast"))
            return figures(plain_time, fast_time, fast, plain)
        return self._compare_some(self._work(task))

    def count(self, task: str) -> dict[str, Any]:
        """How many multiplications the host makes for a first edit, and how many accelerated."""
        work = self._work(task)
        work([])  # imports, and what the host keeps from call to call
        host = multiplications(lambda: work([0]))
        with self._accelerated():
            accelerated = multiplications(lambda: work([0]))
        return {"host_multiplications": host, "accelerated_multiplications": accelerated}

    def _work(self, task: str) -> Callable[[list[int]], list[torch.Tensor]]:
        """What is done with the facts of some numbers."""
        if task == "statistics":
            turn = itertools.count()
            return lambda which: self.statistics(f"turn{next(turn)}") if which else []
        work = {"edit": self.edit, "rome": self.edit_by_rome, "evaluation": self.evaluated}
        return work[task]

    def _compare_some(self, work: Callable[[list[int]], list[torch.Tensor]]) -> dict[str, Any]:
        """Work on the host's first facts as it does it; on the same and on all, accelerated."""
        everything = list(range(len(self.facts)))
        some = everything[: self.host_edits]
        work(everything[:0])  # imports, and what the host keeps from call to call
        plain_time, plain = timed(lambda: work(some))
        with self._accelerated():
            fast_time, fast = timed(lambda: work(everything))
            if len(some) < len(everything):
                fast = work(some)
        found = figures(plain_time * len(everything) / len(some), fast_time, fast, plain)
        return {**found, "edits": len(everything), "made_by_the_host": len(some)}

    def _rounding(self) -> dict[str, Any]:
        """How far float32 results lie from float64 ones, both of the host as it is: of the edit
        that is furthest off when accelerated.
        """
        each = [[i] for i in range(len(self.facts))]
        with self._accelerated():
            fast = [self.edit(one) for one in each]
            with self._in_float64():
                exact = [self.edit(one) for one in each]
        apart = [max(map(relative, one, other)) for one, other in zip(fast, exact)]
        worst = max(range(len(apart)), key=apart.__getitem__)
        plain = self.edit(each[worst])
        with self._in_float64():
            truth = self.edit(each[worst])
        return {
            "fact": worst,
            "largest_relative_difference": max(map(relative, fast[worst], plain)),
            "host_in_float32": max(map(relative, plain, truth)),
            "accelerated_in_float32": max(map(relative, fast[worst], truth)),
            "accelerated_in_float64": max(map(relative, exact[worst], truth)),
            "accelerated_of_all": apart,
        }

    @contextmanager
    def _in_float64(self) -> Iterator[None]:
        """The model, and what the host makes anew, in float64."""
        before = torch.get_default_dtype()
        self.model.hf.double()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            self.model.hf.float()  # a float32 number is what it was after the way to float64

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

    def edit(self, which: list[int]) -> list[torch.Tensor]:
        """What editing some of the facts, batch by batch, adds to the weights, which are given
        back.
        """
        hf, tok = self.model.hf, self.model.tokenizer
        memory: dict[str, torch.Tensor] = {}
        if self.host == "alphaedit":
            covs = [cov.double() for cov in self.main.COV_CACHE.values()]
            bases = [NullSpace(cov, threshold=2e-2) for cov in covs]
            eye = torch.eye(self.model.d_ff, dtype=torch.float64)
            stack = torch.stack([base.inverse(eye).float() for base in bases])
            memory = {"cache_c": torch.zeros_like(stack), "P": stack}
        with self._given_back(self.hparams.layers) as found:
            for at in range(0, len(which), self.batch):
                requests = [copy.deepcopy(self.requests[i]) for i in which[at : at + self.batch]]
                if self.host == "memit":
                    self.main.apply_memit_to_model(hf, tok, requests, self.hparams)
                else:
                    _, memory["cache_c"] = self.main.apply_AlphaEdit_to_model(
                        hf, tok, requests, self.hparams, **memory
                    )
        return found

    def edit_by_rome(self, which: list[int]) -> list[torch.Tensor]:
        """The same by the host's ROME, one fact after the other, in the middle layer of MEMIT's."""
        hf, tok, layer = self.model.hf, self.model.tokenizer, self.hparams.layers[1]
        hparams = SimpleNamespace(**{**vars(self.hparams), "layers": [layer]})
        hparams.context_template_length_params = [[5, 10], [10, 10]]
        key = hf.config._name_or_path.replace("/", "_"), hparams.rewrite_module_tmp.format(layer)
        moment = SimpleNamespace(mom2=SimpleNamespace(moment=lambda: self.main.COV_CACHE[key]))
        if self.rome is None:
            self.rome = importlib.import_module("rome.rome_main")
            self.rome.get_context_templates(hf, tok, hparams.context_template_length_params)
        inverse = importlib.import_module("rome.compute_u")
        vars(inverse)["layer_stats"] = lambda *_, **__: moment
        vars(inverse)["inv_mom2_cache"].clear()
        with self._given_back([layer]) as found:
            for i in which:
                request = [copy.deepcopy(self.requests[i])]
                self.rome.apply_rome_to_model(hf, tok, request, hparams)
        return found

    def evaluated(self, which: list[int]) -> list[torch.Tensor]:
        """CounterFact's measures of some facts, without the texts that it generates."""
        module = imported("experiments.py.eval_utils_counterfact")
        found = []
        for fact in (self.facts[i] for i in which):
            record = {
                "requested_rewrite": {
                    "prompt": fact.prompt,
                    "subject": fact.subject,
                    "target_new": {"str": fact.target},
                    "target_true": {"str": str(fact.true)},
                },
                "paraphrase_prompts": list(fact.paraphrases),
                "neighborhood_prompts": [probe.prompt for probe in fact.neighbours],
                "generation_prompts": [],
            }
            measures = module.compute_rewrite_quality_counterfact(
                self.model.hf, self.model.tokenizer, record, None, None
            )
            found += [
                torch.tensor([list(pair.values()) for pair in measures[name]])
                for name in measures
                if name.endswith("_probs") and measures[name]
            ]
        return found

    @contextmanager
    def _given_back(self, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
        """A list that holds what was added to the layers' weights once the block is left."""
        found: list[torch.Tensor] = []
        weights = [self.model.weight(layer) for layer in layers]
        before = [weight.detach().clone() for weight in weights]
        yield found
        with torch.no_grad():
            for weight, old in zip(weights, before):
                found.append(weight - old)
                weight.copy_(old)


def kept_in(path: Path | None, facts: str) -> Callable[[dict[str, Any]], None]:
    """Puts rows into a file of results, in place of earlier ones of the same case."""

    def keep(row: dict[str, Any]) -> None:
        if path is None:
            return
        known = common.read(path.parent, path.stem)[1] if path.is_file() else []
        same = next((one for one in known if one["case"] == row["case"]), {})
        known = [one for one in known if one["case"] != row["case"]]
        here = common.environment()
        known.append({**same, **row, "facts": facts, "environment": here})
        header = {"benchmark": path.stem, "environment": here}
        with atomic_file(path) as new:
            new.write_text("".join(json.dumps(one) + "\n" for one in [header, *known]), "utf-8")

    return keep


#: What was asked for of each case: how many times as fast.
WANTED = {
    "memit: statistics of 5 layers": 5,
    "memit: 8 edits": 7,
    "memit: 32 edits": 8,
    "AlphaEdit: 10 x 8 edits": 8,
    "memit: ROME": 6,
    "memit: probability tests": 6,
}


def table(folder: Path = common.RESULTS) -> str:
    """Markdown of results/hosts.jsonl: speed, then what rounding alone does."""
    header, rows = common.read(folder, "hosts")
    heads = [
        "what",
        "as it is, CPU-s",
        "accelerated",
        "times as fast",
        "asked for",
        "multiplications, times fewer",
        "results apart",
    ]
    lines = [
        [
            row["case"] + _share(row),
            f"{row['host_cpu_s']:.1f}",
            f"{row['accelerated_cpu_s']:.1f}",
            f"{row['ratio']:.1f}",
            next(
                (f"{least}" for case, least in WANTED.items() if row["case"].startswith(case)), ""
            ),
            _fewer(row),
            f"{row['largest_relative_difference']:.0e}",
        ]
        for row in rows
        if "ratio" in row
    ]
    parts = [Table(heads, lines).markdown()]
    for row in rows:
        if "host_in_float32" in row:
            parts.append(
                f"{row['case']}, the one that rounding changes most: from the host's own float64 "
                f"result, its float32 result is {row['host_in_float32']:.0e} away, the accelerated "
                f"one {row['accelerated_in_float32']:.0e}, the accelerated one in float64 "
                f"{row['accelerated_in_float64']:.0e}."
            )
    each = common.measured_each(header, [(row["case"], row) for row in rows])
    return "\n\n".join([*parts, each])


def _share(row: dict[str, Any]) -> str:
    made, edits = row.get("made_by_the_host"), row.get("edits")
    return "" if made == edits else f" (the host: {made}, scaled)"


def _fewer(row: dict[str, Any]) -> str:
    if "host_multiplications" not in row:
        return ""
    return f"{row['host_multiplications'] / row['accelerated_multiplications']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("host", choices=("memit", "alphaedit"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--limit", type=int, default=8, help="facts")
    parser.add_argument("--dataset", default="embedded", help="a fact set that knowedit loads")
    parser.add_argument("--what", action=common.Repeated, default=["statistics", "edit"])
    parser.add_argument("--host-edits", type=int, help="edits that the host makes as it is: all")
    parser.add_argument("--batch", type=int, help="edits made together: all")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "hosts.jsonl")
    parser.add_argument("--count", action="store_true", help="count multiplications, not seconds")
    parser.add_argument("--quick", action="store_true", help="keep no results")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep = kept_in(None if given.quick else given.output.resolve(), given.dataset)
    measured(
        given.host,
        given.path.resolve(),
        given.limit,
        given.what,
        given.dataset,
        given.host_edits,
        given.batch,
        keep,
        given.count,
    )


if __name__ == "__main__":
    main()
