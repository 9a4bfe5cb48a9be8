"""Mistakes seen in respected libraries. Each test is one of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference

pytestmark = pytest.mark.sweep

integer_loss = ce_jax.softmax_cross_entropy_with_integer_labels
soft_loss = ce_jax.softmax_cross_entropy
INF, NAN = jnp.inf, jnp.nan
both_modes = pytest.mark.parametrize("forward_mode", [False, True])


def pulled(loss, logits, cotangent=None):
    """Losses, and the gradient of each row's loss, from one program."""

    @jax.jit
    def losses_and_slopes(logits):
        losses, pull = jax.vjp(loss, logits)
        (slopes,) = pull(jnp.ones_like(losses) if cotangent is None else cotangent)
        return losses, slopes

    return losses_and_slopes(logits)


@both_modes
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"weight": jnp.ones(1000)}, {"ignore_index": -7}],
    ids=list,
)
def test_invalid_label_is_nan_and_never_wrapped(options, forward_mode):
    """Loss and gradient of its row are NaN; the other row is untouched."""
    labels = jnp.array([-100, -1, 1000, 1001, 2**31 - 1, -(2**31), 3])
    losses, slopes = pulled(
        lambda z: integer_loss(z, labels, **options, forward_mode=forward_mode),
        jnp.zeros((7, 1000)),
    )
    np.testing.assert_allclose(losses, [np.nan] * 6 + [np.log(1000.0)], rtol=1e-6)
    assert np.isnan(slopes[:6]).all()
    assert np.isfinite(slopes[6]).all()


def test_invalid_label_spoils_the_mean_visibly():
    labels, weight = jnp.array([5, 0]), jnp.ones(3)
    for options in ({}, {"weight": weight}):
        value, slopes = pulled(
            lambda z, options=options: integer_loss(z, labels, **options, reduction="mean"),
            jnp.zeros((2, 3)),
        )
        assert np.isnan(value)
        assert np.isnan(slopes[0]).all()


@both_modes
def test_invalid_label_that_does_not_count(forward_mode):
    labels = jnp.array([-100, 999, 1])
    options = {"where": jnp.array([True, False, True]), "ignore_index": -100}
    for reduction in ("sum", "mean"):
        value, slopes = pulled(
            lambda z, reduction=reduction: integer_loss(
                z,
                labels,
                weight=jnp.ones(2),
                **options,
                reduction=reduction,
                forward_mode=forward_mode,
            ),
            jnp.zeros((3, 2)),
        )
        np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)
        np.testing.assert_array_equal(slopes[:2], 0.0)


@both_modes
@pytest.mark.parametrize("hidden", [-INF, "where"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_masked_class_with_zero_target(hidden, smoothing, forward_mode):
    """0 * -inf is 0 in value and gradient; smoothing spreads over the two classes that are left."""
    logits = jnp.array([[1.0, 0.5 if hidden == "where" else hidden, 0.0]])
    where = jnp.array([[True, False, True]]) if hidden == "where" else None
    targets = jnp.array([[1.0, 0.0, 0.0]])
    exact = {
        "logits": np.array([[1.0, 0.0]]),
        "labels": np.array([[1.0, 0.0]]),
        "label_smoothing": smoothing,
    }
    value = reference.softmax_cross_entropy(**exact)
    slope = reference.vjp(reference.softmax_cross_entropy, exact, "logits", 1.0)[0]
    for loss, labels in ((soft_loss, targets), (integer_loss, jnp.array([0]))):
        losses, slopes = pulled(
            lambda z, loss=loss, labels=labels: loss(
                z, labels, where=where, label_smoothing=smoothing, forward_mode=forward_mode
            ),
            logits,
        )
        np.testing.assert_allclose(losses, value, rtol=1e-6)
        np.testing.assert_allclose(slopes, [[slope[0], 0.0, slope[1]]], rtol=1e-6, atol=1e-7)


def test_masked_class_in_forward_mode():
    """jacfwd, where optax gives NaN; the tangent of a masked logit moves nothing."""
    logits, targets = jnp.array([1.0, -INF, 0.0]), jnp.array([1.0, 0.0, 0.0])
    for smoothing in (0.0, 0.3):

        def loss(z, smoothing=smoothing):
            return soft_loss(z, targets, label_smoothing=smoothing, forward_mode=True)

        slopes, wanted, curvature = (
            jax.jit(derivative(loss))(logits)
            for derivative in (jax.jacfwd, jax.jacrev, jax.hessian)
        )
        np.testing.assert_allclose(slopes, wanted, rtol=1e-6)
        assert np.isfinite(slopes).all()
        assert np.isfinite(curvature).all()


@pytest.mark.parametrize("hidden", [-INF, "where"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"weight": jnp.array([1.0, 2.0, 3.0])}], ids=list
)
def test_label_on_a_masked_class_is_infinite(hidden, options):
    logits = jnp.array([[1.0, 9.0 if hidden == "where" else hidden, 0.0], [1.0, 2.0, 3.0]])
    where = jnp.array([[True, False, True], [True] * 3]) if hidden == "where" else None
    for loss, labels in (
        (integer_loss, jnp.array([1, 2])),
        (soft_loss, jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])),
        (soft_loss, jnp.array([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])),
    ):
        losses, slopes = pulled(
            lambda z, loss=loss, labels=labels: loss(z, labels, where=where, **options), logits
        )
        assert losses[0] == np.inf
        assert np.isfinite(losses[1])
        assert np.isfinite(slopes[1]).all()
        assert not np.isnan(slopes[0, ::2]).any()


