"""Whether a file is a second moment, and of this model (unit, model, data)."""

import pytest

from knowedit.statistics import key_statistics
from knowedit.statistics.files import verify


def test_sound_files_pass_and_damaged_sums_do_not(tiny_llama, tiny_gpt2, collected):
    assert all(
        f.ok for f in [*verify.sound(collected[1]), *verify.belongs(collected[1], tiny_llama)]
    )
    refused = {f.name for f in verify.belongs(collected[1], tiny_gpt2) if not f.ok}
    assert {"same weights", "same module"} <= refused
    collected[1].extra["audit"]["bias"] = 1e-3
    assert "accumulation error" in {f.name for f in verify.sound(collected[1]) if not f.ok}


@pytest.mark.model
@pytest.mark.data
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
