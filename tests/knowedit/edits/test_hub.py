"""Edits go to a folder or a repository and come back, with a card that says what they are; the
hub is a stand-in that keeps what it is sent (unit).
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from knowedit import Edit, evaluate
from knowedit.edits.export.folder import save_edited
from knowedit.edits.measured import measure
from knowedit.errors import EditError
from tests.knowedit.edits.test_edit import an_edit


class Hub:
    """A folder that answers as `huggingface_hub.HfApi` does."""

    def __init__(self, folder):
        self.folder, self.asked = folder, []

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.asked.append(("create", private))
        return SimpleNamespace(repo_id=f"somebody/{repo_id}")  # as the hub completes a bare name

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.asked.append(("branch", branch))

    def upload_folder(self, *, repo_id, folder_path, commit_message, revision, **_):
        self.asked.append((repo_id, commit_message, revision))
        shutil.copytree(folder_path, self.folder / repo_id)
        return SimpleNamespace(oid="0" * 40)

    def hf_hub_download(self, repo_id, filename, **_):
        if not (self.folder / repo_id / filename).exists():
            raise FileNotFoundError(repo_id)
        return str(self.folder / repo_id / filename)


@pytest.fixture
def edit(tiny_llama):
    made = an_edit(tiny_llama)
    made.report.add_measured(measure(tiny_llama, made))
    made.config = {"method": "test", "gain": 0.9}
    evaluate(tiny_llama, made, made.facts, progress=False).keep_in(made)
    return made


def test_an_edit_goes_to_the_hub_and_comes_back(edit, tmp_path):
    hub = Hub(tmp_path)
    found = edit.push_to_hub("fixed", private=True, revision="tested", api=hub)
    assert found.oid == "0" * 40
    assert hub.asked == [
        ("create", True),
        ("branch", "tested"),
        ("somebody/fixed", "Upload edit", "tested"),
    ]
    back = Edit.from_pretrained("somebody/fixed", api=hub)
    assert back.key == edit.key and back.facts == edit.facts
    with pytest.raises(EditError, match=r"'somebody/other' is neither a folder.*hub"):
        Edit.from_pretrained("somebody/other", api=hub)


def test_a_folder_a_file_and_what_is_none(edit, tmp_path):
    folder = edit.save_pretrained(tmp_path / "edit")
    for name in (folder, str(folder), folder / "edit.safetensors"):
        assert Edit.from_pretrained(name).key == edit.key
    with pytest.raises(EditError, match=r"holds no edit\.safetensors"):
        Edit.from_pretrained(tmp_path)


def test_what_the_hub_says_is_passed_on(edit):
    class Closed(Hub):
        def create_repo(self, *_, **__):
            raise PermissionError("403 Forbidden\nand more")

    with pytest.raises(EditError, match=r"'a/b': PermissionError: 403 Forbidden; `edit\.save_pre"):
        edit.push_to_hub("a/b", api=Closed(Path()))


def test_cards_say_facts_method_settings_and_measures(tiny_llama, edit, tmp_path):
    edit.report.details["run"] = {"model": "somebody/base"}
    places = {
        "knowedit": edit.save_pretrained(tmp_path / "edit"),
        "peft": edit.export(tmp_path / "adapter", tiny_llama),
        "transformers": save_edited(tiny_llama, [edit], tmp_path / "folder"),
    }
    fact, measured = edit.facts[0], edit.report.measured
    for library, folder in places.items():
        card = ModelCard.load(folder / "README.md")
        base = "somebody/base" if library == "knowedit" else "tiny-llama"
        assert (card.data.library_name, card.data.base_model) == (library, base)
        assert f"| {fact.text} | {fact.target} | TEST |" in card.text
        assert f"{measured.perplexity_before:.2f} -> {measured.perplexity:.2f}" in card.text
        settings = card.text.partition("```json")[2].partition("```")[0]
        assert json.loads(settings) == edit.config
        efficacy = edit.report.details["evaluation"]["after"]["efficacy"]["success"]
        assert f"{efficacy['mean']:.3f} [{efficacy['low']:.3f}, " in card.text


def test_a_path_is_no_base_model(edit, tmp_path):
    edit.report.details["run"] = {"model": "/home/me/model"}
    folder = edit.save_pretrained(tmp_path / "edit")
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict()
