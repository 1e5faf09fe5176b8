"""What resnet50.py and vgg16.py share, in the order in which the data flows:

start, find images, find copies, split, feed, build, train, evaluate, explain, report, compare runs;
and predict, for one new image.

Every stage takes `record` first, a dict that ends as settings.json: what a stage found, guessed,
skipped or converted is printed once and kept in it.
"""
import base64
import contextlib
import functools
import hashlib
import html
import importlib.metadata
import io
import itertools
import json
import math
import mmap
import os
import platform
import posixpath
import re
import runpy
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = Path(__file__).read_text(encoding="utf-8")  # as it runs, whatever an editor writes meanwhile


def stop_on_signals():
    """End at once on Ctrl-C and SIGTERM, with one line: a run may be killed at any moment and goes on from disk.

    Python hands signals to its main thread, which may be in a training step for many seconds; the
    interpreter writes to the wakeup socket right away, and a thread waits there.
    """
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    signal.set_wakeup_fd(mouth.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)

    def wait():
        with mouth:  # which would be closed if nothing referred to it
            number = ear.recv(1)[0]
        try:
            print("\nstopped: run the same command to go on from the last finished epoch", flush=True)
        finally:  # whoever listened may be gone
            os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


if Path(sys.argv[0]).resolve() in HERE.glob("*.py"):  # a script of this folder runs, nobody's session or test
    stop_on_signals()


@contextlib.contextmanager
def muted_stderr():
    """Send file descriptor 2 nowhere: libraries in C and C++ write to it, past sys.stderr."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


os.environ["KERAS_BACKEND"] = "tensorflow"  # Keras reads it when it is imported
os.environ["MPLBACKEND"] = "agg"  # files only: a server has no display
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
MOST_PIXELS = 2**26  # 8192 x 8192: no film has more, and a small file may claim to
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MOST_PIXELS)
try:
    with muted_stderr():
        import cv2
        import keras
        import matplotlib
        import numpy as np
        import pandas as pd
        import sklearn.metrics
        import tensorflow as tf
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
        from sklearn.model_selection import StratifiedGroupKFold
except ImportError as missing:
    if "lib" in str(missing) and ".so" in str(missing):
        sys.exit(f"OpenCV cannot be loaded ({missing}): apt-get install libgl1 libglib2.0-0, or"
                 " pip uninstall opencv-python and pip install opencv-python-headless.")
    sys.exit(f"{missing}: pip install -r {HERE / 'requirements.txt'}")

# ------------------------------------------------------------------------------------------------
# augmentation of the training side, drawn anew for every image of every epoch
BRIGHTNESS = 0.1  # largest shift either way, as a share of the grey scale
CONTRAST = 0.2  # largest change either way: factors from 0.8 to 1.2
SATURATION = 0.2  # likewise; it does nothing to grey images, and every image here is grey
# the layers on top of the backbone
HEAD_UNITS = 256  # of the dense layer between the pooled features and the probability
DROPOUT = 0.3  # share of these units that a training step leaves out
# ------------------------------------------------------------------------------------------------

PHANTOMS = HERE / "data" / "phantoms"
CLASSES = ("benign", "malignant")  # 0 and 1 wherever a number stands for the label
LESION_BOXES = r"(\d{1,6}:\d{1,6}:[1-9]\d{,5}:[1-9]\d{,5}(\|(?!$)|$))*"  # x:y:width:height in pixels, joined by |
OUTCOMES = ("true_positive", "false_positive", "true_negative", "false_negative")
FOLDS = 5
RINGS, ANGLES, WAVES = 24, 128, 23  # of a fingerprint: circles, points on each, frequencies kept
COPY_CORRELATION = 0.87  # of fingerprints: two patients of DDSM reach 0.80, 99 % of copies exceed 0.89
RESHAPED_CORRELATION = 0.95  # of those of the squashed image: turned films share corners, and reach 0.88
IMAGE_SIZE = 224  # pixels, both ways
THUMB = 256  # longer side, in pixels, of the film in which the breast is found
BORDER = 20  # of these pixels at most: a white border is no wider
SURROUNDINGS = 0.5  # of a lesion, each way, as a share of its longer side
REPLICATES = 2000  # of the bootstrap behind the intervals
CLAIMED = {  # what the original work published for each backbone; not measured here
    "accuracy": {"resnet50": 0.85, "vgg16": 0.83},
    "precision": {"resnet50": 0.86, "vgg16": 0.84},
    "recall": {"resnet50": 0.84, "vgg16": 0.82},
    "f1": {"resnet50": 0.85, "vgg16": 0.83},
    "specificity": {},
    "auc": {},
}
SMALLEST = 32  # pixels of the shorter side of a film
THRESHOLD = 0.5  # probability of malignancy from which an image is called malignant
DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm", ".bmp", *DICOM_SUFFIXES)
ASIDE = ".partial"  # ends the name of a file that is being written
SYSTEM_FILES = ("thumbs.db", "desktop.ini")
VALIDATION_FOLDERS = ("val", "valid", "validation", "test")
PATIENT_PATTERNS = {  # how public collections write the patient into the name of a file or folder
    "CBIS-DDSM": r"(?<![A-Za-z0-9])(P_\d{5})(?!\d)",
    "DDSM": r"(?<![A-Za-z0-9])([A-D]_\d{4})_\d\.(?:LEFT|RIGHT)_(?:CC|MLO)",
    "INbreast": r"(?<!\d)\d{8}_([0-9a-f]{16})_MG_[LR]_",
}
LAYOUTS = """
  DATA_DIR/benign.../ and DATA_DIR/malignant.../  with images anywhere below
  DATA_DIR/train/ and DATA_DIR/val/               with such class folders in each
  DATA_DIR/labels.csv                             with columns path,label[,patient_id,split,lesion_box]
Images are PNG, JPEG, TIFF, PGM, BMP or DICOM files. data/README.md says where to get some."""


class UserError(Exception):
    """Something that the user can mend: one sentence, shown without a traceback."""


def run(main):
    """Call `main`; a UserError ends the process with its sentence and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"\n{Path(sys.argv[0]).name}: {error}")


@contextlib.contextmanager
def explain_write_errors(place):
    """Turn what a full disk, missing rights or a deleted folder raise into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or "the disk may be full"
        raise UserError(f"{place} cannot be written ({reason}): mend that, or choose another OUTPUT_DIR; the same"
                        " command goes on from the last finished epoch.") from error


@contextlib.contextmanager
def write_aside(file):
    """A binary stream to a file that appears whole or not at all: flushed to the disk, then renamed."""
    aside = file.with_name(f".{file.name}.{secrets.token_hex(4)}{ASIDE}")
    try:
        with aside.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def stage(function):
    """Keep the wall time of a stage, in seconds, in record["seconds"]."""

    @functools.wraps(function)
    def timed(record, *arguments):
        started = time.perf_counter()
        result = function(record, *arguments)
        record["seconds"][function.__name__] = round(time.perf_counter() - started, 2)
        return result

    return timed


def say(record, topic, text):
    """Print a line and keep it in record["console"]."""
    record["console"].append(f"{topic:<11} {text}")
    print(record["console"][-1], flush=True)


def locate(path):
    """The absolute Path of what a constant names: ~ expanded, relative to the scripts' folder."""
    return Path(os.path.abspath(HERE / os.path.expanduser(path)))


def shorten(path):
    """A path as a person would give it: relative where it lies below the scripts' folder."""
    return str(path.relative_to(HERE)) if path.is_relative_to(HERE) else str(path)


def list_some(items, most=20):
    """The first items on lines of their own, and how many more there are; unprintable ones escaped."""
    items = [item if item.isprintable() else ascii(item)[1:-1] for item in items]
    more = [f"... and {len(items) - most} more"] if len(items) > most else []
    return "".join(f"\n  {item}" for item in [*items[:most], *more])


# ---- start -------------------------------------------------------------------------------------


def is_path(value):
    return isinstance(value, (str, os.PathLike)) and str(value).strip() != ""


def is_number(value, kind=Real):
    return isinstance(value, kind) and not isinstance(value, bool)


CONSTANTS = {  # what each may be: a check, the words for it, and the value as delivered
    "DATA_DIR": (is_path, "the path of a folder in quotes", "data/phantoms"),
    "OUTPUT_DIR": (is_path, "the path of a folder in quotes", "outputs"),
    "CROP": (lambda v: v in ("breast", "lesion", None), '"breast", "lesion" or None', "breast"),
    "FOLD": (lambda v: is_number(v, Integral) and 0 <= v < FOLDS, f"a whole number from 0 to {FOLDS - 1}", 0),
    "WEIGHTS": (lambda v: v is None or is_path(v), '"imagenet", None or the path of a weights file', "imagenet"),
    "UNFROZEN_FRACTION": (lambda v: is_number(v) and 0 < v <= 1, "a share above 0 up to 1, such as 0.5", 0.5),
    "LEARNING_RATE": (lambda v: is_number(v) and 0 < v < math.inf, "a number above 0, such as 1e-4",
                      {"resnet50": 1e-4, "vgg16": 5e-5}),
    "EPOCHS": (lambda v: is_number(v, Integral) and v >= 1, "a whole number from 1", 7),
    "BATCH_SIZE": (lambda v: is_number(v, Integral) and v >= 1, "a whole number from 1", 13),
    "SEED": (lambda v: is_number(v, Integral) and 0 <= v < 2**31, "a whole number from 0 to 2147483647", 0),
    "MIXED_PRECISION": (lambda v: v == "auto" or isinstance(v, bool), '"auto", True or False', "auto"),
}


def spread(devices):
    """Let the models to come train on several devices at once, each with an equal part of every batch.

    devices: their names; with one or none, TensorFlow chooses.
    """
    several = len(devices) > 1
    tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy(devices) if several else None)


