"""Make labels.csv for INbreast: full-field digital mammograms with BI-RADS categories, in a download of yours.

INbreast is given on request by its authors (Moreira et al. 2012, Acad. Radiol. 19:236-248,
https://doi.org/10.1016/j.acra.2011.09.014, which is to be cited). Leave everything as it comes: INbreast.csv,
AllDICOMs and AllXML, anywhere below the download. Then

    python data/inbreast/prepare.py DOWNLOAD

writes labels.csv beside this file, and missing.csv where films are missing. Nothing is copied: labels.csv
points into the download.

The labels are no pathology: they are BI-RADS categories, the opinion of a radiologist. LABELS, below, maps them
as papers do. Category 2 (benign finding) becomes benign. Categories 4 (suspicious), 5 (highly suggestive of
malignancy) and 6 (known cancer) become malignant. Categories 1 (no finding), 3 (probably benign) and 0
(incomplete) are excluded.

Patient, side and view are in the file name. Lesion boxes surround the masses and clusters of AllXML.
"""
import plistlib
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the folder of the project, wherever the command is called from
from data import UserError, preparing  # noqa: E402
from data.films import absolute  # noqa: E402
from data.names import SIDES  # noqa: E402

# ------------------------------------------------------------------------------------------------
LABELS = {"2": "benign", "4": "malignant", "5": "malignant", "6": "malignant"}  # by BI-RADS; others are excluded
LESIONS = ("mass", "cluster")  # annotations that become boxes, by their name in lower case
PUBLISHED = {"films": 410, "1": 67, "2": 220, "3": 23, "4": 43, "5": 49, "6": 8}  # films by BI-RADS
# ------------------------------------------------------------------------------------------------

COLUMNS = {"file name": "film", "laterality": "side", "view": "view", "bi-rads": "birads"}
FILM = r"(\d+)_([0-9a-f]{16})_MG_([LR])_([A-Z]+)_ANON\.dcm"  # number, patient, side, view
VIEWS = {"ML": "MLO"}  # file names say ML where INbreast.csv says MLO
CATEGORY = r"([0-6])[abc]?(?:[.,]0+)?"  # 4a, 4b and 4c are 4; spreadsheets make 2.0 or 2,0 of 2


def read_categories(path):
    """Table of INbreast.csv: film (its number), side, view, label ("" where it is excluded). Raises UserError."""
    table = preparing.read_table(path, COLUMNS)
    table = table[table["film"] != ""]
    birads = table["birads"].str.lower().str.extract(f"^{CATEGORY}$", expand=False)
    if wrong := sorted(set(table["birads"][birads.isna()])):
        raise UserError(f"{path}: the BI-RADS category {wrong} is unknown, it has to be one of 0 to 6.")
    films = table["film"].str.replace(r"[.,]0+$", "", regex=True)
    if twice := sorted(set(films[films.duplicated()])):
        raise UserError(f"{path} has several rows of a film, keep one of each: {', '.join(twice[:20])}.")

    counts = birads.value_counts().sort_index().to_dict()
    preparing.compare_counts(f"{path.name}, films by BI-RADS", {"films": len(table)} | counts, PUBLISHED)
    names = {category: LABELS.get(category, "excluded") for category in counts}
    print(f"the labels are BI-RADS categories, no pathology: {names}")
    side = table["side"].str.lower().map(SIDES)
    return table.assign(film=films, side=side, view=table["view"].str.upper(), label=birads.map(LABELS).fillna(""))


def read_point(text):
    """x and y, in pixels of the film, of a point such as "(1234.5, 678.9)" or "(1234,5, 678,9)". ValueError."""
    numbers = text.strip("() ")
    parts = re.split(r",\s+", numbers) if re.search(r",\s", numbers) else numbers.split(",")
    x, y = (float(part.replace(",", ".")) for part in parts)
    return x, y


