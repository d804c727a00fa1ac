"""What do networks of NAS-Bench-201 cost? `python -m benchmarks.cell_cost`, several minutes.

* A program for every cell, against one for all with its operations chosen at run time: compiling,
  steps, memory, and from how much training on the former is ahead.
* A step against the same networks in PyTorch, in an environment of its own.
* The paper's setting: operations counted in compiled programs, and what a study would take.
"""

from typing import Any

import jax
from absl import app, flags, logging
from rich.console import Console

from benchmarks import cell_against_torch, cell_flops, cell_programs, common

FLAGS = flags.FLAGS
flags.DEFINE_bool("quick", False, "Try everything at a tiny size; times say nothing, none is kept.")
flags.DEFINE_bool("torch", True, "Compare with PyTorch.")


def main(arguments: list[str]) -> None:
    """Measures, prints the tables and writes the results."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; flags start with --")
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_enable_compilation_cache", False)  # or compiling would be reading
    size = cell_programs.QUICK if FLAGS.quick else cell_programs.Size()
    results: dict[str, Any] = {"settings": cell_programs.SMALL | size._asdict()}
    skipped = {"skipped": "--notorch"}
    parts = {
        "programs": lambda: cell_programs.compare_programs(size),
        "torch": lambda: cell_against_torch.against_torch(size) if FLAGS.torch else skipped,
        "operations": lambda: cell_flops.count_operations(size),
    }
    tables = {
        "programs": cell_programs.programs_table,
        "torch": cell_against_torch.torch_table,
        "operations": cell_flops.operations_table,
    }
    console = Console(width=150)
    for part, measure in parts.items():
        results[part] = measure()
        console.print(tables[part](results[part]))
        if not FLAGS.quick:  # after each part: a run that is cut off keeps what it has
            path = common.write_results("cell_cost", results, "flax", "optax")
            console.print(f"results: {path.relative_to(path.parents[2])}")


if __name__ == "__main__":
    app.run(main)
