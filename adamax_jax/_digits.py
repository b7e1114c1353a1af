"""The 1797 handwritten digits that scikit-learn ships, in two parts."""

from typing import NamedTuple

import numpy as np


class Digits(NamedTuple):
    """Images in [0, 1], shape (n, 64), and labels, shape (n,)."""

    train_images: np.ndarray
    test_images: np.ndarray
    train_labels: np.ndarray
    test_labels: np.ndarray


def digits() -> Digits:
    """The digits; a fifth of each kind is for the test, the same ones every time."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        np.float32(images / 16),
        np.int32(labels),
        test_size=0.2,
        stratify=labels,
        random_state=0,
    )
    return Digits(*map(np.asarray, parts))
