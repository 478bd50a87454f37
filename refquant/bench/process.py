"""Ask a module of this package something in a process of its own; question and answer travel as JSON.

Thread pools of different libraries disturb each other within one process: members of one still spin when the next one
begins (kernel_turn.py). A process of its own also gives back its memory, and what it does to a library's settings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RefquantError

Answer = dict[str, Any]


def ask(module: str, who: str, question: Answer) -> Answer:
    """Run ``python -m module``, which calls `answer`, and return what it answers.

    Raises
    ------
    RefquantError
        The process failed; the message names `who` and ends with the last line that it wrote.
    """
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command, environment = [sys.executable, "-m", module], os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(  # in the package's own folder: -m looks for it in the current one first
        command, input=json.dumps(question), capture_output=True, text=True, env=environment, cwd=paths[0]
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RefquantError(f"bench: the process of {who} ended with status {done.returncode}: {last}")
    found: Answer = json.loads(done.stdout)
    return found


def answer(respond: Callable[[Answer], Answer]) -> None:
    """Read a question from the standard input, write the answer to the standard output, and nothing else there."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what other libraries print
    with output:
        json.dump(respond(json.load(sys.stdin)), output)
