"""Losses of preferences: formulas, extremes, limits, what all of them refuse."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import ce_jax
from tests import reference_post_training
from tests.comparison import accuracy, compare, together
from tests.helpers import WRONG_NAME, compilations

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

mp = mpmath.mp
PAIR = ("chosen", "rejected")
FOUR = (*PAIR, "reference_chosen", "reference_rejected")
# Name -> log-probabilities it takes, and the options it is differentiated by.
LOSSES = {
    "dpo_loss": (FOUR, {"beta": 0.3, "label_smoothing": 0.2}),
    "ipo_loss": (FOUR, {"beta": 0.3}),
    "simpo_loss": (PAIR, {"beta": 2.0, "gamma": 1.0}),
    "orpo_loss": (PAIR, {}),
    "kto_loss": (
        ("log_prob", "reference_log_prob"),
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6},
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def problem(name, shape=(3, 2), seed=0):
    draw = np.random.default_rng(seed)
    arguments = {key: draw.uniform(-4, -0.05, shape) for key in LOSSES[name][0]}
    if name == "kto_loss":
        arguments |= {"desirable": draw.random(shape) < 0.5, "kl": np.float64(0.7)}
    return arguments


@together(
    {"name": name, "dtype": dtype, "masked": masked}
    for name in LOSSES
    for dtype in ("bfloat16", "float64")
    for masked in (False, True)
)
def test_value_and_gradients(case):
    name, options = case["name"], LOSSES[case["name"]][1]
    arguments = problem(name) | options
    if case["masked"]:
        arguments |= {"where": np.array([[True], [False], [True]]), "reduction": "mean"}
        arguments["sample_weight"] = np.array([[0.5, 2.0], [1.0, 1.0], [0.0, 0.7]])
    loss, truth = getattr(ce_jax, name), getattr(reference_post_training, name)
    compare(loss, truth, arguments, tuple(options), dtype=jnp.dtype(case["dtype"]), loosen=2.0)


def exact(name, values, **options):
    """By 60 digits, value and slopes: a truth for numbers at which float64 has no digits left."""

    def log_sigmoid(x):
        return -mp.log1p(mp.exp(-x))

    def log_odds(x):
        return x - mp.log(-mp.expm1(x))

    beta, eps = options.get("beta"), options.get("label_smoothing")
    formulas = {
        "dpo_loss": lambda a, b, c, d: (
            -(1 - eps) * log_sigmoid(beta * (a - c - b + d))
            - eps * log_sigmoid(-beta * (a - c - b + d))
        ),
        "simpo_loss": lambda a, b: -log_sigmoid(beta * (a - b) - options["gamma"]),
        "orpo_loss": lambda a, b: -log_sigmoid(log_odds(a) - log_odds(b)),
        "kto_loss": lambda a, b: 1 / (1 + mp.exp(beta * (a - b - options["kl"]))),
    }
    with mp.workdps(600):
        at = tuple(map(mp.mpf, values))
        orders = np.eye(len(at), dtype=int).tolist()
        slopes = [mp.diff(formulas[name], at, tuple(order)) for order in orders]
        return float(formulas[name](*at)), [float(x) for x in slopes]


EXTREMES = {
    "dpo_loss": [
        ((-1e4, -1e4, -9e3, -1e4), {"beta": 1.0, "label_smoothing": 0.0}),
        ((-9e3, -1e4, -1e4, -1e4), {"beta": 0.02, "label_smoothing": 0.0}),
        ((-9e3, -1e4, -1e4, -1e4), {"beta": 1.0, "label_smoothing": 0.25}),
        ((-1e4, -9e3, -1e4, -1e4), {"beta": 0.03, "label_smoothing": 1.0}),
    ],
    "simpo_loss": [
        ((-1e3, -1.0), {"beta": 2.0, "gamma": 1.0}),
        ((-1.0, -21.0), {"beta": 2.0, "gamma": 1.0}),
    ],
    "orpo_loss": [
        ((-1e-6, -3.0), {}),
        ((-1e-6, -30.0), {}),
        ((-3.0, -1e-6), {}),
        ((-1e-6, -2e-6), {}),
        ((-2e-6, -1e-6), {}),
        ((-1e3, -1.0), {}),
        ((-1e4, -9.99e3), {}),
        ((-1.0, -40.0), {}),
        ((-0.4, -0.4), {}),
        ((-1e-20, -8e-20), {}),
        ((-8e-20, -1e-20), {}),
    ],
    "kto_loss": [
        ((-1e4, -9e3), {"beta": 0.05, "kl": 2.0}),
        ((-9.96e3, -1e4), {"beta": 1.0, "kl": 2.0}),
        ((-1e4, -9.96e3), {"beta": 1.0, "kl": 2.0}),
        ((-5.0, -7.0), {"beta": 1.0, "kl": 2.0}),
    ],
}


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name):
    """Each of the numbers keeps its digits, however small it is."""
    more = {"desirable": True} if name == "kto_loss" else {}

    @jax.jit
    @jax.vmap
    def found(values, options):
        loss = functools.partial(getattr(ce_jax, name), **options, **more)
        return jax.value_and_grad(lambda values: loss(*values))(values)

    columns, options = zip(*EXTREMES[name], strict=True)
    columns = tuple(jnp.float32(x) for x in zip(*columns, strict=True))
    options = {key: jnp.float32([x[key] for x in options]) for key in options[0]}
    values, slopes = found(columns, options)
    for i in range(len(values)):
        at = [float(x[i]) for x in columns]
        value, wanted = exact(name, at, **{key: float(x[i]) for key, x in options.items()})
        rtol = 2 * accuracy("float32")
        np.testing.assert_allclose(values[i], value, rtol=rtol, atol=1e-37, err_msg=str(at))
        np.testing.assert_allclose([x[i] for x in slopes], wanted, rtol=rtol, atol=1e-37)


@pytest.mark.usefixtures("usual_programs")
def test_odds_at_probability_one():
    """Value and slopes are limits, where there are any."""

    @jax.jit
    @jax.vmap
    def both(better, worse):
        return jax.value_and_grad(ce_jax.orpo_loss, (0, 1))(better, worse)

    better, worse = jnp.array([0.0, 0.0, -1.0, 1e-7, 0.5]), jnp.array([-1.0, 0.0, 0.0, -1.0, -1.0])
    value, (by_better, by_worse) = both(better, worse)
    odds = 1 / np.expm1(1)
    np.testing.assert_allclose(value, [0, np.log(2), np.inf, 0, np.nan], rtol=1e-6)
    np.testing.assert_allclose(by_better[:2], [-odds, 0], rtol=1e-6)
    np.testing.assert_allclose(by_worse[:3], [0, 0, np.inf], rtol=1e-6)
    assert np.isfinite(by_better[:4]).all()


@pytest.mark.usefixtures("usual_programs")
@every_loss
def test_an_answer_that_is_impossible(name):
    """A chosen one costs the most that there is, and a rejected one the least; no slope is NaN."""
    names, options = LOSSES[name]
    at = {key: jnp.full(2, -1.0) for key in names}
    at[names[0]] = jnp.array([-jnp.inf, -1.0])
    at[names[1]] = jnp.array([-1.0, -jnp.inf])
    if name == "kto_loss":
        at = {"log_prob": jnp.full(2, -jnp.inf), "reference_log_prob": jnp.full(2, -1.0)}
        options |= {"desirable": jnp.array([True, False]), "kl": 0.0}
    if name == "dpo_loss":
        options = options | {"label_smoothing": 0.0}
    loss = functools.partial(getattr(ce_jax, name), **options)
    value, slopes = jax.jit(lambda at: (loss(**at), jax.grad(lambda at: jnp.sum(loss(**at)))(at)))(
        at
    )
    if name == "ipo_loss":  # a margin has a best value, from which both are infinitely far
        np.testing.assert_array_equal(value, np.inf)
        return
    most = options["desirable_weight"] if name == "kto_loss" else np.inf
    np.testing.assert_allclose(value, [most, 0], rtol=1e-6)
    for slope in slopes.values():
        assert np.isfinite(slope).all()
    if "beta" in options:
        by_beta = jax.jacrev(lambda beta: loss(**at, beta=beta))(options["beta"])
        assert by_beta[1] == 0
        assert not np.isnan(by_beta[0])


@pytest.mark.parametrize("name", ["dpo_loss", "simpo_loss", "kto_loss"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_second_derivatives_by_beta(name, beta):
    """`f(beta m)` has the mixed derivative `f' + beta m f''`, also where beta is 0."""
    more = {"dpo_loss": (-1.5, -1.7), "simpo_loss": (), "kto_loss": (True, 0.1)}[name]
    options = {"gamma": 0.0} if name == "simpo_loss" else {}
    offset = {"dpo_loss": -0.2, "simpo_loss": 0.0, "kto_loss": -0.1}[name]
    loss = functools.partial(getattr(ce_jax, name), **options)
    found = jax.hessian(lambda x: loss(x[0], x[1], *more, beta=x[2]))(jnp.array([-1.0, -2.0, beta]))
    np.testing.assert_allclose(found, found.T, rtol=1e-5, atol=1e-7)
    margin = 1.0 + offset
    p = 1 / (1 + np.exp(beta * margin))  # of -log(1 - p); kto's loss is p itself
    first, second = (-p, p * (1 - p))
    if name == "kto_loss":
        first, second = -p * (1 - p), p * (1 - p) * (1 - 2 * p)
    np.testing.assert_allclose(found[0, 2], first + beta * margin * second, rtol=1e-5)


def test_an_answer_that_is_impossible_without_a_beta():
    """A beta of 0 makes all answers alike."""
    at = [jnp.float32(x) for x in (-np.inf, -1, -1, -1)]
    value, slopes = jax.value_and_grad(functools.partial(ce_jax.dpo_loss, beta=0.0), (0, 1))(*at)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(slopes, [0, 0])


def test_smoothing_is_the_chance_of_exchanged_answers():
    arguments = {key: jnp.float32(x) for key, x in problem("dpo_loss").items()}
    turned = {
        key: arguments[
            key.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")
        ]
        for key in FOUR
    }
    found = ce_jax.dpo_loss(**arguments, label_smoothing=0.3)
    mixed = 0.7 * ce_jax.dpo_loss(**arguments) + 0.3 * ce_jax.dpo_loss(**turned)
    np.testing.assert_allclose(found, mixed, rtol=1e-6)
    equal = ce_jax.dpo_loss(**arguments, label_smoothing=0.5)
    np.testing.assert_allclose(equal, ce_jax.dpo_loss(**turned, label_smoothing=0.5), rtol=1e-6)


def test_the_divergence_of_kto_is_a_constant():
    """It is not below 0, and no gradient reaches it."""
    x = jnp.array([-1.0, -2.0])
    loss = functools.partial(ce_jax.kto_loss, x, x, jnp.array([True, False]), beta=1.0)
    for below in (-5.0, jnp.array([-1.0, -2.0]), jnp.array([0.0])):
        np.testing.assert_allclose(loss(below), [0.5, 0.5])
    np.testing.assert_allclose(loss(1.0), [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-6)
    # Of a good and a bad answer alike slopes would cancel.
    assert jax.grad(lambda kl: loss(kl)[0])(1.0) == 0


@every_loss
def test_rows_that_do_not_count(name):
    """Whatever they hold; no row, or no weight, at all gives 0 and gradient 0."""
    arguments = {key: jnp.asarray(x) for key, x in problem(name, (4,)).items()}
    smooth = {key: arguments.pop(key).astype(jnp.float32) for key in LOSSES[name][0]}
    smooth = {
        key: x.at[:3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf])) for key, x in smooth.items()
    }

    @jax.jit
    def both(smooth, where, sample_weight):
        def loss(smooth):
            more = {"where": where, "sample_weight": sample_weight, "reduction": "mean"}
            return getattr(ce_jax, name)(**smooth, **arguments, **more)

        return jax.value_and_grad(loss)(smooth)

    ones, last = np.ones(4, np.float32), np.arange(4) == 3
    for where, weight in (
        (last, ones),
        (ones > 0, ones * np.float32(last)),
        (last, 0 * ones),
        (~(ones > 0), ones),
    ):
        value, slopes = both(smooth, where, weight)
        empty = not np.any(where & (weight > 0))
        assert value == 0 if empty else value > 0
        for slope in slopes.values():
            np.testing.assert_array_equal(slope[:3], 0)
            assert slope[3] == 0 if empty else slope[3] != 0


@every_loss
def test_transforms(name):
    """Forward mode, second derivatives, vmap; and a schedule compiles once."""
    names, options = LOSSES[name]
    arguments = {key: np.asarray(x) for key, x in problem(name, (3,)).items()}
    first, x = names[0], arguments.pop(names[0])

    def slope(x, **more):
        return jax.grad(lambda x: loss(x, **more).sum())(x)

    def loss(x, **more):
        return getattr(ce_jax, name)(**{first: x}, **arguments, **more)

    with jax.enable_x64(True):
        ones, step = np.ones(3), 1e-5
        ends = np.stack([x - step, x, x + step])
        slopes = jax.jit(jax.vmap(slope))(ends)
        value, tangent = jax.jit(lambda x: jax.jvp(loss, (x,), (ones,)))(x)
        second = jax.jit(lambda x: jax.jvp(slope, (x,), (ones,))[1])(x)
        np.testing.assert_allclose(tangent, slopes[1], rtol=1e-12)
        np.testing.assert_allclose(second, (slopes[2] - slopes[0]) / (2 * step), rtol=1e-6)
        truth = getattr(reference_post_training, name)
        np.testing.assert_allclose(value, truth(**{first: x}, **arguments), rtol=1e-12)
    if not options:
        return
    option = next(iter(options))
    scheduled = jax.jit(lambda value: loss(x, **{option: value}))
    scheduled(0.5)
    with compilations() as seen:
        scheduled(0.25)
    assert not seen


@pytest.mark.cpu
def test_pairs_that_are_sharded():
    """Over explicit mesh axes: losses lie where their pairs lie, and a mean is that of all."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    weight = np.array([0.5, 0.0, 1.0, 2.0, 1.0, 0.3, 0.0, 1.0], np.float32)

    def losses(problems, weight):
        for name, arguments in problems.items():
            loss = functools.partial(getattr(ce_jax, name), **arguments, sample_weight=weight)
            yield loss(), loss(reduction="mean")

    problems = {name: problem(name, (8,)) for name in LOSSES}
    narrow = jax.tree.map(lambda x: x if x.dtype == bool else np.float32(x), problems)
    wanted = list(losses(narrow, weight))
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda x: jax.device_put(x, spread) if x.ndim else x, narrow)
        found = jax.jit(lambda *x: list(losses(*x)))(placed, jax.device_put(weight, spread))
    for (by_row, mean), (rows, of_all) in zip(found, wanted, strict=True):
        assert by_row.sharding.spec == spread.spec
        np.testing.assert_allclose(by_row, rows, rtol=1e-6)
        np.testing.assert_allclose(mean, of_all, rtol=1e-6)


