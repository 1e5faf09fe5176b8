"""Metrics of predictions, with intervals over patients: two films of one patient are not independent.

An interval is Wilson's (1927) with Student's t for z and the effective sample size (Kish 1965) for n, from the
standard deviation over resamples of the patients. tests/coverage.py simulates how often it is right.
"""
import numpy as np
import pandas as pd
from scipy import special, stats

from data import log

RESAMPLES, BATCH = 2000, 100  # of the patients; of them in memory at a time
NAMES = ("accuracy", "precision", "recall", "f1", "specificity", "brier", "auc", "sensitivity_at_90_specificity",
         "specificity_at_90_sensitivity")
GRID = np.linspace(0, 1, 101)  # false positive rates of ROC curves


def stratify(labels, patients, folds):
    """(films, strata, smaller): the input to a bootstrap over patients within strata.

    films: a table with label, fold and patient, a number; strata: the patients of each; smaller: how many patients
    the rarer class has in folds that have both. A stratum is a class in a fold, or in all folds if one has a
    single patient. A patient with films of both classes counts as malignant.
    """
    films = pd.DataFrame({"label": np.asarray(labels), "fold": 0 if folds is None else np.asarray(folds)})
    films["patient"], _ = pd.Series(list(patients), dtype=object).factorize(use_na_sentinel=False)
    rows = films.groupby("patient")[["fold", "label"]].max()
    keys = ["fold", "label"] if rows.value_counts().min() > 1 else ["label"]
    strata = [part.index for _, part in rows.groupby(keys)]
    ranked = films.groupby("fold")["label"].transform("nunique") == 2
    if not ranked.all():
        log.warning("%d films do not count for the AUC: their fold has one class.", np.sum(~ranked))
    return films, strata, min(films[ranked].groupby("label")["patient"].nunique(), default=0)


def read_off(misses, rates):
    """Sensitivity at 90 % specificity, or the reverse: (R,), of each resample.

    misses: films of the class that are called wrong so far, (R, S); rates: the share of the other class that is
    called right, (R, S). A threshold at the k-th of n films calls k / (n + 1) of new ones wrong on average
    (Weibull 1939): k / n would promise too much of few films. Between two films it is interpolated.
    """
    rows, wanted = np.arange(len(misses)), (misses[:, -1] + 1) / 10
    after = (misses >= wanted[:, None]).argmax(axis=1)  # the threshold reaches the film beyond
    before = (misses >= misses[rows, after - 1, None]).argmax(axis=1)  # and the one before
    (low, high), (start, end) = misses[rows, [before, after]], rates[rows, [before - 1, after - 1]]
    start = np.where(low > 0, start, end)  # of fewer than 9 films, the first
    return start + (end - start) * (wanted - low) / np.maximum(high - low, 1e-9)


def score(films, probabilities, weights, threshold):
    """NAMES and true positive rates on GRID, (R, 110); weights: (R, N), how often each film counts."""
    labels, folds = films["label"].to_numpy(), films["fold"].to_numpy()
    cells = np.eye(4, dtype=int)[2 * labels + (probabilities >= threshold)]
    tn, fp, fn, tp = (weights @ cells).T
    total = tn + fp + fn + tp
    parts = np.array([tp + tn, tp, tp, 2 * tp, tn, weights @ (probabilities - labels) ** 2])
    wholes = np.array([total, tp + fp, tp + fn, 2 * tp + fp + fn, tn + fp, total])
    order, sums, valid = np.argsort(-probabilities, kind="stable"), 0, 0
    for fold in np.unique(folds):
        rows = order[folds[order] == fold]
        steps = np.flatnonzero(np.diff(probabilities[rows], prepend=np.nan, append=np.nan))  # ties are one
        counts = weights[:, rows] * np.array([labels[rows] == 0, labels[rows] == 1])[:, None]
        fps, tps = counts = np.cumulative_sum(counts, axis=2, include_initial=True).take(steps, axis=2)
        fpr, tpr = counts / np.maximum(counts[:, :, -1:], 1)
        pairs = fps[:, -1:] * tps[:, -1:]
        auc = np.trapezoid(tps, fps)[:, None] / np.maximum(pairs, 1)  # exactly 1 if perfect
        sensitivity = read_off(fps, tpr)
        specificity = read_off(tps[:, -1:] - tps[:, ::-1], 1 - fpr[:, ::-1])
        curves = [np.interp(GRID, x, y) for x, y in zip(fpr, tpr, strict=True)]
        sums += (pairs > 0) * np.column_stack([auc, sensitivity, specificity, curves])
        valid += pairs > 0
    return np.hstack([(parts / np.maximum(wholes, 1)).T, sums / np.maximum(valid, 1)])


