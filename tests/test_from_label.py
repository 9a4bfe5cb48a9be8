"""Rows read relative to their label's logit, or to their largest where that is too far away."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import from_label
from ce_jax._rows.dense import row_statistics
from ce_jax._rows.tile import Target
from tests import reference
from tests.comparison import check, close, together
from tests.helpers import LAYOUTS, compilations, covering, softmax_arguments
from tests.hlo import collectives
from tests.mesh import Layout

IDS = "softmax_cross_entropy_with_integer_labels"

ROWS, CLASSES = 4, 6
draw = np.random.default_rng(31)
LOGITS = draw.normal(size=(ROWS, CLASSES))
LABELS = np.array([2, 0, 5, 1])
COTANGENT = draw.normal(size=ROWS)
NEAR = 3 * LOGITS
# One row is enough for all to be read relative to their maxima, or to be read again.
FAR_IN_SAMPLE, FAR = NEAR.copy(), NEAR.copy()
FAR_IN_SAMPLE[1, 3] = FAR[2, 3] = 200.0
BATCHES = {"near": NEAR, "far in sample": FAR_IN_SAMPLE, "far elsewhere": FAR}
MASKED = NEAR.copy()
MASKED[1, 3], MASKED[3, 1] = -np.inf, -np.inf
MASKED[3] -= 200.0  # relative to 0 nothing would be left of them


def loss(logits, labels=LABELS, **options):
    return ce_jax.softmax_cross_entropy_with_integer_labels(logits, labels, **options)


def truth(logits, **options):
    return reference.softmax_cross_entropy_with_integer_labels(logits, LABELS, **options)


CASES = covering(
    seed=7,
    layout=list(LAYOUTS),
    where=[None, "rows", "classes"],
    masked=[False, True],
    weight=[False, True],
    sample_weight=[False, True],
    ignore_index=[None, -7],
    label_smoothing=[0.0, 0.3],
    z_loss=[0.0, 0.1],
    reduction=["none", "mean"],
    dtype=["float32", "float64", "bfloat16"],
)


@pytest.fixture(autouse=True, params=["labels", "nothing"])
def small_tiles_too(request, one_device, monkeypatch):
    """Any tile is worth it, read relative to the one or the other, and half of the rows first.

    What has to be read again is so in blocks, of one row each if the first axis is one of rows.
    """
    monkeypatch.setattr(from_label, "_SMALL", 0)
    monkeypatch.setattr(from_label, "_MEDIUM", 0)
    monkeypatch.setattr(from_label, "_SAMPLED", 2)
    monkeypatch.setattr(from_label, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(from_label, "_FEWEST_NARROW_ROWS", 2)
    monkeypatch.setattr(from_label, "FEW_CLASSES", 0 if request.param == "labels" else 10**6)
    return request.param


@pytest.fixture
def far_in_sample(monkeypatch):
    monkeypatch.setattr(from_label, "_near_in_sample", lambda *_: jnp.zeros((), bool))


@pytest.fixture
def far_elsewhere(monkeypatch):
    monkeypatch.setattr(from_label, "_near_in_sample", lambda *_: jnp.ones((), bool))
    monkeypatch.setattr(from_label, "_MOST", 0.0)
    monkeypatch.setattr(from_label, "_MOST_BARE", 0.0)


def check_case(case):
    dtype = jnp.dtype(case.pop("dtype"))
    check(IDS, softmax_arguments(**case), dtype=dtype)


@pytest.mark.sweep
@together(CASES)
def test_options(case):
    check_case(case)


@pytest.mark.sweep
@pytest.mark.usefixtures("far_in_sample")
@together(CASES)
def test_options_relative_to_maxima(case):
    check_case(case)


@pytest.mark.sweep
@pytest.mark.usefixtures("far_elsewhere")
@together(CASES)
def test_options_read_again(case):
    check_case(case)


@pytest.mark.parametrize("logits", BATCHES.values(), ids=BATCHES)
def test_a_batch_of_either_kind(logits):
    check(IDS, {"logits": logits, "labels": LABELS})
    check(IDS, {"logits": logits, "labels": LABELS}, dtype=jnp.float64)


def test_labels_that_are_not_allowed():
    value, pull = jax.vjp(loss, jnp.asarray(MASKED, jnp.float32))
    (slope,) = pull(jnp.ones(ROWS))
    np.testing.assert_array_equal(np.isinf(value), [False, False, False, True])
    close(value[:3], truth(MASKED)[:3], 4e-6)
    assert not np.any(np.isnan(slope))


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_normaliser_spoils_no_other(spoilt):
    logits = NEAR.copy()
    logits[1] = spoilt
    losses, pull = jax.vjp(loss, jnp.asarray(logits, jnp.float32))
    (slope,) = pull(jnp.ones_like(losses))
    rest = np.array([0, 2, 3])
    close(losses[rest], truth(NEAR)[rest], 4e-6)
    assert np.all(np.isfinite(slope[rest]))
    assert not np.isfinite(losses[1])
    assert np.all(np.isnan(slope[1]))


@pytest.mark.parametrize("size", [10.0, 31.0, 40.0, 80.0, 1e4])
def test_losses_of_any_size(size):
    """No digits are lost in rows that do not need the maximum, nor beside one that does."""
    rows, classes = 8, 2000
    logits = np.random.default_rng(3).normal(size=(rows, classes)).astype(np.float32)
    labels = np.arange(rows)
    logits[3, 3] += size  # a loss near 0
    logits[4] += np.float32(size)
    logits[5, 5] -= size
    logits[6, [900, 901]] = size + np.array([1.1, 2.3])
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    log_probs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    losses, pull = jax.vjp(lambda z: loss(z, labels), logits)
    np.testing.assert_allclose(losses, -log_probs[labels, labels], rtol=3e-7, atol=2e-7)
    assert np.all(losses >= 0)
    slope = np.exp(log_probs) - (labels[:, None] == np.arange(classes))
    np.testing.assert_allclose(pull(jnp.ones(rows))[0], slope, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("offset", [-80.0, -60.0, -15.0, 0.0, 60.0, 80.0, 1e4])
def test_small_probabilities_wherever_logits_are(offset):
    rows, classes = 300, 10
    logits = np.random.default_rng(5).normal(size=(rows, classes)) - 45 * (np.arange(classes) > 6)
    logits = (logits + offset).astype(np.float32)
    labels = np.arange(rows) % 7
    exact = logits.astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    probs = np.exp(exact) / np.exp(exact).sum(-1, keepdims=True)
    losses, pull = jax.vjp(lambda z: loss(z, labels), logits)
    np.testing.assert_allclose(losses, -np.log(probs[np.arange(rows), labels]), rtol=6e-7)
    np.testing.assert_allclose(pull(jnp.ones(rows))[0][:, 7:], probs[:, 7:], rtol=1e-5)


@pytest.mark.parametrize("size", [12.0, 28.0, 70.0])
def test_the_normaliser_beside_an_unlikely_label(size):
    rows, classes = 200, 10
    logits = np.random.default_rng(4).normal(size=(rows, classes)).astype(np.float32)
    labels = np.arange(rows) % classes
    unlikely = np.arange(rows // 2, rows)  # none of them in the sample
    logits[unlikely, labels[unlikely]] -= np.float32(size)
    found = row_statistics(jnp.asarray(logits), Target(labels=jnp.asarray(labels)))
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(found.lse, lse, rtol=0, atol=1.3e-6)


@pytest.mark.cpu
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("kind", "tried", "far"),
    [("near", "label", None), ("far in sample", "maximum", 1), ("far elsewhere", "label", 2)],
)
def test_what_is_tried(kind, tried, far, whole, monkeypatch):
    if whole:
        monkeypatch.setattr(from_label, "_MEDIUM", 10**6)
    logits = BATCHES[kind].astype(np.float32)
    label, maximum = logits[np.arange(ROWS), LABELS], logits.max(-1)
    found = from_label.sums(
        jnp.asarray(logits), jnp.asarray(LABELS), jnp.asarray(label), None, shapes={}, shared=True
    )
    bare = found.attempt.bare
    if bare is not None:
        tried = np.zeros_like(label)
    else:
        tried = {"label": label, "maximum": maximum}[tried]
        np.testing.assert_array_equal(found.attempt.tried, tried)
    missed = np.arange(ROWS) == far if np.any(tried != maximum) else np.zeros(ROWS, bool)
    if whole:
        missed[:] = missed.any()
    bits = missed.any() if whole else (2 ** np.arange(ROWS))[missed].sum()
    assert int(found.attempt.missed) == bits
    np.testing.assert_array_equal(found.base, np.where(missed, maximum, tried))
    if bare is not None:
        np.testing.assert_allclose(bare.own, np.where(missed, 1.0, np.exp(label)), rtol=1e-6)
        relative = (logits - np.where(missed, maximum, 0.0)[:, None]).astype(np.float64)
        np.testing.assert_allclose(bare.rest, np.exp(relative).sum(-1) - bare.own, rtol=1e-6)
        np.testing.assert_array_equal(bare.gap, np.where(missed, label - maximum, 0.0))


@pytest.mark.cpu
@pytest.mark.parametrize("garbage", [-100.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, ROWS - 1])  # in the sample, and elsewhere
def test_rows_that_do_not_count_have_no_say_in_what_is_tried(row, garbage):
    logits = NEAR.astype(np.float32)
    logits[row, LABELS[row]] = garbage
    own = jnp.asarray(logits[np.arange(ROWS), LABELS])
    counts = jnp.arange(ROWS) != row
    found = from_label.sums(
        jnp.asarray(logits), jnp.asarray(LABELS), own, counts, shapes={}, shared=True
    )
    if found.attempt.tried is not None:
        np.testing.assert_array_equal(found.attempt.tried, own)
    assert found.attempt.missed == 0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("logits", BATCHES.values(), ids=BATCHES)
def test_derivatives_of_every_kind(logits):
    options = {"weight": np.linspace(0.5, 2.0, CLASSES), "label_smoothing": 0.2, "z_loss": 0.01}
    arguments = {"logits": logits, "labels": LABELS, **options}
    slope = reference.vjp(getattr(reference, IDS), arguments, "logits", COTANGENT)
    curvature = reference.hessian(getattr(reference, IDS), arguments, "logits", COTANGENT)
    direction = draw.normal(size=logits.shape)
    along = np.einsum("ijkl,kl->ij", curvature, direction)

    def total(z, **mode):
        return jnp.sum(loss(z, **options, **mode) * COTANGENT)

    @jax.jit
    def found(z):
        forward = functools.partial(total, forward_mode=True)
        return {
            "first": [
                jax.grad(total)(z),
                jax.grad(forward)(z),
                jax.jacfwd(forward)(z),
                jax.grad(jax.checkpoint(total))(z),
                jax.vmap(jax.grad(total))(jnp.stack([NEAR, z]))[1],
                jax.vmap(jax.grad(forward))(jnp.stack([NEAR, z]))[1],
            ],
            "second": [
                jax.jvp(jax.grad(total), (z,), (direction,))[1],
                jax.grad(lambda z: jnp.vdot(jax.grad(total)(z), direction))(z),
                jax.jvp(jax.grad(forward), (z,), (direction,))[1],
                jax.jvp(lambda z: jax.jvp(forward, (z,), (direction,))[1], (z,), (direction,))[1],
            ],
        }

    results = found(jnp.asarray(logits))
    for one in results["first"]:
        close(one, slope, 1e-10)
    *products, quadratic = results["second"]
    for one in products:
        np.testing.assert_allclose(one, along, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(quadratic, np.vdot(along, direction), rtol=1e-9)


def test_batches_of_both_kinds():
    batch = jnp.asarray(np.stack([*BATCHES.values(), NEAR[::-1]]), jnp.float32)

    def losses_and_slopes(z):
        losses, pull = jax.vjp(loss, z)
        return losses, *pull(jnp.asarray(COTANGENT, losses.dtype))

    for z, losses, slopes in zip(batch, *jax.vmap(losses_and_slopes)(batch), strict=True):
        exact = {"logits": np.asarray(z, np.float64), "labels": LABELS}
        close(losses, getattr(reference, IDS)(**exact), 4e-6)
        close(slopes, reference.vjp(getattr(reference, IDS), exact, "logits", COTANGENT), 4e-6)


@pytest.mark.cpu
def test_devices_of_both_kinds():
    """Each device reads its rows in its own way, and asks no other."""
    layout = Layout({"data": 2}, rows="data")
    on_mesh = ce_jax.on_mesh(getattr(ce_jax, IDS), layout.mesh(), rows="data")
    program = jax.jit(jax.value_and_grad(lambda z: on_mesh(z, LABELS, reduction="mean")))
    logits = jnp.asarray(FAR, jnp.float32)
    value, slope = program(logits)
    close(value, truth(FAR, reduction="mean"), 4e-6)
    exact = {"logits": FAR, "labels": LABELS, "reduction": "mean"}
    close(slope, reference.vjp(getattr(reference, IDS), exact, "logits", np.ones(())), 4e-6)
    assert all(found.bytes <= 8 for found in collectives(program.lower(logits).compile()))


@pytest.mark.cpu
def test_the_maximum_is_looked_for_in_loops_alone(small_tiles_too):
    """The program itself reads the logits twice, and the exponentials are where the slopes go."""
    shape = (256, 4096)
    program = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y, reduction="mean")))
    compiled = program.lower(
        jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    ).compile()
    text = compiled.as_text()
    entry = text[text.index("\nENTRY ") :]
    called = re.findall(r"calls=%([\w.\-]+)", entry)
    bodies = [text.split(f"\n%{name} (")[1].split("\n}")[0] for name in called]
    of_tiles = [body for body in bodies if "f32[256,4096]" in body]
    assert sum("exponential(" in body for body in of_tiles) == 1
    assert sum("reduce(" in body for body in of_tiles) + entry.count(" reduce(") == 1
    # Relative to nothing there are two sums, if in rows as long as these in parts of 16.
    partial = 2 / 16 if small_tiles_too == "nothing" else 0
    limit = 4 * shape[0] * shape[1] * (1 / 16 + partial)
    assert compiled.memory_analysis().temp_size_in_bytes < limit


def test_eager_calls_compile_once():
    """Loops are compiled anew whenever they are called outside `jit`."""

    def eagerly(z):
        jax.value_and_grad(lambda z: loss(z, reduction="mean"))(z)
        jax.jvp(lambda z: loss(z, forward_mode=True, reduction="mean"), (z,), (z,))
        jax.vmap(jax.grad(lambda z: loss(z, reduction="mean")))(z[None])

    logits = jnp.asarray(FAR, jnp.float32)
    eagerly(logits)
    with compilations() as seen:
        eagerly(logits)
    assert not seen


@pytest.mark.parametrize("small_tiles_too", ["nothing"], indirect=True)
def test_losses_near_zero_keep_their_digits():
    """Relative to the label, `1 + rest` would be rounded."""
    rows, classes = 300, 10
    logits = np.random.default_rng(6).normal(size=(rows, classes)).astype(np.float32)
    labels = np.arange(rows) % classes
    logits[np.arange(rows), labels] += np.linspace(0, 40, rows, dtype=np.float32)
    exp = np.exp(logits.astype(np.float64))
    own = exp[np.arange(rows), labels]
    exp[np.arange(rows), labels] = 0
    # Only a CPU takes exponentials of logits as they are: differences of up to 44 are rounded.
    rounding = 0 if jax.default_backend() == "cpu" else 2.0**-19
    exact = np.log1p(exp.sum(-1) / own)
    np.testing.assert_allclose(loss(logits, labels), exact, rtol=1e-6 + rounding)
