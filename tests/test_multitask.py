"""Losses of several tasks, weighted by their uncertainty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ce_jax

pytestmark = pytest.mark.usefixtures("cheap_programs")

LOSSES = {"digit": 2.3, "pair": (0.7, 1e-3)}
FUSED = jax.jit(jax.value_and_grad(ce_jax.uncertainty_weighted_loss, (0, 1)))
VARIANCES = {"digit": -0.4, "pair": (1.5, -6.0)}


def truth(log_variances, losses):
    pairs = zip(jax.tree.leaves(log_variances), jax.tree.leaves(losses), strict=True)
    return sum(np.exp(-s) * x + s / 2 for s, x in pairs)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_value_and_gradients(dtype):
    with jax.enable_x64(dtype == "float64"):
        tolerance = 1e-12 if dtype == "float64" else 2e-6
        s, losses = jax.tree.map(lambda x: jnp.asarray(x, dtype), (VARIANCES, LOSSES))
        value, slopes = jax.jit(jax.value_and_grad(ce_jax.uncertainty_weighted_loss, (0, 1)))(
            s, losses
        )
        assert value.dtype == dtype
        exact = jax.tree.map(lambda x: np.asarray(x, float), (s, losses))
        np.testing.assert_allclose(value, truth(*exact), rtol=tolerance)
        leaves = zip(*map(jax.tree.leaves, (*exact, *slopes)), strict=True)
        for s_i, loss, by_s, by_loss in leaves:
            np.testing.assert_allclose(by_s, 0.5 - np.exp(-s_i) * loss, rtol=4 * tolerance)
            np.testing.assert_allclose(by_loss, np.exp(-s_i), rtol=4 * tolerance)


def test_it_starts_as_the_plain_sum():
    s = ce_jax.init_log_variances(LOSSES)
    assert jax.tree.structure(s) == jax.tree.structure(LOSSES)
    np.testing.assert_allclose(
        ce_jax.uncertainty_weighted_loss(s, LOSSES), sum(jax.tree.leaves(LOSSES)), rtol=1e-6
    )
    half = ce_jax.init_log_variances(LOSSES, value=np.log(2.0))
    np.testing.assert_allclose(half["digit"], np.log(2.0), rtol=1e-6)
    narrow = ce_jax.init_log_variances(jnp.zeros((), jnp.bfloat16))
    assert narrow.dtype == jnp.float32


@pytest.mark.usefixtures("lenient")
def test_optax_finds_the_best_weights():
    losses = jax.tree.map(jnp.float32, {"a": 3.0, "b": 0.05})
    s = ce_jax.init_log_variances(losses)
    optimiser = optax.adam(0.05)

    @jax.jit
    def step(carry, _):
        s, state = carry
        slopes = jax.grad(ce_jax.uncertainty_weighted_loss)(s, losses)
        updates, state = optimiser.update(slopes, state)
        return (optax.apply_updates(s, updates), state), None

    (s, _), _ = jax.lax.scan(step, (s, optimiser.init(s)), length=1000)
    for name, loss in losses.items():
        np.testing.assert_allclose(jnp.exp(-s[name]), 1 / (2 * loss), rtol=1e-3)


@pytest.mark.parametrize("s", [-1e4, -200.0, -30.5, 200.0, 1e4])
@pytest.mark.parametrize("loss", [0.0, 1e-30, 1.0, 1e3])
def test_extreme_variances(s, loss):
    """Finite throughout, and the slope says which way back."""
    values = FUSED(s, loss)
    assert all(jnp.isfinite(x) for x in jax.tree.leaves(values))
    by_s = values[1][0]
    assert (by_s > 0) == (s > 0 or loss < 1e-13)


def test_the_tangent_joins_smoothly():
    around = jnp.array([-30.0 - 1e-3, -30.0, -30.0 + 1e-3])
    value, slope = jax.vmap(jax.value_and_grad(ce_jax.uncertainty_weighted_loss), (0, None))(
        around, 1.0
    )
    np.testing.assert_allclose(value, np.exp(30.0) * (1 - (around + 30.0)), rtol=2e-6)
    np.testing.assert_allclose(slope, -np.exp(30.0), rtol=2e-3)


def test_transforms():
    s = jnp.linspace(-1.0, 1.0, 3)
    losses = jnp.array([0.5, 1.0, 2.0])
    values = jax.vmap(ce_jax.uncertainty_weighted_loss)(s, losses)
    np.testing.assert_allclose(values, np.exp(-s) * losses + s / 2, rtol=1e-6)
    _, tangent = jax.jvp(ce_jax.uncertainty_weighted_loss, (0.0, 2.0), (1.0, 0.0))
    assert tangent == -1.5
    assert jax.hessian(ce_jax.uncertainty_weighted_loss)(0.0, 2.0) == 2.0
    assert jnp.isnan(ce_jax.uncertainty_weighted_loss(0.0, jnp.nan))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ce_jax.uncertainty_weighted_loss({"a": 0.0}, {"b": 0.0}),
            ValueError,
            "log_variances must have the structure",
        ),
        (lambda: ce_jax.uncertainty_weighted_loss({}, {}), ValueError, "at least one leaf"),
        (lambda: ce_jax.init_log_variances(1j), TypeError, "losses"),
        (lambda: ce_jax.init_log_variances(1.0, value=np.inf), ValueError, "value"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
