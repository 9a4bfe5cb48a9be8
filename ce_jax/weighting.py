r"""Class weights and logit offsets for imbalanced classes and for shifted class shares.

The weights `[C]` are for the `weight` of a loss. A class without examples gets weight 0 and is not
counted among the K classes.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._arguments import checks
from ._arguments.compiled import compiled
from ._arguments.options import known_value, option, scalar
from ._arguments.types import ArrayLike, Scalar
from ._rows.dtypes import wide
from ._rows.numerics import expm1_ratio, one_minus_exp, power


def inverse_frequency_weights(counts: ArrayLike) -> Float[Array, "..."]:
    r"""Class weights proportional to the inverse of the number of examples, with mean 1.

    .. math:: w_c = \frac{K / n_c}{\sum_k 1 / n_k}

    over the K classes that have examples; the others get 0.

    Args:
      counts: number of examples of each class `[C]`, or any numbers proportional to it.

    Returns:
      The weights `[C]`, float32 (float64 for float64 counts).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative count or a shape that is not `[C]`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.inverse_frequency_weights(jnp.array([300, 100, 0])))
      [0.5 1.5 0. ]

    References:
      King and Zeng, `Logistic Regression in Rare Events Data`, 2001.
    """
    return _effective_number_weights(_shares("counts", counts), 0.0)


def balanced_weights(counts: ArrayLike) -> Float[Array, "..."]:
    r"""Class weights that give every class the same total weight, with mean 1 over the examples.

    .. math:: w_c = \frac{\sum_k n_k}{K\, n_c}

    over the K classes that have examples; the others get 0. The weights are proportional to
    `inverse_frequency_weights`, but the sum of the weights over all examples is the number of
    examples.

    Args:
      counts: number of examples of each class `[C]`, or any numbers proportional to it.

    Returns:
      The weights `[C]`, float32 (float64 for float64 counts).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative count or a shape that is not `[C]`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.balanced_weights(jnp.array([300, 100, 0])))
      [0.6667 2.     0.    ]

    References:
      King and Zeng, `Logistic Regression in Rare Events Data`, 2001; the rule is
      scikit-learn's "balanced".
    """
    return _balanced_weights(_shares("counts", counts))


@compiled
def _balanced_weights(counts: Array) -> Array:
    present = counts != 0
    classes = jnp.sum(present, dtype=counts.dtype)
    share = _normalised(counts)
    return jnp.where(present, 1 / (classes * jnp.where(present, share, 1)), 0)


def effective_number_weights(counts: ArrayLike, *, beta: Scalar = 0.999) -> Float[Array, "..."]:
    r"""Class weights proportional to the inverse effective number of examples, with mean 1.

    .. math:: w_c \propto \frac{1}{E_c}, \qquad E_c = \frac{1 - \beta^{n_c}}{1 - \beta}

    Each example covers a part :math:`1 - \beta` of its class, so many examples overlap: E grows
    like n at first and never exceeds :math:`1 / (1 - \beta)`. At :math:`\beta = 0` all weights are
    equal; at :math:`\beta = 1` they are `inverse_frequency_weights`. Classes without examples get
    0.

    Args:
      counts: number of examples of each class `[C]`.
      beta: overlap, in [0, 1]. May be traced; near 1 a Python float keeps more digits.

    Returns:
      The weights `[C]`, float32 (float64 for float64 counts).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative count, a shape that is not `[C]`, or a `beta` out of range.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.effective_number_weights(jnp.array([3000, 100, 0]), beta=0.999).round(4))
      [0.1821 1.8179 0.    ]

    References:
      Cui et al., `Class-Balanced Loss Based on Effective Number of Samples`, 2019.
    """
    checked = scalar("beta", beta, 0.0, 1.0)
    # The formula needs 1 - beta, which loses digits if beta is rounded to float32 first.
    rest = 1.0 - beta if isinstance(beta, float | int) else 1 - checked
    return _effective_number_weights(_shares("counts", counts), rest)


@compiled
def _effective_number_weights(counts: Array, rest: Array) -> Array:
    present, rest = counts != 0, jnp.asarray(rest).astype(counts.dtype)
    counts = jnp.where(present, counts, 1)
    # `1 - beta^n`, as the denominator is the same for all; near beta = 1, where that is 0, over
    # `-log beta`.
    near = rest < 0.5
    of_near = counts * jnp.log1p(-jnp.where(near, rest, 0))
    beta = jnp.where(near, 0.5, 1 - rest)
    of_far = counts * jnp.log(jnp.where(beta == 0, 0.5, beta))
    small = (of_far > -0.5) & (beta > 0)  # of which `1 - beta^n` would lose digits
    far = jnp.where(small, one_minus_exp(of_far), 1 - power(beta, counts))
    effective = jnp.where(near, counts * _slope_of_exp(of_near), far)
    inverse = jnp.where(present, 1 / jnp.where(present, effective, 1), 0)
    mean = jnp.sum(inverse) / jnp.maximum(jnp.sum(present, dtype=counts.dtype), 1)
    return inverse / jnp.where(mean == 0, 1, mean)


def _slope_of_exp(x: Float[Array, " classes"]) -> Float[Array, " classes"]:
    """`(e^x - 1) / x`, which is 1 at 0."""
    small = jnp.abs(x) <= 0.5
    large = jnp.where(small, 1, x)
    return jnp.where(small, expm1_ratio(jnp.where(small, x, 0)), -one_minus_exp(large) / large)


def focal_alpha(positives: ArrayLike, total: ArrayLike) -> Float[Array, "..."]:
    r"""The `alpha` of `sigmoid_focal_loss` that gives both labels the same total weight.

    .. math:: \alpha_c = 1 - n_c / N, \qquad \alpha_c\, n_c = (1 - \alpha_c) (N - n_c)

    Args:
      positives: number of positive examples of each class, of any shape.
      total: number of examples, a scalar or an array with the axes of `positives` (size 1
        broadcasts).

    Returns:
      The weight of the positive label, of the shape of `positives`, float32 (float64 for float64
      counts): 1 where there are no positives, 1/2 where there are no examples at all.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative count or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.focal_alpha(jnp.array([10, 50, 0]), 100))
      [0.9 0.5 1. ]

    References:
      Lin et al., `Focal Loss for Dense Object Detection`, 2017, section 3.1.
    """
    n, everything = _floats("positives", positives), _floats("total", total)
    everything = checks.of_rows("total", everything, n.shape, "positives")
    some, all_of_them = known_value("positives", positives), known_value("total", total)
    if some is not None and all_of_them is not None and np.any(some > all_of_them):
        raise ValueError(f"positives must be at most total, got {positives} of {total}")
    return _focal_alpha(n, everything)


@compiled
def _focal_alpha(positives: Array, total: Array) -> Array:
    return jnp.where(total == 0, 0.5, (total - positives) / jnp.where(total == 0, 1, total))


def training_logit_offset(prior: ArrayLike, *, tau: Scalar = 1.0) -> Float[Array, "..."]:
    r"""Offset to add to the logits in training, which gives rare classes a larger margin.

    .. math:: z_c + \tau \log \pi_c

    With :math:`\tau = 1` the logits without the offset are those of a uniform prior: predict
    without the offset. The offset can also be the `bias` of the linear losses.

    Args:
      prior: share of each class in the training data `[C]`, or the counts. The offset of a class
        without examples is -inf, which masks the class; to avoid this, add 1 to the counts.
      tau: strength, at least 0. May be traced.

    Returns:
      The offset `[C]`, at most 0; for `tau = 0` it is 0 except for masked classes. float32 (float64
      for float64 input).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative share, a shape that is not `[C]`, or a `tau` out of range.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.training_logit_offset(jnp.array([300, 100, 0])))
      [-0.2877 -1.3863    -inf]

    References:
      Menon et al., `Long-Tail Learning via Logit Adjustment`, 2021.
    """
    return _logit_offset(_shares("prior", prior), scalar("tau", tau, low=0.0), sign=1)


def prediction_logit_offset(prior: ArrayLike, *, tau: Scalar = 1.0) -> Float[Array, "..."]:
    r"""Offset to add to the logits in prediction, if the model was trained without an offset.

    .. math:: z_c - \tau \log \pi_c

    With :math:`\tau = 1` the result is the prediction for a uniform prior. Use an offset in
    training or in prediction, not in both.

    Args:
      prior: share of each class in the training data `[C]`, or the counts.
      tau: strength, at least 0. May be traced.

    Returns:
      The offset `[C]`, float32 (float64 for float64 input). It is -inf for a class without
      examples: the model has learnt nothing about this class and must not predict it.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative share, a shape that is not `[C]`, or a `tau` out of range.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.prediction_logit_offset(jnp.array([300, 100, 0])))
      [0.2877 1.3863   -inf]

    References:
      Menon et al., `Long-Tail Learning via Logit Adjustment`, 2021.
    """
    return _logit_offset(_shares("prior", prior), scalar("tau", tau, low=0.0), sign=-1)


@compiled
def _logit_offset(prior: Array, tau: Array, *, sign: int) -> Array:
    present = prior != 0
    log_prior = jnp.log(jnp.where(present, _normalised(prior), 1))
    return jnp.where(present, sign * tau.astype(prior.dtype) * log_prior, -jnp.inf)


def prior_shift_weights(train_prior: ArrayLike, target_prior: ArrayLike) -> Float[Array, "..."]:
    r"""Class weights that make training data represent data with other class shares.

    .. math:: w_c = \pi'_c / \pi_c

    Their mean over the training data is 1 if each class of the target has examples. To shift the
    predictions of a trained model in the same way, add their logarithm to the logits.

    Args:
      train_prior: share of each class in the training data `[C]`, or the counts.
      target_prior: share of each class `[C]` in the data for which the model is used, or the
        counts; from `estimate_prior` if there are no labels.

    Returns:
      The weights `[C]`, float32 (float64 for float64 input); 0 for a class without training
      examples.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a negative share, or shapes that are not both `[C]`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.prior_shift_weights(jnp.array([300, 100]), jnp.array([0.5, 0.5])))
      [0.6667 2.    ]

    References:
      Saerens et al., `Adjusting the Outputs of a Classifier to New a Priori Probabilities: a
      Simple Procedure`, 2002.
    """
    train, target = _shares("train_prior", train_prior), _shares("target_prior", target_prior)
    checks.shape_is("target_prior", target, train.shape, "the shape of train_prior")
    dtype = jnp.promote_types(train.dtype, target.dtype)
    return _prior_shift_weights(train.astype(dtype), target.astype(dtype))


@compiled
def _prior_shift_weights(train: Array, target: Array) -> Array:
    present = train != 0
    share = jnp.where(present, _normalised(train), 1)
    return jnp.where(present, _normalised(target) / share, 0)


def _floats(name: str, x: ArrayLike) -> Float[Array, "..."]:
    """Non-negative numbers in a dtype to calculate with."""
    x = jnp.asarray(option(name, x, low=0.0))
    return x.astype(wide(x.dtype))


def _shares(name: str, x: ArrayLike) -> Float[Array, " classes"]:
    x = _floats(name, x)
    if x.ndim != 1:
        raise ValueError(f"{name} must have shape [C], one number per class, got {x.shape}")
    return x


def _normalised(x: Float[Array, " classes"]) -> Float[Array, " classes"]:
    total = jnp.sum(x)
    return x / jnp.where(total == 0, 1, total)
