"""What the compiled programs allocate beside their arguments and results."""

import jax
import jax.numpy as jnp
import optax.losses
import pytest

import ce_jax

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("one_device")]

ROWS, CLASSES = 256, 4096
ALL = ROWS * CLASSES * 4


def temporaries(function, *arguments):
    """Bytes the program holds at once for what is neither argument nor result."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def integer(z, y, **options):
    return ce_jax.softmax_cross_entropy_with_integer_labels(z, y, reduction="mean", **options)


def smoothed(z, y):
    return integer(z, y, label_smoothing=0.1, weight=jnp.ones(CLASSES), ignore_index=-1)


def optax_smoothed(z, y):
    one_hot = jax.nn.one_hot(y, CLASSES, dtype=z.dtype)
    return optax.losses.softmax_cross_entropy(z, optax.losses.smooth_labels(one_hot, 0.1)).mean()


IDS = ((ROWS,), jnp.int32)
# Name -> (our loss, optax's, what its labels are: None for the like of the logits).
LOSSES = {
    "integer": (
        integer,
        lambda z, y: optax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean(),
        IDS,
    ),
    "smoothed": (smoothed, optax_smoothed, IDS),
    "soft": (
        lambda z, t: ce_jax.softmax_cross_entropy(z, t, reduction="mean"),
        lambda z, t: optax.losses.softmax_cross_entropy(z, t).mean(),
        None,
    ),
    "poly": (
        lambda z, t: ce_jax.poly_loss_cross_entropy(z, t, reduction="mean"),
        lambda z, t: optax.losses.poly_loss_cross_entropy(z, t).mean(),
        None,
    ),
    "focal": (
        lambda z, t: ce_jax.sigmoid_focal_loss(z, t, reduction="mean"),
        lambda z, t: optax.losses.sigmoid_focal_loss(z, t).mean(),
        None,
    ),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_takes_no_more_than_optax(name, dtype):
    ours, theirs, labels = LOSSES[name]
    logits = ((ROWS, CLASSES), dtype)
    used = temporaries(jax.value_and_grad(ours), logits, labels or logits)
    # A page for scalars and rows.
    limit = temporaries(jax.value_and_grad(theirs), logits, labels or logits) + 4096
    assert used <= limit


@pytest.mark.parametrize(
    "loss", [ce_jax.sigmoid_focal_loss, ce_jax.binary_cross_entropy], ids=lambda f: f.__name__
)
def test_the_gradient_keeps_only_what_the_loss_is_given(loss):
    """Outside of `jit`, where no compiler chooses; with a mask, which the mean depends on too."""
    given = jnp.full((4, 8), 0.5)
    where = jnp.ones((4, 8), bool)
    _, pull = jax.vjp(lambda x: loss(x, given, where=where, reduction="mean"), given)
    kept = [x for x in jax.tree.leaves(pull) if x.size == given.size]
    assert len(kept) <= 3


@pytest.mark.parametrize(
    "loss", [ce_jax.sigmoid_focal_loss, ce_jax.binary_cross_entropy], ids=lambda f: f.__name__
)
def test_the_gradient_of_a_mean_adds_up_no_loss_again(loss):
    """It is recomputed for the gradient, and only the mask's sum is needed there."""
    given = jnp.full((4, 8), 0.5)
    where = jnp.ones((4, 8), bool)
    gradient = jax.grad(lambda x, where: loss(x, given, where=where, reduction="mean"))
    assert jax.jit(gradient).lower(given, where).as_text().count("stablehlo.reduce(") == 1


def test_nll_loss_has_no_gradient_in_float32():
    """Before it is compiled: XLA for a CPU makes one."""

    def loss(log_probs, labels):
        return ce_jax.nll_loss(log_probs, labels, reduction="mean")

    log_probs = jax.ShapeDtypeStruct((ROWS, CLASSES), jnp.bfloat16)
    program = jax.jit(jax.value_and_grad(loss)).lower(log_probs, jax.ShapeDtypeStruct(*IDS))
    assert f"<{ROWS}x{CLASSES}xbf16>" in program.as_text()
    assert f"<{ROWS}x{CLASSES}xf32>" not in program.as_text()


def test_the_gradient_of_a_smoothed_nll_loss_is_no_scatter():
    """A GPU would do that in an array of its own, in float32."""

    def loss(log_probs, labels):
        return ce_jax.nll_loss(log_probs, labels, label_smoothing=0.1, reduction="mean")

    log_probs = jax.ShapeDtypeStruct((ROWS, CLASSES), jnp.bfloat16)
    program = jax.jit(jax.value_and_grad(loss)).lower(log_probs, jax.ShapeDtypeStruct(*IDS))
    assert "gather" in program.as_text()
    assert "scatter" not in program.as_text()


def brier(z, y):
    return ce_jax.brier_score(z, y, reduction="mean")


@pytest.mark.parametrize(
    ("loss", "labels"), [(LOSSES["poly"][0], None), (brier, IDS)], ids=["poly", "brier"]
)
def test_one_array_of_the_logits_size(loss, labels):
    """The exponentials that the gradient is made of."""
    logits = ((ROWS, CLASSES), jnp.float32)
    assert temporaries(jax.value_and_grad(loss), logits, labels or logits) < 1.1 * ALL


@pytest.mark.parametrize(
    "function", [integer, smoothed, jax.value_and_grad(smoothed)], ids=["ids", "sums", "gradient"]
)
def test_bfloat16_logits_are_not_stored_in_float32(function):
    rows = 8 * ROWS
    used = temporaries(function, ((rows, CLASSES), jnp.bfloat16), ((rows,), jnp.int32))
    # A few numbers for each row, and the partial sums of smoothing: 16 for each.
    assert used <= 256 * rows


@pytest.mark.parametrize("row_option", [None, "ignore_index", "where", "sample_weight"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_the_loss_of_ids_and_its_gradient_build_nothing_of_the_logits_size(row_option, options):
    """Neither one-hot targets nor probabilities nor a copy in which rows are left out.

    Smoothing has two kinds of partial sums, each of sixteen logits.
    """
    logits = ((ROWS, CLASSES), jnp.float32)

    def loss(z, y):
        rows = {"ignore_index": -1, "where": y % 3 > 0, "sample_weight": (y % 3).astype(z.dtype)}
        return integer(z, y, **options, **{k: v for k, v in rows.items() if k == row_option})

    limit = ALL / (7 if options else 16)
    assert temporaries(loss, logits, IDS) < limit
    assert temporaries(jax.value_and_grad(loss), logits, IDS) < limit
