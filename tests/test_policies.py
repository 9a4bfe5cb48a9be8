"""The clipped policy loss and the estimates of divergence."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import ce_jax
from tests import reference_post_training
from tests.comparison import accuracy, compare, slopes_everywhere, together
from tests.helpers import WRONG_NAME, compilations

pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("cheap_programs")]

mp = mpmath.mp
KINDS = ("k1", "k2", "k3")
every_kind = pytest.mark.parametrize("kind", KINDS)


ROWS, LENGTH = 8, 5


def problem(seed=0):
    draw = np.random.default_rng(seed)
    old = draw.uniform(-2, -0.8, (ROWS, LENGTH))
    both = {"log_prob": old + draw.uniform(-0.7, 0.7, old.shape), "old_log_prob": old}
    return both, draw.normal(size=old.shape)


@together(
    {"dtype": dtype, "masked": masked, "advantage": advantage}
    for dtype in ("bfloat16", "float64")
    for masked in (False, True)
    for advantage in ("token", "sequence")
)
def test_clipped_loss(case):
    arguments, advantage = problem()
    arguments |= {"advantage": advantage if case["advantage"] == "token" else advantage[:, :1]}
    arguments |= {"low": 0.2, "high": 0.3}
    if case["masked"]:
        arguments |= {"where": np.arange(LENGTH)[None] != 1, "reduction": "mean"}
        arguments["sample_weight"] = np.linspace(0.0, 2.0, ROWS * LENGTH).reshape(ROWS, LENGTH)
    loss, truth = ce_jax.ppo_clip_loss, reference_post_training.ppo_clip_loss
    dtype = jnp.dtype(case["dtype"])
    if dtype == jnp.float64:  # both sides of both bounds are among the cases
        ratio, gains = (
            np.exp(arguments["log_prob"] - arguments["old_log_prob"]),
            arguments["advantage"] > 0,
        )
        for place in (ratio > 1.3, ratio < 0.8, (ratio < 1.3) & (ratio > 0.8)):
            assert (place & gains).any()
            assert (place & ~gains).any()
    compare(loss, truth, arguments, ("low", "high"), dtype=dtype, loosen=2.0)


def test_the_slope_of_an_advantage_that_all_share_adds_up_in_float32():
    """In bfloat16 each of thousands of tokens would be rounded before it is added."""
    draw = np.random.default_rng(0)
    old = draw.uniform(-2, -1, (8, 4096))
    log_prob = old + draw.normal(size=old.shape)

    def loss(advantage):
        return ce_jax.ppo_clip_loss(log_prob, old, advantage, high=0.2, reduction="sum")

    gradient = jax.grad(loss)(jnp.ones((), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    held = np.minimum(np.exp(log_prob - old), 1.2)
    np.testing.assert_allclose(float(gradient), -np.sum(held), rtol=2**-8)


@together(
    {"kind": kind, "dtype": dtype, "masked": masked}
    for kind in KINDS
    for dtype in ("bfloat16", "float64")
    for masked in (False, True)
)
def test_divergence(case):
    arguments, _ = problem(seed=1)
    arguments["reference_log_prob"] = arguments.pop("old_log_prob")
    if case["masked"]:
        arguments |= {"where": np.arange(LENGTH)[None] != 1, "reduction": "mean"}
        arguments["sample_weight"] = np.linspace(0.0, 2.0, ROWS * LENGTH).reshape(ROWS, LENGTH)
    arguments["kind"] = case["kind"]
    estimate, truth = ce_jax.kl_estimate, reference_post_training.kl_estimate
    compare(estimate, truth, arguments, dtype=jnp.dtype(case["dtype"]), loosen=2.0)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_a_token_that_the_policy_cannot_make(kind):
    estimate = functools.partial(ce_jax.kl_estimate, kind=kind)
    assert estimate(jnp.float32(-jnp.inf), jnp.float32(-1.0)) == jnp.inf
    assert estimate(jnp.float32(-1.0), jnp.float32(-jnp.inf)) == jnp.inf


@pytest.mark.usefixtures("usual_programs")
def test_ratios_that_overflow():
    """Clipped ones are bounds and have no slope; others are as large as they are."""
    log_prob = jnp.array([0.0, 0.0, -1e4, -1e4, 0.0, -1e4])
    old = jnp.array([-1e4, -1e3, 0.0, 0.0, -1e4, -1e4])
    advantage = jnp.array([2.0, 0.0, -2.0, 2.0, -2.0, 3.0])

    @jax.jit
    def both(log_prob, old, advantage):
        def loss(*arrays):
            return jnp.sum(ce_jax.ppo_clip_loss(*arrays) * jnp.arange(1.0, 7.0))

        one_by_one = ce_jax.ppo_clip_loss(log_prob, old, advantage)
        return one_by_one, jax.grad(loss, (0, 1, 2))(log_prob, old, advantage)

    losses, (by_new, by_old, by_advantage) = both(log_prob, old, advantage)
    np.testing.assert_allclose(losses, [-2.4, 0, 1.6, 0, np.inf, -3], rtol=1e-6)
    np.testing.assert_array_equal(by_new, [0, 0, 0, 0, np.inf, -18])
    np.testing.assert_array_equal(by_old, [0, 0, 0, 0, -np.inf, 18])
    np.testing.assert_allclose(by_advantage, [-1.2, -2.4, -2.4, 0, -np.inf, -6], rtol=1e-6)


def test_at_the_old_policy_it_is_the_policy_gradient():
    """The first step of an iteration, where the ratio is 1 and the slope is the advantage."""
    arguments, advantage = problem()
    x = jnp.float32(arguments["log_prob"])
    value, slope = slopes_everywhere(
        lambda x: ce_jax.ppo_clip_loss(x, jax.lax.stop_gradient(x), jnp.float32(advantage)), x
    )
    np.testing.assert_allclose(value, -advantage, rtol=1e-6)
    np.testing.assert_allclose(slope, -advantage, rtol=1e-6)
    still = ce_jax.ppo_clip_loss(x, x, 1.0, low=0.0, high=0.0)
    np.testing.assert_array_equal(still, -1)


@pytest.mark.usefixtures("usual_programs")
@every_kind
def test_divergence_of_policies_that_are_close_or_far(kind):
    """No digits cancel near 0, and none but those of an exponential overflow."""
    log_r = np.array([0.0, 1e-7, -1e-6, 1e-3, -0.3, 0.6, 5.0, -30.0, -1e3, -1e4])
    formulas = {"k1": lambda x: -x, "k2": lambda x: x**2 / 2, "k3": lambda x: mp.expm1(x) - x}

    estimate = functools.partial(ce_jax.kl_estimate, jnp.zeros(log_r.size), kind=kind)
    value, slope = slopes_everywhere(estimate, log_r)
    with mp.workdps(60):
        at = [mp.mpf(float(x)) for x in np.float32(log_r)]
        wanted = [float(formulas[kind](x)) for x in at]
        slopes = [float(mp.diff(formulas[kind], x)) for x in at]
    np.testing.assert_allclose(value, wanted, rtol=accuracy("float32"))
    np.testing.assert_allclose(slope, slopes, rtol=accuracy("float32"), atol=1e-99)
    far = ce_jax.kl_estimate(jnp.float32(-1e3), jnp.float32(0.0), kind=kind)
    assert far == {"k1": -1e3, "k2": 5e5, "k3": np.inf}[kind]


@pytest.mark.usefixtures("x64")
@every_kind
def test_what_the_estimates_and_their_slopes_mean(kind):
    """Over all tokens, weighted by how often the policy draws them."""
    draw = np.random.default_rng(0)
    z, reference = jnp.asarray(draw.normal(size=(2, 7)))
    q, log_p = jax.nn.log_softmax(reference), jax.nn.log_softmax(z)

    def mean(z):
        share = jax.lax.stop_gradient(jax.nn.softmax(z))
        return jnp.sum(share * ce_jax.kl_estimate(jax.nn.log_softmax(z), q, kind=kind))

    def forward(z):
        return ce_jax.kl_divergence(jax.nn.softmax(z), jnp.exp(q))

    def backward(z):
        return ce_jax.kl_divergence(jnp.exp(q), jax.nn.softmax(z))

    wanted = {
        "k1": (forward(z), jnp.zeros(7)),
        "k2": (jnp.sum(jnp.exp(log_p) * (log_p - q) ** 2 / 2), jax.grad(forward)(z)),
        "k3": (forward(z), jax.grad(backward)(z)),
    }[kind]
    value, slope = jax.value_and_grad(mean)(z)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-12)
    np.testing.assert_allclose(slope, wanted[1], atol=1e-12)


@pytest.mark.parametrize("name", ["ppo_clip_loss", "kl_estimate"])
def test_rows_that_do_not_count(name):
    """Whatever they hold; no row at all gives 0 and gradient 0."""
    first = jnp.array([jnp.nan, jnp.inf, -jnp.inf, -1.0])
    rest = (jnp.full(4, -1.1), jnp.ones(4))[: 1 + (name == "ppo_clip_loss")]

    @jax.jit
    @jax.value_and_grad
    def both(x, where, sample_weight):
        more = {"where": where, "sample_weight": sample_weight, "reduction": "mean"}
        return getattr(ce_jax, name)(x, *rest, **more)

    ones, last = np.ones(4, np.float32), np.arange(4) == 3
    for where, weight, empty in (
        (last, ones, False),
        (ones > 0, ones * np.float32(last), False),
        (ones == 0, ones, True),
        (last, 0 * ones, True),
    ):
        value, slope = both(first, where, weight)
        assert (value == 0) == empty
        np.testing.assert_array_equal(slope[:3], 0)
        assert (slope[3] == 0) == empty


@pytest.mark.cpu
def test_tokens_that_are_sharded():
    """Over explicit mesh axes, with one advantage for each sequence, or for all."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    arguments, advantage = problem()
    arrays = [np.float32(x) for x in arguments.values()]
    weight = np.linspace(0, 1, ROWS, dtype=np.float32)[:, None]

    def run(new, old, advantage, weight):
        def loss(new):
            options = {"sample_weight": weight, "where": old < -1.0, "reduction": "mean"}
            return ce_jax.ppo_clip_loss(new, old, advantage, **options) + ce_jax.kl_estimate(
                new, old, **options
            )

        return jax.value_and_grad(loss)(new)

    for by_sequence in (np.float32(advantage[:, :1]), np.float32(0.7)):
        inputs = (*arrays, by_sequence, weight)
        wanted = run(*inputs)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, spread) if x.ndim else x for x in inputs]
            value, slope = jax.jit(run)(*placed)
        np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
        np.testing.assert_allclose(slope, wanted[1], rtol=1e-5, atol=1e-7)
        assert slope.sharding.spec == jax.sharding.PartitionSpec("data", None)


