"""Make labels.csv for CBIS-DDSM: digitised films with pathology labels, in a download of yours.

Get the images from TCIA (https://www.cancerimagingarchive.net/collection/cbis-ddsm/, DICOM, 164 GB) or Kaggle
(awsaf49/cbis-ddsm-breast-cancer-image-dataset, a JPEG copy). The four tables *_case_description_*_set.csv are
at TCIA, too (Kaggle has them in csv/). Leave everything as it comes, with the tables anywhere below the download
or beside this file. Then

    python data/cbis_ddsm/prepare.py DOWNLOAD            whole films, with the boxes of their lesions
    python data/cbis_ddsm/prepare.py DOWNLOAD --crops    abnormalities, as the collection cuts them out

writes labels.csv beside this file, and missing.csv where images are missing. Nothing is copied: labels.csv
points into the download. The official split is kept. Lesion boxes surround the connected parts of the masks.
Masks and crops are opened, as only their pixels tell one from the other: whole films take a while.

BENIGN_WITHOUT_CALLBACK is a label without a biopsy; it counts as benign.

The licence is CC BY 3.0: cite Lee et al. 2017, Sci. Data 4:170177.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the folder of the project, wherever the command is called from
from data import UserError, preparing  # noqa: E402
from data.dicom import import_pydicom  # noqa: E402
from data.films import absolute  # noqa: E402
from data.names import SIDES  # noqa: E402
from data.reading import is_mask  # noqa: E402

# ------------------------------------------------------------------------------------------------
TABLES = {  # the official ones, and the set that their films are in
    "mass_case_description_train_set.csv": "train",
    "mass_case_description_test_set.csv": "test",
    "calc_case_description_train_set.csv": "train",
    "calc_case_description_test_set.csv": "test",
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
PUBLISHED = {"patients": 1566, "films": 3103, "abnormalities": 3568, "test films": 645, "test abnormalities": 704}
DICOM, JPEG = (".dcm",), (".jpg", ".jpeg")  # suffixes
# ------------------------------------------------------------------------------------------------

PICTURE = ["patient_id", "side", "view"]


def read_tables(files, folder):
    """All rows of the four tables, one per abnormality: the values of COLUMNS, table, label, split; all str."""
    parts = []
    for name, split in TABLES.items():
        path = preparing.find_table(files, folder, name)
        part = preparing.read_table(path, COLUMNS)
        if wrong := sorted(set(part["pathology"]) - set(LABELS)):
            raise UserError(f"{path}: the pathology {wrong} is unknown, it has to be one of {', '.join(LABELS)}.")
        side = part["side"].str.lower().map(SIDES).fillna("")
        parts.append(part.assign(table=name, split=split, label=part["pathology"].map(LABELS), side=side))
    return pd.concat(parts, ignore_index=True)


def report_tables(table):
    """Print the counts of the official tables, and who stands in the training and in the test tables."""
    test = table[table["split"] == "test"]
    counts = [*table[["patient_id", "film"]].nunique(), len(table), test["film"].nunique(), len(test)]
    preparing.compare_counts("tables", dict(zip(PUBLISHED, counts, strict=True)), PUBLISHED)
    both = table[(table["split"] == "train") & table["patient_id"].isin(test["patient_id"])]
    print(f"{both['patient_id'].nunique()} patients stand in training and test tables: a run keeps their test"
          f" films and excludes their {both['film'].nunique()} training films ({len(both)} abnormalities)")


def list_films(table):
    """The films of the tables: a row each, with the label and the type of all their lesions.

    A film is malignant where one of its lesions is, whichever table has it.
    """
    pictures = table.groupby(PICTURE)
    print(f"{(pictures['film'].nunique() > 1).sum()} films stand in several tables, as two files of one"
          " picture each: both files are kept, labelled by the lesions of both")
    several = pictures["type"].transform("nunique") > 1
    films = table.assign(label=pictures["label"].transform("max"), type=table["type"].mask(several, "both"))
    return films.drop_duplicates("film")


def index_images(paths, download, places):
    """{name of a folder: the images anywhere below it}, for all folders in `places`, paths of the tables."""
    index, named = {}, {name for place in places for name in place.split("/")[:-1]}
    for path in paths:
        for name in named.intersection(path.relative_to(download).parts[:-1]):
            index.setdefault(name, []).append(path)
    return index


def find_images(places, index):
    """The images in the series that the paths of a table name, or else below their subjects: sorted Paths."""
    parts = [place.split("/") for place in places]
    for names in {part[-2:][0] for part in parts}, {part[0] for part in parts}:
        if paths := sorted({path for name in names for path in index.get(name, ())}):
            return paths
    return []


def read_pixels(path):
    """The pixels of an image: (H, W), uint8 or uint16. Raises whatever is wrong with the file."""
    if path.suffix.lower() in JPEG:
        return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_GRAYSCALE)
    return import_pydicom().dcmread(path).pixel_array


def read_images(paths):
    """([(Path, pixels, whether it is a mask)], "") of some images, or ([], reason)."""
    images = []
    for path in paths:
        try:
            pixels = read_pixels(path)
            images.append((path, pixels, is_mask(pixels)))
        except UserError:
            raise
        except Exception:  # OpenCV and pydicom raise whatever the file leads them to
            return [], f"{path.name} cannot be read"
    return images, "" if images else "not in the download"


def choose_image(places, index, crops):
    """(path, "") of the film or crop that the paths of a row name, (its place, reason) where that is not clear.

    places: that of the film; or those of crop and mask, which may be swapped, or lie in one series.
    """
    paths = find_images(places, index)
    if len(paths) == 1 and not crops:
        return paths[0], ""
    images, reason = read_images(paths)
    sizes = {path: pixels.size for path, pixels, mask in images if not mask}
    if not sizes:
        return Path(places[0]), reason or "only a mask"
    if crops and len(sizes) > 1:
        return Path(places[0]), f"{len(sizes)} images that are no masks"
    return max(sizes, key=sizes.get), ""


def find_lesion(places, index):
    """((height, width) of a mask, boxes, "") of a lesion, or (None, None, reason).

    places: those of crop and mask, as in choose_image(). If a mask is in several files, their union counts.

    boxes: int (K, 4), x, y, width and height of its connected parts, in pixels of the mask.
    """
    images, reason = read_images(find_images(places, index))
    masks = [pixels > pixels.max() / 2 for _, pixels, mask in images if mask]
    if not masks:
        return None, None, reason or "no mask"
    if len({mask.shape for mask in masks}) > 1:
        return None, None, "its masks differ in size"
    union = np.logical_or.reduce(masks).astype(np.uint8)
    _, _, parts, _ = cv2.connectedComponentsWithStats(union)
    boxes = parts[1:, :4]  # the first part is the black around them
    return (union.shape, boxes, "") if len(boxes) else (None, None, "its mask is empty")


def scale_boxes(boxes, mask, film):
    """(["x:y:width:height", ...] in pixels of a film, ""), or ([], reason) where the mask is of another film.

    boxes: as in find_lesion(); mask, film: their (height, width), that of a film None where it cannot be read.
    """
    if film is None:
        return [], "its mammogram cannot be read"
    if abs(mask[1] * film[0] - film[1] * mask[0]) > mask[0] + film[0]:  # more than sizes in whole pixels explain
        return [], f"its mask has {mask[1]} x {mask[0]} pixels, the film {film[1]} x {film[0]}"
    scale = np.array([film[1] / mask[1], film[0] / mask[0]])
    starts = np.floor(boxes[:, :2] * scale).astype(int)
    ends = np.minimum(np.ceil((boxes[:, :2] + boxes[:, 2:]) * scale), film[::-1]).astype(int)
    return [":".join(map(str, box)) for box in np.hstack([starts, ends - starts])], ""


def look_up(function, rows, what):
    """[function(row) for each row], several at a time; prints how far it is."""
    results = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading and OpenCV release Python's lock
        for result in pool.map(function, rows):
            if len(results) % 500 == 0:
                print(f"looking up {what}: {len(results)} of {len(rows)}", flush=True)
            results.append(result)
    return results


def find_boxes(films, table, index):
    """(lesion_box of each film, table of the lesions that have no box: path, table, reason).

    films: rows of list_films() with path, a Path. Only lesions that make the label have boxes: the benign one of a
    malignant film is no place to look for cancer.
    """
    lesions = table[table["label"] == table.groupby(PICTURE)["label"].transform("max")]
    masks = look_up(partial(find_lesion, index=index), lesions[["crop", "mask"]].to_numpy(), "masks")
    lesions = lesions.assign(found=masks)
    pictures = dict(list(lesions.groupby(PICTURE)))
    boxes, without = [], []
    for film in films.itertuples():
        shape, parts = preparing.read_shape(film.path), []
        for lesion in pictures[film.patient_id, film.side, film.view].itertuples():
            mask, outlines, reason = lesion.found
            if not reason:
                scaled, reason = scale_boxes(outlines, mask, shape)
                parts += scaled
            if reason:
                without.append((lesion.mask, lesion.table, reason))
        boxes.append("|".join(parts))
    return boxes, pd.DataFrame(without, columns=["path", "table", "reason"]).drop_duplicates()


def main(download="", crops=False, folder=HERE):
    """Write labels.csv to `folder`, and missing.csv where images are missing; returns the labels."""
    download, folder = preparing.find_download(download, folder), absolute(folder)
    files = preparing.list_files(download)
    table = read_tables(files, folder)
    report_tables(table)
    rows, columns = (table, ["crop", "mask"]) if crops else (list_films(table), ["film"])
    what = "crops" if crops else "films"
    places = table[["film", "crop", "mask"]].to_numpy().ravel()
    dicom, jpeg = ([path for path in files if path.suffix.lower() in suffixes] for suffixes in (DICOM, JPEG))
    dicom, jpeg = index_images(dicom, download, places), index_images(jpeg, download, places)
    if dicom and jpeg:
        raise UserError(f"{download} holds both the DICOM files and the JPEG copy: name the folder of one.")
    index = dicom or jpeg
    chosen = look_up(partial(choose_image, index=index, crops=crops), rows[columns].to_numpy(), what)
    rows = rows.assign(path=[path for path, _ in chosen], reason=[reason for _, reason in chosen])
    labels, missing = rows[rows["reason"] == ""], rows[rows["reason"] != ""]
    if labels.empty:
        raise UserError(f"""{download} holds none of the {len(rows)} {what}. Two layouts are known:
  TCIA    .../Calc-Test_P_00038_LEFT_CC/<study>/<series>/*.dcm
  Kaggle  .../jpeg/<uid of the series>/*.jpg""")

    if not crops:
        boxes, without = find_boxes(labels, table, index)
        labels, missing = labels.assign(lesion_box=boxes), pd.concat([missing, without])
        print(f"{boxes.count('')} of {len(labels)} films have no lesion_box; {len(without)} masks cannot be used")
    labels = labels.assign(path=[preparing.name_path(path, folder) for path in labels["path"]])
    missing = missing.assign(path=missing["path"].map(str))
    known = ["path", "label", "patient_id", "split", "side", "view", "lesion_box", "type"]
    labels = labels[[column for column in known if column in labels]]
    advice = " and CROP = None, as these are cut out already," if crops else ""
    preparing.write_labels(labels, missing[["path", "table", "reason"]], folder, what, advice)
    return labels


if __name__ == "__main__":
    preparing.run(main, __doc__, crops="the abnormalities that are cut out, not whole films")
