"""The command line: `python -m maxva_kernels` reports what is installed, and what can run here and what not.

`python -m maxva_kernels convert IN OUT` moves an optimizer's state in from other programs, or out.
"""

import argparse
import signal
import sys

from maxva_kernels import info
from maxva_kernels.convert import file


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m maxva_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="report what is installed and what can run (the default)")
    about = (
        "Converts the optimizer state in a checkpoint: the authors' MAdam or LaMAdam and torch's Adam or AdamW into "
        "this package's, and this package's into the authors'. Its keys say which it is; all else in the file stays."
    )
    convert = commands.add_parser("convert", help="move an optimizer's state from or to another one", description=about)
    file.add_arguments(convert)
    arguments = parser.parse_args()
    if arguments.command != "convert":
        print(info.report())
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # by way of what removes a partial file
    try:
        print(file.convert_file(arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"{convert.prog}: {error}")


if __name__ == "__main__":
    main()
