"""A copy of the whole model, edited, that any transformers user can load, beside the record that
takes every bit back.

The record is a safetensors file, but not named as one: many loaders take every `*.safetensors` of a
folder, some of its sub-folders too, and would put the original weights over the edited ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from knowedit.edits.card import card, said_of
from knowedit.edits.changes import Change, read_changes, write_changes
from knowedit.edits.places import pieces, places, said
from knowedit.errors import EditError
from knowedit.facts.fact import Fact
from knowedit.io.files import atomic_file, atomic_folder, disk_errors
from knowedit.io.progress import no_bars_of_transformers
from knowedit.io.tensors import checksum, read_file, understood, write_file
from knowedit.models.checkpoint import Checkpoint
from knowedit.models.editable import EditableModel
from knowedit.models.experts import split_name
from knowedit.models.gguf import as_plain
from knowedit.models.load import accepts_model, fingerprint_of
from knowedit_kernels.lowrank import WeightLedger

if TYPE_CHECKING:
    from knowedit.edits.edit import Edit

RECORD = "knowedit.undo"
FORMAT = "knowedit-undo/2"
EARLIER_RECORD = "knowedit-undo.safetensors"  # which loaders took for weights
EARLIER = ("knowedit-undo/1",)  # read, and brought to today's form by `read_record`
ORIGINAL = "original."  # before a parameter's name: its bits as they were
CARD = "README.md"
BASE_CARD = "README.base.md"  # the card of the model that was edited, where its folder had one
CONFIG, ENTRY = "config.json", "knowedit"


@accepts_model
def save_edited(model: EditableModel, edits: Sequence[Edit], folder: str | Path) -> Path:
    """Save `model` with `edits` written into its weights, and the original bits of those weights
    beside it; the model card and the configuration say what was written.

    The folder appears whole or not at all; the model in memory is left as it was found.

    Raises:
        EditError: an edit does not fit, the folder exists already, or transformers writes an edited
            weight as a part of another one. OSError: the disk refuses.
    """
    if not edits:
        raise EditError("no edits to apply; name at least one edit file")
    if active := model.ledger.active:
        raise EditError(
            f"{model.name} has active edits ({', '.join(active)}); undo them and name them with "
            f"the others"
        )
    names = sorted({name for edit in edits for name in edit.by_parameter(model)})
    originals = {name: model.stored(name).detach().cpu().clone() for name in names}
    header = header_of(model, edits)
    try:
        with ExitStack() as applied:
            for edit in edits:
                applied.enter_context(edit.applied_to(model))
            applied.enter_context(as_plain(model.hf))
            with atomic_folder(folder) as temporary, disk_errors(folder):
                _write_folder(temporary, model, edits, originals, header)
    except FileExistsError as error:
        raise EditError(str(error)) from error
    return Path(folder)


def header_of(model: EditableModel | Checkpoint, edits: Sequence[Edit]) -> dict[str, Any]:
    """What an undo record says of the model and its edits."""
    return {
        "format": FORMAT,
        "fingerprint": model.fingerprint,
        "model": model.name,
        "edits": [said_of(edit) for edit in edits],
    }


def _write_folder(
    folder: Path,
    model: EditableModel,
    edits: Sequence[Edit],
    originals: Mapping[str, Tensor],
    header: dict[str, Any],
) -> None:
    """Write the edited model as it is in memory, the record, and what the folder says of itself."""
    with no_bars_of_transformers():
        model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    edited = {name: model.stored(name).detach().cpu() for name in originals}
    stored = places(_weight_files(folder), edited)
    header["weights"] = {
        name: said({"transposed": model.is_transposed(name), **stored[name]}, edited[name])
        for name in originals
    }
    header[CONFIG] = config_of(folder).get(ENTRY)
    _write_record(folder, header, originals, {e.key: e.by_parameter(model) for e in edits})
    describe(folder, header)


def write(model: EditableModel, edits: Sequence[Edit], path: str | Path) -> Path:
    """`save_edited`, as every export format is called."""
    return save_edited(model, edits, path)


def record_of(folder: str | Path) -> Path:
    """The undo record of a folder; one with the name of an earlier version gets today's.

    Raises:
        EditError: the folder holds none.
    """
    folder = Path(folder)
    path, earlier = folder / RECORD, folder / EARLIER_RECORD
    if not path.exists() and earlier.exists():
        try:
            earlier.replace(path)
        except OSError:  # a folder that may only be read
            return earlier
    if not path.exists():
        raise EditError(
            f"{folder} holds no {RECORD}: it was not written by `knowedit apply`, or is already "
            f"undone"
        )
    return path


def facts_in(folder: str | Path) -> list[Fact]:
    """The facts that were written into an edited folder; none where it has no undo record.

    Raises:
        EditError: the record is damaged.
    """
    path = Path(folder)
    if not any((path / name).is_file() for name in (RECORD, EARLIER_RECORD)):
        return []
    header, _, _ = read_record(record_of(path))
    with understood(path / RECORD, "an undo record"):
        return [Fact.from_dict(fact) for made in header["edits"] for fact in made["facts"]]


def read_record(
    path: Path,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, dict[str, Change]]]:
    """The header of an undo record, the original weights by parameter, and the changes of each edit
    by its key: none where there is only one edit, or in a file of the first version.

    Raises:
        EditError: missing, damaged, or of another kind.
    """
    header, tensors = read_file(path, (FORMAT, *EARLIER), "an undo record")
    if header["format"] in EARLIER:
        return header, tensors, {}
    with understood(path, "an undo record"):
        originals = {
            name.removeprefix(ORIGINAL): tensors.pop(name)
            for name in sorted(tensors)
            if name.startswith(ORIGINAL)
        }
        changes = {
            made["key"]: read_changes(
                {
                    full.partition(".")[2]: tensor
                    for full, tensor in tensors.items()
                    if full.partition(".")[0] == str(number)
                }
            )
            for number, made in enumerate(header["edits"])
        }
        _check_header(header, originals)
    return header, originals, changes


def _check_header(header: Mapping[str, Any], originals: Mapping[str, Tensor]) -> None:
    """Raise an error of any kind where the header lacks what an undo needs, or has something else
    in its place: before the first file is touched.
    """
    texts = [header["fingerprint"], header["model"]]
    for made in header["edits"]:
        texts += [made["method"], made["key"]]
        for fact in made["facts"]:
            Fact.from_dict(fact)
    for name in originals:
        weight = header["weights"][name]
        for part, _ in pieces(weight, originals[name]):
            texts += [part["tensor"], part["edited"]]
        if not isinstance(weight["transposed"], bool):
            raise TypeError(f"weights.{name}.transposed is {weight['transposed']!r}")
    if other := next((text for text in texts if not isinstance(text, str)), None):
        raise TypeError(f"text was expected in the place of {other!r}")


def restore(folder: str | Path, only: Iterable[str] = ()) -> str:
    """Put the original bits back into a folder written by `save_edited`, or take back some of its
    edits.

    Each weight file is replaced in one step and the record goes last, so an interrupted undo is
    finished by running it again.

    Args:
        only: keys of edits, or how they begin; none: all of them.

    Returns:
        The fingerprint of the model that is left.

    Raises:
        EditError: the folder holds no record or no such edit, or the result is not the model the
            edits were made on.
    """
    folder = Path(folder)
    path = record_of(folder)
    header, originals, changes = read_record(path)
    left = [
        made for made in header["edits"] if made not in _named(header["edits"], [*only], folder)
    ]
    if left:
        return _take_back(folder, header, originals, changes, left)
    weights = header.get("weights", {})
    found = fingerprint_of(folder, originals)
    if found != header["fingerprint"]:
        raise EditError(
            f"{folder}: after the undo its fingerprint would be {found[:12]}, before the edit it "
            f"was {header['fingerprint'][:12]}: other weights were changed too, and nothing was "
            "written; take the original model again"
        )
    as_files = {
        part["tensor"]: bits
        for name, tensor in originals.items()
        for part, bits in pieces(weights[name] if weights else {"tensor": name}, tensor)
    }
    _replace(folder, as_files)
    if weights:
        _forget(folder, header)
    path.unlink(missing_ok=True)
    return found


def _take_back(
    folder: Path,
    header: dict[str, Any],
    originals: Mapping[str, Tensor],
    changes: Mapping[str, Mapping[str, Change]],
    left: list[dict[str, Any]],
) -> str:
    """Leave the edits `left` in the folder, computed anew from the original weights; returns the
    fingerprint.
    """
    if not all(made["key"] in changes for made in left):
        raise EditError(
            f"{folder} was written by an earlier version, which kept no changes: undo all of its "
            "edits, and apply those you want again"
        )
    weights = header["weights"]
    now = {name: tensor.clone() for name, tensor in originals.items()}
    with understood(folder / RECORD, "an undo record"):  # its parts fit, before a file is touched
        ledger = WeightLedger(now, [name for name in now if weights[name]["transposed"]])
        for made in left:
            ledger.add_many(made["key"], {n: c.raw for n, c in changes[made["key"]].items()})
    parts = [piece for name, tensor in now.items() for piece in pieces(weights[name], tensor)]
    expected = {part["tensor"]: {part["edited"], checksum(bits)} for part, bits in parts}
    _replace(folder, {part["tensor"]: bits for part, bits in parts}, expected)
    kept = {
        name: said(weights[name], now[name])
        for name in now
        if any(name in changes[made["key"]] for made in left)
    }
    before = _card(header)
    header = {**header, "edits": left, "weights": kept}
    _write_record(
        folder,
        header,
        {name: originals[name] for name in kept},
        {made["key"]: changes[made["key"]] for made in left},
    )
    if _text(folder / CARD) == before:
        describe(folder, header)
    return fingerprint_of(folder)


def _named(
    made: Sequence[dict[str, Any]], only: Sequence[str], folder: Path
) -> Sequence[dict[str, Any]]:
    """The edits whose keys begin with one of `only`; all where it is empty. Raises EditError for
    one that means none or several.
    """
    if not only:
        return made
    found = []
    for name in only:
        like = [one for one in made if one["key"].startswith(name)]
        if len(like) != 1:
            known = ", ".join(one["key"] for one in made)
            raise EditError(
                f"{folder} holds {len(like) or 'no'} edits called {name!r}; its edits: {known}"
            )
        found += like
    return found


# -- the files
# -------------------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*.safetensors")) if file.name != EARLIER_RECORD]


def _replace(
    folder: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, set[str]] = {},
) -> None:
    """Put `tensors` in the place of those of these names in the folder's weight files.

    Args:
        expected: checksums of what may be there; none: anything.

    Raises:
        EditError: they are in none of the files, or something else is there.
    """
    left = set(tensors)
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                metadata, known = opened.metadata(), set(opened.keys())
            here = {name for name in left if split_name(name)[0] in known}
            if not here:
                continue
            held = load_file(file)
        except SafetensorError as error:
            raise EditError(
                f"{file} is truncated or damaged ({error}); take the original model again"
            ) from error
        for name in here if expected else ():
            if checksum(_part(held, name)) not in expected[name]:
                raise EditError(
                    f"{file}: {name} was changed since the edit was written; undo all edits to get "
                    "the original weights back"
                )
        for name in here:
            if name in held:
                held[name] = tensors[name].contiguous()
            else:
                _part(held, name).copy_(tensors[name])
        with atomic_file(file) as temporary, disk_errors(file):
            save_file(held, temporary, metadata=metadata)
        left -= here
    if left:
        raise EditError(
            f"{folder}: the weights {sorted(left)} of the undo record are in none of its files"
        )


def _part(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The tensor of that name, or one expert's matrix in one."""
    parameter, expert = split_name(name)
    return tensors[parameter] if expert is None else tensors[parameter][expert]


