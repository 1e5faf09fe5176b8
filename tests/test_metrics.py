"""Metrics and intervals against hand counts, scikit-learn, SciPy, brute force and simulation."""
import itertools
import json
import logging
import runpy
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from scipy import stats

from data.results import metrics
from data.results.metrics import compare_aucs, compute_roc_band, measure

NAMES = ("accuracy", "precision", "recall", "f1", "specificity", "auc", "sensitivity_at_90_specificity",
         "specificity_at_90_sensitivity")
SIMULATION = runpy.run_path(str(Path(__file__).with_name("coverage.py")))


def random_case(seed, films=60, ties=True):
    """Labels and probabilities of a model with an AUC of about 0.75."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(films) % 3 == 0).astype(int)
    probabilities = np.clip(0.4 + 0.2 * labels + 0.2 * rng.standard_normal(films), 0, 1)
    return labels, probabilities.round(1) if ties else probabilities


def read_off_a_tenth(wrong, right):
    """The share of the scores `right` above a threshold that a tenth of new scores such as `wrong` exceed."""
    points = [(np.sum(wrong >= value) / (len(wrong) + 1), np.mean(right > value)) for value in -np.unique(-wrong)]
    return np.interp(0.1, *zip(*points, strict=True))


def width(interval):
    return interval[1] - interval[0]


def wilson(value, variance, freedom):
    """The values p whose distance to `value` is t standard errors at p."""
    scale = stats.t.ppf(0.975, freedom) ** 2 * variance / (value * (1 - value))
    return sorted(np.roots([1 + scale, -2 * value - scale, value**2]))  # (value - p)^2 = scale p (1 - p)


# ---- values ------------------------------------------------------------------------------------


def test_a_case_counted_by_hand():
    labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    probabilities = [0.9, 0.8, 0.5, 0.3, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0]  # 0.5 is called malignant
    metrics = measure(labels, probabilities, list("abcdefghij"))
    assert metrics["confusion_matrix"] == {"tn": 5, "fp": 1, "fn": 1, "tp": 3}
    assert metrics["accuracy"] == 8 / 10
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == 3 / 4
    assert metrics["specificity"] == 5 / 6
    assert metrics["majority_baseline"] == 6 / 10
    assert metrics["auc"] == (6 + 6 + 5 + 3.5) / 24
    assert metrics["sensitivity_at_90_specificity"] == pytest.approx(2 / 4)  # above 0.7: 1 of 7 new ones
    assert metrics["specificity_at_90_sensitivity"] == pytest.approx(3 / 6)  # below 0.3: 1 of 5 new ones
    assert (metrics["positive_class"], metrics["threshold"]) == ("malignant", 0.5)
    assert measure(labels, probabilities, range(10), threshold=0.75)["confusion_matrix"]["tp"] == 2


@pytest.mark.parametrize("seed", range(6))
def test_against_scikit_learn_and_brute_force(seed):
    labels, probabilities = random_case(seed)
    metrics, called = measure(labels, probabilities, range(60)), probabilities >= 0.5
    reference = sklearn.metrics.classification_report(labels, called, output_dict=True)
    assert metrics["precision"] == pytest.approx(reference["1"]["precision"])
    assert metrics["recall"] == pytest.approx(reference["1"]["recall"])
    assert metrics["f1"] == pytest.approx(reference["1"]["f1-score"])
    assert metrics["specificity"] == pytest.approx(reference["0"]["recall"])
    assert metrics["accuracy"] == pytest.approx(reference["accuracy"])
    pairs = list(itertools.product(probabilities[labels == 1], probabilities[labels == 0]))
    assert metrics["auc"] == pytest.approx(sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs))
    benign, malignant = probabilities[labels == 0], probabilities[labels == 1]
    assert metrics["sensitivity_at_90_specificity"] == pytest.approx(read_off_a_tenth(benign, malignant))
    assert metrics["specificity_at_90_sensitivity"] == pytest.approx(read_off_a_tenth(-malignant, -benign))


def test_a_perfect_model_has_an_auc_of_exactly_1():
    labels = (np.arange(150) < 38).astype(int)
    probabilities = np.where(labels, 0.6, 0.1) + np.linspace(0, 0.3, 150)  # trapezoids sum to 0.9999999999999999
    metrics = measure(labels, probabilities, range(150))
    assert metrics["auc"] == 1
    for name in NAMES:
        assert metrics["ci95"][name][0] <= metrics[name] <= metrics["ci95"][name][1]


def test_malignant_is_never_predicted():
    metrics = measure([0, 1, 1], [0.1, 0.2, 0.3], "abc")
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == 0
    assert metrics["specificity"] == 1
    assert metrics["majority_baseline"] == pytest.approx(2 / 3)
    assert metrics["ci95"]["precision"] == [0, 1], "of no film"


# ---- folds -------------------------------------------------------------------------------------


def test_folds_pool_counts_and_average_rankings():
    folds = np.repeat(["x", "y"], 6)
    labels = np.array([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    probabilities = np.array([0.9, 0.6, 0.7, 0.4, 0.3, 0.2, 0.3, 0.2, 0.05, 0.1, 0.01, 0.0])  # another scale in y
    metrics = measure(labels, probabilities, range(12), folds=folds)
    assert metrics["confusion_matrix"] == {"tn": 6, "fp": 1, "fn": 3, "tp": 2}
    assert metrics["recall"] == 2 / 5
    assert metrics["auc"] == pytest.approx((7 / 8 + 8 / 9) / 2)
    assert metrics["sensitivity_at_90_specificity"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["specificity_at_90_sensitivity"] == pytest.approx((3 / 4 + 2 / 3) / 2)
    _, low, high, curve = compute_roc_band(labels, probabilities, range(12), folds=folds)
    assert curve[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert low[0] <= curve[0] <= high[0]
    shifted = probabilities + 2 * (folds == "y")
    together = [measure(labels, p, range(12), folds=folds) for p in (probabilities, shifted)]
    assert together[0]["ci95"]["auc"] == together[1]["ci95"]["auc"], "only ranks within a fold count"


def test_a_fold_of_one_class_does_not_count_for_the_auc_and_is_logged(caplog):
    labels, probabilities = random_case(0)
    with caplog.at_level(logging.WARNING, "mammograms"):
        alone = measure(labels, probabilities, range(60))
        assert not caplog.records
        both = measure([*labels, 0, 0], [*probabilities, 0.9, 0.1], range(62), folds=[0] * 60 + [1] * 2)
    assert "2 films" in caplog.text
    assert both["auc"] == alone["auc"]
    assert both["confusion_matrix"]["fp"] == alone["confusion_matrix"]["fp"] + 1


def test_a_single_patient_of_a_class_in_a_fold_still_varies():
    labels, folds = (np.arange(20) < 7).astype(int), np.arange(20) % 5  # one or two malignant films in each fold
    probabilities = np.where(np.arange(20) % 3, 0.7 - 0.2 * folds / 5, 0.2 + 0.2 * folds / 5)
    folded, pooled = (measure(labels, probabilities, range(20), folds=f)["ci95"] for f in (folds, None))
    assert folded["recall"] == pooled["recall"]
    assert width(folded["auc"]) > 0.6 * width(pooled["auc"])


def test_nothing_is_ranked_where_every_fold_has_one_class():
    metrics = measure([0] * 5 + [1] * 5, np.arange(10) / 10, range(10), folds=[0] * 5 + [1] * 5)
    assert metrics["ci95"]["auc"] == [0, 1]
    assert metrics["recall"] == 1


# ---- intervals ---------------------------------------------------------------------------------


def test_interval_against_leaving_out_each_patient():
    """Wilson's interval with the standard error of the stratified jackknife; patients with two films."""
    labels, patients = np.repeat(np.arange(80) < 30, 2).astype(int), np.repeat(range(80), 2)
    rng = np.random.default_rng(0)
    probabilities = 0.4 + 0.2 * labels + np.repeat(rng.normal(0, 0.1, 80), 2) + rng.normal(0, 0.1, 160)
    metrics = measure(labels, probabilities, patients)
    references = (("auc", sklearn.metrics.roc_auc_score), ("brier", sklearn.metrics.brier_score_loss),
                  ("recall", lambda labels, scores: sklearn.metrics.recall_score(labels, scores >= 0.5)))
    for name, function in references:
        left_out = np.array([function(labels[patients != i], probabilities[patients != i]) for i in range(80)])
        variance = sum((len(part) - 1) * np.var(part) for part in (left_out[:30], left_out[30:]))
        assert metrics["ci95"][name] == pytest.approx(wilson(metrics[name], variance, 78), abs=0.006)


