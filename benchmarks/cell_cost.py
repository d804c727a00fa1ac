"""What do networks of NAS-Bench-201 cost? `python -m benchmarks.cell_cost`, several minutes.

* A program for every cell, against one for all with its operations chosen at run time: compiling,
  steps, memory, and from how much training on the former is ahead.
* A step against the same networks in PyTorch, in an environment of its own.
* The paper's setting: operations counted in compiled programs, and what a study would take.
"""

from absl import app, flags

from benchmarks import cell_against_torch, cell_flops, cell_programs, parts

FLAGS = flags.FLAGS
parts.define_flags(torch=True)


def main(arguments: list[str]) -> None:
    """Measures, prints the tables and writes the results."""
    parts.prepare(arguments)
    size = cell_programs.QUICK if FLAGS.quick else cell_programs.Size()
    parts.run(
        "cell_cost",
        {"settings": cell_programs.SMALL | size._asdict()},
        {
            "programs": (
                lambda: cell_programs.compare_programs(size),
                cell_programs.programs_table,
            ),
            "torch": (
                lambda: cell_against_torch.against_torch(size),
                cell_against_torch.torch_table,
            ),
            "operations": (
                lambda: cell_flops.count_operations(size),
                cell_flops.operations_table,
            ),
        },
        torch=("torch",),
    )


if __name__ == "__main__":
    app.run(main)
