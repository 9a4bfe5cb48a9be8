"""What a mean divides and by what, for means that are put together from parts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

if TYPE_CHECKING:
    _Leaf: TypeAlias = Float[Array, "..."]
else:  # operations on pytrees put other things than arrays in their places
    _Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ratio:
    r"""The sum of losses and what their mean divides it by: what `reduction="ratio"` returns.

    .. math::
      \bar\ell = \frac{\sum_k t_k}{\sum_k d_k}

    Micro-batches or devices that each give a mean over their own rows can't be averaged, as what
    these divide by differs. Their totals :math:`t_k` and denominators :math:`d_k` add up: by `+`,
    `sum`, `jax.lax.psum` or in the carry of `jax.lax.scan`, as it is a pytree of two arrays.

    Attributes:
      total: the sum of the losses.
      denominator: what the mean divides it by, of the same shape.

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
      The rule of what a mean divides by is that of `torch.nn.CrossEntropyLoss`.
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
        """The total over the denominator; 0 with gradient 0 where that is 0.

        Unless the total is NaN, as it is where a label is no class, which nothing must hide.
        """
        empty = (self.denominator == 0) & ~jnp.isnan(self.total)
        quotient = self.total / jnp.where(self.denominator == 0, 1, self.denominator)
        return jnp.where(empty, 0, quotient)
