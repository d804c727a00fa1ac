"""The snapshot of version 0.1 is complete, and differences from it are found; some may exist."""

import json

from tests.test_zoo import EXAMPLES
from tests.zoo_snapshot import ABSENT, FILE, Difference, differences, encode, table

PATHS = {"count": "2", "depth_sum": "2", "min": "0", "max": "2"}


def model(**leaves):
    return {"paths": PATHS, "leaves": leaves}


def leaf(role="hidden", width_sgd: float | None = 1.0, **more):
    return {"role": role, "width_sgd": width_sgd, **more}


UNSUPPORTED_THEN = {
    "equinox-mlp_mixer_with_joint_norms_undeclared",
    "haiku-variational_autoencoder_undeclared",
    "linen-attention_pooling",
    "linen-optimized_lstm_language_model",
    "linen-weight_normalization",
    "plain-low_rank_update",
    "plain-state_space_layer",
}
"""Examples that version 0.1 could not read."""


def test_the_file_holds_every_example():
    models = json.loads(FILE.read_text(encoding="utf-8"))
    assert set(EXAMPLES) - set(models) == UNSUPPORTED_THEN
    assert all(one["leaves"] for one in models.values())


def test_differences_of_values_leaves_and_models():
    before = {
        "gone": model(a=leaf()),
        "raising": model(a=leaf()),
        "same": model(a=leaf()),
        "some": model(a=leaf(), b=leaf(), c=leaf("bias"), d=leaf()),
    }
    after = {
        "new": model(a=leaf()),
        "raising": {"error": "TraceError: no"},
        "same": model(a=leaf()),
        "some": model(a=leaf("readout", 2.0), b=leaf(width_sgd=None), d=leaf(std_none=0.5))
        | {"paths": PATHS | {"count": "3"}},
    }
    found = differences(before, after)
    assert found == [
        Difference("gone", "", "model", "traced", ABSENT),
        Difference("new", "", "model", ABSENT, "traced"),
        Difference("raising", "", "model", "traced", "raises TraceError: no"),
        Difference("some", "(paths)", "count", "2", "3"),
        Difference("some", "a", "role", "hidden", "readout"),
        Difference("some", "a", "width_sgd", 1.0, 2.0),
        Difference("some", "b", "width_sgd", 1.0, None),
        Difference("some", "c", "leaf", "bias", ABSENT),
        Difference("some", "d", "std_none", ABSENT, 0.5),
    ]
    lines = table(found).splitlines()
    assert [line.split() for line in lines if "width_sgd" in line][:2] == [
        ["width_sgd", "1.0", "->", "2.0"],
        ["b", "width_sgd", "1.0", "->", "error"],
    ]
    assert lines[-1].startswith("9 values differ, in 4 models")
    assert table(differences(before, before)) == "nothing differs"


def test_the_file_is_read_as_it_was_written():
    models = {"a": model(x=leaf(), y=leaf()), "b": {"error": "TraceError: no"}}
    assert json.loads(encode(models)) == models
