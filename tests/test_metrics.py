"""Metrics and intervals against hand counts, scikit-learn, SciPy, brute force and simulation."""
import itertools
import json
import logging
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from scipy import stats

from data.results import metrics
from data.results.metrics import NAMES, compare_aucs, measure, measure_trainings, measure_with_curves


@pytest.fixture
def simulation(monkeypatch):
    """What tests/coverage.py defines, with fewer resamples."""
    functions = runpy.run_path(str(Path(__file__).with_name("coverage.py")))
    for name in ("RESAMPLES", "BATCH"):
        monkeypatch.setattr(metrics, name, 250)
    return functions


def random_case(seed, films=60, ties=True):
    """Labels and probabilities of a model with an AUC of about 0.75."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(films) % 3 == 0).astype(int)
    probabilities = np.clip(0.4 + 0.2 * labels + 0.2 * rng.standard_normal(films), 0, 1)
    return labels, probabilities.round(1) if ties else probabilities


def score_with_scikit_learn(labels, probabilities, threshold=0.5):
    """The metrics of NAMES."""
    predicted = probabilities >= threshold
    report = sklearn.metrics.classification_report(labels, predicted, output_dict=True, labels=[0, 1])
    values = (sklearn.metrics.accuracy_score(labels, predicted), report["1"]["precision"], report["1"]["recall"],
              report["1"]["f1-score"], report["0"]["recall"],
              sklearn.metrics.brier_score_loss(labels, probabilities),
              sklearn.metrics.roc_auc_score(labels, probabilities),
              sklearn.metrics.average_precision_score(labels, probabilities))
    return dict(zip(NAMES, values, strict=True))


def width(interval):
    return interval[-1] - interval[-2]


def wilson(value, variance, freedom):
    """The values p whose distance to `value` is t standard errors at p."""
    scale = stats.t.ppf(0.975, freedom) ** 2 * variance / (value * (1 - value))
    return sorted(np.roots([1 + scale, -2 * value - scale, value**2]))  # (value - p)^2 = scale p (1 - p)


def is_covered(truth, low, high):
    return low <= truth <= high


# ---- values ------------------------------------------------------------------------------------


def test_a_case_counted_by_hand():
    labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    probabilities = [0.9, 0.8, 0.5, 0.3, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0]  # 0.5 is predicted malignant
    results = measure(labels, probabilities, list("abcdefghij"))
    assert results["confusion_matrix"] == {"tn": 5, "fp": 1, "fn": 1, "tp": 3}
    assert results["accuracy"] == 8 / 10
    assert results["precision"] == results["recall"] == results["f1"] == 3 / 4
    assert results["specificity"] == 5 / 6
    assert results["majority_baseline"] == 6 / 10
    assert results["auc"] == (6 + 6 + 5 + 3.5) / 24
    assert results["average_precision"] == pytest.approx((1 / 1 + 2 / 2 + 3 / 4 + 4 / 7) / 4)
    assert (results["positive_class"], results["threshold"]) == ("malignant", 0.5)
    assert measure(labels, probabilities, range(10), threshold=0.75)["confusion_matrix"]["tp"] == 2


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed, ties):
    labels, probabilities = random_case(seed, ties=ties)
    results = measure(labels, probabilities, range(60), threshold=0.45)
    expected = score_with_scikit_learn(labels, probabilities, threshold=0.45)
    assert {name: results[name] for name in NAMES} == pytest.approx(expected)


def test_a_perfect_model_has_values_of_exactly_1():
    labels = (np.arange(150) < 38).astype(int)
    probabilities = np.where(labels, 0.6, 0.1) + np.linspace(0, 0.3, 150)  # trapezoids sum to 0.9999999999999999
    results = measure(labels, probabilities, range(150))
    assert results["auc"] == results["average_precision"] == 1
    for name in NAMES:
        assert is_covered(results[name], *results["ci95"][name])


@pytest.mark.parametrize(("labels", "undefined"), [
    ([0, 1, 1], {"precision"}),  # no film is predicted malignant
    ([1, 1, 1], {"precision", "specificity", "auc", "average_precision"}),
    ([0, 0, 0], {"precision", "recall", "f1", "auc", "average_precision"})])
def test_a_ratio_of_nothing_is_undefined(labels, undefined):
    results = measure(labels, [0.1, 0.2, 0.3], "abc")
    assert {name for name in NAMES if results[name] is None} == undefined
    for name in undefined:
        assert results["ci95"][name] == [0, 1]
        assert metrics.with_interval(results, name) == "undefined"
    assert results == json.loads(json.dumps(results, allow_nan=False))
    several = measure_trainings(labels, [[0.1, 0.2, 0.3], [0.9, 0.2, 0.3]], "abc")
    assert {name for name in NAMES if several[name] is None} == undefined
    assert several["sd"]["precision"] is None, "one of the trainings has no precision"
    json.dumps(several, allow_nan=False)


# ---- folds -------------------------------------------------------------------------------------


def test_folds_pool_counts_and_average_rankings():
    folds = np.repeat(["x", "y"], 6)
    labels = np.array([1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
    probabilities = np.array([0.9, 0.6, 0.7, 0.4, 0.3, 0.2, 0.3, 0.2, 0.05, 0.1, 0.01, 0.0])  # another scale in y
    results, bands = measure_with_curves(labels, probabilities, range(12), folds=folds)
    assert results["confusion_matrix"] == {"tn": 6, "fp": 1, "fn": 3, "tp": 2}
    assert results["recall"] == 2 / 5
    assert results["auc"] == pytest.approx((7 / 8 + 8 / 9) / 2)
    assert results["average_precision"] == pytest.approx(((1 + 2 / 3) / 2 + (1 + 1 + 3 / 4) / 3) / 2)
    assert bands["roc"][2, 0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert bands["precision_recall"][2, -1] == pytest.approx((2 / 3 + 3 / 4) / 2)
    shifted = probabilities + 2 * (folds == "y")
    again = measure(labels, shifted, range(12), folds=folds)
    assert again["ci95"]["auc"] == results["ci95"]["auc"], "only ranks within a fold count"


def test_a_fold_of_one_class_does_not_count_for_rankings_and_is_logged(caplog):
    labels, probabilities = random_case(0)
    with caplog.at_level(logging.WARNING, "mammograms"):
        alone = measure(labels, probabilities, range(60))
        assert not caplog.records
        both = measure([*labels, 0, 0], [*probabilities, 0.9, 0.1], range(62), folds=[0] * 60 + [1] * 2)
        nowhere = measure([0] * 5 + [1] * 5, np.arange(10) / 10, range(10), folds=[0] * 5 + [1] * 5)
    assert "2 mammograms" in caplog.text
    assert [both[name] for name in ("auc", "average_precision")] == [
        alone[name] for name in ("auc", "average_precision")]
    assert both["confusion_matrix"]["fp"] == alone["confusion_matrix"]["fp"] + 1
    assert (nowhere["auc"], nowhere["recall"]) == (None, 1)


def test_a_single_patient_of_a_class_in_a_fold_still_varies():
    labels, folds = (np.arange(20) < 7).astype(int), np.arange(20) % 5  # one or two malignant films in each fold
    probabilities = np.where(np.arange(20) % 3, 0.7 - 0.2 * folds / 5, 0.2 + 0.2 * folds / 5)
    folded, pooled = (measure(labels, probabilities, range(20), folds=f)["ci95"] for f in (folds, None))
    assert folded["recall"] == pooled["recall"]
    assert width(folded["auc"]) > 0.6 * width(pooled["auc"])


# ---- intervals ---------------------------------------------------------------------------------


def test_intervals_against_leaving_out_each_patient():
    """Wilson's interval with the standard error of the jackknife; of patients with two films each."""
    labels, patients = np.repeat(np.arange(80) < 30, 2).astype(int), np.repeat(range(80), 2)
    rng = np.random.default_rng(0)
    probabilities = 0.4 + 0.2 * labels + np.repeat(rng.normal(0, 0.1, 80), 2) + rng.normal(0, 0.1, 160)
    results = measure(labels, probabilities, patients)
    kept = [patients != patient for patient in range(80)]
    excluded = pd.DataFrame([score_with_scikit_learn(labels[films], probabilities[films]) for films in kept])
    variances = 79 * excluded.var(ddof=0)
    predicted = len(set(patients[probabilities >= 0.5]))
    for name, count in zip(NAMES[:-1], (80, predicted, 30, 30, 50, 80, 30), strict=True):
        expected = wilson(results[name], variances[name], count - 1)
        assert results["ci95"][name] == pytest.approx(expected, abs=0.012), name


