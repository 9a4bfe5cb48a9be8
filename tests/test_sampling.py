"""Losses over sampled classes, the samplers, and in what sense the estimate is unbiased."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import stats

import ce_jax
from ce_jax import Negatives
from tests import reference, reference_sampling
from tests.comparison import close, compare, together
from tests.helpers import GARBAGE, compilations, covering
from tests.test_memory import temporaries

pytestmark = pytest.mark.usefixtures("cheap_programs")

INF, NAN = np.inf, np.nan
ROWS, SAMPLES, ITEMS, WIDTH = 5, 4, 9, 3
SCORES = {
    "sampled_softmax_cross_entropy": {},
    "bpr_loss": {},
    "gbce_loss": {"num_items": ITEMS, "calibration": 0.6},
}


def scores(name, *, where=None, sample_weight=False, counts=False, reduction="none", seed=0):
    draw = np.random.default_rng(seed)
    label, negatives = draw.normal(size=ROWS), draw.normal(size=(ROWS, SAMPLES))
    arguments = SCORES[name] | {"reduction": reduction}
    if where == "rows":
        arguments["where"] = np.arange(ROWS) != 3
        label[3], negatives[3] = NAN, GARBAGE
    if where == "negatives":
        arguments["where"] = draw.random((ROWS, SAMPLES)) < 0.6
        arguments["where"][2] = False
        negatives[~arguments["where"]] = np.resize(GARBAGE, (~arguments["where"]).sum())
    if sample_weight:
        arguments["sample_weight"] = draw.uniform(0.5, 2.0, size=ROWS)
        arguments["sample_weight"][1] = 0.0
    if counts and name == "sampled_softmax_cross_entropy":
        arguments["log_expected_count"] = draw.normal(size=SAMPLES)
        arguments["label_log_expected_count"] = draw.normal(size=ROWS)
    return {"label_logits": label, "negative_logits": negatives} | arguments


@pytest.mark.sweep
@together(
    covering(
        name=list(SCORES),
        where=[None, "rows", "negatives"],
        sample_weight=[False, True],
        counts=[False, True],
        reduction=["none", "mean"],
        dtype=["float32", "float64"],
    )
)
def test_scores(case):
    name, dtype = case["name"], jnp.dtype(case["dtype"])
    arguments = scores(**{k: v for k, v in case.items() if k != "dtype"})
    truth = getattr(reference_sampling, name)
    wrt = ("calibration",) if name == "gbce_loss" else ()
    static = {k: arguments.pop(k) for k in ("num_items", "reduction") if k in arguments}
    truth, loss = (functools.partial(f, **static) for f in (truth, getattr(ce_jax, name)))
    compare(loss, truth, arguments, wrt, dtype=dtype, loosen=2.0)


def linear(ids, log_expected_count, **arguments):
    negatives = Negatives(ids, log_expected_count)
    return ce_jax.linear_sampled_softmax_cross_entropy(negatives=negatives, **arguments)


def layer(*, own=False, bias=False, masked=False, class_axis=-1, seed=0, **options):
    """With accidental hits, and with a negative that is none; labels in two axes."""
    draw = np.random.default_rng(seed)
    rows = (2, 3)
    labels = draw.integers(ITEMS, size=rows)
    ids = draw.integers(ITEMS, size=(*rows, SAMPLES) if own else SAMPLES)
    ids[..., 1] = labels if own else labels[0, 1]
    log_count = draw.normal(size=ids.shape)
    ids[..., 2], log_count[..., 2] = -7, INF
    hidden, kernel = draw.normal(size=(*rows, WIDTH)), draw.normal(size=(WIDTH, ITEMS))
    if bias:
        options |= {"bias": draw.normal(size=ITEMS), "logit_soft_cap": 2.0}
    if masked:
        options |= {"where": np.arange(6).reshape(rows) != 4, "ignore_index": -1}
        options["label_log_expected_count"] = draw.normal(size=rows)
        options["sample_weight"] = draw.uniform(0.5, 2.0, size=rows)
        labels[0, 2] = -1
        hidden[0, 2] = hidden[1, 1] = GARBAGE[:WIDTH]
    return options | {
        "hidden": hidden,
        "kernel": kernel if class_axis == -1 else kernel.T.copy(),
        "labels": labels,
        "ids": ids,
        "log_expected_count": log_count,
        "class_axis": class_axis,
    }


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float64", {"bias": True, "own": True, "masked": True, "class_axis": 0}),
        ("float64", {"bias": True}),
        ("float32", {"masked": True, "class_axis": 0, "reduction": "mean"}),
    ],
    ids=["own negatives", "shared", "mean"],
)
def test_linear_form(dtype, options):
    arguments = layer(**options)
    wrt = ("logit_soft_cap",) if "bias" in options else ()
    truth = reference_sampling.linear_sampled_softmax_cross_entropy
    compare(linear, truth, arguments, wrt, dtype=jnp.dtype(dtype), loosen=3.0)


@pytest.mark.usefixtures("x64")
def test_transformations():
    """As one program: vmap of grad, second derivatives, and forward mode."""
    arguments = layer(bias=True, own=True)
    kernel, cotangent = arguments.pop("kernel"), np.random.default_rng(1).normal(size=(2, 3))
    truth = functools.partial(reference_sampling.linear_sampled_softmax_cross_entropy, **arguments)
    v = np.random.default_rng(2).normal(size=kernel.shape)

    def f(kernel, **more):
        return jnp.vdot(cotangent, linear(kernel=kernel, **arguments, **more))

    @jax.jit
    def derivatives(x, v):
        gradient = jax.vmap(jax.grad(f))(jnp.stack([x, x]))[1]
        forward = jax.jvp(jax.grad(f), (x,), (v,))[1]
        reverse = jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x)
        pushed = jax.jvp(functools.partial(f, forward_mode=True), (x,), (v,))[1]
        return gradient, forward, reverse, pushed

    gradient, forward, reverse, pushed = derivatives(kernel, v)
    slope = reference.vjp(truth, {"kernel": kernel}, "kernel", cotangent)
    product = reference.hessian_product(truth, {"kernel": kernel}, "kernel", cotangent, v)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(pushed, np.vdot(slope, v), rtol=1e-11)
    np.testing.assert_allclose(forward, product, rtol=0, atol=1e-8)
    np.testing.assert_allclose(reverse, product, rtol=0, atol=1e-8)


def normaliser(hidden, kernel, label, negatives):
    """The estimate of the sum over all classes, which the loss is the logarithm of."""
    loss = ce_jax.linear_sampled_softmax_cross_entropy(hidden, kernel, label, negatives)
    return jnp.exp(loss + hidden @ kernel[:, label])


@pytest.mark.usefixtures("x64")
def test_the_normaliser_is_unbiased():
    """Over all possible draws of a tiny vocabulary, to rounding: the estimate and its gradient."""
    items, samples = 4, 3
    draw = np.random.default_rng(0)
    hidden, kernel = jnp.asarray(draw.normal(size=2)), jnp.asarray(draw.normal(size=(2, items)))
    draws = np.array(list(itertools.product(range(items), repeat=samples)))
    log_prob = np.log(reference_sampling.log_uniform(items))
    chance = np.exp(log_prob[draws].sum(-1))
    np.testing.assert_allclose(chance.sum(), 1, rtol=1e-14)
    log_count = np.asarray(ce_jax.log_uniform_log_prob(draws, items)) + np.log(samples)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def estimate(ids, log_count, label):
        f = functools.partial(normaliser, label=label, negatives=Negatives(ids, log_count))
        return jax.value_and_grad(f, 1)(hidden, kernel)

    z = np.exp(np.asarray(hidden) @ np.asarray(kernel))
    for label in (0, 3):
        value, gradient = estimate(draws, log_count, label)
        np.testing.assert_allclose(chance @ value, z.sum(), rtol=1e-12)
        expected = np.tensordot(chance, gradient, 1)
        np.testing.assert_allclose(expected, np.outer(hidden, z), rtol=1e-12, atol=1e-14)
        assert np.std(value) > 0.1 * z.sum()


@pytest.mark.usefixtures("x64")
def test_in_batch_negatives_are_unbiased():
    """Over all batches that a row may find itself in, whatever its own label."""
    items, others = 3, 2
    draw = np.random.default_rng(1)
    hidden, kernel = jnp.asarray(draw.normal(size=2)), jnp.asarray(draw.normal(size=(2, items)))
    prob = np.array([0.6, 0.3, 0.1])
    batches = np.array(list(itertools.product(range(items), repeat=others)))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def estimate(rest, label):
        labels = jnp.concatenate([label[None], rest, jnp.array([2])])
        negatives = ce_jax.in_batch_negatives(
            labels, jnp.log(prob)[labels], where=jnp.arange(4) < 3
        )
        return normaliser(hidden, kernel, label, negatives)

    for label in range(items):
        found = prob[batches].prod(-1) @ estimate(batches, jnp.asarray(label))
        np.testing.assert_allclose(found, np.exp(hidden @ kernel).sum(), rtol=1e-12)


def test_the_normaliser_of_a_large_draw():
    """Within the standard error of many independent draws; without the correction far outside."""
    items, samples, draws, label = 1000, 64, 400, 17
    hidden, kernel = jnp.ones(1), -0.5 * jnp.log1p(jnp.arange(float(items)))[None]
    negatives = ce_jax.log_uniform_negatives(jax.random.key(5), samples, items, shape=(draws,))
    truth = np.sum(1 / np.sqrt(1 + np.arange(items)))

    estimate = jax.jit(jax.vmap(functools.partial(normaliser, hidden, kernel, label)))

    def distance(negatives):
        found = np.asarray(estimate(negatives), np.float64)
        return abs(found.mean() - truth) / (found.std(ddof=1) / np.sqrt(draws))

    assert distance(negatives) < 3
    uncorrected = negatives.log_expected_count * 0 + np.log(samples / items)
    assert distance(negatives._replace(log_expected_count=uncorrected)) > 30


@pytest.mark.parametrize("items", [1, 37])
@pytest.mark.parametrize("name", ["uniform_negatives", "log_uniform_negatives"])
def test_samplers_draw_what_they_say(name, items):
    negatives = getattr(ce_jax, name)(jax.random.key(3), 20_000, items, shape=(2,))
    assert negatives.ids.shape == negatives.log_expected_count.shape == (2, 20_000)
    assert negatives.ids.dtype == jnp.int32
    uniform = np.full(items, 1 / items)
    prob = reference_sampling.log_uniform(items) if "log" in name else uniform
    ids = np.asarray(negatives.ids).ravel()
    counts = np.bincount(ids, minlength=items)
    assert counts.size == items
    expected = np.log(20_000 * prob)[np.asarray(negatives.ids)]
    np.testing.assert_allclose(negatives.log_expected_count, expected, rtol=0, atol=2e-6)
    if items > 1:
        assert stats.chisquare(counts, 40_000 * prob).pvalue > 1e-3
        again = getattr(ce_jax, name)(jax.random.key(4), 20_000, items, shape=(2,))
        assert np.any(again.ids != negatives.ids)
        assert np.any(negatives.ids[0] != negatives.ids[1])


def test_every_id_of_many_has_its_chance():
    """A power of a float32 would round ids beyond 2^24 to even ones, and to multiples of 128."""
    items = 2**31 - 1
    ids = np.asarray(ce_jax.log_uniform_negatives(jax.random.key(0), 30_000, items).ids)
    assert ids.min() == 0
    far = ids[ids >= 2**28]
    share = 3 / 31  # three of 31 octaves
    assert abs(far.size - 30_000 * share) < 4 * np.sqrt(30_000 * share)
    assert far.max() < items
    assert stats.chisquare(np.bincount(far % 8, minlength=8)).pvalue > 1e-3
    log_prob = ce_jax.log_uniform_log_prob(far[:5], items)
    np.testing.assert_allclose(log_prob, -np.log(far[:5] * np.log(2**31)), rtol=1e-6)
    assert np.isnan(ce_jax.log_uniform_log_prob(np.array([-1, 3]), 3)).all()


@pytest.mark.parametrize("name", ["uniform_negatives", "log_uniform_negatives"])
def test_more_items_than_ids(name):
    with pytest.raises(ValueError, match=r"num_items must be below 2\^31"):
        getattr(ce_jax, name)(jax.random.key(0), 3, 2**31)
    with pytest.raises(ValueError, match=r"num_items must be below 2\^31"):
        ce_jax.log_uniform_log_prob(np.array([0]), 2**31)


def test_only_the_sample_is_read():
    """Neither logits of all classes, 134 MB, nor another array of the kernel's size."""
    rows, width, items, samples = 512, 16, 65536, 128

    def loss(hidden, kernel, labels, ids):
        negatives = Negatives(ids, jnp.zeros(samples))
        return ce_jax.linear_sampled_softmax_cross_entropy(
            hidden, kernel, labels, negatives, class_axis=0, reduction="mean"
        )

    spent = temporaries(
        jax.value_and_grad(loss, (0, 1)),
        ((rows, width), jnp.float32),
        ((items, width), jnp.float32),
        ((rows,), jnp.int32),
        ((samples,), jnp.int32),
    )
    assert spent < 4 * items * width / 2


