"""Comparison of value and gradients with a truth given as a function, and of the two modes."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import reference
from tests.helpers import accuracy, close, result_dtype


def check(loss, truth, arguments, wrt=(), *, dtype=jnp.float32, loosen=1.0, **static):
    """Like `helpers.check`, of any two functions of the same keyword arguments.

    Float arrays among the `arguments` are traced and differentiated, as are the floats named in
    `wrt`; other arrays are traced, the rest and `static` (of the loss alone) is constant.
    """
    with jax.enable_x64(dtype == jnp.float64):
        arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
        smooth = {k: jnp.asarray(v, dtype) for k, v in arrays.items() if v.dtype.kind == "f"}
        smooth |= {k: jnp.asarray(arguments[k], result_dtype(dtype)) for k in wrt}
        others = {k: v for k, v in arrays.items() if k not in smooth}
        fixed = {k: v for k, v in arguments.items() if k not in smooth and k not in others}
        exact = arguments | {k: np.asarray(v, np.float64) for k, v in smooth.items()}
        expected = np.asarray(truth(**exact))
        cotangent = np.random.default_rng(1).normal(size=expected.shape)

        @jax.jit
        def value_and_gradients(smooth, others, cotangent):
            value, pull = jax.vjp(
                lambda smooth: loss(**smooth, **others, **fixed, **static), smooth
            )
            return value, pull(cotangent.astype(value.dtype))[0]

        value, gradients = value_and_gradients(smooth, others, jnp.asarray(cotangent))
    assert value.dtype == result_dtype(dtype)
    cotangent = np.asarray(cotangent, result_dtype(dtype)).astype(np.float64)
    close(value, expected, loosen * accuracy(value.dtype))
    size = np.max(np.abs(expected), initial=0.0)
    for key, gradient in gradients.items():
        assert gradient.dtype == smooth[key].dtype
        slope = reference.vjp(truth, exact, key, cotangent)
        close(gradient, slope, loosen * accuracy(gradient.dtype), f"d {key}", size)


def slopes_everywhere(function, x):
    """Value and slope, which must be the same in both modes."""
    x = jnp.asarray(x, jnp.float32)

    @jax.jit
    def both(x):
        value, pull = jax.vjp(function, x)
        return value, *pull(jnp.ones_like(x)), *jax.jvp(function, (x,), (jnp.ones_like(x),))

    value, slope, pushed, tangent = both(x)
    np.testing.assert_array_equal(pushed, value)
    np.testing.assert_array_equal(tangent, slope)
    return value, slope
