"""The flags that say which data set a binary trains on."""

import os

from absl import flags

from experiments.lab.datasets import DATASET_NAMES, arrays, sources

FLAGS = flags.FLAGS

flags.disclaim_key_flags()  # they belong to the binary that defines them by this module


class DatasetParser(flags.ArgumentParser):
    """A name, or the path of a .npz file, which is named by its content from then on."""

    syntactic_help = f"({'|'.join(DATASET_NAMES)}, or a file FILE.npz)"

    def parse(self, argument: str) -> str:
        if arrays.is_file_name(argument):
            try:
                return arrays.with_digest(argument)
            except OSError as error:
                raise ValueError(str(error)) from None
        sources.check_name(argument)
        return argument


class DatasetFlag(flags.Flag):
    """Keeps the folder of a .npz file in --data_dir, which does not decide what a run computes."""

    def parse(self, argument: str) -> None:
        super().parse(argument)
        if arrays.is_file_name(argument):
            FLAGS.data_dir = os.path.dirname(os.path.abspath(os.path.expanduser(argument)))


def define_data_flags(default: str | None) -> None:
    """Defines --dataset and --data_dir."""
    flags.DEFINE_string("data_dir", None, "Folder of the data set; see `make data`.")
    explained = (
        "Data set, or a .npz file of your own with train_images, train_labels, test_images and "
        "test_labels."
    )
    flag = DatasetFlag(DatasetParser(), flags.ArgumentSerializer(), "dataset", default, explained)
    flags.DEFINE_flag(flag)