def start(constants):
    """Check the script's constants, seed every generator, and open the record of the run.

    constants: globals() of a script, read now so that whoever imports the script may set them first.
    Raises UserError that names the constant with a wrong value.
    """
    for name, (is_right, words, _) in CONSTANTS.items():
        if not is_right(constants[name]):
            raise UserError(f"{name} is {constants[name]!r}, but has to be {words}.")
    weights, output_dir = constants["WEIGHTS"], locate(constants["OUTPUT_DIR"])
    if weights not in (None, "imagenet") and not locate(weights).is_file():
        raise UserError(f"WEIGHTS is {str(weights)!r}, but there is no file {locate(weights)}.")
    try:
        (output_dir / ".cache").mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise UserError(f"OUTPUT_DIR: nothing can be written to {output_dir} ({error.strerror}).") from error
    for left in itertools.chain(output_dir.glob(f".*{ASIDE}"), output_dir.glob(f".*/.*{ASIDE}")):
        with contextlib.suppress(OSError):  # of a run that was killed while it wrote; or somebody else's
            if time.time() - left.stat().st_mtime > 24 * 60 * 60:
                left.unlink()
    gpus = [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    modules = (tf, keras, np, pd, matplotlib, sklearn, cv2)
    versions = {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}
    versions |= {package.name: package.version for package in importlib.metadata.distributions()
                 if package.name.startswith(("pydicom", "pylibjpeg"))}
    record = {
        "note": "",  # what every figure and file of the run has to say about it
        "constants": {name: constants[name] for name in CONSTANTS},
        "augmentation": {"BRIGHTNESS": BRIGHTNESS, "CONTRAST": CONTRAST, "SATURATION": SATURATION},
        "head": {"HEAD_UNITS": HEAD_UNITS, "DROPOUT": DROPOUT},
        "versions": versions,
        "device": ", ".join(gpu.get("device_name", "GPU") for gpu in gpus) or f"CPU, {os.cpu_count()} cores",
        "seconds": {},
        "console": [],
    }
    keras.config.set_image_data_format("channels_last")  # whatever the user's keras.json says
    keras.config.set_floatx("float32")
    keras.backend.clear_session()
    mixed = constants["MIXED_PRECISION"]
    if mixed == "auto":  # tensor cores came with compute capability 7
        mixed = bool(gpus) and all(gpu.get("compute_capability", (0,)) >= (7,) for gpu in gpus)
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")
    spread([gpu.name for gpu in tf.config.list_logical_devices("GPU")])
    keras.utils.set_random_seed(constants["SEED"])
    tf.config.experimental.enable_op_determinism()  # without it a GPU adds up in any order
    say(record, "software", "for research, not for clinical use")
    say(record, "device", f"{record['device']}; {'16-bit floats with XLA' if mixed else '32-bit floats'}; seed"
        f" {constants['SEED']}")
    if shutil.which("nvidia-smi") and not gpus:
        remedy = "in WSL2 only" if os.name == "nt" else "after pip install 'tensorflow[and-cuda]'"
        say(record, "", "the GPU of the NVIDIA driver that is installed cannot be used: TensorFlow sees it"
            f" {remedy}, and where CUDA_VISIBLE_DEVICES does not hide it")
    return record


# ---- find images -------------------------------------------------------------------------------


def is_dicom(path):
    """Whether a file is DICOM: by its name, or by its first bytes where its name is no image's."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix in DICOM_SUFFIXES
    try:
        return path.is_file() and path.open("rb").read(132)[128:] == b"DICM"
    except OSError:
        return False


def import_pydicom():
    """The module pydicom, which only those with DICOM files need. Raises UserError where it is missing."""
    try:
        import pydicom.pixels
    except ModuleNotFoundError as error:
        raise UserError("DICOM files need one more package: pip install pydicom") from error
    warnings.filterwarnings("ignore", module="pydicom")  # of tags that no one here reads
    return pydicom


def read_folders(record, root):
    """Table of the images in class folders: path, label, split ("" where the folders give none)."""
    below = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    given = [name for name in VALIDATION_FOLDERS if name in below]
    sides = {"": root}
    if "train" in below and given:
        sides = {"train": below["train"], "validation": below[given[0]]}
        if given[1:]:
            say(record, "skipped", f"{', '.join(given[1:])}, as {given[0]} is the validation side")
    rows, skipped = [], Counter()

    def refuse(error):
        raise UserError(f"{error.filename} cannot be opened ({error.strerror}): mend its rights, or remove it.")

    for split, side in sides.items():
        for top in sorted(path for path in side.iterdir() if path.is_dir()):
            label = next((label for label in CLASSES if top.name.lower().startswith(label)), None)
            for folder, below, files in os.walk(top, onerror=refuse) if label else ():
                skipped["links to folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in below)
                below[:] = [name for name in below if not name.startswith(".")]
                for path in (Path(folder, name) for name in files if not name.startswith(".")):
                    if path.name.lower() in SYSTEM_FILES:
                        continue
                    if path.suffix.lower() in IMAGE_SUFFIXES or is_dicom(path):
                        rows.append((path.relative_to(root).as_posix(), label, split))
                    else:
                        skipped[path.suffix.lower() or "files without suffix"] += 1
    skipped = +skipped
    if skipped:
        kinds = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(skipped.items()))
        say(record, "skipped", f"what is no image in the class folders: {kinds}")
    return pd.DataFrame(rows, columns=["path", "label", "split"], dtype=str)


def read_labels(record, file):
    """Table of a labels.csv: path, label, split, and patient_id and lesion_box where it has them.

    Raises UserError that lists the columns, labels, splits or paths that are wrong.
    """
    try:
        with file.open(encoding="utf-8-sig") as stream:
            separator = max(",;\t", key=stream.readline().count)  # a spreadsheet of a country with decimal commas
        with warnings.catch_warnings(action="error"):  # of rows that are longer than the header
            table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, index_col=False,
                                encoding="utf-8-sig")
    except (ValueError, OSError, Warning) as error:
        raise UserError(f"{file} cannot be read as comma-separated values in UTF-8: {error}.") from error
    table.columns = table.columns.str.strip().str.lower()
    if table.columns.has_duplicates:
        raise UserError(f"{file} has two columns of one name: {', '.join(table.columns)}.")
    if missing := [name for name in ("path", "label") if name not in table]:
        raise UserError(f"{file} has no column {' and no column '.join(missing)}; it has {', '.join(table)}.")
    table = table[[name for name in ("path", "label", "patient_id", "split", "lesion_box") if name in table]]
    table = table.apply(lambda column: column.str.strip())
    table["path"] = [path and posixpath.normpath(path.replace("\\", "/")) for path in table["path"]]
    for column, allowed in (("label", CLASSES), ("split", ("train", "validation"))):
        if column in table:
            table[column] = table[column].str.lower()
            if wrong := sorted(set(table[column]) - set(allowed)):
                if set(wrong) <= {"0", "1"}:
                    raise UserError(f"{file}: {column} holds {' and '.join(wrong)}; replace them by"
                                    f" {' and '.join(allowed)}, as only you know which number means which.")
                found = ", ".join(map(repr, wrong[:20]))
                raise UserError(f"{file}: {column} has to be {' or '.join(allowed)}, but there is {found}.")
    if repeated := table.duplicated().sum():
        say(record, "skipped", f"{repeated} rows of {file.name} that repeat another")
        table = table.drop_duplicates()
    paths, boxes = table["path"], table.get("lesion_box", pd.Series("", index=table.index))
    for problem, wrong in (
        ("climb out of the folder of the table", [".." in Path(path).parts for path in paths]),
        ("name no file", [not os.path.isfile(os.path.join(file.parent, path)) for path in paths]),
        ("have rows that contradict each other", paths.duplicated()),
        ("have a lesion_box other than x:y:width:height in pixels", ~boxes.str.fullmatch(LESION_BOXES)),
    ):
        if any(wrong):
            raise UserError(f"{file}: {sum(wrong)} paths {problem}: {list_some(list(paths[wrong]))}")
    return table if "split" in table else table.assign(split="")


def read_patient_id(path):
    """PatientID of a DICOM file, "" where there is none."""
    try:
        return str(import_pydicom().dcmread(path, specific_tags=["PatientID"]).get("PatientID") or "").strip()
    except Exception:  # whatever is wrong with the file: it is listed with all others when they are read
        return ""


def name_patients(record, table, folder):
    """The table with every patient_id filled in: as given, read from the path, of DICOM, or the path itself.

    A PatientID may be a hospital's: only a number of it is kept, unless it is that of a public collection.
    """
    patients, sources = (pd.Series("", table.index, dtype=object) for _ in range(2))

    def fill(source, found):
        empty = found.index[(found != "") & (patients[found.index] == "")]
        patients[empty], sources[empty] = found[empty], source

    fill("labels.csv", table.get("patient_id", patients.copy()))
    for scheme, pattern in PATIENT_PATTERNS.items():
        fill(scheme, table["path"].str.extract(pattern)[0].dropna())
    dicoms = [index for index in table.index[patients == ""] if is_dicom(folder / table["path"][index])]
    with ThreadPoolExecutor() as pool:
        tags = pd.Series(list(pool.map(read_patient_id, folder / table["path"][dicoms])), dicoms, dtype=object)
    tags = tags[tags != ""]
    for pattern in PATIENT_PATTERNS.values():
        fill("PatientID", tags.str.extract(pattern)[0].dropna())
    fill("PatientID", tags[tags.isin(patients)])  # those that the table has for other images
    fill("PatientID", pd.Series([f"dicom_{code + 1:05d}" for code in pd.factorize(tags)[0]], tags.index))
    record["patients_from"] = sources.replace("", "nowhere").value_counts().to_dict()
    for source, count in record["patients_from"].items():
        say(record, "patients", f"of {count} images known from {source}" if source != "nowhere" else
            f"unknown for {count} images, each counted as a patient of its own: where some show the same patient,"
            " the results look better than they are (name them in labels.csv, patient_id)")
    return table.assign(patient_id=patients.mask(patients == "", table["path"]))


@stage
def find_images(record, data_dir):
    """Table of the images of `data_dir`, sorted by path: path, label, split, patient_id, lesion_box.

    All str; split is "train", "validation" or "" where the data brings none, lesion_box is "" where
    unknown. Raises UserError where there is no image of a class.
    """
    folder = locate(data_dir)
    if folder == PHANTOMS and not ((folder / "labels.csv").is_file() and any(folder.glob("images/*.png"))):
        say(record, "phantoms", "making synthetic mammograms")
        runpy.run_path(str(folder / "prepare.py"), run_name="__main__")
    if not folder.is_dir():
        raise UserError(f"DATA_DIR is {str(data_dir)!r}, but there is no folder {folder}. It may be:{LAYOUTS}")
    labels = folder / "labels.csv"
    try:
        table = read_labels(record, labels) if labels.is_file() else read_folders(record, folder)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be opened ({error.strerror}): mend its rights.") from error
    odd = [ascii(path) for path in table["path"] if "\r" in path or path.encode(errors="replace").decode() != path]
    if odd:
        raise UserError(f"{folder}: {len(odd)} names are not in UTF-8 or hold a carriage return; rename them:"
                        f" {list_some(odd)}")
    for name in CLASSES:
        if name not in set(table["label"]):
            raise UserError(f"DATA_DIR {folder} holds no {name} image. It may be:{LAYOUTS}")
    if all(Path(path).name.startswith("synthetic_") for path in table["path"]):
        record["note"] = "synthetic phantoms"
        say(record, "SYNTHETIC", "*** phantoms, no patients: the results say nothing about mammograms ***")
    if any(is_dicom(folder / path) for path in table["path"]):
        import_pydicom()  # or stop here, before anything is read
    table = table.sort_values("path", ignore_index=True)
    table = name_patients(record, table, folder).assign(lesion_box=table.get("lesion_box", ""))
    record["patients"] = "patients" if "nowhere" not in record["patients_from"] else "patients (some unknown)"
    patients = f"{table['patient_id'].nunique()} {record['patients']}"
    say(record, "data", f"{shorten(folder)}: {len(table)} images of {patients}")
    return table


# ---- read images -------------------------------------------------------------------------------


def guess_depth(grey):
    """The smallest of 8, 12, 14 and 16 bits that holds the brightest pixel: a 12-bit film read as 16 is black."""
    return next(bits for bits in (8, 12, 14, 16) if grey.max() < 2**bits)


def read_dicom(path):
    """(grey, depth, words) of a DICOM file, as its window or VOI LUT shows it: uint16 (H, W), black to bright.

    depth: bits of the full scale. Raises UserError where it holds no single grey image, or one that is
    compressed in a way for which no decoder is installed.
    """
    pydicom = import_pydicom()
    try:
        data = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError as error:
        raise UserError("not a DICOM file") from error
    kind = data.get("SOPClassUID", pydicom.uid.UID("")).name or "of unknown class"
    frames, photometric = int(data.get("NumberOfFrames") or 1), data.get("PhotometricInterpretation")
    if "PixelData" not in data:
        raise UserError(f"a DICOM object without an image ({kind})")
    if frames > 1:
        raise UserError(f"a DICOM object of {frames} frames ({kind}); only single images can be used")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or data.BitsStored > 16:
        raise UserError(f"a DICOM image in {photometric} of {data.BitsStored} bits ({kind}), not in grey of 16")
    if data.Rows * data.Columns > MOST_PIXELS:
        raise UserError(f"a DICOM image of {data.Columns} x {data.Rows} pixels, too large for a film")
    syntax = data.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not pydicom.pixels.get_decoder(syntax).is_available:
        plugin = "openjpeg" if "2000" in syntax.name else "libjpeg"
        raise UserError(f"compressed as {syntax.name}: pip install pylibjpeg pylibjpeg-{plugin}")
    bits = data.BitsStored
    lowest = -(2 ** (bits - 1)) if data.PixelRepresentation else 0
    grey = (data.pixel_array.astype(np.int32) - lowest).clip(0, 65535).astype(np.uint16)
    levels = pydicom.pixels.apply_modality_lut(np.arange(lowest, lowest + 2**bits), data)
    shown, words = pydicom.pixels.apply_voi_lut(levels, data), ""
    if shown is levels:
        if lowest:  # of a signed film, few of the values below 0 are in use
            grey -= grey.min().clip(max=-lowest)
        depth = bits if not lowest and bits < 16 and grey.max() < 2**bits else guess_depth(grey)
        if levels[0] > levels[-1]:
            grey = np.uint16(2**depth - 1) - grey
    else:
        words = " with VOI LUT" if data.get("VOILUTSequence") else " with window"
        if tables := data.get("VOILUTSequence") or data.get("ModalityLUTSequence"):
            low, high = 0, 2 ** tables[0].LUTDescriptor[2] - 1
        else:
            low, high = levels.min(), levels.max()
        shown = np.rint((shown - low) * (65535 / (high - low))).clip(0, 65535).astype(np.uint16)
        grey, depth = shown.take(grey, mode="clip"), 16
    if photometric == "MONOCHROME1":
        grey = np.uint16(2**depth - 1) - grey
    return grey, depth, f"{bits} bit DICOM {photometric}{words}"


def read_picture(path):
    """(grey, depth, words) of a file that OpenCV reads: uint8 or uint16 (H, W), what is transparent black."""
    content = np.fromfile(path, np.uint8)
    if not content.size:
        raise UserError("an empty file")
    is_tiff = content[:4].tobytes() in (b"II*\0", b"MM\0*")
    if is_tiff and (pages := cv2.imcount(str(path))) > 1:
        raise UserError(f"a TIFF of {pages} pages; save the one that is the film")
    try:
        pixels = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if "MAX_IMAGE" in str(error):
            raise UserError(f"more than {MOST_PIXELS:,} pixels, too many for a film") from error
        raise
    if pixels is None:
        raise UserError("not an image that OpenCV can read, or one that is cut off")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"its pixels are {pixels.dtype}; save it with 8 or 16 bits")
    if is_tiff and pixels.ndim == 3 and pixels.shape[2] == 4:
        raise UserError("a TIFF of four channels, which may be CMYK; save it in grey")
    grey, words = pixels.reshape(*pixels.shape[:2], -1)[..., 0], "grey"
    if pixels.ndim == 3 and pixels.shape[2] >= 3:
        grey, words = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY), "colour"
        if pixels.shape[2] == 4:
            words = "colour with alpha"
            grey = (grey * (pixels[..., 3] / np.iinfo(pixels.dtype).max)).astype(pixels.dtype)
    depth, container = guess_depth(grey), 8 * grey.dtype.itemsize
    return grey, depth, f"{depth} bit {words}" + (f" in {container}" if depth < container else "")


def read_film(path):
    """(grey, depth, words) of any image file: uint8 or uint16 (H, W), bits of the full scale, format in words.

    Raises UserError with the reason.
    """
    try:
        if not path.is_file():
            raise UserError("no file: a pipe, or a link that leads nowhere")
        if path.stat().st_size > 16 * MOST_PIXELS:
            raise UserError(f"a file of {path.stat().st_size:,} bytes, too large for a film")
        grey, depth, words = read_dicom(path) if is_dicom(path) else read_picture(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(error.strerror or str(error)) from error
    except Exception as error:  # OpenCV and pydicom raise whatever the file leads them to
        raise UserError((str(error).strip() or repr(error)).splitlines()[-1]) from error
    if min(grey.shape) < SMALLEST:
        raise UserError("{1} x {0} pixels, too small for a film".format(*grey.shape))
    if grey.min() == grey.max():
        raise UserError("all its pixels are equal")
    return grey, depth, words


def find_breast(grey, depth):
    """The largest bright component of a film: uint8 (H, W), 1 in the breast, 0 in labels, tape and borders.

    It is looked for in a film of THUMB pixels. An opening cuts what ties labels to the breast. Where
    nothing is left, all is breast.
    """
    scale = THUMB / max(grey.shape)
    size = [max(1, round(side * scale)) for side in reversed(grey.shape)]
    thumb = cv2.resize(grey, size, interpolation=cv2.INTER_AREA) * (255 / (2**depth - 1))
    thumb = cv2.medianBlur(np.rint(thumb).astype(np.uint8), 5)
    otsu, _ = cv2.threshold(thumb, 0, 255, cv2.THRESH_OTSU)
    bright = thumb > 0.4 * otsu  # the skin is darker than Otsu's threshold
    white = (thumb >= 0.97 * thumb.max()) & (thumb.max() >= 250)  # unexposed film, which is as bright as can be
    for turns in range(4):  # a border is white from its edge inwards and soon ends, white tissue goes on
        run = np.logical_and.accumulate(np.rot90(white, turns))
        np.rot90(bright, turns)[run & (run.sum(axis=0) <= BORDER)] = False
    bright = np.pad(bright, BORDER).astype(np.uint8)  # an opening does not work along the edges
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))
    bright = cv2.morphologyEx(bright, cv2.MORPH_OPEN, disc)[BORDER:-BORDER, BORDER:-BORDER]
    outlines, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return np.ones(grey.shape, np.uint8)
    largest = max(outlines, key=cv2.contourArea)
    breast = cv2.drawContours(np.zeros(bright.shape, np.uint8), [largest], -1, 1, cv2.FILLED)
    return cv2.resize(breast, grey.shape[::-1], interpolation=cv2.INTER_NEAREST)


def read_boxes(lesion_box):
    """The boxes of a lesion_box: int (K, 4), x, y, width and height in pixels of the film."""
    return np.array([box.split(":") for box in lesion_box.split("|") if box], int).reshape(-1, 4)


def cut_square(grey, left, top, side):
    """A square of a film scaled to (IMAGE_SIZE, IMAGE_SIZE), black where it reaches beyond the film."""
    scale, square = IMAGE_SIZE / side, np.zeros((IMAGE_SIZE, IMAGE_SIZE), grey.dtype)
    part = grey[max(0, top) : top + side, max(0, left) : left + side]
    row, column = round(max(0, -top) * scale), round(max(0, -left) * scale)
    height, width = (max(1, round(side * scale)) for side in part.shape)
    height, width = min(height, IMAGE_SIZE - row), min(width, IMAGE_SIZE - column)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    square[row : row + height, column : column + width] = cv2.resize(part, (width, height), interpolation=how)
    return square


def crop_film(grey, depth, crop, lesion_box):
    """(image, cut): what `crop` keeps of a film as (IMAGE_SIZE, IMAGE_SIZE), and where it lay in the film.

    crop: the constant CROP; cut: left, top, width and height in pixels, which may reach beyond the film.
    """
    if crop is None:
        height, width = grey.shape
        return cv2.resize(grey, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA), (0, 0, width, height)
    if crop == "breast":
        breast = find_breast(grey, depth)
        grey = grey * breast
        left, top, width, height = cv2.boundingRect(breast)
        side = max(width, height)
    else:
        boxes = read_boxes(lesion_box)
        left, top = boxes[:, :2].min(axis=0).tolist()
        width, height = ((boxes[:, :2] + boxes[:, 2:]).max(axis=0) - (left, top)).tolist()
        side = math.ceil(max(width, height) * (1 + 2 * SURROUNDINGS))
    left, top = left - (side - width) // 2, top - (side - height) // 2
    return cut_square(grey, left, top, side), (left, top, side, side)


def fingerprint(image, shape):
    """The texture on circles around the centre of a picture: complex64 (RINGS, WAVES), of norm 1.

    image: uint8 (IMAGE_SIZE, IMAGE_SIZE); shape: the (height, width) in which a circle is round.
    Turning a picture shifts the phases of its circles, mirroring it turns them round. The waves are
    whitened, as the amplitude of tissue falls with frequency ** -1.5, and what stands out is damped, so
    that texture tells pictures apart and not the outline that all breasts share.
    """
    angles = 2 * np.pi * np.arange(ANGLES) / ANGLES
    radii = (np.arange(RINGS) + 0.5)[:, None] / RINGS / 2  # of the shorter side
    waves, half = np.arange(1, WAVES + 1), IMAGE_SIZE / 2 - 0.5
    across, down = (IMAGE_SIZE * min(shape) / side for side in reversed(shape))
    x = (half + across * radii * np.cos(angles)).astype(np.float32)
    y = (half + down * radii * np.sin(angles)).astype(np.float32)
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigmaX=across / 100, sigmaY=down / 100)
    spectrum = np.fft.rfft(cv2.remap(smooth, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE))
    spectrum[:, 1 : WAVES + 1] *= waves**1.5
    spectrum[:, 0], spectrum[:, WAVES + 1 :] = 0, 0
    texture = np.fft.irfft(spectrum, ANGLES)
    texture = np.tanh(texture / (np.abs(texture).mean(axis=1, keepdims=True) + 1e-6)) * np.sqrt(radii)
    found = np.fft.rfft(texture)[:, 1 : WAVES + 1].astype(np.complex64)
    return found / (np.linalg.norm(found) + np.float32(1e-6))


def read_image(path, crop=None, lesion_box=""):
    """(image, cut, words, prints): what `crop` keeps of one file, and what finds copies of it.

    image: uint8 (IMAGE_SIZE, IMAGE_SIZE), grey; cut: as in crop_film; prints: complex64 (2, RINGS, WAVES),
    the fingerprints of the whole film on circles that are round in it, and in its squashed image.
    Raises UserError with the reason.
    """
    grey, depth, words = read_film(path)
    for x, y, width, height in read_boxes(lesion_box):
        if x + width > grey.shape[1] + 2 or y + height > grey.shape[0] + 2:  # 2 for rounding
            raise UserError("its lesion_box reaches beyond the film of {1} x {0} pixels".format(*grey.shape))
    to_bytes = 255 / (2**depth - 1)
    whole, (_, _, width, height) = crop_film(grey, depth, None, "")
    image, cut = (whole, (0, 0, width, height)) if crop is None else crop_film(grey, depth, crop, lesion_box)
    whole, image = (np.rint(pixels * to_bytes).astype(np.uint8) for pixels in (whole, image))
    if image.min() == image.max():
        raise UserError(f"all pixels of its {crop} are equal")
    return image, cut, words, np.stack([fingerprint(whole, (height, width)), fingerprint(whole, (1, 1))])


KEY = ["path", "stamp", "box"]  # by which a film is known again
CUT = ["left", "top", "width", "height"]
INDEX = [*KEY, *CUT, "format", "sha256"]


def name_cache(record, folder, crop, output_dir):
    """The file that keeps what was read from `folder` in this way of reading, its code and releases included."""
    settings = [str(folder), crop, THUMB, BORDER, SURROUNDINGS, RINGS, ANGLES, WAVES, record["versions"]]
    settings.append(re.search("# ---- read images.*?# ---- find copies", SOURCE, re.DOTALL)[0])
    return output_dir / ".cache" / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def stamp(path):
    """Size and time of the last change of a file, by which an edited one is known; "" where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def open_cache(file):
    """(index, images, prints): a table of the films that were read before, and memory maps of both.

    Empty where there is no such file, or a damaged one. It holds the images, the prints, the index as
    JSON, and how many there are.
    """
    try:
        with file.open("rb") as stream:
            stream.seek(-8, os.SEEK_END)
            count = int.from_bytes(stream.read(), "little")
            images = np.memmap(stream, np.uint8, "r", shape=(count, IMAGE_SIZE, IMAGE_SIZE))
            prints = np.memmap(stream, np.complex64, "r", images.nbytes, (count, 2, RINGS, WAVES))
            stream.seek(images.nbytes + prints.nbytes)
            rows = json.loads(stream.read()[:-8])
        return pd.DataFrame(rows, columns=INDEX), images, prints
    except (OSError, ValueError, OverflowError):
        return pd.DataFrame(columns=INDEX, dtype=str), [], []


def fill_cache(file, films, folder, crop, index, images, prints):
    """Write the cache of `films`: what it holds of them already as it is, all others read on all cores.

    index, images, prints: what it holds, see open_cache. Nothing but the index stays in memory. Returns
    the reasons of those that cannot be read.
    """
    known = index.astype(object).to_numpy().tolist()
    places = {key: row for row, key in enumerate(zip(*(index[name] for name in KEY), strict=True))}
    rows, bad, done = [], [], 0
    keys = list(films[KEY].itertuples(index=False))
    bar = keras.utils.Progbar(sum(key not in places for key in keys), unit_name="image", interval=0.5)

    def read_or_reuse(key):
        if (row := places.get(key)) is not None:
            return images[row], prints[row], known[row]
        try:
            image, cut, words, both = read_image(folder / key.path, crop, key.box)
        except UserError as error:
            return None, None, (key.path, str(error))
        return image, both, [*key, *cut, words, hashlib.sha256(image).hexdigest()]

    pool = ThreadPoolExecutor(os.cpu_count())  # OpenCV decodes outside Python's lock
    try:
        with (explain_write_errors(file), write_aside(file) as stream,
              tempfile.TemporaryFile(dir=file.parent) as other):
            for image, both, row in pool.map(read_or_reuse, keys):
                if image is None:
                    bad.append(row)
                else:
                    stream.write(image.tobytes())
                    other.write(both.tobytes())
                    rows.append(row)
                if image is None or tuple(row[:3]) not in places:
                    bar.update(done := done + 1)
            other.seek(0)
            shutil.copyfileobj(other, stream)
            stream.write(json.dumps(rows).encode())
            stream.write(len(rows).to_bytes(8, "little"))
    finally:
        pool.shutdown(cancel_futures=True)
    return bad


@stage
def read_images(record, films):
    """(films, images, prints): the table with what was cut out of each film, and what was read, in its order.

    images: uint8 (N, IMAGE_SIZE, IMAGE_SIZE), grey; prints: complex64 (N, 2, RINGS, WAVES), see read_image;
    both memory-mapped from a cache in OUTPUT_DIR, which knows a film by path, size, time of change and how
    it is read. The table gains left, top, width, height (see crop_film), format and sha256 (of the image).
    Raises one UserError that lists every file that cannot be read.
    """
    folder, crop, output_dir = (record["constants"][name] for name in ("DATA_DIR", "CROP", "OUTPUT_DIR"))
    folder = locate(folder)
    if crop == "lesion":
        films, left_out = films[films["lesion_box"] != ""], films[films["lesion_box"] == ""]
        if films["label"].nunique() < len(CLASSES):
            raise UserError('CROP is "lesion", but no images of both classes have a lesion_box: add it to'
                            ' labels.csv, or set CROP to "breast" or None.')
        record["without_box"] = left_out["path"].tolist()
        if len(left_out):
            say(record, "LEFT OUT", f'*** {len(left_out)} images without a lesion_box, as CROP is "lesion" ***')
    films = films.reset_index(drop=True).assign(
        stamp=[stamp(folder / path) for path in films["path"]],
        box=films["lesion_box"].to_numpy())
    file, listing = name_cache(record, folder, crop, locate(output_dir)), locate(output_dir) / "bad_images.csv"
    with explain_write_errors(listing):
        listing.unlink(missing_ok=True)  # of an earlier run
    index, images, prints = open_cache(file)
    known = films[KEY].merge(index[KEY]).shape[0]
    say(record, "cache", f"{known} of {len(films)} images were read before: {shorten(file)}")
    for _ in range(10):  # another run may put its own there
        if index[KEY].to_numpy().tolist() == films[KEY].to_numpy().tolist():
            break
        with muted_stderr():  # image libraries write to it whatever they find
            bad = fill_cache(file, films, folder, crop, index, images, prints)
        if bad:
            with explain_write_errors(listing), write_aside(listing) as stream:
                stream.write(pd.DataFrame(bad, columns=["path", "reason"]).to_csv(index=False).encode())
            lines = list_some([": ".join(reason) for reason in bad])
            raise UserError(f"{len(bad)} of {len(films)} images cannot be used; mend or remove them"
                            f" (all are in {shorten(listing)}): {lines}")
        index, images, prints = open_cache(file)
    else:
        raise UserError(f"{file} cannot be read back: choose another OUTPUT_DIR, on a disk of this machine.")
    films = films.drop(columns=["stamp", "box"]).assign(**index.drop(columns=KEY))
    record["formats"] = films["format"].value_counts().to_dict()
    say(record, "images", "read as " + ", ".join(f"{n} x {kind}" for kind, n in record["formats"].items()))
    return films, images, prints


# ---- find copies -------------------------------------------------------------------------------


def correlate(one, other):
    """Correlation of pairs of fingerprints at the best angle, plain or mirrored: float (P,), up to 1."""
    found = []
    for turned in (one * other.conj(), one * other):
        waves = np.pad(turned.sum(axis=1), ((0, 0), (1, ANGLES // 2 - WAVES)))
        found.append(np.fft.irfft(waves, ANGLES, axis=1).max(axis=1) * ANGLES / 2)
    return np.maximum(*found)


def find_pairs(prints, least, most=8, block=512):
    """Pairs of fingerprints that correlate by `least` or more: int (P, 2).

    The magnitudes of the waves do not change when a picture is turned or mirrored. They propose the
    `most` nearest of each image, a block of rows at a time; the correlation of the phases decides.
    """
    magnitudes = np.abs(prints).reshape(len(prints), -1)
    most, found = min(most, len(prints) - 1), []
    for first in range(0, len(prints), block):
        rows = np.arange(first, min(first + block, len(prints)))
        alike = magnitudes[rows] @ magnitudes.T
        alike[rows - first, rows] = -1  # an image is no copy of itself
        near = np.argpartition(alike, -most)[:, -most:]
        pairs = np.column_stack([np.repeat(rows, most), near.ravel()])
        found.append(pairs[correlate(*prints[pairs.T]) >= least])
    return np.concatenate(found)


@stage
def group_copies(record, films, prints):
    """The table with its column group: the same for all images of a patient and all their copies.

    prints: the fingerprints of read_image, complex64 (N, 2, RINGS, WAVES).
    Copies are found turned by any angle or mirrored (on circles that are round in the film), and resized
    to another shape (on circles that are round in the 224 x 224 image), re-encoded, brightened or darkened.
    """
    found = [find_pairs(prints[:, 0], COPY_CORRELATION), find_pairs(prints[:, 1], RESHAPED_CORRELATION)]
    if isinstance(prints, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        prints._mmap.madvise(mmap.MADV_DONTNEED)  # they are not needed again, and count as resident memory
    pairs = np.unique(np.sort(np.concatenate(found)), axis=0)
    siblings = pd.Series(films.index).groupby(films["patient_id"].to_numpy()).transform("min")
    root = list(range(len(films)))

    def find_root(index):
        while root[index] != index:
            root[index] = index = root[root[index]]
        return index

    for one, other in [*pairs, *enumerate(siblings)]:
        low, high = sorted((find_root(one), find_root(other)))
        root[high] = low
    groups = films["patient_id"].iloc[[find_root(index) for index in films.index]].to_numpy()
    copies = len(set(pairs.ravel()))
    record["copies"] = {"pairs": len(pairs), "images": copies}
    if copies:
        say(record, "copies", f"{copies} images show the same picture as another; such patients stay on one side")
    return films.assign(group=groups)


# ---- split -------------------------------------------------------------------------------------


@stage
def split_patients(record, films, fold, seed):
    """The table with its column split filled in: "train", "validation" or "left out".

    Data without a split of its own is cut into FOLDS parts, stratified by class, patients with all their
    images and copies together, and part number `fold` is held out. In data with one, validation images of
    a patient or a picture that is trained on are left out; their column trained_on names such an image.
    Raises UserError where a side would lack a class.
    """
    films = films.copy()
    groups = films.groupby("label")["group"].nunique()
    if both := films.groupby("patient_id")["label"].nunique().gt(1).sum():
        say(record, "patients", f"{both} have benign and malignant images; all of them stay on one side")
    if films["split"].eq("").all():
        how = f"fold {fold} of 0 to {FOLDS - 1} is held out: whole patients, stratified by class"
        if groups.min() < FOLDS:
            raise UserError(
                f"DATA_DIR has {groups.min()} {groups.idxmin()} patients, but {FOLDS} folds need {FOLDS} or"
                " more of each class: add patients, or give the data a split of its own."
            )
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        held_out = list(splitter.split(films, films["label"], films["group"]))[fold][1]
        films["split"] = np.where(films.index.isin(held_out), "validation", "train")
    else:
        how = "as the data brings it; FOLD is not used"
        trained_on = films[films["split"] == "train"].drop_duplicates("group").set_index("group")["path"]
        leaks = films["split"].eq("validation") & films["group"].isin(trained_on.index)
        films["trained_on"] = films["group"].map(trained_on).where(leaks)
        films.loc[leaks, "split"] = "left out"
        if leaks.any():
            say(record, "LEFT OUT", f"*** {leaks.sum()} of {leaks.sum() + films['split'].eq('validation').sum()}"
                " validation images: they show a patient or a picture that is trained on (leaks.csv) ***")
    say(record, "split", how)
    record["split"] = {"how": how}
    for side in ("train", "validation"):
        groups = films[films["split"] == side].groupby("label")["patient_id"]
        counts = groups.agg(images="size", patients="nunique").T.to_dict()
        if missing := [name for name in CLASSES if name not in counts]:
            raise UserError(f"the {side} side has no {missing[0]} image ({how}): check DATA_DIR, FOLD and SEED.")
        words = [f"{name} {n['images']} images of {n['patients']} patients" for name, n in counts.items()]
        say(record, "", f"{side:<10} {', '.join(words)}")
        record["split"][side] = counts
    return films


# ---- feed --------------------------------------------------------------------------------------


def draw_epoch(labels, seed, epoch):
    """Which images an epoch shows, in order: int64 indices, twice as many as the majority class has.

    labels: int (N,), 0 or 1. The minority is repeated whole as often as it fits, then filled up with a
    random part of it. It depends on (seed, epoch) alone, so that any epoch can be drawn again.
    """
    rng = np.random.default_rng((seed, epoch))
    majority = np.bincount(labels).max()
    chosen = []
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        rounds = math.ceil(majority / len(members))
        chosen.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:majority])
    return rng.permutation(np.concatenate(chosen))


def augment(image, seed):
    """A random variant of `image`, float32 (H, W, 3) in 0..255; the same for the same seed, int (2,)."""
    flip, *seeds = tf.unstack(tf.random.split(seed, 4))
    shift, contrast, saturation = (tf.random.stateless_uniform([], key, -1, 1) for key in seeds)
    image = tf.image.stateless_random_flip_left_right(image, flip)
    image = tf.image.adjust_brightness(image, 255 * BRIGHTNESS * shift)
    image = tf.image.adjust_contrast(image, 1 + CONTRAST * contrast)
    image = tf.image.adjust_saturation(image, 1 + SATURATION * saturation)
    return tf.clip_by_value(image, 0, 255)


@stage
def feed(record, images, films, epochs, batch_size, seed):
    """(training, validation, steps): where batches come from, tf.data.Datasets, and the batches of an epoch.

    A batch is float32 (B, IMAGE_SIZE, IMAGE_SIZE, 3) in 0..255 and int64 labels (B,). training(first) is
    the dataset of all epochs from `first`, counted from 0: balanced, every draw augmented by (seed,
    epoch, place in the epoch), whatever the number of threads. validation is the dataset of every
    held-out image once, as it is, in the table's order, with weights, float32 (B,).
    Several devices (see spread) share every batch evenly, so all of their batches are full: those of
    training with further draws, those of validation with images of weight 0. The weights of all others
    make up for these, as Keras takes the mean over images and not over weights.
    """
    labels = films["label"].eq("malignant").to_numpy(np.int64)
    train, held_out = (np.flatnonzero(films["split"] == side) for side in ("train", "validation"))
    devices = tf.distribute.get_strategy().num_replicas_in_sync
    batch_size = math.ceil(batch_size / devices) * devices
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread sleeps ever longer, and the last batch waits until it wakes

    def fill(indices):
        return indices if devices == 1 else np.resize(indices, math.ceil(len(indices) / batch_size) * batch_size)

    def draw(epoch):
        return fill(train[draw_epoch(labels[train], seed, int(epoch))])

    def load(index):
        grey = tf.numpy_function(lambda i: images[i], [index], tf.uint8, stateful=False)
        grey = tf.ensure_shape(grey, (IMAGE_SIZE, IMAGE_SIZE))
        return tf.repeat(tf.cast(grey, tf.float32)[..., None], 3, axis=-1), tf.gather(labels, index)

    def make_epoch(epoch):
        def load_augmented(place, index):
            image, label = load(index)
            return augment(image, tf.random.fold_in([tf.constant(seed, tf.int64), epoch], place)), label

        order = tf.numpy_function(draw, [epoch], tf.int64, stateful=False)
        order = tf.data.Dataset.from_tensor_slices(tf.ensure_shape(order, (None,))).enumerate()
        return order.map(load_augmented, num_parallel_calls=os.cpu_count()).batch(batch_size)

    def training(first):
        return tf.data.Dataset.range(first, epochs).flat_map(make_epoch).prefetch(2).with_options(options)

    shown = fill(held_out)
    weights = np.where(np.arange(len(shown)) < len(held_out), len(shown) / len(held_out), 0).astype(np.float32)
    validation = tf.data.Dataset.from_tensor_slices((shown, weights)).map(
        lambda index, weight: (*load(index), weight), num_parallel_calls=os.cpu_count())
    record["batch"] = batch_size
    if devices > 1:
        say(record, "devices", f"{devices} share batches of {batch_size}, in full batches")
    record["draws_per_epoch"] = len(draw(0))
    say(record, "epoch", f"{record['draws_per_epoch']} augmented draws, half of them of each class; saturation"
        " does nothing, as all images are grey")
    steps = math.ceil(record["draws_per_epoch"] / batch_size)
    return training, validation.batch(batch_size).prefetch(2).with_options(options), steps


# ---- build -------------------------------------------------------------------------------------


def fetch_imagenet(url, md5):
    """(path, "") of the ImageNet weights in Keras' cache, or (None, reason) where they cannot be downloaded.

    Raises UserError where another file lies in their place, which Keras would replace or delete.
    """
    name = url.rsplit("/", 1)[1]
    home = Path(os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras"))
    cached = home / "models" / name
    if cached.is_file():
        if hashlib.md5(cached.read_bytes()).hexdigest() != md5:
            raise UserError(f"{cached} is not the file that {url} has: remove it, or set WEIGHTS to its path.")
        return cached, ""
    socket.setdefaulttimeout(20)  # seconds: a network that swallows packets would hang the run
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cached.parent) as aside:  # a download may break off
            file = keras.utils.get_file(name, url, cache_dir=aside, cache_subdir="", file_hash=md5)
            os.replace(file, cached)
        return cached, ""
    except Exception as error:  # a failed download is a bare Exception in Keras
        return None, (
            f"the ImageNet weights cannot be downloaded ({str(error).rsplit(': ', 1)[-1]}): fetch {url} where"
            " there is a network, and set WEIGHTS to the path of that file."
        )


@stage
def load_weights(record, backbone, weights, url, md5):
    """Fill `backbone` with the weights that the constant WEIGHTS names; False where they stay random.

    Random weights stand in for those of ImageNet on the phantoms only, where nothing is claimed, and
    every figure and file says so. Raises UserError where a file is missing or of another network.
    """
    file, origin = None, "random weights, not pretrained"
    if weights == "imagenet":
        file, reason = fetch_imagenet(url, md5)
        origin = f"ImageNet, {url}" if file else "random weights: this shows only that the pipeline works"
        if reason and "synthetic" not in record["note"]:
            raise UserError(reason)
        if reason:
            say(record, "RANDOM", f"*** {origin}; {reason} ***")
    elif weights is not None:
        file, origin = locate(weights), str(weights)
    if file is None:
        record["note"] = "; ".join(filter(None, (record["note"], origin)))
    else:
        before = backbone.get_weights()
        try:
            with warnings.catch_warnings(action="ignore"):  # of layers that stay random, which is checked below
                backbone.load_weights(file)
            kernels = [(old, new) for old, new in zip(before, backbone.get_weights(), strict=True) if old.ndim > 1]
            if any(np.array_equal(old, new) for old, new in kernels):
                raise ValueError("it leaves layers without weights")
        except Exception as error:  # Keras and h5py raise whatever the file leads them to
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"WEIGHTS: {file} holds no {backbone.name} without top layers ({reason}).") from error
    record["weights"] = {"origin": origin, "sha256": file and hashlib.sha256(file.read_bytes()).hexdigest()}
    say(record, "weights", origin)
    return file is not None


@stage
def build_model(record, backbone, pretrained, unfrozen_fraction, learning_rate):
    """The compiled classifier: raw RGB float (B, 224, 224, 3) in 0..255 to P(malignant), (B, 1).

    The top `unfrozen_fraction` of the backbone's layers trains (half a layer counts as one), the rest
    is frozen. In a pretrained backbone every BatchNormalization is frozen too: its statistics would
    follow batches of 13 images, and calling it with training=False does not keep Keras from that.
    """
    unfrozen = max(1, math.floor(round(unfrozen_fraction * len(backbone.layers), 6) + 0.5))
    for layer in backbone.layers[:-unfrozen]:
        layer.trainable = False
    for layer in backbone.layers:
        if pretrained and isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    full = {"dtype": "float32"}  # with MIXED_PRECISION too, so that no probability and no metric is rounded
    features = keras.layers.GlobalAveragePooling2D(name="pooled", **full)(backbone.output)
    features = keras.layers.Dense(HEAD_UNITS, activation="relu", name="head", **full)(features)
    features = keras.layers.Dropout(DROPOUT, name="dropout", **full)(features)
    logit = keras.layers.Dense(1, name="logit", **full)(features)
    probability = keras.layers.Activation("sigmoid", name="probability", **full)(logit)
    name = re.sub(r"\W+", "_", f"{backbone.name} {record['note']}").strip("_")
    model = keras.Model(backbone.inputs[0], probability, name=name)
    floats, devices = keras.config.dtype_policy().name, tf.distribute.get_strategy().num_replicas_in_sync
    xla = floats == "mixed_float16" and devices == 1  # it cannot compile what several devices share
    accuracy = keras.metrics.BinaryAccuracy(name="accuracy")  # its name alone would have the step traced twice
    model.compile(keras.optimizers.Adam(learning_rate), keras.losses.BinaryCrossentropy(),
                  weighted_metrics=[accuracy], jit_compile=xla)
    parameters, total = sum(layer.count_params() for layer in backbone.layers[-unfrozen:]), backbone.count_params()
    record["model"] = {
        "backbone": backbone.name,
        "layers": len(backbone.layers),
        "unfrozen_layers": unfrozen,
        "parameters": total,
        "unfrozen_parameters": parameters,
        "trained_parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        "batch_norm": "inference mode" if pretrained else "trained where unfrozen",
        "floats": floats,
        "xla": xla,
        "devices": devices,
        "sha256": hashlib.sha256(model.to_json().encode()).hexdigest(),
    }
    say(record, "unfrozen", f"the top {unfrozen} of {len(backbone.layers)} layers of {backbone.name}, with"
        f" {parameters:,} of {total:,} parameters ({parameters / total:.1%})")
    return model


# ---- train -------------------------------------------------------------------------------------


def name_run(record, films):
    """<backbone>-unfrozen<percent>-<6 hex digits of the settings, the network and the data>."""
    places = ("DATA_DIR", "OUTPUT_DIR", "WEIGHTS")  # what lies there counts, not where it lies
    settings = {name: value for name, value in record["constants"].items() if name not in places}
    settings |= {key: record[key] for key in ("augmentation", "head", "model")}
    settings |= {"weights": record["weights"]["sha256"]}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(films.to_csv(index=False).encode())
    percent = 100 * record["constants"]["UNFROZEN_FRACTION"]
    return f"{record['model']['backbone']}-unfrozen{percent:g}-{digest.hexdigest()[:6]}"


def lock(file, wait=False):
    """The open file, locked until it is closed or the process ends.

    Where another process holds it: wait for it, or raise UserError.
    """
    stream = file.open("a")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError) as error:
        stream.close()
        raise UserError(f"another process is at {file.stem[1:]}: wait for it, or change a constant.") from error
    return stream


@contextlib.contextmanager
def run_folder(record, films, output_dir):
    """A folder to write into, which becomes OUTPUT_DIR/<name of the run> once it is complete.

    It is new/ in the hidden folder OUTPUT_DIR/.<name of the run>, beside the state of the training: what a
    run that is stopped goes on from. An earlier run of the same name stays until the new one is complete.
    Raises UserError where another process is at the same run.
    """
    folder = locate(output_dir) / name_run(record, films)
    work = folder.with_name(f".{folder.name}")
    new, old = work / "new", work / "old"
    record["run_folder"] = shorten(folder)
    with explain_write_errors(folder), lock(folder.with_name(f".{folder.name}.lock")):
        if old.exists() and not folder.exists():  # killed between the two renames below
            old.rename(folder)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        new.mkdir(parents=True)
        say(record, "run folder", f"{shorten(folder)}, once the run is complete")
        try:
            yield new
        except BaseException:
            if not any(work.glob("*.state")):  # nothing to go on from
                shutil.rmtree(work, ignore_errors=True)
            raise
        for file in new.rglob("*.*"):
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    say(record, "finished", f"in {sum(record['seconds'].values()) / 60:.1f} minutes: {shorten(folder)}")


def name_state(record, folder):
    """The file from which training goes on; another release or another common.py may not go on from it."""
    code = hashlib.sha256(json.dumps(record["versions"]).encode() + SOURCE.encode())
    return folder.parent / f"{code.hexdigest()[:12]}.state"


def state_of(model):
    """All variables that an epoch changes: weights, the dropout's place in its random numbers, the optimizer's."""
    return [*model.variables, *model.optimizer.variables]


def save_state(model, history, file):
    """Write the history, a row of metrics and the seconds so far for each finished epoch, and all variables."""
    with write_aside(file) as stream:
        for array in (history, *map(np.asarray, state_of(model))):
            np.save(stream, array)


def load_state(model, file):
    """Put back all variables; returns the rows of the history, none where there is no such file."""
    if not file.exists():
        return []
    with file.open("rb") as stream:
        history = np.load(stream)
        for variable in state_of(model):
            variable.assign(np.load(stream))
    return history.tolist()


@stage
def train(record, model, training, validation, epochs, steps, folder):
    """Fit all epochs, keep the last; a table of epoch, loss, accuracy, val_loss, val_accuracy.

    Nothing is chosen on the validation side. After every epoch, the state is saved beside `folder`, and
    the next call goes on from it as if it had never stopped. Raises UserError where the loss is not finite.
    """
    columns, state = ["loss", "accuracy", "val_loss", "val_accuracy"], name_state(record, folder)
    model.optimizer.build(model.trainable_variables)
    rows = load_state(model, state)
    before, started = rows[-1][-1] if rows else 0, time.perf_counter()
    if rows:
        record["seconds"]["train, before it was stopped"] = round(before, 2)
        where = f"at epoch {len(rows) + 1}" if len(rows) < epochs else "after the last epoch"
        record["continued"] = f"{where} of {epochs}"
        say(record, "continuing", record["continued"])

    def keep(epoch, metrics):
        rows.append([*(metrics[name] for name in columns), before + time.perf_counter() - started])
        save_state(model, rows, state)

    stop = keras.callbacks.TerminateOnNaN(raise_error=True)
    try:
        if len(rows) < epochs:
            model.fit(training(len(rows)), epochs=epochs, initial_epoch=len(rows), steps_per_epoch=steps,
                      validation_data=validation, shuffle=False,
                      callbacks=[stop, keras.callbacks.LambdaCallback(on_epoch_end=keep)])
        if not all(np.isfinite(weight).all() for weight in model.weights):
            raise RuntimeError("NaN in the weights, which a ReLU can hide from the loss")
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(f"the memory of {record['device']} is too small for a step: lower BATCH_SIZE, which is"
                        " another run.") from error
    except RuntimeError as error:
        if "NaN" not in str(error):
            raise
        state.unlink(missing_ok=True)
        raise UserError(f"training left the finite numbers ({error}): lower LEARNING_RATE.") from error
    history = pd.DataFrame(rows, columns=[*columns, "seconds"])[columns]
    history.insert(0, "epoch", range(1, epochs + 1))
    return history


# ---- evaluate ----------------------------------------------------------------------------------


def count_outcomes(labels, probabilities, weights):
    """(fpr, tpr, metrics): the ROC curve and every metric, for each of R ways to weigh the N images.

    labels: int (N,), 1 where malignant; probabilities: float (N,), of malignancy; weights: (R, N), how
    often each image counts. fpr, tpr: float (R, L), one column for each distinct probability, from the
    strictest threshold down; metrics: {name: float (R,)}. Malignant is the positive class. A ratio of
    nothing is 0, as in scikit-learn (the precision where no image was called malignant); the AUC is nan
    where a class is missing.
    """
    order = np.argsort(-probabilities, kind="stable")
    levels = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
    above = [np.cumsum(weights[:, order] * (labels[order] == label), axis=1)[:, levels] for label in (0, 1)]
    fps, tps = (np.column_stack([np.zeros(len(weights)), counts]) for counts in above)
    called = np.searchsorted(-probabilities[order][levels], -THRESHOLD, side="right")  # levels of the malignant
    negatives, positives, fp, tp = fps[:, -1], tps[:, -1], fps[:, called], tps[:, called]

    def share(part, whole):
        return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)

    fpr, tpr = share(fps, negatives[:, None]), share(tps, positives[:, None])
    auc = np.sum(np.diff(fpr) * (tpr[:, 1:] + tpr[:, :-1]) / 2, axis=1)
    metrics = {
        "accuracy": share(tp + negatives - fp, positives + negatives),
        "precision": share(tp, tp + fp),
        "recall": share(tp, positives),
        "f1": share(2 * tp, tp + fp + positives),
        "specificity": share(negatives - fp, negatives),
        "auc": np.where((negatives > 0) & (positives > 0), auc, np.nan),
        "sensitivity_at_90_specificity": np.where(fpr <= 0.1 + 1e-9, tpr, 0).max(axis=1),
        "specificity_at_90_sensitivity": np.where(tpr >= 0.9 - 1e-9, 1 - fpr, 0).max(axis=1),
    }
    return fpr, tpr, metrics


