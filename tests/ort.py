"""ONNX Runtime, as the tests of exports use it; without it, a module that imports this is skipped."""

import pytest

onnxruntime = pytest.importorskip("onnxruntime")

EXACT = ("session.x64quantprecision", "1")  # else, where a processor has no VNNI, sums of two products saturate


def session(network, optimized=True, kept=None):
    """Load an exported network; `kept` is where the optimized graph goes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(*EXACT)
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if kept is not None:
        options.optimized_model_filepath = str(kept)
    return onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
