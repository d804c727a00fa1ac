"""Training: against plain Python loops and closed forms; interrupted runs end bit for bit alike."""

import functools
import json
import math
import pathlib
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from archscale_jax._initialize import initialize
from archscale_jax._optax import scale_by_architecture
from archscale_jax._spaces import dag_graph
from archscale_jax.tuning._search import find_learning_rate
from experiments.lab.checkpoints import restore_checkpoint, save_checkpoint
from experiments.lab.datasets import Dataset, augment, epoch_indices
from experiments.lab.files import read_records
from experiments.lab.models import DagMLP
from experiments.lab.training import (
    create_optimizer,
    create_schedule,
    create_train_state,
    cross_entropy,
    epoch_batches,
    evaluate,
    fit,
    has_diverged,
    jitted_train_batches,
    jitted_train_epoch,
    train_batches,
    train_epoch,
    train_losses,
    vertex_features,
)
from tests.binaries import FORKS, become, imported

BATCH, EXAMPLES, TESTS, CLASSES = 8, 43, 21, 3  # five whole batches, three examples left over

pytestmark = pytest.mark.quick_compilation


@functools.cache
def dataset():
    random = np.random.default_rng(0)

    def split(count):
        labels = random.integers(0, CLASSES, count)
        images = random.normal(size=(count, 4, 4, 1)) + labels[:, None, None, None]
        return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)

    return Dataset("synthetic", CLASSES, *split(EXAMPLES), *split(TESTS))


