"""data/cbis_ddsm/prepare.py, on small downloads of each form with the quirks of the real one."""
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, write_dicom

from data import UserError

SCRIPT = REPOSITORY / "data" / "cbis_ddsm" / "prepare.py"
FORMS = ("tcia classic", "tcia descriptive", "kaggle")
PREPARE = runpy.run_path(str(SCRIPT))
TABLES = {f"{kind}-{side}": f"{kind}_case_description_{name}_set.csv".lower() for kind in ("Mass", "Calc")
          for side, name in (("Training", "train"), ("Test", "test"))}
# Abnormalities: film, number, pathology, how crop and mask lie (in one series or two, named the wrong way round or
# not) and what is odd about the mask (larger than the film, of another film, two parts, two files); then, by hand,
# label, split and type of the film. P_00002 has three lesions on one film, P_00004 a mass and a calcification, and
# P_00008 stands in a test and a training table.
CASES = """
Mass-Training_P_00001_LEFT_CC    1  MALIGNANT                apart                 malignant  train  mass
Mass-Training_P_00001_LEFT_MLO   1  MALIGNANT                apart-swapped-larger  malignant  train  mass
Mass-Training_P_00002_RIGHT_CC   1  BENIGN                   together              malignant  train  mass
Mass-Training_P_00002_RIGHT_CC   2  MALIGNANT                together-swapped      malignant  train  mass
Mass-Training_P_00002_RIGHT_CC   3  MALIGNANT                apart                 malignant  train  mass
Mass-Training_P_00003_LEFT_MLO   1  BENIGN_WITHOUT_CALLBACK  together-two          benign     train  mass
Mass-Training_P_00004_RIGHT_MLO  1  BENIGN                   together              malignant  train  both
Mass-Training_P_00005_LEFT_CC    1  BENIGN                   apart                 benign     train  mass
Mass-Test_P_00006_LEFT_CC        1  BENIGN                   together              benign     test   mass
Mass-Test_P_00007_RIGHT_MLO      1  MALIGNANT                apart-swapped         malignant  test   mass
Mass-Test_P_00008_LEFT_CC        1  MALIGNANT                together              malignant  test   mass
Calc-Training_P_00004_RIGHT_MLO  1  MALIGNANT                together-swapped      malignant  train  both
Calc-Training_P_00008_RIGHT_CC   1  BENIGN                   together              benign     train  calcification
Calc-Training_P_00009_LEFT_MLO   1  MALIGNANT                together              malignant  train  calcification
Calc-Training_P_00010_RIGHT_CC   1  BENIGN                   together-swapped      benign     train  calcification
Calc-Test_P_00011_LEFT_CC        1  BENIGN_WITHOUT_CALLBACK  together-split        benign     test   calcification
Calc-Test_P_00012_RIGHT_MLO      1  MALIGNANT                together-swapped      malignant  test   calcification
Calc-Test_P_00013_LEFT_MLO       1  BENIGN                   together              benign     test   calcification
Calc-Test_P_00014_RIGHT_CC       1  MALIGNANT                apart-other           malignant  test   calcification
"""
CASES = [line.split() for line in CASES.strip().splitlines()]
FILMS, CROPS = {}, {}  # {name: the rest of its row in labels.csv}


OTHER = {"Calc-Test_P_00014_RIGHT_CC_1": "its mask has 108 x 192 pixels, the film 72 x 96"}


def make_blobs(name, how):
    """The parts of a lesion on its film of 72 x 96 pixels: a mask each, by the name of the abnormality."""
    rng, blobs = np.random.default_rng([*map(ord, name)]), []
    for top, bottom in ((10, 38), (58, 86)):  # never touching
        middle = rng.integers((10, top), (62, bottom)).tolist()
        axes = rng.integers(3, 10, 2).tolist()
        blobs.append(cv2.ellipse(np.zeros((96, 72), np.uint8), middle, axes, 0, 0, 360, 1, -1))
    return blobs if "two" in how or "split" in how else blobs[:1]


def name_box(blob):
    """x:y:width:height of what is white."""
    rows, columns = np.nonzero(blob)
    return f"{columns.min()}:{rows.min()}:{np.ptp(columns) + 1}:{np.ptp(rows) + 1}"


for film, number, pathology, _, label, split, kind in CASES:
    patient, side, view = re.search(r"(P_\d+)_(\w+)_(\w+)$", film).groups()
    boxes = []
    for name, lesion, text, how, *_ in CASES:
        if name.endswith(f"_{patient}_{side}_{view}") and text.lower().startswith(label) and "other" not in how:
            boxes += map(name_box, make_blobs(f"{name}_{lesion}", how))
    boxes = "|".join(boxes)
    FILMS[film] = f"{label},{patient},{split},{side.lower()},{view},{boxes},{kind}"
    label, kind = pathology.split("_")[0].lower(), {"Mass": "mass", "Calc": "calcification"}[film[:4]]
    CROPS[f"{film}_{number}"] = f"{label},{patient},{split},{side.lower()},{view},{kind}"