def test_accuracy_of_single_films_against_the_binomial_variance_and_scipy():
    labels, probabilities = np.repeat([1, 0], [6, 9]), np.repeat([0.9, 0.1, 0.9, 0.1], [5, 1, 7, 2])
    interval = measure(labels, probabilities, range(15))["ci95"]["accuracy"]
    assert interval == pytest.approx(wilson(7 / 15, 7 / 15 * 8 / 15 / 14, 14), abs=0.01)
    labels, probabilities = np.repeat([1, 0], 200), np.repeat([0.9, 0.1, 0.2], [100, 100, 200])
    interval = measure(labels, probabilities, range(400))["ci95"]["accuracy"]
    assert interval == pytest.approx(list(stats.binomtest(300, 400).proportion_ci(method="wilson")), abs=0.004)


@pytest.mark.parametrize("views", [1, 3])
def test_exact_limits_at_0_and_1_against_scipy(views):
    """12 malignant and 20 benign patients, all right or all wrong, whatever the number of views."""
    labels, patients = np.repeat(np.arange(32) < 12, views).astype(int), np.repeat(range(32), views)
    right, wrong = (measure(labels, p, patients)["ci95"] for p in (labels, 1 - labels))
    right["brier"], wrong["brier"] = wrong["brier"], right["brier"]
    counts = dict(zip(NAMES[:-1], (32, 12, 12, 12, 20, 32, 12), strict=True))
    for name, count in counts.items():
        assert right[name] == pytest.approx(list(stats.binomtest(count, count).proportion_ci())), name
    for name, count in (counts | {"precision": 20}).items():  # benign patients, all predicted malignant
        assert wrong[name] == pytest.approx(list(stats.binomtest(0, count).proportion_ci())), name
    assert right["average_precision"] == right["auc"]


