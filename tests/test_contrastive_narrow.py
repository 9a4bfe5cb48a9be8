"""Contrastive losses of narrow embeddings: the scale meets products in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests import reference, reference_contrastive
from tests.test_contrastive import PAIRS, budget, every_loss, of, problem, scalars
from tests.test_contrastive_sharded import DEVICES

pytestmark = pytest.mark.sweep


def naive(name, arguments):
    """Sum of the losses by the textbook, every step in the embeddings' own dtype."""
    first, *second = (arguments[key] for key in PAIRS[name])
    columns = second[0] if second else first
    scale = arguments["logit_scale"].astype(first.dtype)
    z = (scale * first) @ columns.T
    rows = np.arange(len(first))
    if name == "siglip_loss":
        z = z + arguments["logit_bias"].astype(first.dtype)
        return jnp.sum(jax.nn.softplus((1 - 2 * jnp.eye(*z.shape, dtype=z.dtype)) * z))
    if name == "clip_loss":
        both = jax.nn.log_softmax(z, 0) + jax.nn.log_softmax(z, 1)
        return -jnp.sum(both[rows, rows]) / 2
    if name == "info_nce_loss":
        return -jnp.sum(jax.nn.log_softmax(z)[rows, rows])
    others = ~np.eye(len(rows), dtype=bool)
    positives = others & (arguments["labels"][:, None] == arguments["labels"])
    number = np.maximum(positives.sum(-1, keepdims=True), 1)
    log_p = jax.nn.log_softmax(jnp.where(others, z, -jnp.inf))
    return -jnp.sum(jnp.where(positives, log_p, 0) / jnp.asarray(number, z.dtype))


@every_loss
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("forward_mode", [False, True])
def test_narrow_embeddings(name, dtype, forward_mode):
    """Unit vectors at CLIP's largest scale, in several blocks: no worse than the naive formula.

    The value is as good as that of float32 embeddings: the scale, which no narrow dtype holds,
    meets float32 products. Embeddings times the scale, rounded, would be off by hundredths.
    """
    draw = np.random.default_rng(0)
    arguments = problem(name, rows=12) | {"logit_scale": np.float32(99.7)}
    for key in PAIRS[name]:
        x = draw.normal(size=(12, 8))
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        arguments[key] = jnp.asarray(x, dtype)
    smooth = {k: v for k, v in arguments.items() if k in PAIRS[name]}
    smooth |= {k: jnp.float32(arguments[k]) for k in scalars(arguments)}
    rest = {k: v for k, v in arguments.items() if k not in smooth}
    exact = {k: np.asarray(v, np.float64) for k, v in smooth.items()} | rest
    options = budget(name, 12, 5, "float32") | {"forward_mode": forward_mode}

    def ours(smooth):
        return of(name)(**smooth, **rest, **options, reduction="sum")

    value, slopes = jax.jit(jax.value_and_grad(ours))(smooth)
    plain = jax.jit(jax.value_and_grad(lambda smooth: naive(name, smooth | rest)))(smooth)
    truth = functools.partial(of(name, reference_contrastive), reduction="sum")
    expected = truth(**exact)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    assert abs(value - expected) <= abs(np.float64(plain[0]) - expected)
    for key, slope in slopes.items():
        wanted = reference.vjp(truth, exact, key, 1.0)
        assert slope.dtype == smooth[key].dtype
        errors = [
            np.linalg.norm(np.asarray(found[key], np.float64) - wanted)
            for found in (slopes, plain[1])
        ]
        assert errors[0] <= errors[1], (key, errors)
    for key in scalars(arguments):
        np.testing.assert_allclose(slopes[key], reference.vjp(truth, exact, key, 1.0), rtol=1e-5)


@every_loss
def test_a_scale_that_takes_float16_beyond_its_range(name):
    """Embeddings of deviation 50 at scale 1000: scaled, the largest of them would be inf."""
    draw = np.random.default_rng(0)
    arguments = problem(name, rows=6) | {"logit_scale": np.float32(1000)}
    for key in PAIRS[name]:
        arguments[key] = jnp.asarray(50 * draw.normal(size=(6, 8)), jnp.float16)
    exact = {k: np.asarray(v, np.float64) if k != "labels" else v for k, v in arguments.items()}
    scale = arguments.pop("logit_scale")
    # In one program: in two, a CPU may round logits of a million differently before a difference.
    value_and_slope = jax.value_and_grad(
        lambda scale: of(name)(**arguments, logit_scale=scale, reduction="sum")
    )
    found, slope = jax.jit(value_and_slope)(scale)
    truth = functools.partial(of(name, reference_contrastive), reduction="sum")
    expected = truth(**exact)
    assert expected > 1e5
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, reference.vjp(truth, exact, "logit_scale", 1.0), rtol=1e-5)


@pytest.mark.cpu
@every_loss
def test_narrow_embeddings_over_devices(name):
    """As on one device; the gradient of the scale, the same on all, is the sum over all."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    arguments = problem(name, rows=8) | {"logit_scale": np.float32(30.3)}
    for key in PAIRS[name]:
        arguments[key] = jnp.asarray(arguments[key][:8], jnp.bfloat16)
    arrays = {k: jnp.asarray(v) for k, v in arguments.items()}
    arrays |= {k: arrays[k].astype(jnp.float32) for k in scalars(arguments)}
    specs = {k: P("data") if v.ndim else P() for k, v in arrays.items()}
    loss = functools.partial(of(name), axis_name="data", reduction="sum")
    sharded = jax.shard_map(lambda x: loss(**x), mesh=mesh, in_specs=(specs,), out_specs=P())
    exact = {
        k: np.asarray(v, np.float64) if v.ndim == 2 or not v.ndim else np.asarray(v)
        for k, v in arrays.items()
    }
    truth = functools.partial(of(name, reference_contrastive), reduction="sum")

    def of_scale(scale):
        return sharded(arrays | {"logit_scale": scale})

    value, slope = jax.jit(jax.value_and_grad(of_scale))(arrays["logit_scale"])
    np.testing.assert_allclose(value, truth(**exact), rtol=2e-6)
    expected = reference.vjp(truth, exact, "logit_scale", 1.0)
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
