"""Robust losses of logits: focal, poly, corrected for noisy labels."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

import ce_jax
from tests import reference_beyond
from tests.comparison import compare, slopes_everywhere, together
from tests.helpers import covering, softmax_arguments

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

mp = mpmath.mp

FOCAL_OPTIONS = {
    "alpha": [None, 1.0, "classes"],
    "gamma": [0.0, 0.5, "classes"],
    "hard": [False, True],
    "where": [False, True],
    "sample_weight": [False, True],
    "reduction": [None, "sum", "mean"],
    "dtype": ["bfloat16", "float64"],
}


@together(covering(seed=1, **FOCAL_OPTIONS))
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
    compare(
        ce_jax.sigmoid_focal_loss,
        reference_beyond.sigmoid_focal_loss,
        arguments,
        wrt,
        dtype=jnp.dtype(case["dtype"]),
        loosen=2,
    )


@pytest.mark.usefixtures("usual_programs")
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


@pytest.mark.usefixtures("usual_programs")
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


@together(covering(seed=2, **POLY_OPTIONS))
def test_poly_loss_cross_entropy(case):
    case = {key: value for key, value in case.items() if value is not None}
    dtype, forward_mode = jnp.dtype(case.pop("dtype")), case.pop("forward_mode")
    arguments = softmax_arguments(soft=True, epsilon=-0.7, **case)
    compare(
        ce_jax.poly_loss_cross_entropy,
        reference_beyond.poly_loss_cross_entropy,
        arguments,
        ("epsilon",),
        dtype=dtype,
        forward_mode=forward_mode,
        loosen=2,
    )


@pytest.mark.usefixtures("usual_programs")
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


@together(
    case | {"loss": f"{direction}_corrected_cross_entropy"}
    for direction in ("forward", "backward")
    for case in covering(seed=3, **NOISY_OPTIONS)
)
def test_corrected_cross_entropy(case):
    case = {key: value for key, value in case.items() if value is not None}
    name, dtype = case.pop("loss"), jnp.dtype(case.pop("dtype"))
    arguments = softmax_arguments(transition=TRANSITION, **case)
    loss, truth = getattr(ce_jax, name), getattr(reference_beyond, name)
    compare(loss, truth, arguments, dtype=dtype, loosen=4)


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


@pytest.mark.usefixtures("usual_programs")
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
