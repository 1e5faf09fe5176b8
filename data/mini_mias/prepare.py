"""Make labels.csv for mini-MIAS: 322 digitised films of 161 patients, 1024 x 1024 pixels of 8 bits.

    python data/mini_mias/prepare.py [FOLDER_OR_ARCHIVE]

Its home is http://peipa.essex.ac.uk/info/mias.html. It is for research only: who uses it agrees to the
Licence.txt in it, which asks for a reference in whatever is published: Suckling et al. 1994, Excerpta
Medica International Congress Series 1069, 375-378.

Pass the folder with the films (mdb001.pgm ...) and Info.txt, which is only read, or all-mias.tar.gz, which
is unpacked to data/mini_mias/films. Without either, the script takes what lies in data/mini_mias, or
downloads the archive. Only films with a benign or malignant finding are in labels.csv.

No published checksum of the archive is known to us, so what is in it is checked: a download has to hold all
films that Info.txt lists, each of its exact size, and Info.txt the known numbers of each class. The SHA-256
of the archive that was unpacked is then kept in all-mias.tar.gz.sha256, and any other is refused.
"""
import hashlib
import http.client
import os
import re
import shutil
import sys
import tarfile
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

import pandas as pd

# ------------------------------------------------------------------------------------------------
URL = "http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz"
TIMEOUT = 20  # seconds without an answer
SIZE = 1024  # pixels of a film, both ways
WHOLE = {"films": 322, "benign": 63, "malignant": 52, "patients": 108}  # the collection; patients with a finding
# ------------------------------------------------------------------------------------------------

HERE = Path(__file__).resolve().parent
ARCHIVE, RECORD = "all-mias.tar.gz", "all-mias.tar.gz.sha256"
FILM = re.compile(r"mdb\d{3}\.pgm", re.IGNORECASE)
PGM = re.compile(rb"P5\s+(?:#.*\n\s*)*%d\s+(?:#.*\n\s*)*%d\s+(?:#.*\n\s*)*\d{1,3}\s" % (SIZE, SIZE))
ROW = re.compile(  # of Info.txt: film, severity, x, y, radius; some lack the circle, or have a note for it
    r"(mdb\d{3})\s+[FGD]\s+(?:NORM|(?:CALC|CIRC|SPIC|MISC|ARCH|ASYM)\s+([BM])"
    r"(?:\s+(\d+)\s+(\d+)\s+(\d+)|\s+\*NOTE\s+\d\*)?)", re.IGNORECASE)


