"""A copy of the whole model, edited, that any transformers user can load, beside the record that
takes every bit back.

The record is a safetensors file, but not named as one: many loaders take every `*.safetensors` of a
folder, some of its sub-folders too, and would put the original weights over the edited ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import NoneType
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
from knowedit.models.fingerprint import computing
from knowedit.models.gguf import as_plain
from knowedit.models.load import accepts_model, config_in, fingerprint_of
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
BECOMES = "becomes"  # the checksum that a part has once an undo that was begun is done
FORCE = "undo with force=True (--force)"


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
    header = header_of(model, edits, model.hf.config)
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


def header_of(
    model: EditableModel | Checkpoint, edits: Sequence[Edit], config: Any
) -> dict[str, Any]:
    """What an undo record says of the model, its configuration and its edits."""
    return {
        "format": FORMAT,
        "fingerprint": model.fingerprint,
        "model": model.name,
        "computes": [list(pair) for pair in computing(config)],
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
        numbers = {str(number) for number in range(len(header["edits"]))}
        if other := sorted(name for name in tensors if name.partition(".")[0] not in numbers):
            raise ValueError(f"the tensor {other[0]} is of no edit")
        _check_header(header, originals)
    return header, originals, changes


def _check_header(header: Mapping[str, Any], originals: Mapping[str, Tensor]) -> None:
    """Raise an error of any kind where the header lacks what an undo needs, or has something else
    in its place: before the first file is touched.
    """
    texts = {name: header[name] for name in ("fingerprint", "model")}
    if not isinstance(header["edits"], list) or not header["edits"]:
        raise TypeError(f"edits is {header['edits']!r}, not a list of what was written")
    for number, made in enumerate(header["edits"]):
        if not isinstance(made["facts"], list):
            raise TypeError(f"edits[{number}].facts is {made['facts']!r}, not a list")
        texts |= {f"edits[{number}].{name}": made[name] for name in ("method", "key")}
        for fact in made["facts"]:
            Fact.from_dict(fact)
    if other := sorted(set(header["weights"]) ^ set(originals)):
        raise ValueError(f"{other[0]} is either without its bits or without its record")
    for name in originals:
        weight = header["weights"][name]
        for part, _ in pieces(weight, originals[name]):
            texts |= {f"weights.{name}.{field}": part[field] for field in ("tensor", "edited")}
        if not isinstance(weight["transposed"], bool):
            raise TypeError(f"weights.{name}.transposed is {weight['transposed']!r}")
    for field, value in texts.items():
        if not isinstance(value, str):
            raise TypeError(f"{field} is {value!r}, not a text")
    pairs = header.get("computes", [])
    if not isinstance(pairs, list) or any(list(map(type, pair)) != [str, str] for pair in pairs):
        raise TypeError(f"computes is {pairs!r}, not pairs of texts")
    if not isinstance(header.get(CONFIG), (dict, NoneType)):
        raise TypeError(f"{CONFIG} is {header[CONFIG]!r}, not fields of a configuration")
    _card(header)  # says what is in the other fields, after the weights are back


def restore(
    folder: str | Path,
    only: Iterable[str] = (),
    *,
    force: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Put the original bits back into a folder written by `save_edited`, or take back some of its
    edits.

    Each weight file is replaced in one step and the record goes last, so an interrupted undo is
    finished by running it again.

    Args:
        only: keys of edits, or how they begin; none: all of them.
        force: also where weights or the configuration were changed since the edit: what was changed
            of the edited weights is lost, and what was changed beside them stays.
        trust_remote_code: run code that comes with the folder, as `load_model` does.

    Returns:
        The fingerprint of the model that is left.

    Raises:
        EditError: the folder holds no record or no such edit, it was changed since the edit, or the
            result is not the model the edits were made on; nothing was written then.
        ModelError: the folder's model cannot be loaded, or needs code of its own.
    """
    folder = Path(folder)
    path = record_of(folder)
    header, originals, changes = read_record(path)
    gone = _named(header["edits"], [*only], folder)
    left = [made for made in header["edits"] if made not in gone]
    if not force:
        _check_config(folder, header, trust_remote_code)
    if left:
        _take_back(folder, header, originals, changes, left, force)
        return fingerprint_of(folder, {}, trust_remote_code)
    weights = header.get("weights", {})
    back = {
        part["tensor"]: bits
        for name, tensor in originals.items()
        for part, bits in pieces(weights[name] if weights else {"tensor": name}, tensor)
    }
    _check_weights(folder, back, _known(weights, originals), force)
    found = fingerprint_of(folder, originals, trust_remote_code)
    if found != header["fingerprint"] and not force:
        raise EditError(
            f"{folder}: after the undo its fingerprint would be {found[:12]}, before the edit it "
            f"was {header['fingerprint'][:12]}: other weights were changed too, and nothing was "
            f"written; take the original model again, or {FORCE}, which leaves them as they are"
        )
    _replace(folder, back)
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
    force: bool,
) -> None:
    """Leave the edits `left` in the folder, computed anew from the original weights."""
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
    written = {
        part["tensor"]: bits
        for name, tensor in now.items()
        for part, bits in pieces(weights[name], tensor)
    }
    known = _known(weights, originals)
    for name, bits in written.items():
        known[name].add(checksum(bits))
    _check_weights(folder, written, known, force)
    # what any undo after an interruption of this one may find
    meant = {name: said(weights[name], now[name], BECOMES) for name in now}
    _write_record(folder, {**header, "weights": meant}, originals, changes)
    _replace(folder, written)
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


