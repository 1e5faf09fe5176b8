"""The page over all runs answers which setting is better, and how sure that is. Nothing is trained here."""
import html
import json
import logging
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from data import CLASSES
from data.results import comparison, metrics

CONSTANTS = {
    "DATA_DIR": "data/phantoms", "OUTPUT_DIR": "outputs", "CROP": "breast", "FOLD": 0, "WEIGHTS": "imagenet",
    "UNFROZEN_FRACTION": 0.5, "LEARNING_RATE": 1e-4, "EPOCHS": 7, "BATCH_SIZE": 13, "SEED": 0, "SPLIT_SEED": 0,
    "MIXED_PRECISION": "auto", "BRIGHTNESS": 0.1, "CONTRAST": 0.2, "SATURATION": 0.2, "HEAD_UNITS": 256,
    "DROPOUT": 0.3, "THRESHOLD": 0.5,
}
PICTURES = ("films.png", "confusion_matrix.png", "roc_curve.png", "precision_recall.png", "training_curves.png",
            "grad_cam_example.png")


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def write_run(tmp_path):
    """Write the folder of a run: of 200 films of 100 patients, a fifth is held out, scored with some skill."""
    clock = iter(range(1_700_000_000, 1_800_000_000))

    def write(name, backbone="vgg16", skill=1.0, note="", collection="", given=False, weights="aaaa", seed=0,
              keep=1.0, floats=("float32",), pretrained=True, device="CPU with 2 cores", keras="3.15.1",
              **constants):
        versions = {"tensorflow": "2.21.0", "keras": keras}
        constants, numbers = CONSTANTS | constants, np.arange(200)
        split = pd.DataFrame({"path": [f"{number:04d}" for number in numbers]})
        split["label"] = np.take(CLASSES, numbers // 2 % 2)
        split["patient_id"] = split["group"] = [f"{number // 2:03d}" for number in numbers]
        split["film_sha256"] = collection + split["path"]
        held_out = numbers // 4 % 5 == (0 if given else constants["FOLD"])
        split["split"] = np.where(held_out, "validation", "train")
        films = split[held_out].head(int(keep * held_out.sum()))
        labels = films["label"].eq("malignant").to_numpy(int)
        noise = np.random.default_rng(seed + 10 * constants["FOLD"]).standard_normal(len(films))
        scores = np.clip(0.5 + 0.3 * skill * (labels - 0.5) + 0.2 * noise, 0, 1)
        (folder := tmp_path / name).mkdir()
        split.to_csv(folder / "split.csv", index=False)
        baseline = 0.2 * labels + np.random.default_rng(constants["FOLD"]).random(len(films))
        films[["path", "patient_id", "label"]].assign(probability=scores, baseline=baseline).to_csv(
            folder / "predictions.csv", index=False)
        results = metrics.measure(labels, scores, films["group"], constants["SEED"], constants["THRESHOLD"])
        results["baseline"] = {"auc": 0.6, "ci95": {"auc": [0.5, 0.7]}}
        (folder / "metrics.json").write_text(json.dumps(results | {"note": note, "side": "validation"}))
        (folder / "settings.json").write_text(json.dumps({
            "note": note, "constants": constants, "model": {"backbone": backbone, "floats": floats},
            "weights": {"origin": "a file", "pretrained": pretrained, "sha256": weights},
            "split": {"given": given}, "seconds": {"training": 120.0}, "versions": versions, "device": device,
        }))
        os.utime(folder / "settings.json", (next(clock),) * 2)
        for picture in PICTURES:
            (folder / picture).touch()
        return folder

    return write


def strip_tags(source):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", source)).split())


class Page(HTMLParser):
    """report.html taken apart: tags with attributes, all text, rows of tables as dicts."""

    def __init__(self, source):
        super().__init__()
        self.source, self.text, self.tags, self.tables = source, strip_tags(source), [], []
        self.feed(source)
        self.answers = [strip_tags(text) for text in self.find("strong")[1:]]
        for table in self.find("table"):
            rows = [re.findall("(?s)<t[hd].*?</t[hd]>", row) for row in re.findall("(?s)<tr.*?</tr>", table)]
            header, *rows = [list(map(strip_tags, row)) for row in rows]
            self.tables.append([dict(zip(header, row, strict=True)) for row in rows])
        self.rows = [row for table in self.tables for row in table]
        self.names = list(map(strip_tags, self.find("h3")))

    def find(self, tag):
        return re.findall(f"<{tag}[ >].*?</{tag}>", self.source, re.DOTALL)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.fixture
def compare(tmp_path):
    """The page and runs.csv over the runs that have been written."""

    def run():
        comparison.compare(tmp_path)
        table = pd.read_csv(tmp_path / "runs.csv", dtype=str, keep_default_na=False)
        return Page((tmp_path / "report.html").read_text("utf-8")), table.set_index("run")

    return run


def read_predictions(*folders):
    """(labels, scores, patients, folds) of the held-out films of all runs."""
    tables = [pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str}) for folder in folders]
    folds = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    table = pd.concat(tables)
    labels = table["label"].eq("malignant").to_numpy(int)
    return labels, table["probability"].to_numpy(), table["patient_id"].to_numpy(), folds


