"""`--config`, `--set`, generated options and old spellings (unit; edits on a tiny model)."""

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest
import typer.main

import knowedit as ke
from knowedit.cli import recorded
from knowedit.cli.app import app
from knowedit.cli.commands import OLD
from knowedit.cli.generated import attribute_help, changed, options_of
from knowedit.cli.options import parse_methods, say
from knowedit.cli.printed import JSON, Printed
from knowedit.cli.reference import reference
from knowedit.edits.edit import Edit
from knowedit.errors import ConfigError, KnowEditError
from knowedit.evaluation.tracing.localisation import AverageTrace
from knowedit.io.config import Config

CORPUS = ("--corpus", "corpus.txt", "--tokens", "500", "--layer", "1")


def test_an_edit_file_computes_the_same_edit_again(place, knowedit):
    given = ("--set", "metric.gain=0.8", "--set", "target.steps=3", "--seed", "4", *CORPUS)
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *given)
    made = Edit.load(place / "a.safetensors")
    assert made.config["metric"]["gain"] == 0.8 and made.config["layers"] == [1]
    assert made.config["material"]["seed"] == 4
    said = knowedit("edit", "--config", "a.safetensors", "-o", "b.safetensors")
    again = Edit.load(place / "b.safetensors")
    assert "the same bits as a.safetensors" in said and again.key == made.key
    assert again.config == made.config and again.facts == made.facts
    other = ("--set", "metric.gain=0.5", "-o", "c.safetensors")
    said = knowedit("edit", "--config", "a.safetensors", *other)
    assert "not the same bits as a.safetensors" in said
    assert Edit.load(place / "c.safetensors").config["metric"]["gain"] == 0.5


def test_an_edit_file_works_from_every_folder(place, knowedit, monkeypatch):
    """Its paths stand from its own folder, names stay names, and so it may move with them."""
    (place / "made").mkdir()
    given = ("--method", "neuron-patch", "--set", "tokens=300", "--set", "steps=3")
    edit = ("edit", "model", "facts.jsonl", *given, "--layer", "2", "--corpus", "corpus.txt*2")
    knowedit(*edit, "-o", "made/a.safetensors")
    made = Edit.load(place / "made" / "a.safetensors")
    run = made.report.details["run"]
    assert run["model"] == "../model" and run["corpus"] == ["../corpus.txt*2"]
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    said = knowedit("edit", "--config", "../made/a.safetensors", "-o", "b.safetensors")
    assert "the same bits as ../made/a.safetensors" in said
    again = Edit.load("b.safetensors")
    assert again.report.details["run"] == run
    names = {"model": "owner/name", "corpus": ["wikipedia", "self"], "statistics": "/there"}
    assert recorded.kept(names, Path("a")) == recorded.found(names, Path("a")) == names


def test_an_edit_file_may_have_any_name(place, knowedit):
    """It is known by what is in it: as --config, as facts, to look into, and to write over."""
    knowedit("edit", "model", "facts.jsonl", "-o", "lyon", "--set", "target.steps=2", *CORPUS)
    for name in ("lyon.yaml", "lyon.jsonl"):
        (place / name).write_bytes((place / "lyon").read_bytes())
    made = Edit.load(place / "lyon")
    for name in ("lyon", "lyon.yaml"):
        assert f"the same bits as {name}" in knowedit("edit", "--config", name, "-o", name)
    for name in ("lyon", "lyon.jsonl"):
        assert made.key in knowedit("inspect", name)
    knowedit("edit", "model", "lyon.jsonl", "-o", "b", "--set", "target.steps=2", *CORPUS)
    assert Edit.load(place / "b").key == made.key


@pytest.mark.parametrize("method", ["ft-l", "memit"])
def test_the_same_edit_is_the_same_file(place, knowedit, method):
    """Byte for byte: what it cost to compute stays out."""
    steps = "steps=2" if method == "ft-l" else "target.steps=2"
    given = ("--method", method, "--set", steps, *(CORPUS if method == "memit" else CORPUS[-2:]))
    said = knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *given, "--json")
    knowedit("edit", "--config", "a.safetensors", "-o", "b.safetensors")
    assert (place / "a.safetensors").read_bytes() == (place / "b.safetensors").read_bytes()
    assert ("seconds" in json.loads(said)["report"]) == (method == "ft-l")


