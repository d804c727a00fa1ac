"""Ctrl-C ends a binary with a sentence and the status 130, whenever and however often it comes."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from experiments.lab.sweeps import ProcessExecutor

ROOT = pathlib.Path(__file__).parents[1]
START = """
import atexit, os, signal, sys, threading, time
from experiments.lab import interrupts

atexit.register(print, "torn down")

def interrupt(*pauses):
    def send():
        for pause in pauses:
            time.sleep(pause)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=send, daemon=True).start()
"""


def run(code):
    """Runs code in a process of its own; `interrupt` sends it Ctrl-C after each of the pauses."""
    return subprocess.run(
        [sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code",
    [
        "interrupts.answer_while_importing(); interrupt(0); time.sleep(9)",
        """
with interrupts.answered(lambda: "nothing was written"):
    interrupt(0)
    time.sleep(9)
""",
        """
with interrupts.answered(lambda: "nothing was written"):
    interrupt(*5 * [0.04])
    try:
        time.sleep(9)
    finally:
        time.sleep(0.3)  # what is finished is being kept
""",
        """
with interrupts.answered(lambda: "nothing was written"):
    interrupt(0, 0.2)
    try:
        time.sleep(9)
    except KeyboardInterrupt as error:
        raise ValueError("what was cut fails in words of its own") from error
""",
        """
class Callback:
    def __del__(self):
        interrupt(0)
        time.sleep(0.2)  # Python drops what is raised here

with interrupts.answered(lambda: "nothing was written"):
    Callback()
    time.sleep(9)
""",
    ],
    ids=["while importing", "once", "five times", "as an error", "in a garbage collection"],
)
def test_an_interrupt_ends_in_one_sentence_without_a_teardown(code):
    done = run(code)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; nothing was written\n"


def test_a_second_interrupt_ends_what_waits():
    done = run("""
with interrupts.answered(lambda: "all is kept"), interrupts.announced("interrupted: waiting"):
    interrupt(0, 1.1)
    try:
        time.sleep(9)
    finally:
        time.sleep(60)
""")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "\ninterrupted: waiting\ninterrupted; all is kept\n"


def test_an_interrupt_after_the_end_and_one_that_the_shell_turns_off_change_nothing():
    done = run("""
with interrupts.answered(str):
    pass
os.kill(os.getpid(), signal.SIGINT)
with interrupts.answered(str):
    os.kill(os.getpid(), signal.SIGINT)
interrupts.answer_while_importing()
os.kill(os.getpid(), signal.SIGINT)
""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "torn down\n", "")


def test_the_cursor_of_a_terminal_is_shown_again():
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", START + "interrupts.end('interrupted; all is kept')"],
        cwd=ROOT,
        stderr=theirs,
    ) as process:
        assert process.wait(60) == 130
    os.close(theirs)
    assert os.read(ours, 1000) == b"\x1b[?25hinterrupted; all is kept\r\n"
    os.close(ours)


def test_an_interrupt_waits_for_a_save():
    done = run("""
with interrupts.answered(lambda: "all is kept"):
    with interrupts.later():
        interrupt(0)
        time.sleep(0.2)
        print("saved")
    time.sleep(9)
""")
    assert (done.returncode, done.stdout) == (130, "saved\n")


def test_an_interrupt_ends_worker_processes():
    done = run("""
import multiprocessing
process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
process.start()
print(process.pid, flush=True)
with interrupts.answered(lambda: "all is kept"):
    interrupt(0)
    time.sleep(9)
""")
    assert done.returncode == 130
    assert not pathlib.Path(f"/proc/{done.stdout.strip()}/exe").exists()


def test_worker_processes_do_not_hear_a_terminal():
    with ProcessExecutor(1) as executor:
        blocked = executor.submit(signal.pthread_sigmask, signal.SIG_BLOCK, set()).result()
    assert signal.SIGINT in blocked
