"""A mean as a total and a denominator, for means over several batches or devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ._arguments.compiled import numeric
from ._rows.numerics import directional

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
        (a, by_a), (b, by_b) = self._numbers(), other._numbers()
        return Ratio(a + b, by_a + by_b)

    def __radd__(self, other: int) -> Ratio:
        """With the 0 with which `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def mean(self) -> Float[Array, "..."]:
        """The total divided by the denominator; 0 with gradient 0 where the denominator is 0.

        A total of NaN, which shows a label that is not a class, stays NaN.
        """
        return _quotient(*self._numbers())

    def _numbers(self) -> tuple[Any, Any]:
        return numeric("total", self.total), numeric("denominator", self.denominator)


@jax.custom_jvp
@functools.partial(jax.jit, inline=True)  # one program, where a mean is taken outside `jit`
def _quotient(total: ArrayLike, denominator: ArrayLike) -> Float[Array, "..."]:
    none = jnp.equal(denominator, 0)
    quotient = jnp.divide(total, jnp.where(none, 1, denominator))
    return jnp.where(none & ~jnp.isnan(total), 0, quotient)


@functools.partial(_quotient.defjvp, symbolic_zeros=True)
def _quotient_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """The slope is written without the total: else a recomputed loss would be summed again, too."""
    mean, denominator = _quotient(*primals), primals[1]
    none = jnp.equal(denominator, 0)
    slope = jnp.where(none, 0, 1 / jnp.where(none, 1, denominator).astype(mean.dtype))
    return mean, directional((slope, -mean * slope), tangents)
