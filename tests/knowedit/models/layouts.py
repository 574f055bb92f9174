"""Layouts as some models have them, made from that of a tiny one."""

from __future__ import annotations

from dataclasses import replace

from knowedit.models.structure import Layout


def without_attention(layout: Layout, layer: int) -> Layout:
    """The same, where nothing at one layer mixes tokens."""
    return replace(layout, mixers={**layout.mixers, layer: ()})
