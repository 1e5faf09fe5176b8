"""Which films are in the training, validation and test set, and which films a model was trained on."""
import hashlib
import os
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from data import CLASSES, UserError, list_some, log
from data.duplicates import find_groups
from data.patients import TEXT
from data.names import first_known, match_patients
from data.runs import REMEDY, is_bool, is_text, read_array, read_json, read_table

FOLDS = 5  # parts of the patients, one of which is held out
SETS = {"train": "training set", "validation": "validation set", "test": "test set"}
HERE = Path(__file__).resolve().parent.parent
SETTINGS = {  # what is used of the settings.json of a run that another started from
    "constants": {"WEIGHTS": lambda value: value is None or is_text(value)},
    "weights": {"origin": is_text, "pretrained": is_bool},
}
TESTED = "its patient or picture is in the test set"  # reasons for which a film is excluded
TRAINED = "its patient or picture is in the training set"
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
            f"DATA_DIR has {patients.min()} patients with {patients.idxmin()} mammograms{but}. Patients who share"
            f" a picture count once. {FOLDS} folds need {FOLDS} of each class: add patients, or bring a validation"
            " set (a column split in labels.csv, or folders train/ and val/).")


def find_first(films, chosen):
    """For each film the path of the first film of its group that is `chosen` (bool), NaN where there is none."""
    return films["path"].where(chosen).groupby(films["group"]).transform("first")


def exclude(films, shown, column, reason):
    """Exclude films from their sets, in place, unless they are excluded already.

    shown: for each film the path of a film of its group, which goes into `column`; NaN keeps the film.
    """
    leaks = shown.notna() & films["excluded"].eq("")
    films.loc[leaks, column] = shown[leaks]
    films.loc[leaks, ["split", "excluded"]] = "excluded", reason


def deal_folds(films, seed):
    """The fold of each film, "0" to "4", as a Series: whole groups, stratified by class. seed: SPLIT_SEED."""
    folds = pd.Series("", films.index)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    for number, (_, rows) in enumerate(splitter.split(films, films["label"], films["group"])):
        folds.iloc[rows] = str(number)
    return folds


def split_patients(films, fold, seed):
    """The table with split "train", "validation", "test" or "excluded", and fold, tested_on, trained_on, excluded.

    - A test set that comes with the data stays whole. Films of other sets that show one of its patients or
      pictures are excluded. tested_on is the path of such a test film.
    - A validation set that comes with the data loses films that show a patient or a picture of the training set.
      trained_on is the path of such a training film.
    - Without a validation set, the training films are dealt into folds, "0" to "4". The fold `fold` is held out.
      Films with a reason in excluded are dealt, too, so that the folds do not depend on CROP.

    films: path, label, group, excluded, and split as the data gives it ("", "train", "validation" or "test").
    fold: 0 to FOLDS - 1. seed: SPLIT_SEED. Raises UserError where there are too few patients.
    """
    check_folds(films)
    films = films.assign(split=films["split"].replace("", "train"), fold="", tested_on="", trained_on="")
    tested_on = find_first(films, films["split"].eq("test")).where(films["split"].ne("test"))

    if not has_validation(films):
        dealt = films[films["split"].eq("train") & tested_on.isna()]
        films.loc[dealt.index, "fold"] = deal_folds(dealt, seed)
        films.loc[films["fold"].eq(str(fold)), "split"] = "validation"

    films.loc[films["excluded"].ne(""), "split"] = "excluded"
    exclude(films, tested_on, "tested_on", TESTED)
    trained_on = find_first(films, films["split"].eq("train")).where(films["split"].eq("validation"))
    exclude(films, trained_on, "trained_on", TRAINED)
    return films


def count_classes(films):
    """Mammograms and patients of each class as text: 12 benign mammograms of 6 patients and 8 malignant ..."""
    counts = films.groupby("label")["group"].agg(["size", "nunique"])
    return " and ".join(f"{mammograms} {label} mammograms of {patients} patients"
                        for label, mammograms, patients in counts.itertuples())


