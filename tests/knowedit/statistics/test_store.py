"""Statistics files: ours and the peers', what is refused and why, and the commands that look after
them.
"""

import json
import pickle
import sys

import numpy as np
import pytest
import torch

from knowedit.cli.app import main
from knowedit.errors import StatisticsError
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.files import npz, store, verify

MODULE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(
        "\n\n".join(
            f"The river number {i} flows north to the town of {i * 7919 % 1000}."
            for i in range(300)
        )
    )
    return path


@pytest.fixture
def collected(tiny_llama, corpus, tmp_path):
    """Layers 1 and 2 of the tiny Llama, under a hub-like name."""
    tiny_llama.name = "owner/tiny"
    return key_statistics(tiny_llama, [1, 2], corpus, 4000, directory=tmp_path / "ours")


def peer_file(path, total, count=4000, **members):
    """As the peers write it: numpy.savez with these names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {
        "mom2.constructor": "x.SecondMoment()",
        "mom2.count": count,
        "mom2.mom2": total,
        "sample_size": 100,
        **members,
    }
    np.savez(path, **members)
    return path


@pytest.mark.parametrize(
    ("style", "folder"),
    [("rome", "owner_tiny"), ("memit", "owner_tiny"), ("easyedit", "tiny"), ("alphaedit", "tiny")],
)
def test_export_uses_the_names_and_members_of_the_peers(collected, tmp_path, style, folder):
    path = npz.write(tmp_path / "stats", collected[1], style, dataset="wikitext", sample_size=500)
    assert path == tmp_path / "stats" / folder / "wikitext_stats" / f"{MODULE}_float32_mom2_500.npz"
    with np.load(path, allow_pickle=False) as members:
        assert set(members.files) == {"mom2.constructor", "mom2.count", "mom2.mom2", "sample_size"}
        assert members["mom2.count"].dtype == np.int64 and members["mom2.count"] == 4000
        assert members["mom2.mom2"].dtype == np.float32 and members["sample_size"] == 500
        moment = torch.from_numpy(members["mom2.mom2"]) / members["mom2.count"].item()
    assert torch.allclose(moment.double(), collected.moment(1), rtol=1e-6, atol=0)


def test_export_and_import_keep_everything_but_float64(tiny_llama, collected, tmp_path):
    made, findings = npz.take(npz.write(tmp_path, collected[1], "rome"), tiny_llama)
    assert (made.total - collected[1].total).norm() <= 1e-7 * collected[1].total.norm()
    assert (made.layer, made.module, made.count) == (1, MODULE, 4000) and all(
        f.ok for f in findings
    )
    assert not made.recipe.skip_first and made.recipe.fingerprint == tiny_llama.fingerprint
    made.save(store.layer_file(tmp_path / "imported", 1))
    loaded = KeyStatistics.load(tmp_path / "imported")
    loaded.check(tiny_llama, [1])
    assert loaded.metric(1).dim == tiny_llama.d_ff and not loaded.is_sink(1)


def test_what_is_no_second_moment_is_refused(tiny_llama, collected, tmp_path):
    good = collected[1].total.numpy()
    skewed, negative, holed = good.copy(), good.copy(), good.copy()
    skewed[0, 1] *= 1.5
    negative[3, 3] = -negative[3, 3]
    holed[2, 2] = np.nan
    for total, count, message in (
        (skewed, 4000, "symmetric"),
        (negative, 4000, "positive semidefinite"),
        (holed, 4000, "NaN or infinite"),
        (good, 0, "0 tokens"),
        (good, 20, "rank: 48 of 48 directions, from 20 tokens"),
        (good[:, :40], 4000, "square"),
        (good[:40, :40], 4000, "size 40, the layer's keys have 48"),
    ):
        path = peer_file(tmp_path / f"{MODULE}_float32_mom2_100.npz", total, count)
        with pytest.raises(StatisticsError, match=message):
            npz.take(path, tiny_llama)


def test_another_models_or_layers_file_is_refused(
    tiny_llama, tiny_gpt2, collected, corpus, tmp_path
):
    other = key_statistics(tiny_gpt2, [1], corpus, 4000, directory=tmp_path / "gpt2")
    with pytest.raises(
        StatisticsError,
        match=r"is of transformer.h.1.mlp.c_proj, owner/tiny has modules like model.layers.0",
    ):
        npz.take(npz.write(tmp_path, other[1], "rome"), tiny_llama)
    for wrong in (other[1].total, collected[2].total):  # the right name on the wrong keys
        path = peer_file(tmp_path / "x" / f"{MODULE}_float32_mom2_100.npz", wrong.numpy())
        with pytest.raises(
            StatisticsError, match="keys alike: channel energies correlate.*collect your own"
        ):
            npz.take(path, tiny_llama)
    path = peer_file(tmp_path / "nameless.npz", collected[1].total.numpy())
    with pytest.raises(StatisticsError, match="does not say which layer"):
        npz.take(path, tiny_llama)
    assert npz.take(path, tiny_llama, layer=1)[0].layer == 1
    named = npz.write(tmp_path, collected[1], "easyedit")
    with pytest.raises(StatisticsError, match="is of layer 1 by its name, not of layer 2"):
        npz.take(named, tiny_llama, layer=2)


class Bomb:
    def __reduce__(self):
        return (print, ("unpickled!",))


def test_no_pickle_is_ever_loaded(tiny_llama, collected, tmp_path, capsys):
    path = peer_file(tmp_path / "a.npz", np.array([[Bomb()]], dtype=object))
    bare = tmp_path / "b.npz"
    bare.write_bytes(pickle.dumps(Bomb()))
    for bad in (path, bare):
        with pytest.raises(StatisticsError, match="never loaded"):
            npz.read(bad)
    assert "unpickled!" not in capsys.readouterr().out
    (tmp_path / "c.npz").write_bytes(npz.write(tmp_path, collected[1], "rome").read_bytes()[:-500])
    with pytest.raises(StatisticsError, match=r"c\.npz cannot be read as \.npz"):
        npz.read(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", v_star=np.zeros(3))
    with pytest.raises(StatisticsError, match=r"holds v_star, and no mom2\.mom2"):
        npz.read(tmp_path / "d.npz")
    with pytest.raises(StatisticsError, match="no such file"):
        npz.read(tmp_path / "e.npz")


def test_sound_files_pass_and_damaged_sums_do_not(tiny_llama, tiny_gpt2, collected):
    assert all(
        f.ok for f in [*verify.sound(collected[1]), *verify.belongs(collected[1], tiny_llama)]
    )
    refused = {f.name for f in verify.belongs(collected[1], tiny_gpt2) if not f.ok}
    assert {"same weights", "same module"} <= refused
    collected[1].extra["audit"]["bias"] = 1e-3
    assert "accumulation error" in {f.name for f in verify.sound(collected[1]) if not f.ok}


def test_real_keys_tell_layers_apart(smollm, data, tmp_path):
    """On the real model a few hundred keys are enough to know the layer a file is of."""
    found = key_statistics(
        smollm,
        [4, 5],
        data / "wikitext2_raw_valid.txt.gz",
        4000,
        directory=tmp_path,
        progress=False,
    )
    seen = {layer: verify.sample(smollm, layer) for layer in (4, 5)}
    for layer in (4, 5):
        for other in (4, 5):
            assert verify.resembles(found[layer].total, found[layer].count, seen[other]).ok == (
                layer == other
            )


@pytest.fixture
def knowedit(monkeypatch, capsys, tmp_path, collected, tiny_llama):
    """Run a command line in a folder with the model and its statistics."""
    tiny_llama.hf.save_pretrained(tmp_path / "model")
    tiny_llama.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["knowedit", "stats", *arguments])
        capsys.readouterr()
        left = 0
        try:
            main()
        except SystemExit as stop:
            left = stop.code or 0
        said = capsys.readouterr()
        assert left == code, said.out + said.err
        return said.out if code == 0 else said.out + said.err

    return run


def test_ls_show_verify(knowedit, tmp_path):
    said = knowedit("ls", "ours")
    assert "owner/tiny  layers 1, 2  4,000 tokens of corpus.txt" in said
    assert json.loads(knowedit("ls", "ours", "--json"))[0]["layers"] == [1, 2]
    assert "no statistics in" in knowedit("ls")
    said = knowedit("show", "ours", "--plot", "picture.png")
    assert said.count("key statistics of") == 2 and "drawn into picture.png" in said
    assert "error of solve" not in said  # all of it is in one window: no halves to compare
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        json.loads(knowedit("show", "ours/layer-002.safetensors", "--json"))[0]["module"]
        == "model.layers.2.mlp.down_proj"
    )
    assert "ends in .png" in knowedit("show", "ours", "--plot", "picture.txt", code=1)
    said = knowedit("verify", "ours", "--model", "model")
    assert "FAIL" not in said and said.count("ok   same weights") == 2
    (tmp_path / "ours" / "layer-002.safetensors").write_bytes(b"short")
    assert "truncated or damaged" in knowedit("verify", "ours", code=1)
    assert "no such file" in knowedit("show", "nowhere", code=1)


def test_export_import_and_a_foreign_file(knowedit, tmp_path, tiny_gpt2, corpus):
    paths = knowedit("export", "ours", "-o", "stats", "--format", "easyedit").split()
    assert paths[0] == f"stats/tiny/wikipedia_stats/{MODULE}_float32_mom2_100000.npz"
    assert "FAIL" not in knowedit("verify", paths[0], "--model", "model")
    assert "layer 1, 4,000 tokens" in knowedit("import", "model", *paths, "-o", "taken")
    assert KeyStatistics.load(tmp_path / "taken").layers == [1, 2]
    assert "exists; choose another folder" in knowedit(
        "import", "model", paths[0], "-o", "taken", code=1
    )
    other = key_statistics(tiny_gpt2, [1], corpus, 1000, directory=tmp_path / "gpt2")
    foreign = peer_file(tmp_path / f"{MODULE}_float32_mom2_100.npz", other[1].total.numpy(), 1000)
    said = knowedit("verify", str(foreign), "--model", "model", code=1)
    assert "FAIL keys alike" in said and "1 of 1 files failed" in said
    assert "is refused (keys alike" in knowedit("import", "model", str(foreign), "-o", "no", code=1)
    assert not (tmp_path / "no").exists()
    assert "format 'pickle' is not known" in knowedit(
        "export", "ours", "-o", "x", "--format", "pickle", code=1
    )


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
    said = knowedit(
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
    line = said.splitlines()[1].split()
    assert line[0] == "1" and line[-1].startswith("±") and float(line[-1][1:-1]) <= 30
    found = KeyStatistics.load(tmp_path / "mixed")[1]
    assert found.recipe.corpus["name"] == "corpus.txt*1, more.txt*2" and not found.recipe.skip_first
    assert found.recipe.until == "solve" and 30_000 < found.count < 90_000
    assert "error of solve     ±" in knowedit("show", "mixed")
    assert "must be one of tokens, solve" in knowedit("model", *options, "--until", "soon", code=1)
