"""Which films show the same picture, and the split that keeps them and their patients on one side."""
import mmap
from itertools import combinations_with_replacement, product

import cv2
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from data import UserError, log
from data.films import list_some

FOLDS = 5  # parts of the patients, one of which is held out
RINGS, ANGLES, WAVES = 24, 128, 23  # of a fingerprint: circles, points on each, frequencies kept
DUPLICATE_CORRELATION = 0.87  # of fingerprints: two patients reach 0.80, 99 % of duplicates exceed 0.89
SQUASHED_CORRELATION = 0.95  # of those of the squashed film: turned films share corners, and reach 0.88
BLOCK, BATCH = 1024, 2048  # films compared by magnitudes at once, pairs shifted at once
ROUNDING = 1e-5  # how far 32 bits may put a bound too low


def fingerprint(image, shape):
    """The texture on circles around the centre of a picture: complex64 (RINGS, WAVES), of norm 1.

    image: (S, S), uint8, uint16 or float of any scale; shape: the (height, width) in which a circle is round.
    Turning shifts the phases, mirroring turns them round. Waves are whitened, what stands out is damped.
    """
    size, angles = len(image), 2 * np.pi * np.arange(ANGLES) / ANGLES
    radii = (np.arange(RINGS) + 0.5)[:, None] / RINGS / 2  # of the shorter side
    across, down = (size * min(shape) / side for side in reversed(shape))
    x = (size / 2 - 0.5 + across * radii * np.cos(angles)).astype(np.float32)
    y = (size / 2 - 0.5 + down * radii * np.sin(angles)).astype(np.float32)
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigmaX=across / 100, sigmaY=down / 100)
    circles = cv2.remap(smooth, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    spectrum = np.fft.rfft(circles)[:, : WAVES + 1]
    spectrum *= np.arange(WAVES + 1) ** 1.5
    texture = np.fft.irfft(spectrum, ANGLES)
    texture = np.tanh(texture / (np.abs(texture).mean(axis=1, keepdims=True) + 1e-6)) * np.sqrt(radii)
    found = np.fft.rfft(texture)[:, 1 : WAVES + 1].astype(np.complex64)
    return found / (np.linalg.norm(found) + np.float32(1e-6))


def connect(edges, count):
    """The connected component of each of `count` nodes: int (count,); edges: int (2, E)."""
    return connected_components(coo_array((np.ones(len(edges[0])), edges), (count, count)), directed=False)[1]


def find_pictures(fingerprints, threshold, pictures):
    """The number of the picture that each film shows: int (N,), from those known so far.

    fingerprints: complex64 (N, RINGS, WAVES). The product of their magnitudes is never less than the correlation
    at any angle, plain or mirrored (Cauchy-Schwarz). Films of one picture are not compared again.
    """
    magnitudes = np.abs(fingerprints).reshape(len(fingerprints), -1)
    for top, left in combinations_with_replacement(range(0, len(magnitudes), BLOCK), 2):
        bounds = magnitudes[top : top + BLOCK] @ magnitudes[left : left + BLOCK].T
        pairs = np.argwhere(bounds >= threshold - ROUNDING).T
        pairs += [[top], [left]]
        while (apart := pictures[pairs[0]] != pictures[pairs[1]]).any():
            batch, pairs = np.split(pairs[:, apart], [BATCH], axis=1)
            first, second = fingerprints[batch]
            waves = np.stack([(first * second.conj()).sum(axis=1), (first * second).sum(axis=1)])
            shifted = np.fft.irfft(np.pad(waves, ((0, 0), (0, 0), (1, 0))), ANGLES) * ANGLES / 2
            duplicates = batch[:, shifted.max(axis=(0, 2)) >= threshold]
            pictures = connect(pictures[duplicates], len(pictures))[pictures]
    return pictures


def find_groups(films, fingerprints):
    """The table with its columns group (str), picture (int) and duplicate (bool).

    Films of one picture show the same. group is the patient_id of the first of all films of a patient and their
    duplicates. fingerprints: complex64 (N, 2, RINGS, WAVES), on circles that are round in the film and in its
    squashed image.
    """
    pictures = find_pictures(fingerprints[:, 0], DUPLICATE_CORRELATION, np.arange(len(films)))
    pictures = find_pictures(fingerprints[:, 1], SQUASHED_CORRELATION, pictures)
    if isinstance(fingerprints, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        fingerprints._mmap.madvise(mmap.MADV_DONTNEED)  # or its pages count as memory
    patients = films.groupby("patient_id").ngroup().to_numpy()
    groups = connect(np.stack([pictures, len(films) + patients]), 2 * len(films))[pictures]
    return films.assign(group=films.groupby(groups)["patient_id"].transform("first"), picture=pictures,
                        duplicate=np.bincount(pictures)[pictures] > 1)


def group_duplicates(films, fingerprints):
    """find_groups, and tell of duplicates, of those with different labels, and of patients with both classes."""
    films = find_groups(films, fingerprints)
    if films["duplicate"].any():
        log.info("%d films show the same picture as another; their patients stay on one side, and count as one",
                 films["duplicate"].sum())
    labels = films.groupby("picture")["label"].transform("nunique")
    if len(torn := films["path"][labels > 1]):
        log.warning("%d films show the same picture under both labels, one of which is wrong: %s", len(torn),
                    list_some(torn.tolist()))
    if mixed := films.groupby("group")["label"].nunique().gt(1).sum():
        log.info("%d patients have benign and malignant films", mixed)
    return films


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
