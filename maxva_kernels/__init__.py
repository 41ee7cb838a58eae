"""MAdam and LaMAdam, the optimizers of Maximum Variation Averaging (arXiv 2006.11918), as fused kernels for PyTorch.

    optimizer = maxva_kernels.MAdam(model.parameters(), lr=1e-3)

A step goes optim (groups, state, checkpoints) > functional > backends > the kernel, once. `python -m maxva_kernels`
says which backends were built and which can run.
"""

from . import functional
from . import gpu_ops as _gpu_ops  # only registers  # noqa: F401
from .master import join_master, split_master
from .optim import LaMAdam, MAdam
from .statistics import Statistics, StepStatistics

__all__ = ["LaMAdam", "MAdam", "Statistics", "StepStatistics", "functional", "join_master", "split_master"]

__version__ = "0.1.0"
