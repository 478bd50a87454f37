"""Compile the C core (cext/) into the Python module refquant.kernels._core.

One function, `build`, and two callers: a person who edits the C sources,

    python build_ext.py

which leaves the module beside its Python face in refquant/kernels/; and the build backend
(hatch_build.py), which puts it into the wheel. An editable installation runs from the source
tree, hence the line above is also how it is brought up to date after a change in cext/.

The C interface is written once: cffi parses the part of cext/refquant.h that stands between
two marks. The module keeps to Python's stable ABI, so that one file serves every CPython
from 3.10 on.

Without a working compiler refquant is complete, only slower: NumPy computes the same
integers. An installation then succeeds with one line that says how to get the kernels.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CEXT = ROOT / "cext"
MODULE = "refquant.kernels._core"
BEGIN, END = "/* cffi: begin */", "/* cffi: end */"

# Never -march=native: a wheel is run elsewhere; each kernel names the instructions it needs.
# No auto-vectorization: the scalar kernel must stay scalar, or its time means nothing.
# No contraction of a*b+c into one rounding: float results would depend on the compiler.
# No debug information: it would carry the name of a temporary folder into the wheel.
FLAGS = [
    "-O3",
    "-std=c11",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    "-ffp-contract=off",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-g0",
]

# Free-threaded interpreters have no stable ABI yet; there the module serves one version only.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")

REMEDY = (
    "install a C compiler (Debian: apt install gcc python3-dev; macOS: xcode-select --install) "
    "and setuptools, then install refquant again or run `python build_ext.py`."
)


class BuildError(RuntimeError):
    """The C core was required and could not be compiled."""


def cdef(header: str) -> str:
    """Return the part of a C header that stands between the cffi marks."""
    before, begin, rest = header.partition(BEGIN)
    declarations, end, after = rest.partition(END)
    if not begin or not end:
        raise BuildError(f"cext/refquant.h must hold the marks {BEGIN} and {END}, in this order")
    return declarations


def filename() -> str:
    """Return the file name under which Python finds the compiled module."""
    if not STABLE_ABI:
        return "_core" + sysconfig.get_config_var("EXT_SUFFIX")
    return "_core.pyd" if os.name == "nt" else "_core.abi3.so"


def required() -> bool:
    """Tell whether REFQUANT_REQUIRE_EXT makes a failed compilation fatal."""
    return os.environ.get("REFQUANT_REQUIRE_EXT", "") not in ("", "0")


def build(out_dir: Path, *, required: bool) -> Path | None:
    """Compile the C core into `out_dir`.

    Parameters
    ----------
    out_dir : Path
        An existing folder; the module appears in it complete or not at all.
    required : bool
        What a failure means: an exception, or one line on stderr and no module.

    Returns
    -------
    Path or None
        The compiled module; None when it could not be compiled and is not required.

    Raises
    ------
    BuildError
        The compilation failed and `required` is true.
    """
    try:
        return _compile(out_dir)
    except BuildError:
        raise
    except Exception as error:  # whatever cffi, setuptools or the compiler stumble over
        problem = f"the C core could not be compiled ({' '.join(str(error).split())})"
        if required:
            raise BuildError(f"{problem}. Please {REMEDY}") from error
        print(f"refquant: {problem}; NumPy does its work, slower. For the kernels, {REMEDY}", file=sys.stderr)
        return None


def _compile(out_dir: Path) -> Path:
    declarations = cdef((CEXT / "refquant.h").read_text(encoding="utf-8"))
    from cffi import FFI

    flags = ["/O2"] if os.name == "nt" else FLAGS  # MSVC knows none of FLAGS
    macros: list[tuple[str, str | None]] = [("RQ_FLAGS", f'"{" ".join(flags)}"')]
    if not STABLE_ABI:
        macros.append(("_CFFI_NO_LIMITED_API", None))
    ffi = FFI()
    ffi.cdef(declarations)
    ffi.set_source(
        MODULE,
        '#include "refquant.h"',
        sources=[str(path) for path in sorted(CEXT.glob("*.c"))],
        include_dirs=[str(CEXT)],
        define_macros=macros,
        extra_compile_args=flags,
    )
    with tempfile.TemporaryDirectory() as scratch:
        compiled = ffi.compile(tmpdir=scratch, target=filename())
        # Rename into place: a running Python keeps the old file, and nobody sees half of one.
        fresh = out_dir / (filename() + ".new")
        shutil.copyfile(compiled, fresh)
        return fresh.replace(out_dir / filename())


if __name__ == "__main__":
    try:
        print(build(ROOT / "refquant" / "kernels", required=True))
    except BuildError as error:
        sys.exit(f"build_ext: {error}")
