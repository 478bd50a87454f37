"""The errors that refquant raises on purpose.

Each message says three things: what was given, what is allowed, and what to do about it.
The command line prints such a message as one line; everything else that escapes is a bug
and keeps its traceback.
"""


class RefquantError(Exception):
    """Root of every error a user can cause; catch this one to catch them all."""


class ShapeError(RefquantError, ValueError):
    """An array has the wrong shape or dtype for the operation that was asked of it."""


class RangeError(RefquantError, ValueError):
    """A number lies outside of what the operation can represent (bits, ranges, NaN, K bound)."""


class UnknownNameError(RefquantError, KeyError):
    """A model, method, sampler or data set of that name does not exist."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class CheckpointError(RefquantError):
    """A file is no checkpoint of ours, is damaged, or does not fit the model."""


class DataError(RefquantError):
    """A data set is missing, damaged, or cannot be fetched."""


class LoweringError(RefquantError):
    """A quantized model holds something that has no integer form; the message names the layer and the reason."""


class UnsupportedISA(RefquantError):
    """A kernel was asked for that is not compiled in or that this CPU cannot run."""
