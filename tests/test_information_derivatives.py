"""Derivatives and transforms of the information functions, against finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import helpers
from tests.test_information import ALL, ELEMENTWISE, TWO, P, arguments

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]


def difference(function, arrays, index, direction, step=1e-6):
    """Central difference of function(*arrays) along `direction` in one argument."""

    def moved(sign):
        at = list(arrays)
        at[index] = at[index] + sign * step * direction
        return np.asarray(function(*at))

    return (moved(1) - moved(-1)) / (2 * step)


@pytest.mark.parametrize("base", [math.e, 2])
@pytest.mark.parametrize("function", ALL)
def test_derivatives_of_both_orders_in_every_mode(function, base, x64):
    draw = np.random.default_rng(5)
    arrays = arguments(function)
    wrt = tuple(range(len(arrays)))

    def total(*arrays):
        return function(*arrays, base=base) @ jnp.arange(1.0, len(P) + 1)

    if function in ELEMENTWISE:

        def total(*arrays):
            return function(*arrays, base=base).sum(-1) @ jnp.arange(1.0, len(P) + 1)

    gradients = jax.grad(total, wrt)(*arrays)
    forward = jax.jacfwd(total, wrt)(*arrays)
    for i in wrt:
        direction = draw.normal(size=P.shape)
        slope = np.sum(gradients[i] * direction)
        np.testing.assert_allclose(slope, difference(total, arrays, i, direction), rtol=1e-6)
        np.testing.assert_allclose(forward[i], gradients[i], rtol=1e-13)
        primal, tangent = jax.jvp(
            lambda x, i=i: total(*arrays[:i], x, *arrays[i + 1 :]), (arrays[i],), (direction,)
        )
        np.testing.assert_allclose(primal, total(*arrays), rtol=1e-15)
        np.testing.assert_allclose(tangent, slope, rtol=1e-12)

    gradient = jax.jit(jax.grad(total, wrt))
    hessian = jax.jit(jax.hessian(total, wrt))(*arrays)
    backward = jax.jit(jax.jacrev(gradient, wrt))(*arrays)
    for i in wrt:
        for j in wrt:
            direction = draw.normal(size=P.shape)
            curve = np.tensordot(hessian[i][j], direction, 2)
            expected = difference(lambda *a, i=i: gradient(*a)[i], arrays, j, direction)
            np.testing.assert_allclose(curve, expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(backward[i][j], hessian[i][j], rtol=1e-12, atol=1e-12)


def test_gradients_at_zero_are_the_limits():
    inf = np.inf
    p, q = jnp.array([0.0, 0.0, 0.5, 0.5]), jnp.array([0.0, 0.5, 0.0, 0.5])
    np.testing.assert_array_equal(jax.grad(ce_jax.entropy)(p)[:2], inf)
    assert jax.grad(ce_jax.binary_entropy)(0.0) == inf
    assert jax.grad(ce_jax.binary_entropy)(1.0) == -inf
    dp, dq = jax.grad(ce_jax.cross_entropy, (0, 1))(p, q)
    np.testing.assert_allclose(dp, [inf, np.log(2), inf, np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(dq, [0, 0, -inf, -1])
    dp, dq = jax.grad(ce_jax.kl_divergence, (0, 1))(p, q)
    np.testing.assert_allclose(dp, [inf, -inf, inf, 1])
    np.testing.assert_array_equal(dq, [0, 0, -inf, -1])


def test_one_hot_targets_have_gradients_in_every_mode():
    p, q = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.3, 0.6, 0.1])
    for function in TWO:
        expected = [0.0, -1 / 0.6, 0.0]
        for jacobian in (jax.grad, jax.jacfwd, jax.jacrev):
            np.testing.assert_allclose(jacobian(function, 1)(p, q), expected, rtol=1e-6)
        tangent = jax.jvp(lambda q, function=function: function(p, q), (q,), (jnp.ones(3),))[1]
        np.testing.assert_allclose(tangent, sum(expected), rtol=1e-6)
        np.testing.assert_allclose(
            jax.hessian(function, 1)(p, q), np.diag([0.0, 1 / 0.36, 0.0]), rtol=1e-6
        )


@pytest.mark.parametrize("function", ALL)
def test_a_zero_that_does_not_move_adds_nothing_to_a_tangent(function, x64):
    """Its slope may be infinite: the rows of `jax.jacfwd` and the off-diagonals of a Hessian."""
    one, other = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.75, 0.0])
    given = (one, other) if function in TWO else (one,)
    for i, x in enumerate(given):

        def of(x, i=i):
            return jnp.sum(function(*given[:i], x, *given[i + 1 :]))

        def finite(*arrays):
            found = function(*arrays)
            return jnp.sum(found[:2]) if function in ELEMENTWISE else found

        moving = jnp.array([1.0, -2.0, 0.0])
        want = difference(finite, list(given), i, moving)
        np.testing.assert_allclose(jax.jvp(of, (x,), (moving,))[1], want, rtol=1e-6)
        np.testing.assert_array_equal(jax.jacfwd(of)(x), jax.grad(of)(x))
        hessian = jax.hessian(of)(x)
        assert np.isfinite(hessian[:2]).all()
        np.testing.assert_array_equal(hessian[2, :2], 0)


def test_a_finite_slope_between_distributions_that_lack_a_class(x64):
    p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.2, 0.8, 0.0])
    found = jax.jvp(lambda t: ce_jax.entropy(t * p + (1 - t) * q), (0.3,), (1.0,))[1]
    np.testing.assert_allclose(found, 0.3 * np.log(0.71 / 0.29), rtol=1e-13)
    found = jax.jvp(lambda e: ce_jax.smoothed_label_entropy(e, 5), (0.0,), (0.0,))[1]
    assert found == 0


def test_chain_rule_through_a_sigmoid(x64):
    """dE/dp = -c/p + (1-c)/(1-p) and dp/ds = p(1-p) multiply to p - c."""
    draw = np.random.default_rng(11)
    for c, s in zip(draw.uniform(size=20), draw.normal(size=20), strict=True):

        def loss(p, c=c):
            return ce_jax.cross_entropy(jnp.array([c, 1 - c]), jnp.stack([p, 1 - p]))

        p = jax.nn.sigmoid(s)
        np.testing.assert_allclose(jax.grad(loss)(p), -(c / p) + (1 - c) / (1 - p), rtol=1e-12)
        through = jax.grad(lambda s, loss=loss: loss(jax.nn.sigmoid(s)))(s)
        np.testing.assert_allclose(through, p - c, rtol=1e-10, atol=1e-14)


def test_base_may_be_traced(x64):
    for function in ALL:
        arrays = arguments(function)
        traced = jax.jit(lambda base, f=function, a=arrays: f(*a, base=base))(7.25)
        np.testing.assert_allclose(traced, function(*arrays, base=7.25), rtol=1e-14)
        mapped = jax.vmap(lambda base, f=function, a=arrays: f(*a, base=base))(jnp.array([2.0, 10]))
        np.testing.assert_allclose(mapped[0], function(*arrays, base=2), rtol=1e-14)
        np.testing.assert_allclose(mapped[1], function(*arrays, base=10), rtol=1e-14)
        slope = jax.jacfwd(lambda base, f=function, a=arrays: f(*a, base=base))(3.0)
        expected = -function(*arrays, base=3.0) / (3.0 * math.log(3.0))
        np.testing.assert_allclose(slope, expected, rtol=1e-12)


@pytest.mark.parametrize("function", ALL)
def test_vmap_and_scan(function):
    arrays = [jnp.asarray(x, jnp.float32) for x in arguments(function)]
    plain = function(*arrays)
    np.testing.assert_allclose(jax.vmap(function)(*arrays), plain, rtol=1e-6)
    scanned = jax.lax.scan(lambda _, xs: (None, function(*xs)), None, arrays)[1]
    np.testing.assert_allclose(scanned, plain, rtol=1e-6)
    slopes = jax.grad(lambda *a: function(*a).sum())(*arrays)
    mapped = jax.vmap(jax.grad(lambda *a: function(*a).sum()))(*arrays)
    np.testing.assert_allclose(mapped, slopes, rtol=1e-6)
    remat = jax.grad(lambda *a: jax.checkpoint(function)(*a).sum())(*arrays)
    np.testing.assert_allclose(remat, slopes, rtol=1e-6)


@pytest.mark.parametrize("function", ALL)
def test_an_eager_call_is_one_cached_program(function):
    arrays = [jnp.full((3, 17), 1 / 17) for _ in arguments(function)]
    with helpers.compilations() as first:
        function(*arrays, base=2)
    with helpers.compilations() as again:
        function(*arrays, base=2)
        function(*arrays, base=10)
    assert len(first) == 1
    assert not again
