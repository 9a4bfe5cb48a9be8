"""The parts of a loss, the gradient per class, calibration and temperature."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

import ce_jax
from ce_jax._rows.bins import bin_of_rank
from tests import reference, reference_beyond
from tests.comparison import close, compare
from tests.helpers import softmax_arguments

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]


def distributions(arguments):
    """The same problem with labels that sum to 1 over the class axes."""
    axis = arguments["axis"]
    labels = arguments["labels"]
    total = labels.sum(axis, keepdims=True)
    return {**arguments, "labels": labels / np.where(total == 0, 1, total)}


@pytest.mark.parametrize("layout", ["last", "tuple"])
@pytest.mark.parametrize("where", [None, "rows", "classes"])
def test_cross_entropy_parts(layout, where):
    arguments = distributions(
        softmax_arguments(layout=layout, where=where, soft=True, masked=True, seed=5)
    )
    found = ce_jax.cross_entropy_parts(**arguments)
    entropy, divergence = reference_beyond.cross_entropy_parts(**arguments)
    close(found.entropy, entropy, 4e-6, size=1.0)
    close(found.divergence, divergence, 4e-6, size=1.0)
    with jax.enable_x64(True):
        wide = ce_jax.cross_entropy_parts(**arguments)
    close(wide.entropy, entropy, 1e-12, size=1.0)
    close(wide.divergence, divergence, 1e-12, size=1.0)
    loss = ce_jax.softmax_cross_entropy(**arguments)
    np.testing.assert_allclose(jnp.sum(sum(found), -1), loss, rtol=1e-5)
    assert jnp.all(found.divergence >= 0)


def test_parts_of_sure_labels_and_of_a_perfect_model():
    logits = jnp.array([[2.0, 0.5, -1.0]])
    labels = jnp.array([[False, True, False]])
    parts = ce_jax.cross_entropy_parts(logits, labels)
    np.testing.assert_array_equal(parts.entropy, 0)
    np.testing.assert_allclose(
        parts.divergence.sum(), ce_jax.softmax_cross_entropy(logits, labels)[0], rtol=1e-6
    )
    perfect = ce_jax.cross_entropy_parts(logits, jax.nn.softmax(logits))
    np.testing.assert_allclose(perfect.divergence, 0, atol=1e-12)
    impossible = ce_jax.cross_entropy_parts(jnp.array([0.0, -jnp.inf]), jnp.array([0.5, 0.5]))
    assert impossible.divergence[1] == jnp.inf
    near = ce_jax.cross_entropy_parts(logits + jnp.array([[1e-3, 0, 0]]), jax.nn.softmax(logits))
    p = np.exp([2.0, 0.5, -1.0])[0] / np.exp([2.0, 0.5, -1.0]).sum()
    exact = 0.5 * 1e-6 * p * (1 - p)
    np.testing.assert_allclose(near.divergence.sum(), exact, rtol=2e-3)


@pytest.mark.parametrize("labels", [[1.25, -0.25, 0.0], [1, -1, 0]])
def test_a_negative_label_has_no_entropy(labels):
    """It is NaN where it is, in both parts; other classes are what they are without it."""
    logits = jnp.array([2.0, 0.5, -1.0])
    found = ce_jax.cross_entropy_parts(logits, jnp.array(labels))
    fine = ce_jax.cross_entropy_parts(logits, jnp.maximum(jnp.array(labels), 0))
    for part, whole in zip(found, fine, strict=True):
        np.testing.assert_array_equal(np.isnan(part), [False, True, False])
        np.testing.assert_array_equal(part[::2], whole[::2])


def test_parts_under_transforms():
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(size=(4, 3)), jnp.float32)
    labels = jnp.asarray(draw.dirichlet(np.ones(3), size=4), jnp.float32)
    together = ce_jax.cross_entropy_parts(logits, labels)
    one_by_one = jax.jit(jax.vmap(ce_jax.cross_entropy_parts))(logits, labels)
    for a, b in zip(together, one_by_one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    slope = jax.jit(jax.grad(lambda z: ce_jax.cross_entropy_parts(z, labels).divergence.sum()))(
        logits
    )
    np.testing.assert_allclose(slope, jax.nn.softmax(logits) - labels, atol=1e-6)


def test_gradient_view():
    arguments = softmax_arguments(ignore_index=-100, where="rows", seed=3)
    found = ce_jax.gradient_view(**arguments)

    def loss(z):
        return ce_jax.softmax_cross_entropy_with_integer_labels(
            **{**arguments, "logits": z}, reduction="sum"
        )

    slopes = jax.jit(jax.grad(loss))(jnp.asarray(arguments["logits"], jnp.float32))
    np.testing.assert_allclose(found.per_example, slopes, atol=1e-6)
    counts = arguments["where"] & (arguments["labels"] != -100)
    for c in range(4):
        rows = counts & (arguments["labels"] == c)
        assert found.size[c] == rows.sum()
        mean = np.asarray(slopes)[rows].mean(0) if rows.any() else np.zeros(4)
        np.testing.assert_allclose(found.by_label[c], mean, atol=1e-6)
    wrong = ce_jax.gradient_view(jnp.zeros((2, 2)), jnp.array([7, 1]))
    assert jnp.all(jnp.isnan(wrong.per_example[0]))
    np.testing.assert_allclose(wrong.by_label, [[0, 0], [0.5, -0.5]])


def test_the_order_of_the_examples_does_not_matter():
    """Of what is a mean over them, or fitted to all of them."""
    logits, labels = overconfident(200)
    logits[50:100], labels[50:100] = logits[:50], labels[:50]  # ties
    prior = np.full(4, 0.25)

    @jax.jit
    def found(logits, labels):
        view = ce_jax.gradient_view(logits, labels)
        score = ce_jax.brier_score(logits, labels, reduction="mean")
        shares = ce_jax.estimate_prior(logits, prior).prior
        return view.by_label, score, ce_jax.fit_temperature(logits, labels), shares

    order = np.random.default_rng(1).permutation(200)
    for a, b in zip(found(logits, labels), found(logits[order], labels[order]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_the_mean_gradient_of_very_many_examples():
    """A float32 sum of a million equal numbers is off by a hundredth: it rounds them all alike."""
    size = 2**20 + 2**18
    row = jnp.array([0.3, -0.4, 1.1])
    found = jax.jit(ce_jax.gradient_view)(jnp.tile(row, (size, 1)), jnp.ones(size, jnp.int32))
    p = np.exp(np.float64(row)) / np.exp(np.float64(row)).sum()
    np.testing.assert_allclose(found.by_label[1], p - [0, 1, 0], rtol=1e-4)
    np.testing.assert_array_equal(found.size, [0, size, 0])


def predictions(size=500):
    draw = np.random.default_rng(1)
    confidence = draw.random(size).astype(np.float32)
    return confidence, draw.random(size) < confidence**2


@pytest.mark.parametrize("bins", [1, 7])
@pytest.mark.parametrize("adaptive", [False, True])
def test_reliability(bins, adaptive):
    confidence, correct = predictions()
    found = ce_jax.reliability_bins(confidence, correct, bins=bins, adaptive=adaptive)
    expected = reference_beyond.reliability_bins(confidence, correct, bins=bins, adaptive=adaptive)
    for mine, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, true, rtol=1e-5)
    error = ce_jax.expected_calibration_error(confidence, correct, bins=bins, adaptive=adaptive)
    np.testing.assert_allclose(
        error,
        reference_beyond.expected_calibration_error(
            confidence, correct, bins=bins, adaptive=adaptive
        ),
        rtol=1e-5,
    )
    if adaptive:
        assert found.size.max() - found.size.min() <= 1


def test_reliability_is_that_of_scikit_learn():
    confidence, correct = predictions()
    for adaptive, strategy in ((False, "uniform"), (True, "quantile")):
        found = ce_jax.reliability_bins(confidence, correct, bins=10, adaptive=adaptive)
        accuracy, mean = calibration_curve(correct, confidence, n_bins=10, strategy=strategy)
        np.testing.assert_allclose(found.accuracy, accuracy, rtol=1e-5)
        np.testing.assert_allclose(found.confidence, mean, rtol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_reliability_of_what_counts(adaptive):
    confidence, correct = predictions(60)
    where = np.arange(60) % 3 != 0
    spoiled = np.where(where, confidence, np.nan).astype(np.float32)
    function = functools.partial(ce_jax.expected_calibration_error, bins=4, adaptive=adaptive)
    expected = function(confidence[where], correct[where])
    np.testing.assert_allclose(function(spoiled, correct, where=where), expected, rtol=1e-6)
    both = jax.vmap(lambda c: function(c, correct, where=where))(jnp.stack([spoiled, confidence]))
    np.testing.assert_allclose(both, [expected, expected], rtol=1e-6)
    assert jnp.isnan(function(confidence, correct, where=np.zeros(60, bool)))
    few = ce_jax.reliability_bins(confidence[:2], correct[:2], bins=4, adaptive=adaptive)
    assert few.size.sum() == 2
    np.testing.assert_array_equal(jnp.isnan(few.accuracy), few.size == 0)


def test_edges_of_bins():
    """Bins are closed on the right, and 0 belongs to the first."""
    edges = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    found = ce_jax.reliability_bins(edges, jnp.ones(5, bool), bins=4)
    np.testing.assert_array_equal(found.size, [2, 1, 1, 1])


def test_many_predictions_in_many_bins_of_equal_size():
    """Rank times number of bins exceeds 32 bits."""
    size, bins = 300_000, 10_000
    confidence = np.linspace(0, 1, size, dtype=np.float32)
    correct = np.arange(size) % 7 < 3
    found = ce_jax.reliability_bins(confidence, correct, bins=bins, adaptive=True)
    np.testing.assert_array_equal(found.size, size // bins)
    for mine, x in ((found.confidence, confidence), (found.accuracy, correct)):
        np.testing.assert_allclose(mine, x.reshape(bins, -1).mean(-1, dtype=float), rtol=1e-6)


@pytest.mark.parametrize("bins", [1, 7, 1000, 999_983, 2**31 - 1])
def test_bins_of_ranks(bins):
    """For any numbers below 2^31; ranks that are not among `size` go last."""
    for size in (1, 2, 1000, 3_000_017, 2**31 - 1):
        rank = np.unique(np.linspace(0, size - 1, 50).astype(int))
        expected = [int(r) * bins // size for r in rank]
        found = bin_of_rank(jnp.asarray(rank, jnp.int32), jnp.asarray(size, jnp.int32), bins)
        np.testing.assert_array_equal(found, expected)
        after = bin_of_rank(jnp.asarray([size]), jnp.asarray(size), bins)
        assert expected[-1] <= after[0] < bins


def test_bins_of_more_predictions_than_float32_counts():
    """A float32 sum of ones stops at 2^24; of equal numbers it drifts off long before."""
    size = 2**24 + 2**22
    confidence = np.full(size, 0.9, np.float32)
    correct = np.arange(size, dtype=np.int32) >= 2**10
    found = ce_jax.reliability_bins(confidence, correct, bins=2)
    np.testing.assert_array_equal(found.size, [0, size])
    np.testing.assert_allclose(found.accuracy[1], 1 - 2**10 / size, rtol=1e-7)
    np.testing.assert_allclose(found.confidence[1], np.float64(np.float32(0.9)), rtol=2e-7)


def test_the_mean_confidence_has_a_derivative():
    """Of each prediction in a bin, one over the bin's size."""
    confidence, counts = jnp.array([0.1, 0.2, 0.7, 0.9, 0.3]), np.arange(5) != 4

    def means(confidence):
        found = ce_jax.reliability_bins(confidence, counts, bins=2, where=counts)
        return found.confidence

    expected = [[0.5, 0.5, 0, 0, 0], [0, 0, 0.5, 0.5, 0]]
    np.testing.assert_allclose(jax.jacrev(means)(confidence), expected, rtol=1e-6)


