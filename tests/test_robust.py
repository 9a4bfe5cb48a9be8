"""Robust losses: functions of a log-probability; what all of them refuse."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import ce_jax
from tests import reference, reference_beyond
from tests.comparison import accuracy, compare, result_dtype, slopes_everywhere, together
from tests.helpers import WRONG_NAME, compilations, softmax_arguments

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

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
    [-1e-9, -1e-4, -0.1, -0.49, -0.51, -1.0, -3.0, -16.0, -20.0, -50.0, -99.9, -100.1, -1e3]
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


@together(
    {"name": name, "options": options, "dtype": dtype}
    for name, options in CASES
    for dtype in ("float32", "float64")
)
def test_value_and_gradients(case):
    name, options = case["name"], case["options"]
    # Beside 30 a power's own rounding counts that often.
    compare(
        getattr(ce_jax, name),
        getattr(reference_beyond, name),
        {"log_prob": LOG_PROBS, **options},
        tuple(k for k in options if options[k] != 0 or k == "gamma"),
        dtype=jnp.dtype(case["dtype"]),
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


@pytest.mark.usefixtures("usual_programs")
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


@pytest.mark.usefixtures("usual_programs")
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


@pytest.mark.usefixtures("usual_programs")
def test_generalized_cross_entropy_near_order_zero():
    """q -> 0 gives the cross-entropy, smoothly: the slope by q at 0 is -log(p)^2 / 2."""
    x = jnp.array([-1e-6, -0.5, -20.0])
    for q in (0.0, 1e-30, 1e-12):
        np.testing.assert_allclose(ce_jax.generalized_cross_entropy(x, q=q), -x, rtol=1e-6)
    slope = jax.jacfwd(lambda q: ce_jax.generalized_cross_entropy(x, q=q))(0.0)
    np.testing.assert_allclose(slope, -jnp.square(x) / 2, rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
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

    compare(loss, truth, arguments, loosen=2)
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
        compare(soft, functools.partial(mixed, own=np.exp), arguments, ("beta",), dtype=dtype)
        compare(hard, functools.partial(mixed, own=predicted), arguments, ("beta",), dtype=dtype)
    assert ce_jax.soft_bootstrapped_cross_entropy(-jnp.inf, 0.5, beta=0.0) == 0.5
    assert ce_jax.hard_bootstrapped_cross_entropy(-0.5, -jnp.inf, beta=1.0) == 0.5


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
            WRONG_NAME,
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
