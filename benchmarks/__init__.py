"""What produces every number in the README; run each as `python -m benchmarks.<name>` (see
README.md here).
"""
