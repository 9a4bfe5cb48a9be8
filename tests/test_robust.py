"""Robust losses: functions of a log-probability, and those of logits."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

import ce_jax
from tests import reference, reference_beyond
from tests.beyond import check
from tests.helpers import (
    accuracy,
    compilations,
    covering,
    named,
    result_dtype,
    softmax_arguments,
)

pytestmark = pytest.mark.sweep

mp = mpmath.mp
# Name -> options to try, of each one that is differentiated.
OF_LOG_PROB = {
    "focal_loss": {"gamma": (0.0, 0.5, 30.0)},
    "poly_loss": {"epsilon": (-1.0,)},
    "generalized_cross_entropy": {"q": (1e-6, 0.7)},
    "symmetric_cross_entropy": {"alpha": (0.0, 0.1), "beta": (1.0,), "log_zero": (-4.0,)},
}
LABEL = np.array([0])
CASES = [
    (name, dict(zip(options, values, strict=True)))
    for name, options in OF_LOG_PROB.items()
    for values in (lambda columns: np.array(np.meshgrid(*columns)).reshape(len(columns), -1).T)(
        list(options.values())
    )
]
LOG_PROBS = np.array(
    [-1e-9, -1e-4, -0.1, -0.49, -0.51, -1.0, -3.0, -20.0, -50.0, -99.9, -100.1, -1e3]
)
# The same in the terms of mpmath, for derivatives of any order.
EXACT = {
    "focal_loss": lambda x, gamma: -x * (-mp.expm1(x)) ** gamma,
    "poly_loss": lambda x, epsilon: -x - epsilon * mp.expm1(x),
    "generalized_cross_entropy": lambda x, q: -mp.expm1(q * x) / q,
    "symmetric_cross_entropy": lambda x, alpha, beta, log_zero: (
        -alpha * x + beta * log_zero * mp.expm1(x)
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_value_and_gradients(name, options, dtype):
    # Beside 30 a power's own rounding counts that often.
    check(
        getattr(ce_jax, name),
        getattr(reference_beyond, name),
        {"log_prob": LOG_PROBS, **options},
        tuple(k for k in options if options[k] != 0 or k == "gamma"),
        dtype=jnp.dtype(dtype),
        loosen=1 + options.get("gamma", 0.0),
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("focal_loss", {"gamma": 0.5}),
        ("focal_loss", {"gamma": 2.0}),
        ("poly_loss", {"epsilon": 2.0}),
        ("generalized_cross_entropy", {"q": 0.7}),
        ("symmetric_cross_entropy", {"alpha": 0.1, "beta": 1.0, "log_zero": -4.0}),
    ],
)
def test_derivatives_of_higher_order(name, options, x64):
    function = functools.partial(getattr(ce_jax, name), **options)
    first = jax.grad(function)
    second = jax.jacfwd(first)
    third = jax.grad(second)
    points = [-1e-9, -1e-3, -0.3, -0.8, -30.0]
    found = jax.jit(jax.vmap(lambda x: (first(x), second(x), third(x))))(jnp.array(points))
    for order, derivative in enumerate(found, 1):
        with mp.workdps(60):
            exact = [mp.diff(lambda x: EXACT[name](x, **options), x, order) for x in points]
        np.testing.assert_allclose(derivative, np.array(exact, float), rtol=1e-12, atol=1e-99)


def slopes_everywhere(function, x):
    """Value and slope, which must be the same in both modes."""
    x = jnp.asarray(x, jnp.float32)

    @jax.jit
    def both(x):
        value, pull = jax.vjp(function, x)
        return value, *pull(jnp.ones_like(x)), *jax.jvp(function, (x,), (jnp.ones_like(x),))

    value, slope, pushed, tangent = both(x)
    np.testing.assert_array_equal(pushed, value)
    np.testing.assert_array_equal(tangent, slope)
    return value, slope


@pytest.mark.parametrize(
    ("name", "options", "at_one", "at_zero"),
    [  # (value, slope) at p = 1 and at p = 0
        ("focal_loss", {"gamma": 0.0}, (0, -1), (np.inf, -1)),
        ("focal_loss", {"gamma": 0.5}, (0, 0), (np.inf, -1)),
        ("focal_loss", {"gamma": 2.0}, (0, 0), (np.inf, -1)),
        ("poly_loss", {"epsilon": 2.0}, (0, -3), (np.inf, -1)),
        ("generalized_cross_entropy", {"q": 0.0}, (0, -1), (np.inf, -1)),
        ("generalized_cross_entropy", {"q": 1e-3}, (0, -1), (1000, 0)),
        ("generalized_cross_entropy", {"q": 1.0}, (0, -1), (1, 0)),
        ("symmetric_cross_entropy", {}, (0, -4.1), (np.inf, -0.1)),
        ("symmetric_cross_entropy", {"alpha": 0.0}, (0, -4), (4, 0)),
    ],
)
def test_limits(name, options, at_one, at_zero):
    function = functools.partial(getattr(ce_jax, name), **options)
    value, slope = slopes_everywhere(function, [0.0, -jnp.inf])
    np.testing.assert_allclose(value, [at_one[0], at_zero[0]], rtol=1e-6)
    np.testing.assert_allclose(slope, [at_one[1], at_zero[1]], rtol=1e-6)


def test_derivatives_at_probability_one():
    """With gamma = 1 the series is x^2 + x^3 / 2 + ...; with 1/2 the curvature is infinite."""
    third = jax.jit(jax.grad(jax.grad(jax.grad(functools.partial(ce_jax.focal_loss, gamma=1.0)))))
    np.testing.assert_allclose(third(0.0), 3.0, rtol=1e-6)

    def of_logits(z):
        return ce_jax.focal_loss(ce_jax.softmax_statistics(z, np.array([0, 0])).log_prob, gamma=0.5)

    logits = jnp.array([[200.0, 0.0], [1.0, 0.0]])
    found = jax.jit(jax.hessian(lambda z: of_logits(z).sum()))(logits)
    assert jnp.all(jnp.isfinite(found))
    np.testing.assert_array_equal(found[0], 0)
    assert found[1, 0, 1, 0] > 0


def test_generalized_cross_entropy_near_order_zero():
    """q -> 0 gives the cross-entropy, smoothly: the slope by q at 0 is -log(p)^2 / 2."""
    x = jnp.array([-1e-6, -0.5, -20.0])
    for q in (0.0, 1e-30, 1e-12):
        np.testing.assert_allclose(ce_jax.generalized_cross_entropy(x, q=q), -x, rtol=1e-6)
    slope = jax.jacfwd(lambda q: ce_jax.generalized_cross_entropy(x, q=q))(0.0)
    np.testing.assert_allclose(slope, -jnp.square(x) / 2, rtol=1e-6)


def test_what_is_no_log_probability():
    """Rounding is forgiven; a loss in place of a log-probability is not."""
    x = jnp.array([1e-7, 0.5, jnp.nan])
    for name in OF_LOG_PROB:
        value, pull = jax.vjp(getattr(ce_jax, name), x)
        np.testing.assert_array_equal(value, [0, np.nan, np.nan], name)
        np.testing.assert_array_equal(jnp.isnan(*pull(jnp.ones(3))), [False, True, True], name)


@pytest.mark.parametrize("name", OF_LOG_PROB)
def test_on_softmax_statistics(name):
    """A chain of two: gradients by the logits, rows that do not count, a label that is masked."""
    function = getattr(ce_jax, name)
    arguments = softmax_arguments(ignore_index=-100, where="rows", sample_weight=False, seed=3)

    def loss(logits, labels, axis, where, ignore_index):
        return function(
            ce_jax.softmax_statistics(
                logits, labels, axis, where, ignore_index=ignore_index
            ).log_prob
        )

    def truth(logits, labels, axis, where, ignore_index):
        counts = where & (labels != ignore_index)
        cross = reference.softmax_cross_entropy_with_integer_labels(logits, labels, axis, counts)
        return np.where(counts, getattr(reference_beyond, name)(log_prob=-cross), 0)

    check(loss, truth, arguments, loosen=2)
    logits = jnp.array([[0.0, -jnp.inf, 1.0]])
    labels = jnp.array([1])
    slope = jax.jit(
        jax.grad(lambda z: function(ce_jax.softmax_statistics(z, labels).log_prob).sum())
    )
    assert not jnp.any(jnp.isnan(slope(logits)))


@pytest.mark.parametrize("name", OF_LOG_PROB)
def test_on_linear_statistics(name):
    """The linear form tells the same log-probability, and takes its cotangent."""
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(6, 5)), jnp.float32)
    kernel, labels = draw.normal(size=(5, 9)).astype(np.float32), draw.integers(9, size=6)

    def loss(statistics, kernel):
        return jnp.sum(getattr(ce_jax, name)(statistics(kernel).log_prob))

    (value, slope), (expected, expected_slope) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, statistics)))(jnp.asarray(kernel))
        for statistics in (
            lambda kernel: ce_jax.linear_softmax_statistics(hidden, kernel, labels),
            lambda kernel: ce_jax.softmax_statistics(hidden @ kernel, labels),
        )
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OF_LOG_PROB)
def test_transforms(name):
    function = getattr(ce_jax, name)
    x = jnp.linspace(-3.0, -0.1, 6).reshape(2, 3)
    one_by_one = jnp.stack([function(row) for row in x])
    np.testing.assert_allclose(jax.vmap(function)(x), one_by_one, rtol=1e-6)
    slopes = jax.jit(jax.grad(lambda x: jax.vmap(function)(x).sum()))(x)
    one_by_one = jax.jit(jax.vmap(jax.vmap(jax.grad(function))))(x)
    np.testing.assert_allclose(slopes, one_by_one, rtol=1e-6)
    option = next(iter(OF_LOG_PROB[name]))
    scheduled = jax.jit(lambda value: function(x, **{option: value}))
    scheduled(0.5)
    with compilations() as seen:
        scheduled(0.25)
    assert not seen


def test_bootstrapped():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(6, 4)), draw.integers(4, size=6)

    def soft(logits, beta):
        found = ce_jax.softmax_statistics(logits, labels)
        return ce_jax.soft_bootstrapped_cross_entropy(found.log_prob, found.entropy, beta=beta)

    def hard(logits, beta):
        found = ce_jax.softmax_statistics(logits, labels)
        best = ce_jax.softmax_statistics(logits, found.argmax)
        return ce_jax.hard_bootstrapped_cross_entropy(found.log_prob, best.log_prob, beta=beta)

    def log_p(logits):
        return logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))

    def mixed(logits, beta, own):
        y = np.eye(4)[labels]
        return -np.sum((beta * y + (1 - beta) * own(log_p(logits))) * log_p(logits), -1)

    def predicted(log_p):
        return np.eye(4)[np.argmax(log_p.real, -1)]

    for dtype in (jnp.float32, jnp.float64):
        arguments = {"logits": logits, "beta": 0.6}
        check(soft, functools.partial(mixed, own=np.exp), arguments, ("beta",), dtype=dtype)
        check(hard, functools.partial(mixed, own=predicted), arguments, ("beta",), dtype=dtype)
    assert ce_jax.soft_bootstrapped_cross_entropy(-jnp.inf, 0.5, beta=0.0) == 0.5
    assert ce_jax.hard_bootstrapped_cross_entropy(-0.5, -jnp.inf, beta=1.0) == 0.5


# Of logits


FOCAL_OPTIONS = {
    "alpha": [None, 1.0, "classes"],
    "gamma": [0.0, 0.5, "classes"],
    "hard": [False, True],
    "where": [False, True],
    "sample_weight": [False, True],
    "reduction": [None, "sum", "mean"],
    "dtype": ["bfloat16", "float64"],
}


@pytest.mark.parametrize("case", covering(seed=1, **FOCAL_OPTIONS), ids=named)
def test_sigmoid_focal_loss(case):
    draw = np.random.default_rng(2)
    logits, labels = 3 * draw.normal(size=(5, 4)), draw.uniform(size=(5, 4))
    arguments = {"logits": logits, "labels": (labels > 0.5) * 1.0 if case["hard"] else labels}
    if case["hard"]:
        arguments["labels"] = arguments["labels"].astype(np.int32)
    wrt = []
    for name, low, high in (("alpha", 0.1, 0.9), ("gamma", 0.3, 2.0)):
        if case[name] == "classes":
            arguments[name] = draw.uniform(low, high, size=4)
        elif case[name] is not None:
            arguments[name] = case[name]
            wrt.append(name)
    if case["where"]:
        arguments["where"] = draw.random((5, 4)) < 0.7
        logits[~arguments["where"]] = np.nan
    if case["sample_weight"]:
        arguments["sample_weight"] = draw.uniform(0, 2, size=(5, 1))
        arguments["sample_weight"][1] = 0.0
    arguments["reduction"] = case["reduction"] or "none"
    check(
        ce_jax.sigmoid_focal_loss,
        reference_beyond.sigmoid_focal_loss,
        arguments,
        wrt,
        dtype=jnp.dtype(case["dtype"]),
        loosen=2,
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sigmoid_focal_loss_at_infinite_logits(gamma):
    """The loss is that of the denied share of the label; slopes are the limits, in both modes."""
    inf = jnp.inf
    logits = jnp.array([inf, inf, inf, -inf, -inf, -inf])
    labels = jnp.array([1.0, 0.0, 0.5, 1.0, 0.0, 0.5])
    function = functools.partial(ce_jax.sigmoid_focal_loss, labels=labels, gamma=gamma)
    value, slope = slopes_everywhere(function, logits)
    np.testing.assert_array_equal(value, [0, inf, inf, inf, 0, inf])
    half = 0.5 ** (1 + gamma)
    np.testing.assert_allclose(slope, [0, 1, half, -1, 0, -half], rtol=1e-6)
    assert function(logits, alpha=labels)[1] == inf
    assert ce_jax.sigmoid_focal_loss(inf, 0.0, alpha=1.0, gamma=gamma) == 0
    assert ce_jax.sigmoid_focal_loss(inf, 0.0, sample_weight=0.0, gamma=gamma) == 0


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_sigmoid_focal_loss_keeps_small_numbers(gamma, x64):
    """At a large margin the loss is e^(-(1 + gamma) z), and so, up to sign and size, its slopes."""
    z = jnp.array([40.0, 90.0])
    function = functools.partial(ce_jax.sigmoid_focal_loss, labels=1, gamma=gamma)
    rate = 1 + gamma
    for order in range(3):
        expected = (-rate) ** order * np.exp(-rate * np.asarray(z))
        np.testing.assert_allclose(jax.jit(jax.vmap(function))(z), expected, rtol=1e-12)
        function = jax.grad(function)
    second = jax.vmap(jax.jacfwd(jax.grad(lambda z: ce_jax.sigmoid_focal_loss(z, 1, gamma=gamma))))
    exact = [
        mp.diff(lambda z: mp.log1p(mp.exp(-z)) / (1 + mp.exp(z)) ** gamma, x, 2)
        for x in (-2.0, 0.0, 3.0)
    ]
    np.testing.assert_allclose(
        jax.jit(second)(jnp.array([-2.0, 0.0, 3.0])), np.array(exact, float), 1e-9
    )


POLY_OPTIONS = {
    "layout": ["last", "tuple"],
    "where": [None, "rows", "classes"],
    "masked": [False, True],
    "sample_weight": [False, True],
    "reduction": [None, "sum", "mean"],
    "forward_mode": [False, True],
    "dtype": ["float32", "float64"],
}


@pytest.mark.parametrize("case", covering(seed=2, **POLY_OPTIONS), ids=named)
def test_poly_loss_cross_entropy(case):
    case = {key: value for key, value in case.items() if value is not None}
    dtype, forward_mode = jnp.dtype(case.pop("dtype")), case.pop("forward_mode")
    arguments = softmax_arguments(soft=True, epsilon=-0.7, **case)
    check(
        ce_jax.poly_loss_cross_entropy,
        reference_beyond.poly_loss_cross_entropy,
        arguments,
        ("epsilon",),
        dtype=dtype,
        forward_mode=forward_mode,
        loosen=2,
    )


def test_poly_loss_cross_entropy_at_large_logits():
    """Far from 0 as near it, in value and gradient, and with a target on a masked class."""
    logits, labels = jnp.array([[3.0, 1.0, -jnp.inf]]), jnp.array([[0.0, 1.0, 0.0]])
    loss = jax.jit(jax.value_and_grad(lambda z: ce_jax.poly_loss_cross_entropy(z, labels)[0]))
    value, slope = loss(logits)
    far_value, far_slope = loss(logits + 2.0**16)
    np.testing.assert_array_equal(far_value, value)
    np.testing.assert_array_equal(far_slope, slope)
    assert ce_jax.poly_loss_cross_entropy(logits, labels[:, ::-1])[0] > 0
    assert ce_jax.poly_loss_cross_entropy(logits, jnp.array([[0.0, 0.0, 1.0]]))[0] == jnp.inf
    for far in (1e4, 1e30):
        value, slope = loss(jnp.array([[far, 0.0, -far]]))
        np.testing.assert_allclose(value, far, rtol=1e-3)
        np.testing.assert_allclose(slope, [[1.0, -1.0, 0.0]], atol=1e-6)


def test_poly_loss_cross_entropy_of_class_ids_is_poly_loss():
    draw = np.random.default_rng(0)
    logits, labels = jnp.asarray(draw.normal(size=(5, 4)), jnp.float32), draw.integers(4, size=5)
    np.testing.assert_allclose(
        ce_jax.poly_loss_cross_entropy(logits, jax.nn.one_hot(labels, 4, dtype=bool)),
        ce_jax.poly_loss(ce_jax.softmax_statistics(logits, labels).log_prob),
        rtol=1e-6,
    )


@pytest.mark.usefixtures("lenient")
def test_equal_to_optax():
    draw = np.random.default_rng(0)
    logits = jnp.asarray(5 * draw.normal(size=(6, 4)), jnp.float32)
    labels = jnp.asarray(draw.dirichlet(np.ones(4), size=6), jnp.float32)

    def total(function, z, **options):
        return function(z, labels, **options).sum()

    for name, options in (
        ("sigmoid_focal_loss", {"alpha": 0.25, "gamma": 1.5}),
        ("sigmoid_focal_loss", {"gamma": jnp.arange(4.0)}),
        ("poly_loss_cross_entropy", {"epsilon": -1.0}),
        ("poly_loss_cross_entropy", {"axis": None}),
    ):
        ours, theirs = (
            jax.jit(jax.value_and_grad(functools.partial(total, getattr(module, name), **options)))(
                logits
            )
            for module in (ce_jax, optax.losses)
        )
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-6)


# Of noisy labels


TRANSITION = np.array(
    [[0.7, 0.2, 0.1, 0.0], [0.0, 0.6, 0.2, 0.2], [0.1, 0.1, 0.8, 0.0], [0.3, 0.0, 0.1, 0.6]]
)
NOISY_OPTIONS = {
    "layout": ["last", "first"],
    "where": [None, "rows"],
    "ignore_index": [None, -100],
    "sample_weight": [False, True],
    "reduction": [None, "sum", "mean"],
    "dtype": ["float32", "float64"],
}


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("case", covering(seed=3, **NOISY_OPTIONS), ids=named)
def test_corrected_cross_entropy(case, name):
    case = {key: value for key, value in case.items() if value is not None}
    name, dtype = name + "_corrected_cross_entropy", jnp.dtype(case.pop("dtype"))
    arguments = softmax_arguments(transition=TRANSITION, **case)
    loss, truth = getattr(ce_jax, name), getattr(reference_beyond, name)
    check(loss, truth, arguments, dtype=dtype, loosen=4)


def test_corrections_do_what_they_are_for():
    """Without noise they change nothing; backward correction is right on the mean over it."""
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(size=(4, 4)), jnp.float32)
    labels, matrix = jnp.arange(4), jnp.asarray(TRANSITION, jnp.float32)
    plain = ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels)
    for correct in (
        ce_jax.forward_corrected_cross_entropy,
        ce_jax.backward_corrected_cross_entropy,
    ):
        np.testing.assert_allclose(correct(logits, labels, jnp.eye(4)), plain, rtol=1e-5)
        assert jnp.isnan(correct(logits, labels.at[0].set(7), matrix))[0]
    for z in logits:
        rows = jnp.broadcast_to(z, (4, 4))
        by_label = ce_jax.backward_corrected_cross_entropy(rows, labels, matrix)
        exact = ce_jax.softmax_cross_entropy_with_integer_labels(rows, labels)
        np.testing.assert_allclose(matrix @ by_label, exact, rtol=1e-5)


def test_forward_correction_at_extreme_logits():
    """No class that can become label 3 is likely: its probability underflows, its log does not."""
    logits = jnp.array([[300.0, 0.0, -200.0, -400.0]])
    loss = functools.partial(ce_jax.forward_corrected_cross_entropy, labels=jnp.array([3]))
    matrix = jnp.asarray(TRANSITION, jnp.float32)
    of_both = jax.jit(jax.value_and_grad(lambda z, t: loss(z, transition=t)[0], (0, 1)))
    value, (slope, by_matrix) = of_both(logits, matrix)
    np.testing.assert_allclose(value, 300 - np.log(0.2), rtol=1e-6)
    np.testing.assert_allclose(slope, [[1, -1, 0, 0]], atol=1e-6)
    assert not jnp.any(jnp.isnan(by_matrix))
    np.testing.assert_allclose(by_matrix[1, 3], -1 / 0.2, rtol=1e-6)
    masked = jnp.array([[1.0, -jnp.inf, 0.0, -jnp.inf]])
    value, (slope, _) = of_both(masked, matrix)
    assert value == jnp.inf
    assert jnp.all(jnp.isfinite(slope))
    silenced = jax.jit(
        jax.value_and_grad(lambda z: loss(z, transition=matrix, sample_weight=0.0)[0])
    )(masked)
    assert silenced[0] == 0
    np.testing.assert_array_equal(silenced[1], 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ce_jax.focal_loss(jnp.zeros(2, int)), TypeError, "log_prob .* floating"),
        (lambda: ce_jax.focal_loss(jnp.zeros(2), gamma=-1.0), ValueError, "gamma .* -1.0"),
        (lambda: ce_jax.focal_loss(jnp.zeros(2), gamma="2"), TypeError, "gamma"),
        (lambda: ce_jax.poly_loss(jnp.zeros(2), epsilon=np.nan), ValueError, "epsilon"),
        (lambda: ce_jax.generalized_cross_entropy(jnp.zeros(2), q=1.5), ValueError, "q .* 1.5"),
        (lambda: ce_jax.symmetric_cross_entropy(0.0, log_zero=1.0), ValueError, "log_zero"),
        (
            lambda: ce_jax.soft_bootstrapped_cross_entropy(jnp.zeros(2), jnp.zeros(3)),
            ValueError,
            r"entropy .*\(2,\).*\(3,\)",
        ),
        (lambda: ce_jax.sigmoid_focal_loss(jnp.zeros(2), 1, alpha=2.0), ValueError, "alpha"),
        (
            lambda: ce_jax.sigmoid_focal_loss(jnp.zeros(2), 1, gamma=jnp.ones(3)),
            ValueError,
            "gamma",
        ),
        (
            lambda: ce_jax.sigmoid_focal_loss(jnp.zeros(2), 1, reduction="avg"),
            ValueError,
            "reduction",
        ),
        (
            lambda: ce_jax.poly_loss_cross_entropy(jnp.zeros(2), jnp.zeros(3)),
            ValueError,
            "labels",
        ),
        (
            lambda: ce_jax.forward_corrected_cross_entropy(jnp.zeros((1, 3)), LABEL, jnp.eye(2)),
            ValueError,
            r"transition .*\(3, 3\).*\(2, 2\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_results_are_wide():
    assert accuracy(result_dtype(jnp.float16)) == accuracy(jnp.float32)
    for name in OF_LOG_PROB:
        assert getattr(ce_jax, name)(jnp.zeros(2, jnp.float16)).dtype == jnp.float32
