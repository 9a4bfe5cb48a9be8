"""The transformer of the language-model experiment."""

import jax
import jax.numpy as jnp
from flax import nnx

VOCABULARY = 256  # bytes
WIDTH = 64


class Block(nnx.Module):
    """Causal attention and a perceptron, each added to what it reads."""

    def __init__(self, width: int, *, heads: int = 4, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, keep_rngs=False, rngs=rngs
        )
        self.inner = nnx.Linear(width, 4 * width, rngs=rngs)
        self.outer = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, length, width]` to the same shape."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.outer(jax.nn.gelu(self.inner(self.norms[1](x))))


class LanguageModel(nnx.Module):
    """A transformer up to its last hidden states; `head` gives the kernel that follows."""

    def __init__(
        self, length: int, *, width: int = WIDTH, blocks: int = 2, tied: bool = True, rngs: nnx.Rngs
    ):
        self.tokens = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs=rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.untied = None if tied else nnx.Linear(width, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array, table: jax.Array | None = None) -> jax.Array:
        """Maps byte ids `[batch, length]` to hidden states `[batch, length, width]`.

        Args:
          tokens: byte ids.
          table: the table of embeddings, where the model's own is spread over devices.
        """
        table = self.tokens.embedding[...] if table is None else table
        x = table[tokens] + self.positions(jnp.arange(tokens.shape[-1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def head(self) -> tuple[nnx.Param[jax.Array], int]:
        """The kernel of the last layer and its class axis: the embedding table, if tied."""
        if self.untied is None:
            return self.tokens.embedding, 0
        return self.untied.kernel, 1
