"""The methods for diffusion transformers: what each promises, on a tiny conditional one."""

from dataclasses import replace

import numpy as np
import pytest
from toys import CALIBRATION, TINY_DIT, tiny_dit, tiny_model, tiny_session

from refquant.errors import RangeError, ShapeError, UnknownNameError
from refquant.quant.affine import QSpec, dequantize
from refquant.quant.calibrate import Calibration
from refquant.quant.curvature import evened, samples
from refquant.quant.dynamic import PerToken
from refquant.quant.grids import GridTable
from refquant.quant.groupwise import as_rows, group_qparams
from refquant.quant.guided import rounded
from refquant.quant.methods import METHODS, TRANSFORMER_METHODS, ditas, methods_for, options_of, qdit, tfmq
from refquant.quant.mrq_sign import SignSplit
from refquant.quant.mrq_softmax import SoftmaxRegions
from refquant.quant.observers import StepTable, minmax
from refquant.quant.quantized import load_quantized
from refquant.quant.record import pick
from refquant.quant.temporal import every_condition, features
from refquant.quant.transformer import sources, token_layers

OPTIONS = {
    "tqdit": {"groups": 2},
    "ptq4dit": {"time_steps": 3},
    "qdit": {"group": 8, "rounds": 2, "population": 2},
    "ditas": {"group": 8, "rank": 2},
}
EACH = pytest.mark.parametrize("name", TRANSFORMER_METHODS)
PROBS = [f"blocks.{i}.attn.product.probs" for i in range(TINY_DIT.depth)]


@pytest.fixture(scope="module")
def recorded():
    return Calibration(tiny_dit(), replace(CALIBRATION, images=4))


def made_by(name, recorded, *, bits=(4, 8), coverage="full", **options):
    session = tiny_session(recorded, weight_bits=bits[0], input_bits=bits[1], coverage=coverage, states=8)
    return METHODS[name](session, **{**OPTIONS[name], **options})


def answers(model, trajectories):
    """All answers on the float trajectories, (S, N, C, H, W)."""
    eps = model.denoiser()
    steps = enumerate(trajectories.t.tolist())
    return np.stack([eps(trajectories.x[s], t, s, trajectories.y) for s, t in steps])


# ------------------------------------------------------------------ all four


