"""The dtype of sums over classes."""

from __future__ import annotations

import jax.numpy as jnp


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which logits of `dtype` are accumulated: float32, or float64 for float64."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
