"""Rows of 9 to 32 classes, of which a CPU finds the exponentials from maxima of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ce_jax
from ce_jax._rows import sums
from tests import reference
from tests.comparison import accuracy, check, close, together
from tests.helpers import LAYOUTS, covering, softmax_arguments

IDS = "softmax_cross_entropy_with_integer_labels"
ROWS = 5

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_device")]

draw = np.random.default_rng(17)


@pytest.fixture
def any_length(monkeypatch):
    monkeypatch.setattr(sums, "_UNROLLED_ROWS", range(1, 10**6))


@pytest.mark.sweep
@pytest.mark.usefixtures("any_length")
@together(
    covering(
        seed=5,
        layout=list(LAYOUTS),
        soft=[False, True],
        where=[None, "rows", "classes"],
        masked=[False, True],
        weight=[False, True],
        label_smoothing=[0.0, 0.3],
        z_loss=[0.0, 0.1],
        dtype=["float32", "float64", "bfloat16"],
    )
)
def test_options(case):
    dtype = jnp.dtype(case.pop("dtype"))
    check("softmax_cross_entropy" if case["soft"] else IDS, softmax_arguments(**case), dtype=dtype)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("classes", [8, 9, 16, 17, 23, 24, 31, 32, 33])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_all_lengths_nearby(classes, dtype, soft):
    logits = 3 * draw.normal(size=(ROWS, classes))
    logits[0] -= 1e4  # nothing would be left relative to 0
    logits[1, :-2] = -np.inf
    labels = np.full(ROWS, classes - 1)
    targets = np.where(np.isinf(logits), 0, draw.uniform(size=logits.shape))
    for smoothing in (0.0, 0.3):
        options = {"logits": logits, "label_smoothing": smoothing}
        if soft:
            check("softmax_cross_entropy", options | {"labels": targets}, dtype=dtype)
        else:
            check(IDS, options | {"labels": labels}, dtype=dtype)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("forward_mode", [False, True])
def test_second_derivatives_and_batches(forward_mode):
    logits = draw.normal(size=(2, 12))
    labels = np.array([1, 11])

    def both(logits, labels, library=ce_jax, **options):
        found = library.softmax_statistics(logits, labels, **options)
        return found.entropy - found.log_prob

    arguments = {"logits": logits, "labels": labels}
    truth = reference.hessian(
        lambda **a: both(**a, library=reference), arguments, "logits", np.ones(2)
    )
    derive = jax.hessian if forward_mode else lambda f: jax.jacrev(jax.grad(f))
    found = derive(lambda z: both(z, labels, forward_mode=forward_mode).sum())(jnp.asarray(logits))
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-8)

    batch = draw.normal(size=(3, 2, 12))
    found = jax.jit(jax.vmap(both, (0, None)))(jnp.asarray(batch), jnp.asarray(labels))
    for one, z in zip(found, batch, strict=True):
        close(one, both(z, labels, reference), 1e-13)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_normaliser_spoils_no_other(spoilt):
    logits = draw.normal(size=(ROWS, 20))
    labels = draw.uniform(size=logits.shape)
    expected = reference.softmax_cross_entropy(logits, labels)
    logits[2] = spoilt
    losses, pull = jax.vjp(
        lambda z: ce_jax.softmax_cross_entropy(z, labels), jnp.asarray(logits, jnp.float32)
    )
    (slope,) = pull(jnp.ones_like(losses))
    rest = np.array([0, 1, 3, 4])
    close(losses[rest], expected[rest], accuracy(losses.dtype))
    assert np.all(np.isfinite(slope[rest]))
    assert not np.isfinite(losses[2])
    assert np.all(np.isnan(slope[2]))


@pytest.mark.parametrize("classes", [10, 20, 32])
def test_exponentials_are_not_compiled_by_llvm(classes):
    """All of them are in one kernel of XLA's own, with the maxima, or in one that is flat."""

    def loss(z, q):
        return ce_jax.softmax_cross_entropy(z, q, reduction="mean")

    z = jax.ShapeDtypeStruct((4096, classes), jnp.float32)
    program = jax.jit(jax.value_and_grad(loss)).lower(z, z).compile().as_text()
    bodies = program.split("\n\n")
    finding = [body.split()[0] for body in bodies if " exponential(" in body]
    assert len(finding) == 1
    (call,) = [line for line in program.splitlines() if f"calls={finding[0]}" in line]
    assert "kind=kCustom" in call
