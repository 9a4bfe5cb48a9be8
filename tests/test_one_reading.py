"""A row read once for its maximum and its sum, as on a GPU; here a CPU runs what that would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax import _one_reading, _parts
from tests import reference
from tests.comparison import check, close, together
from tests.helpers import LAYOUTS, covering, softmax_arguments

IDS = "softmax_cross_entropy_with_integer_labels"


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, one_device):
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *args, **own: own.get("cuda", own["default"])(*args)
    )


@pytest.fixture
def cut(monkeypatch):
    """Limits so small that a GPU would cut every row of four."""
    monkeypatch.setattr(_parts, "_LONGEST_ON_GPU", 1)
    monkeypatch.setattr(_parts, "_SHORTEST", 1)
    monkeypatch.setattr(_one_reading, "_SIDE_BY_SIDE", 2)


CASES = covering(
    layout=[*LAYOUTS],
    where=[None, "rows", "classes"],
    masked=[False, True],
    weight=[False, True],
    label_smoothing=[0.0, 0.3],
    dtype=["float32", "float64", "bfloat16"],
)


@pytest.mark.sweep
@together(CASES)
def test_losses(case):
    dtype = jnp.dtype(case.pop("dtype"))
    check(IDS, softmax_arguments(**case), dtype=dtype)


@pytest.mark.sweep
@pytest.mark.usefixtures("cut")
@together(CASES)
def test_losses_of_cut_rows(case):
    dtype = jnp.dtype(case.pop("dtype"))
    check(IDS, softmax_arguments(**case), dtype=dtype)


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


def read(x, shape=None):
    base, total = _one_reading._at_once(shape, jnp.dtype("float32"), jnp.asarray(x, jnp.float32))
    return np.asarray(base), np.asarray(total)


@pytest.mark.parametrize("shape", [None, (4, 2, 16)], ids=["whole", "cut"])
def test_what_is_not_finite(shape):
    x = np.zeros((4, 32))
    x[0] = -np.inf
    x[1, 5:] = -np.inf
    x[2, 17] = np.inf
    x[3, 31] = np.nan
    base, total = read(x, shape)
    np.testing.assert_array_equal(base, [-np.inf, 0, np.inf, np.nan])
    np.testing.assert_array_equal(total, [0, 5, np.nan, np.nan])


def test_sums_move_to_every_larger_maximum():
    """Of ascending logits each is a new one, and of far ones nothing is left."""
    x = np.stack([np.arange(1024) / 8, -np.arange(1024) / 8, 1e4 * np.arange(1024)])
    base, total = read(x)
    np.testing.assert_array_equal(base, x.max(-1))
    exact = np.exp(x - x.max(-1, keepdims=True)).sum(-1)
    np.testing.assert_allclose(total, exact, rtol=1e-6)


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


def test_a_program_for_a_gpu_reads_rows_once(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_parts, "_may_be_sharded", lambda: False)
    jax.clear_caches()
    shape = jax.ShapeDtypeStruct((256, 4096), jnp.float32)
    labels = jax.ShapeDtypeStruct((256,), jnp.int32)
    loss = jax.jit(ce_jax.softmax_cross_entropy_with_integer_labels)

    def reduces(platform):
        text = loss.trace(shape, labels).lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.reduce"), text.count("tensor<256x4096xf32>, tensor<f32>")

    # One, of two arrays of an eighth of the size.
    assert reduces("cuda") == (1, 0)
    assert reduces("tpu") == (2, 2)