def test_what_differs_has_columns_and_names_say_no_more_than_is_needed(write_run, compare):
    write_run("a", "resnet50", UNFROZEN_FRACTION=0.5)
    write_run("b", "resnet50", UNFROZEN_FRACTION=0.625)
    write_run("c", "densenet121", CROP=None)
    page, _ = compare()
    assert {(row["backbone"], row["CROP"], row["trainable layers"]) for row in page.rows} == {
        ("ResNet50", "breast", "50 %"), ("ResNet50", "breast", "62.5 %"), ("densenet121", "None", "50 %")}
    assert {*page.names} == {"ResNet50, 50 %", "ResNet50, 62.5 %", "densenet121, 50 %"}
    (shared,) = (strip_tags(text) for text in page.find("p") if "The same in all" in text)
    for text in ("EPOCHS 7", "LEARNING_RATE 0.0001", "HEAD_UNITS 256", "WEIGHTS imagenet", "SPLIT_SEED 0",
                 "Keras 3.15.1", "device CPU", "floats float32"):
        assert text in shared
    assert not re.search("trainable|UNFROZEN|CROP|FOLD| SEED|DATA_DIR|OUTPUT_DIR|aaaa|code", shared)


def test_every_constant_tells_settings_apart_but_where_the_films_lie(write_run, compare):
    write_run("a", FOLD=0)
    write_run("b", FOLD=1, DATA_DIR="elsewhere", OUTPUT_DIR="elsewhere", BATCH_SIZE=13.0)
    assert len(compare()[0].rows) == 1
    apart = {"DATA_DIR", "OUTPUT_DIR", "FOLD", "SPLIT_SEED", "SEED", "WEIGHTS", "MIXED_PRECISION", "SATURATION"}
    changed = CONSTANTS.keys() - apart
    for number, name in enumerate(changed):
        write_run(f"changed {name}", **{name: 0.25, "FOLD": number % 5})
    assert len(compare()[0].rows) == 1 + len(changed)


