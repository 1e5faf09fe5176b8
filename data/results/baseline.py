"""The baseline of every result: a random forest of file properties, which sees no lesion.

If benign and malignant films come from two scanners or websites, such properties alone predict the class. A
network has learnt something about lesions only if it does better.
"""
import numpy as np
import pandas as pd
from scipy import special
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.tree import DecisionTreeClassifier

from data import log
from data.reading import SURROUNDINGS
from data.results import metrics
from data.results.metrics import with_interval
from data.runs import explain_damage
from data.splits import FOLDS, deal_folds

CATEGORIES = ["format", "side", "view"]  # properties that are text; the others are numbers
FOREST = RandomForestClassifier(100, min_samples_leaf=5, random_state=0)  # of all properties
TREE = DecisionTreeClassifier(max_leaf_nodes=4, min_samples_leaf=5, random_state=0)  # of one property
NAMED = 3  # the most telling properties that are named, at most
TELLING = 0.65  # a warning if the whole interval of the AUC lies above this


# ---- properties and scores ---------------------------------------------------------------------


def list_properties(films, images, crop):
    """A table of the properties of each film, with the index of `films`; lengths are in pixels of the film.

    films: the table of group_duplicates(); images: uint8 (N, S, S), as the network sees them. black_share and
    white_share count pixels of 0 and 255. With CROP = "lesion" the size (longer side) and the place of the lesion
    are among the properties.
    """
    width, height = films["film_width"], films["film_height"]
    table = films[[*CATEGORIES, "film_width", "film_height"]].assign(
        aspect_ratio=width / height, bytes_per_pixel=films["bytes"] / (width * height), bit_depth=films["depth"],
        films_of_patient=films.groupby("group")["path"].transform("size"))
    greys = [(image.mean(), image.std(), np.mean(image == 0), np.mean(image == 255)) for image in images]
    table[["mean_grey", "grey_deviation", "black_share", "white_share"]] = greys
    if crop == "lesion":
        size = films["width"] / (1 + 2 * SURROUNDINGS)
        return table.assign(lesion_size=size, lesion_left=films["left"], lesion_top=films["top"])
    if crop == "breast":
        return table.assign(crop_size=films["width"], crop_left=films["left"], crop_top=films["top"])
    return table


def list_trainings(table):
    """{fold: the rows of the training set of its model}; a run of one fold has one model, with the key "".

    table: label, split or fold, and properties, as in properties.csv.
    """
    if "fold" not in table:
        return {"": table[table["split"] == "train"]}
    folds = [str(number) for number in range(FOLDS)]
    return {fold: table[table["fold"].isin(folds) & (table["fold"] != fold)] for fold in folds}


def read_trainings(file):
    """list_trainings() of the properties.csv of a run. Raises UserError if it is damaged."""
    text = dict.fromkeys([*CATEGORIES, "fold"], str)
    with explain_damage(file):
        return list_trainings(pd.read_csv(file, dtype=text, keep_default_na=False))


def encode(properties, known):
    """Properties as float (N, P). A category becomes its index among those of `known`, -1 if it is not there."""
    table = properties.copy()
    for name in table.columns.intersection(CATEGORIES):
        table[name] = pd.Index(known[name].unique()).sort_values().get_indexer(table[name])
    return table.to_numpy(float)


def score_films(model, training, properties):
    """P(malignant) of films by a model that is fitted to the training films: a Series like `properties`.

    model: FOREST or TREE; training: rows of list_trainings(); properties: a table with the columns to use.
    """
    known = training[properties.columns]
    model.fit(encode(known, known), training["label"] == "malignant")
    return pd.Series(model.predict_proba(encode(properties, known))[:, 1], properties.index)


def score_held_out(model, trainings, properties, folds=None):
    """score_films() with the training films of each film's fold; without folds, the mean logit of all models."""
    if folds is not None:
        parts = [score_films(model, trainings[fold], properties[folds == fold]) for fold in folds.unique()]
        return pd.concat(parts).loc[properties.index]
    scores = [score_films(model, training, properties) for training in trainings.values()]
    logits = special.logit(np.clip(scores, 1e-7, 1 - 1e-7))
    return pd.Series(special.expit(logits.mean(axis=0)), properties.index)


def add_baseline(predictions, properties, trainings):
    """(predictions with the column baseline, ranked): P(malignant) of the held-out films by the file properties.

    predictions: of the network, with a column fold if they are of all folds; properties: of all films; trainings:
    see list_trainings; ranked: see rank_properties.
    """
    properties = properties.loc[predictions.index]
    folds = predictions.get("fold")  # None for a single model
    alone = score_held_out(FOREST, trainings, properties, folds)
    ranked = rank_properties(trainings, properties, predictions["label"], folds)
    return predictions.assign(baseline=alone), ranked


