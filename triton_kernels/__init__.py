"""Triton kernels of the MAdam and LaMAdam steps, installed as ``maxva_kernels.triton_kernels``. None is built yet."""
