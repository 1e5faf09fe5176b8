"""data/cmmd/prepare.py, on small downloads in the layouts of TCIA's downloader, with quirks."""
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import write_dicom
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from data import UserError

FORMS = ("by patient", "by study", "by series")
TABLE = "CMMD_clinicaldata_revision"
# Patients, then the label of the left and of the right breast; x: films without a row in the table; -: no films
CASES = """
D1-0001  -          benign
D1-0002  benign     -
D1-0003  -          benign
D1-0021  benign     benign
D1-0034  benign     -
D1-0087  benign     malignant
D1-0045  malignant  -
D1-0046  -          malignant
D2-0001  malignant  x
D2-0002  x          malignant
D2-0003  malignant  x
"""
CASES = [line.split() for line in CASES.strip().splitlines()]
CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}


def make_code(value, meaning="", scheme="SCT"):
    """An item of ViewCodeSequence."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, scheme, meaning
    return code


def write_film(path, patient, side, view, **tags):
    """An 8-bit DICOM film of noise, as CMMD has them; tags replace or add to those of its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*map(ord, f"{patient}{side}{view}")])
    noise = cv2.resize(rng.random((12, 9)), (72, 96), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    header = {"PatientID": patient, "ImageLaterality": side, "ViewCodeSequence": [make_code(*CODES[view])],
              "SOPInstanceUID": generate_uid(entropy_srcs=[str(path)])}
    write_dicom(path, (255 * noise).astype(np.uint8), bits=8, **header | tags)


def make_cmmd(folder, form, kind="csv"):
    """Write a small CMMD download of one of the FORMS; kind: csv, "csv;" or xlsx, of the clinical table.

    Returns [(path below `folder`, patient, side, view, label or "")] of all films.
    """
    folder, films, rows, manifest = Path(folder), [], [], []
    for number, (patient, left, right) in enumerate(CASES):
        study, series = (f"1.3.6.1.4.1.14519.5.2.1.1239.1759.{7 * 10**20 + 1009 * number}{end}" for end in (0, 1))
        place = {"by patient": f"{patient}/07-18-2010-NA-NA-{study[-5:]}/1.000000-NA-{series[-5:]}",
                 "by study": study, "by series": series}[form]
        count = 0
        for side, label in (("L", left), ("R", right)):
            for view in CODES if label != "-" else ():
                count += 1
                path = f"manifest/CMMD/{place}/1-{count}.dcm"
                write_film(folder / path, patient, side, view)
                films.append((path, patient, {"L": "left", "R": "right"}[side], view, label.replace("x", "")))
            if label not in ("-", "x"):
                rows.append((patient, side, "44,5", 2, "mass", label.title(), "Luminal A"))
        manifest.append((series, "CMMD", patient, study, count, ".\\CMMD\\" + place.replace("/", "\\")))

    columns = ["Series UID", "Collection", "Subject ID", "Study UID", "Number of Images", "File Location"]
    pd.DataFrame(manifest, columns=columns).to_csv(folder / "manifest" / "metadata.csv", index=False)
    columns = ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]
    table = pd.DataFrame(rows, columns=columns)
    if kind == "xlsx":
        table.to_excel(folder / f"{TABLE}.xlsx", index=False)
    else:
        table.to_csv(folder / f"{TABLE}.csv", sep=kind[3:] or ",", index=False)
    return films


def expect(films, folder):
    """labels.csv as text, of those films that have a label."""
    lines = [f"{folder}/{path},{label},{','.join(rest)}" for path, *rest, label in films if label]
    return "\n".join(["path,label,patient_id,side,view", *sorted(lines), ""])


@pytest.mark.parametrize(("form", "kind"), [
    ("by patient", "csv"), ("by study", "csv;"), ("by series", "csv"), ("by patient", "xlsx")])
def test_every_form_gives_the_expected_table(make_labels, tmp_path, form, kind, capsys):
    if kind == "xlsx":
        pytest.importorskip("openpyxl")
    films = make_cmmd(tmp_path / "download", form, kind)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "download").rglob("*")}
    assert make_labels("cmmd", tmp_path / "download") == expect(films, tmp_path / "download")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "download").rglob("*")} == before
    assert not (tmp_path / "data" / "missing.csv").exists()
    printed = capsys.readouterr().out
    for words in (r"{'patients': 11, 'breasts': 13, 'benign': 7, 'malignant': 6}, but published were {'patients':",
                  r"DICOM files: 32, but published were 5202", r"\n6 films of 3 breasts are excluded, .* no row",
                  r"labels.csv: 26 films of 11 patients", r"benign +14 +6\nmalignant +12 +6\n", r"next: set DATA"):
        assert re.search(words, printed), words


