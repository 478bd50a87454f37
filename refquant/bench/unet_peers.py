"""The same network in other libraries, float32 and int8, each as fast as it goes there.

A function here takes a case and the number of threads, and returns an engine: a pass to be timed, and a way to read
its last answer. All passes take an input that lies ready and give (N, C, H, W) float32 back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..nn.dit import DiT
from .kernel_peers import Unfit
from .unet_networks import Case, T

OURS_FLOAT = "refquant float32"
OURS = {"refquant W8A8": 8, "refquant W4A8": 4}  # bits of weights


class Engine(NamedTuple):
    """A network ready to run: `run` does a pass, `read` turns what run returned into an array, `note` says more."""

    run: Callable[[], Any]
    read: Callable[[Any], NDArray[np.float32]]
    note: str = ""


def torch_eager(case: Case, threads: int) -> Engine:
    """PyTorch eager in its default layout."""
    return _torch(case, threads, "pytorch eager")


def torch_channels_last(case: Case, threads: int) -> Engine:
    """PyTorch eager, channels last."""
    return _torch(case, threads, "pytorch channels-last")


def torch_compiled(case: Case, threads: int) -> Engine:
    """torch.compile of the network with frozen weights, so that they are prepared once; needs a C++ compiler."""
    return _torch(case, threads, "pytorch channels-last", compiled=True)


def _torch(case: Case, threads: int, layout: str, *, compiled: bool = False) -> Engine:
    if compiled:  # a folder of its own: what a compiler that was killed left in the shared one breaks later runs
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(case.folder) / "inductor"))
    import torch

    from . import torch_dit, torch_unet

    network = case.float_model().network
    if isinstance(network, DiT):
        if layout == "pytorch channels-last" and not compiled:
            raise Unfit("tokens have their features last in either layout")
        run = torch_dit.forward(torch_dit.build(network, threads), case.x, T, case.y, compiled=compiled)
    else:
        order = torch_unet.LAYOUTS[layout]
        run = torch_unet.forward(torch_unet.build(network, order, threads), case.x, T, order, compiled=compiled)
    return Engine(run, torch.Tensor.numpy)


def onnxruntime_float(case: Case, threads: int) -> Engine:
    """ONNX Runtime on the float32 network."""
    return _onnxruntime(case, threads, "float32")


def onnxruntime_int8(case: Case, threads: int) -> Engine:
    """ONNX Runtime on the quantized network."""
    return _onnxruntime(case, threads, "int8")


def _onnxruntime(case: Case, threads: int, network: str) -> Engine:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # exact products: where the processor has no dot product of bytes, sums of two saturate otherwise, and the answer is
    # another one (0.3 to 0.6 off, where rounding makes 0.03 to 0.1)
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_free_dimension_override_by_name("N", case.batch)
    with tempfile.TemporaryDirectory() as folder:  # what it made of the network, to be counted
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        path = str(case.path(f"{network}.onnx"))
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    feed, note = case.inputs, _counted([(kind, kind in ONNXRUNTIME_INTEGER) for kind in kinds])
    return Engine(lambda: session.run(None, feed)[0], np.asarray, note)


def openvino_float(case: Case, threads: int) -> Engine:
    """OpenVINO on the float32 network, held to float32: by default it takes bfloat16 where the processor has it."""
    return _openvino(case, threads, "float32", {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_int8(case: Case, threads: int) -> Engine:
    """OpenVINO on the quantized network; what is not int8 there has the type it likes best."""
    return _openvino(case, threads, "int8", {})


def _openvino(case: Case, threads: int, network: str, settings: dict[str, str]) -> Engine:
    import openvino

    core = openvino.Core()
    model = core.read_model(case.path(f"{network}.onnx"))
    model.reshape({name: list(array.shape) for name, array in case.inputs.items()})
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", **settings}
    compiled = core.compile_model(model, "CPU", settings)
    kinds = [_kind(op) for op in compiled.get_runtime_model().get_ordered_ops()]
    rest = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
    request = compiled.create_infer_request()
    for name, array in case.inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor()

    note = f"{_counted([(what, how.endswith('I8')) for what, how in kinds])}, other operations in {rest}"
    return Engine(run, lambda tensor: tensor.data, note)


def _kind(op: Any) -> tuple[str, str]:
    facts = op.get_rt_info()
    what, how = (facts[key].value if hasattr(facts[key], "value") else facts[key]
                 for key in ("layerType", "primitiveType"))  # fmt: skip
    return str(what), str(how)


def _counted(operations: Sequence[tuple[str, bool]]) -> str:
    """Say how many convolutions are integer ones; of a network without convolutions, how many matrix products.

    Parameters
    ----------
    operations : sequence of (str, bool)
        What each is called, and whether it multiplies integers.
    """
    counted = {what: [integer for kind, integer in operations if kind.endswith(ends)]
               for what, ends in PRODUCTS.items()}  # fmt: skip
    what = next((what for what, found in counted.items() if found), "products")
    found = counted.get(what, [])
    return f"{sum(found)} of {len(found)} {what} in int8"


# What operations that multiply are called in other libraries, by their ends.
PRODUCTS = {"convolutions": ("Conv", "Convolution"),
            "matrix products": ("MatMul", "MatMulIntegerToFloat", "Gemm", "FullyConnected")}  # fmt: skip
ONNXRUNTIME_INTEGER = {"QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm"}


# What each needs, and what it is made of the network.
FLOATS: dict[str, tuple[tuple[str, ...], Callable[[Case, int], Engine]]] = {
    "PyTorch eager": (("torch",), torch_eager),
    "PyTorch channels-last": (("torch",), torch_channels_last),
    "PyTorch compiled": (("torch",), torch_compiled),
    "ONNX Runtime float32": (("onnxruntime", "onnx"), onnxruntime_float),
    "OpenVINO float32": (("openvino", "onnx"), openvino_float),
}
INTEGERS: dict[str, tuple[tuple[str, ...], Callable[[Case, int], Engine]]] = {
    "ONNX Runtime int8": (("onnxruntime", "onnx"), onnxruntime_int8),
    "OpenVINO int8": (("openvino", "onnx"), openvino_int8),
}
SLOW_START = ("PyTorch compiled",)  # compiles for minutes: one turn, as long as those of the others together
