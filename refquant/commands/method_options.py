"""The options of the methods, as their signatures and docstrings tell them: for --help, and to check --option."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from ..errors import RangeError, UnknownNameError
from ..quant.methods import METHODS, method, options_of

_ENTRY = re.compile(r"(?P<names>\w+(?:, \w+)*) : (?P<kind>.+)")
WIDTH = 110


@dataclass(frozen=True)
class Option:
    """What a method can be told.

    Attributes
    ----------
    default : object
    choices : tuple of str
        All that is allowed; empty where that is no short list.
    text : str
        What it means, one line.
    """

    default: Any
    choices: tuple[str, ...] = ()
    text: str = ""


def described(name: str) -> dict[str, Option]:
    """Return the options of a method by name: defaults of its signature, choices and words of its docstring."""
    found = {key: Option(default) for key, default in options_of(name).items()}
    _, _, parameters = (inspect.getdoc(method(name)) or "").partition("\nParameters\n----------\n")
    keys: list[str] = []
    for line in parameters.split("\n\n")[0].splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry is not None:
            keys = [key for key in entry["names"].split(", ") if key in found]
            listed = entry["kind"] if entry["kind"].startswith("{") else "()"
            choices = tuple(re.findall(r'"([^"]*)"', listed))
        for key in keys:
            text = "" if entry is not None else f"{found[key].text} {line.strip()}".strip()
            found[key] = Option(found[key].default, choices, text)
    return found


def help_text() -> str:
    """List the options of all methods with their defaults, choices and meaning."""
    lines = ["options of the methods, as --option KEY=VALUE; what stands here is the default:"]
    for name in METHODS:
        lines.append(f"  {name}")
        for key, option in described(name).items():
            others = f"({', '.join(option.choices)}) " if option.choices else ""
            head, body = f"    {_shown(key, option.default)}", f"{others}{option.text}".strip()
            if len(head) > 31:
                lines.append(head)
                head = ""
            lines += textwrap.wrap(body, WIDTH, initial_indent=head.ljust(32), subsequent_indent=" " * 32) or [head]
    return "\n".join(lines)


def parse_options(name: str, given: list[str]) -> dict[str, Any]:
    """Turn KEY=VALUE texts into options of the method, of the type of their defaults.

    Raises
    ------
    UnknownNameError
        The method has no such option, or the option no such choice.
    RangeError
        Not of the type of the default.
    """
    known, out = described(name), {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            listed = ", ".join(_shown(k, option.default) for k, option in known.items()) or "none"
            raise UnknownNameError(f"--option {text!r}: {name} has no such option. It has: {listed}.")
        choices = known[key].choices
        if choices and value not in choices:
            raise UnknownNameError(f"--option {text!r}: {key} of {name} is one of {', '.join(choices)}.")
        out[key] = _typed(text, value, known[key].default)
    return out


def _shown(key: str, default: object) -> str:
    """As it would be typed."""
    if default is None:
        return key
    return f"{key}={str(default).lower() if isinstance(default, bool) else default}"


def _typed(text: str, value: str, default: object) -> object:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise RangeError(f"--option {text!r}: true or false is wanted.")
        return value == "true"
    if isinstance(default, str):
        return value
    kind = float if isinstance(default, float) else int
    try:
        return kind(value)
    except ValueError:
        raise RangeError(f"--option {text!r}: a {'' if kind is float else 'whole '}number is wanted.") from None
