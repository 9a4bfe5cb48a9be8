"""Next-token labels and masks, sums over tokens, perplexity, bits per byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests import reference_post_training
from tests.comparison import compare

pytestmark = pytest.mark.usefixtures("cheap_programs")

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


@pytest.mark.parametrize("shift", [1, 2, 4, 6, 9])
@pytest.mark.parametrize("options", [(), ("segments",), ("where", "pad_id")])
def test_several_tokens_ahead(shift, options):
    """Written out pair by pair; the shorter form is the longer one without its end."""
    tokens = np.array([[5, 6, 7, 8, 9, 0], [3, 1, 3, 4, 3, 3]], np.int8)
    # In the second row documents that are alike stand on both sides of another.
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 1, 1, 1]])
    chosen = np.array([[True, True, False, True, True, True]])
    given = {}
    given |= {"segment_ids": segments} if "segments" in options else {}
    given |= {"where": chosen} if "where" in options else {}
    given |= {"pad_id": 3} if "pad_id" in options else {}
    labels, counts = np.zeros((2, 6), np.int8), np.zeros((2, 6), bool)
    for row in range(2):
        for t in range(6 - shift):
            label = labels[row, t] = tokens[row, t + shift]
            counts[row, t] = True
            if "segments" in options:
                between = segments[row, t : t + shift + 1]
                counts[row, t] = (between == between[0]).all() and between[0] != 0
            if "where" in options:
                counts[row, t] &= chosen[0, t + shift] and label != 3
    kept = ce_jax.next_tokens(tokens, shift=shift, keep_length=True, **given)
    for found, wanted in zip(kept, (tokens, labels, counts), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    if shift <= 6:
        cut = ce_jax.next_tokens(tokens, shift=shift, **given)
        for found, whole in zip(cut, kept, strict=True):
            np.testing.assert_array_equal(found, whole[:, : 6 - shift])


@pytest.mark.cpu
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_sequence_that_is_sharded(axis_type):
    """Each device keeps its positions; the label of its last one is on the next device."""
    mesh = jax.make_mesh((4,), ("length",), axis_types=(axis_type,))
    spread = NamedSharding(mesh, P(None, "length"))
    tokens, segments = np.arange(16).reshape(2, 8) % 9, np.array([[1] * 5 + [2] * 3, [1] * 8])
    where = np.arange(8)[None] != 3
    ahead = jax.jit(
        lambda tokens, segments, where: ce_jax.next_tokens(
            tokens, shift=2, keep_length=True, segment_ids=segments, where=where, pad_id=4
        ),
        out_shardings=spread if axis_type == AxisType.Auto else None,
    )
    with jax.set_mesh(mesh):
        found = ahead(*(jax.device_put(x, spread) for x in (tokens, segments, where)))
        if axis_type == AxisType.Explicit:  # as its cause, and the reason for the option
            with pytest.raises(Exception, match="not divisible"):
                ce_jax.next_tokens(jax.device_put(tokens, spread))
    wanted = ce_jax.next_tokens(
        tokens, shift=2, keep_length=True, segment_ids=segments, where=where, pad_id=4
    )
    for x, y in zip(found, wanted, strict=True):
        assert x.sharding.spec == P(None, "length")
        np.testing.assert_array_equal(x, y)


def test_heads_that_share_a_kernel_cost_what_they_cost_apart():
    """Several tokens ahead, of hidden states of all positions; the ends do not count."""
    draw = np.random.default_rng(0)
    hidden = jnp.asarray(draw.normal(size=(3, 2, 6, 4)), jnp.float32)
    kernel = jnp.asarray(draw.normal(size=(4, 9)), jnp.float32)
    ahead = [ce_jax.next_tokens(TOKENS, shift=s, keep_length=True) for s in (1, 2, 3)]
    labels, where = (jnp.stack([getattr(x, name) for x in ahead]) for name in ("labels", "where"))
    loss = ce_jax.linear_softmax_cross_entropy
    together = loss(hidden, kernel, labels, where=where, reduction="sum")
    apart = [
        loss(h[:, :-s], kernel, ce_jax.next_tokens(TOKENS, shift=s).labels, reduction="sum")
        for s, h in enumerate(hidden, 1)
    ]
    np.testing.assert_allclose(together, sum(apart), rtol=1e-6)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_log_probability_of_a_sequence(mean, dtype):
    log_prob = np.random.default_rng(0).uniform(-9, 0, (3, 2, 4))
    where = np.random.default_rng(1).random(log_prob.shape) < 0.6
    where[0, 1] = False  # nothing at all
    log_prob[~where] = np.resize([-np.inf, np.nan, np.inf], (~where).sum())
    arguments = {"log_prob": log_prob, "where": where, "mean": mean}
    truth = reference_post_training.sequence_log_prob
    compare(ce_jax.sequence_log_prob, truth, arguments, dtype=jnp.dtype(dtype))
    assert ce_jax.sequence_log_prob(log_prob, where, mean=mean)[0, 1] == 0


def test_log_probability_of_sequences_of_any_length():
    for where in (None, True, np.ones((1, 3), bool), jnp.array([[True], [True]])):
        found = ce_jax.sequence_log_prob(-jnp.ones((2, 3)), where, mean=True)
        np.testing.assert_array_equal(found, -1)
    empty = ce_jax.sequence_log_prob(jnp.zeros((2, 0)), mean=True)
    np.testing.assert_array_equal(empty, jnp.zeros(2))
    assert ce_jax.sequence_log_prob(jnp.array([-1.0, -jnp.inf])) == -jnp.inf


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
            lambda: ce_jax.next_tokens(TOKENS, shift=7),
            ValueError,
            r"tokens .* L >= 7, the shift; write keep_length=True, got \(2, 6\)",
        ),
        (lambda: ce_jax.next_tokens(TOKENS, shift=0), ValueError, "shift .* 0"),
        (lambda: ce_jax.next_tokens(TOKENS, shift=1.5), TypeError, "shift"),
        (
            lambda: ce_jax.next_tokens(TOKENS[:, :0], keep_length=True),
            ValueError,
            r"tokens .*\(2, 0\)",
        ),
        (lambda: ce_jax.sequence_log_prob(0.5), ValueError, r"log_prob .*\(\)"),
        (lambda: ce_jax.sequence_log_prob(TOKENS), TypeError, "log_prob .* floating"),
        (
            lambda: ce_jax.sequence_log_prob(jnp.zeros((3, 3)), jnp.ones(3, bool)),
            ValueError,
            r"where .*\(3, 3\).*\(3,\)",
        ),
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
