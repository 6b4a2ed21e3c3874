"""scikit-learn's handwritten digits: 1,797 pictures of 8 x 8 px, in ten classes, without captions.

From the UCI repository's "Optical Recognition of Handwritten Digits" (its test set), under CC BY 4.0.
"""

from collections.abc import Callable, Iterator

import numpy as np

from mug.data.builders.fashion_mnist import as_png
from mug.data.builders.writers import Sample
from mug.data.errors import DataError


def digit_pairs(wanted: Callable[[str], bool]) -> Iterator[Sample]:
    """Yields the pictures whose key (`00000`, …) is wanted, black on white; `label` is the digit.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError("the digits need scikit-learn: pip install scikit-learn") from None
    ink_ND, labels_N = load_digits(return_X_y=True)  # 0 to 16, of 8 x 8 pixels
    pixels_NHW = np.round(255 * (1 - np.asarray(ink_ND).reshape(-1, 8, 8) / 16)).astype(np.uint8)
    for number, (pixels_HW, label) in enumerate(zip(pixels_NHW, np.asarray(labels_N).tolist(), strict=True)):
        key = f"{number:05d}"
        if wanted(key):
            meta = {"key": key, "label": str(label), "license": "CC BY 4.0"}
            yield Sample(key, as_png(pixels_HW), "png", "", meta)
