"""Trainings, studies and benchmarks with the public functions of `ce_jax`.

The modules at the top are the commands, and each opens with its own; the folders hold what the
commands share.
"""
