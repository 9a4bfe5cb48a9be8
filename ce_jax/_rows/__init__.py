"""Computation: statistics of rows, losses of rows, and their derivatives.

`tile` is the file to read first: the maths of one tile of logits. Formulas are plain `jax.numpy`;
rules of derivatives, loops and collectives use `jax.lax`. What only a platform or its compiler
explains lives in `_platform`, checks of arguments in `_arguments`.
"""
