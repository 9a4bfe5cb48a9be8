"""Every transformation of JAX over every loss, in float64, against the truth's derivatives."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ce_jax
from tests.helpers import compilations
from tests.problems import INTEGER, PROBLEMS, SIGMOID, SOFT

pytestmark = pytest.mark.usefixtures("x64", "cheap_programs")

# All transforms of a kind are one program, since compiling is what takes the time.
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


def repeated(x, times=2):
    return jnp.stack([x] * times)


def scanned(f, x):
    return jax.lax.scan(lambda total, _: (total + f(x) / 3, None), 0.0, length=3)[0]


def accumulated_while(f, x):
    """Gradients taken inside a while loop."""

    def body(carry):
        step, total = carry
        return step + 1, total + jax.grad(f)(x) / 3

    return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (0, jnp.zeros_like(x)))[1]


GRADIENTS = {
    "grad": lambda f, x: jax.grad(f)(x),
    "value_and_grad": lambda f, x: jax.jit(jax.value_and_grad(f))(x)[1],
    "jacrev": lambda f, x: jax.jacrev(f)(x),
    "remat": lambda f, x: jax.grad(jax.checkpoint(f))(x),
    "scan": lambda f, x: jax.grad(lambda x: scanned(f, x))(x),
    "cond": lambda f, x: jax.grad(lambda x: jax.lax.cond(x[0].sum() < 1e9, f, jnp.sum, x))(x),
    "while": accumulated_while,
    "vmap of grad": lambda f, x: jax.vmap(jax.grad(f))(repeated(x))[1],
    "grad of vmap": lambda f, x: jax.grad(lambda x: jax.vmap(f)(repeated(x)).mean())(x),
    "vmap of vmap": lambda f, x: jax.vmap(jax.vmap(jax.grad(f), -1, -1), -1, -1)(
        jnp.moveaxis(repeated(repeated(x)), (0, 1), (-2, -1))
    )[..., 1, 0],
}
HESSIANS = {
    "hessian": lambda f, x: jax.hessian(f)(x),
    "reverse over reverse": lambda f, x: jax.jacrev(jax.grad(f))(x),
    "vmap of hessian": lambda f, x: jax.vmap(jax.hessian(f))(repeated(x))[1],
    "hessian of remat": lambda f, x: jax.hessian(jax.checkpoint(f))(x),
}
PRODUCTS = {
    "forward over reverse": lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "reverse over reverse": lambda f, x, v: jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x),
    "vmap of the product": lambda f, x, v: jax.vmap(lambda v: jax.jvp(jax.grad(f), (x,), (v,))[1])(
        repeated(v)
    )[1],
}


@every_problem
def test_value(problem):
    np.testing.assert_allclose(problem.loss(problem.x), problem.truth(problem.x), rtol=1e-12)
    stacked = jax.vmap(problem.loss)(repeated(jnp.asarray(problem.x)))
    np.testing.assert_allclose(stacked[1], problem.truth(problem.x), rtol=1e-12)


def every_result(transforms, f, *arguments):
    """What each of the transforms of `f` makes of the arguments, by name."""

    @jax.jit
    def results(*arguments):
        return {name: transform(f, *arguments) for name, transform in transforms.items()}

    return results(*arguments).items()


@every_problem
def test_gradient(problem):
    for name, found in every_result(GRADIENTS, problem.scalar, problem.x):
        np.testing.assert_allclose(found, problem.gradient(), rtol=1e-11, atol=1e-13, err_msg=name)


@pytest.mark.sweep
@every_problem
def test_hessian(problem):
    for name, found in every_result(HESSIANS, problem.scalar, problem.x):
        np.testing.assert_allclose(found, problem.hessian(), rtol=0, atol=1e-9, err_msg=name)


@every_problem
def test_hessian_vector_product(problem):
    v = np.random.default_rng(2).normal(size=problem.x.shape)
    wanted = np.tensordot(problem.hessian(), v, axes=problem.x.ndim)
    for name, found in every_result(PRODUCTS, problem.scalar, problem.x, v):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9, err_msg=name)


FORWARD = {
    "jvp": lambda f, x, v: jax.jvp(f, (x,), (v,))[1],
    "linearize": lambda f, x, v: jax.linearize(f, x)[1](v),
    "jacfwd": lambda f, x, v: jnp.vdot(jax.jacfwd(f)(x), v),
    "vmap of jvp": lambda f, x, v: jax.vmap(lambda v: jax.jvp(f, (x,), (v,))[1])(repeated(v))[1],
    "jvp of scan": lambda f, x, v: jax.jvp(lambda x: scanned(f, x), (x,), (v,))[1],
    "jvp of remat": lambda f, x, v: jax.jvp(jax.checkpoint(f), (x,), (v,))[1],
    "transposed": lambda f, x, v: jnp.vdot(jax.grad(f)(x), v),
}


@every_problem
def test_forward_mode(problem):
    v = np.random.default_rng(2).normal(size=problem.x.shape)
    loss = functools.partial(problem.scalar, forward_mode=True)
    for name, found in every_result(FORWARD, loss, problem.x, v):
        np.testing.assert_allclose(found, np.vdot(problem.gradient(), v), rtol=1e-11, err_msg=name)


TWICE = {
    "forward over forward": lambda f, x: jax.jacfwd(jax.jacfwd(f))(x),
    "reverse over forward": lambda f, x: jax.jacrev(jax.jacfwd(f))(x),
}


@pytest.mark.sweep
@every_problem
def test_second_order_of_forward_mode(problem):
    loss = functools.partial(problem.scalar, forward_mode=True)
    for name, found in every_result(TWICE, loss, problem.x):
        np.testing.assert_allclose(found, problem.hessian(), rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", [INTEGER, SOFT, SIGMOID])
def test_vmap_over_labels_and_options(name):
    """Labels, weights, masks and the float options batch like the logits do."""
    draw = np.random.default_rng(0)
    batched = {
        "logits": draw.normal(size=(3, 4, 5)),
        "labels": draw.integers(5, size=(3, 4)) if name == INTEGER else draw.random((3, 4, 5)),
        "weight": draw.uniform(0.5, 2.0, size=(3, 5)),
        "sample_weight": draw.uniform(0.5, 2.0, size=(3, 4, 1) if name == SIGMOID else (3, 4)),
        "label_smoothing": draw.uniform(0.1, 0.5, size=3),
        "where": draw.random((3, 4, 5) if name == SIGMOID else (3, 4)) < 0.7,
    }
    if name == SIGMOID:
        batched["pos_weight"] = draw.uniform(0.5, 2.0, size=(3, 5))
    else:
        batched["z_loss"] = draw.uniform(0.1, 0.5, size=3)
    smooth = {key: value for key, value in batched.items() if value.dtype == float}
    others = {key: value for key, value in batched.items() if key not in smooth}

    @jax.jit
    def gradients(smooth, others):
        return jax.value_and_grad(
            lambda smooth: getattr(ce_jax, name)(**smooth, **others, reduction="mean")
        )(smooth)

    together = jax.vmap(gradients)(smooth, others)
    for i in range(3):
        alone = gradients(*jax.tree.map(lambda x, i=i: jnp.asarray(x[i]), (smooth, others)))
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-14),
            together,
            alone,
        )


def test_integer_arguments_have_float0_cotangents():
    logits, labels = jnp.ones((2, 3)), jnp.array([0, 1])
    _, pull = jax.vjp(
        lambda z, y, rows: ce_jax.softmax_cross_entropy_with_integer_labels(z, y, where=rows),
        logits,
        labels,
        jnp.array([True, False]),
    )
    slopes, of_labels, of_where = pull(jnp.ones(2))
    assert slopes.dtype == logits.dtype
    assert of_labels.dtype == of_where.dtype == jax.dtypes.float0
    assert of_labels.shape == of_where.shape == (2,)
    slopes = jax.grad(
        lambda z, y: ce_jax.softmax_cross_entropy(z, y, reduction="sum"), (0, 1), allow_int=True
    )(logits, jnp.eye(2, 3, dtype=jnp.int32))
    assert slopes[1].dtype == jax.dtypes.float0


def batch_problem():
    draw = np.random.default_rng(0)
    return (
        jnp.asarray(draw.normal(size=(16, 5))),
        jnp.asarray(draw.integers(5, size=16)).at[3].set(-100),
        jnp.asarray(draw.uniform(0.5, 2.0, size=5)),
    )


def mesh_of(devices):
    return jax.make_mesh(
        (devices,),
        ("data",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices("cpu")[:devices],
    )


def mean_loss(logits, labels, weight):
    return ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, weight=weight, ignore_index=-100, label_smoothing=0.1, reduction="mean"
    )


def sharded_mean(logits, labels, weight):
    """The mean of the whole batch from the sums of its shards."""
    total = ce_jax.softmax_cross_entropy_with_integer_labels(
        logits, labels, weight=weight, ignore_index=-100, label_smoothing=0.1, reduction="sum"
    )
    denominator = ce_jax.mean_denominator(labels, weight=weight, ignore_index=-100)
    return jax.lax.psum(total, "data") / jax.lax.psum(denominator, "data")


@pytest.mark.parametrize("inside", [False, True])
def test_shard_map_over_the_batch(inside):
    """The gradient taken outside of the mapped function, and inside of it."""
    arguments = batch_problem()
    specs = (P("data"), P("data"), P())
    differentiate = (0, 2)
    if inside:
        found = jax.jit(
            jax.shard_map(
                jax.value_and_grad(sharded_mean, differentiate),
                mesh=mesh_of(8),
                in_specs=specs,
                out_specs=(P(), (P("data"), P())),
            )
        )(*arguments)
    else:
        mapped = jax.shard_map(sharded_mean, mesh=mesh_of(8), in_specs=specs, out_specs=P())
        found = jax.jit(jax.value_and_grad(mapped, differentiate))(*arguments)
    wanted = jax.value_and_grad(mean_loss, differentiate)(*arguments)
    chex.assert_trees_all_close(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [INTEGER, SOFT, SIGMOID])
def test_shard_map_without_reduction(name):
    logits, labels, _ = batch_problem()
    labels = labels if name == INTEGER else jax.nn.one_hot(labels, 5, dtype=logits.dtype)
    options = {"ignore_index": -100} if name == INTEGER else {}
    cotangent = jnp.linspace(-1.0, 1.0, logits.size if name == SIGMOID else 16)

    def total(loss, z):
        return jnp.vdot(cotangent, loss(z, labels).ravel())

    def loss(z, y):
        return getattr(ce_jax, name)(z, y, **options)

    mapped = jax.shard_map(loss, mesh=mesh_of(4), in_specs=P("data"), out_specs=P("data"))
    found = jax.jit(jax.grad(lambda z: total(mapped, z)))(logits)
    wanted = jax.grad(lambda z: total(loss, z))(logits)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


def test_a_batch_sharded_over_a_mesh_stays_sharded():
    """Under jit alone: the same numbers, and no device gathers the batch."""
    arguments = batch_problem()
    by_row = NamedSharding(mesh_of(8), P("data"))
    placed = (*(jax.device_put(x, by_row) for x in arguments[:2]), arguments[2])
    step = jax.jit(jax.value_and_grad(mean_loss))
    value, slopes = step(*placed)
    wanted = jax.value_and_grad(mean_loss)(*arguments)
    chex.assert_trees_all_close((value, slopes), wanted, rtol=1e-12, atol=1e-14)
    assert slopes.sharding.is_equivalent_to(by_row, 2)
    assert "all-gather" not in step.lower(*placed).compile().as_text()


@pytest.mark.parametrize("name", [INTEGER, SOFT, SIGMOID])
def test_one_trace_per_shape_whatever_the_float_options(name):
    """A schedule of label_smoothing (and z_loss) compiles once."""
    labels = jnp.array([0, 1]) if name == INTEGER else jnp.ones((2, 3))
    chex.clear_trace_counter()
    schedules = ("label_smoothing",) if name == SIGMOID else ("label_smoothing", "z_loss")

    def loss(logits, rate):
        rates = dict.fromkeys(schedules, rate)
        return getattr(ce_jax, name)(logits, labels, **rates, reduction="mean")

    step = jax.jit(jax.grad(chex.assert_max_traces(loss, n=1), argnums=(0, 1)))
    with compilations() as seen:
        slopes = [step(jnp.ones((2, 3)) * i, rate)[1] for i, rate in enumerate((0.1, 0.2, 0.3))]
        before = len(seen)
        step(jnp.ones((2, 3)), 0.4)
        assert len(seen) == before
    assert np.isfinite(slopes).all()


EAGER = {
    INTEGER: lambda **options: ce_jax.softmax_cross_entropy_with_integer_labels(
        jnp.ones((3, 7)), jnp.array([0, 1, 2]), **options
    ),
    SOFT: lambda **options: ce_jax.softmax_cross_entropy(
        jnp.ones((3, 7)), jnp.ones((3, 7)), **options
    ),
    SIGMOID: lambda **options: ce_jax.sigmoid_binary_cross_entropy(
        jnp.ones((3, 7)), jnp.ones((3, 7)), **options
    ),
    "nll_loss": lambda **options: ce_jax.nll_loss(
        jnp.ones((3, 7)), jnp.array([0, 1, 2]), **options
    ),
    "binary_cross_entropy": lambda **options: ce_jax.binary_cross_entropy(
        jnp.ones((3, 7)), jnp.ones((3, 7)), **options
    ),
}


@pytest.mark.parametrize("name", EAGER)
def test_eager_calls_run_one_cached_program(name):
    """One program the first time, none after, also when a float option has another value."""
    jax.block_until_ready((jnp.ones((3, 7)), jnp.array([0, 1, 2])))
    jax.clear_caches()
    jax.block_until_ready((jnp.ones((3, 7)), jnp.array([0, 1, 2])))
    with compilations() as seen:
        EAGER[name](label_smoothing=0.1, reduction="mean")
        assert len(seen) == 1
        EAGER[name](label_smoothing=0.1, reduction="mean")
        EAGER[name](label_smoothing=0.2, reduction="mean")
        assert len(seen) == 1


@pytest.mark.parametrize("name", EAGER)
def test_inside_jit_the_loss_is_inlined(name):
    """No call of its own is left in the program of the caller."""
    program = jax.make_jaxpr(lambda: EAGER[name](label_smoothing=0.1))()
    assert name not in {eqn.params.get("name") for eqn in program.jaxpr.eqns}


@pytest.mark.usefixtures("frozen_heap")
@pytest.mark.parametrize("problem", ["integer-options", "soft-options", "sigmoid-options", "nll"])
def test_no_tracer_leaks(problem):
    problem = PROBLEMS[problem]
    with jax.checking_leaks():
        jax.jit(jax.grad(problem.scalar))(problem.x)
        jax.vmap(jax.grad(problem.scalar))(repeated(jnp.asarray(problem.x)))


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(ce_jax.softmax_cross_entropy, forward_mode=True),
        functools.partial(ce_jax.sigmoid_binary_cross_entropy, forward_mode=True),
        ce_jax.sigmoid_focal_loss,
    ],
)
def test_what_does_not_move_adds_nothing_to_the_tangent_of_an_infinite_loss(loss):
    """The slopes by the banned class and its share are infinite, and both stay where they are."""
    logits, labels = jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([[0.5, 0.3, 0.2]])
    moves, still = jnp.array([[1.0, 2.0, 0.0]]), jnp.zeros((1, 3))
    value, found = jax.jvp(lambda *x: loss(*x).sum(), (logits, labels), (moves, still))
    slope = jax.grad(lambda z: loss(z, labels).sum())(logits)
    assert value == jnp.inf
    np.testing.assert_allclose(found, np.sum(slope[:, :2] * moves[:, :2]), rtol=1e-6)