def test_intervals_against_the_variance_of_binomial_counts():
    """Patients are drawn in each class: the variance of the accuracy is the sum of those of the classes."""
    labels, probabilities = np.repeat([1, 0], [6, 9]), np.repeat([0.9, 0.1, 0.9, 0.1], [5, 1, 7, 2])
    metrics = measure(labels, probabilities, range(15))
    recall, specificity = 5 / 6 * 1 / 6 / 5, 2 / 9 * 7 / 9 / 8  # p (1 - p) / (n - 1)
    variances = {"recall": recall, "specificity": specificity,
                 "accuracy": (6**2 * recall + 9**2 * specificity) / 15**2}
    for name, variance in variances.items():
        assert metrics["ci95"][name] == pytest.approx(wilson(metrics[name], variance, 15 - 2), abs=0.01)


def test_recall_of_single_films_against_scipy():
    """Binomial counts: nearly Wilson's own interval, a little wider for Student's t and the unbiased variance."""
    labels, probabilities = np.repeat([1, 0], 200), np.repeat([0.9, 0.1, 0.2], [150, 50, 200])
    interval = measure(labels, probabilities, range(400))["ci95"]["recall"]
    assert interval == pytest.approx(list(stats.binomtest(150, 200).proportion_ci(method="wilson")), abs=0.004)


