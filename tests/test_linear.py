"""The linear form: values and every gradient over the option space, in blocks of both kinds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import block_sizes
from ce_jax._rows import sharded
from tests import comparison, linear, reference, reference_linear
from tests.comparison import accuracy, close
from tests.helpers import covering, named

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("few_tokens", "cheap_programs")]

OPTIONS = {
    "batch": [(7,), (2, 3), ()],
    "class_axis": [-1, 0],
    "budget": ["classes", "tokens", None],
    "bias": [None, "finite", "-inf"],
    "logit_soft_cap": [None, 1.5],
    "padding": [None, *linear.PADDING],
    "weight": [False, True],
    "sample_weight": [False, True],
    "where": [False, True],
    "ignore_index": [None, -100],
    "label_smoothing": [None, 0.1, 1.0],
    "z_loss": [None, 0.3],
    "temperature": [None, "one", "rows"],
    "gamma": [None, 1.7],
    "reduction": ["none", "sum", "mean"],
    "statistics": [False, True],
    "forward_mode": [None, True],
    "dtype": ["float32", "float64"],
}
SCALARS = ("logit_soft_cap", "label_smoothing", "z_loss", "gamma")


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "_FEWEST_TOKENS", linear.FEWEST_TOKENS)
        # Rows that do not count are left out where arrays are known to be on one device.
        patch.setattr(block_sizes, "rows", lambda tokens: linear.FEWEST_TOKENS)
        patch.setattr(sharded, "_may_be_sharded", lambda: False)
        jax.clear_caches()
        yield


def check_case(case):
    case = {key: value for key, value in case.items() if value is not None}
    dtype, budget = case.pop("dtype"), case.pop("budget", None)
    static = {key: case.pop(key) for key in ("forward_mode",) if key in case}
    statistics = case.pop("statistics")
    arguments = linear.linear_arguments(**case)
    classes = arguments["kernel"].shape[case["class_axis"]]
    rows = arguments["labels"].size
    summed = case["reduction"] != "none" and not static
    steps = sum(key in case for key in ("bias", "logit_soft_cap", "padding", "temperature"))
    if budget is not None:
        masked = "where" in arguments or "ignore_index" in arguments
        at_once = -(-rows // 2) if masked else rows
        static["memory_budget"] = {
            "classes": linear.class_budget(at_once, 2, dtype, steps),
            "tokens": linear.token_budget(classes, linear.FEWEST_TOKENS, dtype, steps),
        }[budget]
        work = at_once, classes, linear.logit_bytes(dtype, steps), static["memory_budget"]
        by_token = block_sizes.token_block(*work)
        if budget == "tokens" and rows > 1 and summed:
            assert by_token == linear.FEWEST_TOKENS
        if budget == "classes" and rows > 1:
            assert (block_sizes.class_block(*work), by_token) == (2, None)
    ours, truth = linear.loss, reference_linear.linear_softmax_cross_entropy
    if statistics:
        ours, truth = linear.loss_and_statistics, linear.true_loss_and_statistics
    scalars = [key for key in SCALARS if key in case]
    comparison.compare(ours, truth, arguments, scalars, dtype=jnp.dtype(dtype), **static)


@pytest.mark.parametrize("case", covering(**OPTIONS), ids=named)
def test_options(case):
    """Every two options meet; gradients of all arrays and of all float options."""
    check_case(case)


ALL = {
    "bias": "-inf",
    "logit_soft_cap": 1.5,
    "padding": "numbers",
    "weight": True,
    "sample_weight": True,
    "where": True,
    "ignore_index": -100,
    "label_smoothing": 0.1,
    "z_loss": 0.3,
    "temperature": "rows",
    "gamma": 1.7,
    "class_axis": 0,
    "batch": (2, 5),
    "dtype": "float64",
}


@pytest.mark.parametrize("budget", ["classes", "tokens"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_options_together(budget, reduction):
    check_case(ALL | {"budget": budget, "reduction": reduction, "statistics": False})


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_all_options_together_with_statistics(reduction):
    check_case(ALL | {"budget": "classes", "reduction": reduction, "statistics": True})


def test_the_closed_form():
    """What the tests of many classes compare with is the same truth."""
    arguments = linear.linear_arguments(bias="finite", weight=True)
    scalars = {"logit_soft_cap": 1.5, "label_smoothing": 0.1, "z_loss": 0.3}
    arrays = {key: value for key, value in arguments.items() if key != "class_axis"}
    cotangent = np.random.default_rng(1).normal(size=7)
    losses, gradients = reference_linear.closed_form(**arrays, **scalars, cotangent=cotangent)
    truth = reference_linear.linear_softmax_cross_entropy
    np.testing.assert_allclose(losses, truth(**arguments, **scalars), rtol=1e-13)
    for key, gradient in gradients.items():
        slope = reference.vjp(truth, arguments | scalars, key, cotangent)
        np.testing.assert_allclose(gradient, slope, rtol=1e-12, atol=1e-14)


def check_many_classes(classes, budget, *, rows=3, width=2, spread=1.0, reduction="none"):
    """Ids among them the first and the last class; float32."""
    arguments = linear.linear_arguments(
        batch=(rows,), width=width, classes=classes, bias="finite", weight=True
    )
    del arguments["class_axis"]
    arguments["labels"][[0, -1]] = 0, classes - 1
    for key in ("kernel", "bias"):
        arguments[key] *= spread
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in arguments.items() if k != "labels"}
    scalars = {"logit_soft_cap": 3.0, "label_smoothing": 0.1, "z_loss": 0.01}
    cotangent = np.random.default_rng(1).normal(size=rows) if reduction == "none" else 1.0

    @jax.jit
    def value_and_gradients(arrays):
        value, pull = jax.vjp(
            lambda arrays: ce_jax.linear_softmax_cross_entropy(
                **arrays,
                labels=arguments["labels"],
                **scalars,
                memory_budget=budget,
                reduction=reduction,
            ),
            arrays,
        )
        return value, pull(jnp.asarray(cotangent, jnp.float32))[0]

    value, gradients = value_and_gradients(arrays)
    losses, slopes = reference_linear.closed_form(
        **arrays,
        labels=arguments["labels"],
        cotangent=np.broadcast_to(np.asarray(cotangent, np.float32), rows),
        **scalars,
    )
    close(value, losses if reduction == "none" else losses.sum(), accuracy("float32"))
    # Gradients are differences of terms of the size of the weights.
    size = max(1.0, np.abs(losses).max())
    for key, gradient in gradients.items():
        close(gradient, slopes[key], accuracy("float32"), f"d {key}", size)


BLOCK = 128


@pytest.mark.parametrize("classes", [1, 2, 100, 127, 128, 129, 192, 256, 257, 384, 1000])
def test_every_fit_of_classes_and_blocks(classes):
    """One class; a block less one, one, one more, one and a half, two, and more."""
    budget = linear.class_budget(3, BLOCK, steps=2)
    chosen = block_sizes.class_block(3, classes, linear.logit_bytes("float32", 2), budget)
    assert chosen == min(classes, BLOCK)
    check_many_classes(classes, budget)


def test_the_ragged_block_last(monkeypatch):
    """As for a TPU; elsewhere it is the first."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    jax.clear_caches()  # it is asked when a loss is traced
    check_many_classes(300, linear.class_budget(3, BLOCK, steps=2))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7])
