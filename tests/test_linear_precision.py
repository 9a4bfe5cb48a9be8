"""Narrow dtypes: against the truth of the rounded inputs, no worse than the plain dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import block_sizes
from tests import linear, reference_linear

pytestmark = pytest.mark.sweep


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "_FEWEST_TOKENS", linear.FEWEST_TOKENS)
        yield


def naive(hidden, kernel, bias, weight, labels):
    """The textbook's, every step in the inputs' own dtype."""
    logits = hidden @ kernel + bias[None]
    shifted = logits - jnp.max(logits, -1, keepdims=True)
    log_probs = shifted - jnp.log(jnp.sum(jnp.exp(shifted), -1, keepdims=True))
    return -weight[labels] * log_probs[np.arange(labels.size), labels]


@pytest.mark.parametrize("division", ["classes", "tokens", "whole"])
@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_error_is_not_above_the_naive_dense_forms(dtype, spread, division):
    rows, width, classes = 48, 64, 512
    draw = np.random.default_rng(0)
    labels = draw.integers(classes, size=rows)
    arrays = {
        "hidden": draw.normal(size=(rows, width)),
        "kernel": spread * draw.normal(size=(width, classes)),
        "bias": spread * draw.normal(size=classes),
        "weight": draw.uniform(0.5, 1.5, size=classes),
    }
    arrays = {key: jnp.asarray(value, dtype) for key, value in arrays.items()}
    how = {
        "classes": {"memory_budget": linear.class_budget(rows, 128, dtype, steps=1)},
        "tokens": {
            "memory_budget": linear.token_budget(classes, 8, dtype, steps=1),
            "reduction": "sum",
        },
        "whole": {},
    }[division]
    cotangent = jnp.asarray(draw.normal(size=rows), dtype)

    def ours(arrays):
        by_row = {"sample_weight": cotangent} if division == "tokens" else {}
        return ce_jax.linear_softmax_cross_entropy(**arrays, labels=labels, **by_row, **how)

    @jax.jit
    def gradients(arrays):
        value, pull = jax.vjp(ours, arrays)
        plain, pull_plain = jax.vjp(lambda arrays: naive(**arrays, labels=labels), arrays)
        onto = jnp.ones((), value.dtype) if division == "tokens" else cotangent.astype(value.dtype)
        return value, pull(onto)[0], plain, pull_plain(cotangent)[0]

    value, slopes, plain, plain_slopes = gradients(arrays)
    exact = {key: np.asarray(x, np.float64) for key, x in arrays.items()}
    scale = np.asarray(cotangent, np.float64)
    losses, truth = reference_linear.closed_form(**exact, labels=labels, cotangent=scale)
    if division == "tokens":
        losses, plain = scale @ losses, scale @ np.asarray(plain, np.float64)

    def error(found, wanted):
        return np.linalg.norm(np.asarray(found, np.float64) - wanted)

    assert error(value, losses) <= error(plain, losses)
    for key, slope in slopes.items():
        assert slope.dtype == arrays[key].dtype
        assert error(slope, truth[key]) <= error(plain_slopes[key], truth[key]), key


@pytest.mark.parametrize(("division", "key"), [("classes", "hidden"), ("tokens", "kernel")])
def test_error_of_second_derivatives_is_not_above_the_naive_dense_forms(division, key):
    """Of what all blocks read, of which there are many, by reverse over reverse."""
    rows, width, classes = 256, 16, 1024
    draw = np.random.default_rng(4)
    labels = draw.integers(classes, size=rows)
    arrays = {
        "hidden": draw.normal(size=(rows, width)),
        "kernel": 0.3 * draw.normal(size=(width, classes)),
    }
    arrays = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    v = jnp.asarray(draw.normal(size=arrays[key].shape), jnp.bfloat16)
    budget = {
        "classes": linear.class_budget(rows, 4, "bfloat16"),
        "tokens": linear.token_budget(classes, linear.FEWEST_TOKENS, "bfloat16"),
    }[division]

    def ours(x):
        return ce_jax.linear_softmax_cross_entropy(
            **arrays | {key: x}, labels=labels, reduction="sum", memory_budget=budget
        )

    def plain(x):
        zeros = {"bias": jnp.zeros(classes, x.dtype), "weight": jnp.ones(classes, x.dtype)}
        return naive(**arrays | {key: x}, **zeros, labels=labels).sum()

    def product(function):
        def along(x):
            return jnp.vdot(jax.grad(function)(x), v, preferred_element_type=jnp.float32)

        return jax.jit(jax.grad(along))(arrays[key])

    def slope(size):
        exact = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
        exact[key] = exact[key] + size * np.asarray(v, np.float64)
        ones = {"bias": np.zeros(classes), "weight": np.ones(classes)}
        return reference_linear.closed_form(
            **exact, **ones, labels=labels, cotangent=np.ones(rows)
        )[1][key]

    def difference(size):
        return (slope(size) - slope(-size)) / (2 * size)

    truth = (4 * difference(1e-4) - difference(2e-4)) / 3

    def error(found):
        return np.linalg.norm(np.asarray(found, np.float64) - truth)

    assert error(product(ours)) <= error(product(plain))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernel_gradient_is_accumulated_in_float32(dtype):
    """1365 blocks of tokens whose gradients all have the same sign."""
    rows = 4095
    budget = linear.token_budget(2, 3, dtype)
    assert block_sizes.token_block(rows, 2, linear.logit_bytes(dtype), budget) == 3
    slopes = jax.jit(
        jax.grad(
            lambda w: ce_jax.linear_softmax_cross_entropy(
                jnp.ones((rows, 1), dtype),
                w,
                jnp.zeros(rows, jnp.int32),
                reduction="sum",
                memory_budget=budget,
            )
        )
    )(jnp.zeros((1, 2), dtype))
    np.testing.assert_allclose(
        np.asarray(slopes, np.float64),
        [[-rows / 2, rows / 2]],
        rtol=2**-8 if dtype[0] == "b" else 2**-11,
    )


def test_hidden_gradient_is_accumulated_in_float32():
    """1024 blocks of classes that each add as much: a bfloat16 sum would stop at 0.25."""
    classes, block = 4096, 4
    kernel = jnp.ones((1, classes), jnp.bfloat16)
    slopes = jax.jit(
        jax.grad(
            lambda h: ce_jax.linear_softmax_statistics(
                h,
                kernel,
                jnp.zeros(2, jnp.int32),
                memory_budget=linear.class_budget(2, block, "bfloat16"),
            ).lse.sum()
        )
    )(jnp.ones((2, 1), jnp.bfloat16))
    np.testing.assert_array_equal(slopes, jnp.ones((2, 1), jnp.bfloat16))


@pytest.mark.parametrize("division", ["classes", "tokens", "forward_mode"])
def test_the_gradient_of_a_float32_bias_is_not_rounded(division):
    """It is the sum of the logits' gradient as it is, not as it was rounded for the matmuls."""
    rows, width, classes = 30, 8, 40
    draw = np.random.default_rng(0)
    labels = draw.integers(classes, size=rows)
    hidden = jnp.asarray(draw.normal(size=(rows, width)), jnp.bfloat16)
    kernel = jnp.asarray(draw.normal(size=(width, classes)), jnp.bfloat16)
    bias = jnp.asarray(draw.normal(size=classes), jnp.float32)
    budget = linear.class_budget(rows, 7, "bfloat16", steps=1)
    how = {
        "classes": {"memory_budget": budget},
        "tokens": {
            "memory_budget": linear.token_budget(classes, 7, "bfloat16", steps=1),
            "reduction": "sum",
        },
        "forward_mode": {"memory_budget": budget, "forward_mode": True},
    }[division]
    slope = jax.jit(
        jax.grad(
            lambda b: jnp.sum(
                ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, bias=b, **how)
            )
        )
    )(bias)
    exact = [np.asarray(x, np.float64) for x in (hidden, kernel)]
    _, truth = reference_linear.closed_form(
        *exact, labels, np.ones(rows), bias=bias, weight=np.ones(classes)
    )
    np.testing.assert_allclose(slope, truth["bias"], rtol=2e-6, atol=2e-6)


