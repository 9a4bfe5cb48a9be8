import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from experiments.data import datasets
from experiments.output.errors import RunError
from experiments.output.runs import RunFolder
from experiments.training.loop import Settings, Trainer, fit
from experiments.training.objectives import make_objective

pytestmark = pytest.mark.usefixtures("cheap_programs")

SETTINGS = Settings(
    epochs=3, batch_size=64, learning_rate=2e-3, weight_decay=0.1, dropout=0.2, seed=0
)


@pytest.fixture(scope="module")
def digits():
    return datasets.load_digits()


def make_trainer(digits, settings=SETTINGS, devices=1, loss="softmax", **options):
    dataset = digits.parity() if loss == "even-odd" else digits
    objective = make_objective(loss, dataset, **options)
    return Trainer(dataset, objective, settings, jax.devices()[:devices])


@pytest.fixture(scope="module")
def trainer(digits):
    """One trainer for the tests that need no particular one: it holds no state of a run."""
    return make_trainer(digits)


def test_an_epoch_depends_on_nothing_but_the_state_and_its_number(digits, trainer):
    first, second = trainer, make_trainer(digits)
    state, _ = first.run_epoch(first.initial_state(), 0)
    again, _ = second.run_epoch(second.initial_state(), 0)
    chex.assert_trees_all_equal(state, again)
    saved = jax.tree.map(np.array, state)
    after, _ = first.run_epoch(state, 1)
    restored = jax.device_put(saved, jax.tree.map(lambda leaf: leaf.sharding, again))
    after_restored, _ = second.run_epoch(restored, 1)
    chex.assert_trees_all_equal(after, after_restored)


def test_epochs_and_seeds_differ(digits, trainer):
    one, _ = trainer.run_epoch(trainer.initial_state(), 0)
    other, _ = trainer.run_epoch(trainer.initial_state(), 1)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(one.params, other.params)
    other_seed = make_trainer(digits, Settings(**{**vars(SETTINGS), "seed": 1}))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(trainer.initial_state(), other_seed.initial_state())


def test_every_example_counts_once_per_epoch(digits, trainer):
    _, tally = trainer.run_epoch(trainer.initial_state(), 0)
    assert len(digits.train_labels) % SETTINGS.batch_size != 0
    assert int(tally.examples) == len(digits.train_labels)
    assert float(tally.loss.denominator) == len(digits.train_labels)


@pytest.mark.parametrize("loss", ["softmax", "even-odd"])
def test_the_rows_that_fill_up_the_last_batch_are_not_counted(digits, loss):
    """They repeat image 0, which is given the label that the untrained model takes it for."""
    task = digits.parity() if loss == "even-odd" else digits
    task = dataclasses.replace(task, test_images=task.train_images, test_labels=task.train_labels)
    objective = make_objective(loss, task)
    settings = Settings(**{**vars(SETTINGS), "batch_size": 1000, "learning_rate": 1e-30})
    settings = dataclasses.replace(settings, dropout=0.0)
    trainer = Trainer(task, objective, settings, jax.devices()[:1])
    found = trainer.evaluate(trainer.initial_state())
    assert found.log_probs.shape == (1437, len(task.class_names))
    labels = task.train_labels.copy()
    labels[0] = found.predicted[0]
    right = int(np.sum(found.predicted == labels))

    trainer = Trainer(
        dataclasses.replace(task, train_labels=labels), objective, settings, jax.devices()[:1]
    )
    state, tally = trainer.run_epoch(trainer.initial_state(), 0)
    np.testing.assert_array_equal(trainer.evaluate(state).predicted, found.predicted)
    assert (int(tally.examples), int(tally.correct)) == (1437, right)
    # Nor does it matter to predictions how many rows are filled up.
    whole = dataclasses.replace(settings, batch_size=1437)
    again = Trainer(task, objective, whole, jax.devices()[:1])
    np.testing.assert_allclose(
        again.evaluate(again.initial_state()).log_probs, found.log_probs, rtol=1e-4, atol=1e-5
    )


def test_a_batch_is_no_larger_than_the_training_set(digits):
    with pytest.raises(RunError, match="--batch-size 1438 is above 1437, the number of training"):
        make_trainer(digits, Settings(**{**vars(SETTINGS), "batch_size": 1438}))