def test_an_edit_of_another_model_is_refused(place, knowedit, tiny_gpt2):
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *CORPUS)
    tiny_gpt2.hf.save_pretrained(place / "other")
    tiny_gpt2.tokenizer.save_pretrained(place / "other")
    again = ("edit", "other", "--config", "a.safetensors", "-o", "b.safetensors")
    assert "was made for a model with fingerprint" in knowedit(*again, code=1)
    assert not (place / "b.safetensors").exists()


@pytest.mark.parametrize("form", ["yaml", "json", "method"])
def test_a_record_computes_the_same_edit(place, knowedit, form):
    given = ("--method", "emmet", "--set", "target.steps=2", *CORPUS)
    knowedit("edit", "model", "facts.jsonl", "-o", "a.safetensors", *given)
    made = Edit.load(place / "a.safetensors")
    options = {
        "model": "model",
        "facts": "facts.jsonl",
        "method": made.config,
        "corpus": "corpus.txt",
        "tokens": 500,
    }
    text, rest = json.dumps(options), ()
    if form == "yaml":
        text = "model: model\nfacts: facts.jsonl\nmethod: emmet\nset: {target.steps: 2}\n"
        text += "corpus: [corpus.txt]\ntokens: 500\nlayer: 1\n"
    elif form == "method":
        text, rest = json.dumps(made.config), ("model", "facts.jsonl", *CORPUS[:4])
    name = "r.json" if form != "yaml" else "r.yaml"
    (place / name).write_text(text)
    knowedit("edit", *rest, "--config", name, "-o", "b.safetensors")
    assert Edit.load(place / "b.safetensors").key == made.key


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methdo: memit", "no option 'methdo'; did you mean 'method'?"),
        ("- 1", "expected names and values"),
        ("a: [", "neither YAML nor JSON"),
        ("kind: memitt", "unknown method 'memitt'; did you mean 'memit'?"),
        ("{kind: memit, gian: 1}", "memit has no setting 'gian'"),
        ("tokens: [1, 2]", "tokens is one value"),
        ("", "r.yaml is empty; write options into it"),
    ],
)
def test_wrong_records_are_refused_before_a_model_is_loaded(place, knowedit, text, message):
    (place / "r.yaml").write_text(text)
    said = knowedit("edit", "no", "facts.jsonl", "--config", "r.yaml", "-o", "x", code=1)
    assert said.startswith("error: ") and message in said


def test_a_grid_is_one_table(place, knowedit):
    (place / "grid.yaml").write_text(
        "model: model\ndataset: facts.jsonl\ncorpus: corpus.txt\ntokens: 500\nmethods: [memit]\n"
        "grid: {metric.gain: [0.5, 0.9], layers: [[1]], target.steps: [2]}\n"
    )
    said = knowedit("eval", "--config", "grid.yaml", "-o", "run", "--quiet")
    lines = said.splitlines()
    assert lines[0].split()[:2] == ["method", "metric.gain"] and len(lines) == 5
    assert [line.split()[0] for line in lines[1:]] == ["unedited", "MEMIT", "MEMIT", "efficacy:"]
    record = json.loads(knowedit("eval", "--config", "grid.yaml", "--limit", "1", "--json"))
    assert record["sweep"]["limit"] == 1 and len(record["rows"]) == 2
    refused = ("eval", "--config", "grid.yaml", "--method", "rome")
    assert "does not go with a grid" in knowedit(*refused, code=1)


