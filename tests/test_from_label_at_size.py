"""Rows read relative to their label's logit, at the sizes at which that is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._platform import from_label
from tests.comparison import accuracy, close

pytestmark = pytest.mark.usefixtures("one_device")


@jax.jit
def losses_and_slopes(logits, labels, cotangent):
    losses, pull = jax.vjp(
        lambda z: ce_jax.softmax_cross_entropy_with_integer_labels(z, labels), logits
    )
    return losses, *pull(cotangent)


def log_probs(logits):
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("spoilt", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("shape", [(8192, 10), (300000, 8), (8192, 300), (20, 40000)], ids=str)
def test_rows_far_from_0_or_spoilt(shape, offset, spoilt):
    """So many that a CPU's maximum passes over NaN. The spoilt row is the last of its block."""
    rows, classes = shape
    draw = np.random.default_rng(9)
    logits = (draw.normal(size=shape) + offset).astype(np.float32)
    labels = draw.integers(classes, size=rows)
    block = rows // from_label._block_count(jnp.asarray(logits))
    logits[block // 2, labels[block // 2]] -= 150
    others = np.ones(rows, bool)
    if spoilt is not None:
        others[block - 1] = False
        logits[block - 1, labels[block - 1]] = spoilt
    expected = log_probs(logits[others])
    is_label = labels[others, None] == np.arange(classes)

    losses, slopes = map(np.asarray, losses_and_slopes(logits, labels, np.ones(rows, np.float32)))
    close(losses[others], -expected[is_label], 4e-6)
    np.testing.assert_allclose(slopes[others], np.exp(expected) - is_label, rtol=0, atol=2e-6)
    if spoilt == -np.inf:
        np.testing.assert_array_equal(losses[~others], np.inf)
    elif spoilt is not None:
        assert np.isnan(losses[~others])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "blocks"), [((64, 33, 1000), 32), ((1, 2100, 1000), 1), ((262176, 8), 32)], ids=str
)
def test_blocks(shape, blocks, dtype):
    """Two unlikely labels in different ones."""
    draw = np.random.default_rng(6)
    z = draw.normal(size=shape)
    labels = draw.integers(shape[-1], size=shape[:-1])
    rows = labels.size
    for row in (rows // 2, rows - 1):
        z.reshape(rows, -1)[row, labels.flat[row]] -= 150.0
    logits = jnp.asarray(z, dtype)
    assert from_label._block_count(logits) == blocks
    expected = log_probs(np.asarray(logits, np.float64))
    is_label = labels[..., None] == np.arange(shape[-1])
    cotangent = draw.normal(size=labels.shape).astype(np.float32)
    losses, slopes = losses_and_slopes(logits, labels, cotangent)
    close(losses, -expected[is_label].reshape(labels.shape), 4e-6)
    close(slopes, cotangent[..., None] * (np.exp(expected) - is_label), accuracy(dtype))
