"""The library in the place of hand-written losses, in the manner of three public code bases.

Each model is small and each loss is written out as people have it. Values, gradients and 20 steps
of training agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ce_jax

pytestmark = pytest.mark.usefixtures("lenient", "cheap_programs")

VOCABULARY, WIDTH, BATCH, LENGTH = 23, 8, 8, 6
STEPS = 20


@pytest.fixture
def params():
    draw = np.random.default_rng(0)
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "dense": (WIDTH, WIDTH),
        "head": (WIDTH, VOCABULARY),
    }
    return {name: jnp.asarray(0.5 * draw.normal(size=s), jnp.float32) for name, s in shapes.items()}


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(1, VOCABULARY, (BATCH, LENGTH + 1)))


def hidden_states(params, inputs):
    """A causal mean of embeddings and a layer."""
    x = params["embedding"][inputs]
    positions = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)[None, :, None]
    return jnp.tanh(jnp.cumsum(x, 1) / positions @ params["dense"])


def trained(loss, params, steps=STEPS):
    """All losses on the way, and the parameters at the end."""
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        params, state = carry
        value, slopes = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slopes, state)
        return (optax.apply_updates(params, updates), state), (value, slopes)

    (params, _), (values, slopes) = jax.lax.scan(
        step, (params, optimizer.init(params)), length=steps
    )
    return values, params, jax.tree.map(lambda x: x[0], slopes)


def agree(ours, theirs, params):
    """Also after 20 steps, in which Adam divides by small numbers what differs by rounding."""
    (values, end, first), (expected, their_end, their_first) = (
        jax.jit(lambda p, loss=loss: trained(loss, p))(params) for loss in (ours, theirs)
    )
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-6)
    assert values[-1] < values[0]
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(their_first), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(their_end), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.cpu
def test_lm1b(params, tokens):
    """Flax' example: a share for the others, less its entropy; sums and weights over devices."""
    smoothing = 0.1
    inputs, targets = tokens[:, :-1], tokens[:, 1:].at[2, 4:].set(0).at[5].set(0)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def by_hand(params, inputs, targets):
        logits = hidden_states(params, inputs) @ params["head"]
        confidence, low = 1 - smoothing, smoothing / (VOCABULARY - 1)
        constant = -(
            confidence * jnp.log(confidence) + (VOCABULARY - 1) * low * jnp.log(low + 1e-20)
        )
        soft = jax.nn.one_hot(targets, VOCABULARY) * (confidence - low) + low
        losses = -jnp.sum(soft * jax.nn.log_softmax(logits), -1) - constant
        weights = jnp.where(targets > 0, 1.0, 0.0)
        return jnp.sum(losses * weights), jnp.sum(weights)

    eps = ce_jax.smoothing_over_others(smoothing, VOCABULARY)

    def with_library(params, inputs, targets):
        ratio = ce_jax.softmax_cross_entropy_with_integer_labels(
            hidden_states(params, inputs) @ params["head"],
            targets,
            label_smoothing=eps,
            ignore_index=0,
            reduction="ratio",
        )
        return ratio.total, ratio.denominator

    def over_devices(of_device):
        def local(params, inputs, targets):
            total, weights = jax.lax.psum(of_device(params, inputs, targets), "batch")
            return total / weights

        spread = (P(), P("batch"), P("batch"))
        on_devices = jax.shard_map(local, mesh=mesh, in_specs=spread, out_specs=P())
        return lambda params: on_devices(params, inputs, targets)

    entropy = ce_jax.smoothed_label_entropy(eps, VOCABULARY)
    ours = over_devices(with_library)
    agree(lambda params: ours(params) - entropy, over_devices(by_hand), params)


def test_maxtext(params, tokens):
    """A mask of segments, the z-loss logged beside the loss, the vocabulary in tiles."""
    z_loss = 1e-2
    segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 2, 0]], BATCH, 0)).at[3, 2:].set(0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)

    def by_hand(params):
        hidden = hidden_states(params, inputs)
        lse, label = [], jnp.zeros(targets.shape)
        for first in range(0, VOCABULARY, 10):
            logits = hidden @ params["head"][:, first : first + 10]
            lse.append(jax.nn.logsumexp(logits, -1))
            hit = targets[..., None] == first + jnp.arange(logits.shape[-1])
            label += jnp.sum(jnp.where(hit, logits, 0), -1)
        lse = jax.nn.logsumexp(jnp.stack(lse), 0)
        penalty = z_loss * jnp.square(lse)
        weights = jnp.sum(mask) + 1e-8
        return jnp.sum((lse - label + penalty) * mask) / weights, jnp.sum(penalty * mask) / weights

    def with_library(params):
        pairs = ce_jax.next_tokens(tokens, segment_ids=segments)
        loss, found = ce_jax.linear_softmax_cross_entropy(
            hidden_states(params, pairs.inputs),
            params["head"],
            pairs.labels,
            where=pairs.where,
            z_loss=z_loss,
            reduction="mean",
            return_statistics=True,
            memory_budget=8 * 10 * BATCH * LENGTH,
        )
        return loss, z_loss * jnp.sum(jnp.square(found.lse)) / jnp.sum(pairs.where)

    for ours, theirs in zip(with_library(params), by_hand(params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    agree(lambda p: with_library(p)[0], lambda p: by_hand(p)[0], params)


def test_policy_gradient(params, tokens):
    """Log-probabilities of tokens, an entropy bonus, the clipped ratio to an older policy."""
    low, high, bonus = 0.2, 0.3, 0.01
    draw = np.random.default_rng(2)
    inputs, actions = tokens[:, :-1], tokens[:, 1:]
    advantage = jnp.asarray(draw.normal(size=(BATCH, 1)), jnp.float32)
    answer = jnp.asarray(draw.random(actions.shape) < 0.6)
    older = jax.tree.map(lambda x: x + 0.2 * jnp.cos(7 * x), params)

    def by_hand(params):
        def log_probs(params):
            return jax.nn.log_softmax(hidden_states(params, inputs) @ params["head"])

        every = log_probs(params)
        new, old = (
            jnp.take_along_axis(x, actions[..., None], -1)[..., 0]
            for x in (every, log_probs(older))
        )
        ratio = jnp.exp(new - old)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)
        entropy = -jnp.sum(jnp.exp(every) * every, -1)
        return jnp.sum((-gain - bonus * entropy) * answer) / jnp.sum(answer)

    def with_library(params):
        def statistics(params):
            return ce_jax.linear_softmax_statistics(
                hidden_states(params, inputs), params["head"], actions, where=answer
            )

        found = statistics(params)
        loss = ce_jax.ppo_clip_loss(
            found.log_prob,
            statistics(older).log_prob,
            jnp.broadcast_to(advantage, actions.shape),
            low=low,
            high=high,
            where=answer,
            reduction="ratio",
        )
        return loss.mean() - bonus * jnp.sum(found.entropy) / jnp.sum(answer)

    agree(with_library, by_hand, params)
