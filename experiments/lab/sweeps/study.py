"""Resumable studies: run the trials that a journal lacks, and end with the same journal always.

A trial is a mapping of JSON values, its settings. Its record is `{"hash", "trial", "result"}`, or
`{"hash", "trial", "error"}` where it failed. Records hold no times and depend on nothing but the
trial, so a study that was cut ends with the bytes of an undisturbed one, wherever its trials ran.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from experiments.lab import files
from experiments.lab.progress import progress_of

Trial = Mapping[str, Any]
Record = dict[str, Any]
Run = Callable[..., Mapping[str, Any]]


class WorkerLostError(RuntimeError):
    """The process or machine that ran a trial was lost, every time it was tried."""


def trial_hash(trial: Trial) -> str:
    """Returns the trial's name: 16 hex digits of SHA-256 over its canonical JSON.

    The order of keys does not matter; `1` and `1.0` are different settings, a tuple is a list.

    Raises:
      TypeError: a setting is not a JSON value; the message names its key.
      ValueError: a number is not finite; the message names its key.
    """
    text = json.dumps(_as_json(trial, "trial"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def missing_trials(
    trials: Iterable[Trial], records: Iterable[Mapping[str, Any]], *, retry_failed: bool = False
) -> list[Trial]:
    """Returns the trials without a record, in order.

    Args:
      trials: all trials of the study.
      records: what is finished, of this study or of others too. The last of a hash counts.
      retry_failed: a trial whose record holds an error is missing as well.

    Raises:
      TypeError: see `trial_hash`.
      ValueError: see `trial_hash`, or a trial is listed twice.
    """
    latest = _latest(records)
    return [
        trial
        for name, trial in _by_hash(trials).items()
        if name not in latest or (retry_failed and "error" in latest[name])
    ]


def run_trial(trial: Trial, run: Run, checkpoints: pathlib.Path | None = None) -> Record:
    """Runs one trial to its record; an exception becomes the record's error.

    A result holds JSON values; numbers in it that are not finite become None, any other value is
    an error. KeyboardInterrupt and SystemExit are not failures of the trial and pass through.

    Args:
      trial: the settings.
      run: see `run_study`.
      checkpoints: the folder that holds those of all trials, if `run` saves any.

    Raises:
      TypeError: see `trial_hash`.
      ValueError: see `trial_hash`.
    """
    record = _unfinished(trial)
    folder = [] if checkpoints is None else [checkpoints / record["hash"]]
    try:
        return record | {"result": _as_json(files.strict_json(run(trial, *folder)), "result")}
    except Exception as error:
        return record | {"error": f"{type(error).__name__}: {error}"}


def _unfinished(trial: Trial) -> Record:
    return {"hash": trial_hash(trial), "trial": _as_json(trial, "trial")}


class Journal:
    """The finished trials in a file, which only this process writes to; any thread may."""

    def __init__(self, path: pathlib.Path, holds: Mapping[str, Any], retry_failed: bool) -> None:
        self.path, self._holds, self._retry_failed = path, holds, retry_failed
        self._lock = threading.Lock()
        self.latest = _latest(_read(path, holds))

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        path: str | pathlib.Path,
        *,
        holds: Mapping[str, Any] | None = None,
        retry_failed: bool = False,
    ) -> Iterator["Journal"]:
        """Opens the journal of a path, see `run_study`."""
        with files.locked(path):
            yield cls(pathlib.Path(path), holds or {}, retry_failed)

    def run(
        self, trial: Trial, run: Run, executor: concurrent.futures.Executor | None = None
    ) -> Record:
        """Returns the record of a trial; one that is missing is run, here or in an executor."""
        record = self.latest.get(trial_hash(trial))
        if record is None or (self._retry_failed and "error" in record):
            if executor is None:
                record = run_trial(trial, run)
            else:
                record = _outcome(executor.submit(run_trial, trial, run), trial)
            self.append(record)
        return record

    def append(self, record: Record) -> None:
        """Writes the record of a trial."""
        with self._lock:
            files.append_record(self.path, record)
            self.latest[record["hash"]] = record

    def order(self, trials: Iterable[Trial]) -> list[Record]:
        """Brings the records into the order of trials, others behind; returns those of the trials.

        A file that was cut and went on has the bytes of one that was not.
        """
        names = [trial_hash(trial) for trial in trials]
        records = _read(self.path, self._holds)
        latest = _latest(records)
        ordered = [latest[name] for name in names]
        others = [one for one in records if one["hash"] not in set(names)]
        files.write_records(self.path, [*ordered, *others])
        return ordered


def run_study(
    trials: Iterable[Trial],
    run: Run,
    journal: str | pathlib.Path,
    *,
    checkpoints: str | pathlib.Path | None = None,
    workers: int = 1,
    executor: concurrent.futures.Executor | None = None,
    retry_failed: bool = False,
    holds: Mapping[str, Any] | None = None,
    description: str = "trials",
    progress: bool = True,
) -> list[Record]:
    """Runs the trials that the journal lacks, and appends a record as each one is finished.

    When all are done, the journal holds the records in the order of `trials`, then those of trials
    that are not listed. After an interrupt or a kill, the same call goes on: what is recorded is
    not run again, what had begun is, from its checkpoint if it saves any. So a trial may run twice,
    but has one record, which only this process writes.

    Args:
      trials: all trials of the study, each once.
      run: from a trial to its result, JSON values. It must not depend on other trials.
      journal: the file, usually `results.jsonl`; `results.jsonl.lock` keeps other processes out.
      checkpoints: folder for those of long trials, which must be there wherever these run. `run` is
        then called with a trial and a folder of its own (see `experiments.lab.checkpoints`), which
        is removed once the trial is recorded.
      workers: how many trials run at a time. One runs in the calling thread, where Ctrl-C stops
        it at once; more run in threads, and those that have begun are finished and recorded first.
      executor: runs the trials instead: a `ProcessExecutor`, a `RayExecutor`, or any other that
        can send `run` and a trial where it works. It stays open. A trial for which it raises
        `WorkerLostError` has failed; any other error that is not the trial's ends the study.
      retry_failed: run trials again that failed; the new record replaces the old one.
      holds: what every result must hold: types by name, as of `isinstance`.
      description: what the trials are called where progress is shown.
      progress: show it on standard error, see `experiments.lab.progress`.

    Returns:
      The records in the order of `trials`, as read from the journal.

    Raises:
      TypeError: see `trial_hash`.
      ValueError: see `trial_hash`; a trial is listed twice, `workers` is below 1 or given beside
        an executor, the journal is damaged or another's, or another process writes to it.
      OSError: a record could not be written; those before it are kept.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, found {workers}")
    if executor is not None and workers != 1:
        raise ValueError(f"an executor has its own number of workers; found workers={workers} too")
    by_hash = _by_hash(trials)
    saves = None if checkpoints is None else pathlib.Path(checkpoints).absolute()
    with Journal.open(journal, holds=holds, retry_failed=retry_failed) as records:
        latest = records.latest
        missing = missing_trials(by_hash.values(), latest.values(), retry_failed=retry_failed)
        done = [latest[name] for name in by_hash.keys() - _by_hash(missing).keys()]
        failed = sum("error" in record for record in done)
        with progress_of(
            description, len(by_hash), done=len(done), note=f"{failed} failed", visible=progress
        ) as advance:

            def record(one: Record) -> None:
                nonlocal failed
                records.append(one)
                failed += "error" in one
                advance(note=f"{failed} failed")
                _clear(saves, [one])

            _clear(saves, done)
            if executor is not None:
                _run_in(executor, missing, run, saves, records, record)
            elif workers == 1:
                for trial in missing:
                    record(run_trial(trial, run, saves))
            else:
                with concurrent.futures.ThreadPoolExecutor(workers) as threads:
                    _run_in(threads, missing, run, saves, records, record)
        return records.order(by_hash.values())


