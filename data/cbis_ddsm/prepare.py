"""Make labels.csv for CBIS-DDSM: digitised films with biopsy-proven labels, in a download of yours.

Get the images from TCIA (https://www.cancerimagingarchive.net/collection/cbis-ddsm/, DICOM, 164 GB) or Kaggle
(awsaf49/cbis-ddsm-breast-cancer-image-dataset, a JPEG copy), and the four tables *_case_description_*_set.csv
from TCIA (Kaggle has them in csv/). Leave everything as it comes, with the tables anywhere below the download
or beside this file. Then

    python data/cbis_ddsm/prepare.py DOWNLOAD            whole films
    python data/cbis_ddsm/prepare.py DOWNLOAD --crops    abnormalities, as the collection cuts them out

writes labels.csv beside this file, and missing.csv where images are missing. Nothing is copied: labels.csv
points into the download. Crops are opened, as only their pixels tell them from the masks beside them.

The licence is CC BY 3.0: cite Lee et al. 2017, Sci. Data 4:170177.
"""
import argparse
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

# ------------------------------------------------------------------------------------------------
TABLES = {  # the official ones, and the side of the split that their patients go to
    "mass_case_description_train_set.csv": "train",
    "mass_case_description_test_set.csv": "validation",
    "calc_case_description_train_set.csv": "train",
    "calc_case_description_test_set.csv": "validation",
}
COLUMNS = {  # of these tables, which write some with underscores, and what they are called here
    "patient id": "patient_id",
    "left or right breast": "side",
    "image view": "view",
    "abnormality type": "type",
    "pathology": "pathology",
    "image file path": "film",  # paths are subject/study/series/file
    "cropped image file path": "crop",  # or the mask: the tables swap them now and then
    "roi mask file path": "mask",
}
LABELS = {"MALIGNANT": "malignant", "BENIGN": "benign", "BENIGN_WITHOUT_CALLBACK": "benign"}
PUBLISHED = {"patients": 1566, "films": 3103, "abnormalities": 3568}
KINDS = {".csv": "tables", ".dcm": "DICOM", ".jpg": "JPEG", ".jpeg": "JPEG"}
UNEXPLAINED = 0.02  # share of variance off black and white: below 0.01 in masks, above 0.04 in crops
# ------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent


