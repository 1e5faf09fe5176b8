"""Who is trained, validated and tested on, and what a model has seen already."""
import hashlib
import os
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from data import UserError, log
from data.duplicates import find_groups
from data.films import CLASSES, list_some
from data.names import first_known, match_patients
from data.runs import REMEDY, is_text, read_array, read_json, read_table

FOLDS = 5  # parts of the patients, one of which is held out
HERE = Path(__file__).resolve().parent.parent
SETTINGS = {  # what is used of the settings.json of a run that another started from
    "constants": {"WEIGHTS": lambda value: value is None or is_text(value)},
    "weights": {"origin": is_text, "pretrained": lambda value: isinstance(value, bool)},
}
IMAGENET = {  # hashes of ImageNet weights without top layers: the MD5 of a file, as keras.applications has it
    "4d473c1dd8becc155b73f8504c6f6626": "ResNet50",
    "6d6bbae143d832006294945121d1f1fc": "VGG16",
    # the same weights in a file of any format: the SHA-256 of all arrays in the order of the model
    "d9a27cc1fc7f975ef8cff49180e794ccd7c4bc868ebb49740803b3bbaa8dbefd": "VGG16",
}


# ---- training, validation and test set ---------------------------------------------------------


def has_validation(films):
    """Whether the data brings its own validation set. If not, FOLD holds out a fifth of the training patients."""
    return films["split"].eq("validation").any()


def check_folds(films):
    """Raise UserError where a class has too few patients for FOLDS folds; those of the test set do not count.

    Of films without the column `group`, which are not read yet, every patient_id counts.
    """
    patient = "group" if "group" in films else "patient_id"
    tested = films[patient].isin(films[patient][films["split"].eq("test")])
    patients = films[~tested].groupby("label")[patient].nunique().reindex(CLASSES, fill_value=0)
    if not has_validation(films) and patients.min() < FOLDS:
        but = " outside of its test set" if tested.any() else ""
        raise UserError(
            f"DATA_DIR has {patients.min()} {patients.idxmin()} patients{but} (those who share a picture count"
            f" once), but {FOLDS} folds need {FOLDS} or more of each class: add patients, or give a validation"
            " set, as a column split with train and validation in labels.csv or as folders train/ and val/."
        )


def find_first(films, chosen):
    """For each film the path of the first film of its group that is `chosen` (bool), NaN where there is none."""
    return films["path"].where(chosen).groupby(films["group"]).transform("first")


def exclude(films, shown, column, reason):
    """Exclude films from their sets, in place, unless they are excluded already.

    shown: for each film the path of a film of its group, which goes into `column`; NaN keeps the film.
    """
    leaks = shown.notna() & films["left_out"].eq("")
    films.loc[leaks, column] = shown[leaks]
    films.loc[leaks, ["split", "left_out"]] = "left out", reason


def split_patients(films, fold, seed):
    """The table with split "train", "validation", "test" or "left out", and fold, tested_on, trained_on, left_out.

    A test set that comes with the data stays whole: films of other sets that show one of its patients or pictures
    are excluded, and tested_on is the path of such a test film. A validation set that comes with the data loses
    films that show a patient or a picture of the training set; trained_on is the path of such a training film.
    Without one, the training films are dealt into folds, "0" to "4", and the number `fold` is held out for
    validation. Films with a reason in left_out are dealt, too, so that the folds do not depend on CROP.

    films: path, label, group, left_out, and split as the data gives it ("", "train", "validation" or "test").
    fold: 0 to FOLDS - 1. seed: SPLIT_SEED. Raises UserError where there are too few patients.
    """
    check_folds(films)
    films = films.assign(split=films["split"].replace("", "train"), fold="", tested_on="", trained_on="")
    tested_on = find_first(films, films["split"].eq("test")).where(films["split"].ne("test"))
    if not has_validation(films):
        dealt = films[films["split"].eq("train") & tested_on.isna()]
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        for number, (_, rows) in enumerate(splitter.split(dealt, dealt["label"], dealt["group"])):
            films.loc[dealt.index[rows], "fold"] = str(number)
        films.loc[films["fold"].eq(str(fold)), "split"] = "validation"
    films.loc[films["left_out"].ne(""), "split"] = "left out"
    exclude(films, tested_on, "tested_on", "its patient or picture is in the test set")
    trained_on = find_first(films, films["split"].eq("train")).where(films["split"].eq("validation"))
    exclude(films, trained_on, "trained_on", "its patient or picture is trained on")
    return films