def resample(groups, seed, most=100):
    """Bootstrap weights of N images, int (up to `most`, N) at a time, REPLICATES in all.

    groups: (N,), whose image it is. Whole patients are drawn with replacement, as many as there are: two
    images of one patient are no two independent cases (Efron and Tibshirani 1993, chapter 8).
    """
    _, members = np.unique(groups, return_inverse=True)
    patients = members.max() + 1
    rng = np.random.default_rng(seed)
    for first in range(0, REPLICATES, most):
        drawn = rng.multinomial(patients, np.full(patients, 1 / patients), min(most, REPLICATES - first))
        yield drawn[:, members]


def measure(labels, probabilities, groups, seed=0):
    """(metrics, band): a dict of every metric with its 95 % interval, and the band of the ROC curve.

    labels, probabilities: as in count_outcomes; groups: (N,), whose image it is. band: float (3, 101), a
    grid of false positive rates and between which true positive rates 95 % of the curves lie there.
    """
    _, _, exact = count_outcomes(labels, probabilities, np.ones((1, len(labels))))
    grid, curves, samples = np.linspace(0, 1, 101), [], []
    for weights in resample(groups, seed):
        fpr, tpr, drawn = count_outcomes(labels, probabilities, weights)
        curves += [np.interp(grid, x, y) for x, y in zip(fpr, tpr, strict=True)]
        samples.append(drawn)
    samples = {name: np.concatenate([drawn[name] for drawn in samples]) for name in exact}
    called = probabilities >= THRESHOLD
    tn, fp, fn, tp = (int(n) for n in sklearn.metrics.confusion_matrix(labels, called, labels=[0, 1]).ravel())
    metrics = {name: float(value[0]) for name, value in exact.items()} | {
        "ci95": {name: np.nanquantile(values, (0.025, 0.975)).tolist() for name, values in samples.items()},
        "confusion_matrix": {"tn": tn, "fp": fp, "fn": fn, "tp": tp},
        "majority_baseline": max(tn + fp, fn + tp) / len(labels),
        "positive_class": "malignant",
        "threshold": THRESHOLD,
    }
    return metrics, np.stack([grid, *np.quantile(curves, (0.025, 0.975), axis=0)])


