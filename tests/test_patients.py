"""Whose mammogram it is: ids, names, DICOM headers; sides and views."""
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import write_dicom, write_labels

from data import CLASSES, UserError, films, names, patients


@pytest.fixture
def patients_of(make):
    """A function that makes films with a labels.csv of {path: patient_id}, and returns those that are found."""

    def find(ids):
        folder = make(*ids)
        write_labels(folder, list(ids), list(ids.values()))
        return films.find_films(folder).set_index("path")["patient_id"].to_dict()

    return find


def group(patients):
    """The films of each patient, sorted."""
    names = {*patients.values()}
    return sorted(sorted(path for path in patients if patients[path] == name) for name in names)


# ---- patients: ids -----------------------------------------------------------------------------


@pytest.mark.parametrize("spellings", [
    ["10006", "10006.0", "10006.00", "010006", "10006,0"], ["0007", "7", " 7", "7.0", "7 "],
    ["P 12", "p12", "P12", "P012"], ["0007", "'0007", "7\u200b", "7\xa0"],
    ["A_0001", "a_1"], ["Müller", "MÜLLER"], ["12-007", "12-7"], ["\uff17", "7"], ["P-7", "P\u20137", "P\u20117"],
    ["P7", "\u200eP7", "P\xad7"], ['="0007"', "0007"], ["17", "\u0661\u0667"], ["7,00", "7"],
])
def test_spellings_of_one_id_are_one_patient(patients_of, caplog, spellings):
    found = patients_of({f"{row}.png": patient for row, patient in enumerate([*spellings, "other"])})
    assert set(found.values()) == {spellings[0].strip(), "other"}, "as it was written first"
    count = len({spelling.strip() for spelling in spellings})
    assert caplog.text.count(f"{count} ids in labels.csv count as 1, ") == 1


def test_ids_that_differ_otherwise_are_different_patients(patients_of):
    ids = ["1", "10", "100", "P1", "P10", "A_1", "A-1", "A1", "1.5", "1.05", "1.50", "1,5", "1,05", "ANON123",
           "Anonymous 1", "no1", "Anna", "1_0", "x", "xa", "1e5", "1,000",
           "1e6", "0", "test", "unknown 1", "unknown 2", "patient 1", "naN1", "#5", "2.16.840.1.0", "2.16.840.1"]
    assert len(group(patients_of({f"{row}.png": patient for row, patient in enumerate(ids)}))) == len(ids)


PLACEHOLDERS = ["", "nan", "NaN", "None", "NULL", "N/A", "n.a.", "#N/A", "<NA>", "#REF!", "unknown", "Unknown",
                "REMOVED", "anonymous", "Anonymized", "anonymised", "ANON", "de-identified", "Anonymous^Patient",
                "patient", "-", "--", "?", "xxx", "not available", "unbekannt", "Patient ID", "missing",
                "-1", "-999", "#NV", "#N/D", "Anónimo", "anonymous^female", "Unknown^Unknown", "removed by CTP",
                "not recorded", "no patient id", "desconhecido", "masked", "blank", "inconnue", "keine Angabe"]


def test_placeholders_mean_unknown_and_the_file_name_decides(patients_of, caplog):
    ids = {f"{row}.png": name for row, name in enumerate(PLACEHOLDERS)}
    found = patients_of(ids | {"mdb001.png": "unknown", "mdb002.png": "N/A", "x.png": "P1", "y.png": "P1"})
    known = {"mdb001.png": "mias_001", "mdb002.png": "mias_001", "x.png": "P1", "y.png": "P1"}
    assert found == {name: name for name in ids} | known
    assert f"the patient_id of {len(PLACEHOLDERS) + 1} images is a placeholder" in caplog.text
    assert f"{len(PLACEHOLDERS)} images are of unknown patients" in caplog.text


def test_an_id_that_all_films_share_is_none(patients_of, caplog):
    assert len(group(patients_of({f"{row}.png": ("H1", "h 1")[row % 2] for row in range(6)}))) == 6
    assert caplog.text.count("all images have the same patient_id: it counts as unknown") == 1
    assert len(group(patients_of({"a.png": "H1", "b.png": "H1", "c.png": "H2"}))) == 2
    some_unknown = {f"{row}.png": "H1" if row < 20 else "" for row in range(24)}
    assert len(group(patients_of(some_unknown))) == 24
    assert len(group(patients_of({"a.png": "H1", "b.png": "H1", "c.png": ""}))) == 2


@pytest.mark.parametrize(("shared", "total", "warned"), [
    (30, 100, True), (11, 100, True), (9, 100, True), (8, 100, False), (4, 12, False), (5, 20, True)])
def test_a_patient_with_very_many_films_is_named(make, caplog, shared, total, warned):
    folder = make(*[f"{row:03d}.png" for row in range(total)])
    patients = ["x" if row < shared else row for row in range(total)]
    write_labels(folder, [f"{row:03d}.png" for row in range(total)], patients)
    films.find_films(folder)
    benign, malignant, each = (shared + 1) // 2, shared // 2, total // 2
    line = f"patient 'x' has {benign} of {each} benign and {malignant} of {each} malignant images"
    assert (line in caplog.text) == warned
    assert caplog.text.count("WARNING") == warned


