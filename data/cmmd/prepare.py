"""Make labels.csv for CMMD: full-field digital mammograms with biopsy-confirmed labels, in a download of yours.

Get the images (DICOM, about 23 GB) and CMMD_clinicaldata_revision.xlsx from TCIA
(https://www.cancerimagingarchive.net/collection/cmmd/). Leave everything as it comes, with the table anywhere
below the download or beside this file. Then

    python data/cmmd/prepare.py DOWNLOAD

writes labels.csv beside this file, and missing.csv where films are missing or cannot be used. Nothing is copied:
labels.csv points into the download. Both layouts of TCIA's downloader work, by patient and by study or series UID.
The table is read as it comes (pip install openpyxl), or saved as CSV.

The table has a row for a breast: its label is that of all films of the breast. Patient, side and view of a film
come from its DICOM header. Films of a breast without a row are excluded, as nothing is known about it. Five images
are of two patients, as TCIA says (D1-0202 and D2-0284 four, D1-0808 and D1-1292 one): a run finds and joins them.

The licence is CC BY 4.0: cite Cui et al. 2021, https://doi.org/10.7937/tcia.eqde4b16.
"""
import re
import sys
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the folder of the project, wherever the command is called from
from data import CLASSES, UserError, preparing  # noqa: E402
from data.films import absolute  # noqa: E402
from data.names import SIDES  # noqa: E402

# ------------------------------------------------------------------------------------------------
TABLE = "CMMD_clinicaldata_revision.xlsx"  # or .csv
COLUMNS = {"id1": "patient_id", "leftright": "side", "classification": "label"}
PUBLISHED = {"patients": 1775, "breasts": 1872, "benign": 556, "malignant": 1316}  # of the table
FILMS = 5202  # images of the collection; 3744 show a breast of the table
# ------------------------------------------------------------------------------------------------

PATIENT = r"D[12]-\d{4}"  # as headers, folders and tables name patients
TAGS = ["SOPInstanceUID", "PatientID", "ImageLaterality", "Laterality", "ViewCodeSequence", "ViewPosition"]
VIEWS = {"399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO",  # codes of SNOMED, new and old
         "CC": "CC", "MLO": "MLO"}  # as ViewPosition has it


def read_breasts(path):
    """{(patient_id, side): label} of the clinical table. Raises UserError."""
    table = preparing.read_table(path, COLUMNS)
    table = table[table.ne("").any(axis=1)]  # spreadsheets end in empty rows
    table = table.assign(patient_id=table["patient_id"].str.upper(), label=table["label"].str.lower(),
                         side=table["side"].str.lower().map(SIDES).fillna(""))
    for column, known, wrong in (
        ("patient_id", "D1-0001 or the like", ~table["patient_id"].str.fullmatch(PATIENT)),
        ("side", "L or R", table["side"].eq("")),
        ("label", "Benign or Malignant", ~table["label"].isin(CLASSES)),
    ):
        if wrong.any():
            raise UserError(f"{path}: the {column} of {wrong.sum()} rows is unknown (first in row"
                            f" {wrong.idxmax() + 2}): it has to be {known}.")

    rows = table.groupby(["patient_id", "side"])["label"]
    if both := (rows.nunique() > 1).sum():
        print(f"{both} breasts have rows of both classes: they count as malignant")
    breasts = rows.max()
    counts = {"patients": table["patient_id"].nunique(), "breasts": len(breasts)}
    preparing.compare_counts(path.name, counts | breasts.value_counts().sort_index().to_dict(), PUBLISHED)
    return breasts.to_dict()


def read_manifests(files):
    """{folder: patient_id} as the metadata.csv files of TCIA's downloader have them."""
    folders = {}
    for path in files:
        if path.name.lower() != "metadata.csv":
            continue
        try:
            rows = preparing.read_table(path, {"subject id": "patient_id", "file location": "folder"})
        except UserError as error:
            print(f"not used: {error}")
            continue
        for patient, folder in rows.to_numpy():
            folders[path.parent / folder.replace("\\", "/")] = patient
    return folders


def read_film(path, download, folders):
    """(patient_id, side, view, uid, reason) of a DICOM film; the reason why it cannot be used, or "".

    Header, folders and metadata.csv have to name one patient. A view that is not CC or MLO is "".
    """
    header = preparing.read_header(path, TAGS)
    if header is None:
        return "", "", "", "", "cannot be read as DICOM"
    names = [str(header.get("PatientID") or ""), *path.relative_to(download).parts[:-1]]
    names += [folders.get(folder, "") for folder in path.parents]
    names = {name.strip().upper() for name in names}
    patients = sorted(name for name in names if re.fullmatch(PATIENT, name))
    side = str(header.get("ImageLaterality") or header.get("Laterality") or "").strip().lower()
    codes = [str(code.get("CodeValue", "")) for code in header.get("ViewCodeSequence") or []]
    codes.append(str(header.get("ViewPosition") or ""))
    view = next((VIEWS[code] for code in codes if code in VIEWS), "")

    reason = ""
    if side not in SIDES:
        reason = "its header has no ImageLaterality: the breast is unknown"
    if not patients:
        reason = "neither header nor folders nor metadata.csv name its patient"
    if len(patients) > 1:
        reason = f"header, folders and metadata.csv name different patients: {', '.join(patients)}"
    uid = str(header.get("SOPInstanceUID") or path)
    return "".join(patients), SIDES.get(side, ""), view, uid, reason


def read_films(paths, download, folders):
    """Table of DICOM films: path and what read_film() returns; copies of another file have a reason, too."""
    rows = []
    for number, path in enumerate(paths):
        if number % 500 == 0:
            print(f"reading headers: {number} of {len(paths)}", flush=True)
        rows.append((path, *read_film(path, download, folders)))
    films = pd.DataFrame(rows, columns=["path", "patient_id", "side", "view", "uid", "reason"])
    usable = films[films["reason"] == ""]
    copies = usable.index[usable["uid"].duplicated()]
    films.loc[copies, "reason"] = "a copy of another file: they have one SOPInstanceUID"
    return films


def main(download="", folder=HERE):
    """Write labels.csv to `folder`, and missing.csv where films are missing; returns the labels."""
    download, folder = preparing.find_download(download, folder), absolute(folder)
    files = preparing.list_files(download)
    breasts = read_breasts(preparing.find_table(files, folder, TABLE, r"CMMD_clinicaldata_revision.*\.(csv|xlsx)"))
    paths = [path for path in files if path.suffix.lower() == ".dcm"]
    preparing.compare_counts("DICOM files", len(paths), FILMS)
    films = read_films(paths, download, read_manifests(files))
    films["path"] = [preparing.name_path(path, folder) for path in paths]

    usable = films[films["reason"] == ""]
    shown = list(zip(usable["patient_id"], usable["side"], strict=True))
    usable = usable.assign(label=[breasts.get(breast, "") for breast in shown])
    labels = usable.loc[usable["label"] != "", ["path", "label", "patient_id", "side", "view"]]
    print(f"{len(usable) - len(labels)} films of {len({*shown} - breasts.keys())} breasts are excluded, as the"
          f" table has no row for them; {(labels['view'] == '').sum()} films have no view CC or MLO")
    lost = [(f"{patient} {side}", "no film of this breast") for patient, side in breasts.keys() - {*shown}]
    missing = pd.concat([films.loc[films["reason"] != "", ["path", "reason"]],
                         pd.DataFrame(lost, columns=["path", "reason"])])
    preparing.write_labels(labels, missing, folder)
    return labels


if __name__ == "__main__":
    preparing.run(main, __doc__)
