"""The command line: `python -m maxva_kernels` reports what is installed, and what can run here and what not."""

import argparse

from maxva_kernels import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m maxva_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="report what is installed and what can run (the default)")
    parser.parse_args()
    print(info.report())


if __name__ == "__main__":
    main()
