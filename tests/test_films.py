"""Layouts, labels.csv and patients: what is read, what is refused in one sentence, what is logged."""
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, write_dicom

import data
from data import UserError, films

CLASSES = ("benign", "malignant")


@pytest.fixture
def make(tmp_path, caplog):
    """Make empty files in tmp_path / "data"; returns that folder. Films are found by name, not opened."""
    caplog.set_level("INFO")

    def write(*names):
        for name in names:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return tmp_path / "data"

    return write


@pytest.fixture
def table_of(make):
    """The table of a labels.csv with this content beside a.png, b.png, deep/c.png and mdb003.png."""

    def read(content):
        folder = make("a.png", "b.png", "deep/c.png", "mdb003.png", "../aside.png")
        content = content.replace("{0}", str(folder)) if isinstance(content, str) else content
        (folder / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return films.find_films(folder)

    return read


def test_other_columns_of_labels_csv_are_named(table_of, caplog):
    caplog.set_level("INFO")
    table = table_of("path,label,patient id\na.png,benign,7\nb.png,malignant,8\n")
    assert table["patient_from"].eq("unknown").all()
    assert "columns of labels.csv that are not used: 'patient id'\n" in caplog.text


# ---- class folders -----------------------------------------------------------------------------


def test_class_folders_in_any_case_with_images_anywhere_below(make, caplog):
    folder = make("Benign Masses/a.png", "BENIGN_2/deep/er/b.JPG", "malignant/c.TIFF", "malignant/d.dcm.pgm",
                  "benign/notes.txt", "benign/.hidden.png", "normal/e.png", "cancer/f.png", "g.png", ".git/h.png")
    (folder / "malignant" / "scan").write_bytes(bytes(128) + b"DICM")
    table = films.find_films(folder)
    assert table.columns.tolist() == ["path", "label", "split", "patient_id", "lesion_box", "patient_from"]
    assert table["path"].tolist() == ["BENIGN_2/deep/er/b.JPG", "Benign Masses/a.png", "malignant/c.TIFF",
                                      "malignant/d.dcm.pgm", "malignant/scan"]
    assert table["label"].tolist() == ["benign"] * 2 + ["malignant"] * 3
    assert set(table["split"]) == set(table["lesion_box"]) == {""}
    assert table.index.tolist() == list(range(5))
    assert ": 'cancer', 'g.png', 'normal', 'benign/notes.txt'\n" in caplog.text


@pytest.mark.parametrize("word", ["val", "valid", "Validation", "TEST"])
def test_given_split_of_folders(make, caplog, word):
    names = [f"{side}/{label}/x.png" for side in ("Train", word) for label in CLASSES]
    table = films.find_films(make(*names, "Train/gutartig/x.png", "normal/benign/y.png"))
    assert table["path"].tolist() == sorted(names)
    assert table["split"].eq("train").tolist() == [path.startswith("Train") for path in table["path"]]
    assert set(table["split"]) == {"train", "validation"}
    assert "'Train/gutartig'" in caplog.text and "'normal'" in caplog.text


def test_a_test_side_is_kept_where_there_is_a_validation_side_too(make, tmp_path):
    sides = {"train": "train", "valid": "validation", "Test": "test"}
    names = [f"{side}/{label}/x.png" for side in sides for label in CLASSES]
    table = films.find_films(make(*names))
    assert table["split"].tolist() == [sides[path.split("/")[0]] for path in table["path"]]
    table.assign(split=table["path"].str.split("/").str[0]).to_csv(tmp_path / "data" / "labels.csv", index=False)
    assert films.find_films(tmp_path / "data")["split"].tolist() == table["split"].tolist()


def test_a_linked_class_folder_is_read_and_a_link_below_it_is_logged(make, tmp_path, caplog):
    folder = make("../store/a.png", "malignant/b.png")
    (folder / "benign").symlink_to(tmp_path / "store")
    (folder / "malignant" / "loop").symlink_to(folder)
    assert films.find_films(folder)["path"].tolist() == ["benign/a.png", "malignant/b.png"]
    assert ": 'malignant/loop'\n" in caplog.text


@pytest.mark.parametrize(("names", "words"), [
    ([], "data cannot be used"),
    (["x.txt"], r"no benign and no malignant image \(ignored: 'x.txt'\)"),
    (["benign/a.png", "cancer/b.png", "normal/c.png"], r"no malignant image \(ignored: 'cancer', 'normal'\)"),
    (["val/benign/a.png", "val/malignant/a.png"], r"no benign .* \(ignored: 'val'\)"),
    ([f"{number:02d}/a.png" for number in range(30)], r": '00', '01', .* '19' and 10 more\)"),
    ([b"benign/\xff.png"], "data cannot be used .*utf-8"),
])
def test_a_missing_class_shows_what_was_ignored_and_the_layouts(make, tmp_path, names, words):
    make(*map(os.fsdecode, names))
    with pytest.raises(UserError, match=words + r".* needs benign/ and malignant/, or train/ .*, or labels\.csv"):
        films.find_films(tmp_path / "data")


@pytest.mark.skipif(os.name == "nt", reason="rights work otherwise there")
def test_what_may_not_be_read_is_named(make):
    folder = make("benign/deep/a.png", "malignant/b.png")
    for parent in [folder, *folder.parents][:-2]:
        parent.chmod(0o755)
    (folder / "benign" / "deep").chmod(0)
    try:
        os.getuid() or os.seteuid(65534)  # root may read everything
        with pytest.raises(UserError, match=r"Permission denied: .*benign/deep"):
            films.find_films(folder)
    finally:
        os.getuid() or os.seteuid(0)


# ---- labels.csv --------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [
    "path,label\na.png,Benign \nb.png,MALIGNANT\n", "\ufeffpath,label\na.png,benign\nb.png,malignant\n",
    "path;label\na.png;benign\nb.png;malignant\n", "path\tlabel\na.png\tbenign\nb.png\tmalignant\n",
    "path,label\r\na.png,benign\r\nb.png,malignant\r\n", "Label, Path \nbenign,a.png\nmalignant,b.png\n",
    "path,label\n.\\a.png,benign\ndeep\\c.png,malignant\n", "path,label\n{0}/a.png,benign\n{0}/b.png,malignant\n",
    "path,label,view\na.png,benign,CC\n../aside.png,malignant,\n",
    "path,label,patient_id\na.png,benign\nb.png,malignant,7\n",
    "path,label,split\na.png,benign,\nb.png,malignant,\n",
])
def test_tables_that_are_accepted(table_of, content):
    table = table_of(content).sort_values("label")
    assert table["label"].tolist() == ["benign", "malignant"]
    assert table["path"].iloc[0].endswith("a.png")
    assert set(table["lesion_box"]) == set(table["split"]) == {""}


