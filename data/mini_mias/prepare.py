"""Make labels.csv for mini-MIAS: the 115 digitised films that have a benign or malignant finding.

    python data/mini_mias/prepare.py [FOLDER_OR_ARCHIVE]

Its home is http://peipa.essex.ac.uk/info/mias.html. Its Licence.txt allows research only, and asks for a
reference: Suckling et al. 1994, Excerpta Medica International Congress Series 1069, 375-378.

Pass the folder with the films (mdb001.pgm ...) and Info.txt, or all-mias.tar.gz (or .tar.xz), which is unpacked
to data/mini_mias/films. Without either, the script takes what lies in data/mini_mias, or downloads the archive.
"""
import os
import re
import shutil
import sys
import tempfile
import urllib.request
from pathlib import Path

import pandas as pd

# ------------------------------------------------------------------------------------------------
URL = "http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz"
TIMEOUT = 20  # seconds without an answer
SIZE = 1024  # pixels of a film, both ways, 8 bits each
WHOLE = {"benign": 63, "malignant": 52, "patients": 108}  # films with a finding, and whose they are
# ------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
LABELS = {"b": "benign", "m": "malignant"}  # the letters of Info.txt
ROW = (  # of Info.txt; some lack the circle, or have a note for it
    r"^(?P<film>mdb\d{3})\s+[fgd]\s+(?:norm|(?:calc|circ|spic|misc|arch|asym)\s+(?P<severity>[bm])"
    r"(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>\d+)|\s+\*note\s+\d\*)?)$")


def make_box(x, y, radius):
    """x:y:width:height, from the upper left, of a circle in pixels from the lower left; "" outside of the film."""
    left, top = max(0, x - radius), max(0, SIZE - y - radius)
    width, height = min(SIZE, x + radius) - left, min(SIZE, SIZE - y + radius) - top
    return f"{left}:{top}:{width}:{height}" if width > 0 and height > 0 else ""


def read_info(file):
    """Table of the films with a finding in Info.txt: film, label, patient_id, lesion_box."""
    lines = pd.Series(file.read_text("utf-8-sig", errors="replace").lower().splitlines()).str.strip()
    rows = lines.str.extract(ROW)  # nothing of what is prose
    wrong = lines[lines.str.match(r"mdb\d") & rows["film"].isna()]
    for number, line in wrong.items():
        sys.exit(f"{file}, line {number + 1}, has to look like 'mdb001 G CIRC B 535 425 197', but is {line!r}")
    # only findings that make the label: the benign one of a malignant film is no place to look for cancer
    rows = rows[rows["severity"] == rows.groupby("film")["severity"].transform("max")]
    circles = rows[["x", "y", "radius"]].fillna("0").astype(int).to_numpy()
    rows = rows.assign(label=rows["severity"].map(LABELS), box=[make_box(*circle) for circle in circles])
    films = rows.groupby(["film", "label"], as_index=False)
    table = films.agg(lesion_box=("box", lambda boxes: "|".join(filter(None, boxes))))
    numbers = (table["film"].str[3:].astype(int) + 1) // 2  # films 1 and 2, 3 and 4 ... are of one patient
    return table.assign(patient_id=numbers.map("mias_{:03d}".format))


def read_collection(folder, source):
    """({"mdb001": path, ...}, table of Info.txt) of a folder and the folders in it; `source` is for errors."""
    paths, films = sorted([*folder.glob("*"), *folder.glob("*/*")]), {}
    for path in (path for path in paths if re.fullmatch(r"mdb\d{3}\.pgm", path.name.lower())):
        if films.setdefault(path.stem.lower(), path) != path:
            sys.exit(f"{films[path.stem.lower()]} and {path} are the same film: remove one of them.")
    infos = [path for path in paths if path.name.lower() == "info.txt"]
    if not films or not infos:
        sys.exit(f"{source} holds no {'Info.txt' if films else 'film (mdb001.pgm ...)'}: both have to be in it.")
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
            sys.exit(f"{archive} cannot be unpacked ({error}): get the archive from elsewhere and pass its path.")
        read_collection(films, archive)
        os.replace(films, folder / "films")


def find_source(source, folder):
    """The folder of the films: `source` itself, or folder/films, filled where it is missing."""
    source = Path(source or folder).expanduser().resolve()
    if any(source.glob("mdb*")) or any(source.glob("*/mdb*")):
        return source
    archive = source if source.is_file() else next(source.glob("all-mias.tar.?z"), None)
    if not archive and source != folder:
        sys.exit(f"{source} holds neither films (mdb001.pgm ...) nor all-mias.tar.gz: pass the folder that does.")
    if not (folder / "films").exists():
        unpack(archive or URL, folder)
    return folder / "films"


def prepare(source="", folder=HERE):
    """Write folder/labels.csv for the films in `source`, a folder or archive; returns the table."""
    source = find_source(source, folder)
    films, table = read_collection(source, source)
    missing = [film for film in table["film"] if film not in films]
    table = table[~table["film"].isin(missing)]
    if table.empty:
        sys.exit(f"{source} holds none of the films that have a benign or malignant finding in Info.txt.")
    if wrong := [film for film in table["film"] if not 0 < films[film].stat().st_size - SIZE**2 < 100]:
        sys.exit(f"No PGM of {SIZE} x {SIZE} pixels of 8 bits, fetch anew: {', '.join(wrong)}")  # and a header
    print(f"{source}: {len(films)} films, {len(table)} with a finding; {len(missing)} missing:", *missing)
    print("without lesion_box, as Info.txt has no circle:", *table["film"][table["lesion_box"] == ""])
    paths = [films[film].as_posix().removeprefix(f"{folder.as_posix()}/") for film in table["film"]]
    table = table.assign(path=paths).sort_values("path")[["path", "label", "patient_id", "lesion_box"]]
    table.to_csv(folder / "labels.csv.part", index=False, lineterminator="\n")
    os.replace(folder / "labels.csv.part", folder / "labels.csv")
    counts = table["label"].value_counts().sort_index().to_dict() | {"patients": table["patient_id"].nunique()}
    print(f"labels.csv: {counts} of {WHOLE}")
    return table


if __name__ == "__main__":
    try:
        prepare(" ".join(sys.argv[1:]))  # spaces in a path need no quotes
    except OSError as error:  # no right to read or write, a full disk
        sys.exit(f"labels.csv could not be made: {error}")
