"""What the files alone give away, on collections where it is known, against scikit-learn and by simulation."""
import cv2
import numpy as np
import pandas as pd
import pytest
import sklearn.ensemble
from scipy import special

from data import CLASSES
from data.duplicates import group_duplicates
from data.films import find_films
from data.reading import read_films
from data.results import baseline, metrics
from data.results.baseline import FOREST, TREE, list_properties, list_trainings, score_held_out, warn_of_giveaways
from data.splits import split_patients


@pytest.fixture(autouse=True)
def small_forests(monkeypatch):
    monkeypatch.setattr(baseline.FOREST, "n_estimators", 10)


def make_table(patients, seed=0, **columns):
    """(films, images) of two films a patient, every second patient malignant; no property tells the class."""
    rng, count, who = np.random.default_rng(seed), 2 * patients, np.repeat(np.arange(patients), 2)
    width, height, left, top, size, volume = rng.integers(1000, 2000, (6, count))
    films = pd.DataFrame({
        "path": [f"{number}.png" for number in range(count)], "label": np.take(CLASSES, who % 2), "split": "",
        "group": [f"p{number}" for number in who], "excluded": "", "format": rng.choice(["PNG", "JPEG"], count),
        "side": np.resize(["left", "right"], count), "view": "", "depth": 8, "film_width": width,
        "film_height": height, "bytes": volume, "left": left, "top": top, "width": size})
    return films.assign(**columns), rng.integers(0, 256, (count, 8, 8), np.uint8)


def split_table(films, images, crop="breast"):
    """(properties.csv, properties) of five folds."""
    films = split_patients(films, 0, 0)
    properties = list_properties(films, images, crop)
    return films[["path", "label", "fold"]].join(properties), properties


def list_warnings(caplog):
    return [record.getMessage() for record in caplog.records if getattr(record, "limit", False)]


# ---- properties --------------------------------------------------------------------------------


def test_properties_by_hand():
    films, images = make_table(2, depth=12, film_width=200, film_height=400, bytes=40000, width=60, top=3,
                               left=[5, 6, 7, 8], group=["a", "b", "a", "a"])
    images[0] = 0
    images[0, :4], images[0, 4, :3] = 255, (1, 100, 254)
    whole = list_properties(films, images, None).iloc[0]
    assert whole[["film_width", "aspect_ratio", "bytes_per_pixel", "bit_depth", "films_of_patient"]].tolist() == [
        200, 0.5, 0.5, 12, 3]
    assert whole[["black_share", "white_share"]].tolist() == [29 / 64, 32 / 64]
    assert whole[["mean_grey", "grey_deviation"]].tolist() == pytest.approx([images[0].mean(), images[0].std()])
    for crop, name, size in (("breast", "crop", 60), ("lesion", "lesion", 30)):  # half of a crop is the lesion
        table = list_properties(films, images, crop)
        names = [f"{name}_size", f"{name}_left", f"{name}_top"]
        assert list(table) == [*whole.index, *names]
        assert table[names].iloc[1].tolist() == [size, 6, 3]


# ---- the forest --------------------------------------------------------------------------------


def test_a_film_is_scored_by_a_forest_of_the_films_that_its_network_was_trained_on():
    films, images = make_table(30)
    films.loc[films["label"] == "malignant", "film_width"] += 400
    table, properties = split_table(films, images)
    scores = score_held_out(FOREST, list_trainings(table), properties, table["fold"])
    fold = table["fold"] == "3"
    columns = properties.assign(format=properties["format"] == "PNG", side=properties["side"] == "right", view=0)
    forest = sklearn.ensemble.RandomForestClassifier(10, min_samples_leaf=5, random_state=0)
    forest.fit(columns[~fold].to_numpy(float), table["label"][~fold] == "malignant")
    assert scores[fold].tolist() == forest.predict_proba(columns[fold].to_numpy(float))[:, 1].tolist()
    swapped = table.assign(label=table["label"].where(~fold, np.take(CLASSES, table["label"].eq("benign"))))
    again = score_held_out(FOREST, list_trainings(swapped), properties, table["fold"])
    assert again[fold].equals(scores[fold]), "whose own labels do not count"
    assert not again[~fold].equals(scores[~fold])
    single = table.drop(columns="fold").assign(split=np.where(fold, "validation", "train"))
    assert score_held_out(FOREST, list_trainings(single), properties[fold]).tolist() == pytest.approx(
        scores[fold].tolist()), "a run of this fold alone"