def test_what_else_decides_a_result_is_never_pooled_but_named(write_run, compare):
    """An AUC of .97 of all folds became .77 where fold 0 of another Keras was added. "auto" is no precision."""
    folders = [write_run(f"a{fold}", skill=3.0, FOLD=fold) for fold in range(5)]
    labels, scores, patients, folds = read_predictions(*folders)
    expected = metrics.with_interval(metrics.measure(labels, scores, patients, folds=folds), "auc")
    assert expected > "0.9"
    write_run("other release", keras="3.14.0", skill=-3.0)
    write_run("other device", device="NVIDIA A100", skill=-3.0)
    write_run("other floats", floats=("bfloat16", "float32"), skill=-3.0)
    file = write_run("other code", skill=-3.0) / "settings.json"
    edit_json(file, versions=json.loads(file.read_text())["versions"] | {"code": "c0de"})
    write_run("same", MIXED_PRECISION=False, device="CPU with 64 cores", skill=3.0)
    page, table = compare()
    (first,), others = page.tables
    assert (first["AUC"], first["held out"]) == (expected, "all folds 200 mammograms of 100 patients")
    decisive = ["Keras", "device", "floats", "code"]
    assert [first[name] for name in decisive] == ["3.15.1", "CPU", "float32", "not recorded"]
    assert {tuple(row[name] for name in decisive) for row in others} == {
        ("3.14.0", "CPU", "float32", "not recorded"), ("3.15.1", "GPU", "float32", "not recorded"),
        ("3.15.1", "CPU", "bfloat16 and float32", "not recorded"), ("3.15.1", "CPU", "float32", "c0de")}
    assert table.loc["other release", ["TensorFlow", "Keras", "device"]].tolist() == ["2.21.0", "3.14.0", "CPU"]


def test_weights_are_what_they_hold_not_where_they_lie(write_run, compare):
    """Random ones are another draw with another SEED."""
    write_run("a", WEIGHTS="imagenet")
    write_run("b", WEIGHTS="~/x/imagenet.h5", FOLD=1)
    (row,) = compare()[0].rows
    assert row["held out"] == "folds 0, 1 only 80 mammograms of 40 patients"
    write_run("c", WEIGHTS=r"C:\y\imagenet.h5", weights="bbbb")
    for seed in range(2):
        write_run(f"random {seed}", weights=f"random {seed}", pretrained=False, seed=seed, SEED=seed)
    rows = compare()[0].rows
    assert {row["WEIGHTS"] for row in rows} == {"imagenet.h5 aaaa", "imagenet.h5 bbbb", "random"}
    assert [row["trainings"][0] for row in rows if row["WEIGHTS"] == "random"] == ["2"]


def test_several_trainings_of_a_setting_are_one_row(write_run, compare):
    """With the same SEED for the split; an interval and a difference cover patients and trainings."""
    folders, trainings = {}, {}
    for dropout, seeds in ((0.3, range(3)), (0.5, range(2))):
        runs = [[write_run(f"{dropout} {seed} {fold}", seed=seed + 3 * fold, SEED=seed, FOLD=fold, DROPOUT=dropout,
                           skill=3 * dropout) for fold in range(2)] for seed in seeds]
        folders[dropout] = runs
        trainings[dropout] = [read_predictions(*run)[1] for run in runs]
    for seed in range(7, 10):
        write_run(f"one fold only {seed}", SEED=seed, DROPOUT=0.5, skill=-5.0)
    page, _ = compare()
    first, second = page.rows
    labels, _, patients, folds = read_predictions(*folders[0.3][0])
    for row, scores in ((first, trainings[0.5]), (second, trainings[0.3])):
        expected = metrics.measure_trainings(labels, scores, patients, folds=folds)
        for name in ("AUC", "accuracy", "F1"):
            assert row[name] == metrics.with_interval(expected, name.lower())
        assert row["trainings"] == f"{len(scores)} SD of AUC {expected['sd']['auc']:.2f}"
        assert row["held out"] == "folds 0, 1 only 80 mammograms of 40 patients"
    difference = metrics.compare_aucs(labels, trainings[0.5], trainings[0.3], patients, folds)
    assert second["AUC of the best minus this"] == "{:+.2f} [{:.2f}, {:.2f}]".format(*difference)


