"""Cross-entropy losses for JAX: exact in every option, with fused gradients, compiled by XLA."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

from .calibration import ReliabilityBins as ReliabilityBins
from .calibration import brier_score as brier_score
from .calibration import expected_calibration_error as expected_calibration_error
from .calibration import reliability_bins as reliability_bins
from .contrastive import ClipStatistics as ClipStatistics
from .contrastive import clip_loss as clip_loss
from .contrastive import info_nce_loss as info_nce_loss
from .contrastive import siglip_loss as siglip_loss
from .denominator import mean_denominator as mean_denominator
from .diagnostics import CrossEntropyParts as CrossEntropyParts
from .diagnostics import GradientView as GradientView
from .diagnostics import cross_entropy_parts as cross_entropy_parts
from .diagnostics import gradient_view as gradient_view
from .distillation import distillation_loss as distillation_loss
from .distillation import linear_distillation_loss as linear_distillation_loss
from .information import binary_entropy as binary_entropy
from .information import cross_entropy as cross_entropy
from .information import entropy as entropy
from .information import kl_divergence as kl_divergence
from .information import self_information as self_information
from .jensen_shannon import jensen_shannon_loss as jensen_shannon_loss
from .jensen_shannon import linear_jensen_shannon_loss as linear_jensen_shannon_loss
from .linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from .linear_statistics import linear_softmax_statistics as linear_softmax_statistics
from .mesh import on_mesh as on_mesh
from .multitask import init_log_variances as init_log_variances
from .multitask import uncertainty_weighted_loss as uncertainty_weighted_loss
from .negatives import Negatives as Negatives
from .negatives import in_batch_negatives as in_batch_negatives
from .negatives import log_uniform_log_prob as log_uniform_log_prob
from .negatives import log_uniform_negatives as log_uniform_negatives
from .negatives import uniform_negatives as uniform_negatives
from .noisy_labels import backward_corrected_cross_entropy as backward_corrected_cross_entropy
from .noisy_labels import forward_corrected_cross_entropy as forward_corrected_cross_entropy
from .policies import kl_estimate as kl_estimate
from .policies import ppo_clip_loss as ppo_clip_loss
from .poly import poly_loss_cross_entropy as poly_loss_cross_entropy
from .preferences import dpo_loss as dpo_loss
from .preferences import ipo_loss as ipo_loss
from .preferences import kto_loss as kto_loss
from .prior_shift import PriorEstimate as PriorEstimate
from .prior_shift import estimate_prior as estimate_prior
from .probabilities import binary_cross_entropy as binary_cross_entropy
from .probabilities import nll_loss as nll_loss
from .ranking import bpr_loss as bpr_loss
from .ranking import gbce_loss as gbce_loss
from .ratio import Ratio as Ratio
from .reference_free import orpo_loss as orpo_loss
from .reference_free import simpo_loss as simpo_loss
from .robust import focal_loss as focal_loss
from .robust import generalized_cross_entropy as generalized_cross_entropy
from .robust import hard_bootstrapped_cross_entropy as hard_bootstrapped_cross_entropy
from .robust import poly_loss as poly_loss
from .robust import soft_bootstrapped_cross_entropy as soft_bootstrapped_cross_entropy
from .robust import symmetric_cross_entropy as symmetric_cross_entropy
from .sampling import linear_sampled_softmax_cross_entropy as linear_sampled_softmax_cross_entropy
from .sampling import sampled_softmax_cross_entropy as sampled_softmax_cross_entropy
from .sequence import NextTokens as NextTokens
from .sequence import bits_per_byte as bits_per_byte
from .sequence import next_tokens as next_tokens
from .sequence import perplexity as perplexity
from .sequence import sequence_log_prob as sequence_log_prob
from .sigmoid import sigmoid_binary_cross_entropy as sigmoid_binary_cross_entropy
from .sigmoid import sigmoid_focal_loss as sigmoid_focal_loss
from .smoothing import smooth_labels as smooth_labels
from .smoothing import smoothed_label_entropy as smoothed_label_entropy
from .smoothing import smoothing_over_others as smoothing_over_others
from .softmax import safe_softmax_cross_entropy as safe_softmax_cross_entropy
from .softmax import softmax_cross_entropy as softmax_cross_entropy
from .softmax import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from .statistics import SoftmaxStatistics as SoftmaxStatistics
from .statistics import softmax_statistics as softmax_statistics
from .supervised_contrastive import supervised_contrastive_loss as supervised_contrastive_loss
from .temperature import fit_temperature as fit_temperature
from .top_k import linear_top_k_distillation_loss as linear_top_k_distillation_loss
from .top_k import top_k_distillation_loss as top_k_distillation_loss
from .weighting import balanced_weights as balanced_weights
from .weighting import effective_number_weights as effective_number_weights
from .weighting import focal_alpha as focal_alpha
from .weighting import inverse_frequency_weights as inverse_frequency_weights
from .weighting import prediction_logit_offset as prediction_logit_offset
from .weighting import prior_shift_weights as prior_shift_weights
from .weighting import training_logit_offset as training_logit_offset

if TYPE_CHECKING:
    from optax.losses import binary_dice_loss as binary_dice_loss
    from optax.losses import convex_kl_divergence as convex_kl_divergence
    from optax.losses import cosine_distance as cosine_distance
    from optax.losses import cosine_similarity as cosine_similarity
    from optax.losses import ctc_loss as ctc_loss
    from optax.losses import ctc_loss_with_forward_probs as ctc_loss_with_forward_probs
    from optax.losses import dice_loss as dice_loss
    from optax.losses import generalized_kl_divergence as generalized_kl_divergence
    from optax.losses import hinge_loss as hinge_loss
    from optax.losses import huber_loss as huber_loss
    from optax.losses import kl_divergence_with_log_targets as kl_divergence_with_log_targets
    from optax.losses import l2_loss as l2_loss
    from optax.losses import log_cosh as log_cosh
    from optax.losses import make_fenchel_young_loss as make_fenchel_young_loss
    from optax.losses import multiclass_generalized_dice_loss as multiclass_generalized_dice_loss
    from optax.losses import multiclass_hinge_loss as multiclass_hinge_loss
    from optax.losses import multiclass_perceptron_loss as multiclass_perceptron_loss
    from optax.losses import multiclass_sparsemax_loss as multiclass_sparsemax_loss
    from optax.losses import ntxent as ntxent
    from optax.losses import perceptron_loss as perceptron_loss
    from optax.losses import ranking_softmax_loss as ranking_softmax_loss
    from optax.losses import sparsemax_loss as sparsemax_loss
    from optax.losses import squared_error as squared_error
    from optax.losses import triplet_margin_loss as triplet_margin_loss

# All other losses come from optax, so that `ce_jax` can replace `optax.losses`.
_OF_OPTAX = (
    "binary_dice_loss",
    "convex_kl_divergence",
    "cosine_distance",
    "cosine_similarity",
    "ctc_loss",
    "ctc_loss_with_forward_probs",
    "dice_loss",
    "generalized_kl_divergence",
    "hinge_loss",
    "huber_loss",
    "kl_divergence_with_log_targets",
    "l2_loss",
    "log_cosh",
    "make_fenchel_young_loss",
    "multiclass_generalized_dice_loss",
    "multiclass_hinge_loss",
    "multiclass_perceptron_loss",
    "multiclass_sparsemax_loss",
    "ntxent",
    "perceptron_loss",
    "ranking_softmax_loss",
    "sparsemax_loss",
    "squared_error",
    "triplet_margin_loss",
)
__all__ = sorted(
    {name for name, x in globals().items() if getattr(x, "__module__", "").startswith("ce_jax.")}
    | {*_OF_OPTAX}
)


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # else a type checker would accept any name

    def __getattr__(name):
        """Imports optax when one of its losses is asked for, and not before."""
        if name in _OF_OPTAX:
            from optax import losses

            return getattr(losses, name)
        message = f"module {__name__!r} has no attribute {name!r}"
        if not name.startswith("_"):
            import difflib

            meant = difflib.get_close_matches(name, __all__, n=1)
            message += f"; did you mean {meant[0]!r}?" if meant else ""
        raise AttributeError(message)
