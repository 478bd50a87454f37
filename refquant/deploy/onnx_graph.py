"""An ONNX graph while it is being written: constants, tables of the sampler's steps, nodes.

Values and nodes are called by the names of this package, so that a viewer or a profiler of another runtime shows the
layers under the names that `refquant info --layers` lists. Needs the package onnx, which writes the file and computes
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RefquantError

OPSET, IR_VERSION = 21, 10  # the first ones with integers of 4 bits


class Graph:
    """Nodes and initializers.

    Parameters
    ----------
    step : int or None
        Numbers of this step of the sampler become constants; None: the graph has an input ``step`` () int64 and looks
        them up.
    """

    def __init__(self, step: int | None) -> None:
        try:
            import onnx
        except ImportError:
            raise RefquantError("exporting needs the package onnx. Install it: pip install refquant[onnx].") from None
        self.onnx, self.step = onnx, step
        self.nodes: list[Any] = []
        self.arrays: dict[str, NDArray[Any]] = {}
        self.initializers: dict[str, Any] = {}
        self.looked_up: set[str] = set()

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Store an array, once under each name."""
        if name not in self.arrays:
            self.arrays[name] = array
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        assert np.array_equal(self.arrays[name], array), f"two different constants are called {name}"
        return name

    def int4(self, name: str, codes: NDArray[np.int8]) -> str:
        """Store codes from -8 to 7, two to a byte, the first in the low half."""
        flat = np.append(codes.ravel(), np.zeros(codes.size % 2, np.int8)) & 15
        packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
        kind = self.onnx.TensorProto.INT4
        self.initializers[name] = self.onnx.helper.make_tensor(name, kind, codes.shape, packed.tobytes(), raw=True)
        return name

    def of_step(self, name: str, rows: NDArray[Any]) -> str:
        """One row of (S, ...), or of (1, ...) for all steps; a name that is there already has the same rows.

        It is a constant where the step is known or all rows are equal, else it is looked up.

        Parameters
        ----------
        name : str
        rows : array, (S, ...) or (1, ...)

        Returns
        -------
        str
            Name of the value in the graph.
        """
        if name in self.looked_up:
            return name
        if len(rows) == 1 or (self.step is None and (rows == rows[0]).all()):
            return self.constant(name, rows[0])
        if self.step is not None:
            return self.constant(name, rows[self.step])
        self.looked_up.add(name)
        return self.node("Gather", [self.constant(f"{name}.table", rows), "step"], name, axis=0)

    def node(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append a node called `name`, which is the name of its value, too."""
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def parts(self, x: str, names: Sequence[str], axis: int) -> list[str]:
        """Cut a value into equal parts of these names along an axis."""
        how = {"axis": axis, "num_outputs": len(names)}
        self.nodes.append(self.onnx.helper.make_node("Split", [x], list(names), name=f"{x}.split", **how))
        return list(names)

    def model(
        self, name: str, x_shape: Sequence[int], producer: str, facts: Mapping[str, str], *, classes: bool = False
    ) -> Any:
        """Finish: inputs, and the output ``eps`` like ``x``.

        Parameters
        ----------
        name : str
            Of the graph.
        x_shape : sequence of int
            Of one image: ``x`` is ``(N, *x_shape)`` float32.
        producer : str
        facts : mapping of str to str
            The model's properties.
        classes : bool
            The network knows classes: ``y`` (N,) int64.

        Returns
        -------
        onnx.ModelProto
            Where the step is not known, it has the input ``step`` () int64, too.
        """
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        inputs = [helper.make_tensor_value_info("x", kinds.FLOAT, ["N", *x_shape])]
        if classes:
            inputs.append(helper.make_tensor_value_info("y", kinds.INT64, ["N"]))
        if self.step is None:
            inputs.append(helper.make_tensor_value_info("step", kinds.INT64, []))
        outputs = [helper.make_tensor_value_info("eps", kinds.FLOAT, ["N", *x_shape])]
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        opset = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name=producer)
        helper.set_model_props(made, dict(facts))
        return made