def _clear(checkpoints: pathlib.Path | None, records: Iterable[Record]) -> None:
    """Removes the checkpoints of finished trials; what failed may go on from them."""
    for record in records:
        if checkpoints is not None and "result" in record:
            shutil.rmtree(checkpoints / record["hash"], ignore_errors=True)


def _run_in(
    executor: concurrent.futures.Executor,
    trials: Sequence[Trial],
    run: Run,
    checkpoints: pathlib.Path | None,
    journal: Journal,
    record: Callable[[Record], None],
) -> None:
    """Runs the trials in an executor; this thread records each one as it is finished."""
    futures: dict[concurrent.futures.Future[Record], Trial] = {}
    try:
        for trial in trials:
            futures[executor.submit(run_trial, trial, run, checkpoints)] = trial
        for future in concurrent.futures.as_completed(futures):
            record(_outcome(future, futures[future]))
    except BaseException:
        # What cannot be cancelled is running: wait, and keep it. An interrupt may have come while
        # a record was appended: only the journal knows whether it is there.
        begun = [future for future in futures if not future.cancel()]
        concurrent.futures.wait(begun)
        recorded = _latest(files.read_records(journal.path))
        for one in (future.result() for future in begun if not future.exception()):
            if recorded.get(one["hash"]) != one:
                journal.append(one)
        raise


def _outcome(future: concurrent.futures.Future[Record], trial: Trial) -> Record:
    try:
        return future.result()
    except WorkerLostError as error:
        return _unfinished(trial) | {"error": f"{type(error).__name__}: {error}"}


_REMEDY = "remove the line, and the trial is run anew"


def _read(path: pathlib.Path, holds: Mapping[str, Any]) -> list[Record]:
    """Reads a journal; ValueError names the number of a record that is not of a trial as it was."""
    records = files.read_records(path, _REMEDY)
    for number, record in enumerate(records, start=1):
        try:
            ends = {"error": str} if "error" in record else {"result": dict}
            files.check_fields(record, {"hash": str, "trial": dict} | ends, "it")
            files.check_fields(record.get("result", {}), holds if "result" in record else {}, "it")
            if trial_hash(record["trial"]) != record["hash"]:
                raise ValueError(f"it has the hash {record['hash']!r} of another trial")
        except ValueError as error:
            raise ValueError(
                f"{path} line {number} is not the record of a trial of this study: {error}; "
                f"{_REMEDY}"
            ) from None
    return records


def _latest(records: Iterable[Mapping[str, Any]]) -> dict[Any, Any]:
    """Records by their hash; a later one replaces an earlier one."""
    return {record.get("hash"): record for record in records}


def _by_hash(trials: Iterable[Trial]) -> dict[str, Trial]:
    """Trials by their hash, in order; ValueError where some are listed twice."""
    by_hash: dict[str, Trial] = {}
    twice = []
    for trial in trials:
        if (name := trial_hash(trial)) in by_hash:
            twice.append(str(dict(trial)))
        by_hash[name] = trial
    if twice:
        raise ValueError(f"trials are listed more than once: {', '.join(twice)}")
    return by_hash


def _as_json(value: Any, where: str) -> Any:
    """Copies a mapping to what `json` would read back; raises where that is not the same."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a {where} must be a mapping, found {type(value).__name__}")
    _check_json(value, where)
    return json.loads(json.dumps(files.strict_json(value), allow_nan=False))


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; JSON takes strings only")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; JSON has finite numbers only")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(f"{where} is not a JSON value, but of type {type(value).__name__}")