def count_films(films):
    """Films and patients of each class as text: benign 12 films of 6 patients, malignant ..."""
    counts = films.groupby("label")["group"].agg(["size", "nunique"])
    return ", ".join(f"{label} {size} films of {patients} patients"
                     for label, size, patients in counts.itertuples())


def check_sides(films, sides=("train", "validation"), every_fold=False):
    """Print how many films each set has, and how many are excluded and why.

    Raises UserError where a set, one of `sides` or the test set, or any fold lacks a class.
    """
    for side in ("train", "validation", "test"):
        if films["split"].eq(side).any():
            log.info("%-10s %s", side, count_films(films[films["split"].eq(side)]))
    left_out = films[films["left_out"].ne("")]
    leaks = left_out["tested_on"].ne("") | left_out["trained_on"].ne("")
    excluded = ""
    for reason, rows in left_out.groupby("left_out"):
        listed = " (leaks.csv)" if leaks[rows.index].any() else ""
        log.warning("%-10s %s: %s%s: %s", "excluded", count_films(rows), reason, listed,
                    list_some(rows["path"].tolist()))
        excluded += f"; {len(rows)} films are excluded: {reason}{listed}"
    remedy = "check DATA_DIR, CROP, FOLD"
    if leaks.any():
        remedy = "move whole patients to one set, or remove the split, so that FOLD holds patients out"
    used = films[films["left_out"].eq("")]
    folds = used[used["fold"].ne("")].groupby("fold") if every_fold else []
    for number, fold in folds:
        if fold["label"].nunique() < len(CLASSES):
            raise UserError(f"fold {number} has films of one class only{excluded}: add patients, or run the other"
                            " folds one by one.")
    for side, label in product((*sides, *{"test"} & {*used["split"]}), CLASSES):
        if not (used["split"].eq(side) & used["label"].eq(label)).any():
            name = "training" if side == "train" else side
            raise UserError(f"the {name} set has no {label} film{excluded}: {remedy}.")


# ---- what a model has seen ---------------------------------------------------------------------


def is_imagenet(file, digest):
    """Whether a weights file is one of IMAGENET, by its MD5 or by the SHA-256 of its arrays (`digest`)."""
    with open(file, "rb") as content:
        return bool({digest, hashlib.file_digest(content, "md5").hexdigest()} & {*IMAGENET})


def read_trained(folder, shape):
    """(trained, prints, complete): what the model of a run has seen, in its run and in those that it started from.

    trained: the films, with path, patient_id and more. prints: their fingerprints, a list of an array a run.
    complete: False where a file is missing or older, or where weights are neither from a run nor from ImageNet.
    shape: that of the fingerprints of a film. Raises UserError where a file of these runs is damaged.
    """
    tables, prints, earlier = [pd.DataFrame(columns=["path", "patient_id"], dtype=str)], [], set()
    while True:
        files = [folder / name for name in ("split.csv", "fingerprints.npy", "settings.json")]
        is_whole = folder not in earlier and all(map(os.path.isfile, files))  # a run may replace an earlier one
        if is_whole:
            films = read_table(files[0], ["path", "patient_id"])
            stored = read_array(files[1], np.complex64, (len(films), *[None] * len(shape)))
        if not is_whole or stored.shape[1:] != shape:
            log.warning("%s is not the whole folder of a run, or is of an older version: what its weights were"
                        " trained on is unknown", folder)
            return pd.concat(tables), prints, False

        if "split" in films:
            trained = films["split"].eq("train")
        else:  # a result of all folds: each fold was trained on in some other
            trained = read_table(files[0], ["fold"])["fold"].isin(map(str, range(FOLDS)))
        if not trained.any():
            raise UserError(f"{files[0]} does not tell what was trained on: {REMEDY}.")
        tables.append(films[trained])
        prints.append(stored[np.flatnonzero(trained)])

        recorded = read_json(files[2], SETTINGS)
        if recorded["weights"]["origin"] == "imagenet" or not recorded["weights"]["pretrained"]:
            return pd.concat(tables), prints, True
        earlier.add(folder)
        folder = (HERE / os.path.expanduser(recorded["constants"]["WEIGHTS"] or "")).parent