def test_the_state_is_donated(trainer):
    state = trainer.initial_state()
    trainer.run_epoch(state, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_all_epochs_share_one_compilation(trainer):
    state = trainer.initial_state()
    for epoch in range(3):
        state, _ = trainer.run_epoch(state, epoch)
        trainer.evaluate(state)
    assert trainer._jit_epoch._cache_size() == 1
    assert trainer._run_predictions._cache_size() == 1


@pytest.mark.cpu
def test_eight_devices_give_the_result_of_one(digits, trainer):
    eight = make_trainer(digits, devices=8)
    assert (trainer.mesh.size, eight.mesh.size) == (1, 8)
    state_one, tally_one = trainer.run_epoch(trainer.initial_state(), 0)
    state_eight, tally_eight = eight.run_epoch(eight.initial_state(), 0)
    np.testing.assert_allclose(tally_one.loss.mean(), tally_eight.loss.mean(), rtol=1e-5)
    evaluation_one, evaluation_eight = trainer.evaluate(state_one), eight.evaluate(state_eight)
    np.testing.assert_allclose(evaluation_one.loss, evaluation_eight.loss, rtol=1e-4)
    np.testing.assert_allclose(
        evaluation_one.log_probs, evaluation_eight.log_probs, rtol=1e-3, atol=1e-3
    )


@pytest.mark.cpu
def test_the_batch_is_spread_over_the_devices(digits):
    trainer = make_trainer(digits, Settings(**{**vars(SETTINGS), "batch_size": 40}), devices=8)
    trainer.compile()
    # Of the 40 rows of a batch each device takes its 5 through the first layer.
    assert "f32[5,512]" in trainer._run_epoch.as_text()
    assert "f32[40,512]" not in trainer._run_epoch.as_text()


@pytest.mark.cpu
def test_a_batch_that_does_not_divide_uses_fewer_devices(digits):
    trainer = make_trainer(digits, Settings(**{**vars(SETTINGS), "batch_size": 60}), devices=8)
    assert trainer.mesh.size == 6
    assert trainer.devices.startswith("6 x ")
    assert "2 more idle" in trainer.devices


def test_fit_resumes_to_the_same_metrics(trainer, tmp_path):
    def run(path, interrupt_after=None):
        def on_epoch(row):
            if row["epoch"] == interrupt_after:
                raise KeyboardInterrupt

        with RunFolder(path, {}) as folder:
            evaluation = fit(trainer, folder, on_epoch)
        return evaluation, [{**row, "seconds": 0} for row in folder.history]

    unbroken, unbroken_history = run(tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", interrupt_after=2)
    resumed, resumed_history = run(tmp_path / "broken")
    np.testing.assert_array_equal(unbroken.log_probs, resumed.log_probs)
    assert [row["epoch"] for row in resumed_history] == [1, 2, 3]
    assert unbroken_history == resumed_history


def test_a_diverging_run_stops_and_records_no_epoch_of_it(digits, tmp_path):
    settings = Settings(**{**vars(SETTINGS), "learning_rate": 1e30})
    with (
        RunFolder(tmp_path, {}) as folder,
        pytest.raises(RunError, match="try a smaller --learning-rate"),
    ):
        fit(make_trainer(digits, settings), folder, lambda row: None)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["test_loss"]) for row in rows if row["kind"] == "epoch")
    assert folder.epochs_done == len(folder.history)


@pytest.mark.parametrize("loss", ["softmax", "one-hot", "one-vs-rest", "even-odd", "weighted"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_of_every_objective(digits, loss, label_smoothing):
    dataset = digits.parity() if loss == "even-odd" else digits
    objective = make_objective(loss, dataset, label_smoothing)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, objective.outputs)).astype(np.float32)
    labels = dataset.train_labels[:7]
    where = np.array([True] * 5 + [False] * 2)
    result = objective.loss(*map(jax.numpy.asarray, (logits, labels, where)))
    # The same from the formulas, in float64, over the five rows that count.
    logits, labels = logits[:5].astype(np.float64), labels[:5]
    one_hot = np.eye(len(dataset.class_names))[labels]
    weight = np.ones(len(dataset.class_names))
    if loss in ("softmax", "one-hot", "weighted"):
        if loss == "weighted":
            counts = np.bincount(dataset.train_labels)
            weight = counts.sum() / (len(counts) * counts)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        target = (1 - label_smoothing) * one_hot + label_smoothing / 10
        total = -(weight * target * log_probs).sum()
    else:
        target = one_hot if loss == "one-vs-rest" else labels[:, None]
        target = (1 - label_smoothing) * target + label_smoothing / 2
        p = 1 / (1 + np.exp(-logits))
        total = -(target * np.log(p) + (1 - target) * np.log(1 - p)).sum()
    np.testing.assert_allclose(result.total, total, rtol=1e-5)
    np.testing.assert_allclose(result.denominator, weight[labels].sum(), rtol=1e-6)


def test_z_loss_reaches_the_softmax_losses(digits):
    logits = jax.numpy.asarray(np.random.default_rng(0).normal(size=(4, 10)), jax.numpy.float32)
    labels, where = jax.numpy.arange(4), jax.numpy.ones(4, bool)
    lse = np.log(np.exp(np.asarray(logits, np.float64)).sum(axis=1))
    for loss in ("softmax", "one-hot", "weighted"):
        plain = make_objective(loss, digits).loss(logits, labels, where)
        with_z = make_objective(loss, digits, z_loss=0.1).loss(logits, labels, where)
        np.testing.assert_allclose(with_z.total - plain.total, 0.1 * (lse**2).sum(), rtol=1e-4)


@pytest.mark.parametrize("loss", ["one-vs-rest", "even-odd"])
def test_z_loss_is_refused_where_it_means_nothing(digits, loss):
    dataset = digits.parity() if loss == "even-odd" else digits
    with pytest.raises(ValueError, match=f"z_loss belongs to the softmax losses, {loss}"):
        make_objective(loss, dataset, z_loss=0.1)


def test_even_odd_wants_two_classes(digits):
    with pytest.raises(ValueError, match="digits has 10"):
        make_objective("even-odd", digits)


@pytest.mark.parametrize("loss", ["softmax", "one-hot", "one-vs-rest", "even-odd", "weighted"])
def test_log_probs_agree_with_the_loss(digits, loss):
    """The negative log-probability of the label is the loss, where the loss is a likelihood."""
    dataset = digits.parity() if loss == "even-odd" else digits
    objective = make_objective(loss, dataset)
    logits = jax.numpy.asarray(
        np.random.default_rng(0).normal(size=(1, objective.outputs)), jax.numpy.float32
    )
    classes = len(dataset.class_names)
    for label in range(classes):
        found = objective.loss(logits, jax.numpy.array([label]), jax.numpy.ones(1, bool)).mean()
        log_probs = np.asarray(objective.log_probs(logits), np.float64)[0]
        wanted = -log_probs[label]
        if loss == "one-vs-rest":
            others = np.delete(log_probs, label)
            wanted -= np.log1p(-np.exp(others)).sum()
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
