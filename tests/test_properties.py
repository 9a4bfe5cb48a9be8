"""What must hold for any input: hypothesis looks for the one that breaks it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ce_jax
from tests import reference
from tests.comparison import close

pytestmark = pytest.mark.sweep

# Few shapes, since each is compiled; many values.
SHAPES = [(1, 1), (3, 2), (4, 7)]
# A float32, as hypothesis wants its bounds.
HUGE = float(np.float32(3e38))
DTYPES = ["float32", "float16", "bfloat16"]


def floats(low, high):
    """Without the subnormal ones: XLA takes them for 0, the reference does not."""
    return st.floats(low, high, width=32, allow_subnormal=False)


@st.composite
def problems(draw, low=-50.0, high=50.0, dtypes=("float32",)):
    """Logits, ids and soft labels of them, and a smoothing."""
    rows, classes = shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(dtypes))
    logits = draw(hnp.arrays(np.float32, shape, elements=floats(low, high)))
    labels = draw(hnp.arrays(np.int32, rows, elements=st.integers(0, classes - 1)))
    targets = draw(hnp.arrays(np.float32, shape, elements=floats(0.0, 2.0)))
    smoothing = draw(st.sampled_from([0.0, 0.125, 1.0]) | floats(0.0, 1.0))
    return jnp.asarray(logits, dtype), labels, jnp.asarray(targets, dtype), np.float32(smoothing)


@jax.jit
def integer(logits, labels, smoothing):
    def loss(z):
        return ce_jax.softmax_cross_entropy_with_integer_labels(
            z, labels, label_smoothing=smoothing
        )

    losses, pull = jax.vjp(loss, logits)
    return losses, pull(jnp.ones_like(losses))[0]


@jax.jit
def soft(logits, targets, smoothing):
    def loss(z):
        return ce_jax.softmax_cross_entropy(z, targets, label_smoothing=smoothing)

    losses, pull = jax.vjp(loss, logits)
    return losses, pull(jnp.ones_like(losses))[0]


@jax.jit
def sigmoid(logits, targets, smoothing):
    def loss(z):
        return ce_jax.sigmoid_binary_cross_entropy(z, targets, label_smoothing=smoothing)

    losses, pull = jax.vjp(loss, logits)
    return losses, pull(jnp.ones_like(losses))[0]


def against_the_truth(name, found, logits, labels, smoothing, atol):
    """Losses and, rounded once to the dtype of the logits, their slopes."""
    truth = getattr(reference, name)
    exact = {
        "logits": np.asarray(logits, np.float64),
        "labels": np.asarray(labels, int if labels.dtype == np.int32 else np.float64),
        "label_smoothing": float(smoothing),
    }
    losses, slopes = found
    np.testing.assert_allclose(losses, truth(**exact), rtol=2e-6, atol=atol)
    slope = reference.vjp(truth, exact, "logits", np.ones(losses.shape))
    rounding = {"float32": 2e-6, "float16": 2**-11, "bfloat16": 2**-8}[logits.dtype.name]
    np.testing.assert_allclose(slopes, slope, rtol=rounding + 1e-6, atol=atol / 5)


@given(problems(dtypes=DTYPES))
def test_the_truth(problem):
    logits, labels, targets, eps = problem
    names = ("softmax_cross_entropy_with_integer_labels", "softmax_cross_entropy")
    against_the_truth(names[0], integer(logits, labels, eps), logits, labels, eps, 1e-5)
    against_the_truth(names[1], soft(logits, targets, eps), logits, targets, eps, 1e-4)
    found = sigmoid(logits, targets, eps)
    against_the_truth("sigmoid_binary_cross_entropy", found, logits, targets, eps, 1e-5)


@given(problems(), st.integers(-100, 100))
def test_shift_invariance(problem, shift):
    """Softmax losses do not see a constant added to a row's logits."""
    logits, labels, targets, smoothing = problem
    grid = jnp.round(logits * 8) / 8  # so that the shifted logits are exact
    for loss, label in ((integer, labels), (soft, targets)):
        here, slopes = loss(grid, label, smoothing)
        there, shifted_slopes = loss(grid + jnp.float32(shift), label, smoothing)
        np.testing.assert_allclose(there, here, rtol=2e-5, atol=2e-4)
        np.testing.assert_allclose(shifted_slopes, slopes, rtol=2e-5, atol=2e-5)


@given(problems())
def test_rows_of_the_gradient_sum_to_zero(problem):
    """T * sum(softmax) - sum(t) = 0, also where T is not 1."""
    logits, labels, targets, smoothing = problem
    for loss, label in ((integer, labels), (soft, targets)):
        _, slopes = loss(logits, label, smoothing)
        size = jnp.abs(slopes).sum(-1)
        assert (np.abs(slopes.sum(-1)) <= 1e-5 * np.maximum(size, 1.0)).all()


