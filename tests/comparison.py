"""Value and gradients against a truth, in one program for many cases, and in both modes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference

# Comparisons that `together` has still to run: (whether in 64 bits, program, inputs, comparison).
_waiting = None


def check(name, arguments, wrt=(), **options):
    """`compare` of the function of that name with that of `tests.reference`."""
    compare(getattr(ce_jax, name), getattr(reference, name), arguments, wrt, **options)


def compare(loss, truth, arguments, wrt=(), *, dtype=jnp.float32, loosen=1.0, **static):
    """Compare value and gradients with the truth, under a random, unequal cotangent.

    Float arrays among the `arguments` are traced and differentiated, as are the floats named in
    `wrt`; other arrays are traced, the rest and `static` (of the loss alone) is constant.
    """
    wide = dtype == jnp.float64
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    smooth = {k: v.astype(dtype) for k, v in arrays.items() if v.dtype.kind == "f"}
    smooth |= {k: np.asarray(arguments[k], result_dtype(dtype)) for k in wrt}
    others = {k: v for k, v in arrays.items() if k not in smooth}
    fixed = {k: v for k, v in arguments.items() if k not in smooth and k not in others}
    exact = arguments | {k: np.asarray(v, np.float64) for k, v in smooth.items()}
    expected = np.asarray(truth(**exact))
    cotangent = np.random.default_rng(1).normal(size=expected.shape)
    cotangent = np.asarray(cotangent, result_dtype(dtype))

    def value_and_gradients(smooth, others, cotangent):
        value, pull = jax.vjp(lambda smooth: loss(**smooth, **others, **fixed, **static), smooth)
        return value, pull(cotangent)[0]

    def compared(value, gradients):
        assert value.dtype == result_dtype(dtype)
        close(value, expected, loosen * accuracy(value.dtype))
        # A slope may cancel to 0 from terms of the size of the value.
        size = np.max(np.abs(expected), initial=0.0)
        for key, gradient in gradients.items():
            assert gradient.dtype == smooth[key].dtype
            slope = reference.vjp(truth, exact, key, cotangent.astype(np.float64))
            close(gradient, slope, loosen * accuracy(gradient.dtype), f"d {key}", size)

    comparison = wide, value_and_gradients, (smooth, others, cotangent), compared
    if _waiting is None:
        _run([comparison])
    else:
        _waiting.append(comparison)


def together(cases, size=6):
    """Decorates a test of one case: all that a few of them `compare` is compiled as one program.

    That takes two thirds of the time of a program for each. Cases are dicts of options.
    """
    ordered = sorted(cases, key=lambda case: case.get("dtype") == "float64")
    groups = [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def decorate(test_one):
        @pytest.mark.parametrize("cases", groups, ids=map(str, itertools.count()))
        def test(cases):
            _run_together(test_one, cases)

        test.__name__, test.__doc__ = test_one.__name__, test_one.__doc__
        return test

    return decorate


def _run_together(test_one, cases):
    global _waiting
    cases_of = []
    waiting = _waiting = []
    try:
        for case in cases:
            test_one(dict(case))
            cases_of += [case] * (len(waiting) - len(cases_of))
    finally:
        _waiting = None
    _run(waiting, cases_of)


def _run(comparisons, cases=(None,)):
    for wide in {x[0] for x in comparisons}:
        chosen = [(x, case) for x, case in zip(comparisons, cases, strict=True) if x[0] == wide]
        programs = [program for (_, program, _, _), _ in chosen]
        with jax.enable_x64(wide):
            found = jax.jit(
                lambda inputs, programs=programs: [
                    program(*x) for program, x in zip(programs, inputs, strict=True)
                ]
            )([inputs for (_, _, inputs, _), _ in chosen])
        for (comparison, case), results in zip(chosen, found, strict=True):
            try:
                comparison[-1](*results)
            except AssertionError as error:
                if case is not None:
                    error.add_note(f"in the case {case}")
                raise


def result_dtype(dtype):
    """The dtype of losses and statistics of inputs in `dtype`."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def accuracy(dtype):
    """Relative error allowed: a few roundings, and in narrow dtypes just the last one."""
    few = {"float64": 1e-12, "float32": 4e-6, "bfloat16": 1.01 * 2**-8, "float16": 1.01 * 2**-11}
    return few[jnp.dtype(dtype).name]


def close(actual, expected, rtol, name="value", size=0.0):
    """`actual` is `expected`; for entries near 0, relative to the largest finite one or `size`."""
    expected = np.asarray(expected, np.float64)
    scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=size)
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=rtol, atol=rtol * scale / 8, err_msg=name
    )


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
