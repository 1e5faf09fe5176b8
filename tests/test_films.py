"""Folders, masks and phantoms: which images are found, and what is said of the others."""
import os
import re
import subprocess
import sys

import numpy as np
import pydicom
import pytest
from conftest import REPOSITORY, as_nobody, write_dicom

import data
from data import CLASSES, UserError, films


# ---- class folders -----------------------------------------------------------------------------


def test_class_folders_in_any_case_with_images_anywhere_below(make, caplog):
    folder = make("Benign Masses/a.png", "BENIGN_2/deep/er/b.JPG", "malignant/c.TIFF", "malignant/d.dcm.pgm",
                  "benign/notes.txt", "benign/.hidden.png", "normal/e.png", "cancer/f.png", "g.png", ".git/h.png")
    (folder / "malignant" / "scan").write_bytes(bytes(128) + b"DICM")
    table = films.find_films(folder)
    assert table.columns.tolist() == [
        "path", "label", "split", "patient_id", "lesion_box", "side", "view", "patient_from"]
    assert table["path"].tolist() == ["BENIGN_2/deep/er/b.JPG", "Benign Masses/a.png", "malignant/c.TIFF",
                                      "malignant/d.dcm.pgm", "malignant/scan"]
    assert table["label"].tolist() == ["benign"] * 2 + ["malignant"] * 3
    assert table[["split", "lesion_box", "side", "view"]].eq("").all(axis=None)
    assert table.index.tolist() == list(range(5))
    assert ": 'cancer', 'g.png', 'normal', 'benign/notes.txt'\n" in caplog.text
    assert caplog.text.count("normal is not benign") == 1


@pytest.mark.parametrize("sides", [
    {"Train": "train", "val": "validation"}, {"Train": "train", "valid": "validation"},
    {"train": "train", "Validation": "validation"}, {"train": "train", "TEST": "test"},
    {"train": "train", "valid": "validation", "Test": "test"},
])
def test_given_split_of_folders(make, caplog, sides):
    names = [f"{side}/{label}/x.png" for side in sides for label in CLASSES]
    other = f"{next(iter(sides))}/gutartig"
    table = films.find_films(make(*names, f"{other}/x.png", "normal/benign/y.png"))
    assert table["path"].tolist() == sorted(names)
    assert table["split"].tolist() == [sides[path.split("/")[0]] for path in sorted(names)]
    assert repr(other) in caplog.text and "'normal'" in caplog.text


def test_a_linked_class_folder_is_read_and_a_link_below_it_is_logged(make, tmp_path, caplog):
    folder = make("../store/a.png", "malignant/b.png")
    (folder / "benign").symlink_to(tmp_path / "store")
    (folder / "malignant" / "loop").symlink_to(folder)
    assert films.find_films(folder)["path"].tolist() == ["benign/a.png", "malignant/b.png"]
    assert ": 'malignant/loop'\n" in caplog.text


LAYOUTS = r".* needs labels\.csv, or benign/ and malignant/, alone or in train/"


@pytest.mark.parametrize(("names", "words"), [
    ([], r"data cannot be used \(No such file or directory: /.*data\)" + LAYOUTS),
    (["x.txt"], r"no benign and no malignant image \(ignored: 'x.txt'\)" + LAYOUTS),
    (["benign/a.png", "cancer/b.png", "normal/c.png"],
     r"no malignant image \(ignored: 'cancer', 'normal'\).* Normal is not benign" + LAYOUTS),
    (["val/benign/a.png", "val/malignant/a.png"], r"no benign .* \(ignored: 'val'\)" + LAYOUTS),
    ([f"{number:02d}/a.png" for number in range(30)], r": '00', '01', .* '19' and 10 more\)" + LAYOUTS),
    (["0/a.png", "1/b.png"], "Write benign for 0 and malignant for 1" + LAYOUTS),
    (["BIRADS 2/a.png", "BI-RADS 5/b.png"], "BI-RADS categories are no labels: write benign" + LAYOUTS),
    (["benign/a.png", b"malignant/\xff.png", "malignant/b.png"], r"1 files .* not in UTF-8: .* malignant/\\xff"),
    (["prepare.py", "films/a.png"], r"Run prepare\.py first: python /.*/data/prepare\.py \("),
    *[([name, "a.png"], rf"'{re.escape(name)}' is not read: save it as labels\.csv \(in Excel: \"CSV UTF-8\"\)")
      for name in ("labels.xlsx", "Labels.XLS", "labels.csv.txt", "LABELS.CSV")],
])
def test_a_missing_class_shows_what_was_ignored_and_what_to_do(make, tmp_path, names, words):
    make(*map(os.fsdecode, names))
    with pytest.raises(UserError, match=words):
        films.find_films(tmp_path / "data")