@pytest.mark.parametrize("layout", ["last", "tuple"])
def test_brier_score(layout):
    arguments = softmax_arguments(
        layout=layout, ignore_index=-100, sample_weight=True, masked=True, reduction="mean"
    )
    for dtype in (jnp.float32, jnp.float64):
        compare(ce_jax.brier_score, reference_beyond.brier_score, arguments, dtype=dtype, loosen=2)


def test_brier_score_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(30, 3)).astype(np.float32), draw.integers(3, size=30)
    probs = np.asarray(jax.nn.softmax(logits), float)
    expected = brier_score_loss(labels, probs / probs.sum(-1, keepdims=True))
    np.testing.assert_allclose(
        ce_jax.brier_score(logits, labels, reduction="mean"), expected, rtol=1e-5
    )


def overconfident(size=400, factor=3.0):
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(size, 4))
    labels = np.argmax(logits + draw.gumbel(size=logits.shape), -1)
    return factor * logits, labels


@pytest.mark.parametrize("factor", [0.2, 30.0])
def test_fit_temperature(factor):
    logits, labels = overconfident(factor=factor)

    def loss(log_temperature):
        z = logits / np.exp(log_temperature)
        return reference.softmax_cross_entropy_with_integer_labels(z, labels, reduction="mean")

    best = scipy.optimize.minimize_scalar(
        loss, bracket=(np.log(factor) - 1, np.log(factor) + 1), tol=1e-10
    )
    found = ce_jax.fit_temperature(logits.astype(np.float32), labels)
    np.testing.assert_allclose(found, np.exp(best.x), rtol=1e-5)


