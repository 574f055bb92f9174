"""Evaluation by two processes: the rows and figures of one, each doing its share (unit; a tiny
model, two processes over gloo).
"""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from knowedit.evaluation.protocols import PROMPTS, PROTOCOLS, RESULTS
from knowedit.facts.records import write_facts
from tests.knowedit.methods.test_locate import FACTS
from tests.knowedit.statistics.helpers import save_model, varied_texts
from tests.processes import Forked

#: The command line in so many ranks. Batches are small, so that there are some to share; what each
#: rank does is written down.
PROGRAM = """
import os, sys
import transformers.models.llama.modeling_llama
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from knowedit.cli.app import main
from knowedit.errors import EditError
from knowedit.evaluation import interview
from knowedit.methods.locate import values
from knowedit.methods.locate.recipe import Recipe
from knowedit.models import generation
from knowedit.models.editable import EditableModel
ranks = int(sys.argv[1])
sys.argv = ["knowedit", *sys.argv[2:]]
generation.score.__kwdefaults__["budget"] = 40
interview.TOGETHER = 2
def noted(owner, name):
    made = getattr(owner, name)
    def wrapper(*given, **named):
        with open("did", "a") as file:
            file.write(f"{name} {os.environ.get('RANK', 0)}\\n")
        return made(*given, **named)
    setattr(owner, name, wrapper)
noted(EditableModel, "final_states")
noted(values, "_optimise")
noted(Recipe, "finish")
finish = Recipe.finish
def fails(self, task, targets):
    if os.environ.get("RANK", "0") == os.environ.get("FAILS"):
        raise EditError("this fact cannot be written")
    return finish(self, task, targets)
Recipe.finish = fails
if ranks == 1:
    main()
else:
    elastic_launch(LaunchConfig(1, 1, ranks, run_id="test", rdzv_backend="c10d",
                                rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
                                monitor_interval=0.1), main)()
"""
QUICK = '{"kind": "memit", "layers": [1], "target": {"steps": 2}, "runtime": {"budget": 24}}'


@pytest.fixture
def workplace(tiny_llama, tmp_path, own_cache):
    """A folder with a model, facts, a corpus and the program."""
    save_model(tiny_llama, tmp_path / "model")
    write_facts(tmp_path / "facts.jsonl", FACTS)
    (tmp_path / "corpus.txt").write_text(varied_texts(60))
    (tmp_path / "run.py").write_text(PROGRAM)
    return tmp_path


def run(workplace, ranks, *arguments, code=0, **more):
    """What it said; `code` None: it fails."""
    (workplace / "did").unlink(missing_ok=True)
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "KNOWEDIT_CACHE": "cache", **more}
    process = Forked(("run.py", str(ranks), *arguments), workplace, {**os.environ, **own})
    said = process.communicate(timeout=300)
    assert process.returncode == code if code is not None else process.returncode != 0, said
    return said


def evaluated(workplace, ranks, *arguments, **more):
    given = ("eval", "model", "--dataset", "facts.jsonl", "--method", QUICK)
    kept = ("--corpus", "corpus.txt", "--tokens", "2000")
    return run(workplace, ranks, *given, *kept, *arguments, **more)


def did(workplace):
    """How often each rank did what is noted: `{name: [rank 0, rank 1]}`."""
    file = workplace / "did"
    found = Counter(file.read_text().splitlines() if file.exists() else ())
    names = {line.split()[0] for line in found}
    return {name: [found[f"{name} {rank}"] for rank in (0, 1)] for name in names}


def timeless(value):
    """A record without what says how long it took."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.endswith("seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_two_ranks_measure_what_one_does(workplace, protocol):
    more = ("--text", "corpus.txt", "--generate", "2", "--batch", "2", "--every", "2")
    shared = {}
    evaluated(workplace, 1, "--limit", "1")  # collects the statistics
    for ranks in (1, 2):
        out, err = evaluated(
            workplace, ranks, "--protocol", protocol, *more, "--json", "-o", f"by{ranks}"
        )
        assert json.loads(out) and err.count("computing and measuring") == 1  # one rank speaks
        shared[ranks] = did(workplace)
    one, two = (workplace / f"by{ranks}" for ranks in (1, 2))
    results = [timeless(json.loads((folder / RESULTS).read_text())) for folder in (one, two)]
    assert results[0] == results[1]  # to the last bit
    assert (one / PROMPTS).read_text() == (two / PROMPTS).read_text()
    alone, together = shared[1], shared[2]
    for name in ("final_states", "_optimise"):
        assert 0 < max(together[name]) < sum(alone[name])
    assert sum(together["_optimise"]) == sum(alone["_optimise"])
    if protocol == "single":
        assert together["finish"] == [2, 1] and sum(alone["finish"]) == len(FACTS) == 3


def test_a_run_goes_on_with_other_ranks(workplace):
    evaluated(workplace, 2, "-o", "run")
    out, err = evaluated(workplace, 1, "--method", "ft", "-o", "run", "--json")
    assert "kept from run" in err and [r["method"] for r in json.loads(out)] == ["MEMIT", "FT"]
    out, err = evaluated(workplace, 2, "--method", "ft", "-o", "run", "--json")
    assert err.count("kept from run") == 2 and len(json.loads(out)) == 2
    assert not {"finish", "_optimise"} & set(did(workplace))


@pytest.mark.parametrize("grid", [False, True])
def test_an_error_of_one_rank_is_that_of_all(workplace, grid):
    if not grid:
        out, err = evaluated(
            workplace, 2, "--protocol", "single", "-o", "run", code=None, FAILS="1"
        )
        assert err.count("error: this fact cannot be written") == 1 and not out
        assert not list((workplace / "run").glob("*"))
        return
    (workplace / "grid.json").write_text(
        json.dumps(
            {
                **{"model": "model", "dataset": "facts.jsonl", "protocol": "single"},
                **{"corpus": "corpus.txt", "tokens": 2000},
                "methods": [json.loads(QUICK), {"kind": "ft", "steps": 2}],
            }
        )
    )
    out, _ = run(workplace, 2, "eval", "--config", "grid.json", "-o", "run", "--json", FAILS="1")
    reasons = [row["reason"] for row in json.loads(out)["rows"]]
    assert reasons == ["EditError: this fact cannot be written", None]


def test_an_edit_by_two_ranks_is_that_of_one(workplace):
    edits = []
    for ranks in (1, 2):
        given = ("--method", QUICK, "--corpus", "corpus.txt", "--tokens", "2000", "--force")
        file = f"by{ranks}.safetensors"
        run(workplace, ranks, "edit", "model", "facts.jsonl", *given, "-o", file)
        out, _ = run(workplace, 1, "inspect", file, "--json")
        edits.append(json.loads(out))
    assert edits[0]["key"] == edits[1]["key"]
