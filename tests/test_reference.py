"""The truth itself, against fifty digits and against finite differences."""

import mpmath
import numpy as np
import pytest

from tests import reference

mpmath.mp.dps = 50
LOGITS = {
    "ordinary": [0.3, -1.2, 2.0],
    "far apart": [700.0, -700.0, 0.0],
    "far from zero": [1e6, 1e6 + 1, 1e6 - 2],
    "certain": [60.0, 0.0, -5.0],
    "tiny": [1e-300, -1e-300, 0.0],
}


@pytest.mark.parametrize("z", LOGITS.values(), ids=LOGITS)
def test_softmax_cross_entropy_to_fifty_digits(z):
    targets, weight, eps, z_loss = [0.7, 0.2, 0.4], [1.5, 0.5, 2.0], 0.1, 0.01
    lse = mpmath.log(sum(mpmath.exp(mpmath.mpf(v)) for v in z))
    wanted = z_loss * lse**2 + sum(
        w * ((1 - mpmath.mpf(eps)) * t + mpmath.mpf(eps) / 3) * (lse - v)
        for w, t, v in zip(weight, targets, z, strict=True)
    )
    found = reference.softmax_cross_entropy(
        np.array(z), np.array(targets), weight=np.array(weight), label_smoothing=eps, z_loss=z_loss
    )
    np.testing.assert_allclose(found, float(wanted), rtol=1e-14)


@pytest.mark.parametrize("z", [-800.0, -40.0, -1e-8, 0.0, 1.5, 40.0, 800.0])
def test_sigmoid_binary_cross_entropy_to_fifty_digits(z):
    def softplus(x):
        return mpmath.log1p(mpmath.exp(mpmath.mpf(x)))

    for y in (0.0, 0.3, 1.0):
        wanted = 2 * mpmath.mpf(y) * softplus(-z) + (1 - mpmath.mpf(y)) * softplus(z)
        found = reference.sigmoid_binary_cross_entropy(np.array(z), np.array(y), pos_weight=2.0)
        np.testing.assert_allclose(found, float(wanted), rtol=1e-14)


@pytest.mark.parametrize("name", ["logits", "weight", "sample_weight", "label_smoothing"])
def test_complex_step_is_the_derivative(name):
    draw = np.random.default_rng(0)
    arguments = {
        "logits": draw.normal(size=(4, 3)),
        "labels": np.array([0, 2, -100, 1]),
        "weight": draw.uniform(0.5, 2.0, size=3),
        "sample_weight": draw.uniform(0.5, 2.0, size=4),
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "ignore_index": -100,
        "reduction": "mean",
    }
    function = reference.softmax_cross_entropy_with_integer_labels
    found = reference.vjp(function, arguments, name, 1.0)
    x = np.asarray(arguments[name])
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = 1e-6
        high, low = (function(**arguments | {name: x + sign * step}) for sign in (1, -1))
        np.testing.assert_allclose(found[index], (high - low) / 2e-6, rtol=0, atol=1e-9)