def test_derivatives_in_forward_mode_are_accumulated_in_float32():
    """Over 100 blocks of classes: the gradient JAX derives by `hidden`, and second derivatives.

    Sums in bfloat16 are off by 0.01; what is rounded once, to half of the last of 8 bits, by 0.002.
    """
    rows, width, classes = 16, 8, 400
    draw = np.random.default_rng(0)
    labels = draw.integers(classes, size=rows)
    hidden = jnp.asarray(draw.normal(size=(rows, width)), jnp.bfloat16)
    kernel = jnp.asarray(0.3 * draw.normal(size=(width, classes)), jnp.bfloat16)
    v = jnp.asarray(draw.normal(size=hidden.shape), jnp.bfloat16)
    budget = linear.class_budget(rows, 4, "bfloat16")

    def loss(h):
        return ce_jax.linear_softmax_cross_entropy(
            h, kernel, labels, reduction="sum", memory_budget=budget, forward_mode=True
        )

    @jax.jit
    def derivatives(h):
        gradient = jax.grad(loss)
        along = jax.grad(lambda h: jnp.vdot(gradient(h), v, preferred_element_type=jnp.float32))
        return gradient(h), along(h), jax.jvp(gradient, (h,), (v,))[1]

    def slope(size):
        moved = np.asarray(hidden, np.float64) + size * np.asarray(v, np.float64)
        ones = {"bias": np.zeros(classes), "weight": np.ones(classes)}
        _, found = reference_linear.closed_form(
            moved, np.asarray(kernel, np.float64), labels, np.ones(rows), **ones
        )
        return found["hidden"]

    def difference(size):
        return (slope(size) - slope(-size)) / (2 * size)

    product = (4 * difference(1e-4) - difference(2e-4)) / 3
    found = derivatives(hidden)
    for mine, truth in zip(found, (slope(0), product, product), strict=True):
        error = np.linalg.norm(np.asarray(mine, np.float64) - truth)
        assert error < 0.004 * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("division", ["classes", "tokens"])
