"""Metrics of predictions, with intervals over patients, as two films of one patient are not independent.

The standard error of a metric is its standard deviation over bootstrap resamples of the patients. The interval is
Wilson's (1927), with this standard error and Student's t. tests/coverage.py simulates how often intervals contain
the true value. A ratio with the denominator 0 is undefined: NaN in arrays, None in results.
"""
import numpy as np
import pandas as pd
import sklearn.metrics
from scipy import special, stats

from data import log

RESAMPLES = 2000  # of the patients
BATCH = 250  # resamples in memory at a time
NAMES = ("accuracy", "precision", "recall", "f1", "specificity", "brier", "auc", "average_precision")
TITLES = {name: name for name in NAMES} | {
    "recall": "recall (sensitivity)", "f1": "F1", "brier": "Brier score", "auc": "AUC",
    "average_precision": "average precision"}
EPSILON = np.finfo(float).epsneg  # from 1 to the float below it: a probability that is closer has no logit
GRID = np.linspace(0, 1, 101)  # false positive rates of ROC curves, recalls of precision-recall curves


# ---- metrics of resamples ----------------------------------------------------------------------


def tabulate(labels, patients, folds):
    """A table of the films with label (1 malignant), fold, and patient as a number from 0."""
    films = pd.DataFrame({"label": np.asarray(labels), "fold": 0 if folds is None else np.asarray(folds)})
    films["patient"], _ = pd.Series(list(patients), dtype=object).factorize(use_na_sentinel=False)
    return films


