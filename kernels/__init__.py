"""Triton kernels of bitfast, installed as ``bitfast.kernels``: the files of an op begin with its name.

``<op>.py`` chooses launch shapes and lists launches, the files beside it hold the kernels. They import torch
and triton only, and are imported by ``bitfast/ops/<op>.py`` on the op's first launch.
"""
