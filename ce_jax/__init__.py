"""Cross-entropy losses for JAX: exact in every option, with fused gradients, compiled by XLA."""

from .denominator import mean_denominator as mean_denominator
from .information import binary_entropy as binary_entropy
from .information import cross_entropy as cross_entropy
from .information import entropy as entropy
from .information import kl_divergence as kl_divergence
from .information import self_information as self_information
from .probabilities import binary_cross_entropy as binary_cross_entropy
from .probabilities import nll_loss as nll_loss
from .probabilities import smooth_labels as smooth_labels
from .sigmoid import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from .softmax import SoftmaxStatistics as SoftmaxStatistics
from .softmax import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from .softmax import softmax_cross_entropy as softmax_cross_entropy
from .softmax import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from .softmax import softmax_statistics as softmax_statistics


def __getattr__(name: str) -> object:
    """Losses that are no cross-entropies come from optax, so that its module can be replaced."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from optax import losses

    try:
        return getattr(losses, name)
    except AttributeError:
        raise AttributeError(f"neither ce_jax nor optax.losses has {name!r}") from None