def test_fit_temperature_of_what_counts():
    logits, labels = overconfident(90)
    logits = logits.astype(np.float32)
    weight = (np.arange(90) % 3).astype(np.float32)
    spoiled = np.where(weight[:, None] == 0, np.nan, logits)
    expected = ce_jax.fit_temperature(
        np.repeat(logits, weight.astype(int), 0), np.repeat(labels, weight.astype(int))
    )
    found = ce_jax.fit_temperature(spoiled.T, labels, 0, sample_weight=weight)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    kept = weight > 0
    halves = ce_jax.fit_temperature(logits[kept], labels[kept])
    first = np.arange(90) < 45
    ignored = np.where(kept | first, labels, -100)
    found = ce_jax.fit_temperature(spoiled, ignored, where=kept | ~first, ignore_index=-100)
    np.testing.assert_allclose(found, halves, rtol=1e-5)
    masked = np.concatenate([logits, np.full((90, 1), -np.inf, np.float32)], 1)
    np.testing.assert_allclose(
        ce_jax.fit_temperature(masked, labels), ce_jax.fit_temperature(logits, labels), rtol=1e-5
    )
    both = jax.vmap(ce_jax.fit_temperature)(
        jnp.stack([logits, 2 * logits]), jnp.stack([labels] * 2)
    )
    alone = ce_jax.fit_temperature(logits, labels)
    np.testing.assert_allclose(both, [alone, 2 * alone], rtol=1e-5)


