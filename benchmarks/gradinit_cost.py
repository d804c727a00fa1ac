"""What does GradInit cost, and what is it worth? `python -m benchmarks.gradinit_cost`, minutes.

* An iteration against a training step: time, compiling and memory, of both branches and variants.
* Against the package `gradinit` for PyTorch, in an environment of its own: derivatives, times, and
  how networks train from the weights that each rescaled.
"""

from absl import app, flags

from benchmarks import (
    gradinit_against_torch,
    gradinit_iterations,
    gradinit_learned,
    gradinit_ways,
    parts,
)

FLAGS = flags.FLAGS
flags.DEFINE_string("data_dir", None, "Folder of Fashion-MNIST; see README, Data.")
parts.define_flags(torch=True)


def main(arguments: list[str]) -> None:
    """Measures, prints the tables and writes the results."""
    parts.prepare(arguments)
    size = gradinit_ways.QUICK if FLAGS.quick else gradinit_ways.Size()
    parts.run(
        "gradinit_cost",
        {"settings": {"dataset": "fashion_mnist"} | size._asdict()},
        {
            "iterations": (
                lambda: gradinit_iterations.cost_of_iterations(size, FLAGS.data_dir),
                gradinit_iterations.iterations_table,
            ),
            "torch": (
                lambda: gradinit_against_torch.against_torch(size, FLAGS.data_dir),
                gradinit_against_torch.torch_table,
            ),
            "learned": (
                lambda: gradinit_learned.compare_learned(size, FLAGS.data_dir),
                gradinit_learned.learned_table,
            ),
        },
        torch=("torch", "learned"),
    )


if __name__ == "__main__":
    app.run(main)