@pytest.mark.parametrize("views", [1, 3])
def test_exact_limits_at_0_and_1_against_scipy(views):
    """12 malignant and 20 benign patients, all right or all wrong, whatever the number of views."""
    labels, patients = np.repeat(np.arange(32) < 12, views).astype(int), np.repeat(range(32), views)
    right, wrong = (measure(labels, p, patients)["ci95"] for p in (labels, 1 - labels))
    for name, count in zip(NAMES, (32, 12, 12, 12, 20, 12, 12, 12), strict=True):
        assert right[name] == pytest.approx(list(stats.binomtest(count, count).proportion_ci()))
        assert wrong[name] == pytest.approx(list(stats.binomtest(0, count).proportion_ci()))


def test_a_precision_of_1_counts_the_patients_called_malignant():
    labels, probabilities = np.repeat([1, 0], 10), np.repeat([0.9, 0.2, 0.1], [4, 6, 10])
    interval = measure(labels, probabilities, range(20))["ci95"]["precision"]
    assert interval == pytest.approx(list(stats.binomtest(4, 4).proportion_ci()))


def test_four_views_of_each_patient_do_not_narrow_the_interval():
    labels, probabilities = random_case(1, films=40, ties=False)
    alone = measure(labels, probabilities, range(40))["ci95"]
    fourfold = np.repeat(labels, 4), np.repeat(probabilities, 4)
    together, apart = (measure(*fourfold, patients)["ci95"] for patients in (np.repeat(range(40), 4), range(160)))
    for name in NAMES[:6]:
        assert together[name] == pytest.approx(alone[name], abs=1e-6)
        assert width(apart[name]) < 0.7 * width(alone[name])


@pytest.mark.parametrize(("scenario", "names", "data_sets"), [
    ((24, 2, 0.94, 0.5, 1), ["auc", "accuracy"], 200),  # of 1,000 percentile intervals 0.86 and 0.88 cover
    ((110, 1, 0.65, 0.45, 5), NAMES[-2:], 100)])  # 0.80 and 0.71, with k of n films for k / n
