"""The same convolution in other libraries: uint8 in, int8 weights with one scale per output, uint8 out.

Each peer gets what suits it: weights prepared beforehand, activations in the order it computes in (pixel by pixel,
channels last, for all of them), the same number of threads, and an output buffer of its own where it takes one.
A function here returns a call to be timed and a way to read its last result, or raises `Unfit` with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .kernel_problems import Problem


class Engine(NamedTuple):
    """A prepared convolution: `run` computes it, `read` turns what run returned into an array (N, H, W, O)."""

    run: Callable[[], Any]
    read: Callable[[Any], NDArray[Any]]


class Unfit(Exception):
    """A peer cannot do this here; the message says why."""


def onnxruntime(p: Problem, threads: int) -> Engine:
    """QLinearConv in its channels-last form, which ONNX Runtime itself puts inside of larger networks."""
    import onnxruntime
    from onnx import helper

    attributes = {"kernel_shape": [p.shape.k] * 2, "pads": [p.padding] * 4, "strides": [1, 1], "channels_last": 1}
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    node = helper.make_node("QLinearConv", names, ["y"], domain="com.microsoft", **attributes)
    constants = _constants(p)
    graph = helper.make_graph([node], "conv", *_ends(p), [constants[n] for n in names[1:]])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y = np.empty((*p.x.shape[:3], p.shape.o), np.uint8)
    binding = session.io_binding()  # no copies, and no allocation of the output
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(p.x))
    binding.bind_output("y", "cpu", 0, np.uint8, y.shape, y.ctypes.data)

    def run() -> NDArray[np.uint8]:
        session.run_with_iobinding(binding)
        return y  # and keeps its memory, of which the binding has the address only

    return Engine(run, lambda y: y)


def torch_onednn(p: Problem, threads: int) -> Engine:
    """PyTorch's quantized convolution through oneDNN."""
    return _torch(p, threads, "onednn")


def torch_fbgemm(p: Problem, threads: int) -> Engine:
    """PyTorch's quantized convolution through FBGEMM."""
    return _torch(p, threads, "fbgemm")


def _torch(p: Problem, threads: int, backend: str) -> Engine:
    import torch

    if backend not in torch.backends.quantized.supported_engines:
        raise Unfit(f"this PyTorch has no {backend}")
    torch.set_num_threads(threads)
    torch.backends.quantized.engine = backend  # of the packing, and with it of the calls
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that quantized tensors will be removed one day
        w = torch._make_per_channel_quantized_tensor(
            torch.tensor(p.w).permute(0, 3, 1, 2), torch.tensor(p.w_scale, dtype=torch.float64),
            torch.zeros(p.shape.o, dtype=torch.long), 0,
        )  # fmt: skip
        x = torch._make_per_tensor_quantized_tensor(torch.tensor(p.x).permute(0, 3, 1, 2), p.x_scale, p.zero_point)
        packed = torch.ops.quantized.conv2d_prepack(w, None, [1, 1], [p.padding] * 2, [1, 1], 1)
    convolve, y_scale, y_zero = torch.ops.quantized.conv2d, p.y_scale, p.y_zero_point
    return Engine(lambda: convolve(x, packed, y_scale, y_zero), lambda y: y.int_repr().permute(0, 2, 3, 1).numpy())


