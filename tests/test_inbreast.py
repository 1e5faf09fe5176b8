"""data/inbreast/prepare.py, on small downloads in the form of the release, with its quirks and a spreadsheet's."""
import plistlib
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import write_dicom

from data import UserError

# Film, patient, side and view as in the name of the film, BI-RADS; then, by hand, label and lesion_box ("none": no
# XML file). Films are 72 x 96 pixels. OUTLINES: name and points of each annotation, by the number of the film.
CASES = """
20586908  6c613a14b80a8591  R  CC  2   benign     10:20:21:31
20586934  6c613a14b80a8591  L  CC  1   -          none
20586960  6c613a14b80a8591  R  ML  2   benign     none
20587054  0b7396cdccacca82  L  ML  4a  malignant  5:6:11:11|30:40:16:21
20587148  fd746d25eb40b3dc  L  CC  3   -          10:10:11:11
22580015  6200187f3f1ccc18  R  ML  4b  malignant  61:0:11:6
22613624  dcafa6ba6374ec07  R  CC  4c  malignant  none
22613702  dcafa6ba6374ec07  L  ML  2   benign
22614074  6bd24a0a42c19ce1  R  CC  5   malignant  12:13:3:5
22670347  98429c0bdf78c0c7  L  ML  6   malignant  3:3:4:4
22670465  7e677f3d530e41ed  L  CC  2   benign     20:20:21:26
22678449  60995d51033e24b8  L  ML  2   benign     8:50:13:21
22678810  64a22c47765f0c5c  L  CC  2   benign     30:30:21:26
50993399  5d85ecc9cf26b254  L  ML  5   malignant  none
"""
CASES = [[*line.split(), ""][:7] for line in CASES.strip().splitlines()]
OUTLINES = {
    "20586908": [("Mass", [(10.2, 20.9), (30.99, 20.0), (30.1, 50.5)])],
    "20587054": [("mass ", [(5, 6), (15, 6), (15, 16), (5, 16)]), ("Calcification", [(50.5, 60.5)]),
                 ("Cluster", [(30, 40), (45, 60), (30, 60)])],
    "20587148": [("Mass", [(10, 10), (20, 10), (20, 20)])],
    "22580015": [("Mass", [(61, -3.5), (80.2, 5), (61, 5)]), ("Mass", [(90, 10), (95, 10), (95, 20)])],
    "22613702": [("Spiculated Region", [(10, 10), (20, 10), (20, 20)]), ("Mass", [(10, 10)]),
                 ("Calcification", [(1, 1)])],
    "22614074": [("Cluster", [(12.5, 13.5), (14.9, 17.1), (12.0, 17.0)])],
    "22670347": [("Mass", [(3, 3), (6, 3), (6, 6)])],
    "22670465": [("Mass", [(20, 20), (40, 20), (40, 45)])],
    "22678449": [("Mass", [(8, 50), (20, 50), (20, 70)])],
    "22678810": [("Cluster", [(30, 30), (50, 30), (50, 55)])],
}
HEADER = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"


