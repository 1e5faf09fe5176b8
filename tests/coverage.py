"""Simulated coverage of the 95 % intervals of data/results/metrics.py: how often they contain the true value.

python tests/coverage.py           prints two tables; 1,000 data sets a column, half an hour on two cores
python tests/coverage.py 200       with fewer data sets

Patients are drawn from a population with a certain share of malignant ones. Scores are binormal, two views of a
patient are correlated 0.5. The second table draws trainings, too: the true value is the mean over all trainings of
a setting and all patients.
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

SCENARIOS = (  # patients, views of each, true AUC, share of malignant patients, folds, gain of the scores
    (24, 2, 0.80, 0.5, 1, 1), (24, 2, 0.94, 0.5, 1, 1), (60, 2, 0.80, 0.5, 1, 1), (60, 1, 0.80, 0.2, 1, 1),
    (23, 1, 0.70, 0.5, 1, 1), (120, 1, 0.65, 0.5, 1, 1), (30, 1, 0.70, 0.33, 1, 20), (110, 1, 0.65, 0.45, 5, 1),
    (110, 1, 0.50, 0.45, 5, 1), (120, 2, 0.90, 0.5, 5, 1))
SEVERAL = ((110, 1, 0.70, 0.45, 5, 1), (60, 2, 0.80, 0.5, 1, 1))
TRAININGS = ((1, 1), (2, 2), (3, 3), (5, 5), (1, 3))  # of the first and of the second setting
SETTING, TRAINING = 0.25, 0.25  # variance of a score that a setting, and a training, does not share with others
RESAMPLES = 500  # instead of 2,000, for speed: intervals are a little less sure
SPREAD = 0.1  # of trainings: then their AUCs vary by 0.03, as those of VGG16 do on lesion crops of mini-MIAS


def draw_trainings(rng, scenario, auc, spread, count):
    """(distances, shifts), (count, folds) each: what trainings make of each fold, see draw()."""
    folds = scenario[4]
    deviations = spread * np.sqrt(folds) * rng.standard_normal((2, count, folds))
    return np.sqrt(2) * norm.ppf(auc) + deviations[0], deviations[1]


def draw(scenario, seed, trainings=(1, 1), spread=0.0, second_auc=None):
    """(labels, probabilities of two settings, patients, folds) of one data set; both have the same AUC by default.

    A score is normal with standard deviation 1 and mean -d / 2 (benign) or d / 2, and a shift: the AUC is
    Phi(d / sqrt(2)). The probabilities of a setting are (K, N), of K trainings.
    """
    count, views, auc, share, folds, gain = scenario
    rng = np.random.default_rng([seed, *(int(1000 * number) for number in scenario)])
    malignant = (rng.random(count) < share).astype(int)
    fold = np.empty(count, int)
    for label in (0, 1):
        rows = np.flatnonzero(malignant == label)
        fold[rows] = np.arange(len(rows)) % folds

    def draw_noise(variance):
        patient, view = rng.standard_normal((count, 1)), rng.standard_normal((count, views))
        return np.sqrt(variance / 2) * (patient + view)

    shared, settings = draw_noise(1 - SETTING - TRAINING), []
    for setting_auc, number in zip((auc, second_auc or auc), trainings, strict=True):
        distances, shifts = draw_trainings(rng, scenario, setting_auc, spread, number)
        own, probabilities = draw_noise(SETTING), []
        for distance, shift in zip(distances, shifts, strict=True):
            means = distance[fold] * (malignant - 0.5) + shift[fold]
            scores = means[:, None] + shared + own + draw_noise(TRAINING)
            probabilities.append(expit(gain * scores).ravel())
        settings.append(np.array(probabilities))
    patients = np.repeat(np.arange(count), views)
    return np.repeat(malignant, views), settings, patients, fold[patients]


def compute_truth(scenario, spread=0.0, auc=None):
    """{name: value in the population, mean of all trainings} at the threshold 0.5."""
    share, gain = scenario[3], scenario[5]
    distances, shifts = draw_trainings(np.random.default_rng(0), scenario, auc or scenario[2], spread, 20_000)
    recall = norm.cdf(distances / 2 + shifts).mean(axis=1)
    fpr = norm.cdf(shifts - distances / 2).mean(axis=1)

    places, noise = np.linspace(-3, 3, 121), np.linspace(-6, 6, 4001)  # means of scores, and what varies
    squares = [np.trapezoid(expit(gain * (place + noise)) ** 2 * norm.pdf(noise), noise) for place in places]
    benign = np.interp(shifts - distances / 2, places, squares)
    malignant = np.interp(-shifts - distances / 2, places, squares)

    thresholds, steps, precisions = np.linspace(8, -8, 2001), np.linspace(-1, 4, 101), []
    for distance in steps:
        tpr, rate = norm.sf(thresholds - distance / 2), norm.sf(thresholds + distance / 2)
        precision = share * tpr / (share * tpr + (1 - share) * rate)
        precisions.append(np.trapezoid(precision, tpr))

    tp, fp = share * recall, (1 - share) * fpr
    values = {"accuracy": tp + (1 - share) - fp, "precision": tp / (tp + fp), "recall": recall,
              "f1": 2 * tp / (tp + fp + share), "specificity": 1 - fpr,
              "brier": share * malignant + (1 - share) * benign, "auc": norm.cdf(distances / np.sqrt(2)),
              "average_precision": np.interp(distances, steps, precisions)}
    return {name: value.mean() for name, value in values.items()}


TRUTHS = {}  # of scenarios, in each process


def remember_truth(*arguments):
    if arguments not in TRUTHS:
        TRUTHS[arguments] = compute_truth(*arguments)
    return TRUTHS[arguments]


def check(scenario, seed):
    """Which of the intervals of one data set contain the value of the population, {name: bool}."""
    labels, ((first,), (second,)), patients, folds = draw(scenario, seed)
    intervals = metrics.measure(labels, first, patients, seed, folds=folds)["ci95"]
    truth = remember_truth(scenario)
    covered = {name: intervals[name][0] <= truth[name] <= intervals[name][1] for name in truth}

    _, low, high = metrics.compare_aucs(labels, first, second, patients, folds, seed=seed)
    covered["equal AUCs"] = low <= 0 <= high
    labels, settings, patients, folds = draw(scenario, seed, second_auc=scenario[2] - 0.1)
    for name, confidence in (("AUCs 0.1 apart", 0.95), ("the same, 99.5 %", 0.995)):
        _, low, high = metrics.compare_aucs(labels, *settings, patients, folds, confidence, seed)
        covered[name] = low <= 0.1 <= high
    return covered


def check_trainings(scenario, trainings, seed):
    """The same for several trainings of each of two settings."""
    labels, (first, second), patients, folds = draw(scenario, seed, trainings, SPREAD, scenario[2] - 0.1)
    truth, covered = remember_truth(scenario, SPREAD), {}
    if trainings[0] == trainings[1]:
        intervals = metrics.measure_trainings(labels, first, patients, seed, folds=folds)["ci95"]
        covered = {name: intervals[name][0] <= truth[name] <= intervals[name][1] for name in truth}

    apart = truth["auc"] - remember_truth(scenario, SPREAD, scenario[2] - 0.1)["auc"]
    _, low, high = metrics.compare_aucs(labels, first, second, patients, folds, seed=seed)
    return covered | {"AUCs 0.1 apart": low <= apart <= high}


def show(pool, data_sets, function, columns):
    """Print a table of the shares that `function` finds; columns: {title: its arguments but for the seed}."""
    table = {}
    for title, arguments in columns.items():
        repeated = [[argument] * data_sets for argument in arguments]
        covered = pd.DataFrame(list(pool.map(function, *repeated, range(data_sets), chunksize=10)))
        table[title] = covered.mean()
        print(".", end="", flush=True)
    print("\n" + pd.DataFrame(table).to_string(float_format="{:.3f}".format), flush=True)


def use_few_resamples():
    """Set RESAMPLES in a process of the pool; an import of this file changes nothing."""
    metrics.RESAMPLES = metrics.BATCH = RESAMPLES


def main():
    data_sets = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    single = {"{} ({}) {:.2f} {:.0%} {} {}".format(*scenario): [scenario] for scenario in SCENARIOS}
    several = {"{} against {}, AUC {:.2f}, {} folds".format(*trainings, scenario[2], scenario[4]):
               [scenario, trainings] for scenario in SEVERAL for trainings in TRAININGS}
    with ProcessPoolExecutor(initializer=use_few_resamples) as pool:
        print(f"{data_sets} data sets a column")
        print("patients (views) AUC, share of malignant patients, folds, gain", flush=True)
        show(pool, data_sets, check, single)
        print("trainings of the first setting against those of the second", flush=True)
        show(pool, data_sets, check_trainings, several)


if __name__ == "__main__":
    main()
