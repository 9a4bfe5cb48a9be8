"""A row read once for its maximum and its sum, as on a GPU; here a CPU runs what that would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ce_jax._rows.sums import Columns

import ce_jax
from ce_jax._platform import one_reading, parts
from tests import reference
from tests.comparison import check, close, compare, together
from tests.helpers import LAYOUTS, covering, softmax_arguments

IDS = "softmax_cross_entropy_with_integer_labels"
SOFT = "softmax_cross_entropy"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, one_device):
    monkeypatch.setattr(one_reading, "_CACHED", 0)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, **own: own.get("cuda", own["default"])(*args)
    )


@pytest.fixture
def cut(monkeypatch):
    """Limits so small that a GPU would cut every row of four."""
    monkeypatch.setattr(parts, "_LONGEST_ON_GPU", 1)
    monkeypatch.setattr(parts, "_SHORTEST", 1)
    monkeypatch.setattr(one_reading, "_SIDE_BY_SIDE", 2)


CASES = covering(
    layout=[*LAYOUTS],
    soft=[False, True],
    where=[None, "rows", "classes"],
    masked=[False, True],
    weight=[False, True],
    label_smoothing=[None, 0.3, 1.0],
    dtype=["float32", "float64", "bfloat16"],
)


def check_case(case):
    dtype = jnp.dtype(case.pop("dtype"))
    if case["label_smoothing"] is None:
        del case["label_smoothing"]
    wrt = [name for name in ("label_smoothing",) if name in case]
    check(SOFT if case["soft"] else IDS, softmax_arguments(**case), wrt, dtype=dtype)


@pytest.mark.sweep
@together(CASES)
def test_losses(case):
    check_case(case)


@pytest.mark.sweep
@pytest.mark.usefixtures("cut")
@together(CASES)
def test_losses_of_cut_rows(case):
    check_case(case)


def statistics(logits, labels, function=ce_jax.softmax_statistics):
    found = function(logits, labels)
    return found.lse + 2 * found.entropy - found.log_prob


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("classes", [4, 37])
@pytest.mark.usefixtures("cut", "x64")
def test_statistics(dtype, classes):
    draw = np.random.default_rng(classes)
    logits = 3 * draw.normal(size=(5, classes))
    logits[2, 1:3] = -np.inf
    arguments = {"logits": logits, "labels": np.array([0, 3, 3, 1, 0])}
    truth = functools.partial(statistics, function=reference.softmax_statistics)
    compare(statistics, truth, arguments, dtype=jnp.dtype(dtype), loosen=4)


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 15, 17, 64, 65, 1000])
def test_any_number_of_classes(classes):
    draw = np.random.default_rng(classes)
    logits = draw.normal(size=(2, 300, classes)).astype(np.float32) * 30
    labels = draw.integers(classes, size=(2, 300))
    arguments = {"logits": logits, "labels": labels}
    found = ce_jax.softmax_cross_entropy_with_integer_labels(**arguments)
    close(found, reference.softmax_cross_entropy_with_integer_labels(**arguments), 1e-6)
    lse = ce_jax.softmax_statistics(**arguments).lse
    close(lse, reference.softmax_statistics(**arguments).lse, 1e-6)


def read(x, shape=None, classes=None):
    columns = Columns(jnp.ones(x.shape, jnp.float32), classes)
    dtype = jnp.dtype("float32")
    return one_reading._read_once(shape, dtype, True, jnp.asarray(x, dtype), columns)


@pytest.mark.parametrize("shape", [None, (4, 2, 16)], ids=["whole", "cut"])
def test_what_is_not_finite(shape):
    x = np.zeros((4, 32))
    x[0] = -np.inf
    x[1, 5:] = -np.inf
    x[2, 17] = np.inf
    x[3, 31] = np.nan
    part = read(x, shape, jnp.float32(0.5))
    np.testing.assert_array_equal(part.base, [-np.inf, 0, np.inf, np.nan])
    np.testing.assert_array_equal(part.sum_exp, [0, 5, np.nan, np.nan])
    np.testing.assert_array_equal(part.exp_dot, [0, 0, np.nan, np.nan])
    np.testing.assert_array_equal(part.target_sum, [32, 32, 32, 32])
    np.testing.assert_array_equal(part.target_dot, [-np.inf, -np.inf, np.nan, np.nan])
    np.testing.assert_array_equal(part.classes_count[:3], [0, 5, 32])
    np.testing.assert_array_equal(part.classes_sum[:3], [0, 2.5, 16])
    np.testing.assert_array_equal(part.classes_dot, [0, 0, np.nan, np.nan])


def test_sums_move_to_every_larger_maximum():
    """Of ascending logits each is a new one, and of far ones nothing is left."""
    x = np.stack([np.arange(1024) / 8, -np.arange(1024) / 8, 1e4 * np.arange(1024)])
    part = read(x, classes=jnp.float32(0.25))
    np.testing.assert_array_equal(part.base, x.max(-1))
    shifted = x - x.max(-1, keepdims=True)
    exp = np.exp(shifted)
    exact = {
        "sum_exp": exp,
        "exp_dot": exp * shifted,
        "target_dot": shifted,
        "classes_dot": shifted / 4,
        "classes_sum": np.full(x.shape, 0.25),
    }
    for name, summands in exact.items():
        np.testing.assert_allclose(getattr(part, name), summands.sum(-1), rtol=1e-6)


def test_a_move_may_overflow():
    """A class that is as good as masked, far below the largest logit there is."""
    logits = np.full((2, 64), -3e38, np.float32)
    logits[:, 40] = 3e38
    logits[1, 41] = 2.9e38
    targets = np.zeros_like(logits)
    targets[:, 40] = 1
    arguments = {"logits": logits, "labels": targets}
    found = jax.jit(ce_jax.softmax_cross_entropy)(**arguments)
    np.testing.assert_array_equal(found, [0, 0])
    found = jax.jit(ce_jax.softmax_cross_entropy)(**arguments, label_smoothing=0.0)
    np.testing.assert_array_equal(found, [0, 0])
    found = jax.jit(ce_jax.softmax_statistics)(logits, np.array([40, 40]))
    np.testing.assert_array_equal(found.entropy, [0, 0])


@pytest.mark.usefixtures("x64")
def test_derivatives_of_any_order():
    draw = np.random.default_rng(1)
    logits, labels = jnp.asarray(draw.normal(size=(2, 11))), np.array([3, 10])
    arguments = {"logits": np.asarray(logits), "labels": labels}

    def loss(z, **options):
        return ce_jax.softmax_cross_entropy_with_integer_labels(z, labels, **options).sum()

    truth = reference.hessian(
        reference.softmax_cross_entropy_with_integer_labels, arguments, "logits", np.ones(2)
    )
    np.testing.assert_allclose(jax.hessian(loss)(logits), truth, rtol=0, atol=1e-8)
    forward = functools.partial(loss, forward_mode=True)
    np.testing.assert_allclose(jax.jacfwd(forward)(logits), jax.grad(loss)(logits), atol=1e-14)
    np.testing.assert_allclose(jax.hessian(forward)(logits), truth, rtol=0, atol=1e-8)


def test_batches_of_logits_and_of_labels():
    draw = np.random.default_rng(2)
    logits = jnp.asarray(draw.normal(size=(3, 5, 20)), jnp.float32)
    labels = jnp.asarray(draw.integers(20, size=(3, 5)))
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(jax.vmap(loss)(logits, labels), loss(logits, labels), rtol=1e-6)
    for_each = jax.vmap(loss, (None, 0))(logits[0], labels)
    np.testing.assert_allclose(for_each[0], loss(logits[0], labels[0]), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_blocks_of_classes():
    draw = np.random.default_rng(3)
    hidden, kernel = draw.normal(size=(6, 4)), draw.normal(size=(4, 23))
    labels = draw.integers(23, size=6)
    for options in ({"reduction": "none"}, {"reduction": "mean"}):
        found = ce_jax.linear_softmax_cross_entropy(
            hidden, kernel, labels, memory_budget=1, **options
        )
        exact = reference.softmax_cross_entropy_with_integer_labels(
            hidden @ kernel, labels, **options
        )
        np.testing.assert_allclose(found, exact, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_program_for_a_gpu_reads_rows_once(monkeypatch, smoothing):
    monkeypatch.undo()
    monkeypatch.setattr(parts, "_may_be_sharded", lambda: False)
    jax.clear_caches()
    labels = jax.ShapeDtypeStruct((256,), jnp.int32)
    loss = jax.jit(
        functools.partial(
            ce_jax.softmax_cross_entropy_with_integer_labels, label_smoothing=smoothing
        )
    )

    def reduces(platform, classes):
        logits = jax.ShapeDtypeStruct((256, classes), jnp.float32)
        text = loss.trace(logits, labels).lower(lowering_platforms=(platform,)).as_text()
        whole = f"(tensor<256x{classes}xf32>, tensor<f32>)"
        return text.count("stablehlo.reduce"), text.count(whole)

    sums = 4 if smoothing else 2
    # One, of arrays of an eighth of the size.
    assert reduces("cuda", 16384) == (1, 0)
    assert reduces("tpu", 16384) == (sums, sums)
    # What stays in the cache is not worth it.
    assert reduces("cuda", 8192) == (sums, sums)
