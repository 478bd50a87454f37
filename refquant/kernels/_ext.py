"""The compiled module, or the knowledge that there is none: the only place that imports it.

The rest of refquant.kernels reads three constants from here: `lib` and `ffi` (None without
the extension) and `ROWS`, the kernel table of cext/dispatch.c as {name: row}.
"""

from ..errors import RefquantError

__all__ = ["ABI_VERSION", "ROWS", "ffi", "lib"]

ABI_VERSION = 6  # of the interface that this package was written for: RQ_ABI_VERSION in cext/refquant.h

try:
    from ._core import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "refquant.kernels._core":
        raise  # not compiled is fine; a missing cffi, or a module that does not load, is not
    ffi = lib = None

if lib is not None and lib.rq_abi_version() != ABI_VERSION:
    raise RefquantError(
        f"the compiled module has interface {lib.rq_abi_version()}, this refquant needs {ABI_VERSION}. "
        "Run `python build_ext.py` in the source tree, or install refquant again."
    )

ROWS: dict[str, int] = (
    {} if lib is None else {ffi.string(lib.rq_kernel_name(row)).decode(): row for row in range(lib.rq_kernel_count())}
)
