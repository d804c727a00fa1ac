"""The flags that say which data set a binary trains on."""

from absl import flags

from archscale_jax.datasets import DATASET_NAMES, arrays, sources

flags.disclaim_key_flags()  # they belong to the binary that defines them by this module


class DatasetParser(flags.ArgumentParser):
    """A name, or a .npz file, which is named with its digest so that a resumed run has the same."""

    syntactic_help = f"({'|'.join(DATASET_NAMES)}, or a file FILE.npz)"

    def parse(self, argument: str) -> str:
        if arrays.is_file_name(argument):
            try:
                return arrays.identified(argument)
            except OSError as error:
                raise ValueError(str(error)) from None
        sources.check_name(argument)
        return argument


def define_data_flags(default: str | None) -> None:
    """Defines --dataset and --data_dir."""
    flags.DEFINE(
        DatasetParser(), "dataset", default,
        "Data set, or a .npz file of your own with train_images, train_labels, test_images and "
        "test_labels.", serializer=flags.ArgumentSerializer(),
    )  # fmt: skip
    flags.DEFINE_string("data_dir", None, "Folder of the data set; see README.")
