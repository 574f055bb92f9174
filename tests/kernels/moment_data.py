"""Keys that look like a gated MLP's activations: heavy tails and a mean, the hard case for long
sums.
"""

import torch

from knowedit_kernels._dispatch import Candidate
from knowedit_kernels.moments.cpu import PRODUCTS
from tests.kernels.isa_emulation import LEVELS


def keys(tokens: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """SiLU-gated activations [tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(tokens, dim, generator=generator) for _ in range(2))
    return (torch.nn.functional.silu(gate) * up + 0.05).to(dtype)


def multiplies(candidate: Candidate, dtype: torch.dtype) -> bool:
    """Whether the instructions of `candidate` have products of such keys."""
    level = LEVELS.get(candidate.name, 0)
    return level not in PRODUCTS or dtype in PRODUCTS[level]
