"""Every decoder family that transformers can build, as a tiny random model, against the plain one:
`python -m benchmarks.families` (docs/families.md).

`models` builds them, `checks` says what must hold, `matrix` runs all of it, `page` makes the table.
"""
