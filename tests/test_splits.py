"""Who is trained, validated and tested on, and what a model has seen: in tables. Runs are in test_folds.py."""
import inspect
import io
import json
import logging
import re
import sys
import types
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import StratifiedGroupKFold
from test_duplicates import CLASSES, make_fingerprints, make_table, turn_fingerprints
from tiny import build_backbone, common, prepare

from data import UserError, list_some, splits
from data.duplicates import group_duplicates
from data.patients import TEXT
from data.splits import FOLDS, check_folds, check_sides, check_unseen, exclude_known, list_seen, split_patients


def make_films(patients=60, malignant=0.4, mixed=0.0, seed=0):
    """A table of one to five films a patient, in random order."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        label = rng.random() < malignant
        for view in range(rng.integers(1, 6)):
            other = rng.random() < mixed
            rows.append((f"{patient}_{view}.png", CLASSES[int(label != other)], f"patient {patient}"))
    films = pd.DataFrame(rows, columns=["path", "label", "patient_id"]).sample(frac=1, random_state=seed)
    return films.assign(split="", excluded="", group=films["patient_id"]).reset_index(drop=True)


def give_split(films, held_out=10, name="validation"):
    """The first patients are in the set `name`, the others in training."""
    names = [f"patient {number}" for number in range(held_out)]
    return films.assign(split=np.where(films["patient_id"].isin(names), name, "train"))


def describe(films):
    """What is printed of a set."""
    return " and ".join(f"{len(rows)} {label} mammograms of {rows['group'].nunique()} patients"
                        for label, rows in films.groupby("label"))


# ---- folds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_no_group_is_in_two_sets_and_every_one_is_held_out_once(seed):
    films = make_films(mixed=0.1, seed=seed)
    films["group"] = films["patient_id"].str.replace(r".$", "", regex=True)  # up to ten patients in one
    held_out = Counter()
    for fold in range(FOLDS):
        split = split_patients(films, fold, seed)
        assert split.groupby("group")["split"].nunique().max() == 1
        held_out.update(split["path"][split["split"] == "validation"])
    assert held_out == Counter(dict.fromkeys(films["path"], 1))


def test_the_seed_moves_the_split():
    films = make_films()
    split = split_patients(films, 0, 0)
    assert split["split"].equals(split_patients(films, 0, 0)["split"])
    assert not split["split"].equals(split_patients(films, 0, 1)["split"])


def test_folds_keep_the_prevalence():
    films = make_films(patients=400)
    prevalence = films["label"].eq("malignant").mean()
    for fold in range(FOLDS):
        split = split_patients(films, fold, 0)
        held_out = split[split["split"] == "validation"]
        assert held_out["label"].eq("malignant").mean() == pytest.approx(prevalence, abs=0.03)
        assert len(held_out) == pytest.approx(len(films) / FOLDS, rel=0.05)
        check_sides(split)


@pytest.mark.parametrize("given", ["", "validation", "test"])
def test_films_excluded_change_no_other_set(given):
    """As with CROP = "lesion", where films have no box: the folds are those of the other crops."""
    films = give_split(make_films(), name=given) if given else make_films()
    torn = films.index[films["patient_id"] == "patient 0"][0]  # a film of a held-out patient
    films.loc[torn, "split"] = "train" * bool(given)
    unused = (films.index % 3 == 0) | (films.index == torn)
    expected = split_patients(films, 2, 0)
    split = split_patients(films.assign(excluded=np.where(unused, "no lesion_box", "")), 2, 0)
    assert (split["split"][unused] == "excluded").all()
    assert split["excluded"][unused].eq("no lesion_box").all()
    assert split["fold"].equals(expected["fold"])
    if given != "validation":
        assert split["split"][~unused].equals(expected["split"][~unused])


@pytest.mark.parametrize("tested", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_too_few_patients_for_the_folds_are_refused_with_the_remedy(grouped, tested):
    """Four malignant ones outside of the test set; where pictures are known, eight of which five share one."""
    films = make_films(patients=20, malignant=0)
    rows = range(8 if grouped else 4)
    films.loc[rows, "label"] = "malignant"
    films.loc[rows, "patient_id"] = [f"other {row}" for row in rows]
    films["group"] = films["patient_id"].replace({f"other {row}": "other 3" for row in rows if row > 3})
    if tested:
        names = ["tested 1", "tested 2", "tested 2"]
        more = films.head(3).assign(path=["a", "b", "c"], patient_id=names, group=names)
        films = pd.concat([films, more], ignore_index=True)
        films["split"] = ["train"] * (len(films) - 3) + ["test", "test", "train"]
    if not grouped:
        films = films.drop(columns="group")
    words = "4 patients with malignant mammograms" + " outside of its test set" * tested
    with pytest.raises(UserError, match=rf"{words}\. .*5 folds need 5 of each class: add patients, or bring"):
        check_folds(films)
    check_folds(give_split(films))


def test_a_table_that_only_tests_has_nobody_to_train_on():
    films = give_split(make_films(), held_out=60, name="test")
    with pytest.raises(UserError, match="0 patients with benign mammograms outside of its test set"):
        split_patients(films, 0, 0)


# ---- sets that come with the data --------------------------------------------------------------


def split_by_hand(films):
    """{path: (split, films for tested_on, films for trained_on)} by the rules of data/README.md, film by film."""
    answers, trained = {}, []
    rows = films.to_dict("records")
    for row in rows:
        tests = [other["path"] for other in rows if other["group"] == row["group"] and other["split"] == "test"]
        if row["excluded"]:
            answers[row["path"]] = "excluded", [], []
        elif row["split"] != "test" and tests:
            answers[row["path"]] = "excluded", tests, []
        elif row["split"] == "train":
            trained.append(row)
    for row in rows:
        known = [other["path"] for other in trained if other["group"] == row["group"]]
        if row["path"] not in answers and row["split"] == "validation" and known:
            answers[row["path"]] = "excluded", [], known
    return {row["path"]: answers.get(row["path"], (row["split"], [], [])) for row in rows}


@pytest.mark.parametrize("seed", range(4))
def test_given_sets_are_those_of_the_rules_film_by_film(seed):
    """Most patients are in several sets, and a few share a picture. What is excluded was not trained on."""
    films = make_films(patients=80, seed=seed)
    rng = np.random.default_rng(seed)
    films["split"] = rng.choice(["train", "validation", "test"], len(films), p=[0.7, 0.2, 0.1])
    films["excluded"] = np.where(rng.random(len(films)) < 0.2, "no lesion_box", "")
    films["group"] = films["group"].replace({f"patient {number}": "patient 79" for number in range(5)})
    split, expected = split_patients(films, 0, 0), split_by_hand(films)
    for row in split.itertuples():
        side, tests, known = expected[row.path]
        assert row.split == side
        assert (row.tested_on in tests) if tests else row.tested_on == ""
        assert (row.trained_on in known) if known else row.trained_on == ""
        assert bool(row.excluded) == (row.split == "excluded")
    assert split["fold"].eq("").all()


def test_31_patients_of_both_official_sides_leave_training(caplog):
    """As in CBIS-DDSM: the test set stays whole, and what is left of training is dealt as if it were all."""
    caplog.set_level(logging.INFO)
    films = give_split(make_films(patients=400, seed=1), held_out=100, name="test")
    both = [f"patient {number}" for number in range(31)]
    again = films[films["patient_id"].isin(both)]
    films = pd.concat([films, again.assign(path="again/" + again["path"], split="train")], ignore_index=True)
    official = films["split"].eq("test")
    pool = films[films["split"].eq("train") & ~films["patient_id"].isin(both)]
    reference = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=3)
    for fold, (_, rows) in enumerate(reference.split(pool, pool["label"], pool["group"])):
        split = split_patients(films, fold, 3)
        assert split["split"][official].eq("test").all(), "whole, and never validated on"
        leaks = split["split"].eq("excluded")
        assert sorted(split["path"][leaks]) == sorted("again/" + again["path"])
        assert split["tested_on"][leaks].isin(films["path"][official]).all()
        assert set(split["patient_id"][leaks]) == set(both)
        held_out = pool["path"].iloc[rows]
        assert sorted(split["path"][split["split"].eq("validation")]) == sorted(held_out)
        assert sorted(split["path"][split["split"].eq("train")]) == sorted(set(pool["path"]) - set(held_out))
        check_sides(split, every_fold=True)
    (line,) = {line for line in caplog.messages if line.startswith("excluded")}
    words = f"excluded: {describe(again)}: its patient or picture is in the test set (leaks.csv): 'again/"
    assert line.startswith(words) and line.endswith(f" and {len(again) - 20} more")


def test_training_films_alone_are_dealt_as_films_without_a_split_are():
    films = make_films()
    assert split_patients(films.assign(split="train"), 1, 0).equals(split_patients(films, 1, 0))


def test_patients_with_both_classes_are_counted(caplog):
    caplog.set_level(logging.INFO)
    films = make_films(patients=100, mixed=0.1)
    mixed = (films.groupby("patient_id")["label"].nunique() == 2).sum()
    group_duplicates(films, make_fingerprints(np.random.default_rng(0), len(films)))
    assert f"{mixed} patients have benign and malignant mammograms" in caplog.text


LEAK = {"validation": splits.TRAINED, "test": splits.TESTED}


# ---- what is printed and refused ---------------------------------------------------------------


def test_a_set_without_a_class_is_refused_with_what_was_excluded():
    films = make_films(patients=30)
    apart = films.assign(split=films["label"].map({"malignant": "train", "benign": "validation"}))
    with pytest.raises(UserError, match="training set has no benign image: check DATA_DIR, CROP, FOLD"):
        check_sides(split_patients(apart, 0, 0))
    unused = films["label"] == "malignant"
    words = rf"the training set has no malignant image; {unused.sum()} images are excluded: no lesion_box: check"
    with pytest.raises(UserError, match=words):
        check_sides(split_patients(films.assign(excluded=np.where(unused, "no lesion_box", "")), 0, 0))
    tested = split_patients(give_split(films, name="test"), 0, 0)
    tested.loc[tested["split"].eq("test"), "label"] = "benign"
    with pytest.raises(UserError, match="test set has no malignant image"):
        check_sides(tested)


@pytest.mark.parametrize(("later", "loses"), [("validation", "validation"), ("test", "training")])
def test_given_sets_that_share_all_patients_are_refused_with_the_remedy(later, loses):
    films = give_split(make_films(patients=60))  # ten have a validation set for themselves
    more = films[films["split"].eq("train")].assign(split=later, path=lambda table: "again/" + table["path"])
    if later == "validation":
        films = films[films["split"].eq("train")]
    split = split_patients(pd.concat([films, more], ignore_index=True), 0, 0)
    match = rf"^the {loses} set has no .*; {len(more)} images are excluded: .*\(leaks\.csv\): move whole patients"
    with pytest.raises(UserError, match=match):
        check_sides(split)


def test_all_folds_are_checked_before_the_first_is_trained():
    films = split_patients(make_films(patients=40), 0, 0)
    check_sides(films, every_fold=True)
    malignant = films["label"].eq("malignant") & films["fold"].eq("3")
    films.loc[malignant, ["split", "excluded"]] = "excluded", "no lesion_box"
    check_sides(films)
    with pytest.raises(UserError, match=rf"^fold 3 has images of one class only; {malignant.sum()} images"):
        check_sides(films, every_fold=True)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_the_counts_that_are_printed(caplog, name):
    caplog.set_level(logging.INFO)
    films = give_split(make_films(patients=100, mixed=0.1), name=name)
    films["group"] = films["group"].replace("patient 51", "patient 50")  # who share a picture count once
    films.loc[films.index[films["patient_id"] == "patient 0"][0], "split"] = "train"
    films.loc[films["patient_id"] == "patient 1", "excluded"] = "no lesion_box"
    split = split_patients(films, 0, 0)
    check_sides(split)
    sets = ["train", "validation"] + ["test"] * (name == "test")
    lines = [f"{splits.SETS[side]}: {describe(split[split['split'].eq(side)])}" for side in sets]
    for reason, listed in (("no lesion_box", ""), (LEAK[name], " (leaks.csv)")):
        rows = split[split["excluded"].eq(reason)]
        lines.append(f"excluded: {describe(rows)}: {reason}{listed}: {list_some(rows['path'].tolist())}")
    assert sorted(caplog.messages) == sorted(lines)


# ---- weights -----------------------------------------------------------------------------------


@pytest.fixture
def collection():
    """(films, fingerprints): eight films of as many patients, of which the last four are held out."""
    names = [f"patient {number}" for number in range(8)]
    sides = ["train"] * 4 + ["validation"] * 4
    films = make_table(names).assign(group=names, patient_from="labels.csv", split=sides, fold="0", excluded="")
    return films, make_fingerprints(np.random.default_rng(0), 8)


@pytest.fixture
def write_run(tmp_path):
    """A function that leaves what a run does of its films; returns settings with which another starts from it."""

    def write(films, fingerprints, trained, name="run", weights="imagenet", column="split"):
        (tmp_path / name).mkdir()
        films = films.assign(split=np.where(films.index.isin(trained), "train", "validation"))
        films[["path", "patient_id", column, "group"]].to_csv(tmp_path / name / "split.csv", index=False)
        np.save(tmp_path / name / "fingerprints.npy", fingerprints)
        (tmp_path / name / "settings.json").write_text(json.dumps({
            "constants": {"WEIGHTS": str(weights)}, "weights": {"origin": str(weights), "pretrained": True}}))
        return types.SimpleNamespace(WEIGHTS=tmp_path / name / "model.keras", FOLD=0, DATA_DIR=tmp_path / "films")

    return write


def test_weights_that_have_seen_held_out_patients_or_their_pictures_are_refused(collection, write_run):
    films, prints = collection
    settings = write_run(films, prints, trained=range(5))
    with pytest.raises(UserError, match=r"^WEIGHTS: .* trained on 1 of the 4 held-out patients.* SPLIT_SEED"):
        check_unseen(films, prints, settings)
    names = [f"other {number}" for number in range(8)]
    renamed = films.assign(patient_id=names, group=names)
    with pytest.raises(UserError, match="1 of the 4 held-out patients"):  # known by a turned picture
        check_unseen(renamed, turn_fingerprints(prints, 77, mirrored=True), settings)
    others = make_fingerprints(np.random.default_rng(1), 8)
    sides = ["train"] * 4 + ["test"] + ["validation"] * 3
    with pytest.raises(UserError, match="1 of the 4 held-out patients"):  # known by the patient
        check_unseen(films.assign(split=sides), others, settings)
    settings.FOLD = "all"
    with pytest.raises(UserError, match="5 of the 8 held-out patients"):  # each is held out once
        check_unseen(films, prints, settings)
    with pytest.raises(UserError, match="4 of the 7 held-out patients"):  # one has no lesion_box
        check_unseen(films.assign(split=["excluded", *sides[1:]]), prints, settings)
    folds = films.assign(fold=[*"01234", "excluded", "test", "test"])
    pooled = write_run(folds, prints, [], name="all folds", column="fold")
    pooled.FOLD = "all"
    with pytest.raises(UserError, match="5 of the 8 held-out patients"):
        check_unseen(films, others, pooled)
    given = films.assign(fold="", split=["train"] * 5 + ["validation"] * 3)
    check_unseen(given, prints, settings)  # FOLD is not used


def test_weights_that_have_not_seen_them_are_accepted(collection, write_run, caplog):
    caplog.set_level("INFO")
    films, prints = collection
    check_unseen(films, prints, write_run(films, prints, trained=range(4)))
    assert "none of the held-out patients" in caplog.text
    others = make_fingerprints(np.random.default_rng(1), 8)
    own = {"unknown": films["path"], "PatientID": [f"dicom_{row:05d}" for row in range(8)],
           TEXT: [f"case{row}" for row in range(8)]}
    for number, (source, names) in enumerate(own.items()):  # which name a patient of this collection only
        elsewhere = films.assign(patient_from=source, patient_id=names, group=names)
        settings = write_run(elsewhere, prints, trained=range(8), name=f"run{number}")
        check_unseen(elsewhere, others, settings)


@pytest.mark.parametrize(("source", "warned"), [("dicom_", True), ("patient ", False)])
def test_patients_of_two_collections_that_only_dicom_knows_are_not_compared_which_is_said(
        collection, write_run, caplog, source, warned):
    films, prints = collection
    ids = [f"{source}{row:05d}" for row in range(8)]
    films = films.assign(patient_id=ids, patient_from="PatientID", excluded="")
    folder = write_run(films, prints, trained=range(8)).WEIGHTS.parent
    others = make_fingerprints(np.random.default_rng(1), 8)
    found = exclude_known(films.assign(split="validation"), others, "elsewhere", folder)
    assert found["split"].eq("validation").all() == warned
    assert ("PatientID only cannot be compared" in caplog.text) == warned


def test_what_the_weights_of_the_weights_were_trained_on_counts(collection, write_run, caplog):
    films, prints = collection
    first = write_run(films, prints, trained=range(5), name="first")
    others = films.assign(patient_id=[f"other {number}" for number in range(8)])
    settings = write_run(others, make_fingerprints(np.random.default_rng(1), 8), range(4), weights=first.WEIGHTS)
    with pytest.raises(UserError, match="1 of the 4 held-out patients"):
        check_unseen(films, prints, settings)
    folder = settings.WEIGHTS.parent
    assert list_seen(films["path"], list(prints), folder) == [True] * 5 + [False] * 3
    assert "unknown" not in caplog.text
    (first.WEIGHTS.parent / "split.csv").unlink()
    check_unseen(films, prints, settings)
    assert f"{first.WEIGHTS.parent}: it is unknown what its weights were trained on" in caplog.text
    assert "none of the held-out" not in caplog.text, "which nobody knows"
    assert list_seen(films["path"], [*prints[:7], None], folder) == ["unknown"] * 8
    caplog.clear()
    np.save(folder / "fingerprints.npy", prints[:, :1])
    assert list_seen(films["path"], list(prints), folder) == ["unknown"] * 8
    assert "no complete folder of a run of this version" in caplog.text


def save(array):
    """The bytes of a NumPy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