def test_one_sentence_says_which_setting_is_better(write_run, compare):
    write_run("a", skill=2.5)
    assert compare()[0].answers == [f"VGG16 is the only setting: AUC {compare()[0].rows[0]['AUC']}."]
    write_run("b", skill=2.5, seed=1, DROPOUT=0.5)
    page, _ = compare()
    assert page.answers == [f"No setting can be told from the best ({page.names[0]}): all differences include 0."]
    write_run("c", "resnet50", skill=-1.0, seed=2)
    page, _ = compare()
    best, difference = page.names[0], page.rows[-1]["AUC of the best minus this"]
    assert page.answers == [f"{best} is better than ResNet50, DROPOUT 0.3: {difference} (one training of each);"
                            f" 1 other setting cannot be told from the best."]
    for fold in range(2):
        write_run(f"d{fold}", "resnet50", FOLD=fold, skill=-2.0, seed=3, DROPOUT=0.1)
    (answer,) = compare()[0].answers
    assert all(re.search(rf"VGG16, DROPOUT {dropout} is better than ResNet50, DROPOUT 0.1: \+", answer)
               for dropout in (0.3, 0.5)), "on the films of both"


def test_folds_are_pooled_at_the_threshold_of_the_setting(write_run, compare):
    """Of repeats of a fold the newest counts."""
    write_run("z-older", skill=-1.0, THRESHOLD=0.6)
    folders = [write_run(f"vgg16-{fold}", FOLD=fold, skill=1 - fold / 2, THRESHOLD=0.6) for fold in range(3)]
    (row,) = compare()[0].rows
    labels, scores, patients, folds = read_predictions(*folders)
    expected = metrics.measure(labels, scores, patients, 0, 0.6, folds)
    names = {name: metrics.TITLES.get(name, name) for name in (*comparison.METRICS, "auc")}
    assert {header: row[header] for header in names.values()} == {
        header: metrics.with_interval(expected, name) for name, header in names.items()}
    assert row["held out"] == "folds 0, 1, 2 only 120 mammograms of 60 patients"


def test_what_the_files_alone_give_away_stands_beside_each_setting(write_run, compare):
    """But not beside a run of a version that did not measure it."""
    folders = [write_run(f"a{fold}", FOLD=fold) for fold in range(2)]
    older = write_run("b", DROPOUT=0.5)
    page, table = compare()
    cell = page.tables[0][0]["file properties alone"]
    labels, scores, patients, folds = read_predictions(*folders)
    alone = pd.concat([pd.read_csv(folder / "predictions.csv")["baseline"] for folder in folders])
    results = metrics.measure(labels, alone, patients, folds=folds)
    difference = metrics.compare_aucs(labels, scores, alone, patients, folds)
    assert cell == f"{comparison.with_interval(results, 'auc')} AUC of the network minus this " + \
        "{:+.2f} [{:.2f}, {:.2f}]".format(*difference)
    names = ["baseline_auc", "baseline_auc_low", "baseline_auc_high"]
    assert table.loc["b", names].tolist() == ["0.6", "0.5", "0.7"]
    predictions = pd.read_csv(older / "predictions.csv", dtype=str).drop(columns="baseline")
    predictions.to_csv(older / "predictions.csv", index=False)
    cells = {row["DROPOUT"]: row["file properties alone"] for row in compare()[0].rows}
    assert cells == {"0.3": cell, "0.5": "not recorded"}


def test_the_first_picture_of_a_section_is_a_contact_sheet_of_each_crop(write_run, compare):
    for name in ("a", "b"):
        write_run(name, FOLD=int(name == "b"))
    write_run("c", CROP="lesion")
    write_run("d", collection="other")
    sources = [attributes["src"] for tag, attributes in compare()[0].tags if tag == "img"]
    assert [source for source in sources if "films" in source] == ["b/films.png", "c/films.png", "d/films.png"]
    assert sources[:2] == ["b/films.png", "c/films.png"]


def test_films_are_ranked_by_their_logits(write_run, compare):
    """Of confident films the probabilities are all 1 in nine digits."""
    file = write_run("a") / "predictions.csv"
    predictions = pd.read_csv(file, dtype={"path": str, "patient_id": str})
    predictions.assign(logit=20 + 10 * predictions["probability"], probability=1).to_csv(file, index=False)
    (row,) = compare()[0].rows
    auc = sklearn.metrics.roc_auc_score(predictions["label"] == "malignant", predictions["probability"])
    assert float(row["AUC"].split()[0]) == pytest.approx(auc, abs=0.0051)


