"""What the compiled programs allocate beside their arguments and results."""

import jax
import jax.numpy as jnp
import optax.losses
import pytest

import ce_jax

ROWS, CLASSES = 256, 4096
ALL = ROWS * CLASSES * 4


def temporaries(function, *arguments):
    """Bytes the program holds at once for what is neither argument nor result."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arguments]
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


LOGITS = ((ROWS, CLASSES), jnp.float32)
NARROW = ((ROWS, CLASSES), jnp.bfloat16)
LABELS = ((ROWS,), jnp.int32)


@pytest.mark.parametrize("logits", [LOGITS, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "z_loss": 1e-4, "weight": jnp.ones(CLASSES), "ignore_index": -1},
    ],
    ids=["plain", "smoothed", "all"],
)
def test_the_loss_of_ids_builds_no_target(options, logits):
    """Forward, whatever the options: nothing of the size of the logits, in no dtype."""
    used = temporaries(
        lambda z, y: ce_jax.softmax_cross_entropy_with_integer_labels(
            z, y, **options, reduction="mean"
        ),
        logits,
        LABELS,
    )
    assert used < ALL / 16


def test_statistics_build_nothing_of_the_logits_size():
    assert temporaries(ce_jax.softmax_statistics, LOGITS, LABELS) < ALL / 16


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_holds_one_array_of_the_logits_size(smoothing):
    """And no more than optax's: the weights, the mask and the reduction add none."""

    def ours(z, y):
        return ce_jax.softmax_cross_entropy_with_integer_labels(
            z,
            y,
            ignore_index=-100,
            weight=jnp.ones(CLASSES),
            label_smoothing=smoothing,
            reduction="mean",
        )

    def theirs(z, y):
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()

    used = temporaries(jax.value_and_grad(ours), LOGITS, LABELS)
    assert used < 1.1 * ALL
    assert used <= 1.02 * temporaries(jax.value_and_grad(theirs), LOGITS, LABELS)


def test_the_sigmoid_loss_and_its_gradient_are_one_pass():
    used = temporaries(
        jax.value_and_grad(
            lambda z, y: ce_jax.sigmoid_binary_cross_entropy(z, y, reduction="mean")
        ),
        LOGITS,
        LOGITS,
    )
    assert used < ALL / 16
