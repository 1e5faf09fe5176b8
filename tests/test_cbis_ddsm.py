"""data/cbis_ddsm/prepare.py, on small downloads of each form with the quirks of the real one."""
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "cbis_ddsm" / "prepare.py"
FORMS = ("tcia classic", "tcia descriptive", "kaggle", "kaggle without dicom_info")
TABLES = {
    "Mass-Training": "mass_case_description_train_set.csv",
    "Mass-Test": "mass_case_description_test_set.csv",
    "Calc-Training": "calc_case_description_train_set.csv",
    "Calc-Test": "calc_case_description_test_set.csv",
}
# abnormalities: the film, the number, the pathology, how crop and mask lie (in one series or two, and whether the
# table has them the wrong way round), and what dicom_info.csv says of both
CASES = """
Mass-Training_P_00001_LEFT_CC    1  MALIGNANT                apart            both
Mass-Training_P_00001_LEFT_MLO   1  MALIGNANT                apart-swapped    both
Mass-Training_P_00002_RIGHT_CC   1  BENIGN                   together         both
Mass-Training_P_00002_RIGHT_CC   2  MALIGNANT                together-swapped both
Mass-Training_P_00003_LEFT_MLO   1  BENIGN_WITHOUT_CALLBACK  together         nothing
Mass-Training_P_00004_RIGHT_MLO  1  BENIGN                   together         same
Mass-Training_P_00005_LEFT_CC    1  BENIGN                   apart            nothing
Mass-Test_P_00006_LEFT_CC        1  BENIGN                   together         both
Mass-Test_P_00007_RIGHT_MLO      1  MALIGNANT                apart-swapped    same
Mass-Test_P_00008_LEFT_CC        1  MALIGNANT                together         both
Calc-Training_P_00004_RIGHT_MLO  1  MALIGNANT                together-swapped nothing
Calc-Training_P_00008_RIGHT_CC   1  BENIGN                   together         both
Calc-Training_P_00009_LEFT_MLO   1  MALIGNANT                together         both
Calc-Training_P_00010_RIGHT_CC   1  BENIGN                   together-swapped same
Calc-Test_P_00011_LEFT_CC        1  BENIGN_WITHOUT_CALLBACK  together         both
Calc-Test_P_00012_RIGHT_MLO      1  MALIGNANT                together-swapped both
Calc-Test_P_00013_LEFT_MLO       1  BENIGN                   together         wrong
Calc-Test_P_00014_RIGHT_CC       1  MALIGNANT                apart            both
"""
# written by hand: P_00002 has a benign and a malignant lesion on one film; P_00004 a benign mass and a malignant
# calcification on one picture; P_00008 stands in a test and a training table
FILMS = """
Mass-Training_P_00001_LEFT_CC    malignant,P_00001,train,LEFT,CC,mass
Mass-Training_P_00001_LEFT_MLO   malignant,P_00001,train,LEFT,MLO,mass
Mass-Training_P_00002_RIGHT_CC   malignant,P_00002,train,RIGHT,CC,mass
Mass-Training_P_00003_LEFT_MLO   benign,P_00003,train,LEFT,MLO,mass
Mass-Training_P_00004_RIGHT_MLO  malignant,P_00004,train,RIGHT,MLO,both
Mass-Training_P_00005_LEFT_CC    benign,P_00005,train,LEFT,CC,mass
Mass-Test_P_00006_LEFT_CC        benign,P_00006,validation,LEFT,CC,mass
Mass-Test_P_00007_RIGHT_MLO      malignant,P_00007,validation,RIGHT,MLO,mass
Mass-Test_P_00008_LEFT_CC        malignant,P_00008,train,LEFT,CC,mass
Calc-Training_P_00004_RIGHT_MLO  malignant,P_00004,train,RIGHT,MLO,both
Calc-Training_P_00008_RIGHT_CC   benign,P_00008,train,RIGHT,CC,calcification
Calc-Training_P_00009_LEFT_MLO   malignant,P_00009,train,LEFT,MLO,calcification
Calc-Training_P_00010_RIGHT_CC   benign,P_00010,train,RIGHT,CC,calcification
Calc-Test_P_00011_LEFT_CC        benign,P_00011,validation,LEFT,CC,calcification
Calc-Test_P_00012_RIGHT_MLO      malignant,P_00012,validation,RIGHT,MLO,calcification
Calc-Test_P_00013_LEFT_MLO       benign,P_00013,validation,LEFT,MLO,calcification
Calc-Test_P_00014_RIGHT_CC       malignant,P_00014,validation,RIGHT,CC,calcification
"""
CROPS = """
Mass-Training_P_00001_LEFT_CC_1    malignant,P_00001,train,LEFT,CC,mass
Mass-Training_P_00001_LEFT_MLO_1   malignant,P_00001,train,LEFT,MLO,mass
Mass-Training_P_00002_RIGHT_CC_1   benign,P_00002,train,RIGHT,CC,mass
Mass-Training_P_00002_RIGHT_CC_2   malignant,P_00002,train,RIGHT,CC,mass
Mass-Training_P_00003_LEFT_MLO_1   benign,P_00003,train,LEFT,MLO,mass
Mass-Training_P_00004_RIGHT_MLO_1  benign,P_00004,train,RIGHT,MLO,mass
Mass-Training_P_00005_LEFT_CC_1    benign,P_00005,train,LEFT,CC,mass
Mass-Test_P_00006_LEFT_CC_1        benign,P_00006,validation,LEFT,CC,mass
Mass-Test_P_00007_RIGHT_MLO_1      malignant,P_00007,validation,RIGHT,MLO,mass
Mass-Test_P_00008_LEFT_CC_1        malignant,P_00008,train,LEFT,CC,mass
Calc-Training_P_00004_RIGHT_MLO_1  malignant,P_00004,train,RIGHT,MLO,calcification
Calc-Training_P_00008_RIGHT_CC_1   benign,P_00008,train,RIGHT,CC,calcification
Calc-Training_P_00009_LEFT_MLO_1   malignant,P_00009,train,LEFT,MLO,calcification
Calc-Training_P_00010_RIGHT_CC_1   benign,P_00010,train,RIGHT,CC,calcification
Calc-Test_P_00011_LEFT_CC_1        benign,P_00011,validation,LEFT,CC,calcification
Calc-Test_P_00012_RIGHT_MLO_1      malignant,P_00012,validation,RIGHT,MLO,calcification
Calc-Test_P_00013_LEFT_MLO_1       benign,P_00013,validation,LEFT,MLO,calcification
Calc-Test_P_00014_RIGHT_CC_1       malignant,P_00014,validation,RIGHT,CC,calcification
"""
DESCRIPTIONS = {"film": "full mammogram images", "crop": "cropped images", "mask": "ROI mask images"}