def make_inbreast(folder, decimal_commas=False):
    """Write a small INbreast release below `folder`; decimal_commas: as a spreadsheet rewrites numbers.

    Returns {number of a film: its path below `folder`}.
    """
    release = Path(folder) / "INbreast Release 1.0"
    for name in ("AllDICOMs", "AllXML", "PectoralMuscle/Pectoral Muscle XML"):
        (release / name).mkdir(parents=True)
    rows, places = [HEADER], {}
    for film, patient, side, view, birads, *_ in CASES:
        rng = np.random.default_rng(int(film))
        noise = cv2.resize(rng.random((12, 9)), (72, 96), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        places[film] = f"INbreast Release 1.0/AllDICOMs/{film}_{patient}_MG_{side}_{view}_ANON.dcm"
        write_dicom(Path(folder, places[film]), (4095 * noise).astype(np.uint16), bits=14, PatientID="removed")
        view = view.replace("ML", "MLO")
        film, birads = (f"{film},0", re.sub(r"^(\d)$", r"\1,0", birads)) if decimal_commas else (film, birads)
        rows.append(f"removed;removed;{side};{view};201001;{film};{' ' * 90};{birads}")
    (release / "INbreast.csv").write_text("\r\n".join([*rows, ""]))

    for film, rois in OUTLINES.items():
        rois = [{"Area": 0.5, "IndexInImage": number, "Name": name, "NumberOfPoints": len(points),
                 "Point_mm": ["(0.000000, 0.000000, 0.000000)"] * len(points),
                 "Point_px": [f"({x:f}, {y:f})".replace(".", "," if decimal_commas else ".") for x, y in points],
                 "Type": 15} for number, (name, points) in enumerate(rois)]
        images = [{"ImageIndex": 0, "NumberOfROIs": len(rois), "ROIs": rois}]
        (release / "AllXML" / f"{film}.xml").write_bytes(plistlib.dumps({"Images": images}))
    muscle = plistlib.dumps({"ROIPoints": ["{10, 20}", "{30, 40}"]})
    (release / "PectoralMuscle" / "Pectoral Muscle XML" / "20586908_muscle.xml").write_bytes(muscle)
    return places


def expect(places, folder, **boxes):
    """labels.csv as text, with other boxes for some films."""
    lines = []
    for film, patient, side, view, _, label, box in CASES:
        if label != "-" and film in places:
            box, side = boxes.get(f"_{film}", box.replace("none", "")), {"L": "left", "R": "right"}[side]
            lines.append(f"{folder}/{places[film]},{label},{patient},{side},{view.replace('ML', 'MLO')},{box}")
    return "\n".join(["path,label,patient_id,side,view,lesion_box", *sorted(lines), ""])


@pytest.mark.parametrize("decimal_commas", [False, True])
def test_the_release_gives_the_expected_table(make_labels, tmp_path, decimal_commas, capsys):
    folder = tmp_path / "download"
    places = make_inbreast(folder, decimal_commas)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert make_labels("inbreast", folder) == expect(places, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert not (tmp_path / "data" / "missing.csv").exists()
    printed = capsys.readouterr().out
    for words in ("by BI-RADS: {'films': 14, '1': 1, '2': 6, '3': 1, '4': 3, '5': 2, '6': 1}, but published were"
                  " {'films': 410, '1': 67, '2': 220, '3': 23, '4': 43, '5': 49, '6': 8}",
                  "no pathology: {'1': 'excluded', '2': 'benign', '3': 'excluded', '4': 'malignant', '5': 'mal",
                  "14 films of 11 patients by their names; published were 410 films of 115 cases",
                  "\n1 benign films without an XML file, and so without a lesion_box\n",
                  "\n2 malignant films without an XML file, and so without a lesion_box\n",
                  "\n2 points outside of their film, moved to its edge\n",
                  "\n1 annotations 'Spiculated Region', which become no box\n",
                  "\n2 annotations 'Calcification', which become no box\n",
                  "\n2 masses or clusters of fewer than 3 points or outside of their film, which become no box\n",
                  "labels.csv: 12 films of 10 patients", "next: set DATA_DIR"):
        assert words in printed, words


def test_odd_films(make_labels, tmp_path, capsys):
    folder = tmp_path / "download"
    places = make_inbreast(folder)
    release = folder / "INbreast Release 1.0"
    (release / "AllXML" / "20586908.xml").write_text("<plist>cut off")
    for film, point in (("22670347", r"(\1)"), ("22670465", r"(\1,\2)"), ("22678449", "(nan, nan)")):
        file = release / "AllXML" / f"{film}.xml"
        file.write_text(re.sub(r"\(([1-9]\d*)\.0+, ([1-9]\d*)\.0+\)", point, file.read_text()))
    (folder / places["22614074"]).write_bytes(b"cut off")
    for film in ("20586960", "20587148"):  # benign, and one that is excluded
        (folder / places[film]).unlink()
    stranger = shutil.copy(folder / places["20586908"], release / "copy of a film.dcm")
    unknown = release / "AllDICOMs" / "99999999_6c613a14b80a8591_MG_L_CC_ANON.dcm"
    shutil.copy(folder / places["20586908"], unknown)
    table = release / "INbreast.csv"
    table.write_text(table.read_text().replace("L;CC;201001;22670465", "R;FB;201001;22670465"))

    labels = make_labels("inbreast", folder)
    missing = {"20586960": "not in the download", str(unknown): "no row in INbreast.csv",
               str(folder / places["22614074"]): "cannot be read as DICOM",
               str(stranger): "not named like a film of INbreast"}
    assert dict(pd.read_csv(tmp_path / "data" / "missing.csv").to_numpy()) == missing
    places = {film: place for film, place in places.items() if film not in ("20586960", "22614074")}
    assert labels == expect(places, folder, _20586908="", _22670347="", _22678449="")
    printed = capsys.readouterr().out
    assert "3 XML files cannot be read, their films have no lesion_box: 20586908.xml 22670347.xml 2267" in printed
    assert "22670465_7e677f3d530e41ed_MG_L_CC_ANON.dcm: INbreast.csv has another side or view" in printed


def edit(old, new):
    """A function that changes INbreast.csv."""

    def change(folder):
        table = folder / "INbreast Release 1.0" / "INbreast.csv"
        table.write_text(table.read_text().replace(old, new))

    return change


def copy_film(folder):
    film = next(folder.rglob("*.dcm"))
    shutil.copy(film, folder / film.name)


REFUSED = [  # what is done to a download, and what the sentence says
    (edit(";4c", ";7"), r"INbreast.csv: the BI-RADS category \['7'\] is unknown, it has to be one of 0 to 6"),
    (edit(";22670347;", ";22614074;"), "INbreast.csv has several rows of a film, keep one of each: 22614074"),
    (edit("Bi-Rads", "Category"), "INbreast.csv has no column bi-rads: get it anew"),
    (copy_film, "are the same mammogram: remove one of them"),
    (lambda folder: next(folder.rglob("INbreast.csv")).unlink(), "^INbreast.csv is missing: put it into .*data"),
    (lambda folder: shutil.rmtree(folder / "INbreast Release 1.0" / "AllDICOMs"), "No films were found"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_refused(make_labels, tmp_path, change, words):
    make_inbreast(tmp_path / "download")
    change(tmp_path / "download")
    with pytest.raises(UserError, match=words):
        make_labels("inbreast", tmp_path / "download")
    assert not list((tmp_path / "data").iterdir())
