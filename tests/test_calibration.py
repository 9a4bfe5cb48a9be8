"""Calibration where the order of the predictions, a border or a bound decides; narrow dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._rows.bins import bin_sums
from tests import reference, reference_beyond

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

adaptive_error = functools.partial(ce_jax.expected_calibration_error, adaptive=True)


@pytest.mark.parametrize("correct", ["1111111000", "1101101101", "0001111111"])
def test_one_confidence_is_one_tie(correct):
    """Seven of ten are right at 0.7, in whatever order they come."""
    confidence, correct = np.full(10, 0.7, np.float32), np.array(list(correct)) == "1"
    np.testing.assert_allclose(adaptive_error(confidence, correct, bins=5), 0, atol=1e-7)
    found = ce_jax.reliability_bins(confidence, correct, bins=5, adaptive=True)
    np.testing.assert_array_equal(found.size, 2)
    np.testing.assert_allclose(found.accuracy, 0.7, rtol=1e-6)


@pytest.mark.parametrize("wrong_at", ["start", "end", "spread"])
def test_two_ties_that_are_calibrated(wrong_at):
    """300 at 0.9, of which 270 are right, and 700 at 1, all right: no bin has a gap."""
    order = {
        "start": np.arange(1000),
        "end": np.arange(1000)[::-1],
        "spread": np.random.default_rng(0).permutation(1000),
    }[wrong_at]
    confidence = np.where(np.arange(1000) < 300, 0.9, 1.0).astype(np.float32)[order]
    correct = (np.arange(1000) >= 30)[order]
    for bins in (7, 15):
        error = adaptive_error(confidence, correct, bins=bins)
        np.testing.assert_allclose(error, 0, atol=2e-7)


def tied_predictions(size=400):
    """Confidences in steps of 1/20, both above and below the accuracy; some do not count."""
    draw = np.random.default_rng(3)
    confidence = (draw.integers(1, 21, size=size) / 20).astype(np.float32)
    correct = draw.random(size) < np.where(confidence > 0.5, confidence - 0.2, confidence + 0.2)
    return confidence, correct, draw.random(size) < 0.6


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("adaptive", [False, True])
def test_bins_of_what_counts(bins, adaptive):
    """The bins themselves, of garbage where nothing counts, with gaps of both signs."""
    confidence, correct, where = tied_predictions()
    expected = reference_beyond.reliability_bins(
        confidence[where], correct[where], bins=bins, adaptive=adaptive
    )
    gaps = np.subtract(*expected[1:])
    assert bins == 1 or (np.any(gaps > 0.05) and np.any(gaps < -0.05))
    spoiled = np.where(where, confidence, np.resize([np.nan, np.inf, 0.1], where.size))
    found = ce_jax.reliability_bins(
        spoiled.astype(np.float32), correct, bins=bins, adaptive=adaptive, where=where
    )
    for mine, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("bins", [1, 3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_batch_of_masks_and_answers_beside_one_confidence(bins, adaptive):
    """Of one bin, all of a batch know the index: XLA for a CPU then added up wrong numbers."""
    draw = np.random.default_rng(0)
    confidence = np.full(6, 0.5, np.float32)
    where, correct = draw.random((2, 6, 6)) < 0.6

    def of(where, correct):
        options = {"bins": bins, "adaptive": adaptive, "where": where}
        return (
            ce_jax.reliability_bins(confidence, correct, **options),
            ce_jax.expected_calibration_error(confidence, correct, **options),
        )

    for given in ((where, correct[0]), (where[0], correct), (where, correct)):
        axes = [0 if x.ndim == 2 else None for x in given]
        found = jax.jit(jax.vmap(of, axes))(*given)
        for i in range(6):
            wanted = of(*(x[i] if x.ndim == 2 else x for x in given))
            one = jax.tree.map(lambda x, i=i: x[i], found)
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), one, wanted)


def test_what_does_not_count_is_no_tie():
    """Not of predictions of confidence 0 either, as which it is stored."""
    confidence, correct = jnp.zeros(6), np.array([True, False, True, True, True, True])
    options = {"where": np.array([True, True, False, True, True, False]), "adaptive": True}
    found = ce_jax.reliability_bins(confidence, correct, bins=2, **options)
    np.testing.assert_array_equal(found.size, 2)
    np.testing.assert_array_equal(found.accuracy, 0.75)


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.usefixtures("x64")
def test_the_order_of_the_predictions_does_not_matter(dtype, counting):
    """Not in one bit where bins are adaptive, ties or not; else not beyond the rounding of sums."""
    draw = np.random.default_rng(0)
    confidence, correct, where = tied_predictions()
    confidence = np.where(draw.random(400) < 0.3, draw.random(400), confidence)
    options = {"where": where} if counting else {}

    @functools.partial(jax.jit, static_argnames=("adaptive",))
    def both(confidence, correct, options, adaptive):
        bins = ce_jax.reliability_bins(confidence, correct, bins=7, adaptive=adaptive, **options)
        error = ce_jax.expected_calibration_error(
            confidence, correct, bins=7, adaptive=adaptive, **options
        )
        return *bins, error

    confidence = jnp.asarray(confidence, dtype)
    for adaptive in (False, True):
        first = both(confidence, correct, options, adaptive)
        for _ in range(5):
            order = draw.permutation(400)
            moved = {k: v[order] for k, v in options.items()}
            again = both(confidence[order], correct[order], moved, adaptive)
            for a, b in zip(first, again, strict=True):
                rtol = 0 if adaptive else 1e-13 if dtype == "float64" else 1e-6
                np.testing.assert_allclose(b, a, rtol=rtol)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_symbolic_number_of_predictions(adaptive):
    """One exported program for any number of them."""
    (size,) = jax.export.symbolic_shape("size")
    error = functools.partial(ce_jax.expected_calibration_error, bins=4, adaptive=adaptive)
    shapes = (jax.ShapeDtypeStruct((size,), dtype) for dtype in (jnp.float32, bool))
    exported = jax.export.export(jax.jit(error))(*shapes)
    confidence, correct, _ = tied_predictions()
    for some in (1, 33):
        x = confidence[:some], correct[:some]
        expected = reference_beyond.expected_calibration_error(*x, bins=4, adaptive=adaptive)
        np.testing.assert_allclose(exported.call(*x), expected, rtol=1e-5, atol=1e-7)


def test_the_derivative_of_tied_predictions():
    """Of the error by each confidence: the sign of its bin's gap, over the number of all."""
    confidence = jnp.array([0.9, 0.2, 0.9, 0.2, 0.9, 0.2])
    correct = np.array([True, True, False, True, False, False])
    slope = jax.jit(jax.grad(lambda c: adaptive_error(c, correct, bins=3)))(confidence)
    # Bins of two: 0.2 with 2/3 right; 0.2 and 0.9, with 1/2 right; 0.9 with 1/3 right.
    np.testing.assert_allclose(jnp.sort(slope), np.array([-1, -1, 1, 1, 1, 1]) / 6, rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.usefixtures("x64")
def test_a_border_is_the_number_nearest_to_its_fraction(dtype):
    """A confidence of k / bins is in bin k, for every k."""
    for bins in (49, 100):
        fractions = np.asarray(np.arange(1, bins + 1) / bins, dtype)
        correct = np.zeros(bins, bool)
        found = ce_jax.reliability_bins(fractions, correct, bins=bins)
        np.testing.assert_array_equal(found.size, 1, err_msg=f"{bins} bins")
        above = np.nextafter(fractions[:-1], np.asarray(2, dtype))
        found = ce_jax.reliability_bins(above, correct[1:], bins=bins)
        np.testing.assert_array_equal(found.size, np.arange(bins) > 0, err_msg=f"{bins} bins")


@pytest.mark.usefixtures("usual_programs")
def test_a_large_sum_does_not_swallow_what_is_added_to_it():
    """As one accumulator does from 2^25 on, where a float32 is 4 from the next: all that follows.

    So the mean of 4e7 confidences would be off by 0.086.
    """
    draw = np.random.default_rng(0)
    x = draw.random(300_000).astype(np.float32)
    index = draw.integers(3, size=x.size)
    x[:3], index[:3] = 2**25, (0, 1, 2)
    found = jax.jit(bin_sums, static_argnums=2)(x, index, 3)
    expected = np.bincount(index, x.astype(float))
    np.testing.assert_allclose(found - 2**25, expected - 2**25, rtol=0.01)


RIGHT = jnp.array([[5.0, 0.0], [0.0, 3.0]])


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e5])
@pytest.mark.parametrize("low", [0.01, 1e-4, 0.37])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.usefixtures("x64")
def test_where_no_temperature_is_the_best_the_bound_is_returned(low, scale, dtype):
    """To the last bit: with all right the coldest, with all wrong the hottest."""
    logits = (scale * RIGHT).astype(dtype)
    result = np.dtype(np.float64 if dtype == "float64" else np.float32)
    cold = ce_jax.fit_temperature(logits, jnp.array([0, 1]), low=low, high=99.3)
    hot = ce_jax.fit_temperature(logits, jnp.array([1, 0]), low=low, high=99.3)
    assert cold.dtype == hot.dtype == result
    assert (cold, hot) == (result.type(low), result.type(99.3))