@pytest.mark.parametrize("kind", [float, np.float32, np.float64, jnp.float32])
def test_a_bound_is_within_the_bounds(kind):
    """In float32 1e-6 is below 1e-6."""
    right, coldest = jnp.array([[5.0, 0.0], [0.0, 3.0]]), kind(1e-6)
    found = ce_jax.fit_temperature(right, jnp.array([0, 1]), low=coldest)
    assert found == np.float32(1e-6)
    loss = ce_jax.distillation_loss(right, jnp.zeros((2, 2)), temperature=coldest)
    # To so cold a student the teacher's even odds cost their gap in half of the cases.
    np.testing.assert_allclose(loss, 1e-6**2 * np.array([5.0, 3.0]) / 2e-6, rtol=1e-4)
    for name, below in (("low", 9e-7), ("high", 0.0)):
        with pytest.raises(ValueError, match=f"{name} must .*1e-06"):
            ce_jax.fit_temperature(right, jnp.array([0, 1]), **{name: kind(below)})
    assert ce_jax.fit_temperature(right, jnp.array([0, 1]), low=kind(2), high=kind(2)) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ce_jax.fit_temperature(jnp.zeros((1, 2)), jnp.zeros(1, int), low=200.0),
            ValueError,
            r"low .* high.* low=200\.0 and high=100\.0",
        ),
        (
            lambda: ce_jax.cross_entropy_parts(jnp.zeros((2, 3)), jnp.zeros((3, 3))),
            ValueError,
            "labels",
        ),
        (lambda: ce_jax.gradient_view(jnp.zeros((2, 3)), jnp.zeros(2)), TypeError, "labels"),
        (lambda: ce_jax.brier_score(jnp.zeros((2, 3)), jnp.zeros(3, int)), ValueError, "labels"),
        (
            lambda: ce_jax.reliability_bins(jnp.zeros(2), jnp.zeros(3, bool)),
            ValueError,
            r"correct .*\(2,\).*\(3,\)",
        ),
        (lambda: ce_jax.reliability_bins(jnp.zeros(2), jnp.zeros(2)), TypeError, "correct .* bool"),
        (
            lambda: ce_jax.reliability_bins(jnp.zeros(2), jnp.zeros(2, bool), bins=0),
            ValueError,
            "bins",
        ),
        (
            lambda: ce_jax.fit_temperature(jnp.zeros((1, 2)), jnp.zeros(1, int), low=0.0),
            ValueError,
            "low",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