@EACH
def test_file_and_back(name, recorded, tmp_path):
    """The loaded model gives the same answers, bit for bit, and its file is the same again."""
    made = made_by(name, recorded)
    made.save(tmp_path / "a.safetensors")
    again = load_quantized(str(tmp_path / "a.safetensors"))
    got = answers(again, recorded.trajectories)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, answers(made, recorded.trajectories))
    assert np.abs(got - answers(recorded.model, recorded.trajectories)).max() > 0
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@EACH
def test_float_bits_give_the_float_model(name, recorded):
    made = made_by(name, recorded, bits=(32, 32))
    want = answers(recorded.model, recorded.trajectories)
    np.testing.assert_allclose(answers(made, recorded.trajectories), want, rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("bits", [(2, 2), (3, 4), (8, 32), (32, 6)])
@pytest.mark.parametrize("coverage", ["full", "released"])
def test_any_bits_give_finite_answers(name, recorded, bits, coverage):
    made = made_by(name, recorded, bits=bits, coverage=coverage)
    assert np.isfinite(answers(made, recorded.trajectories)).all()
    kept = {n for n, layer in made.layers.items() if layer.codes is None}
    aside = {n for n in made.layers if n.startswith("t_embedder") or "adaLN" in n}
    assert kept == (set(made.layers) if bits[0] == 32 else aside if coverage == "released" else set())


@EACH
def test_eight_bits_are_closer_than_four(name, recorded):
    want = answers(recorded.model, recorded.trajectories)
    error = [np.square(answers(made_by(name, recorded, bits=b), recorded.trajectories) - want).mean() for b in
             ((4, 8), (8, 8))]  # fmt: skip
    assert error[1] < 0.5 * error[0]


@EACH
def test_a_unet_is_refused_before_any_work(name):
    calibration = Calibration(tiny_model(), CALIBRATION)
    with pytest.raises(ShapeError, match=f"{name} is made for diffusion transformers"):
        METHODS[name](tiny_session(calibration))
    assert "trajectories" not in vars(calibration)
    assert name not in methods_for("unet") and name in methods_for("dit")


@EACH
def test_same_seed_same_bytes(name, recorded, tmp_path):
    for file in "ab":
        made_by(name, recorded).save(tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@EACH
def test_unknown_options(name, recorded):
    for option, default in options_of(name).items():
        if isinstance(default, str):
            with pytest.raises(UnknownNameError, match="Known: "):
                made_by(name, recorded, **{option: "no-such"})


@EACH
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_weights_that_are_not_finite(name, damage):
    model = tiny_dit()
    model.network.blocks[0].mlp.fc1.weight.data[0, 0] = damage
    with pytest.raises(RangeError):
        made_by(name, Calibration(model, CALIBRATION))


def test_an_unconditional_transformer_will_do():
    model = tiny_dit(replace(TINY_DIT, classes=0))
    calibration = Calibration(model, CALIBRATION)
    for name in TRANSFORMER_METHODS:
        made = made_by(name, calibration)
        x = calibration.trajectories.x[0]
        assert np.isfinite(made.denoiser()(x, int(calibration.trajectories.t[0]), 0)).all()


# ------------------------------------------------------------------ TFMQ-DM, carried over


def modulation_error(made, model):
    """Squared error of all modulations, over every time-step and class."""
    t, y = every_condition(np.arange(model.schedule.timesteps), model.classes)
    got, want = features(made.network, t, y), features(model.network, t, y)
    return sum(float(np.square(got[n] - want[n], dtype=np.float64).sum()) for n in want)


def test_tiar_lowers_the_error_of_the_modulations(recorded):
    """Over every time-step and class, at 3 bits: less than two thirds of what nearest rounding leaves."""
    session = tiny_session(recorded, weight_bits=3, input_bits=32, effort={"iterations": 1, "rate": 0.03})
    made = METHODS["tfmq"](session, tiar_iterations=200)
    nearest = METHODS["nearest"](session)
    assert modulation_error(made, recorded.model) < 0.67 * modulation_error(nearest, recorded.model)
    assert set(made.recipe["temporal_layers"]) >= {"t_embedder.mlp.0", "final_layer.adaLN_modulation.1"}


def test_tiar_sees_every_class_of_every_time_step(recorded, monkeypatch):
    told = []

    def spy(forward, layers, weights, inputs, target, cfg, **options):
        told.append((inputs, target))
        return np.zeros(cfg.iterations, np.float32)

    monkeypatch.setattr(tfmq, "reconstruct", spy)
    METHODS["tfmq"](tiny_session(recorded, states=1, effort={"iterations": 1}), tiar_iterations=1)
    (t, y), target = told[0]
    steps, classes = recorded.model.schedule.timesteps, TINY_DIT.classes + 1
    assert {*zip(t.tolist(), y.tolist(), strict=True)} == {(a, b) for a in range(steps) for b in range(classes)}
    want = np.concatenate(list(features(recorded.model.network, t, y).values()), axis=1)
    np.testing.assert_allclose(target, want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------ TQ-DiT


def test_groups_repeat_the_rows_of_the_softmax_tables(recorded):
    """Scope "softmax": exactly the probabilities may have tables, alike within a group; nothing else has."""
    made = made_by("tqdit", recorded, groups=2)
    for name, quantizer in made.quantizers().items():
        if name in PROBS:
            assert isinstance(quantizer.table or quantizer.qparams, (GridTable, SoftmaxRegions))
            if quantizer.table is not None:
                shifts = [quantizer.table[s].shift for s in range(4)]
                assert shifts[0] == shifts[1] != shifts[2] == shifts[3]
        else:
            assert quantizer.table is None and quantizer.qparams is not None


def test_one_group_has_no_tables(recorded):
    assert not made_by("tqdit", recorded, groups=1, scope="all").has_tables()


def test_scope_all_gives_every_searched_activation_a_table(recorded):
    made = made_by("tqdit", recorded, groups=4, scope="all", gelu="uniform")
    tables = {n for n, q in made.quantizers().items() if isinstance(q.table, StepTable)}
    assert len(tables) > 12 and "x_embedder.proj.input" not in tables
    assert all(len(made.quantizers()[n].table) == 4 for n in tables)


def test_plain_quantizers_where_regions_are_switched_off(recorded):
    made = made_by("tqdit", recorded, softmax="uniform", gelu="uniform", groups=1)
    kinds = {type(q.qparams).__name__ for q in made.quantizers().values()}
    assert kinds == {"QParams"}
    split = made_by("tqdit", recorded, gelu="split").quantizers()
    assert isinstance(split["blocks.0.mlp.fc2.input"].qparams, SignSplit)
    assert isinstance(split["blocks.1.adaLN_modulation.1.input"].qparams, SignSplit)
    assert split["blocks.0.mlp.fc2.input"].qparams.negative == pytest.approx(0.17004 / 127, rel=1e-4)
    assert split["blocks.0.adaLN_modulation.1.input"].qparams.negative == pytest.approx(0.27846 / 127, rel=1e-4)
    assert not isinstance(split["blocks.0.attn.qkv.input"].qparams, SignSplit)


def test_the_search_beats_min_max_on_what_it_searches(recorded):
    """Weighted output error of every block's linear layers, on the method's own sample: less than min-max's."""
    made = made_by("tqdit", recorded, bits=(4, 4), gelu="uniform")
    states = pick(recorded.trajectories, 8, 0)
    names = token_layers(TINY_DIT)
    seen = samples(recorded.model, names, recorded.trajectories, states, tokens=160, seed=0)
    seen = {name: evened(sample) for name, sample in seen.items()}
    weights = recorded.model.network.state_dict()
    for name in names:
        (x,), w, g = seen[name].inputs, weights[f"{name}.weight"], seen[name].g

        def score(x_q, w_q, x=x, w=w, g=g):
            return float(np.square((x_q @ w_q.T - x @ w.T) * g, dtype=np.float64).sum())

        layer = made.layers[name]
        got = score(rounded(x, layer.input.qparams), layer.layer.weight.data)
        spec = QSpec(4, signed=True, axis=0)
        assert got < score(rounded(x, minmax(x, QSpec(4))), rounded(w, minmax(w, spec))), name


def test_groups_that_do_not_fit(recorded):
    for groups in (0, 5):
        with pytest.raises(RangeError, match="groups of 4 steps"):
            made_by("tqdit", recorded, groups=groups)


def test_groups_without_states(recorded):
    """Fewer states than groups."""
    session = tiny_session(recorded, states=2)
    with pytest.raises(RangeError, match="none of 2 states is of group"):
        METHODS["tqdit"](session, groups=4)


# ------------------------------------------------------------------ PTQ4DiT


def test_without_balance_it_is_brecq(recorded):
    """Same session, same codes; with it, other codes and a balanced base that answers the same."""
    session = tiny_session(recorded, weight_bits=4, states=8)
    plain, brecq = METHODS["ptq4dit"](session, salience="none"), METHODS["brecq"](session)
    for name, layer in brecq.layers.items():
        np.testing.assert_array_equal(plain.layers[name].codes, layer.codes)
    for name, quantizer in brecq.quantizers().items():
        assert plain.quantizers()[name].qparams.scale == quantizer.qparams.scale


@pytest.mark.parametrize("salience", ["ssc", "mean", "max"])
def test_the_balanced_base_is_the_float_model(recorded, salience):
    made = made_by("ptq4dit", recorded, salience=salience)
    want = answers(recorded.model, recorded.trajectories)
    np.testing.assert_allclose(answers(made.base, recorded.trajectories), want, rtol=1e-4, atol=1e-4)
    assert set(made.recipe["balance"]) == set(sources(TINY_DIT))
    low, high = made.recipe["balance"]["blocks.0.attn.qkv"]
    assert low < 1 < high or low != high


def test_salient_channels_of_both_sides_meet(recorded):
    """After balancing by the maximum, each channel of input and weight has the same salience (CSB)."""
    made = made_by("ptq4dit", recorded, salience="max", time_steps=4)
    for name in sources(TINY_DIT):
        w = np.abs(made.base.network.state_dict()[f"{name}.weight"]).max(axis=0)
        seen = np.concatenate([
            np.abs(x).max(axis=(0, 1))[None]
            for x in _inputs(made.base, name, recorded.trajectories)
        ]).max(axis=0)  # fmt: skip
        np.testing.assert_allclose(seen, w, rtol=1e-3)


def _inputs(model, name, trajectories):
    from refquant.quant.record import unit_inputs

    return [unit_inputs(model.network, name, trajectories.at([s]))[0] for s in range(trajectories.steps)]


def test_more_time_steps_than_there_are_will_do(recorded):
    made_by("ptq4dit", recorded, time_steps=1000)
    with pytest.raises(RangeError, match="at least 1 step"):
        made_by("ptq4dit", recorded, time_steps=0)


# ------------------------------------------------------------------ Q-DiT


def test_groups_are_one_for_weight_and_activation(recorded):
    made = made_by("qdit", recorded)
    for name, size in made.recipe["groups"].items():
        layer = made.layers[name]
        assert layer.input.qparams == PerToken(8, size)
        assert layer.weight_qparams.scale.size == layer.codes.size // size
        assert layer.codes.shape[1] % size == 0
    assert np.mean(list(made.recipe["groups"].values())) >= OPTIONS["qdit"]["group"]
    trace = made.recipe["fitness"]
    assert len(trace) == 2 and trace[1] <= trace[0]


def test_without_search_all_groups_are_alike(recorded):
    made = made_by("qdit", recorded, search=False, group=4)
    assert set(made.recipe["groups"].values()) == {4} and made.recipe["fitness"] == []
    whole = made_by("qdit", recorded, search=False, group=0)
    assert all(whole.layers[n].weight_qparams.scale.size == len(whole.layers[n].codes) for n in token_layers(TINY_DIT))


@pytest.mark.parametrize("options", [{"group": 3}, {"group": 7}])
def test_groups_that_do_not_divide(recorded, options):
    with pytest.raises(ShapeError, match="do not divide"):
        made_by("qdit", recorded, **options)


def test_impossible_searches(recorded):
    for options in ({"rounds": 0}, {"population": 1}):
        with pytest.raises(RangeError, match="at least 1 round"):
            made_by("qdit", recorded, **options)


def separable(best):
    return lambda genes: float(sum(abs(np.log2(g / b)) for g, b in zip(genes, best, strict=True)))


def test_evolution_finds_the_optimum_of_a_separable_fitness():
    """Six genes of four sizes: 4,096 choices, 200 tried."""
    sizes, best = [(8, 16, 32, 64)] * 6, (16, 64, 32, 64, 16, 64)
    asked = []

    def fitness(genes):
        asked.append(genes)
        return separable(best)(genes)

    genes, trace = qdit.evolve(fitness, sizes, (32,) * 6, 30, qdit.Evolution(20, 6, 10), seed=0)
    assert genes == best and trace[-1] == 0
    assert trace == sorted(trace, reverse=True)
    assert len(asked) == len(set(asked)) <= 200
    assert all(np.mean(g) >= 30 for g in asked)


def test_evolution_is_never_worse_than_the_first():
    """A fitness that only the first choice satisfies."""
    first = (32, 32)
    genes, _ = qdit.evolve(lambda g: float(g != first), [(8, 16, 32)] * 2, first, 0, qdit.Evolution(4, 2, 3), seed=1)
    assert genes == first


def test_evolution_with_one_choice_ends():
    genes, trace = qdit.evolve(lambda g: 1.0, [(8,)] * 3, (8, 8, 8), 8, qdit.Evolution(4, 2, 5), seed=0)
    assert genes == (8, 8, 8) and trace == [1.0] * 5


# ------------------------------------------------------------------ DiTAS


def test_alpha_is_the_best_of_the_grid():
    """By the definition, and with channels so unlike that neither end of the grid is best."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((60, 8)) * rng.choice([1, 1, 30], 8)).astype(np.float32)
    w = (rng.standard_normal((5, 8)) * rng.choice([1, 10], 8)).astype(np.float32)
    reach, spec = np.abs(x).max(axis=0).astype(float), QSpec(4, signed=True, axis=0)

    def ranges(v):
        return group_qparams(minmax, v, spec, 4)

    alpha, b = ditas.best_alpha(x, w, reach, ranges, PerToken(4))
    errors = []
    for a in ditas.ALPHAS:
        s = reach**a / np.abs(w).max(axis=0) ** (1 - a)
        q = ranges((w * s).astype(np.float32))
        w_q = dequantize(*_codes((w * s).astype(np.float32), q)).reshape(w.shape)
        errors.append(np.square(PerToken(4).fake_quantize((x / s).astype(np.float32)) @ w_q.T - x @ w.T).sum())
        if a == alpha:
            np.testing.assert_allclose(b, 1 / s, rtol=1e-9)
    assert alpha == ditas.ALPHAS[int(np.argmin(errors))]
    assert min(errors) < 0.8 * errors[0]


def _codes(w, q):
    from refquant.quant.affine import quantize

    return quantize(as_rows(w, q), q), q


def test_weights_are_quantized_after_smoothing(recorded):
    """Codes and branch stand for the smoothed weight, not for the original one."""
    made = made_by("ditas", recorded, bits=(8, 8))
    original, smooth = recorded.model.network.state_dict(), made.base.network.state_dict()
    for name in token_layers(TINY_DIT):
        layer = made.layers[name]
        left, right = layer.branch or (np.zeros((len(layer.codes), 0)), np.zeros((0, layer.codes.shape[1])))
        got = layer.layer.weight.data + left @ right
        want = smooth[f"{name}.weight"]
        assert np.abs(got - want).max() <= 0.51 * layer.weight_qparams.scale.max()
        if name in sources(TINY_DIT):
            assert np.abs(got - original[f"{name}.weight"]).max() > layer.weight_qparams.scale.max()


def test_branches_can_be_left_out(recorded):
    made = made_by("ditas", recorded, rank=0)
    assert all(layer.branch is None for layer in made.layers.values())
    with_branches = made_by("ditas", recorded, bits=(3, 8))
    branches = [layer.branch for layer in with_branches.layers.values() if layer.branch is not None]
    assert len(branches) >= 4 and all(left.shape[1] == 2 for left, _ in branches)


def test_alphas_are_in_the_recipe(recorded):
    made = made_by("ditas", recorded)
    names = [n for n in sources(TINY_DIT) if n in token_layers(TINY_DIT)]
    assert list(made.recipe["alpha"]) == names and all(0 <= a <= 1 for a in made.recipe["alpha"].values())


@pytest.mark.parametrize("options", [{"rank": -1}, {"rank": 9}])
def test_impossible_ranks(recorded, options):
    with pytest.raises(RangeError, match="rank is"):
        made_by("ditas", recorded, **options)