def test_a_given_split_is_never_pooled_and_a_single_setting_compared_with_nothing(write_run, compare):
    write_run("a", "densenet121", given=True, FOLD=0, SEED=3)
    newest = write_run("b", "densenet121", given=True, FOLD=1, SEED=3)
    page, _ = compare()
    (row,) = page.rows
    results = json.loads((newest / "metrics.json").read_text())
    assert row["AUC"] == comparison.with_interval(results, "auc")
    assert (row["backbone"], row["held out"]) == ("densenet121", "given split 40 mammograms of 20 patients")
    assert not re.search("best minus|optimistic|Bonferroni", page.text)


def test_the_test_set_is_the_same_whatever_fold_was_held_out(write_run, compare):
    for name, fold, skill in (("vgg16", 0, 3.0), ("densenet121", 1, 0.0)):
        folder = write_run(name, name, FOLD=fold, skill=skill)
        source = write_run(f"{name} on the test set", name, skill=skill)
        split = pd.read_csv(source / "split.csv", dtype=str)
        tested = split["split"].eq("validation")
        for place in (source, folder):
            split.assign(split=np.where(tested, "test", "train")).to_csv(place / "split.csv", index=False)
        edit_json(source / "metrics.json", side="test")
        shutil.move(source, folder / "test")
        predictions = pd.read_csv(folder / "predictions.csv", dtype=str)
        predictions[["path", "label"]] = split.loc[~tested, ["path", "label"]].to_numpy()[: len(predictions)]
        predictions.to_csv(folder / "predictions.csv", index=False)
    page, _ = compare()
    rows = next(table for table in page.tables if "test set" in table[0]["held out"])
    assert [row["backbone"] for row in rows] == ["VGG16", "densenet121"]
    assert rows[0]["held out"] == rows[1]["held out"]
    assert any(answer.startswith("VGG16 is better than densenet121") for answer in page.answers)


def test_models_that_were_validated_elsewhere_are_never_pooled(write_run, compare):
    """Not even two folds of one setting, whose five trainings are five models."""
    write_run("trained")
    for fold in range(2):
        write_run(f"trained{fold}-on-other", given=True, collection="other", FOLD=fold, skill=fold,
                  TRAINED_ON="data/phantoms", MODEL=f"trained{fold}")
    page, _ = compare()
    ordinary, elsewhere = sorted(page.tables, key=len)
    assert [row["backbone"] for row in ordinary] == ["VGG16"]
    assert {(row["MODEL"], row["held out"]) for row in elsewhere} == {
        (f"trained{fold}", "other collection 40 mammograms of 20 patients") for fold in range(2)}
    first, second = (text for text in map(strip_tags, page.find("p")) if "The same in all" in text)
    assert "TRAINED_ON" not in first
    assert "TRAINED_ON phantoms" in second


def test_a_section_holds_the_runs_on_the_same_films_and_split(write_run, compare):
    write_run("a", DATA_DIR="data/phantoms")
    write_run("b", DATA_DIR="/elsewhere/phantoms", DROPOUT=0.5)
    write_run("other films", collection="others", DATA_DIR="/films/ddsm-1.0")
    write_run("other folds", SPLIT_SEED=1)
    write_run("trained again", SEED=1)
    edit_json(write_run("other test set") / "settings.json", split={"given": False, "dealt": "other films"})
    write_run("no folds", given=True, SPLIT_SEED=2)
    for name, given, collection, column, value in (
            ("other patients", False, "", "group", "000"), ("another split", True, "", "split", "train"),
            ("excluded", True, "others", "split", "excluded")):
        file = write_run(name, given=given, collection=collection) / "split.csv"
        split = pd.read_csv(file, dtype=str)
        split.loc[:7, column] = value
        split.to_csv(file, index=False)
    page, _ = compare()
    assert sorted(map(strip_tags, page.find("h2"))) == [
        "ddsm-1.0: 200 mammograms of 100 patients", "phantoms: 192 mammograms of 96 patients",
        *["phantoms: 200 mammograms of 100 patients"] * 4, "phantoms: 200 mammograms of 97 patients"]
    assert sorted(map(len, page.tables)) == [1, 1, 1, 1, 1, 2, 2], "two given splits; two settings"