PRINTS = make_fingerprints(np.random.default_rng(0), 8)
HEADER = "path,patient_id,split\n"
ROWS = [f"{number},{number},train\n" for number in range(9)]
CLAIMED = save(PRINTS).replace(b"(8, ", b"(8888888888, ", 1).replace(b" " * 9, b"", 1)  # more than any disk holds


@pytest.mark.parametrize(("name", "content"), [
    *[("split.csv", text) for text in (
        "", HEADER, "path,patient_id\n" + "a,b\n" * 8, "path,split\n" + "a,train\n" * 8, "".join(ROWS[:8]),
        HEADER + "".join(ROWS[:7]), HEADER + "".join(ROWS), HEADER + "".join(ROWS[:7]) + "8,8,train,x\n",
        HEADER + "".join(ROWS[:8]).replace("train", "test"), "path,patient_id,fold\n" + "a,b,excluded\n" * 8,
        b"\x89PNG\xff", b"\0" * 99, "path,path,patient_id,split\n" + "a,b,c,train\n" * 8, HEADER + '"' * 99)],
    *[("fingerprints.npy", text) for text in (b"", b"text", save(PRINTS)[:-1], save(PRINTS)[:50], CLAIMED)],
    *[("fingerprints.npy", save(array)) for array in (
        PRINTS[:7], PRINTS[:, 0], PRINTS.real, PRINTS * np.nan, 3, np.array([{}] * 8))],
    *[("settings.json", text) for text in (
        "", "[]", "{", '{"constants": []}', '{"constants": {}}', '{"constants": {"WEIGHTS": 3}}', "[" * 10**5,
        '{"constants": {"WEIGHTS": ["a"]}}', '{"constants": {"WEIGHTS": "a"}, "weights": {"origin": "a"}}',
        json.dumps({"constants": {"WEIGHTS": "x" * 10**6}}))],
])
def test_what_a_damaged_run_was_trained_on_is_not_guessed(collection, write_run, name, content):
    """The sentence names the file, and nothing of Python or of a library."""
    settings = write_run(*collection, trained=range(8))
    content = content.encode() if isinstance(content, str) else content
    (settings.WEIGHTS.parent / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        check_unseen(*collection, settings)
    assert not re.search(r"Error|Errno|Traceback|object|dtype|\n", str(caught.value))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("weights", ["/", "", "nowhere", "x" * 4000, "~no such user/x", "/dev/null", "run"])
def test_weights_from_elsewhere_are_unknown(collection, write_run, caplog, weights):
    settings = write_run(*collection, trained=range(4), weights=weights)
    check_unseen(*collection, settings)
    assert "it is unknown what its weights were trained on" in caplog.text


def test_a_run_that_started_from_itself_is_unknown(collection, write_run, caplog):
    """As when an edited run has replaced the one from which it started."""
    films, prints = collection
    settings = write_run(films, prints, trained=range(4))
    file = settings.WEIGHTS.parent / "settings.json"
    file.write_text(file.read_text().replace("imagenet", str(settings.WEIGHTS)))
    check_unseen(films, prints, settings)
    assert "is unknown" in caplog.text


def test_a_new_film_is_known_by_its_picture_or_by_the_patient_in_its_name(collection, write_run, caplog):
    films, prints = collection
    names = ["mias_001", "A_1109", *films["patient_id"][2:]]
    settings = write_run(films.assign(patient_id=names, group=names), prints, trained=range(4))
    paths = ["new/mdb002.png", "new/A_1109_1.LEFT_CC.png", "A_1110_1.LEFT_CC.png", "patient 3", "000003.png",
             "held out.png", "copy.png", "unreadable.png"]
    new = make_fingerprints(np.random.default_rng(1), 5)
    pictures = [*new, prints[5], turn_fingerprints(prints[3], 123, mirrored=True), None]
    seen = list_seen(paths, pictures, settings.WEIGHTS.parent)
    assert seen == [True, True, False, False, False, False, True, "unknown"]
    assert "the model was trained on 3 of 8 images or their patients" in caplog.text


def test_imagenet_weights_are_known_by_what_keras_publishes():
    for name in ("ResNet50", "VGG16"):
        source = inspect.getsource(sys.modules[getattr(common.keras.applications, name).__module__])
        (digest,) = (digest for digest, model in splits.IMAGENET.items() if model == name and len(digest) == 32)
        assert digest in source


@pytest.mark.parametrize("known_by", ["file", "arrays", "nothing"])
def test_imagenet_weights_by_path_are_imagenet_and_nobody_is_told_that_it_is_unknown(
        collection, tmp_path, monkeypatch, caplog, known_by):
    """In a file as Keras has it, or the same arrays in another file."""
    caplog.set_level("INFO")
    films, prints = collection
    backbone = build_backbone(None)
    backbone.save_weights(tmp_path / "a.weights.h5")
    settings = prepare(tmp_path, WEIGHTS=str(tmp_path / "a.weights.h5"))
    _, weights = common.load_backbone(build_backbone, films, prints, settings)
    assert weights["origin"].endswith("a.weights.h5")
    assert "unknown" in caplog.text
    caplog.clear()
    file = common.hashlib.md5((tmp_path / "a.weights.h5").read_bytes()).hexdigest()
    monkeypatch.setattr(splits, "IMAGENET", {"file": {file: "tiny"}, "arrays": {weights["sha256"]: "tiny"},
                                             "nothing": {"0": "tiny"}}[known_by])
    _, weights = common.load_backbone(build_backbone, films, prints, settings)
    assert (weights["origin"] == "imagenet") == ("unknown" not in caplog.text) == (known_by != "nothing")
    assert weights["pretrained"]
