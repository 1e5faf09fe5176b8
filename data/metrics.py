"""Metrics of predictions, with intervals over patients: two films of one patient are not independent.

An interval is Wilson's (1927) with Student's t for z and the effective sample size (Kish 1965) for n, from the
standard deviation over resamples of the patients. tests/coverage.py simulates how often it is right.
"""
import numpy as np
import pandas as pd
from scipy import stats

from data import log

RESAMPLES, BATCH = 2000, 100  # of the patients; how many of them are in memory at a time
GRID = np.linspace(0, 1, 101)  # false positive rates of ROC curves


def divide(part, whole):
    """part / whole, and 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def stratify(labels, patients, folds):
    """Labels, folds, patients as numbers (N,), strata of the patients (P,), how many count for the AUC.

    A stratum is a class in a fold, or in all folds where a fold has one patient of a class (no variation to draw).
    A patient with films of both classes is malignant. The smaller class of folds with both counts for the AUC.
    """
    labels, folds = np.asarray(labels), np.zeros(len(labels)) if folds is None else np.asarray(folds)
    patients, _ = pd.Series(list(patients), dtype=object).factorize(use_na_sentinel=False)
    rows = pd.DataFrame({"fold": folds, "malignant": labels}).groupby(patients).max()
    strata = rows.groupby(["fold", "malignant"]).ngroup().to_numpy()
    ranked = (pd.Series(labels).groupby(folds).transform("nunique") == 2).to_numpy()
    if not ranked.all():
        log.warning("%d films do not count for the AUC: their fold has one class.", np.sum(~ranked))
    smaller = min(len(np.unique(patients[ranked & (labels == label)])) for label in (0, 1))
    strata = rows["malignant"].to_numpy() if 1 in np.bincount(strata) else strata
    return labels, folds, patients, strata, smaller


def bootstrap(function, patients, strata, seed):
    """Values (K,) and resamples (RESAMPLES, K) of function(weights of the films (R, N)) -> (R, K).

    Of the n patients of a stratum n - 1 are drawn with replacement and count n / (n - 1), which makes the variance
    of the resamples unbiased (Rao and Wu 1988); a single patient counts 1. No resample lacks a class.
    """
    rng, resamples = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // BATCH):
        weights = np.empty((BATCH, len(strata)))
        for stratum, n in zip(*np.unique(strata, return_counts=True), strict=True):
            drawn = rng.multinomial(max(n - 1, 1), np.full(n, 1 / n), BATCH)
            weights[:, strata == stratum] = drawn * n / max(n - 1, 1)
        resamples.append(function(weights[:, patients]))
    return function(np.ones((1, len(patients)), int))[0], np.concatenate(resamples)


def rank(labels, probabilities, weights, folds):
    """AUC, sensitivity at 90 % specificity, specificity at 90 % sensitivity, and the ROC curve on GRID, (R, 104).

    weights: (R, N), how often each film counts. Folds with both classes are averaged; 0 if there are none.
    """
    probabilities, total, valid = np.asarray(probabilities), 0, 0
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        rows = rows[np.argsort(-probabilities[rows], kind="stable")]
        ends = np.flatnonzero(np.diff(probabilities[rows], append=np.nan))  # of tied films
        sums = [np.cumsum(weights[:, rows] * (labels[rows] == label), axis=1)[:, ends] for label in (0, 1)]
        fps, tps = np.pad(sums, ((0, 0), (0, 0), (1, 0)))
        fpr, tpr = divide(fps, fps[:, -1:]), divide(tps, tps[:, -1:])
        pairs = np.sum(np.diff(fps) * (tps[:, 1:] + tps[:, :-1]), axis=1) / 2  # counts: a perfect AUC is exactly 1
        auc = divide(pairs, fps[:, -1] * tps[:, -1])
        sensitivity = np.where(fpr <= 0.1 + 1e-9, tpr, 0).max(axis=1)
        specificity = np.where(tpr >= 0.9 - 1e-9, 1 - fpr, 0).max(axis=1)
        curves = [np.interp(GRID, x, y) for x, y in zip(fpr, tpr, strict=True)]
        has_both = (fps[:, -1:] > 0) & (tps[:, -1:] > 0)
        total = total + has_both * np.column_stack([auc, sensitivity, specificity, curves])
        valid = valid + has_both
    return divide(total, valid)


def compute_interval(value, error, patients, strata, confidence=0.95):
    """[low, high]; exact for this number of patients (Clopper and Pearson 1934) where resamples do not vary."""
    tail, hits, misses = (1 + confidence) / 2, value * patients, (1 - value) * patients
    if value in (0, 1) or error < 1e-9 or patients < 2:
        low = stats.beta.isf(tail, hits, misses + 1) if hits else 0
        high = stats.beta.ppf(tail, hits + 1, misses) if misses else 1
    else:
        t = stats.t.ppf(tail, len(strata) - len(np.unique(strata)))
        size = value * (1 - value) / error**2
        margin = t * np.sqrt(error**2 + (t / size / 2) ** 2)
        low, high = (value + t**2 / size / 2 + np.array([-margin, margin])) / (1 + t**2 / size)
    return [max(float(low), 0.0), min(float(high), 1.0)]  # rounding may exceed 0 or 1


def measure(labels, probabilities, patients, seed=0, threshold=0.5, folds=None):
    """Dict of metrics with 95 % intervals, ready for JSON. Ratios of nothing are 0, with the interval [0, 1].

    labels: int (N,), 1 malignant; probabilities: float (N,), called malignant from `threshold` up; patients: (N,),
    hashable. folds: (N,), scored by different models, or None: counts are pooled, the AUC and the operating points
    are means of the folds that have both classes (Forman and Scholz 2010).
    """
    labels, folds, patients, strata, smaller = stratify(labels, patients, folds)
    called = np.asarray(probabilities) >= threshold
    cells = np.eye(4, dtype=int)[2 * labels + called]

    def compute_metrics(weights):
        tn, fp, fn, tp = (weights @ cells).T
        parts = np.array([tp + tn, tp, tp, 2 * tp, tn])
        wholes = np.array([tn + fp + fn + tp, tp + fp, tp + fn, 2 * tp + fp + fn, tn + fp])
        return np.hstack([divide(parts, wholes).T, rank(labels, probabilities, weights, folds)[:, :3]])

    values, resamples = bootstrap(compute_metrics, patients, strata, seed)
    benign, malignant, positive = (len(np.unique(patients[rows])) for rows in (labels == 0, labels == 1, called))
    counts = {"accuracy": len(strata), "precision": min(positive, malignant), "recall": malignant, "f1": malignant,
              "specificity": benign, "auc": smaller, "sensitivity_at_90_specificity": smaller,
              "specificity_at_90_sensitivity": smaller}  # patients behind the columns of compute_metrics
    rows = zip(values, resamples.std(axis=0), counts.values(), strict=True)
    tn, fp, fn, tp = cells.sum(axis=0).tolist()
    return dict(zip(counts, values.tolist(), strict=True)) | {
        "ci95": {name: compute_interval(*row, strata) for name, row in zip(counts, rows, strict=True)},
        "confusion_matrix": {"tn": tn, "fp": fp, "fn": fn, "tp": tp},
        "majority_baseline": max(tn + fp, fn + tp) / len(labels),
        "positive_class": "malignant",
        "threshold": float(threshold),
    }


def compute_roc_band(labels, probabilities, patients, seed=0, folds=None):
    """Float (3, 101): false positive rates, and the limits of 95 % of the true positive rates of resamples."""
    labels, folds, patients, strata, smaller = stratify(labels, patients, folds)
    _, curves = bootstrap(lambda w: rank(labels, probabilities, w, folds)[:, 3:], patients, strata, seed)
    low, high = np.quantile(curves, (0.025, 0.975), axis=0) if smaller > 1 else (0 * GRID, 0 * GRID + 1)
    return np.stack([GRID, low, high])


def compare_aucs(labels, first, second, patients, folds=None, confidence=0.95, seed=0):
    """(difference, low, high): AUC of the first minus AUC of the second of two models on the same films.

    The limits combine those of the two AUCs with the correlation of their resamples (Zou and Donner 2008).
    """
    labels, folds, patients, strata, smaller = stratify(labels, patients, folds)

    def compute_aucs(weights):
        return np.column_stack([rank(labels, model, weights, folds)[:, 0] for model in (first, second)])

    aucs, resamples = bootstrap(compute_aucs, patients, strata, seed)
    errors = resamples.std(axis=0)
    correlation = divide(np.cov(resamples.T, ddof=0)[0, 1], errors[0] * errors[1])
    limits = [compute_interval(*row, smaller, strata, confidence) for row in zip(aucs, errors, strict=True)]
    (down, drop), (up, rise) = np.abs(np.transpose(limits) - aucs)
    low, high = (np.sqrt(max(x**2 - 2 * correlation * x * y + y**2, 0)) for x, y in ((down, rise), (up, drop)))
    return tuple(float(aucs[0] - aucs[1] + shift) for shift in (0, -low, high))
