"""What the trials of tests/test_runners.py do, where worker processes can import it."""

import os
import pathlib
import signal
import time
from collections.abc import Mapping
from typing import Any


def work(trial: Mapping[str, Any], folder: str | None = None) -> dict[str, Any]:
    """Computes from the settings alone; `seconds`, `fails` and `kills` say what happens on the way.

    Args:
      trial: `kills` is how many workers it kills before it is done, where there is a folder.
      folder: where every start leaves a file, named by the trial and the process.
    """
    starts = []
    if folder is not None:
        place = pathlib.Path(folder)
        place.joinpath(f"{trial['index']}_{os.getpid()}_{time.time_ns()}").touch()
        starts = list(place.glob(f"{trial['index']}_*"))
    time.sleep(trial.get("seconds", 0.0))
    if 0 < len(starts) <= trial.get("kills", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if trial.get("fails"):
        raise ValueError("it does")
    return {"loss": trial["index"] / 3, "curve": [float("nan"), trial["index"]]}


def about_process(trial: Mapping[str, Any]) -> dict[str, Any]:
    """Tells where it runs, and in how many threads XLA would."""
    del trial
    time.sleep(0.3)  # so that one worker cannot take all
    cores = sorted(os.sched_getaffinity(0))
    return {"process": os.getpid(), "cores": cores, "threads": os.environ["NPROC"]}