def test_a_patient_with_most_of_both_classes_is_named(patients_of, caplog):
    patients_of({"a.png": "x", "b.png": "y", "mdb001.png": "x", "mdb002.png": "y"})
    assert "patient 'x' has 2 of 2 benign and 2 of 2 malignant images" in caplog.text


# ---- patients: names ---------------------------------------------------------------------------

HASH, OTHER_HASH = "0028fb2c7f0b3a5cb9a80cb0e1cdbb91", "7fc1f1bb8bb1a7efaf7104e49c4d8b86"
UIDS = "1.2.842.113970.3.62.1.56868341/1.2.844.113684.2750825168/1.2.826.0.1.3680043.8.498.1039"


@pytest.mark.parametrize(("path", "patient", "source", "side", "view"), [
    ("Mass-Training_P_00001_LEFT_CC.png", "P_00001", "CBIS-DDSM", "left", "CC"),
    ("Calc-Test_P_00038_LEFT_MLO_1/1.3.6/000001.png", "P_00038", "CBIS-DDSM", "left", "MLO"),
    ("Calc-Test_P_00038_RIGHT_MLO/08-29-2017-DDSM-NA-94942/1.000000-full mammogram images-63992/1-1.png",
     "P_00038", "CBIS-DDSM", "right", "MLO"),
    ("A_1109_1.LEFT_MLO.png", "A_1109", "DDSM", "left", "MLO"),
    ("0029/C_0029_1.RIGHT_CC.jpg", "C_0029", "DDSM", "right", "CC"),
    ("20586908_6c613a14b80a8591_MG_R_CC_ANON.png", "6c613a14b80a8591", "INbreast", "right", "CC"),
    ("20586960_6c613a14b80a8591_MG_L_ML_ANON.png", "6c613a14b80a8591", "INbreast", "left", "MLO"),
    ("mdb001.pgm", "mias_001", "mini-MIAS", "right", "MLO"),
    ("MDB002 (3).png", "mias_001", "mini-MIAS", "left", "MLO"),
    (f"{HASH}/{OTHER_HASH}.png", HASH, "VinDr-Mammo", "", ""),
    (f"images_png/{HASH}_{OTHER_HASH}_resized.png", HASH, "VinDr-Mammo", "", ""),
    ("D1-0001/07-18-2010-NA-NA-79377/1.000000-NA-70244/1-1.png", "D1-0001", "CMMD", "", ""),
    ("D2-0007_R_MLO.png", "D2-0007", "CMMD", "right", "MLO"),
    ("P100_L_DM_MLO.jpg", "P100", "CDD-CESM", "left", "MLO"),
    ("P1_R_CM_CC.jpg", "P1", "CDD-CESM", "right", "CC"),
    ("2019_BC0021382_ CC_L.jpg", "BC0021382", "KAU-BCMD", "left", "CC"),
    ("mass-training_p_00001_left_cc.png", "p_00001", "CBIS-DDSM", "left", "CC"),
    ("a_1109_1.left_mlo.png", "a_1109", "DDSM", "left", "MLO"),
    ("20586908_6C613A14B80A8591_MG_R_CC.png", "6C613A14B80A8591", "INbreast", "right", "CC"),
    (f"{HASH.upper()}/{OTHER_HASH.upper()}.png", HASH.upper(), "VinDr-Mammo", "", ""),
    ("d1-0001/1-1.png", "d1-0001", "CMMD", "", ""), ("p100_l_dm_mlo.jpg", "p100", "CDD-CESM", "left", "MLO"),
    ("2019_bc0021382_ cc_l.jpg", "bc0021382", "KAU-BCMD", "left", "CC"),
    ("img_20_30_1_RCC.tif", "20", "BCDR", "right", "CC"), ("img_20_30_1_LO.tif", "20", "BCDR", "left", "MLO"),
    ("patient_20_study_30_img_20_30_2_RO_PRE.png", "20", "BCDR", "right", "MLO"),
    (f"cohort_1/10000879/{UIDS}.png", "10000879", "EMBED", "", ""),
    *[(path, None, None, "", "") for path in (
        "P_00001.png", "P_00001/1.png", "xmdb001.png", "mdb0011.png", "mdb001/scan.png", "D1-00012.png",
        "AD1-0001.png", "D3-0001.png", f"{HASH}.png", f"{HASH}/1.png", "P100.png", "A_1109_1.png",
        "2019_BC0021382.jpg", "img_20_30_1.png",
        "10000879/1/2/3.png", "10006/1.png", "10006_2.png", "2019/123456789.png")],
    *[(path, None, None, side, view) for path, side, view in (
        ("P_00001_LEFT_CCX.png", "left", ""), ("P100_L_XX_MLO.jpg", "left", "MLO"), ("P1_left.png", "left", ""),
        ("7_MLO.png", "", "MLO"), ("7_L.png", "", ""), ("7_R_L_CC.png", "", "CC"), ("7_LCC.png", "left", "CC"),
        ("7-rmlo2.png", "right", "MLO"), ("7_CC_R.png", "right", "CC"), ("7_L-XCCL.png", "left", "XCCL"),
        ("7_CCL.png", "left", "CC"), ("7 MLOR.png", "right", "MLO"), ("7_lt_cc.png", "left", "CC"),
        ("7-RT-mlo.png", "right", "MLO"), ("left/7_CC.png", "left", "CC"), ("7_LCC_MLO.png", "", ""),
        ("img_20_30_LCC.png", "left", "CC"), ("7_LO.png", "left", "MLO"), ("7_O.png", "", ""),
        ("Lo_7_R_CC.png", "right", "CC"),
        ("7_ml.png", "", ""), ("Lisa Right_ML.png", "right", "ML"), ("a.LEFT_MLO.1.png", "left", "MLO"),
        ("L/CC/7.png", "left", "CC"), ("right/7.png", "right", ""), ("P_00001_LEFT_CC/own/7.png", "left", "CC"),
        ("P_00001_LEFT_CC/1/2/3/7.png", "left", "CC"))],
])
def test_patients_sides_and_views_in_names(make, caplog, path, patient, source, side, view):
    path = f"benign/{path}"
    table = films.find_films(make(path, *(f"{label}/B_3001_1.LEFT_CC.png" for label in CLASSES))).set_index("path")
    expected = [patient or path, f"file name ({source})" if source else "unknown"]
    assert table.loc[path, ["patient_id", "patient_from"]].tolist() == expected
    assert table.loc[path, ["side", "view"]].tolist() == [side, view]
    assert table["patient_id"].nunique() == 2
    assert (source is None) == ("counts as a patient of its own" in caplog.text)
    assert caplog.text.count("3 images of 2 patients") == 1


