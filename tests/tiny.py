"""What the tests of a run share: a backbone of ten layers, its script, its films, and processes that run it.

The script is made as the README says for another backbone: a copy of vgg16.py with another
build_backbone().
"""
import contextlib
import functools
import importlib.util
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import common  # before Keras: it chooses Keras' backend

import cv2
import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

import vgg16
from data.results import baseline, files

FOLDER = tempfile.TemporaryDirectory()  # of finish_run(), gone with the process
BACKBONE = '''def build_backbone(weights):
    """Ten layers with batch norm, which train in a moment; its "imagenet" weights are never there."""
    inputs = keras.Input((common.IMAGE_SIZE, common.IMAGE_SIZE, 3), name="image")
    tensor = keras.layers.Rescaling(1 / 255, name="scaled")(inputs)
    tensor = keras.layers.AveragePooling2D(4, name="small")(tensor)
    for name in ("low", "high"):
        tensor = keras.layers.Conv2D(8, 3, name=name)(tensor)
        tensor = keras.layers.BatchNormalization(name=f"{name}_norm")(tensor)
        tensor = keras.layers.ReLU(name=f"{name}_relu")(tensor)
        if name == "low":
            tensor = keras.layers.MaxPooling2D(4, name="pool")(tensor)
    backbone = keras.Model(inputs, tensor, name="tiny")
    if weights == "imagenet":
        raise Exception("URL fetch failure on https://example.invalid/tiny.h5")
    if weights:
        backbone.load_weights(weights)
    return backbone


'''


# ---- in this process ---------------------------------------------------------------------------


def edit(text, constants):
    """A source with other constants, each of which is there once and had another value."""
    for name, value in constants.items():
        edited, count = re.subn(rf"(?m)^{name} = .+?(?=  #|$)", lambda _, n=name, v=value: f"{n} = {v!r}", text)
        assert count == 1, f"{name} is there {count} times"
        assert edited != text, f"{name} is {value!r} anyway"
        text = edited
    return text


def write_tiny(file, **constants):
    """Copy vgg16.py to `file`, with the backbone above and other constants; in 32 bits on every machine."""
    head, rest = (REPOSITORY / "vgg16.py").read_text("utf-8").split("def build_backbone(weights):")
    _, tail = rest.split("def main(")
    constants = {"MIXED_PRECISION": False} | constants
    file.write_text(edit(f"{head}{BACKBONE}def main({tail}", constants), "utf-8")
    return file


