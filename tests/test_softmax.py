"""The softmax losses: values and every gradient over the option space."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference
from tests.comparison import accuracy, check, close, together
from tests.helpers import LAYOUTS, combinations, covering, in_layout, softmax_arguments

pytestmark = pytest.mark.sweep

INTEGER = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"
OPTIONS = {
    "layout": list(LAYOUTS),
    "where": [None, "rows", "classes"],
    "weight": [False, True],
    "sample_weight": [False, True],
    "masked": [False, True],
    "label_smoothing": [None, 0.1, 1.0],
    "z_loss": [None, 0.3],
    "temperature": [None, "one", "rows"],
    "reduction": [None, "sum", "mean"],
    "traced": [False, True],
    "forward_mode": [None, True],
    "dtype": ["float32", "float64"],
}


def check_case(name, case, **extra):
    case = {key: value for key, value in (case | extra).items() if value is not None}
    dtype = jnp.dtype(case.pop("dtype"))
    static = {key: case.pop(key) for key in ("forward_mode",) if key in case}
    schedules = [key for key in ("label_smoothing", "z_loss") if key in case]
    wrt = schedules if case.pop("traced") else ()
    check(name, softmax_arguments(**case), wrt, dtype=dtype, **static)


@together(covering(ignore_index=[None, -100, 1], seed=1, **OPTIONS))
def test_integer_labels(case):
    check_case(INTEGER, case)


@together(covering(seed=2, **OPTIONS))
def test_soft_labels(case):
    check_case(SOFT, case, soft=True)


@together(
    combinations(
        dtype=["float16", "bfloat16"], soft=[False, True], reduction=["none", "sum", "mean"]
    )
)
def test_narrow_dtypes_round_once(case):
    """Inputs of 16 bits: the loss is a float32 one, each gradient is rounded a single time."""
    dtype = jnp.dtype(case.pop("dtype"))
    arguments = softmax_arguments(
        where="classes",
        weight=True,
        sample_weight=True,
        masked=True,
        label_smoothing=0.1,
        z_loss=0.3,
        **case,
    )
    check(SOFT if case["soft"] else INTEGER, arguments, dtype=dtype)


@pytest.mark.parametrize("shape", [(999, 5), (5,), (1, 5)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_labels_for_many_rows_or_classes(dtype, shape):
    """Gradients add up over what labels are broadcast to, and are rounded once."""
    draw = np.random.default_rng(17)
    logits = jnp.asarray(draw.normal(size=(999, 5)), dtype)
    labels = jnp.asarray(draw.uniform(0.1, 1.0, size=shape), dtype)
    cotangent = jnp.asarray(draw.uniform(size=999), jnp.float32)
    losses, pull = jax.vjp(lambda t: ce_jax.softmax_cross_entropy(logits, t), labels)
    slopes = pull(cotangent)[0]

    z = np.asarray(logits, np.float64)
    surprise = np.log(np.exp(z).sum(-1, keepdims=True)) - z
    close(losses, (np.asarray(labels, np.float64) * surprise).sum(-1), accuracy(losses.dtype))
    each = np.asarray(cotangent, np.float64)[:, None] * surprise
    whole = {(999, 5): each, (5,): each.sum(0), (1, 5): each.sum(0, keepdims=True)}
    assert slopes.dtype == dtype
    close(slopes, whole[shape], accuracy(dtype))


@pytest.mark.parametrize("axis", [None, (0, 1), (1, 0)])
def test_soft_labels_over_all_axes(axis):
    arguments = softmax_arguments(soft=True, label_smoothing=0.1, z_loss=0.2)
    weight = np.random.default_rng(0).uniform(0.5, 2.0, size=20)
    check(SOFT, arguments | {"axis": axis, "weight": weight})


def test_weight_of_a_tuple_of_axes_follows_its_order():
    """`weight[c]` belongs to the class that label c names: axes in the caller's order."""
    logits = np.zeros((2, 3), np.float32)
    weight = np.arange(1.0, 7.0, dtype=np.float32)
    for axis in ((0, 1), (1, 0)):
        order = in_layout(np.arange(6), logits.shape, axis)
        labels = np.float32(order == 4)
        one_hot = ce_jax.softmax_cross_entropy(logits, labels, axis, weight=weight)
        integer = ce_jax.softmax_cross_entropy_with_integer_labels(
            logits, np.int32(4), axis, weight=weight
        )
        np.testing.assert_allclose([one_hot, integer], 5.0 * np.log(6.0), rtol=1e-6)


