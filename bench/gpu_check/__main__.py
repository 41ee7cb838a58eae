"""The command line; see ../gpu_check.sh."""

import argparse
import sys
from pathlib import Path

from gpu_check import programme

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    stages = "\n".join(f"  {name:<12}{stage.about}" for name, stage in programme.STAGES.items())
    parser = argparse.ArgumentParser(
        prog="bench/gpu_check.sh",
        description=f"Builds, checks and measures the package on this machine's GPU.\n\nstages:\n{stages}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="which (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, with stand-ins and tiny sizes")
    parser.add_argument("--out", type=Path, help="folder for the results (default: $OUT, or bench/results/<GPU>)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_check", help="folder for the build")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: 9)")
    parser.add_argument("--wheel", type=Path, help="a wheel of this package to install in place of a build")
    args = parser.parse_args()
    unknown = [name for name in args.stages if name not in programme.STAGES]
    if unknown:
        parser.error(f"no stage is called {unknown[0]!r}; there are {', '.join(programme.STAGES)}")
    return programme.run(ROOT, args)


if __name__ == "__main__":
    sys.exit(main())