@pytest.mark.parametrize("forward_mode", [False, True])
def test_gradients_of_one_class_add_up_in_float32(forward_mode):
    """A thousand rows of one label: in bfloat16 the sum would stop growing at a few hundred."""
    rows = 1000
    hidden = jnp.ones((rows, 1), jnp.bfloat16)
    kernel = jnp.zeros((1, 4), jnp.bfloat16)
    negatives = Negatives(jnp.array([1, 1, 2]), jnp.zeros(3))

    def loss(kernel, bias):
        return ce_jax.linear_sampled_softmax_cross_entropy(
            hidden,
            kernel,
            jnp.zeros(rows, int),
            negatives,
            bias=bias,
            reduction="sum",
            forward_mode=forward_mode,
        )

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(kernel, kernel[0]):
        assert gradient.dtype == jnp.bfloat16
        expected = rows * np.array([-0.75, 0.5, 0.25, 0.0])
        np.testing.assert_allclose(np.float32(gradient).ravel(), expected, rtol=2**-8)


def test_a_symbolic_batch():
    """One exported program for any number of rows, with the gradient of the kernel's rows."""
    (batch,) = jax.export.symbolic_shape("batch")
    negatives = Negatives(jnp.array([1, 1, 2]), jnp.zeros(3))

    def both(hidden, kernel, labels):
        loss = functools.partial(
            ce_jax.linear_sampled_softmax_cross_entropy, labels=labels, negatives=negatives
        )
        value, pull = jax.vjp(lambda *x: loss(*x), hidden, kernel)
        return value, pull(jnp.ones_like(value))

    hidden, labels = ((batch, WIDTH), jnp.float32), ((batch,), jnp.int32)
    shapes = hidden, ((WIDTH, ITEMS), jnp.float32), labels
    exported = jax.export.export(jax.jit(both))(*(jax.ShapeDtypeStruct(*x) for x in shapes))
    draw = np.random.default_rng(0)
    for rows in (1, 6):
        x = [
            draw.normal(size=shape).astype(np.float32) for shape in ((rows, WIDTH), (WIDTH, ITEMS))
        ]
        x.append(draw.integers(ITEMS, size=rows).astype(np.int32))
        jax.tree.map(lambda a, b: close(a, b, 1e-5), exported.call(*x), both(*x))


