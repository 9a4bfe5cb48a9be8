"""Next-token labels and masks, perplexity, bits per byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax

TOKENS = np.array([[5, 6, 7, 8, 0, 0], [3, 3, 3, 3, 3, 3]])
SEGMENTS = np.array([[1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 3]])


def test_shift():
    found = ce_jax.next_tokens(TOKENS)
    np.testing.assert_array_equal(found.inputs, TOKENS[:, :-1])
    np.testing.assert_array_equal(found.labels, TOKENS[:, 1:])
    assert found.where.all()


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("pad_id", [None, 0, 3, 1000])
@pytest.mark.parametrize("where", [False, True])
def test_mask(segments, pad_id, where):
    """Written out pair by pair."""
    chosen = np.array([True, True, True, False, True, True])
    options = {"pad_id": pad_id}
    options |= {"segment_ids": SEGMENTS} if segments else {}
    options |= {"where": chosen[None]} if where else {}
    expected = np.ones((2, 5), bool)
    for row in range(2):
        for t in range(5):
            if TOKENS[row, t + 1] == pad_id or (where and not chosen[t + 1]):
                expected[row, t] = False
            if segments and SEGMENTS[row, t + 1] in {0} | {*SEGMENTS[row]} - {SEGMENTS[row, t]}:
                expected[row, t] = False
    found = ce_jax.next_tokens(TOKENS.astype(np.uint8), **options)
    np.testing.assert_array_equal(found.where, expected)


@pytest.mark.parametrize(
    ("dtype", "pad_id", "as_stored"), [("uint8", -1, 255), ("uint8", 256, 0), ("int8", 300, 44)]
)
def test_a_pad_id_that_no_token_can_have(dtype, pad_id, as_stored):
    """Nothing is padding: neither what it would be stored as, nor anything else."""
    tokens = np.array([1, as_stored, 3, as_stored], dtype)
    found = ce_jax.next_tokens(tokens, pad_id=pad_id)
    np.testing.assert_array_equal(found.where, True)
    np.testing.assert_array_equal(found.labels, tokens[1:])


def test_packed_documents_cost_what_they_cost_apart():
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(size=(6, 9)), jnp.float32)
    loss = ce_jax.softmax_cross_entropy_with_integer_labels
    packed = ce_jax.next_tokens(TOKENS[0], segment_ids=SEGMENTS[0])
    together = loss(logits[:-1], packed.labels, where=packed.where, reduction="sum")
    parts = [ce_jax.next_tokens(TOKENS[0, a:b]) for a, b in ((0, 2), (2, 4))]
    apart = loss(logits[:1], parts[0].labels)[0] + loss(logits[2:3], parts[1].labels)[0]
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    assert ce_jax.mean_denominator(packed.labels, where=packed.where) == 2


def test_short_sequences_and_transforms():
    assert ce_jax.next_tokens(jnp.array([4])).labels.shape == (0,)
    together = ce_jax.next_tokens(TOKENS, segment_ids=SEGMENTS)
    one_by_one = jax.vmap(lambda t, s: ce_jax.next_tokens(t, segment_ids=s))(
        jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)
    )
    jax.tree.map(np.testing.assert_array_equal, together, one_by_one)
    assert jax.jit(ce_jax.next_tokens)(TOKENS).where.dtype == bool


def test_perplexity_and_bits_per_byte():
    total, count = np.array([10.0, 3.0, 0.0]), np.array([5, 3, 4])
    np.testing.assert_allclose(ce_jax.perplexity(total, count), np.exp(total / count), rtol=1e-6)
    bits = ce_jax.bits_per_byte(total, count)
    np.testing.assert_allclose(bits, np.log2(np.exp(total)) / count, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp2(bits), ce_jax.perplexity(total, count), rtol=1e-6)
    for function in (ce_jax.perplexity, ce_jax.bits_per_byte):
        assert jnp.isnan(function(0.0, 0))
        assert function(jnp.float16(1.0), 2).dtype == jnp.float32
    slope = jax.grad(ce_jax.perplexity)(2.0, 4.0)
    np.testing.assert_allclose(slope, np.exp(0.5) / 4, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jvp(lambda x: ce_jax.bits_per_byte(x, 4), (2.0,), (1.0,))[1],
        1 / (4 * np.log(2)),
        rtol=1e-6,
    )
    with jax.enable_x64(True):
        assert ce_jax.perplexity(np.float64(1.0), 2).dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ce_jax.next_tokens(jnp.zeros(3)), TypeError, "tokens .* integer"),
        (lambda: ce_jax.next_tokens(3), ValueError, r"tokens .*\(\)"),
        (
            lambda: ce_jax.next_tokens(TOKENS, segment_ids=SEGMENTS[0]),
            ValueError,
            r"segment_ids .*\(2, 6\).*\(6,\)",
        ),
        (lambda: ce_jax.next_tokens(TOKENS, where=TOKENS), TypeError, "where .* bool"),
        (lambda: ce_jax.next_tokens(TOKENS, pad_id=0.5), TypeError, "pad_id"),
        (
            lambda: ce_jax.perplexity(jnp.zeros(2), jnp.zeros(3)),
            ValueError,
            r"count must have .*\(2,\).*total.*\(3,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