@pytest.mark.parametrize("soft", [False, True])
def test_one_class(soft):
    arguments = {
        "logits": np.array([[3.0], [-2.0]]),
        "labels": np.array([[0.7], [1.0]]) if soft else np.array([0, 0]),
        "weight": np.array([2.0]),
        "z_loss": 0.1,
        "label_smoothing": 0.2,
        "reduction": "mean",
    }
    check(SOFT if soft else INTEGER, arguments, ("z_loss", "label_smoothing"))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_empty_batch(shape, soft):
    logits = jnp.zeros(shape)
    labels = jnp.zeros(shape) if soft else jnp.zeros(shape[:-1], jnp.int32)
    loss = getattr(ce_jax, SOFT if soft else INTEGER)
    assert loss(logits, labels).shape == shape[:-1]
    for reduction in ("sum", "mean"):
        value, gradient = jax.value_and_grad(loss)(logits, labels, reduction=reduction)
        assert value == 0.0
        assert gradient.shape == shape


@pytest.mark.parametrize("wide", [False, True])
def test_labels_of_every_width(wide):
    """Class ids mean the same in every integer dtype, also where -100 is not a value of it."""
    logits = np.random.default_rng(0).normal(size=(5, 200)).astype(np.float32)
    ids = {f"int{bits}": np.array([0, 127, 3, 100, 126]) for bits in (8, 16, 32, 64)}
    # 156 is -100 in eight bits.
    ids |= {f"uint{bits}": np.array([0, 127, 3, 156, 126]) for bits in (8, 16, 32, 64)}

    @jax.jit
    def value_and_slopes(logits, ids):
        loss = jax.value_and_grad(ce_jax.softmax_cross_entropy_with_integer_labels)
        return {
            dtype: loss(logits, labels, ignore_index=-100, label_smoothing=0.1, reduction="mean")
            for dtype, labels in ids.items()
        }

    with jax.enable_x64(wide):
        found = value_and_slopes(logits, {dtype: ids[dtype].astype(dtype) for dtype in ids})
        as_int32 = value_and_slopes(logits, {dtype: ids[dtype].astype(np.int32) for dtype in ids})
        for dtype, labels in ids.items():
            value, slopes = found[dtype]
            wanted, wanted_slopes = as_int32[dtype]
            np.testing.assert_allclose(value, wanted, rtol=1e-6)
            # Where p and the label nearly cancel, what is left of both is a rounding of p.
            np.testing.assert_allclose(slopes, wanted_slopes, rtol=1e-6, atol=2**-23 * 1e-3)
            exact = reference.softmax_cross_entropy_with_integer_labels(
                logits.astype(np.float64), labels, label_smoothing=0.1, reduction="mean"
            )
            close(value, exact, 1e-6)


@pytest.mark.parametrize("label", [2**32, 2**32 - 100, 2**31, 2**63 - 1])
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
@pytest.mark.usefixtures("x64")
def test_wide_label_is_not_cut_to_32_bits(label, dtype):
    """2**32 is no class 0, and 2**32 - 100 is not the ignored -100."""
    labels = np.array([0, label], dtype)
    losses = ce_jax.softmax_cross_entropy_with_integer_labels(
        np.zeros((2, 3), np.float32), labels, ignore_index=-100
    )
    np.testing.assert_allclose(losses, [np.log(3.0), np.nan], rtol=1e-6)


def test_unsigned_label_is_not_the_negative_ignore_index():
    labels = np.array([0, 2**32 - 100], np.uint32)
    losses = ce_jax.softmax_cross_entropy_with_integer_labels(
        np.zeros((2, 3), np.float32), labels, ignore_index=-100
    )
    np.testing.assert_allclose(losses, [np.log(3.0), np.nan], rtol=1e-6)


@pytest.mark.parametrize("labels", [np.eye(3, dtype=np.int32), np.eye(3, dtype=bool)])
def test_one_hot_labels_of_integer_and_bool_dtype(labels):
    logits = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    wanted = ce_jax.softmax_cross_entropy(logits, labels.astype(np.float32), label_smoothing=0.1)
    found = ce_jax.softmax_cross_entropy(logits, labels, label_smoothing=0.1)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", [INTEGER, SOFT])