def with_interval(metrics, name):
    """A metric as a person reads it: 0.71 [0.64, 0.78]."""
    return "{:.2f} [{:.2f}, {:.2f}]".format(metrics[name], *metrics["ci95"][name])


def last_feature_maps(model):
    """Name of the layer with the last feature maps that no pooling has made coarser yet."""
    pooling = (keras.layers.MaxPooling2D, keras.layers.GlobalAveragePooling2D)
    return next(layer.name for layer in reversed(model.layers)
                if len(layer.output.shape) == 4 and not isinstance(layer, pooling))


def make_classifier(model):
    """A compiled function that calls images and explains why: float32 (B, H, W, 3) in 0..255 to two tensors.

    The first is P(malignant), float32 (B,), the second Grad-CAM of the predicted class (Selvaraju et al.
    2017), float32 (B, h, w) in 0..1, on the last feature maps. The logit is differentiated, as a saturated
    sigmoid has no gradient, and its sign is turned for benign. A map without positive evidence is 0
    everywhere.
    """
    maps = model.get_layer(last_feature_maps(model)).output
    bottom = keras.Model(model.inputs[0], maps)
    top = keras.Model(maps, [model.get_layer("logit").output, model.output])

    @tf.function(input_signature=[tf.TensorSpec(model.inputs[0].shape, tf.float32)])
    def classify(images):
        features = bottom(images, training=False)
        with tf.GradientTape() as tape:
            tape.watch(features)
            logit, probability = (output[:, 0] for output in top(features, training=False))
            evidence = tf.where(probability >= THRESHOLD, logit, -logit)
        gradient, features = (tf.cast(part, tf.float32) for part in (tape.gradient(evidence, features), features))
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        cams = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
        return probability, tf.math.divide_no_nan(cams, tf.reduce_max(cams, axis=(1, 2), keepdims=True))

    return classify


