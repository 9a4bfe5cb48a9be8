"""The losses of `ce_jax` and of other JAX libraries, as a user of each would write them."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ce_jax
from experiments.benchmarking.problems import ENTROPY_BONUS, IGNORED, SMOOTHING
from experiments.benchmarking.programs import Loss, Peer, jax_program


def _ce_jax() -> dict[str, Loss]:
    integer = partial(ce_jax.softmax_cross_entropy_with_integer_labels, reduction="mean")
    linear = partial(ce_jax.linear_softmax_cross_entropy, reduction="mean")

    def statistics(z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = ce_jax.softmax_statistics(z, y)
        return -jnp.mean(found.log_prob + ENTROPY_BONUS * found.entropy), found.argmax

    return {
        "integer": integer,
        "one-hot": partial(ce_jax.softmax_cross_entropy, reduction="mean"),
        "ignored": partial(integer, ignore_index=IGNORED),
        "weighted": lambda z, y, w: integer(z, y, weight=w),
        "smoothed": partial(integer, label_smoothing=SMOOTHING),
        "sigmoid": partial(ce_jax.sigmoid_binary_cross_entropy, reduction="mean"),
        "statistics": statistics,
        "linear": linear,
        "masked": partial(linear, ignore_index=IGNORED),
        "mixed": linear,
    }


def _optax() -> dict[str, Loss]:
    integer = optax.losses.softmax_cross_entropy_with_integer_labels
    soft = optax.losses.softmax_cross_entropy

    def ignored(z: jax.Array, y: jax.Array) -> jax.Array:
        counts = y != IGNORED
        return jnp.mean(integer(z, jnp.where(counts, y, 0)), where=counts)

    def weighted(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(integer(z, y) * w[y]) / jnp.sum(w[y])

    def smoothed(z: jax.Array, y: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
        return jnp.mean(soft(z, optax.losses.smooth_labels(one_hot, SMOOTHING)))

    def statistics(z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        entropy = soft(z, jax.nn.softmax(z))
        return jnp.mean(integer(z, y) - ENTROPY_BONUS * entropy), jnp.argmax(z, -1)

    return {
        "integer": lambda z, y: jnp.mean(integer(z, y)),
        "one-hot": lambda z, q: jnp.mean(soft(z, q)),
        "ignored": ignored,
        "weighted": weighted,
        "smoothed": smoothed,
        "sigmoid": lambda z, t: jnp.mean(optax.losses.sigmoid_binary_cross_entropy(z, t)),
        "statistics": statistics,
        "linear": lambda h, k, y: jnp.mean(integer(h @ k, y)),
        "masked": lambda h, k, y: ignored(h @ k, y),
        "mixed": lambda h, k, y: jnp.mean(integer(h @ k.astype(h.dtype), y)),
    }


def _plain() -> dict[str, Loss]:
    def picked(log_p: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.take_along_axis(log_p, y[:, None], axis=-1)[:, 0]

    def ignored(z: jax.Array, y: jax.Array) -> jax.Array:
        counts = y != IGNORED
        loss = -picked(jax.nn.log_softmax(z), jnp.where(counts, y, 0))
        return jnp.mean(loss, where=counts)

    def weighted(z: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        return -jnp.sum(w[y] * picked(jax.nn.log_softmax(z), y)) / jnp.sum(w[y])

    def smoothed(z: jax.Array, y: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(z)
        loss = (1 - SMOOTHING) * picked(log_p, y) + SMOOTHING * jnp.mean(log_p, -1)
        return -jnp.mean(loss)

    def statistics(z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(z)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return -jnp.mean(picked(log_p, y) + ENTROPY_BONUS * entropy), jnp.argmax(z, -1)

    return {
        "integer": lambda z, y: -jnp.mean(picked(jax.nn.log_softmax(z), y)),
        "one-hot": lambda z, q: -jnp.mean(jnp.sum(q * jax.nn.log_softmax(z), -1)),
        "ignored": ignored,
        "weighted": weighted,
        "smoothed": smoothed,
        "sigmoid": lambda z, t: jnp.mean(jax.nn.softplus(z) - t * z),
        "statistics": statistics,
        "linear": lambda h, k, y: -jnp.mean(picked(jax.nn.log_softmax(h @ k), y)),
        "masked": lambda h, k, y: ignored(h @ k, y),
        "mixed": lambda h, k, y: -jnp.mean(picked(jax.nn.log_softmax(h @ k.astype(h.dtype)), y)),
    }


def _keras() -> dict[str, Loss]:
    os.environ["KERAS_BACKEND"] = "jax"
    losses: Any = importlib.import_module("keras").losses

    def mean(name: str, **options: Any) -> Loss:
        function = getattr(losses, name)
        return lambda z, y: jnp.mean(function(y, z, from_logits=True, **options))

    return {
        "integer": mean("sparse_categorical_crossentropy"),
        "one-hot": mean("categorical_crossentropy"),
        "smoothed": lambda z, y: jnp.mean(
            losses.categorical_crossentropy(
                jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype),
                z,
                from_logits=True,
                label_smoothing=SMOOTHING,
            )
        ),
        "sigmoid": mean("binary_crossentropy"),
    }


def _tokamax(**options: Any) -> dict[str, Loss]:
    function: Any = importlib.import_module("tokamax").linear_softmax_cross_entropy_loss
    if options and "chunked_xla" not in (function.__doc__ or ""):
        raise NotImplementedError("this version has no chunked_xla")
    importlib.import_module("absl.flags").FLAGS([""])  # or it would read our command line as its
    return {
        "linear": lambda h, k, y: function(h, y, k, reduction="mean", **options),
        "mixed": lambda h, k, y: function(h, y, k.astype(h.dtype), reduction="mean", **options),
    }


# The modules and operations of the optional are named here: what is missing cannot tell them.
_OPTIONAL: dict[str, tuple[str, Callable[[], dict[str, Loss]], set[str]]] = {
    "keras": ("keras", _keras, {"integer", "one-hot", "smoothed", "sigmoid"}),
    "tokamax": ("tokamax", _tokamax, {"linear", "mixed"}),
    # The one that does not hold the logits, which it takes by default on a TPU alone.
    "tokamax chunked": (
        "tokamax",
        partial(_tokamax, implementation="chunked_xla"),
        {"linear", "mixed"},
    ),
}


def losses() -> dict[str, Mapping[str, Loss]]:
    """The losses of the libraries that are always there, by name and operation."""
    return {"ce_jax": _ce_jax(), "optax": _optax(), "jax.nn": _plain()}


def peers() -> list[Peer]:
    """All JAX peers, those that are not installed among them."""
    found = [_peer(name, functions, functions) for name, functions in losses().items()]
    for name, (module, load, operations) in _OPTIONAL.items():
        functions: dict[str, Loss] = {}
        missing = "" if importlib.util.find_spec(module) else "not installed"
        if not missing:
            try:
                functions = load()
            except Exception as error:  # Whatever goes wrong in it is its result.
                missing = f"cannot be used: {type(error).__name__}: {error}"
        found.append(_peer(name, operations, functions, missing))
    return found


def _peer(
    name: str, operations: Iterable[str], functions: Mapping[str, Loss], missing: str = ""
) -> Peer:
    return Peer(
        name,
        frozenset(operations),
        lambda problem, inputs: jax_program(functions[problem.formula], problem, inputs),
        missing,
    )