def rank_properties(trainings, properties, labels, folds=None):
    """{property: AUC} of the properties that are better than chance on their own, the highest first.

    labels: (N,), "benign" or "malignant". With folds, the AUC is their mean. The films are held out, but the
    highest of many AUCs is optimistic.
    """
    aucs, malignant = {}, labels == "malignant"
    parts = malignant.groupby(np.zeros(len(labels)) if folds is None else folds)
    rows = [part.index for _, part in parts if part.nunique() == 2]
    for name in properties:
        scores = score_held_out(TREE, trainings, properties[[name]], folds)
        aucs[name] = float(np.mean([roc_auc_score(malignant[part], scores[part]) for part in rows]))
    return {name: auc for name, auc in sorted(aucs.items(), key=lambda item: -item[1]) if auc > 0.5}


# ---- results -----------------------------------------------------------------------------------


def measure_baseline(scores, probabilities, ranked, seed):
    """The "baseline" of metrics.json: its AUC, and the AUC of the network minus it, with intervals.

    scores: labels, probabilities (of the network), patients and folds; probabilities: of the file properties;
    ranked: see rank_properties().
    """
    alone = scores | {"probabilities": probabilities}
    results = metrics.measure(**alone, seed=seed)
    difference = metrics.compare_aucs(scores["labels"], scores["probabilities"], probabilities, scores["patients"],
                                      scores["folds"])
    telling = [{"property": name, "auc": auc} for name, auc in ranked.items()]
    return {"auc": results["auc"], "ci95": {"auc": results["ci95"]["auc"]}, "difference": list(difference),
            "most_telling": telling[:NAMED]}


def describe_baseline(baseline):
    """The "baseline" of metrics.json in words."""
    difference, low, high = baseline["difference"]
    verdict = "does better" if low > 0 else "does worse" if high < 0 else "is not shown to do better"
    telling = ", ".join(f"{item['property'].replace('_', ' ')} ({item['auc']:.2f})"
                        for item in baseline["most_telling"]) or "none"
    return (f"File properties alone: AUC {with_interval(baseline, 'auc')}. The network {verdict}:"
            f" {metrics.describe_difference(difference, low, high)}. Single properties with the highest AUC:"
            f" {telling}.")


# ---- before training ---------------------------------------------------------------------------


def choose_training_films(films, seed):
    """The films of the training set with a column fold: as a run deals them, also where the data has a split.

    None if a fold lacks a class: with so few patients no interval is narrow enough for a warning.
    """
    films = films[films["split"].isin(["", "train"])]
    if films.groupby("label")["group"].nunique().min() < FOLDS:
        return None

    films = films.assign(fold=deal_folds(films, seed))
    films = films[films["excluded"] == ""]
    classes = films.groupby("fold")["label"].nunique()
    return films if classes.eq(2).sum() == FOLDS else None


def count_by_class(values, malignant):
    """How many films of each class have each category, or range of numbers, of a property: a sentence."""
    if values.name in CATEGORIES:
        parts = {value or "unknown": part for value, part in malignant.groupby(values)}
    else:
        column = values.to_numpy(float)[:, None]
        leaves = TREE.fit(column, malignant).apply(column)
        ranges = sorted((part for _, part in values.groupby(leaves)), key=min)
        parts = {f"{part.min():.4g} to {part.max():.4g}": malignant[part.index] for part in ranges}
    counts = [f"{value}: {part.sum()} malignant, {(~part).sum()} benign" for value, part in parts.items()]
    return f"{values.name.replace('_', ' ').capitalize()} {'; '.join(counts)}."


def warn_of_giveaways(films, images, crop, seed):
    """Warn if file properties alone predict the class; summary.md repeats the warning under Limits.

    films: the table of group_duplicates(); seed: SPLIT_SEED.
    """
    training = choose_training_films(films, seed)
    if training is None:
        return

    properties = list_properties(films, images, crop).loc[training.index]
    trainings = list_trainings(training[["label", "fold"]].join(properties))
    malignant, folds = training["label"] == "malignant", training["fold"]
    probabilities = score_held_out(FOREST, trainings, properties, folds)
    results = metrics.measure(malignant.to_numpy(int), probabilities.to_numpy(), training["group"].to_numpy(),
                              folds=folds.to_numpy())
    if results["ci95"]["auc"][0] <= TELLING:
        return

    ranked = rank_properties(trainings, properties, training["label"], folds)
    names = [name for name, auc in ranked.items() if auc > max(ranked.values()) - 0.1]
    found = f"File properties alone predict the class of a mammogram (AUC {with_interval(results, 'auc')})."
    counts = [count_by_class(properties[name], malignant) for name in names[:NAMED]]
    advice = "A network may learn these properties instead of the look of lesions."
    log.warning(" ".join([found, *counts, advice]), extra={"limit": True})
