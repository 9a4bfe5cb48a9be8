"""A mean as a total and a denominator, for means over several batches or devices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:
    _Leaf: TypeAlias = Float[Array, "..."]
else:  # operations on pytrees also put other objects than arrays here
    _Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    r"""Total and denominator of a mean: the result of `reduction="ratio"`.

    .. math::
      \bar\ell = \frac{\sum_k t_k}{\sum_k d_k}

    The means of several micro-batches or devices can't be averaged, because their denominators
    differ. Instead, add up their totals :math:`t_k` and denominators :math:`d_k`: by `+`, `sum`,
    `jax.lax.psum`, or in the carry of `jax.lax.scan`. A `Ratio` is a pytree of two arrays.

    Attributes:
      total: the sum of the losses.
      denominator: the denominator of the mean, of the same shape.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> def loss(logits, labels):
      ...     return ce_jax.softmax_cross_entropy_with_integer_labels(
      ...         logits, labels, ignore_index=-1, reduction="ratio"
      ...     )
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [0.2, 0.8]]))
      >>> parts = [loss(logits[:2], jnp.array([0, 1])), loss(logits[2:], jnp.array([-1]))]
      >>> print(sum(parts).mean())
      0.4904

    References:
      The denominator follows `torch.nn.CrossEntropyLoss`.
    """

    total: _Leaf
    denominator: _Leaf

    def __add__(self, other: Ratio) -> Ratio:
        """The ratio of both parts together."""
        if not isinstance(other, Ratio):
            return NotImplemented
        return Ratio(self.total + other.total, self.denominator + other.denominator)

    def __radd__(self, other: int) -> Ratio:
        """With the 0 with which `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> Float[Array, "..."]:
        """The total divided by the denominator.

        Where the denominator is 0, a finite total gives 0 with gradient 0. One that is infinite, or
        NaN, which shows a label that is not a class, gives NaN.
        """
        if isinstance(self.denominator, np.ndarray) and self.denominator.all():  # known not to be 0
            return jnp.divide(self.total, self.denominator)
        # A number over infinity is 0, and so is its slope: no gradient has to keep the total.
        return self.total / jnp.where(self.denominator == 0, jnp.inf, self.denominator)