@pytest.mark.parametrize("benign_predicted", [0, 1, 3])
@pytest.mark.parametrize("softening", [0, 1e-6])
def test_saturated_scores_against_a_plain_bootstrap(benign_predicted, softening):
    """Of 30 patients, 20 benign: nearly all are certain to be malignant."""
    labels, probabilities = np.repeat([0, 1], [20, 10]), np.full(30, 1 - softening)
    probabilities[:benign_predicted] = softening
    probabilities[::2] = np.clip(probabilities[::2], softening / 3, 1 - softening / 3)
    results, rng = measure(labels, probabilities, range(30)), np.random.default_rng(0)
    errors = (probabilities - labels) ** 2
    resamples = errors[rng.integers(30, size=(2000, 30))].mean(axis=1)
    for name, value in (("brier", resamples), ("accuracy", 1 - resamples)):
        expected = np.quantile(value, (0.025, 0.975))
        assert results["ci95"][name] == pytest.approx(expected, abs=0.05)


def test_the_brier_score_of_confident_and_right_models_is_no_surer_than_the_accuracy():
    labels = np.arange(30) % 2
    results = measure(labels, np.where(labels, 1 - 1e-5, 1e-5), range(30))
    low, high = results["ci95"]["brier"]
    assert (low, high) == pytest.approx((0, 1 - results["ci95"]["accuracy"][0]), abs=0.01)


