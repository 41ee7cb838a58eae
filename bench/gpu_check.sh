#!/usr/bin/env bash
# The GPU programme, for the first GPU that comes by: builds the package here, checks the kernels against the CPU's bits,
# and measures them, in less than ten minutes.
#
#   bench/gpu_check.sh                     everything, the most important first
#   bench/gpu_check.sh speed host          these stages alone, after a build where there is none of these sources yet
#   bench/gpu_check.sh --rehearse          all of it without a GPU: a typo must not cost the time of one
#   bench/gpu_check.sh --help              the stages and options
#
# Needs python3 (or $PYTHON) with torch >= 2.10, nvcc and a C++ compiler. Writes a JSON file for each stage and
# summary.txt into $OUT, or where that is unset into bench/results/<GPU>/. The checkout stays as it is: the package is
# built from a copy in build/gpu_check, which git ignores.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m gpu_check "$@"
