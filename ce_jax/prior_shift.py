"""Class shares of unlabelled data, estimated from a model's predictions."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from ._arguments import checks, reductions
from ._arguments.compiled import compiled
from ._arguments.options import option, scalar
from ._arguments.types import ArrayLike, Scalar
from ._rows.dtypes import wide


class PriorEstimate(NamedTuple):
    """The result of `estimate_prior`.

    Attributes:
      prior: share of each class.
      steps: number of steps taken.
      change: largest change of a share in the last step: at most the tolerance if the method
        converged.
    """

    prior: Float[Array, " classes"]
    steps: Integer[Array, ""]
    change: Float[Array, ""]


def estimate_prior(
    logits: ArrayLike,
    train_prior: ArrayLike,
    *,
    sample_weight: ArrayLike | None = None,
    tolerance: Scalar = 1e-6,
    max_steps: int = 1000,
) -> PriorEstimate:
    r"""Maximum-likelihood class shares of unlabelled data, from a model's predictions.

    The EM algorithm, which starts from the training prior :math:`\pi`, for a model with the
    posterior :math:`p = \mathrm{softmax}(z)`:

    .. math::
      g_{nc} = \frac{p_{nc}\, \pi'_c / \pi_c}{\sum_k p_{nk}\, \pi'_k / \pi_k},
      \qquad \pi'_c \leftarrow \frac{\sum_n s_n g_{nc}}{\sum_n s_n}

    The model must be calibrated under the training prior. The class shares may differ from the
    training data, but not the distribution within a class.

    Args:
      logits: logits or log-probabilities of unlabelled data `[N, C]`, floating. An example that has
        no class with a share in the training data makes the result NaN; give it the weight 0.
      train_prior: share of each class in the training data `[C]`, or the counts. A class without
        examples keeps a share of 0.
      sample_weight: weight :math:`s` of each example, broadcastable to `[N]`.
      tolerance: stop when no share changes by more than this, at least 0. May be traced.
      max_steps: stop after this many steps.

    Returns:
      A named tuple of the shares `[C]` in float32 (float64 for float64 logits), the number of
      steps, and the last change. Without any example, the shares are the training prior. The result
      has no reverse-mode derivative, because the number of steps is not known in advance.

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> probs = jnp.array([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
      >>> print(ce_jax.estimate_prior(jnp.log(probs), jnp.array([0.5, 0.5])).prior)
      [0.8125 0.1875]

    References:
      Saerens et al., `Adjusting the Outputs of a Classifier to New a Priori Probabilities: a
      Simple Procedure`, 2002.
    """
    return _estimate_prior(
        logits,
        option("train_prior", train_prior, low=0.0),
        sample_weight,
        scalar("tolerance", tolerance, low=0.0),
        max_steps=checks.positive_int("max_steps", max_steps),
    )


@compiled
def _estimate_prior(
    logits: Array,
    train_prior: Array,
    sample_weight: Array | None,
    tolerance: Array,
    *,
    max_steps: int,
) -> PriorEstimate:
    z = checks.floating("logits", logits)
    if z.ndim != 2 or z.shape[1] == 0:
        raise ValueError(f"logits must have shape [N, C] with C > 0, got {z.shape}")
    dtype = wide(z.dtype)
    checks.shape_is("train_prior", train_prior, z.shape[1:], "one share per class")
    train = train_prior.astype(dtype)
    train = train / jnp.where(jnp.sum(train) == 0, 1, jnp.sum(train))
    weights = reductions.weights(sample_weight, z.shape[:1], dtype)
    if weights is None:
        weights = jnp.ones(z.shape[:1], dtype)
    present = train > 0
    # The training prior is divided out once; each step multiplies by the current prior.
    log_train = jnp.log(jnp.where(present, train, 1))
    z = jnp.where(present[None], z.astype(dtype) - log_train[None], -jnp.inf)
    z = jnp.where((weights > 0)[:, None], z, 0)

    def step(state: PriorEstimate) -> PriorEstimate:
        posterior = jax.nn.softmax(z + jnp.log(state.prior)[None], -1)
        # At default precision, an accelerator would give the shares three digits only.
        shares = jnp.matmul(weights, posterior, precision="highest")
        total = jnp.sum(shares)
        prior = jnp.where(total == 0, train, shares / jnp.where(total == 0, 1, total))
        return PriorEstimate(prior, state.steps + 1, jnp.max(jnp.abs(prior - state.prior)))

    def unsettled(state: PriorEstimate) -> Array:
        return (state.change > tolerance.astype(dtype)) & (state.steps < max_steps)

    start = PriorEstimate(train, jnp.zeros((), jnp.int32), jnp.asarray(jnp.inf, dtype))
    return jax.lax.while_loop(unsettled, step, start)
