"""Do spellings agree, and moments hold? Random networks: `python -m benchmarks.random_programs`.

For every network of `tests/programs.py`: the standard deviations, roles and width multipliers of
five spellings, which must agree; and at width 1,024 the second moment of every vertex, by two rules
of initialization, in one of the spellings, against what the rule promises (with the noise that
`tests/program_checks.py` gives). Ten minutes on two quiet cores with `--workers=2`, half an hour on
one. What is done is kept in `build/random_programs`, for as long as the code of the library stays
the same, and a second call goes on from there. `--workers=2` checks in two processes, each on its
share of the cores; `taskset -c 0` before the command leaves all cores but one to others.

    python -m benchmarks.random_programs --seed=17

prints one network: its text, which choices of spelling change what, and the table of its vertices.
"""

import collections
import concurrent.futures
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks import common
from experiments.lab.files import append_record, read_records
from experiments.lab.sweeps import ProcessExecutor
from tests.program_checks import (
    RULES,
    TOLERANCE,
    Moments,
    architecture,
    at_fault,
    differences,
    library_promise,
    second_moments,
)
from tests.programs import generate
from tests.spellings import Spelled, Spelling, spelled, spellings

FLAGS = flags.FLAGS
flags.DEFINE_integer("programs", 1000, "Number of programs.", lower_bound=1)
flags.DEFINE_integer("width", 1024, "Width at which moments are measured.", lower_bound=16)
flags.DEFINE_bool("moments", True, "Whether to measure moments at all.")
flags.DEFINE_integer("workers", 1, "Processes, which share the cores.", lower_bound=1)
flags.DEFINE_integer("seed", None, "Show the program of this seed, and nothing else.")


def measured_spelling(seed: int) -> Spelled:
    """Returns the spelling in which moments are measured; seeds take them in turn."""
    chosen = spellings(seed)
    return spelled(generate(seed), chosen[seed % len(chosen)])


def measured(written: Spelled, rule: str, width: int) -> list[Moments] | str | None:
    """Measures moments: of every vertex, or why not, or None without promises."""
    promise = library_promise()
    if promise is None:
        return None
    try:
        return second_moments(written, rule, promise, width=width)
    except Exception as error:  # of any kind: a program is a network like any other
        return f"{type(error).__name__}: {error}"


def check(seed: int, width: int, moments: bool) -> dict[str, Any]:
    """Checks one program: what the journal keeps of it."""
    program = generate(seed)
    found = differences(program)
    record: dict[str, Any] = {
        "seed": seed,
        "kinds": sorted(program.kinds),
        "differences": sorted({f"{one.quantity}" for one in found}),
        "moments": {},
    }
    for rule in RULES if moments else ():
        vertices = measured(measured_spelling(seed), rule, width)
        if isinstance(vertices, str):
            record["moments"][rule] = {"error": vertices}
        elif vertices:
            worst = max(vertices, key=lambda one: abs(one.ratio - 1))
            record["moments"][rule] = {
                "vertices": len(vertices),
                "wrong": sum(not one.holds for one in vertices),
                "open": sum(one.is_open for one in vertices),
                "worst_ratio": worst.ratio,
                "draws": worst.draws,
            }
    return record


def checks(seeds: list[int], width: int, moments: bool, workers: int) -> Iterator[dict[str, Any]]:
    """Checks programs in processes; yields what the journal keeps, in the order of arrival."""
    executor = ProcessExecutor(workers)
    try:
        calls = [executor.submit(check, seed, width, moments) for seed in seeds]
        for call in concurrent.futures.as_completed(calls):
            yield call.result()
    finally:  # where a program raises or a user interrupts, those that wait are not begun
        executor.shutdown(cancel_futures=True)


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts what holds, in all and by what is in the programs."""
    kinds = {kind for record in records for kind in record["kinds"]}
    by_kind = {
        kind: counts([record for record in records if kind in record["kinds"]])
        for kind in sorted(kinds)
    }
    quantities = collections.Counter(name for record in records for name in record["differences"])
    return counts(records) | {
        "by_kind": by_kind,
        "differences": dict(quantities.most_common()),
        "seeds_with_differences": [one["seed"] for one in records if one["differences"]],
        "seeds_with_wrong_moments": {
            rule: [one["seed"] for one in records if is_wrong(one["moments"].get(rule))]
            for rule in RULES
        },
    }


def is_wrong(moments: dict[str, Any] | None) -> bool:
    return moments is not None and ("error" in moments or moments["wrong"] > 0)


def counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts programs, those whose spellings agree and those whose moments hold."""
    found: dict[str, Any] = {
        "programs": len(records),
        "spellings_agree": sum(not record["differences"] for record in records),
    }
    for rule in RULES:
        told = [one["moments"][rule] for one in records if rule in one["moments"]]
        ratios = [one["worst_ratio"] for one in told if one.get("worst_ratio") is not None]
        found[rule] = {
            "measured": len(told),
            "hold": sum(not is_wrong(one) for one in told),
            "errors": sum("error" in one for one in told),
            "smallest_ratio": min(ratios, default=None),
            "largest_ratio": max(ratios, default=None),
        }
    return found