def test_every_fit_of_rows_and_blocks(rows):
    """With room for three rows, four are divided evenly."""
    budget = linear.token_budget(11, 3, steps=2)
    chosen = block_sizes.token_block(rows, 11, linear.logit_bytes("float32", 2), budget)
    assert chosen == (2 if rows == 4 else min(rows, 3))
    check_many_classes(11, budget, rows=rows, reduction="sum")


@pytest.mark.usefixtures("one_device")  # whose tiles of tokens are read in parts
@pytest.mark.parametrize("classes", [50257, 151936])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_vocabularies(classes, reduction):
    """In eight blocks of classes, or in two of tokens."""
    budget = linear.class_budget(5, -(-classes // 8), steps=2)
    if reduction == "sum":
        budget = linear.token_budget(classes, 3, steps=2)
    check_many_classes(classes, budget, rows=5, reduction=reduction)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("spread", [1e-3, 1e-6])
def test_small_logits(spread, reduction):
    budget = linear.class_budget(5, 128, steps=2)
    if reduction == "sum":
        budget = linear.token_budget(300, 3, steps=2)
    check_many_classes(300, budget, rows=5, spread=spread, reduction=reduction)


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(batch, reduction):
    hidden, kernel = jnp.ones((*batch, 3)), jnp.ones((3, 4))
    labels = jnp.zeros(batch, jnp.int32)
    value, pull = jax.vjp(
        lambda h, w, b: ce_jax.linear_softmax_cross_entropy(
            h, w, labels, bias=b, label_smoothing=0.1, reduction=reduction
        ),
        *(hidden, kernel, jnp.ones(4)),
    )
    np.testing.assert_array_equal(value, np.zeros(batch if reduction == "none" else ()))
    for gradient, like in zip(pull(jnp.ones_like(value)), ((*batch, 3), (3, 4), (4,)), strict=True):
        np.testing.assert_array_equal(gradient, np.zeros(like))


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("field", ["lse", "label_logit", "log_prob", "entropy"])
def test_each_statistic(field, forward_mode):
    """Alone, so that the other cotangents are zero; every option of the function."""
    arguments = linear.linear_arguments(
        batch=(2, 3),
        class_axis=0,
        bias="-inf",
        logit_soft_cap=1.5,
        padding="garbage",
        where=True,
        ignore_index=-100,
    )
    comparison.compare(
        lambda **arguments: getattr(ce_jax.linear_softmax_statistics(**arguments), field),
        lambda **arguments: getattr(reference_linear.linear_softmax_statistics(**arguments), field),
        arguments,
        ["logit_soft_cap"],
        dtype=jnp.float64,
        memory_budget=linear.class_budget(6, 2, "float64", steps=3),
        forward_mode=forward_mode,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_argmax_is_the_first_of_the_largest(dtype):
    """Ties within a block, between blocks and with the padding."""
    kernel = jnp.zeros((1, 9), dtype).at[0, jnp.array([3, 4, 6, 8])].set(2)
    hidden = jnp.array([[1], [-1], [0]], dtype)
    for block in (2, 3, None):  # with 3, what is left is the last two classes
        budget = None if block is None else linear.class_budget(3, block, dtype, steps=1)
        found = ce_jax.linear_softmax_statistics(
            hidden, kernel, jnp.zeros(3, jnp.int32), num_classes=8, memory_budget=budget
        )
        np.testing.assert_array_equal(found.argmax, [3, 0, 0])
        assert found.argmax.dtype == jnp.int32


def test_statistics_with_the_loss_are_those_of_the_function():
    """And accuracy comes from them."""
    arguments = linear.linear_arguments(batch=(20,), ignore_index=-100, bias="finite")
    hidden, kernel, bias = (
        jnp.asarray(arguments.pop(key), jnp.float32) for key in ("hidden", "kernel", "bias")
    )
    loss, found = ce_jax.linear_softmax_cross_entropy(
        hidden, kernel, bias=bias, **arguments, reduction="mean", return_statistics=True
    )
    alone = ce_jax.linear_softmax_statistics(hidden, kernel, bias=bias, **arguments)
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    counts = arguments["labels"] != -100
    np.testing.assert_allclose(loss, -found.log_prob[counts].mean(), rtol=1e-6)
    z = reference_linear.logits(*(np.asarray(x, np.float64) for x in (hidden, kernel, bias)))
    np.testing.assert_array_equal(found.argmax[counts], z.argmax(-1)[counts])


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_loss_of_the_log_probability_with_its_own_constants(gamma, reduction):
    """Arrays and traced numbers in its closure, and none."""
    arguments = linear.linear_arguments()
    inputs = [jnp.asarray(arguments[key], jnp.float32) for key in ("hidden", "kernel")]
    budget = linear.token_budget(7, 3) if reduction == "sum" else linear.class_budget(7, 2)

    def ours(*inputs):
        losses = ce_jax.linear_softmax_cross_entropy(
            *inputs,
            arguments["labels"],
            log_prob_loss=lambda log_prob: linear.focal(log_prob, gamma),
            memory_budget=budget,
            reduction=reduction,
        )
        return losses.sum()

    def dense(hidden, kernel):
        log_probs = jax.nn.log_softmax(hidden @ kernel)
        return linear.focal(log_probs[np.arange(7), arguments["labels"]], gamma).sum()

    value, gradients = jax.value_and_grad(ours, (0, 1))(*inputs)
    wanted, slopes = jax.value_and_grad(dense, (0, 1))(*inputs)
    np.testing.assert_allclose(value, wanted, rtol=2e-6)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), gradients, slopes)


@pytest.mark.parametrize("division", ["classes", "tokens"])
def test_gradient_accumulation_is_exact(division):
    """Sums over sums of denominators, whichever way a part is divided."""
    arguments = linear.linear_arguments(batch=(12,), weight=True, ignore_index=-100, bias="finite")
    labels, weight = jnp.asarray(arguments["labels"]), jnp.asarray(arguments["weight"], jnp.float32)
    sample_weight = jnp.linspace(0.5, 2.0, 12)
    hidden = jnp.nan_to_num(jnp.asarray(arguments["hidden"], jnp.float32))
    head = tuple(jnp.asarray(arguments[key], jnp.float32) for key in ("kernel", "bias"))

    def loss(head, part, reduction, **options):
        kernel, bias = head
        return ce_jax.linear_softmax_cross_entropy(
            *(hidden[part], kernel, labels[part]),
            bias=bias,
            weight=weight,
            sample_weight=sample_weight[part],
            ignore_index=-100,
            label_smoothing=0.1,
            z_loss=0.1,
            reduction=reduction,
            **options,
        )

    @functools.partial(jax.jit, static_argnames="budget")
    def part_of(head, rows, budget):
        def total(head):
            return loss(head, rows, "sum", memory_budget=budget)

        denominator = ce_jax.mean_denominator(
            labels[rows], weight=weight, sample_weight=sample_weight[rows], ignore_index=-100
        )
        return *jax.value_and_grad(total)(head), denominator

    budget = linear.class_budget(4, 2, steps=1)
    if division == "tokens":
        budget = linear.token_budget(7, 3, steps=1)
    parts = [part_of(head, np.arange(12).reshape(3, 4)[i], budget) for i in range(3)]
    total, gradient, denominator = jax.tree.map(lambda *x: sum(x), *parts)
    wanted, slopes = jax.jit(jax.value_and_grad(lambda head: loss(head, np.arange(12), "mean")))(
        head
    )
    np.testing.assert_allclose(total / denominator, wanted, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / denominator, b, rtol=1e-5, atol=1e-6),
        gradient,
        slopes,
    )
