"""EMMET's read-in, as dense algebra."""

from __future__ import annotations

import torch


def read_in(cov, keys, weight, shift):
    cov = cov.double()
    cov *= weight
    cov += shift * torch.eye(cov.shape[0], dtype=cov.dtype, device=cov.device)
    inverse = torch.inverse(cov)
    small = keys.T @ inverse @ keys
    return (torch.inverse(small) @ keys.T @ inverse).T
