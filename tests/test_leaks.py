"""What a model was trained on: known by the patient and by the picture, in its own run and in those before."""
import io
import json
import re
import sys
import types

import numpy as np
import pytest
from test_duplicates import make_fingerprints, make_table, turn_fingerprints

from data import UserError
from data.splits import check_unseen


@pytest.fixture
def collection():
    """(films, fingerprints): eight films of as many patients, of which the last four are held out."""
    names = [f"patient {number}" for number in range(8)]
    sides = ["train"] * 4 + ["validation"] * 4
    films = make_table(names).assign(group=names, patient_from="labels.csv", split=sides, fold="0")
    return films, make_fingerprints(np.random.default_rng(0), 8)


@pytest.fixture
def write_run(tmp_path):
    """A function that leaves what a run does of its films; returns settings with which another starts from it."""

    def write(films, fingerprints, trained, name="run", weights="imagenet"):
        (tmp_path / name).mkdir()
        split = films.assign(split=np.where(films.index.isin(trained), "train", "validation"))
        split[["path", "patient_id", "split", "group"]].to_csv(tmp_path / name / "split.csv", index=False)
        np.save(tmp_path / name / "fingerprints.npy", fingerprints)
        (tmp_path / name / "settings.json").write_text(json.dumps({"constants": {"WEIGHTS": str(weights)}}))
        return types.SimpleNamespace(WEIGHTS=tmp_path / name / "model.keras", FOLD=0, DATA_DIR=tmp_path / "films")

    return write


def test_weights_that_have_seen_held_out_patients_or_their_pictures_are_refused(collection, write_run):
    films, prints = collection
    settings = write_run(films, prints, trained=range(5))
    with pytest.raises(UserError, match=r"^WEIGHTS: .* trained on 1 of the 4 held-out patients"):
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
        check_unseen(films.assign(split=["left out", *sides[1:]]), prints, settings)
    folds = films.assign(fold=[*"01234", *["left out"] * 3]).drop(columns="split")  # of a result of all folds
    folds[["path", "patient_id", "fold", "group"]].to_csv(settings.WEIGHTS.with_name("split.csv"), index=False)
    with pytest.raises(UserError, match="5 of the 8 held-out patients"):
        check_unseen(films, others, settings)
    given = films.assign(fold="", split=["train"] * 5 + ["validation"] * 3)
    check_unseen(given, prints, settings)  # FOLD is not used


def test_weights_that_have_not_seen_them_are_accepted(collection, write_run, caplog):
    caplog.set_level("INFO")
    films, prints = collection
    check_unseen(films, prints, write_run(films, prints, trained=range(4)))
    assert "none of the held-out patients" in caplog.text
    others = make_fingerprints(np.random.default_rng(1), 8)
    for number, source in enumerate(("unknown", "PatientID")):  # neither a file name nor a number is a patient
        names = films["path"] if source == "unknown" else [f"dicom_{row:05d}" for row in range(8)]
        elsewhere = films.assign(patient_from=source, patient_id=names, group=names)
        settings = write_run(elsewhere, prints, trained=range(8), name=f"run{number}")
        check_unseen(elsewhere, others, settings)


def test_what_the_weights_of_the_weights_were_trained_on_counts(collection, write_run, caplog):
    films, prints = collection
    first = write_run(films, prints, trained=range(5), name="first")
    others = films.assign(patient_id=[f"other {number}" for number in range(8)])
    settings = write_run(others, make_fingerprints(np.random.default_rng(1), 8), range(4), weights=first.WEIGHTS)
    with pytest.raises(UserError, match="1 of the 4 held-out patients"):
        check_unseen(films, prints, settings)
    assert "is unknown" not in caplog.text
    file = settings.WEIGHTS.parent / "settings.json"  # of the second run, which the first replaced meanwhile
    recorded = file.read_text()
    for model in (settings.WEIGHTS, first.WEIGHTS):
        (first.WEIGHTS.parent / "settings.json").write_text(json.dumps({"constants": {"WEIGHTS": str(model)}}))
        with pytest.raises(UserError, match="1 of the 4 held-out patients"):
            check_unseen(films, prints, settings)
        assert f"{model} does not lie in the folder of a run" in caplog.text
    assert file.read_text() == recorded
    (first.WEIGHTS.parent / "split.csv").unlink()
    check_unseen(films, prints, settings)
    assert f"{first.WEIGHTS} does not lie in the folder of a run" in caplog.text


class Bomb:
    """It goes off where a pickle is loaded."""

    def __reduce__(self):
        return sys.exit, ("loading a file runs what it holds",)


def save(array):
    """The bytes of a NumPy file."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


PRINTS = make_fingerprints(np.random.default_rng(0), 8)
HEADER = "path,patient_id,split\n"
ROWS = [f"{number},{number},train\n" for number in range(9)]
CLAIMED = save(PRINTS).replace(b"(8, 2,", b"(8888888888, 2,").replace(b" " * 9, b"", 1)  # more than any disk holds


@pytest.mark.parametrize(("name", "content"), [
    *[("split.csv", text) for text in (
        "", HEADER, "path,patient_id\n" + "a,b\n" * 8, "path,split\n" + "a,train\n" * 8, "".join(ROWS[:8]),
        HEADER + "".join(ROWS[:7]), HEADER + "".join(ROWS), HEADER + "".join(ROWS[:7]) + "8,8,train,x\n",
        HEADER + "".join(ROWS[:8]).replace("train", "test"), "path,patient_id,fold\n" + "a,b,left out\n" * 8,
        b"\x89PNG\xff", b"\0" * 99, "path,path,patient_id,split\n" + "a,b,c,train\n" * 8, HEADER + '"' * 99)],
    *[("fingerprints.npy", text) for text in (b"", b"text", save(PRINTS)[:-1], save(PRINTS)[:50], CLAIMED)],
    *[("fingerprints.npy", save(array)) for array in (
        PRINTS[:7], PRINTS[:, 0], PRINTS[:, :1], PRINTS.real, PRINTS * np.nan, PRINTS * 9, 3, np.array([Bomb()]))],
    *[("settings.json", text) for text in (
        "", "[]", "{", '{"constants": []}', '{"constants": {}}', '{"constants": {"WEIGHTS": 3}}', "[" * 10**5,
        '{"constants": {"WEIGHTS": ["a"]}}', json.dumps({"constants": {"WEIGHTS": "x" * 10**6}}))],
])
def test_what_was_trained_on_is_known_or_refused(collection, write_run, name, content):
    """Of a damaged or foreign run; the sentence names the file, and nothing of Python or of a library."""
    settings = write_run(*collection, trained=range(8))
    content = content.encode() if isinstance(content, str) else content
    (settings.WEIGHTS.parent / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        check_unseen(*collection, settings)
    assert not re.search(r"Error|Errno|Traceback|object|dtype|\n", str(caught.value))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("weights", ["/", "", "\0", "nowhere", "x" * 4000, "~no such user/x", "/dev/null", "run"])
def test_weights_from_elsewhere_are_unknown(collection, write_run, caplog, weights):
    settings = write_run(*collection, trained=range(4), weights=weights.replace("\0", "a" * 9))
    check_unseen(*collection, settings)
    assert "whether it has seen these films is unknown" in caplog.text
