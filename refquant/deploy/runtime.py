"""Execute a program: buffers planned once for a batch size, operations one after the other, nothing allocated per step.

Two engines give the same bits:

    ref   the normative NumPy sentences (`refquant.ref`)
    c     the C core, with whichever kernel is active (`refquant.kernels`)

The first time that a step is run, each operation goes through the checks of `refquant.kernels`, and its calls of the C
core are recorded (`refquant.kernels.recording`); from then on the step is that list of calls, half a microsecond each
beside 5 to 10. What was recorded belongs to a thread, a batch size, a kernel and a number of threads: callers in
several Python threads have memory of their own.

`Executor` is a noise predictor, so every sampler takes it. With `trace` it hands every value to a callable, by name;
integer sums are not kept apart from what follows them, so what a trace compares are codes and floats.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..diffusion.sampling import Images
from ..errors import ShapeError, UnknownNameError
from ..kernels import Call
from ..quant.quantized import QuantizedModel
from ..threads import get_threads
from . import runtime_dit
from .lower import lower
from .plan import plan
from .program import Concat, Convolve, Encode, Mix, Operation, Pad, Probabilities, Program, Scores, Upsample, at

ENGINES = ("ref", "c")
BATCH_SIZES = 2  # of a thread whose memory is kept: those of a sampler's full batches and of its last one
Trace = Callable[[str, NDArray[Any]], None]


class Executor:
    """A program ready to run on batches.

    Parameters
    ----------
    program : Program
    engine : {"ref", "c"}
    """

    def __init__(self, program: Program, engine: str = "c") -> None:
        if engine not in ENGINES:
            raise UnknownNameError(f"no engine is called {engine!r}. Known: {', '.join(ENGINES)}.")
        self.program, self.engine = program, engine
        self._own = threading.local()

    def __call__(
        self,
        x: NDArray[np.float32],
        step: int,
        trace: Trace | None = None,
        *,
        y: NDArray[np.integer] | None = None,
    ) -> NDArray[np.float32]:
        """Run one step on x (N, H, W, C) float32; the result is overwritten by this thread's next call.

        Classes y (N,) are for conditional networks, K for "no class", which is also what all images are without y.
        """
        want = self.program.values[0].shape
        if x.ndim != 4 or x.shape[1:] != want or x.dtype != np.float32 or len(x) == 0:
            raise ShapeError(f"the program wants float32 (N, {', '.join(map(str, want))}), got {x.dtype} {x.shape}.")
        with kernels.using("ref") if self.engine == "ref" else nullcontext():
            room = self._room(len(x))
            room.arrays[0][...] = x
            room.classes[...] = self.program.checked_classes(y, len(x))
            if trace is None and step in room.steps:
                kernels.repeat(room.steps[step])
            else:
                room.steps[step] = self._record(room, step, trace)
        return room.arrays[self.program.operations[-1].out]

    def recorded(self, images: int, step: int) -> tuple[NDArray[np.float32], list[Call]]:
        """What a step that this thread has run is made of: where it reads x, and a call for each operation."""
        room = self._room(images)
        return room.arrays[0], room.steps[step]

    def _room(self, images: int) -> _Room:
        """Memory of this thread for so many images on the active kernel; the one used longest ago makes place."""
        rooms = self._own.__dict__.setdefault("rooms", OrderedDict())
        key = (images, kernels.active(), get_threads())
        if key not in rooms:
            while len(rooms) >= BATCH_SIZES:
                rooms.popitem(last=False)
            rooms[key] = _Room(self.program, images)
        rooms.move_to_end(key)
        return rooms[key]

    def _record(self, room: _Room, step: int, trace: Trace | None) -> list[Call]:
        """Run a step through all checks, and keep its calls."""
        with kernels.recording() as calls:
            for operation in self.program.operations:
                self._run(operation, room, step)
                if trace is not None:
                    trace(self.program.values[operation.out].name, room.arrays[operation.out])
        return calls

    def _run(self, op: Operation, room: _Room, step: int) -> None:
        arrays = room.arrays
        out = arrays[op.out]
        if isinstance(op, Encode):
            _encode(op, arrays[op.x].reshape(out.shape), step, out)
        elif isinstance(op, Pad):
            _pad(arrays[op.x], op.pads, at(op.zero_points, step), out)
        elif isinstance(op, Convolve):
            _convolve(op, arrays[op.x], None if op.residual is None else arrays[op.residual], step, out)
        elif isinstance(op, Scores):
            q, k = at(op.q_params, step), at(op.k_params, step)
            scale = q.scale * k.scale * np.float32(1 / np.sqrt(arrays[op.q].shape[-1]))
            kernels.products(
                arrays[op.q], arrays[op.k], transpose_b=True, a_zero_point=int(q.zero_point),
                b_zero_point=int(k.zero_point), scale=scale, out=out,
            )  # fmt: skip
        elif isinstance(op, Probabilities):
            q = at(op.quantizers, step)
            kernels.softmax_quantize(arrays[op.x], scale=float(q.scale), bits=q.spec.bits, out=out)
        elif isinstance(op, Mix):
            p, v = at(op.p_params, step), at(op.v_params, step)
            kernels.products(
                arrays[op.p], arrays[op.v], a_zero_point=int(p.zero_point), b_zero_point=int(v.zero_point),
                scale=p.scale * v.scale, out=out.reshape(len(out), -1, out.shape[-1]),
            )  # fmt: skip
        elif isinstance(op, Upsample):
            kernels.upsample_nearest(arrays[op.x], out=out)
        elif isinstance(op, Concat):
            kernels.concat_channels(arrays[op.x], arrays[op.y], out=out)
        else:
            runtime_dit.run(op, arrays, room.classes, step)


class _Room:
    """One block of memory for a batch, in which values that are never alive together share their place.

    Attributes
    ----------
    arrays : list of array
        The values of the program, views into the block.
    classes : int64 array, (N,)
        Of the images, where the network knows any.
    steps : dict of int to list of Call
        The recorded steps.
    """

    def __init__(self, program: Program, images: int) -> None:
        offsets, size = plan(program, images)
        block = np.zeros(size, np.uint8)
        self.arrays = [
            block[start : start + images * value.bytes]
            .view(np.uint8 if value.codes else np.float32)
            .reshape(images, *value.shape)
            for start, value in zip(offsets, program.values, strict=True)
        ]
        self.classes = np.zeros(images, np.int64)
        self.steps: dict[int, list[Call]] = {}


def _pad(x: NDArray[np.uint8], pads: tuple[int, int, int, int], zero: int, out: NDArray[np.uint8]) -> None:
    """Put x into a frame of codes that mean 0."""
    (_, h, w, _), (top, _, left, _) = x.shape, pads

    def frame() -> None:
        out[...] = zero
        out[:, top : top + h, left : left + w] = x

    kernels.fill("pad", frame)


def _encode(op: Encode, x: NDArray[np.float32], step: int, out: NDArray[np.uint8]) -> None:
    q = at(op.quantizers, step)
    scale, zero_point, bits = float(q.scale), int(q.zero_point), q.spec.bits
    if op.norm is None:
        kernels.quantize(x, scale, zero_point, bits=bits, out=out)
    else:
        n = op.norm
        kernels.group_norm_silu_quantize(
            x, n.gamma, n.beta, n.groups, eps=n.eps, silu=op.silu, scale=scale, zero_point=zero_point, bits=bits,
            out=out,
        )  # fmt: skip


def _convolve(
    op: Convolve, x: NDArray[np.uint8], residual: NDArray[np.float32] | None, step: int, out: NDArray[np.float32]
) -> None:
    kernels.conv2d(
        x, op.weights, stride=op.stride, padding=op.padding, x_zero_point=at(op.zero_points, step),
        output=at(op.outputs, step), residual=residual, out=out,
    )  # fmt: skip


class IntegerDenoiser:
    """A noise predictor that computes in integers.

    Parameters
    ----------
    model : QuantizedModel
    engine : {"ref", "c"}
    """

    def __init__(self, model: QuantizedModel, engine: str = "c") -> None:
        self.model, self.program = model, lower(model)
        self.executor = Executor(self.program, engine)

    def __call__(self, x: Images, t: int, step: int, y: NDArray[np.integer] | None = None) -> Images:
        """Predict the noise in x (N, C, H, W), of images of the classes y (N,), at this step of the sampler."""
        self.program.check_step(t, step)
        answer = self.executor(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), step, y=y).transpose(0, 3, 1, 2)
        answer = answer[:, : x.shape[1]]  # further channels hold variances
        base = self.model.base
        if base.prediction == "eps":
            return answer.copy()
        ab = base.schedule.alpha_bar[t]
        return np.float32(np.sqrt(1 - ab)) * x + np.float32(np.sqrt(ab)) * answer


def integer_denoiser(model: QuantizedModel, engine: str = "c"):  # noqa: ANN201  NoisePredictor
    """Return the noise predictor of a quantized model in integers, with its correction if it has one."""
    eps = IntegerDenoiser(model, engine)
    return eps if model.correction is None else model.correction.applied(eps)
