"""Device functions shared by the Triton kernels. Importing this package imports nothing; Triton is
optional.
"""
