"""Unit: files that the first version wrote (commit 9e9dd4f) are read, applied and gone on from, and
today's records keep all that made an edit.

`files/v1` holds what that commit wrote for two small models of random weights, a Llama in float32
and a GPT-2 in bfloat16; `applied.safetensors` has the changed weights as they were with each edit
applied. The models are those of the edited folders, with the edit taken back.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from knowedit.edits.changes import Dense, LowRank, oversized
from knowedit.edits.edit import Edit
from knowedit.edits.export.folder import restore
from knowedit.edits.export.listing import export_format, formats
from knowedit.edits.history import History
from knowedit.edits.journal import edits_in
from knowedit.edits.report import EditReport
from knowedit.errors import ConfigError, EditError
from knowedit.facts.fact import Fact
from knowedit.io.tensors import format_of, read_file, write_file
from knowedit.methods import MEMIT, MEND, FineTuning
from knowedit.methods.learned.mend.network import MendNetwork
from knowedit.methods.learned.serac import network as serac_network
from knowedit.methods.learned.serac.memory import MemoryEdit
from knowedit.methods.locate.metrics import Covariance
from knowedit.methods.session import Session
from knowedit.models.fingerprint import weights_fingerprint
from knowedit.models.load import load_model
from tests.knowedit.edits.test_edit import an_edit
from tests.knowedit.methods.helpers import FACTS, VALUES, statistics_of, target_of

V1 = Path(__file__).parent / "files" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
WEIGHTS = sorted(set(EXPECTED) - {"serac-llama", "history-llama"})
SPAIN = Fact(prompt="The capital of {} is", subject="Spain", target="Oslo")


@pytest.fixture
def of_v1(tmp_path):
    """A model that the files are of, by name."""

    def loaded(name):
        folder = tmp_path / name
        shutil.copytree(V1 / f"edited-{name}", folder)
        assert restore(folder) == EXPECTED[f"memit-{name}"]["before"]
        return load_model(str(folder))

    return loaded


def same_weights(model, name):
    """The weights are those of then, but for the last bit: processors without fused multiply-add
    round once more.
    """
    wanted = load_file(V1 / "applied.safetensors")
    found = [full for full in wanted if full.partition("/")[0] == name]
    for full in found:
        now = model.hf.get_parameter(full.partition("/")[2])
        rtol = 1e-6 if now.dtype == torch.float32 else 0.008
        torch.testing.assert_close(now.detach(), wanted[full], rtol=rtol, atol=1e-6)
    return {full.partition("/")[2] for full in found}


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_edit_of_the_first_version_gives_the_same_weights(of_v1, tmp_path, name):
    wanted = EXPECTED[name]
    model = of_v1(wanted["model"])
    assert model.fingerprint == wanted["before"]
    edit = Edit.load(V1 / f"{name}.safetensors")
    assert edit.method_name == wanted["method"] and isinstance(edit.report, EditReport)
    again = Edit.load(edit.save(tmp_path / "again.safetensors"))
    assert format_of(tmp_path / "again.safetensors") == "knowedit-edit/3"
    for read in (edit, again):
        with read.applied_to(model):
            assert same_weights(model, name) == set(edit.by_parameter(model))
        assert weights_fingerprint(model.hf) == wanted["before"]
    assert again.key == edit.key and again.report.record() == edit.report.record()
    with pytest.raises(EditError, match="does not record the settings"):
        edit.method()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_edited_folder_of_the_first_version_is_the_edit_applied(tmp_path, name):
    edited = load_model(str(V1 / f"edited-{name}"))
    assert same_weights(edited, f"memit-{name}")


def test_patches_of_the_first_version_still_exclude_each_other(of_v1):
    model = of_v1("llama")
    one, other = (Edit.load(V1 / f"neuron-patch-{n}llama.safetensors") for n in ("", "other-"))
    assert one.exclusive == other.exclusive == {"layer 1 neuron 0", "layer 1 neuron 8"}
    with one.applied_to(model), pytest.raises(EditError, match="both rewrite layer 1 neuron 0"):
        other.apply(model)


def test_a_history_of_the_first_version_goes_on(of_v1, tmp_path):
    wanted, model = EXPECTED["history-llama"], of_v1("llama")
    read = History.load(V1 / "history-llama.safetensors")
    assert len(read) == 2 and len(edits_in(V1 / "history-llama.safetensors")) == 2
    read.replay(model)
    assert same_weights(model, "history-llama")
    again = History.load(read.save(tmp_path / "again.safetensors"))
    assert format_of(tmp_path / "again.safetensors") == "knowedit-history/4"
    again.check(model)
    method = MEMIT(layers=(0, 1), target=target_of(VALUES))
    session = Session(method, model, statistics_of(model, (0, 1)), again)
    third = session.write([SPAIN], progress=False)
    assert set(third.keys) == {0, 1} and len(session.history) == 3
    assert same_weights(model, "history-llama-third")
    torch.testing.assert_close(session.history.keys(0)[:, :1], read.keys(0)[:, :1], rtol=0, atol=0)
    for _ in range(3):
        session.undo()
    assert weights_fingerprint(model.hf) == wanted["before"]


def test_an_edit_file_has_no_keys_for_a_history(of_v1, tmp_path):
    model = of_v1("llama")
    old = Edit.load(V1 / "memit-llama.safetensors")
    made = MEMIT(layers=(0,), target=target_of(VALUES)).compute(
        model, FACTS[:1], statistics_of(model, (0,)), progress=False
    )
    new = Edit.load(made.save(tmp_path / "a.safetensors"))
    for edit in (old, new, Edit.load(new.save(tmp_path / "b.safetensors"))):
        with pytest.raises(EditError, match="without its keys"):
            History(model.fingerprint).add(edit)
    trained = Edit.load(V1 / "ft-l-llama.safetensors")  # was written at none
    History(model.fingerprint).add(trained)


def test_networks_of_the_first_version_edit_as_then(of_v1):
    model = of_v1("llama")
    network = MendNetwork.load(V1 / "mend-network-llama.safetensors", model)
    stored = Edit.load(V1 / "mend-llama.safetensors")
    made = MEND(network).compute(model, stored.facts, progress=False)
    then = stored.by_parameter(model)
    assert set(made.changes) == set(then)
    for name, change in made.changes.items():
        torch.testing.assert_close(change.dense(), then[name].dense(), rtol=1e-3, atol=1e-5)


def test_a_memory_edit_of_the_first_version_answers_as_then(of_v1, tmp_path, monkeypatch):
    for name, size in (("HEADS", 2), ("WIDTH", 4), ("SIZE", 8)):  # the file is kept small
        monkeypatch.setattr(serac_network, name, size)
    model, wanted = of_v1("llama"), EXPECTED["serac-llama"]
    serac_network.SeracNetwork.load(V1 / "serac-network-llama.safetensors", model)
    edit = Edit.load(V1 / "serac-llama.safetensors")
    again = Edit.load(edit.save(tmp_path / "again.safetensors"))
    assert format_of(tmp_path / "again.safetensors") == "knowedit-memory/2"
    for read in (edit, again):
        assert isinstance(read, MemoryEdit) and read.key == wanted["key"]
        with read.applied_to(model):
            prompts = [FACTS[0].text, "It is said that Miles Davis plays the"]
            assert model.router.route(prompts) == wanted["route"]
        assert model.router is None


# -- today's records ------------------------------------------------------------------------------


def made_by(method, model, layers=(1,)):
    return method.compute(model, FACTS[:2], statistics_of(model, layers), progress=False)


def test_the_method_comes_back_from_the_file_and_computes_the_same_edit(tiny_llama, tmp_path):
    method = MEMIT(layers=(1,), target=target_of(VALUES), metric=Covariance(gain=0.8))
    edit = made_by(method, tiny_llama)
    read = Edit.load(edit.save(tmp_path / "a.safetensors"))
    assert read.method() == method and read.config == edit.config == method.to_dict()
    assert made_by(read.method(), tiny_llama).key == edit.key
    assert set(read.software) >= {"knowedit-kernels", "torch", "transformers", "python"}
    assert read.statistics["1"] == statistics_of(tiny_llama, (1,)).identity["1"]
    assert (read.report, read.key_layers) == (edit.report, (1,))


def test_every_edit_of_a_batch_of_single_ones_has_the_record(tiny_llama):
    method = MEMIT(layers=(1,), target=target_of(VALUES))
    statistics = statistics_of(tiny_llama, (0, 1))
    for edit in method.compute_each(tiny_llama, FACTS[:2], statistics, progress=False):
        assert edit.method() == method and set(edit.statistics) == {"1"} and edit.software
    trained = next(iter(FineTuning(steps=1).compute_each(tiny_llama, FACTS[:1])))
    assert trained.method() == FineTuning(steps=1) and trained.statistics == {}


def test_a_setting_that_is_an_object_cannot_come_back(of_v1, tmp_path):
    model = of_v1("llama")
    network = MendNetwork.load(V1 / "mend-network-llama.safetensors", model)
    network.file = None  # as one that was just trained
    edit = Edit.load(MEND(network).compute(model, FACTS[:1]).save(tmp_path / "a.safetensors"))
    with pytest.raises(ConfigError, match="an object"):
        edit.method()


def test_a_file_of_a_newer_version_says_so(tiny_llama, tmp_path):
    path = an_edit(tiny_llama).save(tmp_path / "a.safetensors")
    header, tensors = read_file(path, Edit.format, "an edit")
    write_file(path, tensors, {**header, "format": "knowedit-edit/99"})
    with pytest.raises(EditError, match="written by a newer version"):
        Edit.load(path)
    write_file(path, tensors, {**header, "format": "knowedit-other/1"})
    with pytest.raises(EditError, match="not an edit of this version"):
        Edit.load(path)
    with pytest.raises(EditError, match="not a history of this version"):
        History.load(path)


def test_a_report_goes_to_a_flat_record_and_back():
    report = EditReport(gain=0.9, layers={"1": {"gain": 0.9}}, details={"loss": 0.1})
    record = report.to_dict()
    assert record == {
        "loss": 0.1,
        "gain": 0.9,
        "relative_norm": {},
        "layers": {"1": {"gain": 0.9}},
        "warnings": [],
    }
    assert EditReport.from_dict(record) == report
    with pytest.raises(EditError, match="may not be called gain"):
        EditReport(details={"gain": 1.0})


def test_a_layer_with_several_changes_is_named_by_the_model(tiny_llama):
    edit = an_edit(tiny_llama)
    name = tiny_llama.layout.weight_name(1)
    assert edit.delta(1).equal(edit.delta(name))
    attention = name.replace("mlp.down_proj", "self_attn.q_proj")
    edit.changes[attention] = Dense(torch.zeros(32, 32))
    assert edit.delta(1, tiny_llama).equal(edit.delta(name))
    with pytest.raises(EditError, match=r"2 parameters at 1"):
        edit.delta(1)
    with pytest.raises(EditError, match=r"no parameter at .*layers\.3\."):
        edit.delta(3, tiny_llama)


def test_a_change_that_does_not_fit_is_refused(tiny_gpt2):
    edit = an_edit(tiny_gpt2)
    name = tiny_gpt2.layout.weight_name(1)
    for change in (
        LowRank(torch.zeros(5, 1), torch.zeros(48, 1)),
        Dense(torch.zeros(32, 48)),  # as a Llama stores it
    ):
        with pytest.raises(EditError, match="does not fit"):
            replace(edit, changes={name: change}).apply(tiny_gpt2)


def test_reprs_fit_a_screen(tiny_llama):
    edit = an_edit(tiny_llama, layers=(0, 1, 2))
    edit.facts = [replace(edit.facts[0], prompt="{} " + 40 * "long ")] * 50
    history = History(tiny_llama.fingerprint, [edit] * 40)
    for shown in (repr(edit), repr(history)):
        assert len(shown.splitlines()) <= 10 and max(map(len, shown.splitlines())) <= 120
    assert edit.key in repr(edit) and "and 49 more" in repr(edit) and "40 edits" in repr(history)


# -- export formats -------------------------------------------------------------------------------


def test_a_format_is_a_module_of_its_name():
    assert set(formats()) == {"folder", "gguf-lora", "peft"} and all(formats().values())
    with pytest.raises(EditError, match="did you mean 'peft'"):
        export_format("petf")


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_rank_beyond_the_width_is_the_width_in_an_adapter(shape):
    generator = torch.Generator().manual_seed(0)
    change = LowRank(*(torch.randn(side, 9, generator=generator) for side in shape))
    least = change.least()
    assert least.rank == min(shape) and least.least() is least
    exact = change.U.double() @ change.V.double().T
    torch.testing.assert_close(least.U.double() @ least.V.double().T, exact, rtol=1e-6, atol=1e-6)
    (note,) = oversized({"m": change, "small": least, "dense": Dense(change.dense())})
    times = 9 * sum(shape) / math.prod(shape)
    assert f"factors of rank 9 of m, {times:.1f} times" in note
    assert note.endswith(f"rank {min(shape)}") and oversized({"small": least}) == []


def test_several_edits_make_one_adapter(tiny_llama, tmp_path):
    from peft import PeftModel

    edits = [an_edit(tiny_llama, seed, size=0.1) for seed in (1, 2)]
    folder = export_format("peft")(tiny_llama, edits, tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    with edits[0].applied_to(tiny_llama), edits[1].applied_to(tiny_llama):
        written = tiny_llama.hf(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(tiny_llama.hf, folder)(input_ids=ids).logits
    torch.testing.assert_close(adapted, written, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "field, value",
    [
        ("fingerprint", {"a": 1}),
        ("setup", 0.5),
        ("setup", "no pair"),
        ("report.gain", [[1]]),
        ("report.gain", "high"),
        ("report.warnings", 0.5),
        ("report.warnings", [1]),
        ("report.relative_norm", {"1": "large"}),
        ("report.layers", {"1": 2}),
        ("report.steps", ["x"]),
        ("report.measured", 3),
    ],
)
def test_a_record_with_parts_of_other_kinds_is_no_edit(tiny_llama, tmp_path, field, value):
    path = tmp_path / "a.safetensors"
    an_edit(tiny_llama).save(path)
    header, tensors = read_file(path, Edit.format, "an edit")
    *outer, name = field.split(".")
    (header[outer[0]] if outer else header)[name] = value
    write_file(path, tensors, header)
    with pytest.raises(EditError, match="is not an edit of this version"):
        Edit.load(path)
