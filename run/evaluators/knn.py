"""k nearest neighbours by cosine similarity, as DINO votes (arXiv 2104.14294, section 4.1 and its code's options).

Dimension letters: N training images, M test images, D width, C classes, k neighbours.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mug.model.heads import spread
from mug.run.cluster import hardware
from mug.run.common.errors import RunError
from mug.run.evaluators.evaluator import EvalContext, Evaluator, Result, Subject
from mug.run.evaluators.frozen import FrozenConfig, encoders, open_images, record_of
from mug.run.evaluators.results import Accuracies
from mug.run.evaluators.sharing import gather_rows, share

TEMPERATURE = 0.07
CHUNK = 1024  # test images compared at once


@dataclass(frozen=True, kw_only=True)
class KNNConfig(FrozenConfig):
    """Nearest neighbours among labelled images.

    Args:
        k: numbers of neighbours that vote.
    """

    k: tuple[int, ...] = (10, 20, 100, 200)

    def check(self) -> None:
        super().check()
        if not self.k or min(self.k) < 1:
            raise RunError(f"k must be at least 1, not {min(self.k, default='missing')}")


class NearestNeighbours(Evaluator):
    """Top-1 accuracy on labelled images, by class token and by the mean of the patch tokens, of full images (nothing
    masked): `accuracy/knn, FEATURE, k = K`. The ranks share the encoding and the comparing.

    Records have `std` and `rank` of the test images' features, see `mug.model.heads.spread`: of a random encoder, the
    last one's.
    """

    Config = KNNConfig

    def __init__(self, config: KNNConfig, context: EvalContext):
        super().__init__(config, context)
        self.images = open_images(config, context)
        if max(config.k) > len(self.images.train):
            raise RunError(f"k {max(config.k)} is more than the {len(self.images.train)} training images")

    def run(self, subject: Subject) -> Result:
        found, spreads = Accuracies(self.config.hits), {}
        for encoder in encoders(self.config, self.context, self.images, subject):
            for feature, train_ND in encoder.train.items():
                unit_MD = torch.nn.functional.normalize(encoder.test[feature].to(hardware.device()), dim=1)
                spreads[feature] = {name: value.item() for name, value in spread(unit_MD).items()}
                for k, right_M in self._right(train_ND, encoder.test[feature]).items():
                    for _ in encoder.seeds:
                        found.add(feature, f"k = {k}", right_M)
        result = found.result("knn", record_of(self.config, "kNN", self.encoder_name(subject)))
        for record in result.records:
            record |= spreads[record["feature"]]
        return result

    def _right(self, train_ND: Tensor, test_MD: Tensor) -> dict[int, Tensor]:
        """Returns by k which test images were right, uint8 [M]; this rank compares its share of them."""
        device, mine = hardware.device(), [*share(len(test_MD))]
        labels_N, true_m = self.images.train_labels_N.to(device), self.images.test_labels_M[mine].to(device)
        predicted = predict(train_ND.to(device), labels_N, test_MD[mine].to(device), sorted(set(self.config.k)))
        return {k: gather_rows((one_m == true_m).to(torch.uint8), len(test_MD)) for k, one_m in predicted.items()}


@torch.inference_mode()
def predict(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, neighbours: list[int], temperature: float = TEMPERATURE
) -> dict[int, Tensor]:
    """Returns for each k the class of each test image, int64 [M].

    Each of the k most similar training images votes for its class with weight exp(similarity / temperature).

    Args:
        train_ND, test_MD: fp32 features, of any length: they are normalised here.
        labels_N: int64, 0..C-1.
        neighbours: values of k, each at most N.
    """
    classes = int(labels_N.max()) + 1
    train_ND, test_MD = (torch.nn.functional.normalize(x, dim=1) for x in (train_ND, test_MD))
    predicted: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    for chunk_MD in test_MD.split(CHUNK):
        similarity, index = (chunk_MD @ train_ND.T).topk(max(neighbours), dim=1)  # [M, k], the nearest first
        weight = ((similarity - 1) / temperature).exp()
        for k in neighbours:
            votes_MC = weight.new_zeros(len(chunk_MD), classes)
            votes_MC.scatter_add_(1, labels_N[index[:, :k]], weight[:, :k])
            predicted[k].append(votes_MC.argmax(1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}