def draw_weights(films, seed):
    """Yield the weight of each film: first ones, int (1, N), then counts in resamples of patients, int (BATCH, N).

    Each resample draws n - 1 of n patients with replacement, so that variances are unbiased (Rao and Wu 1988).
    """
    yield np.ones((1, len(films)), int)

    rng, patients = np.random.default_rng(seed), films["patient"].to_numpy()
    count = patients.max() + 1
    for _ in range(RESAMPLES // BATCH):
        yield rng.multinomial(max(count - 1, 1), np.full(count, 1 / count), BATCH)[:, patients]


def rank_films(labels, probabilities, weights):
    """(tp, fp): how many malignant and benign films reach each threshold, both int (R, S + 1).

    weights: int (R, N), the weight of each film in each of R resamples. The thresholds are the S different
    probabilities in falling order, after one that no film reaches.
    """
    order = np.argsort(-probabilities, kind="stable")
    steps = np.flatnonzero(np.diff(probabilities[order], append=-np.inf))  # the last film of each probability

    counts = []
    for label in (1, 0):
        chosen = np.where(labels[order] == label, weights[:, order], 0)
        counts.append(np.pad(chosen.cumsum(axis=1)[:, steps], ((0, 0), (1, 0))))
    return counts


def compute_auc(tp, fp):
    return np.trapezoid(tp, fp, axis=1) / (tp[:, -1] * fp[:, -1])


def compute_average_precision(tp, fp):
    """The mean of the precisions at each malignant film, without interpolation."""
    precision = tp / (tp + fp)
    return np.nansum(precision[:, 1:] * np.diff(tp, axis=1), axis=1) / tp[:, -1]


def trace_roc(tp, fp):
    """Sensitivity at the false positive rates GRID, (R, 101)."""
    rates = zip(fp / fp[:, -1:], tp / tp[:, -1:], strict=True)
    return np.array([np.interp(GRID, fpr, tpr) for fpr, tpr in rates])


def trace_precision_recall(tp, fp):
    """Precision where the recall first reaches GRID, (R, 101); at recall 0, that at the first malignant film."""
    curves = []
    for found, precision in zip(tp, tp / (tp + fp), strict=True):
        wanted = np.maximum(GRID * found[-1] - 1e-9, 1)  # films; in floats, 0.07 * 100 is more than 7
        curves.append(precision.take(found.searchsorted(wanted), mode="clip"))
    return np.array(curves)


CURVES = {"roc": trace_roc, "precision_recall": trace_precision_recall}


def average_folds(function, ranks):
    """The mean of function(tp, fp), (R, ...), over the folds with both classes (Forman and Scholz 2010)."""
    parts = []
    for tp, fp in ranks:
        part = function(tp, fp)
        part[(tp[:, -1] == 0) | (fp[:, -1] == 0)] = np.nan
        parts.append(part)
    return np.ma.masked_invalid(parts).mean(axis=0).filled(np.nan)


def score(films, probabilities, threshold, weights, ranks):
    """{name: float (R,)}: each metric of NAMES in each of R resamples; ranks: rank_films() of each fold."""
    labels = films["label"].to_numpy()
    malignant, predicted = labels == 1, probabilities >= threshold

    def count(chosen):
        return weights[:, chosen].sum(axis=1)

    tp, fp = count(malignant & predicted), count(~malignant & predicted)
    fn, tn = count(malignant & ~predicted), count(~malignant & ~predicted)
    total = weights.sum(axis=1)
    return {
        "accuracy": (tp + tn) / total,
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "f1": 2 * tp / (2 * tp + fp + fn),
        "specificity": tn / (tn + fp),
        "brier": weights @ (probabilities - labels) ** 2 / total,
        "auc": average_folds(compute_auc, ranks),
        "average_precision": average_folds(compute_average_precision, ranks),
    }


@np.errstate(invalid="ignore")  # of 0 / 0
def bootstrap(films, probabilities, threshold, seed, curves=()):
    """{name: float (1 + RESAMPLES,)} of NAMES, and {name: (1 + RESAMPLES, 101)} of the requested CURVES.

    The first row is the value of all films, the others are values of resamples of their patients.
    """
    labels, folds = films["label"].to_numpy(), films.groupby("fold").indices.values()
    parts = []
    for weights in draw_weights(films, seed):
        ranks = [rank_films(labels[fold], probabilities[fold], weights[:, fold]) for fold in folds]
        part = score(films, probabilities, threshold, weights, ranks)
        for name in curves:
            part[name] = average_folds(CURVES[name], ranks)
        parts.append(part)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# ---- intervals ---------------------------------------------------------------------------------


def count_ranked(films):
    """The number of patients that decide AUC and average precision: those of the smaller class."""
    films = films[films.groupby("fold")["label"].transform("nunique") == 2]
    return min(films["patient"][films["label"] == label].nunique() for label in (0, 1))


def count_patients(films, predicted):
    """{name: the number of patients that decide a metric}; predicted: bool (N,), predicted malignant."""
    everyone, ranked = films["patient"].nunique(), count_ranked(films)
    benign, malignant = (films["patient"][films["label"] == label].nunique() for label in (0, 1))
    return {"accuracy": everyone, "precision": films["patient"][predicted].nunique(), "recall": malignant,
            "f1": malignant, "specificity": benign, "brier": everyone, "auc": ranked, "average_precision": ranked}


def compute_excess(films, probabilities):
    """The bias of the average precision of few films, as a share of its distance to 1: the mean of the folds.

    Each malignant film counts itself in its own precision. The correction is exact for random scores (Bestgen
    2015), and vanishes with many films.
    """
    shares = []
    for fold in films.groupby("fold").indices.values():
        if films["label"].iloc[fold].nunique() == 2:
            ranks = stats.rankdata(-probabilities[fold], "max")
            shares.append((np.sum(1 / ranks) - 1) / (len(fold) - 1))
    return np.mean(shares) if shares else 0


def remove_excess(samples, films, probabilities):
    """The result of bootstrap() with an average precision without the bias of few films."""
    excess = compute_excess(films, probabilities)
    unbiased = (samples["average_precision"] - excess) / (1 - excess)
    return samples | {"average_precision": np.maximum(unbiased, 0)}


def compute_variance(values):
    """The variance over the resamples in which a metric is defined; values: (1 + RESAMPLES,)."""
    resamples = values[1:]
    defined = resamples[~np.isnan(resamples)]
    return np.var(defined) if len(defined) else 0.0


def compute_margin(parts, confidence=0.95):
    """Half the width of the t interval of a sum of parts (Satterthwaite 1946).

    parts: (variance, degrees of freedom) of each.
    """
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0
    freedom = total**2 / sum(variance**2 / freedom for variance, freedom in parts)
    return np.sqrt(total) * stats.t.ppf((1 + confidence) / 2, freedom)


def compute_unseen(patients, confidence=0.95):
    """The upper limit of a share if no patient of a sample is a case (Clopper and Pearson 1934)."""
    return 1 - ((1 - confidence) / 2) ** (1 / patients)


def compute_interval(value, margin, patients):
    """[low, high] of a metric; margin: t times its standard error; patients: the number that decides it."""
    if np.isnan(value) or patients == 0:
        return [0.0, 1.0]

    low = high = value
    if 0 < value < 1:
        variance = value * (1 - value)
        if margin < 1e-9:  # no variation between resamples: the binomial variance of the patients
            margin = compute_margin([(variance / patients, max(patients - 1, 1))])
        ratio = margin**2 / variance  # t^2 / effective sample size
        centre = (value + ratio / 2) / (1 + ratio)
        width = np.sqrt(margin**2 + ratio**2 / 4) / (1 + ratio)
        low, high = centre - width, centre + width

    unseen = compute_unseen(patients)
    return [float(min(low, 1 - unseen)), float(max(high, unseen))]


def estimate_intervals(trainings, patients):
    """{name: [low, high]} of the mean of K trainings, from bootstrap() of each; patients: see count_patients."""
    intervals = {}
    for name in NAMES:
        each = np.array([samples[name] for samples in trainings])  # (K, 1 + RESAMPLES)
        mean = each.mean(axis=0)
        parts = [(compute_variance(mean), max(patients[name] - 1, 1))]
        if len(each) > 1:
            parts.append((np.var(each[:, 0], ddof=1) / len(each), len(each) - 1))
        intervals[name] = compute_interval(mean[0], compute_margin(parts), patients[name])
    return intervals


# ---- results -----------------------------------------------------------------------------------


def to_json(values):
    """The dict with None for NaN."""
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def measure_with_curves(labels, probabilities, patients, seed=0, threshold=0.5, folds=None, curves=CURVES):
    """(results, bands): see measure(); bands are the ROC and the precision-recall curve with intervals.

    bands: {name: float (3, 101)}, on GRID: the 2.5 % and 97.5 % quantiles of the resampled curves, and the curve.
    """
    films, probabilities = tabulate(labels, patients, folds), np.asarray(probabilities, float)
    one_class = films.groupby("fold")["label"].transform("nunique") == 1
    if one_class.any():
        log.warning("%d mammograms do not count for AUC and average precision, as their fold has one class only",
                    one_class.sum())

    predicted = probabilities >= threshold
    deciding = count_patients(films, predicted)
    samples = bootstrap(films, probabilities, threshold, seed, curves)
    unbiased = remove_excess(samples, films, probabilities)
    counts = sklearn.metrics.confusion_matrix(films["label"], predicted, labels=[0, 1]).ravel().tolist()
    results = to_json({name: samples[name][0] for name in NAMES}) | {
        "ci95": estimate_intervals([unbiased], deciding),
        "confusion_matrix": dict(zip(("tn", "fp", "fn", "tp"), counts, strict=True)),
        "majority_baseline": float(films["label"].value_counts(normalize=True).max()),
        "positive_class": "malignant",
        "threshold": float(threshold),
    }

    bands = {}
    for name in curves:
        limits = pd.DataFrame(samples[name][1:]).quantile([0.025, 0.975])  # skips NaN
        if deciding["auc"] < 2:  # no interval from a single patient
            limits = [np.zeros_like(GRID), np.ones_like(GRID)]
        bands[name] = np.vstack([limits, samples[name][0]])
    return results, bands


def measure(labels, probabilities, patients, seed=0, threshold=0.5, folds=None):
    """Metrics with 95 % intervals, for JSON. An undefined metric is None, with the interval [0, 1].

    labels: int (N,), 1 malignant; probabilities: float (N,); predicted malignant from `threshold` up; patients:
    (N,), hashable; folds: (N,) or None. AUC and average precision are means of the folds with both classes.
    """
    return measure_with_curves(labels, probabilities, patients, seed, threshold, folds, curves=())[0]


def measure_trainings(labels, trainings, patients, seed=0, threshold=0.5, folds=None):
    """The mean of several trainings of a setting, with intervals that cover patients and trainings, for JSON.

    trainings: float (K, N), the probabilities of each training; for the other arguments see measure(). The dict
    has the metrics, "ci95", "sd" (the standard deviation between trainings) and "trainings" (K). If K is 1, sd
    is None, and the intervals cover patients only.
    """
    films, trainings = tabulate(labels, patients, folds), np.asarray(trainings, float)
    values, unbiased, deciding = [], [], []
    for training in trainings:
        samples = bootstrap(films, training, threshold, seed)
        values.append({name: samples[name][0] for name in NAMES})
        unbiased.append(remove_excess(samples, films, training))
        deciding.append(count_patients(films, training >= threshold))

    values = pd.DataFrame(values)
    return to_json(values.mean(skipna=False)) | {
        "ci95": estimate_intervals(unbiased, pd.DataFrame(deciding).min()),
        "sd": to_json(values.std(skipna=False)),
        "trainings": len(trainings),
    }


def compare_aucs(labels, first, second, patients, folds=None, confidence=0.95, seed=0, second_varies=True):
    """(difference, low, high): AUC of the first minus that of the second setting, paired over resamples.

    first, second: float (N,), or (K, N) of K trainings, whose AUCs are averaged. Both settings are assumed to vary
    equally between trainings, unless second_varies is False, as for the baseline. With one training of each, the
    interval covers patients only.
    """
    films = tabulate(labels, patients, folds)
    first_aucs, second_aucs = (  # (K, 1 + RESAMPLES)
        np.array([bootstrap(films, training, 0.5, seed)["auc"] for training in np.atleast_2d(setting)])
        for setting in (first, second))
    differences = first_aucs.mean(axis=0) - second_aucs.mean(axis=0)
    difference = float(differences[0])
    if np.isnan(difference):
        return difference, -1.0, 1.0

    patients = count_ranked(films)
    parts = [(compute_variance(differences), max(patients - 1, 1))]
    varying = [first_aucs, second_aucs] if second_varies else [first_aucs]
    freedom = sum(len(aucs) - 1 for aucs in varying)
    if freedom > 0:
        pooled = sum(np.var(aucs[:, 0]) * len(aucs) for aucs in varying) / freedom
        parts.append((sum(pooled / len(aucs) for aucs in varying), freedom))
    margin = compute_margin(parts, confidence)

    if margin == 0 and not np.array_equal(first, second):  # they may differ on other patients
        margin = compute_unseen(patients, confidence)
    return difference, float(max(difference - margin, -1)), float(min(difference + margin, 1))


def average_films(labels, probabilities, patients, folds, sides):
    """The arguments of measure() with one row for each patient, as a dict.

    The score of a breast is the mean logit of its views. The score of a patient is the larger one of both breasts.
    A patient is malignant if one of the films is. sides: (N,), "left", "right" or "". Films of a patient without
    a known side count as one breast.
    """
    films = pd.DataFrame({"label": labels, "logit": special.logit(np.clip(probabilities, EPSILON, 1 - EPSILON)),
                          "patient": patients, "side": sides, "fold": 0 if folds is None else folds})
    breasts = films.groupby(["patient", "side"]).agg({"label": "max", "logit": "mean", "fold": "first"})
    rows = breasts.groupby("patient").agg({"label": "max", "logit": "max", "fold": "first"})
    folds = None if folds is None else rows["fold"].to_numpy()
    return {"labels": rows["label"].to_numpy(), "probabilities": special.expit(rows["logit"].to_numpy()),
            "patients": rows.index.to_numpy(), "folds": folds}


def play_pointing_game(boxes, maps, true_positives):
    """How often the peak of a map lies in a lesion box of its film (Zhang et al. 2016), as a dict.

    boxes: of each film a list of (left, top, width, height) as shares of the image. maps: float (N, h, w).
    An empty map is a miss. true_positives: bool (N,).

    "other_films" is the baseline: how often the peaks of the other films lie in the boxes of a film. Peaks that
    always lie in the middle do no better than it.
    """
    rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), maps.shape[1:])
    x, y = (columns + 0.5) / maps.shape[2], (rows + 0.5) / maps.shape[1]
    inside = np.zeros((len(boxes), len(boxes)), bool)  # the boxes of a film in rows, the peak of a map in columns
    for row, film_boxes in enumerate(boxes):
        for left, top, width, height in film_boxes:
            inside[row] |= (left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)
    inside &= maps.any(axis=(1, 2))
    hits, game = inside.diagonal(), {}
    others = (inside.sum(axis=1) - hits) / max(1, len(boxes) - 1)
    for name, chosen in (("images", np.ones(len(boxes), bool)), ("true_positives", true_positives)):
        if chosen.any():
            game[name] = {"images": int(chosen.sum()), "hits": int(hits[chosen].sum()),
                          "share": float(hits[chosen].mean()), "other_films": float(others[chosen].mean())}
    return game


def describe_held_out(results):
    """The films and patients of a metrics.json as text: 48 held-out mammograms of 24 patients."""
    films, patients = results["validation_images"], results["validation_patients"]
    return f"{films} {'test' if results['side'] == 'test' else 'held-out'} mammograms of {patients} patients"


def describe_difference(difference, low, high):
    """A difference with its interval as text: +0.07 [-0.02, 0.16]."""
    return f"{difference:+.2f} [{low:.2f}, {high:.2f}]"


def with_interval(results, name):
    """A metric with its interval as text: 0.71 [0.64, 0.78]; or: undefined."""
    if results[name] is None:
        return "undefined"
    return "{:.2f} [{:.2f}, {:.2f}]".format(results[name], *results["ci95"][name])
