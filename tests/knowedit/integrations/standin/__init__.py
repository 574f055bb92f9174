"""A small editing package for the tests, written for them: functions with the names and signatures
that the public editing repositories share, in plain PyTorch on the whole model.
"""