def test_a_folder_above_the_collection_is_no_patient(make, tmp_path):
    above = [f"{tmp_path}/Mass-Training_P_00001_LEFT_CC/2024/{row}.png" for row in range(8)]
    beside = [f"../D1-0001/films/{row}.png" for row in range(8)]
    for paths in (above, beside):
        folder = make("labels.csv", *paths)
        write_labels(folder, paths)
        table = films.find_films(folder)
        assert table["patient_id"].nunique() == 8 and set(table["side"]) == {""}


@pytest.mark.parametrize("form", ["{}/{}.png", "{}_{}.png", "train_images/{}/{}.png"])
def test_numbers_are_patients_where_they_look_like_those_of_rsna(make, form):
    """There images have random numbers below 2 ** 31, of which a few are short, and patients have few films."""
    rng = np.random.default_rng(0)
    images = [(patient, image) for patient in rng.choice(65535, 40, replace=False)
              for image in rng.integers(2**31, size=4)]
    images = [(patient, image % 10**6 if row % 9 == 0 else image) for row, (patient, image) in enumerate(images)]
    expected = {f"{CLASSES[patient % 2]}/{form.format(patient, image)}": str(patient) for patient, image in images}
    table = films.find_films(make(*expected))
    assert table.set_index("path")["patient_id"].to_dict() == expected
    assert set(table["patient_from"]) == {"file name (RSNA)"}


@pytest.mark.parametrize("names", [
    [f"{row % 7}_{row}" for row in range(40)], [f"{row % 9}/{row}" for row in range(40)],
    [f"{row % 10}_2024{row:04d}" for row in range(40)], [f"{2019 + row % 2}/{10**9 + row}" for row in range(40)],
    [f"{2010 + row % 10}/{10**9 + row}" for row in range(40)],
])
def test_other_numbers_are_no_patients(make, names):
    table = films.find_films(make(*(f"{CLASSES[row % 2]}/{name}.png" for row, name in enumerate(names))))
    assert table["patient_id"].nunique() == 40 and set(table["patient_from"]) == {"unknown"}


# ---- patients: several sources -----------------------------------------------------------------


def name_cbis(row):
    return f"Mass-Training_P_{row // 2 + 1:05d}_LEFT_{('CC', 'MLO')[row % 2]}"


@pytest.mark.parametrize(("paths", "ids"), [
    ([f"{name_cbis(row)}.png" for row in range(28)], [name_cbis(row) for row in range(28)]),
    ([f"{name_cbis(row)}.png" for row in range(28)], range(28)),
    ([f"{name_cbis(row)}/1.3.6.{row}/1.3/1-1.png" for row in range(28)], [f"image {row}" for row in range(28)]),
    ([f"mdb{row:03d}.pgm" for row in range(1, 29)], range(1, 29)),
    ([f"{row // 2 + 1}/{2 * 10**9 + row}.png" for row in range(28)], range(28)),  # as other patients are named
    ([f"case {row // 2:03d}_{'LR'[row % 2]}_CC.png" for row in range(28)], range(28)),  # each film has its own id
    ([f"{row // 2}/{'LR'[row % 2]}-MLO.png" for row in range(28)], [f"image {row}" for row in range(28)]),
    ([f"{row}.png" for row in range(28)], [name_cbis(row) for row in range(28)]),  # an id that names an image
])
def test_names_join_what_patient_id_keeps_apart(patients_of, caplog, paths, ids):
    found = patients_of(dict(zip(paths, map(str, ids), strict=True)))
    assert group(found) == sorted(sorted(paths[row : row + 2]) for row in range(0, 28, 2))
    source = "they" if paths[0] == "0.png" else "the file names"
    assert f"28 ids in labels.csv, but {source} show 14 patients: joined" in caplog.text