def test_coverage_of_a_good_model_and_of_small_folds(scenario, names, data_sets):
    truth, covered = SIMULATION["compute_truth"](scenario), []
    for seed in range(200, 200 + data_sets):
        labels, (probabilities, _), patients, folds = SIMULATION["draw"](scenario, seed)
        intervals = measure(labels, probabilities, patients, folds=folds)["ci95"]
        covered.append([intervals[name][0] <= truth[name] <= intervals[name][1] for name in names])
    assert (np.mean(covered, axis=0) > 0.91).all()


@pytest.mark.parametrize(("labels", "patients"), [
    ([0, 1], "ab"), ([0, 1], "aa"), ([1, 1], "ab"), ([0, 0], "ab"), ([1], "a"), ([1, 0, 0, 0], "abcd"),
    ([0, 1, 0, 1], "aabb"), ([1, 0, 0], [None, ("b", 2), 7])])
def test_too_few_patients_give_wide_intervals(labels, patients):
    probabilities = np.linspace(0.4, 0.6, len(labels))
    metrics = measure(labels, probabilities, patients)
    assert metrics == json.loads(json.dumps(metrics, allow_nan=False))
    for name in NAMES:
        assert 0 <= metrics["ci95"][name][0] <= metrics[name] <= metrics["ci95"][name][1] <= 1
    if len(set(labels)) == 1:
        assert metrics["ci95"]["auc"] == [0, 1]
    band = compute_roc_band(labels, probabilities, patients)
    assert np.isfinite(band).all()
    if labels == [1, 0, 0, 0]:
        assert [band[1].max(), band[2].min()] == [0, 1], "one malignant patient says nothing about others"
    assert width(metrics["ci95"]["auc"]) > 0.8
    difference, low, high = compare_aucs(labels, probabilities, -probabilities, patients)
    assert low <= difference <= high


def test_any_hashable_names_a_patient():
    labels, probabilities = random_case(0, films=6)
    names = [None, None, ("b", 2), ("b", 2), 7, 7]
    assert measure(labels, probabilities, names) == measure(labels, probabilities, list("aabbcc"))


def test_intervals_are_seeded_and_hardly_depend_on_the_order_of_the_films():
    labels, probabilities = random_case(2)
    patients = np.array([f"patient {i}" for i in range(30)]).repeat(2)
    metrics = measure(labels, probabilities, patients, seed=1)
    assert metrics == measure(list(labels), list(probabilities), list(patients), seed=1)
    assert metrics["ci95"] != measure(labels, probabilities, patients, seed=2)["ci95"]
    order = np.random.default_rng(0).permutation(60)
    shuffled = measure(labels[order], probabilities[order], patients[order], seed=1)
    for name in NAMES:
        assert shuffled[name] == metrics[name]
        assert shuffled["ci95"][name] == pytest.approx(metrics["ci95"][name], abs=0.02)


# ---- ROC band and comparison -------------------------------------------------------------------


