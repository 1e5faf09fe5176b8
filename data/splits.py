"""Who is trained on, validated on and tested on, and what a model was trained on already."""
import os
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold

from data import UserError, log
from data.duplicates import RINGS, WAVES, find_groups
from data.runs import REMEDY, is_text, read_array, read_json, read_table

FOLDS = 5  # parts of the patients, one of which is held out
HERE = Path(__file__).resolve().parent.parent
SETTINGS = {"constants": {"WEIGHTS": lambda v: v is None or is_text(v)}}  # of a run that is started from


def check_folds(films):
    """Raise UserError where a class has fewer than FOLDS groups, or patients before there are groups."""
    patients = films.groupby("label")["group" if "group" in films else "patient_id"].nunique()
    if films["split"].eq("").all() and patients.min() < FOLDS:
        raise UserError(
            f"DATA_DIR has {patients.min()} {patients.idxmin()} patients (those who share a picture count"
            f" once), but {FOLDS} folds need {FOLDS} or more of each class: add patients, or give a split, as a"
            " column split with train and validation in labels.csv or as folders train/ and val/."
        )


def find_known(films, side, earlier):
    """For each film of a side the path of a film of the same group on one of the sides `earlier`, else NaN."""
    paths = films["path"].where(films["split"].isin(earlier))
    return paths.groupby(films["group"]).transform("first").where(films["split"].eq(side))


def split_patients(films, fold, seed):
    """The table with split "train", "validation" or "left out", fold, trained_on and left_out.

    Without a given split all films, those left out too, are in a fold, "0" to "4"; number `fold` is held out.
    Validation films of a group that is trained on are left out; trained_on is the path of one such film. A given
    split may have a side "test", too, which loses what is trained or validated on.
    """
    films = films.assign(trained_on="", fold="")
    if films["split"].eq("").all():
        check_folds(films)
        splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
        for number, (_, rows) in enumerate(splitter.split(films, films["label"], films["group"])):
            films.loc[films.index[rows], "fold"] = str(number)
        films["split"] = np.where(films["fold"].eq(str(fold)), "validation", "train")
    films.loc[films["left_out"].ne(""), "split"] = "left out"
    for side, earlier in (("validation", ["train"]), ("test", ["train", "validation"])):
        known, held_out = find_known(films, side, earlier), films["split"].eq(side)
        leaks = known.notna()  # none between folds
        films.loc[leaks, "trained_on"] = known[leaks]
        use = "trained on" if side == "validation" else "trained or validated on"
        films.loc[leaks, ["split", "left_out"]] = "left out", f"its patient or picture is {use}"
        if leaks.any():
            log.warning("%d of %d %s films are left out: they show a patient or a picture that is %s (leaks.csv)",
                        leaks.sum(), held_out.sum(), side, use)
    return films


def check_sides(films, sides=("train", "validation"), every_fold=False):
    """Tell how many films each side has; raises UserError where one, or any fold, lacks a class."""
    for side in ("train", "validation", "test"):
        counts = films[films["split"].eq(side)].groupby("label")["group"].agg(["size", "nunique"])
        if len(counts):
            log.info("%-10s %s", side, ", ".join(f"{label} {size} films of {patients} patients"
                                                 for label, size, patients in counts.itertuples()))
    reasons = films.loc[films["left_out"].ne(""), "left_out"].value_counts()
    left_out = "".join(f"; {count} films are left out: {reason}" for reason, count in reasons.items())
    if films["trained_on"].ne("").any() and not films["split"].eq("validation").any():
        raise UserError(f"nothing is left of the validation side{left_out} (leaks.csv names them): move whole"
                        " patients to that side, or remove the split, so that FOLD holds patients out.")
    folds = films[films["left_out"].eq("")].groupby("fold") if every_fold else []
    for number, fold in folds:
        if fold["label"].nunique() < films["label"].nunique():
            raise UserError(f"fold {number} has films of one class only{left_out}: add patients, or run the other"
                            " folds one by one.")
    for side, label in product((*sides, *{"test"} & {*films["split"]}), films["label"].unique()):
        if not (films["split"].eq(side) & films["label"].eq(label)).any():
            raise UserError(f"the {side} side has no {label} film{left_out}: check DATA_DIR, CROP, FOLD.")


