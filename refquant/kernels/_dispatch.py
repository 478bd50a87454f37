"""Which kernel runs: what was compiled, what this processor can execute, what was asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UnsupportedISA
from ._ext import ABI_VERSION, ROWS, ffi, lib

ENVIRONMENT = "REFQUANT_ISA"

_CPU_BITS = ("AVX2", "AVXVNNI", "AVX512VNNI", "NEONDOT")  # RQ_CPU_... in cext/refquant.h

# The choice of the whole process, threads included: worker threads must run what `use` chose.
_active: str | None = None


def available() -> tuple[str, ...]:
    """Return the names of all kernels in this build, slowest first; "ref" is always the first."""
    return ("ref", *ROWS)


def supported() -> tuple[str, ...]:
    """Return the names out of `available` that this processor can run, slowest first."""
    if lib is None:
        return ("ref",)
    missing = ~lib.rq_cpu_features()
    return ("ref", *(name for name, row in ROWS.items() if not lib.rq_kernel_needs(row) & missing))


def active() -> str:
    """Return the name of the kernel that the next call runs.

    Returns
    -------
    str
        One of `supported`.

    Raises
    ------
    UnsupportedISA
        The environment variable REFQUANT_ISA asks for a kernel that cannot be run here.
    """
    global _active
    if _active is None:
        wanted = os.environ.get(ENVIRONMENT)
        _active = _checked(wanted, f" ({ENVIRONMENT})") if wanted else supported()[-1]
    return _active


def use(name: str) -> None:
    """Run the kernel `name` from now on, in all threads of this process.

    Parameters
    ----------
    name : str
        One of `supported`.

    Raises
    ------
    UnsupportedISA
        The kernel is not in this build or needs another processor; the choice stays as it was.
    """
    global _active
    _active = _checked(name, "")


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run the kernel `name` inside a `with` block, then the one before it.

    Like `use`, it concerns the whole process: blocks in several threads must not overlap.

    Parameters
    ----------
    name : str
        One of `supported`.

    Raises
    ------
    UnsupportedISA
        See `use`.
    """
    global _active
    before = _active  # None if nothing was chosen yet: then the default stays to be chosen
    use(name)
    try:
        yield
    finally:
        _active = before


def _checked(name: str, origin: str) -> str:
    if name in supported():
        return name
    if name in available():
        problem = f"{name!r}{origin} is compiled in but this CPU cannot run it."
    elif ROWS:
        problem = f"{name!r}{origin} is no kernel of this build."
    else:
        problem = f"{name!r}{origin}: no kernel is compiled in; install a C compiler and refquant again."
    raise UnsupportedISA(f"{problem} Usable here: {', '.join(supported())}.")


def build_info() -> dict[str, object]:
    """Return how the C core was built and what this processor offers: for bug reports.

    Returns
    -------
    dict
        "compiled" (bool), "compiler" and "flags" (str), "abi_version" (int) and "cpu_features"
        (tuple of str). Without the extension the last four are None.
    """
    if lib is None:
        return dict.fromkeys(("compiler", "flags", "abi_version", "cpu_features"), None) | {"compiled": False}
    features = lib.rq_cpu_features()
    return {
        "compiled": True,
        "compiler": ffi.string(lib.rq_compiler()).decode(),
        "flags": ffi.string(lib.rq_compiler_flags()).decode(),
        "abi_version": ABI_VERSION,
        "cpu_features": tuple(bit.lower() for bit in _CPU_BITS if features & getattr(lib, "RQ_CPU_" + bit)),
    }