def _write_record(
    folder: Path,
    header: Mapping[str, Any],
    originals: Mapping[str, Tensor],
    changes: Mapping[str, Mapping[str, Change]],
) -> None:
    """The undo record: the original weights and, where one of several edits may be taken back
    alone, the changes of each.
    """
    tensors = {f"{ORIGINAL}{name}": tensor for name, tensor in originals.items()}
    for number, made in enumerate(header["edits"] if len(changes) > 1 else ()):
        parts = write_changes(changes[made["key"]])
        tensors |= {f"{number}.{name}": tensor for name, tensor in parts.items()}
    write_file(folder / RECORD, tensors, header)


# -- what the folder says of itself
# -------------------------------------------------------------------------------------------------


def describe(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the model card, and what was edited into the configuration."""
    with atomic_file(folder / CARD) as temporary:
        temporary.write_text(_card(header), encoding="utf-8")
    edits = [
        {"key": made["key"], "method": made["method"], "facts": len(made["facts"])}
        for made in header["edits"]
    ]
    entry = {"base": header["model"], "base_fingerprint": header["fingerprint"], "edits": edits}
    _set_entry(folder, entry)


def _forget(folder: Path, header: Mapping[str, Any]) -> None:
    """Remove what `describe` wrote; a card that someone else has changed is left."""
    if _text(folder / CARD) == _card(header):
        (folder / CARD).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            (folder / BASE_CARD).replace(folder / CARD)
    _set_entry(folder, header[CONFIG])


def _card(header: Mapping[str, Any]) -> str:
    """The model card of an edited folder, the same for the same header."""
    weights = "\n".join(f"- `{parameter}`" for parameter in sorted(header["weights"]))
    return card(
        "transformers",
        header["model"],
        f"{header['model']}, edited",
        f"A copy of this model (fingerprint `{header['fingerprint']}`) with facts written into its "
        "weights:",
        header["edits"],
        f"The weights that differ from the original:\n\n{weights}\n\n"
        f"`knowedit undo FOLDER` puts every bit back; `{RECORD}` is the record it needs, and no "
        "part of the model.",
    )


def config_of(folder: Path) -> dict[str, Any]:
    """The fields of the folder's configuration."""
    found = json.loads((folder / CONFIG).read_text("utf-8"))
    return found if isinstance(found, dict) else {}


def _set_entry(folder: Path, entry: Any) -> None:
    """Change what the folder's configuration says of edits; None: nothing. Written as transformers
    writes it.
    """
    with suppress(FileNotFoundError):
        record = {name: part for name, part in config_of(folder).items() if name != ENTRY}
        record |= {} if entry is None else {ENTRY: entry}
        with atomic_file(folder / CONFIG) as temporary:
            text = json.dumps(record, indent=2, sort_keys=True)
            temporary.write_text(f"{text}\n", encoding="utf-8")


def _text(path: Path) -> str | None:
    """A file's text; None where there is none."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
