"""The MAdam and LaMAdam steps and the gradient norm in Triton, installed as ``maxva_kernels.triton_kernels``.

maxva.py has the formula, step.py and grad_norm.py the walk over tensors, launcher.py the host's side.
"""
