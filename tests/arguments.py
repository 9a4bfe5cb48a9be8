"""Right arguments of every public function, with arrays wherever arrays are taken.

The losses of those whose rows may have several axes have two, of one size: what belongs to the one
axis must not pass for what belongs to the other.
"""

import numpy as np

from ce_jax import Negatives

draw = np.random.default_rng(0)


def normal(*shape):
    return draw.normal(size=shape).astype(np.float32)


def positive(*shape):
    return draw.uniform(0.2, 0.8, shape).astype(np.float32)


ROWS, CLASSES = (3, 3), 4
LOGITS = normal(*ROWS, CLASSES)
IDS = draw.integers(CLASSES, size=ROWS).astype(np.int32)
WHERE = np.array([[True, False, True], [True, True, True], [False, True, True]])
BY_ROW = {"sample_weight": positive(*ROWS), "where": WHERE}
OF_IDS = {"labels": IDS, **BY_ROW}
HEAD = {"hidden": normal(*ROWS, 2), "kernel": normal(2, CLASSES), "bias": normal(CLASSES)}
TEACHER = {
    "teacher_hidden": normal(*ROWS, 2),
    "teacher_kernel": normal(2, CLASSES),
    "teacher_bias": normal(CLASSES),
    "temperature": 1 + positive(*ROWS),
}
KNOWN = {
    "teacher_ids": np.stack([IDS, (IDS + 1) % CLASSES], -1),
    "teacher_log_probs": np.log(np.stack([positive(*ROWS), positive(*ROWS)], -1) / 2),
}
SAMPLED = {"label_logits": normal(*ROWS), "negative_logits": normal(*ROWS, 5), **BY_ROW}
NEGATIVES = Negatives(np.array([1, 2], np.int32), np.log(np.array([0.5, 0.5], np.float32)))
PAIRS = {"where": WHERE[0], "sample_weight": positive(3)}
PROBS = positive(*ROWS, CLASSES)
ELEMENTS = {"labels": PROBS, "sample_weight": PROBS, "where": PROBS < 0.5, "weight": PROBS}
LOG_PROB = {"log_prob": np.log(positive(*ROWS))}
COUNTS = np.array([3, 1, 2], np.int32)
ANSWERS = {"chosen": np.log(positive(*ROWS)), "rejected": np.log(positive(*ROWS)), **BY_ROW}
BESIDE_REFERENCE = {
    **ANSWERS,
    "reference_chosen": np.log(positive(*ROWS)),
    "reference_rejected": np.log(positive(*ROWS)),
}

