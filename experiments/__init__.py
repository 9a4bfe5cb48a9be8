"""Scripts that train with the public functions of `ce_jax`. Each opens with its command."""
