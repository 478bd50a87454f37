"""Tables of steps: each row is the range of what the network sees at that step, and is in force there."""

import numpy as np
import pytest
from toys import tiny_model, tiny_session

from refquant.diffusion.ddim import ddim_sample
from refquant.diffusion.denoiser import Denoiser
from refquant.diffusion.sampling import NoiseSource, timestep_sequence
from refquant.errors import RangeError, UnknownNameError
from refquant.quant.activations import step_tables
from refquant.quant.affine import QSpec
from refquant.quant.calibrate import CalibrationConfig
from refquant.quant.methods import METHODS
from refquant.quant.observers import StepTable, minmax
from refquant.quant.observers.steps import released_table
from refquant.quant.record import Trajectories
from refquant.quant.units import temporal_layers
from refquant.quant.wrap import activation_quantizers, watched, wrap
from refquant.threads import using_threads

SPEC, STEPS = QSpec(8), 5


@pytest.fixture(scope="module")
def network(model):
    """Weights at 4 bits, activations float."""
    wrapped, layers = wrap(model.network)
    for layer in layers.values():
        layer.quantize_weight(minmax(layer.layer.weight.data, QSpec(4, signed=True, axis=0)))
    return wrapped


@pytest.fixture(scope="module")
def specs(network):
    pinned = QSpec(8, symmetric=True)
    return {name: pinned if name.endswith(".probs") else SPEC for name in activation_quantizers(network)}


def random_states(t, images=3, seed=0):
    """Trajectories of unrelated states, so that no two steps look alike, even at equal t."""
    x = np.random.default_rng(seed).standard_normal((len(t), images, 1, 8, 8), dtype=np.float32)
    return Trajectories(x * np.linspace(2, 0.5, len(t), dtype=np.float32)[:, None, None, None, None], np.array(t))


def seen_at(network, trajectories, step):
    """Every quantizer's input at this step, all images together, as the sampler's denoiser calls the network."""
    parts = {}
    own = watched(network, lambda name, value: parts.setdefault(name, []).append(value))
    with using_threads(1):
        Denoiser(own)(trajectories.x[step], int(trajectories.t[step]), step)
    return {name: np.concatenate(values) for name, values in parts.items()}


def same(a, b):
    np.testing.assert_array_equal(a.scale, b.scale)
    np.testing.assert_array_equal(a.zero_point, b.zero_point)


# ------------------------------------------------------------------ the law, and tables that break it


def rows_are_the_ranges_of_their_steps(tables, network, trajectories):
    """table[k] = min-max of what the network sees at step k, bit for bit."""
    for step in range(trajectories.steps):
        for name, value in seen_at(network, trajectories, step).items():
            same(tables[name][step], minmax(value, tables[name].spec))


@pytest.mark.parametrize("images", [1, 3, 20])
def test_exact_tables_by_brute_force(network, specs, images):
    """Also where the images of a step are more than one thread takes at a time."""
    trajectories = random_states(timestep_sequence(20, STEPS, "uniform"), images)
    tables = step_tables(network, trajectories, specs)
    assert set(tables) == set(specs) and all(len(table) == STEPS for table in tables.values())
    rows_are_the_ranges_of_their_steps(tables, network, trajectories)


def by_t(tables, t):
    """The mutant: one row for each time-step; a later step at the same t overwrites an earlier one."""
    last = [max(j for j in range(len(t)) if t[j] == t[k]) for k in range(len(t))]
    return {name: StepTable(q.scale[last], q.zero_point[last], q.spec) for name, q in tables.items()}


def by_rank_of_t(tables, t):
    """The mutant: counts the different time-steps, and looks up with the step."""
    rows = np.minimum(np.unique(t, return_index=True)[1][::-1], len(t) - 1)
    rows = np.resize(rows, len(t))
    return {name: StepTable(q.scale[rows], q.zero_point[rows], q.spec) for name, q in tables.items()}


def ascending(tables, t):
    """The mutant: row 0 is the cleanest step."""
    return {name: StepTable(q.scale[::-1], q.zero_point[::-1], q.spec) for name, q in tables.items()}


@pytest.mark.parametrize("mutant", [by_t, by_rank_of_t, ascending])
def test_tables_with_another_index_are_caught(network, specs, mutant):
    """The quadratic schedule visits t = 0 twice; there rows by t are those of another step."""
    t = timestep_sequence(20, 8, "quadratic")
    assert len(set(t)) < len(t)
    trajectories = random_states(t)
    tables = step_tables(network, trajectories, specs)
    rows_are_the_ranges_of_their_steps(tables, network, trajectories)
    with pytest.raises(AssertionError):
        rows_are_the_ranges_of_their_steps(mutant(tables, t), network, trajectories)


def test_rows_by_t_go_unnoticed_where_every_t_comes_once(network, specs):
    """Why the quadratic schedule is needed above."""
    t = timestep_sequence(20, STEPS, "uniform")
    trajectories = random_states(t)
    rows_are_the_ranges_of_their_steps(by_t(step_tables(network, trajectories, specs), t), network, trajectories)


# ------------------------------------------------------------------ kinds, scopes


