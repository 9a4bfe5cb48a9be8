"""The last layer of a model, hidden states to logits, one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .blocks import take
from .dtypes import wide
from .numerics import tempered_rows
from .tile import ABSENT


class Tokens(NamedTuple):
    """What the last layer reads of each token, or its cotangent; a temperature may be absent.

    Attributes:
      hidden: `[tokens, D]`. The matmuls are in its dtype.
      temperature: what the logits of a token are divided by, `[tokens]`.
    """

    hidden: Float[Array, "tokens width"]
    temperature: Float[Array, " tokens"] = ABSENT


class Head(NamedTuple):
    """Parameters of the last layer, or their cotangents; bias and soft cap may be absent.

    Attributes:
      kernel: `[D, V]`, or `[V, D]` as an embedding table has it.
      bias: `[V]`.
      soft_cap: the logits `u` become `soft_cap * tanh(u / soft_cap)`.
    """

    kernel: Float[Array, "_ _"]
    bias: Float[Array, " classes"] = ABSENT
    soft_cap: Float[Array, ""] = ABSENT


Pull = Callable[[Float[Array, "tokens classes"]], tuple[Tokens, Head]]


def logits(
    tokens: Tokens, head: Head, class_axis: int
) -> tuple[Float[Array, "tokens classes"], Pull]:
    """Logits in the accumulation dtype, and the function that takes their cotangents back.

    That function rounds the logits' cotangents to the dtype of `hidden` before its two matmuls, as
    a matmul in float32 is many times slower on an accelerator, and returns sums in the accumulation
    dtype.
    """
    hidden, kernel = tokens.hidden, head.kernel.astype(tokens.hidden.dtype)
    products = _dot(hidden, 1, kernel, 1 - class_axis)
    if head.bias is not None:
        products = products + head.bias.astype(products.dtype)[None]
    z, undo = jax.vjp(_capped_and_tempered, products, head.soft_cap, tokens.temperature)

    def pull(dz: Float[Array, "tokens classes"]) -> tuple[Tokens, Head]:
        dz, d_cap, d_temperature = undo(dz)
        d_bias = ABSENT if head.bias is None else jnp.sum(dz, 0)
        dz = dz.astype(hidden.dtype)
        pair = (hidden, dz) if class_axis == 1 else (dz, hidden)
        d_kernel = _dot(pair[0], 0, pair[1], 0)
        d_hidden = _dot(dz, 1, kernel, class_axis)
        return Tokens(d_hidden, d_temperature), Head(d_kernel, d_bias, d_cap)

    return z, pull


def _dot(a: Array, a_axis: int, b: Array, b_axis: int) -> Array:
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=wide(a.dtype))


def _capped_and_tempered(
    u: Float[Array, "tokens classes"],
    cap: Float[Array, ""] | None,
    temperature: Float[Array, " tokens"] | None,
) -> Float[Array, "tokens classes"]:
    z = u if cap is None else _soft_cap(u, cap)
    return z if temperature is None else tempered_rows(z, temperature)


def _soft_cap(u: Float[Array, "..."], cap: Float[Array, ""]) -> Float[Array, "..."]:
    banned = u == -jnp.inf  # by the bias; a cap must not let it in again
    return jnp.where(banned, -jnp.inf, cap * jnp.tanh(jnp.where(banned, 0, u) / cap))


def take_classes(head: Head, classes: int, class_axis: int) -> Head:
    """The part of the head that gives the logits of the first classes."""
    bias = ABSENT if head.bias is None else take(head.bias, 0, classes)
    return head._replace(kernel=take(head.kernel, 0, classes, class_axis), bias=bias)