def find_seen(films, fingerprints, collection, trained, prints):
    """(films, seen): the films in groups, and for each the path of a film of its group in `trained`, else NaN.

    collection: goes before a path or a number that stands for a patient in these films only.
    trained, prints: see read_trained.
    """
    numbered = films["patient_from"].eq("unknown") | films["patient_id"].str.startswith("dicom_")
    films = films.assign(patient_id=films["patient_id"].mask(numbered, f"{collection}: " + films["patient_id"]))
    both = find_groups(pd.concat([films, trained], ignore_index=True), np.concatenate([fingerprints, *prints]))
    seen = find_first(both, both.index >= len(films))
    return both[: len(films)], seen[: len(films)]


def check_unseen(films, fingerprints, settings):
    """Raise UserError where WEIGHTS were trained on held-out patients or their pictures, in any run so far."""
    folder = settings.WEIGHTS.parent
    trained, prints, complete = read_trained(folder, np.shape(fingerprints)[1:])
    if trained.empty:
        return
    dealt = films["fold"].ne("") & films["split"].ne("left out")
    held_out = films["split"].isin(["validation", "test"]) | (dealt & (settings.FOLD == "all"))
    films, fingerprints = films[held_out], fingerprints[np.flatnonzero(held_out)]
    seen = find_seen(films, fingerprints, settings.DATA_DIR.name, trained, prints)[1].notna().to_numpy()
    if seen.any():
        raise UserError(f"WEIGHTS: {settings.WEIGHTS} was trained on {films['group'][seen].nunique()} of the"
                        f" {films['group'].nunique()} held-out patients, so its results would look better than"
                        " they are: use the FOLD and SPLIT_SEED of that run, or other weights.")
    if complete:
        log.info("none of the held-out patients is in the training set of %s", folder.name)


def leave_out_known(films, fingerprints, collection, source):
    """The films of another collection as split_patients() gives them: what a run has seen is excluded.

    films: with split "validation"; collection: its name; source: the folder of the run.
    """
    trained, prints, _ = read_trained(source, fingerprints.shape[1:])
    films, seen = find_seen(films, fingerprints, collection, trained, prints)
    films = films.assign(fold="", tested_on="", trained_on="")
    films.loc[films["left_out"].ne(""), "split"] = "left out"
    exclude(films, seen, "trained_on", "its patient or picture is trained on")
    if (named := films["trained_on"].ne("") & films["patient_id"].isin(trained["patient_id"])).any():
        log.warning("%d of the films that are excluded have a patient_id of the training set: where it means"
                    " another patient here, change it in labels.csv", named.sum())
    return films


def list_seen(paths, fingerprints, folder):
    """Whether the model of a run has seen each film: a list of True, False and "unknown".

    True: the film shows a picture that was trained on, or its name the patient of a public collection that was.
    "unknown": the film is not readable, or not all that was trained on is known (see read_trained).

    paths: of loose files; fingerprints: of each, None where it is not readable; folder: that of the run.
    """
    readable = [place for place, one in enumerate(fingerprints) if one is not None]
    answers = np.full(len(paths), "unknown", object)
    if readable:
        new = np.stack([fingerprints[place] for place in readable])
        trained, prints, complete = read_trained(folder, new.shape[1:])
        films = pd.DataFrame({"path": [str(paths[place]) for place in readable]})
        patients = first_known(match_patients(films["path"]))
        films["patient_from"] = np.where(patients.isna(), "unknown", "file name")
        films["patient_id"] = patients.fillna(films["path"])
        seen = find_seen(films, new, "predict", trained, prints)[1].notna()
        unseen = False if complete else "unknown"
        answers[readable] = [True if known else unseen for known in seen]
        if seen.any():
            log.warning("%d of %d films show a picture or a patient that the model was trained on (trained_on): it"
                        " knows their labels, so their probabilities say nothing of what it can do", seen.sum(),
                        len(paths))
    return answers.tolist()