def test_an_id_of_patients_of_two_collections_is_named(patients_of, caplog):
    paths = {f"P_{row:05d}_LEFT_{view}.png": f"P{row}" for row in range(5) for view in ("CC", "MLO")}
    patients_of(paths)
    assert "several patients" not in caplog.text
    found = patients_of(paths | {"D1-0001_L_CC.png": "P3", "D1-0002_L_CC.png": "P7"})
    assert len(group(found)) == 6
    assert "1 ids in labels.csv have images that the file names assign to several patients, such as 'p3'" \
        in caplog.text


def test_a_patient_who_is_known_from_several_sources_is_one(patients_of):
    """labels.csv joins a film with the first, the name of the first with the second, which d.png has as its id."""
    names = [f"Mass-Test_P_00007_{view}.png" for view in ("LEFT_CC", "LEFT_MLO")]
    found = patients_of({"a.png": "x", names[0]: "X", names[1]: "", "d.png": "P_00007", "e.png": "P_00008"})
    assert found == dict.fromkeys(["a.png", *names, "d.png"], "X") | {"e.png": "P_00008"}


@pytest.mark.parametrize(("paths", "texts"), [
    (["{0}_L_CC", "{0}_R_MLO"], ["{0}"]), (["{0} RIGHT CC", "{0}-left-mlo", "{0}_LCC"], ["{0}"]),
    (["case {0}.RCC", "case {0}.RMLO (2)"], ["case {0}"]), (["{0}/L_CC", "{0}/RMLO"], ["{0}"]),
    (["CC/{0}_L_CC", "MLO/{0}_L_MLO"], ["{0}"]), (["{0}_CCL", "{0} MLOR"], ["{0}"]),
    (["{0}_lt_cc", "{0}_RT_MLO"], ["{0}"]), (["left/{0}_CC", "right/{0}_CC"], ["{0}"]),
    (["{0}/img_L_CC", "{0}/img_R_CC"], ["{0}/img"]), (["mass/{0}_L_CC", "Calc cases/{0}_R_CC"], ["{0}"]),
    (["testing/{0}_L_CC", "training set/{0}_L_MLO"], ["{0}"]),
    (["BI-RADS 4/{0}_L_CC", "birads5/{0}_R_CC"], ["{0}"]),
    (["{0}_20190301_L_CC", "{0}-2021-12-24-L_CC", "{0}/2020.05.06/R_CC"], ["{0}"]),
    (["Massimo {0}/L_CC", "Massimo {0}/R_CC"], ["Massimo {0}"]),
    (["architectural distortion/{0}_L_CC", "{0}_L_MLO"], ["{0}"]),
    (["20190301_{0}_L_CC", "20190301_{0}_R_CC"], ["20190301_{0}"]),  # which may be a number of that day
])
def test_films_with_the_same_text_before_side_and_view_are_one_patient(make, caplog, paths, texts):
    names = {row: [f"{path.format(f'{row:04d}')}.png" for path in paths] for row in range(12)}
    names = {row: [f"{CLASSES[row % 2]}/{name}" for name in found] for row, found in names.items()}
    table = films.find_films(make(*itertools.chain(*names.values()))).set_index("path")
    assert set(table["patient_from"]) == {patients.TEXT}
    for row, found in names.items():
        assert set(table.loc[found, "patient_id"]) == {texts[0].format(f"{row:04d}")}
    (message,) = re.findall("12 patients of .* images are guessed.*", caplog.text)
    assert message.count("000") >= 3, "with three examples"


@pytest.mark.parametrize("name", [
    "{0}_L_CC", "L_CC_{0}", "image_L_CC_{0}", "{0}", "{0}_L", "scan {0}", "CC/{0}", "L/CC/{0}",
])
def test_names_that_tell_of_no_patient_are_unknown_and_the_warning_says_what_to_write(make, caplog, name):
    names = [f"{CLASSES[row % 2]}/{name.format(row)}.png" for row in range(20)]
    table = films.find_films(make(*names))
    assert table["patient_id"].tolist() == sorted(names) and set(table["patient_from"]) == {"unknown"}
    assert re.search(f"20 images are of unknown patients, such as '{min(names)}', .* write labels.csv with columns"
                     f" path,label,patient_id and rows such as {min(names)},benign,patient 1\n", caplog.text)


def test_the_text_counts_only_where_nothing_else_is_known(patients_of):
    """Two films of a text whose patients labels.csv knows, three of which it knows one, and four of which two."""
    found = patients_of({"1_L_CC.png": "A", "1_R_CC.png": "B", "2_L_CC.png": "C", "2_R_CC.png": "",
                         "2_L_MLO.png": "", "3_L_CC.png": "D", "3_R_CC.png": "E", "3_L_MLO.png": "",
                         "3_R_MLO.png": ""})
    assert group(found) == [["1_L_CC.png"], ["1_R_CC.png"], ["2_L_CC.png", "2_L_MLO.png", "2_R_CC.png"],
                            ["3_L_CC.png"], ["3_L_MLO.png", "3_R_MLO.png"], ["3_R_CC.png"]]
    assert found["2_L_MLO.png"] == "C"


def test_a_date_alone_is_the_text(make):
    names = [f"{CLASSES[row % 2]}/img_2019{row // 2 + 1:02d}01_{'LR'[row // 2 % 2]}_{('CC', 'MLO')[row % 2]}.png"
             for row in range(12)]
    assert films.find_films(make(*names))["patient_id"].nunique() == 6


