"""The first study: a small network, a deep one and a wide one, at every rate of a grid."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.lab import files
from tests.binaries import imported

study = imported("tune_small")

pytestmark = pytest.mark.quick_compilation

SMALL = ("--base_depth=1", "--base_width=8", "--depth=2", "--wide=16", "--steps=3",
         "--batch_size=8", "--num_rates=2", "--num_seeds=1")  # fmt: skip
TRIAL = {"base": [1, 8], "steps": 6, "batch_size": 8, "seeds": 2, "rates": [1e-3, 1e-2]}


def test_it_trains_prints_draws_and_goes_on(tmp_path, run_again):
    done = run_again("tune_small", tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "At the rate that is best for 1 block of width 8, 2 blocks of width 8 reach" in (
        done.stdout
    )
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert (tmp_path / "tune_small.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report.html").read_text().count("<svg") == 1
    assert len(files.read_records(tmp_path / "results.jsonl")) == 3 * 2
    again = run_again("tune_small", tmp_path, *SMALL)
    assert again.returncode == 0 and again.stdout == done.stdout


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--depth=1 --wide=8", "raise one of them"),
        ("--wide=7", "--wide=7 is below --base_width=8, that of the small network; raise --wide"),
        ("--steps=0", "steps"),
        ("--max_rate=0", "rate"),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, run_again, flag, text):
    done = run_again("tune_small", tmp_path, *SMALL, *flag.split())
    assert done.returncode != 0
    assert text in done.stderr.splitlines()[-1]


def test_losses_are_those_of_a_plain_loop():
    """Against a training written out: framework's start, one rate, one seed at a time."""
    found = study.train(TRIAL | {"size": [2, 8], "how": "standard"})["losses"]
    network, tokens = study.Network(2, 8), jnp.zeros((8, study.CONTEXT), jnp.int32)
    optimizer = optax.adamw(1e-2, weight_decay=study.DECAY)
    params = jax.jit(network.init)(jax.random.split(jax.random.key(0), 2)[1], tokens)
    state, last = optimizer.init(params), math.nan

    @jax.jit
    def step(params, state, window):
        def loss_fn(params):
            logits = jax.nn.log_softmax(network.apply(params, window[:, :-1]))
            return -logits[np.arange(8), window[:, -1]].mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    for window in study.windows(6, 8).astype(np.int32):
        params, state, last = step(params, state, window)
    assert found[1][1] == pytest.approx(float(last), rel=1e-4)


def test_the_base_has_no_other_base():
    """Where the network is the base, both parametrizations see the same data and rates."""
    base = study.train(TRIAL | {"size": [1, 8], "how": "plan"})["losses"]
    assert np.shape(base) == (2, 2) and np.all(np.abs(np.array(base) - math.log(256)) < 1)


def test_windows_are_pieces_of_the_source():
    windows = study.windows(2, 3).reshape(6, -1)
    text = study.source().tobytes()
    assert windows.shape == (6, study.CONTEXT + 1)
    assert all(one.tobytes() in text for one in windows)


def test_what_is_given_up_and_what_diverged():
    rates = [0.1, 0.2, 0.4]
    record = {"rates": rates, "how": "plan"}
    results = study.summarise(
        [
            record | {"size": [2, 8], "losses": [[2.0], [1.0], [3.0]]},
            record | {"size": [4, 8], "losses": [[1.0], [1.5], [None]]},
            record | {"size": [2, 16], "losses": [[1.0], [None], [None]]},
        ]
    )
    assert results["best"].tolist() == [0.2, 0.1, 0.1]
    assert results["given_up"].tolist() == pytest.approx([0.0, 0.5, math.inf])
    assert study.table(results)["given up"].tolist() == ["0.0%", "50.0%", "diverged"]
