"""Information functions against 60 digits of mpmath, their identities and their errors."""

import math

import jax
import jax.numpy as jnp
import jaxtyping
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import ce_jax

pytestmark = pytest.mark.sweep

BASES = [math.e, 2, 10, 0.5, 7.25]
ELEMENTWISE = [ce_jax.self_information, ce_jax.binary_entropy]
ONE = [*ELEMENTWISE, ce_jax.entropy]
TWO = [ce_jax.cross_entropy, ce_jax.kl_divergence]
ALL = [*ONE, *TWO]

P = np.array([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]])
Q = np.array([[0.25, 0.15, 0.35, 0.25], [0.9, 0.04, 0.05, 0.01]])


@pytest.fixture
def unchecked():
    """Lets the functions' own checks see what the type checker of the tests would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def arguments(function):
    return (P, Q) if function in TWO else (P,)


def log(x):
    return mpmath.log(x) if x > 0 else mpmath.mpf("-inf")


def xlogy(x, y):
    return x * log(y) if x else mpmath.mpf(0)


TERMS = {
    ce_jax.self_information: lambda p: -log(p),
    ce_jax.entropy: lambda p: -xlogy(p, p),
    ce_jax.binary_entropy: lambda p: -xlogy(p, p) - xlogy(1 - p, 1 - p),
    ce_jax.cross_entropy: lambda p, q: -xlogy(p, q),
    ce_jax.kl_divergence: lambda p, q: xlogy(p, p) - xlogy(p, q),
}


def truth(function, *arrays, base=math.e):
    """The formula on exactly these floats, summed over the last axis where the function sums."""
    with mpmath.workdps(60):
        exact = [[mpmath.mpf(float(x)) for x in np.ravel(array)] for array in arrays]
        scale = mpmath.log(base) if base != math.e else mpmath.mpf(1)
        terms = [TERMS[function](*xs) / scale for xs in zip(*exact, strict=True)]
        shape = np.shape(arrays[0])
        if function in ELEMENTWISE:
            return np.array([float(t) for t in terms]).reshape(shape)
        rows = np.reshape(np.array(terms, object), (-1, shape[-1]))
        return np.array([float(mpmath.fsum(row)) for row in rows]).reshape(shape[:-1])


def distributions(delta=None, *, shape=(5, 30), dtype=np.float64, seed=0):
    """A random p, and a q that differs from it by relative `delta`."""
    draw = np.random.default_rng(seed)
    p = draw.dirichlet(np.ones(shape[-1]), size=shape[:-1])
    q = p * np.exp(delta * draw.normal(size=shape)) if delta else draw.dirichlet(p[0] * 9, shape[0])
    return p.astype(dtype), (q / q.sum(-1, keepdims=True)).astype(dtype)


# Worked examples, to the digits they are quoted with.


def test_self_information_and_entropy_of_three_outcomes():
    p = jnp.array([0.7, 0.2, 0.1])
    np.testing.assert_allclose(ce_jax.self_information(p), [0.36, 1.61, 2.30], atol=0.005)
    np.testing.assert_allclose(ce_jax.entropy(p), 0.80, atol=0.005)
    np.testing.assert_allclose(ce_jax.self_information(jnp.array(0.8)), 0.223, atol=0.0005)


def test_binary_entropy_in_bits():
    bits = ce_jax.binary_entropy(jnp.array([0.1, 0.999]), base=2)
    np.testing.assert_allclose(bits, [0.4690, 0.0114], atol=0.00005)


def test_categorical_cross_entropy():
    loss = ce_jax.cross_entropy(jnp.array([0.0, 1.0, 0.0]), jnp.array([0.3, 0.6, 0.1]))
    np.testing.assert_allclose(loss, 0.511, atol=0.0005)


@pytest.mark.parametrize(
    ("labels", "predictions", "base", "expected", "digit"),
    [
        ([0.0, 1.0, 1.0], [0.1, 0.7, 0.8], math.e, 0.685, 0.0005),
        ([1.0, 0.0, 0.0], [0.5, 0.2, 0.3], 10, 0.55, 0.005),
        ([1.0, 0.0, 0.0], [0.8, 0.1, 0.1], 10, 0.19, 0.005),
    ],
)
def test_binary_cross_entropies_summed(labels, predictions, base, expected, digit):
    p, q = (jnp.stack([x, 1 - x]) for x in (jnp.array(labels), jnp.array(predictions)))
    loss = ce_jax.cross_entropy(p, q, axis=None, base=base)
    np.testing.assert_allclose(loss, expected, atol=digit)


# Values.


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ALL)
def test_is_the_formula(function, dtype, base, x64):
    arrays = [x.astype(dtype) for x in (distributions() if function in TWO else (P,))]
    value = function(*arrays, base=base)
    assert value.dtype == dtype
    np.testing.assert_allclose(
        value, truth(function, *arrays, base=base), rtol=8 * np.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_binary_entropy_is_accurate_at_both_ends(dtype, x64):
    small = np.array([1e-30, 1e-12, 1e-6, 1e-3, 0.05], dtype)
    p = np.concatenate([small, 1 - small, [0.49, 0.5, 0.51]]).astype(dtype)
    expected = truth(ce_jax.binary_entropy, p)
    np.testing.assert_allclose(ce_jax.binary_entropy(p), expected, rtol=6 * np.finfo(dtype).eps)


@pytest.mark.parametrize("delta", [10.0**-k for k in range(8)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kl_divergence_is_accurate_near_equality(dtype, delta, x64):
    """The plain sum of p log(p/q) is off by a rounding of p itself: at 1e-7, by all there is."""
    p, q = distributions(delta, dtype=dtype)
    expected = truth(ce_jax.kl_divergence, p, q)
    error = np.abs(np.asarray(ce_jax.kl_divergence(p, q), np.float64) - expected)
    # The sum of p - q, 0 but for the rounding of p and q, has the error of a sum of such numbers.
    allowed = 8 * np.abs(expected) + np.sum(np.abs(p - q), -1, dtype=np.float64)
    assert np.all(error <= np.finfo(dtype).eps * allowed)


def test_kl_divergence_of_equals_is_zero():
    np.testing.assert_array_equal(ce_jax.kl_divergence(P, P), [0.0, 0.0])
    np.testing.assert_array_equal(jax.grad(lambda q: ce_jax.kl_divergence(P, q).sum())(P), -1.0)


def test_kl_divergence_of_numbers_that_are_no_distributions(x64):
    p = np.array([[1e-3, 2.0, 0.0], [1e150, 1e-300, 3.0]])
    q = np.array([[1e3, 2.1, 7.0], [1e-150, 1e-290, 3.5]])
    expected = truth(ce_jax.kl_divergence, p, q)
    np.testing.assert_allclose(ce_jax.kl_divergence(p, q), expected, rtol=1e-14)


def test_certainty_is_positive_zero():
    for value in (
        ce_jax.self_information(jnp.ones(3)),
        ce_jax.entropy(jnp.ones(1)),
        ce_jax.binary_entropy(jnp.array([0.0, 1.0])),
        ce_jax.cross_entropy(jnp.ones(1), jnp.ones(1)),
        ce_jax.kl_divergence(jnp.ones(1), jnp.ones(1)),
    ):
        np.testing.assert_array_equal(value, 0.0)
        assert not np.signbit(value).any()


def test_impossible_outcomes():
    p, q = jnp.array([0.0, 0.5, 0.5]), jnp.array([0.5, 0.0, 0.5])
    assert ce_jax.self_information(jnp.array(0.0)) == np.inf
    assert ce_jax.entropy(p, base=2) == 1.0
    np.testing.assert_array_equal(ce_jax.binary_entropy(jnp.array([0.0, 1.0])), 0.0)
    for function in TWO:
        assert function(p, q) == np.inf
        assert function(p, jnp.array([0.0, 0.5, 0.5])) == function(p[1:], p[1:])
        assert function(p, jnp.array([0.5, 0.25, 0.25])) == function(p[1:], q[2:] / 2 * jnp.ones(2))


@pytest.mark.parametrize("bad", [-1e-3, -2.3, -np.inf, np.nan])
def test_what_is_no_probability_gives_nan(bad):
    wrong = jnp.array([0.5, bad])
    for function in ONE:
        assert np.isnan(function(wrong)).any()
    for function in TWO:
        assert np.isnan(function(wrong, jnp.array([0.5, 0.5])))
        assert np.isnan(function(jnp.array([0.5, 0.5]), wrong))
        assert np.isnan(function(jnp.array([1.0, 0.0]), wrong))
    assert np.isnan(ce_jax.binary_entropy(jnp.array(1.5)))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (-1, 0), None])
def test_axis(axis):
    draw = np.random.default_rng(3)
    p, q = draw.uniform(0.1, 1, size=(2, 2, 3, 4)).astype(np.float32)
    sum_over = tuple(range(3)) if axis is None else axis
    np.testing.assert_allclose(
        ce_jax.entropy(p, axis), -np.sum(p * np.log(p), axis=sum_over), rtol=1e-5
    )
    np.testing.assert_allclose(
        ce_jax.cross_entropy(p, q, axis), -np.sum(p * np.log(q), axis=sum_over), rtol=1e-5
    )
    np.testing.assert_allclose(
        ce_jax.kl_divergence(p, q, axis), np.sum(p * np.log(p / q), axis=sum_over), rtol=1e-4
    )


def test_nothing_to_sum():
    nothing = jnp.zeros((2, 0))
    np.testing.assert_array_equal(ce_jax.entropy(nothing), [0.0, 0.0])
    np.testing.assert_array_equal(ce_jax.kl_divergence(nothing, nothing), [0.0, 0.0])
    assert ce_jax.cross_entropy(nothing, nothing, 0).shape == (0,)
    assert ce_jax.self_information(0.5) == ce_jax.entropy(0.5, None) * 2


# dtypes.


@pytest.mark.parametrize("narrow", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("function", ALL)
def test_narrow_inputs_are_summed_in_float32(function, narrow):
    arrays = [jnp.asarray(x, narrow) for x in arguments(function)]
    value, pull = jax.vjp(function, *arrays)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, function(*(x.astype(jnp.float32) for x in arrays)))
    assert [x.dtype for x in pull(jnp.ones_like(value))] == [narrow] * len(arrays)


def test_dtypes_may_differ(x64):
    p, q = jnp.asarray(P, jnp.float32), jnp.asarray(Q, jnp.float64)
    for function in TWO:
        assert function(p, q).dtype == jnp.float64
        assert function(p, q, base=jnp.float16(2)).dtype == jnp.float64
        assert function(p, q.astype(jnp.bfloat16)).dtype == jnp.float32


# Identities.


@pytest.mark.parametrize("base", BASES)
def test_cross_entropy_is_entropy_and_divergence(base, x64):
    p, q = distributions()
    both = ce_jax.entropy(p, base=base) + ce_jax.kl_divergence(p, q, base=base)
    np.testing.assert_allclose(ce_jax.cross_entropy(p, q, base=base), both, rtol=1e-13)


def test_entropy_is_mean_self_information():
    np.testing.assert_allclose(
        ce_jax.entropy(P), np.sum(P * ce_jax.self_information(P), -1), rtol=1e-6
    )


PROBABILITIES = hnp.arrays(
    np.float64, st.sampled_from([2, 3, 9]), elements=st.floats(0, 1, allow_subnormal=False)
).map(lambda x: x + (x.sum() == 0))


@given(PROBABILITIES, st.randoms(use_true_random=False), st.sampled_from(BASES[:3]))
def test_properties(weights, random, base):
    order = random.sample(range(len(weights)), len(weights))
    with jax.enable_x64(True):
        p, q = weights / weights.sum(), (weights[order] + 1e-3) / np.sum(weights + 1e-3)
        most = math.log(len(p)) / math.log(base)
        entropy = ce_jax.entropy(p, base=base)
        assert 0 <= entropy <= most * (1 + 1e-12)
        np.testing.assert_allclose(ce_jax.entropy(p[order], base=base), entropy, atol=1e-12)
        divergence = ce_jax.kl_divergence(p, q, base=base)
        assert divergence >= -1e-15
        cross = ce_jax.cross_entropy(p, q, base=base)
        np.testing.assert_allclose(cross, entropy + divergence, rtol=1e-12, atol=1e-13)
        # Merging two outcomes loses information (data processing).
        merged = (np.append(x[2:], x[0] + x[1]) for x in (p, q))
        assert ce_jax.kl_divergence(*merged, base=base) <= divergence + 1e-12
        np.testing.assert_allclose(
            ce_jax.binary_entropy(p, base=base),
            ce_jax.entropy(np.stack([p, 1 - p]), 0, base=base),
            atol=1e-14,
        )


# Errors.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", ALL)
def test_integers_are_no_probabilities(function):
    good = [jnp.asarray(x, jnp.float32) for x in arguments(function)]
    for i, name in enumerate("pq"[: len(good)]):
        for dtype in (jnp.int32, jnp.bool_, jnp.complex64):
            bad = [*good[:i], good[i].astype(dtype), *good[i + 1 :]]
            with pytest.raises(TypeError, match=rf"\b{name}\b.*{jnp.dtype(dtype).name}"):
                function(*bad)
            with pytest.raises(TypeError, match=rf"\b{name}\b.*{jnp.dtype(dtype).name}"):
                jax.jit(function)(*bad)


@pytest.mark.parametrize("function", TWO)
def test_shapes_must_agree(function):
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(4,\)"):
        function(P, Q[0])


@pytest.mark.parametrize("function", [ce_jax.entropy, *TWO])
def test_bad_axis(function):
    arrays = arguments(function)
    for axis in (2, -3, (0, 2), (1, -1)):
        with pytest.raises(ValueError, match="axis"):
            function(*arrays, axis)
    with pytest.raises(ValueError, match="axis"):
        function(*(jnp.float32(0.5) for _ in arrays))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", [ce_jax.entropy, *TWO])
@pytest.mark.parametrize("axis", [1.0, "last", (0, 1.0)])
def test_axis_of_wrong_type(function, axis):
    with pytest.raises(TypeError, match="axis"):
        function(*arguments(function), axis)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("function", ALL)
def test_bad_base(function):
    arrays = arguments(function)
    for base in (0, -2, 1, 1.0, math.inf, math.nan, jnp.float32(1), np.float64(-1), jnp.ones(2)):
        with pytest.raises(ValueError, match="base"):
            function(*arrays, base=base)
    for base in ("2", None, 2j):
        with pytest.raises(TypeError, match="base"):
            function(*arrays, base=base)
