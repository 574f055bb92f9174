"""The peers' files: names, members, and what is refused and why (unit)."""

import pickle

import numpy as np
import pytest
import torch

from knowedit.errors import StatisticsError
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.files import npz, store
from tests.knowedit.statistics.helpers import MODULE, peer_file


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
    made, findings = npz.import_layer(npz.write(tmp_path, collected[1], "rome"), tiny_llama)
    assert (made.total - collected[1].total).norm() <= 1e-7 * collected[1].total.norm()
    assert (made.layer, made.module, made.count) == (1, MODULE, 4000) and all(
        f.ok for f in findings
    )
    assert not made.recipe.skip_first and made.recipe.fingerprint == tiny_llama.fingerprint
    made.save(store.layer_file(tmp_path / "imported", 1))
    loaded = KeyStatistics.load(tmp_path / "imported")
    loaded.check(tiny_llama, [1])
    assert loaded.metric(1).dim == tiny_llama.d_ff


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
            npz.import_layer(path, tiny_llama)


def test_another_models_or_layers_file_is_refused(
    tiny_llama, tiny_gpt2, collected, river_corpus, tmp_path
):
    other = key_statistics(tiny_gpt2, [1], river_corpus, 4000, directory=tmp_path / "gpt2")
    with pytest.raises(
        StatisticsError,
        match=r"is of transformer.h.1.mlp.c_proj, owner/tiny has modules like model.layers.0",
    ):
        npz.import_layer(npz.write(tmp_path, other[1], "rome"), tiny_llama)
    for wrong in (other[1].total, collected[2].total):  # the right name on the wrong keys
        path = peer_file(tmp_path / "x" / f"{MODULE}_float32_mom2_100.npz", wrong.numpy())
        with pytest.raises(
            StatisticsError, match="keys alike: channel energies correlate.*collect your own"
        ):
            npz.import_layer(path, tiny_llama)
    path = peer_file(tmp_path / "nameless.npz", collected[1].total.numpy())
    with pytest.raises(StatisticsError, match="does not say which layer"):
        npz.import_layer(path, tiny_llama)
    assert npz.import_layer(path, tiny_llama, layer=1)[0].layer == 1
    named = npz.write(tmp_path, collected[1], "easyedit")
    with pytest.raises(StatisticsError, match="is of layer 1 by its name, not of layer 2"):
        npz.import_layer(named, tiny_llama, layer=2)


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