def test_films_that_no_fold_held_out_get_the_mean_logit_of_the_five_forests(tmp_path):
    """As the training films are in the folder of a run, with a format that is new and films that were excluded."""
    table, _ = split_table(*make_table(30))
    table.loc[:1, ["fold", "label"]] = "excluded", "neither"
    table.to_csv(tmp_path / "properties.csv", index=False)
    films, images = make_table(4, seed=1, format="12 bit DICOM")
    properties = list_properties(films, images, "breast")
    trainings = baseline.read_trainings(tmp_path / "properties.csv")
    assert {fold: rows["path"].tolist() for fold, rows in trainings.items()} == {
        fold: table["path"][~table["fold"].isin([fold, "excluded"])].tolist() for fold in "01234"}
    scores = [score_held_out(FOREST, {"": rows}, properties) for rows in trainings.values()]
    assert score_held_out(FOREST, trainings, properties).tolist() == pytest.approx(
        special.expit(special.logit(scores).mean(axis=0)).tolist())


def test_a_property_alone_is_scored_by_what_the_training_films_have_in_its_range():
    """Malignant films come from the smallest and from the largest of three scanners, and a category is new."""
    size = np.repeat([100, 200, 300], [10, 20, 10])
    training = pd.DataFrame({"label": np.where(size == 200, *CLASSES), "format": ["a"] * 25 + ["b"] * 15,
                             "side": "", "view": "", "size": size})
    new = pd.DataFrame({"format": ["a", "b", "c"], "side": "", "view": "", "size": [90, 190, 350]})
    scores = {name: baseline.score_films(TREE, training, new[[name]]).tolist() for name in new}
    assert scores["size"] == [1, 0, 1]
    assert scores["format"][:2] == pytest.approx([10 / 25, 10 / 15])
    assert scores["side"] == [0.5] * 3
    held_out = pd.DataFrame({"side": "", "format": list("babab"), "size": [90, 190, 350, 210, 200]})
    labels, trainings = pd.Series(np.take(CLASSES, [1, 0, 1, 1, 0])), dict.fromkeys("012", training)
    ranked = [baseline.rank_properties(trainings, held_out, labels, folds)
              for folds in (None, pd.Series(list("00111")), pd.Series(list("00112")))]
    assert list(ranked[0].items()) == [("size", pytest.approx(5 / 6)), ("format", pytest.approx(3.5 / 6))]
    assert ranked[1] == {"size": (1 + 0.75) / 2, "format": (1 + 0.25) / 2}
    assert ranked[2] == {"size": 1, "format": 1}, "two folds have one class only"


# ---- beside the result -------------------------------------------------------------------------


def test_the_difference_is_that_of_compare_aucs_and_the_interval_that_of_measure():
    films, images = make_table(30)
    table, properties = split_table(films, images)
    trainings = list_trainings(table)
    alone = score_held_out(FOREST, trainings, properties, table["fold"]).to_numpy()
    ranked = baseline.rank_properties(trainings, properties, table["label"], table["fold"])
    labels, folds = films["label"].eq("malignant").to_numpy(int), table["fold"].to_numpy()
    network = np.clip(0.4 + 0.2 * labels + np.random.default_rng(0).normal(0, 0.2, 60), 0, 1)
    scores = {"labels": labels, "probabilities": network, "patients": films["group"].to_numpy(), "folds": folds}
    found = baseline.measure_baseline(scores, alone, ranked, seed=0)
    assert found["difference"] == list(metrics.compare_aucs(labels, network, alone, films["group"], folds))
    measured = metrics.measure(labels, alone, films["group"], 0, 0.5, folds)
    assert (found["auc"], found["ci95"]) == (measured["auc"], {"auc": measured["ci95"]["auc"]})
    assert found["difference"][0] == pytest.approx(
        metrics.measure(labels, network, films["group"], folds=folds)["auc"] - found["auc"])
    assert [item["auc"] for item in found["most_telling"]] == sorted(ranked.values(), reverse=True)[:3]


@pytest.mark.parametrize(("difference", "verdict"), [
    ([0.04, -0.09, 0.17], "is not shown to do better: +0.04 [-0.09, 0.17]."),
    ([0.2, 0.01, 0.39], "does better: +0.20 [0.01, 0.39]."),
    ([-0.2, -0.3, -0.1], "does worse: -0.20 [-0.30, -0.10].")])
