"""Settings of the whole suite: strict promotion, eight CPU devices, repeatable property tests."""

import gc
import os

# Read when the backend starts, which is after every import. Most tests use one of the eight.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import pytest
from jax._src import compiler

from ce_jax._platform import block_sizes
from ce_jax._rows import sharded

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, which no deadline can tell from a slow test.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(config, items):
    if config.getoption("jaxtyping_packages", None):
        reason = "sizes are annotated as int, which symbolic ones are not"
        for item in items:
            if "symbolic" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
    if jax.default_backend() == "cpu":
        return
    skip = pytest.mark.skip(reason="needs CPU devices, and JAX has others here")
    for item in items:
        if item.get_closest_marker("cpu"):
            item.add_marker(skip)


def pytest_collection_finish():
    # What is imported stays, and each full collection would look through all of it again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Those of one module are of no use to the next, and slow down what looks for garbage."""
    yield
    jax.clear_caches()


# What XLA leaves out for `cheap_programs`. Older versions can also write a fused loop in one step,
# not in two.
_CHEAP = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):
    _CHEAP["xla_cpu_use_fusion_emitters"] = False
_OPTIONS_OF = compiler.get_compile_options


@pytest.fixture(scope="module")
def cheap_programs():
    """Lets XLA compile in a third of the time and leave out LLVM's optimisations.

    For modules that ask what a transform, an option or a reduction gives, and how often something
    is compiled. A test among them that looks at memory, rounding or extreme values takes
    `usual_programs`. For a whole module, because a program is compiled once and kept for the tests
    that follow. JAX has no public option for all programs of a process.
    """
    if jax.default_backend() != "cpu":
        yield
        return

    def cheap(*args, **kwargs):
        options = _OPTIONS_OF(*args, **kwargs)
        options.env_option_overrides = [*options.env_option_overrides, *_CHEAP.items()]
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", cheap)
        yield


@pytest.fixture
def usual_programs(monkeypatch):
    """Programs as users have them, for a test in a module of `cheap_programs`."""
    monkeypatch.setattr(compiler, "get_compile_options", _OPTIONS_OF)
    jax.clear_caches()
    yield
    jax.clear_caches()


def _on_one_device():
    """As on one, where a platform has its own ways: over the eight here arrays might be sharded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "_may_be_sharded", lambda: False)
        jax.clear_caches()  # it is asked when a loss is traced
        yield
    jax.clear_caches()


one_device = pytest.fixture(_on_one_device)
# Programs are kept for the tests of a module that follow.
module_on_one_device = pytest.fixture(scope="module")(_on_one_device)


@pytest.fixture(scope="module")
def tiles_of_one_row():
    """So that small batches too have tiles to leave out, those without a row that counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sizes, "rows", lambda tokens: 1)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture
def frozen_heap():
    """JAX's search for leaks collects garbage again and again: let it see new objects alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def lenient():
    """Jax's own default promotion, for code that is not ours."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
