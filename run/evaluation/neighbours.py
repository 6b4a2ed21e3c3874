"""How well an encoder in training tells classes apart: nearest neighbours on some labelled images."""

import torch

from mug.model.encoder import Encoder
from mug.run.evaluation.datasets import Source, open_splits
from mug.run.evaluation.features import EncoderFeatures, extract
from mug.run.evaluation.knn import predict
from mug.run.training import hardware

MOST_TRAIN, MOST_TEST = 5000, 1000  # images; enough for two digits
K = 20
BATCH = 64


class Neighbours:
    """Some of the labelled images that `data` names (as run/knn.py's --data), spread evenly over each split.

    Raises:
        RunError, DataError: there are none, or a label is wrong.
    """

    def __init__(self, data: str, cache: str | None, size: int):
        splits = open_splits(data, None, "label", cache)
        self.size = size
        self.train, self.train_labels = _spread(splits.train, torch.from_numpy(splits.train_labels), MOST_TRAIN)
        self.test, self.test_labels = _spread(splits.test, torch.from_numpy(splits.test_labels), MOST_TEST)
        self.k = min(K, len(self.train))

    def accuracy(self, encoder: Encoder) -> float:
        """Share of the test images that get their class: mean of the patches, cosine, K votes as in run/knn.py.

        `encoder` holds whole weights, and is moved to this rank's device: rank 0 does this alone.
        """
        network = EncoderFeatures(encoder, self.size)
        train_ND, test_MD = (
            extract(network, source, BATCH, 0, hardware.device())["mean of patches"]
            for source in (self.train, self.test)
        )
        predicted_M = predict(train_ND, self.train_labels, test_MD, [self.k])[self.k]
        return (predicted_M == self.test_labels).double().mean().item()


def _spread(source: Source, labels_N: torch.Tensor, most: int) -> tuple[Source, torch.Tensor]:
    count = min(most, len(source))
    numbers = [i * len(source) // count for i in range(count)]
    return source.select(numbers), labels_N[numbers]
