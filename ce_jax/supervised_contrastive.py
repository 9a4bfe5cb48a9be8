"""Contrastive loss of embeddings with class labels."""

from __future__ import annotations

from jaxtyping import Array

from ._arguments import checks, reductions
from ._arguments.compiled import compiled
from ._arguments.options import scalar
from ._arguments.reductions import Reducer
from ._arguments.sides import gathered, reduced, sides
from ._arguments.types import ArrayLike, Loss, Reduction, Scalar, reducible
from ._rows import pairs, sharded


@reducible
def supervised_contrastive_loss(
    embeddings: ArrayLike,
    labels: ArrayLike,
    where: ArrayLike | None = None,
    *,
    logit_scale: Scalar = 1.0,
    sample_weight: ArrayLike | None = None,
    axis_name: str | None = None,
    reduction: Reduction = "none",
    memory_budget: int | None = None,
    forward_mode: bool = False,
) -> Loss:
    r"""Mean cross-entropy of picking an example of the same class out of all other examples.

    With :math:`P_i` the other examples with the label of example i:

    .. math::
      \ell_i = \frac{1}{|P_i|} \sum_{p \in P_i} \Big( \log \sum_{j \ne i} e^{z_{ij}} - z_{ip} \Big),
      \qquad z_{ij} = s \langle x_i, x_j \rangle

    An example that is the only one of its class does not count, but it is a negative of the others.
    For cosines, normalise the embeddings first. Several views of one image are several examples; if
    the labels are the numbers of the images, this is the loss of SimCLR. The logits of all pairs
    are computed in blocks, and again for the gradient.

    Args:
      embeddings: `[N, D]`, floating.
      labels: class ids `[N]`, of any integer dtype and any value.
      where: bool `[N]`: the examples that exist. Others are ignored.
      logit_scale: s, at least 0, the inverse of the temperature: the paper's is 10. May be traced.
      sample_weight: weight of each example's loss, broadcastable to `[N]`.
      axis_name: mapped mesh axis (inside `jax.shard_map`) over which all arrays are sharded by
        rows. Each example is compared with the examples of all devices.
      reduction: "none": this device's losses `[N]`; "sum", "ratio" or "mean": over all devices, the
        last divided by `sum(sample_weight)` of the examples that count (0 if that is 0).
      memory_budget: bytes that a block of logits and its gradient may take, by default a third
        of the bytes of `embeddings`, but at least 256 MB and at most 1 GB; 17 MB on a CPU.
      forward_mode: True for `jax.jvp`, `jax.jacfwd` and `jax.linearize`, which cannot use the
        custom gradient; JAX then differentiates by its own rules.

    Returns:
      The loss, `[N]` or `[]`, in float32 (float64 for float64 embeddings).

    Raises:
      TypeError: for a dtype or type that does not fit.
      ValueError: for a shape or a value that does not fit, and for embeddings that, to JAX, do not
        vary over `axis_name`.

    Example:
      >>> import jax.numpy as jnp, ce_jax
      >>> embeddings = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, -0.8]])
      >>> labels = jnp.array([0, 0, 1, 2])
      >>> loss = ce_jax.supervised_contrastive_loss(embeddings, labels, logit_scale=10.0)
      >>> print(loss)
      [0.1273 0.127  0.     0.    ]

    References:
      Khosla et al., `Supervised Contrastive Learning`, 2020, equation 2. SimCLR: Chen et al.,
      `A Simple Framework for Contrastive Learning of Visual Representations`, 2020.
    """
    return _supervised_contrastive(
        embeddings,
        labels,
        where,
        scalar("logit_scale", logit_scale, low=0.0),
        sample_weight,
        axis_name=axis_name,
        reduction=reductions.reducer(reduction),
        memory_budget=checks.memory_budget(memory_budget),
        forward_mode=forward_mode,
    )


@compiled
def _supervised_contrastive(
    embeddings: Array,
    labels: Array,
    where: Array | None,
    logit_scale: Array,
    sample_weight: Array | None,
    *,
    axis_name: str | None,
    reduction: Reducer,
    memory_budget: int | None,
    forward_mode: bool,
) -> Loss:
    name = "embeddings"
    x = sides(name, embeddings, name, embeddings, where, logit_scale, axis_name)
    labels = checks.integer("labels", labels)
    checks.shape_is("labels", labels, x.rows.shape[:1], "one class id per row")
    labels = sharded.like(labels, x.rows)
    x = x._replace(row_group=labels, column_group=gathered(labels, axis_name))
    loss, counts = pairs.against_group(x, memory_budget=memory_budget, forward_mode=forward_mode)
    counts = checks.both(x.row_counts, counts)
    return reduced(loss, counts, sample_weight, axis_name, reduction)