@pytest.mark.parametrize(("probabilities", "malignant"), [
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 2), ([0.5, 0.5, 0.1, 0.1, 0.1, 0.9], 3), ([0.5] * 5, 2)])
def test_the_excess_of_the_average_precision_against_all_orders_of_the_labels(probabilities, malignant):
    count, values = len(probabilities), []
    for rows in itertools.combinations(range(count), malignant):
        labels = np.isin(np.arange(count), rows).astype(int)
        values.append(sklearn.metrics.average_precision_score(labels, probabilities))
    excess = metrics.compute_excess(metrics.tabulate(labels, range(count), None), np.array(probabilities))
    share = malignant / count
    assert np.mean(values) == pytest.approx(share + (1 - share) * excess)


def test_four_views_of_each_patient_do_not_narrow_the_interval():
    labels, probabilities = random_case(1, films=40, ties=False)
    alone = measure(labels, probabilities, range(40))["ci95"]
    fourfold = np.repeat(labels, 4), np.repeat(probabilities, 4)
    together, apart = (measure(*fourfold, patients)["ci95"] for patients in (np.repeat(range(40), 4), range(160)))
    for name in NAMES[:-1]:
        assert together[name] == pytest.approx(alone[name], abs=1e-6)
        assert width(apart[name]) < 0.7 * width(alone[name])


@pytest.mark.parametrize(("scenario", "names"), [
    ((24, 2, 0.94, 0.5, 1, 1), ["auc", "accuracy"]),  # percentile intervals cover 0.86 and 0.88
    ((30, 1, 0.60, 0.33, 5, 1), ["average_precision"])])  # 0.69 without the correction for few films
def test_coverage_of_a_good_model_and_of_small_folds(simulation, scenario, names):
    truth, covered = simulation["compute_truth"](scenario), []
    for seed in range(200, 300):
        labels, (probabilities, _), patients, folds = simulation["draw"](scenario, seed)
        intervals = measure(labels, probabilities[0], patients, folds=folds)["ci95"]
        covered.append([is_covered(truth[name], *intervals[name]) for name in names])
    assert (np.mean(covered, axis=0) > 0.91).all()


@pytest.mark.parametrize(("labels", "patients"), [
    ([0, 1], "ab"), ([0, 1], "aa"), ([1, 1], "ab"), ([0, 0], "ab"), ([1], "a"), ([1, 0, 0, 0], "abcd"),
    ([0, 1, 0, 1], "aabb"), ([1, 0, 0], [None, ("b", 2), 7])])
def test_too_few_patients_give_wide_intervals(labels, patients):
    probabilities = np.linspace(0.4, 0.6, len(labels))
    results, bands = measure_with_curves(labels, probabilities, patients)
    assert results == json.loads(json.dumps(results, allow_nan=False))
    for name in NAMES:
        low, high = results["ci95"][name]
        assert 0 <= low <= high <= 1
        assert results[name] is None or low <= results[name] <= high
    assert width(results["ci95"]["auc"]) > 0.8
    if labels in ([0, 1], [1, 0, 0, 0]):
        assert all(band[:2].tolist() == [[0] * 101, [1] * 101] for band in bands.values())
    difference, low, high = compare_aucs(labels, probabilities, -probabilities, patients)
    assert low <= difference <= high or (np.isnan(difference) and (low, high) == (-1, 1))


def test_any_hashable_names_a_patient():
    labels, probabilities = random_case(0, films=6)
    names = [None, None, ("b", 2), ("b", 2), 7, 7]
    assert measure(labels, probabilities, names) == measure(labels, probabilities, list("aabbcc"))


def test_intervals_are_seeded_and_hardly_depend_on_the_order_of_the_films():
    labels, probabilities = random_case(2)
    patients = np.array([f"patient {i}" for i in range(30)]).repeat(2)
    results = measure(labels, probabilities, patients, seed=1)
    assert results == measure(list(labels), list(probabilities), list(patients), seed=1)
    assert results["ci95"] != measure(labels, probabilities, patients, seed=2)["ci95"]
    order = np.random.default_rng(0).permutation(60)
    shuffled = measure(labels[order], probabilities[order], patients[order], seed=1)
    for name in NAMES:
        assert shuffled[name] == pytest.approx(results[name])
        assert shuffled["ci95"][name] == pytest.approx(results["ci95"][name], abs=0.02)


