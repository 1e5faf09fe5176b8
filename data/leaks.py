"""What a model was trained on already: such films are no test of it."""
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd

from data import UserError, log
from data.duplicates import find_groups, find_known, split_patients

HERE = Path(__file__).resolve().parent.parent


def read_trained(file):
    """[(films, fingerprints)] that a model file was trained on, in its own run and in those it started from."""
    files = [file.with_name(name) for name in ("split.csv", "fingerprints.npy", "settings.json")]
    if not all(map(Path.is_file, files)):
        log.warning("%s does not lie in the folder of a run: whether it has seen these films is unknown", file)
        return []
    films = pd.read_csv(files[0], dtype=str, keep_default_na=False).assign(left_out="")
    # a result of all folds has no column split: what was not left out was trained on in some fold
    rows = np.flatnonzero(films["split"] == "train" if "split" in films else films["fold"] != "left out")
    found = [(films.iloc[rows].assign(split="train"), np.load(files[1])[rows])]
    weights = json.loads(files[2].read_text("utf-8"))["constants"]["WEIGHTS"]
    return found if weights in (None, "imagenet") else found + read_trained(HERE / os.path.expanduser(weights))


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