@pytest.mark.cpu
@pytest.mark.usefixtures("x64")
def test_a_batch_over_devices():
    """Rows sharded, kernel and negatives the same everywhere: the kernel's gradient is whole."""
    arguments = layer()
    arguments = {k: jnp.asarray(v) for k, v in arguments.items() if k != "class_axis"}
    rows, rest = {"hidden": P("data"), "labels": P("data")}, dict.fromkeys(arguments, P())
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def total(arguments):
        return jax.lax.psum(linear(**arguments, reduction="sum"), "data")

    sharded = jax.shard_map(total, mesh=mesh, in_specs=(rest | rows,), out_specs=P())
    for_kernel = jax.jit(jax.grad(lambda kernel: sharded(arguments | {"kernel": kernel})))
    truth = reference_sampling.linear_sampled_softmax_cross_entropy
    truth = functools.partial(truth, reduction="sum")
    slope = reference.vjp(truth, layer(), "kernel", 1.0)
    close(for_kernel(arguments["kernel"]), slope, 1e-11)


@pytest.mark.parametrize("name", SCORES)
def test_extreme_scores(name):
    """Weights of 0 silence what is not finite; an impossible negative costs nothing."""
    label = jnp.array([0.0, 1e5, NAN, 3.0, -INF])
    negatives = jnp.array([[-INF, 1.0], [-1e5, 2.0], [INF, 0.0], [1e5, 0.0], [-INF, -INF]])
    options = SCORES[name]
    weights = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0])

    @jax.jit
    def value_and_gradients(*logits):
        loss = functools.partial(getattr(ce_jax, name), sample_weight=weights, **options)
        value, pull = jax.vjp(loss, *logits)
        return value, pull(jnp.ones_like(value))

    value, gradients = value_and_gradients(label, negatives)
    assert np.isfinite(value).all()
    np.testing.assert_array_equal(value[jnp.array([2, 4])], 0)
    assert value[3] > 1e4
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[jnp.array([2, 4])], 0)
    empty = getattr(ce_jax, name)(jnp.zeros(0), jnp.zeros((0, 3)), reduction="mean", **options)
    assert empty == 0


