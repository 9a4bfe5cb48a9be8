"""What is computed: statistics of rows, from logits to the loss of a row, and their derivatives.

`tile` is the file to read first: the maths of one tile of logits. All is plain `jax.numpy`. What
only a platform or its compiler explains lives in `_platform`, checks of arguments in `_arguments`.
"""
