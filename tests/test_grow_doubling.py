"""The study of doubling: what a training does and counts, and what is said of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx

import archscale_jax as archscale
from archscale_jax._trees import named_leaves, with_leaves
from experiments import grow_doubling_report as report
from experiments import grow_operators
from experiments.lab.datasets import text as texts
from experiments.lab.models.images import ResidualStages
from tests.binaries import imported

doubling = imported("grow_doubling")

pytestmark = pytest.mark.quick_compilation


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Makes trainings as short and as small as can be; returns the settings of a study of them."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(80):
        (folder / f"{number}.py").write_text(f"# {number}\n" + "return x\n" * 20)
    tasks = {"decoder": doubling.Task((1, 16), (2, 32), 2**-7, "decoder", 4, head=8),
             "cnn": doubling.Task((3, 1), (6, 2), 2**-7, "CNN", 8),
             "hidden": doubling.Task((3, 1), (3, 2), 2**-7, "hidden", 8, stream=2)}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "PART": 2,
            "CONTEXT": 8,
            "WARMUP": 4,
            "AFTER": (0, 2),
            "BATCHES": 3,
        }.items():
            patch.setattr(doubling, name, value)
        patch.setattr(doubling, "TASKS", tasks)
        yield {"steps": 24, "text": texts.load_text(str(folder)).name, "dataset": "digits"}
    doubling.model_of.cache_clear()
    doubling.data_of.cache_clear()


@pytest.fixture
def study(small, tmp_path):
    return doubling.Study(small, tmp_path / "results.jsonl", {})


def test_a_training_grows_and_counts_what_it_does(study):
    task, switches = "decoder", [12]
    trial = study.trial(task, "width", 0.01, 1)
    json.dumps(trial)
    assert trial["sizes"] == [[2, 16], [2, 32]]
    assert (trial["switches"], trial["ends"]) == (switches, [24])
    found = doubling.train(trial)
    each = [
        doubling.model_of(task, tuple(size), *doubling.data_key(trial)).operations
        for size in trial["sizes"]
    ]
    assert each == sorted(each)
    # A growth costs an update of the larger network.
    updates = np.diff([0, *switches, 24]) + np.append(0, np.ones(len(switches)))
    assert found["operations"] == [pytest.approx(np.dot(updates, each))]
    assert len(found["growths"]) == len(switches)
    for growth in found["growths"]:
        assert growth["after"][0] == pytest.approx(growth["before"], rel=1e-4)
        assert len(growth["after"]) == 2
    assert np.isfinite(found["held_out"][0])
    assert 0 <= found["accuracy"][0] <= 1


def test_hidden_layers_alone_grow_by_an_operator(study):
    trial = study.trial("hidden", "tiny", 0.01, 1)
    assert (trial["sizes"], trial["switches"], trial["ends"]) == ([[3, 1], [3, 2]], [12], [24])
    found = doubling.train(trial)
    small, large = study.operations("hidden", [(3, 1), (3, 2)])
    (growth,) = found["growths"]
    assert growth["operations"] > 0
    total = 12 * small + 13 * large + growth["operations"]
    assert found["operations"] == [pytest.approx(total)]
    assert growth["after"][0] != growth["before"]
    assert np.isfinite(found["held_out"][0])


def test_methods_are_those_of_a_task():
    assert set(doubling.TASKS["hidden"].methods) == {"scratch", *doubling.METHODS} - {
        *doubling.TASKS["cnn"].methods
    } | {"scratch"}


@pytest.fixture(scope="module")
def narrow_and_wide():
    """A trained-like narrow network, the shapes of a wide one, and a loss for both."""
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    batch = images, jax.random.randint(jax.random.key(1), (64,), 0, 10)
    plans = [
        archscale.parametrize(
            nnx.eval_shape(
                lambda h=h: ResidualStages((8, 8, 1), 2, 3, 10, True, hidden=h, rngs=nnx.Rngs(0))
            ),
            images,
            optimizer="adamw",
            model_kwargs={"train": True},
        )
        for h in (1, 2)
    ]
    params = [jax.jit(plan.init)(jax.random.key(2)) for plan in plans]
    wide = [leaf.shape for leaf in jax.tree.leaves(params[1])]

    def logits(params, images):
        is_wide = [leaf.shape for leaf in jax.tree.leaves(params)] == wide
        return plans[is_wide].apply(params, images)

    def loss(params, batch):
        found = logits(params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(found, batch[1]).mean()

    return params, batch, jax.jit(logits), loss


@pytest.mark.parametrize("method", ["tiny", "random"])
def test_new_neurons_leave_the_others_as_they_are(method, narrow_and_wide):
    (params, like), batch, logits, loss = narrow_and_wide
    added = grow_operators.add_neurons(
        loss, params, like, batch, batch, None, None, key=jax.random.key(3), method=method
    )
    old, new = named_leaves(params), named_leaves(added.params)
    assert {name: leaf.shape for name, leaf in new.items()} == {
        name: leaf.shape for name, leaf in named_leaves(like).items()
    }
    for name, leaf in old.items():
        np.testing.assert_array_equal(new[name][tuple(map(slice, leaf.shape))], leaf)
    # Where nothing reads the new ones the function is that of before.
    read = {
        name: jnp.asarray(leaf).at[:, :, old[name].shape[2] :].set(0)
        for name, leaf in new.items()
        if leaf.ndim == 4 and leaf.shape[2] > old[name].shape[2]
    }
    assert len(read) == 3
    unread = with_leaves(added.params, read)
    np.testing.assert_allclose(
        logits(unread, batch[0]), logits(params, batch[0]), rtol=1e-4, atol=1e-5
    )
    assert added.amplitude > 0
    assert added.operations > grow_operators.search_operations(loss, like, batch)


def test_the_search_is_counted_as_14_forward_passes_of_the_wide_network(narrow_and_wide):
    (_, like), batch, _, loss = narrow_and_wide
    # Places times inputs and outputs, of 8 × 8, 4 × 4 and 2 × 2 pixels; 9 entries a kernel.
    convolutions = 64 * (1 * 2 + 2 * 2 + 2 * 2) + 16 * (2 * 4 + 4 * 4) + 4 * (4 * 8 + 8 * 8)
    expected = 14 * len(batch[1]) * 2 * (9 * convolutions + 8 * 10)
    assert grow_operators.search_operations(loss, like, batch) == expected


def test_what_grow_cannot_widen_is_said(narrow_and_wide):
    (params, like), batch, _, loss = narrow_and_wide
    names = named_leaves(like)
    name = "readout/kernel"
    taller = with_leaves(like, {name: jnp.zeros((names[name].shape[0] + 1, 10))})
    with pytest.raises(ValueError, match="readout/kernel.*accepted are shapes"):
        grow_operators.add_neurons(
            loss, params, taller, batch, batch, None, None, key=jax.random.key(3)
        )


def test_hidden_layers_as_wide_as_the_stream_make_the_usual_network():
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))

    def network(**options):
        return ResidualStages((8, 8, 1), 2, 3, 10, True, **options, rngs=nnx.Rngs(0))

    @nnx.jit
    def logits(model):
        return model(images, train=True)

    usual, ours = nnx.jit(network)(), nnx.eval_shape(lambda: network(hidden=2))
    nnx.update(ours, nnx.state(usual))
    np.testing.assert_array_equal(logits(ours), logits(usual))
    thin = nnx.eval_shape(lambda: network(hidden=1))
    widths = [(first.convolution.out_features, second.convolution.out_features)
              for first, second in thin.blocks]  # fmt: skip
    assert widths == [(1, 2), (2, 4), (4, 8)]


def test_ends_share_what_comes_before_the_rate_falls(study):
    whole, short, long = (
        doubling.train(study.trial("hidden", "scratch", 0.01, 0, lengths=lengths))
        for lengths in ((0.5, 1.0), (0.5,), (1.0,))
    )
    assert whole["held_out"] == [*short["held_out"], *long["held_out"]]
    assert whole["operations"][1] == pytest.approx(2 * whole["operations"][0])
    assert whole["operations"][0] == short["operations"][0]


def test_a_doubled_path_starts_small_where_it_doubles():
    task = doubling.Task((2, 32), (4, 64), 0.01, "", 1)
    width, depth = (doubling.path_of(task, doubling.METHODS[name]) for name in ("width", "depth"))
    assert width == ([(4, 32), (4, 64)], [1 / 2])
    assert depth == ([(2, 64), (4, 64)], [1 / 2])
    assert doubling.path_of(task, doubling.METHODS["scratch"]) == ([(4, 64)], [])


def results(losses, task="decoder"):
    """Trainings from scratch at loss = operations^(-1/4), and one of each method at its loss."""
    rows = [
        {"task": task, "method": "scratch", "rate": 0.01, "seed": seed, "updates": updates,
         "searched": False, "operations": updates, "held_out": updates**-0.25, "accuracy": 0.5,
         "rise": np.nan}
        for seed in (0, 1) for updates in (400, 600, 800)
    ]  # fmt: skip
    rows += [
        rows[0] | {"method": method, "seed": seed, "updates": 800, "operations": 500,
                   "held_out": loss, "rise": 0.01 * (seed + 1)}
        for method, loss in losses.items() for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("equal", [300, 500, 625, 800, 1000])
def test_savings_are_those_of_a_power_law(equal):
    frame = results({})
    one = frame[frame.seed == 0]
    assert report.saved(one, 500, equal**-0.25) == pytest.approx(1 - 500 / equal)


def test_the_table_and_the_figure_show_every_method(tmp_path):
    frame = results({"both": 625**-0.25, "halves": 400**-0.25})
    rows = report.table(frame, 800).to_dict("records")
    assert [row["method"] for row in rows] == ["from scratch"] * 3 + [
        doubling.METHODS[name].label for name in ("both", "halves")
    ]
    assert [row["saved, %"] for row in rows[3:]] == ["20.0 ± 0.0", "-25.0 ± 0.0"]
    assert rows[3]["rise, %"] == "1.50 ± 0.50"
    assert rows[3]["operations"] == f"{500 / 800:.2f}"
    report.draw(frame, 800, ["decoder"], tmp_path / "figure.png")
    text = (tmp_path / "figure.svg").read_text()
    assert all(doubling.METHODS[name].label in text for name in ("scratch", "both", "halves"))


def test_operators_are_compared_seed_by_seed():
    frame = results({"copies": 625**-0.25, "tiny": 800**-0.25}, "hidden").assign(
        growing=0.0, before=0.5, after=0.5, later=0.4
    )
    tiny = frame.method == "tiny"
    frame.loc[tiny, "growing"] = 100.0
    frame.loc[tiny, ["after", "later"]] = 0.45, 0.43
    copies, grown = report.operators(frame, 800).to_dict("records")
    assert copies["hidden neurons"] == doubling.METHODS["copies"].label
    assert copies["saved, %"] == copies["growing free, %"] == "20.0 ± 0.0"
    assert (grown["saved, %"], grown["growing free, %"]) == ("37.5 ± 0.0", "50.0 ± 0.0")
    assert grown["growing, %"] == "20.0"
    assert grown["less copies"] == f"{800**-0.25 - 625**-0.25:.4f} ± 0.0000"
    assert (grown["right after"], grown["100 later"]) == ("-0.0500 ± 0.0000", "-0.0700 ± 0.0000")
    assert grown["100 later, less copies"] == "0.0300 ± 0.0000"
    assert report.operators(results({}), 800).empty


def test_rates_are_searched_until_the_best_has_worse_neighbours(study, monkeypatch):
    asked = []

    def measure(trials, name):
        asked.extend(trial["rate"] for trial in trials)
        return [{"result": {"held_out": [abs(np.log2(one["rate"]) + 4.9)]}} for one in trials]

    monkeypatch.setattr(study, "measure", measure)
    assert study.best_rate("decoder") == 2**-5
    assert max(asked) == 2**-4


def test_what_is_missing_is_said(study, monkeypatch):
    monkeypatch.setattr(study, "_only_finished", True)
    with pytest.raises(doubling.UnfinishedError):
        study.measure([study.trial("cnn", "both", 0.01, 0)], "")
    assert study.frame().empty