def test_running_tables_are_those_of_the_released_recipe(network, specs):
    """`released_table` of the recorded tensors with the same generator; batches may differ in a last bit of a sum."""
    trajectories = random_states(timestep_sequence(20, STEPS, "uniform"), images=20)
    tables = step_tables(network, trajectories, specs, kind="running", seed=3)
    recorded = [seen_at(network, trajectories, step) for step in range(STEPS)]
    for name, spec in specs.items():
        want = released_table([r[name] for r in recorded], spec, np.random.default_rng(3))
        np.testing.assert_allclose(tables[name].scale, want.scale, rtol=1e-5)
        assert np.abs(tables[name].zero_point - want.zero_point).max() <= 1


def test_running_ranges_clip_and_depend_on_the_seed(network, specs):
    """An average of extremes lies inside of the extremes; which samples start it matters."""
    trajectories = random_states(timestep_sequence(20, 2, "uniform"), images=40)
    exact = step_tables(network, trajectories, specs)["conv_in.input"]
    running = [step_tables(network, trajectories, specs, kind="running", seed=s)["conv_in.input"] for s in (0, 1)]
    assert (running[0].scale < exact.scale).all()
    assert not np.array_equal(running[0].scale, running[1].scale)


def test_of_layers_that_see_t_alone_one_state_a_step_is_enough(model, network, specs):
    """Constant scope: exact = running = exact over all images, bit for bit; and different from step to step."""
    constant = {f"{name}.input" for name in temporal_layers(model.network)}
    chosen = {name: specs[name] for name in constant}
    trajectories = random_states(timestep_sequence(20, STEPS, "uniform"))
    one = step_tables(network, random_states(trajectories.t, images=1), chosen)
    exact, running = (
        step_tables(network, trajectories, chosen, kind=k, constant=constant) for k in ("exact", "running")
    )
    for name in chosen:
        same(exact[name], running[name])
        same(exact[name], one[name])
    assert len(set(exact["mid.block_1.temb_proj.input"].scale.tolist())) == STEPS


def test_a_scope_with_other_layers_looks_at_all_images(model, network, specs):
    constant = {f"{name}.input" for name in temporal_layers(model.network)}
    trajectories = random_states(timestep_sequence(20, STEPS, "uniform"))
    rows_are_the_ranges_of_their_steps(
        step_tables(network, trajectories, specs, constant=constant), network, trajectories
    )


def test_threads_do_not_matter(network, specs):
    trajectories = random_states(timestep_sequence(20, 3, "uniform"), images=40)
    with using_threads(1):
        alone = step_tables(network, trajectories, specs, kind="running")
    with using_threads(2):
        together = step_tables(network, trajectories, specs, kind="running")
    for name in specs:
        same(alone[name], together[name])


def test_quantizers_that_are_set_are_obeyed(model, specs):
    """With conv_in's input at 2 bits, the next layer's range is that of what then reaches it."""
    wrapped, _ = wrap(model.network)
    trajectories = random_states(timestep_sequence(20, 2, "uniform"))
    free = step_tables(wrapped, trajectories, specs)
    activation_quantizers(wrapped)["conv_in.input"].set(minmax(trajectories.x, QSpec(2)))
    coarse = step_tables(wrapped, trajectories, specs)
    same(free["conv_in.input"], coarse["conv_in.input"])  # ranges are of values before they are rounded
    assert not np.array_equal(free["down.0.block.0.conv1.input"].scale, coarse["down.0.block.0.conv1.input"].scale)


def test_unknown_kind(network, specs):
    with pytest.raises(UnknownNameError, match="exact, running"):
        step_tables(network, random_states([0]), specs, kind="mse")


# ------------------------------------------------------------------ in the sampler


@pytest.fixture
def tabled(model):
    session = tiny_session(model, CalibrationConfig(images=2, steps=STEPS), weight_bits=4)
    return METHODS["tfmq"](session, tiar_iterations=2)


def sample(quantized, steps, **options):
    noise = NoiseSource(5, 2, quantized.base.image_shape)
    return ddim_sample(quantized.denoiser(), noise.draw(), quantized.base.schedule, noise, steps=steps, **options)


def test_the_sampler_puts_step_k_in_force_at_step_k(tabled):
    """A spy on every quantizer: what it rounds with at each call is its table's row, also in a second run."""
    told = []
    for name, q in tabled.quantizers().items():
        q.watcher = lambda _, value, name=name, q=q: told.append((name, q.qparams))
    with using_threads(1):
        for _ in range(2):
            sample(tabled, STEPS)
    calls = {name: [q for n, q in told if n == name] for name in tabled.quantizers()}
    for name, q in tabled.quantizers().items():
        assert len(calls[name]) == 2 * STEPS
        for k, row in enumerate(calls[name]):
            same(row, q.table[k % STEPS])


@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS + 1, 20])
def test_a_sampler_with_another_number_of_steps_is_refused(tabled, steps):
    with pytest.raises(RangeError, match=f"tables: they are for a sampler of {STEPS} steps, t = 16 to 0"):
        sample(tabled, steps)


def test_a_sampler_with_other_time_steps_is_refused(tabled):
    with pytest.raises(RangeError, match="Sample with as many steps"):
        sample(tabled, STEPS, spacing="quadratic")


def test_without_tables_any_sampler_will_do():
    quantized = METHODS["nearest"](tiny_session(tiny_model(), CalibrationConfig(images=2, steps=4)))
    for steps in (1, 7):
        assert np.isfinite(sample(quantized, steps)).all()