@stage
def evaluate(record, model, validation, films):
    """(predictions, maps, metrics, band) of the held-out images.

    predictions: path, patient_id, label, probability (of malignancy) and predicted, in the order and
    with the index of `films`; maps: their Grad-CAM, float32 (N, h, w), see make_classifier. metrics and
    band: those of measure(), and what they were measured on.
    """
    held_out = films[films["split"] == "validation"]
    classify = make_classifier(model)
    parts = [[part.numpy() for part in classify(pixels)] for pixels, _, _ in validation]
    probabilities, maps = (np.concatenate(part)[: len(held_out)] for part in zip(*parts, strict=True))
    probabilities = probabilities.astype(float)
    predictions = held_out[["path", "patient_id", "label"]].assign(
        probability=probabilities, predicted=np.take(CLASSES, probabilities >= THRESHOLD))
    labels = predictions["label"].eq("malignant").to_numpy(int)
    metrics, band = measure(labels, probabilities, held_out["group"], record["constants"]["SEED"])
    metrics |= {"validation_images": len(held_out), "validation_patients": held_out["patient_id"].nunique()}
    patients = f"{metrics['validation_patients']} held-out {record['patients']}"
    record["held_out"] = f"{len(held_out)} images of {patients}"
    for name in metrics["ci95"]:
        say(record, "result", f"{name.replace('_', ' '):<29} {with_interval(metrics, name)}")
    say(record, "", f"on {record['held_out']}, with 95 % intervals over patients; always answering the"
        f" majority has accuracy {metrics['majority_baseline']:.2f}")
    for name in set(CLASSES) - set(predictions["predicted"]):
        say(record, "WARNING", f"*** no image was called {name} ***")
    if record["note"]:
        say(record, "NOTE", f"*** {record['note']} ***")
    return predictions, maps, metrics, band