@pytest.mark.parametrize("table", [False, True])
def test_dicom_objects_without_an_image_are_ignored_and_other_images_are_named(make, caplog, table):
    folder = make("benign/a.png", "malignant/b.png")
    uid = pydicom.uid
    for name, kind in (("benign/report.dcm", uid.MammographyCADSRStorage),
                       ("malignant/DICOMDIR", uid.MediaStorageDirectoryStorage),
                       ("malignant/magnetic.dcm", uid.MRImageStorage),
                       ("malignant/sound", uid.UltrasoundImageStorage),
                       ("benign/digitised.dcm", uid.SecondaryCaptureImageStorage),
                       ("benign/plate.dcm", uid.ComputedRadiographyImageStorage),
                       ("malignant/state", uid.GrayscaleSoftcopyPresentationStateStorage),
                       ("benign/film.dcm", uid.DigitalMammographyXRayImageStorageForPresentation)):
        write_dicom(folder / name, np.arange(4).reshape(2, 2), SOPClassUID=kind)
    if table:
        rows = [f"{path.relative_to(folder).as_posix()},{path.parent.name}" for path in folder.glob("*/*")]
        (folder / "labels.csv").write_text("\n".join(["path,label", *rows]))
    assert films.find_films(folder)["path"].tolist() == [
        "benign/a.png", "benign/digitised.dcm", "benign/film.dcm", "benign/plate.dcm", "malignant/b.png",
        "malignant/magnetic.dcm", "malignant/sound"]
    assert "3 DICOM objects without an image are ignored (Grayscale Softcopy" in caplog.text
    assert "'benign/report.dcm', 'malignant/DICOMDIR', 'malignant/state'\n" in caplog.text
    assert ("2 DICOM files declare another kind of image (MR Image Storage, Ultrasound Image Storage): remove"
            " those that are no mammograms: 'malignant/magnetic.dcm', 'malignant/sound'\n") in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="rights work otherwise there")
def test_what_may_not_be_read_is_named(make):
    folder = make("benign/deep/a.png", "malignant/b.png")
    (folder / "benign" / "deep").chmod(0)
    with as_nobody(folder), pytest.raises(UserError, match=r"Permission denied: .*benign/deep"):
        films.find_films(folder)


# ---- masks and drawings ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "1_mask.png", "1_mask_1.png", "1_mask2.png", "1_Mask.PNG", "1-MASK.tif", "1.mask.png", "1 roi.jpg",
    "1_ROI_3.png", "1_seg.png", "1_segmentation.png", "1_overlay.bmp", "1_annotation.png", "mask_1.png",
    "1_ground_truth.png", "masks/1.png", "Tumor Masks/1.jpg", "1_segmentations/1_seg.png",
    "../benign_masks/1.png", "../masks/1.png", "1_lesion_mask.png", "1_Mask_mass1.png", "1_leftMask.png",
    "1_ROIs.png", "1.png_mask.png", "1_groundtruth.png", "1_bbox.png", "1_labelled.png", "masks/1_2.png",
])
@pytest.mark.parametrize("layout", ["folders", "labels.csv"])
def test_masks_beside_an_image_of_the_same_name_are_ignored_and_listed(make, caplog, layout, name):
    name = os.path.normpath(f"benign/{name}")
    folder = make("benign/1.dcm.png", "benign/1.jpg", "malignant/2.png", name)
    if layout == "labels.csv":
        (folder / "labels.csv").write_text("\n".join(
            ["path,label", "benign/1.dcm.png,benign", "benign/1.jpg,benign", "malignant/2.png,malignant",
             f"{name},benign"]))
    assert films.find_films(folder)["path"].tolist() == ["benign/1.dcm.png", "benign/1.jpg", "malignant/2.png"]
    listed = "1 masks or drawings beside an image of the same name are ignored: "
    assert (f"{listed}{name!r}" in caplog.text) == (layout == "labels.csv" or name.startswith("benign"))


def test_masks_without_their_image_and_names_that_look_similar_are_films(make, caplog):
    names = ["benign/1.png", "benign/2_roi.png", "benign/roi.png", "benign/1_maskara.png", "benign/11_mask.png",
             "benign/Mass 1.png", "benign/rois/7.png", "malignant/1_x_mask.png", "malignant/segment 1.png"]
    assert films.find_films(make(*names))["path"].tolist() == sorted(names)
    assert "ignored" not in caplog.text


def test_masks_are_no_films_to_predict_either(make, caplog):
    folder = make("a.png", "a_mask.png", "deep/b.png", "deep/masks/b.png")
    assert films.list_images(folder) == [folder / "a.png", folder / "deep/b.png"]
    assert "'a_mask.png', 'deep/masks/b.png'" in caplog.text
    assert films.list_images([folder / "a_mask.png"]) == [folder / "a_mask.png"], "what is named, counts"


# ---- phantoms ----------------------------------------------------------------------------------


