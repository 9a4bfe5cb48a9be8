"""The multilayer perceptron of the experiments."""

from collections.abc import Sequence
from itertools import pairwise

import jax
from flax import nnx

HIDDEN = (512, 256)


class MLP(nnx.Module):
    """Linear layers with a ReLU and dropout after each but the last.

    Parameters and arithmetic are float32; matmuls ask for the highest precision, because
    accelerators otherwise round their operands to fewer bits.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: Sequence[int] = HIDDEN,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        widths = (features, *hidden, outputs)
        self.layers = nnx.List(
            [
                nnx.Linear(
                    inputs,
                    width,
                    kernel_init=jax.nn.initializers.he_normal(),
                    precision=jax.lax.Precision.HIGHEST,
                    rngs=rngs,
                )
                for inputs, width in pairwise(widths)
            ]
        )
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, inputs: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Maps `[n, features]` to logits `[n, outputs]`; without a key nothing is dropped."""
        *hidden_layers, last = self.layers
        activations = inputs
        for index, layer in enumerate(hidden_layers):
            activations = jax.nn.relu(layer(activations))
            if dropout_key is not None:
                activations = self.dropout(
                    activations,
                    deterministic=False,
                    rngs=jax.random.fold_in(dropout_key, index),
                )
        return last(activations)