def read_boxes(file, width, height, counts):
    """The lesion_box of an XML property list for a film of width x height pixels.

    counts: Counter of what became no box or was clipped; it is added to. Raises whatever is wrong with the file.
    """
    boxes = []
    images = plistlib.loads(file.read_bytes())["Images"]
    rois = [roi for image in images for roi in image["ROIs"]]
    for roi in rois:
        name = str(roi.get("Name", "")).strip()
        if name.lower() not in LESIONS:
            counts[f"annotations {name!r}, which become no box"] += 1
            continue
        points = np.array([read_point(text) for text in roi["Point_px"]]).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError("a point is nowhere")
        inside = points.clip(0, (width - 1, height - 1))
        outside = (points != inside).any(axis=1)
        if len(points) < 3 or outside.all():
            counts["masses or clusters of fewer than 3 points or outside of their film, which become no box"] += 1
            continue
        counts["points outside of their film, moved to its edge"] += int(outside.sum())
        start = np.floor(inside.min(axis=0)).astype(int)
        size = np.floor(inside.max(axis=0)).astype(int) + 1 - start
        boxes.append(":".join(map(str, (*start, *size))))
    return "|".join(boxes)


def find_boxes(films, outlines):
    """The lesion_box of each film; prints what could not be used. outlines: {number of a film: its XML file}."""
    boxes, counts, unreadable = [], Counter(), []
    for film in films.itertuples():
        box = ""
        if film.film in outlines:
            try:
                box = read_boxes(outlines[film.film], film.width, film.height, counts)
            except Exception:  # plistlib raises whatever a damaged file leads it to
                unreadable.append(outlines[film.film].name)
        else:
            counts[f"{film.label} films without an XML file, and so without a lesion_box"] += 1
        boxes.append(box)
    for what, count in sorted(counts.items()):
        print(f"{count} {what}")
    if unreadable:
        print(f"{len(unreadable)} XML files cannot be read, their films have no lesion_box:", *unreadable)
    return boxes


def read_films(table, films):
    """(table of the films that have a label and can be read, [(number or Path, reason)] of the others).

    films: {number: Path}. Patient, side and view are those of the file name; prints where INbreast.csv has others.
    """
    rows, missing = [], [(films[film], "no row in INbreast.csv") for film in films.keys() - {*table["film"]}]
    for row in table[table["label"] != ""].itertuples():
        if row.film not in films:
            missing.append((row.film, "not in the download"))
            continue
        path = films[row.film]
        shape = preparing.read_shape(path)
        if shape is None:
            missing.append((path, "cannot be read as DICOM"))
            continue
        _, patient, letter, view = re.fullmatch(FILM, path.name, re.IGNORECASE).groups()
        side, view = SIDES[letter.lower()], VIEWS.get(view.upper(), view.upper())
        if (side, view) != (row.side, row.view):
            print(f"{path.name}: INbreast.csv has another side or view, that of the name is used")
        rows.append((row.film, path, row.label, patient.lower(), side, view, *shape))
    columns = ["film", "path", "label", "patient_id", "side", "view", "height", "width"]
    return pd.DataFrame(rows, columns=columns), missing


def main(download="", folder=HERE):
    """Write labels.csv to `folder`, and missing.csv where films are missing; returns the labels."""
    download, folder = preparing.find_download(download, folder), absolute(folder)
    files = preparing.list_files(download)
    table = read_categories(preparing.find_table(files, folder, "INbreast.csv"))
    films = preparing.name_files(files, FILM)
    xml = [path for path in files if path.parent.name.lower() == "allxml"]
    outlines = preparing.name_files(xml, r"(\d+)\.xml")
    patients = {path.name.split("_")[1].lower() for path in films.values()}
    print(f"{len(films)} films of {len(patients)} patients by their names; published were 410 films of 115 cases")

    labels, missing = read_films(table, films)
    strangers = {path for path in files if path.suffix.lower() == ".dcm"} - {*films.values()}
    missing += [(path, "not named like a film of INbreast") for path in strangers]
    labels = labels.assign(lesion_box=find_boxes(labels, outlines),
                           path=[preparing.name_path(path, folder) for path in labels["path"]])
    labels = labels[["path", "label", "patient_id", "side", "view", "lesion_box"]]
    missing = pd.DataFrame(missing, columns=["path", "reason"]).astype(str)
    preparing.write_labels(labels, missing, folder)
    return labels


if __name__ == "__main__":
    preparing.run(main, __doc__)