# ---- explain -----------------------------------------------------------------------------------


def lay_over(image, cam):
    """The map on the image, uint8 (IMAGE_SIZE, IMAGE_SIZE, 3) RGB: strong evidence covers, weak shows through."""
    heat = cv2.resize(cam, image.shape, interpolation=cv2.INTER_LINEAR)[..., None]
    colour = matplotlib.colormaps["viridis"](heat[..., 0])[..., :3] * 255
    return np.rint(image[..., None] * (1 - 0.6 * heat) + colour * 0.6 * heat).astype(np.uint8)


def select_cases(predictions, most=4):
    """The rows of `predictions` to look at, with their outcome: up to `most` of each, surest first."""
    right = np.where(predictions["predicted"] == predictions["label"], "true_", "false_")
    called = np.where(predictions["predicted"] == "malignant", "positive", "negative")
    ranked = predictions.assign(outcome=np.char.add(right, called))
    ranked = ranked.sort_values("probability", key=lambda p: -abs(p - THRESHOLD), kind="stable")
    return pd.concat([ranked[ranked["outcome"] == outcome].head(most) for outcome in OUTCOMES])


def place_boxes(film):
    """The lesion boxes of a row of the table: float (K, 4), x, y, width and height as shares of its image."""
    corner, shape = (film.left, film.top, 0, 0), (film.width, film.height)
    return (read_boxes(film.lesion_box) - corner) / (shape * 2)