def test_one_sentence_says_whether_the_network_does_better(difference, verdict):
    result = {"auc": 0.63, "ci95": {"auc": [0.52, 0.74]}, "difference": difference,
              "most_telling": [{"property": "lesion_size", "auc": 0.617}]}
    text = baseline.describe_baseline(result)
    assert text.startswith(f"File properties alone: AUC 0.63 [0.52, 0.74]. The network {verdict}")
    assert "lesion size (0.62)" in text


# ---- before training ---------------------------------------------------------------------------


@pytest.fixture
def collection(tmp_path):
    """Write 48 films of noise of 24 patients, and warn of them; change() is done to those of malignant ones."""

    def make(change, suffix=".png"):
        rows = []
        for number in range(48):
            malignant, rng = number // 2 % 2 == 1, np.random.default_rng(number)
            pixels = cv2.resize(rng.integers(0, 200, (9, 9), np.uint8), (60, 60 + number % 5))
            if malignant:
                pixels = change(pixels)
            rows.append((f"{number}{suffix if malignant else '.png'}", CLASSES[malignant], f"p{number // 2}"))
            assert cv2.imwrite(str(tmp_path / rows[-1][0]), pixels)
        table = pd.DataFrame(rows, columns=["path", "label", "patient_id"])
        table.to_csv(tmp_path / "labels.csv", index=False)
        films, images, prints = read_films(find_films(tmp_path), tmp_path, None, tmp_path / "outputs")
        warn_of_giveaways(group_duplicates(films, prints), images, None, 0)

    return make


@pytest.mark.parametrize(("change", "suffix", "counts"), [
    (np.copy, ".jpg", "Format 8 bit JPEG, grey: 24 malignant, 0 benign;"
                      " 8 bit PNG, grey: 0 malignant, 24 benign."),
    (lambda pixels: cv2.resize(pixels, (80, 80)), ".png",
     "Film height 60 to 64: 0 malignant, 24 benign; 80 to 80: 24 malignant, 0 benign."),
    (lambda pixels: pixels // 3, ".png", "Mean grey "),
])
def test_a_format_a_size_or_a_brightness_that_tells_the_classes_apart_is_named(
        collection, caplog, change, suffix, counts):
    collection(change, suffix)
    (warning,) = list_warnings(caplog)
    assert counts in warning
    assert "(AUC 1.00 [0.74, 1.00])" in warning, "of 12 patients of a class, Clopper and Pearson"


def test_where_nothing_tells_the_interval_holds_one_half_and_nobody_is_warned(caplog, monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 200)
    held = []
    for seed in range(40):
        films, images = make_table(24, seed)
        table, properties = split_table(films, images)
        alone = score_held_out(FOREST, list_trainings(table), properties, table["fold"])
        labels = films["label"].eq("malignant").to_numpy(int)
        low, high = metrics.measure(labels, alone, films["group"], folds=table["fold"])["ci95"]["auc"]
        held.append(low <= 0.5 <= high)
        assert low <= baseline.TELLING
    assert sum(held) >= 30
    warn_of_giveaways(*make_table(24), "breast", 0)
    assert not list_warnings(caplog)


def test_a_given_split_is_judged_by_its_training_films_alone(caplog):
    films, images = make_table(60)
    malignant, given = films["label"] == "malignant", np.repeat(["train", "validation", "test"], [60, 30, 30])
    split = films.assign(split=given)
    split.loc[malignant & (given != "train"), "bytes"] = 10**6
    warn_of_giveaways(split, images, None, 0)
    assert not list_warnings(caplog)
    split.loc[malignant, "bytes"] = 10**6
    warn_of_giveaways(split, images, None, 0)
    (warning,) = list_warnings(caplog)
    assert "Bytes per pixel 0.0003439 to 0.001143: 0 malignant, 30 benign; 0.2614 to 0.7253: 30" in warning


@pytest.mark.parametrize("change", [{"split": ["train"] * 8 + ["validation"] * 32}, {"label": "benign"}, {
    "excluded": np.where(np.arange(40) % 4 // 2, "no lesion_box", "")}])
def test_too_few_films_for_five_folds_are_no_reason_to_stop(caplog, change):
    warn_of_giveaways(*make_table(20, **change), "breast", 0)
    assert not list_warnings(caplog)


def test_folds_are_those_of_the_run_even_where_films_are_excluded():
    films, _ = make_table(30)
    films.loc[::7, "excluded"] = "no lesion_box"
    dealt = baseline.choose_training_films(films, 5)["fold"]
    assert dealt.equals(split_patients(films, 0, 5)["fold"][films["excluded"] == ""])