@pytest.mark.parametrize("logits_dtype", ["bfloat16", "float32"])
def test_options_keep_their_own_dtype(name, logits_dtype):
    """Logits of one float dtype, options of another: each gradient in its input's own."""
    arguments = softmax_arguments(soft=name == SOFT, weight=True, sample_weight=True)
    axis = arguments.pop("axis")
    other = "float32" if logits_dtype == "bfloat16" else "bfloat16"
    floats = {
        key: jnp.asarray(value, logits_dtype if key == "logits" else other)
        for key, value in arguments.items()
        if value.dtype.kind == "f"
    }
    integers = {key: value for key, value in arguments.items() if key not in floats}
    loss = getattr(ce_jax, name)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda floats: loss(**floats, **integers, axis=axis, reduction="mean"))
    )(floats)
    assert value.dtype == jnp.float32
    exact = integers | {key: np.asarray(x, np.float64) for key, x in floats.items()}
    truth = getattr(reference, name)
    close(value, truth(**exact, reduction="mean"), 4e-6)
    for key, gradient in gradients.items():
        assert gradient.dtype == floats[key].dtype
        exact_gradient = reference.vjp(truth, exact | {"reduction": "mean"}, key, 1.0)
        close(gradient, exact_gradient, 1.01 * 2**-8)


@functools.partial(jax.jit, static_argnames="name")
def losses_and_slopes(logits, labels, *, name):
    losses, pull = jax.vjp(lambda z: getattr(ce_jax, name)(z, labels), logits)
    return losses, pull(jnp.ones_like(losses))[0]


def naive(logits, targets):
    """The textbook formula, every step in the logits' own dtype."""
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    log_probs = shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
    return -jnp.sum(targets * log_probs, axis=-1)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_error_is_not_above_the_naive_formulas(dtype, spread, offset, soft):
    """Against the truth: no worse than the textbook's in that dtype."""
    wide = dtype in ("float32", "float64")
    if wide and spread == 20.0 and jax.__version_info__ < (0, 10):
        pytest.skip("before jax 0.10, slopes of float32 and float64 are off by up to three units")
    draw = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(offset + spread * draw.normal(size=(512, 16)), dtype)
        labels = draw.integers(16, size=512)
        targets = jnp.asarray(
            draw.dirichlet(np.ones(16), size=512) if soft else np.eye(16)[labels], dtype
        )
        losses, slopes = losses_and_slopes(
            logits, targets if soft else labels, name=SOFT if soft else INTEGER
        )
        plain, pull = jax.vjp(lambda z: naive(z, targets), logits)
        (plain_slopes,) = pull(jnp.ones(512, dtype))
    z, t = np.asarray(logits, np.longdouble), np.asarray(targets, np.longdouble)
    z = z - z.max(-1, keepdims=True)
    lse = np.log(np.exp(z).sum(-1, keepdims=True))
    truth = (t * (lse - z)).sum(-1)
    true_slopes = t.sum(-1, keepdims=True) * np.exp(z - lse) - t

    def error(found, exact, norm):
        return float(norm(np.asarray(found, np.longdouble) - exact))

    # Two orders of summing the same terms differ by chance: a tenth of the naive error, or the
    # rounding of the result. A slope may be off by two units in the last place of the largest, 1:
    # those of exp(z - lse).
    rms, largest = np.linalg.norm, lambda x: np.abs(x).max()
    rounding = float(jnp.finfo(losses.dtype).eps * rms(truth)) / 2
    assert error(losses, truth, rms) <= max(1.1 * error(plain, truth, rms), rounding)
    allowed = max(error(plain_slopes, true_slopes, largest), 2 * float(jnp.finfo(dtype).eps))
    assert error(slopes, true_slopes, largest) <= allowed


def test_logits_far_below_and_far_apart():
    """Tiny logits keep their gradient, and huge ones neither overflow nor lose the loss."""
    tiny = np.array([[1e-30, -1e-30, 0.0]], np.float32)
    value, gradient = jax.value_and_grad(
        lambda z: ce_jax.softmax_cross_entropy_with_integer_labels(z, np.array([0]))[0]
    )(tiny)
    np.testing.assert_allclose(value, np.log(3.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-2 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    huge = np.array([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]], np.float32)
    losses = ce_jax.softmax_cross_entropy_with_integer_labels(huge, np.array([0, 1]))
    np.testing.assert_allclose(losses, [0.0, np.log(3.0)], rtol=1e-6)


def test_safe_is_the_same_function():
    assert ce_jax.safe_softmax_cross_entropy is ce_jax.softmax_cross_entropy