def bootstrap(films, strata, probabilities, seed, threshold=0.5):
    """score() of the films, (110,), and of resamples of their patients, (RESAMPLES, 110).

    Of n patients of a stratum n - 1 are drawn and count n / (n - 1): an unbiased variance (Rao and Wu 1988).
    """
    rng, resamples, probabilities = np.random.default_rng(seed), [], np.asarray(probabilities)
    for _ in range(RESAMPLES // BATCH):
        weights = np.empty((BATCH, sum(map(len, strata))))
        for rows in strata:
            n, draws = len(rows), max(len(rows) - 1, 1)
            weights[:, rows] = rng.multinomial(draws, np.full(n, 1 / n), BATCH) * n / draws
        resamples.append(score(films, probabilities, weights[:, films["patient"]], threshold))
    return score(films, probabilities, np.ones((1, len(films)), int), threshold)[0], np.concatenate(resamples)


def compute_interval(value, error, patients, strata, confidence=0.95):
    """[low, high]; exact (Clopper and Pearson 1934) where resamples do not vary."""
    tail, hits, misses = (1 + confidence) / 2, value * patients, (1 - value) * patients
    if value in (0, 1) or error < 1e-9 or patients < 2:
        low = stats.beta.isf(tail, hits, misses + 1) if hits else 0
        high = stats.beta.ppf(tail, hits + 1, misses) if misses else 1
    else:
        t = stats.t.ppf(tail, sum(len(rows) - 1 for rows in strata))
        size = value * (1 - value) / error**2
        margin = t * np.sqrt(error**2 + (t / size / 2) ** 2)
        low, high = (value + t**2 / size / 2 + np.array([-margin, margin])) / (1 + t**2 / size)
    return np.clip([low, high], 0.0, 1.0).tolist()  # but for rounding


def measure(labels, probabilities, patients, seed=0, threshold=0.5, folds=None):
    """Metrics with 95 % intervals, for JSON. Ratios of nothing are 0, with the interval [0, 1].

    labels: int (N,), 1 malignant; probabilities: float (N,), malignant from `threshold` up; patients: (N,),
    hashable; folds: (N,) or None. Counts are pooled; what is ranked is the mean of the folds that have both
    classes (Forman and Scholz 2010).
    """
    films, strata, smaller = stratify(labels, patients, folds)
    values, resamples = bootstrap(films, strata, probabilities, seed, threshold)
    labels, called = films["label"], np.asarray(probabilities) >= threshold
    tn, fp, fn, tp = np.bincount(2 * labels + called, minlength=4).tolist()
    benign, malignant, positive = (films["patient"][rows].nunique() for rows in (labels == 0, labels == 1, called))
    everyone = films["patient"].nunique()
    counts = [everyone, min(positive, malignant), malignant, malignant, benign, everyone] + 3 * [smaller]
    errors = resamples.std(axis=0)
    if called.all() or not called.any():  # resamples then vary by nothing but how many films a patient has
        errors[: NAMES.index("brier")] = 0
    rows = zip(NAMES, values, errors, counts, strict=False)
    return dict(zip(NAMES, values.tolist(), strict=False)) | {
        "ci95": {name: compute_interval(*row, strata) for name, *row in rows},
        "confusion_matrix": {"tn": tn, "fp": fp, "fn": fn, "tp": tp},
        "majority_baseline": max(tn + fp, fn + tp) / len(films),
        "positive_class": "malignant",
        "threshold": float(threshold),
    }


def compute_roc_band(labels, probabilities, patients, seed=0, folds=None):
    """Float (4, 101): false positive rates, 95 % limits of the true positive rates, the curve itself."""
    films, strata, smaller = stratify(labels, patients, folds)
    curve, curves = (table[..., len(NAMES) :] for table in bootstrap(films, strata, probabilities, seed))
    low, high = np.quantile(curves, (0.025, 0.975), axis=0) if smaller > 1 else (0 * GRID, 0 * GRID + 1)
    return np.stack([GRID, low, high, curve])


def compare_aucs(labels, first, second, patients, folds=None, confidence=0.95, seed=0):
    """AUC of the first minus that of the second model: (difference, low, high) (Zou and Donner 2008)."""
    films, strata, smaller = stratify(labels, patients, folds)  # one seed: the same resamples
    tables = [np.vstack(bootstrap(films, strata, model, seed)) for model in (first, second)]
    aucs, *resamples = np.transpose(tables)[NAMES.index("auc")]
    errors = np.std(resamples, axis=0)
    correlation = np.cov(resamples, rowvar=False, ddof=0)[0, 1] / errors.prod() if errors.all() else 0
    limits = [compute_interval(*row, smaller, strata, confidence) for row in zip(aucs, errors, strict=True)]
    (down, drop), (up, rise) = np.abs(np.transpose(limits) - aucs)
    low, high = (np.sqrt(max(x**2 - 2 * correlation * x * y + y**2, 0)) for x, y in ((down, rise), (up, drop)))
    return tuple(float(aucs[0] - aucs[1] + shift) for shift in (0, -low, high))


def average_films(labels, probabilities, patients, folds, sides):
    """The same arguments but for `sides` with one row a patient, who is malignant when one of the films is.

    The score of a breast is the mean logit of its views, that of a patient the larger of both breasts. sides: (N,)
    of "left", "right" or "". Films of a patient whose side is unknown count as those of one breast.
    """
    films = pd.DataFrame({"label": labels, "logit": special.logit(np.clip(probabilities, 1e-7, 1 - 1e-7)),
                          "patient": patients, "side": sides, "fold": 0 if folds is None else folds})
    breasts = films.groupby(["patient", "side"]).agg({"label": "max", "logit": "mean", "fold": "first"})
    rows = breasts.groupby("patient").agg({"label": "max", "logit": "max", "fold": "first"})
    folds = None if folds is None else rows["fold"].to_numpy()
    return {"labels": rows["label"].to_numpy(), "probabilities": special.expit(rows["logit"].to_numpy()),
            "patients": rows.index.to_numpy(), "folds": folds}


def play_pointing_game(boxes, maps, true_positives):
    """How often the peak of a map lies in a lesion box of its film (Zhang et al. 2016), as a dict.

    boxes: those of N films, each (left, top, width, height) as shares of the image; maps: float (N, h, w), an
    empty one is a miss; true_positives: bool (N,). The baseline is how often the peaks of the other films lie in a
    film's boxes, so that a habit of pointing at the middle does not count as skill.
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
    """What metrics.json was measured on as text: 48 held-out films of 24 patients."""
    films, patients = results["validation_images"], results["validation_patients"]
    return f"{films} {'test' if results['side'] == 'test' else 'held-out'} films of {patients} patients"


def with_interval(results, name):
    """A metric with its interval as text: 0.71 [0.64, 0.78]."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(results[name], *results["ci95"][name])
