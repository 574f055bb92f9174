"""What produces every number in docs/benchmarks.md; run each as `python -m benchmarks.<name>` (see
README.md here).
"""
