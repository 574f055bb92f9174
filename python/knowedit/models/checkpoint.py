"""A model's folder of safetensors files, read a tensor at a time: the model is never loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError
from knowedit.models.fingerprint import setup_of, streamed_fingerprint
from knowedit.models.load import check_plain, class_for, said_by
from knowedit.models.shards import check_floats, read_tensor, tensor_files
from knowedit.models.structure import is_transposed

ADAPTER = "adapter_config.json"


class Checkpoint:
    """The weights of a folder written by `save_pretrained`, by the names that the model has for
    them.

    Attributes:
        folder: where it is.
        files: `{tensor: file}` as the files name the tensors.

    Raises:
        ModelError: it is no such folder, an adapter's, or its weights are quantised or no
            safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ModelError(
                f"{folder} is not a folder; a checkpoint is read from one that save_pretrained "
                "wrote, or that was downloaded from the hub"
            )
        if (self.folder / ADAPTER).exists():
            raise ModelError(f"{folder} holds an adapter; merge it into its base model first")
        if not (self.folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json; give the folder of a whole model")
        check_plain(str(folder), self.config)
        check_floats(self.folder)
        self.files = tensor_files(self.folder)

    @cached_property
    def config(self) -> Any:
        """Of transformers."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder}: {said_by(error)}") from error

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model without numbers: names and shapes of its parameters, and its modules."""
        opened = class_for(self.config)
        make = getattr(opened, "from_config", None) or opened._from_config
        with torch.device("meta"):
            found: nn.Module = make(self.config)
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's parameters; a tied one has one name."""
        return {name: tuple(held.shape) for name, held in self.skeleton.named_parameters()}

    def stored_as(self, name: str) -> str:
        """What the files call a parameter: as the model does, or without its first part (GPT-2).

        Raises:
            ModelError: they do not hold it as a tensor of its own.
        """
        prefix = f"{getattr(self.skeleton, 'base_model_prefix', '')}."
        for stored in (name, name.removeprefix(prefix)):
            if stored in self.files:
                return stored
        raise ModelError(
            f"{self.folder} holds no tensor for {name}: transformers puts it together as it loads "
            "the model; load the model (`knowedit apply` without --stream)"
        )

    def tensor(self, name: str) -> Tensor:
        """A parameter as it is stored, read from its file alone. Raises ModelError."""
        stored = self.stored_as(name)
        found = read_tensor(self.files[stored], stored)
        if tuple(found.shape) != self.shapes[name]:
            raise ModelError(
                f"{self.folder}: {name} is stored as {list(found.shape)}, and the model has "
                f"{list(self.shapes[name])}; config.json is of another model"
            )
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, one at a time."""
        return ((name, self.tensor(name)) for name in self.shapes)

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored `[in, out]` (GPT-2's)."""
        return is_transposed(self.skeleton, name)

    @property
    def name(self) -> str:
        """Its folder."""
        return str(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """As `EditableModel.fingerprint` of the model loaded in the dtype it is stored in."""
        return streamed_fingerprint(self.skeleton, self.tensor)

    @cached_property
    def setup(self) -> str:
        """As `EditableModel.setup`. Raises ModelError: the folder has no tokenizer."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder} has no tokenizer: {said_by(error)}") from error
        return setup_of(self.config, tokenizer)
