"""Runs with FOLD = "all", with a test set, and with sets that come with the data, on films of noise."""
import contextlib
import io
import json
import re
import shutil
import weakref
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from conftest import write_film
from scipy import special
from tiny import common, hasten, import_tiny, spoil

from data.results import metrics
from data.results.summary import write_summary

TEST = [f"{number}.png" for number in range(24, 32)]
LEAKS = ["0.png", "2.png", "3.png"]  # of the patient, the copy, and the other film of the patient with the copy
POOL = [f"{number}.png" for number in range(24) if f"{number}.png" not in LEAKS]


@pytest.fixture(scope="module", autouse=True)
def quick_runs():
    with hasten():
        yield


def mirror(source, copy):
    assert cv2.imwrite(str(copy), cv2.imread(str(source), cv2.IMREAD_UNCHANGED)[:, ::-1])


def write_labels(folder, split, **patients):
    """labels.csv of films of two views a patient, in these sets; patients: other names, by number of the film."""
    numbers = np.arange(len(split))
    names = [patients.get(f"film{number}", f"p{number // 2}") for number in numbers]
    labels = np.take(common.CLASSES, numbers // 2 % 2)
    paths = [f"{number}.png" for number in numbers]
    table = pd.DataFrame({"path": paths, "label": labels, "patient_id": names, "split": split})
    table.to_csv(folder / "labels.csv", index=False)


def read_table(file):
    return pd.read_csv(file, keep_default_na=False, dtype={"fold": str})


def read_json(file):
    return json.loads(file.read_text("utf-8"))


def predicts_one_class(results):
    counts = results["confusion_matrix"]
    return 0 in (counts["tp"] + counts["fp"], counts["tn"] + counts["fn"])


def read_summary(folder):
    return " ".join((folder / "summary.md").read_text("utf-8").split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(script, single, folder, console): runs with FOLD 2, then "all", on 24 films to train and 8 to test.

    Training film 0 is of a patient that is tested, and training film 3 is a mirrored copy of test film 24.
    """
    place = tmp_path_factory.mktemp("folds")
    for number in range(32):
        write_film(place / "films" / f"{number}.png", seed=number)
    mirror(place / "films" / "24.png", place / "films" / "3.png")
    write_labels(place / "films", ["train"] * 24 + ["test"] * 8, film0="tested", film31="tested")
    script = import_tiny(place, place / "films", FOLD=2, EPOCHS=1, WEIGHTS=None)
    models, optimizers, console = weakref.WeakSet(), weakref.WeakSet(), io.StringIO()
    script.earlier_models, script.optimizers_left = [], []
    compile_model, make_explainer = common.compile_model, common.make_explainer

    def watch_training(model, *arguments):
        script.earlier_models.append(len(models))
        compile_model(model, *arguments)
        models.add(model)
        optimizers.add(model.optimizer)

    def watch_evaluation(*arguments):
        script.optimizers_left.append(len(optimizers))
        return make_explainer(*arguments)

    with contextlib.redirect_stdout(console), pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "compile_model", watch_training)
        patch.setattr(common, "make_explainer", watch_evaluation)
        single = script.main()
        script.FOLD = "all"
        folder = script.main()
    return script, single, folder, console.getvalue()


def list_parts(folder):
    """The folders of the five folds, 0 to 4."""
    return [folder.with_name(name) for name in read_json(folder / "settings.json")["folds"]]


# ---- all folds ---------------------------------------------------------------------------------


def test_no_model_of_an_earlier_fold_is_in_memory_while_the_next_trains(trained):
    script = trained[0]
    assert script.earlier_models == [0] * 5
    assert script.optimizers_left == [0] * 7, "five folds and two tests; they have three times the weights' memory"


def test_all_folds_hold_every_patient_out_once_and_are_runs_of_their_own(trained):
    _, single, folder, console = trained
    assert re.fullmatch(r"tiny-unfrozen50-all-[0-9a-f]{6}", folder.name)
    assert console.count("finished: ") == 8, "five folds, all of them and two test sets: no fold is trained again"
    assert "4 of 5 folds remain" in console
    parts = list_parts(folder)
    assert parts[2] == single
    predictions = read_table(folder / "predictions.csv")
    assert sorted(predictions["path"]) == sorted(POOL), "every film outside of the test set once"
    for fold, part in enumerate(parts):
        assert read_json(part / "settings.json")["constants"]["FOLD"] == fold
        expected = read_table(part / "predictions.csv")
        found = predictions[predictions["fold"] == str(fold)]
        for column in ("path", "probability", "baseline"):
            assert found[column].tolist() == expected[column].tolist()
    split = read_table(folder / "split.csv").set_index("path")
    assert split["fold"][predictions["path"]].tolist() == predictions["fold"].tolist()
    assert split["fold"][TEST].eq("test").all()
    assert split["fold"][LEAKS].eq("excluded").all()
    assert split.loc[POOL].groupby("patient_id")["fold"].nunique().max() == 1
    settings = read_json(folder / "settings.json")
    assert settings["constants"]["FOLD"] == "all"


def test_the_result_of_all_folds_pools_counts_and_averages_aucs(trained):
    _, _, folder, console = trained
    results = read_json(folder / "metrics.json")
    predictions = read_table(folder / "predictions.csv")
    groups = read_table(folder / "split.csv").set_index("path")["group"][predictions["path"]]
    truth = predictions["label"].eq("malignant").to_numpy(int)
    scores = special.expit(predictions["logit"])
    expected = metrics.measure(truth, scores, groups, 0, 0.5, predictions["fold"])
    assert {name: results[name] for name in expected} == expected
    aucs = [sklearn.metrics.roc_auc_score(truth[rows], scores[rows])
            for rows in predictions.groupby("fold").indices.values()]
    assert results["auc"] == pytest.approx(np.mean(aucs))
    assert results["validation_patients"] == 11
    assert f"AUC {results['auc']:.2f}" in re.sub(" +", " ", console)
    for name in ("confusion_matrix.png", "roc_curve.pdf", "grad_cam_example.png", "training_curves.png"):
        assert (folder / name).is_file()
    table = read_table(folder / "folds.csv")
    assert table["auc"].tolist() == pytest.approx(aucs)
    assert table["films"].tolist() == predictions["fold"].value_counts(sort=False).tolist()
    for row in table.itertuples():
        part = read_json(folder.with_name(row.run) / "metrics.json")
        assert [row.accuracy_low, row.accuracy_high] == pytest.approx(part["ci95"]["accuracy"])


def test_a_damaged_fold_is_named_instead_of_pooled(trained, tmp_path):
    script, _, folder, _ = trained
    parts = [shutil.copytree(part, tmp_path / part.name) for part in list_parts(folder)]
    data = Path(script.DATA_DIR)
    settings, _ = common.start(vars(script), {"OUTPUT_DIR": str(tmp_path)})
    films, images, prints = common.read_films(common.find_films(data), data, settings.CROP, tmp_path)
    films = common.split_patients(common.group_duplicates(films, prints), 4, 0)
    repeated = (parts[0] / "predictions.csv").read_bytes()
    for name, change in (("settings.json", {"title": None}), ("maps.npy", Path.unlink), ("predictions.csv", b""),
                         ("predictions.csv", repeated)):  # each is noticed before the one that was spoilt earlier
        spoil(parts[1] / name, change)
        with pytest.raises(common.UserError, match=rf"{name}.* delete it and run its script again"):
            common.pool_folds(parts, films, images, prints, settings)


def test_the_summary_says_what_the_tables_say(trained):
    _, single, folder, _ = trained
    for place, words in ((single, "held out, stratified by class"), (folder, "trained without this patient")):
        text, flat = (place / "summary.md").read_text("utf-8"), read_summary(place)
        results = read_json(place / "metrics.json")
        alike = any(predicts_one_class(side) for side in (results, read_json(place / "test" / "metrics.json")))
        assert ("The same class was predicted for all mammograms." in flat) is alike
        for source in (results, results["per_patient"]):
            assert metrics.with_interval(source, "auc") in text
        for phrase in (words, "32 mammograms of 16 patients", "learning rate of 5e-05",
                       "exponential moving", "1 epochs with batches of 13", "not for clinical use",
                       "random weights",
                       f"Keras {common.keras.__version__}", "brightness was shifted by up to 10%"):
            assert phrase in flat
        assert "{" not in text


def test_the_summary_of_another_collection_does_not_speak_of_its_folds(trained, tmp_path):
    folder = shutil.copytree(trained[2], tmp_path / "elsewhere")
    spoil(folder / "settings.json", {"constants": {"TRAINED_ON": "data/others"}})
    read_table(folder / "split.csv").rename(columns={"fold": "split"}).to_csv(folder / "split.csv", index=False)
    write_summary(folder)
    summary = read_summary(folder)
    assert "The mean of their logits counts." in summary
    assert "model.keras; in the folder of the run" in summary
    for words in ("in two folds", "in a fold", "folds.csv"):
        assert words not in summary


def test_a_model_of_all_folds_has_seen_all_their_films(trained, tmp_path):
    script, _, folder, _ = trained
    labels = read_table(Path(script.DATA_DIR) / "labels.csv").set_index("path").loc[POOL]
    paths = [str(Path(script.DATA_DIR) / path) for path in POOL]
    labels.assign(path=paths, split="").to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(common.UserError, match=r"no mammogram that .* can be scored on .*in the training set"):
        common.validate(folder, tmp_path)


# ---- a test set --------------------------------------------------------------------------------


def test_a_test_set_is_scored_once_by_a_run_and_never_validated_on(trained):
    _, single, _, _ = trained
    split = read_table(single / "split.csv").set_index("path")["split"]
    assert sorted(split.index[split == "test"]) == TEST
    assert sorted(split.index[split == "excluded"]) == LEAKS
    assert sorted(split.index[split.isin(["train", "validation"])]) == sorted(POOL)
    validation, test = (read_table(place / "predictions.csv") for place in (single, single / "test"))
    assert sorted(validation["path"]) == sorted(split.index[split == "validation"]) != []
    assert sorted(test["path"]) == TEST
    leaks = read_table(single / "leaks.csv").set_index("path")
    assert leaks["tested_on"].to_dict() == {"0.png": "31.png", "2.png": "24.png", "3.png": "24.png"}
    assert leaks["trained_on"].eq("").all()
    results = read_json(single / "test" / "metrics.json")
    assert (results["side"], results["validation_images"], results["validation_patients"]) == ("test", 8, 5)
    summary, table = read_summary(single), read_table(single / "split.csv").query("split == 'test'")
    benign = table["group"][table["label"] == "benign"]
    for words in (f"A test set came with the data: {len(benign)} benign mammograms of {benign.nunique()} patients",
                  "These patients are in no other set.",
                  "A fifth of the training patients was held out", "| 8 test mammograms of 5 patients |",
                  "3 mammograms were excluded: its patient or picture", metrics.with_interval(results, "brier")):
        assert words in summary


def test_of_all_folds_the_mean_logit_counts_and_no_fold_is_scored_on_the_test_set(trained):
    script, single, folder, _ = trained
    parts = list_parts(folder)
    assert [part for part in parts if (part / "test").exists()] == [single], "which was run alone before"
    test = read_table(folder / "test" / "predictions.csv")
    paths = [Path(script.DATA_DIR) / path for path in test["path"]]
    logits = [special.logit(common.predict(part, paths)["probability"]) for part in parts]
    assert np.std(logits, axis=0).min() > 0, "five models"
    expected = special.expit(np.mean(logits, axis=0))
    assert np.allclose(test["probability"], expected, atol=1e-6)
    assert np.allclose(common.predict(folder, paths)["probability"], expected, atol=1e-6)
    runs = pd.read_csv(folder.parent / "runs.csv")
    assert sorted(runs["run"][runs["side"] == "test"]) == sorted([single.name, folder.name])
    summary = read_summary(folder)
    for words in ("without another fifth of the training patients",
                  "The test set was scored by the mean of their logits.", "| 8 test mammograms of"):
        assert words in summary


def test_a_run_that_was_stopped_before_the_test_set_scores_it_and_trains_nothing(trained, capsys):
    """As a second call of a complete run trains nothing; and the page has one row for all folds."""
    script, _, folder, _ = trained
    paths = [folder / "summary.md", *sorted((folder / "test").glob("*.*"))]
    before = [path.read_bytes() for path in paths]
    shutil.rmtree(folder / "test")
    paths[0].write_text("without the table of the test set")
    assert script.main() == folder
    console = capsys.readouterr().out
    assert "Epoch" not in console and "loss" not in console
    assert "on 8 test mammograms of 5 patients" in console
    assert [path.read_bytes() for path in paths] == before
    page = (folder.parent / "report.html").read_text("utf-8")
    rows = re.findall(r"(?s)<tr>(.*?)</tr>", page)
    assert sum("<td>all folds<br>21 mammograms<br>of 11 patients</td>" in row for row in rows) == 1


@pytest.mark.parametrize("all_folds", [False, True])
def test_predict_says_what_the_model_was_trained_on(trained, tmp_path, capsys, all_folds):
    script, single, folder, _ = trained
    split = read_table(single / "split.csv")
    for name in ("train", "validation", "test"):
        path = split["path"][split["split"] == name].iloc[0]
        mirror(Path(script.DATA_DIR) / path, tmp_path / f"mirrored {name}.png")
    write_film(tmp_path / "99.png", seed=99)
    (tmp_path / "broken.png").write_text("no film")
    table = common.predict(folder if all_folds else single, tmp_path)
    assert table.columns.tolist() == ["path", "probability", "predicted", "trained_on", "reason"]
    seen = {Path(row.path).stem: row.trained_on for row in table.itertuples()}
    assert seen == {"mirrored train": True, "mirrored validation": all_folds, "mirrored test": False, "99": False,
                    "broken": "unknown"}
    count = 2 if all_folds else 1
    assert f"the model was trained on {count} of 5 images or their patients" in capsys.readouterr().out
    copy = shutil.copytree(single, tmp_path / "copy")
    (copy / "fingerprints.npy").unlink()
    assert common.predict(copy, tmp_path / "99.png")["trained_on"].item() == "unknown"
    assert "it is unknown what its weights were trained on" in capsys.readouterr().out


# ---- which films -------------------------------------------------------------------------------


def test_split_seed_deals_the_patients_and_seed_does_not(trained, monkeypatch, tmp_path):
    """Nothing is trained here: what the datasets would be made of is enough."""
    script, single, _, _ = trained
    dealt = []

    def note(images, films, settings):
        dealt.append(films.set_index("path")["split"].to_dict())
        raise common.UserError("enough")

    monkeypatch.setattr(common, "make_datasets", note)
    for constants in ({"SEED": 1}, {"SPLIT_SEED": 1}):
        with pytest.raises(common.UserError, match="enough"):
            script.main(FOLD=2, OUTPUT_DIR=str(tmp_path / "outputs"), **constants)
    trained_on = read_table(single / "split.csv").set_index("path")["split"].to_dict()
    assert dealt[0] == trained_on != dealt[1]


def test_a_validation_set_and_a_test_set_of_the_data_are_used_as_they_are(tmp_path):
    """FOLD is not used. A picture is in both: the test set keeps it, the validation set loses its patient."""
    for number in range(30):
        write_film(tmp_path / "films" / f"{number}.png", seed=number)
    shutil.copy(tmp_path / "films" / "15.png", tmp_path / "films" / "29.png")
    write_labels(tmp_path / "films", ["train"] * 14 + ["val"] * 8 + ["test"] * 8)
    folder = import_tiny(tmp_path, tmp_path / "films", EPOCHS=1, WEIGHTS=None, FOLD="all").main()
    assert "-all-" not in folder.name, "a given validation set has no folds"
    split = read_table(folder / "split.csv").set_index("path")["split"]
    assert sorted(split.index[split == "excluded"]) == ["14.png", "15.png"]
    assert read_table(folder / "leaks.csv")["tested_on"].isin(["28.png", "29.png"]).all()
    for place, numbers in ((folder, range(16, 22)), (folder / "test", range(22, 30))):
        assert sorted(read_table(place / "predictions.csv")["path"]) == [f"{number}.png" for number in numbers]
    summary = read_summary(folder)
    assert "The split came with the data: training set" in summary
    assert "| 8 test mammograms of" in summary
    assert sorted(pd.read_csv(folder.parent / "runs.csv")["side"]) == ["test", "validation"]
    assert "test set" in (folder.parent / "report.html").read_text("utf-8")
