"""One problem for each differentiable function: the loss and its truth, of one array."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import ce_jax
from tests import reference

INTEGER = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"
SIGMOID = "sigmoid_binary_cross_entropy"
SHAPE = (4, 3)


class Problem(NamedTuple):
    """`function` of `x` as its argument `key`, with `options`; one `field` of its result."""

    function: str
    key: str
    x: np.ndarray
    options: dict[str, Any]
    field: str | None = None
    has_forward_mode: bool = True

    def loss(self, x, forward_mode=False):
        """The library's losses, each per example."""
        mode = {"forward_mode": True} if forward_mode and self.has_forward_mode else {}
        value = getattr(ce_jax, self.function)(**{self.key: x}, **self.options, **mode)
        return getattr(value, self.field) if self.field else value

    def truth(self, x):
        value = getattr(reference, self.function)(**{self.key: x}, **self.options)
        return getattr(value, self.field) if self.field else value

    def cotangent(self):
        shape = np.shape(self.truth(self.x))
        return np.random.default_rng(1).normal(size=shape)

    def scalar(self, x, forward_mode=False):
        """A scalar in which every example has its own share."""
        losses = self.loss(x, forward_mode)
        return jnp.sum(losses * jnp.asarray(self.cotangent(), losses.dtype))

    def gradient(self):
        return _gradient(self.name())

    def hessian(self):
        return _hessian(self.name())

    def name(self):
        return next(name for name, problem in PROBLEMS.items() if problem is self)


def _problems():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=SHAPE)
    labels = draw.integers(3, size=4).astype(np.int32)
    targets = draw.uniform(0.1, 1.0, size=SHAPE)
    weight, sample_weight = draw.uniform(0.5, 2.0, size=3), draw.uniform(0.5, 2.0, size=4)
    allowed = (np.arange(3) != 1) | (np.arange(3) == labels[:, None])
    softmax_options = {
        "weight": weight,
        "sample_weight": sample_weight,
        "where": allowed,
        "label_smoothing": 0.1,
        "z_loss": 0.05,
    }
    sigmoid_options = {
        "weight": weight,
        "sample_weight": sample_weight[:, None],
        "label_smoothing": 0.1,
        "pos_weight": weight[::-1],
        "where": draw.random(SHAPE) < 0.7,
    }
    nll_options = {key: value for key, value in softmax_options.items() if key != "z_loss"}
    binary_options = {key: value for key, value in sigmoid_options.items() if key != "pos_weight"}
    ids, soft, possible = {"labels": labels}, {"labels": targets}, {"labels": targets * allowed}
    padded = {"labels": np.where(np.arange(4) == 2, -100, labels), "ignore_index": -100}
    probs = draw.uniform(0.1, 0.9, size=SHAPE)
    yield "integer", Problem(INTEGER, "logits", logits, ids)
    yield "integer-options", Problem(INTEGER, "logits", logits, softmax_options | padded)
    yield "integer-mean", Problem(INTEGER, "logits", logits, padded | {"reduction": "mean"})
    yield "integer-first-axis", Problem(INTEGER, "logits", logits.T, ids | {"axis": 0})
    yield "soft", Problem(SOFT, "logits", logits, soft)
    yield "soft-options", Problem(SOFT, "logits", logits, softmax_options | possible)
    yield "soft-labels", Problem(SOFT, "labels", targets, {"logits": logits, "z_loss": 0.1})
    mean = {"logits": logits, **ids, "reduction": "mean"}
    yield "class-weight", Problem(INTEGER, "weight", weight, mean)
    yield "sigmoid", Problem(SIGMOID, "logits", logits, soft)
    yield "sigmoid-options", Problem(SIGMOID, "logits", logits, sigmoid_options | soft)
    for field in ("lse", "label_logit", "log_prob", "entropy"):
        yield field, Problem("softmax_statistics", "logits", logits, ids, field)
    yield "nll", Problem("nll_loss", "log_probs", logits, nll_options | padded, None, False)
    binary_options |= soft
    yield "binary", Problem("binary_cross_entropy", "probs", probs, binary_options, None, False)
    yield "smooth", Problem("smooth_labels", "labels", targets, {"alpha": 0.2}, None, False)


PROBLEMS = dict(_problems())


@functools.cache
def _gradient(name):
    problem = PROBLEMS[name]
    return reference.vjp(_as_keyword(problem), {"x": problem.x}, "x", problem.cotangent())


@functools.cache
def _hessian(name):
    problem = PROBLEMS[name]
    return reference.hessian(_as_keyword(problem), {"x": problem.x}, "x", problem.cotangent())


def _as_keyword(problem):
    return lambda x: problem.truth(x)