def test_numbers_stay_text(table_of):
    table = table_of("path,label,patient_id,lesion_box\na.png,benign,0010,1:2:3:4|5:6:7:8\nb.png,malignant,1e5,\n")
    assert table["patient_id"].tolist() == ["0010", "1e5"]
    assert table["lesion_box"].tolist() == ["1:2:3:4|5:6:7:8", ""]


@pytest.mark.parametrize(("words", "expected", "left"), [
    ("train Val TRAIN val", "train validation train validation", ""),
    ("train valid train validation", "train validation train", "1 rows of labels.csv .*'validation'"),
    ("train test train test", "train validation train validation", ""),
    ("train val test train", "train validation test train", ""),
])
def test_split_takes_the_words_that_folders_take(table_of, caplog, words, expected, left):
    films_of = zip(["a.png", "b.png", "deep/c.png", "mdb003.png"], CLASSES * 2, words.split(), strict=True)
    table = table_of("path,label,split\n" + "\n".join(map(",".join, films_of)))
    assert table["split"].tolist() == expected.split()
    assert re.search(left, caplog.text)
    assert bool(left) == ("left out" in caplog.text)


def test_repeated_rows_are_logged(table_of, caplog):
    assert len(table_of("path,label\na.png,benign\nb.png,malignant\na.png,benign\n")) == 2
    assert "1 rows of labels.csv are left out: repeated" in caplog.text


@pytest.mark.parametrize(("content", "words"), [
    ("", "is no table"),
    ("path,label\na.png,benign,too,many\nb.png,malignant\n", "is no table .*: save it as CSV in UTF-8"),
    ('path,label\n"a.png,benign\n', "is no table"),
    ("path,label\nöde.png,benign\nb.png,malignant\n".encode("latin-1"), "is no table .*: save it as CSV in UTF-8"),
    ("path,Label,label\na.png,benign,benign\n", "each once; it has 'path', 'label', 'label'"),
    ("file,class\na.png,benign\n", "needs columns path and label.*; it has 'file', 'class'"),
    ("path,label\na.png,0\nb.png,normal\ndeep/c.png,0\n", "3 rows .* benign or malignant: '0', 'normal'"),
    ("path,label\na.png,\nb.png,malignant\n", "1 rows have a label other than benign or malignant: ''"),
    ("path,label,split\na.png,benign,train\nb.png,malignant,soon\n", "split other than train, val, .*: 'soon'"),
    ("path,label,split\na.png,benign,train\nb.png,malignant,\n", "split other than train, val, .*: ''"),
    ("path,label\na.png,benign\nz.png,malignant\n", "1 paths name no file: 'z.png'"),
    ("path,label\n\x00,benign\nb.png,malignant\n", r"1 paths name no file: '\\x00'"),
    ("path,label\n" + "x" * 5000 + ",benign\nb.png,malignant\n", "1 paths name no file"),
    ("path,label\na.png,benign\n./a.png,malignant\n", "1 paths have rows that contradict each other: 'a.png'"),
    ("path,label\na.png,benign\n../data/a.png,malignant\n", "contradict each other: '../data/a.png'"),
    *[(f"path,label,lesion_box\na.png,benign,\nb.png,malignant,{box}\n", rf"lesion_box other than .*: '{box[:5]}")
      for box in ("1:2:3", "1:2:3:0", "1:1:1234567:5", "1:2:3:4|")],
    ("path,label\na.png,benign\nb.png,benign\n", "no malignant image"),
    ("path,label\n", "no benign and no malignant image"),
])
def test_tables_that_are_refused(table_of, content, words):
    with pytest.raises(UserError, match=words) as caught:
        table_of(content)
    assert "\n" not in str(caught.value)


