"""A small example call of every public function, and what it must give: for tests over all of them.

Arrays are drawn by the names of their axes, so that a test may choose the sizes: `b` examples of
`t` positions, `c` classes, embeddings of width `d`, `s` negatives, `k` classes that are known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

import ce_jax
from tests import (
    reference,
    reference_beyond,
    reference_contrastive,
    reference_distillation,
    reference_linear,
    reference_post_training,
    reference_sampling,
)

SIZES = {"b": 3, "t": 2, "c": 6, "d": 3, "s": 3, "k": 3}


class Draw(NamedTuple):
    """An array: the names of its axes, and how to draw it in a shape, given all sizes."""

    axes: str
    fill: Callable[[np.random.Generator, tuple[int, ...], dict[str, int]], np.ndarray]

    def array(self, draw, sizes):
        return self.fill(draw, tuple(sizes[axis] for axis in self.axes.split()), sizes)


class Entry(NamedTuple):
    """A call of a public function.

    Attributes:
      draws: its arrays by name. A gradient is taken by those of floating numbers.
      truth: what it must return, as NumPy arrays of the same structure, if a tuple.
      out: the names of the axes of each result; of all but `b` any letter will do.
      options: arguments that are no arrays.
      call: how to call it with `draws` and `options`, if not by these names.
      constant: floating arrays that it has no derivative by.
      sharded: the axis that `axis_name` may spread over devices.
    """

    draws: dict[str, Draw]
    truth: Callable[..., Any]
    out: tuple[str, ...] = ("b t",)
    options: dict[str, Any] = {}  # noqa: RUF012
    call: Callable[..., Any] | None = None
    constant: tuple[str, ...] = ()
    sharded: str | None = None

    def arrays(self, seed=0, **sizes):
        draw = np.random.default_rng(seed)
        return {name: x.array(draw, SIZES | sizes) for name, x in self.draws.items()}

    def smooth(self):
        """The names of the arguments to differentiate by."""
        example = self.arrays()
        return [k for k, x in example.items() if x.dtype.kind == "f" and k not in self.constant]


def normal(axes):
    return Draw(axes, lambda draw, shape, sizes: draw.normal(size=shape))


def uniform(axes, low, high):
    return Draw(axes, lambda draw, shape, sizes: draw.uniform(low, high, shape))


def ids(axes, below="c"):
    return Draw(axes, lambda draw, shape, sizes: draw.integers(0, sizes[below], shape))


def flags(axes):
    return Draw(axes, lambda draw, shape, sizes: draw.random(shape) < 0.6)


def shares(axes):
    """Positive numbers that add up to 1 along the last axis."""

    def fill(draw, shape, sizes):
        x = draw.uniform(0.2, 1.0, shape)
        return x / x.sum(-1, keepdims=True)

    return Draw(axes, fill)


def _known_ids(draw, shape, sizes):
    """Other classes than the first, each at most once in a row."""
    *rows, k = shape
    orders = [1 + draw.permutation(sizes["c"] - 1)[:k] for _ in range(int(np.prod(rows)))]
    return np.reshape(orders, shape)


def _known_log_probs(draw, shape, sizes):
    p = draw.uniform(0.2, 1.0, shape)
    return np.log(0.8 * p / p.sum(-1, keepdims=True))


def _counts(axes):
    return Draw(axes, lambda draw, shape, sizes: draw.integers(1, 50, shape).astype(float))


def _transition(draw, shape, sizes):
    x = np.eye(shape[0]) * 0.7 + 0.3 / shape[0] + draw.uniform(0, 0.05, shape)
    return x / x.sum(-1, keepdims=True)


# Of several functions.

_LOGITS, _IDS = normal("b t c"), ids("b t")
_CLASS_WEIGHT, _ROW_WEIGHT = uniform("c", 0.5, 2.0), uniform("b t", 0.5, 2.0)
_LABELLED = {"logits": _LOGITS, "labels": _IDS}
_WEIGHTS = {"weight": _CLASS_WEIGHT, "sample_weight": _ROW_WEIGHT}
_SOFT = {"logits": _LOGITS, "labels": shares("b t c")}
_LINEAR = {"hidden": normal("b t d"), "kernel": normal("d c"), "labels": _IDS, "bias": normal("c")}
_SCORES = {"label_logits": normal("b t"), "negative_logits": normal("b t s")}
_BINARY = {"logits": normal("b t"), "labels": uniform("b t", 0, 1), "sample_weight": _ROW_WEIGHT}
_LOG_PROB = {"log_prob": uniform("b t", -3.0, -0.1)}
_PAIRS = {"images": normal("b d"), "texts": normal("b d"), "sample_weight": uniform("b", 0.5, 2.0)}
_SMOOTHED = {"label_smoothing": uniform("", 0.1, 0.3), "z_loss": uniform("", 0.01, 0.1)}
_TEMPERATURE, _SCALE = {"temperature": uniform("", 1, 3)}, {"logit_scale": uniform("", 1, 3)}
_STATISTICS = ("b t",) * 5
_ANSWERS = {"chosen": uniform("b t", -3, -0.1), "rejected": uniform("b t", -3, -0.1)}
_REFERENCE = {k: uniform("b t", -3, -0.1) for k in ("reference_chosen", "reference_rejected")}
_POLICY, _BETA = {"log_prob": uniform("b t", -3, -0.1)}, {"beta": uniform("", 0.2, 2)}
_STUDENT = {k: x for k, x in _LINEAR.items() if k != "labels"} | _TEMPERATURE
_STUDENT |= {"sample_weight": _ROW_WEIGHT}

_KNOWN = {"teacher_ids": Draw("b t k", _known_ids)}
_KNOWN |= {"teacher_log_probs": Draw("b t k", _known_log_probs)}
_SHARE = {"beta": uniform("", 0.2, 0.8)}


def _log_softmax(z):
    return z - np.log(np.sum(np.exp(z), -1, keepdims=True))


def _gradient_view(logits, labels):
    classes = logits.shape[-1]
    by_row = np.exp(_log_softmax(logits)) - np.eye(classes)[labels]
    groups = [by_row[labels == c] for c in range(classes)]
    means = [g.mean(0) if len(g) else np.zeros(classes) for g in groups]
    return by_row, np.array(means), np.array([len(g) for g in groups])


def _fit_temperature(logits, labels):
    """Where the slope by 1 / T is 0."""
    logits = logits + np.eye(logits.shape[-1])[labels]
    ahead = logits - np.take_along_axis(logits, labels[..., None], -1)

    def slope(inverse):
        p = np.exp(_log_softmax(inverse * logits))
        return np.sum(p * np.where(p == 0, 0, ahead))

    return 1 / optimize.brentq(slope, 1e-2, 1e2, xtol=1e-14, rtol=1e-14)


def _with_temperature(logits, labels, **options):
    """Labels without any relation to the logits would ask for the highest temperature."""
    logits = logits + jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return ce_jax.fit_temperature(logits, labels, **options)


def _expected_counts(sampler, items, samples=200):
    """How often each class is expected, from a draw that holds all of them."""

    def call(seed):
        found = sampler(jax.random.key(seed), samples, items)
        return jnp.zeros(items).at[found.ids].set(found.log_expected_count)

    return call


def _with_negatives(ids, log_expected_count, **rest):
    negatives = ce_jax.Negatives(ids, log_expected_count)
    return ce_jax.linear_sampled_softmax_cross_entropy(negatives=negatives, **rest)


def _on_mesh(**arguments):
    size = min(2, jax.device_count())
    mesh = jax.make_mesh((size,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = ce_jax.on_mesh(ce_jax.softmax_cross_entropy_with_integer_labels, mesh, classes="model")
    return loss(**arguments)


def _of_correct(confidence, correct, **options):
    return reference_beyond.expected_calibration_error(
        confidence.ravel(), correct.ravel(), **options
    )


CATALOGUE = {
    # Softmax cross-entropies.
    "softmax_cross_entropy_with_integer_labels": Entry(
        _LABELLED | _WEIGHTS | _SMOOTHED,
        reference.softmax_cross_entropy_with_integer_labels,
        sharded="c",
    ),
    "softmax_cross_entropy": Entry(
        _SOFT | _WEIGHTS | _SMOOTHED, reference.softmax_cross_entropy, sharded="c"
    ),
    "safe_softmax_cross_entropy": Entry(_SOFT, reference.softmax_cross_entropy, sharded="c"),
    "softmax_statistics": Entry(
        _LABELLED, reference.softmax_statistics, out=_STATISTICS, sharded="c"
    ),
    "linear_softmax_cross_entropy": Entry(
        _LINEAR | _WEIGHTS | _SMOOTHED | {"logit_soft_cap": uniform("", 2, 4)},
        reference_linear.linear_softmax_cross_entropy,
        sharded="c",
    ),
    "linear_softmax_statistics": Entry(
        _LINEAR, reference_linear.linear_softmax_statistics, out=_STATISTICS, sharded="c"
    ),
    "on_mesh": Entry(_LABELLED, reference.softmax_cross_entropy_with_integer_labels, call=_on_mesh),
    "mean_denominator": Entry(
        {"labels": _IDS} | _WEIGHTS, reference.mean_denominator, out=("",), sharded="c"
    ),
    # Binary, and from probabilities.
    "sigmoid_binary_cross_entropy": Entry(
        _BINARY | {"pos_weight": uniform("", 1, 2), "label_smoothing": uniform("", 0.1, 0.3)},
        reference.sigmoid_binary_cross_entropy,
    ),
    "sigmoid_focal_loss": Entry(
        _BINARY | {"alpha": uniform("", 0.2, 0.8), "gamma": uniform("", 1, 3)},
        reference_beyond.sigmoid_focal_loss,
    ),
    "binary_cross_entropy": Entry(
        {"probs": uniform("b t", 0.1, 0.9), "labels": uniform("b t", 0, 1)}
        | {"sample_weight": _ROW_WEIGHT},
        reference.binary_cross_entropy,
    ),
    "nll_loss": Entry(
        {"log_probs": uniform("b t c", -3, 0), "labels": _IDS} | _WEIGHTS, reference.nll_loss
    ),
    "smooth_labels": Entry(
        {"labels": shares("b t c"), "alpha": uniform("", 0.1, 0.3)},
        reference.smooth_labels,
        out=("b t c",),
    ),
    "smoothing_over_others": Entry(
        {"eps": uniform("", 0.1, 0.5)},
        lambda eps, num_classes: eps * num_classes / (num_classes - 1),
        out=("",),
        options={"num_classes": 5},
    ),
    "smoothed_label_entropy": Entry(
        {"label_smoothing": uniform("", 0.1, 0.9)},
        lambda label_smoothing, num_classes: reference_post_training.smoothed_label_entropy(
            label_smoothing, num_classes
        ),
        out=("",),
        options={"num_classes": 5},
    ),
    # Functions of the label's log-probability, and other robust losses.
    "focal_loss": Entry(_LOG_PROB | {"gamma": uniform("", 1, 3)}, reference_beyond.focal_loss),
    "poly_loss": Entry(_LOG_PROB | {"epsilon": uniform("", 1, 3)}, reference_beyond.poly_loss),
    "generalized_cross_entropy": Entry(
        _LOG_PROB | {"q": uniform("", 0.3, 0.9)}, reference_beyond.generalized_cross_entropy
    ),
    "symmetric_cross_entropy": Entry(
        _LOG_PROB | {"alpha": uniform("", 0.1, 1), "beta": uniform("", 0.1, 1)},
        reference_beyond.symmetric_cross_entropy,
    ),
    "soft_bootstrapped_cross_entropy": Entry(
        _LOG_PROB | {"entropy": uniform("b t", 0, 2), "beta": uniform("", 0.3, 0.9)},
        reference_beyond.soft_bootstrapped_cross_entropy,
    ),
    "hard_bootstrapped_cross_entropy": Entry(
        _LOG_PROB | {"argmax_log_prob": uniform("b t", -1, -0.1), "beta": uniform("", 0.3, 0.9)},
        reference_beyond.hard_bootstrapped_cross_entropy,
    ),
    "poly_loss_cross_entropy": Entry(
        _SOFT | {"sample_weight": _ROW_WEIGHT, "epsilon": uniform("", 1, 3)},
        reference_beyond.poly_loss_cross_entropy,
    ),
    "forward_corrected_cross_entropy": Entry(
        _LABELLED | {"transition": Draw("c c", _transition), "sample_weight": _ROW_WEIGHT},
        reference_beyond.forward_corrected_cross_entropy,
    ),
    "backward_corrected_cross_entropy": Entry(
        _LABELLED | {"transition": Draw("c c", _transition), "sample_weight": _ROW_WEIGHT},
        reference_beyond.backward_corrected_cross_entropy,
    ),
    # A teacher.
    "distillation_loss": Entry(
        {"logits": _LOGITS, "teacher_logits": _LOGITS, "sample_weight": _ROW_WEIGHT} | _TEMPERATURE,
        reference_distillation.distillation_loss,
        sharded="c",
    ),
    "linear_distillation_loss": Entry(
        _STUDENT
        | {"teacher_hidden": normal("b t d"), "teacher_kernel": normal("d c")}
        | {"teacher_bias": normal("c")},
        reference_distillation.linear_distillation_loss,
        sharded="c",
    ),
    "linear_distillation_loss of teacher_logits": Entry(
        _STUDENT | {"teacher_logits": _LOGITS},
        reference_distillation.linear_distillation_loss,
        sharded="c",
    ),
    "jensen_shannon_loss": Entry(
        {"logits": _LOGITS, "teacher_logits": _LOGITS, "sample_weight": _ROW_WEIGHT}
        | _TEMPERATURE
        | _SHARE,
        reference_distillation.jensen_shannon_loss,
        sharded="c",
    ),
    "linear_jensen_shannon_loss": Entry(
        _STUDENT
        | _SHARE
        | {"teacher_hidden": normal("b t d"), "teacher_kernel": normal("d c")}
        | {"teacher_bias": normal("c")},
        reference_distillation.linear_jensen_shannon_loss,
        sharded="c",
    ),
    "top_k_distillation_loss": Entry(
        {"logits": _LOGITS, "sample_weight": _ROW_WEIGHT} | _KNOWN | _TEMPERATURE,
        reference_distillation.top_k_distillation_loss,
        sharded="c",
    ),
    "linear_top_k_distillation_loss": Entry(
        _STUDENT | _KNOWN,
        reference_distillation.linear_top_k_distillation_loss,
        sharded="c",
    ),
    # Preferences and policies.
    "dpo_loss": Entry(
        _ANSWERS
        | _REFERENCE
        | _BETA
        | {"label_smoothing": uniform("", 0.1, 0.3), "sample_weight": _ROW_WEIGHT},
        reference_post_training.dpo_loss,
    ),
    "ipo_loss": Entry(
        _ANSWERS | _REFERENCE | _BETA | {"sample_weight": _ROW_WEIGHT},
        reference_post_training.ipo_loss,
    ),
    "simpo_loss": Entry(
        _ANSWERS | _BETA | {"gamma": uniform("", 0.2, 2), "sample_weight": _ROW_WEIGHT},
        reference_post_training.simpo_loss,
    ),
    "orpo_loss": Entry(
        _ANSWERS | {"sample_weight": _ROW_WEIGHT}, reference_post_training.orpo_loss
    ),
    "kto_loss": Entry(
        _POLICY
        | {"reference_log_prob": uniform("b t", -3, -0.1), "desirable": flags("b t")}
        | {"kl": uniform("b t", -0.5, 0.5), "sample_weight": _ROW_WEIGHT}
        | {"desirable_weight": uniform("", 1, 2), "undesirable_weight": uniform("", 1, 2)}
        | _BETA,
        reference_post_training.kto_loss,
        constant=("kl",),
    ),
    "ppo_clip_loss": Entry(
        _POLICY
        | {"old_log_prob": uniform("b t", -3, -0.1), "advantage": normal("b t")}
        | {"low": uniform("", 0.1, 0.3), "high": uniform("", 0.1, 0.3)}
        | {"sample_weight": _ROW_WEIGHT},
        reference_post_training.ppo_clip_loss,
    ),
    "kl_estimate": Entry(
        _POLICY | {"reference_log_prob": uniform("b t", -3, -0.1), "sample_weight": _ROW_WEIGHT},
        reference_post_training.kl_estimate,
    ),
    # Pairs.
    "info_nce_loss": Entry(
        {"queries": normal("b d"), "keys": normal("b d"), "sample_weight": uniform("b", 0.5, 2)}
        | _SCALE,
        reference_contrastive.info_nce_loss,
        out=("b",),
        sharded="b",
    ),
    "clip_loss": Entry(
        _PAIRS | _SCALE,
        reference_contrastive.clip_loss,
        out=("b",),
        sharded="b",
    ),
    "siglip_loss": Entry(
        _PAIRS | _SCALE | {"logit_bias": uniform("", -2, 0)},
        reference_contrastive.siglip_loss,
        out=("b",),
        sharded="b",
    ),
    "supervised_contrastive_loss": Entry(
        _SCALE
        | {"embeddings": normal("b d"), "sample_weight": uniform("b", 0.5, 2)}
        | {"labels": Draw("b", lambda draw, shape, sizes: draw.integers(0, 2, shape))},
        reference_contrastive.supervised_contrastive_loss,
        out=("b",),
        sharded="b",
    ),
    # A sample of the classes.
    "sampled_softmax_cross_entropy": Entry(
        _SCORES | {"log_expected_count": uniform("s", -1, 0), "sample_weight": _ROW_WEIGHT},
        reference_sampling.sampled_softmax_cross_entropy,
    ),
    "linear_sampled_softmax_cross_entropy": Entry(
        _LINEAR
        | {"ids": ids("s"), "log_expected_count": uniform("s", -1, 0)}
        | {"sample_weight": _ROW_WEIGHT},
        reference_sampling.linear_sampled_softmax_cross_entropy,
        call=_with_negatives,
    ),
    "bpr_loss": Entry(_SCORES | {"sample_weight": _ROW_WEIGHT}, reference_sampling.bpr_loss),
    "gbce_loss": Entry(
        _SCORES | {"sample_weight": _ROW_WEIGHT, "calibration": uniform("", 0.2, 0.8)},
        reference_sampling.gbce_loss,
        options={"num_items": 20},
    ),
    "in_batch_negatives": Entry(
        {"labels": ids("b"), "log_prob": uniform("b", -3, -1)},
        lambda labels, log_prob: (labels, log_prob + np.log(len(labels) - 1)),
        out=("b", "b"),
    ),
    "uniform_negatives": Entry(
        {"seed": Draw("", lambda draw, shape, sizes: draw.integers(0, 99, shape))},
        lambda seed: np.full(4, np.log(50)),
        out=("c",),
        call=_expected_counts(ce_jax.uniform_negatives, 4),
    ),
    "log_uniform_negatives": Entry(
        {"seed": Draw("", lambda draw, shape, sizes: draw.integers(0, 99, shape))},
        lambda seed: np.log(200 * reference_sampling.log_uniform(4)),
        out=("c",),
        call=_expected_counts(ce_jax.log_uniform_negatives, 4),
    ),
    "log_uniform_log_prob": Entry(
        {"ids": _IDS},
        lambda ids, num_items: np.log(reference_sampling.log_uniform(num_items))[ids],
        options={"num_items": 7},
    ),
    # Information.
    "self_information": Entry(
        {"p": uniform("b t", 0.1, 0.9)}, lambda p, base: -np.log2(p), options={"base": 2}
    ),
    "binary_entropy": Entry(
        {"p": uniform("b t", 0.1, 0.9)},
        lambda p, base: -p * np.log2(p) - (1 - p) * np.log2(1 - p),
        options={"base": 2},
    ),
    "entropy": Entry(
        {"p": shares("b t c")}, lambda p, base: -np.sum(p * np.log2(p), -1), options={"base": 2}
    ),
    "cross_entropy": Entry(
        {"p": shares("b t c"), "q": shares("b t c")},
        lambda p, q, base: -np.sum(p * np.log2(q), -1),
        options={"base": 2},
    ),
    "kl_divergence": Entry(
        {"p": shares("b t c"), "q": shares("b t c")},
        lambda p, q, base: np.sum(p * np.log2(p / q), -1),
        options={"base": 2},
    ),
    # Diagnostics and calibration.
    "cross_entropy_parts": Entry(
        _SOFT, reference_beyond.cross_entropy_parts, out=("b t c", "b t c")
    ),
    "gradient_view": Entry(_LABELLED, _gradient_view, out=("b t c", "c c", "c")),
    "brier_score": Entry(_LABELLED | {"sample_weight": _ROW_WEIGHT}, reference_beyond.brier_score),
    "reliability_bins": Entry(
        {"confidence": uniform("b t", 0.3, 0.9), "correct": flags("b t")},
        lambda confidence, correct, bins: reference_beyond.reliability_bins(
            confidence.ravel(), correct.ravel(), bins=bins, adaptive=False
        ),
        out=("m",) * 3,
        options={"bins": 1},
    ),
    "expected_calibration_error": Entry(
        {"confidence": uniform("b t", 0.3, 0.9), "correct": flags("b t")},
        _of_correct,
        out=("",),
        options={"bins": 3},
    ),
    "fit_temperature": Entry(
        _LABELLED, _fit_temperature, out=("",), call=_with_temperature, constant=("logits",)
    ),
    # Class shares.
    "estimate_prior": Entry(
        {"logits": normal("b c"), "train_prior": shares("c")},
        lambda logits, train_prior, tolerance, max_steps: reference_beyond.estimate_prior(
            logits, train_prior, max_steps
        ),
        out=("c",),
        options={"tolerance": 0.0, "max_steps": 3},
        call=lambda **x: ce_jax.estimate_prior(**x).prior,
        constant=("logits", "train_prior"),
    ),
    "inverse_frequency_weights": Entry(
        {"counts": _counts("c")}, reference_beyond.inverse_frequency_weights, out=("c",)
    ),
    "balanced_weights": Entry(
        {"counts": _counts("c")}, reference_beyond.balanced_weights, out=("c",)
    ),
    "effective_number_weights": Entry(
        {"counts": _counts("c")},
        lambda counts: reference_beyond.effective_number_weights(counts),
        out=("c",),
        constant=("counts",),
    ),
    "focal_alpha": Entry(
        {"positives": uniform("c", 1, 9), "total": uniform("", 10, 20)},
        lambda positives, total: 1 - positives / total,
        out=("c",),
    ),
    "training_logit_offset": Entry(
        {"prior": _counts("c"), "tau": uniform("", 0.5, 1.5)},
        lambda prior, tau: tau * np.log(prior / prior.sum()),
        out=("c",),
    ),
    "prediction_logit_offset": Entry(
        {"prior": _counts("c"), "tau": uniform("", 0.5, 1.5)},
        lambda prior, tau: -tau * np.log(prior / prior.sum()),
        out=("c",),
    ),
    "prior_shift_weights": Entry(
        {"train_prior": _counts("c"), "target_prior": _counts("c")},
        lambda train_prior, target_prior: (
            (target_prior / target_prior.sum()) / (train_prior / train_prior.sum())
        ),
        out=("c",),
    ),
    # Sequences, and several losses in one.
    "next_tokens": Entry(
        {"tokens": ids("b t")},
        lambda tokens: (tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, bool)),
        out=("b t",) * 3,
    ),
    "perplexity": Entry(
        {"total": uniform("", 2, 9), "count": uniform("", 3, 5)},
        lambda total, count: np.exp(total / count),
        out=("",),
    ),
    "bits_per_byte": Entry(
        {"total": uniform("", 2, 9), "num_bytes": uniform("", 3, 5)},
        lambda total, num_bytes: total / num_bytes / np.log(2),
        out=("",),
    ),
    "next_tokens of three heads": Entry(
        {"tokens": ids("b t")},
        lambda tokens, shift, keep_length: (
            tokens,
            np.pad(tokens[:, shift:], ((0, 0), (0, min(shift, tokens.shape[1])))),
            np.arange(tokens.shape[1]) + shift < tokens.shape[1] * np.ones_like(tokens),
        ),
        out=("b t",) * 3,
        options={"shift": 3, "keep_length": True},
    ),
    "sequence_log_prob": Entry(
        {"log_prob": uniform("b t", -3, -0.1)},
        reference_post_training.sequence_log_prob,
        out=("b",),
        options={"mean": True},
    ),
    "init_log_variances": Entry(
        {"losses": uniform("s", 0, 1)},
        lambda losses, value: (value, value),
        out=("", ""),
        options={"value": 0.5},
        call=lambda losses, value: ce_jax.init_log_variances(
            {"one": losses[0], "two": losses[1]}, value=value
        ),
    ),
    "uncertainty_weighted_loss": Entry(
        {"log_variances": normal("s"), "losses": uniform("s", 0, 1)},
        lambda log_variances, losses: np.sum(np.exp(-log_variances) * losses + log_variances / 2),
        out=("",),
        call=lambda log_variances, losses: ce_jax.uncertainty_weighted_loss(
            list(log_variances), list(losses)
        ),
    ),
}
