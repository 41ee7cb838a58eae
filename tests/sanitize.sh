#!/usr/bin/env bash
# The CPU kernels under the address and undefined-behaviour sanitizers: builds them so in a scratch folder and runs the
# tests that walk every size, dtype, option and layout over them. Any report fails the run (capture=sys: and is seen).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$root"
cp -r setup.py pyproject.toml README.md LICENSE build_backend csrc maxva_kernels triton_kernels tests bench "$scratch"
cd "$scratch"
rm -f maxva_kernels/*.so

export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
export LDFLAGS="-fsanitize=address,undefined"
MAXVA_BUILD=cpu python setup.py -q build_ext --inplace >build.log 2>&1 || { cat build.log; exit 1; }

# Python itself is not instrumented: the runtime is loaded first, and its own leaks are not ours.
export LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH="$scratch"
python -c "import maxva_kernels._ops as ops, maxva_kernels; assert maxva_kernels.__file__.startswith('$scratch'), maxva_kernels.__file__; assert not ops.load_error('_C'), ops.load_error('_C')"
python -m pytest -q --capture=sys -p no:cacheprovider tests/test_step.py tests/test_grad_norm.py tests/test_inputs.py tests/test_ops.py \
  tests/test_state_dtype.py::test_is_a_step_in_float32_rounded tests/test_state_dtype.py::test_special_values \
  -k "not graph and not opcheck" -m "not simulated"