# ---- curves ------------------------------------------------------------------------------------


def test_curves_against_a_loop_over_resampled_patients():
    labels, probabilities = random_case(4, films=120, ties=False)
    labels = np.repeat(labels[::2], 2)  # two films of each patient
    results, bands = measure_with_curves(labels, probabilities, np.repeat(range(60), 2))
    assert results == measure(labels, probabilities, np.repeat(range(60), 2)), "they come from the same resamples"

    def trace(films):
        fpr, tpr, _ = sklearn.metrics.roc_curve(labels[films], probabilities[films], drop_intermediate=False)
        precision, recall, _ = sklearn.metrics.precision_recall_curve(labels[films], probabilities[films])
        reached = [precision[np.flatnonzero(recall >= max(share, 1e-9) - 1e-12)[-1]] for share in metrics.GRID]
        return np.interp(metrics.GRID, fpr, tpr), reached

    rng, resamples = np.random.default_rng(5), []
    for _ in range(500):
        drawn = rng.integers(60, size=59)
        resamples.append(trace(np.concatenate([2 * drawn, 2 * drawn + 1])))
    for name, curve, expected in zip(bands, trace(np.arange(120)), np.swapaxes(resamples, 0, 1), strict=True):
        low, high, found = bands[name]
        assert np.allclose(found, curve), name
        assert np.abs(np.quantile(expected, (0.025, 0.975), axis=0) - [low, high]).mean() < 0.02, name


# ---- several trainings -------------------------------------------------------------------------


def test_trainings_are_averaged_and_their_standard_deviation_is_given():
    labels, probabilities = random_case(0, ties=False)
    trainings = [probabilities, np.sqrt(probabilities), np.roll(probabilities, 1)]
    results, each = measure_trainings(labels, trainings, range(60)), [
        measure(labels, training, range(60)) for training in trainings]
    for name in NAMES:
        values = [result[name] for result in each]
        assert (results[name], results["sd"][name]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert results["trainings"] == 3


def test_a_training_alone_or_again_has_the_interval_over_patients():
    labels, probabilities = random_case(1, ties=False)
    folds, expected = np.arange(60) % 5, measure(*random_case(1, ties=False), range(60), folds=np.arange(60) % 5)
    alone = measure_trainings(labels, [probabilities], range(60), folds=folds)
    thrice = measure_trainings(labels, [probabilities] * 3, range(60), folds=folds)
    assert (alone["ci95"], alone["sd"]) == (expected["ci95"], dict.fromkeys(NAMES))
    for name in NAMES:
        assert thrice["ci95"][name] == pytest.approx(expected["ci95"][name])
        assert thrice["sd"][name] == pytest.approx(0)
    second = np.random.default_rng(0).permutation(probabilities)
    assert compare_aucs(labels, [probabilities] * 2, [second] * 3, range(60)) == pytest.approx(
        compare_aucs(labels, probabilities, second, range(60)))


def test_the_variance_between_trainings_is_added_to_that_over_patients():
    """Half of the trainings rank nearly all films right, the others nearly none: patients hardly matter."""
    labels = np.arange(400) % 2
    rng = np.random.default_rng(0)
    good, fair, poor = (skill * labels + rng.normal(0, 0.5, 400) for skill in (2, 1, 0))
    aucs = np.array([sklearn.metrics.roc_auc_score(labels, training) for training in (good, fair, poor)])
    interval = measure_trainings(labels, [good, fair, poor], range(400))["ci95"]["auc"]
    between = np.var(aucs, ddof=1) / 3
    assert interval == pytest.approx(wilson(aucs.mean(), between, 2), abs=0.02)
    difference, low, high = compare_aucs(labels, [good, fair], [fair, poor], range(400))
    pooled = (np.var(aucs[:2]) * 2 + np.var(aucs[1:]) * 2) / 2
    assert difference == pytest.approx((aucs[0] - aucs[2]) / 2)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * np.sqrt(pooled), abs=0.1)
    _, low, high = compare_aucs(labels, [good, fair, poor], fair, range(400), second_varies=False)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 2) * np.sqrt(between), abs=0.05)


