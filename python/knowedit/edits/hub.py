"""Edits as repositories of the Hugging Face hub: one file and a card. Names, arguments and
behaviour are those of peft and transformers, so that there is nothing to learn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowedit.edits.card import card, said_of
from knowedit.errors import EditError

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

FILE = "edit.safetensors"
CARD = "README.md"


def write_pretrained(edit: Edit, folder: str | Path) -> Path:
    """Write `folder/edit.safetensors` and its card; the folder may exist. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    edit.save(folder / FILE)
    (folder / CARD).write_text(_card(edit), encoding="utf-8")
    return folder


def push(
    edit: Edit,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    api: Any = None,
) -> Any:
    """Upload what `write_pretrained` writes; makes the repository where there is none. Returns the
    hub's `CommitInfo`. Raises EditError: the hub refuses or is out of reach.

    Args:
        repo_id: "OWNER/NAME".
        revision: the branch, made where it is missing.
        api: a `huggingface_hub.HfApi` of another endpoint; default: the hub's.
    """
    api = api or _api(token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=write_pretrained(edit, temporary),
                commit_message=commit_message or "Upload edit",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
    except Exception as error:  # the hub client's own, the http library's and the system's errors
        raise EditError(
            f"the edit could not be pushed to {repo_id!r}: {_first_line(error)}; `edit.save"
            "_pretrained(FOLDER)` writes the same files to the disk"
        ) from error


def find(
    name: str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    api: Any = None,
) -> Path:
    """The edit's file of a folder, a file itself, or a repository of the hub (downloaded once).

    Raises:
        EditError: there is none.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise EditError(f"{path} holds no {FILE}; save_pretrained writes one")
        return path / FILE
    if path.is_file():
        return path
    try:
        return Path(
            (api or _api(token)).hf_hub_download(
                str(name),
                FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        )
    except Exception as error:
        raise EditError(
            f"{str(name)!r} is neither a folder or file here nor an edit on the hub: "
            f"{_first_line(error)}"
        ) from error


def _api(token: bool | str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _card(edit: Edit) -> str:
    """The card of a repository that holds an edit alone."""
    base = edit.report.details.get("run", {}).get("model")
    opening = (
        f"An edit of the model with fingerprint `{edit.fingerprint}`, and refused on any other:\n\n"
        '```python\nimport knowedit as ke\n\nke.Edit.from_pretrained("THIS_REPOSITORY").apply(model'
        ")\n```"
    )
    return card("knowedit", base, f"An edit of {base or 'a model'}", opening, [said_of(edit)])
