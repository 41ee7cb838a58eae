"""The build: Python packages always, compiled kernels as `build_backend/maxva_build_plan.py` decides.

MAXVA_BUILD   auto (default: what can be built), cuda, cpu, python
FORCE_CUDA    1 is MAXVA_BUILD=cuda
CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX   as for every PyTorch extension
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))  # not there yet when setup.py is run by hand

from maxva_build_commands import commands, extensions  # noqa: E402
from maxva_build_plan import Facts, gather_facts, plan, requested_mode  # noqa: E402

mode = requested_mode(os.environ)
facts = Facts() if mode == "python" else gather_facts(os.environ)
decision = plan(mode, facts, os.environ.get("TORCH_CUDA_ARCH_LIST"))
ext_modules = extensions(ROOT, decision, facts)

setup(
    # `triton_kernels` as a top-level name belongs to another project: the folder is installed inside the package.
    packages=find_packages(include=["maxva_kernels", "maxva_kernels.*"])
    + [f"maxva_kernels.{name}" for name in find_packages(include=["triton_kernels", "triton_kernels.*"])],
    package_dir={"maxva_kernels.triton_kernels": "triton_kernels"},
    ext_modules=ext_modules,
    cmdclass=commands(ROOT, decision, facts),
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