def test_options_by_name_where_there_is_no_method(place, knowedit):
    trace = ("trace", "model", "The capital of France is", "--subject", "France", "--json")
    set_here = knowedit(*trace, "--set", "samples=2", "--set", "kind=mlp")
    assert set_here == knowedit(*trace, "--samples", "2", "--kind", "mlp")
    (place / "t.yaml").write_text("{samples: 2, kind: [mlp], noise: 1.0}")
    assert knowedit(*trace, "--config", "t.yaml", "--noise", "3.0") == set_here
    assert "no setting 'sampels'; did you mean 'samples'?" in knowedit(
        *trace, "--set", "sampels=2", code=1
    )


@pytest.mark.parametrize("old", sorted(OLD))
def test_old_spellings_name_the_new_one(knowedit, old):
    said = knowedit("eval", "model", old, "1", code=1)
    assert said == f"error: {old} is now {OLD[old]}; see knowedit eval --help\n"


def test_what_we_say_has_no_old_spelling():
    """Neither do errors with a remedy, nor help, nor pages."""
    old = re.compile(rf"({'|'.join(sorted(OLD))})(?![\w-])")
    root = Path(ke.__file__).parent
    files = [path for path in root.rglob("*.*") if path.suffix in (".py", ".j2", ".md", ".yaml")]
    found = {path.name: old.findall(path.read_text("utf-8")) for path in files}
    assert len(files) > 200 and [name for name, words in found.items() if words] == ["commands.py"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--method", "{bad"), "--method '{bad' begins like a record and is not JSON"),
        (("--dtype", "float17"), "dtype must be float32, bfloat16, float16 or auto"),
        (("--dtype", "int8"), "dtype must be float32, bfloat16, float16 or auto"),
        (("-o", "."), "error: . is a folder; name a file to write"),
        (("--set", "gain=.5x"), "covariance.gain must be a number, got str '.5x'"),
        (("--set", "steps=-1"), "hidden-state.steps must be at least 1, got -1"),
    ],
)
def test_what_an_option_cannot_be(knowedit, option, said):
    assert said in knowedit("edit", "model", "facts.jsonl", "-o", "a", *option, code=1)


@pytest.mark.parametrize("option", ["--seed=-1", "--tokens=0", "--batch=0", "--every=0"])
def test_a_number_that_an_option_cannot_have(knowedit, option):
    said = knowedit("eval", "model", option, code=2)
    assert f"invalid value for '{option.partition('=')[0]}'" in said and "or equal to" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["memit,rome"], "--method memit --method rome"),
        (["memitt"], "did you mean 'memit'?"),
    ],
)
def test_methods_by_name(given, message):
    with pytest.raises(KnowEditError, match=message):
        parse_methods(given)


def test_a_seed_that_a_method_does_not_use_is_said(capsys):
    parse_methods(["memit"], seed=3)
    assert capsys.readouterr().err == ""
    assert parse_methods(["mend"], seed=3) == parse_methods(["mend"])
    assert "draws no random numbers; --seed does not change its edits" in capsys.readouterr().err


def test_set_wins_over_a_file_and_may_be_repeated(place, knowedit):
    trace = ("trace", "model", "The capital of France is", "--subject", "France", "--json")
    (place / "t.yaml").write_text("{samples: 3, kind: [hidden], seed: 4}")
    given = (
        "--set",
        "samples=2",
        "--config",
        "t.yaml",
        "--set",
        "kind=mlp",
        "--set",
        "kind=hidden",
    )
    wanted = ("--samples", "2", "--kind", "mlp", "--kind", "hidden", "--seed", "4")
    assert knowedit(*trace, *given) == knowedit(*trace, *wanted)


