"""What the tests share. Nothing here imports common, Keras or TensorFlow: the tests of data/ do without."""
import contextlib
import os
import runpy
import signal
import sys
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it otherwise
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the same answers on every machine
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as common.py has it, whichever of the two is imported first
REPOSITORY = Path(__file__).resolve().parent.parent
SLOWEST = ("test_scripts.py", "test_training.py", "test_folds.py", "test_run.py")  # of the files, in this order
sys.path.insert(0, str(REPOSITORY))

import data  # noqa: E402  (before OpenCV, whose limits it sets)
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pydicom  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
    """Begin with the slowest files, so that no worker is left alone with one at the end."""
    first = [item for name in SLOWEST for item in items if item.path.name == name]
    items[:] = first + [item for item in items if item.path.name not in SLOWEST]


def write_dicom(path, pixels, bits=12, syntax=None, **tags):
    """The path of a DICOM film with int pixels (H, W) of `bits`, and these tags."""
    content, depth = pydicom.Dataset(), np.uint8 if bits == 8 else np.uint16
    content.SOPClassUID = pydicom.uid.DigitalMammographyXRayImageStorageForPresentation
    content.PatientName, content.PatientBirthDate, content.PatientID = "Secret^Person", "19610203", "H-4711"
    content.file_meta = pydicom.dataset.FileMetaDataset()
    content.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    content.set_pixel_data(pixels.astype(np.int16 if pixels.min() < 0 else depth), "MONOCHROME2", bits)
    if syntax:
        content.compress(syntax)
    for tag, value in tags.items():
        setattr(content, tag, value)
    content.save_as(path, enforce_file_format=True)
    return Path(path)


def write_film(path, top=255, dtype=np.uint8, channels=1, seed=0):
    """Write a random smooth film, 60 x 40 of any dtype, to a path; returns its pixels."""
    rng = np.random.default_rng(seed)
    pixels = cv2.resize(rng.random((6, 4, channels)), (40, 60)).reshape(60, 40, channels)
    pixels = (pixels / pixels.max() * top).astype(dtype)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return pixels


@contextlib.contextmanager
def as_nobody(folder):
    """Act as a user without rights, as root may read everything; the folders above may be entered."""
    user = os.geteuid()
    if not user:
        for parent in [folder, *folder.parents][:-2]:
            parent.chmod(parent.stat().st_mode | 0o055)
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def make_labels(tmp_path):
    """Run the main() of a collection's prepare.py on a download; returns the text of tmp_path/data/labels.csv."""
    folder = tmp_path / "data"
    folder.mkdir()

    def run(collection, download, **options):
        script = runpy.run_path(str(REPOSITORY / "data" / collection / "prepare.py"))
        script["main"](download, folder=folder, **options)
        return (folder / "labels.csv").read_text()

    return run


@pytest.fixture(scope="session")
def phantoms():
    """The functions and constants of data/phantoms/prepare.py."""
    return runpy.run_path(str(REPOSITORY / "data" / "phantoms" / "prepare.py"))


@pytest.fixture
def film():
    return write_film


@pytest.fixture
def make(tmp_path, caplog):
    """Make empty files in tmp_path / "data"; returns that folder. Films are found by name, not opened."""
    caplog.set_level("INFO")

    def write(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "data"

    return write


def write_labels(folder, paths, patients=()):
    """labels.csv of films that are benign and malignant by turns, with these patients or without patient_id."""
    table = pd.DataFrame({"path": paths, "label": np.resize(data.CLASSES, len(paths))})
    if len(patients):
        table["patient_id"] = patients
    table.to_csv(folder / "labels.csv", index=False)
