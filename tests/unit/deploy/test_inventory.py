"""What a lowered network consists of: complete, in order, and with sizes that can be counted another way."""

import numpy as np
import pytest
import toys

from refquant.deploy import lower
from refquant.deploy.inventory import inventory
from refquant.deploy.program import INTEGER, Convolve
from refquant.nn.layers import Conv2d
from refquant.quant.calibrate import Calibration
from refquant.quant.cost import bit_operations
from refquant.quant.methods import METHODS


@pytest.fixture(scope="module", params=[("nearest", 8), ("nearest", 4), ("tfmq", 4)], ids=str)
def quantized(request, calibration):
    name, bits = request.param
    options = {"tiar_iterations": 2} if name == "tfmq" else {}
    return METHODS[name](toys.tiny_session(calibration, weight_bits=bits), **options)


def test_every_operation_is_listed_as_what_it_is(quantized):
    program = lower(quantized)
    entries = inventory(program)
    assert [entry.name for entry in entries] == [program.values[op.out].name for op in program.operations]
    assert [entry.integer for entry in entries] == [isinstance(op, INTEGER) for op in program.operations]
    assert [entry.shape for entry in entries] == [program.values[op.out].shape for op in program.operations]
    layers = {name for name, layer in quantized.layers.items() if isinstance(layer.layer, Conv2d)}
    bits = quantized.recipe["weight_bits"]
    assert {e.name for e in entries if e.what == f"convolution, {bits}-bit weights"} == layers
    assert "group norm, SiLU, to codes" in {e.what for e in entries if e.name.endswith("conv1.input")}
    assert {e.what for e in entries if e.name.endswith("q.input")} == {"group norm, to codes"}
    assert {e.what for e in entries if e.name == "conv_in.input"} == {"to codes"}


def test_multiplications_are_those_of_the_cost_model(quantized):
    """Which counts bit operations of the layers as they are wrapped, the time layers among them."""
    times = {name: layer.layer.weight.data.size for name, layer in quantized.layers.items()
             if not isinstance(layer.layer, Conv2d)}  # fmt: skip
    weight, bits = quantized.recipe["weight_bits"], quantized.recipe["input_bits"]
    total = 0
    for entry in inventory(lower(quantized)):
        attends = entry.name.endswith((".scores", ".mixed"))
        total += entry.multiplications * (bits * 8 if attends else weight * bits)
        assert (entry.multiplications > 0) == entry.integer
    assert total + sum(times.values()) * weight * bits == bit_operations(quantized)


def test_bytes_are_those_of_the_arrays(quantized):
    """Packed weights as they lie in memory; of tables a scale and a bias of every output and step, each array once."""
    program = lower(quantized)
    entries = dict(zip(program.operations, inventory(program), strict=True))
    for op, entry in entries.items():
        if isinstance(op, Convolve):
            arrays = {id(a): a for o in op.outputs for a in (o.scale, o.bias)}
            assert entry.weight_bytes == op.weights.nbytes
            assert entry.table_bytes == sum(a.nbytes for a in arrays.values())
        else:
            assert entry.weight_bytes == 0
    norms = [op for op in program.operations if getattr(op, "norm", None) is not None]
    arrays = {id(a): a for op in norms for a in (op.norm.gamma, op.norm.beta)}
    shared = sum(entries[op].table_bytes for op in norms)
    quantizers = sum(q.scale.nbytes + q.zero_point.nbytes for op in norms for q in op.quantizers)
    assert shared == sum(a.nbytes for a in arrays.values()) + quantizers
    assert len(arrays) == 2 * len(norms)  # q, k and v of attention have one norm and one range: one operation
    assert np.all([e.table_bytes > 0 for e in entries.values() if e.integer and e.weight_bytes])


def transformer(**options):
    model = toys.tiny_dit()
    method = METHODS["tqdit" if options else "nearest"]
    return method(toys.tiny_session(Calibration(model, toys.CALIBRATION)), **options)


@pytest.mark.parametrize("options", [{}, {"groups": 2, "gelu": "split"}], ids=str)
def test_a_transformer(options):
    """Every product is there: those of one region and one sign come to what the network's shapes say."""
    quantized = transformer(**options)
    program, cfg = lower(quantized), toys.TINY_DIT
    entries = inventory(program)
    assert [entry.integer for entry in entries] == [isinstance(op, INTEGER) for op in program.operations]
    assert not any("convolution" in e.what for e in entries if e.name != "x_embedder.proj")
    tokens, d, hidden = cfg.tokens, cfg.width, cfg.mlp_ratio * cfg.width
    twice = 2 if options else 1  # both regions, both signs
    block = 4 * d * d + hidden * d * (1 + twice)
    attention = cfg.depth * tokens * tokens * d * (1 + twice)
    ends = 2 * tokens * d * cfg.patch**2
    assert sum(e.multiplications for e in entries) == cfg.depth * tokens * block + attention + ends
    layers = {name for name in quantized.layers if "adaLN" not in name and not name.startswith("t_embedder")}
    packed = {id(op.weights): op.weights.nbytes for op in program.operations if hasattr(op, "weights")}
    assert len(packed) == len(layers)
    assert sum(e.weight_bytes for e in entries) == sum(packed.values())
    table = next(e for e in entries if e.name == "condition")
    assert table.table_bytes == 4 * len(program.timesteps) * (cfg.classes + 1) * (6 * cfg.depth + 2) * d
