"""Texts about a fact, to train edits with and, apart from them, to test edits with."""
