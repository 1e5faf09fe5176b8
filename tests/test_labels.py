"""labels.csv: what is read, refused in one sentence, or logged."""
import re
import unicodedata

import pytest
from conftest import write_labels

from data import CLASSES, UserError, films


@pytest.fixture
def table_of(make):
    """The table of a labels.csv with this content beside a.png, b.png, deep/c.png and mdb003.png."""

    def read(content):
        folder = make("a.png", "b.png", "deep/c.png", "mdb003.png", "../aside.png", "#d.png", "ä.png")
        content = content.replace("{0}", str(folder)) if isinstance(content, str) else content
        (folder / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return films.find_films(folder)

    return read


@pytest.mark.parametrize("content", [
    "path,label\na.png,Benign \nb.png,MALIGNANT\n", "\ufeffpath,label\na.png,benign\nb.png,malignant\n",
    "path;label\na.png;benign\nb.png;malignant\n", "path\tlabel\na.png\tbenign\nb.png\tmalignant\n",
    "path,label\r\na.png,benign\r\nb.png,malignant\r\n", "Label, Path \nbenign,a.png\nmalignant,b.png\n",
    "path,label\n.\\a.png,benign\ndeep\\c.png,malignant\n", "path,label\n{0}/a.png,benign\n{0}/b.png,malignant\n",
    "path,label,view\na.png,benign,CC\n../aside.png,malignant,\n",
    "path,label,patient_id\na.png,benign\nb.png,malignant,7\n",
    "path,label,split\na.png,benign,\nb.png,malignant,\n",
    'path,label,note\n"a.png",benign,"one, two"\nb.png,malignant,"a ""word"""\n',
    "sep=;\r\npath;label\r\na.png;benign\r\nb.png;malignant\r\n",
    '"sep=,"\npath,label\na.png,benign\nb.png,malignant\n',
    "sep=\t\npath\tlabel\na.png\tbenign\nb.png\tmalignant\n",
    "path;label;;\na.png;benign;;;\nb.png;malignant\n",
    "\n\npath,label\n\na.png,benign\n,\n ,,\nb.png,malignant\n\n",
    "# from us; 2024\n# path, label, and more\npath,label\na.png,benign\n#,,,\n\"# b\",x\nb.png,malignant\n",
    "path,label\na.png,benign\n#d.png,malignant\n",
    'path;label;"size (w, h, d)"\na.png;benign;"1,2,3"\nb.png;malignant;\n',
    "path|label\na.png|benign\nb.png|malignant\n", "\ufeff\ufeffpath,label\na.png,benign\nb.png,malignant\n",
    "sep=,\npath;label\na.png;benign\nb.png;malignant\n",
    "# from us\nSEP=;\npath;label\na.png;benign\nb.png;malignant\n",
    "path,label,note,note\na.png,benign,1,2\nb.png,malignant,1,2\n",
])
def test_tables_that_are_accepted(table_of, caplog, content):
    table = table_of(content).sort_values("label")
    assert "''" not in caplog.text, "an empty column is no column"
    assert table["label"].tolist() == ["benign", "malignant"]
    assert table["path"].iloc[0].endswith("a.png")
    assert set(table["lesion_box"]) == set(table["split"]) == {""}


@pytest.mark.parametrize(("encoding", "start", "said"), [
    ("utf-8", b"", ""), ("utf-16", b"", "UTF-16"), ("utf-16-be", b"\xfe\xff", "UTF-16"),
    ("utf-16-le", b"", "UTF-16"), ("utf-16-be", b"", "UTF-16"), ("cp1252", b"", "Windows-1252"),
])
def test_encodings_of_spreadsheets(table_of, caplog, encoding, start, said):
    rows = "path\tlabel\tpatient_id\nä.png\tbenign\tMüller\nb.png\tmalignant\t2\n"
    table = table_of(start + rows.encode(encoding))
    assert table["path"].tolist() == ["b.png", "ä.png"]
    assert table["patient_id"].tolist() == ["2", "Müller"]
    assert re.findall("was read as (.*)", caplog.text) == [said] * bool(said)


def test_numbers_stay_text(table_of):
    table = table_of("path,label,patient_id,lesion_box\na.png,benign,0010,1:2:3:4|5:6:7:8\nb.png,malignant,1e5,\n")
    assert table["patient_id"].tolist() == ["0010", "1e5"]
    assert table["lesion_box"].tolist() == ["1:2:3:4|5:6:7:8", ""]


@pytest.mark.parametrize("name", ["patient id", "patientid", "pid", "case_id", "mrn", "patienten-nr", "pat. name"])
def test_other_columns_are_named_and_what_to_call_those_that_look_familiar(table_of, caplog, name):
    table = table_of(f"path,label,{name},Laterality,,age\na.png,benign,7,L,,50\nb.png,malignant,8,R,,60\n")
    assert table["patient_from"].eq("unknown").all()
    assert f"columns of labels.csv that are not used: {name!r}, 'laterality', '', 'age'\n" in caplog.text
    assert f"rename {name!r} to patient_id; rename 'laterality' to side\n" in caplog.text


@pytest.mark.parametrize(("words", "expected", "excluded"), [
    ("train Val TRAIN val", "train validation train validation", ""),
    ("train valid train validation", "train validation train",
     "1 rows .* excluded, as the validation set is split 'valid': 'mdb003.png'"),
    ("train Test train test", "train test train test", ""),
    ("train val test train", "train validation test train", ""),
])
def test_split_takes_the_words_that_folders_take(table_of, caplog, words, expected, excluded):
    films_of = zip(["a.png", "b.png", "deep/c.png", "mdb003.png"], CLASSES * 2, words.split(), strict=True)
    table = table_of("path,label,split\n" + "\n".join(map(",".join, films_of)))
    assert table["split"].tolist() == expected.split()
    assert re.search(excluded, caplog.text)
    assert bool(excluded) == ("excluded" in caplog.text)


def test_what_of_a_table_or_a_folder_is_not_used_is_logged(table_of, caplog):
    table_of("path,label\n#e.png,benign\na.png,benign\n# no film\nb.png,malignant\n")
    assert "2 lines of labels.csv start with # and are ignored: '#e.png,benign', '# no film'" in caplog.text
    assert ("4 images have no row in labels.csv and are not used: '#d.png', 'deep/c.png', 'mdb003.png'"
            in caplog.text)


def test_accents_that_unicode_writes_in_two_ways_are_one_name(make):
    names = [unicodedata.normalize(form, letter + ".png") for form, letter in (("NFC", "é"), ("NFD", "ü"))]
    folder = make(*names)
    write_labels(folder, [unicodedata.normalize("NFD", names[0]), unicodedata.normalize("NFC", names[1])])
    assert {*films.find_films(folder)["path"]} == {*names}


def test_repeated_rows_are_logged(table_of, caplog):
    assert len(table_of("path,label\na.png,benign\nb.png,malignant\na.png,benign\n")) == 2
    assert "1 rows of labels.csv are excluded, as they are repeated: 'a.png'" in caplog.text


def name_labels(*labels):
    return "path,label\n" + "\n".join(map(",".join, zip(["a.png", "b.png", "deep/c.png"], labels, strict=False)))


@pytest.mark.parametrize(("content", "words"), [
    ("", "is empty: it needs a first row with path and label"),
    ("\n;;\n# no more\n", "is empty"),
    ("path,label\na.png,benign,too,many\nb.png,malignant\n", "line 2 has 4 cells, but the first row has 2: "),
    ("\n#\npath,label\na.png,benign\nb,1.png,malignant\n", "line 5 has 3 cells, .* holds ',' into quotation"),
    ('path,label\nb.png,malignant\n"a.png,benign\nb.png,malignant\n', "line 3: remove the quotation mark"),
    ('path,label\n"a"x.png,benign\n', "line 2: remove the quotation mark"),
    (bytes(range(256)), "is no text in UTF-8, UTF-16 or Windows-1252: save it as labels.csv"),
    (b"PK\x03\x04 a workbook", "is a workbook: save it as labels.csv"),
    ("path,Label,label\na.png,benign,benign\n", "each once; it has 'path', 'label', 'label'"),
    ("file,class\na.png,benign\n", "needs .*; it has 'file', 'class': rename 'class' to label; rename 'file'"),
    ("image,Pathology\na.png,benign\n", "rename 'pathology' to label; rename 'image' to path"),
    ("path,BI-RADS\na.png,2\n", "rename 'bi-rads' to label"),
    ("x,y\na.png,benign\n", "it has 'x', 'y': name them in the first row"),
    (name_labels("0", "normal", "0"), "3 rows .* benign or malignant: '0', 'normal'. Normal is not benign.* Write"
                                      " benign for 0 and malignant for 1"),
    (name_labels("", "malignant"), "1 rows have a label other than benign or malignant: ''"),
    (name_labels("0.0", "1.0"), "Write benign for 0 and malignant for 1"),
    (name_labels("FALSE", "TRUE"), "Write benign for 0 and malignant for 1"),
    (name_labels("B", "M"), "'b', 'm'. Write benign or malignant"),
    (name_labels("BENIGN_WITHOUT_CALLBACK", "MALIGNANT"), "'benign_without_callback'. Write benign or malig"),
    (name_labels("BI-RADS 2", "BIRADS-5"), "'bi-rads 2', 'birads-5'. BI-RADS categories are no labels"),
    (name_labels("2", "4a"), "BI-RADS categories are no labels: write benign"),
    (name_labels('"2,0"', "ACR 4"), "BI-RADS categories are no labels: write benign"),
    (name_labels("+", "n"), "Write benign for 0 and malignant for 1"),
    (name_labels("gutartig", "non-malignant"), "'gutartig', 'non-malignant'. Write benign or malignant"),
    ("Mammograms of 2024\npath,label\na.png,benign\n", "it has 'mammograms of 2024': name them in the first row"),
    ("path,label,patient_id\na.png,benign,1234567890123450\nb.png,malignant,1234567890123460\n"
     "deep/c.png,benign,1234567890123470\n", "3 rows have a patient_id that a spreadsheet has rounded"),
    ("path,label,split\na.png,benign,train\nb.png,malignant,soon\n", "split other than train, val, .*: 'soon'"),
    ("path,label,split\na.png,benign,train\nb.png,malignant,\n", "split other than train, val, .*: ''"),
    ("path,label\na.png,benign\nz.png,malignant\n",
     "labels.csv, line 3: 1 paths name no file: 'z.png'. Write paths of files, relative to the folder"),
    ("path,label\na.png,benign\n\n# a note\n,malignant\n", "labels.csv, line 5: 1 paths name no file: '.'"),
    ("path,label\n\x00,benign\nb.png,malignant\n", r"1 paths name no file: '\\x00'"),
    ("path,label\n" + "x" * 5000 + ",benign\nb.png,malignant\n", "1 paths name no file"),
    ("path,label\na.png,benign\n./a.png,malignant\n", "1 paths have rows that contradict each other: 'a.png'"),
    ("path,label\na.png,benign\n../data/a.png,malignant\n", "contradict each other: '../data/a.png'"),
    *[(f"path,label,lesion_box\na.png,benign,\nb.png,malignant,{box}\n", rf"lesion_box other than .*: '{box[:5]}")
      for box in ("1:2:3", "1:2:3:0", "1:1:1234567:5", "1:2:3:4|")],
    *[(f'path,label,patient_id\na.png,benign,7\nb.png,malignant,"{rounded}"\n',
       f"1 rows have a patient_id that a spreadsheet has rounded .*: '{re.escape(rounded)}'")
      for rounded in ("1.23457E+15", "1,23457E+15", "1E+15", "1.23456789012346E15")],
    ("path,label,side\na.png,benign,left\nb.png,malignant,both\n", "a side other than left or right: 'both'"),
    ("path,label\na.png,benign\nb.png,benign\n", "labels.csv has no malignant image"),
    ("path,label\n", "labels.csv has no benign and no malignant image"),
])
def test_tables_that_are_refused(table_of, content, words):
    with pytest.raises(UserError, match=words) as caught:
        table_of(content)
    assert not re.search("\n|Error|[Tt]okeniz|[Pp]andas|codec", str(caught.value))
