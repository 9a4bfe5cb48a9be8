"""An example of weight 0 takes no part in any derivative, even if its loss is inf or NaN.

And an example whose label is no class takes part in every mean, whatever the weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import linear, reference, reference_linear
from tests.comparison import check, close

# The truth multiplies what it then leaves out.
pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore:invalid value")]

INTEGER = "softmax_cross_entropy_with_integer_labels"
INF, NAN = np.inf, np.nan
# Integers, as floats would be differentiated too: by its weight, the derivative is the loss.
WEIGHTS = np.array([0, 1, 2])
BANNED = np.array([[0.5, -INF, 1.0], [0.3, -0.2, 0.9], [1.0, 0.4, -0.6]])


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("name", "labels"),
    [
        (INTEGER, np.array([1, 0, 2])),
        ("softmax_cross_entropy", np.array([[0.2, 0.5, 0.3], [0.1, 0.9, 0.0], [1.0, 0.2, 0.2]])),
        ("softmax_cross_entropy", np.array([[NAN, 0.5, INF], [0.1, 0.9, 0.0], [1.0, 0.2, 0.2]])),
    ],
    ids=["class id", "share of a class with -inf", "labels of NaN and inf"],
)
def test_softmax(name, labels, reduction):
    arguments = {
        "logits": BANNED,
        "labels": labels,
        "weight": np.array([0.5, 1.5, 2.0]),
        "sample_weight": WEIGHTS,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "reduction": reduction,
    }
    check(name, arguments, ("label_smoothing", "z_loss"))


@pytest.mark.parametrize(
    ("name", "row_option"),
    [
        (INTEGER, "ignore_index"),
        (INTEGER, "where"),
        (INTEGER, "sample_weight"),
        ("softmax_cross_entropy", "where"),
        ("softmax_cross_entropy", "sample_weight"),
    ],
)
@pytest.mark.parametrize("classes", [4, 400])
@pytest.mark.usefixtures("one_device")
def test_second_derivatives(name, row_option, classes):
    """What a row holds that has no effect shows in no derivative of any order, by anything."""
    draw = np.random.default_rng(2)
    rows, out = 200, 3
    clean = draw.normal(size=(rows, classes)).astype(np.float32)
    clean[out] = 0
    others = jnp.arange(rows) != out
    if name == INTEGER:
        labels = jnp.where(others, draw.integers(0, classes, rows), -100)
    else:
        labels = jnp.asarray(draw.dirichlet(np.ones(classes), rows), jnp.float32)
    options = {row_option: -100 if row_option == "ignore_index" else others}
    options |= {"label_smoothing": 0.1, "z_loss": 0.1}
    direction = jnp.asarray(draw.normal(size=clean.shape), jnp.float32)
    weight = jnp.asarray(draw.uniform(0.5, 2.0, classes), jnp.float32)

    @jax.jit
    def derivatives(z):
        slopes = jax.grad(
            lambda z, w: getattr(ce_jax, name)(z, labels, weight=w, reduction="sum", **options),
            (0, 1),
        )

        def along(z, w):
            by_logits, by_weight = slopes(z, w)
            return jnp.sum(by_logits * direction) + jnp.sum(by_weight * direction[0])

        pushed = jax.jvp(lambda z: slopes(z, weight), (z,), (direction,))[1]
        return slopes(z, weight), pushed, jax.grad(along, (0, 1))(z, weight)

    wanted = derivatives(jnp.asarray(clean))
    for garbage in (NAN, INF, -INF):
        spoilt = clean.copy()
        # Without its other logits, or the row would have a normaliser beside -inf.
        spoilt[out, : classes if garbage == -INF else 2] = garbage
        for x, y in zip(
            jax.tree.leaves(derivatives(jnp.asarray(spoilt))), jax.tree.leaves(wanted), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6, err_msg=str(garbage))


@pytest.mark.parametrize("first", [-INF, NAN, INF])
def test_nll_loss(first):
    log_probs = np.log([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]])
    log_probs[0, 1] = first
    arguments = {
        "log_probs": log_probs,
        "labels": np.array([1, 0, 2]),
        "weight": np.array([0.5, 1.5, 2.0]),
        "sample_weight": WEIGHTS,
        "label_smoothing": 0.2,
    }
    check("nll_loss", arguments, ("label_smoothing",))


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("sigmoid_binary_cross_entropy", (NAN, 1.0)),
        ("sigmoid_binary_cross_entropy", (INF, 0.0)),
        ("sigmoid_binary_cross_entropy", (0.5, NAN)),
        ("binary_cross_entropy", (NAN, 1.0)),
        ("binary_cross_entropy", (0.5, NAN)),
    ],
    ids=str,
)
def test_binary(name, element):
    probs = name == "binary_cross_entropy"
    draw = np.random.default_rng(4)
    inputs, labels = draw.uniform(0.2, 0.8, size=3), np.array([0.0, 0.3, 1.0])
    inputs[0], labels[0] = element
    arguments = {
        "probs" if probs else "logits": inputs,
        "labels": labels,
        "weight": np.array([0.5, 1.5, 2.0]),
        "sample_weight": WEIGHTS,
        "label_smoothing": 0.2,
    }
    traced = ("label_smoothing",)
    if not probs:
        arguments["pos_weight"] = 1.5
        traced += ("pos_weight",)
    check(name, arguments, traced)


def test_focal_share_of_the_positive_labels():
    """By `alpha`, it is (1 - p)^2 softplus(-z) of what weighs something, here log(2) / 4."""
    logits, labels, weight = jnp.array([-INF, 0.0]), jnp.ones(2), jnp.array([0.0, 1.0])
    found = jax.grad(
        lambda alpha: ce_jax.sigmoid_focal_loss(
            logits, labels, alpha=alpha, sample_weight=weight, reduction="sum"
        )
    )(0.3)
    np.testing.assert_allclose(found, np.log(2) / 4, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"gamma": 1.7}], ids=["cross-entropy", "focal"])
@pytest.mark.parametrize("blocks", ["classes", "tokens"])
def test_linear(blocks, options):
    draw = np.random.default_rng(6)
    arguments = {
        "hidden": draw.normal(size=(3, 2)),
        "kernel": draw.normal(size=(2, 4)),
        "bias": np.array([0.3, -INF, 0.2, -0.4]),
        "labels": np.array([1, 0, 2]),
        "weight": np.array([0.5, 1.5, 2.0, 1.0]),
        "sample_weight": WEIGHTS,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "reduction": "mean",
        **options,
    }
    division = {"memory_budget": linear.class_budget(3, 2, steps=1)} if blocks == "classes" else {}
    smooth = {
        name: jnp.asarray(value, jnp.float32)
        for name, value in arguments.items()
        if not isinstance(value, str) and np.result_type(value).kind == "f"
    }
    fixed = {name: value for name, value in arguments.items() if name not in smooth}
    found = jax.jit(jax.grad(lambda smooth: linear.loss(**smooth, **fixed, **division)))(smooth)
    exact = fixed | {name: np.asarray(value, np.float64) for name, value in smooth.items()}
    truth = reference_linear.linear_softmax_cross_entropy
    for name, slope in found.items():
        wanted = reference.vjp(truth, exact, name, 1.0)
        close(slope, wanted, 4e-6, name, float(truth(**exact)))


@pytest.mark.parametrize("of_layers", [False, True])
def test_temperature_of_distillation(of_layers):
    """The teacher's first row gives a share to a class that the student's excludes."""
    student, teacher = BANNED, BANNED[::-1].copy()
    student, teacher = (jnp.asarray(x, jnp.float32) for x in (student, teacher))

    def loss(temperature, rows=slice(None)):
        options = {"temperature": temperature, "reduction": "sum"}
        if of_layers:
            # One row for each unit vector, so that the kernel's rows are the logits' finite ones.
            bias = jnp.array([0.0, -INF, 0.0])
            kernel = jnp.where(jnp.isfinite(student), student, 0)
            return ce_jax.linear_distillation_loss(
                *(jnp.eye(3), kernel),
                bias=bias,
                teacher_logits=teacher,
                sample_weight=jnp.array([0, 0, 0]),
                **options,
            )
        return ce_jax.distillation_loss(
            student, teacher, sample_weight=jnp.asarray(WEIGHTS), **options
        )

    def truth(temperature):
        total = 0.0
        for z, t, weight in zip(np.asarray(student), np.asarray(teacher), WEIGHTS, strict=True):
            if weight and not of_layers:
                p, q = (np.exp(x / temperature) for x in (t.astype(float), z.astype(float)))
                p, q = p / p.sum(), q / q.sum()
                terms = p[p > 0] * np.log(p[p > 0] / q[p > 0])
                total += weight * temperature**2 * terms.sum()
        return total

    value, slope = jax.jit(jax.value_and_grad(loss))(2.0)
    np.testing.assert_allclose(value, truth(2.0), rtol=2e-5)
    difference = (truth(2.0 + 1e-5) - truth(2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "linear", "nll_loss"])
def test_a_label_that_is_no_class_is_in_every_mean(form):
    """Though its class, if it were the first, weighed nothing, and so did the denominator."""
    labels, weight = jnp.array([7, 0]), jnp.array([0.0, 1.0, 1.0])
    options = {"weight": weight, "reduction": "mean"}

    def loss(x, **more):
        if form == "linear":
            return ce_jax.linear_softmax_cross_entropy(
                x, jnp.ones((3, 3)), labels, **options, **more
            )
        function = ce_jax.nll_loss if form == "nll_loss" else getattr(ce_jax, INTEGER)
        return function(x, labels, **options, **more)

    value, slopes = jax.value_and_grad(loss)(jnp.zeros((2, 3)))
    assert np.isnan(value)
    assert np.isnan(slopes[0]).any()
    value, slopes = jax.value_and_grad(loss)(jnp.zeros((2, 3)), sample_weight=jnp.array([0, 1]))
    assert value == 0
    np.testing.assert_array_equal(slopes, 0.0)


@pytest.mark.parametrize("spoilt", [NAN, INF])
def test_many_logits(spoilt):
    """Of so many that XLA on a CPU finds their maximum by other code, which passes over NaN."""
    rows, classes = 64, 5000
    logits = jnp.zeros((rows, classes), jnp.float32).at[1, 7].set(spoilt)
    weights = jnp.ones(rows).at[1].set(0)

    @jax.jit
    def slopes(logits, teacher, weights):
        def losses(x):
            ids, shares = jnp.zeros(rows, jnp.int32), jnp.full((rows, classes), 1 / classes)
            options = {"sample_weight": weights, "reduction": "sum"}
            return (
                ce_jax.softmax_cross_entropy_with_integer_labels(x, ids, **options),
                ce_jax.softmax_cross_entropy(x, shares, **options),
                ce_jax.distillation_loss(x, teacher, **options),
            )

        return jax.jacrev(losses)(logits)

    for slope in slopes(logits, jnp.ones((rows, classes)), weights):
        assert jnp.all(jnp.isfinite(slope))
        assert not jnp.any(slope[1])


@pytest.mark.parametrize("logit", [INF, -INF])
@pytest.mark.parametrize("label", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [None, 0.25])
def test_the_label_of_an_infinite_logit(label, logit, alpha):
    """A slope of infinity, times a weight of 0."""

    def focal(labels, weights):
        logits = jnp.array([logit, 0.5])
        return ce_jax.sigmoid_focal_loss(logits, labels, alpha=alpha, sample_weight=weights).sum()

    labels = jnp.array([label, 0.2])
    by_label, by_weight = jax.grad(focal, (0, 1))(labels, jnp.array([0.0, 1.0]))
    of_other = jax.grad(
        lambda y: ce_jax.sigmoid_focal_loss(jnp.array([0.5]), y, alpha=alpha).sum()
    )(jnp.array([0.2]))
    np.testing.assert_array_equal(by_label, [0.0, of_other[0]])
    assert by_weight[0] == 0.0


NOTHING = jnp.zeros(1)
FAR = jnp.array([-100.0])
# Gradients of losses that are infinite, or no number, in an example of weight 0.
MUTE = {
    "ppo_clip_loss": lambda x: ce_jax.ppo_clip_loss(x, FAR, -jnp.ones(1), sample_weight=NOTHING),
    "kl_estimate": lambda x: ce_jax.kl_estimate(FAR, x, sample_weight=NOTHING),
    "orpo_loss": lambda x: ce_jax.orpo_loss(x, x + 1, sample_weight=NOTHING),
    "ipo_loss": lambda x: ce_jax.ipo_loss(1e30 * x, x, x, x, beta=1.0, sample_weight=NOTHING),
    "gbce_loss": lambda x: ce_jax.gbce_loss(
        -INF * jnp.ones(1), x[:, None], num_items=9, calibration=-x[0], sample_weight=NOTHING
    ),
    "binary_cross_entropy": lambda x: ce_jax.binary_cross_entropy(
        x, -x, weight=x, sample_weight=NOTHING
    ),
    "top_k_distillation_loss": lambda x: ce_jax.top_k_distillation_loss(
        jnp.zeros((1, 4)), jnp.array([[0, 1]]), jnp.tile(-4 * x, (1, 2)), sample_weight=NOTHING
    ),
}


@pytest.mark.parametrize("name", MUTE)
def test_a_loss_that_is_not_finite_has_no_slope_where_it_weighs_nothing(name):
    value, pull = jax.vjp(MUTE[name], jnp.array([-1.0]))
    np.testing.assert_array_equal(value, [0])
    np.testing.assert_array_equal(*pull(jnp.ones(1)), [0])


@pytest.mark.parametrize("form", ["dense", "linear"])
@pytest.mark.parametrize("name", ["distillation_loss", "jensen_shannon_loss"])
def test_a_weight_of_0_learns_of_the_loss(name, form):
    """The slope of the gradient by the weight is the gradient that the row would have."""
    student, teacher = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[1.0, 0.0, 0.5]])

    def loss(z, weight):
        options = {"sample_weight": weight, "reduction": "sum"}
        if form == "dense":
            return getattr(ce_jax, name)(z, teacher, **options)
        linear = getattr(ce_jax, f"linear_{name}")
        return linear(z, jnp.eye(3), teacher_logits=teacher, **options)

    mixed = jax.jacrev(jax.grad(loss), 1)(student, NOTHING)[..., 0]
    np.testing.assert_allclose(mixed, jax.grad(loss)(student, jnp.ones(1)), rtol=1e-5)


def test_labels_of_a_banned_class_in_second_derivatives():
    """Reverse over reverse, as forward over reverse."""
    logits, labels = jnp.array([[0.0, 1.0, -INF]]), jnp.array([[0.3, 0.7, 0.0]])

    def loss(labels, weight):
        return ce_jax.softmax_cross_entropy(logits, labels, sample_weight=weight, reduction="sum")

    surprise = np.log1p(np.e) - np.array([0.0, 1.0])
    of_square = jax.jacrev(jax.grad(lambda x: loss(x, jnp.ones(1)) ** 2))(labels)
    wanted = np.pad(2 * np.outer(surprise, surprise), (0, 1))
    np.testing.assert_allclose(of_square[0, :, 0], wanted, rtol=1e-6)
    mixed = jax.jacrev(jax.grad(loss), 1)(labels, jnp.ones(1))[0, :, 0]
    np.testing.assert_allclose(mixed, [*surprise, 0], rtol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("form", [INTEGER, "softmax_cross_entropy", "linear_softmax_cross_entropy"])
def test_a_weight_of_nan_in_a_row_that_does_not_count(form, reduction):
    """It reaches no derivative, as any other number there would not."""
    where, weights = np.array([True, False, True]), np.array([1.0, NAN, 2.0], np.float32)
    draw = np.random.default_rng(0)
    z, kernel = draw.normal(size=(3, 3)), draw.normal(size=(3, 3))
    given = {"logits": z} if form != "linear_softmax_cross_entropy" else {"hidden": z}
    given |= {"kernel": kernel} if "hidden" in given else {}
    given |= {"weight": np.array([0.5, 1.5, 2.0]), "label_smoothing": 0.2, "z_loss": 0.1}
    given = {k: jnp.asarray(v, jnp.float32) for k, v in given.items()}
    ids = np.array([1, 0, 2])
    labels = np.eye(3, dtype=np.float32)[ids] if form == "softmax_cross_entropy" else ids

    @jax.jit
    def both(given, weights):
        def loss(given, weights):
            options = {"where": where, "sample_weight": weights, "reduction": reduction}
            return getattr(ce_jax, form)(**given, labels=labels, **options)

        return jax.value_and_grad(loss, (0, 1))(given, weights)

    found, wanted = both(given, weights), both(given, np.where(where, weights, 1))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(x, y)
