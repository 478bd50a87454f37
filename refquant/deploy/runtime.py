"""Execute a program: buffers planned once for a batch size, operations one after the other, nothing allocated per step.

Two engines give the same bits:

    ref   the normative NumPy sentences (`refquant.ref`)
    c     the C core, with whichever kernel is active (`refquant.kernels`)

`Executor` is a noise predictor, so every sampler takes it. With `trace` it hands every value to a callable, by name;
integer sums are not kept apart from what follows them, so what a trace compares are codes and floats.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels
from ..diffusion.sampling import Images
from ..errors import ShapeError, UnknownNameError
from ..kernels import Dequantize
from ..quant.quantized import QuantizedModel
from .lower import lower
from .plan import plan
from .program import Concat, Convolve, Encode, Mix, Operation, Probabilities, Program, Scores, Upsample, at

ENGINES = ("ref", "c")
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
        self._arrays: dict[int, list[NDArray[Any]]] = {}

    def __call__(self, x: NDArray[np.float32], step: int, trace: Trace | None = None) -> NDArray[np.float32]:
        """Run one step on x (N, H, W, C) float32; the result is overwritten by the next call with as many images."""
        want = self.program.values[0].shape
        if x.ndim != 4 or x.shape[1:] != want or x.dtype != np.float32 or len(x) == 0:
            raise ShapeError(f"the program wants float32 (N, {', '.join(map(str, want))}), got {x.dtype} {x.shape}.")
        arrays = self._buffers(len(x))
        arrays[0][...] = x
        with kernels.using("ref") if self.engine == "ref" else nullcontext():
            for operation in self.program.operations:
                self._run(operation, arrays, step)
                if trace is not None:
                    trace(self.program.values[operation.out].name, arrays[operation.out])
        return arrays[self.program.operations[-1].out]

    def _buffers(self, images: int) -> list[NDArray[Any]]:
        """Views into one block of memory, in which values that are never alive together share their place."""
        if images not in self._arrays:
            offsets, size = plan(self.program, images)
            block = np.zeros(size, np.uint8)
            self._arrays[images] = [
                block[start : start + images * value.bytes]
                .view(np.uint8 if value.codes else np.float32)
                .reshape(images, *value.shape)
                for start, value in zip(offsets, self.program.values, strict=True)
            ]
        return self._arrays[images]

    def _run(self, op: Operation, arrays: list[NDArray[Any]], step: int) -> None:
        out = arrays[op.out]
        if isinstance(op, Encode):
            _encode(op, arrays[op.x].reshape(out.shape), step, out)
        elif isinstance(op, Convolve):
            _convolve(op, arrays[op.x], None if op.residual is None else arrays[op.residual], step, out)
        elif isinstance(op, Scores):
            q, k = at(op.q_params, step), at(op.k_params, step)
            scale = q.scale * k.scale * np.float32(1 / np.sqrt(arrays[op.q].shape[-1]))
            _products(arrays[op.q], arrays[op.k], int(q.zero_point), int(k.zero_point), scale, out)
        elif isinstance(op, Probabilities):
            q = at(op.quantizers, step)
            kernels.softmax_quantize(arrays[op.x], scale=float(q.scale), bits=q.spec.bits, out=out)
        elif isinstance(op, Mix):
            p, v = at(op.p_params, step), at(op.v_params, step)
            flat, transposed = out.reshape(len(out), -1, out.shape[-1]), arrays[op.v].transpose(0, 2, 1)
            _products(arrays[op.p], transposed, int(p.zero_point), int(v.zero_point), p.scale * v.scale, flat)
        elif isinstance(op, Upsample):
            kernels.upsample_nearest(arrays[op.x], out=out)
        elif isinstance(op, Concat):
            cut = arrays[op.x].shape[-1]
            out[..., :cut], out[..., cut:] = arrays[op.x], arrays[op.y]


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
    zero, padding = at(op.zero_points, step), op.pads[0]
    if len(set(op.pads)) > 1:  # one-sided: pixels that mean 0 are put there by hand
        x = np.pad(x, ((0, 0), op.pads[:2], op.pads[2:], (0, 0)), constant_values=zero)
        padding = 0
    kernels.conv2d(
        x, op.weights, stride=op.stride, padding=padding, x_zero_point=zero, output=at(op.outputs, step),
        residual=residual, out=out,
    )  # fmt: skip


def _products(
    a: NDArray[np.uint8], b: NDArray[np.uint8], a_zero: int, b_zero: int, scale: np.float32, out: NDArray[np.float32]
) -> None:
    """out[n] = scale a[n] b[n]ᵀ for every image; b's codes move by 128, for the kernels multiply by signed ones."""
    signed = np.ascontiguousarray(b ^ 0x80).view(np.int8)
    output = Dequantize(np.full(out.shape[-1], scale, np.float32))
    for n in range(len(a)):
        kernels.gemm(a[n], signed[n], a_zero_point=a_zero, b_zero_point=b_zero - 128, output=output, out=out[n])


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

    def __call__(self, x: Images, t: int, step: int) -> Images:
        """Predict the noise in x (N, C, H, W) at this step of the sampler."""
        self.program.check_step(t, step)
        answer = self.executor(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), step).transpose(0, 3, 1, 2)
        base = self.model.base
        if base.prediction == "eps":
            return answer.copy()
        ab = base.schedule.alpha_bar[t]
        return np.float32(np.sqrt(1 - ab)) * x + np.float32(np.sqrt(ab)) * answer


def integer_denoiser(model: QuantizedModel, engine: str = "c"):  # noqa: ANN201  NoisePredictor
    """Return the noise predictor of a quantized model in integers, with its correction if it has one."""
    eps = IntegerDenoiser(model, engine)
    return eps if model.correction is None else model.correction.applied(eps)
