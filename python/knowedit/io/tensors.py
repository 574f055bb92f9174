"""Our safetensors files: named tensors, a JSON header that says which format they are of, and
checksums of both.

The checksums are CRC-32s, as zip files have: they see every damage of up to 32 bits in a row and
all but one in four thousand million of the others, `zlib` is in every Python, and it reads 2 GB/s
and more on any processor (blake2b 0.6; SHA-256 1.4, and a third of it without special units). They
guard against accidents, not against forgery.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from knowedit.errors import EditError, KnowEditError
from knowedit.io.files import atomic_file, disk_errors

KEY = "knowedit"  # of the header, in a file's metadata
#: Behind a header's last field: `{tensor: checksum}`, with the header's own under the empty name.
#: In the header's text, as metadata of several names come in no order: equal files are equal bits.
CHECKSUMS = ', "checksums": '
#: Names of dtypes in safetensors files.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
OWN_SUM = '{"": "'  # how the sums begin

logger = logging.getLogger(__name__)


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's dtype, shape and bits; 8 hex digits."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    return f"{zlib.crc32(bits(tensor), start):08x}"


def write_file(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write `tensors` (moved to the CPU) and `header`, which has a "format", with their checksums
    to one file, atomically. Raises OSError: the disk refuses; an older file is left as it was.
    """
    held = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps(header)
    sums = {"": _text_checksum(text)} | {name: checksum(held[name]) for name in sorted(held)}
    with atomic_file(path) as temporary, disk_errors(path):
        save_file(held, temporary, metadata={KEY: f"{text[:-1]}{CHECKSUMS}{json.dumps(sums)}}}"})
    return Path(path)


def write_streamed(
    path: str | Path, tensors: Mapping[str, Callable[[], Tensor]], header: Mapping[str, Any]
) -> Path:
    """As `write_file`, of tensors that are made when they are needed, twice, and never all at hand:
    at first for their checksums, which stand at the file's start.
    """
    text = json.dumps(header)
    sums = {"": _text_checksum(text)}
    fields: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]()
        start, end = end, end + tensor.numel() * tensor.element_size()
        sums[name] = checksum(tensor)
        kind = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        fields[name] = {**kind, "data_offsets": [start, end]}
    fields["__metadata__"] = {KEY: f"{text[:-1]}{CHECKSUMS}{json.dumps(sums)}}}"}
    head = json.dumps(fields).encode()
    head += b" " * (-len(head) % 8)
    with atomic_file(path) as temporary, disk_errors(path), temporary.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name in sorted(tensors):
            out.write(bits(tensors[name]()))
    return Path(path)


