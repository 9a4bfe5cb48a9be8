"""A temperature divides float32 logits, after bias and soft cap, in every loss of logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from tests import reference, reference_linear
from tests.calls import call, narrow, takes, truth
from tests.catalogue import CATALOGUE

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]


OF_SOFT_LABELS = "softmax_cross_entropy", "poly_loss_cross_entropy", "cross_entropy_parts"
OF_DIFFERENCES = (
    *OF_SOFT_LABELS,
    "softmax_cross_entropy_with_integer_labels",
    "brier_score",
    "forward_corrected_cross_entropy",
    "backward_corrected_cross_entropy",
    "distillation_loss",
    "jensen_shannon_loss",
    "top_k_distillation_loss",
)


def normal(*shape, scale=1.0, seed=0):
    return np.random.default_rng(seed).normal(size=shape) * scale


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_logits_are_not_rounded_again(dtype):
    """Divided before they are widened, log-probabilities would be off by 0.1 nats."""
    logits = jnp.asarray(normal(2000, 500, scale=8), dtype)
    labels = jnp.argmax(logits, -1)
    found = ce_jax.softmax_statistics(logits, labels, temperature=0.7)
    truth = reference.softmax_statistics(
        np.asarray(logits, np.float64)[:50], np.asarray(labels)[:50], temperature=0.7
    )
    for name in ("lse", "label_logit", "log_prob", "entropy"):
        np.testing.assert_allclose(
            getattr(found, name)[:50], getattr(truth, name), rtol=1e-6, atol=1e-6
        )


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_hidden_states_are_not_rounded_again(dtype):
    hidden, kernel = (jnp.asarray(normal(*s), dtype) for s in ((50, 32), (32, 200)))
    labels = jnp.argmax(hidden @ kernel, -1)
    options = {"temperature": 0.7, "logit_soft_cap": 5.0}
    found = ce_jax.linear_softmax_statistics(hidden, kernel, labels, **options)
    truth = reference_linear.linear_softmax_statistics(
        np.asarray(hidden, np.float64),
        np.asarray(kernel, np.float64),
        np.asarray(labels),
        **options,
    )
    np.testing.assert_allclose(found.log_prob, truth.log_prob, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("usual_programs")
def test_huge_logits_keep_what_they_differ_by():
    """Divided first, under `jit`, `x / T` of the maximum and of the sum may differ."""
    loss = functools.partial(ce_jax.softmax_cross_entropy_with_integer_labels, temperature=0.7)
    logits = jnp.full((1, 2), 5e9)
    for function in (loss, jax.jit(loss)):
        np.testing.assert_allclose(function(logits, jnp.array([0])), np.log(2), rtol=1e-6)
    slope = jax.grad(lambda z: jnp.sum(loss(z, jnp.array([0]))))(logits)
    np.testing.assert_allclose(slope, [[-0.5 / 0.7, 0.5 / 0.7]], rtol=1e-6)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("name", OF_DIFFERENCES)
def test_an_offset_of_all_logits_costs_no_digit(name):
    """What depends on their differences alone is the same, to the last digits."""
    draw = np.random.default_rng(0)
    arrays = {
        "logits": draw.integers(-9, 9, (8, 6)).astype(np.float32),
        "teacher_logits": draw.integers(-9, 9, (8, 6)).astype(np.float32),
        "labels": np.arange(8) % 6,
        "transition": np.float32(np.eye(6) / 2 + 1 / 12),
    }
    if name in OF_SOFT_LABELS:
        arrays["labels"] = draw.dirichlet(np.ones(6), 8).astype(np.float32)
    if "top_k" in name:
        order = np.argsort(arrays["teacher_logits"])[:, :3]
        arrays |= {"teacher_ids": order, "teacher_log_probs": np.full((8, 3), -2, np.float32)}
    taken = {key: x for key, x in arrays.items() if takes(name, key)}
    run = jax.jit(lambda logits: call(name, taken | {"logits": logits}, temperature=1.25))
    for found, wanted in zip(run(arrays["logits"] + 4096), run(arrays["logits"]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("scale", [100.0, 1e5])
def test_losses_and_entropies_are_not_negative(scale):
    """Whatever a compiler contracts: of a certain class they are 0, not -3e-5."""
    logits = jnp.asarray(normal(200, 50, scale=scale), jnp.float32)
    labels = jnp.argmax(logits, -1)

    @jax.jit
    def of(logits):
        z = logits / 0.7
        found = ce_jax.softmax_statistics(z, labels)
        soft = ce_jax.softmax_cross_entropy(z, jax.nn.one_hot(labels, 50))
        return soft, -found.log_prob, found.entropy

    for x in of(logits):
        assert np.all(np.asarray(x) >= 0)


def test_gradients_of_a_schedule_and_of_one_for_each_row():
    logits, labels = normal(6, 5, scale=3), np.arange(6) % 5
    rows = np.random.default_rng(1).uniform(0.5, 2.0, size=6)
    cotangent = normal(6, seed=2)
    truth = functools.partial(reference.softmax_cross_entropy_with_integer_labels, z_loss=0.1)
    ours = functools.partial(ce_jax.softmax_cross_entropy_with_integer_labels, z_loss=0.1)
    for temperature in (np.array(0.7), rows):
        arguments = {"logits": logits, "labels": labels, "temperature": temperature}
        expected = reference.vjp(truth, arguments, "temperature", cotangent)
        slope = jax.jit(
            jax.grad(
                lambda t: jnp.vdot(ours(jnp.float32(logits), labels, temperature=t), cotangent)
            )
        )(jnp.float32(temperature))
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "linear"])
@pytest.mark.parametrize("masked", [False, True])
def test_banned_classes_and_rows_that_do_not_count_leave_no_nan(form, masked):
    temperature = jnp.array([0.5, jnp.nan if masked else 2.0, 1.5])
    where = jnp.array([True, not masked, True])
    if form == "dense":
        logits = jnp.array(
            [[-jnp.inf, 0.0, 1.0], [jnp.nan if masked else 3.0, 1.0, 2.0], [0.0] * 3]
        )

        def loss(z, t):
            return jnp.sum(
                ce_jax.softmax_cross_entropy_with_integer_labels(
                    z, jnp.array([1, 2, 0]), where=where, temperature=t, label_smoothing=0.1
                )
            )
    else:
        logits = jnp.array([[1.0, 2.0], [jnp.nan if masked else 1.0, 0.0], [0.5, -1.0]])
        bias = jnp.array([-jnp.inf, 0.0, 0.0])

        def loss(h, t):
            return ce_jax.linear_softmax_cross_entropy(
                h,
                jnp.ones((2, 3)),
                jnp.array([1, 2, 1]),
                bias=bias,
                where=where,
                temperature=t,
                label_smoothing=0.1,
                reduction="sum",
            )

    value, slopes = jax.jit(jax.value_and_grad(loss, (0, 1)))(logits, temperature)
    for x in (value, *slopes):
        assert np.all(np.isfinite(x))
    if masked:
        assert slopes[1][1] == 0


@pytest.mark.parametrize("forward_mode", [False, True])
def test_a_label_that_is_banned_has_no_slope_by_the_temperature(forward_mode):
    """Whatever the blocks: its logit is infinite at any temperature, and the loss is lse."""
    hidden, labels = jnp.array([[1.0, 2.0]]), jnp.array([1])
    kernel, bias = jnp.array([[1.0, 0, 1, 3], [0, 1, 2, 1]]), jnp.array([0, -jnp.inf, 0, 0])
    z, t = np.array([1.0, 5.0, 5.0]), 1.5
    p = np.exp(z / t) / np.exp(z / t).sum()
    options = {"bias": bias, "forward_mode": forward_mode}
    for budget in (None, 1):

        def both(t, budget=budget):
            given = options | {"temperature": t, "memory_budget": budget}
            found = ce_jax.linear_softmax_statistics(hidden, kernel, labels, **given)
            loss = ce_jax.linear_softmax_cross_entropy(hidden, kernel, labels, **given)
            return jnp.concatenate([found.label_logit, loss])

        by_label, by_loss = jax.jacrev(both)(t)
        assert by_label == 0
        np.testing.assert_allclose(by_loss, -np.sum(p * z) / t**2, rtol=1e-5)
    slope = jax.jacrev(
        lambda t: (
            ce_jax.softmax_statistics(
                hidden @ kernel + bias[None], labels, temperature=t, forward_mode=forward_mode
            ).label_logit
        )
    )(t)
    assert slope == 0


@pytest.mark.usefixtures("usual_programs")
def test_it_costs_no_copy_of_the_logits():
    from tests.test_memory import temporaries

    def loss(logits, labels, temperature):
        return ce_jax.softmax_cross_entropy_with_integer_labels(
            logits, labels, temperature=temperature, reduction="mean"
        )

    used = temporaries(
        jax.value_and_grad(loss),
        ((1024, 4096), jnp.float32),
        ((1024,), jnp.int32),
        ((), jnp.float32),
    )
    assert used <= 1024 * 4096 * 4 // 8


@pytest.mark.parametrize(
    ("value", "message"),
    [(0.0, "temperature must be finite and in"), (jnp.ones(3), "temperature must have the axes")],
    ids=["zero", "shape"],
)
def test_wrong_temperatures(value, message):
    with pytest.raises(ValueError, match=message):
        ce_jax.softmax_cross_entropy_with_integer_labels(
            jnp.zeros((2, 4)), jnp.array([0, 1]), temperature=value
        )
    with pytest.raises(ValueError, match=message):
        ce_jax.linear_softmax_statistics(
            jnp.zeros((2, 4)), jnp.zeros((4, 5)), jnp.array([0, 1]), temperature=value
        )


SQUARED = ("distillation", "jensen_shannon")  # these also multiply by its square


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, entry in CATALOGUE.items()
        if name != "on_mesh"
        and takes(name, "temperature")
        and "logits" in entry.draws
        and not any(word in name for word in SQUARED)
    ],
)
def test_every_loss_of_logits(name):
    """The loss of the quotients, and its gradients by logits and temperature."""
    exact = CATALOGUE[name].arrays()
    found = truth(name, exact)
    draw = np.random.default_rng(3)
    of_classes = name == "cross_entropy_parts"  # which returns a number for each class of a row
    rows = found[0].shape[:-1] if of_classes else found[0].shape
    temperature = draw.uniform(0.5, 2.0, size=rows)

    def tempered(logits, temperature):
        more = logits.ndim - temperature.ndim
        return logits / temperature.reshape(temperature.shape + (1,) * more)

    quotients = tempered(exact["logits"], temperature)
    expected = truth(name, exact | {"logits": quotients})
    arrays = narrow(exact)
    cotangents = [draw.normal(size=x.shape) for x in expected]

    def inner(loss):
        return sum(
            jnp.vdot(x, jnp.float32(g))
            for x, g in zip(loss, cotangents, strict=True)
            if jnp.issubdtype(x.dtype, jnp.floating)
        )

    def ours(logits, t):
        return inner(call(name, arrays | {"logits": logits}, temperature=t))

    def plain(logits, t):
        return inner(call(name, arrays | {"logits": tempered(logits, t)}))

    t = jnp.float32(temperature)
    for a, b in zip(call(name, arrays, temperature=t), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    slopes, same = (jax.grad(f, (0, 1))(jnp.float32(exact["logits"]), t) for f in (ours, plain))
    for a, b in zip(slopes, same, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_sampled_losses():
    """A temperature comes before the correction by expected counts."""
    draw = np.random.default_rng(0)
    label, negatives = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((4,), (4, 6)))
    counts = jnp.asarray(draw.normal(size=6), jnp.float32)
    t = jnp.asarray(draw.uniform(0.5, 2.0, size=4), jnp.float32)
    loss = functools.partial(ce_jax.sampled_softmax_cross_entropy, log_expected_count=counts)
    found = loss(label, negatives, temperature=t)
    np.testing.assert_allclose(found, loss(label / t, negatives / t[:, None]), rtol=1e-5)

    for ranked in (ce_jax.bpr_loss, functools.partial(ce_jax.gbce_loss, num_items=50)):
        found = ranked(label, negatives, temperature=t)
        np.testing.assert_allclose(found, ranked(label / t, negatives / t[:, None]), rtol=1e-5)

    hidden, kernel = (jnp.asarray(draw.normal(size=s), jnp.float32) for s in ((4, 3), (3, 9)))
    drawn = ce_jax.uniform_negatives(jax.random.key(0), 5, 9)
    loss = functools.partial(ce_jax.linear_sampled_softmax_cross_entropy, negatives=drawn)
    labels = jnp.arange(4)
    found = loss(hidden, kernel, labels, temperature=t)
    np.testing.assert_allclose(found, loss(hidden / t[:, None], kernel, labels), rtol=1e-5)


CERTAIN = jnp.array([[0.0, 1.0, 1e10]])
MATRIX = jnp.eye(3) * 0.7 + 0.1
# What each function is of a model that is certain of the label, whatever the temperature.
OF_CERTAIN = {
    "brier_score": (lambda z, t: ce_jax.brier_score(z, jnp.array([2]), temperature=t), 0),
    "distillation_loss": (lambda z, t: ce_jax.distillation_loss(z, z, temperature=t), 0),
    "jensen_shannon_loss": (lambda z, t: ce_jax.jensen_shannon_loss(z, z, temperature=t), 0),
    "forward_corrected_cross_entropy": (
        lambda z, t: ce_jax.forward_corrected_cross_entropy(
            z, jnp.array([2]), MATRIX, temperature=t
        ),
        -np.log(0.8),
    ),
    "cross_entropy_parts": (
        lambda z, t: (
            ce_jax.cross_entropy_parts(z, jnp.array([[0.0, 0.0, 1.0]]), temperature=t).divergence
        ),
        0,
    ),
    "linear_softmax_cross_entropy": (
        lambda z, t: ce_jax.linear_softmax_cross_entropy(
            z, jnp.eye(3), jnp.array([2]), temperature=t
        ),
        0,
    ),
    "linear_distillation_loss": (
        lambda z, t: ce_jax.linear_distillation_loss(
            z, jnp.eye(3), teacher_logits=z, temperature=t
        ),
        0,
    ),
}


@pytest.mark.usefixtures("usual_programs")
@pytest.mark.parametrize("name", OF_CERTAIN)
def test_of_huge_logits_the_largest_is_the_maximum(name):
    """A product that is contracted in one place only would leave its rounding, some hundreds."""
    function, right = OF_CERTAIN[name]
    both = jax.value_and_grad(lambda z, t: jnp.sum(function(z, t)))
    for run in (both, jax.jit(both)):
        for temperature in np.linspace(0.3, 3, 12):
            value, slope = run(CERTAIN, jnp.float32(temperature))
            np.testing.assert_allclose(value, right, atol=1e-6)
            assert jnp.isfinite(slope).all()
