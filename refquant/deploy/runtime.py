"""Execute a program: buffers planned once for a batch size, operations one after the other, nothing allocated per step.

Two engines compute the same integers:

    ref   `refquant.ref`: the normative NumPy sentences
    c     `refquant.kernels`: the C core, with whichever kernel is active

`Executor` is a noise predictor, so every sampler takes it. With `trace` it hands every value to a callable, by name;
integer sums are not kept apart from what follows them, so what a trace compares are codes and floats.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import kernels, ref
from ..diffusion.sampling import Images
from ..errors import ShapeError, UnknownNameError
from ..kernels import Dequantize
from ..quant.quantized import QuantizedModel
from . import islands
from .lower import lower
from .plan import plan
from .program import Concat, Convolve, Encode, Mix, Probabilities, Program, Scores, Upsample, at

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
        self._core: ModuleType = kernels if engine == "c" else ref
        self._arrays: dict[int, list[NDArray[Any]]] = {}

    def __call__(self, x: NDArray[np.float32], step: int, trace: Trace | None = None) -> NDArray[np.float32]:
        """Run one step on x (N, H, W, C) float32; the result is overwritten by the next call with as many images."""
        want = self.program.values[0].shape
        if x.ndim != 4 or x.shape[1:] != want or x.dtype != np.float32 or len(x) == 0:
            raise ShapeError(f"the program wants float32 (N, {', '.join(map(str, want))}), got {x.dtype} {x.shape}.")
        arrays = self._buffers(len(x))
        arrays[0][...] = x
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

    def _run(self, op: Any, arrays: list[NDArray[Any]], step: int) -> None:
        out = arrays[op.out]
        if isinstance(op, Encode):
            islands.encode(arrays[op.x].reshape(out.shape), at(op.quantizers, step), op.norm, op.silu, out)
        elif isinstance(op, Convolve):
            self._convolve(op, arrays, step, out)
        elif isinstance(op, Scores):
            self._products(arrays[op.q], arrays[op.k], at(op.q_params, step), at(op.k_params, step), out, True)
        elif isinstance(op, Probabilities):
            islands.probabilities(arrays[op.x], at(op.quantizers, step), out)
        elif isinstance(op, Mix):
            flat = out.reshape(len(out), -1, out.shape[-1])
            self._products(arrays[op.p], arrays[op.v], at(op.p_params, step), at(op.v_params, step), flat, False)
        elif isinstance(op, Upsample):
            islands.upsample(arrays[op.x], out)
        elif isinstance(op, Concat):
            cut = arrays[op.x].shape[-1]
            out[..., :cut], out[..., cut:] = arrays[op.x], arrays[op.y]

    def _convolve(self, op: Convolve, arrays: list[NDArray[Any]], step: int, out: NDArray[Any]) -> None:
        x, zero = arrays[op.x], at(op.zero_points, step)
        padding, pads = op.pads[0], op.pads
        if len(set(pads)) > 1:  # one-sided: pixels that mean 0 are put there by hand
            x = np.pad(x, ((0, 0), pads[:2], pads[2:], (0, 0)), constant_values=zero)
            padding = 0
        residual = None if op.residual is None else arrays[op.residual]
        output = at(op.outputs, step)
        if self.engine == "c":
            kernels.conv2d(
                x, op.weights, stride=op.stride, padding=padding, x_zero_point=zero, output=output, residual=residual,
                out=out,
            )  # fmt: skip
        else:
            sums = ref.conv2d(
                x, op.weights.unpack(), stride=op.stride, padding=padding, x_zero_point=zero,
                w_zero_point=op.weights.zero_point,
            )  # fmt: skip
            out[...] = output.apply(sums, residual)

    def _products(
        self, a: NDArray[np.uint8], b: NDArray[np.uint8], a_q: Any, b_q: Any, out: NDArray[np.float32], scores: bool
    ) -> None:
        """out[n] = scale a[n] b[n]ᵀ (scores) or scale a[n] b[n] for every image; b's codes move by 128 to be signed."""
        scale = np.float32(a_q.scale) * np.float32(b_q.scale)
        if scores:
            scale = np.float32(scale * np.float32(1 / np.sqrt(a.shape[-1])))
        output = Dequantize(np.full(out.shape[-1], scale, np.float32))
        za, zb = int(a_q.zero_point), int(b_q.zero_point) - 128
        for n in range(len(a)):
            signed = (b[n].reshape(-1, b.shape[-1]) ^ 0x80).view(np.int8)
            rows = signed if scores else np.ascontiguousarray(signed.T)
            if self.engine == "c":
                kernels.gemm(a[n], rows, a_zero_point=za, b_zero_point=zb, output=output, out=out[n])
            else:
                out[n] = output.apply(ref.gemm_blas(a[n], rows, a_zero_point=za, b_zero_point=zb))


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