def test_dtypes(dtype, division):
    """Losses and statistics in float32; each gradient in its own input's dtype."""
    arrays = {
        "hidden": jnp.ones((6, 2), dtype),
        "kernel": jnp.ones((2, 5), dtype),
        "bias": jnp.ones(5, jnp.bfloat16),
        "weight": jnp.ones(5, jnp.float16),
        "sample_weight": jnp.ones(6, jnp.float32),
    }
    how = {
        "classes": {"memory_budget": linear.class_budget(6, 2, dtype, steps=1)},
        "tokens": {"memory_budget": linear.token_budget(5, 3, dtype, steps=1), "reduction": "mean"},
    }[division]

    @jax.jit
    def value_and_gradients(arrays):
        value, pull = jax.vjp(
            lambda arrays: ce_jax.linear_softmax_cross_entropy(
                **arrays, labels=np.zeros(6, np.int8), label_smoothing=0.1, **how
            ),
            arrays,
        )
        return value, pull(jnp.ones_like(value))[0]

    value, slopes = value_and_gradients(arrays)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.log(5.0), rtol=2e-6)
    for key, slope in slopes.items():
        assert (slope.dtype, slope.shape) == (arrays[key].dtype, arrays[key].shape)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32"])
def test_label_dtypes(dtype):
    labels = np.array([0, 3, 99, 127], dtype)
    hidden = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(3, 300)).astype(np.float32)
    wanted = ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels.astype(np.int32))
    np.testing.assert_array_equal(
        ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels), wanted
    )
