"""Studies that are killed, interrupted, failing or shared end as undisturbed ones."""

import hashlib
import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import hypothesis
import pytest
from hypothesis import strategies

from experiments.lab.files import append_record, read_records, write_records
from experiments.lab.sweeps import missing_trials, run_study, run_trial, trial_hash

KILLS = 6
PACKAGE = pathlib.Path(__file__).parents[1] / "archscale_jax"
# The package's own __init__ imports JAX, which takes seconds and which a study does not need.
SCRIPT = f"""
import os, signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits none
package = types.ModuleType("archscale_jax")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["archscale_jax"] = package
from experiments.lab.sweeps import run_study

def run(trial):
    os.write(1, b"%d\\n" % trial["index"])
    time.sleep(0.02)
    if trial["index"] % 10 == 7:
        raise ValueError("seven")
    return {{"loss": trial["rate"] / 3, "curve": [float("nan"), trial["index"]]}}

trials = [{{"index": i, "rate": 0.1 * i, "text": "naïve"}} for i in range(int(sys.argv[2]))]
assert "jax" not in sys.modules
run_study(trials, run, sys.argv[1], workers=int(sys.argv[3]), progress=False)
"""


def start(journal, count=30, workers=2):
    """The script as a process; its standard output lists the trials that begin."""
    command = [sys.executable, "-c", SCRIPT, str(journal), str(count), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin(process, count):
    """Waits until so many trials have begun, and gives them."""
    return [int(process.stdout.readline()) for _ in range(count)]


def finish(process):
    """The trials that began since, and what was said."""
    with process:  # not communicate(), which would pass over lines that readline() has buffered
        return [int(line) for line in process.stdout], process.stderr.read()


def indices(journal):
    return [record["trial"]["index"] for record in read_records(journal)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    journal = tmp_path_factory.mktemp("undisturbed") / "results.jsonl"
    process = start(journal)
    begun, errors = finish(process)
    assert process.returncode == 0, errors
    assert sorted(begun) == list(range(30))
    return journal.read_bytes()


def test_the_undisturbed_script_writes_what_it_should(undisturbed):
    records = [json.loads(line) for line in undisturbed.splitlines()]
    assert [record["trial"]["index"] for record in records] == list(range(30))
    for index, record in enumerate(records):
        assert record["trial"] == {"index": index, "rate": 0.1 * index, "text": "naïve"}
        if index % 10 == 7:
            assert set(record) == {"hash", "trial", "error"}
            assert record["error"] == "ValueError: seven"
        else:
            assert set(record) == {"hash", "trial", "result"}
            assert record["result"] == {"loss": 0.1 * index / 3, "curve": [None, index]}


def test_a_study_that_is_killed_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, undisturbed):
    moments = random.Random(0)
    killed = 0
    for number in range(KILLS):
        journal = tmp_path / str(number) / "results.jsonl"
        process = start(journal)
        begin(process, moments.randint(1, 24))
        time.sleep(moments.uniform(0, 0.04))
        process.send_signal(signal.SIGKILL)
        finish(process)
        killed += process.returncode == -signal.SIGKILL
        kept = indices(journal)
        assert len(set(kept)) == len(kept)
        again = start(journal)
        begun, errors = finish(again)
        assert again.returncode == 0, errors
        assert sorted(begun + kept) == list(range(30))  # each is kept or run, and none is both
        assert journal.read_bytes() == undisturbed
    assert killed > 0


def test_ctrl_c_keeps_what_has_begun_and_cancels_the_rest(tmp_path):
    journal = tmp_path / "results.jsonl"
    process = start(journal, count=1000)
    begun = begin(process, 5)
    process.send_signal(signal.SIGINT)
    later, errors = finish(process)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert sorted(begun + later) == sorted(indices(journal))
    assert len(begun + later) < 1000


def test_ctrl_c_stops_a_single_worker_inside_its_trial(tmp_path):
    journal = tmp_path / "results.jsonl"
    process = start(journal, count=1000, workers=1)
    begun = begin(process, 3)
    process.send_signal(signal.SIGINT)
    later, errors = finish(process)
    assert process.returncode != 0
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert len(begun + later) - 1 <= len(indices(journal)) < 1000


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_a_failure_of_the_trial_that_raises_it(tmp_path, workers, interrupt):
    journal = tmp_path / "results.jsonl"
    begun = []

    def run(trial):
        begun.append(trial["index"])
        if trial["index"] == 2:
            raise interrupt
        time.sleep(0.01)
        return {}

    with pytest.raises(interrupt):
        study(journal, run, workers=workers, trials=[{"index": i} for i in range(1000)])
    assert sorted(begun) == sorted([*indices(journal), 2])
    assert len(begun) < 1000
    assert study(journal, square, trials=TRIALS[:4])[2]["result"] == {"square": 4}


TRIALS = [{"index": index} for index in range(8)]


def square(trial):
    return {"square": trial["index"] ** 2}


def study(journal, run=square, *, trials=TRIALS, **options):
    return run_study(trials, run, journal, progress=False, **options)


@pytest.fixture
def terminal(monkeypatch):
    """A terminal for Rich, which draws no bar elsewhere."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


class TestRunStudy:
    @pytest.mark.parametrize("workers", [1, 3, 20])
    def test_gives_and_writes_the_records_in_order(self, tmp_path, workers):
        journal = tmp_path / "new" / "results.jsonl"

        def later_ones_first(trial):
            time.sleep(0.03 / (1 + trial["index"]))
            return square(trial)

        records = study(journal, later_ones_first, workers=workers)
        assert records == [
            {"hash": trial_hash({"index": i}), "trial": {"index": i}, "result": {"square": i * i}}
            for i in range(8)
        ]
        assert read_records(journal) == records

    def test_runs_so_many_trials_at_a_time(self, tmp_path):
        together = threading.Barrier(3)

        def run(trial):
            together.wait(timeout=30)  # breaks, and fails the trial, where fewer come
            return {"thread": threading.get_ident() != main}

        main = threading.get_ident()
        records = study(tmp_path / "results.jsonl", run, trials=TRIALS[:6], workers=3)
        assert [record.get("result") for record in records] == [{"thread": True}] * 6

    def test_writes_from_the_calling_thread_as_trials_finish(self, tmp_path):
        journal = tmp_path / "results.jsonl"

        def run(trial):
            return {"recorded": len(read_records(journal))}

        assert [record["result"]["recorded"] for record in study(journal, run)] == list(range(8))

    def test_runs_only_what_is_missing_and_leaves_a_full_journal_alone(self, tmp_path):
        journal = tmp_path / "results.jsonl"
        first = study(journal, trials=TRIALS[2:4])
        begun = []

        def run(trial):
            begun.append(trial["index"])
            return square(trial)

        records = study(journal, run)
        assert begun == [0, 1, 4, 5, 6, 7]
        assert records[2:4] == first
        assert read_records(journal) == records
        file = journal.stat().st_ino
        assert study(journal, run) == records
        assert len(begun) == 6
        assert journal.stat().st_ino == file

    def test_keeps_other_records_behind_its_own(self, tmp_path):
        journal = tmp_path / "results.jsonl"
        other = [{"hash": trial_hash({"x": x}), "trial": {"x": x}, "result": {}} for x in (2, 1)]
        write_records(journal, other)
        records = study(journal)
        assert read_records(journal) == [*records, *other]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"trial": None}, "None as 'trial'"),
            ({"hash": 3}, "3 as 'hash'"),
            ({"hash": "0123456789abcdef"}, "hash '0123456789abcdef' of another trial"),
            ({"trial": {"index": 9}}, "of another trial"),
            ({"result": [1]}, r"\[1\] as 'result'"),
            ({"result": {}}, "'nothing' as 'square'"),
            ({"result": {"square": "4"}}, "'4' as 'square'"),
            ({"error": 3}, "3 as 'error'"),
        ],
    )
    def test_names_what_is_not_the_record_of_a_trial(self, tmp_path, changed, message):
        journal = tmp_path / "results.jsonl"
        records = study(journal)
        write_records(journal, [records[0], records[1] | changed, *records[2:]])
        before = journal.read_bytes()
        with pytest.raises(ValueError, match=f"results.jsonl line 2 is not the .*{message}"):
            study(journal, holds={"square": int})
        assert journal.read_bytes() == before

    @pytest.mark.parametrize("workers", [1, 2])
    def test_long_trials_have_a_folder_until_they_are_recorded(self, tmp_path, workers):
        saves = tmp_path / "checkpoints"

        def run(trial, folder):
            assert folder == saves / trial_hash(trial)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "step").touch()
            if trial["index"] == 5:
                raise OSError("disk")
            return square(trial)

        study(tmp_path / "results.jsonl", run, checkpoints=saves, workers=workers)
        assert [path.name for path in saves.iterdir()] == [trial_hash(TRIALS[5])]
        left = saves / trial_hash(TRIALS[2])  # as a kill leaves it after the record
        left.mkdir()
        study(tmp_path / "results.jsonl", run, checkpoints=saves, retry_failed=True)
        assert not left.exists()

    @pytest.mark.parametrize("torn", [b"{", b'{"hash": "0123', b'{"trial": "\xc3'])
    def test_cuts_off_a_torn_last_line(self, tmp_path, torn):
        whole, journal = tmp_path / "whole.jsonl", tmp_path / "results.jsonl"
        study(whole)
        for lines in (0, 3, 8):
            kept = b"".join(whole.read_bytes().splitlines(keepends=True)[:lines])
            journal.write_bytes(kept + torn)
            study(journal)
            assert journal.read_bytes() == whole.read_bytes()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_records_failures_keeps_them_and_runs_them_again_when_asked(self, tmp_path, workers):
        journal = tmp_path / "results.jsonl"
        begun = []

        def run(trial, broken=(1, 5)):
            begun.append(trial["index"])
            if trial["index"] in broken:
                raise OSError(f"disk {trial['index']}")
            return square(trial)

        records = study(journal, run, workers=workers)
        assert [i for i, record in enumerate(records) if "error" in record] == [1, 5]
        assert records[5] == {
            "hash": trial_hash({"index": 5}),
            "trial": {"index": 5},
            "error": "OSError: disk 5",
        }
        begun.clear()
        assert study(journal, run, workers=workers) == records
        assert begun == []

        still = study(journal, lambda trial: run(trial, broken=(5,)), retry_failed=True)
        assert begun == [1, 5]
        assert still[1]["result"] == {"square": 1}
        assert still[5] == records[5]
        study(journal, square, retry_failed=True)
        study(tmp_path / "undisturbed.jsonl")
        assert journal.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()

    def test_raises_on_duplicates_and_runs_nothing(self, tmp_path):
        trials = [{"a": 1, "b": 2}, {"c": 3}, {"b": 2, "a": 1}, *[{"d": (4,)}] * 2]
        with pytest.raises(ValueError, match="more than once") as caught:
            study(tmp_path / "results.jsonl", trials=trials)
        for name in "abd":
            assert f"'{name}': " in str(caught.value)
        assert "'c'" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("workers", [0, -1])
    def test_does_not_run_without_workers(self, tmp_path, workers):
        with pytest.raises(ValueError, match=f"workers must be at least 1, found {workers}"):
            study(tmp_path / "results.jsonl", workers=workers)

    def test_names_a_damaged_journal(self, tmp_path):
        (tmp_path / "results.jsonl").write_text("{\n")
        with pytest.raises(ValueError, match="line 1 is not JSON.* and the trial is run anew"):
            study(tmp_path / "results.jsonl")

    def test_shows_a_bar_with_failures_unless_told_not_to(self, tmp_path, capsys, terminal):
        def run(trial):
            return square(trial) if trial["index"] else {}["loss"]

        for count in (4, 8):  # the second call starts from the first one's records
            run_study(TRIALS[:count], run, tmp_path / "results.jsonl", description="chains")
            shown = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", capsys.readouterr().err)
            assert re.search(rf"chains .*{count}/{count} 1 failed", shown)
        study(tmp_path / "other.jsonl", run)
        assert capsys.readouterr() == ("", "")


def test_one_process_writes_a_journal_at_a_time(tmp_path):
    journal = tmp_path / "results.jsonl"
    process = start(journal, count=1000)
    try:
        begin(process, 1)
        with pytest.raises(ValueError, match="another process writes to this journal") as caught:
            study(journal)
        assert str(journal) in str(caught.value)
        assert len(study(tmp_path / "other.jsonl")) == 8
    finally:
        process.kill()
        finish(process)
    assert len(study(journal)) == 8  # the lock died with the process


def test_the_lock_ends_with_the_study_also_where_it_raises(tmp_path):
    journal = tmp_path / "results.jsonl"

    def interrupted(trial):
        with pytest.raises(ValueError, match="another process"):
            study(journal)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(journal, interrupted)
    study(journal)
    assert len(study(journal)) == 8


def test_a_runner_elsewhere_needs_only_the_functions_and_the_journal(tmp_path):
    journal = tmp_path / "elsewhere.jsonl"
    study(tmp_path / "here.jsonl")
    study(journal, trials=TRIALS[:3])
    for trial in reversed(missing_trials(TRIALS, read_records(journal))):
        append_record(journal, run_trial(trial, square))
    assert missing_trials(TRIALS, read_records(journal)) == []
    study(journal)
    assert journal.read_bytes() == (tmp_path / "here.jsonl").read_bytes()


def test_missing_trials_believe_the_last_record_of_a_hash():
    failed, fine = (
        {"hash": trial_hash(TRIALS[0])} | end for end in ({"error": "x"}, {"result": 1})
    )
    assert missing_trials(TRIALS[:2], [failed]) == TRIALS[1:2]
    assert missing_trials(TRIALS[:2], [failed], retry_failed=True) == TRIALS[:2]
    assert missing_trials(TRIALS[:2], [failed, fine], retry_failed=True) == TRIALS[1:2]
    assert missing_trials(TRIALS[:2], [fine, failed], retry_failed=True) == TRIALS[:2]


class TestRunTrial:
    def test_gives_what_the_journal_gives_back(self, tmp_path):
        trial = {"widths": (2, 3), "nested": {"b": 1, "a": [None, True]}}
        record = run_trial(trial, lambda trial: {"losses": (0.5, float("inf"), float("nan"))})
        assert record["trial"] == {"widths": [2, 3], "nested": {"b": 1, "a": [None, True]}}
        assert record["result"] == {"losses": [0.5, None, None]}
        append_record(tmp_path / "results.jsonl", record)
        assert read_records(tmp_path / "results.jsonl") == [record]

    def test_records_the_trial_as_it_was_before_the_run(self):
        trial = {"rates": [1]}
        record = run_trial(trial, lambda trial: trial["rates"].append(2) or {})
        assert record["trial"] == {"rates": [1]}
        assert record["hash"] == trial_hash({"rates": [1]})

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (3.0, "TypeError: a result must be a mapping, found float"),
            (None, "TypeError: a result must be a mapping, found NoneType"),
            (
                {"a": {"b": [1, {2}]}},
                "TypeError: result.a.b[1] is not a JSON value, but of type set",
            ),
            ({1: 2}, "TypeError: result has the key 1; JSON takes strings only"),
        ],
    )
    def test_of_a_result_without_json_is_a_failure(self, result, message):
        assert run_trial({}, lambda trial: result)["error"] == message


JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


def backwards(value):
    if isinstance(value, dict):
        return {key: backwards(item) for key, item in reversed(value.items())}
    return tuple(map(backwards, value)) if isinstance(value, list) else value


class TestTrialHash:
    @pytest.mark.parametrize(
        ("trial", "canonical"),
        [
            ({}, "{}"),
            (
                {"b": [1, 2.5, None], "a": {"d": True, "c": "é"}},
                '{"a":{"c":"\\u00e9","d":true},"b":[1,2.5,null]}',
            ),
            (
                {"seed": 10**20, "rate": 0.1 + 0.2},
                f'{{"rate":0.30000000000000004,"seed":1{20 * "0"}}}',
            ),
        ],
    )
    def test_is_sha256_of_canonical_json(self, trial, canonical):
        assert trial_hash(trial) == hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @hypothesis.given(strategies.dictionaries(strategies.text(), JSON, max_size=4))
    @hypothesis.settings(max_examples=30)
    def test_does_not_depend_on_the_order_of_keys_or_on_a_way_through_json(self, trial):
        assert trial_hash(backwards(trial)) == trial_hash(trial)
        assert trial_hash(json.loads(json.dumps(trial))) == trial_hash(trial)

    def test_tells_trials_apart(self):
        trials = [{}, {"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": [1]}, {"a": {"b": 1}}]
        trials += [{"a": None}, {"b": 1}, {"a": 2}, {"a": [1, 2]}, {"a": [2, 1]}]
        assert len({trial_hash(trial) for trial in trials}) == len(trials)

    @pytest.mark.parametrize(
        ("trial", "error", "message"),
        [
            ({"rate": float("nan")}, ValueError, "trial.rate is nan; JSON has finite numbers only"),
            ({"a": [0, {"b": -float("inf")}]}, ValueError, r"trial.a\[1\].b is -inf"),
            ({"model": {"widths": {1, 2}}}, TypeError, "trial.model.widths is not a JSON .* set"),
            ({"path": pathlib.Path()}, TypeError, "trial.path is not a JSON value, .* type Posix"),
            ({"model": {3: 1}}, TypeError, "trial.model has the key 3; JSON takes strings only"),
            ([1], TypeError, "a trial must be a mapping, found list"),
        ],
    )
    def test_names_what_is_not_json(self, trial, error, message, tmp_path):
        with pytest.raises(error, match=message):
            trial_hash(trial)
        with pytest.raises(error, match=message):
            study(tmp_path / "results.jsonl", trials=[{"fine": 1}, trial])
        assert list(tmp_path.iterdir()) == []


FULL_DISK = SCRIPT.replace(
    "import os, signal, sys, time, types",
    """import os, signal, sys, time, types, resource
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))""",
)


@pytest.mark.parametrize(("workers", "capacity"), [(2, 1), (1, 700), (2, 2000)])
def test_a_disk_that_is_full_costs_no_record(tmp_path, undisturbed, workers, capacity):
    journal = tmp_path / "results.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(journal), "30", str(workers), str(capacity)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    # The limit's word; a full disk says "No space left on device" at the same place.
    assert "OSError: [Errno 27] File too large; the records before are kept" in finished.stderr
    assert str(journal) in finished.stderr
    # Whole lines, as many as fit; the next may be half there.
    kept = journal.read_bytes()
    lines = undisturbed.splitlines(keepends=True)
    assert len(kept) == capacity
    assert len(read_records(journal)) >= capacity // max(map(len, lines))
    begun, errors = finish(start(journal))
    assert errors == ""
    assert journal.read_bytes() == undisturbed
    assert len(begun) == 30 - kept.count(b"\n")