def test_a_date_counts_where_the_text_without_it_has_too_many_films_for_a_patient(make):
    names = [f"{CLASSES[day % 2]}/site{day // 20}/201901{day % 20 + 11}/{side}_{view}.png"
             for day in range(100) for side in "LR" for view in ("CC", "MLO")]
    table = films.find_films(make(*names))
    assert table.groupby("patient_id").size().eq(4).all()


def test_a_film_without_id_has_the_patient_of_the_others_of_its_text(make, caplog, dicoms_of):
    """Whatever source knows them; the PatientID stays hidden."""
    folder = make("labels.csv")
    paths = [f"{row:02d}_{side}_CC.dcm" for row in range(12) for side in "LR"]
    for number, path in enumerate(paths):
        tags = {"PatientID": "" if number == 5 else f"HOSPITAL-{number // 2}"}
        write_dicom(folder / path, np.zeros((8, 8), np.uint8), **tags)
    write_labels(folder, paths, ["case0"] + [""] * 23)
    table = films.find_films(folder)
    assert table["patient_id"].tolist() == ["case0"] * 2 + [f"dicom_{row // 2:05d}" for row in range(2, 24)]
    assert table["patient_from"].tolist() == ["labels.csv"] + ["PatientID"] * 23
    assert "1 images of unknown patients have the same text before side and view as images of one" in caplog.text
    assert "of another patient" not in caplog.text


@pytest.mark.parametrize(("name", "patient", "warned"), [
    ("{0}_{1}.png", "{0}", ""), ("{0}_{1}.png", "", ""),
    ("{0}_{1}.png", "{0} {2}", "24 ids in labels.csv, but they show 12 patients: joined, such as '000 L', '000 "),
    ("{0}_{1}.png", "{0}{2}", "24 ids in labels.csv, but they show 12 patients: joined, such as '000L', '000R'"),
    ("{0}_{1}.png", "{0}{2}x", "have the same text before side"),
    ("{3}.png", "{0}_{2}_20190301", "24 ids in labels.csv, but they show 12 patients: joined, such as"),
    ("{0}{2}{1}.png", "{0}{2}{1}", "48 ids in labels.csv, but they show 24 patients: joined, such as"),
    ("{0}{2}-{1}x.png", "{0}{2}-{1}x", "48 images have 48 patients: if the ids are those of images"),
])
def test_ids_that_may_be_those_of_breasts_or_images_are_named(make, caplog, name, patient, warned):
    films_of_all = itertools.product(range(12), "LR", ("CC", "MLO"))
    parts = [(f"{row:03d}", f"{side}_{view}", side, f"scan {number}")
             for number, (row, side, view) in enumerate(films_of_all)]
    paths = [name.format(*part) for part in parts]
    folder = make(*paths)
    write_labels(folder, paths, [patient.format(*part) for part in parts])
    films.find_films(folder)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    messages = [message for message in messages if "show a breast that has the other label" not in message]
    assert len(messages) == bool(warned) and warned in "".join(messages)


@pytest.mark.parametrize(("text", "view"), [
    ("LCC", "CC"), ("R-MLO", "MLO"), ("left cc", "CC"), ("LMO", "LMO"), ("LM", "LM"), ("ML", "ML"), ("LLL", ""),
])
def test_a_view_may_be_written_with_its_side(text, view):
    assert names.to_view(text) == view


def test_thumbnails_and_bins_of_drives_are_no_films(make):
    table = films.find_films(make("benign/1.jfif", "malignant/2.JPE", "benign/@eaDir/1.jfif/SYNOPHOTO_THUMB_M.jpg",
                                  "malignant/#recycle/3.png", "malignant/$RECYCLE.BIN/4.png", "benign/.5.png"))
    assert table["path"].tolist() == ["benign/1.jfif", "malignant/2.JPE"]


@pytest.mark.parametrize("blank", [0, 1])
def test_an_id_for_each_image_names_no_patient_where_file_names_do_also_with_a_blank_cell(make, blank):
    paths = [f"{row:02d}_{side}_{view}.png" for row in range(10) for side in "LR" for view in ("CC", "MLO")]
    folder = make(*paths)
    write_labels(folder, paths, [f"I{row}" if row >= blank else "" for row in range(40)])
    assert films.find_films(folder)["patient_id"].nunique() == 10


@pytest.mark.parametrize(("name", "warned"), [
    ("2019{1}01_{0:03d}_{2}", True), ("{0:03d}_20{1}_{2}", True), ("P{0:03d}/{1}_{2}", True),
    ("20{1}/{0:03d}_{2}", True), ("P{0:03d}/{2}_{1}", False), ("{0:03d}_2019{1}11_{2}", False),
    ("11.{1}.2019/{0:03d}/{2}", False), ("site1_P{0:03d}/{1}_{2}", True),
    ("site 1/{0:03d}_{2}", False), ("{0:03d}_2019-{1}-11-101530_{2}", False),
])
def test_guessed_patients_that_share_a_number_are_named(make, caplog, name, warned):
    """Of each of 20 patients two views of both breasts, each breast on another day."""
    table = films.find_films(make(*[f"{CLASSES[row % 2]}/{name.format(row, day, f'{side}_{view}')}.png"
                                    for row in range(20) for side, day in (("L", 11), ("R", 12))
                                    for view in ("CC", "MLO")]))
    assert ("of the guessed patients share their first number" in caplog.text) == warned
    assert table["patient_id"].nunique() == (40 if warned else 20)


