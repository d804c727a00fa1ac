"""Binaries: `python -m experiments.NAME --flag=value`."""

import importlib.util
import sys

from experiments.lab import interrupts

_STARTS = sys.argv[:1] == ["-m"]  # what Python makes of `python -m` while it imports this
if _STARTS:
    interrupts.answer_while_importing()

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
