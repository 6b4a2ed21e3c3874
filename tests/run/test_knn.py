"""k nearest neighbours against scikit-learn's, and the intervals against SciPy's."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

from mug.run import evaluate, knn
from mug.run.common.errors import RunError
from mug.run.evaluators import intervals
from mug.run.evaluators.intervals import Accuracy
from mug.run.evaluators.knn import CHUNK, TEMPERATURE, KNNConfig, predict


def clusters(seed: int, count: int, classes: int = 5, width: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes; lengths vary, so that cosine and Euclidean neighbours differ."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, width))
    labels = random.integers(classes, size=count)
    features = (centres[labels] + random.normal(size=(count, width))) * random.uniform(0.1, 10, (count, 1))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def test_same_classes_as_scikit_learn():
    train, labels = clusters(1, 600)
    test, test_labels = clusters(2, CHUNK + 76)
    for k, predicted in predict(train, labels, test, [1, 10, 50]).items():
        oracle = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / TEMPERATURE)
        )
        expected = oracle.fit(train.double(), labels).predict(test.double())
        assert (predicted.numpy() != expected).mean() < 0.002, "but for ties in the last bit of fp32"
        score, ours = oracle.score(test, test_labels), (predicted == test_labels).double().mean().item()
        assert 0.5 < score < 0.99 and abs(score - ours) < 0.005


def test_near_neighbours_outvote_many_far_ones():
    """One at similarity 1 has weight 1; three at 0.8 have exp(-0.2 / 0.07) = 0.057 each."""
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, 0.6], [0.8, -0.6], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1, 2])
    assert predict(train, labels, torch.tensor([[5.0, 0.0]]), [1, 4, 5]) == {1: 0, 4: 0, 5: 0}
    assert predict(train, labels, torch.tensor([[5.0, 0.0]]), [4], temperature=1e3) == {4: 1}


def test_intervals_are_those_of_statistics():
    accuracy = Accuracy((0.70, 0.72, 0.75), images=200)
    low, high = stats.t.interval(0.95, 2, loc=accuracy.mean, scale=stats.sem(accuracy.values))
    assert accuracy.seed_interval() == pytest.approx((low, high), abs=1e-6)
    assert accuracy.deviation == pytest.approx(np.std(accuracy.values, ddof=1))
    wilson = stats.binomtest(140, 200).proportion_ci(method="wilson")
    assert Accuracy((0.7,), images=200).test_interval() == pytest.approx((wilson.low, wilson.high), abs=1e-6)
    assert Accuracy((0.7,), images=200).seed_interval() is None
    assert Accuracy((0.0,), images=200).test_interval()[0] == 0 and Accuracy((1.0,), images=9).test_interval()[1] == 1
    assert pytest.approx([stats.t.ppf(0.975, df) for df in range(1, intervals.MAX_SEEDS)], abs=1e-6) == intervals.T


def test_the_line_says_percent_and_both_intervals():
    assert str(Accuracy((0.7,), 200)) == " 70.00  95% over test images: 63.32 to 75.93"
    line = str(Accuracy((0.70, 0.72, 0.74), 200))
    assert line.startswith(" 72.00 ± 2.00 (3 seeds, 95%: 67.03 to 76.97)")


BASIC = ["run", "--data", "openmoji"]
MISTAKES = {
    "unknown encoder": ([*BASIC, "--encoder", "randon"], "randon"),
    "no neighbours": ([*BASIC, "--k", "[3, 0]"], "--k must be at least 1"),
    "too many seeds": ([*BASIC, "--seeds", "11"], "--seeds must lie between 1 and 10"),
    "no batch": ([*BASIC, "--batch", "0"], "--batch must be at least 1"),
    "folder of results": ([*BASIC, "--json", "nowhere/results.jsonl"], "nowhere/results.jsonl: cannot write there"),
    "a folder for results": ([*BASIC, "--json", "/proc"], "--json /proc: cannot write there"),
    "no data": (["run"], "data"),
    "unknown flag": ([*BASIC, "--neighbours", "3"], "--neighbours"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_on_the_command_line_is_named(case):
    arguments, message = MISTAKES[case]
    with pytest.raises(RunError) as refused:
        knn.parse(arguments)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_script_is_short_for_the_evaluation_of_its_name():
    sections = ["--eval", "knn", "--knn.data", "openmoji", "--knn.k", "[5, 20]", "--batch", "7"]
    same = knn.parse([*BASIC, "--k", "[5, 20]", "--batch", "7"])
    assert evaluate.parse(["run", *sections]) == same and same.evals["knn"] == KNNConfig(data="openmoji", k=(5, 20))
    both = evaluate.parse(["run", *sections, "--eval=captions", "--captions.beams", "2"])
    assert list(both.evals) == ["knn", "captions"] and both.evals["captions"].beams == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--eval is missing; give one or more of answers, attentive_probe, captions"),
        (["--eval", "knnn"], "'knnn' is not one of the evaluations answers, attentive_probe, captions"),
        (["--eval", "knn"], "knn.data"),
        (["--eval", "retrieval", "--retrieval.limit", "0"], "--retrieval.limit must be at least 1, not 0"),
        (["--eval", "retrieval", "--captions.beams", "2"], "captions.beams"),
        (["--eval", "zero_shot", "--zero_shot.data", "x", "--zero_shot.templates", "[photo]"], "--zero_shot.templates"),
    ],
)
def test_a_mistake_of_evaluate_is_named(arguments, message):
    with pytest.raises(RunError) as refused:
        evaluate.parse(["run", *arguments])
    assert message in str(refused.value) and "\n" not in str(refused.value)
