"""Which weights are these? A digest that every single-bit change alters."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def weights_fingerprint(model: nn.Module) -> str:
    """Digest of a model's parameters: blake2b over name, shape, dtype and a position-dependent
    64-bit sum of the bits.

    Every single-bit change alters it. It is a guard against mistakes, not against forgery.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
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