def test_phantoms_are_made_where_there_are_none(make, tmp_path, monkeypatch, caplog):
    folder = make("prepare.py").resolve()
    (folder / "prepare.py").write_text("""
def make_phantoms(folder):
    (folder / "images").mkdir(exist_ok=True)
    for name in "ab":
        (folder / f"images/synthetic_{name}.png").touch()
    (folder / "labels.csv").write_text("path,label\\n" + "".join(
        f"images/synthetic_{name}.png,{label}\\n" for name, label in zip("ab", ("benign", "malignant"))))
""")
    monkeypatch.setattr(films, "PHANTOMS", folder)
    table = films.find_films(folder)
    assert films.is_synthetic(table)
    assert not films.is_synthetic(table.replace("images/synthetic_b.png", "images/b.png"))
    assert films.find_films(folder).equals(table)
    assert caplog.text.count("making synthetic mammograms") == 1, "they are made once"
    for image in (folder / "images").iterdir():
        image.unlink()
    assert films.find_films(folder).equals(table), "and where the images were deleted"
    (folder / "images").rename(tmp_path / "away")
    (folder / "images").write_text("in the way")
    with pytest.raises(UserError, match=r"data cannot be used \(.*images"):
        films.find_films(folder)


def test_nothing_below_data_imports_the_networks():
    code = ("import sys, data.results.comparison, data.results.files, data.splits\n"  # which import all others
            "sys.exit(bool({'tensorflow', 'keras', 'common'} & {*sys.modules}))")
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


# ---- files that are none, names and sentences of any length ---------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="there are no such files")
@pytest.mark.parametrize("name", ["pipe", "pipe.dcm", "pipe.DICOM"])
def test_a_pipe_is_never_opened(tmp_path, name):
    """This one would answer like a DICOM file. Others never answer."""
    os.mkfifo(tmp_path / name)
    pipe = os.open(tmp_path / name, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(pipe, bytes(128) + b"DICM" + bytes(300))
        assert not films.is_dicom(tmp_path / name)
    finally:
        os.close(pipe)


def test_what_is_listed_for_a_folder(make, tmp_path, monkeypatch):
    """A link that leads nowhere is listed, so that reading it gives the reason."""
    folder = make("b.png", "deep/a.PNG", "notes.txt", ".hidden.png")
    (folder / "link.png").symlink_to("nowhere.png")
    (folder / "broken").symlink_to("nowhere")
    expected = [str(folder / name) for name in ("b.png", "deep/a.PNG", "link.png")]
    assert list(map(str, films.list_images(folder))) == expected
    monkeypatch.chdir(tmp_path)
    assert list(map(str, films.list_images("data"))) == expected
    twice = ["data/b.png", folder, "data/b.png", "missing.png"]
    assert films.list_images(twice) == [folder / "b.png", folder, folder / "b.png", tmp_path / "missing.png"]
    assert films.list_images("x" * 5000) == [tmp_path / ("x" * 5000)]


@pytest.mark.skipif(os.name == "nt", reason="rights work otherwise there")
@pytest.mark.parametrize("rights", [0, 0o444])
def test_folders_that_cannot_be_listed_are_among_the_images_and_named(make, caplog, rights):
    folder = make("a.png", "closed/b.png")
    (folder / "closed").chmod(rights)
    with as_nobody(folder):
        assert films.list_images(folder) == [folder / "a.png", folder / "closed"]
        with pytest.raises(UserError, match="closed has no image that can be found"):
            films.list_images(folder / "closed")
    assert f"1 folders cannot be listed, so their images are missing: '{folder / 'closed'}'" in caplog.text
    (folder / "closed").chmod(0o755)


@pytest.mark.parametrize("value", ["x" * 10**6, ["x" * 10**5] * 20, {"x" * 10**6: "y" * 10**6}, b"x" * 10**6])
def test_no_value_makes_a_long_sentence(value):
    assert len(data.list_some([value] * 100)) < 100_000
    assert len(data.quote(value)) < 5000
    sentence = str(UserError(f"EPOCHS is {value}, but has to be a whole number."))
    assert len(sentence) < 30_000
    assert sentence.startswith("EPOCHS is ")
    assert sentence.endswith("but has to be a whole number.")


@pytest.mark.parametrize("name", ["a", "a" * 300, "乳" * 83, "x" + "乳" * 83, "é" * 200, "\udcff乳" * 60])
def test_a_name_is_cut_between_its_characters(name, tmp_path):
    cut = data.cut_name(name)
    whole = name.replace("\udcff", "")
    assert whole.startswith(cut)
    assert len(cut.encode()) <= 100
    assert cut == whole or len((cut + whole[len(cut)]).encode()) > 100, "no more than necessary"
    (tmp_path / f"false_negative_01_{cut}.png").touch()