def test_set_is_added_to_what_a_file_sets(place, knowedit):
    """The command line wins, wherever --config stands."""
    (place / "r.yaml").write_text("set: {target.steps: 2, metric.gain: 0.5}")
    given = ("edit", "model", "facts.jsonl", "-o", "a", "--set", "metric.gain=0.8", *CORPUS)
    knowedit(*given, "--config", "r.yaml")
    made = Edit.load(place / "a").config
    assert made["target"]["steps"] == 2 and made["metric"]["gain"] == 0.8
    (place / "t.yaml").write_text("set: {samples: 3, kind: [attention]}\nnoise: 1.0")
    trace = ("trace", "model", "The capital of France is", "--subject", "France", "--json")
    found = knowedit(*trace, "--set", "kind=mlp", "--config", "t.yaml")
    assert found == knowedit(*trace, "--samples", "3", "--kind", "mlp", "--noise", "1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("geometry", "no"), "has no setting 'stesp'"),
        (("study", "arithmetic", "no", "--method", "ft"), "ft has no setting 'stesp'; did you"),
        (("demo", "no"), "neuron-patch has no setting 'stesp'"),
    ],
)
def test_commands_with_methods_of_their_own_refuse_what_these_do_not_have(knowedit, words, message):
    assert message in knowedit(*words, "--set", "stesp=3", code=1)


def test_the_seed_draws_the_statistics(place, knowedit):
    """Another seed is another sample of the model's own texts; files are read in order."""
    given = ("edit", "model", "facts.jsonl", "--tokens", "300", "--layer", "1", "--seed", "3")
    given += ("--set", "target.steps=1")
    seeds = {}
    for corpus in ("self", "corpus.txt"):
        knowedit(*given, "--corpus", corpus, "-o", f"{corpus}.safetensors")
        listed = json.loads(knowedit("stats", "ls", "--json"))
        (where,) = [row["folder"] for row in listed if row["corpus"] == corpus]
        (header,) = json.loads(knowedit("stats", "show", where, "--json"))
        seeds[corpus] = header["recipe"]["seed"]
    assert seeds == {"self": 3, "corpus.txt": 0}
    assert "the same bits" in knowedit("edit", "--config", "self.safetensors", "-o", "again")