def test_a_temperature_between_traced_bounds():
    """Found where the bounds leave it, the bound where they cut it off, alone or many at once."""
    logits = jnp.array([[4.0, 0.0]] * 4)
    labels = jnp.array([0, 0, 0, 1])
    best = 4 / np.log(3)
    low, high = jnp.array([0.01, 3.7, 0.01]), jnp.array([100.0, 100.0, 3.3])
    fit = jax.jit(
        jax.vmap(lambda low, high: ce_jax.fit_temperature(logits, labels, low=low, high=high))
    )
    found = fit(low, high)
    np.testing.assert_allclose(found[0], best, rtol=1e-6)
    np.testing.assert_array_equal(found[1:], [low[1], high[2]])


def test_a_temperature_of_nothing():
    """1 where there is nothing to fit, or the bound next to it; NaN where there is no softmax."""
    fit = ce_jax.fit_temperature
    assert fit(jnp.zeros((0, 3)), jnp.zeros(0, int)) == 1
    assert fit(jnp.zeros((0, 3)), jnp.zeros(0, int), low=7.7) == np.float32(7.7)
    assert fit(jnp.zeros((4, 3)), jnp.arange(4) % 3) == 1
    assert fit(jnp.array([[0.0, -jnp.inf]]), jnp.array([1])) == 1
    assert jnp.isnan(fit(RIGHT, jnp.array([0, 5])))
    for spoiled in (jnp.nan, jnp.inf):
        logits = RIGHT.at[1, 0].set(spoiled)
        assert jnp.isnan(fit(logits, jnp.array([0, 1])))
        np.testing.assert_allclose(fit(logits, jnp.array([1, -1]), ignore_index=-1), 100)


