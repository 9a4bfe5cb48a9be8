"""What the tests of the linear form share: its problems, and how its work is divided in them."""

import jax.numpy as jnp
import numpy as np

import ce_jax
from tests import reference_linear
from tests.comparison import result_dtype
from tests.helpers import GARBAGE

# Fewer than the library's own, so that small problems have several blocks of tokens. Tests that
# depend on it set it with the fixture `few_tokens`.
FEWEST_TOKENS = 3
# What kernel, bias and weights hold beyond the classes.
PADDING = {"zeros": (0.0,), "numbers": (70.0, -30.0), "garbage": GARBAGE}


def linear_arguments(
    *,
    batch=(7,),
    width=3,
    classes=7,
    class_axis=-1,
    padding=None,
    bias=None,
    weight=False,
    sample_weight=False,
    where=False,
    ignore_index=None,
    temperature=None,
    seed=0,
    **options,
):
    """Inputs of the linear form, garbage in the rows that do not count and in the padding."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(classes, size=batch)
    hidden, kernel = draw.normal(size=(*batch, width)), draw.normal(size=(width, classes))
    per_class = {}
    if bias is not None:
        per_class["bias"] = draw.normal(size=classes)
    if bias == "-inf":
        unused = np.setdiff1d(np.arange(classes), labels)
        per_class["bias"][unused[: classes // 3]] = -np.inf
    if weight:
        per_class["weight"] = draw.uniform(0.5, 2.0, size=classes)
    if padding is not None:
        options["num_classes"] = classes
        beyond = np.resize(PADDING[padding], (width, 5))
        kernel = np.concatenate([kernel, beyond], axis=1)
        per_class = {k: np.append(v, beyond[0]) for k, v in per_class.items()}
    if where:
        options["where"] = draw.random(batch) < 0.7
    if ignore_index is not None:
        labels = np.where(draw.random(batch) < 0.3, ignore_index, labels)
        options["ignore_index"] = ignore_index
    counts = options.get("where", np.ones(batch, bool)) & (labels != ignore_index)
    hidden[~counts] = np.resize(GARBAGE, width)
    if temperature == "one":
        options["temperature"] = np.array(0.7)
    if temperature == "rows":
        options["temperature"] = draw.uniform(0.5, 2.0, size=batch)
    if sample_weight:
        weights = draw.uniform(0.5, 2.0, size=batch)
        if batch:
            weights[(1,) * len(batch)] = 0.0
        options["sample_weight"] = weights
    kernel = kernel if class_axis == -1 else kernel.T.copy()
    return {
        "hidden": hidden,
        "kernel": kernel,
        "labels": labels,
        "class_axis": class_axis,
        **per_class,
        **options,
    }


def focal(log_prob, gamma):
    return -log_prob * (-jnp.expm1(log_prob)) ** gamma


def loss(gamma=None, **arguments):
    """The library's loss; with a `gamma`, of the focal loss whose closure holds it."""
    if gamma is not None:
        arguments["log_prob_loss"] = lambda log_prob: focal(log_prob, gamma)
    return ce_jax.linear_softmax_cross_entropy(**arguments)


def loss_and_statistics(**arguments):
    """Loss and differentiable statistics of all rows as one vector."""
    value, found = loss(**arguments, return_statistics=True)
    return jnp.concatenate([x.ravel() for x in (value, *found[:-1])])


def true_loss_and_statistics(**arguments):
    of_statistics = {
        key: value
        for key, value in arguments.items()
        if key
        in (
            *("hidden", "kernel", "labels", "bias", "class_axis", "num_classes"),
            *("logit_soft_cap", "temperature", "where", "ignore_index"),
        )
    }
    value = reference_linear.linear_softmax_cross_entropy(**arguments)
    found = reference_linear.linear_softmax_statistics(**of_statistics)
    return np.concatenate([np.ravel(x) for x in (value, *found[:-1])])


def class_budget(rows, block, dtype="float32", steps=0):
    """The budget for this many classes at a time, where the work is divided by classes.

    `steps` counts what stands between the matmul and the logits: bias, soft cap, padding.
    """
    return block * max(rows, 1) * logit_bytes(dtype, steps)


def token_budget(classes, block, dtype="float32", steps=0):
    """The budget for this many rows at a time, where the work is divided by rows."""
    return block * classes * logit_bytes(dtype, steps)


def logit_bytes(dtype, steps=0):
    """What the library reckons for a logit, its gradient, and the steps to it."""
    return result_dtype(dtype).itemsize * (1 + steps) + jnp.dtype(dtype).itemsize
