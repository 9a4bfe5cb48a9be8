"""The statistics of the softmax: each value, and each but argmax differentiable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from experiments.compile_only import passes
from tests import reference
from tests.comparison import accuracy, close, result_dtype
from tests.helpers import LAYOUTS, covering, named, softmax_arguments

pytestmark = pytest.mark.sweep

FIELDS = ("lse", "label_logit", "log_prob", "entropy")


def statistics_arguments(**case):
    """As for the losses, but every row counts, so none holds garbage."""
    arguments = softmax_arguments(**case)
    if case.get("where") == "classes":
        shape, axis = arguments["logits"].shape, arguments["axis"]
        axes = axis if isinstance(axis, tuple) else (axis,)
        empty = ~arguments["where"].any(axis=axes, keepdims=True)
        arguments["where"] = arguments["where"] | np.broadcast_to(empty, shape)
        logits = np.random.default_rng(7).normal(size=shape)
        arguments["logits"] = np.where(empty, logits, arguments["logits"])
    return arguments


@pytest.mark.parametrize(
    "case",
    covering(
        layout=list(LAYOUTS),
        where=[None, "classes"],
        masked=[False, True],
        forward_mode=[False, True],
        dtype=["float32", "float64", "bfloat16"],
    ),
    ids=named,
)
def test_values_and_gradients(case):
    dtype, forward_mode = jnp.dtype(case.pop("dtype")), case.pop("forward_mode")
    arguments = statistics_arguments(**case)
    with jax.enable_x64(dtype == jnp.float64):
        logits = jnp.asarray(arguments.pop("logits"), dtype)
        labels, axis, where = arguments["labels"], arguments["axis"], arguments.get("where")

        @jax.jit
        def statistics(logits, labels, where, cotangents):
            def of(logits):
                found = ce_jax.softmax_statistics(
                    logits, labels, axis, where, forward_mode=forward_mode
                )
                return found[:4], found

            _, pull, found = jax.vjp(of, logits, has_aux=True)
            return found, jax.vmap(pull)(cotangents)[0]

        # One field at a time: all cotangents but its own are 0.
        cotangents = tuple(
            jnp.zeros((4, *labels.shape), result_dtype(dtype))
            .at[i]
            .set(np.random.default_rng(i).normal(size=labels.shape))
            for i in range(4)
        )
        found, slopes = statistics(logits, labels, where, cotangents)
    exact = {"logits": np.asarray(logits, np.float64), **arguments}
    truth = reference.softmax_statistics(**exact)
    np.testing.assert_array_equal(found.argmax, truth.argmax)
    for i, name in enumerate(FIELDS):
        assert getattr(found, name).dtype == result_dtype(dtype)
        close(getattr(found, name), getattr(truth, name), accuracy(result_dtype(dtype)), name)

        def field(name=name, **exact):
            return getattr(reference.softmax_statistics(**exact), name)

        slope = reference.vjp(field, exact, "logits", np.asarray(cotangents[i][i], np.float64))
        close(slopes[i], slope, accuracy(dtype), f"d {name}")


def test_names_and_types():
    found = ce_jax.softmax_statistics(jnp.zeros((2, 3)), jnp.array([0, 1]))
    assert isinstance(found, ce_jax.SoftmaxStatistics)
    assert found._fields == (*FIELDS, "argmax")
    assert jnp.issubdtype(found.argmax.dtype, jnp.integer)
    assert all(field.shape == (2,) for field in found)


def test_the_statistics_are_consistent():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    labels = jnp.array([0, 1, 2, 3, 4, 0])
    found = ce_jax.softmax_statistics(logits, labels)
    loss = ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(-found.log_prob, loss, rtol=1e-6)
    np.testing.assert_allclose(found.lse - found.label_logit, loss, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, ce_jax.entropy(jax.nn.softmax(logits)), rtol=2e-6)


def test_labels_that_are_masked_or_invalid():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]] * 4)
    labels = jnp.array([1, 0, 3, -1])
    found = ce_jax.softmax_statistics(logits, labels)
    np.testing.assert_allclose(found.log_prob, [-np.inf, -np.log(2.0), np.nan, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(found.label_logit, [-np.inf, 0.0, np.nan, np.nan])
    np.testing.assert_allclose(found.entropy, np.log(2.0), rtol=1e-6)
    np.testing.assert_allclose(found.lse, np.log(2.0), rtol=1e-6)


def test_argmax_is_the_first_of_equals():
    """Also where the largest is the lowest finite number, or nothing is allowed."""
    inf, lowest = jnp.inf, jnp.finfo("float32").min
    logits = [[1.0, 3.0, 3.0], [-inf, -5.0, -inf], [-inf, -inf, lowest], [-inf, -inf, -inf]]
    logits, wanted = jnp.array(logits), [1, 1, 2, 0]
    labels = jnp.array([0, 1, 2, 0])
    found = ce_jax.softmax_statistics(logits, labels)
    np.testing.assert_array_equal(found.argmax, wanted)
    for row, largest in zip(logits, wanted, strict=True):  # a class at a time
        layer = jnp.zeros((1, 1)), jnp.zeros((1, 3)), jnp.zeros(1, int)
        one = ce_jax.linear_softmax_statistics(*layer, bias=row, memory_budget=1)
        np.testing.assert_array_equal(one.argmax, [largest])


@pytest.mark.parametrize("classes", [3, 70])
def test_argmax_of_infinite_logits(classes):
    row = np.linspace(0, 1, classes, dtype=np.float32)
    row[1:] = np.inf
    found = ce_jax.softmax_statistics(row[None], np.array([0]))
    layer = jnp.ones((1, 1)), row[None], np.array([0])
    for budget in (1, None):
        by_class = ce_jax.linear_softmax_statistics(*layer, memory_budget=budget)
        assert found.argmax == by_class.argmax == 1


def test_argmax_of_not_a_number_is_a_class():
    """Predictions are used as indices."""
    logits = jnp.full((1, 3), jnp.nan)
    found = ce_jax.softmax_statistics(logits, jnp.zeros(1, int))
    layer = jnp.zeros((1, 1)), jnp.zeros((1, 3)), jnp.zeros(1, int)
    by_class = ce_jax.linear_softmax_statistics(*layer, bias=logits[0], memory_budget=1)
    assert found.argmax == by_class.argmax == 0


def test_a_masked_class_is_never_the_argmax():
    logits = jnp.array([[-3.0, 9.0, -2.0]])
    where = jnp.array([[True, False, True]])
    found = ce_jax.softmax_statistics(logits, jnp.array([0]), where=where)
    np.testing.assert_array_equal(found.argmax, [2])


def test_a_row_that_does_not_count_has_no_gradient():
    logits = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf], [3.0, 5.0]])
    labels = jnp.array([0, -1, 1])
    rows = labels != -1
    for options in ({"ignore_index": -1}, {"where": rows}):
        slopes = jax.grad(
            lambda z, options=options: sum(
                jnp.sum(jnp.where(rows, x, 0.0))
                for x in ce_jax.softmax_statistics(z, labels, **options)[:4]
            )
        )(logits)
        np.testing.assert_array_equal(slopes[1], 0.0)
        assert np.isfinite(slopes).all()


@pytest.mark.cpu
@pytest.mark.usefixtures("one_device")
def test_accuracy_costs_one_reading_and_no_array():
    """The argmax beside a loss and its gradient; of an entropy that nobody uses nothing is left."""
    rows, classes = 512, 2048
    loss = ce_jax.softmax_cross_entropy_with_integer_labels

    def plain(logits, labels):
        return loss(logits, labels, z_loss=0.1, reduction="mean"), ()

    def with_statistics(logits, labels):
        options = {"z_loss": 0.1, "reduction": "mean", "return_statistics": True}
        value, found = loss(logits, labels, **options)
        return value, (jnp.sum(found.argmax == labels), jnp.sum(found.lse))

    def program(function):
        step = jax.jit(jax.value_and_grad(function, has_aux=True))
        logits = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
        return step.lower(logits, jax.ShapeDtypeStruct((rows,), jnp.int32)).compile()

    before, after = program(plain), program(with_statistics)
    used = after.memory_analysis().temp_size_in_bytes
    assert used - before.memory_analysis().temp_size_in_bytes <= 64 * rows
    # To find the class, and to see that it exists.
    reads = [passes(x.as_text(), rows, classes)[0] for x in (before, after)]
    assert reads[1] <= reads[0] + 2


@pytest.mark.parametrize("forward_mode", [False, True])
def test_the_slope_of_the_logit_of_an_unknown_label_is_nan(forward_mode):
    """Beside a loss, too, whose own labels need not be safe to index with."""

    def total(logits):
        _, found = ce_jax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.array([0, -1, 9]), return_statistics=True, forward_mode=forward_mode
        )
        return jnp.sum(found.label_logit)

    slopes = jax.grad(total)(jnp.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(jnp.any(jnp.isnan(slopes), -1), [False, True, True])