def overwrite(path: Path, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the one of that name, shape and dtype in a safetensors file;
    no other byte is read or written.

    Raises:
        ValueError: another shape or dtype is there.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        field = json.loads(file.read(size))[name]
        if field["shape"] != list(tensor.shape) or field["dtype"] != DTYPES[tensor.dtype]:
            raise ValueError(f"{path}: {name} is {field['dtype']} {field['shape']}")
        file.seek(8 + size + field["data_offsets"][0])
        file.write(bits(tensor))


def bits(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, as files hold them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class TensorFile:
    """An opened file, from which single tensors can be read; each is checked as it is.

    Attributes:
        header: empty for another program's file.
        names: of the tensors.
    """

    def __init__(self, path: Path, file: Any, error: type[KnowEditError], remedy: str) -> None:
        self._path, self._file, self._error, self._remedy = path, file, error, remedy
        self.names: list[str] = sorted(file.keys())
        self.header, self._sums = self._read(file.metadata() or {})

    def _read(self, metadata: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str] | None]:
        """The header, and the tensors' checksums: None where the file has none."""
        if KEY not in metadata:
            if any(OWN_SUM in text for text in metadata.values()):
                raise self._damaged("its header")
            return {}, None
        body, written, sums_text = metadata[KEY].rpartition(CHECKSUMS)
        header = json.loads(f"{body}}}" if written else sums_text)
        lost = not written and OWN_SUM in sums_text  # the name before the sums is damaged
        if not isinstance(header, dict) or set(metadata) != {KEY} or lost:
            raise self._damaged("its header")
        if not written:
            _note_unchecked(self._path)
            return header, None
        sums = json.loads(sums_text[:-1])
        if (
            not isinstance(sums, dict)
            or not sums_text.endswith("}")
            or sums.pop("", None) != _text_checksum(f"{body}}}")
            or sorted(sums) != self.names
        ):
            raise self._damaged("its header")
        return header, sums

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises the error that the file was opened with: it is damaged, or there is
        none of that name.
        """
        found = self._file.get_tensor(name)
        if self._sums is not None and checksum(found) != self._sums[name]:
            raise self._damaged(name)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {name: self.tensor(name) for name in self.names}

    def _damaged(self, what: str) -> KnowEditError:
        return self._error(
            f"{self._path} is damaged: {what} is not what was written (its checksum is another); "
            f"{self._remedy}"
        )


@contextmanager
def opened(
    path: str | Path, error: type[KnowEditError] = EditError, remedy: str = "make it again"
) -> Iterator[TensorFile]:
    """The opened file. Raises `error`: missing or damaged; the message ends with `remedy`."""
    if Path(path).is_dir():
        raise error(f"{path} is a folder; name one of our files in it, or another file")
    if not Path(path).is_file():
        raise error(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(Path(path), file, error, remedy)
    except (SafetensorError, json.JSONDecodeError, RecursionError, OSError) as problem:
        raise error(
            f"{path} is truncated or damaged, or not a safetensors file ({problem}); {remedy}"
        ) from problem


@contextmanager
def understood(
    path: str | Path,
    what: str,
    error: type[KnowEditError] = EditError,
    remedy: str = "make it again",
) -> Iterator[None]:
    """Within the block a file's contents are made sense of: a field that is missing, or not what it
    should be, is `error`, which names the file. An error of ours that names it already stays.

    Args:
        what: the file should be, with its article.
    """
    try:
        yield
    except MISREAD as problem:
        if isinstance(problem, KnowEditError) and str(path) in str(problem):
            raise
        ours = isinstance(problem, KnowEditError)
        why = str(problem) if ours else f"{type(problem).__name__}: {problem}"
        raise error(f"{path} is not {what} of this version ({why[:400]}); {remedy}") from problem


#: What reading fields of a record that are missing, or of other types, raises.
MISREAD = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    RecursionError,
    RuntimeError,
    StopIteration,
)


def format_of(path: str | Path, error: type[KnowEditError] = EditError) -> str | None:
    """The format of a file of ours; None: another program's. Raises `error`: missing or damaged."""
    with opened(path, error) as file:
        return file.header.get("format")


def read_file(
    path: str | Path,
    formats: str | Sequence[str],
    what: str,
    error: type[KnowEditError] = EditError,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file.

    Args:
        formats: that it may be of, the newest first.
        what: the file should be, with its article, for the message.

    Raises:
        error: missing, damaged, of none of `formats`, or of a newer one.
    """
    known = (formats,) if isinstance(formats, str) else tuple(formats)
    with opened(path, error) as file:
        found = file.header.get("format")
        if found in known:
            return file.header, file.tensors()
    if _newer(found, known):
        raise error(
            f"{path} was written by a newer version of this program (format {found!r}, this one "
            f"reads {', '.join(known)}); install that version"
        )
    raise error(f"{path} is not {what} of this version (format {found!r}, expected {known[0]!r})")


def _newer(found: Any, known: Sequence[str]) -> bool:
    """Whether a format is a later one of the same name as one that is known."""
    name, _, number = str(found).partition("/")
    same = [int(form.partition("/")[2]) for form in known if form.partition("/")[0] == name]
    return bool(same) and number.isdecimal() and int(number) > max(same)


def _text_checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


_NOTED: list[Path] = []


def _note_unchecked(path: Path) -> None:
    """Say once that there are files without checksums."""
    if not _NOTED:
        logger.warning(
            "%s is of an earlier version, without checksums (as others may be): damage to its "
            "numbers would not be seen; files made from now on have them",
            path,
        )
        _NOTED.append(path)