@pytest.mark.parametrize("margin", [-40.0, -2.0, 9.0, 30.0])
def test_brier_score_keeps_its_digits(margin):
    """Score, slopes and Hessian where the label has nearly all, or no class has."""
    z = np.array([[margin, 0.0, -0.5, -3.0]])
    label = np.zeros(1, int)

    def score(z):
        return ce_jax.brier_score(z, label)[0]

    def truth(z):  # of sums that do not cancel
        shares = np.exp(z[0] - z[0].real.max())
        others = shares[1:] / shares.sum()
        return np.array([np.sum(others) ** 2 + np.sum(others**2)])

    given, one = {"z": z}, np.ones(1)
    x = jnp.asarray(z, jnp.float32)
    value, slope = jax.value_and_grad(score)(x)
    np.testing.assert_allclose(value, truth(z)[0], rtol=1e-6)
    np.testing.assert_allclose(slope, reference.vjp(truth, given, "z", one), rtol=1e-5)
    pushed = jax.jvp(score, (x,), (jnp.ones_like(x).at[0, 0].set(2),))[1]
    np.testing.assert_allclose(pushed, 2 * slope[0, 0] + jnp.sum(slope[0, 1:]), rtol=1e-5)
    hessian = reference.hessian(truth, given, "z", one).reshape(4, 4)
    found = jax.hessian(score)(x).reshape(4, 4)
    np.testing.assert_allclose(found, hessian, rtol=1e-4, atol=1e-6 * np.abs(hessian).max())


