"""What does GradInit cost, and what is it worth? `python -m benchmarks.gradinit_cost`, minutes.

* An iteration against a training step: time, compiling and memory, of both branches and variants.
* Against the package `gradinit` for PyTorch, in an environment of its own: derivatives, times, and
  how networks train from the weights that each rescaled.
"""

from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console

from benchmarks import (
    common,
    gradinit_against_torch,
    gradinit_iterations,
    gradinit_learned,
    gradinit_ways,
)

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")
flags.DEFINE_bool("quick", False, "Try everything at a tiny size; times say nothing, none is kept.")
flags.DEFINE_bool("torch", True, "Compare with PyTorch.")


def main(arguments: list[str]) -> None:
    """Measures, prints the tables and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    size = gradinit_ways.QUICK if FLAGS.quick else gradinit_ways.Size()
    results: dict[str, Any] = {"settings": {"dataset": "fashion_mnist"} | size._asdict()}
    skipped = {"skipped": "--notorch"}
    parts = {
        "iterations": lambda: gradinit_iterations.cost_of_iterations(size, FLAGS.data_dir),
        "torch": lambda: gradinit_against_torch.against_torch(size, FLAGS.data_dir),
        "learned": lambda: gradinit_learned.compare_learned(size, FLAGS.data_dir),
    }
    tables = {
        "iterations": gradinit_iterations.iterations_table,
        "torch": gradinit_against_torch.torch_table,
        "learned": gradinit_learned.learned_table,
    }
    console = Console(width=150)
    for part, measure in parts.items():
        results[part] = measure() if FLAGS.torch or part == "iterations" else skipped
        console.print(tables[part](results[part]))
        if not FLAGS.quick:  # after each part: a run that is cut off keeps what it has
            path = common.write_results("gradinit_cost", results, "flax", "optax")
            console.print(f"results: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    app.run(main)