def _known(
    weights: Mapping[str, Mapping[str, Any]], originals: Mapping[str, Tensor]
) -> dict[str, set[str]]:
    """By tensor of the files, the checksums that it may have where nobody else wrote to it: edited,
    as it was, and as an undo that was interrupted left it. Empty for a record of the first version.
    """
    return {
        part["tensor"]: {part["edited"], part.get(BECOMES, ""), checksum(bits)}
        for name, weight in weights.items()
        if name in originals
        for part, bits in pieces(weight, originals[name])
    }


def _check_config(folder: Path, header: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise EditError where the folder's configuration computes something else with the weights
    than when the edit was written.
    """
    if "computes" not in header:  # a record of an earlier version
        return
    was = {(name, value) for name, value in header["computes"]}
    now = set(computing(config_in(folder, trust_remote_code)))
    if was != now:
        changed = sorted({name for name, _ in was ^ now})
        raise EditError(
            f"{folder / CONFIG} was changed since the edit was written: {', '.join(changed)} "
            f"({_values(changed, was)}; now {_values(changed, now)}); nothing was written: put "
            f"that back, or {FORCE}, which leaves the file as it is"
        )


def _values(names: Sequence[str], fields: set[tuple[str, str]]) -> str:
    """Of some fields of a configuration."""
    held = [next((value for other, value in fields if other == name), "unset") for name in names]
    return ", ".join(held)


def _check_weights(
    folder: Path, written: Mapping[str, Tensor], known: Mapping[str, set[str]], force: bool
) -> None:
    """Raise EditError unless the folder's files hold all of the tensors that are to be `written`,
    of their shapes, and each as nobody but an edit or an undo has left it.

    Args:
        known: checksums that a tensor may have; none: any.
        force: it may have any.
    """
    left, changed = set(written), []
    for file in _weight_files(folder):
        with _reading(file), safe_open(file, framework="pt") as opened:
            for name in sorted(left & _held(opened, left)):
                found = _tensor(opened, name)
                if found.shape != written[name].shape:
                    raise EditError(
                        f"{file}: {name} is {list(found.shape)}, and in the undo record "
                        f"{list(written[name].shape)}; take the original model again"
                    )
                if name in known and checksum(found) not in known[name]:
                    changed.append(name)
                left.discard(name)
    if left:
        raise EditError(
            f"{folder}: the weights {sorted(left)} of the undo record are in none of its files; "
            "nothing was written"
        )
    if changed and not force:
        raise EditError(
            f"{folder}: {', '.join(changed)} changed since the edit was written (by another "
            f"program, or a training); nothing was written: {FORCE}, which puts other numbers over "
            "that change, or take the original model again"
        )


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


def _held(opened: Any, names: Iterable[str]) -> set[str]:
    """Those of `names`, `NAME[expert]` for one of several matrices, that a file holds."""
    known = set(opened.keys())
    return {name for name in names if split_name(name)[0] in known}


def _tensor(opened: Any, name: str) -> Tensor:
    """One of those that `_held` finds."""
    parameter, expert = split_name(name)
    held = opened.get_slice(parameter)
    found: Tensor = held[:] if expert is None else held[expert]
    return found


def _replace(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors` in the place of those of these names in the folder's weight files; they are
    there (`_check_weights`).
    """
    for file in _weight_files(folder):
        with _reading(file):
            with safe_open(file, framework="pt") as opened:
                metadata, here = opened.metadata(), _held(opened, tensors)
            held = load_file(file) if here else {}
        for name in here:
            parameter, expert = split_name(name)
            if expert is None:
                held[name] = tensors[name].contiguous()
            else:
                held[parameter][expert].copy_(tensors[name])
        if here:
            with atomic_file(file) as temporary, disk_errors(file):
                save_file(held, temporary, metadata=metadata)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise EditError where a weight file cannot be read."""
    try:
        yield
    except (SafetensorError, LookupError, ValueError) as error:  # also: no such expert in it
        raise EditError(
            f"{file} is truncated or damaged ({error}); take the original model again"
        ) from error


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
