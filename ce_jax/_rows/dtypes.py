"""The dtype of sums over classes."""

from __future__ import annotations

import jax.numpy as jnp


def wide(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype in which numbers of these are accumulated: float32, or float64 if one is that."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)
