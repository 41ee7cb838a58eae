"""The backends, one small module each with the same face.

NAME: str
why_not(device) -> str | None       why it cannot run on that device and what to do; None if it can
step(groups, laprop, scaling, recorder, saturation)
                                    one step in place over tensors that share a device; with a recorder it is told what
                                    the step did; saturation may save it the reading of w
update_norms(groups, laprop, scaling) -> Tensor
                                    of each parameter, all of which have gradients, its norm and that of its update at
                                    learning rate 1: float64 [params, 2]; nothing is changed
grad_norm(grads) -> Tensor          the global norm, a scalar on the gradients' device
"""
