"""The backends, one small module each with the same face.

NAME: str
why_not(device) -> str | None       why it cannot run on that device and what to do; None if it can
step(groups, laprop, scaling)       one step in place over tensors that share a device
grad_norm(grads) -> Tensor          the global norm, a scalar on the gradients' device
"""