def list_files(download):
    """Sorted paths of the files that may matter: {"tables", "DICOM", "JPEG": list}. Links are followed, once."""
    files, seen = {kind: [] for kind in KINDS.values()}, set()
    for folder, below, names in os.walk(download, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        for name in names:
            kind = KINDS.get(os.path.splitext(name)[1].lower())
            if kind and not name.startswith("."):
                files[kind].append(Path(folder, name))
    return {kind: sorted(paths) for kind, paths in files.items()}


def read_tables(paths, folder):
    """All rows of the four tables, one per abnormality: the values of COLUMNS, table, label, split; all str."""
    parts = []
    for name, split in TABLES.items():
        path, *copies = [path for path in paths if path.name == name] or [folder / name]
        if any(copy.read_bytes() != path.read_bytes() for copy in copies):
            sys.exit(f"{name} differs between {', '.join(map(str, (path, *copies)))}: keep one of them.")
        try:
            part = pd.read_csv(path, dtype=str, keep_default_na=False)
        except FileNotFoundError:
            sys.exit(f"{name} is missing: put it into {folder}, or anywhere below the download.")
        except ValueError as error:
            sys.exit(f"{path} cannot be read as a table ({error}): get it anew.")
        part.columns = part.columns.str.strip().str.lower().str.replace("_", " ")
        if missing := [column for column in COLUMNS if column not in part]:
            sys.exit(f"{path} has no column {' and no column '.join(missing)}: get it anew.")
        part = part[list(COLUMNS)].rename(columns=COLUMNS).apply(lambda column: column.str.strip())
        if wrong := sorted(set(part["pathology"]) - set(LABELS)):
            sys.exit(f"{path}: the pathology {wrong} is unknown, it has to be one of {', '.join(LABELS)}.")
        parts.append(part.assign(table=name, split=split, label=part["pathology"].map(LABELS)))
    return pd.concat(parts, ignore_index=True)


def merge_tables(table, crops):
    """The rows of what has to be found: abnormalities for `crops`, otherwise films.

    A film is malignant where one of its lesions is, whichever table has it. A patient in training and
    test tables goes to training, whole.
    """
    patients, films = table[["patient_id", "film"]].nunique()
    counts = {"patients": patients, "films": films, "abnormalities": len(table)}
    print(f"tables: {counts},", "as published" if counts == PUBLISHED else f"but published were {PUBLISHED}")
    train = table["patient_id"].isin(table["patient_id"][table["split"] == "train"])
    moved = table[train & (table["split"] == "validation")]
    print(f"{moved['patient_id'].nunique()} patients stand in training and test tables: all of theirs goes to"
          f" train, so validation has {moved['film'].nunique()} films fewer than the official test side")
    table = table.assign(split=np.where(train, "train", "validation"))
    if crops:
        return table
    pictures = table.groupby(["patient_id", "side", "view"])
    print(f"{(pictures['film'].nunique() > 1).sum()} films stand in mass and calc tables, as two files of one"
          " picture each: both files are kept, labelled by the lesions of both")
    several = pictures["type"].transform("nunique") > 1
    table = table.assign(label=pictures["label"].transform("max"), type=table["type"].mask(several, "both"))
    return table.drop_duplicates("film")


def index_images(paths, download, places):
    """{name of a folder: the images anywhere below it}, for all folders in `places`, paths of the tables."""
    index, named = {}, {name for place in places for name in place.split("/")[:-1]}
    for path in paths:
        for name in named.intersection(path.relative_to(download).parts[:-1]):
            index.setdefault(name, []).append(path)
    return index


def read_pixels(path):
    """The pixels of an image: (H, W), uint8 or uint16. Raises whatever is wrong with the file."""
    if KINDS[path.suffix.lower()] == "JPEG":
        return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    try:
        import pydicom
    except ModuleNotFoundError:
        sys.exit("DICOM files need one more package: pip install pydicom")
    return pydicom.dcmread(path).pixel_array


def is_mask(pixels):
    """Whether an image is black and white, but for what JPEG blurs along the edges.

    A dark crop with a few bright specks lies close to black and white, too. Its variance is small, and
    that of a mask is large: the distance from black and white is measured against it.
    """
    step = 1 + min(pixels.shape) // 1000  # masks are as large as films
    grey = pixels[::step, ::step].astype(float)
    white = grey.max()
    distance = np.minimum(grey, white - grey)
    return bool(grey.min() <= 0.1 * white and np.mean(distance**2) <= UNEXPLAINED * grey.var())


def choose_image(places, index, crops):
    """(path, "") of the film or crop that the paths of a row name, (its place, reason) where that is not clear.

    places: that of the film; or those of crop and mask, which may be swapped, or lie in one series.
    """
    parts = [place.split("/") for place in places]
    for names in {part[-2:][0] for part in parts}, {part[0] for part in parts}:  # of series, or else of subjects
        if paths := sorted({path for name in names for path in index.get(name, ())}):
            break
    if len(paths) == 1 and not crops:
        return paths[0], ""
    sizes = {}
    for path in paths:
        try:
            pixels = read_pixels(path)
            if not is_mask(pixels):
                sizes[path] = pixels.size
        except Exception:  # OpenCV and pydicom raise whatever the file leads them to
            return Path(places[0]), f"{path.name} cannot be read"
    if not sizes:
        return Path(places[0]), "only a mask" if paths else "not in the download"
    if crops and len(sizes) > 1:
        return Path(places[0]), f"{len(sizes)} images that are no masks"
    return max(sizes, key=sizes.get), ""


def main(download=HERE, crops=False, folder=HERE):
    """Write labels.csv to `folder`, and missing.csv where images are missing; returns the labels."""
    download, folder = (Path(os.path.abspath(os.path.expanduser(path))) for path in (download, folder))
    if not download.is_dir():
        sys.exit(f"There is no folder {download}: name the folder of the download.")
    files = list_files(download)
    table = merge_tables(read_tables(files["tables"], folder), crops)
    what, columns = ("crops", ["crop", "mask"]) if crops else ("films", ["film"])
    places = table[columns].to_numpy()
    dicom, jpeg = (index_images(files[kind], download, places.ravel()) for kind in ("DICOM", "JPEG"))
    if dicom and jpeg:
        sys.exit(f"{download} holds both the DICOM files and the JPEG copy: name the folder of one of them.")
    paths, reasons = [], []
    for number, row in enumerate(places):
        if number % 500 == 0:
            print(f"looking up {what}: {number} of {len(places)}", flush=True)
        path, reason = choose_image(row, dicom or jpeg, crops)
        paths.append((path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix())
        reasons.append(reason)
    table = table.assign(path=paths, reason=reasons)
    labels, missing = (table[(table["reason"] == "") == found].sort_values("path") for found in (True, False))
    if labels.empty:
        sys.exit(f"""{download} holds none of the {len(table)} {what}. Two layouts are known:
  TCIA    .../Calc-Test_P_00038_LEFT_CC/<study>/<series>/*.dcm
  Kaggle  .../jpeg/<uid of the series>/*.jpg""")
    labels = labels[["path", "label", "patient_id", "split", "side", "view", "type"]]
    labels.to_csv(folder / "labels.csv.part", index=False, lineterminator="\n")
    os.replace(folder / "labels.csv.part", folder / "labels.csv")
    (folder / "missing.csv").unlink(missing_ok=True)
    if len(missing):
        missing[["path", "table", "reason"]].to_csv(folder / "missing.csv", index=False, lineterminator="\n")
        print(f"{len(missing)} {what} are missing: {folder / 'missing.csv'} lists them and says why")
    print(f"{folder / 'labels.csv'}: {len(labels)} {what} of {labels['patient_id'].nunique()} patients")
    counts = pd.crosstab(labels["split"], labels["label"])
    print(counts.reindex(index=["train", "validation"], columns=["benign", "malignant"], fill_value=0))
    crop = " and CROP = None, as these are cut out already," if crops else ""
    print(f'next: set DATA_DIR = "data/cbis_ddsm"{crop} at the top of resnet50.py or vgg16.py')
    return labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make labels.csv for CBIS-DDSM; the top of this file says more.")
    parser.add_argument("download", metavar="DOWNLOAD", nargs="?", default=HERE, help="the folder of the download")
    parser.add_argument("--crops", action="store_true", help="the abnormalities that are cut out, not whole films")
    try:
        main(**vars(parser.parse_args()))
    except OSError as error:  # no right to read or write, a full disk
        sys.exit(f"labels.csv could not be made: {error}")
