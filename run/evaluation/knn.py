"""k nearest neighbours by cosine similarity, as DINO votes (arXiv 2104.14294, section 4.1 and its code's options).

Dimension letters: N training images, M test images, D width, C classes, k neighbours.
"""

import torch
from torch import Tensor

TEMPERATURE = 0.07
CHUNK = 1024  # test images compared at once


@torch.inference_mode()
def predict(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, neighbours: list[int], temperature: float = TEMPERATURE
) -> dict[int, Tensor]:
    """For each k the class of each test image, int64 [M].

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
