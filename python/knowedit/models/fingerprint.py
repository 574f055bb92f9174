"""Which weights are these? A digest that every single-bit change alters."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from knowedit.errors import ModelError


def weights_fingerprint(model: nn.Module) -> str:
    """Digest of a model's parameters: blake2b over name, shape, dtype and a position-dependent
    64-bit sum of the bits.

    Every single-bit change alters it. It is a guard against mistakes, not against forgery.

    Raises:
        ModelError: a weight is NaN or infinite: nothing that is made of such a model means
            anything.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach()).all():
            raise ModelError(
                f"{name} of this {type(model).__name__} has weights that are NaN or infinite; its "
                "file is damaged, or was saved after a training that failed: load it again"
            )
        digest.update(
            f"{name}{tuple(parameter.shape)}{parameter.dtype}{_bit_sum(parameter)}".encode()
        )
    return digest.hexdigest()


def _bit_sum(tensor: Tensor, chunk: int = 1 << 22) -> int:
    """Sum of the tensor's 32-bit words, each times an odd number of its own place, modulo 2**64."""
    words = tensor.detach().contiguous().view(-1)
    words = words.view(torch.int16) if tensor.element_size() == 2 else words.view(torch.int32)
    total = 0
    place = torch.arange(1, 2 * min(chunk, words.numel()), 2, device=words.device)
    for number, part in enumerate(words.split(chunk)):
        block = int((part.long() * place[: part.numel()]).sum())
        total = (total * 0x9E3779B97F4A7C15 + block * (2 * number + 1)) % (1 << 64)
    return total
