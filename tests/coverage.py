"""Simulated coverage of the 95 % intervals of data/metrics.py: how often they contain the value of the population.

python tests/coverage.py           prints the table; 1,000 data sets a column, half an hour on two cores
python tests/coverage.py 200       with fewer data sets

Scores are binormal, two views of a patient are correlated 0.5, the numbers of patients of each class are fixed.
"""
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.results import metrics

SCENARIOS = (  # patients, views of each, true AUC, share of malignant patients, folds
    (24, 2, 0.80, 0.5, 1), (24, 2, 0.94, 0.5, 1), (60, 2, 0.80, 0.5, 1), (60, 1, 0.80, 0.2, 1),
    (23, 1, 0.70, 0.5, 1), (120, 1, 0.65, 0.5, 1), (110, 1, 0.65, 0.45, 5), (120, 2, 0.90, 0.5, 5))
MODELS = 0.5  # correlation of the scores of two models for the same film


def draw(scenario, seed, second_auc=None):
    """(labels, probabilities of two models, patients, folds) of one data set; both have the same AUC by default.

    A score is normal with standard deviation 1 and mean -d / 2 (benign) or d / 2: the AUC is Phi(d / sqrt(2)).
    """
    count, views, auc, share, folds = scenario
    rng = np.random.default_rng([seed, *(int(1000 * number) for number in scenario)])
    malignant = (np.arange(count) < round(count * share)).astype(int)
    noise = np.sqrt(0.5) * (rng.standard_normal((3, count, 1)) + rng.standard_normal((3, count, views)))
    probabilities = []
    for own, model_auc in zip(noise[:2], (auc, second_auc or auc), strict=True):
        distance = np.sqrt(2) * norm.ppf(model_auc)
        scores = np.sqrt(MODELS) * noise[2] + np.sqrt(1 - MODELS) * own + distance * (malignant[:, None] - 0.5)
        probabilities.append(expit(scores).ravel())
    patients = np.repeat(np.arange(count), views)
    return np.repeat(malignant, views), probabilities, patients, patients % folds


def compute_truth(scenario):
    """{name: value in the population} at the threshold 0.5."""
    count, _, auc, share, _ = scenario
    rate = norm.cdf(norm.ppf(auc) / np.sqrt(2))  # recall and specificity
    at_90 = norm.cdf(np.sqrt(2) * norm.ppf(auc) - norm.ppf(0.9))
    malignant = round(count * share) / count
    tp, fp = malignant * rate, (1 - malignant) * (1 - rate)
    precision, f1 = tp / (tp + fp), 2 * tp / (tp + fp + malignant)
    brier = norm.expect(lambda score: expit(score) ** 2, loc=-norm.ppf(auc) / np.sqrt(2))  # alike in both classes
    return {"accuracy": rate, "precision": precision, "recall": rate, "f1": f1, "specificity": rate,
            "brier": brier, "auc": auc, "sensitivity_at_90_specificity": at_90,
            "specificity_at_90_sensitivity": at_90}


def check(scenario, seed):
    """Which of the intervals of one data set contain the value of the population, {name: bool}."""
    labels, (first, second), patients, folds = draw(scenario, seed)
    intervals = metrics.measure(labels, first, patients, seed, folds=folds)["ci95"]
    truth = compute_truth(scenario)
    covered = {name: intervals[name][0] <= truth[name] <= intervals[name][1] for name in truth}
    _, low, high = metrics.compare_aucs(labels, first, second, patients, folds, seed=seed)
    covered["equal AUCs"] = low <= 0 <= high
    labels, models, patients, folds = draw(scenario, seed, scenario[2] - 0.1)
    for name, confidence in (("AUCs 0.1 apart", 0.95), ("the same, 99.5 %", 0.995)):
        _, low, high = metrics.compare_aucs(labels, *models, patients, folds, confidence, seed)
        covered[name] = low <= 0.1 <= high
    return covered


def main():
    data_sets = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rows = {}
    with ProcessPoolExecutor() as pool:
        for scenario in SCENARIOS:
            covered = pool.map(check, [scenario] * data_sets, range(data_sets), chunksize=10)
            rows["{} patients ({}), AUC {:.2f}, {:.0%}, {}".format(*scenario)] = pd.DataFrame(list(covered)).mean()
            print(".", end="", flush=True)
    print(f"\n{data_sets} data sets a column; patients (views), AUC, share of malignant patients, folds")
    print(pd.DataFrame(rows).to_string(float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