@pytest.mark.parametrize("copies", [["0004_L_CC (1)"], ["0004_L_CC (1)", "0009_R_MLO - Copy"]])
def test_texts_that_number_images_are_warned_of_in_spite_of_a_copy(make, caplog, copies):
    numbered = [f"{row:04d}_{'LLRR'[row % 4]}_{('CC', 'MLO')[row % 2]}" for row in range(60)]
    films.find_films(make(*[f"{CLASSES[row // 4 % 2]}/{name}.png" for row, name in enumerate(numbered)],
                          *[f"malignant/{name}.png" for name in copies]))
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(re.match(r"60 patients of 6\d images are guessed", message) for message in warned)


def test_ids_of_examinations_are_joined_also_for_a_patient_of_many(patients_of):
    """Three examinations of one patient among 60 films of others."""
    ids = [f"{100 + row // 4:04d}_20190301" for row in range(60)]
    ids += [f"0003_{2017 + row // 4}0301" for row in range(12)]
    found = patients_of({f"{row}.png": name for row, name in enumerate(ids)})
    assert len({found[f"{row}.png"] for row in range(60, 72)}) == 1 and len({*found.values()}) == 16


def test_long_ids_are_not_taken_for_rounded_because_one_ends_in_zeros(patients_of):
    ids = [f"{123456789012345001 + row // 4 * 37}" for row in range(36)] + ["123456789012346000"] * 4
    assert len({*patients_of({f"{row}.png": name for row, name in enumerate(ids)}).values()}) == 10


def test_folders_of_days_are_no_patients_of_embed(make):
    """As a DICOM archive writes them: day, study, series, file."""
    paths = [f"{CLASSES[row % 2]}/2019030{row % 2 + 1}/1.2.3.4.{row // 2}/1.2.3.5.{row}/{row}.png"
             for row in range(12)]
    assert set(films.find_films(make(*paths))["patient_from"]) == {"unknown"}


def test_a_breast_with_both_labels_is_named(patients_of, caplog):
    paths = ["1_L_CC.png", "1_R_CC.png", "1_L_MLO.png", "2_L_CC.png", "2_R_MLO.png", "3_R_CC.png"]  # by turns
    patients_of(dict.fromkeys(paths, ""))
    assert "show a breast that has the other label" not in caplog.text
    patients_of({"4_L_CC.png": "A", "5_L_MLO.png": "A", "6_R_CC.png": "A", "7_L_CC.png": "B"})
    assert ("2 images show a breast that has the other label in another image: check the labels: '4_L_CC.png',"
            " '5_L_MLO.png'\n") in caplog.text


def test_a_folder_of_another_set_than_the_split_is_named(make, caplog):
    paths = ["train/1.png", "Val/2.png", "testing/3.png", "test/4.png", "contest/5.png", "tests.png"]
    folder = make(*paths)
    for splits, named in ((["train", "val", "test", "train", "test", "train"], 1), ([""] * 6, 4)):
        rows = [f"{path},{CLASSES[row % 2]},{split}" for row, (path, split) in
                enumerate(zip(paths, splits, strict=True))]
        (folder / "labels.csv").write_text("path,label,split\n" + "\n".join(rows))
        films.find_films(folder)
        assert f"{named} images lie in a folder of another set than their split, or have none" in caplog.text


@pytest.mark.parametrize("table", ["Labels.csv", "labels.xlsx", "labels.csv.txt", "clinical.csv"])
def test_a_table_beside_class_folders_is_named(make, caplog, table):
    films.find_films(make("benign/1.png", "malignant/2.png", table))
    assert "1 tables are not read. If one has the patients, save it as labels.csv" in caplog.text
    assert f": '{table}'\n" in caplog.text


def test_a_path_that_names_the_other_class_or_no_finding_is_named(make, caplog):
    films.find_films(make("benign/1.png", "benign/malignant/2.png", "benign cases/Normal/3.png", "malignant/4.png",
                          "Malignant/benign_5.png", "benign/abnormal/6.png", "benign/non-malignant/7.png",
                          "malignant/normals/8.png"))
    assert ("2 images have the other class in their path: check their label: 'Malignant/benign_5.png',"
            " 'benign/malignant/2.png'\n") in caplog.text
    assert "2 images are named normal or healthy" in caplog.text
    assert "'benign cases/Normal/3.png', 'malignant/normals/8.png'\n" in caplog.text


# ---- DICOM -------------------------------------------------------------------------------------


@pytest.fixture
def dicoms_of(make):
    """A function that makes 00.dcm, 01.dcm ... with these tags, and labels.csv with ids; returns the table."""

    def find(tags, ids=()):
        folder = make("labels.csv")
        for row, values in enumerate(tags):
            write_dicom(folder / f"{row:02d}.dcm", np.zeros((8, 8), np.uint8), **values)
        rows = [f"{row:02d}.dcm,{CLASSES[row // 2 % 2]},{patient}"
                for row, (_, patient) in enumerate(itertools.zip_longest(tags, ids, fillvalue=""))]
        (folder / "labels.csv").write_text("path,label,patient_id\n" + "\n".join(rows))
        return films.find_films(folder)

    return find


