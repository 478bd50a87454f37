"""The command line: ``refquant VERB ...``.

Exit codes: 0 fine, 1 a check failed, 2 bad usage or bad input. An error that the user can mend is one
line on standard error; --debug shows where it came from.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ._version import __version__
from .commands import average, bench, compare, demo, evaluate, export, info, quantize, sample, train, tutorials, verify
from .commands.common import apply_common
from .errors import RefquantError

VERBS = (demo, sample, train, average, quantize, export, evaluate, compare, info, verify, bench, tutorials)


def parser() -> argparse.ArgumentParser:
    """Build the parser of all verbs."""
    p = argparse.ArgumentParser(
        prog="refquant",
        description="Post-training quantization of diffusion models, readable and verifiable.",
        epilog="Start with `refquant demo`. `refquant VERB --help` describes a verb.",
    )
    p.add_argument("--version", action="version", version=f"refquant {__version__}")
    verbs = p.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parser().parse_args(arguments)
    try:
        apply_common(args)
        return int(args.run(args))
    except RefquantError as error:
        if args.debug:
            raise
        print(f"refquant {args.verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        if args.debug:
            raise
        print(f"refquant {args.verb}: out of memory. Ask for fewer images or a smaller batch.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"refquant {args.verb}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
