"""Contrastive losses of a batch that is sharded over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests import reference, reference_contrastive
from tests.comparison import close
from tests.test_contrastive import PAIRS, budget, every_loss, of, problem

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cheap_programs")]

DEVICES = 4


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "reduction"), [*((name, "mean") for name in PAIRS), ("clip_loss", "none")]
)
def test_sharded_batch(name, reduction, mesh):
    """Value and gradients are those of one device, of arrays sharded and of replicated scalars."""
    options = {"where": True, "sample_weight": True} if reduction == "mean" else {}
    arguments = problem(name, rows=12, **options)
    if name == "info_nce_loss":
        arguments["keys"] = arguments["keys"][:12]
    arrays = {k: jnp.asarray(v) for k, v in arguments.items()}
    specs = {k: P("data") if v.ndim else P() for k, v in arrays.items()}
    more = {"axis_name": "data", "reduction": reduction, **budget(name, 3, 5, jnp.float64)}

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P() if reduction == "mean" else P("data"),
    )
    def sharded(arrays):
        return of(name)(**arrays, **more)

    truth = functools.partial(of(name, reference_contrastive), reduction=reduction)
    smooth = {k: v for k, v in arrays.items() if v.dtype == jnp.float64}
    rest = {k: v for k, v in arrays.items() if k not in smooth}
    value, pull = jax.vjp(lambda smooth: sharded(smooth | rest), smooth)
    expected = truth(**arguments)
    close(value, expected, 1e-12)
    cotangent = np.random.default_rng(3).normal(size=np.shape(expected))
    for key, gradient in pull(jnp.asarray(cotangent))[0].items():
        slope = reference.vjp(truth, arguments, key, cotangent)
        close(gradient, slope, 1e-11, key, np.max(np.abs(expected)))


@every_loss
def test_what_would_be_silently_wrong_raises(name, mesh):
    """Gradients without JAX's record of what varies, and embeddings that are not sharded."""
    arrays = {k: jnp.asarray(v) for k, v in problem(name, rows=8).items() if np.ndim(v)}
    arrays |= {k: v[:8].astype(jnp.float32) for k, v in arrays.items() if k in PAIRS[name]}
    for specs, options in ((P("data"), {"check_vma": False}), (P(), {})):
        local = functools.partial(of(name), axis_name="data", reduction="sum")
        sharded = jax.shard_map(
            lambda arrays, local=local: local(**arrays),
            mesh=mesh,
            in_specs=(dict.fromkeys(arrays, specs),),
            out_specs=P(),
            **options,
        )
        with pytest.raises(ValueError, match=rf"{PAIRS[name][0]} must vary .*'data'"):
            sharded(arrays)
