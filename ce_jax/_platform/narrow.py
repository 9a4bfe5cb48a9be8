"""Rounding to bfloat16, which a CPU does faster with integers.

XLA's own conversion keeps LLVM from making a kernel with exponentials fast: 35 ms for 1024 rows of
32768, where what follows takes 13.4, as the kernel does in float32 (two cores of a Xeon that has
an instruction for it; jax 0.10.2, and alike 0.11.2 and 0.12.0).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def narrowed(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """`x.astype(dtype)`."""
    if x.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return x.astype(dtype)
    return _to_bfloat16(x)


@jax.custom_jvp
def _to_bfloat16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    found: Array = jax.lax.platform_dependent(
        x, cpu=_by_integers, default=lambda x: x.astype(jnp.bfloat16)
    )
    return found


@_to_bfloat16.defjvp
def _to_bfloat16_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)


def _by_integers(x: Float[Array, "..."]) -> Float[Array, "..."]:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)  # ties to even
    bits = jnp.where(jnp.isnan(x), bits | 0x400000, nearest)  # or its digits might carry
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