ARGUMENTS = {
    "backward_corrected_cross_entropy": {
        "logits": LOGITS,
        "transition": np.eye(CLASSES, dtype=np.float32),
        **OF_IDS,
    },
    "balanced_weights": {"counts": COUNTS},
    "binary_cross_entropy": {"probs": PROBS, **ELEMENTS},
    "binary_entropy": {"p": PROBS},
    "bits_per_byte": {"total": positive(*ROWS), "num_bytes": positive(*ROWS)},
    "bpr_loss": SAMPLED,
    "brier_score": {"logits": LOGITS, **OF_IDS},
    "clip_loss": {"images": normal(3, 2), "texts": normal(3, 2), **PAIRS},
    "cross_entropy": {"p": PROBS, "q": PROBS},
    "cross_entropy_parts": {"logits": LOGITS, "labels": PROBS, "where": WHERE},
    "distillation_loss": {
        "logits": LOGITS,
        "teacher_logits": normal(*LOGITS.shape),
        "temperature": 1 + positive(*ROWS),
        **BY_ROW,
    },
    "dpo_loss": BESIDE_REFERENCE,
    "effective_number_weights": {"counts": COUNTS},
    "entropy": {"p": PROBS},
    "estimate_prior": {
        "logits": LOGITS[0],
        "train_prior": positive(CLASSES),
        "sample_weight": positive(3),
    },
    "expected_calibration_error": {"confidence": positive(*ROWS), "correct": WHERE, "where": WHERE},
    "fit_temperature": {"logits": LOGITS, **OF_IDS},
    "focal_alpha": {"positives": positive(*ROWS), "total": 1 + positive(*ROWS)},
    "focal_loss": LOG_PROB,
    "forward_corrected_cross_entropy": {
        "logits": LOGITS,
        "transition": np.full((CLASSES, CLASSES), 0.25, np.float32),
        **OF_IDS,
    },
    "gbce_loss": {**SAMPLED, "num_items": 9},
    "generalized_cross_entropy": LOG_PROB,
    "gradient_view": {"logits": LOGITS, "labels": IDS, "where": WHERE},
    "hard_bootstrapped_cross_entropy": {**LOG_PROB, "argmax_log_prob": np.log(positive(*ROWS))},
    "in_batch_negatives": {
        "labels": COUNTS,
        "log_prob": np.log(positive(3)),
        "where": WHERE[0],
    },
    "info_nce_loss": {"queries": normal(3, 2), "keys": normal(3, 2), **PAIRS},
    "inverse_frequency_weights": {"counts": COUNTS},
    "ipo_loss": BESIDE_REFERENCE,
    "jensen_shannon_loss": {
        "logits": LOGITS,
        "teacher_logits": normal(*LOGITS.shape),
        "temperature": 1 + positive(*ROWS),
        **BY_ROW,
    },
    "kl_divergence": {"p": PROBS, "q": PROBS},
    "kl_estimate": {**LOG_PROB, "reference_log_prob": np.log(positive(*ROWS)), **BY_ROW},
    "kto_loss": {
        **LOG_PROB,
        "reference_log_prob": np.log(positive(*ROWS)),
        "desirable": WHERE,
        "kl": positive(*ROWS),
        **BY_ROW,
    },
    "linear_distillation_loss": {**HEAD, **TEACHER, **BY_ROW},
    "linear_jensen_shannon_loss": {**HEAD, **TEACHER, **BY_ROW},
    "linear_sampled_softmax_cross_entropy": {
        **HEAD,
        **OF_IDS,
        "negatives": NEGATIVES,
        "label_log_expected_count": normal(*ROWS),
    },
    "linear_softmax_cross_entropy": {**HEAD, **OF_IDS, "weight": positive(CLASSES)},
    "linear_softmax_statistics": {**HEAD, "labels": IDS, "where": WHERE},
    "linear_top_k_distillation_loss": {
        **HEAD,
        **KNOWN,
        "temperature": 1 + positive(*ROWS),
        **BY_ROW,
    },
    "log_uniform_log_prob": {"ids": IDS, "num_items": 9},
    "mean_denominator": OF_IDS,
    "next_tokens": {"tokens": IDS, "segment_ids": IDS, "where": WHERE},
    "nll_loss": {"log_probs": LOGITS, **OF_IDS, "weight": positive(CLASSES)},
    "orpo_loss": ANSWERS,
    "perplexity": {"total": positive(*ROWS), "count": positive(*ROWS)},
    "poly_loss": LOG_PROB,
    "poly_loss_cross_entropy": {"logits": LOGITS, "labels": PROBS, **BY_ROW},
    "ppo_clip_loss": {
        **LOG_PROB,
        "old_log_prob": np.log(positive(*ROWS)),
        "advantage": normal(*ROWS),
        **BY_ROW,
    },
    "prediction_logit_offset": {"prior": positive(CLASSES)},
    "prior_shift_weights": {"train_prior": positive(CLASSES), "target_prior": positive(CLASSES)},
    "reliability_bins": {"confidence": positive(*ROWS), "correct": WHERE, "where": WHERE},
    "safe_softmax_cross_entropy": {"logits": LOGITS, "labels": PROBS, **BY_ROW},
    "sampled_softmax_cross_entropy": {
        **SAMPLED,
        "log_expected_count": normal(5),
        "label_log_expected_count": normal(*ROWS),
    },
    "self_information": {"p": PROBS},
    "sequence_log_prob": {**LOG_PROB, "where": WHERE},
    "siglip_loss": {"images": normal(3, 2), "texts": normal(3, 2), **PAIRS},
    "sigmoid_binary_cross_entropy": {"logits": LOGITS, **ELEMENTS, "pos_weight": PROBS},
    "sigmoid_focal_loss": {
        "logits": LOGITS,
        **{name: x for name, x in ELEMENTS.items() if name != "weight"},
        "alpha": PROBS,
        "gamma": PROBS,
    },
    "simpo_loss": ANSWERS,
    "smooth_labels": {"labels": PROBS, "alpha": 0.1, "where": PROBS < 0.5},
    "soft_bootstrapped_cross_entropy": {**LOG_PROB, "entropy": positive(*ROWS)},
    "softmax_cross_entropy": {
        "logits": LOGITS,
        "labels": PROBS,
        **BY_ROW,
        "weight": positive(CLASSES),
    },
    "softmax_cross_entropy_with_integer_labels": {
        "logits": LOGITS,
        **OF_IDS,
        "weight": positive(CLASSES),
    },
    "softmax_statistics": {"logits": LOGITS, "labels": IDS, "where": WHERE},
    "supervised_contrastive_loss": {
        "embeddings": normal(3, 2),
        "labels": np.array([0, 0, 1], np.int32),
        **PAIRS,
    },
    "symmetric_cross_entropy": LOG_PROB,
    "top_k_distillation_loss": {
        "logits": LOGITS,
        **KNOWN,
        "temperature": 1 + positive(*ROWS),
        **BY_ROW,
    },
    "training_logit_offset": {"prior": positive(CLASSES)},
}
# These take no arrays: a function, a key of jax.random, a scalar, a tree of scalars of which a list
# is one.
WITHOUT_ARRAYS = {
    "on_mesh",
    "log_uniform_negatives",
    "uniform_negatives",
    "smoothed_label_entropy",
    "smoothing_over_others",
    "init_log_variances",
    "uncertainty_weighted_loss",
}
