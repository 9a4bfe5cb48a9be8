"""Each platform's way of reading a tile gives what the plain way does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax import _platform
from ce_jax._platform import cpu, gpu
from ce_jax._rows import tile

ROWS, CLASSES = 64, 1500
draw = np.random.default_rng(5)
LOGITS = 3 * draw.normal(size=(ROWS, CLASSES))
LOGITS[draw.random((ROWS, CLASSES)) < 0.1] = -np.inf
LABELS = np.nanargmax(np.where(np.isfinite(LOGITS), draw.random((ROWS, CLASSES)), -1), -1)
PROBS = np.where(np.isfinite(LOGITS), draw.dirichlet(np.ones(CLASSES), ROWS), 0)
WEIGHT = draw.uniform(0.5, 2, CLASSES)
COTANGENT = draw.normal(size=ROWS)

integer = ce_jax.softmax_cross_entropy_with_integer_labels
soft = ce_jax.softmax_cross_entropy
LOSSES = {
    "integer": lambda z: integer(z, LABELS),
    "smoothed": lambda z: integer(z, LABELS, label_smoothing=0.1, weight=WEIGHT, z_loss=0.01),
    "excluded": lambda z: integer(z, LABELS, label_smoothing=0.1, where=LABELS % 3 > 0),
    "soft": lambda z: soft(z, PROBS),
    "all of soft": lambda z: soft(z, PROBS, label_smoothing=0.2, weight=WEIGHT, z_loss=0.01),
    "statistics": lambda z: sum(ce_jax.softmax_statistics(z, LABELS)[:4]),
    "sigmoid": lambda z: ce_jax.sigmoid_binary_cross_entropy(jnp.clip(z, -9, 9), PROBS).sum(-1),
    "sigmoid of few": lambda z: ce_jax.sigmoid_binary_cross_entropy(
        jnp.clip(z[:, :9], -9, 9), PROBS[:, :9], pos_weight=WEIGHT[:9]
    ).sum(-1),
    "linear": lambda z: ce_jax.linear_softmax_cross_entropy(
        jnp.where(z > -jnp.inf, z, 0)[:, :40],
        jnp.asarray(LOGITS[:40]).clip(-1, 1).astype(z.dtype),
        LABELS,
        label_smoothing=0.1,
        memory_budget=1 << 16,
    ),
}


@pytest.fixture
def without_platforms(monkeypatch):
    def forget():
        monkeypatch.setattr(_platform, "normaliser", tile.normaliser)
        monkeypatch.setattr(_platform, "read", tile.read)
        monkeypatch.setattr(_platform, "reread", lambda *both: both)
        monkeypatch.setattr(_platform, "two_sums", lambda a, b: (a.sum(-1), b.sum(-1)))
        monkeypatch.setattr(_platform, "elementwise", lambda function, *arrays: function(*arrays))
        jax.clear_caches()

    monkeypatch.setattr(cpu, "_CACHED_BYTES", 0)
    jax.clear_caches()
    yield forget
    jax.clear_caches()


@pytest.mark.cpu
@pytest.mark.sweep
@pytest.mark.usefixtures("one_device", "x64")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_results_without_platforms(dtype, without_platforms):
    logits = jnp.asarray(LOGITS, dtype)

    def results():
        found = {}
        for name, of in LOSSES.items():
            loss, pull = jax.jit(lambda z, of=of: jax.vjp(of, z))(logits)
            found[name] = loss, pull(jnp.asarray(COTANGENT, loss.dtype))[0]
        return found

    found = results()
    without_platforms()
    plain = results()
    digits = 1e-13 if dtype == "float64" else 2e-6
    unit = float(jnp.finfo(dtype).eps) * (2 if dtype in ("bfloat16", "float16") else 16)
    for name, (loss, slope) in found.items():
        plain_loss, plain_slope = (np.asarray(x, float) for x in plain[name])
        np.testing.assert_allclose(loss, plain_loss, rtol=digits, err_msg=name)
        slope = np.asarray(slope, float)
        np.testing.assert_allclose(slope, plain_slope, rtol=unit, atol=unit, err_msg=name)


@pytest.mark.parametrize("classes", [1, 7, 8, 1000, 1503])
def test_the_normaliser_of_a_gpu(classes):
    """In the same maths on any platform: values, and derivatives of first and second order."""
    with jax.enable_x64(True):
        z = draw.normal(size=(5, classes)) * 20
        z[0] = -np.inf
        z[1, ::2] = -np.inf
        z = jnp.asarray(z)

        @functools.partial(jax.jit, static_argnums=0)
        def derivatives(normaliser, z):
            def log_sum(z):
                row_max, total = normaliser(z)
                return jnp.sum(jnp.cos(row_max + jnp.log(total)))

            row_max, total = normaliser(z)
            finite = z[2:]
            slope = jax.grad(log_sum)
            tangent = jnp.cos(finite)
            return row_max, total, slope(finite), jax.jvp(slope, (finite,), (tangent,))[1]

        found, wanted = (derivatives(x, z) for x in (gpu.normaliser, tile.normaliser))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


def test_the_two_sums_of_a_gpu():
    """Each is its own, whatever the other is; also their derivatives."""
    a, b = draw.normal(size=(2, 5, 31)).astype(np.float32)
    a[0, 3], b[1, 7], a[2, 5] = np.inf, -np.inf, np.nan
    wanted = a.sum(-1), b.sum(-1)
    for found, want in zip(gpu.two_sums(a, b), wanted, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    g = draw.normal(size=(2, 5)).astype(np.float32)
    for found, want in zip(jax.vjp(gpu.two_sums, a, b)[1](tuple(g)), g, strict=True):
        np.testing.assert_allclose(found, np.broadcast_to(want[:, None], a.shape))


@pytest.mark.sweep
@pytest.mark.usefixtures("one_device", "x64")
def test_second_derivatives_of_blocks(without_platforms, monkeypatch):
    """Under `jax.checkpoint` a second derivative does not use the rule of the first."""
    hidden, kernel = draw.normal(size=(3, 2)), draw.normal(size=(2, 12))

    def second():
        jax.clear_caches()
        options = {"label_smoothing": 0.1, "memory_budget": 1, "forward_mode": True}
        slope = jax.grad(
            lambda x: ce_jax.linear_softmax_cross_entropy(
                x, kernel, LABELS[:3] % 12, reduction="sum", **options
            )
        )
        return jax.jit(lambda x: jax.jvp(slope, (x,), (jnp.cos(x),))[1])(hidden)

    of_platform = second()
    without_platforms()
    plain = second()
    monkeypatch.setattr(_platform, "normaliser", gpu.normaliser)
    for found in (of_platform, second()):
        np.testing.assert_allclose(found, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 3, 1024, 1031, 131071, 131072])
def test_the_sums_of_a_cpu(classes):
    """Also of a prime number of classes no more are added up one by one than digits allow."""
    arrays = {name: jnp.asarray(draw.random((4, classes)), jnp.float32) for name in "ab"}
    for name, total in cpu.row_sums(arrays).items():
        np.testing.assert_allclose(total, np.sum(np.float64(arrays[name]), -1), rtol=5e-6)
    _, slopes = jax.jvp(cpu.row_sums, (arrays,), (arrays,))
    for name, slope in slopes.items():
        np.testing.assert_allclose(slope, np.sum(arrays[name], -1), rtol=1e-5, atol=1e-5)