def test_runs_of_the_version_in_which_seed_dealt_the_folds_keep_their_section(write_run, compare):
    write_run("now", SPLIT_SEED=1)
    for seed in (1, 2):
        file = write_run(f"then {seed}", SEED=seed) / "settings.json"
        constants = json.loads(file.read_text())["constants"]
        edit_json(file, constants={name: value for name, value in constants.items() if name != "SPLIT_SEED"})
    assert [row["trainings"][0] for row in compare()[0].rows] == ["2", "1"]


def test_the_best_is_compared_on_the_films_of_all_shared_folds_at_the_level_of_all_pairs(write_run, compare):
    best = [write_run(f"a{fold}", skill=2.0, FOLD=fold) for fold in range(3)]
    second = [write_run(f"b{fold}", skill=0.5, seed=1, FOLD=fold, DROPOUT=0.5) for fold in range(1, 4)]
    third = write_run("c", skill=0.1, seed=2, CROP="lesion", keep=0.5)
    write_run("d", skill=-2.0, FOLD=4, DROPOUT=0.1)
    page, _ = compare()
    (first,), others = page.tables
    cells = {(row["CROP"], row["DROPOUT"]): row["AUC of the best minus this"] for row in others}
    for name, first_folds, other_folds in ((("breast", "0.5"), best[1:], second[:2]),
                                           (("lesion", "0.3"), best[:1], [third])):
        labels, scores, patients, folds = read_predictions(*other_folds)
        reference = read_predictions(*first_folds)[1][: len(labels)]
        aucs = [metrics.measure(labels, part, patients, folds=folds)["auc"] for part in (reference, scores)]
        expected = metrics.compare_aucs(labels, reference, scores, patients, folds, 1 - 0.05 / 6)
        assert cells[name] == "{:.2f} against {:.2f} on the {} common mammograms: {:+.2f} [{:.2f}, {:.2f}]".format(
            *aucs, len(labels), *expected)
    assert (first["CROP"], first["DROPOUT"], first["AUC of the best minus this"]) == ("breast", "0.3", "")
    assert cells["breast", "0.1"] == "no common mammograms"
    assert [row["held out"].split(" only ")[0] for row in others] == ["folds 1, 2, 3", "fold 0", "fold 4"]
    for text in ("Bonferroni", "With one training of each setting, they cover the variation", "optimistic"):
        assert text in page.text