def list_some(names):
    """The first twenty names."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def find_films(folder):
    """{"mdb001": path, ...} of the films in a folder and its subfolders; none that are half unpacked."""
    films = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if not FILM.fullmatch(path.name) or path.parent == folder / "films.part":
            continue
        if films.setdefault(path.stem.lower(), path) != path:
            sys.exit(f"{films[path.stem.lower()]} and {path} are the same film: remove one of them.")
    return films


def check_films(films):
    """Stop where a film is not of the size that all have: it was cut short, or is not of this collection."""
    wrong = []
    for name, path in films.items():
        with open(path, "rb") as file:
            header = PGM.match(file.read(1000))
        if not header or path.stat().st_size != header.end() + SIZE * SIZE:
            wrong.append(name)
    if wrong:
        sys.exit(f"No PGM of exactly {SIZE} x {SIZE} pixels of 8 bits, fetch anew: {list_some(wrong)}")


def make_box(x, y, radius):
    """x:y:width:height of a circle, clipped to the film, or "" where it lies outside.

    Info.txt has its origin in the lower left corner, and the masses of mdb010, mdb023 and mdb028 lie there; a
    box has it in the upper left. Both are corners of the film, not pixels: what is y above its lower edge is
    SIZE - y below its upper one, not SIZE - 1 - y.
    """
    left, top = max(0, x - radius), max(0, SIZE - y - radius)
    width, height = min(SIZE, x + radius) - left, min(SIZE, SIZE - y + radius) - top
    return f"{left}:{top}:{width}:{height}" if width > 0 and height > 0 else ""


def read_info(file):
    """Table of Info.txt, one row per film: film, label ("normal" too), patient_id, lesion_box."""
    findings = {}
    for number, line in enumerate(file.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        if not re.match(r"\s*mdb\d", line, re.IGNORECASE):
            continue  # prose
        if not (row := ROW.fullmatch(line.strip())):
            sys.exit(f"{file}, line {number}, has to look like 'mdb001 G CIRC B 535 425 197', but is {line!r}")
        film, severity, *circle = row.groups()
        findings.setdefault(film.lower(), []).append(((severity or "").upper(), circle))
    rows = []
    for film, found in findings.items():
        worst = max(severity for severity, _ in found)  # M, B or ""
        # only findings that make the label: the benign one of a malignant film is no place to look for cancer
        boxes = [make_box(*map(int, circle)) for severity, circle in found if severity == worst and circle[0]]
        label = {"M": "malignant", "B": "benign", "": "normal"}[worst]
        patient = (int(film[3:]) + 1) // 2  # films 1 and 2, 3 and 4 ... are the two breasts of one patient
        rows.append((film, label, f"mias_{patient:03d}", "|".join(filter(None, boxes))))
    return pd.DataFrame(rows, columns=["film", "label", "patient_id", "lesion_box"])


def count(table):
    """How many films and so on, as in WHOLE."""
    benign, malignant = (int((table["label"] == name).sum()) for name in ("benign", "malignant"))
    patients = table.loc[table["label"] != "normal", "patient_id"].nunique()
    return {"films": len(table), "benign": benign, "malignant": malignant, "patients": patients}


def read_collection(folder, name):
    """(films, table of Info.txt, films that are missing) of a folder; `name`: what an error calls it."""
    films = find_films(folder)
    places = dict.fromkeys([*(path.parent for path in films.values()), folder])
    infos = [path for place in places for path in sorted(place.glob("*")) if path.name.lower() == "info.txt"]
    if not films or not infos:
        sys.exit(f"{name} holds no {'Info.txt' if films else 'film (mdb001.pgm ...)'}: both have to be in it.")
    check_films(films)
    listed = read_info(infos[0])
    return films, listed, [film for film in listed["film"] if film not in films]


def unpack(archive, folder, downloaded=False):
    """Unpack films and texts to folder/films, all or nothing, unless that was done; returns folder/films."""
    films, aside, record, skipped = folder / "films", folder / "films.part", folder / RECORD, []
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if record.is_file() and record.read_text().split()[:1] != [digest]:
        sys.exit(f"{archive} has the SHA-256 {digest}, but {record} that of the archive that was unpacked before:"
                 f" if you trust the new one, delete that file and {films}.")
    if films.exists() and not record.is_file():
        sys.exit(f"{films} does not come from {archive} and is in its way: rename it, or delete it.")
    if films.exists():
        return films
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for number, member in enumerate(tar, 1):
                print(f"\runpacking {archive.name}: {number} files", end="", flush=True)
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    sys.exit(f"\n{archive} is refused: {member.name} in it would land outside of the folder.")
                if member.isfile() and re.fullmatch(r"\w+\.(pgm|txt)", path.name, re.IGNORECASE):
                    with tar.extractfile(member) as source, open(aside / path.name, "xb") as target:
                        shutil.copyfileobj(source, target)  # its bytes alone: no link, owner or mode
                elif not member.isdir():
                    skipped.append(member.name)
            while tar.fileobj.read(2**20):  # up to the checksum at the very end
                pass
        print(f"\nnot unpacked, as it is no plain .pgm or .txt file: {list_some(skipped)}" if skipped else "")
        _, listed, missing = read_collection(aside, archive)
        if downloaded and (missing or count(listed) != WHOLE):
            sys.exit(f"{URL} is no longer the whole collection, with {len(missing)} films missing and Info.txt on"
                     f" {count(listed)}: fetch it from another source, and pass its path.")
        record.write_text(f"{digest}  {ARCHIVE}\n")
        os.replace(aside, films)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        sys.exit(f"\n{archive} cannot be unpacked ({error}): fetch it anew, from {URL} or elsewhere.")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return films


def download(folder):
    """Fetch the archive and unpack it; only then does it get its name. Returns folder/films."""
    aside = folder / f"{ARCHIVE}.part"
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as response, open(aside, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            while piece := response.read(2**20):
                file.write(piece)
                print(f"\rdownloading {URL}: {file.tell() >> 20} of {size >> 20 or '?'} MB", end="", flush=True)
            if size and file.tell() != size:
                raise OSError(f"it broke off after {file.tell()} of {size} bytes")
        print()
        films = unpack(aside, folder, downloaded=True)
        os.replace(aside, folder / ARCHIVE)
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"\n{URL} cannot be downloaded ({getattr(error, 'reason', error)}): fetch it on another machine,"
                 " or the films and Info.txt from another source, and pass the path of the archive or folder, as"
                 " in: python data/mini_mias/prepare.py PATH")
    finally:
        aside.unlink(missing_ok=True)
    return films


def find_source(source, folder):
    """The folder of the films: `source` itself, or what was or is now unpacked in `folder`."""
    source = Path(source).expanduser().resolve() if source else folder
    if not source.exists():
        sys.exit(f"{source} does not exist: pass the folder with the films and Info.txt, or {ARCHIVE}.")
    archive = source if source.is_file() else source / ARCHIVE
    unpacked = source == folder and archive.is_file() and (folder / RECORD).is_file()  # is it still the same?
    if find_films(source) and not unpacked:
        return source
    if archive.is_file():
        return unpack(archive, folder)
    if source == folder:
        return download(folder)
    sys.exit(f"{source} holds neither films (mdb001.pgm ...) nor {ARCHIVE}: pass the folder that does.")


def prepare(source=None, folder=HERE):
    """Write folder/labels.csv for the films in `source`, a folder or archive; returns the table."""
    source = find_source(source, folder)
    films, listed, missing = read_collection(source, source)
    there = ~listed["film"].isin(missing)
    table = listed[there & (listed["label"] != "normal")]
    if table.empty:
        sys.exit(f"{source} holds none of the films that have a benign or malignant finding in Info.txt.")
    if count(listed) != WHOLE:
        print(f"Info.txt lists {count(listed)}, but that of the whole collection {WHOLE}")
    if missing:
        print(f"missing in {source}: {len(missing)} of {len(listed)} films: {list_some(missing)}")
    print(f"normal films, left out: {there.sum() - len(table)}")
    if boxless := list(table["film"][table["lesion_box"] == ""]):
        print(f"without lesion_box, as Info.txt has no circle for it: {list_some(boxless)}")
    paths = [films[film] for film in table["film"]]
    paths = [(path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix() for path in paths]
    table = table.assign(path=paths)[["path", "label", "patient_id", "lesion_box"]]
    table = table.sort_values("path", ignore_index=True)
    aside = folder / "labels.csv.part"
    table.to_csv(aside, index=False, lineterminator="\n")
    os.replace(aside, folder / "labels.csv")
    name = "labels.csv" if missing or count(listed) != WHOLE else "the whole collection"
    print(name + ": {benign} benign and {malignant} malignant films of {patients} patients".format(**count(table)))
    return table


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("Pass one folder or archive, or nothing: python data/mini_mias/prepare.py [FOLDER_OR_ARCHIVE]")
    try:
        prepare(*sys.argv[1:])
    except OSError as error:  # no right to read or write, a full disk
        sys.exit(f"labels.csv could not be made: {error}")