def test_coverage_of_several_trainings(simulation):
    """Patients and trainings are random: the true value is the mean of all trainings on all patients."""
    scenario, covered = (110, 1, 0.75, 0.45, 1, 1), []
    first_auc, second_auc = (simulation["compute_truth"](scenario, 0.4, auc)["auc"] for auc in (0.75, 0.65))
    for seed in range(60):
        labels, (first, second), patients, _ = simulation["draw"](scenario, seed, (3, 3), 0.4, 0.65)
        interval = measure_trainings(labels, first, patients)["ci95"]["auc"]
        _, *difference = compare_aucs(labels, first, second, patients)
        covered.append((is_covered(first_auc, *interval), is_covered(first_auc - second_auc, *difference)))
    assert (np.mean(covered, axis=0) > 0.88).all()


# ---- comparison --------------------------------------------------------------------------------


def test_comparison_is_paired():
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    scores = labels + rng.normal(0, 1, 200)
    better, worse = scores, scores + rng.normal(0, 0.5, 200)
    difference, low, high = compare_aucs(labels, better, worse, range(200))
    aucs = [sklearn.metrics.roc_auc_score(labels, model) for model in (better, worse)]
    assert difference == pytest.approx(aucs[0] - aucs[1])
    excluded = [sklearn.metrics.roc_auc_score(np.delete(labels, film), np.delete(better, film))
                - sklearn.metrics.roc_auc_score(np.delete(labels, film), np.delete(worse, film))
                for film in range(200)]
    margin = stats.t.ppf(0.975, 99) * np.sqrt(199 * np.var(excluded))
    assert (low, high) == pytest.approx((difference - margin, difference + margin), abs=0.005)
    assert compare_aucs(labels, worse, better, range(200)) == pytest.approx((-difference, -high, -low))


def test_comparison_of_the_same_model_is_0_and_of_two_perfect_ones_is_not():
    labels, probabilities = random_case(0, films=90)
    assert compare_aucs(labels, probabilities, probabilities, range(90)) == (0, 0, 0)
    limit = stats.binomtest(30, 30).proportion_ci().low
    alike = compare_aucs(labels, probabilities, probabilities**2, range(90))
    assert alike == pytest.approx((0, limit - 1, 1 - limit)), "it ranks these alike, but maybe not others"
    assert compare_aucs(labels, labels, labels, range(90)) == (0, 0, 0)
    difference, low, high = compare_aucs(labels, labels, labels + probabilities / 2, range(90))
    assert (difference, low, high) == pytest.approx((0, limit - 1, 1 - limit))


def test_comparison_with_a_higher_confidence_is_wider_as_students_t():
    labels, probabilities = random_case(1, films=300, ties=False)
    second = np.random.default_rng(0).permutation(probabilities)
    wide, narrow = (compare_aucs(labels, probabilities, second, range(300), confidence=confidence)
                    for confidence in (0.9995, 0.95))
    expected = stats.t.ppf(0.99975, 99) / stats.t.ppf(0.975, 99)  # of 100 malignant patients
    assert width(wide) / width(narrow) == pytest.approx(expected)


# ---- patients ----------------------------------------------------------------------------------


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
    assert extreme["probabilities"].tolist() == [0.5]
    saturated = 1 - 10.0 ** -np.arange(5, 16)
    alone = metrics.average_films([0] * 11, saturated, range(11), None, [""] * 11)
    assert (np.diff(alone["probabilities"]) > 0).all(), "patients have the order of their only films"