HEADER = "path,patient_id,label,probability\n"
FILMS = HEADER + "0000,1,benign,0.5\n0001,1,benign,0.1\n"  # fine with another one, 0002,1,malignant,0.5
SPOILT = [
    *[("settings.json", text) for text in ("", "{", "[]", "[" * 10**5, "\0" * 99)],
    *[("settings.json", {"constants": value}) for value in (
        {}, None, CONSTANTS | {"a": {"b": 3}}, CONSTANTS | {"a": "x" * 10**6}, CONSTANTS | {"a\x1b[31m": 3})],
    *[("settings.json", {"constants": CONSTANTS | {name: value}}) for name, value in (
        ("THRESHOLD", "half"), ("THRESHOLD", float("nan")), ("SEED", -1), ("SEED", 0.5), ("SEED", 10**400),
        ("DATA_DIR", "\n"), ("WEIGHTS", [3]), ("FOLD", {}))],
    *[("settings.json", {name: value}) for name, value in (
        ("model", 3), ("model", {"backbone": "vgg16", "floats": "float32"}), ("weights", "imagenet"),
        ("split", {"given": "no"}), ("note", 3), ("note", "a\nb"), ("note", "\ud800"), ("seconds", [120]),
        ("versions", {"keras": 3}), ("device", None))],
    ("metrics.json", "{}"), ("metrics.json", {"side": "<b>"}),
    *[("metrics.json", {"ci95": {"auc": value}}) for value in (1, [0, 1, 1], [0, "1"])],
    *[("metrics.json", {"auc": value}) for value in ("0.7", True, float("inf"))],
    *[("metrics.json", {"baseline": value}) for value in (
        None, {}, {"auc": "0.6", "ci95": {"auc": [0, 1]}}, {"auc": 0.6, "ci95": {"auc": None}})],
    ("predictions.csv", "\x89PNG\n"), ("predictions.csv", HEADER), ("predictions.csv", FILMS),
    *[("predictions.csv", FILMS + row) for row in (
        "0002,1,malignant,high\n", "0002,1,malignant,nan\n", "0002,1,malignant,-1\n", "0002,1,malignant\n",
        "0002,1,normal,0.5\n", "0002,1,benign,0.5\n", "9999,1,malignant,0.5\n",
        "0002,1,malignant,0.5\n0002,1,malignant,0.5\n", "0002,1,malignant,0.5,0.5\n")],
    ("predictions.csv", FILMS.replace("patient_id", "fold") + "0002,2,malignant,0.5\n"),
    ("predictions.csv", FILMS.replace("patient_id", "path") + "0002,1,malignant,0.5\n"),
    ("predictions.csv", FILMS.replace("patient_id", "logit") + "0002,nan,malignant,0.5\n"),
    ("split.csv", "path,label\n0000,benign\n"), ("split.csv", "path,label,group,film_sha256,split\n"),
]


def test_no_bad_folder_prevents_the_page(write_run, compare, caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("mammograms"), "propagate", True)
    comparison.compare(tmp_path)
    assert not list(tmp_path.iterdir()), "there is no run"
    good = write_run("good")
    (good / "predictions.csv").write_text(FILMS + "0002,1,malignant,0.5\n")
    for number, (name, content) in enumerate(SPOILT):
        file = shutil.copytree(good, tmp_path / f"bad-{number:02d}") / name
        edit_json(file, **content) if isinstance(content, dict) else file.write_text(content)
    (write_run("bad-99") / "metrics.json").unlink()
    write_run(".unfinished")
    assert compare()[1].index.tolist() == ["good"]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == len({re.search(r"bad-\d\d", message)[0] for message in messages}) == len(SPOILT) + 1
    for message in messages:
        assert re.match(r"excluded from the comparison: .*(settings|metrics|predictions|split)\.(js|cs)", message)
        assert len(message) < 1000
        assert not re.search(r"Error|Errno|Traceback|object|dtype|[\x00-\x1f\ud800]", message)


def test_runs_csv_has_a_row_per_run_with_settings_and_metrics(write_run, compare, tmp_path):
    folder = write_run("b", CROP=None, note="synthetic phantoms")
    write_run("a", "resnet50", DROPOUT=0.5)
    _, table = compare()
    assert table.loc["a", ["backbone", "DROPOUT", "CROP", "FOLD"]].tolist() == ["resnet50", "0.5", "breast", "0"]
    assert table.loc["b", ["backbone", "CROP", "note"]].tolist() == ["vgg16", "None", "synthetic phantoms"]
    results = json.loads((folder / "metrics.json").read_text())
    for name, limits in results["ci95"].items():
        values = table.loc["b", [name, f"{name}_low", f"{name}_high"]].astype(float)
        assert values.tolist() == pytest.approx([results[name], *limits])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "runs.csv", "report.html"}


