"""The linear form as people train it: a float32 kernel, and hidden states in 16 bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import linear, reference_linear
from tests.mesh import LAYOUTS
from tests.test_memory import temporaries

pytestmark = pytest.mark.usefixtures("cheap_programs")

ROWS, WIDTH, CLASSES = 24, 32, 128
NARROW = ["bfloat16", "float16"]
WAYS = {
    "classes": {"memory_budget": linear.class_budget(ROWS, 32, "bfloat16", steps=1)},
    "tokens": {"memory_budget": 10**9, "reduction": "sum"},
    "forward": {"forward_mode": True},
}


def problem(dtype, seed=0):
    draw = np.random.default_rng(seed)
    wide = {
        "kernel": 0.3 * draw.normal(size=(WIDTH, CLASSES)),
        "bias": draw.normal(size=CLASSES),
        "weight": draw.uniform(0.5, 1.5, size=CLASSES),
    }
    arrays = {key: jnp.asarray(x, jnp.float32) for key, x in wide.items()}
    hidden = jnp.asarray(draw.normal(size=(ROWS, WIDTH)), dtype)
    labels = jnp.asarray(draw.integers(CLASSES, size=ROWS))
    cotangent = jnp.asarray(draw.normal(size=ROWS), jnp.float32)
    return {"hidden": hidden, **arrays}, labels, cotangent


def truth(arrays, labels, cotangent, dtype):
    """Of the kernel as it multiplies: rounded to the dtype of the hidden states."""
    kernel = arrays["kernel"].astype(dtype)
    exact = {k: np.asarray(x, np.float64) for k, x in {**arrays, "kernel": kernel}.items()}
    return reference_linear.closed_form(**exact, labels=np.asarray(labels), cotangent=cotangent)


def errors(found, exact):
    exact = np.asarray(exact)
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", NARROW)
def test_values_and_gradients(dtype, way):
    """Each gradient in its argument's dtype, none worse than where the kernel is cast outside."""
    arrays, labels, cotangent = problem(dtype)
    options = WAYS[way]
    summed = "reduction" in options

    def gradients(cast):
        def loss(arrays):
            kernel = arrays["kernel"].astype(dtype) if cast else arrays["kernel"]
            weights = {"sample_weight": cotangent} if summed else {}
            return ce_jax.linear_softmax_cross_entropy(
                **(arrays | {"kernel": kernel}), labels=labels, **weights, **options
            )

        value, pull = jax.vjp(loss, arrays)
        return value, pull(jnp.ones((), jnp.float32) if summed else cotangent)[0]

    (value, ours), (_, outside) = (jax.jit(gradients, static_argnums=0)(x) for x in (False, True))
    losses, exact = truth(arrays, labels, np.asarray(cotangent, np.float64), dtype)
    expected = losses @ np.asarray(cotangent, np.float64) if summed else losses
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    for key, gradient in ours.items():
        assert gradient.dtype == arrays[key].dtype
        limit = errors(outside[key], exact[key])
        assert errors(gradient, exact[key]) <= 1.01 * limit + 1e-7, key
    if way != "forward":  # there JAX rounds each block's to the dtype that multiplies
        error, limit = (errors(x["kernel"], exact["kernel"]) for x in (ours, outside))
        # XLA for a GPU leaves out the rounding of the other gradient too, and both are the same.
        assert error < limit or (error == limit and jax.default_backend() != "cpu")


