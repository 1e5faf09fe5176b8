"""What a model was trained on: known by the patient and by the picture, in its own run and in those before."""
import json
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
    (first.WEIGHTS.parent / "split.csv").unlink()
    check_unseen(films, prints, settings)
    assert f"{first.WEIGHTS} does not lie in the folder of a run" in caplog.text