ONE, TWO = jnp.zeros(2), jnp.zeros(3)
FOUR_ONES = (ONE,) * 4


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ce_jax.dpo_loss(ONE, TWO, ONE, ONE), ValueError, r"rejected .*\(2,\).*\(3,\)"),
        (
            lambda: ce_jax.dpo_loss(ONE, ONE, ONE, jnp.zeros((2, 1))),
            ValueError,
            r"reference_rejected .*\(2,\) .*chosen.*\(2, 1\)",
        ),
        (lambda: ce_jax.ipo_loss(ONE, ONE, jnp.zeros(2, int), ONE), TypeError, "reference_chosen"),
        (lambda: ce_jax.dpo_loss(*FOUR_ONES, beta=-1.0), ValueError, "beta .* -1.0"),
        (lambda: ce_jax.dpo_loss(*FOUR_ONES, beta=ONE), ValueError, r"beta .*\(2,\)"),
        (lambda: ce_jax.dpo_loss(*FOUR_ONES, beta="1"), TypeError, "beta"),
        (
            lambda: ce_jax.dpo_loss(*FOUR_ONES, label_smoothing=True),
            TypeError,
            "label_smoothing .* True",
        ),
        (
            lambda: ce_jax.dpo_loss(*FOUR_ONES, label_smoothing=1.5),
            ValueError,
            "label_smoothing .* 1.5",
        ),
        (lambda: ce_jax.ipo_loss(*FOUR_ONES, beta=0.0), ValueError, "beta .* 0.0"),
        (lambda: ce_jax.simpo_loss(ONE, ONE, gamma=-1.0), ValueError, "gamma .* -1.0"),
        (lambda: ce_jax.orpo_loss(ONE, ONE, where=ONE), TypeError, "where .* bool"),
        (lambda: ce_jax.orpo_loss(ONE, ONE, where=TWO > 0), ValueError, r"where .*\(3,\)"),
        (
            lambda: ce_jax.simpo_loss(jnp.zeros((2, 2)), jnp.zeros((2, 2)), sample_weight=ONE),
            ValueError,
            r"sample_weight .*\(2, 2\).*\(2,\)",
        ),
        (lambda: ce_jax.orpo_loss(ONE, ONE, reduction="avg"), WRONG_NAME, "reduction"),
        (lambda: ce_jax.kto_loss(ONE, ONE, ONE, 0.1), TypeError, "desirable .* bool"),
        (lambda: ce_jax.kto_loss(ONE, ONE, TWO > 0, 0.1), ValueError, r"desirable .*\(3,\)"),
        (lambda: ce_jax.kto_loss(ONE, ONE, ONE > 0, TWO), ValueError, r"kl .*\(2,\).*\(3,\)"),
        (
            lambda: ce_jax.kto_loss(ONE, ONE, ONE > 0, 0.0, desirable_weight=-1),
            ValueError,
            "desirable_weight .* -1",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.usefixtures("usual_programs")
@every_loss
def test_narrow_numbers_are_widened_first(name):
    """Those of other dtypes meet in the widest, and the result is wide."""
    arguments = {key: jnp.asarray(x) for key, x in problem(name).items()}
    narrow = {key: arguments[key].astype(jnp.float16) for key in LOSSES[name][0]}
    wide = {key: x.astype(jnp.float32) for key, x in narrow.items()}
    mixed = narrow | {LOSSES[name][0][0]: wide[LOSSES[name][0][0]]}
    wanted = getattr(ce_jax, name)(**(arguments | wide))
    for given in (narrow, mixed):
        found = getattr(ce_jax, name)(**(arguments | given))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
