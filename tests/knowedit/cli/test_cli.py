"""The commands as a user types them, on a tiny model saved to a folder (unit)."""

import json
import os
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from knowedit.cli.options import json_text, parse_layers
from knowedit.edits.edit import Edit
from knowedit.edits.history import History
from knowedit.errors import KnowEditError
from knowedit.io import config
from knowedit.io.config import kinds
from knowedit.io.files import _machine, locked
from knowedit.methods.base import Method
from tests.knowedit.cli.examples import FACTS
from tests.knowedit.commandline import CommandLine
from tests.knowedit.facts.examples import ROME
from tests.processes import Forked

CORPUS = ("--corpus", "corpus.txt", "--tokens", "500", "--layer", "1")


def test_edit_inspect_apply_undo(place, knowedit):
    said = knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *CORPUS)
    assert (
        "MEMIT: 2 facts" in said
        and "gain 0." in said
        and "(gain: the share of the planned change that arrives; |delta|/|W|: " in said
        and "lambda: the weight of what must stay" in said
        and "leak:" not in said
        and "knowedit apply model a.safetensors" in said
    )
    seen = knowedit("inspect", "a.safetensors")
    assert "The capital of France is -> Lyon" in seen and "rank 2" in seen
    knowedit("apply", "model", "a.safetensors", "-o", "edited")
    assert "MEMIT" in knowedit("inspect", "edited")
    original, edited = (
        load_file(place / name / "model.safetensors") for name in ("model", "edited")
    )
    changed = [name for name, tensor in original.items() if not tensor.equal(edited[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    assert "every weight is back" in knowedit("undo", "edited")
    assert all(
        t.equal(original[n]) for n, t in load_file(place / "edited" / "model.safetensors").items()
    )
    assert "already undone" in knowedit("undo", "edited", code=1)
    knowedit("export", "model", "a.safetensors", "-o", "adapter")
    assert (place / "adapter" / "adapter_model.safetensors").exists()


def test_what_only_fits_a_gguf_file_is_refused_before_anything_is_loaded(place, knowedit):
    for given in (("model",), ("model", "--stream")):
        said = knowedit("apply", *given, "a.safetensors", "-o", "edited.gguf", code=1)
        assert "give the GGUF file that the edit was computed on" in said


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_facts_are_joined_and_asked_in_the_chat_as_told(place, knowedit, tiny_llama, monkeypatch):
    monkeypatch.setattr(tiny_llama.tokenizer, "chat_template", TEMPLATE)  # of all tests
    tiny_llama.tokenizer.save_pretrained(place / "model")
    (place / "one.jsonl").write_text(json.dumps(FACTS[0]))
    lora = ("--method", "lora", "--set", "steps=1", "--json", "--join", "none", "--chat")
    made = json.loads(knowedit("edit", "model", "one.jsonl", "-o", "a.safetensors", *lora))
    (written,) = made["facts"]
    assert written["join"] == "none"
    assert written["prompt"] == "<user>The capital of {} is<assistant>"
    measured = ("eval", "model", "--dataset", "one.jsonl", *lora, "-o", "run")
    assert [one["facts"] for one in json.loads(knowedit(*measured))] == [1]
    said = "".join(
        p.read_text() for p in (place / "run").rglob("*") if p.suffix in (".csv", ".jsonl", ".json")
    )
    assert "<user>The capital of France is<assistant>" in said
    assert "other" in knowedit(*(word for word in measured if word != "--chat"), code=1)
    assert "join" in knowedit("eval", "model", "--dataset", "one.jsonl", "--join", "dash", code=1)


def test_a_gradient_method_needs_no_statistics(place, knowedit):
    settings = (
        "--set",
        "steps=2",
        "--set",
        "rank=3",
        "--set",
        'modules=["q_proj","down_proj"]',
    )
    said = knowedit(
        "edit",
        "model",
        "facts.jsonl",
        "-o",
        "a.safetensors",
        "--method",
        "lora",
        "--layer",
        "1-2",
        *settings,
    )
    assert (
        "LoRA: 2 facts, 4 weights changed" in said
        and "numbers trained in 2 steps" in said
        and "NLL" in said
    )
    assert "model.layers.1.self_attn.q_proj.weight  rank 3" in knowedit("inspect", "a.safetensors")
    knowedit("apply", "model", "a.safetensors", "-o", "edited")
    assert "every weight is back" in knowedit("undo", "edited")
    for bad, message in (
        ("lr", "name=value"),
        ("steps=x", "lora.steps must be a whole number"),
        ("gain=1", "lora has no setting 'gain'"),
        ("rank=0", "rank must"),
    ):
        assert message in knowedit(
            "edit",
            "model",
            "facts.jsonl",
            "-o",
            "b.safetensors",
            "--method",
            "lora",
            "--set",
            bad,
            code=1,
        )


def test_edits_in_sequence_share_a_history(place, knowedit):
    for number, fact in enumerate(FACTS):
        (place / f"{number}.jsonl").write_text(json.dumps(fact))
        said = knowedit(
            "edit",
            "model",
            f"{number}.jsonl",
            "-o",
            f"{number}.safetensors",
            "--history",
            "seen.safetensors",
            *CORPUS,
        )
        assert (
            "knowedit apply model seen.safetensors" in said
        )  # a later edit alone would lack the earlier ones
    again = ("edit", "model", "1.jsonl", "-o", "x", "--history", "seen.safetensors", *CORPUS)
    with locked("seen.safetensors"):
        assert "another run is writing to seen.safetensors" in knowedit(*again, code=1)
    assert "repeats history, edit 1" in knowedit(
        "edit", "model", "1.jsonl", "-o", "x", "--history", "seen.safetensors", *CORPUS, code=1
    )
    (place / "other.jsonl").write_text(json.dumps({**FACTS[1], "target": "Peru"}))
    other = ("edit", "model", "other.jsonl", "-o", "other.safetensors", "--correct", *CORPUS)
    assert "--correct needs --history" in knowedit(*other, code=1)
    shutil.copy(place / "seen.safetensors", place / "corrected.safetensors")
    knowedit(*other, "--history", "corrected.safetensors", "--force")
    corrected = History.load(place / "corrected.safetensors")
    assert [fact.target for fact in corrected.facts] == [FACTS[0]["target"], "Peru"]
    history = History.load(place / "seen.safetensors")
    assert [fact.subject for fact in history.facts] == ["France", "Brazil"]
    assert history.edits[1].key == Edit.load(place / "1.safetensors").key
    assert "France" in (told := knowedit("inspect", "seen.safetensors")) and "Brazil" in told
    knowedit("apply", "model", "seen.safetensors", "-o", "both")
    written = json.loads(knowedit("export", "model", "seen.safetensors", "-o", "adapter", "--json"))
    assert written["edits"] == [edit.key for edit in history.edits]
    ranks = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert ranks["r"] == 2  # of both facts
    told = knowedit("inspect", "both")
    assert all(edit.key in told for edit in history.edits)
    knowedit("undo", "both")
    assert (
        load_file(place / "both" / "model.safetensors").keys()
        == load_file(place / "model" / "model.safetensors").keys()
    )
    knowedit("edit", "model", "1.jsonl", "-o", "alone.safetensors", *CORPUS)
    assert history.edits[1].key != Edit.load(place / "alone.safetensors").key


def test_statistics_from_files(place, knowedit):
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *CORPUS)
    knowedit("stats", "model", *CORPUS, "-o", "ours")
    knowedit(
        "edit",
        "model",
        "facts.jsonl",
        "-o",
        "b.safetensors",
        "--statistics",
        "ours",
        "--layer",
        "1",
    )
    one, other = (Edit.load(place / f"{edit}.safetensors").delta(1) for edit in "ab")
    assert one.equal(other)
    common = ("--dataset", "facts.jsonl", "--method", "memit", "--statistics", "ours")
    assert "efficacy" in knowedit("eval", "model", *common, "--layer", "1")
    assert "no statistics of layer 2 here" in knowedit(
        "eval", "model", *common, "--layer", "2", code=1
    )
    said = knowedit(
        "edit",
        "model",
        "facts.jsonl",
        "-o",
        "c",
        "--statistics",
        "peer.npz",
        "--layer",
        "1",
        code=1,
    )
    assert "knowedit stats import MODEL peer.npz -o FOLDER" in said and not (place / "c").exists()


def test_stats_eval_doctor(place, knowedit):
    rows = json.loads(knowedit("stats", "model", *CORPUS[:4], "--layer", "0-1", "--json"))
    assert [(r["layer"], r["tokens"]) for r in rows] == [(0, 500), (1, 500)] and not rows[0]["sink"]
    file = next((place / "cache").rglob("layer-001.safetensors"))
    assert "500 from corpus.txt" in knowedit("inspect", str(file))
    said = knowedit(
        "eval",
        "model",
        "--dataset",
        "facts.jsonl",
        "--method",
        "memit",
        *CORPUS,
        "-o",
        "run",
        "--json",
    )
    results = json.loads((place / "run" / "results.json").read_text())
    assert json.loads(said) == results and results[0]["method"] == "MEMIT"
    assert len((place / "run" / "prompts.jsonl").read_text().splitlines()) == 2
    single = knowedit(
        "eval",
        "model",
        "--dataset",
        "facts.jsonl",
        "--method",
        "rome",
        "--protocol",
        "single",
        *CORPUS,
    )
    assert "ROME, single of 2 facts" in single and "efficacy" in single
    common = ("--dataset", "facts.jsonl", "--method", "alphaedit", "--protocol", "sequential")
    course = knowedit(
        "eval", "model", *common, "--batch", "1", "--every", "1", "--text", "corpus.txt", *CORPUS
    )
    assert "AlphaEdit, sequential of 2 facts" in course and "perplexity" in course
    left = place / f".a.safetensors.{_machine()}-4194305.abcdefgh.part"  # no such process
    left.write_bytes(bytes(1 << 20))
    report = json.loads(knowedit("doctor", "model", "--json"))
    assert report["left by killed runs"][str(left)].startswith("1.0 MiB, may be deleted")
    ran = {
        name.rsplit(" ", 1)[0]
        for name, said in report["kernels"].items()
        if "refused" in said or "not needed" in said
    }
    tangents = {f"{op} tangents" for op in ("RMSNorm", "SwiGLU", "attention")}
    assert ran == {"second moment", "low-rank update", "target loss", *tangents}
    assert (
        report["model"]["default layers"].endswith("(rule of thumb)")
        and report["versions"]["torch"]
    )


def test_the_demo_on_a_tiny_model(place, knowedit):
    """It is refused nothing that a real one is not: every option, and JSON."""
    given = ("demo", "model", "--corpus", "corpus.txt", "--tokens", "500", "--seed", "3")
    ours = ("--set", "metric.gain=0.5", "--set", "target.steps=3", "--set", "tokens=400")
    memit = ("--method", "memit", *ours, "--dtype", "float32")
    shown = json.loads(knowedit(*given, *memit, "--json", "-o", "page"))
    assert all(0.3 < layer["gain"] < 0.55 for layer in shown["report"]["layers"].values())
    roles = {row["role"]: row for row in shown["prompts"]}
    assert roles.keys() == {"edited", "paraphrase", "consequence", "neighbour"}
    assert roles["consequence"]["wanted"] == "chemist" and roles["edited"]["wanted"] == "chemistry"
    before, edited, after = shown["fingerprints"]
    assert before == after != edited
    page = (place / "page" / "demo.html").read_text()
    assert "After the undo all weight bits are back" in page and before[:12] in page
    assert "question: " in page and "layer 1." in page and "only the fact is written" in page
    said = knowedit(*given, "--set", "target.steps=3")
    assert "what the model says" in said and "all weight bits are back" in said
    assert "what it does not do" in said


def test_the_printed_command_runs_as_printed(place, knowedit):
    """With the dtype that the edit was made in, and quoted for a shell."""
    (place / "model").rename(place / "my model")
    given = ("edit", "my model", "facts.jsonl", "-o", "an edit.safetensors", "--method", "ft-l")
    said = knowedit(*given, "--set", "steps=1", "--dtype", "bfloat16")
    printed = said.rpartition("apply it with: ")[2]
    program, *words = shlex.split(printed.replace("FOLDER", "edited"))
    assert program == "knowedit" and "bfloat16" in words
    assert "wrote edited" in knowedit(*words)
    again = json.loads(knowedit("undo", "edited", "--json"))
    assert again["fingerprint"] == Edit.load(place / "an edit.safetensors").fingerprint


def test_an_existing_folder_is_refused_before_anything_is_loaded(place, knowedit):
    (place / "taken").mkdir()
    (place / "taken" / "file").touch()
    for command in ("apply", "export"):
        said = knowedit(command, "no model", "no edit", "-o", "taken", code=1)
        assert said == "error: taken exists; choose another folder or remove it\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("edti",), "there is no command 'edti'; did you mean 'edit'?; see knowedit --help"),
        (("train", "mind"), "there is no command 'mind'; did you mean 'mend'?; see knowedit train"),
        (
            ("edit", "--methdo", "x"),
            "knowedit edit has no option --methdo; did you mean '--method'?",
        ),
        (("eval", "m", "--limit", "x"), "invalid value for '--limit': "),
        (("edit", "model"), "missing argument 'facts'; see knowedit edit --help"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(knowedit, arguments, said):
    told = knowedit(*arguments, code=2)
    assert told.startswith(f"error: {said}") and told.count("\n") == 1


def test_files_of_facts_are_shown_as_what_they_are(place, knowedit):
    said = knowedit("inspect", "facts.jsonl")
    assert (
        said.startswith("facts: 2, of 2 subjects; beside them no prompts: ")
        and "The capital of France is -> Lyon" in said
    )
    idle = {"prompt": "The home of Lyon's opera is", "answer": "Lyon"}
    fact = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
    (place / "idle.jsonl").write_text(json.dumps({**fact, "neighbours": [idle]}))
    assert "note: 1 neighbour not asked: the new answer" in knowedit("inspect", "idle.jsonl")
    assert "not asked" not in said
    (place / "broken.jsonl").write_text("{")
    assert "broken.jsonl:1" in knowedit("inspect", "broken.jsonl", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", "model", "nothing.jsonl", "-o", "x"), "nothing.jsonl"),
        (
            ("edit", "model", "facts.jsonl", "-o", "x", "--method", "rosé"),
            "unknown method 'rosé'; did you mean 'rose'?",
        ),
        (
            ("edit", "model", "facts.jsonl", "-o", "x", "--method", "rome", "--set", "gain=0.9"),
            "rome has no setting 'gain'",
        ),
        (
            ("edit", "nowhere", "facts.jsonl", "-o", "x", *CORPUS),
            "neither a local folder nor reachable",
        ),
        (("stats", "model", "--layer", "7", *CORPUS[:4]), "layer 7 does not exist"),
        (("stats", "model", "--layer", "four", *CORPUS[:4]), "give a number like"),
        (("stats", "model", "--corpus", "nothing.txt"), "no such file"),
        (("apply", "model", "facts.jsonl", "-o", "x"), "damaged, or not a safetensors file"),
        (("inspect", "model"), "it was not written by"),
        (("eval", "model", "--dataset", "coutnerfact"), "did you mean 'counterfact'?"),
    ],
)
def test_errors_are_one_line(place, knowedit, arguments, message):
    said = knowedit(*arguments, code=1)
    assert said.startswith("error: ") and message in said and "Traceback" not in said
    assert not (place / "x").exists()


def test_a_bad_fact_names_file_and_line(place, knowedit):
    (place / "facts.jsonl").write_text(
        json.dumps(FACTS[0]) + "\n" + json.dumps(FACTS[1] | {"target": " "}) + "\n"
    )
    assert "facts.jsonl:2: target is empty" in knowedit(
        "edit", "model", "facts.jsonl", "-o", "x", code=1
    )


def test_an_unknown_implementation_is_refused_with_the_names(knowedit, monkeypatch):
    monkeypatch.setenv("KNOWEDIT_IMPL", "nonsense")
    assert "asks for nonsense; an op has: " in knowedit("doctor", code=1)


def test_eval_goes_on_where_it_stopped(place, knowedit, monkeypatch, capsys):
    """A method's results are on disk before the next one starts, and are not measured again."""
    first = ("eval", "model", "--dataset", "facts.jsonl", *CORPUS, "-o", "run")
    given = (*first, "--method", "ft-l", "--method", "memit", "--set", "layers=[1]")
    with monkeypatch.context() as cut:
        cut.setattr(
            "knowedit.methods.MEMIT._compute", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        told = knowedit(*given, code=130)
    assert "the results of 1 method are in run, finished key statistics are kept; run the" in told
    (kept,) = json.loads((place / "run/results.json").read_text())
    found = json.loads(knowedit(*given, "--json"))
    assert found == json.loads((place / "run/results.json").read_text())
    assert found[0] == kept and [record["method"] for record in found] == ["FT-L", "MEMIT"]
    prompts = (place / "run/prompts.jsonl").read_text().splitlines()
    assert len(prompts) == sum(record["evaluation"]["prompts"] for record in found)
    assert "efficacy" in knowedit(*given)  # all of it from the folder
    assert "holds results of other facts" in knowedit(*given, "--limit", "1", code=1)
    # what the report says runs the same: nothing is measured again
    report = knowedit("report", "run").splitlines()
    (again,) = [
        line[len("MEMIT: ") :] for line in report if line.startswith("MEMIT: knowedit eval")
    ]
    assert "--corpus" in again and "--method memit --set 'layers=[1]'" in again
    with monkeypatch.context() as cut:
        cut.setattr("knowedit.methods.MEMIT._compute", None)
        assert json.loads(knowedit(*shlex.split(again)[1:], "-o", "run", "--json")) == found[1:]


OF_A_FILE = "knowedit_own_"
OWN = """
from dataclasses import dataclass, field

from knowedit.methods.locate.metrics import Metric, NullSpace
from knowedit.methods.locate.recipe import Recipe


@dataclass(frozen=True)
class Mine(Recipe):
    \"\"\"A null space of one's own.\"\"\"

    metric: Metric = field(default_factory=NullSpace)
    name = "Mine"
"""


@pytest.fixture
def known_methods():
    """What a test's own files define is forgotten after it."""
    yield
    known = config._KINDS["method"]
    for kind in [kind for kind in known if known[kind].__module__.startswith(OF_A_FILE)]:
        del known[kind]


@pytest.mark.usefixtures("known_methods")
def test_a_method_of_ones_own_is_compared_with_ours(place, knowedit, monkeypatch):
    (place / "mine.py").write_text(OWN)
    assert "A null space of one's own." in knowedit("methods", "mine.py")
    given = ("eval", "model", "--dataset", "facts.jsonl", *CORPUS, "-o", "run")
    given += ("--method", "ft-l", "--method", "mine.py")
    shown = knowedit(*given)
    heads = [line.split() for line in shown.splitlines() if "measure" in line]
    assert heads[-1] == ["measure", "unedited", "FT-L", "Mine"]  # side by side at the end
    assert "every token of the right answer" in shown
    with monkeypatch.context() as cut:  # it is known again, and not measured again
        cut.setattr("knowedit.methods.locate.recipe.Recipe._compute", None)
        shown = knowedit(*given)
    assert [line.split()[-1] for line in shown.splitlines() if "measure" in line] == ["Mine"]
    commands = [line for line in knowedit("report", "run").splitlines() if "mine.py" in line]
    assert len(commands) == 1 and "--method mine.py --set 'layers=[1]'" in commands[0]
    with monkeypatch.context() as cut:
        cut.setattr("knowedit.methods.locate.recipe.Recipe._compute", None)
        again = shlex.split(commands[0].partition(": ")[2])[1:]
        (record,) = json.loads(knowedit(*again, "-o", "run", "--json"))
    assert record["method"] == "Mine" and record["config"]["kind"] == "mine"
    # in a grid, with settings
    sweep = {"methods": [{"kind": "mine.py", "layers": [1], "metric": {"gain": 0.5}}]}
    sweep |= {"model": "model", "dataset": "facts.jsonl", "corpus": "corpus.txt", "tokens": 500}
    (place / "grid.json").write_text(json.dumps(sweep))
    (row,) = json.loads(knowedit("eval", "--config", "grid.json", "-o", "grid", "--json"))["rows"]
    assert row["own"]["file"] == "mine.py" and "metric.gain=0.5" in row["own"]["set"]
    assert "--method mine.py --set metric.gain=0.5 --set 'layers=[1]'" in knowedit("report", "grid")


def test_a_file_that_is_no_method_is_refused(place, knowedit):
    bare = "from knowedit.methods.base import Method\nclass Bare(Method): ..."
    for text, why in (
        ("x = 1", "must define one method, a class made from Method; it has none"),
        (OWN + OWN.replace("Mine", "Two"), "it has Mine, Two"),
        (OWN.replace('"Mine"', '"MEMIT"'), "which is one of ours; give it another name"),
        ("import nothing_like_it", "cannot be run: ModuleNotFoundError"),
        ("raise SystemExit(0)", "cannot be run: SystemExit"),
        (bare, "Bare lacks _compute, name, as every method has"),
        (bare.replace("...", "_compute = print"), "Bare lacks name, as every method has"),
    ):
        (place / f"{len(why)}.py").write_text(text)
        known = dict(kinds(Method))
        assert why in knowedit("methods", f"{len(why)}.py", code=1)
        left = kinds(Method)  # a refused file leaves nothing, and takes nothing's place
        assert all(left[kind] is known.get(kind, left[kind]) for kind in left)
        assert not any(made.__module__.startswith(OF_A_FILE) for made in left.values())
    assert "absent.py does not exist" in knowedit("methods", "absent.py", code=1)


@pytest.mark.usefixtures("known_methods")
def test_two_files_cannot_call_their_methods_alike(place, knowedit):
    """A record names its method, and would be read as the other."""
    for folder in ("a", "b"):
        (place / folder).mkdir()
        (place / folder / "it.py").write_text(OWN.replace("Mine", "Twin"))
    given = ("eval", "model", "--dataset", "facts.jsonl", *CORPUS, "-o", "run")
    given += ("--method", "a/it.py", "--method", "b/it.py")
    assert "as a/it.py does; give its class another name" in knowedit(*given, code=1)
    assert not (place / "run").exists()


def test_ctrl_c_says_what_is_kept(place, knowedit, monkeypatch):
    def stops(*_arguments, **_named):
        raise KeyboardInterrupt(*kept)

    monkeypatch.setattr("knowedit.methods.base.statistics_for", stops)
    edit, kept = ("edit", "model", "facts.jsonl", "-o", "a", *CORPUS), ("500 tokens are kept",)
    assert knowedit(*edit, code=130) == "interrupted: 500 tokens are kept\n"
    kept = ()
    assert knowedit(*edit, code=130) == (
        "interrupted: no edit was written; finished key statistics are kept; run the same command "
        "again to go on\n"
    )


TRACE = ("trace", "model", "The capital of France is", "--subject", "France")
AT_THE_END = "no result was written; finished key statistics are kept; run the same command again"


@pytest.mark.parametrize(
    ("words", "stops", "said"),
    [
        (("same-subject", "model"), "evaluation.subjects.protocol.measure_subjects", AT_THE_END),
        (("geometry", "model"), "statistics.keys.layer_statistics", AT_THE_END),
        (TRACE, "evaluation.tracing.tracing.trace", "no result was written; run the same command"),
        (("demo", "model", "--method", "memit"), "statistics.keys.Collection", AT_THE_END),
        (("study", "arithmetic", "model"), "studies.arithmetic.Study", "no result was written, "),
        (("eval", "--config", "grid.yaml"), "evaluation.sweep.load_model", "no result was writ"),
    ],
)
def test_ctrl_c_says_how_to_go_on_with_and_without_a_folder(
    place, knowedit, monkeypatch, words, stops, said
):
    def stop(*_arguments, **_named):
        raise KeyboardInterrupt

    (place / "grid.yaml").write_text("{model: model, dataset: facts.jsonl, methods: [memit]}")
    monkeypatch.setattr(f"knowedit.{stops}", stop)
    told = knowedit(*words, code=130)
    assert told.splitlines()[-1].startswith(f"interrupted: {said}")
    writes_early = words[0] in ("study", "eval")
    assert (("with -o FOLDER" in told) == writes_early and "to start over" in told) or writes_early
    told = knowedit(*words, "-o", "run", code=130).splitlines()[-1]
    kept = "no results are yet in run" if writes_early else "no result was written to run, which"
    assert kept in told and ("again to go on" in told) == writes_early
    assert not (place / "run").exists()


@pytest.mark.parametrize("what", ["edit", "apply"])
def test_kill_leaves_nothing_half_written(place, knowedit, what):
    """Killed at several moments, the output is whole or absent, and the same command then
    succeeds.
    """
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *CORPUS)
    arguments = (what, "model", "facts.jsonl" if what == "edit" else "a.safetensors", "-o", "out")
    arguments += (*CORPUS, "--force") if what == "edit" else ("--force",)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KNOWEDIT_CACHE": str(place / "cache")}
    before = set(place.iterdir())
    process = Forked(("-m", "knowedit", *arguments), place, environment)
    deadline = time.monotonic() + 120
    while process.poll() is None and set(place.iterdir()) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (place / "out").exists():  # the rename came first
        knowedit("inspect", "out")
    else:
        knowedit(*arguments)
    knowedit("inspect", "out")


def test_parse_layers():
    assert parse_layers(["5"]) == (5,) and parse_layers(["4-6", "9"]) == (4, 5, 6, 9)
    assert parse_layers(None) is None and parse_layers([]) is None
    for bad in ("x", "3-", "6-4", "", "-1"):
        with pytest.raises(KnowEditError, match="give a number like 5 or a range"):
            parse_layers([bad])
    with pytest.raises(KnowEditError, match="--layer 4 --layer 6"):
        parse_layers(["4,6"])


def test_measuring_in_depth(knowedit, place):
    """same-subject and geometry write results, report reads them."""
    facts = [
        *FACTS,
        FACTS[0] | {"prompt": "People of {} speak", "target": "Norse", "true": "French"},
    ]
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    chosen = ("--dataset", "facts.jsonl", "--least", "1", *CORPUS, "-o", "run")
    said = knowedit(
        "same-subject",
        "model",
        "--method",
        "memit",
        "--method",
        "emmet",
        "--wordings",
        "1",
        *chosen,
    )
    assert "EMMET - MEMIT, paired" in said and "3 facts of 2 subjects" in said
    quick = ("--dataset", "facts.jsonl", "--limit", "1", "--wordings", "1", "--layer", "1")
    quick += ("--least", "1", "--method", "ft-l", "--set", "steps=1", "--json")
    assert json.loads(knowedit("same-subject", "model", *quick))[0]["method"] == "FT-L"
    rows = json.loads(
        knowedit("geometry", "model", "--edited", "0", "--threshold", "1e9", *chosen, "--json")
    )
    assert rows[0]["layer"] == 1 and (place / "run/geometry.png").stat().st_size > 1000
    said = knowedit("report", "run")
    assert "kappa covariance" in said and "subjects with 2 facts (1)" in said
    assert (place / "run/report.html").read_text().count("<svg") == 2
    assert "unknown half" in knowedit("same-subject", "model", "--half", "third", *chosen, code=1)
    assert "holds no results" in knowedit("report", "model", code=1)


def test_a_calibration_is_measured_once_and_used(knowedit, place, monkeypatch):
    from knowedit.evaluation.calibration import measure
    from knowedit.models import calibration

    names = ("France", "Brazil", "Japan", "Peru")
    facts = [FACTS[number % 2] | {"subject": name} for number, name in enumerate(names)]
    (place / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    monkeypatch.setattr(calibration, "_SINKS", {})
    for name, value in {"STEPS": 2, "OPENINGS": 2, "SPARED": 60, "CLAMPS": 1, "TRACED": 1}.items():
        monkeypatch.setattr(measure, name, value)
    asked = ("calibrate", "model", "--dataset", "facts.jsonl", "--limit", "4")
    assert "model knows 0 of 4 facts" in knowedit(*asked, code=1)
    monkeypatch.setattr(measure, "known_facts", lambda model, facts, count: list(facts)[:count])
    said = knowedit(*asked)
    assert "4 facts" in said and "Chosen: layer" in said
    monkeypatch.setattr(measure, "calibrate", None)  # it is known from now on
    again = json.loads(knowedit(*asked, "--json"))
    file = place / "cache" / "calibration" / f"{again['fingerprint']}.json"
    record = json.loads(file.read_text())
    assert record == again
    record["choice"]["layer"] = other = 2 if again["choice"]["layer"] != 2 else 1
    file.write_text(json.dumps(record))
    edited = knowedit("edit", "model", "facts.jsonl", *CORPUS[:4], "-o", "a.safetensors")
    assert "MEMIT: 4 facts" in edited and "knowedit calibrate" not in edited
    changed = Edit.load(place / "a.safetensors").changes
    assert set(changed) == {f"model.layers.{other}.mlp.down_proj.weight"}


def test_a_saved_edit_and_an_edited_folder_are_measured(place, knowedit):
    lora = ("--method", "lora", "--set", "steps=2")
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *lora)
    knowedit("apply", "model", "a.safetensors", "-o", "edited")
    saved = json.loads(knowedit("eval", "model", "--edit", "a.safetensors", "--json", "-o", "run"))
    beside = json.loads(knowedit("eval", "edited", "--against", "model", "--json"))
    assert saved[0]["evaluation"] == beside[0]["evaluation"] and saved[0]["facts"] == len(FACTS)
    report = knowedit("report", "run")
    assert "saved edit of 2 facts from a.safetensors" in report
    assert "LoRA: knowedit eval model --edit a.safetensors" in report.splitlines()
    assert beside[0]["run"]["asked"] == {"against": "model"}
    assert (saved[0]["protocol"], beside[0]["protocol"]) == ("saved edit", "comparison")
    reached = ("eval", "model", "--edit", "a.safetensors", "-o", "run")  # kept: not measured again
    knowedit(*reached, "--at-least", "efficacy.success=0", "--at-most", "drift.kl=1e9")
    missed = knowedit(*reached, "--at-most", "drift.kl=-1", code=1)
    assert "LoRA: drift.kl is" in missed and "at most -1 asked" in missed
    said = knowedit("eval", "model", "--edit", "a.safetensors", "--method", "rome", code=1)
    assert "--method computes an edit" in said


@pytest.mark.parametrize(
    "words",
    [
        ("edit", "model", "facts.jsonl", "-o", "a.safetensors"),
        ("eval", "model", "--dataset", "facts.jsonl"),
        ("eval", "model", "--edit", "a.safetensors", "--dataset", "facts.jsonl"),
        ("eval", "model", "--against", "other", "--dataset", "facts.jsonl"),
        ("eval", "--config", "grid.json"),
        ("same-subject", "model"),
        ("recommend", "model", "facts.jsonl"),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_every_command_loads_the_model_as_told(tmp_path, monkeypatch, capsys, words):
    from knowedit.evaluation import protocols, saved, sweep
    from knowedit.evaluation.subjects import protocol
    from knowedit.models import load

    told = {}

    def loaded(name, **options):
        told.update(options)
        raise KnowEditError("this is all that is looked at")

    for module in (load, protocols, saved, sweep, protocol):
        monkeypatch.setattr(module, "load_model", loaded)
    monkeypatch.setattr(saved, "edits_in", lambda path: [SimpleNamespace(key="a", facts=[])])
    monkeypatch.setattr(saved, "_standing", lambda edits: [])
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (tmp_path / "grid.json").write_text('{"methods": ["memit"]}')
    line = CommandLine(monkeypatch, capsys, tmp_path)
    said = line(*words, "--dtype", "bfloat16", "--dequantise", code=1)
    assert "all that is looked at" in said
    assert told["dtype"] == "bfloat16" and told["dequantise"] is True


@pytest.mark.parametrize(
    "words",
    [("same-subject",), ("geometry",), ("trace",), ("calibrate",), ("train", "mend")],
    ids=" ".join,
)
def test_strict_stops_at_a_record_that_cannot_be_edited(place, knowedit, words):
    broken = ROME | {"requested_rewrite": {"prompt": "x", "subject": "y"}}
    (place / "public.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (ROME, broken)))
    told = knowedit(*words, "model", "--dataset", "public.jsonl", "--strict", code=1)
    assert "public.jsonl:2: counterfact record without 'target_new'" in told


def test_an_edit_that_must_say_its_facts_is_refused_where_it_does_not(place, knowedit):
    words = ("edit", "model", "facts.jsonl", "--corpus", "corpus.txt", "--tokens", "500")
    settings = ("--layer", "1", "--set", "target.steps=1", "-o", "a.safetensors")
    told = knowedit(*words, *settings, "--allow", "said=1", "--allow", "gain=-9", code=1)
    assert "facts are said at their own prompts (limit 100%)" in told
    assert not (place / "a.safetensors").exists()


def test_what_transformers_draws_by_itself_is_not_seen(place, monkeypatch, capsys):
    line = CommandLine(monkeypatch, capsys, place)
    made = ("--method", "ft-l", "--set", "steps=1", "--force", "-o", "a.safetensors")
    line("edit", "model", "facts.jsonl", *made)
    line("apply", "model", "a.safetensors", "--force", "-o", "edited", "--quiet")
    assert line.said.err == "" and "wrote edited" in line.said.out


def test_json_is_read_by_every_program():
    found = {"nan": float("nan"), "list": [float("inf"), 1.5], "pair": (1, None), "text": "NaN"}
    assert json.loads(json_text(found)) == {
        "nan": None,
        "list": [None, 1.5],
        "pair": [1, None],
        "text": "NaN",
    }


def test_facts_of_one_subject_are_written_by_the_method_made_for_them(place, knowedit):
    more = {"prompt": "{} lies in", "subject": "France", "target": "Asia"}
    (place / "one.jsonl").write_text("".join(json.dumps(f) + "\n" for f in (FACTS[0], more)))
    quick = ("--set", "target.steps=1", *CORPUS)
    knowedit("edit", "model", "one.jsonl", "-o", "a.safetensors", *quick)
    assert Edit.load(place / "a.safetensors").config["kind"] == "rose"
    knowedit("edit", "model", "one.jsonl", "-o", "b.safetensors", "--method", "memit", *quick)
    assert Edit.load(place / "b.safetensors").config["kind"] == "memit"
