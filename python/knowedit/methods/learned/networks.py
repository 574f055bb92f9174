"""What trained networks have in common: their file, the check against a model, and how a record
names them.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from knowedit.errors import EditError
from knowedit.io.config import Config
from knowedit.io.files import cache_dir
from knowedit.io.tensors import read_file
from knowedit.models.editable import EditableModel
from knowedit.models.fingerprint import difference

N = TypeVar("N", bound="TrainedNetwork")


@dataclass(frozen=True)
class NetworkFile(Config):
    """A trained network as records name it.

    Attributes:
        path: its file.
        digest: of its contents; a file with another one is refused. None: not checked.
    """

    path: Path
    digest: str | None = None


class TrainedNetwork(ABC):
    """A network trained for one model.

    Attributes:
        name: of the method, as the command line says it.
        fingerprint: of the model.
        setup: of the model (`EditableModel.setup`); empty in files of earlier versions.
        report: of the training; empty for an untrained network.
        file: where it was saved or read; None: only in memory.
    """

    name: ClassVar[str]
    fingerprint: str
    report: dict[str, Any]
    file: Path | None = None
    setup: str = ""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything trained, by name, on the CPU."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write the network to one safetensors file, atomically."""

    @classmethod
    @abstractmethod
    def read(cls: type[N], path: Path, model: EditableModel) -> N:
        """The network of a file; see `read_network`."""

    @classmethod
    def load(cls: type[N], where: str | Path | NetworkFile | None, model: EditableModel) -> N:
        """A trained network.

        Args:
            where: its file; None: the one in the cache folder.

        Raises:
            EditError: missing, damaged, not the recorded one, or trained for another model.
        """
        recorded = where if isinstance(where, NetworkFile) else None
        path = recorded.path if recorded is not None else where
        network = cls.read(
            Path(path) if path is not None else default_file(cls.name, model),  # type: ignore[arg-type]
            model,
        )
        if recorded is not None and recorded.digest not in (None, network.digest()):
            raise EditError(
                f"{path} has another {cls.name.upper()} network (digest {network.digest()}) than "
                f"the recorded one ({recorded.digest})"
            )
        return network

    def bits(self) -> bytes:
        """A short digest of everything trained."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.digest()

    def digest(self) -> str:
        """Names its contents."""
        return hashlib.blake2b(self.bits(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As a record refers to it: its file and digest; without a file, its type and digest."""
        if self.file is None:
            return {"reference": type(self).__name__, "digest": self.digest()}
        return NetworkFile(self.file.absolute(), self.digest()).to_dict()

    def check(self, model: EditableModel) -> None:
        """Raise EditError unless it is trained, and for `model`."""
        check_network(self.name, self.fingerprint, self.setup, model, self.file)
        if not self.report:
            raise EditError(
                f"{_called(self.name, self.file)} is not trained; {how_to_train(self.name, model)}"
            )


def default_file(name: str, model: EditableModel) -> Path:
    """Where the trained network of a model is looked for when no file is named."""
    return cache_dir("networks") / f"{name}-{model.fingerprint}.safetensors"


def read_network(
    name: str, path: Path, model: EditableModel, form: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a trained network's file (format `form`).

    Raises:
        EditError: missing, damaged, or trained for another model; the message names the command
            that trains one.
    """
    if not path.is_file():
        raise EditError(f"{path}: no trained {name.upper()} network; {how_to_train(name, model)}")
    header, tensors = read_file(path, form, f"a {name.upper()} network")
    check_network(name, str(header.get("fingerprint")), str(header.get("setup", "")), model, path)
    return header, tensors


def check_fields(header: Mapping[str, Any], report: Any) -> None:
    """Raise an error of any kind where fields of a network's header are not what they should be.

    Args:
        report: of the training; empty for an untrained network.
    """
    for name in ("fingerprint", "setup"):
        if not isinstance(header.get(name, ""), str):
            raise TypeError(f"{name} of the network is {header[name]!r}, not a text")
    if not isinstance(report, dict):
        raise TypeError(f"report of the network is {report!r}, not a record")
    for name in ("trainable_parameters", "seconds"):
        if not is_number(value := report.get(name, 0)) or value < 0:
            raise TypeError(f"report.{name} of the network is {value!r}")


def is_number(value: Any) -> bool:
    """Whether a header's field is a number, and finite."""
    return type(value) in (int, float) and math.isfinite(value)


def check_network(
    name: str, fingerprint: str, setup: str, model: EditableModel, file: Path | None = None
) -> None:
    """Raise EditError when a network of that fingerprint and setup was not trained for `model`.

    Args:
        file: that it is in, for the message.
    """
    if other := difference(model, fingerprint, setup):
        raise EditError(
            f"{_called(name, file)} was trained for a model with fingerprint "
            f"{fingerprint[:12]}, but {model.name} has {model.fingerprint[:12]}: {other}; "
            f"{how_to_train(name, model)}"
        )


def _called(name: str, file: Path | None) -> str:
    return f"the {name.upper()} network" + (f" {file}" if file is not None else "")


def how_to_train(name: str, model: EditableModel) -> str:
    """The remedy: a command where the model has a name to be found by, else a call."""
    if model.name == type(model.hf).__name__:  # an object that was made, not loaded
        return f"train one with train_{name}(model, facts)"
    return f"train one with: knowedit train {name} {model.name}"
