"""Layouts, tables and patients."""
import pytest
from conftest import find

import common


# ---- layouts -----------------------------------------------------------------------------------


def test_class_folders_in_any_case_with_images_anywhere_below(record, film, tmp_path):
    for name in ("Benign Masses/a.png", "BENIGN_2/deep/er/b.JPG", "malignant/c.TIFF", "other/d.png", "top.png"):
        film(tmp_path / name)
    table = find(record, tmp_path)
    assert table["path"].tolist() == ["BENIGN_2/deep/er/b.JPG", "Benign Masses/a.png", "malignant/c.TIFF"]
    assert table["label"].tolist() == ["benign", "benign", "malignant"]
    assert set(table["split"]) == {""}


@pytest.mark.parametrize("validation", ["val", "valid", "Validation", "TEST"])
def test_given_split_of_folders(record, film, tmp_path, validation):
    for side in ("Train", validation):
        for label in ("benign", "malignant"):
            film(tmp_path / side / label / f"{side}.png")
    table = find(record, tmp_path).set_index("path")["split"]
    assert table["Train/benign/Train.png"] == "train"
    assert table[f"{validation}/malignant/{validation}.png"] == "validation"


def test_what_is_no_image_is_said_and_system_files_are_not(record, film, tmp_path, capsys):
    film(tmp_path / "benign" / "a.png")
    film(tmp_path / "malignant" / "b.png")
    film(tmp_path / "benign" / ".hidden.png")
    for name in ("notes.txt", "scan.gif", "Thumbs.db", ".DS_Store"):
        (tmp_path / "benign" / name).write_bytes(b"x")
    assert len(find(record, tmp_path)) == 2
    assert "1 x .gif, 1 x .txt" in capsys.readouterr().out
    assert not any("Thumbs" in line or "DS_Store" in line for line in record["console"])


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_empty_data_dir_shows_the_layouts(record, tmp_path, make):
    folder = tmp_path / "nothing"
    make(folder)
    with pytest.raises(common.UserError, match=r"(?s)DATA_DIR.*benign.*train/.*labels\.csv"):
        find(record, folder)


# ---- labels.csv --------------------------------------------------------------------------------


@pytest.fixture
def table_of(record, film, tmp_path):
    """Write films a.png to d.png and a labels.csv with this text, and read it."""

    def read(text):
        for name in "abcd":
            film(tmp_path / f"{name}.png")
        (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
        return find(record, tmp_path)

    return read


def test_labels_as_people_write_them(table_of):
    table = table_of("\ufeffPath, Label ,patient_id,view\nb.png,MALIGNANT,007,CC\n a.png ,Benign ,8,MLO\n")
    assert table["path"].tolist() == ["a.png", "b.png"]
    assert table["label"].tolist() == ["benign", "malignant"]
    assert table["patient_id"].tolist() == ["8", "007"]
    assert table["lesion_box"].tolist() == ["", ""]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as comma-separated values"),
        ("file,class\na.png,benign\n", "no column path and no column label; it has file, class"),
        ("path,label\na.png,0\nb.png,normal\nc.png,benign\n", "but there is '0', 'normal'"),
        ("path,label,split\na.png,benign,train\nb.png,malignant,test\n", "split has to be .* 'test'"),
        ("path,label\na.png,benign\nz.png,malignant\n", r"1 paths name no file: \n  z.png"),
        ("path,label\na.png,benign\n,malignant\n", "1 paths name no file"),
        ("path,label\na.png,benign\n../b.png,malignant\n", "climb out of the folder"),
        ("path,label\na.png,benign\na.png,malignant\n", r"contradict each other: \n  a.png"),
        ("path,label\na.png,benign\n./a.png,malignant\n", r"contradict each other: \n  a.png"),
        ("path,label,lesion_box\na.png,benign,\nb.png,malignant,1:2:3\n", r"lesion_box other than .*\n  b.png"),
        ("path,label,lesion_box\na.png,benign,1:2:3:0\nb.png,malignant,\n", r"lesion_box other than .*\n  a.png"),
        ("path,label\na.png,benign\nb.png,benign\n", "no malignant image"),
    ],
)
def test_wrong_tables_are_refused_with_what_to_mend(table_of, text, words):
    with pytest.raises(common.UserError, match=words):
        table_of(text)


def test_a_linked_class_folder_is_read_and_a_link_below_it_is_said(record, film, tmp_path, capsys):
    film(tmp_path / "store" / "a.png")
    film(tmp_path / "data" / "malignant" / "b.png")
    (tmp_path / "data" / "benign").symlink_to(tmp_path / "store")
    (tmp_path / "data" / "malignant" / "loop").symlink_to(tmp_path / "data")
    assert find(record, tmp_path / "data")["path"].tolist() == ["benign/a.png", "malignant/b.png"]
    assert "1 x links to folders" in capsys.readouterr().out


def test_only_phantoms_are_synthetic(record, film, tmp_path):
    for name in ("benign/synthetic_2D.png", "malignant/real.png"):
        film(tmp_path / name)
    find(record, tmp_path)
    assert record["note"] == ""


def test_repeated_rows_are_said(table_of, record):
    assert len(table_of("path,label\na.png,benign\nb.png,malignant\na.png,benign\n")) == 2
    assert any("1 rows of labels.csv that repeat another" in line for line in record["console"])


# ---- patients ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "patient", "scheme"),
    [
        ("benign/Mass-Training_P_00001_LEFT_CC.png", "P_00001", "CBIS-DDSM"),
        ("malignant/Calc-Test_P_00038_LEFT_MLO_1/1.3.6/000001.png", "P_00038", "CBIS-DDSM"),
        ("benign/A_1109_1.LEFT_MLO.png", "A_1109", "DDSM"),
        ("benign/C_0029_1.RIGHT_CC.png", "C_0029", "DDSM"),
        ("benign/20586908_6c613a14b80a8591_MG_R_CC_ANON.png", "6c613a14b80a8591", "INbreast"),
        ("benign/IMG_1234.png", "benign/IMG_1234.png", "nowhere"),
        ("benign/MAP_000012.png", "benign/MAP_000012.png", "nowhere"),
    ],
)
def test_patients_read_from_file_names(record, film, tmp_path, path, patient, scheme):
    film(tmp_path / path)
    for label in common.CLASSES:
        film(tmp_path / label / "B_3001_1.LEFT_CC.png")
    table = find(record, tmp_path).set_index("path")
    assert table.loc[path, "patient_id"] == patient
    assert record["patients_from"].get(scheme, 0) >= 1
    assert (scheme == "nowhere") == any("patient of its own" in line for line in record["console"])


def test_empty_patient_cells_fall_back_to_the_name_then_to_the_image(record, film, tmp_path):
    names = ("A_1109_1.LEFT_CC.png", "x.png", "y.png")
    for name in names:
        film(tmp_path / name)
    rows = [f"{name},{label},{patient}" for name, label, patient in
            zip(names, ("benign", "benign", "malignant"), ("", "", "seven"), strict=True)]
    (tmp_path / "labels.csv").write_text("path,label,patient_id\n" + "\n".join(rows))
    assert find(record, tmp_path)["patient_id"].tolist() == ["A_1109", "x.png", "seven"]
