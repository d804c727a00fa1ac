"""The embedded default: the 1797 8x8 digits that scikit-learn ships."""

import numpy as np

from archscale_jax._extras import needed_by
from experiments.lab.datasets.dataset import RawSplits

_SPLIT_SEED = 0
_TEST_FRACTION = 0.2


def read_digits() -> RawSplits:
    """The digits, one fifth of every class held out as the test set, always the same one.

    Returns:
      Images uint8 `[N, 8, 8, 1]` with values 0 to 16, labels int64 `[N]`.
    """
    with needed_by("the data set digits", "experiments"):
        import sklearn.datasets  # lazy: slow to import, and only this data set needs it

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = np.asarray(pixels).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(labels)
    train, test = _stratified_split(labels)
    return RawSplits(images[train], labels[train], images[test], labels[test])


def _stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # NumPy promises that a bit generator's raw stream never changes; it does not promise that of
    # Generator.permutation. Sorting raw draws keeps the split the same under every version.
    order = np.argsort(np.random.PCG64(_SPLIT_SEED).random_raw(len(labels)), kind="stable")
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        is_test[members[: round(_TEST_FRACTION * len(members))]] = True
    return order[~is_test[order]], order[is_test[order]]