def narrow_problem(dtype):
    draw = np.random.default_rng(0)
    logits = jnp.asarray(3 * draw.normal(size=(200, 30)), dtype)
    labels = jnp.asarray(draw.integers(30, size=200))
    return logits, labels


def softmax64(logits):
    p = np.exp(np.asarray(logits, np.float64))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_logits(dtype):
    """No worse than the textbook's formulas in that dtype, and as good as of float32 logits."""
    logits, labels = narrow_problem(dtype)
    p, one_hot = softmax64(logits), np.eye(30)[np.asarray(labels)]
    q = jnp.asarray(np.random.default_rng(1).dirichlet(np.ones(30), size=200), dtype)
    exact_q = np.asarray(q, np.float64)
    plain = jax.nn.softmax(logits)
    parts = ce_jax.cross_entropy_parts(logits, q)
    by_class = jnp.sum((plain - jnp.asarray(one_hot, dtype)) ** 2, -1)
    cases = [
        (ce_jax.brier_score(logits, labels), by_class, np.sum((p - one_hot) ** 2, -1)),
        (parts.entropy, -q * jnp.log(q), -exact_q * np.log(exact_q)),
        (
            parts.divergence,
            q * jnp.log(q / plain) - q + plain,
            exact_q * np.log(exact_q / p) - exact_q + p,
        ),
        (
            ce_jax.gradient_view(logits, labels).per_example,
            plain - jnp.asarray(one_hot, dtype),
            p - one_hot,
        ),
    ]
    for found, naive, true in cases:
        assert found.dtype == jnp.float32
        errors = [np.linalg.norm(np.asarray(x, np.float64) - true) for x in (found, naive)]
        assert errors[0] <= errors[1]
        np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_confidences(dtype, adaptive):
    """A mean of a thousand numbers of 8 or 11 bits, which a sum in that dtype would stop short."""
    draw = np.random.default_rng(0)
    confidence = jnp.asarray(draw.random(3000), dtype)
    correct = draw.random(3000) < 0.5
    found = ce_jax.reliability_bins(confidence, correct, bins=3, adaptive=adaptive)
    exact = np.asarray(confidence, np.float32)
    expected = reference_beyond.reliability_bins(exact, correct, bins=3, adaptive=adaptive)
    assert found.confidence.dtype == jnp.float32
    for mine, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_temperature_of_narrow_logits(dtype):
    """That of the same logits in float64."""
    logits, _ = narrow_problem(dtype)
    draw = np.random.default_rng(1)
    cold = np.asarray(logits, np.float64) / 2.6
    labels = np.argmax(cold + draw.gumbel(size=cold.shape), -1)
    found = ce_jax.fit_temperature(logits, labels)
    with jax.enable_x64(True):
        expected = ce_jax.fit_temperature(np.asarray(logits, np.float64), labels)
    inverse = 1 / float(expected)  # the loss is at its least: its slope in NumPy is 0
    z = np.asarray(logits, np.float64)
    p = softmax64(inverse * z)
    slope = np.sum(p * z, -1) - z[np.arange(len(z)), labels]
    assert abs(slope.mean()) < 1e-12
    np.testing.assert_allclose(found, expected, rtol=1e-5)
