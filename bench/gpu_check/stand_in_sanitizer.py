"""Stands in for compute-sanitizer in a rehearsal: takes the options that sanitizer.py passes, and no others, runs the
command, and reports an error where a fault was put into it."""

from __future__ import annotations

import argparse
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--tool", choices=("memcheck", "racecheck", "initcheck", "synccheck"), required=True)
    parser.add_argument("--error-exitcode", type=int, required=True)
    parser.add_argument("--kernel-name")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    status = subprocess.run(args.command).returncode
    found = int("--fault" in args.command)
    print("========= A REHEARSAL: no sanitizer ran")
    if found:
        print("=========     at void maxva::cuda::norm_chunks_kernel (so it would say)")
    if args.tool == "racecheck":
        print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    else:
        print(f"========= ERROR SUMMARY: {found} error{'s' * (found != 1)}")
    return args.error_exitcode if found else status


if __name__ == "__main__":
    sys.exit(main())