def show(seed: int, width: int) -> None:
    """Prints a program, what its spellings change, and its vertices."""
    program = generate(seed)
    print(f"program {seed}: {', '.join(sorted(program.kinds))}\n")
    print(spelled(program, Spelling()).source)
    found = differences(program)
    for one in found:
        print(one)
    for choice, changed in (at_fault(program) if found else {}).items():
        print(f"\n{choice} alone changes:")
        for one in changed:
            print(f"  {one.leaf} {one.quantity}: {one.plain} became {one.other}")
    print("\nspellings agree\n" if not found else "")
    written = measured_spelling(seed)
    if written.spelling != Spelling():
        print(f"measured: {written.spelling}\n\n{written.source}")
    for rule in RULES:
        show_vertices(written, rule, width)


def show_vertices(written: Spelled, rule: str, width: int) -> None:
    """Prints what a rule promises of the vertices of a program and what they have."""
    vertices = measured(written, rule, width)
    if vertices is None or isinstance(vertices, str):
        print(vertices or "the library promises no moments")
        return
    graph = architecture(written, width).graph
    lines = [["vertex", "edges from", "promised", "measured", "± error", "ratio", "holds"]]
    for one in vertices:
        sources = ", ".join(map(str, graph.senders[graph.receivers == one.vertex]))
        numbers = (one.promised, one.measured, one.error, one.ratio)
        cells = [f"{number:.4g}" for number in numbers]
        lines.append([str(one.vertex), sources, *cells, "yes" if one.holds else "NO"])
    common.show(f"rule {rule}, {vertices[0].draws} draws", lines)


def lines(results: dict[str, Any]) -> list[list[str]]:
    """Lays out how many programs hold, by what is in them; the heading first."""
    moments = [f"{rule}: moments within {TOLERANCE:.0%}" for rule in RULES]
    found = [["programs with", "programs", "spellings agree", *moments]]
    for name, one in {"anything": results, **results["by_kind"]}.items():
        cells = [f"{one[rule]['hold']} of {one[rule]['measured']}" for rule in RULES]
        found.append([name, str(one["programs"]), str(one["spellings_agree"]), *cells])
    return found


def main() -> None:
    if FLAGS.seed is not None:
        show(FLAGS.seed, FLAGS.width)
        return
    programs, width = common.sized((FLAGS.programs, FLAGS.width), (2, 16))
    label = f"{width}{'' if FLAGS.moments else '-spellings'}"
    tests = ["programs.py", "spellings.py", "program_checks.py"]
    journal = common.journal("random_programs", label, tests)
    records = {one["seed"]: one for one in read_records(journal)}
    missing = [seed for seed in range(programs) if seed not in records]
    for record in checks(missing, width, FLAGS.moments, FLAGS.workers):
        append_record(journal, record)
        records[record["seed"]] = record
        if len(records) % 50 == 0:
            print(f"{len(records)} of {programs}", flush=True)
    results = summary([records[seed] for seed in range(programs)])
    common.show("Random programs that hold", lines(results))
    settings = {"width": width, "tolerance": TOLERANCE, "promises": bool(library_promise())}
    common.write_results("random_programs", settings | results)


if __name__ == "__main__":
    common.run(main)
