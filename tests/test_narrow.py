"""Rounding to bfloat16 by integers, as XLA's conversion rounds."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import ce_jax
from ce_jax._platform.narrow import _by_integers, narrowed

# Every upper half of a float32, with the lower halves next to which rounding turns.
UPPER = np.arange(1 << 16, dtype=np.uint32) << 16
LOWER = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
ALL = (UPPER[:, None] | LOWER).view(np.float32)


@pytest.mark.parametrize("function", [_by_integers, lambda x: narrowed(x, jnp.dtype("bfloat16"))])
def test_every_number(function):
    found = np.asarray(jax.jit(function)(ALL))
    with np.errstate(invalid="ignore"):
        exact = ALL.astype(ml_dtypes.bfloat16)
    is_nan = np.isnan(ALL)
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), is_nan)
    # A CPU computes with subnormal numbers as 0, and may leave them so.
    normal = ~is_nan & (np.abs(ALL) >= np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(found.view(np.uint16)[normal], exact.view(np.uint16)[normal])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.usefixtures("x64")
def test_other_dtypes(dtype):
    x = jnp.array([1 / 3, -np.inf, 6e4])
    found = narrowed(x, jnp.dtype(dtype))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(x).astype(dtype))


def test_derivatives():
    def f(x):
        return jnp.sum(narrowed(x, jnp.dtype("bfloat16")).astype(jnp.float32) * 3)

    x = jnp.linspace(0.1, 1, 5)
    np.testing.assert_array_equal(jax.grad(f)(x), 3 * np.ones(5))
    np.testing.assert_array_equal(jax.jvp(f, (x,), (jnp.ones(5),))[1], 15)


def test_a_gpu_converts():
    logits = jax.ShapeDtypeStruct((64, 1000), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((64,), jnp.int32)
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    gradient = jax.jit(jax.grad(lambda z, y: loss(z, y).sum())).trace(logits, labels)

    def uses_integers(platform):
        return "bitcast_convert" in gradient.lower(lowering_platforms=(platform,)).as_text()

    assert uses_integers("cpu")
    assert not uses_integers("cuda")
    assert not uses_integers("tpu")
