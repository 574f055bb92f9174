"""`python -m knowedit_kernels.bench`: how fast, how close to the machine's limits, and how accurate
the kernels are.

A row that misses its accuracy budget gets no speed-up, and the exit code is 1. See `--help`.
"""
