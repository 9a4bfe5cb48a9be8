"""JAX's transformations over the linear form, in float64, against the truth's derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import block_sizes
from tests import linear, reference, reference_linear
from tests.helpers import compilations, inner_programs
from tests.test_transforms import (
    FORWARD,
    GRADIENTS,
    HESSIANS,
    PRODUCTS,
    every_result,
    repeated,
)

pytestmark = pytest.mark.usefixtures("x64", "few_tokens", "cheap_programs")

ROWS, WIDTH, CLASSES = 4, 2, 5
LABELS = np.array([0, 4, -100, 2])
HIDDEN, KERNEL, BIAS = (slice(0, 8), slice(8, 18), slice(18, 23))
OPTIONS = {
    "logit_soft_cap": 2.0,
    "weight": np.linspace(0.5, 1.5, CLASSES),
    "sample_weight": np.array([1.0, 0.3, 1.0, 2.0]),
    "ignore_index": -100,
    "label_smoothing": 0.1,
    "z_loss": 0.05,
    "gamma": 1.7,
}
X = np.random.default_rng(0).normal(size=23)
COTANGENT = np.array([0.7, -1.3, 2.0, 0.4])
BY_CLASS = {"memory_budget": linear.class_budget(ROWS, 2, "float64", steps=2)}
BY_TOKEN = {
    "memory_budget": linear.token_budget(CLASSES, 2, "float64", steps=2),
    "reduction": "mean",
}


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "_FEWEST_TOKENS", 2)
        by_class, by_token = (x["memory_budget"] for x in (BY_CLASS, BY_TOKEN))
        logit = linear.logit_bytes("float64", steps=2)
        assert block_sizes.class_block(ROWS, CLASSES, logit, by_class) == 2
        assert block_sizes.token_block(ROWS, CLASSES, logit, by_token) == 2
        yield


def inputs(x):
    """Hidden states, embedding table and bias, all of them parts of one vector."""
    return {
        "hidden": x[HIDDEN].reshape(ROWS, WIDTH),
        "kernel": x[KERNEL].reshape(CLASSES, WIDTH),
        "bias": x[BIAS],
        "labels": LABELS,
        "class_axis": 0,
    }


def scalar(x, **static):
    """A scalar in which every row has its own share."""
    value = linear.loss(**inputs(x), **OPTIONS, **static)
    return jnp.vdot(COTANGENT.astype(value.dtype), value) if value.ndim else value


def truth(x, reduction="none"):
    return reference_linear.linear_softmax_cross_entropy(
        **inputs(x), **OPTIONS, reduction=reduction
    )


DIVISIONS = {"classes": BY_CLASS, "tokens": BY_TOKEN}
every_division = pytest.mark.parametrize("division", DIVISIONS)


def cotangent(division):
    return 1.0 if "reduction" in DIVISIONS[division] else COTANGENT


@functools.cache
def gradient(division):
    reduction = DIVISIONS[division].get("reduction", "none")
    return reference.vjp(
        functools.partial(truth, reduction=reduction), {"x": X}, "x", cotangent(division)
    )


@functools.cache
def hessian(division):
    reduction = DIVISIONS[division].get("reduction", "none")
    return reference.hessian(
        functools.partial(truth, reduction=reduction), {"x": X}, "x", cotangent(division)
    )


def function(division, **more):
    return functools.partial(scalar, **DIVISIONS[division], **more)


@every_division
def test_gradient(division):
    for name, found in every_result(GRADIENTS, function(division), X):
        np.testing.assert_allclose(found, gradient(division), rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.sweep
@pytest.mark.parametrize("transform", ["hessian", "reverse over reverse"])
@every_division
def test_hessian(division, transform):
    found = jax.jit(lambda x: HESSIANS[transform](function(division), x))(X)
    np.testing.assert_allclose(found, hessian(division), rtol=0, atol=1e-9)


@every_division
def test_hessian_vector_product(division):
    v = np.random.default_rng(2).normal(size=X.shape)
    for name, found in every_result(PRODUCTS, function(division), X, v):
        np.testing.assert_allclose(found, hessian(division) @ v, rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("division", "transform"), [*(("classes", name) for name in FORWARD), ("tokens", "jvp")]
)
def test_forward_mode(division, transform):
    """With a mean too, which then is computed by classes."""
    v = np.random.default_rng(2).normal(size=X.shape)
    f = function(division, forward_mode=True)
    found = jax.jit(lambda x, v: FORWARD[transform](f, x, v))(X, v)
    np.testing.assert_allclose(found, gradient(division) @ v, rtol=1e-11)


@pytest.mark.sweep
def test_second_order_of_forward_mode():
    f = function("classes", forward_mode=True)
    found = jax.jit(jax.jacrev(jax.jacfwd(f)))(X)
    np.testing.assert_allclose(found, hessian("classes"), rtol=0, atol=1e-9)


def test_the_fused_derivative_says_so_in_forward_mode():
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(function("classes"), (X,), (X,))


@every_division
def test_vmap_over_everything(division):
    """Labels, weights, masks and the float options batch like the inputs do."""
    draw = np.random.default_rng(0)
    smooth = {
        "hidden": draw.normal(size=(3, 4, 2)),
        "kernel": draw.normal(size=(3, 2, 5)),
        "bias": draw.normal(size=(3, 5)),
        "weight": draw.uniform(0.5, 2.0, size=(3, 5)),
        "sample_weight": draw.uniform(0.5, 2.0, size=(3, 4)),
        "label_smoothing": draw.uniform(0.1, 0.5, size=3),
        "z_loss": draw.uniform(0.1, 0.5, size=3),
        "logit_soft_cap": draw.uniform(1.0, 2.0, size=3),
        "gamma": draw.uniform(1.0, 2.0, size=3),
    }
    others = {"labels": draw.integers(5, size=(3, 4)), "where": draw.random((3, 4)) < 0.7}

    def gradients(smooth, others):
        def total(smooth):
            value = linear.loss(**smooth, **others, **DIVISIONS[division])
            return jnp.vdot(COTANGENT, value) if value.ndim else value

        return jax.value_and_grad(total)(smooth)

    together = jax.jit(jax.vmap(gradients))(smooth, others)
    alone = jax.jit(gradients)
    for i in range(3):
        wanted = alone(*jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), (smooth, others)))
        found = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_vmap_of_the_statistics():
    stacked = repeated(jnp.asarray(X))

    def statistics(x):
        return ce_jax.linear_softmax_statistics(**inputs(x), ignore_index=-100, memory_budget=96)

    found = jax.jit(jax.vmap(statistics))(stacked)
    wanted = reference_linear.linear_softmax_statistics(**inputs(X), ignore_index=-100)
    for name in wanted._fields:
        np.testing.assert_allclose(getattr(found, name)[1], getattr(wanted, name), rtol=1e-12)


def dot_products(program):
    """The dtypes of the factors of each matmul in a program, loops counted once."""
    found = []
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            found.append({x.aval.dtype.name for x in eqn.invars})
        for inner in inner_programs(eqn):
            found += dot_products(inner)
    return found


def accumulators(program):
    """The dtypes in which the products of each matmul in a program are asked for."""
    found = []
    for eqn in program.eqns:
        if eqn.primitive.name == "dot_general":
            found.append(eqn.outvars[0].aval.dtype.name)
        for inner in inner_programs(eqn):
            found += accumulators(inner)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_products_are_asked_for_in_float32(dtype, forward_mode):
    """In every loss with a matmul; where JAX derives the derivative, in the value at least."""
    x, y = jnp.ones((6, 3), dtype), jnp.ones((3, 5), dtype)
    labels = np.zeros(6, np.int32)
    negatives = ce_jax.Negatives(jnp.array([1, 2]), jnp.zeros(2))
    losses = {
        "linear": (ce_jax.linear_softmax_cross_entropy, (x, y), (labels,), {}),
        "sum": (ce_jax.linear_softmax_cross_entropy, (x, y), (labels,), {"reduction": "sum"}),
        "sampled": (
            ce_jax.linear_sampled_softmax_cross_entropy,
            (x, y),
            (labels, negatives),
            {},
        ),
        "distillation": (
            lambda x, y, **options: ce_jax.linear_distillation_loss(
                x, y, teacher_hidden=x, teacher_kernel=y, **options
            ),
            (x, y),
            (),
            {},
        ),
        "Jensen-Shannon": (
            lambda x, y, **options: ce_jax.linear_jensen_shannon_loss(
                x, y, teacher_hidden=x, teacher_kernel=y, **options
            ),
            (x, y),
            (),
            {},
        ),
        "top k": (
            ce_jax.linear_top_k_distillation_loss,
            (x, y),
            (labels[:, None], jnp.zeros((6, 1))),
            {},
        ),
        "info_nce": (ce_jax.info_nce_loss, (x, x), (), {}),
        "clip": (ce_jax.clip_loss, (x, x), (), {}),
        "siglip": (ce_jax.siglip_loss, (x, x), (), {}),
        "supervised": (ce_jax.supervised_contrastive_loss, (x,), (labels,), {}),
    }
    for name, (loss, smooth, rest, options) in losses.items():

        def total(*smooth, loss=loss, rest=rest, options=options):
            return jnp.sum(loss(*smooth, *rest, forward_mode=forward_mode, **options))

        function = total if forward_mode else jax.grad(total, tuple(range(len(smooth))))
        found = accumulators(jax.make_jaxpr(function)(*smooth).jaxpr)
        assert found, name
        assert set(found) == {"float32"}, name


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("division", "matmuls"), [("classes", 4), ("tokens", 3)])
def test_matmuls(division, matmuls, dtype):
    """Four by classes, three by tokens, and one for the value alone; one loop body each.

    All in the dtype of the inputs: wider factors take an accelerator many times as long.
    """
    # A CPU adds up a few classes by a product too.
    arguments = jnp.ones((6, 2), dtype), jnp.ones((2, 80), dtype)
    budget = {
        "classes": linear.class_budget(6, 40, dtype),
        "tokens": linear.token_budget(80, 3, dtype),
    }[division]
    reduction = "none" if division == "classes" else "sum"

    def loss(hidden, kernel):
        return ce_jax.linear_softmax_cross_entropy(
            hidden, kernel, np.zeros(6, int), reduction=reduction, memory_budget=budget
        ).sum()

    assert dot_products(jax.make_jaxpr(loss)(*arguments).jaxpr) == [{dtype}]
    gradients = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arguments)
    assert dot_products(gradients.jaxpr) == [{dtype}] * matmuls


@every_division
def test_one_compilation_per_shape(division):
    """Whatever the float options and the constants of `log_prob_loss` are."""
    chex.clear_trace_counter()

    def loss(x, rate):
        options = OPTIONS | dict.fromkeys(("label_smoothing", "z_loss", "logit_soft_cap"), rate)
        value = linear.loss(**inputs(x), **(options | {"gamma": rate}), **DIVISIONS[division])
        return value.sum()

    step = jax.jit(jax.grad(chex.assert_max_traces(loss, n=1), argnums=(0, 1)))
    step(X, 0.5)
    with compilations() as seen:
        slopes = [step(X * i, rate)[1] for i, rate in enumerate((0.6, 0.7))]
        assert not seen
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_eager_calls_run_one_cached_program(reduction):
    arguments = {
        "hidden": np.ones((6, 2)),
        "kernel": np.ones((2, 4)),
        "labels": np.zeros(6, int),
        "log_prob_loss": jnp.negative,
        "reduction": reduction,
    }
    with compilations() as seen:
        for rate in (0.1, 0.2, 0.2):
            ce_jax.linear_softmax_cross_entropy(
                **arguments, label_smoothing=rate, z_loss=rate, logit_soft_cap=rate
            )
        assert len(seen) == 1


def test_statistics_run_one_cached_program():
    arguments = np.ones((6, 2)), np.ones((2, 4)), np.zeros(6, int)
    with compilations() as seen:
        for cap in (1.0, 2.0):
            ce_jax.linear_softmax_statistics(*arguments, logit_soft_cap=cap)
        assert len(seen) == 1


@pytest.mark.sweep
@pytest.mark.usefixtures("frozen_heap")
@every_division
def test_no_tracer_leaks(division):
    with jax.checking_leaks():
        jax.jit(jax.grad(function(division)))(X)