def check_sides(films, sides=("train", "validation"), every_fold=False):
    """Print how many films each set has, and how many are excluded and why.

    Raises UserError where one of `sides`, or the test set, lacks a class; with every_fold also where a fold does.
    """
    for side, name in SETS.items():
        if films["split"].eq(side).any():
            log.info("%s: %s", name, count_classes(films[films["split"].eq(side)]))

    excluded = films[films["excluded"].ne("")]
    leaks = excluded["tested_on"].ne("") | excluded["trained_on"].ne("")
    reasons = ""
    for reason, rows in excluded.groupby("excluded"):
        if leaks[rows.index].any():
            reason += " (leaks.csv)"
        log.warning("excluded: %s: %s: %s", count_classes(rows), reason, list_some(rows["path"].tolist()))
        reasons += f"; {len(rows)} images are excluded: {reason}"

    used = films[films["excluded"].eq("")]
    classes = used[used["fold"].ne("")].groupby("fold")["label"].nunique()
    if every_fold and classes.min() < len(CLASSES):
        raise UserError(f"fold {classes.idxmin()} has images of one class only{reasons}: add patients, or run the"
                        " other folds one by one.")
    remedy = "check DATA_DIR, CROP, FOLD"
    if leaks.any():
        remedy = "move whole patients to one set, or remove the split, so that FOLD holds patients out"
    if used["split"].eq("test").any():
        sides = (*sides, "test")
    for side, label in product(sides, CLASSES):
        if not (used["split"].eq(side) & used["label"].eq(label)).any():
            raise UserError(f"the {SETS[side]} has no {label} image{reasons}: {remedy}.")


# ---- what a model has seen ---------------------------------------------------------------------


def is_imagenet(file, digest):
    """Whether a weights file is one of IMAGENET, by its MD5 or by the SHA-256 of its arrays (`digest`)."""
    with open(file, "rb") as content:
        return digest in IMAGENET or hashlib.file_digest(content, "md5").hexdigest() in IMAGENET


def read_trained(folder, shape):
    """(trained, prints, complete): what the model of a run has seen, in its run and in those that it started from.

    trained: the films, with path, patient_id and more. prints: their fingerprints, one array for each run.
    complete: False if a file is missing or older, or if weights are neither from a run nor from ImageNet.

    shape: that of the fingerprints of a film. Raises UserError if a file of these runs is damaged.
    """
    tables, prints, earlier = [pd.DataFrame(columns=["path", "patient_id"], dtype=str)], [], set()
    while True:
        files = [folder / name for name in ("split.csv", "fingerprints.npy", "settings.json")]
        is_whole = folder not in earlier and all(map(os.path.isfile, files))  # a run may replace an earlier one
        if is_whole:
            films = read_table(files[0], ["path", "patient_id"])
            stored = read_array(files[1], np.complex64, (len(films), *[None] * len(shape)))
        if not is_whole or stored.shape[1:] != shape:
            log.warning("%s: it is unknown what its weights were trained on, as this is no complete folder of a"
                        " run of this version", folder)
            return pd.concat(tables), prints, False

        sets = films.get("split", films.get("fold", pd.Series(dtype=str)))
        trained = sets.isin(["train", *map(str, range(FOLDS))])  # each of all folds was trained on in some other
        if not trained.any():
            raise UserError(f"{files[0]} has no image of a training set: {REMEDY}.")
        tables.append(films[trained])
        prints.append(stored[np.flatnonzero(trained)])

        recorded = read_json(files[2], SETTINGS)
        if recorded["weights"]["origin"] == "imagenet" or not recorded["weights"]["pretrained"]:
            return pd.concat(tables), prints, True
        earlier.add(folder)
        folder = (HERE / os.path.expanduser(recorded["constants"]["WEIGHTS"] or "")).parent