@both_modes
@pytest.mark.parametrize("soft", [False, True])
def test_every_class_masked_by_where(soft, forward_mode):
    """Such a row does not count, and is not in the denominator."""
    loss = soft_loss if soft else integer_loss
    labels = jnp.array([[0.3, 0.9]] * 2) if soft else jnp.array([1, 1])
    logits = jnp.array([[NAN, INF], [0.0, 0.0]])
    where = jnp.array([[False, False], [True, True]])
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "forward_mode": forward_mode}
    alone = loss(logits[1], labels[1], **options)
    for reduction, wanted in (("none", [0.0, alone]), ("mean", alone)):
        losses, slopes = pulled(
            lambda z, reduction=reduction: loss(
                z, labels, where=where, reduction=reduction, **options
            ),
            logits,
        )
        np.testing.assert_allclose(losses, wanted, rtol=1e-6)
        np.testing.assert_array_equal(slopes[0], 0.0)
        assert np.isfinite(slopes).all()


def test_every_logit_minus_infinity():
    """By the formula a row that counts is not finite; the rows beside it are untouched."""
    logits, one_hot = jnp.array([[-INF, -INF], [0.0, 0.0]]), jnp.array([[1.0, 0.0]] * 2)
    for loss, labels in ((integer_loss, jnp.array([0, 0])), (soft_loss, one_hot)):
        losses, slopes = pulled(lambda z, loss=loss, labels=labels: loss(z, labels), logits)
        assert not np.isfinite(losses[0])
        np.testing.assert_allclose(losses[1], np.log(2.0), rtol=1e-6)
        assert np.isfinite(slopes[1]).all()


@both_modes
@pytest.mark.parametrize("excluded_by", ["where", "ignore_index", "sample_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_row_that_does_not_count_is_exactly_zero(excluded_by, reduction, forward_mode):
    """Loss and gradient, whatever its logits hold."""
    garbage = [[NAN, NAN], [INF, INF], [-INF, -INF], [INF, -INF], [-INF, INF], [3e38, -3e38]]
    counts = jnp.array([False] * 6 + [True])
    options = {
        "where": {"where": counts},
        "ignore_index": {"ignore_index": 1},
        "sample_weight": {"sample_weight": jnp.where(counts, 2.0, 0.0)},
    }[excluded_by]
    losses, slopes = pulled(
        lambda z: integer_loss(
            z,
            jnp.where(counts, 0, 1),
            label_smoothing=0.1,
            z_loss=0.1,
            weight=jnp.array([1.0, 2.0]),
            reduction=reduction,
            forward_mode=forward_mode,
            **options,
        ),
        jnp.array([*garbage, [0.0, 0.0]]),
    )
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(slopes[:6], 0.0)
    assert np.isfinite(slopes[6]).all()
    if reduction == "none":
        np.testing.assert_array_equal(losses[:6], 0.0)


def test_a_nan_logit_that_counts_is_seen():
    """NaN is no mask: it must not be dropped as -inf is."""
    logits, one_hot = (
        jnp.array([[NAN, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        jnp.array([[0.0, 1.0, 0.0]] * 2),
    )
    for loss, labels in ((integer_loss, jnp.array([1, 1])), (soft_loss, one_hot)):
        losses, slopes = pulled(lambda z, loss=loss, labels=labels: loss(z, labels), logits)
        np.testing.assert_array_equal(np.isnan(losses), [True, False])
        assert np.isnan(slopes[0]).any()
        assert np.isfinite(slopes[1]).all()


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("soft", [False, True])
def test_float16_with_131072_classes(soft):
    classes = 131072
    logits = jnp.zeros((1, classes), jnp.float16)
    labels = jax.nn.one_hot(jnp.array([7]), classes, dtype=jnp.float16) if soft else jnp.array([7])
    loss = soft_loss if soft else integer_loss
    losses, slopes = pulled(lambda z: loss(z, labels, label_smoothing=0.1), logits)
    np.testing.assert_allclose(losses, np.log(classes), rtol=1e-6)
    # Smoothing's share of a class and the softmax's are 6.9e-6: finite, and right to half a unit.
    np.testing.assert_allclose(slopes[0, 7], 0.9 * (1 / classes - 1), rtol=2**-11)
    np.testing.assert_allclose(slopes[0, 8], 0.9 / classes, rtol=0, atol=2**-25)


def test_bfloat16_loss_is_not_quantised():
    losses = integer_loss(jnp.zeros((1, 100), jnp.bfloat16), jnp.array([3]))
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(100.0), rtol=1e-6)


def test_lse_is_not_accumulated_in_bfloat16():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8192)), jnp.bfloat16)
    exact = np.asarray(logits, np.float64)
    lse = ce_jax.softmax_statistics(logits, jnp.array([0, 1])).lse
    np.testing.assert_allclose(lse, np.log(np.exp(exact).sum(-1)), rtol=1e-6)


def test_targets_that_do_not_sum_to_one():
    """The softmax is scaled by the sum of the target, not by 1."""
    logits, targets = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[2.0, 0.5, 0.25]])
    _, slopes = pulled(lambda z: soft_loss(z, targets), logits)
    np.testing.assert_allclose(slopes, 2.75 * jax.nn.softmax(logits) - targets, rtol=2e-6)


