"""Both scripts end to end, as a user runs them: on a dozen phantoms, for one epoch, without a network."""
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from tiny import common, copy_program, edit, finish_process, start_process


NAMES = ("resnet50", "vgg16")
FILES = {"settings.json", "split.csv", "history.csv", "training_curves.png", "metrics.json", "predictions.csv",
         "confusion_matrix.png", "roc_curve.png", "precision_recall.png", "calibration.png", "gradcam",
         "grad_cam_example.png", "films.png", "model.keras", "summary.md", "maps.npy", "fingerprints.npy",
         "properties.csv"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (console, run folder)} of both scripts, side by side in one folder with few phantoms."""
    folder = copy_program(tmp_path_factory.mktemp("scripts") / "program")
    for name in NAMES:
        text = (REPOSITORY / f"{name}.py").read_text("utf-8")
        (folder / f"{name}.py").write_text(edit(text, {"EPOCHS": 1, "MIXED_PRECISION": False}), "utf-8")
    subprocess.run([sys.executable, folder / "data" / "phantoms" / "prepare.py"], check=True, capture_output=True)
    processes = [start_process([folder / f"{name}.py"], folder) for name in NAMES]
    consoles = [finish_process(process) for process in processes]
    folders = [next((folder / "outputs").glob(f"{name}-*/")) for name in NAMES]
    return dict(zip(NAMES, zip(consoles, folders, strict=True), strict=True))


@pytest.fixture(params=NAMES)
def finished(request, runs):
    """(name, console, run folder) of one of them."""
    return request.param, *runs[request.param]


def test_a_run_leaves_every_file(finished):
    name, _, run = finished
    assert re.fullmatch(rf"{name}-unfrozen50-[0-9a-f]{{6}}", run.name)
    figures_too = {name.replace(".png", ".pdf") for name in FILES - {"films.png"}}
    assert {path.name for path in run.iterdir()} == FILES | figures_too
    assert {"runs.csv", "report.html"} < {path.name for path in run.parent.iterdir()}
    assert not [path.name for path in run.parent.iterdir() if path.name.startswith(".") and path.name != ".cache"]
    predictions = pd.read_csv(run / "predictions.csv")
    counts = predictions.groupby(["label", "predicted"]).size().clip(upper=1)
    overlays = [path.name for path in (run / "gradcam").iterdir()]
    assert len(overlays) == counts.sum()
    pattern = r"(true|false)_(positive|negative)_01_synthetic_\w+\.png"
    assert all(re.fullmatch(pattern, overlay) for overlay in overlays)


def test_the_files_agree_with_each_other(finished):
    name, _, run = finished
    split = pd.read_csv(run / "split.csv")
    assert split.columns[:4].tolist() == ["path", "label", "patient_id", "split"]
    assert split["group"].equals(split["patient_id"]), "no two phantoms show the same picture"
    assert split.groupby("patient_id")["split"].nunique().max() == 1
    predictions = pd.read_csv(run / "predictions.csv")
    columns = ["path", "patient_id", "label", "probability", "predicted", "logit"]
    assert predictions.columns[:6].tolist() == columns
    assert predictions["path"].tolist() == split.loc[split["split"] == "validation", "path"].tolist()
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    called = predictions["probability"] >= 0.5
    assert predictions["predicted"].eq("malignant").tolist() == called.tolist()
    assert metrics["accuracy"] == pytest.approx((predictions["label"] == predictions["predicted"]).mean())
    assert metrics["validation_images"] == len(predictions)
    assert metrics["validation_patients"] == predictions["patient_id"].nunique()
    assert metrics["pointing_game"]["images"]["images"] == len(predictions)
    history = pd.read_csv(run / "history.csv")
    assert history["epoch"].tolist() == [1]
    assert np.isfinite(history[["loss", "accuracy", "val_loss", "val_accuracy"]]).all(axis=None)
    assert history["val_accuracy"].iloc[-1] == pytest.approx(metrics["accuracy"])
    settings = json.loads((run / "settings.json").read_text("utf-8"))
    assert settings["constants"]["LEARNING_RATE"] == {"resnet50": 1e-4, "vgg16": 5e-5}[name]
    assert settings["constants"]["BATCH_SIZE"] == 13
    assert settings["constants"].keys() == common.CONSTANTS.keys()
    assert settings["model"]["backbone"] == name
    assert settings["weights"]["pretrained"] is False
    assert settings["collection"]["images"] == len(split)
    assert settings["collection"]["patients"] == 10


def test_everything_states_what_the_run_is_worth(finished):
    _, console, run = finished
    files = [run / name for name in FILES if name.endswith((".csv", ".json"))]
    files += [run.parent / "runs.csv", run.parent / "report.html"]
    for text in (console, *(file.read_text("utf-8") for file in files)):
        assert "synthetic" in text
        assert "only that the pipeline works" in text
        assert "XLA" not in text


def test_the_console_tells_the_story_and_is_kept(finished):
    name, console, run = finished
    kept = "\n".join(json.loads((run / "settings.json").read_text("utf-8"))["console"])
    for text in (console, kept):
        for words in ("20 images of 10 patients", "training set: ", "validation set: ", "device", "random weights",
                      "No ImageNet", f"{name}: the top", "trainable", run.name):
            assert words in text
    for words in ("epoch 1 of 1", "accuracy", "AUC", "Grad-CAM", "finished"):
        assert words in console
    assert "Traceback" not in console
    assert "Warning" not in console


def test_the_models_load_in_plain_keras_and_take_raw_images(runs, tmp_path):
    code = ("import json, keras, numpy, sys; images = numpy.load(sys.argv[1])[..., None].repeat(3, axis=-1);"
            "models = [keras.models.load_model(file) for file in sys.argv[2:]];"
            "assert not any(model.compiled for model in models);"
            "print(json.dumps([model.predict(images, verbose=0).ravel().tolist() for model in models]))")
    folders = [folder for _, folder in runs.values()]
    tables = [pd.read_csv(folder / "predictions.csv") for folder in folders]
    data = folders[0].parent.parent / "data" / "phantoms"
    np.save(tmp_path / "images.npy", [common.reading.read_image(data / path, "breast")[0]
                                      for path in tables[0]["path"]])
    arguments = [sys.executable, "-c", code, tmp_path / "images.npy", *(run / "model.keras" for run in folders)]
    probabilities = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    for found, table in zip(probabilities, tables, strict=True):
        assert np.allclose(found, table["probability"], atol=1e-5)


def test_the_scripts_differ_in_their_backbone_only():
    texts = [(REPOSITORY / f"{name}.py").read_text("utf-8") for name in NAMES]
    lines = [text.splitlines() for text in texts]
    assert sum(first != second for first, second in zip(*lines, strict=True)) <= 14
    mains = [text[text.index("def main(") :] for text in texts]
    assert mains[0] == mains[1]
