"""Make labels.csv for mini-MIAS: the 115 digitised films that have a benign or malignant finding.

    python data/mini_mias/prepare.py [FOLDER_OR_ARCHIVE]

Its home is http://peipa.essex.ac.uk/info/mias.html. Its Licence.txt allows research only, and asks for a
reference: Suckling et al. 1994, Excerpta Medica International Congress Series 1069, 375-378.

Pass the folder with the films (mdb001.pgm ...) and Info.txt, or all-mias.tar.gz (or .tar.xz), which is unpacked
to data/mini_mias/films. Without either, the script takes what lies in data/mini_mias, or downloads the archive.
"""
import os
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the folder of the project, wherever the command is called from
from data import UserError, preparing  # noqa: E402
from data.films import absolute  # noqa: E402
from data.reading import find_breast, has_box_outside, read_boxes  # noqa: E402

# ------------------------------------------------------------------------------------------------
URL = "http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz"
TIMEOUT = 20  # seconds without an answer
SIZE = 1024  # pixels of a film, both ways, 8 bits each
WHOLE = {"benign": 63, "malignant": 52, "patients": 108}  # films with a finding, and whose they are
# ------------------------------------------------------------------------------------------------

FILM = r"(mdb\d{3})\.pgm"
LABELS = {"b": "benign", "m": "malignant"}  # the letters of Info.txt
SIDES = {0: "left", 1: "right"}  # of even and odd film numbers, as Info.txt says; all films are MLO views
ROW = (  # of Info.txt; some lack the circle, or have a note for it
    r"^(?P<film>mdb\d{3})\s+[fgd]\s+(?:norm|(?:calc|circ|spic|misc|arch|asym)\s+(?P<severity>[bm])"
    r"(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+)|\s+\*note\s+\d\*)?)$")


def make_box(x, y, radius):
    """x:y:width:height, from the upper left, of a circle in pixels from the lower left; "" outside of the film."""
    left, top = max(0, x - radius), max(0, SIZE - y - radius)
    width, height = min(SIZE, x + radius) - left, min(SIZE, SIZE - y + radius) - top
    return f"{left}:{top}:{width}:{height}" if width > 0 and height > 0 else ""


def read_info(file):
    """Table of the films with a finding in Info.txt: film, label, lesion_box, patient_id, side, view."""
    lines = pd.Series(file.read_text("utf-8-sig", errors="replace").lower().splitlines()).str.strip()
    rows = lines.str.extract(ROW)  # nothing of what is prose
    wrong = lines[lines.str.match(r"mdb\d") & rows["film"].isna()]
    for number, line in wrong.items():
        raise UserError(f"{file}, line {number + 1}, has to look like 'mdb001 G CIRC B 535 425 197', but is"
                        f" {line!r}")
    # only findings that make the label: the benign one of a malignant film is no place to look for cancer
    rows = rows[rows["severity"] == rows.groupby("film")["severity"].transform("max")]
    circles = rows[["x", "y", "radius"]].fillna("0").astype(int).to_numpy()
    rows = rows.assign(label=rows["severity"].map(LABELS), box=[make_box(*circle) for circle in circles])
    films = rows.groupby(["film", "label"], as_index=False)
    table = films.agg(lesion_box=("box", lambda boxes: "|".join(filter(None, boxes))))
    numbers = table["film"].str[3:].astype(int)
    patients = (numbers + 1) // 2  # films 1 and 2, 3 and 4 ... are of one patient
    sides = (numbers % 2).map(SIDES)
    return table.assign(patient_id=patients.map("mias_{:03d}".format), side=sides, view="MLO")


def read_collection(folder, source):
    """({"mdb001": path, ...}, table of Info.txt) of a folder and the folders in it; `source` is for errors."""
    files = sorted([*folder.glob("*"), *folder.glob("*/*")])
    films = preparing.name_files(files, FILM)
    infos = [path for path in files if path.name.lower() == "info.txt"]
    if not films or not infos:
        lacking = "Info.txt" if films else "film (mdb001.pgm ...)"
        raise UserError(f"{source} holds no {lacking}: both have to be in it.")
    return films, read_info(infos[0])


def unpack(archive, folder):
    """Unpack an archive, or first download it where it is URL, to folder/films: all or nothing."""
    print(f"unpacking {archive}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        films = Path(part, "films")
        try:
            file = Path(part, "download") if archive == URL else archive
            if archive == URL:
                file.write_bytes(urllib.request.urlopen(URL, timeout=TIMEOUT).read())
            shutil.unpack_archive(file, films, "tar", filter="data")  # whatever it is compressed with
        except Exception as error:  # the network and damaged archives raise whatever they come to
            raise UserError(f"{archive} cannot be unpacked ({error}): get the archive from elsewhere and pass its"
                            " path.") from error
        read_collection(films, archive)
        os.replace(films, folder / "films")


def find_source(source, folder):
    """The folder of the films: `source` itself, or folder/films, filled where it is missing."""
    source = absolute(source or folder).resolve()
    if any(source.glob("mdb*")) or any(source.glob("*/mdb*")):
        return source
    archive = source if source.is_file() else next(source.glob("all-mias.tar.?z"), None)
    if not archive and source != folder:
        raise UserError(f"{source} holds neither films (mdb001.pgm ...) nor all-mias.tar.gz: pass the folder that"
                        " does.")
    if not (folder / "films").exists():
        unpack(archive or URL, folder)
    return folder / "films"


def lies_outside(path, lesion_box):
    """Whether a lesion box of a film lies in the black outside of the breast."""
    pixels = np.fromfile(path, np.uint8)[-(SIZE**2) :].reshape(SIZE, SIZE)  # the header is at the start
    return has_box_outside(read_boxes(lesion_box), find_breast(pixels, 8))


def prepare(source="", folder=HERE):
    """Write folder/labels.csv for the films in `source`, a folder or archive; returns the table."""
    source = find_source(source, folder)
    films, table = read_collection(source, source)
    found = table["film"].isin(films)
    missing, table = table[~found], table[found]
    # a file is its pixels and a header
    if wrong := [film for film in table["film"] if not 0 < films[film].stat().st_size - SIZE**2 < 100]:
        raise UserError(f"No PGM of {SIZE} x {SIZE} pixels of 8 bits, fetch anew: {', '.join(wrong)}")
    print(f"{source}: {len(films)} films, {len(table)} with a finding; {len(missing)} missing")
    print("without lesion_box, as Info.txt has no circle:", *table["film"][table["lesion_box"] == ""])
    outside = [film for film, box in table[["film", "lesion_box"]].to_numpy() if lies_outside(films[film], box)]
    if outside:
        print("with a lesion_box in the black outside of the breast, as Info.txt has it:", *outside)
    counts = table["label"].value_counts().sort_index().to_dict() | {"patients": table["patient_id"].nunique()}
    preparing.compare_counts("films with a finding", counts, WHOLE)
    labels = table.assign(path=[preparing.name_path(films[film], folder) for film in table["film"]])
    labels = labels[["path", "label", "patient_id", "side", "view", "lesion_box"]]
    missing = pd.DataFrame({"path": missing["film"] + ".pgm", "reason": "not in the download"})
    preparing.write_labels(labels, missing, folder)
    return labels


if __name__ == "__main__":
    preparing.run(prepare, __doc__)
