"""A moment on disk: one safetensors file with a checksum, written atomically, never a pickle."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

FORMAT = "knowedit-second-moment-1"
GROUPED = "knowedit-grouped-moment-1"
FIELDS = ("lower", "sums", "count", "pending")
CHECKSUM = " crc32 "  # behind the format's name, and then the sum; earlier files have none


def check_state(state: Mapping[str, torch.Tensor], dim: int, where: str = "state") -> None:
    """Raises ValueError naming the missing field or the wrong shape of a moment's state."""
    if missing := [name for name in FIELDS if name not in state]:
        raise ValueError(f"{where} lacks {', '.join(missing)}: not a second moment")
    if state["lower"].shape != (dim, dim) or state["pending"].shape[1:] != (dim,):
        raise ValueError(
            f"{where} has dimension {list(state['lower'].shape)}, expected [{dim}, {dim}]"
        )


def write(
    path: Path,
    state: Mapping[str, torch.Tensor],
    metadata: dict[str, str],
    form: str = FORMAT,
) -> None:
    """Writes through a temporary file in the same folder, synced before it takes the name. Makes
    the folder; the file may be read by whom the umask lets.
    """
    from safetensors.torch import save_file

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        marked = form + CHECKSUM + _checksum(tensors, metadata)
        save_file(tensors, scratch, metadata={**metadata, "format": marked})
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(scratch, 0o666 & ~_umask())  # safetensors lets only the owner read it
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: Path, form: str = FORMAT) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata. Raises FileNotFoundError, or ValueError if the file is damaged
    or foreign.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or no safetensors file ({error}); delete it and collect again"
        ) from None
    found, _, checksum = metadata.pop("format", "none").partition(CHECKSUM)
    if found != form:
        raise ValueError(f"{path} is not a second moment (format {found!r}, expected {form!r})")
    if checksum and checksum != _checksum(state, metadata):
        raise ValueError(
            f"{path} is damaged: it is not what was written (its checksum is another); delete it "
            "and collect again"
        )
    if form == FORMAT:
        check_state(state, state["lower"].shape[0] if "lower" in state else 0, str(path))
    return state, metadata


def _checksum(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 of the metadata, and of each tensor's name, dtype, shape and bits."""
    found = zlib.crc32(repr(sorted(metadata.items())).encode())
    for name, tensor in sorted(state.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        if tensor.numel():
            bits = tensor.reshape(-1).view(torch.uint8).numpy()
            found = zlib.crc32(bits.data, found)
    return f"{found:08x}"
