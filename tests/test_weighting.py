"""Class weights, logit offsets, and the estimate of a shifted prior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

import ce_jax
from tests import reference_beyond

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

COUNTS = np.array([5000, 500, 50, 1, 0])
PRIOR = np.array([0.5, 0.3, 0.2])
WEIGHTS = {
    "inverse_frequency_weights": {},
    "balanced_weights": {},
    "effective_number_weights": {"beta": 0.999},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_class_weights(name):
    function = functools.partial(getattr(ce_jax, name), **WEIGHTS[name])
    expected = getattr(reference_beyond, name)(COUNTS, **WEIGHTS[name])
    np.testing.assert_allclose(function(COUNTS), expected, rtol=2e-6)
    np.testing.assert_allclose(jax.jit(function)(COUNTS), expected, rtol=2e-6)
    both = jax.vmap(function)(jnp.stack([jnp.asarray(COUNTS), jnp.zeros(5, int)]))
    np.testing.assert_allclose(both, [expected, np.zeros(5)], rtol=2e-6)
    with jax.enable_x64(True):
        found = function(COUNTS.astype(float))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.repeat([0, 1, 2, 4], [7, 2, 1, 5])  # class 3 is empty
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    found = ce_jax.balanced_weights(np.bincount(labels))
    np.testing.assert_allclose(found[np.unique(labels)], expected, rtol=1e-6)
    assert found[3] == 0


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9999, 1 - 1e-7, 1.0])
def test_effective_number(beta):
    """From no weighting to the inverse frequency, at any distance of beta from 1."""
    expected = reference_beyond.effective_number_weights(COUNTS, beta=beta)
    found = ce_jax.effective_number_weights(COUNTS, beta=beta)
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    if beta in (0.0, 0.5, 1.0):
        traced = jax.jit(lambda beta: ce_jax.effective_number_weights(COUNTS, beta=beta))(beta)
        np.testing.assert_allclose(traced, expected, rtol=2e-6)


@pytest.mark.parametrize("beta", [0.3, 0.49, 0.51, 0.999])
def test_effective_number_of_a_small_part(beta):
    """Counts may be weights: `1 - beta^n` of little n would have few digits."""
    counts = np.array([1e-8, 1e-3, 1.0, 1e3])
    effective = -np.expm1(counts * np.log(beta))
    expected = np.mean(1 / effective) * effective
    np.testing.assert_allclose(
        1 / ce_jax.effective_number_weights(counts, beta=beta), expected, rtol=3e-6
    )


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.4, 0.5, 0.6, 0.999, 1 - 1e-6, 1.0])
def test_effective_number_by_beta(beta):
    """Also at both ends, where one side of the truth is all there is."""
    counts, pulled = np.array([3.0, 10.0, 1.0]), np.array([1.0, 2.0, -3.0])

    def truth(beta):
        return pulled @ reference_beyond.effective_number_weights(counts, beta=beta)

    low, high = max(beta - 1e-5, 0.0), min(beta + 1e-5, 1.0)
    found = jax.grad(lambda b: ce_jax.effective_number_weights(counts, beta=b) @ pulled)(beta)
    np.testing.assert_allclose(found, (truth(high) - truth(low)) / (high - low), rtol=5e-5)


def test_focal_alpha():
    positives = np.array([10.0, 50.0, 0.0, 100.0])
    found = ce_jax.focal_alpha(positives, 100)
    np.testing.assert_allclose(found, [0.9, 0.5, 1.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found * positives, (1 - found) * (100 - positives), rtol=1e-6)
    np.testing.assert_array_equal(ce_jax.focal_alpha(jnp.zeros(2), jnp.array([0.0, 1.0])), [0.5, 1])


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_logit_offsets(tau):
    log_prior = np.log(COUNTS[:4] / COUNTS.sum())
    training = ce_jax.training_logit_offset(COUNTS, tau=tau)
    prediction = jax.jit(lambda tau: ce_jax.prediction_logit_offset(COUNTS, tau=tau))(tau)
    np.testing.assert_allclose(training[:4], tau * log_prior, rtol=1e-6)
    np.testing.assert_allclose(prediction[:4], -tau * log_prior, rtol=1e-6)
    assert training[4] == prediction[4] == -jnp.inf
    slope = jax.grad(lambda p: ce_jax.training_logit_offset(p, tau=tau)[0])(
        jnp.array([0.5, 0.5, 0])
    )
    np.testing.assert_allclose(slope, [tau, -tau, -tau], rtol=1e-6)


def test_a_trained_offset_learns_the_balanced_problem():
    """The minimiser of the adjusted loss, with the offset left out, has the uniform prior."""
    joint = np.array([[0.6, 0.1], [0.2, 0.1]])  # feature by class
    offset = ce_jax.training_logit_offset(joint.sum(0))
    best = (
        jnp.log(jnp.asarray(joint)) - offset[None]
    )  # logits + offset = log P(class | feature) + const
    slope = jax.grad(
        lambda z: (
            ce_jax.softmax_cross_entropy(z + offset[None], joint / joint.sum(1, keepdims=True))
            @ joint.sum(1)
        )
    )(best)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    balanced = joint / joint.sum(0)
    expected = balanced / balanced.sum(1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(best), expected, rtol=1e-5)


def test_prior_shift_weights():
    found = ce_jax.prior_shift_weights(COUNTS, jnp.array([1.0, 1.0, 1.0, 0.0, 1.0]))
    share = COUNTS / COUNTS.sum()
    np.testing.assert_allclose(found, [*(0.25 / share[:3]), 0.0, 0.0], rtol=1e-6)
    weights = ce_jax.prior_shift_weights(PRIOR, PRIOR[::-1].copy())
    np.testing.assert_allclose(weights @ PRIOR, 1.0, rtol=1e-6)


def shifted_predictions(size=20_000):
    """Posteriors under PRIOR of data drawn from other shares; features are Gaussian."""
    draw = np.random.default_rng(0)
    shares = np.array([0.1, 0.2, 0.7])
    labels = draw.choice(3, size=size, p=shares)
    x = draw.normal(size=size) + 2.0 * labels
    log_likelihood = -0.5 * (x[:, None] - 2.0 * np.arange(3)) ** 2
    return log_likelihood + np.log(PRIOR), np.bincount(labels) / size


def test_estimate_prior():
    logits, shares = shifted_predictions()
    found = ce_jax.estimate_prior(jnp.asarray(logits, jnp.float32), PRIOR)
    np.testing.assert_allclose(found.prior, shares, atol=0.01)
    np.testing.assert_allclose(jnp.sum(found.prior), 1.0, rtol=1e-6)
    assert found.change <= 1e-6
    few = ce_jax.estimate_prior(jnp.asarray(logits[:50], jnp.float32), PRIOR, max_steps=7)
    assert few.steps == 7
    expected = reference_beyond.estimate_prior(logits[:50], PRIOR, 7)
    np.testing.assert_allclose(few.prior, expected, rtol=1e-5)


def test_estimate_prior_of_weighted_batches():
    logits, _ = shifted_predictions(60)
    logits, weight = jnp.asarray(logits, jnp.float32), jnp.asarray(np.arange(60.0) % 3)
    spoiled = logits.at[::3].set(jnp.nan)  # weight 0
    found = ce_jax.estimate_prior(spoiled, PRIOR, sample_weight=weight, max_steps=9)
    np.testing.assert_allclose(
        found.prior, reference_beyond.estimate_prior(logits, PRIOR, 9, weight), rtol=1e-5
    )
    loose, tight = (ce_jax.estimate_prior(logits, PRIOR, tolerance=t).steps for t in (1e-2, 1e-5))
    assert loose < tight
    batches = jnp.stack([logits, logits[:, ::-1]])
    both = jax.vmap(lambda z: ce_jax.estimate_prior(z, PRIOR))(batches)
    alone = [ce_jax.estimate_prior(z, PRIOR) for z in batches]
    np.testing.assert_allclose(both.prior, jnp.stack([x.prior for x in alone]), rtol=1e-5)
    # Off the CPU a product of one batch is not added up as that of both is.
    rounding = 0 if jax.default_backend() == "cpu" else 1
    np.testing.assert_allclose(both.steps, [x.steps for x in alone], rtol=0, atol=rounding)


def test_estimate_prior_whatever_precision_products_have_by_default():
    """A CPU rounds no factors, so the program must tell."""
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(lambda z: ce_jax.estimate_prior(z, PRIOR))(jnp.zeros((5, 3)))
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in str(program).replace("\n", "")
    assert str(program).count("dot_general") == 1


def test_estimate_prior_without_examples_or_classes():
    nothing = ce_jax.estimate_prior(jnp.zeros((0, 3)), PRIOR)
    np.testing.assert_allclose(nothing.prior, PRIOR, rtol=1e-6)
    silent = ce_jax.estimate_prior(jnp.full((2, 3), jnp.nan), PRIOR, sample_weight=0.0)
    np.testing.assert_allclose(silent.prior, PRIOR, rtol=1e-6)
    sure = jnp.array([[0.0, -jnp.inf, 5.0], [-jnp.inf, 0.0, 5.0]])
    found = ce_jax.estimate_prior(sure, jnp.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(found.prior, [0.5, 0.5, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ce_jax.balanced_weights(jnp.array([1, -1])), ValueError, "counts"),
        (lambda: ce_jax.balanced_weights(jnp.ones((2, 2))), ValueError, r"counts .*\(2, 2\)"),
        (lambda: ce_jax.effective_number_weights(COUNTS, beta=1.1), ValueError, "beta .* 1.1"),
        (lambda: ce_jax.focal_alpha(jnp.ones(2), jnp.ones(3)), ValueError, "total"),
        (lambda: ce_jax.training_logit_offset(PRIOR, tau=-1.0), ValueError, "tau"),
        (
            lambda: ce_jax.prior_shift_weights(PRIOR, PRIOR[:2]),
            ValueError,
            r"target_prior .*\(3,\).*\(2,\)",
        ),
        (lambda: ce_jax.estimate_prior(jnp.zeros(3), PRIOR), ValueError, r"logits .*\(3,\)"),
        (lambda: ce_jax.estimate_prior(jnp.zeros((1, 2)), PRIOR), ValueError, "train_prior"),
        (lambda: ce_jax.estimate_prior(jnp.zeros((1, 3), int), PRIOR), TypeError, "logits"),
        (
            lambda: ce_jax.estimate_prior(jnp.zeros((1, 3)), PRIOR, max_steps=0),
            ValueError,
            "max_steps",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
