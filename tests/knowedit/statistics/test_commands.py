"""The commands that collect statistics and look after their files (unit)."""

import json

import pytest

from knowedit.io.files import cache_dir
from knowedit.io.tensors import write_file
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.files.store import header as header_of
from tests.knowedit.commandline import CommandLine
from tests.knowedit.statistics.helpers import MODULE, peer_file, save_model


@pytest.fixture
def knowedit(monkeypatch, capsys, tmp_path, collected, tiny_llama):
    """Run a command line in a folder with the model and its statistics."""
    save_model(tiny_llama, tmp_path / "model")
    return CommandLine(monkeypatch, capsys, tmp_path, "stats")


def test_ls_show_verify(knowedit, tmp_path):
    output = knowedit("ls", "ours")
    assert "owner/tiny  layers 1, 2  4,000 tokens of corpus.txt" in output
    assert json.loads(knowedit("ls", "ours", "--json"))[0]["layers"] == [1, 2]
    assert "no statistics in" in knowedit("ls")
    output = knowedit("show", "ours", "--plot", "picture.png")
    assert output.count("key statistics of") == 2
    assert "error of solve" not in output  # all of it is in one window: no halves to compare
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        json.loads(knowedit("show", "ours/layer-002.safetensors", "--json"))[0]["module"]
        == "model.layers.2.mlp.down_proj"
    )
    assert "ends in .png" in knowedit("show", "ours", "--plot", "picture.txt", code=1)
    output = knowedit("verify", "ours", "--model", "model")
    assert "FAIL" not in output and output.count("ok   same weights") == 2
    found = json.loads(knowedit("verify", "ours", "--json"))
    assert len(found) == 2 and all(one["ok"] for file in found.values() for one in file)
    (tmp_path / "ours" / "layer-002.safetensors").write_bytes(b"short")
    output = knowedit("verify", "ours", code=1)
    assert "ok   " in output and "FAIL readable" in output and "truncated or damaged" in output
    header = header_of(tmp_path / "ours" / "layer-001.safetensors")
    write_file(tmp_path / "ours" / "layer-003.safetensors", {}, {**header, "recipe": None})
    output = knowedit("ls", "ours", code=1)  # the sound one is listed all the same
    assert "owner/tiny  layer 1  4,000 tokens of corpus.txt" in output
    assert "error: 2 of 3 files cannot be read: ours/layer-002.safetensors, ours/layer-0" in output
    assert "delete it and collect again" in output
    assert "no such file" in knowedit("show", "nowhere", code=1)


def test_export_import_and_a_foreign_file(knowedit, tmp_path, tiny_gpt2, river_corpus):
    made = json.loads(knowedit("export", "ours", "-o", "stats", "--format", "easyedit", "--json"))
    paths = [one["file"] for one in made]
    assert [one["layer"] for one in made] == [1, 2]
    assert paths[0] == f"stats/tiny/wikipedia_stats/{MODULE}_float32_mom2_100000.npz"
    assert "FAIL" not in knowedit("verify", paths[0], "--model", "model")
    assert "layer 1, 4,000 tokens" in knowedit("import", "model", *paths, "-o", "taken")
    assert KeyStatistics.load(tmp_path / "taken").layers == [1, 2]
    (taken,) = json.loads(knowedit("import", "model", paths[0], "-o", "again", "--json"))
    assert (taken["layer"], taken["tokens"]) == (1, 4000)
    assert "exists; choose another folder" in knowedit(
        "import", "model", paths[0], "-o", "taken", code=1
    )
    other = key_statistics(tiny_gpt2, [1], river_corpus, 1000, directory=tmp_path / "gpt2")
    foreign = peer_file(tmp_path / f"{MODULE}_float32_mom2_100.npz", other[1].total.numpy(), 1000)
    output = knowedit("verify", str(foreign), "--model", "model", code=1)
    assert "FAIL keys alike" in output and "1 of 1 files failed" in output
    assert "is refused (keys alike" in knowedit("import", "model", str(foreign), "-o", "no", code=1)
    assert not (tmp_path / "no").exists()
    assert "format 'pickle' is not known" in knowedit(
        "export", "ours", "-o", "x", "--format", "pickle", code=1
    )


def test_tokens_are_deleted(knowedit):
    old = cache_dir("tokens") / "old"
    old.mkdir()
    (old / "window").write_bytes(bytes(1000))
    assert json.loads(knowedit("clean", "--json"))["deleted"] >= 1000 and not old.exists()
    assert "0 bytes of tokens deleted" in knowedit("clean")


def test_collecting_from_the_command_line(knowedit, tmp_path):
    (tmp_path / "more.txt").write_text(
        "\n\n".join(f"Line {i} of the other text, which is about bread." for i in range(3000))
    )
    options = (
        "--corpus",
        "corpus.txt*1",
        "--corpus",
        "more.txt*2",
        "--layer",
        "1",
        "--max-length",
        "64",
        "-o",
        "mixed",
    )
    output = knowedit(
        "model",
        *options,
        "--tokens",
        "90000",
        "--until",
        "solve",
        "--tolerance",
        "0.3",
        "--first-tokens",
    )
    line = output.splitlines()[1].split()
    assert line[0] == "1" and line[-1].startswith("±") and float(line[-1][1:-1]) <= 30
    found = KeyStatistics.load(tmp_path / "mixed")[1]
    assert found.recipe.corpus["name"] == "corpus.txt*1, more.txt*2" and not found.recipe.skip_first
    assert found.recipe.until == "solve" and 30_000 < found.count < 90_000
    assert "error of solve     ±" in knowedit("show", "mixed")
    assert "must be one of tokens, solve" in knowedit("model", *options, "--until", "soon", code=1)
