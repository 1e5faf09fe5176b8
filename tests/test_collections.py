"""From a download of each collection, in each of its forms, to the first batch."""
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from test_cbis_ddsm import make_cbis
from test_cmmd import make_cmmd
from test_inbreast import make_inbreast
from test_mini_mias import make_mias
from tiny import common, prepare

FORMS = [
    ("mini_mias", "archive", "breast"), ("mini_mias", "folder", "lesion"), ("mini_mias", "folder", None),
    ("cbis_ddsm", "tcia classic", "breast"), ("cbis_ddsm", "tcia descriptive", "crops"),
    ("cbis_ddsm", "kaggle", "lesion"), ("cbis_ddsm", "kaggle", "crops"),
    ("cmmd", "by patient", "breast"), ("cmmd", "by study", None),
    ("inbreast", "release", "breast"), ("inbreast", "release", "lesion"),
]


def make_download(collection, form, folder):
    """A small download of a collection in one of its forms."""
    if collection == "mini_mias":
        return make_mias(folder, form)
    if collection == "inbreast":
        make_inbreast(folder)
    else:
        {"cbis_ddsm": make_cbis, "cmmd": make_cmmd}[collection](folder, form)
    return folder


def prepare_collection(collection, form, part, folder):
    """Make a small download and its labels.csv in `folder`; returns what to set DATA_DIR and CROP to."""
    script = runpy.run_path(str(REPOSITORY / "data" / collection / "prepare.py"))
    download = make_download(collection, form, folder / "download")
    (folder / "data").mkdir()
    if collection == "mini_mias":
        script["prepare"](download, folder / "data")
    elif part == "crops":
        script["main"](download, True, folder / "data")
        return folder / "data", None
    else:
        script["main"](download, folder=folder / "data")
    return folder / "data", part


@pytest.mark.parametrize(("collection", "form", "part"), FORMS)
def test_from_download_to_first_batch(tmp_path, collection, form, part):
    data, crop = prepare_collection(collection, form, part, tmp_path)
    settings = prepare(tmp_path / "outputs", CROP=crop)
    films = common.find_films(data)
    assert set(films["patient_from"]) == {"labels.csv"}
    given = "" not in set(films["split"])
    assert given == (collection == "cbis_ddsm"), "which brings its own split"
    films["split"] = films["split"].replace("test", "validation")  # too few patients to deal them into folds
    films, images, fingerprints = common.read_films(films, data, crop, settings.OUTPUT_DIR)
    films = common.group_duplicates(films, fingerprints)
    films = common.split_patients(films, 0, 0)
    assert films.loc[films["split"] != "excluded"].groupby("group")["split"].nunique().max() == 1
    for batch, labels in (batches[0] for batches in common.make_datasets(images, films, settings)):
        assert batch.shape[1:] == (224, 224, 3)
        assert len(batch) == len(labels) > 1
        assert min(np.std(image) for image in batch) > 5, "none is black"


@pytest.fixture
def command(tmp_path):
    """A function that runs prepare.py of a collection in a process of its own, from another folder.

    It returns the process that has ended, and the path of labels.csv.
    """

    def run(collection, *arguments):
        for file in (*REPOSITORY.glob("data/*.py"), REPOSITORY / "data" / collection / "prepare.py"):
            copy = tmp_path / "program" / file.relative_to(REPOSITORY)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        done = subprocess.run([sys.executable, copy, *arguments], cwd=tmp_path, capture_output=True, text=True)
        return done, copy.with_name("labels.csv")

    return run


COMMANDS = [("mini_mias", "folder"), ("cbis_ddsm", "kaggle"), ("cmmd", "by series"), ("inbreast", "release")]


@pytest.mark.parametrize(("collection", "form"), COMMANDS)
def test_the_command(command, tmp_path, collection, form):
    """With spaces in the path."""
    make_download(collection, form, tmp_path / "my films")
    done, labels = command(collection, "my", "films")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f'set DATA_DIR = "data/{collection}" at the top of resnet50.py or vgg16.py\n')
    assert str(tmp_path / "my films") in labels.read_text()
    assert not list(labels.parent.glob(".*")), "nothing half written"


def test_a_command_that_fails_leaves_what_was_there(command, tmp_path):
    labels = tmp_path / "program" / "data" / "mini_mias" / "labels.csv"
    labels.parent.mkdir(parents=True)
    labels.write_text("of an earlier run")
    failed, _ = command("mini_mias", "nowhere")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert str(tmp_path / "nowhere") in failed.stderr
    assert labels.read_text() == "of an earlier run"
    labels.unlink()
    make_download("mini_mias", "folder", tmp_path / "my films")
    (labels / "in the way").mkdir(parents=True)
    failed, _ = command("mini_mias", "my films")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "labels.csv could not be made: " in failed.stderr
    assert [path.name for path in labels.iterdir()] == ["in the way"]
    assert not list(labels.parent.glob(".*")), "nothing half written"