def find_seen(films, fingerprints, collection, trained, prints):
    """(films, seen): the films in groups, and for each the path of a film of its group in `trained`, else NaN.

    collection: a prefix of patients that only these films know, such as case1 of case1_L_CC.png.
    trained, prints: see read_trained.
    """
    own = films["patient_from"].isin(["unknown", TEXT]) | films["patient_id"].str.startswith("dicom_")
    films = films.assign(patient_id=films["patient_id"].mask(own, f"{collection}: " + films["patient_id"]))
    both = find_groups(pd.concat([films, trained], ignore_index=True), np.concatenate([fingerprints, *prints]))
    seen = find_first(both, both.index >= len(films))
    return both[: len(films)], seen[: len(films)]


def check_unseen(films, fingerprints, settings):
    """Raise UserError where WEIGHTS were trained on held-out patients or their pictures, in any run so far."""
    folder = settings.WEIGHTS.parent
    trained, prints, complete = read_trained(folder, np.shape(fingerprints)[1:])
    if trained.empty:
        return

    dealt = films["fold"].ne("") & films["split"].ne("excluded")
    held_out = films["split"].isin(["validation", "test"]) | (dealt & (settings.FOLD == "all"))
    films, fingerprints = films[held_out], fingerprints[np.flatnonzero(held_out)]
    seen = find_seen(films, fingerprints, settings.DATA_DIR.name, trained, prints)[1].notna().to_numpy()
    if seen.any():
        raise UserError(f"WEIGHTS: {settings.WEIGHTS} was trained on {films['group'][seen].nunique()} of the"
                        f" {films['group'].nunique()} held-out patients. Use the FOLD and SPLIT_SEED of that run,"
                        " or other weights.")
    if complete:
        log.info("none of the held-out patients is in the training set of %s", folder.name)


def exclude_known(films, fingerprints, collection, source):
    """The films of another collection as split_patients() gives them: what a run has seen is excluded.

    films: with split "validation"; collection: its name; source: the folder of the run.
    """
    trained, prints, _ = read_trained(source, fingerprints.shape[1:])
    hidden = films["patient_id"].str.startswith("dicom_").any()
    if hidden and trained["patient_id"].str.startswith("dicom_").any():
        log.warning("patients known from PatientID only cannot be compared with those of the training set: if the"
                    " collections share patients, results look too good. Write patient_id into the labels.csv of"
                    " both")

    films, seen = find_seen(films, fingerprints, collection, trained, prints)
    films = films.assign(fold="", tested_on="", trained_on="")
    films.loc[films["excluded"].ne(""), "split"] = "excluded"
    exclude(films, seen, "trained_on", TRAINED)
    named = films["trained_on"].ne("") & films["patient_id"].isin(trained["patient_id"])
    if named.any():
        log.warning("%d of the excluded images have a patient_id of the training set: if it means another patient"
                    " here, change it in labels.csv", named.sum())
    return films


def list_seen(paths, fingerprints, folder):
    """Whether the model of a run has seen each film: a list of True, False and "unknown".

    True: the film shows a picture that was trained on, or its name the patient of a public collection that was.
    "unknown": the film is not readable, or not all that was trained on is known (see read_trained).

    paths: of loose files; fingerprints: of each, None where it is not readable; folder: that of the run.
    """
    films = pd.DataFrame({"path": [str(path) for path in paths]})
    patients = first_known(match_patients(films["path"]))
    films["patient_id"] = patients.fillna(films["path"])
    films["patient_from"] = np.where(patients.isna(), "unknown", "file name")

    answers = np.full(len(films), "unknown", object)
    readable = np.array([one is not None for one in fingerprints], bool)
    if readable.any():
        new = np.stack([one for one in fingerprints if one is not None])
        trained, known, complete = read_trained(folder, new.shape[1:])
        seen = find_seen(films[readable], new, "predict", trained, known)[1].notna()
        unseen = False if complete else "unknown"
        answers[readable] = [True if one else unseen for one in seen]
        if seen.any():
            log.warning("the model was trained on %d of %d images or their patients (trained_on): their"
                        " probabilities do not show how good it is", seen.sum(), len(paths))
    return answers.tolist()
