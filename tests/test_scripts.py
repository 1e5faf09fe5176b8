"""Both scripts end to end, as a user runs them, and their constants."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

import common

FILES = {"settings.json", "split.csv", "history.csv", "training_curves.png", "metrics.json", "predictions.csv",
         "confusion_matrix.png", "roc_curve.png", "gradcam", "grad_cam_example.png", "model.keras"}


def prepare_script(name, folder, **constants):
    """(command, environment) of a script in a copy of the repository with edited constants and no network."""
    for file in ("common.py", f"{name}.py", "data/phantoms/prepare.py"):
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        for constant, value in ({"EPOCHS": 2, "BENIGN_PATIENTS": 8, "MALIGNANT_PATIENTS": 6} | constants).items():
            text = re.sub(rf"^{constant} = .+?(?=  #)", f"{constant} = {value!r}", text, flags=re.MULTILINE)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return [sys.executable, folder / f"{name}.py"], os.environ | nowhere | {"KERAS_HOME": str(folder / "keras")}


def run_script(name, folder, surroundings=None, **constants):
    """Run a script as its user does, to its end."""
    command, environment = prepare_script(name, folder, **constants)
    return subprocess.run(command, cwd=folder.parent, env=environment | (surroundings or {}), capture_output=True,
                          text=True, encoding="utf-8", check=False)


@pytest.fixture(scope="module", params=["resnet50", "vgg16"])
def finished(request, tmp_path_factory):
    """(name, console, run folder) of a run on 28 phantoms that it makes first, with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    process = run_script(request.param, folder)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    (run,) = (folder / "outputs").glob("[!.]*/")
    return request.param, process.stdout, run


def test_a_run_leaves_every_file(finished):
    name, _, run = finished
    assert re.fullmatch(rf"{name}-unfrozen50-[0-9a-f]{{6}}", run.name)
    assert {path.name for path in run.iterdir()} == FILES
    predictions = pd.read_csv(run / "predictions.csv")
    outcomes = predictions.groupby(["label", "predicted"]).size().clip(upper=4).sum()
    overlays = [path.name for path in (run / "gradcam").iterdir()]
    assert len(overlays) == outcomes
    pattern = r"(true|false)_(positive|negative)_0[1-4]_synthetic_\w+\.png"
    assert all(re.fullmatch(pattern, overlay) for overlay in overlays)


def test_the_files_agree_with_each_other(finished):
    name, _, run = finished
    split = pd.read_csv(run / "split.csv")
    assert split.columns[:4].tolist() == ["path", "label", "patient_id", "split"]
    assert split["group"].equals(split["patient_id"]), "no two phantoms show the same picture"
    assert split.groupby("patient_id")["split"].nunique().max() == 1
    predictions = pd.read_csv(run / "predictions.csv")
    assert predictions.columns[:5].tolist() == ["path", "patient_id", "label", "probability", "predicted"]
    assert predictions["path"].tolist() == split.loc[split["split"] == "validation", "path"].tolist()
    metrics = json.loads((run / "metrics.json").read_text())
    truth = predictions["label"].eq("malignant").to_numpy(int)
    probabilities = predictions["probability"].to_numpy()
    groups = split.set_index("path").loc[predictions["path"], "group"]
    measured, _ = common.measure(truth, probabilities, groups)
    assert {key: metrics[key] for key in measured} == measured
    assert predictions["predicted"].eq("malignant").tolist() == (probabilities >= 0.5).tolist()
    assert metrics["validation_images"] == len(predictions)
    assert metrics["validation_patients"] == predictions["patient_id"].nunique()
    history = pd.read_csv(run / "history.csv")
    assert history["epoch"].tolist() == [1, 2]
    assert np.isfinite(history[["loss", "accuracy", "val_loss", "val_accuracy"]]).all(axis=None)
    assert history["val_accuracy"].iloc[-1] == pytest.approx(metrics["accuracy"])
    settings = json.loads((run / "settings.json").read_text())
    assert settings["constants"]["LEARNING_RATE"] == {"resnet50": 1e-4, "vgg16": 5e-5}[name]
    assert settings["constants"]["BATCH_SIZE"] == 13
    assert settings["weights"]["sha256"] is None
    assert {"find_images", "train", "evaluate", "explain", "report"} <= settings["seconds"].keys()


def test_everything_says_what_the_run_is_worth(finished):
    _, console, run = finished
    files = [run / name for name in FILES if name.endswith((".csv", ".json"))]
    files += [run.parent / "runs.csv", run.parent / "report.html"]
    for text in (console, *(file.read_text(encoding="utf-8") for file in files)):
        assert "synthetic" in text
        assert "only that the pipeline works" in text


def test_the_console_tells_the_story(finished):
    name, console, run = finished
    for words in ("28 images of 14 patients", "train ", "validation ", "device", "seed 0", "weights", "run folder",
                  f"layers of {name}", "parameters", "Epoch 2/2", run.name, "not for clinical use"):
        assert words in console