def test_roc_band_against_a_loop_over_resampled_patients():
    labels, probabilities = random_case(4, films=120, ties=False)
    labels = np.repeat(labels[::2], 2)  # two films of each patient
    patients = np.repeat(range(60), 2)
    grid, low, high, curve = compute_roc_band(labels, probabilities, patients)
    rng, curves = np.random.default_rng(5), []
    for _ in range(500):
        drawn = [rng.choice(np.unique(patients[labels == label]), sum(labels == label) // 2) for label in (0, 1)]
        films = np.concatenate([np.flatnonzero(patients == patient) for patient in np.concatenate(drawn)])
        fpr, tpr, _ = sklearn.metrics.roc_curve(labels[films], probabilities[films], drop_intermediate=False)
        curves.append(np.interp(grid, fpr, tpr))
    assert np.abs(np.quantile(curves, (0.025, 0.975), axis=0) - [low, high]).mean() < 0.02
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, probabilities, drop_intermediate=False)
    assert (grid[0], grid[-1], len(grid)) == (0, 1, 101)
    assert np.allclose(curve, np.interp(grid, fpr, tpr))
    assert ((low <= curve + 1e-9) & (curve <= high + 1e-9)).all()


def test_comparison_is_paired():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    scores = labels + rng.normal(0, 1, 200)
    better, worse = scores, scores + rng.normal(0, 0.5, 200)
    difference, low, high = compare_aucs(labels, better, worse, range(200))
    aucs = [sklearn.metrics.roc_auc_score(labels, model) for model in (better, worse)]
    assert difference == pytest.approx(aucs[0] - aucs[1])
    unpaired = [width(measure(labels, model, range(200))["ci95"]["auc"]) for model in (better, worse)]
    assert low < difference < high
    assert high - low < 0.7 * np.hypot(*unpaired)
    mirrored = compare_aucs(labels, worse, better, range(200))
    assert mirrored == pytest.approx((-difference, -high, -low))


def test_comparison_of_the_same_model_and_of_two_perfect_ones():
    labels, probabilities = random_case(0, films=90)
    difference, low, high = compare_aucs(labels, probabilities, probabilities**2, range(90))
    assert difference == 0
    assert -0.05 < low <= 0 <= high < 0.05
    difference, low, high = compare_aucs(labels, labels, labels + probabilities / 2, range(90))
    limit = stats.binomtest(30, 30).proportion_ci().low
    assert (difference, high) == (0, pytest.approx(1 - limit))


def test_comparison_with_a_higher_confidence_is_wider_as_students_t():
    labels, probabilities = random_case(1, films=300, ties=False)
    second = np.random.default_rng(0).permutation(probabilities)
    wide, narrow = (compare_aucs(labels, probabilities, second, range(300), confidence=confidence)
                    for confidence in (0.9995, 0.95))
    expected = stats.t.ppf(0.99975, 298) / stats.t.ppf(0.975, 298)
    assert width(wide[1:]) / width(narrow[1:]) == pytest.approx(expected, rel=0.03)


# ---- patients and calibration ------------------------------------------------------------------


def test_a_breast_is_the_mean_logit_of_its_views_and_a_patient_the_larger_breast():
    """A patient is malignant with one malignant film; c has views of unknown side, which count as one breast."""
    labels, patients, folds = np.array([0, 1, 0, 0, 1, 0, 0]), np.array(list("aabccac")), np.array(list("0010000"))
    probabilities = np.array([0.5, 0.9, 0.2, 0.1, 0.9, 0.1, 0.4])
    sides = ["left", "left", "right", "", "", "right", "left"]
    averaged = metrics.average_films(labels, probabilities, patients, folds, sides)
    assert averaged["patients"].tolist() == ["a", "b", "c"]
    assert averaged["labels"].tolist() == [1, 0, 1]
    assert averaged["folds"].tolist() == ["0", "1", "0"]
    assert np.allclose(averaged["probabilities"], [0.75, 0.2, 0.5]), "a's left has odds of 1 and 9, in the mean 3"
    alone = metrics.average_films(labels, probabilities, range(7), None, sides)
    assert alone["folds"] is None
    assert np.allclose(alone["probabilities"], probabilities)
    extreme = metrics.average_films([0, 1], [0.0, 1.0], [0, 0], None, ["", ""])
    assert np.isfinite(extreme["probabilities"]).all()


def test_where_all_are_called_alike_the_interval_does_not_depend_on_who_has_two_films():
    """Within a class nothing varies then, but the accuracy of other films may."""
    labels, names = np.arange(24) % 2, [*range(23), 22]
    for probability in (0.1, 0.9):
        single = metrics.measure(labels, np.full(24, probability), range(24))["ci95"]
        double = metrics.measure(labels, np.full(24, probability), names)["ci95"]
        for name in ("accuracy", "precision", "recall", "f1", "specificity"):
            assert double[name] == pytest.approx(single[name], abs=0.03)
        assert single["accuracy"] == pytest.approx([0.29, 0.71], abs=0.01)  # Clopper and Pearson, 12 of 24