def import_tiny(folder, data, **constants):
    """The tiny script as a module, on the films of a folder and with its outputs beside it, for 2 epochs."""
    file = write_tiny(folder / "tiny.py")
    spec = importlib.util.spec_from_file_location("tiny_script", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    vars(script).update({"DATA_DIR": str(data), "OUTPUT_DIR": str(folder / "outputs"), "EPOCHS": 2} | constants)
    return script


def prepare(folder, **constants):
    """The settings of vgg16.py in 32 bits with random weights, outputs in `folder`, these constants; seeded."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    changes = {"OUTPUT_DIR": str(folder), "WEIGHTS": None, "MIXED_PRECISION": False}
    settings, _ = common.start(vars(vgg16), changes | constants)
    return settings


def build_backbone(weights):
    """That of the tiny script."""
    namespace = {"common": common, "keras": common.keras}
    exec(BACKBONE, namespace)
    return namespace["build_backbone"](weights)


def build_tiny(settings, films):
    """(model, weights) of the tiny backbone, compiled, with the weights that the settings ask for."""
    backbone, weights = common.load_backbone(build_backbone, films, None, settings)
    return common.build_model(backbone, weights, settings), weights


def make_films(labels, held_out, **columns):
    """A table as split_patients() gives it: a patient each film, the last `held_out` of which are held out."""
    count = len(labels)
    names = [f"{number:03d}" for number in range(count)]
    films = pd.DataFrame({
        "path": [f"{name}.png" for name in names], "label": np.take(common.CLASSES, labels), "split": "train",
        "patient_id": names, "patient_from": "labels.csv", "lesion_box": "", "left": 0, "top": 0, "width": 100,
        "height": 100, "container": "8 bit PNG", "depth": 8, "format": "8 bit PNG, grey", "film_sha256": names,
        "image_sha256": names, "excluded": "", "group": names, "duplicate": False, "fold": "", "trained_on": "",
        "tested_on": "", "side": "", "view": "", "film_width": 100, "film_height": 100, "bytes": 5000})
    films.loc[count - held_out :, "split"] = "validation"
    return films.assign(**columns)


def make_noise(count, seed=0):
    """Images of noise: uint8 (count, IMAGE_SIZE, IMAGE_SIZE)."""
    return np.random.default_rng(seed).integers(0, 256, (count, common.IMAGE_SIZE, common.IMAGE_SIZE), np.uint8)


@contextlib.contextmanager
def hasten():
    """Runs with empty files for figures, without overlays to draw, and with a small forest for the baseline.

    These take longer than all else of a tiny run. test_report.py and test_scripts.py have real figures.
    """

    def touch(figure, file, title, note, suffixes=(".png", ".pdf"), dpi=200):
        for suffix in suffixes:
            file.with_suffix(suffix).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "write_figure", touch)
        patch.setattr(files, "write_figure", touch)
        patch.setattr(files, "draw_cases", lambda *_, **__: None)
        patch.setattr(baseline.FOREST, "n_estimators", 5)
        yield


def to_pixels(images):
    """Images as a model takes them: float32 (N, IMAGE_SIZE, IMAGE_SIZE, 3)."""
    return np.repeat(np.asarray(images)[..., None], 3, axis=-1).astype(np.float32)


@functools.cache
def finish_run():
    """(script, folder, console) of a tiny run on phantoms, one of which is a mirrored copy of another patient's.

    It is made once and read by many tests: none may change it.
    """
    place = Path(FOLDER.name)
    make_phantoms = runpy.run_path(str(REPOSITORY / "data" / "phantoms" / "prepare.py"))["make_phantoms"]
    make_phantoms(place / "films", benign=6, malignant=6)
    table = pd.read_csv(place / "films" / "labels.csv", dtype=str)
    film = cv2.imread(str(place / "films" / table["path"][0]), cv2.IMREAD_UNCHANGED)
    assert cv2.imwrite(str(place / "films" / "images" / "synthetic_copy.png"), film[:, ::-1])
    copy = {"path": "images/synthetic_copy.png", "label": table["label"][0], "patient_id": "another name"}
    table = pd.concat([table, pd.DataFrame([copy])]).fillna("")
    table.to_csv(place / "films" / "labels.csv", index=False)
    script = import_tiny(place, place / "films")
    console = io.StringIO()
    with contextlib.redirect_stdout(console), hasten():
        folder = script.main()
    return script, folder, console.getvalue()


def spoil(file, change):
    """Change a file of a run: by other bytes, or by a function of its path, or by other values in a JSON file."""
    if isinstance(change, dict):
        content = json.loads(file.read_text("utf-8"))
        for name, value in change.items():
            content[name] = content[name] | value if isinstance(value, dict) else value
        change = json.dumps(content).encode()
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        change(file)


# ---- in processes of their own -----------------------------------------------------------------


def copy_program(folder, painted=True):
    """A copy of the repository's program, in which the scripts work; with few phantoms, overlays and trees.

    There is a checkpoint after every epoch. painted: whether figures are more than empty files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in (REPOSITORY / "common.py", *REPOSITORY.glob("data/*.py"),
                 *REPOSITORY.glob("data/results/*.py"), REPOSITORY / "data/phantoms/prepare.py"):
        copy = folder / file.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for name, constants in (("data/phantoms/prepare.py", {"BENIGN_PATIENTS": 5, "MALIGNANT_PATIENTS": 5}),
                            ("common.py", {"CHECKPOINT_SECONDS": 0})):  # one after every epoch
        (folder / name).write_text(edit((folder / name).read_text("utf-8"), constants), "utf-8")
    changes = [("data/results/figures.py", "CASES = 4 ", "CASES = 1 "),
               ("data/results/baseline.py", "RandomForestClassifier(100,", "RandomForestClassifier(5,")]
    if not painted:
        paint = "figure.savefig(file.with_suffix(suffix), dpi=dpi, metadata=metadata)"
        changes.append(("data/results/figures.py", paint, "file.with_suffix(suffix).touch()"))
    for name, old, new in changes:
        source = (folder / name).read_text("utf-8")
        assert source.count(old) == 1, f"{old} is there {source.count(old)} times"
        (folder / name).write_text(source.replace(old, new), "utf-8")
    return folder


def start_process(arguments, folder, **environment):
    """A Python process that finds no network; a variable that is None is not there."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = os.environ | nowhere | {"KERAS_HOME": str(folder / "keras")} | environment
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.Popen([sys.executable, "-u", *map(str, arguments)], cwd=folder.parent, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")


def read_until(process, words):
    """The console of a process up to the first line with these words, which has to come."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return "".join(lines)
    raise AssertionError(f"ended before {words!r}: " + "".join(lines))


def finish_process(process):
    """The rest of the console of a process that has to end well."""
    console = process.communicate()[0]
    assert process.returncode == 0, console
    return console


def read_results(outputs):
    """Everything in the one run below `outputs` that is the same in each repetition: {name: bytes}."""
    (run,) = outputs.glob("[!.]*/")
    files = [*run.rglob("*.png"), *run.glob("*.csv"), run / "metrics.json"]
    results = {file.relative_to(run).as_posix(): file.read_bytes() for file in files}
    expected = {"predictions.csv", "history.csv", "split.csv", "roc_curve.png", "grad_cam_example.png"}
    assert expected < set(results)
    with zipfile.ZipFile(run / "model.keras") as archive, h5py.File(
            io.BytesIO(archive.read("model.weights.h5"))) as weights:
        arrays = {}
        weights.visititems(lambda name, item: arrays.update({name: item[()].tobytes()})
                           if isinstance(item, h5py.Dataset) else None)
    assert len(arrays) >= 12
    return results | arrays | {"run": run.name}
