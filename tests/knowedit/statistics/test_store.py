"""Our files: read back as they were written, also those of the first version (unit).

`files/` was written by the first version, from 120 documents and layer 1 of a Llama of four layers
with random weights: a layer's statistics, a checkpoint of the same collection after two windows,
and the statistics exported for ROME.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from knowedit.errors import StatisticsError
from knowedit.io.ranks import Ranks
from knowedit.models.editable import EditableModel
from knowedit.statistics import KeyStatistics, key_statistics
from knowedit.statistics.corpus import windows
from knowedit.statistics.distributed.checkpoints import Checkpoints
from knowedit.statistics.files import npz, store
from knowedit_kernels import SecondMoment

FILES = Path(__file__).parent / "files"
LAYER = FILES / "layer-001.safetensors"
TRACE, SUM = 783123.3685368309, 928378.4777081736  # of the sums, as the first version had them


def test_pack_and_unpack():
    matrix = torch.randn(7, 7, dtype=torch.float64)
    matrix = matrix + matrix.T
    assert torch.equal(store.unpack_lower(store.pack_lower(matrix)), matrix)


def test_statistics_of_the_first_version_are_read():
    found = KeyStatistics.load(LAYER)
    layer = found[1]
    assert (layer.count, layer.model, layer.module) == (
        6000,
        "tiny-llama",
        "model.layers.1.mlp.down_proj",
    )
    assert float(layer.total.trace()) == pytest.approx(TRACE, rel=1e-14)
    assert float(layer.total.sum()) == pytest.approx(SUM, rel=1e-12)
    assert layer.recipe == store.CollectionRecipe(
        fingerprint="160cf162324016cf2b7cf513129c1aa7",
        corpus={
            "name": "corpus.txt",
            "files": [{"name": "corpus.txt", "sha256": "fc2b80b0d6753600"}],
        },
        tokens=6000,
        max_length=64,
        skip_first=True,
        seed=0,
        until="solve",
        tolerance=0.05,
    )
    assert [check["tokens"] for check in layer.extra["convergence"]] == [
        2019,
        3042,
        4065,
        5088,
        6000,
    ]
    assert found.metric(1).dim == 48


def test_what_the_first_version_exported_is_what_it_stored():
    peer = npz.read(FILES / "model.layers.1.mlp.down_proj_float32_mom2_100000.npz")
    ours = KeyStatistics.load(LAYER)[1].total
    assert peer.count == 6000 and (peer.total - ours).norm() <= 1e-7 * ours.norm()


def test_a_checkpoint_of_the_first_version_is_gone_on_from(tiny_llama, tmp_path, monkeypatch):
    """To the sums that the first version came to."""
    monkeypatch.setattr(windows, "SIZE", 1000)
    known = KeyStatistics.load(LAYER)[1]
    for path in FILES.glob("checkpoint-*"):
        shutil.copy(path, tmp_path)
    state, tally, moments = Checkpoints(tmp_path, [1], known.recipe, Ranks()).load()
    assert (state.windows, state.documents, state.counts) == (2, [23], [996, 1023])
    assert state.checks == {"1": known.extra["convergence"][:1]} and not state.converged
    assert (tally.padded, tally.text) == (2065, 2065) and set(moments) == {(0, 1), (1, 1)}
    moment = SecondMoment(48)
    moment.load_state_dict(moments[1, 1])
    assert moment.count == 1023
    # CPUs may draw other weights
    monkeypatch.setattr(EditableModel, "fingerprint", known.recipe.fingerprint)
    found = key_statistics(
        tiny_llama,
        [1],
        FILES / "corpus.txt",
        6000,
        until="solve",
        tolerance=0.05,
        max_length=64,
        directory=tmp_path,
    )[1]
    assert found.count == 6000 and (found.total - known.total).norm() <= 1e-6 * known.total.norm()
    assert [check["tokens"] for check in found.extra["convergence"]] == [
        check["tokens"] for check in known.extra["convergence"]
    ]


def rewritten(path, **changes):
    """The first version's file with another header."""
    header, tensors = store.read(LAYER)
    store.write(path, tensors, {**header, **changes})
    return path


def test_files_of_other_formats(tmp_path, monkeypatch):
    older = rewritten(tmp_path / "layer-001.safetensors", format="old/0", count=None, keys=6000)
    for reads in (store.header, store.LayerStatistics.load):
        with pytest.raises(StatisticsError, match=r"not a statistics file of this version.*old/0"):
            reads(older)

    def migrate(header):
        return {**header, "format": store.FORMAT, "count": header["keys"]}

    monkeypatch.setitem(store.MIGRATIONS, "old/0", migrate)
    assert store.header(older)["count"] == store.LayerStatistics.load(older).count == 6000
    assert torch.equal(KeyStatistics.load(older)[1].total, KeyStatistics.load(LAYER)[1].total)


def test_files_that_are_none_of_ours(tmp_path):
    strange = rewritten(tmp_path / "a.safetensors", recipe={"colour": "red"})
    with pytest.raises(StatisticsError, match="not a statistics file of this version.*colour"):
        store.LayerStatistics.load(strange)
    save_file({"weight": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(StatisticsError, match=r"b\.safetensors is not a statistics file.*None"):
        store.LayerStatistics.load(tmp_path / "b.safetensors")
    with pytest.raises(StatisticsError, match="there is no such statistics file"):
        store.LayerStatistics.load(tmp_path / "c.safetensors")


def test_the_same_weights_under_another_name_have_the_same_statistics(
    tiny_llama, corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    made = key_statistics(tiny_llama, [1], corpus, 100, progress=False)
    tiny_llama.name = "someone/another-name"
    monkeypatch.setattr("knowedit.statistics.keys.Collection", None)  # nothing is collected again
    assert key_statistics(tiny_llama, [1], corpus, 100)[1].digest == made[1].digest