def test_methods_from_options():
    made = parse_methods(["memit", "rome"], ["target.steps=7"], ["3"], 5)
    assert [method.target.steps for method in made] == [7, 7]
    assert [method.layers for method in made] == [(3,), (3,)] and made[0].material.seed == 5
    assert parse_methods([json.dumps(made[0].to_dict())]) == made[:1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ke.MEMIT(layers="x"), "memit.layers must be .*a list of whole numbers.* 'x'"),
        (lambda: ke.Covariance(gain="0.9"), "covariance.gain must be .*a number.* '0.9'"),
        (lambda: ke.MEMIT(metric=3), "memit.metric must be a metric"),
        (lambda: ke.make_method("memit", {"gain": "0.9"}), "covariance.gain must be"),
        (lambda: ke.make_method("memit", {"values": {}}), "memit has no setting 'values'"),
    ],
)
def test_wrong_types_are_errors_of_ours_that_name_the_field(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
    assert ke.MEMIT(layers=5).layers == (5,)


@dataclass(frozen=True)
class Pace(Config):
    """How fast.

    Attributes:
        steps: of Adam, one
            after the other.
        limit, lr: numbers.
    """

    steps: int = 3
    lr: float | None = None


@dataclass(frozen=True)
class Training(Config):
    """Settings.

    Attributes:
        rank: of the network.
    """

    rank: int = 8
    names: tuple[str, ...] = ("a",)
    facts: int = 2
    first: Pace = field(default_factory=Pace)
    second: Pace = field(default_factory=lambda: Pace(5))


def test_options_are_made_from_the_fields_of_a_dataclass():
    made = {option.name: option for option in options_of(Training())}
    assert list(made) == ["rank", "steps", "lr"]  # no list, and no name of an earlier version
    assert made["steps"].help == "Of Adam, one after the other." and made["rank"].opts == ["--rank"]
    assert made["steps"].show_default == "first: 3, second: 5"
    assert attribute_help(Pace)["lr"] == attribute_help(Pace)["limit"] == "Numbers."
    given = changed(Training(), {"steps": 9}, ["second.steps=2", 'names=["b"]', "facts=4"])
    assert given == Training(8, ("b",), 4, Pace(9), Pace(2))
    with pytest.raises(ConfigError, match="no setting 'rnak'; did you mean 'rank'?"):
        changed(Training(), {}, ["rnak=3"])
    with pytest.raises(ConfigError, match="'steps' could be first.steps, second.steps"):
        changed(Training(), {}, ["steps=3"])


def test_the_lists(knowedit):
    names = {row["name"] for row in json.loads(knowedit("methods", "--json"))}
    assert {"memit", "rome", "alphaedit", "recipe"} <= names
    assert "metric.gain" in knowedit("methods", "memit")
    assert json.loads(knowedit("methods", "memit", "--json")) == ke.MEMIT().to_dict()
    assert "did you mean 'memit'?" in knowedit("methods", "memitt", code=1)
    sets = {row["name"]: row for row in json.loads(knowedit("datasets", "--json"))}
    assert sets["embedded"]["here"] and "counterfact" in sets
    assert "embedded.jsonl" in knowedit("datasets")
    listed = json.loads(knowedit("models", "--json"))
    assert any(shape["origin"] == "measured" for shape in listed["presets"])
    assert "google/gemma-3-270m" in {copy["copy of"] for copy in listed["copies"]}
    assert "published" in knowedit("models") and "Gemma Terms of Use" in knowedit("models")
    assert knowedit("models", "--get", "model").strip() == "model"


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_hides_notes(place, knowedit, capsys, quiet):
    knowedit("edit", "model", "facts.jsonl", "-o", "a", *CORPUS, *(["--quiet"] if quiet else []))
    say("a note")
    assert capsys.readouterr().err == ("" if quiet else "a note\n")


def test_edits_as_json(place, knowedit):
    """Every --json in these tests is held to the reference's keys (`CommandLine`)."""
    memit = ("--method", "memit", "--set", "target.steps=1", *CORPUS[:4])
    for line in (
        ("edit", "model", "facts.jsonl", "-o", "a.safetensors", "--layer", "1", *memit),
        ("apply", "model", "a.safetensors", "-o", "edited", "--stream"),
        ("diff", "model", "edited"),
        ("inspect", "edited"),
        ("undo", "edited"),
        ("export", "model", "a.safetensors", "-o", "adapter"),
        ("eval", "model", "--dataset", "facts.jsonl", "--layer", "1", *memit),
    ):
        assert knowedit(*line, "--json")
    seen = json.loads(knowedit("inspect", "a.safetensors", "--json"))
    assert seen["kind"] == "edit" and seen["weights"] == {"model.layers.1.mlp.down_proj.weight": 2}
    assert json.loads(knowedit("inspect", "facts.jsonl", "--json"))["facts"] == seen["facts"]
    stream = ("--stream", "--dtype", "float32", "--force")
    said = knowedit("apply", "model", "a.safetensors", "-o", "b", *stream, code=1)
    assert "--stream loads no model; leave --dtype float32 out" in said
    assert "of 39 weights differ" in knowedit("diff", "model", "a.safetensors")


def test_every_command_with_json_says_its_keys():
    def named(command, path):
        for name, found in getattr(command, "commands", {}).items():
            yield from named(found, [*path, name])
        if any("--json" in option.opts for option in command.params):
            yield " ".join(path)

    assert set(named(typer.main.get_command(app), [])) == set(JSON)
    averaged = {field.name: 0 for field in fields(AverageTrace)}
    assert JSON["trace"][1].fits(averaged) and not JSON["trace"][0].fits(averaged)


def test_what_fits_the_reference():
    printed = Printed("a, b, [c]", "list")
    assert printed.fits([]) and printed.fits([{"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}])
    for wrong in ({"a": 1, "b": 2}, [{"a": 1}], [{"a": 1, "b": 2, "d": 4}], [1]):
        assert not printed.fits(wrong)
    assert Printed("a, ...").fits({"a": 1, "z": 2}) and not Printed("a, ...").fits({"z": 2})
    by_file = Printed("a", "file: list")
    assert by_file.fits({"x": [{"a": 1}]}) and not by_file.fits({"x": {"a": 1}})


def test_the_reference_is_up_to_date(request):
    page = request.config.rootpath / "docs" / "cli.md"
    assert page.read_text(encoding="utf-8") == reference(), "make it again as its head says"