def test_what_was_typed_is_shown_and_every_link_leads_to_something(write_run, compare, tmp_path):
    nasty = "<script>alert('x')</script> & {run.__class__} \"$\\frac$\""
    write_run("a", note=nasty, DATA_DIR=nasty)
    write_run("b <b>#1 50%?'\"", nasty, WEIGHTS=nasty, weights="bbbb", CROP=nasty, **{nasty.upper(): "x"})
    page, _ = compare()
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert {(row["backbone"], row["CROP"], row["WEIGHTS"], row[nasty.upper()]) for row in page.rows} == {
        ("VGG16", "breast", "imagenet", "not recorded"), (nasty, nasty, "frac$\"", "x")}
    assert nasty in map(strip_tags, page.find("mark"))
    ids = {attributes.get("id") for _, attributes in page.tags}
    targets = [attributes["href" if tag == "a" else "src"] for tag, attributes in page.tags if tag in ("a", "img")]
    assert len(targets) == 2 * (1 + 1 + len(PICTURES) + 1), "a contact sheet is a link, too"
    assert all(target[1:] in ids or (tmp_path / unquote(target)).exists() for target in targets)
    assert all(len(attributes["alt"]) > 10 for tag, attributes in page.tags if tag == "img")
    assert "not for clinical use" in page.text


def test_nothing_that_a_run_folder_holds_becomes_a_tag(write_run, compare, tmp_path):
    """Wherever it stands: in names and values of all files, and in the name of the folder.

    What two runs share is shown apart from that in which they differ, here their backbones.
    """
    attack = "</p><script>alert(1)</script><img src=x onerror='alert(2)' \"> {attack} &amp;"

    def write(name, text, backbone):
        folder = write_run(name, note=text, floats=(text,), backbone=backbone, weights=text, seed=1,
                           **{name: text for name in CONSTANTS if name not in ("FOLD", "SEED", "THRESHOLD")})
        settings = json.loads((folder / "settings.json").read_text())
        settings["constants"] |= {"FOLD": text, text.upper(): text, "TRAINED_ON": text, "link": text, "run": text}
        edit_json(folder / "settings.json", **settings)
        results = json.loads((folder / "metrics.json").read_text())
        edit_json(folder / "metrics.json", **{text: 0.5}, note=text, ci95=results["ci95"] | {text: [0, 1]})
        for file in ("split.csv", "predictions.csv"):
            table = pd.read_csv(folder / file, dtype=str).assign(**{text: text, "link": text, "fold": text})
            table.to_csv(folder / file, index=False)
        return folder

    write("plain", "plain", "resnet50")
    write("other", "plain", "vgg16")
    expected, _ = compare()
    for name in ("plain", "other"):
        shutil.rmtree(tmp_path / name)
    names = [attack.replace("/", ""), "&lt;b onclick=x"]
    write(names[0], attack, attack)
    write(names[1], attack, attack + attack)
    page, table = compare()
    assert table.index.tolist() == names
    assert [(tag, list(attributes)) for tag, attributes in page.tags] == [
        (tag, list(attributes)) for tag, attributes in expected.tags]
    assert page.text.count("<script>alert(1)</script>") > 20, "it is shown"
    assert page.text.count("{attack} &amp;") > 20
    links = [value for _, names in page.tags for name, value in names.items() if name in ("href", "src")]
    assert all(re.match(r"#|%3C|%26lt", link) for link in links)


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_folder_whose_name_is_no_utf_8_is_compared(write_run, compare):
    folder = write_run("run")
    folder.rename(folder.with_name(os.fsdecode(b"\xff")))
    images = [attributes["src"] for tag, attributes in compare()[0].tags if tag == "img"]
    assert images == [f"%FF/{name}" for name in PICTURES]


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_the_page_fits_a_telephone(write_run, tmp_path):
    write_run("a_very_long_name" * 5, DATA_DIR="/a_very_long_name" * 9)
    write_run("b", "resnet50", WEIGHTS="/a_very_long_name" * 9)
    comparison.compare(tmp_path)
    (tmp_path / "frame.html").write_text(
        '<iframe id="page" src="report.html" width="390" height="800" onload="let d ='
        " document.getElementById('page').contentDocument; document.title = d.documentElement.scrollWidth\">")
    arguments = ["--headless", "--no-sandbox", "--disable-background-networking", "--allow-file-access-from-files",
                 f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run(["chromium", *arguments, (tmp_path / "frame.html").as_uri()], capture_output=True,
                         text=True, timeout=60, check=True).stdout
    assert int(re.search(r"<title>(\d+)</title>", dom)[1]) <= 390