def read_trained(file):
    """[(films, fingerprints)] that a model file was trained on, in its own run and in those it started from.

    Raises UserError where a file of these runs is damaged.
    """
    found, earlier = [], set()
    while True:
        files = [file.parent / name for name in ("split.csv", "fingerprints.npy", "settings.json")]
        if file in earlier or not all(map(os.path.isfile, files)):  # or replaced by a model that started from it
            log.warning("%s does not lie in the folder of a run: whether it has seen these films is unknown", file)
            return found
        earlier.add(file)
        films = read_table(files[0], ["path", "patient_id"]).assign(left_out="")
        prints = read_array(files[1], np.complex64, (len(films), 2, RINGS, WAVES))
        if "split" in films:
            trained = films["split"].eq("train")
        else:  # a result of all folds: what was not left out was trained on in some fold
            trained = read_table(files[0], ["fold"])["fold"].ne("left out")
        rows = np.flatnonzero(trained)
        if len(rows) == 0 or np.linalg.norm(prints, axis=(2, 3)).max() > 1.001:
            raise UserError(f"{files[0]} and fingerprints.npy do not tell what was trained on: {REMEDY}.")
        found.append((films.iloc[rows].assign(split="train"), prints[rows]))
        weights = read_json(files[2], SETTINGS)["constants"]["WEIGHTS"]
        if weights in (None, "imagenet"):
            return found
        file = HERE / os.path.expanduser(weights)


def add_trained(films, fingerprints, collection, trained):
    """The films of a collection, then those that were trained on (see read_trained), in groups.

    What stands for a patient in one collection only, a path or a number, gets the collection's name before.
    """
    numbered = films["patient_from"].eq("unknown") | films["patient_id"].str.startswith("dicom_")
    films = films.assign(patient_id=films["patient_id"].mask(numbered, f"{collection}: " + films["patient_id"]))
    tables, prints = zip((films, fingerprints), *trained, strict=True)
    return find_groups(pd.concat(tables, ignore_index=True), np.concatenate(prints))


def check_unseen(films, fingerprints, settings):
    """Raise UserError where WEIGHTS were trained on held-out patients or their pictures, in this run or before."""
    if settings.WEIGHTS in (None, "imagenet") or not (trained := read_trained(settings.WEIGHTS)):
        return
    folds = films["fold"].ne("") & films["split"].ne("left out") & (settings.FOLD == "all")
    held_out = films["split"].isin(["validation", "test"]) | folds
    films = films[held_out].assign(split="validation")
    both = add_trained(films, fingerprints[np.flatnonzero(held_out)], settings.DATA_DIR.name, trained)
    known = find_known(both, "validation", ["train"]).iloc[: len(films)].notna().to_numpy()
    if known.any():
        raise UserError(f"WEIGHTS: {settings.WEIGHTS} was trained on {films['group'][known].nunique()} of the"
                        f" {films['group'].nunique()} held-out patients, so its results would look better than"
                        " they are: use the FOLD and SEED of that run, or other weights.")
    log.info("none of the held-out patients is in the training side of %s", settings.WEIGHTS.parent.name)


def leave_out_known(films, fingerprints, collection, source):
    """The films of another collection as split_patients() gives them: what a run was trained on is left out.

    films: with split "validation"; collection: its name; source: the folder of the run.
    """
    trained = read_trained(source / "model.keras")
    both = split_patients(add_trained(films, fingerprints, collection, trained), None, None)
    films, seen = both.iloc[: len(films)], both["patient_id"].iloc[len(films) :]
    if (named := films["trained_on"].ne("") & films["patient_id"].isin(seen)).any():
        log.warning("%d of the films that are left out have a patient_id of the training side: where it means"
                    " another patient here, change it in labels.csv", named.sum())
    return films
