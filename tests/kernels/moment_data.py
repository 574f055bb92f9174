"""Keys that look like a gated MLP's activations: heavy tails and a mean, the hard case for long
sums.
"""

import torch


def keys(tokens: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """SiLU-gated activations [tokens, dim]."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(tokens, dim, generator=generator) for _ in range(2))
    return (torch.nn.functional.silu(gate) * up + 0.05).to(dtype)
