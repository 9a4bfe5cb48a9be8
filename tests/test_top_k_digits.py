"""Digits of distillation from k known classes: where terms cancel, far from 0, at extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference, reference_distillation
from tests.comparison import accuracy, close
from tests.test_top_k import CLASSES, DENSE, INF, NAN, ROWS, TAILS, arguments_of, known

pytestmark = pytest.mark.sweep


def naive(logits, ids, log_probs):
    """The bucket as it is mostly written: the student's rest as what its known classes leave."""
    log_q = jnp.take_along_axis(jax.nn.log_softmax(logits), ids, -1)
    p, q = jnp.exp(log_probs), jnp.exp(log_q)
    rest_p, rest_q = 1 - jnp.sum(p, -1), 1 - jnp.sum(q, -1)
    return jnp.sum(p * (log_probs - log_q), -1) + rest_p * (jnp.log(rest_p) - jnp.log(rest_q))


@pytest.mark.parametrize("gap", [5.0, 12.0, 20.0, 40.0])
def test_the_known_classes_hold_nearly_all(gap):
    """The student gives the others e^-gap, of which a difference from 1 keeps little or nothing."""
    draw = np.random.default_rng(3)
    logits = draw.normal(size=(4, 30))
    ids = np.array([draw.permutation(30)[:4] for _ in range(4)])
    np.put_along_axis(logits, ids, gap + draw.normal(size=(4, 4)), -1)
    log_probs = known(draw, (4,), 30, 4, share=0.99)["teacher_log_probs"]
    logits, log_probs = logits.astype(np.float32), log_probs.astype(np.float32)
    exact = {"logits": np.float64(logits), "teacher_log_probs": np.float64(log_probs)}
    exact["teacher_ids"] = ids
    truth = reference_distillation.top_k_distillation_loss

    @jax.jit
    def of(logits, log_probs):
        ours = lambda z: ce_jax.top_k_distillation_loss(z, ids, log_probs)  # noqa: E731
        plain = lambda z: naive(z, ids, log_probs)  # noqa: E731
        results = [jax.vjp(f, logits) for f in (ours, plain)]
        return [(value, pull(jnp.ones_like(value))[0]) for value, pull in results]

    (value, slope), (plain, plain_slope) = of(logits, log_probs)
    wanted = truth(**exact)
    by_logits = reference.vjp(truth, exact, "logits", np.ones(4))
    close(value, wanted, accuracy("float32"))
    close(slope, by_logits, accuracy("float32"))
    # The share of each other class in the slope is huge beside its probability, and right too.
    np.testing.assert_allclose(slope, by_logits, rtol=1e-4)
    for found, naively, true in ((value, plain, wanted), (slope, plain_slope, by_logits)):
        naive_error = np.nan_to_num(np.max(np.abs(naively - true)), nan=INF)
        assert np.max(np.abs(found - true)) <= naive_error + 1e-7
    if gap >= 20:
        assert not np.isfinite(plain).all() or np.max(np.abs(plain - wanted)) > 1e-3


@pytest.mark.parametrize("known_share", [0.3, 0.999])
def test_close_to_the_teacher(known_share):
    """Where the terms cancel to a millionth of the largest, the loss still has digits."""
    draw = np.random.default_rng(4)
    arguments = known(draw, (4,), 20, 5, known_share)
    arguments["teacher_log_probs"] = arguments["teacher_log_probs"].astype(np.float32)
    p = np.exp(np.float64(arguments["teacher_log_probs"]))
    logits = np.tile(np.log((1 - p.sum(-1, keepdims=True)) / 15), (1, 20))
    np.put_along_axis(logits, arguments["teacher_ids"], np.log(p), -1)
    logits = np.float32(logits + 1e-3 * draw.normal(size=logits.shape) + 5)
    exact = arguments | {"logits": np.float64(logits)}
    exact["teacher_log_probs"] = np.float64(arguments["teacher_log_probs"])
    wanted = reference_distillation.top_k_distillation_loss(**exact)
    found = ce_jax.top_k_distillation_loss(logits, **arguments)
    assert np.all((wanted > 0) & (wanted < 2e-6))
    np.testing.assert_allclose(found, wanted, rtol=2e-2)
    assert np.all(found >= 0)


def test_far_from_0():
    """Digits are lost neither to a common offset nor to a temperature beside it."""
    arguments = arguments_of(DENSE)
    near = np.round(arguments["logits"] * 4) / 4  # exact at the offset, too
    for temperature in (1.0, 3.0):
        options = {k: v for k, v in arguments.items() if k != "logits"}
        options |= {"temperature": temperature}
        found = [ce_jax.top_k_distillation_loss(jnp.float32(near + x), **options) for x in (0, 9e4)]
        np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    masked = np.where(np.arange(CLASSES) < 2, near, -1e30)  # as some write what is not allowed
    arguments |= {"logits": masked, "teacher_ids": np.tile([0, 1, -1], (*ROWS, 1))}
    wanted = reference_distillation.top_k_distillation_loss(**arguments | {"tail": "drop"})
    arguments |= {"logits": jnp.float32(masked), "tail": "drop"}
    close(ce_jax.top_k_distillation_loss(**arguments), wanted, 1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_extremes(tail):
    """Rows: huge logits; all classes known; a class the student bans; nothing allowed, weight 0."""
    logits = jnp.array([[1e4, -1e4, 0], [1.0, 2.0, 3.0], [1.0, -INF, 0.0], [-INF] * 3])
    ids = jnp.array([[0, 1, -1], [2, 0, 1], [1, 0, -1], [0, 1, 2]])
    log_probs = jnp.log(jnp.array([[0.5, 0.25, 1], [0.25, 0.5, 0.25], [0.5, 0.5, 1], [2, 1, NAN]]))
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])

    @jax.jit
    def both(logits, log_probs, weights):
        loss = functools.partial(ce_jax.top_k_distillation_loss, tail=tail)
        value, pull = jax.vjp(
            lambda z, w: loss(z, ids, log_probs, sample_weight=w), logits, weights
        )
        return value, *pull(jnp.ones_like(value))

    value, slope, by_weight = both(logits, log_probs, weights)
    q = np.exp([1.0, 2.0, 3.0]) / np.exp([1.0, 2.0, 3.0]).sum()
    p = np.array([0.5, 0.25, 0.25])
    second = np.sum(p * np.log(p / q))
    of_first = {"bucket": [0.5, 0.25, 0.25], "renormalize": [2 / 3, 1 / 3], "drop": [0.5, 0.25]}
    first = sum(p * (np.log(p) + z) for p, z in zip(of_first[tail], [0, 2e4, 1e4], strict=False))
    np.testing.assert_allclose(value, [first, second, INF, 0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope[1], q - p, atol=1e-6)
    np.testing.assert_array_equal(slope[3], 0)
    assert np.isfinite(slope).all()
    assert by_weight[3] == 0
    empty = ce_jax.top_k_distillation_loss(
        jnp.zeros((0, 3)), jnp.zeros((0, 2), int), jnp.zeros((0, 2)), reduction="mean", tail=tail
    )
    assert empty == 0
