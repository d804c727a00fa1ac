"""What version 0.1 says of every model of the zoo, and what the code at hand says otherwise.

    python -m tests.zoo_snapshot            # lists the differences, ten seconds
    python -m tests.zoo_snapshot --write    # writes tests/golden/zoo_v0_1.json, for another base

The file is not ground truth, unlike the examples of `tests/test_zoo.py`: it makes every change of a
number visible, so that each can be judged. Differences are therefore listed, and fail no test.
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import archscale_jax as archscale
from archscale_jax import Architecture, Operator, Role
from archscale_jax.rules._width import features
from tests.test_zoo import EXAMPLES
from tests.zoo import Example

FILE = pathlib.Path(__file__).parent / "golden" / "zoo_v0_1.json"

BLOCK = archscale.build_graph(
    3, [0, 0, 1], [1, 2, 2], [Operator.LINEAR, Operator.SKIP, Operator.LINEAR]
)
"""One pre-LN block, x + W σ(W norm(x)): the base of the depth multipliers."""

FIELDS = ("role", "layer", "fan_in", "fan_out", "kernel_size")
INITIALIZATIONS = {"target": "target_in_degree", "moment": "second_moment", "none": "he_normal"}
"""Rules by the names that they had in version 0.1."""

WIDTH_RULES = ("sgd", "adam", "muon")
DEPTH_RULES = ("adam", "sgd")

_STEMS = (Role.INPUT, Role.EMBEDDING)

Record = dict[str, Any]
ABSENT = object()
"""Stands for a value that one side does not have; None is one for which a rule raises."""


def snapshot() -> dict[str, Record]:
    """Returns what the code says of every model, by name.

    A model is `{"paths": …, "leaves": {name: …}}`, or `{"error": message}` where tracing raises.
    """
    return {name: describe(one) for name, one in EXAMPLES.items()}


def describe(model: Example) -> Record:
    function, params, inputs = model.build()
    try:
        architecture = archscale.trace(function, params, *inputs, **model.options)
        paths = archscale.path_statistics(architecture.graph)
    except Exception as error:  # whatever a tracer under construction raises
        return {"error": f"{type(error).__name__}: {error}"}
    columns = columns_of(architecture)
    return {
        "paths": {
            # Strings, since numbers of paths exceed what most readers of JSON take for an integer.
            "count": str(paths.count),
            "depth_sum": str(paths.depth_sum),
            "min": str(paths.min_depth),
            "max": str(paths.max_depth),
        },
        "leaves": {
            one.name: {field: getattr(one, field) for field in FIELDS}
            | {column: rounded(values.get(one.name)) for column, values in columns.items()}
            for one in architecture.parameters
        },
    }


def columns_of(architecture: Architecture) -> dict[str, Mapping[str, float | None]]:
    """Returns standard deviations and multipliers of the leaves, by column and leaf."""

    def deviations(rule: str) -> Mapping[str, float | None]:
        # A report excludes the one leaf that raises; `weight_standard_deviations` all.
        report = archscale.report(architecture, rule="none", initialization=INITIALIZATIONS[rule])
        return {one["path"]: one["standard_deviation"] for one in report.records}

    def width(rule: str) -> Mapping[str, float | None]:
        base = archscale.with_widths(architecture, halves(architecture))
        return archscale.learning_rate_multipliers(architecture, base, "none", width_rule=rule)

    def depth(rule: Any) -> Mapping[str, float | None]:
        return archscale.learning_rate_multipliers(architecture, BLOCK, "none", depth_rule=rule)

    kinds = (
        ("std", deviations, INITIALIZATIONS),
        ("width", width, WIDTH_RULES),
        ("depth", depth, DEPTH_RULES),
    )
    return {
        f"{kind}_{rule}": unless_unsupported(function, rule)
        for kind, function, rules in kinds
        for rule in rules
    }


def unless_unsupported(
    function: Callable[[str], Mapping[str, float | None]], rule: str
) -> Mapping[str, float | None]:
    try:
        return function(rule)
    except Exception:  # a crash in one rule must not hide what the others say
        return {}


def halves(architecture: Architecture) -> dict[int, int]:
    """Returns half of every even number of features of hidden weights, and of inputs they join."""
    hidden = [one for one in architecture.parameters if one.role == Role.HIDDEN]
    widths = {width for one in hidden for width in features(one)}
    if np.any(architecture.graph.edges["operator"] == Operator.CONCATENATION):
        stems = [one for one in architecture.parameters if one.role in _STEMS]
        widths |= {features(one)[1] for one in stems}
    return {width: width // 2 for width in sorted(widths) if width >= 4 and width % 2 == 0}


def rounded(value: Any) -> Any:
    """Six digits: the last ones of a float differ between processors. A stack has every slice's."""
    if value is None:
        return None
    if np.ndim(value):
        return [rounded(one) for one in np.ravel(value)]
    return float(f"{value:.6g}")