def make_noise(rng, height, width):
    """A smooth random picture: float (height, width), 0 to 1."""
    noise = cv2.resize(rng.random((height // 8, width // 8)), (width, height), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.min()) / np.ptp(noise)


def make_masks(blobs, how):
    """A mask in one file or two, of the film's size or another one: uint8 (H, W) of 0 and 1, each."""
    parts = blobs if "split" in how else [np.maximum.reduce(blobs)]
    height, width = (192, 144) if "larger" in how else (192, 108) if "other" in how else (96, 72)
    return [cv2.resize(part, (width, height), interpolation=cv2.INTER_NEAREST) for part in parts]


def make_cbis(folder, form):
    """Write a small CBIS-DDSM download of one of the FORMS below `folder`: 17 films, 19 crops, 14 patients.

    Returns where each image lies below `folder`: {name of a film, "<film>_1" of a crop, "<film>_1 mask": path}.
    """
    folder, written, films, rows = Path(folder), {}, {}, []
    uids = (f"1.3.6.1.4.1.9590.100.1.2.{number}" for number in range(7 * 10**20, 8 * 10**20, 1009))

    def write(name, kind, pixels, series, number=1):
        subject, study = name.split()[0], f"{series}0"
        place = {
            "tcia classic": f"CBIS-DDSM/{subject}/{study}/{series}/00000{number - 1}.dcm",
            "tcia descriptive": f"manifest/CBIS-DDSM/{subject}/08-29-2017-DDSM-NA-{study[-5:]}/"
                                f"1.000000-{kind} images-{series[-5:]}/1-{number}.dcm",
        }.get(form, f"archive/jpeg/{series}/{number}-{100 + len(written):03d}.jpg")
        if number > 1 and form == "tcia descriptive":  # in the folder of the first file, whatever that is called
            place = f"{list(written.values())[-1].rpartition('/')[0]}/1-{number}.dcm"
        written[name] = place
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        if form == "kaggle":
            assert cv2.imwrite(str(folder / place), pixels * 255, [cv2.IMWRITE_JPEG_QUALITY, 80])
        else:
            depth = np.uint8 if kind == "mask" else np.uint16
            pixels = (pixels * np.iinfo(depth).max).astype(depth)
            write_dicom(folder / place, pixels, bits=8 * pixels.itemsize)

    for film, number, pathology, how, *_ in CASES:
        table, patient, side, view = re.fullmatch(r"(\w+-\w+?)_(P_\d+)_(\w+)_(\w+)", film).groups()
        if film not in films:
            films[film] = next(uids)
            write(film, "film", make_noise(np.random.default_rng([*map(ord, film[-17:])]), 96, 72), films[film])
        subject = f"{film}_{number}"
        crop = make_noise(np.random.default_rng([*map(ord, subject)]), 64, 48)
        mask, *rest = make_masks(make_blobs(subject, how), how)
        pixels, named, uid = {"crop": np.clip(1.3 * crop, 0, 1), "mask": mask}, {}, ""
        for position, part in enumerate(("mask", "crop") if len(written) % 4 else ("crop", "mask")):
            together = position if "together" in how else 0
            uid = uid if together else next(uids)
            write(subject + " mask" * (part == "mask"), part, pixels[part], uid, together + 1)
            named[part] = f"{subject}/{uid}0/{uid}/00000{together}.dcm"
        for part in rest:  # of a mask in two files
            write(f"{subject} mask 2", "mask", part, uid, 3)
        if "swapped" in how:
            named["crop"], named["mask"] = named["mask"], named["crop"]
        named["mask" if film.startswith("Mass") else "crop"] += "\n"  # within quotes, as in the real tables
        rows.append({
            "table": TABLES[table], "patient_id" if table == "Mass-Test" else "patient id": patient,
            "left or right breast": side, "image view": view, "abnormality id": number,
            "abnormality type": "mass" if film.startswith("Mass") else "calcification",
            "pathology": pathology, "image file path": f"{film}/{films[film]}0/{films[film]}/000000.dcm",
            "cropped image file path": named["crop"], "ROI mask file path": named["mask"],
        })
    place = folder / "archive" if form == "kaggle" else folder
    for name, part in pd.DataFrame(rows).groupby("table"):
        part.dropna(axis=1).to_csv(place / name, index=False)
    return written


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """{form: (folder of a download, where its images lie)}, not to be changed."""
    folders = [tmp_path_factory.mktemp("cbis") for _ in FORMS]
    return {form: (folder, make_cbis(folder, form)) for form, folder in zip(FORMS, folders, strict=True)}


@pytest.fixture
def run(make_labels):
    """Run main() on a download; returns the text of labels.csv, which lands in tmp_path / "data"."""
    return lambda download, crops=False: make_labels("cbis_ddsm", download, crops=crops)


def read_missing(folder):
    """{subject of an image: reason} of missing.csv."""
    missing = pd.read_csv(folder / "data" / "missing.csv")
    assert set(missing["table"]) <= set(TABLES.values())
    return {path.split("/")[0]: reason for path, reason in missing[["path", "reason"]].to_numpy()}


def expect(rows, written, folder, *excluded):
    """labels.csv as text, of FILMS or CROPS but for some images."""
    lines = [f"{folder}/{written[name]},{rest}" for name, rest in rows.items() if name not in excluded]
    box = "" if rows is CROPS else "lesion_box,"
    return "\n".join([f"path,label,patient_id,split,side,view,{box}type", *sorted(lines), ""])


@pytest.mark.parametrize("rows", [FILMS, CROPS], ids=["films", "crops"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_expected_table(run, downloads, tmp_path, form, rows):
    folder, written = downloads[form]
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    assert run(folder, rows is CROPS) == run(folder, rows is CROPS) == expect(rows, written, folder.as_posix())
    assert sorted(os.listdir(tmp_path / "data")) == ["labels.csv", "missing.csv"][: 1 + (rows is FILMS)]
    if rows is FILMS:
        assert read_missing(tmp_path) == OTHER
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_paths_are_relative_below_the_table_and_links_are_followed_once(run, downloads, tmp_path):
    folder, written = downloads["tcia classic"]
    (tmp_path / "data" / "link").symlink_to(folder, target_is_directory=True)
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    assert run(tmp_path / "data", crops=True) == expect(CROPS, written, "link")
    for table in folder.glob("*.csv"):
        shutil.copy(table, tmp_path / "data")
    assert run(tmp_path / "data" / "link" / "CBIS-DDSM") == expect(FILMS, written, "link")


def test_what_is_printed(run, downloads, capsys):
    run(downloads["tcia classic"][0])
    printed = capsys.readouterr().out
    for words in (r"{'patients': 14, 'films': 17, 'abnormalities': 19, 'test films': 7, 'test abnormalities': 7},"
                  r" but published were {'patients': 1566, .*'test films': 645, 'test abnormalities': 704}\n",
                  r"\n1 patients stand in training and test tables: .* excludes their 1 training films \(1 abnorm",
                  r"\n1 films stand in several tables",
                  r"\n1 of 17 films have no lesion_box; 1 masks cannot be used\n",
                  r"labels.csv: 17 films of 14 patients", r"test +benign +3 +3\n +malignant +4 +4\n",
                  r"train +benign +4 +4\n +malignant +6 +4\n", r"next: set DATA_DIR = .*/data\" at the top of"):
        assert re.search(words, printed)


@pytest.mark.parametrize("form", FORMS)
def test_a_download_with_flaws(run, tmp_path, form, capsys):
    folder = tmp_path / "download"
    written = make_cbis(folder, form)
    for table in folder.rglob("*set.csv"):
        table.write_text("\ufeff" + table.read_text())
    film = folder / written["Calc-Test_P_00014_RIGHT_CC"]  # other images share its folder
    for part in ("_1 mask", "_1"):
        shutil.copy(folder / written["Calc-Test_P_00014_RIGHT_CC" + part], film.with_name(f"0{part}{film.suffix}"))
    film.with_name(f"._{film.name}").write_bytes(b"macOS")
    film = film.rename(film.with_suffix(film.suffix.upper()))
    written["Calc-Test_P_00014_RIGHT_CC"] = film.relative_to(folder).as_posix()
    twice, masks, broken, alone, gone = ([*CROPS][row] for row in (5, 11, 14, 7, 8))
    shutil.copy(folder / written[twice], folder / written[f"{twice} mask"])
    shutil.copy(folder / written[f"{masks} mask"], folder / written[masks])
    (folder / written[broken]).write_bytes(b"no image")
    for name in (alone, gone, f"{gone} mask"):
        (folder / written[name]).unlink()
    assert run(folder, True) == expect(CROPS, written, folder.as_posix(), twice, masks, broken, alone, gone)
    assert "missing.csv: 5 images are missing or cannot be used" in capsys.readouterr().out
    unreadable = f"{Path(written[broken]).name} cannot be read"
    reasons = {twice: "2 images that are no masks", masks: "only a mask", alone: "only a mask", broken: unreadable,
               gone: "not in the download"}
    assert read_missing(tmp_path) == reasons

    without = {twice: "no mask", broken: unreadable, gone: "not in the download"}
    films = dict(FILMS)
    for lesion in without:
        films[lesion[:-2]] = re.sub(r"[\d:|]*:[\d:|]*", "", films[lesion[:-2]])
    assert run(folder) == expect(films, written, folder.as_posix())
    assert read_missing(tmp_path) == without | OTHER


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_told_from_crops(seed):
    def compress(pixels, quality):
        code = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return cv2.imdecode(code, cv2.IMREAD_GRAYSCALE)

    rng = np.random.default_rng(seed)
    for height, width in ((64, 48), (400, 300), (2200, 1600)):
        mask, axes = np.zeros((height, width), np.uint8), np.random.default_rng(seed).integers(4, 20, 2).tolist()
        mask = cv2.ellipse(mask, (width // 2, height // 2), axes, 0, 0, 360, 255, -1)
        assert PREPARE["is_mask"](mask // 255 * np.uint16(65535)), "as DICOM has it"
        assert all(PREPARE["is_mask"](compress(mask, quality)) for quality in (50, 75, 100))
        assert PREPARE["is_mask"](0 * mask), "an empty mask shows nothing either"
    crop = make_noise(rng, 64, 48)
    dark = 0.05 * crop
    dark.flat[rng.choice(dark.size, 5, replace=False)] = 1  # a few calcifications, or dust
    half = crop * (np.arange(48) < 24)  # the other half is air
    saturated = np.clip(0.5 + 10 * (crop - np.median(crop)), 0, 1)  # most of it
    for pixels in (crop, crop[:16, :12], np.clip(2 * crop, 0, 1), saturated, dark, half, np.full((64, 48), 0.5)):
        assert not PREPARE["is_mask"]((pixels * 65535).astype(np.uint16))
        assert not PREPARE["is_mask"](compress((pixels * 255).astype(np.uint8), 75))


def edit(kind, *change):
    """A function that changes the text of a table below a folder with re.sub."""
    return lambda folder: [table.write_text(re.sub(*change, table.read_text(), flags=re.DOTALL))
                           for table in folder.rglob(TABLES[kind])]


REFUSED = [  # what is done to a download of Kaggle's, and what the sentence says
    (edit("Mass-Training", "image view", "image_angle"), "train_set.csv has no column image view"),
    (edit("Mass-Training", "$", "x" + ",y" * 40), "train_set.csv cannot be read as a table"),
    (edit("Mass-Test", "MALIGNANT", ""), r"test_set.csv: the pathology \[''\] is unknown"),
    (lambda folder: (folder / TABLES["Mass-Test"]).write_text("another"), "differs between .*: keep one of them"),
    (lambda folder: next(folder.rglob(TABLES["Mass-Test"])).unlink(), "^mass_.* is missing: put it into .*data"),
    (lambda folder: make_cbis(folder / "tcia", "tcia classic"), "both the DICOM files and the JPEG copy"),
    (lambda folder: shutil.rmtree(folder / "archive" / "jpeg"), r"(?s)none of the 19 crops.*\.dcm.*/jpeg/.*\.jpg"),
    (shutil.rmtree, r"^There is no folder .*download: name"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_is_refused(run, tmp_path, change, words):
    make_cbis(tmp_path / "download", "kaggle")
    change(tmp_path / "download")
    (tmp_path / "data" / "labels.csv").write_text("of another run")
    with pytest.raises(UserError, match=words):
        run(tmp_path / "download", crops=True)
    assert (tmp_path / "data" / "labels.csv").read_text() == "of another run"


def test_without_pydicom(run, downloads, monkeypatch):
    """The JPEG copy needs none."""
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for crops in (False, True):
        run(downloads["kaggle"][0], crops)
        with pytest.raises(UserError, match=r"^DICOM files need one more package: pip install pydicom$"):
            run(downloads["tcia descriptive"][0], crops)


@pytest.mark.parametrize(("mask", "film", "agree"), [  # height and width; the large ones are of the collection
    ((4386, 1789), (5041, 2056), True), ((4621, 2781), (5311, 3196), True), ((4688, 3088), (4624, 3056), False),
    ((4624, 3080), (4640, 3072), False), ((96, 72), (110, 83), True), ((96, 72), (96, 72), True),
    ((96, 72), (72, 96), False),
])
def test_masks_of_another_size_are_scaled_where_the_aspect_agrees(mask, film, agree):
    boxes, reason = PREPARE["scale_boxes"](np.array([[7, 11, 20, 40]]), mask, film)
    assert bool(boxes) == (reason == "") == agree
    if agree:
        x, y, width, height = map(int, boxes[0].split(":"))
        vertical, horizontal = film[0] / mask[0], film[1] / mask[1]
        assert x <= 7 * horizontal < x + 1
        assert y <= 11 * vertical < y + 1
        assert x + width - 1 < 27 * horizontal <= x + width
        assert y + height - 1 < 51 * vertical <= y + height
