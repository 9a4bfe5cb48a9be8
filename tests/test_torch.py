"""torch's losses, values and gradients, over their whole option space."""

import functools

import jax
import numpy as np
import pytest

import ce_jax

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
F = torch.nn.functional

WEIGHT = np.array([0.5, 2.0, 1.25, 0.75], np.float32)
# torch's class axis is the second where there is one: (shape, axis).
RANKS = {"vector": ((4,), 0), "matrix": ((5, 4), 1), "image": ((2, 4, 3, 2), 1)}
REDUCTIONS = ("none", "sum", "mean")


def uniform(shape):
    return np.asarray(np.random.default_rng(2).uniform(0.5, 2.0, size=shape), np.float32)


def problem(rank, soft, ignore_index=None):
    draw = np.random.default_rng(0)
    shape, axis = RANKS[rank]
    logits = draw.normal(size=shape).astype(np.float32)
    batch = shape[:axis] + shape[axis + 1 :]
    if soft:
        return logits, np.moveaxis(draw.dirichlet(np.ones(4), batch), -1, axis).astype(np.float32)
    labels = np.asarray(draw.integers(2, 4, size=batch))
    if batch:
        labels.flat[:3] = 0, ignore_index, 1
    return logits, labels


def compare(ours, theirs, inputs, smoothings=(0.0,)):
    """Values and, under one random cotangent, the gradients with respect to every input.

    `ours` is compiled once for all smoothings: a traced option.
    """

    @jax.jit
    def value_and_slopes(smoothing, cotangent, *inputs):
        value, pull = jax.vjp(functools.partial(ours, smoothing), *inputs)
        return value, pull(cotangent)

    for smoothing in smoothings:
        tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
        wanted = theirs(smoothing, *tensors)
        cotangent = np.random.default_rng(1).normal(size=tuple(wanted.shape)).astype(np.float32)
        wanted.backward(torch.tensor(cotangent))
        value, slopes = value_and_slopes(smoothing, cotangent, *inputs)
        np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=2e-6, atol=1e-6)
        for slope, tensor in zip(slopes, tensors, strict=True):
            np.testing.assert_allclose(slope, tensor.grad.numpy(), rtol=1e-5, atol=1e-6)


def tensor_or_none(x):
    return None if x is None else torch.tensor(x)


every_rank = pytest.mark.parametrize("rank", RANKS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)
weighted_or_not = pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
SMOOTHINGS = (0.0, 0.1, 1.0)


@every_rank
@every_reduction
@weighted_or_not
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_cross_entropy_of_indices(rank, weight, reduction, ignore_index):
    logits, labels = problem(rank, soft=False, ignore_index=ignore_index)
    compare(
        lambda smoothing, z: ce_jax.softmax_cross_entropy_with_integer_labels(
            z,
            labels,
            RANKS[rank][1],
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        ),
        lambda smoothing, z: F.cross_entropy(
            z,
            torch.tensor(labels),
            tensor_or_none(weight),
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        ),
        [logits],
        SMOOTHINGS,
    )


@every_rank
@every_reduction
@weighted_or_not
def test_cross_entropy_of_probabilities(rank, weight, reduction):
    """torch's mean divides by the number of rows, as ours does without sample weights."""
    compare(
        lambda smoothing, z, t: ce_jax.softmax_cross_entropy(
            z, t, RANKS[rank][1], weight=weight, label_smoothing=smoothing, reduction=reduction
        ),
        lambda smoothing, z, t: F.cross_entropy(
            z, t, tensor_or_none(weight), label_smoothing=smoothing, reduction=reduction
        ),
        problem(rank, soft=True),
        SMOOTHINGS,
    )


@every_reduction
@pytest.mark.parametrize("weight", [None, (4,), (5, 1)])
@pytest.mark.parametrize("pos_weight", [None, (4,), (5, 4)])
def test_binary_cross_entropy_with_logits(weight, pos_weight, reduction):
    weight, pos_weight = (x if x is None else uniform(x) for x in (weight, pos_weight))
    logits, labels = problem("matrix", soft=True)
    logits[0] = 50.0, -50.0, 0.0, 3.0
    compare(
        lambda _, z, y: ce_jax.sigmoid_binary_cross_entropy(
            z, y, weight=weight, pos_weight=pos_weight, reduction=reduction
        ),
        lambda _, z, y: F.binary_cross_entropy_with_logits(
            z,
            y,
            weight=tensor_or_none(weight),
            pos_weight=tensor_or_none(pos_weight),
            reduction=reduction,
        ),
        (logits, labels),
    )


@every_reduction
@pytest.mark.parametrize("weight", [None, (4,), (5, 1)])
def test_binary_cross_entropy(weight, reduction):
    weight = weight if weight is None else uniform(weight)
    probs = jax.nn.sigmoid(problem("matrix", soft=True)[0])
    labels = problem("matrix", soft=True)[1]
    compare(
        lambda _, p: ce_jax.binary_cross_entropy(p, labels, weight=weight, reduction=reduction),
        lambda _, p: F.binary_cross_entropy(
            p,
            torch.tensor(labels),
            weight=tensor_or_none(weight),
            reduction=reduction,
        ),
        [np.asarray(probs)],
    )


def test_binary_cross_entropy_at_the_ends():
    probs = np.array([0.0, 1.0, 0.0, 1.0, 1e-37], np.float32)
    labels = np.array([1.0, 0.0, 0.0, 1.0, 0.5], np.float32)
    wanted = F.binary_cross_entropy(torch.tensor(probs), torch.tensor(labels), reduction="none")
    np.testing.assert_allclose(ce_jax.binary_cross_entropy(probs, labels), wanted, rtol=1e-6)


@every_rank
@every_reduction
@weighted_or_not
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_nll_loss(rank, ignore_index, weight, reduction):
    scores, labels = problem(rank, soft=False, ignore_index=ignore_index)
    compare(
        lambda _, lp: ce_jax.nll_loss(
            lp,
            labels,
            RANKS[rank][1],
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
        ),
        lambda _, lp: F.nll_loss(
            lp,
            torch.tensor(labels),
            tensor_or_none(weight),
            ignore_index=ignore_index,
            reduction=reduction,
        ),
        [scores],
    )


def test_the_mean_of_nothing_is_where_we_differ():
    """torch: NaN. Here: 0, with gradient 0."""
    logits, labels = np.zeros((2, 3), np.float32), np.array([-100, -100])
    theirs = F.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    ours = ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, ignore_index=-100, reduction="mean"
    )
    assert np.isnan(theirs.item())
    assert ours == 0.0