def test_the_model_loads_in_plain_keras_and_takes_raw_images(finished):
    _, _, run = finished
    predictions = pd.read_csv(run / "predictions.csv")
    data = run.parent.parent / "data" / "phantoms"
    images = [common.read_image(data / path, "breast")[0] for path in predictions["path"]]
    np.save(run.parent / "images.npy", images)
    code = ("import keras, numpy, sys; images = numpy.load(sys.argv[2])[..., None].repeat(3, axis=-1);"
            "model = keras.models.load_model(sys.argv[1]); assert not model.compiled;"
            "print(model.predict(images, verbose=0).ravel().tolist())")
    arguments = [sys.executable, "-c", code, run / "model.keras", run.parent / "images.npy"]
    printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    (run.parent / "images.npy").unlink()
    assert np.allclose(json.loads(printed), predictions["probability"], atol=1e-5)


def test_the_same_constants_give_the_same_bytes(finished, tmp_path):
    """In surroundings of other users, too."""
    name, _, run = finished
    strange = {"KERAS_BACKEND": "jax", "MPLBACKEND": "TkAgg", "LC_ALL": "de_DE.UTF-8", "PYTHONHASHSEED": "7"}
    process = run_script(name, tmp_path, strange)
    assert (process.returncode, process.stderr) == (0, "")
    (again,) = (tmp_path / "outputs").glob("[!.]*/")
    assert again.name == run.name
    for file in ("predictions.csv", "metrics.json", "history.csv", "split.csv"):
        assert (again / file).read_bytes() == (run / file).read_bytes()
    figures = [path.relative_to(run) for path in run.rglob("*.png")]
    assert all((again / figure).read_bytes() == (run / figure).read_bytes() for figure in figures)


# ---- constants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("UNFROZEN_FRACTION", 70), ("UNFROZEN_FRACTION", 0), ("UNFROZEN_FRACTION", "0.5"), ("FOLD", 5), ("FOLD", -1),
     ("FOLD", 0.5), ("BATCH_SIZE", 0), ("BATCH_SIZE", 13.0), ("BATCH_SIZE", True), ("EPOCHS", 0),
     ("LEARNING_RATE", 0), ("LEARNING_RATE", float("nan")), ("SEED", -1), ("SEED", "zero"), ("WEIGHTS", ""),
     ("WEIGHTS", 7), ("DATA_DIR", None), ("OUTPUT_DIR", " "), ("CROP", "Breast"),
     ("CROP", True)],
)
def test_a_wrong_constant_stops_at_once_and_is_named(script, monkeypatch, name, value):
    monkeypatch.setattr(script, name, value)
    with pytest.raises(common.UserError, match=rf"^{name} is {re.escape(repr(value))}, but has to be"):
        script.main()


def test_a_user_error_is_one_sentence_without_a_traceback(tmp_path):
    process = run_script("vgg16", tmp_path, DATA_DIR="nothing")
    assert process.returncode == 1
    assert "DATA_DIR" in process.stderr
    assert "Traceback" not in process.stderr
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [".cache"]


def test_the_scripts_differ_in_their_backbone_only():
    texts = [(REPOSITORY / f"{name}.py").read_text().splitlines() for name in ("resnet50", "vgg16")]
    assert len(texts[0]) == len(texts[1])
    assert sum(a != b for a, b in zip(*texts, strict=True)) <= 14


def test_paths_count_from_the_scripts_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.locate("data/phantoms") == REPOSITORY / "data" / "phantoms"
    assert common.locate("~/films") == tmp_path / "films"
    assert common.locate(tmp_path) == tmp_path


# ---- run folder --------------------------------------------------------------------------------


def test_the_name_changes_with_all_that_decides_the_results_and_with_nothing_else(named):
    record, films = named
    names = {common.name_run(record, films)}
    record["constants"] |= {"DATA_DIR": "/elsewhere", "OUTPUT_DIR": "/elsewhere"}
    assert names == {common.name_run(record, films)}
    others = {"CROP": "lesion", "EPOCHS": 8, "SEED": 1, "LEARNING_RATE": 1e-3, "UNFROZEN_FRACTION": 0.6}
    for name, value in others.items():
        names.add(common.name_run(record | {"constants": record["constants"] | {name: value}}, films))
    names.add(common.name_run(record | {"weights": {"sha256": "2"}}, films))
    names.add(common.name_run(record | {"head": {}}, films))
    names.add(common.name_run(record, films.assign(label="malignant")))
    names.add(common.name_run(record, films.assign(sha256="3")))
    assert len(names) == 10


def test_an_output_dir_that_cannot_be_written_and_missing_weights_stop_at_once(script, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(script, "OUTPUT_DIR", str(tmp_path / "file"))
    with pytest.raises(common.UserError, match=r"^OUTPUT_DIR: nothing can be written"):
        script.main()
    monkeypatch.setattr(script, "WEIGHTS", "nowhere.h5")
    with pytest.raises(common.UserError, match=r"^WEIGHTS is 'nowhere.h5', but there is no file"):
        script.main()
