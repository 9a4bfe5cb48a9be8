"""Mistakes seen in other implementations of the linear form. Each test is one of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import block_sizes
from tests import linear
from tests.helpers import GARBAGE

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("few_tokens", "cheap_programs")]

INF, NAN = jnp.inf, jnp.nan


@pytest.fixture(autouse=True, scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "_FEWEST_TOKENS", linear.FEWEST_TOKENS)
        yield


def by_class(rows, block=2, dtype="float32", steps=0):
    return {"memory_budget": linear.class_budget(rows, block, dtype, steps)}


def by_token(classes, block=3, dtype="float32", steps=0):
    budget = linear.token_budget(classes, block, dtype, steps)
    return {"memory_budget": budget, "reduction": "sum"}


def both(rows, classes, steps=0):
    """How to force each division of the work; `steps` as in `linear.class_budget`."""
    return pytest.mark.parametrize(
        "how",
        [by_class(rows, steps=steps), by_token(classes, steps=steps)],
        ids=["classes", "tokens"],
    )


def pulled(loss, *inputs):
    """The value, and the gradients of the sum of its rows."""

    @jax.jit
    def value_and_gradients(*inputs):
        value, pull = jax.vjp(loss, *inputs)
        return value, pull(jnp.ones_like(value))

    return value_and_gradients(*inputs)


def inputs(rows, width, classes, dtype=jnp.float32, seed=0):
    draw = np.random.default_rng(seed)
    hidden, kernel = draw.normal(size=(rows, width)), draw.normal(size=(width, classes))
    return jnp.asarray(hidden, dtype), jnp.asarray(kernel, dtype)


@both(6, 4, steps=1)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": True}], ids=list)
def test_label_out_of_range_is_nan_in_its_row_only(how, options):
    """Neither wrapped nor read from the padding. What it shares with others it spoils visibly."""
    hidden, kernel = inputs(6, 2, 4)
    labels = jnp.array([-100, 3, 4, -1, 0, 2**31 - 1])
    bad = np.array([True, True, True, True, False, True])
    if "weight" in options:
        options = {"weight": jnp.array([0.0, 1.0, 2.0, 3.0])}
    value, (d_hidden, d_kernel) = pulled(
        lambda h, w: ce_jax.linear_softmax_cross_entropy(
            h, w, labels, num_classes=3, **options, **how
        ),
        hidden,
        kernel,
    )
    np.testing.assert_array_equal(np.isnan(value), bad if value.ndim else True)
    assert np.isnan(d_hidden[bad]).all()
    assert np.isfinite(d_hidden[~bad]).all()
    assert np.isnan(d_kernel[:, :3]).all()
    found = ce_jax.linear_softmax_statistics(hidden, kernel, labels, num_classes=3)
    np.testing.assert_array_equal(np.isnan(found.log_prob), bad)
    np.testing.assert_array_equal(np.isnan(found.label_logit), bad)
    assert np.isfinite(found.lse).all()


@both(7, 3, steps=2)
@pytest.mark.parametrize("excluded_by", ["where", "ignore_index", "sample_weight"])
def test_a_row_that_does_not_count_is_exactly_zero(how, excluded_by):
    """Whatever its hidden states hold, and whatever class its label names."""
    garbage = np.array([[a, b] for a, b in zip(GARBAGE, GARBAGE[::-1], strict=True)] + [[NAN, NAN]])
    hidden = jnp.asarray(np.concatenate([garbage, [[0.5, 1.0], [1.0, -1.0]]]), jnp.float32)
    _, kernel = inputs(7, 2, 3)
    counts = np.arange(7) > 4
    labels, options = np.where(counts, 1, 0), {excluded_by: counts}
    if excluded_by == "ignore_index":
        labels, options = np.where(counts, 1, -100), {"ignore_index": -100}
    elif excluded_by == "sample_weight":
        options = {"sample_weight": counts.astype(np.float32)}
    else:
        labels = np.where(counts, 1, 1000)

    def loss(hidden, kernel, bias, rows=slice(None), **options):
        return ce_jax.linear_softmax_cross_entropy(
            *(hidden, kernel, labels[rows]),
            bias=bias,
            label_smoothing=0.1,
            z_loss=0.1,
            logit_soft_cap=2.0,
            **options,
        )

    bias = jnp.zeros(3)
    value, (d_hidden, *d_head) = pulled(lambda *x: loss(*x, **options, **how), hidden, kernel, bias)
    alone, (d_alone, *head_alone) = pulled(
        lambda *x: loss(*x, slice(5, 7)), hidden[5:], kernel, bias
    )
    np.testing.assert_array_equal(d_hidden[:5], 0.0)
    np.testing.assert_allclose(d_hidden[5:], d_alone, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(d_head, head_alone, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    if value.ndim:
        np.testing.assert_array_equal(value[:5], 0.0)
    np.testing.assert_allclose(value.sum(), alone.sum(), rtol=1e-6)


@pytest.mark.parametrize("how", [{}, by_token(3), by_class(4)], ids=["whole", "tokens", "classes"])
@pytest.mark.parametrize("none", ["ignore_index", "sample_weight", "where"])
def test_nothing_counts(how, none):
    hidden, kernel = inputs(4, 2, 3)
    options = {
        "ignore_index": {"ignore_index": 1},
        "sample_weight": {"sample_weight": jnp.zeros(4)},
        "where": {"where": jnp.zeros(4, bool)},
    }[none]
    value, slopes = pulled(
        lambda *x: ce_jax.linear_softmax_cross_entropy(
            *x, jnp.ones(4, jnp.int32), **options, **(how | {"reduction": "mean"})
        ),
        hidden,
        kernel,
    )
    for x in (value, *slopes):
        np.testing.assert_array_equal(x, 0.0)


@pytest.mark.parametrize("class_axis", [-1, 0])
@both(7, 12, steps=2)
def test_padding_has_no_part(how, class_axis):
    """Gradients of padding are exactly 0; all else is what it is without."""
    case = {"bias": "finite", "weight": True, "class_axis": class_axis}

    @functools.partial(jax.jit, static_argnames="num_classes")
    def value_and_gradients(arrays, labels, num_classes):
        def loss(arrays):
            return ce_jax.linear_softmax_cross_entropy(
                **arrays,
                labels=labels,
                class_axis=class_axis,
                num_classes=num_classes,
                label_smoothing=0.1,
                z_loss=0.1,
                **how,
            )

        value, pull = jax.vjp(loss, arrays)
        return value, pull(jnp.ones_like(value))[0]

    def found(padding=None):
        given = linear.linear_arguments(**case, padding=padding)
        names = ("hidden", "kernel", "bias", "weight")
        arrays = {name: jnp.asarray(given[name], jnp.float32) for name in names}
        return value_and_gradients(arrays, given["labels"], given.get("num_classes"))

    value, slopes = found()
    for padding in linear.PADDING:
        padded_value, padded_slopes = found(padding)
        np.testing.assert_allclose(padded_value, value, rtol=2e-6, err_msg=padding)
        for name, slope in padded_slopes.items():
            kept, beyond = slope, jnp.zeros(0)
            if name != "hidden":
                axis = class_axis if name == "kernel" else 0
                kept, beyond = jnp.split(slope, [7], axis)
                assert beyond.size >= 5
            message = f"{name}, {padding}"
            np.testing.assert_array_equal(beyond, 0.0, err_msg=message)
            np.testing.assert_allclose(kept, slopes[name], rtol=1e-5, atol=2e-6, err_msg=message)


def test_zero_padded_last_block():
    """1000 classes in blocks of 128 and of 1024: log 1000, and no class beyond."""
    hidden, labels = jnp.ones((2, 3)), jnp.array([0, 999])
    for held in (1000, 1024):
        kernel = jnp.zeros((3, held))
        for block in (128, held):
            found = ce_jax.linear_softmax_statistics(
                hidden, kernel - 1.0, labels, num_classes=1000, **by_class(2, block, steps=1)
            )
            np.testing.assert_allclose(found.lse, np.log(1000.0) - 3.0, rtol=1e-6)
            np.testing.assert_allclose(found.entropy, np.log(1000.0), rtol=1e-6)


def test_last_block_is_counted_once():
    """337 classes in one block of 256 and a rest."""
    budget = by_class(2, 256)
    logit = linear.logit_bytes("float32")
    assert block_sizes.class_block(2, 337, logit, budget["memory_budget"]) == 256
    losses = ce_jax.linear_softmax_cross_entropy(
        jnp.ones((2, 3)), jnp.zeros((3, 337)), jnp.array([0, 336]), **budget
    )
    np.testing.assert_allclose(losses, np.log(337.0), rtol=1e-6)


@both(1, 4, steps=1)
def test_soft_cap_has_its_derivative(how):
    """Beyond the cap nothing moves; without that factor the slope would be 0.75."""
    hidden, kernel = jnp.array([[1.0]]), jnp.array([[100.0, -100.0, 100.0, 100.0]])
    value, (d_hidden, d_kernel) = pulled(
        lambda *x: ce_jax.linear_softmax_cross_entropy(
            *x, jnp.array([0]), logit_soft_cap=1.0, **how
        ),
        hidden,
        kernel,
    )
    np.testing.assert_allclose(value.sum(), np.log(3 + np.exp(-2.0)), rtol=1e-6)
    np.testing.assert_allclose(d_kernel, 0.0, atol=1e-7)
    np.testing.assert_allclose(d_hidden, 0.0, atol=1e-5)


@both(4, 3, steps=2)
def test_a_bias_of_minus_infinity_bans_its_class(how):
    """With a soft cap too, in value, smoothing and every gradient."""
    hidden, kernel = inputs(4, 2, 3)
    bias, labels = jnp.array([0.3, -INF, 0.1]), jnp.array([0, 2, 2, 0])
    keep, options = np.array([0, 2]), {"label_smoothing": 0.3, "z_loss": 0.1}
    for cap in (None, 2.0):
        value, slopes = pulled(
            lambda *x, cap=cap: ce_jax.linear_softmax_cross_entropy(
                *x[:2], labels, bias=x[2], logit_soft_cap=cap, **options, **how
            ),
            hidden,
            kernel,
            bias,
        )
        wanted, slopes_of_two = pulled(
            lambda *x, cap=cap: ce_jax.linear_softmax_cross_entropy(
                *x[:2], labels // 2, bias=x[2], logit_soft_cap=cap, **options
            ),
            hidden,
            kernel[:, keep],
            bias[keep],
        )
        np.testing.assert_allclose(value.sum(), wanted.sum(), rtol=1e-6)
        for found, two in zip(slopes, slopes_of_two, strict=True):
            of_two = found if found.shape == two.shape else found[..., keep]
            np.testing.assert_allclose(of_two, two, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(slopes[1][:, 1], 0.0)
        np.testing.assert_array_equal(slopes[2][1], 0.0)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("banned", [slice(0, 4), slice(2, 6), slice(4, 8)])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_a_whole_block_at_minus_infinity(banned, forward_mode):
    """The first, those in the middle, the last: no NaN from -inf - -inf."""
    hidden, kernel = inputs(3, 2, 8)
    bias = jnp.zeros(8).at[banned].set(-INF)
    left = np.flatnonzero(np.isfinite(bias))
    labels = jnp.asarray(left[:3])

    def losses(h, w, b, labels, **options):
        return ce_jax.linear_softmax_cross_entropy(
            h, w, labels, bias=b, label_smoothing=0.1, return_statistics=True, **options
        )

    (value, found), pull = jax.vjp(
        lambda *x: losses(*x, labels, forward_mode=forward_mode, **by_class(3, steps=1)),
        *(hidden, kernel, bias),
    )
    wanted, fewer = losses(hidden, kernel[:, left], jnp.zeros(left.size), jnp.arange(3))
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(found.entropy, fewer.entropy, rtol=1e-5)
    np.testing.assert_array_equal(found.argmax, left[fewer.argmax])
    ones = found._replace(**{k: jnp.ones(3) for k in found._fields[:-1]})
    argmax = np.zeros(3, jax.dtypes.float0)
    slopes = pull((jnp.ones(3), ones._replace(argmax=argmax)))
    for slope in slopes:
        assert np.isfinite(slope).all()


def test_label_on_a_banned_class_is_infinite():
    bias = jnp.array([0.0, -INF, 0.0])
    losses = ce_jax.linear_softmax_cross_entropy(
        jnp.ones((2, 2)), jnp.ones((2, 3)), jnp.array([1, 2]), bias=bias, **by_class(2, steps=1)
    )
    np.testing.assert_allclose(losses, [np.inf, np.log(2.0)], rtol=1e-6)


@both(4, 5)
def test_unequal_cotangents_reach_their_rows(how):
    """As cotangents or as sample weights: d kernel weighs each row by its own."""
    hidden, kernel = inputs(4, 2, 5)
    labels, cotangent = jnp.array([0, 1, 2, 4]), jnp.array([0.0, -2.0, 5.0, 1.0])

    def ours(kernel):
        weight = cotangent if how.get("reduction") else None
        losses = ce_jax.linear_softmax_cross_entropy(
            hidden, kernel, labels, sample_weight=weight, **how
        )
        return losses if losses.ndim == 0 else jnp.vdot(cotangent, losses)

    dz = cotangent[:, None] * (jax.nn.softmax(hidden @ kernel) - jax.nn.one_hot(labels, 5))
    np.testing.assert_allclose(jax.grad(ours)(kernel), hidden.T @ dz, rtol=1e-5, atol=1e-5)


@both(4, 5, steps=1)
def test_bias_has_a_gradient(how):
    hidden, kernel = inputs(4, 2, 5)
    labels = jnp.array([0, 1, 2, 4])
    slopes = jax.grad(
        lambda b: ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, bias=b, **how).sum()
    )(jnp.zeros(5))
    dz = jax.nn.softmax(hidden @ kernel) - jax.nn.one_hot(labels, 5)
    np.testing.assert_allclose(slopes, dz.sum(0), rtol=1e-5, atol=1e-5)


def test_smoothing_ignored_rows_and_class_weights_together():
    """By hand: the ignored row leaves numerator and denominator, the uniform part is weighted."""
    logits = jnp.array([[1.0, 2.0, 0.5], [0.1, -1.0, 0.0], [4.0, 4.0, 4.0]])
    log_probs = jax.nn.log_softmax(logits)
    weight, eps = jnp.array([0.5, 2.0, 3.0]), 0.2
    rows = [
        -0.8 * weight[y] * log_probs[i, y] - eps / 3 * jnp.sum(weight * log_probs[i])
        for i, y in ((0, 1), (1, 0))
    ]
    for how in ({}, by_token(3), by_class(3, 1)):
        found = ce_jax.linear_softmax_cross_entropy(
            logits,
            jnp.eye(3),
            jnp.array([1, 0, 2]),
            weight=weight,
            ignore_index=2,
            label_smoothing=eps,
            **(how | {"reduction": "mean"}),
        )
        np.testing.assert_allclose(found, sum(rows) / 2.5, rtol=2e-6)


def test_a_function_of_the_log_probability_is_one_per_element():
    """A closure over one number per row would pair every row with every number."""
    hidden, kernel = inputs(4, 2, 3)
    gamma = jnp.arange(4.0)
    for how in (by_token(3), by_class(4)):
        with (
            jax.numpy_rank_promotion("allow"),
            pytest.raises((TypeError, ValueError), match="log_prob_loss"),
        ):
            ce_jax.linear_softmax_cross_entropy(
                *(hidden, kernel, jnp.zeros(4, jnp.int32)),
                log_prob_loss=lambda log_prob: linear.focal(log_prob, gamma),
                **how,
            )


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_losses_are_not_quantised(dtype):
    losses = ce_jax.linear_softmax_cross_entropy(
        jnp.ones((1, 2), dtype), jnp.zeros((2, 100), dtype), jnp.array([3])
    )
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, np.log(100.0), rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
def test_lse_is_not_accumulated_in_bfloat16():
    hidden, kernel = inputs(2, 4, 8192, jnp.bfloat16)
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    for how in ({}, by_class(2, 128, "bfloat16")):
        found = ce_jax.linear_softmax_statistics(hidden, kernel, jnp.array([0, 1]), **how)
        np.testing.assert_allclose(found.lse, np.log(np.exp(z).sum(-1)), rtol=2e-6)


@pytest.mark.usefixtures("one_device", "usual_programs")
def test_float16_with_131072_classes():
    kernel = jnp.zeros((1, 131072), jnp.float16)
    for how in (by_class(3, 2**14, "float16"), by_token(131072, dtype="float16")):
        value, (d_hidden, d_kernel) = pulled(
            lambda *x, how=how: ce_jax.linear_softmax_cross_entropy(
                *x, jnp.full(3, 7), label_smoothing=0.1, **how
            ),
            jnp.ones((3, 1), jnp.float16),
            kernel,
        )
        np.testing.assert_allclose(value.sum(), 3 * np.log(131072.0), rtol=1e-6)
        assert np.isfinite(d_hidden).all()
        np.testing.assert_allclose(d_kernel[0, 7], -2.7, rtol=2e-3)
