"""Binaries: `python -m experiments.NAME --flag=value`."""

import importlib.util
import resource
import sys

from experiments.lab import interrupts

_STARTS = sys.argv[:1] == ["-m"]  # what Python makes of `python -m` while it imports this
if _STARTS:
    interrupts.answer_while_importing()
    _space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= _space < 3 * 2**30:  # XLA would end the process where it is at an end
        sys.exit(
            f"error: `ulimit -v` leaves {_space / 2**30:.1f} GiB of address space; JAX needs 3 GiB "
            "or more: raise the limit"
        )

_NEEDED = (
    "absl", "flax", "jax", "jinja2", "matplotlib", "optax", "orbax", "pandas", "rich", "sklearn"
)  # fmt: skip
_missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    message = (
        f"{sys.executable} lacks {', '.join(_missing)}; run `make run` once and take "
        ".venv/bin/python, or pip install '.[experiments]'"
    )
    if _STARTS:
        sys.exit(f"error: {message}")
    raise ModuleNotFoundError(message)