# ---- patients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "patient", "source"), [
    ("benign/Mass-Training_P_00001_LEFT_CC.png", "P_00001", "file name (CBIS-DDSM)"),
    ("malignant/Calc-Test_P_00038_LEFT_MLO_1/1.3.6/000001.png", "P_00038", "file name (CBIS-DDSM)"),
    ("benign/A_1109_1.LEFT_MLO.png", "A_1109", "file name (DDSM)"),
    ("benign/20586908_6c613a14b80a8591_MG_R_CC_ANON.png", "6c613a14b80a8591", "file name (INbreast)"),
    ("benign/mdb001.pgm", "mias_001", "file name (mini-MIAS)"),
    ("benign/MDB002 (3).png", "mias_001", "file name (mini-MIAS)"),
    ("benign/mdb0011.png", "benign/mdb0011.png", "unknown"),
    ("benign/xmdb001.png", "benign/xmdb001.png", "unknown"),
])
def test_patients_read_from_file_names(make, caplog, path, patient, source):
    table = films.find_films(make(path, *(f"{label}/B_3001_1.LEFT_CC.png" for label in CLASSES))).set_index("path")
    assert table.loc[path, ["patient_id", "patient_from"]].tolist() == [patient, source]
    assert table["patient_id"].nunique() == 2
    assert (source == "unknown") == ("counts as a patient of its own" in caplog.text)
    assert caplog.text.count("3 films of 2 patients") == 1


def test_a_patient_id_of_dicom_is_never_written_as_it_is(make, caplog):
    """Unless it is that of a public collection, or the table has it already; names go before tags."""
    tags = {"a.dcm": "HOSPITAL-7", "b": "HOSPITAL-7", "c.dcm": " HOSPITAL-8", "d.dcm": "",
            "e.dcm": "Mass_P_00820_LEFT", "f.dcm": "0042", "g_P_00001.dcm": "HOSPITAL-7", "h.dcm": "",
            "i_P_00002.png": None, "mdb004.png": None, "x.png": None}
    folder = make(*tags)
    for name in list(tags)[:8]:
        write_dicom(folder / name, np.zeros((8, 8), np.uint8), PatientName="Doe^Jane", PatientID=tags[name])
    (folder / "h.dcm").write_bytes(b"no DICOM")
    rows = [f"{name},{CLASSES[number % 2]},{'0042' * (name[0] == 'i')}" for number, name in enumerate(tags)]
    (folder / "labels.csv").write_text("path,label,patient_id\n" + "\n".join(rows))
    table = films.find_films(folder)
    assert table["patient_id"].tolist() == ["dicom_00001", "dicom_00001", "dicom_00002", "d.dcm", "P_00820",
                                            "0042", "P_00001", "h.dcm", "0042", "mias_002", "x.png"]
    assert table["patient_from"].tolist() == [*["PatientID"] * 3, "unknown", *["PatientID"] * 2,
                                              "file name (CBIS-DDSM)", "unknown", "labels.csv",
                                              "file name (mini-MIAS)", "unknown"]
    assert not re.search("HOSPITAL|Doe", caplog.text + table.to_csv())


def test_without_pydicom(make, monkeypatch):
    folder = make("benign/a.dcm", "malignant/b.png")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"^DICOM files need one more package: pip install pydicom$"):
        films.find_films(folder)


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
    for parent in [folder, *folder.parents][:-2]:
        parent.chmod(0o755)
    (folder / "closed").chmod(rights)
    try:
        os.getuid() or os.seteuid(65534)  # root may read everything
        assert films.list_images(folder) == [folder / "a.png", folder / "closed"]
        assert f"cannot be listed, so that their images are missing: '{folder / 'closed'}'" in caplog.text
        with pytest.raises(UserError, match="closed has no image that can be found"):
            films.list_images(folder / "closed")
    finally:
        os.getuid() or os.seteuid(0)
        (folder / "closed").chmod(0o755)


@pytest.mark.parametrize("value", ["x" * 10**6, ["x" * 10**5] * 20, {"x" * 10**6: "y" * 10**6}, b"x" * 10**6])
def test_no_value_makes_a_long_sentence(value):
    assert len(films.list_some([value] * 100)) < 100_000
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