def openvino(p: Problem, threads: int) -> Engine:
    """Dequantize, convolve, quantize, which OpenVINO fuses into one int8 convolution; that is checked.

    The transpositions stand where they cost nothing: after the first and last step they become names of axes.
    Before the first one (or asked for as a layout of the tensors) they would make it fall back to floats.
    """
    import openvino
    from onnx import helper

    node, names = helper.make_node, ["x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    nodes = [
        node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["x_real"]),
        node("Transpose", ["x_real"], ["x_planes"], perm=[0, 3, 1, 2]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_real"], axis=0),
        node("Conv", ["x_planes", "w_real"], ["y_real"], kernel_shape=[p.shape.k] * 2, pads=[p.padding] * 4),
        node("QuantizeLinear", ["y_real", "y_scale", "y_zero"], ["y_planes"]),
        node("Transpose", ["y_planes"], ["y"], perm=[0, 2, 3, 1]),
    ]
    constants = _constants(p)
    graph = helper.make_graph(nodes, "conv", *_ends(p), [constants[n] for n in names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    kinds = {info["layerType"]: info["primitiveType"] for info in _layers(compiled)}
    if not kinds.get("Convolution", "").endswith("I8") or "Transpose" in kinds:
        raise Unfit(f"it would run {kinds}, which is no int8 convolution alone")
    request = compiled.create_infer_request()
    y = np.empty((*p.x.shape[:3], p.shape.o), np.uint8)
    request.set_input_tensor(openvino.Tensor(p.x, shared_memory=True))
    request.set_output_tensor(openvino.Tensor(y, shared_memory=True))

    def run() -> NDArray[np.uint8]:
        request.infer()
        return y

    return Engine(run, lambda y: y)


def _layers(compiled: Any) -> list[dict[str, str]]:
    return [{key: str(value.value if hasattr(value, "value") else value) for key, value in op.get_rt_info().items()}
            for op in compiled.get_runtime_model().get_ordered_ops()]  # fmt: skip


def numpy_float32(p: Problem, threads: int) -> Engine:
    """A float32 matrix product; for a convolution, of unfolded windows (im2col), unfolded anew in each call."""
    x = p.x.astype(np.float32) - np.float32(p.zero_point)
    flat = np.ascontiguousarray(p.w.reshape(p.shape.o, -1).T, np.float32)
    y = np.empty((p.shape.n * p.shape.size**2, p.shape.o), np.float32)
    if p.gemm:
        return Engine(lambda: np.matmul(x, flat, out=y), lambda y: y)
    padded = np.pad(x, ((0, 0), (p.padding,) * 2, (p.padding,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (p.shape.k,) * 2, axis=(1, 2))
    windows = windows.transpose(0, 1, 2, 4, 5, 3)
    columns = np.empty(windows.shape, np.float32)

    def run() -> NDArray[np.float32]:
        np.copyto(columns, windows)
        return np.matmul(columns.reshape(len(y), -1), flat, out=y)

    return Engine(run, lambda y: y.reshape(*p.x.shape[:3], p.shape.o))


def _constants(p: Problem) -> dict[str, Any]:
    """The operands other than x, as ONNX has them: weights (O, C, k, k)."""
    from onnx import numpy_helper

    arrays = {
        "x_scale": np.float32(p.x_scale), "x_zero": np.uint8(p.zero_point),
        "w": np.ascontiguousarray(p.w.transpose(0, 3, 1, 2)), "w_scale": p.w_scale,
        "w_zero": np.zeros(p.shape.o, np.int8), "y_scale": np.float32(p.y_scale), "y_zero": np.uint8(p.y_zero_point),
    }  # fmt: skip
    return {name: numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()}


def _ends(p: Problem) -> tuple[list[Any], list[Any]]:
    """Input and output of an ONNX graph, both channels last."""
    from onnx import TensorProto, helper

    shapes = {"x": p.x.shape, "y": (*p.x.shape[:3], p.shape.o)}
    x, y = (helper.make_tensor_value_info(name, TensorProto.UINT8, shape) for name, shape in shapes.items())
    return [x], [y]


# What each needs, and for which of the two problems it stands.
CONVOLUTIONS: dict[str, tuple[tuple[str, ...], Callable[[Problem, int], Engine]]] = {
    "onnxruntime": (("onnxruntime", "onnx"), onnxruntime),
    "torch onednn": (("torch",), torch_onednn),
    "torch fbgemm": (("torch",), torch_fbgemm),
    "openvino": (("openvino", "onnx"), openvino),
}
FLOATS = {"numpy float32": (("numpy",), numpy_float32)}


def versions(packages: tuple[str, ...]) -> str | None:
    """Return "name version, ..."; None if one of them is not installed."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in packages)
    except PackageNotFoundError:
        return None
