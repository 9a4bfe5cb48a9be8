"""The sum of several losses, with learnt weights."""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._arguments import checks
from ._arguments.options import scalar
from ._arguments.types import ArrayLike, Scalar
from ._rows.dtypes import wide

# Of scalars. jaxtyping's own takes a sixth of the time in which this package is imported.
PyTree: TypeAlias = Any

# Below this log-variance exp(-s) goes on as its tangent. A weight of e^30 is far beyond use.
_LOWEST = -30.0


def init_log_variances(losses: PyTree, *, value: Scalar = 0.0) -> PyTree:
    r"""Initial parameters :math:`s_i = \log \sigma_i^2` of `uncertainty_weighted_loss`.

    Args:
      losses: any pytree with one leaf for each task, such as the losses or zeros.
      value: initial value of all parameters: 0 gives each task the weight 1.

    Returns:
      A pytree of scalars with the same structure, in float32 (float64 for a float64 leaf). Train
      them together with the parameters of the model.

    Raises:
      TypeError: for a leaf or value that is not a real number.
      ValueError: for a leaf that is not a scalar, or a value that is not a finite scalar.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> print(ce_jax.init_log_variances({"digit": 2.3, "parity": 0.7})["parity"])
      0.0

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
      and Semantics`, 2018.
    """
    start = scalar("value", value)
    return jax.tree.map(lambda loss: jnp.asarray(start, _scalar("losses", loss).dtype), losses)


def uncertainty_weighted_loss(log_variances: PyTree, losses: PyTree) -> Float[Array, ""]:
    r"""Sum of the losses of several tasks, weighted by the learnt noise of each task.

    .. math:: \sum_i \left( e^{-s_i} \ell_i + \tfrac{1}{2} s_i \right), \qquad s_i = \log \sigma_i^2

    If :math:`\ell_i` is half a squared error, this is a negative log-likelihood; for a
    cross-entropy the paper uses it as an approximation. For a fixed loss the best weight
    :math:`e^{-s_i}` is :math:`1 / (2 \ell_i)`. For a loss of 0 there is no best weight, and
    :math:`s_i` decreases without end. So below -30 the exponential is continued by its tangent:
    value and gradient stay finite, and the weight decreases again when the loss rises.

    Args:
      log_variances: parameters :math:`s_i`, from `init_log_variances`.
      losses: scalar losses, a pytree of the same structure. Each is a sum or a mean over examples;
        with a mean, the weights do not depend on the batch size.

    Returns:
      The weighted sum, `[]`, in float32 (float64 if a leaf is).

    Raises:
      TypeError: for a leaf that is not a real number.
      ValueError: for a leaf that is not a scalar, structures that differ, or no leaf at all.

    Example:
      >>> import jax, jax.numpy as jnp, ce_jax
      >>> losses = {"digit": 2.0, "parity": 0.5}
      >>> s = ce_jax.init_log_variances(losses)
      >>> print(ce_jax.uncertainty_weighted_loss(s, losses))
      2.5
      >>> print(jax.grad(ce_jax.uncertainty_weighted_loss)(s, losses)["digit"])
      -1.5

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
      and Semantics`, 2018.
    """
    wanted, found = str(jax.tree.structure(losses)), str(jax.tree.structure(log_variances))
    if wanted != found:
        raise ValueError(f"log_variances must have the structure of losses, {wanted}, got {found}")
    if not jax.tree.leaves(losses):
        raise ValueError("losses must have at least one leaf, got none")
    return _uncertainty_weighted_loss(
        [_scalar("log_variances", x) for x in jax.tree.leaves(log_variances)],
        [_scalar("losses", x) for x in jax.tree.leaves(losses)],
    )


@functools.partial(jax.jit, inline=True)
def _uncertainty_weighted_loss(log_variances: list[Array], losses: list[Array]) -> Array:
    dtype = functools.reduce(jnp.promote_types, (x.dtype for x in (*log_variances, *losses)))
    total = jnp.zeros((), dtype)
    for s, loss in zip(log_variances, losses, strict=True):
        s = s.astype(dtype)
        low = s < _LOWEST
        weight = jnp.exp(-jnp.where(low, _LOWEST, s)) * jnp.where(low, 1 + _LOWEST - s, 1)
        total = total + weight * loss.astype(dtype) + s / 2
    return total


def _scalar(name: str, x: ArrayLike) -> Float[Array, ""]:
    x = checks.real(name, x)
    checks.shape_is(f"every leaf of {name}", x, (), "a scalar")
    return x.astype(wide(x.dtype))
