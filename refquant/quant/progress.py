"""What a run tells of itself while it works, on standard error: which phase it is in, and how far it is."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def remark(text: str, quiet: bool) -> None:
    """Print a line, between progress bars if there are any; nothing where `quiet`."""
    if not quiet:
        tqdm.write(text, file=sys.stderr)


def bar(total: int, label: str, quiet: bool) -> tqdm[Any]:
    """Return a progress bar with the time left; silent where `quiet`, and where standard error is no terminal."""
    return tqdm(total=total, desc=label, unit="step", disable=quiet or None, file=sys.stderr, leave=False)
