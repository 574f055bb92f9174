"""Fused kernels for the hot paths of knowledge editing, behind plain functions on tensors."""

from knowedit_kernels._dispatch import explain as explain

__version__ = "0.1.0"
