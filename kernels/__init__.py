"""Triton kernels of bitfast, installed as ``bitfast.kernels``: one file per op, named after it.

Nothing is here yet. A kernel file imports torch and triton only, and is itself imported by
``bitfast/ops/<op>.py`` on the op's first launch.
"""