def make_noise(rng, height, width):
    """A smooth random picture: float (height, width), 0 to 1."""
    noise = cv2.resize(rng.random((height // 8, width // 8)), (width, height), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.min()) / np.ptp(noise)


def make_mask(rng, height=96, width=72):
    """A white ellipse on black: uint8 (height, width)."""
    middle, axes = (width // 2, height // 2), rng.integers(4, 20, 2).tolist()
    return cv2.ellipse(np.zeros((height, width), np.uint8), middle, axes, 0, 0, 360, 255, -1)


def write_dicom(path, pixels, subject, description):
    """A grey DICOM file of 8 or 16 bits, as `pixels` has."""
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path)])
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    data.PatientID, data.SeriesDescription, data.Modality = subject, description, "MG"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelData = pixels.tobytes()
    data.save_as(path, enforce_file_format=True)


def make_cbis(folder, form, rng_seed=0):
    """Write a small CBIS-DDSM download of one of the FORMS below `folder`: 17 films, 18 crops, 14 patients.

    Returns where each image lies: {"Mass-Test_P_00006_LEFT_CC": path of the film below `folder`, the same
    with "_1": of the crop, with "_1 mask": of its mask}.
    """
    folder, written, info, rows, uids = Path(folder), {}, [], [], iter(range(7 * 10**20, 8 * 10**20, 1009))
    kaggle = form.startswith("kaggle")

    def write(name, kind, pixels, subject, uid, number, description):
        study, series = uid
        suffix = ".jpg" if kaggle else ".dcm"
        place = {
            "tcia classic": f"CBIS-DDSM/{subject}/{study}/{series}/00000{number - 1}",
            "tcia descriptive": f"manifest/CBIS-DDSM/{subject}/08-29-2017-DDSM-NA-{study[-5:]}/"
                                f"1.000000-{DESCRIPTIONS[kind]}-{series[-5:]}/1-{number}",
        }.get(form, f"archive/jpeg/{series}/{number}-{100 + len(written):03d}") + suffix
        if number == 2 and form == "tcia descriptive":  # in the folder of the first file, whatever that is called
            place = list(written.values())[-1].replace("/1-1.dcm", "/1-2.dcm")
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        top = 255 if kaggle or kind == "mask" else 65535
        grey = (pixels * top).astype(np.uint8 if top == 255 else np.uint16)
        if kaggle:
            assert cv2.imwrite(str(path), grey, [cv2.IMWRITE_JPEG_QUALITY, 80])
        else:
            write_dicom(path, grey, subject, DESCRIPTIONS[kind])
        written[name] = place
        image = "/".join(["CBIS-DDSM", *place.split("/")[1:]])
        info.append((re.sub("jpe?g", "dcm", image), image, 8, subject, description, series))

    def new_uid():
        return tuple(f"1.3.6.1.4.1.9590.100.1.2.{next(uids)}" for _ in range(2))

    films = {}
    for film, number, pathology, how, described in (line.split() for line in CASES.strip().splitlines()):
        kind, _, patient, side, view = re.fullmatch(r"((Mass|Calc)-\w+?)_(P_\d+)_(\w+)_(\w+)", film).groups()
        if film not in films:
            films[film] = new_uid()
            picture = make_noise(np.random.default_rng([rng_seed, *map(ord, patient + side + view)]), 96, 72)
            write(film, "film", picture, film, films[film], 1, DESCRIPTIONS["film"])
        subject = f"{film}_{number}"
        rng = np.random.default_rng([rng_seed, *map(ord, subject)])
        pixels = {"crop": np.clip(1.3 * make_noise(rng, 64, 48), 0, 1), "mask": make_mask(rng) / 255}
        uid = {"crop": new_uid()}
        uid["mask"] = new_uid() if "apart" in how else uid["crop"]
        order = ("mask", "crop") if len(written) % 4 else ("crop", "mask")
        numbers = {order[0]: 1, order[1]: 1 if "apart" in how else 2}
        names = {"crop": subject, "mask": f"{subject} mask"}
        for part in order:
            words = {"both": DESCRIPTIONS[part], "same": "cropped images", "nothing": "",
                     "wrong": "cropped images" if part == "mask" else ""}[described]
            write(names[part], part, pixels[part], subject, uid[part], numbers[part], words)
        named = {part: "/".join((subject, *uid[part], f"00000{numbers[part] - 1}.dcm")) for part in order}
        if "swapped" in how:
            named["crop"], named["mask"] = named["mask"], named["crop"]
        named["crop" if kind.startswith("Calc") else "mask"] += "\n"
        mass = kind.startswith("Mass")
        rows.append((kind, {
            "patient_id": patient, "breast_density" if mass else "breast density": 3, "left or right breast": side,
            "image view": view, "abnormality id": number, "abnormality type": "mass" if mass else "calcification",
            "mass shape" if mass else "calc type": "OVAL" if mass else "PUNCTATE", "assessment": 4,
            "pathology": pathology, "subtlety": 3, "image file path": "/".join((film, *films[film], "000000.dcm")),
            "cropped image file path": named["crop"], "ROI mask file path": named["mask"],
        }))
    place = folder / ("archive/csv" if kaggle else ".")
    place.mkdir(exist_ok=True)
    for kind, name in TABLES.items():
        pd.DataFrame([row for of, row in rows if of == kind]).to_csv(place / name, index=False)
    if form == "kaggle":
        names = ["file_path", "image_path", "BitsAllocated", "PatientID", "SeriesDescription", "SeriesInstanceUID"]
        pd.DataFrame(info, columns=names).to_csv(place / "dicom_info.csv", index=False)
    return written


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """{form: (folder of a download, where its images lie)}, not to be changed."""
    folders = {form: tmp_path_factory.mktemp("cbis") for form in FORMS}
    return {form: (folder, make_cbis(folder, form)) for form, folder in folders.items()}


@pytest.fixture
def prepare():
    """The functions and constants of data/cbis_ddsm/prepare.py."""
    return runpy.run_path(str(SCRIPT))


@pytest.fixture
def run(prepare, tmp_path):
    """Run main() on a download; returns the text of labels.csv, which lands in tmp_path / "data"."""
    (tmp_path / "data").mkdir()

    def run(download, crops=False, folder=tmp_path / "data"):
        prepare["main"](download, crops, folder)
        return (folder / "labels.csv").read_bytes().decode()

    return run


def expect(rows, written, prefix):
    """labels.csv as text, of the lines of FILMS or CROPS."""
    lines = [f"{prefix}{written[name]},{values}" for name, values in map(str.split, rows.strip().splitlines())]
    return "\n".join(["path,label,patient_id,split,side,view,type", *sorted(lines), ""])


def without(rows, *names):
    """The lines of FILMS or CROPS but for those of some images."""
    return "\n".join(line for line in rows.strip().splitlines() if line.split()[0] not in names)


def look(folder):
    """Everything below a folder: {path: (size, time of the last change)}."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def edit_table(folder, kind, *change):
    """Change the text of a table below a folder with re.sub."""
    [path] = folder.rglob(TABLES[kind])
    text = re.sub(*change, path.read_bytes().decode())
    assert text != path.read_bytes().decode()
    path.write_bytes(text.encode())


@pytest.mark.parametrize("rows", [FILMS, CROPS], ids=["films", "crops"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_expected_table(run, downloads, tmp_path, form, rows):
    (folder, written), before = downloads[form], look(downloads[form][0])
    assert run(folder, rows is CROPS) == expect(rows, written, folder.as_posix() + "/")
    first = (tmp_path / "data" / "labels.csv").read_bytes()
    run(folder, rows is CROPS)
    assert (tmp_path / "data" / "labels.csv").read_bytes() == first
    assert os.listdir(tmp_path / "data") == ["labels.csv"], "no missing.csv, nothing half written"
    assert look(folder) == before, "nothing is written into the download"


def test_the_fixture_is_what_the_tests_are_about(downloads):
    """Line breaks in quotes, both spellings of density, swapped columns, and one picture in two files."""
    folder, written = downloads["tcia classic"]
    texts = {kind: (folder / name).read_text() for kind, name in TABLES.items()}
    assert all('.dcm\n"' in text for text in texts.values())
    assert {"breast_density", "breast density"} == {text.split(",")[1] for text in texts.values()}
    table = pd.concat([pd.read_csv(folder / name, dtype=str) for name in TABLES.values()])
    crops = table["cropped image file path"].str.strip()
    right = [f"CBIS-DDSM/{crop}" == written[crop.split("/")[0]] for crop in crops]
    assert 5 < sum(right) < len(right) - 5, "the tables are often wrong"
    pydicom = pytest.importorskip("pydicom")
    twin = [folder / written[f"{kind}-Training_P_00004_RIGHT_MLO"] for kind in ("Mass", "Calc")]
    first, second = (pydicom.dcmread(path).pixel_array for path in twin)
    assert np.array_equal(first, second) and twin[0] != twin[1] and first.dtype == np.uint16


@pytest.mark.parametrize("form", ["tcia classic", "kaggle"])
def test_paths_are_relative_where_the_download_lies_below(run, tmp_path, monkeypatch, form):
    written = make_cbis(tmp_path / "data" / "download", form)
    expected = expect(FILMS, written, "download/")
    assert run(tmp_path / "data") == expected
    assert run(tmp_path / "data" / "download") == expected
    monkeypatch.chdir(tmp_path)
    assert run(os.path.join("data", "download")) == expected


def test_tables_may_lie_beside_the_script(run, downloads, tmp_path):
    folder, written = downloads["kaggle"]
    for name in TABLES.values():
        shutil.copy(folder / "archive" / "csv" / name, tmp_path / "data")
    assert run(folder / "archive" / "jpeg") == expect(FILMS, written, folder.as_posix() + "/")


def test_a_linked_folder_is_followed_once(run, downloads, tmp_path):
    folder, written = downloads["tcia classic"]
    try:
        (tmp_path / "data" / "link").symlink_to(folder, target_is_directory=True)
        (tmp_path / "data" / "loop").symlink_to(tmp_path / "data", target_is_directory=True)
    except OSError:
        pytest.skip("no right to make links")
    assert run(tmp_path / "data", crops=True) == expect(CROPS, written, "link/")


def test_what_is_printed(run, downloads, tmp_path, capsys):
    run(downloads["tcia classic"][0])
    printed = capsys.readouterr().out
    assert "14 patients, 17 films, 18 abnormalities" in printed
    assert "published were 1566 patients, 3103 films, 3568 abnormalities" in printed
    assert re.search(r"(?m)^1 patients stand in training and test .* validation has 1 films fewer", printed)
    assert re.search(r"(?m)^1 films stand in mass and calc tables", printed)
    assert f"{tmp_path / 'data' / 'labels.csv'}: 17 films of 14 patients" in printed
    assert "train: 4 benign, 7 malignant" in printed
    assert "validation: 3 benign, 3 malignant" in printed
    assert printed.endswith('next: set DATA_DIR = "data/cbis_ddsm" at the top of resnet50.py or vgg16.py\n')
    assert "***" in printed and "missing" not in printed and "a class" not in printed
    run(downloads["tcia classic"][0], crops=True)
    printed = capsys.readouterr().out
    assert "labels.csv: 18 crops of 14 patients" in printed
    assert "train: 6 benign, 6 malignant" in printed


def test_published_totals_are_recognised(run, prepare, downloads, monkeypatch, capsys):
    own = {"patients": 14, "films": 17, "abnormalities": 18}
    assert prepare["PUBLISHED"] == {"patients": 1566, "films": 3103, "abnormalities": 3568}
    monkeypatch.setitem(prepare["main"].__globals__, "PUBLISHED", own)
    run(downloads["kaggle"][0])
    assert "14 patients, 17 films, 18 abnormalities, as published" in capsys.readouterr().out


def test_missing_films_are_listed_and_the_rest_goes_on(run, tmp_path, capsys):
    folder = tmp_path / "download"
    written, gone = make_cbis(folder, "tcia classic"), ("Mass-Test_P_00006_LEFT_CC", "Calc-Test_P_00014_RIGHT_CC")
    aside = [path.rename(tmp_path / path.name) for path in (folder / "CBIS-DDSM" / name for name in gone)]
    assert run(folder) == expect(without(FILMS, *gone), written, folder.as_posix() + "/")
    printed = capsys.readouterr().out
    lines = (tmp_path / "data" / "missing.csv").read_text().splitlines()
    assert lines[0] == "path,table,reason"
    assert [line.split("/")[0] for line in lines[1:]] == sorted(gone)
    assert lines[1].endswith("/000000.dcm,calc_case_description_test_set.csv,not in the download")
    assert "2 films are missing (1 of calc_case_description_test_set.csv, 1 of mass_case" in printed
    assert all(f"  {line.split(',')[0]}: not in the download\n" in printed for line in lines[1:])
    for path in aside:
        path.rename(folder / "CBIS-DDSM" / path.name)
    assert run(folder) == expect(FILMS, written, folder.as_posix() + "/")
    assert not (tmp_path / "data" / "missing.csv").exists()


def test_twenty_missing_files_are_printed_and_all_are_written(run, tmp_path, capsys):
    folder = tmp_path / "download"
    make_cbis(folder, "kaggle without dicom_info")
    row = "P_{0},3,LEFT,CC,1,mass,OVAL,4,BENIGN,3,Mass-Test_P_{0}_LEFT_CC/1.2/1.3.{0}/000000.dcm,a/b/c/d,e/f/g/h\n"
    with next(folder.rglob(TABLES["Mass-Test"])).open("a") as table:
        table.writelines(row.format(patient) for patient in range(20000, 20025))
    run(folder)
    assert capsys.readouterr().out.count(": not in the download") == 20
    assert len((tmp_path / "data" / "missing.csv").read_text().splitlines()) == 26


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_crop_that_pixels_cannot_tell_is_missing(run, tmp_path, form):
    """Each is described in dicom_info.csv as nothing or as the same as its mask."""
    folder = tmp_path / "download"
    written = make_cbis(folder, form)
    twice, masks, broken, alone = (
        "Mass-Training_P_00003_LEFT_MLO_1", "Calc-Training_P_00004_RIGHT_MLO_1",
        "Calc-Training_P_00010_RIGHT_CC_1", "Mass-Training_P_00005_LEFT_CC_1")
    shutil.copy(folder / written[twice], folder / written[f"{twice} mask"])
    shutil.copy(folder / written[f"{masks} mask"], folder / written[masks])
    (folder / written[broken]).write_bytes(b"no image")
    (folder / written[alone]).unlink()
    names = (twice, masks, broken, alone)
    assert run(folder, crops=True) == expect(without(CROPS, *names), written, folder.as_posix() + "/")
    text = (tmp_path / "data" / "missing.csv").read_text()
    assert text.count("\n") == 5, "without the line breaks that the tables have within quotes"
    missing = pd.read_csv(tmp_path / "data" / "missing.csv")
    reasons = {path.split("/")[0]: reason for path, reason in zip(missing["path"], missing["reason"], strict=True)}
    file = Path(written[broken]).name
    assert reasons == {twice: "2 images that are no masks", masks: "only a mask", broken: f"{file} cannot be read",
                       alone: "only a mask"}


def test_a_film_is_the_largest_image_of_its_folder_that_is_no_mask(run, tmp_path):
    """As where two series share a folder."""
    folder = tmp_path / "download"
    written = make_cbis(folder, "tcia classic")
    film, crop = "Mass-Test_P_00006_LEFT_CC", "Mass-Test_P_00006_LEFT_CC_1"
    series = (folder / written[film]).parent
    write_dicom(series / "000009.dcm", make_mask(np.random.default_rng(0), 300, 200), film, "")
    shutil.copy(folder / written[crop], series / "0.dcm")
    assert run(folder) == expect(FILMS, written, folder.as_posix() + "/")


def test_dicom_info_spares_opening_files_and_does_no_harm(run, tmp_path):
    folder, name = tmp_path / "download", "Mass-Test_P_00006_LEFT_CC_1"
    written = make_cbis(folder, "kaggle")
    whole = expect(CROPS, written, folder.as_posix() + "/")
    mask = folder / written[f"{name} mask"]
    mask.write_bytes(b"no image")
    assert run(folder, crops=True) == whole
    shutil.copy(folder / written[f"{name[:-1]}1"], mask)  # a second crop, if anyone looked
    assert run(folder, crops=True) == whole
    [info] = folder.rglob("dicom_info.csv")
    text = info.read_text()
    alone = re.sub(f".*{mask.name}.*", "", text)  # what the other file shows is not said
    for words in ("", "a,b\n1,2\n", 'image_path,SeriesDescription\n"open', alone,
                  text.replace("cropped images", "")):
        info.write_text(words)
        assert run(folder, crops=True) == expect(without(CROPS, name), written, folder.as_posix() + "/")


@pytest.mark.parametrize("form", ["tcia classic", "kaggle"])
def test_names_in_capitals_and_byte_order_marks(run, tmp_path, form):
    """As other systems and programs write them."""
    folder = tmp_path / "download"
    written = make_cbis(folder, form)
    for name, place in written.items():
        written[name] = place[:-4] + place[-4:].upper()
        (folder / place).rename(folder / written[name])
    edit_table(folder, "Calc-Training", r"\A", "\ufeff")
    assert run(folder, crops=True) == expect(CROPS, written, folder.as_posix() + "/")


def test_files_of_the_system_are_ignored(run, tmp_path):
    folder = tmp_path / "download"
    written = make_cbis(folder, "tcia descriptive")
    for path in list(folder.rglob("*.dcm")):
        path.with_name(f"._{path.name}").write_bytes(b"macOS")
    assert run(folder, crops=True) == expect(CROPS, written, folder.as_posix() + "/")


def smooth(height, width, seed=0):
    return make_noise(np.random.default_rng(seed), height, width)


def compress(pixels, quality):
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)


@pytest.mark.parametrize("quality", [50, 75, 100])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (400, 300), (2500, 2000)])
def test_masks(prepare, height, width, quality):
    for seed in range(10):
        mask = make_mask(np.random.default_rng(seed), height, width)
        assert prepare["is_mask"](mask), "as DICOM has it"
        assert prepare["is_mask"](mask // 255 * np.uint16(65535))
        assert prepare["is_mask"](compress(mask, quality))
    assert prepare["is_mask"](np.zeros((height, width), np.uint8)), "an empty mask shows nothing either"


@pytest.mark.parametrize("seed", range(10))
def test_crops_are_no_masks(prepare, seed):
    crop, rng = smooth(64, 48, seed), np.random.default_rng(seed)
    dark = 0.05 * crop
    dark.flat[rng.choice(dark.size, 5, replace=False)] = 1  # a few calcifications, or dust
    half = crop * (np.arange(48) < 24)  # the other half is air
    low, high = np.quantile(crop, (0.45, 0.55))
    saturated = np.clip((crop - low) / (high - low), 0, 1)  # nine tenths of it
    for pixels in (crop, crop[:16, :12], np.clip(2 * crop, 0, 1), np.clip(crop - 0.5, 0, 1), saturated, dark, half,
                   np.clip(3 * crop - 1, 0, 1), 0.9 + 0.1 * crop, np.full((64, 48), 0.5)):
        grey = (pixels * 65535).astype(np.uint16)
        assert not prepare["is_mask"](grey)
        assert not prepare["is_mask"](compress((pixels * 255).astype(np.uint8), 75))


@pytest.mark.parametrize("kind", TABLES)
def test_a_missing_table_is_named(run, tmp_path, kind):
    make_cbis(tmp_path / "download", "tcia classic")
    (tmp_path / "download" / TABLES[kind]).unlink()
    with pytest.raises(SystemExit, match=rf"^{TABLES[kind]} missing: put it below .*download or into .*data\.$"):
        run(tmp_path / "download")


def test_an_unknown_pathology_stops_and_is_listed(run, tmp_path):
    make_cbis(tmp_path / "download", "kaggle")
    edit_table(tmp_path / "download", "Calc-Test", "BENIGN_WITHOUT_CALLBACK", "UNPROVEN")
    edit_table(tmp_path / "download", "Mass-Test", "MALIGNANT", "")
    with pytest.raises(SystemExit, match=r"'', 'UNPROVEN' in 'calc_case_description_test_set.csv', 'mass_"):
        run(tmp_path / "download")
    assert not os.listdir(tmp_path / "data")


@pytest.mark.parametrize(("change", "words"), [
    (("image view", "image_angle"), "has no column image view"),
    ((r"(?s)^.*$", ""), "cannot be read as a table"),
    ((r"(?s)^(.*)$", r"\1\nx" + ",y" * 40), "cannot be read as a table"),
])
def test_a_broken_table_is_named(run, tmp_path, change, words):
    make_cbis(tmp_path / "download", "tcia classic")
    edit_table(tmp_path / "download", "Mass-Training", *change)
    with pytest.raises(SystemExit, match=f"{TABLES['Mass-Training']} {words}"):
        run(tmp_path / "download")


def test_two_versions_of_a_table_stop_and_copies_do_not(run, tmp_path):
    folder = tmp_path / "download"
    written = make_cbis(folder, "tcia classic")
    (folder / "more").mkdir()
    shutil.copy(folder / TABLES["Mass-Test"], folder / "more")
    assert run(folder) == expect(FILMS, written, folder.as_posix() + "/")
    (folder / "more" / TABLES["Mass-Test"]).write_text("another")
    with pytest.raises(SystemExit, match=f"{TABLES['Mass-Test']} differs between .*: keep one of them"):
        run(folder)


def test_nothing_found_shows_the_layouts(run, tmp_path):
    (tmp_path / "data" / "labels.csv").write_text("of another run")
    make_cbis(tmp_path / "download", "tcia classic")
    for path in (tmp_path / "download" / "CBIS-DDSM").glob("*_1"):
        shutil.rmtree(path)
    shutil.rmtree(tmp_path / "download" / "CBIS-DDSM" / "Mass-Training_P_00002_RIGHT_CC_2")
    with pytest.raises(SystemExit, match=r"(?s)none of the 18 crops.*TCIA .*\.dcm.*Kaggle .*/jpeg/.*\.jpg"):
        run(tmp_path / "download", crops=True)
    assert (tmp_path / "data" / "labels.csv").read_text() == "of another run"


def test_a_folder_that_is_not_there(run, tmp_path):
    with pytest.raises(SystemExit, match=r"^There is no folder .*nowhere: name the folder of the download\.$"):
        run(tmp_path / "nowhere")


def test_both_downloads_in_one_folder(run, tmp_path):
    for form in ("tcia classic", "kaggle"):
        make_cbis(tmp_path / "download", form)
    with pytest.raises(SystemExit, match="both the DICOM files and the JPEG copy: name the folder of one"):
        run(tmp_path / "download")


def test_a_class_that_is_missing_is_said(run, tmp_path, capsys):
    make_cbis(tmp_path / "download", "kaggle")
    for kind in ("Mass-Test", "Calc-Test"):
        edit_table(tmp_path / "download", kind, "MALIGNANT", "BENIGN")
    run(tmp_path / "download")
    printed = capsys.readouterr().out
    assert "validation: 6 benign, 0 malignant\n  *** a class has none" in printed
    assert printed.count("a class has none") == 1


def test_without_pydicom(run, downloads, monkeypatch):
    """Whole films need none, crops do; the JPEG copy never does."""
    monkeypatch.setitem(sys.modules, "pydicom", None)
    folder, written = downloads["tcia descriptive"]
    assert run(folder) == expect(FILMS, written, folder.as_posix() + "/")
    run(downloads["kaggle"][0], crops=True)
    with pytest.raises(SystemExit, match=r"^DICOM files need one more package: pip install pydicom$"):
        run(folder, crops=True)


def test_a_run_that_breaks_off_leaves_the_old_table(run, downloads, tmp_path, monkeypatch):
    old = run(downloads["kaggle"][0])

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run(downloads["kaggle"][0], crops=True)
    assert (tmp_path / "data" / "labels.csv").read_bytes().decode() == old


def test_the_command(downloads, tmp_path):
    """In a process of its own: labels.csv beside the script, no TensorFlow, no traceback."""
    (tmp_path / "data" / "cbis_ddsm").mkdir(parents=True)
    script = shutil.copy(SCRIPT, tmp_path / "data" / "cbis_ddsm")
    folder, written = downloads["kaggle"]

    def call(*arguments, code=(script,)):
        return subprocess.run([sys.executable, *code, *map(str, arguments)], capture_output=True, text=True)

    assert call(folder, "--crops").returncode == 0
    labels = tmp_path / "data" / "cbis_ddsm" / "labels.csv"
    assert labels.read_text() == expect(CROPS, written, folder.as_posix() + "/")
    assert call(folder).returncode == 0
    assert labels.read_text() == expect(FILMS, written, folder.as_posix() + "/")
    shutil.copytree(folder, tmp_path / "data" / "cbis_ddsm", dirs_exist_ok=True)
    assert call().returncode == 0, "the folder of the script is the default"
    assert labels.read_text() == expect(FILMS, written, "")
    failed = call(tmp_path / "nowhere")
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    (labels.parent / "labels.csv.part").mkdir()
    failed = call(folder)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("labels.csv could not be made: ")
    look_up = f"import runpy, sys; runpy.run_path({str(script)!r}); sys.exit('tensorflow' in sys.modules)"
    assert call(code=("-c", look_up)).returncode == 0