def test_a_patient_id_of_dicom_is_never_written_as_it_is(make, caplog, capfd):
    """Unless it is that of a public collection, or the table has it already; names go before tags."""
    tags = {"a.dcm": "HOSPITAL-7", "b": "HOSPITAL-7", "c.dcm": " hospital-08", "d.dcm": "", "e.dcm": "HOSPITAL-8",
            "f.dcm": "Mass-Test_P_00820_RIGHT_MLO", "g.dcm": "42.0", "h_P_00001_LEFT_CC.dcm": "HOSPITAL-9",
            "i.dcm": "", "j_P_00002.png": None, "mdb004.png": None, "x.png": None, "y_P_00820_LEFT_CC.png": None}
    folder = make(*tags)
    for name in list(tags)[:9]:
        write_dicom(folder / name, np.zeros((8, 8), np.uint8), PatientName="Doe^Jane", PatientID=tags[name])
    (folder / "i.dcm").write_bytes(b"no DICOM of HOSPITAL-7")
    write_labels(folder, list(tags), ["0042" if name.startswith("j") else "" for name in tags])
    table = films.find_films(folder)
    assert table["patient_id"].tolist() == [
        "dicom_00001", "dicom_00001", "dicom_00002", "d.dcm", "dicom_00002", "P_00820", "0042", "P_00001", "i.dcm",
        "0042", "mias_002", "x.png", "P_00820"]
    assert table["patient_from"].tolist() == [
        *["PatientID"] * 3, "unknown", *["PatientID"] * 3, "file name (CBIS-DDSM)", "unknown", "labels.csv",
        "file name (mini-MIAS)", "unknown", "file name (CBIS-DDSM)"]
    shown = caplog.text + table.to_csv() + "".join(capfd.readouterr())
    assert not re.search("hospital|Doe|Mass-Test", shown, re.IGNORECASE)


