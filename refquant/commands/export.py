"""refquant export: a quantized model as an ONNX network, for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import io
from ..deploy.export import export
from ..deploy.results import IMAGES, result_quantizers
from ..diffusion.model import find
from ..errors import CheckpointError, RefquantError
from ..nn.dit import DiT
from ..quant.quantized import load_quantized
from .common import add_verb, say, setting


def add(verbs: Any) -> None:
    """Describe the verb."""
    p = add_verb(
        verbs, "export", "Write a quantized model as an ONNX network, rounding by QuantizeLinear and DequantizeLinear.",
        "refquant export w4a8.safetensors --onnx w4a8.onnx --round-results",
    )  # fmt: skip
    p.add_argument("model", metavar="MODEL", help="file of a quantized model")
    p.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="where the network is written")
    p.add_argument(
        "--step", type=int, metavar="K",
        help="for this step of the sampler alone, 0 the noisiest (default: the network has an input `step`)",
    )  # fmt: skip
    p.add_argument(
        "--round-results", action="store_true",
        help="round what convolutions give to 8 bits, too, which ONNX Runtime needs to multiply in integers; the "
        f"ranges are those of {IMAGES} trajectories of the model, from noise of the --seed",
    )  # fmt: skip
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the network, and say what other runtimes will make of it."""
    if not args.onnx.parent.is_dir():
        raise RefquantError(f"{args.onnx}: there is no folder {args.onnx.parent}. Make it first, or choose another.")
    kind = io.read_metadata(find(args.model))["kind"]
    if kind != "quantized":
        raise CheckpointError(f"{args.model} holds a {kind}: quantized models are exported. Quantize it first.")
    model = load_quantized(args.model)
    say(args, f"{model.base.name} {model.recipe['method']}, {setting()}")
    if args.round_results and isinstance(model.network, DiT):
        raise RefquantError("--round-results is for convolutions: ONNX Runtime multiplies the integers of a "
                            "transformer without it. Leave it out.")  # fmt: skip
    results = result_quantizers(model, seed=args.seed) if args.round_results else {}
    network = export(model, step=args.step, results=results)
    written = network.SerializeToString()
    io.write_atomically(args.onnx, [written])
    inputs = ", ".join(value.name for value in network.graph.input)
    print(f"{args.onnx}: {len(written) / 1e6:.2f} MB, ONNX opset {network.opset_import[0].version}, {inputs} -> eps")
    for remark in remarks(network):
        print(remark)
    return 0


def remarks(network: Any) -> list[str]:
    """Say where runtimes will not multiply integers, and what would help."""
    nodes = list(network.graph.node)
    convolves = any(node.op_type == "Conv" for node in nodes)
    products = [node for node in nodes if node.op_type == ("Conv" if convolves else "MatMul")]
    integer = {node.name for node in nodes if node.op_type == "DequantizeLinear"}
    both = sum(node.input[0] in integer and node.input[1] in integer for node in products)
    out = [f"{both} of {len(products)} {'convolutions' if convolves else 'matrix products'} multiply codes by codes"]
    tables = sum(node.op_type == "Gather" and node.name.endswith(".scale") for node in nodes)
    if tables:
        out.append(
            f"{tables} scales depend on the step, and runtimes multiply floats where scales are no constants: "
            "--step makes a network for one step"
        )
    elif convolves and both and not any(node.name.endswith(".result") for node in nodes):
        out.append("ONNX Runtime multiplies integers with --round-results only; OpenVINO does as it is")
    own = sum(node.name.endswith(".weight") and len(node.input) == 3 for node in nodes)
    if own:
        out.append(f"{own} weights have zero points of their own: OpenVINO multiplies floats there")
    return out