def test_a_schedule_compiles_once():
    arguments, advantage = problem()
    scheduled = jax.jit(
        lambda low, high: ce_jax.ppo_clip_loss(
            *arguments.values(), advantage, low=low, high=high, reduction="sum"
        )
    )
    scheduled(0.2, 0.2)
    with compilations() as seen:
        scheduled(0.1, 0.4)
    assert not seen


X, Y = jnp.zeros((2, 3)), jnp.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ce_jax.ppo_clip_loss(X, Y, X), ValueError, r"old_log_prob .*\(2, 3\).*\(2,\)"),
        (
            lambda: ce_jax.ppo_clip_loss(X, X, Y),
            ValueError,
            r"advantage .*\(2, 3\) .*\(2,\); write advantage\[:, None\]",
        ),
        (lambda: ce_jax.ppo_clip_loss(X > 0, X, X), TypeError, "log_prob .* floating"),
        (lambda: ce_jax.ppo_clip_loss(X, X, X, low=1.5), ValueError, "low .* 1.5"),
        (lambda: ce_jax.ppo_clip_loss(X, X, X, high=-0.1), ValueError, "high .* -0.1"),
        (lambda: ce_jax.ppo_clip_loss(X, X, X, where=Y > 0), ValueError, r"where .*\(2,\)"),
        (lambda: ce_jax.ppo_clip_loss(X, X, X, reduction="avg"), WRONG_NAME, "reduction"),
        (lambda: ce_jax.kl_estimate(X, Y), ValueError, r"reference_log_prob .*\(2,\)"),
        (lambda: ce_jax.kl_estimate(X, X, kind="k4"), WRONG_NAME, "kind"),
        (
            lambda: ce_jax.kl_estimate(X, X, sample_weight=jnp.ones(3)),
            ValueError,
            r"sample_weight .*\(3,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
