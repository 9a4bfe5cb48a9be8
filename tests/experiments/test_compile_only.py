import importlib.util

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from experiments import compile_only

HLO = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  ROOT %e = f32[4,8]{1,0} exponential(%p)
}

ENTRY %main.3 (z: f32[4,8]) -> (f32[], f32[4,8]) {
  %z = f32[4,8]{1,0} parameter(0)
  %row_max = f32[4]{0} reduce(%z, %c), dimensions={1}
  %pair = (f32[4]{0}, f32[4,8]{1,0}) fusion(%z, %row_max), kind=kLoop, calls=%fused
  %exp = f32[4,8]{1,0} get-tuple-element(%pair), index=1
  %flat = f32[32]{0} bitcast(%exp)
  %dz = f32[4,8]{1,0} fusion(%flat, %row_max), kind=kLoop, calls=%fused
  ROOT %out = (f32[], f32[4,8]{1,0}) tuple(%c, %dz)
}
"""


def test_passes_are_reads_and_writes_of_the_entry():
    assert compile_only.passes(HLO, 4, 8) == (3, 2)
    assert compile_only.passes(HLO, 4, 9) == (0, 0)


def test_matmuls_are_counted_through_loops():
    def looped(a, b):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, b), None), a, length=3)[0] @ b

    jaxpr = jax.make_jaxpr(looped)(jnp.ones((2, 4)), jnp.ones((4, 4))).jaxpr
    assert compile_only.products(jaxpr) == 4 * 2 * 4 * 4


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    result = CliRunner().invoke(compile_only.app, ["--target", "v6e", "--target", "h200"])
    assert result.exit_code == 1
    assert "v6e: no plugin libtpu" in result.stderr
    assert "pip install jax[tpu]" in result.stderr
    assert "--no-deps jax-cuda13-plugin jax-cuda13-pjrt" in result.stderr


def test_losses_that_the_benchmark_does_not_time():
    """Each is compiled for the machine that is there, with optax's where it has one."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    others = compile_only.OTHERS
    programs = [x for x in compile_only.programs(4, 2, 128) if x.problem.operation in others]
    assert [x.name for x in programs if x.peer == "ce_jax"] == list(others)
    assert {x.name for x in programs if x.peer == "optax"} == {
        "poly_loss_cross_entropy",
        "sigmoid_focal_loss",
    }
    for program in programs:
        assert "MB |" in compile_only.compiled(program, sharding)
    milliseconds, unit = compile_only.compiled(programs[0], sharding, here=True).split()[-2:]
    assert float(milliseconds) > 0
    assert unit == "ms"


@pytest.mark.parametrize("module", ["jax_cuda13_plugin", "libtpu"])
def test_a_plugin_that_is_there_is_not_missing(module, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == module or None)
    compile_only._require(module, "")