def play_pointing_game(films, maps, malignant):
    """(hits, game): whether the peak of each map falls into a lesion box, and how often (Zhang et al. 2016).

    films: N rows with a lesion_box; maps: float (N, h, w); malignant: bool (N,), true positives. hits:
    bool (N,); an empty map is a miss. The share that chance would hit is that of the peaks of all other
    images in the boxes of each, so that a habit of pointing at the middle does not count as skill.
    """
    rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), maps.shape[1:])
    x, y = (columns + 0.5) / maps.shape[2], (rows + 0.5) / maps.shape[1]
    hits, chance, found = np.zeros(len(films), bool), np.zeros(len(films)), maps.any(axis=(1, 2))
    for row, film in enumerate(films.itertuples()):
        inside = np.zeros(len(films), bool)  # the peaks of all images, in the boxes of this one
        for left, top, width, height in place_boxes(film):
            inside |= found & (left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)
        hits[row] = inside[row]
        chance[row] = (inside.sum() - inside[row]) / max(1, len(films) - 1)
    groups = {"images": np.ones(len(films), bool), "true_positives": malignant}
    game = {name: {"images": int(of.sum()), "hits": int(hits[of].sum()), "share": float(hits[of].mean()),
                   "chance": float(chance[of].mean())}
            for name, of in groups.items() if of.any()}
    return hits, game


def describe_game(metrics):
    """Sentences on the pointing game, for all images and the true positives; none where it was not played."""
    return [f"the Grad-CAM peak is in the lesion box of {game['hits']} of {game['images']}"
            f" {name.replace('_', ' ')} ({game['share']:.2f}; by chance {game['chance']:.2f})"
            for name, game in metrics.get("pointing_game", {}).items()]


@stage
def explain(record, images, films, predictions, maps, metrics):
    """The selected cases with their image, uint8 (IMAGE_SIZE, IMAGE_SIZE), Grad-CAM map, boxes and hit.

    Where held-out films have a lesion_box, the pointing game over all of them goes into `metrics`.
    """
    malignant, held_out = predictions["predicted"].eq("malignant").to_numpy(), films.loc[predictions.index]
    boxed = held_out["lesion_box"].ne("").to_numpy()
    hits = pd.Series("", index=predictions.index)
    if boxed.any():
        right = malignant & predictions["label"].eq("malignant").to_numpy()
        found, metrics["pointing_game"] = play_pointing_game(held_out[boxed], maps[boxed], right[boxed])
        hits[boxed] = np.where(found, "peak inside the lesion box", "peak outside the lesion box")
        for sentence in describe_game(metrics):
            say(record, "pointing", sentence)
    cases = select_cases(predictions).assign(hit=hits)
    boxes = [place_boxes(film) for film in held_out.loc[cases.index].itertuples()]
    shown = predictions.index.get_indexer(cases.index)
    return cases.assign(image=list(images[cases.index]), cam=list(maps[shown]), boxes=boxes)


# ---- report ------------------------------------------------------------------------------------


def save_table(record, table, path):
    """Write a CSV; nine digits give a float32 back exactly."""
    note = {"note": record["note"]} if record["note"] else {}
    table.assign(**note).to_csv(path, index=False, float_format="%.9g", lineterminator="\n")


def save_json(content, path):
    path.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def start_figure(record, width, height, rows=1, columns=1):
    """(figure, axes): a figure of that many inches under the title of the run."""
    figure = Figure((width, height), layout="constrained")
    model = record["model"]
    figure.suptitle(f"{model['backbone']}, top {model['unfrozen_layers']} of {model['layers']} layers trained")
    return figure, figure.subplots(rows, columns)


def save_figure(record, figure, path):
    """Write a PNG, with what the run has to say about itself below it."""
    if record["note"]:
        note = textwrap.fill(record["note"].upper(), int(12 * figure.get_figwidth()))
        figure.supxlabel(note, fontsize=8, color="firebrick", fontweight="bold")
    with warnings.catch_warnings(action="ignore"):  # of characters in a file name that no font here has
        figure.savefig(path, dpi=120)


def draw_training_curves(record, history, path):
    figure, both = start_figure(record, 9, 4, columns=2)
    for axes, name in zip(both, ("loss", "accuracy"), strict=True):
        axes.plot(history["epoch"], history[name], "o-", label="training (augmented, with dropout)")
        axes.plot(history["epoch"], history[f"val_{name}"], "s--", label="validation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    both[0].set(xlabel="epoch", ylabel="binary cross-entropy", ylim=(0, None))
    both[1].set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    save_figure(record, figure, path)


def draw_confusion_matrix(record, predictions, metrics, path):
    figure, axes = start_figure(record, 5, 4.8)
    sklearn.metrics.ConfusionMatrixDisplay.from_predictions(
        predictions["label"], predictions["predicted"], labels=CLASSES, ax=axes, cmap="Blues", colorbar=False,
        text_kw={"fontsize": 22})
    axes.set(xlabel=f"predicted (threshold {THRESHOLD})", ylabel="true")
    axes.set_title(f"{record['held_out']}\nsensitivity {with_interval(metrics, 'recall')}, specificity"
                   f" {with_interval(metrics, 'specificity')}", fontsize=9)
    save_figure(record, figure, path)


def draw_roc_curve(record, predictions, metrics, band, path):
    figure, axes = start_figure(record, 5, 5.4)
    axes.fill_between(*band, alpha=0.2, label="95 % of bootstrap curves, over patients")
    sklearn.metrics.RocCurveDisplay.from_predictions(
        predictions["label"], predictions["probability"], pos_label="malignant", ax=axes,
        name=record["model"]["backbone"], plot_chance_level=True)
    axes.get_lines()[0].set_label(f"AUC {with_interval(metrics, 'auc')}")
    axes.plot(1 - metrics["specificity"], metrics["recall"], "ko", label=f"threshold {THRESHOLD}")
    axes.plot(0.1, metrics["sensitivity_at_90_specificity"], "v", color="tab:orange",
              label=f"sensitivity {metrics['sensitivity_at_90_specificity']:.2f} at 90 % specificity")
    axes.plot(1 - metrics["specificity_at_90_sensitivity"], 0.9, "^", color="tab:green",
              label=f"specificity {metrics['specificity_at_90_sensitivity']:.2f} at 90 % sensitivity")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title(record["held_out"], fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    save_figure(record, figure, path)


def draw_case(axes, case, heat=False):
    """The image as the model sees it, with the map laid over it or not; its lesion boxes are dashed."""
    axes.imshow(lay_over(case.image, case.cam) if heat else case.image, cmap="gray", vmin=0, vmax=255)
    for left, top, width, height in case.boxes * IMAGE_SIZE:
        axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="white", lw=0.8, ls="--"))
    if heat and not case.cam.any():
        axes.text(0.5, 0.05, "no positive evidence", transform=axes.transAxes, color="white", ha="center")


def draw_overlay(record, case, path):
    """One case: the image, the map and the overlay side by side."""
    figure, panels = start_figure(record, 10, 4.3, columns=3)
    draw_case(panels[0], case)
    heat = panels[1].imshow(case.cam, cmap="viridis", vmin=0, vmax=1)
    draw_case(panels[2], case, heat=True)
    figure.colorbar(heat, ax=panels[2], shrink=0.8, label=f"evidence for {case.predicted}")
    titles = ("what the model sees", "Grad-CAM, {} x {}".format(*case.cam.shape), case.hit or "overlay")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.axis("off")
    words = f"{case.outcome.replace('_', ' ')}: {case.label}, probability of malignancy {case.probability:.3f}"
    figure.suptitle(f"{case.path}\n{words}", fontsize=10, parse_math=False)
    save_figure(record, figure, path)


def draw_sheet(record, cases, path):
    """All cases on one sheet: a row for each outcome, image and overlay in pairs."""
    figure, grid = start_figure(record, 13, 7.6, rows=len(OUTCOMES), columns=8)
    for panels, outcome in zip(grid, OUTCOMES, strict=True):
        rows = list(cases[cases["outcome"] == outcome].itertuples())
        panels[0].set_ylabel(outcome.replace("_", "\n") + ("" if rows else "\n(none)"), fontsize=11)
        for axes in panels:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for case, image, overlay in zip(rows, panels[::2], panels[1::2], strict=False):
            draw_case(image, case)
            image.set_title(case.label, fontsize=10)
            draw_case(overlay, case, heat=True)
            overlay.set_title(f"P(malignant) {case.probability:.2f}", fontsize=10)
    save_figure(record, figure, path)


@stage
def report(record, folder, films, history, predictions, metrics, band, cases):
    """Write the tables and figures of the run into `folder`."""
    save_table(record, films[["path", "label", "patient_id", "split", "group"]], folder / "split.csv")
    leaks = films[films["split"] == "left out"]
    if len(leaks):
        save_table(record, leaks[["path", "label", "patient_id", "trained_on"]], folder / "leaks.csv")
    save_table(record, history, folder / "history.csv")
    save_table(record, predictions, folder / "predictions.csv")
    save_json(metrics | ({"note": record["note"]} if record["note"] else {}), folder / "metrics.json")
    draw_training_curves(record, history, folder / "training_curves.png")
    draw_confusion_matrix(record, predictions, metrics, folder / "confusion_matrix.png")
    draw_roc_curve(record, predictions, metrics, band, folder / "roc_curve.png")
    draw_sheet(record, cases, folder / "grad_cam_example.png")
    (folder / "gradcam").mkdir()
    numbers = cases.groupby("outcome").cumcount() + 1
    for case, number in zip(cases.itertuples(), numbers, strict=True):
        stem = re.sub(r"[^\w.-]", "_", Path(case.path).stem)[:100]
        draw_overlay(record, case, folder / "gradcam" / f"{case.outcome}_{number:02d}_{stem}.png")


@stage
def save_model(record, model, folder):
    """Write model.keras, which plain Keras loads; it takes raw RGB images in 0..255.

    Without the optimizer, which would be two thirds of the file: training goes on from the state.
    """
    keras.Model(model.inputs[0], model.output, name=model.name).save(folder / "model.keras")


# ---- compare runs ------------------------------------------------------------------------------


def tabulate_run(run):
    """A row of runs.csv: settings, what they were measured on, and every metric with its interval."""
    settings, metrics = run["settings"], run["metrics"]
    row = {"run": run["name"], "backbone": settings["model"]["backbone"], "note": settings["note"]}
    row |= {name.lower(): settings["constants"][name] for name in CONSTANTS if name != "OUTPUT_DIR"}
    row |= {"images": metrics["validation_images"], "patients": metrics["validation_patients"]}
    for name, (low, high) in metrics["ci95"].items():
        row |= {name: metrics[name], f"{name}_low": low, f"{name}_high": high}
    return row | {"minutes": round(sum(settings["seconds"].values()) / 60, 1)}


def read_runs(output_dir):
    """The finished runs in OUTPUT_DIR by name: dicts of name, folder, settings, metrics, predictions, section.

    A folder that cannot be read, such as one of another version, is said and left out.
    """
    runs = []
    for file in sorted(output_dir.glob("[!.]*/settings.json")):  # written last: the run is complete
        folder = file.parent
        try:
            run = {"name": folder.name, "folder": folder, "settings": json.loads(file.read_text("utf-8"))}
            run["metrics"] = json.loads((folder / "metrics.json").read_text("utf-8"))
            tables = [pd.read_csv(folder / name, dtype={"patient_id": str, "group": str}, keep_default_na=False)
                      for name in ("predictions.csv", "split.csv")]
            run["predictions"] = tables[0].merge(tables[1][["path", "group"]], on="path")
            run["section"], run["row"] = show_run(run), tabulate_run(run)
            runs.append(run)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            print(f"{'skipped':<11} {shorten(folder)} in the comparison: {type(error).__name__} {error}")
    return runs