def test_gradient_of_soft_labels_is_not_zero():
    logits, targets = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[0.2, 0.5, 0.3]])
    slopes = jax.grad(lambda t: soft_loss(logits, t)[0])(targets)
    np.testing.assert_allclose(slopes, -jax.nn.log_softmax(logits), rtol=2e-6)


def test_gradient_of_the_z_loss_is_not_zero():
    logits, labels = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([1])
    lse = jax.nn.logsumexp(logits)

    def extra(z, z_loss):
        return (integer_loss(z, labels, z_loss=z_loss) - integer_loss(z, labels))[0]

    of_logits, of_z_loss = jax.grad(extra, argnums=(0, 1))(logits, 0.1)
    np.testing.assert_allclose(of_logits, 0.2 * lse * jax.nn.softmax(logits), rtol=1e-5)
    np.testing.assert_allclose(of_z_loss, lse**2, rtol=1e-5)


def test_smoothing_ignored_rows_and_class_weights_together():
    """By hand: the ignored row leaves numerator and denominator, the uniform part is weighted."""
    log_probs = jax.nn.log_softmax(jnp.array([[1.0, 2.0, 0.5], [0.1, -1.0, 0.0], [4.0, 4.0, 4.0]]))
    weight, eps = jnp.array([0.5, 2.0, 3.0]), 0.2
    rows = [
        -0.8 * weight[y] * log_probs[i, y] - eps / 3 * jnp.sum(weight * log_probs[i])
        for i, y in ((0, 1), (1, 0))
    ]
    found = integer_loss(
        log_probs,
        jnp.array([1, 0, 2]),
        weight=weight,
        ignore_index=2,
        label_smoothing=eps,
        reduction="mean",
    )
    np.testing.assert_allclose(found, sum(rows) / (weight[1] + weight[0]), rtol=2e-6)


def test_smoothing_leaves_minus_infinity_alone():
    logits = jnp.array([[0.0, -INF, -INF, 0.0]])
    np.testing.assert_allclose(
        integer_loss(logits, jnp.array([0]), label_smoothing=0.5), np.log(2.0), rtol=1e-6
    )


def test_unequal_cotangents_reach_their_rows():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    labels, cotangent = jnp.array([0, 1, 2]), jnp.array([0.0, -2.0, 5.0])
    _, slopes = pulled(lambda z: integer_loss(z, labels), logits, cotangent)
    wanted = cotangent[:, None] * (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 4))
    np.testing.assert_allclose(slopes, wanted, rtol=2e-6, atol=1e-6)


def test_sample_weight_of_zero_keeps_its_own_gradient():
    """A weight of 0 is a weight: the derivative with respect to it is the loss of its row."""
    logits, labels = jnp.array([[0.3, -1.0], [2.0, 1.0]]), jnp.array([1, 1])
    slopes = jax.grad(lambda w: jnp.sum(integer_loss(logits, labels, sample_weight=w)))(
        jnp.array([0.0, 1.0])
    )
    np.testing.assert_allclose(slopes, integer_loss(logits, labels), rtol=1e-6)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("excluded_by", ["where", "sample_weight"])
@pytest.mark.parametrize(
    "name",
    ["softmax_cross_entropy", "nll_loss", "sigmoid_binary_cross_entropy", "binary_cross_entropy"],
)
def test_excluded_garbage_is_exactly_zero_in_every_loss(name, excluded_by, reduction):
    """As for integer labels: not counting, or weighing 0, silences NaN and infinity."""
    inputs = jnp.array([[NAN, NAN], [INF, -INF], [-INF, -INF], [INF, INF], [0.25, 0.75]])
    labels = jnp.array([0, 0, 1, 1, 1]) if name == "nll_loss" else jnp.array([[1.0, 0.5]] * 5)
    counts = jnp.array([False] * 4 + [True])
    counts = counts[:, None] if name.startswith(("sigmoid", "binary")) else counts
    by_weight = excluded_by == "sample_weight"
    option = {excluded_by: counts.astype(jnp.float32) if by_weight else counts}
    losses, slopes = pulled(
        lambda z: getattr(ce_jax, name)(
            z, labels, **option, label_smoothing=0.1, reduction=reduction
        ),
        inputs,
    )
    assert np.isfinite(losses).all()
    np.testing.assert_array_equal(slopes[:4], 0.0)
    assert np.isfinite(slopes[4]).all()
    assert np.abs(slopes[4]).max() > 0
    if reduction == "none":
        np.testing.assert_array_equal(losses[:4], 0.0)