def test_a_patient_id_of_dicom_joins_films_that_labels_csv_keeps_apart(dicoms_of, caplog):
    table = dicoms_of([{"PatientID": str(row // 2)} for row in range(28)], ids=range(28))  # the same numbers
    pairs = [[f"{row:02d}.dcm", f"{row + 1:02d}.dcm"] for row in range(0, 28, 2)]
    assert group(table.set_index("path")["patient_id"].to_dict()) == pairs
    assert "28 ids in labels.csv, but the PatientIDs show 14 patients: joined" in caplog.text


@pytest.mark.parametrize("placeholder", ["", "REMOVED", "anonymous", "N/A", "HOSPITAL"])
def test_a_patient_id_that_names_no_one_is_none(dicoms_of, caplog, placeholder):
    table = dicoms_of([{"PatientID": placeholder}] * 6)
    assert table["patient_id"].nunique() == 6
    assert "HOSPITAL" not in caplog.text


def test_a_study_is_of_one_patient(dicoms_of, caplog):
    """Of 12 patients with anonymous ids, or ids of images; the first has eight images, each other one four."""
    for ids in (["ANONYMOUS"] * 48, [f"I{max(row, 1)}" for row in range(48)]):
        tags = [{"PatientID": ids[row], "StudyInstanceUID": f"1.2.3.{max(row // 4, 1)}"} for row in range(48)]
        found = dicoms_of(tags)
        assert found["patient_id"].tolist() == [f"dicom_{max(row // 4, 1):05d}" for row in range(48)]
        assert set(found["patient_from"]) == {"StudyInstanceUID" if ids[0] == "ANONYMOUS" else "PatientID"}
    assert "11 studies have images of several PatientIDs" in caplog.text
    assert "1.2.3" not in caplog.text
    assert "48 images have no patient, but a study: if a patient was examined twice" in caplog.text


@pytest.mark.parametrize("ends", [("_L", "_R"), ("L", "R"), (" 20190301", " 20200301"), ("-R_CC", "-L_CC")])
def test_patient_ids_of_dicom_that_differ_by_a_side_or_a_date_are_one(dicoms_of, caplog, ends):
    caplog.set_level("INFO", logger="mammograms")
    found = dicoms_of([{"PatientID": f"{100 + row // 4}{ends[row // 2 % 2]}"} for row in range(40)])
    assert found["patient_id"].tolist() == [f"dicom_{row // 4 + 1:05d}" for row in range(40)]
    assert "the PatientID of 40 images ends in a side, a view or a date, which is ignored" in caplog.text


def test_a_study_does_not_replace_the_text_of_names(make):
    """Two studies of each anonymous patient."""
    folder = make("labels.csv")
    paths = [f"{row:02d}_{side}_CC.dcm" for row in range(12) for side in "LR"]
    for number, path in enumerate(paths):
        write_dicom(folder / path, np.zeros((8, 8), np.uint8), PatientID="", StudyInstanceUID=f"1.2.{number}")
    write_labels(folder, paths)
    assert films.find_films(folder)["patient_id"].tolist() == [f"{row:02d}" for row in range(12) for _ in "LR"]


def test_a_patient_id_with_two_dates_of_birth_is_named_without_them(dicoms_of, caplog):
    births = "19500101", ""
    dicoms_of([{"PatientID": f"77{row}", "PatientBirthDate": birth} for row in (1, 2) for birth in births])
    assert "birth" not in caplog.text
    dicoms_of([{"PatientID": f"77{row}", "PatientBirthDate": f"1950010{row // 2 + 1}"} for row in (1, 2, 3)]
              + [{"PatientID": "771", "PatientBirthDate": "19610203"}])
    assert "1 PatientIDs have several dates of birth" in caplog.text
    assert "1950" not in caplog.text and "1961" not in caplog.text


def test_a_patient_id_of_very_many_films_joins_none_that_are_known(dicoms_of, caplog):
    table = dicoms_of([{"PatientID": f"SITE{row % 2}"} for row in range(40)], ids=[row // 2 for row in range(40)])
    assert table["patient_id"].nunique() == 20
    assert "40 images have a PatientID that more than 8 images share" in caplog.text
    assert dicoms_of([{"PatientID": f"SITE{row % 2}"} for row in range(40)])["patient_id"].nunique() == 2
    assert "patient 'dicom_00001' has 10 of 20 benign" in caplog.text


def code_view(meaning="", value=""):
    code = pydicom.Dataset()
    code.CodeMeaning, code.CodeValue = meaning, value
    return {"ViewCodeSequence": pydicom.Sequence([code])}


@pytest.mark.parametrize(("tags", "side", "view"), [
    ({"ImageLaterality": "L", "ViewPosition": "MLO"}, "left", "MLO"),
    ({"Laterality": "R", "ViewPosition": "XCCL"}, "right", "XCCL"),
    ({"ImageLaterality": "R", "Laterality": "L", "ViewPosition": "LM", **code_view("cranio-caudal")}, "right",
     "CC"),
    ({"ImageLaterality": "B"} | code_view("medio-lateral oblique", "R-10226"), "", "MLO"),
    (code_view("vue de face", "399162004"), "", "CC"), (code_view(value="R-10226"), "", "MLO"),
    ({"ViewPosition": "DOE"} | code_view("Jane Doe"), "", ""),
    ({"ViewCodeSequence": pydicom.Sequence([])}, "", ""), ({}, "", ""),
])
def test_sides_and_views_of_dicom(dicoms_of, tags, side, view):
    table = dicoms_of([tags, {}, {}, {}])
    assert table.loc[0, ["side", "view"]].tolist() == [side, view]


def test_labels_csv_goes_before_dicom_and_dicom_before_names(make, caplog):
    folder = make("a_L_CC.png", "b_R_MLO.png", "c_L_CC.dcm", "d_L_CC.dcm", "e.png")
    for name in ("c_L_CC.dcm", "d_L_CC.dcm"):
        write_dicom(folder / name, np.zeros((8, 8), np.uint8), ImageLaterality="R", ViewPosition="MLO")
    (folder / "labels.csv").write_text(
        "path,label,side,view\na_L_CC.png,benign,L,cranio-caudal\nb_R_MLO.png,malignant,,\nc_L_CC.dcm,benign,LEFT,xccl\n"
        "d_L_CC.dcm,benign,unknown,n/a\ne.png,malignant,right breast,spot\n")
    table = films.find_films(folder)
    assert table["side"].tolist() == ["left", "right", "left", "right", "right"]
    assert table["view"].tolist() == ["CC", "MLO", "XCCL", "MLO", "SPOT"]
    for column in ("side", "view"):
        assert f"2 images have several values of {column}: labels.csv counts first, then DICOM" in caplog.text


def test_what_is_cut_off_is_a_missing_tag_and_nothing_of_it_is_shown(make, caplog, capfd):
    folder = make("whole.dcm")
    tags = {"ImageLaterality": "L", "ViewPosition": "MLO"} | code_view("cranio-caudal", "R-10242")
    content = write_dicom(folder / "whole.dcm", np.zeros((8, 8), np.uint8), **tags).read_bytes()
    for length in range(0, len(content), 5):
        (folder / f"{length:04d}.dcm").write_bytes(content[:length])
    (folder / "no preamble.dcm").write_bytes(content[132:])
    write_labels(folder, sorted(path.name for path in folder.glob("*.dcm")))
    table = films.find_films(folder)
    for row in table.iloc[-2:].itertuples():
        assert (row.patient_from, row.side, row.view) == ("PatientID", "left", "CC"), row.path
    assert set(table["patient_from"]) == {"PatientID", "unknown"} and set(table["side"]) == {"", "left"}
    assert not re.search("H-4711|Secret|1961", caplog.text + table.to_csv() + "".join(capfd.readouterr()))


def test_only_dicom_files_are_opened_and_each_once(make, monkeypatch):
    folder = make("benign/a.png", "malignant/b.jpg", "malignant/x.tif")
    for name in ("benign/c.dcm", "malignant/d.dicom"):
        write_dicom(folder / name, np.zeros((8, 8), np.uint8))
    read, original = [], pydicom.dcmread

    def dcmread(path, **options):
        read.append(Path(path).name)
        return original(path, **options)

    monkeypatch.setattr(pydicom, "dcmread", dcmread)
    monkeypatch.setattr(Path, "open", lambda path, *_: pytest.fail(f"{path} is opened"))
    films.find_films(folder)
    assert sorted(read) == ["c.dcm", "d.dicom"]


def test_without_pydicom(make, monkeypatch):
    folder = make("benign/a.dcm", "malignant/b.png")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"^DICOM files need one more package: pip install pydicom$"):
        films.find_films(folder)