def test_odd_films(make_labels, tmp_path, capsys):
    folder = tmp_path / "download"
    films = {film[1:4]: list(film) for film in make_cmmd(folder, "by patient")}
    place = {film: folder / row[0] for film, row in films.items()}
    left, right = ("D1-0021", "left", "CC"), ("D1-0021", "right", "CC")
    # what is still known, or not needed
    write_film(place[left], "removed", "L", "CC", ViewCodeSequence=[make_code("R-10242", scheme="SRT")])
    write_film(place[right], "d1-0021 ", "R", "CC", ViewCodeSequence=[make_code("399099002", "latero-medial")])
    films[right][3] = ""
    write_film(place["D1-0021", "right", "MLO"], "", "R", "MLO", ViewCodeSequence=[], ViewPosition="MLO")
    (folder / "manifest" / "metadata.csv").write_text("film,size\n1-1.dcm,12\n")
    # what is excluded
    other, sideless = place["D1-0002", "left", "CC"], place["D1-0034", "left", "CC"]
    write_film(other, "D1-0003", "L", "CC")
    write_film(sideless, "D1-0034", "", "CC")
    broken = place["D1-0087", "right", "MLO"]
    broken.write_bytes(b"cut off")
    copy = shutil.copy(place["D1-0001", "right", "CC"], place["D1-0001", "right", "CC"].with_name("1-3.dcm"))
    stranger = folder / "elsewhere" / "1-1.dcm"
    write_film(stranger, "H-4711", "L", "CC")
    for view in CODES:
        place["D2-0003", "left", view].unlink()
    reasons = {str(other): "header, folders and metadata.csv name different patients: D1-0002, D1-0003",
               str(sideless): "its header has no ImageLaterality: the breast is unknown",
               str(broken): "cannot be read as DICOM", "D2-0003 left": "no film of this breast",
               str(copy): "a copy of another file: they have one SOPInstanceUID",
               str(stranger): "neither header nor folders nor metadata.csv name its patient"}

    labels = make_labels("cmmd", folder)
    kept = [row for film, row in films.items() if place[film].exists() and str(place[film]) not in reasons]
    assert labels == expect(kept, folder)
    missing = pd.read_csv(tmp_path / "data" / "missing.csv")
    assert dict(missing.to_numpy()) == reasons
    printed = capsys.readouterr().out
    assert "metadata.csv has no column subject id and no column file location" in printed
    assert "; 1 films have no view CC or MLO" in printed


def test_the_downloaders_list_names_patients_whose_headers_do_not(make_labels, tmp_path):
    films = make_cmmd(tmp_path / "download", "by study")
    path, patient, side, view, _ = films[0]
    write_film(tmp_path / "download" / path, "", side[0].upper(), view)
    assert make_labels("cmmd", tmp_path / "download") == expect(films, tmp_path / "download")
    write_film(tmp_path / "download" / path, "D1-0999", side[0].upper(), view)
    assert make_labels("cmmd", tmp_path / "download") == expect(films[1:], tmp_path / "download")
    assert f"different patients: {patient}, D1-0999" in (tmp_path / "data" / "missing.csv").read_text()


def test_a_breast_with_rows_of_both_classes_is_malignant(make_labels, tmp_path, capsys):
    films = make_cmmd(tmp_path / "download", "by study")
    with open(tmp_path / "download" / f"{TABLE}.csv", "a") as table:
        table.write("D1-0001,R,44,2,mass,Malignant,\n,,,,,,\n")
    films = [(*film[:4], "malignant" if film[1] == "D1-0001" else film[4]) for film in films]
    assert make_labels("cmmd", tmp_path / "download") == expect(films, tmp_path / "download")
    assert "1 breasts have rows of both classes: they count as malignant\n" in capsys.readouterr().out


def edit(old, new):
    """A function that changes the clinical table of a download."""

    def change(folder):
        table = folder / f"{TABLE}.csv"
        table.write_text(table.read_text().replace(old, new, 1))

    return change


REFUSED = [  # what is done to a download, and what the sentence says
    (edit("Benign", "Unsure"), r"the label of 1 rows is unknown \(first in row 2\): it has to be Benign or Mal"),
    (edit("D1-0002,L", "D1-0002,Both"), r"the side of 1 rows is unknown \(first in row 3\): it has to be L or R"),
    (edit("D1-0003", "1003"), r"the patient_id of 1 rows is unknown \(first in row 4\)"),
    (edit("LeftRight", "Side"), "CMMD_clinicaldata_revision.csv has no column leftright: get it anew"),
    (lambda folder: (folder / f"{TABLE}.csv").unlink(), "^CMMD_clinicaldata_revision.xlsx is missing: put it"),
    (lambda folder: (folder / f"{TABLE} (1).csv").write_text("ID1"), "differs between .*: keep one of them"),
    (lambda folder: shutil.rmtree(folder / "manifest"), "No films were found for labels.csv"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_refused(make_labels, tmp_path, change, words):
    make_cmmd(tmp_path / "download", "by study")
    change(tmp_path / "download")
    with pytest.raises(UserError, match=words):
        make_labels("cmmd", tmp_path / "download")
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("package", ["openpyxl", "pydicom"])
def test_packages_that_are_not_installed_are_named(make_labels, tmp_path, monkeypatch, package):
    make_cmmd(tmp_path / "download", "by study")
    if package == "openpyxl":
        (tmp_path / "download" / f"{TABLE}.csv").rename(tmp_path / "download" / f"{TABLE}.xlsx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        make_labels("cmmd", tmp_path / "download")


def test_a_damaged_xlsx_is_refused(make_labels, tmp_path):
    pytest.importorskip("openpyxl")
    make_cmmd(tmp_path / "download", "by study")
    table = tmp_path / "download" / f"{TABLE}.csv"
    for content in (table.read_bytes(), b"PK\x03\x04 cut off"):
        table.with_suffix(".xlsx").write_bytes(content)
        table.unlink(missing_ok=True)
        with pytest.raises(UserError, match="xlsx cannot be read as a table: get it anew"):
            make_labels("cmmd", tmp_path / "download")
