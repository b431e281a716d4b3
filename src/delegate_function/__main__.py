"""`delegate-function-run`: serve a call over standard input and output, or one that lies in a file.

`delegate-function-run --detached DIRECTORY` is the program of a batch job, see `detached`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

from delegate_function import detached, hop


def main() -> None:
    """Run what the command line says."""
    if len(sys.argv) == 1 and not sys.stdin.isatty():
        hop.main()
    if sys.argv[1:2] == ["--detached"]:
        detached.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="delegate-function-run",
        description="Serve one call: over standard input and output when nothing is given, or from a file.",
    )
    parser.add_argument(
        "--delegate-before", metavar="FILE", required=True, help="pickle of (delegate, object, method, args, kwargs)"
    )
    parser.add_argument(
        "--delegate-after", metavar="FILE", required=True, help="where the pickle of (value, exception, object) goes"
    )
    parser.add_argument("--log-level", metavar="N", type=int, help="of Python's logging")
    arguments = parser.parse_args()
    if arguments.log_level is not None:
        logging.basicConfig(level=arguments.log_level)
    run_file(Path(arguments.delegate_before), Path(arguments.delegate_after))


def run_file(before: Path, after: Path) -> None:
    """Run the call in one file and put what came of it into another, which appears when it is complete."""
    import cloudpickle

    delegate, obj, method, args, kwargs = cloudpickle.loads(before.read_bytes())
    value: Any = None
    raised: Exception | None = None
    try:
        value = delegate.invoke(obj, method, *args, **kwargs)
    except Exception as error:
        raised = error
    fd, temporary = tempfile.mkstemp(dir=after.absolute().parent, prefix=f".{after.name}.")
    try:
        with open(fd, "wb") as file:
            cloudpickle.dump((value, raised, obj), file)
        Path(temporary).replace(after)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


if __name__ == "__main__":
    main()