class Difference(NamedTuple):
    """A value of a leaf, of the model's paths, or of the model ("") that has changed."""

    model: str
    leaf: str
    field: str
    before: Any
    after: Any


def differences(before: Mapping[str, Record], after: Mapping[str, Record]) -> list[Difference]:
    """Returns all values that differ between two snapshots, sorted by model and leaf.

    What only one side has counts as one difference, whatever it holds: a model, also one that
    cannot be traced, or a leaf.
    """
    found = []
    for model in sorted({*before, *after}):
        states = [state(side.get(model)) for side in (before, after)]
        if states != ["traced", "traced"]:
            found.append(Difference(model, "", "model", *states))
            continue
        sides = [
            {"(paths)": side[model]["paths"], **side[model]["leaves"]} for side in (before, after)
        ]
        for leaf in sorted({*sides[0], *sides[1]}):
            old, new = (side.get(leaf) for side in sides)
            if old is None or new is None:
                values = (ABSENT if one is None else one.get("role") for one in (old, new))
                found.append(Difference(model, leaf, "leaf", *values))
                continue
            found += [
                Difference(model, leaf, field, old.get(field, ABSENT), new.get(field, ABSENT))
                for field in [*old, *(new.keys() - old.keys())]
            ]
    return [one for one in found if one.before != one.after]


def state(record: Record | None) -> Any:
    if record is None:
        return ABSENT
    return f"raises {record['error']}" if "error" in record else "traced"


def table(found: list[Difference]) -> str:
    """Returns the differences as text: a block for every model, a line for every value."""
    if not found:
        return "nothing differs"
    leaf_width, field_width, before_width = (
        max(len(shown(value)) for value in values)
        for values in zip(*((one.leaf, one.field, one.before) for one in found), strict=True)
    )
    lines, last = [], ("", "")
    for model, leaf, field, before, after in found:
        if model != last[0]:
            lines += ["", model]
        name = "" if (model, leaf) == last else leaf  # a leaf is named on its first line
        cells = f"{name:{leaf_width}}  {field:{field_width}}  {shown(before):>{before_width}}"
        lines.append(f"  {cells} -> {shown(after)}")
        last = model, leaf
    counts = collections.Counter(one.field for one in found)
    models = {one.model for one in found}
    return "\n".join(
        [
            *lines[1:],
            "",
            f"{len(found)} values differ, in {len(models)} models: "
            + ", ".join(f"{field} {count}" for field, count in counts.most_common()),
        ]
    )


def shown(value: Any) -> str:
    if value is ABSENT:
        return "absent"
    return "error" if value is None else str(value)


def encode(models: Mapping[str, Record]) -> str:
    """Returns JSON with one line for every leaf, so that the history of the file reads as one."""

    def compact(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    def lines(model: Record) -> str:
        if "error" in model:
            return compact(model)
        leaves = ",\n".join(
            f"{compact(name)}:{compact(leaf)}" for name, leaf in sorted(model["leaves"].items())
        )
        return f'{{"paths":{compact(model["paths"])},"leaves":{{\n{leaves}\n}}}}'

    blocks = (f"{compact(name)}:{lines(model)}" for name, model in sorted(models.items()))
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Differences of the zoo from version 0.1.")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name} anew")
    if parser.parse_args().write:
        FILE.write_text(encode(snapshot()), encoding="utf-8")
    else:
        print(table(differences(json.loads(FILE.read_text(encoding="utf-8")), snapshot())))


if __name__ == "__main__":
    main()