@given(problems(), st.randoms(use_true_random=False))
def test_permuting_classes_changes_nothing(problem, random):
    logits, labels, targets, smoothing = problem
    order = list(range(logits.shape[1]))
    random.shuffle(order)
    order = np.array(order)
    losses, slopes = integer(logits, labels, smoothing)
    permuted, permuted_slopes = integer(logits[:, order], np.argsort(order)[labels], smoothing)
    np.testing.assert_allclose(permuted, losses, rtol=2e-6, atol=1e-5)
    np.testing.assert_allclose(permuted_slopes, slopes[:, order], rtol=1e-5, atol=1e-6)
    losses, _ = soft(logits, targets, smoothing)
    permuted, _ = soft(logits[:, order], targets[:, order], smoothing)
    np.testing.assert_allclose(permuted, losses, rtol=2e-6, atol=1e-4)


@given(problems())
def test_the_loss_is_linear_in_the_target(problem):
    """Soft labels: the loss of a sum is the sum of the losses; of one-hot labels, the ids' loss."""
    logits, labels, targets, _ = problem
    one_hot = jax.nn.one_hot(labels, logits.shape[1])
    zero = np.float32(0)
    of_ids, _ = integer(logits, labels, zero)
    of_one_hot, _ = soft(logits, one_hot, zero)
    np.testing.assert_allclose(of_one_hot, of_ids, rtol=1e-6, atol=1e-6)
    of_targets, _ = soft(logits, targets, zero)
    of_sum, _ = soft(logits, targets + one_hot, zero)
    np.testing.assert_allclose(of_sum, of_ids + of_targets, rtol=1e-5, atol=1e-4)


@given(problems())
def test_two_classes_are_a_sigmoid(problem):
    """Softmax of (0, z) is the sigmoid of z: two implementations that share no line."""
    logits, _, targets, smoothing = problem
    z, y = logits[:, 0], jnp.clip(targets[:, 0], 0.0, 1.0)
    pair = jnp.stack([jnp.zeros_like(z), z], axis=-1)
    of_pair, slopes = soft(pair, jnp.stack([1.0 - y, y], axis=-1), smoothing)
    of_sigmoid, sigmoid_slopes = sigmoid(z, y, smoothing)
    np.testing.assert_allclose(of_pair, of_sigmoid, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slopes[:, 1], sigmoid_slopes, rtol=1e-5, atol=1e-6)


@given(problems(low=-HUGE, high=HUGE))
def test_huge_logits_are_finite_or_the_right_infinity(problem):
    logits, labels, _, smoothing = problem
    for loss in (integer, sigmoid):
        label = labels if loss is integer else jax.nn.one_hot(labels, logits.shape[1])
        losses, slopes = loss(logits, label, smoothing)
        assert not np.isnan(losses).any()
        assert (np.asarray(losses) >= 0.0).all()
        assert np.isfinite(slopes).all()
        assert (np.abs(slopes) <= 1.0).all()


@given(problems(), st.data())
def test_masks_agree(problem, data):
    """-inf logits, `where` over classes and leaving the classes out: the same loss and slopes."""
    logits, labels, _, smoothing = problem
    rows, classes = logits.shape
    kept = data.draw(hnp.arrays(bool, classes))
    kept[labels[0]] = True
    labels = np.full_like(labels, labels[0])
    with jax.enable_x64(True):
        wide = np.where(kept[None], np.asarray(logits, np.float64), -np.inf)
        exact, _ = integer(wide, labels, np.float64(smoothing))
    hidden, slopes = integer(jnp.where(kept[None], logits, -jnp.inf), labels, smoothing)
    where = np.broadcast_to(kept, logits.shape)
    masked = ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, where=where, label_smoothing=smoothing
    )
    truth = reference.softmax_cross_entropy_with_integer_labels(
        np.asarray(logits, np.float64)[:, kept],
        np.full(rows, kept[: labels[0]].sum()),
        label_smoothing=float(smoothing),
    )
    close(exact, truth, 1e-12, size=1.0)
    # A loss is the logarithm of a sum of at least 1, whose rounding a smaller loss shows too.
    close(hidden, truth, 4e-6, size=1.0)
    np.testing.assert_allclose(masked, hidden, rtol=1e-6, atol=1e-6)
    assert (slopes[:, ~kept] == 0.0).all()
    assert np.isfinite(slopes).all()


@given(problems(), st.data())
@settings(max_examples=50)
def test_rows_add_up(problem, data):
    """Row masks, ignored labels and weights of 0 are three spellings of leaving rows out."""
    logits, labels, _, smoothing = problem
    keep = data.draw(hnp.arrays(bool, len(labels)))
    options = {"label_smoothing": smoothing, "reduction": "mean"}
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    spellings = [
        loss(logits, labels, where=keep, **options),
        loss(logits, np.where(keep, labels, -1), ignore_index=-1, **options),
        loss(logits, labels, sample_weight=keep.astype(np.float32), **options),
    ]
    losses, _ = integer(logits, labels, smoothing)
    wanted = np.mean(np.asarray(losses, np.float64)[keep]) if keep.any() else 0.0
    np.testing.assert_allclose(spellings, wanted, rtol=2e-6, atol=1e-6)


@given(problems(low=-20.0, high=20.0))
def test_statistics_against_the_truth(problem):
    logits, labels, _, _ = problem
    found = ce_jax.softmax_statistics(logits, labels)
    truth = reference.softmax_statistics(np.asarray(logits, np.float64), labels)
    for name in ("lse", "label_logit", "log_prob", "entropy"):
        wanted = getattr(truth, name)
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=2e-6, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found.argmax, truth.argmax)