@functools.cache
def network():
    """A normalised MLP taken apart: its structure, parameters, other state and architecture."""
    model = nnx.eval_shape(
        lambda: DagMLP(dag_graph("2_12"), 16, 16, CLASSES, normalization="batch", rngs=nnx.Rngs(0))
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = initialize(jax.random.key(0), params, model.architecture())
    rest = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
    return graphdef, params, rest, model.architecture()


@functools.cache
def momentum_optimizer():
    schedule = create_schedule(0.1, 20, kind="cosine", warmup_steps=3)
    return create_optimizer(schedule, momentum=0.9, nesterov=True, weight_decay=0.01)


def fresh_state(optimizer):
    _, params, rest, _ = network()
    return create_train_state(params, rest, optimizer, jax.random.key(5))


def to_bytes(tree):
    """Every leaf as bytes, keys as their data."""

    def raw(leaf):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

    return [raw(leaf) for leaf in jax.tree.leaves(tree)]


def log_likelihoods(logits, labels):
    """NumPy, float64: log-probability of each label."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits[np.arange(len(labels)), labels]


def close(one, other, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), one, other)


def plain_epoch(state, rate, *, momentum, nesterov, decay, flip, padding, max_steps=None):
    """One epoch of SGD in plain Python, without a training loop or optax.

    Returns the parameters, the rest of the state, the velocity and the losses.
    """
    graphdef = network()[0]
    images, labels = dataset().train_images, dataset().train_labels
    order_key, augment_key = jax.random.split(jax.random.fold_in(state.key, state.epoch))
    params, rest = nnx.to_pure_dict(state.params), state.model_state
    velocity = jax.tree.map(np.zeros_like, params)
    losses = []

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def with_gradients(params, rest, inputs, one_hot):
        model = nnx.merge(graphdef, state.params, rest, copy=True)
        nnx.update(model, params)
        logits = model(inputs, train=True)
        value = -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=1))
        return value, nnx.state(model, nnx.Not(nnx.Param))

    for step, indices in enumerate(epoch_indices(order_key, EXAMPLES, BATCH)[:max_steps]):
        inputs = images[indices]
        if flip or padding:
            key = jax.random.fold_in(augment_key, step)
            inputs = augment(key, inputs, flip=flip, padding=padding)
        one_hot = jnp.eye(CLASSES)[labels[indices]]

        (value, rest), gradients = with_gradients(params, rest, inputs, one_hot)
        gradients = jax.tree.map(lambda g, p: g + decay * p, gradients, params)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradients)
        direction = velocity
        if nesterov:
            direction = jax.tree.map(lambda v, g: momentum * v + g, velocity, gradients)
        eta = rate(step)
        params = jax.tree.map(lambda p, d, eta=eta: p - eta * d, params, direction)
        losses.append(float(value))
    return params, rest, velocity, losses


class TestTrainEpoch:
    def test_is_a_plain_loop(self):
        """Momentum, decay, a schedule, batch statistics, augmentation and scaled rates at once."""
        graphdef, _, _, architecture = network()
        base = dag_graph("2")
        factor = math.sqrt(1 / (0 + 8))  # paths of depth 0 and 2 against one of depth 1
        optimizer = optax.chain(
            momentum_optimizer(), scale_by_architecture(architecture, base, "path_sum")
        )
        state = fresh_state(optimizer)
        after, losses = train_epoch(
            state,
            dataset().train_images,
            dataset().train_labels,
            graphdef=graphdef,
            optimizer=optimizer,
            batch_size=BATCH,
            max_steps=4,
            flip=True,
            padding=1,
        )

        def rate(step):
            return (
                factor
                * 0.1
                * (step / 3 if step < 3 else (1 + math.cos((step - 3) / 17 * math.pi)) / 2)
            )

        params, rest, velocity, expected = plain_epoch(
            state,
            rate,
            momentum=0.9,
            nesterov=True,
            decay=0.01,
            flip=True,
            padding=1,
            max_steps=4,
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert len(losses) == 4
        close(nnx.to_pure_dict(after.params), params)
        close(after.model_state, rest)
        trace = optax.tree.get(after.optimizer_state, "trace")
        close(nnx.to_pure_dict(trace), velocity)
        assert int(after.epoch) == 1
        assert to_bytes(after.key) == to_bytes(state.key)

    def test_can_stop_early_and_continues_with_the_next_order(self):
        graphdef = network()[0]
        optimizer = create_optimizer(0.05)
        state = fresh_state(optimizer)._replace(epoch=jnp.int32(3))
        after, losses = jitted_train_epoch(
            state,
            dataset().train_images,
            dataset().train_labels,
            graphdef=graphdef,
            optimizer=optimizer,
            batch_size=BATCH,
            max_steps=2,
        )
        params, _, _, expected = plain_epoch(
            state,
            lambda step: 0.05,
            momentum=0,
            nesterov=False,
            decay=0,
            flip=False,
            padding=0,
            max_steps=2,
        )
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        close(nnx.to_pure_dict(after.params), params)
        assert int(after.epoch) == 4

    @pytest.mark.parametrize("size", [0, -1, EXAMPLES + 1])
    def test_raises_on_a_batch_size(self, size):
        optimizer = create_optimizer(0.1)
        arguments = {"graphdef": network()[0], "optimizer": optimizer, "batch_size": size}
        with pytest.raises(ValueError, match=f"batch_size must .*found {size}"):
            train_epoch(
                fresh_state(optimizer),
                dataset().train_images,
                dataset().train_labels,
                **arguments,
            )
        with pytest.raises(ValueError, match=f"batch_size must .*found {size}"):
            next(fit(fresh_state(optimizer), dataset(), total_steps=1, **arguments))


class TestTrainBatches:
    def test_in_parts_is_the_epoch(self):
        """Two parts, with momentum, a schedule and augmentation."""
        optimizer = momentum_optimizer()
        state = fresh_state(optimizer)._replace(epoch=jnp.int32(2))
        images, labels = dataset().train_images, dataset().train_labels
        options = {"graphdef": network()[0], "optimizer": optimizer, "flip": True, "padding": 1}
        whole, expected = jitted_train_epoch(
            state, images, labels, batch_size=BATCH, max_steps=4, **options
        )
        batches = epoch_batches(state, EXAMPLES, BATCH)[:4]
        found = []
        for first in range(0, len(batches), 2):
            part = batches[first : first + 2]
            state, losses = jitted_train_batches(
                state, images, labels, part, jnp.int32(first), **options
            )
            found.extend(losses)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        close(state[:3], whole[:3])
        assert int(state.epoch) == 2
        assert int(whole.epoch) == 3

    def test_batches_hold_every_example_once(self):
        batches = epoch_batches(fresh_state(create_optimizer(0.1)), EXAMPLES, BATCH)
        assert batches.shape == (EXAMPLES // BATCH, BATCH)
        assert len(set(np.asarray(batches).ravel().tolist())) == batches.size

    def test_a_diverged_lane_leaves_the_others_bit_for_bit_alike(self):
        optimizer, graphdef, data = rate_optimizer(), network()[0], dataset()
        batches = epoch_batches(fresh_state(optimizer), EXAMPLES, BATCH)

        @jax.jit
        @jax.vmap
        def train(rate):
            return train_batches(
                rate_state(rate, 0),
                data.train_images,
                data.train_labels,
                batches,
                graphdef=graphdef,
                optimizer=optimizer,
            )

        (sane, sane_losses), (diverged, losses) = (
            train(jnp.array([0.05, rate, 0.2])) for rate in (0.1, 1e38)
        )
        assert not np.isfinite(losses[1, -1])
        others = np.array([0, 2])
        assert to_bytes(losses[others]) == to_bytes(sane_losses[others])
        assert np.isfinite(losses[others]).all()
        pick = lambda state: [leaf[others] for leaf in jax.tree.leaves(state.params)]  # noqa: E731
        assert to_bytes(pick(diverged)) == to_bytes(pick(sane))


@functools.cache
def rate_optimizer():
    """SGD whose rate is part of its state, so that another rate compiles nothing."""
    return optax.inject_hyperparams(lambda rate: create_optimizer(rate))(rate=1.0)


def rate_state(rate, seed):
    state = fresh_state(rate_optimizer())._replace(key=jax.random.key(seed))
    rate = jnp.asarray(rate, jnp.float32)
    return state._replace(optimizer_state=optax.tree.set(state.optimizer_state, rate=rate))


def rate_losses(rate, seed, total_steps=7):
    return train_losses(
        rate_state(rate, seed),
        dataset(),
        graphdef=network()[0],
        optimizer=rate_optimizer(),
        batch_size=BATCH,
        total_steps=total_steps,
    )


class TestTrainLosses:
    @pytest.mark.parametrize("total", [0, 7])
    def test_are_those_of_fit(self, total):
        """Parts of one update here; the epoch of five updates is followed by the next."""
        options = {"graphdef": network()[0], "batch_size": BATCH}
        found = list(rate_losses(0.1, 4, total))
        assert len(found) == total
        epochs = fit(
            rate_state(0.1, 4), dataset(), optimizer=rate_optimizer(), total_steps=total, **options
        )
        means = [metrics["running_loss"] for _, metrics in epochs]
        expected = [np.mean(part) for part in (found[:5], found[5:]) if part]
        np.testing.assert_allclose(means, expected, rtol=1e-5)

    def test_parts_are_means_of_their_updates(self):
        """Twenty updates in ten parts of two, at a small rate: batches of 2 amplify roundings."""
        state = rate_state(0.001, 0)
        options = {"graphdef": network()[0], "optimizer": rate_optimizer(), "batch_size": 2}
        found = list(train_losses(state, dataset(), total_steps=20, **options))
        _, losses = jitted_train_epoch(
            state, dataset().train_images, dataset().train_labels, max_steps=20, **options
        )
        np.testing.assert_allclose(found, losses.reshape(10, 2).mean(axis=1), rtol=5e-4)

    @pytest.mark.parametrize("size", [-1, EXAMPLES + 1])
    def test_raise_on_a_batch_size(self, size):
        with pytest.raises(ValueError, match=f"batch_size must .*found {size}"):
            next(
                train_losses(
                    rate_state(0.1, 0),
                    dataset(),
                    graphdef=network()[0],
                    optimizer=rate_optimizer(),
                    batch_size=size,
                    total_steps=3,
                )
            )

    def test_of_others_do_not_change_beside_one_that_diverges(self):
        pairs = [(0.05, 0), (1e38, 0), (0.2, 1)]
        alone = [list(rate_losses(*pair)) for pair in pairs]
        assert not np.isfinite(alone[1][-1])
        together = list(zip(*(rate_losses(*pair) for pair in pairs), strict=True))
        for index in (0, 2):
            assert np.isfinite(alone[index]).all()
            assert [losses[index] for losses in together] == alone[index]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_searched_with_a_rate_that_diverges_are_the_same(self, workers):
        rates = [0.01, 0.1]
        alone, beside = (
            find_learning_rate(rate_losses, tried, seeds=(0, 1), refine=0, workers=workers)
            for tried in (rates, [*rates, 1e38])
        )
        assert beside.runs[:4] == alone.runs
        assert [run.loss for run in beside.runs[4:]] == [math.inf] * 2

    def test_compile_once_whatever_rate_and_seed(self):
        loop: Any = jitted_train_batches
        loop.clear_cache()
        list(rate_losses(0.1, 0))
        assert loop._cache_size() == 1
        compiled = []

        def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
            if "backend_compile" in event:
                compiled.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            list(rate_losses(0.3, 1))
            list(rate_losses(1e38, 2))
            assert not compiled
            jax.jit(lambda x: x * 3 + 1)(jnp.ones(7))
            assert compiled  # what is listened for does happen
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert loop._cache_size() == 1


class TestVertexFeatures:
    def test_are_those_of_live_vertices_normalised_by_the_batch(self):
        """By hand: vertex 1 leads nowhere, and batch statistics are those of these images."""
        graph = dag_graph("2_20_002")
        model = nnx.eval_shape(
            lambda: DagMLP(graph, 16, 8, CLASSES, normalization="batch", rngs=nnx.Rngs(0))
        )
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        params = initialize(jax.random.key(0), params, model.architecture())
        rest = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), rest)
        images = dataset().train_images[:6]
        found = vertex_features(graphdef, params, rest, images)

        weights = nnx.to_pure_dict(params)

        def layer(values, weights):
            return values @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])

        def activate(values):
            return np.maximum(
                (values - values.mean(axis=0)) / np.sqrt(values.var(axis=0) + 1e-5), 0
            )

        first = layer(np.asarray(images).reshape(6, 16), weights["stem"])
        second = layer(activate(first), weights["layers"]["0_2"])
        third = layer(activate(second), weights["layers"]["2_3"])
        assert len(found) == 3
        for values, expected in zip(found, (first, second, third), strict=True):
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


class TestNetworks:
    """With an argument `train`, with any arguments, and with the modes of NNX."""

    class Normalized(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(16, rngs=rngs)
            self.linear = nnx.Linear(16, CLASSES, rngs=rngs)

        def logits(self, images, **options):
            return self.linear(self.norm(images.reshape(len(images), -1), **options))

    class ByMode(Normalized):
        def __call__(self, images):
            return self.logits(images)

    class ByArgument(Normalized):
        def __call__(self, images, train):
            return self.logits(images, use_running_average=not train)

    class ByAny(Normalized):
        def __call__(self, images, **options):
            return self.logits(images, use_running_average=not options["train"])

    def test_train_and_evaluate_alike(self):
        images, labels = dataset().train_images[:8], dataset().train_labels[:8]
        found = []
        for kind in (self.ByMode, self.ByArgument, self.ByAny):
            graphdef, params, rest = nnx.split(kind(nnx.Rngs(0)), nnx.Param, ...)
            losses = [
                cross_entropy(graphdef, params, rest, images, labels, train=train)[0]
                for train in (True, False)
            ]
            found.append([float(loss) for loss in losses])
        assert found[0] == found[1] == found[2]
        assert found[0][0] != found[0][1]


class TestEvaluate:
    @pytest.mark.parametrize("size", [1, 8, 43, 1000])
    def test_is_the_mean_over_all_examples(self, size):
        """Whatever the batches: whole ones, a remainder, or a single one."""
        graphdef, params, rest, _ = network()
        images, labels = dataset().train_images, dataset().train_labels
        found = evaluate(params, rest, images, labels, graphdef=graphdef, batch_size=size)
        logits = nnx.merge(graphdef, params, rest)(images)
        assert float(found["loss"]) == pytest.approx(-log_likelihoods(logits, labels).mean(), 1e-5)
        accuracy = float(np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(labels)))
        assert float(found["accuracy"]) == pytest.approx(accuracy, 1e-6)

    @pytest.mark.parametrize("size", [0, -3])
    def test_raises_on_a_batch_size(self, size):
        graphdef, params, rest, _ = network()
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, found {size}"):
            evaluate(
                params,
                rest,
                dataset().test_images,
                dataset().test_labels,
                graphdef=graphdef,
                batch_size=size,
            )

    def test_cross_entropy_of_training_normalises_by_the_batch(self):
        graphdef, params, rest, _ = network()
        images, labels = dataset().test_images, dataset().test_labels
        results = [
            cross_entropy(graphdef, params, rest, images, labels, train=train)
            for train in (False, True)
        ]
        for loss, (logits, _) in results:
            assert logits.shape == (TESTS, CLASSES)
            assert float(loss) == pytest.approx(-log_likelihoods(logits, labels).mean(), 1e-5)
        assert float(results[0][0]) != float(results[1][0])
        assert to_bytes(results[0][1][1]) == to_bytes(rest)
        assert to_bytes(results[1][1][1]) != to_bytes(rest)


class TestFit:
    def fit(self, state, total_steps, **changes):
        optimizer = momentum_optimizer()
        arguments = {"graphdef": network()[0], "optimizer": optimizer, "batch_size": BATCH}
        augmentation = {"flip": True, "padding": 1}
        arguments |= augmentation | changes
        return list(fit(state, dataset(), total_steps=total_steps, **arguments))

    def test_reports_every_epoch(self):
        results = self.fit(fresh_state(momentum_optimizer()), 10)
        assert [metrics["epoch"] for _, metrics in results] == [1, 2]
        assert [metrics["step"] for _, metrics in results] == [5, 10]
        state, metrics = results[-1]
        graphdef = network()[0]
        for split, images, labels in (
            ("train", dataset().train_images, dataset().train_labels),
            ("test", dataset().test_images, dataset().test_labels),
        ):
            logits = nnx.merge(graphdef, state.params, state.model_state)(images)
            loss = -log_likelihoods(logits, labels).mean()
            assert metrics[f"{split}_loss"] == pytest.approx(loss, 1e-5)
            accuracy = float(np.mean(np.argmax(np.asarray(logits), axis=1) == np.asarray(labels)))
            assert metrics[f"{split}_accuracy"] == pytest.approx(accuracy, 1e-6)
        assert metrics["diverged"] == 0
        json.dumps(metrics)

    def test_stops_within_the_last_epoch(self):
        whole = self.fit(fresh_state(momentum_optimizer()), 5)
        partial = self.fit(fresh_state(momentum_optimizer()), 7)
        assert [metrics["step"] for _, metrics in partial] == [5, 7]
        assert [int(state.epoch) for state, _ in partial] == [1, 2]
        assert to_bytes(partial[0][0]) == to_bytes(whole[0][0])
        count = optax.tree.get(partial[1][0].optimizer_state, "count")
        assert int(count) == 7
        short = self.fit(fresh_state(momentum_optimizer()), 2)
        assert [metrics["step"] for _, metrics in short] == [2]

    def test_the_running_loss_is_the_mean_before_the_updates(self):
        optimizer = momentum_optimizer()
        _, losses = jitted_train_epoch(
            fresh_state(optimizer),
            dataset().train_images,
            dataset().train_labels,
            graphdef=network()[0],
            optimizer=optimizer,
            batch_size=BATCH,
            flip=True,
            padding=1,
        )
        metrics = self.fit(fresh_state(optimizer), 5)[0][1]
        assert metrics["running_loss"] == pytest.approx(float(np.mean(losses)))

    def test_of_a_finished_state_does_nothing(self):
        state = fresh_state(momentum_optimizer())._replace(epoch=jnp.int32(2))
        assert self.fit(state, 10) == []

    def test_resumed_in_the_middle_ends_bit_for_bit_alike(self, tmp_path):
        """Momentum, schedule, batch statistics and augmentation go through a checkpoint."""
        whole = self.fit(fresh_state(momentum_optimizer()), 20)
        first = self.fit(fresh_state(momentum_optimizer()), 20)[:2]
        save_checkpoint(tmp_path, 2, first[-1][0], {"seed": 0})
        restored = restore_checkpoint(tmp_path, fresh_state(momentum_optimizer()), {"seed": 0})
        assert restored is not None
        second = self.fit(restored[1], 20)
        assert [metrics for _, metrics in first + second] == [metrics for _, metrics in whole]
        assert to_bytes(second[-1][0]) == to_bytes(whole[-1][0])

    @pytest.mark.parametrize(("short", "long"), [(3, 12), (7, 9), (5, 8)])
    def test_with_more_steps_goes_on_to_where_it_would_have_come(self, short, long):
        """Of five updates an epoch: the shorter ends within the first, within another, behind one.

        The optimizer, here of a cosine over 20 updates, is the same for both.
        """
        whole = self.fit(fresh_state(momentum_optimizer()), long)
        first = self.fit(fresh_state(momentum_optimizer()), short)
        more = self.fit(first[-1][0], long, last=first[-1][1])
        whole_epochs = [one for one in first if short == long or one[1]["step"] % 5 == 0]
        found = [*whole_epochs, *more]
        assert len(found) == len(whole)
        for (_, one), (_, other) in zip(found, whole, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        leaves = (jax.tree.leaves(run[-1][0]) for run in (found, whole))
        for one, other in zip(*leaves, strict=True):
            if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):  # scans of other lengths round
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("loss", "diverged"),
        [(0.0, False), (2.30, False), (math.log(10), True), (math.inf, True), (math.nan, True)],
    )
    def test_diverged_means_no_better_than_guessing(self, loss, diverged):
        assert has_diverged(loss, 10) is diverged


class TestSchedule:
    @pytest.mark.parametrize("kind", ["constant", "cosine", "wsd"])
    @pytest.mark.parametrize("warmup", [0, 1, 4, 9])
    def test_follows_its_closed_form(self, kind, warmup):
        total, peak = 10, 0.3
        schedule = create_schedule(peak, total, kind=kind, warmup_steps=warmup)
        for step in range(total + 1):
            expected = peak
            if step < warmup:
                expected = peak * step / warmup
            elif kind == "cosine":
                expected = peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
            elif kind == "wsd":
                expected = peak * min(1.0, (total - step) / min(2, total - warmup))
            assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7), step

    def test_takes_a_traced_rate(self):
        rates = jnp.array([0.1, 0.4])
        middle = jax.vmap(lambda rate: create_schedule(rate, 10, kind="cosine")(5))(rates)
        np.testing.assert_allclose(middle, rates / 2, rtol=1e-5)

    @pytest.mark.parametrize("warmup", [-1, 10, 11])
    def test_raises_on_a_warm_up_that_leaves_no_step(self, warmup):
        with pytest.raises(ValueError, match=f"found {warmup} of 10"):
            create_schedule(0.1, 10, warmup_steps=warmup)

    def test_raises_on_no_steps(self):
        with pytest.raises(ValueError, match="found 0 of 0"):
            create_schedule(0.1, 0)

    def test_names_an_unknown_kind(self):
        with pytest.raises(ValueError, match="'linear'; accepted are constant, cosine"):
            create_schedule(0.1, 10, kind="linear")  # pyright: ignore[reportArgumentType]


class TestOptimizer:
    @pytest.mark.parametrize("rate", [math.nan, 0.0, -0.1, math.inf, -math.inf])
    def test_raises_on_a_rate(self, rate):
        with pytest.raises(ValueError, match=f"positive and finite, found {rate}"):
            create_optimizer(rate)
        with pytest.raises(ValueError, match=f"positive and finite, found {rate}"):
            create_schedule(rate, 10)
        with pytest.raises(ValueError, match="positive and finite"):
            create_schedule(jnp.float32(rate), 10)

    @pytest.mark.parametrize("momentum", [-0.1, 1.0, 2.0, math.nan])
    def test_raises_on_a_momentum(self, momentum):
        with pytest.raises(ValueError, match=f"in \\[0, 1\\), found {momentum}"):
            create_optimizer(0.1, momentum=momentum)

    def test_raises_on_nesterov_without_momentum(self):
        with pytest.raises(ValueError, match="nesterov=True needs a momentum above 0, found 0"):
            create_optimizer(0.1, nesterov=True)

    @pytest.mark.parametrize("decay", [-1e-4, math.nan, math.inf])
    def test_raises_on_a_weight_decay(self, decay):
        with pytest.raises(ValueError, match=f"not negative, found {decay}"):
            create_optimizer(0.1, weight_decay=decay)

    def test_without_momentum_has_no_trace(self):
        params = {"w": jnp.ones(3)}
        assert jax.tree.leaves(create_optimizer(0.1).init(params)) == []
        assert len(jax.tree.leaves(create_optimizer(0.1, momentum=0.9).init(params))) == 1


FLAGS = [
    *("--dataset=digits", "--architecture=2_12", "--width=16", "--normalization=batch"),
    *("--momentum=0.9", "--nesterov", "--schedule=cosine", "--warmup_steps=5"),
    *("--base_rate=0.1", "--epochs=4"),
]


def last_checkpoint(workdir):
    """The last checkpoint as orbax reads it: its number, and its leaves by name."""
    folders = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    last = max(folders, key=lambda path: int(path.name))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(last / "tree")
    return last.name, {name: np.asarray(leaf) for name, leaf in tree.items()}


class TestLonger:
    """`python -m experiments.train` with more updates in the folder of a finished training."""

    FLAGS = (
        *("--dataset=digits", "--architecture=2_12", "--width=8", "--normalization=batch"),
        *("--momentum=0.9", "--base_rate=0.1", "--padding=1", "--warmup_steps=5", "--quiet"),
    )

    @pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
    def test_goes_on_in_whole_epochs_and_is_not_made_shorter(self, tmp_path, run_again):
        """Of 22 updates an epoch: it ends within the second, then behind that."""
        longer = tmp_path / "longer"
        for flag in ("--steps=30", "--epochs=2"):
            done = run_again("train", longer, *self.FLAGS, flag)
            assert done.returncode == 0, done.stderr
        written = [(longer / name).read_bytes() for name in ("results.jsonl", "config.json")]
        shorter = run_again("train", longer, *self.FLAGS, "--steps=30")
        assert shorter.returncode == 1
        assert "(now 30), and it has done 44 updates, more than 30; choose" in shorter.stderr
        assert written == [
            (longer / name).read_bytes() for name in ("results.jsonl", "config.json")
        ]
        found = read_records(longer / "results.jsonl")
        assert [one["step"] for one in found] == [22, 44]
        assert last_checkpoint(longer)[0] == "2"
        assert "This run was resumed" in (longer / "report.html").read_text()

    def test_is_answered_in_a_sentence(self):
        train = imported("train")
        last = {"step": 44, "diverged": 0.0, "test_accuracy": 0.351, "test_loss": 1.86094}
        assert train.answer([{}, last]) == (
            "After 44 updates it reads 35.1% of the test examples right, at a loss of 1.8609 nats; "
            "one seed."
        )
        ended = {"step": 44, "diverged": 1.0, "test_accuracy": 0.1, "test_loss": None}
        assert "no better than guessing: take a smaller" in train.answer([ended])


class TestKill:
    """`python -m experiments.train`, killed and resumed, against an undisturbed run."""

    # Orbax warns that it restores without being told a sharding.
    @pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
    def test_in_the_middle_changes_nothing(self, tmp_path, run_again):
        undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
        output = tmp_path / "output"
        flags, root = [f"--workdir={killed}", *FLAGS], pathlib.Path(__file__).parent.parent
        arguments = ("experiments.train", flags, [output, output], root)
        process = FORKS.Process(target=become, args=arguments)
        process.start()
        results = killed / "results.jsonl"
        # A second record means that the first checkpoint is whole; the second one is being written.
        while not results.exists() or results.read_bytes().count(b"\n") < 2:
            assert process.is_alive(), output.read_text()
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert results.read_bytes().count(b"\n") < 4
        assert not (killed / "report.html").exists()
        resumed = run_again("train", killed, *FLAGS, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert "resumed after epoch" in resumed.stdout + resumed.stderr
        whole = run_again("train", undisturbed, *FLAGS)
        assert whole.returncode == 0, whole.stderr
        assert results.read_bytes() == (undisturbed / "results.jsonl").read_bytes()
        assert results.read_bytes().count(b"\n") == 4
        (one, leaves), (other, wanted) = map(last_checkpoint, (killed, undisturbed))
        assert one == other and to_bytes(leaves) == to_bytes(wanted)
        reports = [(one / "report.html").read_text() for one in (killed, undisturbed)]
        assert ["was resumed: 2 commands" in one for one in reports] == [True, False]
        tables = [one.partition("<h2>Settings")[0] for one in reports]
        assert tables[0] == tables[1]
        for flags, reason in (
            (["--epochs=5"], "holds a run with epochs=4.0 (now 5.0), and --schedule=cosine spreads "
             "over all updates, so that none of another length goes on from it; those of "
             "--schedule=constant do; choose another --workdir"),
        ):  # fmt: skip
            other = run_again("train", undisturbed, *FLAGS, *flags)
            assert other.returncode == 1 and reason in other.stderr
        assert results.read_bytes() == (undisturbed / "results.jsonl").read_bytes()
