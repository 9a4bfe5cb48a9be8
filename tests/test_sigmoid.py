"""The sigmoid loss: values and every gradient over the option space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference
from tests.comparison import check, close, result_dtype, together
from tests.helpers import GARBAGE, combinations, covering

pytestmark = pytest.mark.sweep

NAME = "sigmoid_binary_cross_entropy"
SHAPE = (4, 3)
# What broadcasts to the elements: a number for each, for each class, for each row, or one for all.
SPREAD = {"element": SHAPE, "class": SHAPE[1:], "row": (SHAPE[0], 1), "one": ()}
# Those of examples have all axes or none.
EXAMPLES = SPREAD | {"class": (1, SHAPE[1])}
OPTIONS = {
    "weight": [None, *SPREAD],
    "pos_weight": [None, *SPREAD],
    "sample_weight": [None, *SPREAD],
    "where": [None, "element", "row"],
    "label_smoothing": [None, 0.2, 1.0],
    "traced": [False, True],
    "reduction": [None, "sum", "mean"],
    "forward_mode": [None, True],
    "dtype": ["float32", "float64"],
}


def sigmoid_arguments(*, weight=None, pos_weight=None, sample_weight=None, where=None, **options):
    draw = np.random.default_rng(0)
    logits, labels = 3 * draw.normal(size=SHAPE), draw.random(SHAPE)
    labels[0] = 0.0, 1.0, 0.5
    weights = {"weight": weight, "pos_weight": pos_weight, "sample_weight": sample_weight}
    for name, spread in weights.items():
        if spread is not None:
            shape = (EXAMPLES if name == "sample_weight" else SPREAD)[spread]
            options[name] = draw.uniform(0.5, 2.0, size=shape)
    if sample_weight in ("element", "row"):
        options["sample_weight"].flat[1] = 0.0
    if where is not None:
        options["where"] = draw.random(SPREAD[where]) < 0.6
        counts = np.broadcast_to(options["where"], SHAPE)
        logits[~counts] = np.resize(GARBAGE, (~counts).sum())
    return {"logits": logits, "labels": labels, **options}


@together(covering(seed=3, **OPTIONS))
def test_values_and_gradients(case):
    case = {key: value for key, value in case.items() if value is not None}
    dtype = jnp.dtype(case.pop("dtype"))
    static = {key: case.pop(key) for key in ("forward_mode",) if key in case}
    wrt = ["label_smoothing"] if case.pop("traced") and "label_smoothing" in case else ()
    check(NAME, sigmoid_arguments(**case), wrt, dtype=dtype, **static)


@together(combinations(dtype=["float16", "bfloat16"], reduction=["none", "mean"]))
def test_narrow_dtypes_round_once(case):
    arguments = sigmoid_arguments(
        weight="class",
        pos_weight="class",
        sample_weight="row",
        where="element",
        label_smoothing=0.2,
        reduction=case["reduction"],
    )
    check(NAME, arguments, dtype=jnp.dtype(case["dtype"]))


@together(
    combinations(shape=[(), (1,), (0, 3), (2, 0)], reduction=["none", "sum", "mean"]), size=12
)
def test_shapes(case):
    draw = np.random.default_rng(0)
    shape = case.pop("shape")
    arguments = {"logits": draw.normal(size=shape), "labels": draw.random(shape)}
    arguments = {key: np.asarray(value) for key, value in arguments.items()}
    check(NAME, arguments | case)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32"])
def test_labels_of_any_dtype(dtype):
    logits = jnp.array([[0.3, -2.0], [1.5, 4.0]])
    labels = np.array([[1, 0], [0, 1]])
    found = ce_jax.sigmoid_binary_cross_entropy(logits, labels.astype(dtype), label_smoothing=0.1)
    exact = {"logits": np.asarray(logits, float), "labels": labels, "label_smoothing": 0.1}
    close(found, reference.sigmoid_binary_cross_entropy(**exact), 2e-6)


def test_infinite_logits():
    """At +-inf the loss is 0 where the label agrees and inf where it does not; slopes are p - y."""
    logits = jnp.array([jnp.inf, jnp.inf, jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf])
    labels = jnp.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.5])
    for forward_mode in (False, True):
        losses = ce_jax.sigmoid_binary_cross_entropy(logits, labels, forward_mode=forward_mode)
        np.testing.assert_array_equal(losses, [0.0, np.inf, np.inf, np.inf, 0.0, np.inf])
    slopes = jax.grad(lambda z: ce_jax.sigmoid_binary_cross_entropy(z, labels, reduction="sum"))(
        logits
    )
    np.testing.assert_array_equal(slopes, [0.0, 1.0, 0.5, -1.0, 0.0, -0.5])


@pytest.mark.parametrize("pos_weight", [0.25, 3.0])
def test_infinite_logits_with_pos_weight(pos_weight):
    logits = jnp.array([jnp.inf, jnp.inf, -jnp.inf, -jnp.inf])
    labels = jnp.array([1.0, 0.0, 1.0, 0.0])
    value, slopes = jax.value_and_grad(
        lambda z: ce_jax.sigmoid_binary_cross_entropy(
            z,
            labels,
            pos_weight=pos_weight,
            where=jnp.array([True, False, False, True]),
            reduction="sum",
        )
    )(logits)
    np.testing.assert_array_equal(slopes, 0.0)
    assert value == 0.0
    losses = ce_jax.sigmoid_binary_cross_entropy(logits, labels, pos_weight=pos_weight)
    np.testing.assert_array_equal(losses, [0.0, np.inf, np.inf, 0.0])


MOST = float(np.finfo(np.float32).max)
EDGES = (0.0, -0.0, 1e-30, 20.0, -20.0, 3e38, -3e38, MOST, -MOST, np.inf, -np.inf, np.nan)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("shape", [(2048, 4), (8, 1024)])  # along one axis, and as it is
def test_sums_of_many_losses(shape):
    """A CPU computes them as it adds them up, by other instructions than it stores them by."""
    if shape == (8, 1024) and jax.__version_info__ < (0, 10):
        pytest.skip("before jax 0.10, XLA's sum of 8192 numbers on a CPU is off by 2e-6")
    labels = (0.0, 1.0, 0.5, 1e-30, 0.75, np.nan)
    z, y = (grid.ravel() for grid in np.meshgrid(np.float32(EDGES), np.float32(labels)))

    def with_one_odd_element(case):
        logits, odd = (jnp.zeros(shape).at[-1, -1].set(x) for x in case)
        return ce_jax.sigmoid_binary_cross_entropy(logits, odd, reduction="sum")

    sums = jax.lax.map(jax.value_and_grad(with_one_odd_element), (z, y))[0]
    with np.errstate(invalid="ignore", over="ignore"):
        truth = reference.sigmoid_binary_cross_entropy(np.float64(z), np.float64(y))
        truth = (truth + (np.prod(shape) - 1) * np.log(2.0)).astype(np.float32)
    np.testing.assert_allclose(sums, truth, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_at_the_edges(dtype):
    """What is not summed, or narrow, is computed by other instructions again."""
    labels = (0.0, 1.0, 0.5, 0.75, np.nan)
    z, y = (grid.ravel() for grid in np.meshgrid(np.asarray(EDGES, dtype), np.float32(labels)))
    with np.errstate(invalid="ignore", over="ignore"):
        truth = reference.sigmoid_binary_cross_entropy(np.float64(z), np.float64(y))
    losses = ce_jax.sigmoid_binary_cross_entropy(z, y)
    np.testing.assert_allclose(losses, truth.astype(np.float32), rtol=1e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("shape", [(2048, 4), (8, 1024)])
@pytest.mark.usefixtures("one_device")
def test_sums_hold_no_losses(shape):
    if jax.__version_info__ < (0, 10):
        pytest.skip("before jax 0.10, XLA on a CPU stores the losses that it adds up")
    function = functools.partial(ce_jax.sigmoid_binary_cross_entropy, reduction="mean")
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32),) * 2
    for program in (function, jax.value_and_grad(function)):
        compiled = jax.jit(program).lower(*arrays).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < np.prod(shape)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_error_is_not_above_the_naive_formulas(dtype, spread):
    draw = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(spread * draw.normal(size=4096), dtype)
        labels = jnp.asarray(draw.random(4096), dtype)

        def naive(z):
            one = jnp.ones((), z.dtype)
            return -labels * jax.nn.log_sigmoid(z) - (one - labels) * jax.nn.log_sigmoid(-z)

        def ours(z):
            return ce_jax.sigmoid_binary_cross_entropy(z, labels)

        losses, pull = jax.vjp(ours, logits)
        (slopes,) = pull(jnp.ones(4096, result_dtype(dtype)))
        plain, pull = jax.vjp(naive, logits)
        (plain_slopes,) = pull(jnp.ones(4096, dtype))
    z, y = np.asarray(logits, np.longdouble), np.asarray(labels, np.longdouble)
    truth = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    true_slopes = 1 / (1 + np.exp(-z)) - y

    def error(found, exact):
        return float(np.sqrt(np.mean((np.asarray(found, np.longdouble) - exact) ** 2)))

    assert error(losses, truth) <= 1.1 * error(plain, truth)
    assert error(slopes, true_slopes) <= 1.1 * error(plain_slopes, true_slopes)


def test_large_logits_keep_small_losses():
    """softplus(-80) is 1.8e-35, not 0, and its slope is as small."""
    z = jnp.array([80.0, -80.0])
    labels = jnp.array([1.0, 0.0])
    losses = ce_jax.sigmoid_binary_cross_entropy(z, labels)
    np.testing.assert_allclose(losses, np.exp(-80.0), rtol=1e-5)
    slopes = jax.grad(lambda z: ce_jax.sigmoid_binary_cross_entropy(z, labels, reduction="sum"))(z)
    np.testing.assert_allclose(slopes[1], np.exp(-80.0), rtol=1e-5)


def second_derivatives(loss, **options):
    """d2/dz2 of each element, by every way to differentiate twice."""

    def along(z, f):
        return jax.jvp(f, (z,), (jnp.ones_like(z),))[1]

    def reverse(**more):
        return jax.grad(lambda z: jnp.sum(loss(z, **options, **more)))

    def forward(z):
        return along(z, lambda z: loss(z, **options, forward_mode=True))

    return {
        "reverse over reverse": jax.grad(lambda z: jnp.sum(reverse()(z))),
        "forward over reverse": lambda z: along(z, reverse()),
        "forward over forward": lambda z: along(z, forward),
        "reverse over forward": jax.grad(lambda z: jnp.sum(forward(z))),
        "reverse over reverse of forward mode": jax.grad(
            lambda z: jnp.sum(reverse(forward_mode=True)(z))
        ),
    }


def logistic_derivatives(z):
    """p q and its own derivative, p q (q - p), in which no term is lost to a rounded 1."""
    e = np.exp(-np.abs(np.asarray(z, np.float64)))
    slope = e / (1 + e) ** 2
    return slope, slope * np.sign(z) * -(1 - e) / (1 + e)


MODERATE = (0.0, 0.5, 3.0, 20.0, 50.0, 80.0, 100.0, 1000.0, np.inf)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("float32", MODERATE), ("float64", (*MODERATE, 400.0, 600.0))],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_second_derivatives_at_any_logit(dtype, sizes, pos_weight):
    """They are p q times the sum of the coefficients, and as small as it is far from 0."""
    z, labels = np.meshgrid([*sizes, *(-size for size in sizes)], [0.0, 0.3, 1.0])
    scale = 1 if pos_weight is None else 3 * labels + 1 - labels
    truth, third = (scale * derivative for derivative in logistic_derivatives(z))
    atol = 4 * float(jnp.finfo(dtype).max) ** -0.98  # p stops there, above the subnormal numbers
    rtol = {"float32": 3e-6, "float64": 1e-14}[dtype]
    with jax.enable_x64(dtype == "float64"):
        ways = second_derivatives(
            lambda z, **options: ce_jax.sigmoid_binary_cross_entropy(z, labels, **options),
            pos_weight=pos_weight,
        )
        z = jnp.asarray(z, dtype)
        for name, second in ways.items():
            np.testing.assert_allclose(jax.jit(second)(z), truth, rtol, atol, err_msg=name)
        found = jax.jit(jax.grad(lambda z: jnp.sum(ways["reverse over reverse"](z))))(z)
        np.testing.assert_allclose(found, third, rtol, atol)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_second_derivative_of_what_uses_the_loss(forward_mode, x64):
    """Of l**2 it is 2 l'**2 + 2 l l'': the slope of the value counts, also where |z| has none."""
    z, label = np.array([-2.0, 0.0, 2.0]), 0.3
    p = 1 / (1 + np.exp(-z))
    loss = label * np.logaddexp(0, -z) + (1 - label) * np.logaddexp(0, z)

    def squared(z):
        return ce_jax.sigmoid_binary_cross_entropy(z, label, forward_mode=forward_mode) ** 2

    truth = 2 * (p - label) ** 2 + 2 * loss * p * (1 - p)
    for twice in (jax.grad(jax.grad(squared)), jax.hessian(squared)):
        found = jax.jit(jax.vmap(twice))(jnp.asarray(z))
        np.testing.assert_allclose(found, truth, rtol=1e-14)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_mixed_second_derivatives(forward_mode, x64):
    """By each pair of logit, label and positive weight, also where a coefficient is 0."""

    def loss(arguments):
        z, y, v = arguments
        return ce_jax.sigmoid_binary_cross_entropy(z, y, pos_weight=v, forward_mode=forward_mode)

    points = np.array([[0.0, 0.3, 2.0], [-2.0, 0.0, 2.0], [50.0, 1.0, 2.0], [-50.0, 0.6, 0.0]])
    z, y, v = points.T
    p, q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    by_zz, by_zy = (v * y + 1 - y) * p * q, -v * q - p
    by_zv, by_yv, none = -y * q, np.logaddexp(0, -z), 0 * z
    truth = [[by_zz, by_zy, by_zv], [by_zy, none, by_yv], [by_zv, by_yv, none]]
    for twice in (jax.hessian(loss), jax.jacrev(jax.grad(loss))):
        found = jax.jit(jax.vmap(twice))(jnp.asarray(points))
        np.testing.assert_allclose(found, np.moveaxis(truth, -1, 0), rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pos_weight", [None, 3.0])
@pytest.mark.parametrize(("z", "label", "slope"), [(np.inf, 1, 0), (-np.inf, 0, 0), (np.inf, 0, 1)])
def test_tangents_at_infinite_logits(z, label, slope, pos_weight, dtype):
    """A label that does not vary adds nothing, however steep the loss is in it."""

    def loss(z):
        return ce_jax.sigmoid_binary_cross_entropy(
            z, float(label), pos_weight=pos_weight, forward_mode=True
        )

    point, tangent = jnp.asarray(z, dtype), jnp.ones((), dtype)
    ways = {
        "jvp": jax.jvp(loss, (point,), (tangent,))[1],
        "jit": jax.jit(lambda z, t: jax.jvp(loss, (z,), (t,))[1])(point, tangent),
        "linearize": jax.linearize(loss, point)[1](tangent),
        "vmap": jax.jvp(jax.vmap(loss), (point[None],), (tangent[None],))[1][0],
        "grad": jax.grad(loss)(point),
    }
    assert {name: float(found) for name, found in ways.items()} == dict.fromkeys(ways, slope)


@pytest.mark.parametrize("forward_mode", [False, True])
def test_weights_at_agreeing_infinite_logits(forward_mode):
    """The gradient by a weight is what it weighs: 0 where an infinite logit agrees."""
    logits, labels = jnp.array([-jnp.inf, jnp.inf, 0.0]), jnp.array([0.0, 1.0, 1.0])

    def total(weight, pos_weight):
        return ce_jax.sigmoid_binary_cross_entropy(
            logits,
            labels,
            weight=weight,
            pos_weight=pos_weight,
            reduction="sum",
            forward_mode=forward_mode,
        )

    log_2 = np.log(2.0)
    for differentiate in (jax.grad, jax.jacfwd) if forward_mode else (jax.grad,):
        by_weight, by_pos_weight = (differentiate(total, i)(jnp.ones(()), 2.0) for i in (0, 1))
        np.testing.assert_allclose([by_weight, by_pos_weight], [2 * log_2, log_2], rtol=1e-6)
        by_each = differentiate(total, 1)(1.0, jnp.full(3, 2.0))
        np.testing.assert_allclose(by_each, [0.0, 0.0, log_2], rtol=1e-6)


@pytest.mark.parametrize("pos_weight", [None, 0.0, 2.0])
def test_labels_at_infinite_logits(pos_weight):
    """By a label the slope is v softplus(-z) - softplus(z), and 0 in a loss that weighs nothing."""
    logits, labels = jnp.array([jnp.inf, -jnp.inf, jnp.inf, 0.0]), jnp.array([1.0, 0.0, 1.0, 1.0])

    def total(labels):
        return ce_jax.sigmoid_binary_cross_entropy(
            logits,
            labels,
            weight=jnp.array([1.0, 1.0, 0.0, 1.0]),
            pos_weight=pos_weight,
            reduction="sum",
        )

    v = 1.0 if pos_weight is None else pos_weight
    truth = [-np.inf, np.inf if v else 0.0, 0.0, (v - 1) * np.log(2.0)]
    np.testing.assert_allclose(jax.grad(total)(labels), truth, rtol=1e-6)


@pytest.mark.usefixtures("one_device")  # on which few columns are read in a way of their own
@pytest.mark.parametrize("shape", [(1, 2), (1, 80)])
@pytest.mark.parametrize("pos_weight", [None, 2.0])
def test_second_derivatives_beside_an_infinite_logit(shape, pos_weight):
    """The loss is a factor in them; labels, by which its slope is infinite, do not vary."""
    logits = np.full(shape, np.inf)
    logits.flat[0] = 1.0

    def square(logits, sample_weight):
        return (
            ce_jax.sigmoid_binary_cross_entropy(
                logits,
                jnp.ones(shape),
                pos_weight=pos_weight,
                sample_weight=sample_weight,
                reduction="sum",
            )
            ** 2
        )

    v, p = pos_weight or 1.0, 1 / (1 + np.exp(-1.0))
    cross, slope, curve = -v * np.log(p), v * (p - 1), v * p * (1 - p)
    second = jax.jit(jax.jacfwd(jax.grad(square), argnums=(0, 1)))
    hessian, by_weight = map(np.ravel, second(logits, 1.0))
    np.testing.assert_allclose(hessian[0], 2 * (slope**2 + cross * curve), rtol=1e-5)
    np.testing.assert_allclose(by_weight[0], 4 * cross * slope, rtol=1e-5)
    assert not np.any(hessian[1:])
    assert not np.any(by_weight[1:])