@pytest.mark.usefixtures("usual_programs")
def test_the_kernels_gradient_is_the_accumulator():
    """1024 tokens that each add 2**-10 to what is 1 already: rounded once it would stay 1."""
    rows, classes = 1025, 2
    hidden = jnp.full((rows, 1), 2.0**-10, jnp.bfloat16).at[0].set(1.0)
    labels = jnp.zeros(rows, jnp.int32)
    for budget in (1, 10**9):
        slope = jax.grad(
            lambda k, budget=budget: ce_jax.linear_softmax_cross_entropy(
                hidden, k, labels, reduction="sum", memory_budget=budget
            )
        )(jnp.zeros((1, classes), jnp.float32))
        np.testing.assert_allclose(slope, [[-1.0, 1.0]], rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
def test_by_tokens_there_is_one_narrow_kernel_and_one_block_of_logits():
    """The float32 gradient of the kernel is a result: no second buffer of its size exists."""
    rows, width, classes, block = 4096, 1024, 16384, 1024
    narrow, logits = 2 * width * classes, classes * block * 6
    used = temporaries(
        jax.value_and_grad(
            lambda h, k, y: ce_jax.linear_softmax_cross_entropy(
                h, k, y, reduction="mean", memory_budget=logits
            ),
            (0, 1),
        ),
        ((rows, width), jnp.bfloat16),
        ((width, classes), jnp.float32),
        ((rows,), jnp.int32),
    )
    # A CPU multiplies in float32, and widens what is narrow.
    assert used <= 3 * narrow + 2 * logits + rows * width * 4


@pytest.mark.parametrize("class_axis", [0, 1])
def test_other_forms_take_it_too(class_axis):
    """Statistics, the sampled form and distillation; gradients in the dtypes of the arguments."""
    arrays, labels, cotangent = problem("bfloat16")
    hidden, kernel, bias = (arrays[k] for k in ("hidden", "kernel", "bias"))
    kernel = kernel if class_axis else kernel.T
    negatives = ce_jax.log_uniform_negatives(jax.random.key(0), CLASSES, 16)
    forms = {
        "statistics": lambda h, k, b: ce_jax.linear_softmax_statistics(
            h, k, labels, bias=b, class_axis=class_axis
        ).log_prob,
        "sampled": lambda h, k, b: ce_jax.linear_sampled_softmax_cross_entropy(
            h, k, labels, negatives, bias=b, class_axis=class_axis
        ),
        "distillation": lambda h, k, b: ce_jax.linear_distillation_loss(
            h, k, teacher_hidden=-h, teacher_kernel=k, bias=b, class_axis=class_axis,
            teacher_class_axis=class_axis,
        ),
    }  # fmt: skip
    for name, form in forms.items():
        both = []
        for cast in (False, True):
            inputs = hidden, kernel.astype("bfloat16") if cast else kernel, bias
            value, pull = jax.vjp(form, *inputs)
            slopes = pull(cotangent)
            assert [x.dtype for x in slopes] == [x.dtype for x in inputs], name
            both.append((value, *slopes))
        for ours, outside in zip(*both, strict=True):
            a, b = (np.asarray(x, np.float64) for x in (ours, outside))
            np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-2 * np.abs(b).max(), err_msg=name)


@pytest.mark.cpu
@pytest.mark.parametrize("layout", ["fsdp", "fsdp-tensor"])
def test_devices_exchange_the_narrow_kernel(layout):
    """Values as on one device; what is gathered is in bfloat16, what is summed in float32."""
    layout = LAYOUTS[layout]
    arrays, labels, _ = problem("bfloat16")
    mesh = layout.mesh()
    placed = {name: layout.place(mesh, name, x) for name, x in arrays.items()}
    loss = ce_jax.on_mesh(ce_jax.linear_softmax_cross_entropy, mesh, **layout.spread)

    def step(loss, arrays, labels):
        return jax.value_and_grad(lambda arrays: loss(**arrays, labels=labels, reduction="mean"))(
            arrays
        )

    program = jax.jit(lambda arrays, labels: step(loss, arrays, labels))
    value, slopes = program(placed, labels)
    plain, expected = step(ce_jax.linear_softmax_cross_entropy, arrays, labels)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    share = np.asarray(arrays["weight"], np.float64)[np.asarray(labels)]
    _, exact = truth(arrays, labels, np.full(ROWS, 1 / share.sum()), "bfloat16")
    for name, slope in slopes.items():
        assert slope.dtype == arrays[name].dtype
        # Each rounds the logits' gradient once, before or after it is divided.
        assert errors(slope, exact[name]) <= 2 * errors(expected[name], exact[name]) + 1e-6, name
    lowered = program.lower(placed, labels)
    assert re.search(r'"?stablehlo\.all_gather"?.*-> tensor<[\dx]+xbf16>', lowered.as_text())
    # The wide kernel has a slope and no reader: only one gathering is left of both.
    gathered = re.findall(rf"= \w+\[{WIDTH},\d+\].* all-gather\(", lowered.compile().as_text())
    assert len(gathered) == 1


def test_hidden_states_wider_than_the_kernel_are_an_error():
    with pytest.raises(TypeError, match="kernel must have the dtype of hidden, float32, or a wid"):
        ce_jax.linear_softmax_cross_entropy(
            jnp.ones((2, 3)), jnp.ones((3, 4), jnp.bfloat16), jnp.array([0, 1])
        )
    with pytest.raises(TypeError, match="bfloat16"):
        ce_jax.linear_softmax_cross_entropy(
            jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.float16), jnp.array([0, 1])
        )


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize(("statistics", "axis"), [(False, None), (True, None), (False, 0)], ids=str)
def test_a_sum_takes_three_matmuls(statistics, axis):
    """Also if its axes are named. With statistics beside it, too, whose slopes take more."""
    arrays, labels, _ = problem("bfloat16")

    def step(of):
        def loss(arrays):
            found = ce_jax.linear_softmax_cross_entropy(
                **arrays,
                labels=labels,
                reduction="mean",
                memory_budget=10**9,
                return_statistics=statistics,
                reduction_axis=axis,
            )
            return of(*found) if statistics else found

        return str(jax.make_jaxpr(jax.grad(loss))(arrays)).count("dot_general[")

    assert step(lambda loss, found: loss) == 3
    if statistics:
        assert step(lambda loss, found: loss + jnp.sum(found.entropy)) > 3
