"""The MAdam and LaMAdam steps and the gradient norm in Triton, installed as ``maxva_kernels.triton_kernels``.

maxva.py has the formula; step.py, update_norm.py and grad_norm.py the walk over tensors, coefficients.py what the first
two read for each; launcher.py the host's side.
"""