@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_the_negatives_does_not_matter(name):
    """Of equal scores among them either; losses move with their rows."""
    arguments = scores(name, where="negatives", sample_weight=True)
    arguments["negative_logits"][:, 2] = arguments["negative_logits"][:, 1]
    draw = np.random.default_rng(0)
    rows, columns = draw.permutation(ROWS), draw.permutation(SAMPLES)
    moved = dict(arguments)
    for key in ("label_logits", "sample_weight", "negative_logits", "where"):
        moved[key] = arguments[key][rows]
    for key in ("negative_logits", "where"):
        moved[key] = moved[key][:, columns]
    found, wanted = (getattr(ce_jax, name)(**x) for x in (moved, arguments))
    np.testing.assert_allclose(found, wanted[rows], rtol=1e-6, atol=1e-7)


def test_gbce_without_calibration_is_binary_cross_entropy():
    arguments = scores("gbce_loss") | {"calibration": 0.0}
    z = np.column_stack([arguments["label_logits"], arguments["negative_logits"]])
    plain = ce_jax.sigmoid_binary_cross_entropy(z, np.eye(SAMPLES + 1)[:1].repeat(ROWS, 0))
    np.testing.assert_allclose(ce_jax.gbce_loss(**arguments), plain.mean(-1), rtol=1e-6)


def test_eager_calls_run_one_cached_program():
    arguments = scores("gbce_loss", where="rows", sample_weight=True)
    few = {name: x[1:] for name, x in arguments.items() if np.ndim(x)}
    ce_jax.gbce_loss(**(arguments | few | {"calibration": 0.3}))  # what any shape needs
    with compilations() as seen:
        for rate in (0.1, 0.2):
            ce_jax.gbce_loss(**(arguments | {"calibration": rate}))
        assert len(seen) == 1