def pool_folds(table):
    """A row per setting of which several folds were run: mean and standard deviation over the folds."""
    setting = ["backbone", "note", *(name.lower() for name in CONSTANTS if name not in ("OUTPUT_DIR", "FOLD"))]
    rows = []
    for values, folds in table.groupby(setting, dropna=False):
        if folds["fold"].nunique() > 1:
            row = dict(zip(setting, values, strict=True)) | {"folds": ", ".join(map(str, sorted(folds["fold"])))}
            rows.append(row | {name: f"{folds[name].mean():.2f} ± {folds[name].std():.2f}" for name in CLAIMED})
    return pd.DataFrame(rows)


def compare_pairs(runs):
    """A row per two runs with the same held-out images: the difference in AUC, with a paired bootstrap."""
    aucs = {}  # exact, then of the same resampled patients for every run
    for run in runs:
        table = run["predictions"]
        labels, probabilities = table["label"].eq("malignant").to_numpy(int), table["probability"].to_numpy()
        weights = [np.ones((1, len(table))), *resample(table["group"], 0)]
        aucs[run["name"]] = np.concatenate([count_outcomes(labels, probabilities, w)[2]["auc"] for w in weights])
    rows = []
    for one, other in itertools.combinations(runs, 2):
        held_out = [run["predictions"][["path", "label", "group"]] for run in (one, other)]
        if held_out[0].equals(held_out[1]):
            exact, *drawn = aucs[one["name"]] - aucs[other["name"]]
            low, high = np.nanquantile(drawn, (0.025, 0.975))
            better = "the first is better" if low > 0 else "the second is better"
            rows.append({"first": one["name"], "second": other["name"], "patients": held_out[0]["group"].nunique(),
                         "difference in AUC": f"{exact:+.2f} [{low:+.2f}, {high:+.2f}]",
                         "verdict": "no evidence of a difference" if low <= 0 <= high else better})
    return pd.DataFrame(rows)


def draw_comparison(runs, table):
    """Every metric of every run as a point with its 95 % interval; the published claims as dashed lines."""
    figure = Figure((12, 2.2 + 0.35 * len(runs)), layout="constrained")
    places = np.arange(len(runs))[::-1]
    for axes, (name, claims) in zip(figure.subplots(1, len(CLAIMED), sharey=True), CLAIMED.items(), strict=True):
        for backbone, style in (("resnet50", ("tab:blue", "o")), ("vgg16", ("tab:orange", "s"))):
            rows = table["backbone"].eq(backbone).to_numpy()
            low, value, high = (table.loc[rows, name + end] for end in ("_low", "", "_high"))
            axes.errorbar(value, places[rows], xerr=[value - low, high - value], color=style[0], fmt=style[1],
                          capsize=3, label=backbone)
            if backbone in claims:
                axes.axvline(claims[backbone], color=style[0], ls="--", lw=1, label=f"claimed for {backbone}")
        axes.set(title=name, xlim=(-0.03, 1.03), yticks=places, ylim=(-0.6, len(runs) - 0.4))
        axes.set_yticklabels(table["run"], fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_roc_curves(runs):
    """The ROC curves of all runs over each other."""
    figure = Figure((7, 6), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        sklearn.metrics.RocCurveDisplay.from_predictions(
            run["predictions"]["label"], run["predictions"]["probability"], pos_label="malignant", ax=axes,
            name=f"{run['name']}, fold {run['settings']['constants']['FOLD']}")
    axes.plot([0, 1], [0, 1], "k--", lw=1, label="chance")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.legend(loc="lower right", fontsize=7)
    return figure


def embed(picture, alt):
    """An <img> with the picture in it: the Path of a PNG, or a figure."""
    if isinstance(picture, Figure):
        buffer = io.BytesIO()
        picture.savefig(buffer, dpi=120)
        content = buffer.getvalue()
    else:
        content = picture.read_bytes()
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'


def scroll(content):
    """HTML that may be wider than the screen, which a finger and a keyboard can scroll."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="scrollable">{content}</div>'


def show_table(table, empty):
    """A table as HTML, its cells escaped, or a sentence where it has no row."""
    return f"<p>{empty}</p>" if table.empty else scroll(table.to_html(index=False, border=0))


def show_run(run):
    """The section of a run, as HTML."""
    settings, metrics, folder = run["settings"], run["metrics"], run["folder"]
    backbone, note = settings["model"]["backbone"], settings["note"]
    defaults = {name: default for name, (_, _, default) in CONSTANTS.items()}
    defaults["LEARNING_RATE"] = defaults["LEARNING_RATE"][backbone]
    differs = [f"{name} = {value!r}" for name, value in settings["constants"].items() if value != defaults[name]]
    side = settings["split"]
    trust = [f"Split: {side['how']}."]
    for of, words in (("train", "Trained on"), ("validation", "Held out")):
        counts = [f"{n['images']} {name} images of {n['patients']} patients" for name, n in side[of].items()]
        trust.append(f"{words}: {', '.join(counts)}.")
    trust += [
        "Patients known from: " + ", ".join(f"{of} ({n} images)" for of, n in settings["patients_from"].items())
        + f"; {settings['copies']['images']} images show the same picture as another and stay with it.",
        f"Weights: {settings['weights']['origin']}. {settings['model']['unfrozen_layers']} of"
        f" {settings['model']['layers']} layers trained, batch norm: {settings['model']['batch_norm']}.",
        "Nothing was chosen on the held-out side: fixed epochs, the weights of the last one, threshold 0.5.",
    ]
    if (folder / "leaks.csv").is_file():
        trust.append("Left out of the metrics: validation images of what is trained on, see leaks.csv.")
    values = [(name.replace("_", " "), with_interval(metrics, name)) for name in metrics["ci95"]]
    values.insert(1, ("accuracy of always answering the majority", f"{metrics['majority_baseline']:.2f}"))
    values = pd.DataFrame(values, columns=["metric", "value [95 % interval]"])
    trust += [f"Pointing game: {sentence}." for sentence in describe_game(metrics)]
    outcomes = "{tn} true negatives, {fp} false positives, {fn} false negatives, {tp} true positives"
    pictures = (("confusion_matrix", "confusion matrix: " + outcomes.format(**metrics["confusion_matrix"])),
                ("roc_curve", f"ROC curve, AUC {with_interval(metrics, 'auc')}"),
                ("training_curves", "loss and accuracy of every epoch, training and validation"),
                ("grad_cam_example", "Grad-CAM overlays of the most confident held-out cases, by outcome"))
    return "\n".join([
        f'<section id="{html.escape(run["name"])}"><h2>{html.escape(run["name"])}</h2>',
        f'<p class="badge">{html.escape(note)}</p>' if note else "",
        f"<p>Settings that differ from the defaults: {html.escape(', '.join(differs) or 'none')}.</p>",
        show_table(values, ""),
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in trust) + "</ul>",
        '<div class="pictures">', *(embed(folder / f"{name}.png", alt) for name, alt in pictures), "</div>",
        "</section>"])


def compose_page(runs, table):
    """report.html as text; table: their rows of runs.csv."""
    columns = ["run", "data_dir", "crop", "note", "unfrozen_fraction", "fold", "seed", "images", "patients",
               "minutes"]
    shown = table[columns].assign(
        **{name: [with_interval(run["metrics"], name) for run in runs] for name in CLAIMED})
    pooled = pool_folds(table).drop(columns="weights", errors="ignore")
    page = PAGE
    for name, part in {
        "COMPARISON": scroll(embed(draw_comparison(runs, table), "every metric of every run with its 95 %"
                                   " interval; the same numbers stand in the table")),
        "CURVES": embed(draw_roc_curves(runs), "ROC curves of all runs over each other"),
        "RUNS": show_table(shown, ""),
        "POOLED": show_table(pooled, "No setting has been run on several folds yet."),
        "PAIRS": show_table(compare_pairs(runs), "No two runs held out the same images yet."),
        "SECTIONS": "\n".join(run["section"] for run in runs),
    }.items():
        page = page.replace(f"<!--{name}-->", part)
    return page


def compare(output_dir):
    """Write runs.csv and report.html into OUTPUT_DIR, from the run folders that are in it now."""
    output_dir = locate(output_dir)
    with explain_write_errors(output_dir), lock(output_dir / ".report.lock", wait=True):  # the last reads all runs
        if runs := read_runs(output_dir):
            table = pd.DataFrame([run["row"] for run in runs])
            for name, text in (("runs.csv", table.to_csv(index=False, lineterminator="\n")),
                               ("report.html", compose_page(runs, table))):
                with write_aside(output_dir / name) as stream:
                    stream.write(text.encode())


# ---- one new image -----------------------------------------------------------------------------


def predict(model_path, image_path, lesion_box=""):
    """(probability, overlay) of one film: P(malignant), and its Grad-CAM, uint8 (224, 224, 3) RGB.

    The film is read as in training, where a lesion_box was needed with CROP = "lesion" only. Raises
    UserError where it, or the model, or the settings.json beside the model cannot be read.
    """
    model_path = locate(model_path)
    if model_path.suffix != ".keras":  # older formats may hold code
        raise UserError(f"{model_path} is no model.keras of a run.")
    try:
        model = keras.models.load_model(model_path, safe_mode=True)
        crop = json.loads(model_path.with_name("settings.json").read_text("utf-8"))["constants"]["CROP"]
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{model_path} and the settings.json beside it cannot be loaded: {error}") from error
    if not re.fullmatch(LESION_BOXES, lesion_box) or (crop == "lesion" and not lesion_box):
        raise UserError(f"{model_path} with CROP = {crop!r} needs a lesion_box of {image_path}: x:y:width:height")
    image, *_ = read_image(locate(image_path), crop, lesion_box)
    pixels = np.repeat(image[None, ..., None], 3, axis=-1).astype(np.float32)
    probabilities, maps = make_classifier(model)(pixels)
    return float(probabilities[0]), lay_over(image, maps[0].numpy())


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Mammograms: benign or malignant</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; }
p, li, h2 { overflow-wrap: anywhere; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #8886; white-space: nowrap; }
section td { white-space: normal; }
.scroll { overflow-x: auto; margin: 1rem 0; }
.scroll img { max-width: none; width: max(100%, 60rem); }
.badge { display: inline-block; background: #b22222; color: #fff; padding: 0.1rem 0.6rem; border-radius: 0.3rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.pictures img:nth-child(n+3) { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 0.3rem; }
section { border-top: 2px solid #8886; margin-top: 2rem; }
@page { size: A4 landscape; margin: 1cm; }
@media print {
  body { max-width: none; font-size: 12px; }
  table { font-size: 8px; } th, td { white-space: normal; padding: 0.1rem 0.3rem; }
  .scroll { overflow: visible; } .scroll img { width: 100%; }
  img { max-height: 17cm; width: auto; } section { break-before: page; } tr, img { break-inside: avoid; }
}
</style>
</head>
<body>
<main>
<h1>Mammograms: benign or malignant</h1>
<p><strong>Research software, not for clinical use.</strong> Every interval is a 95 % bootstrap interval over
patients, not images. Dashed lines are claims of the original work, not measured here.</p>
<!--COMPARISON-->
<!--RUNS-->
<h2>Folds of one setting, mean ± standard deviation</h2>
<!--POOLED-->
<h2>Two settings on the same held-out patients</h2>
<p>AUC of the first minus AUC of the second, resampling the same patients for both.</p>
<!--PAIRS-->
<h2>ROC curves</h2>
<!--CURVES-->
<!--SECTIONS-->
</main>
</body>
</html>
"""
