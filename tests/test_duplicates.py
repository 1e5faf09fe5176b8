"""Films that show the same picture, and what they do to a split."""
import logging
import mmap
import re
import tracemalloc
from collections import Counter

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsClassifier

from data import UserError
from data.duplicates import fingerprint, group_duplicates
from data.splits import FOLDS, check_folds, check_sides, split_patients

CLASSES = ("benign", "malignant")


@pytest.fixture(scope="module")
def films(phantoms):
    """24 phantoms of 24 patients, 320 x 256."""
    made = []
    for seed in range(24):
        rng = np.random.default_rng((1, seed))
        view = ("CC", "MLO")[seed % 2]
        made.append(phantoms["make_view"](rng, view, "LEFT", seed % 3 / 2, 20, 0.2, False)[0])
    return made


def turn(film, degrees):
    height, width = film.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    return cv2.warpAffine(film, matrix, (width, height))


def encode(film, quality):
    return cv2.imdecode(cv2.imencode(".jpg", film, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_GRAYSCALE)


def tone(film, change):
    return np.clip(np.rint(255 * change(film / 255)), 0, 255).astype(np.uint8)


COPIES = {
    "the same bytes": lambda film: film,
    "quarter turn": lambda film: np.ascontiguousarray(np.rot90(film)),
    "mirrored": lambda film: cv2.flip(film, 1),
    "upside down": lambda film: cv2.flip(film, 0),
    "turned by 5 degrees": lambda film: turn(film, 5),
    "turned by 143 degrees": lambda film: turn(film, 143),
    "mirrored and turned by 330 degrees": lambda film: turn(cv2.flip(film, 1), 330),
    "resized to 150 x 300": lambda film: cv2.resize(film, (150, 300), interpolation=cv2.INTER_AREA),
    "JPEG of quality 40": lambda film: encode(film, 40),
    "darker": lambda film: tone(film, lambda grey: 0.7 * grey),
    "of more contrast": lambda film: tone(film, lambda grey: 0.4 + 1.3 * (grey - 0.4)),
    "gamma 0.7": lambda film: tone(film, lambda grey: grey**0.7),
    "gamma 1.4": lambda film: tone(film, lambda grey: grey**1.4),
}


def take_fingerprints(film):
    """The two fingerprints that reading a film leaves."""
    image = cv2.resize(film, (224, 224), interpolation=cv2.INTER_AREA)
    return np.stack([fingerprint(image, film.shape), fingerprint(image, (1, 1))])


def make_table(patients):
    paths = [f"{n:06d}.png" for n in range(len(patients))]
    return pd.DataFrame({"path": paths, "patient_id": patients, "label": "benign"})


def group(films, patients=None):
    """group_duplicates of pictures, by default of a patient each."""
    patients = [f"file {n}" for n in range(len(films))] if patients is None else patients
    return group_duplicates(make_table(patients), np.stack([take_fingerprints(film) for film in films]))


def turn_fingerprints(prints, degrees, mirrored=False):
    """Fingerprints of the same pictures turned and mirrored: phases shift, phases change their sign."""
    shift = np.exp(1j * np.radians(degrees) * np.arange(1, prints.shape[-1] + 1))
    return ((prints.conj() if mirrored else prints) * shift).astype(np.complex64)


def make_fingerprints(rng, count):
    """Random ones, of different pictures: complex64 (count, 2, RINGS, WAVES), of norm 1."""
    prints = rng.standard_normal((count, 2, 24, 23, 2)).astype(np.float32).view(np.complex64)[..., 0]
    return prints / np.linalg.norm(prints, axis=(2, 3), keepdims=True)


# ---- duplicates --------------------------------------------------------------------------------


def test_no_two_patients_are_joined(films):
    table = group(films)
    assert table["group"].tolist() == table["patient_id"].tolist()
    assert not table["duplicate"].any()


@pytest.mark.parametrize("squared", [False, True], ids=["as they are", "squared"])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_land_with_their_source_and_with_no_other(films, kind, squared):
    if squared:
        films = [cv2.resize(film, (227, 227), interpolation=cv2.INTER_AREA) for film in films]
    table = group(films + [COPIES[kind](film) for film in films])
    assert table["group"].tolist() == table["patient_id"].tolist()[: len(films)] * 2
    assert table["duplicate"].all()


def test_any_number_of_copies_is_one_group(films):
    """72 copies of each of four films, every 10 degrees, plain and mirrored, in random order."""
    pictures = [turn(film, degrees) for source in films[:4] for film in (source, cv2.flip(source, 1))
                for degrees in range(0, 360, 10)]
    order = np.random.default_rng(0).permutation(len(pictures))
    table = group([pictures[place] for place in order])
    assert table["group"].nunique() == 4
    assert (table.groupby(order // 72)["group"].nunique() == 1).all()


def test_many_nearer_copies_do_not_hide_another(films):
    """36 turned copies of a film and 36 of its darker version: the nearest 35 of each are of the same tone."""
    prints = [turn_fingerprints(take_fingerprints(film), degrees, mirrored=degrees % 20 == 0)
              for source in films[:4] for film in (source, COPIES["gamma 1.4"](source))
              for degrees in range(0, 360, 10)]
    table = group_duplicates(make_table([str(number // 36) for number in range(len(prints))]), np.stack(prints))
    assert table["group"].tolist() == [str(2 * (number // 72)) for number in range(len(prints))]


def test_all_films_of_joined_patients_share_a_group(films):
    patients = ["b", "b", "a", "a", "c", "d"]
    pictures = [films[0], films[1], COPIES["mirrored"](films[1]), films[2], films[3], turn(films[2], 40)]
    table = group(pictures, patients)
    assert table["group"].tolist() == ["b", "b", "b", "b", "c", "b"]
    assert table["duplicate"].tolist() == [False, True, True, True, False, True]


def test_two_copies_of_one_patient_are_duplicates_of_one_group(films, caplog):
    caplog.set_level(logging.INFO)
    table = group([films[0], cv2.flip(films[0], 0), films[1]], ["a", "a", "b"])
    assert table["group"].tolist() == ["a", "a", "b"]
    assert table["duplicate"].tolist() == [True, True, False]
    assert "2 films show the same picture" in caplog.text


def alter(rng, prints, kind, strength):
    """Fingerprints made less like themselves in one of three ways."""
    if kind == "noise":
        prints = prints + strength * make_fingerprints(rng, 1)[0]
    elif kind == "phases":  # each wave turned by another angle: the bounds on the correlation stay at 1
        prints = prints * np.exp(1j * strength * rng.standard_normal(23))
    else:  # magnitudes only: the correlation is as large as its first bound
        prints = prints * np.exp(strength * rng.standard_normal((2, 24, 23)))
    return (prints / np.linalg.norm(prints, axis=(1, 2), keepdims=True)).astype(np.complex64)


@pytest.mark.parametrize("kind", ["noise", "phases", "magnitudes"])
@pytest.mark.parametrize("column", [0, 1])
def test_groups_are_those_of_brute_force_over_all_pairs_and_shifts(kind, column):
    """60 pictures and a copy of each, ever less like it; the other fingerprint of each copy tells nothing."""
    rng = np.random.default_rng(0)
    sources = make_fingerprints(rng, 60)
    copies = np.stack([turn_fingerprints(alter(rng, source, kind, strength), 360 / 128 * rng.integers(128), odd)
                       for source, strength, odd in
                       zip(sources, np.linspace(0.1, 0.8, 60), np.arange(60) % 2 == 1, strict=True)])
    copies[:, 1 - column] = make_fingerprints(rng, 60)[:, 0]
    prints, threshold = np.concatenate([sources, copies]), (0.87, 0.95)[column]
    angles = np.exp(2j * np.pi * np.outer(np.arange(1, 24), np.arange(128)) / 128)
    correlations = np.maximum(*((np.einsum("arw,brw->abw", prints[:, column], other) @ angles).real.max(axis=2)
                                for other in (prints[:, column].conj(), prints[:, column])))
    expected = [str(np.flatnonzero(row >= threshold)[0]) for row in correlations]
    table = group_duplicates(make_table([str(number) for number in range(120)]), prints)
    assert table["group"].tolist() == expected
    assert 65 < table["group"].nunique() < 115, "some copies are found and some are not"


def test_memory_grows_with_the_films_and_not_with_their_pairs():
    """Two films with thousands of copies each: all pairs of 4,000 films take 48 MB more than those of 2,000."""
    rng = np.random.default_rng(0)
    origin = rng.permutation(4000) % 2
    degrees, mirrored = rng.uniform(0, 360, (4000, 1, 1, 1)), rng.random((4000, 1, 1, 1)) < 0.5
    originals = make_fingerprints(rng, 2)[origin]
    prints = np.where(mirrored, turn_fingerprints(originals, degrees, True), turn_fingerprints(originals, degrees))
    table, peaks = make_table([str(number) for number in range(4000)]), []
    for count in (2000, 4000):
        tracemalloc.start()
        grouped = group_duplicates(table[:count], prints[:count])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (grouped.groupby(origin[:count])["group"].nunique() == 1).all()
        assert grouped["group"].nunique() == 2
    assert peaks[1] - peaks[0] < prints[2000:].nbytes


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="no such call on this system")
def test_a_memory_map_leaves_memory_after_use(tmp_path):
    def measure_resident():
        with open("/proc/self/status", encoding="ascii") as status:
            return int(re.search(r"RssFile:\s+(\d+)", status.read())[1]) * 1024

    prints = make_fingerprints(np.random.default_rng(0), 3000)
    prints.tofile(tmp_path / "prints")
    prints = np.memmap(tmp_path / "prints", np.complex64, "r", shape=prints.shape)
    before = measure_resident()
    group_duplicates(make_table([str(number) for number in range(3000)]), prints)
    assert measure_resident() - before < prints.nbytes / 2


@pytest.mark.parametrize(("factor", "dtype"), [(257, np.uint16), (16, np.uint16), (1 / 255, np.float32),
                                               (1 / 255, np.float64), (1000, np.float32)])
def test_the_scale_of_the_pixels_does_not_matter(films, factor, dtype):
    for film in films[:6]:
        image = cv2.resize(film, (224, 224), interpolation=cv2.INTER_AREA)
        scaled = fingerprint((image.astype(float) * factor).astype(dtype), film.shape)
        assert np.vdot(fingerprint(image, film.shape), scaled).real > 0.9999


def test_random_labels_are_learnt_from_copies_by_an_image_level_split_only(films):
    """Seven pictures of each film, with a random label: a nearest neighbour needs but a copy to know it."""
    kinds = [COPIES[name] for name in ("the same bytes", "resized to 150 x 300", "JPEG of quality 40", "darker",
                                       "of more contrast", "gamma 0.7", "gamma 1.4")]
    pictures = [kind(film) for film in films for kind in kinds]
    labels = np.repeat(np.random.default_rng(0).permutation(np.arange(len(films)) % 2), len(kinds))
    table = group(pictures).assign(label=np.take(CLASSES, labels), split="", left_out="")
    pixels = np.stack([cv2.resize(film, (16, 16), interpolation=cv2.INTER_AREA).ravel() for film in pictures])
    pixels = (pixels - pixels.mean(axis=1, keepdims=True)) / pixels.std(axis=1, keepdims=True)

    def score(groups):
        right = []
        for fold in range(FOLDS):
            train = split_patients(table.assign(group=groups), fold, 0)["split"].eq("train")
            classifier = KNeighborsClassifier(1).fit(pixels[train], labels[train])
            right += (classifier.predict(pixels[~train]) == labels[~train]).tolist()
        return np.mean(right)

    assert score(table["patient_id"]) > 0.95
    assert score(table["group"]) < 0.65


# ---- split -------------------------------------------------------------------------------------


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
    return films.assign(split="", left_out="", group=films["patient_id"]).reset_index(drop=True)


def give_split(films, held_out=10):
    names = [f"patient {number}" for number in range(held_out)]
    return films.assign(split=np.where(films["patient_id"].isin(names), "validation", "train"))


@pytest.mark.parametrize("seed", range(5))
def test_no_group_stands_on_both_sides_and_every_one_is_held_out_once(seed):
    films = make_films(mixed=0.1, seed=seed)
    films["group"] = films["patient_id"].str.replace(r".$", "", regex=True)  # up to ten patients in one
    held_out = Counter()
    for fold in range(FOLDS):
        split = split_patients(films, fold, seed)
        sides = split.groupby("group")["split"].agg(set)
        assert all(len(side) == 1 for side in sides)
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


@pytest.mark.parametrize("given", [False, True])
def test_films_left_out_change_no_other_side(given):
    films = give_split(make_films()) if given else make_films()
    unused = films.index % 3 == 0
    expected = split_patients(films, 2, 0)
    split = split_patients(films.assign(left_out=np.where(unused, "no lesion_box", "")), 2, 0)
    assert (split["split"][unused] == "left out").all()
    assert split["left_out"].tolist() == np.where(unused, "no lesion_box", "").tolist()
    assert split["split"][~unused].equals(expected["split"][~unused])


def test_the_counts_that_are_logged(caplog):
    caplog.set_level(logging.INFO)
    films = make_films(patients=100, mixed=0.1)
    films["group"] = films["group"].replace("patient 1", "patient 0")  # who share a picture count once
    split = split_patients(films.assign(left_out=np.where(films.index < 3, "no lesion_box", "")), 0, 0)
    check_sides(split)
    assert "excluded   3 films (no lesion_box): " + ", ".join(map(repr, films["path"][:3])) in caplog.text
    for side in ("train", "validation"):
        for label in CLASSES:
            rows = split[(split["split"] == side) & (split["label"] == label)]
            line = rf"{side} .*{label} {len(rows)} films of {rows['group'].nunique()} patients"
            assert re.search(line, caplog.text)
    mixed = (films.groupby("patient_id")["label"].nunique() == 2).sum()
    group_duplicates(films, make_fingerprints(np.random.default_rng(0), len(films)))
    assert f"{mixed} patients have benign and malignant films" in caplog.text


def test_copies_of_one_picture_under_both_labels_are_named(caplog):
    films = make_table(["a", "b", "c", "d"]).assign(label=["benign", "malignant", "benign", "benign"])
    prints = make_fingerprints(np.random.default_rng(0), 4)
    prints[1], prints[3] = prints[0], prints[2]
    group_duplicates(films, prints)
    assert "2 films show the same picture under both labels" in caplog.text
    assert "'000000.png', '000001.png'" in caplog.text and "000003" not in caplog.text


def test_a_given_split_is_kept_but_for_patients_on_both_sides(caplog):
    films = give_split(make_films(patients=30))
    leak, *trained = films.index[films["patient_id"] == "patient 20"]
    films.loc[leak, "split"] = "validation"
    split = split_patients(films, 3, 0)
    assert split["split"][leak] == "left out"
    assert split["split"].drop(leak).equals(films["split"].drop(leak))
    assert split["trained_on"][leak] in set(films["path"][trained])
    assert "trained on" in split["left_out"][leak]
    for column in ("trained_on", "left_out"):
        assert (split[column].drop(leak) == "").all()
    assert f"1 of {(films['split'] == 'validation').sum()} validation films" in caplog.text
    check_sides(split)


def test_copies_across_a_given_split_are_left_out(films):
    table = group([films[0], films[1], cv2.flip(films[1], 1), films[2], films[3]])
    table["split"] = ["train", "train", "validation", "validation", "validation"]
    table = table.assign(label=["benign", "malignant", "malignant", "benign", "malignant"], left_out="")
    split = split_patients(table, 0, 0)
    assert split["split"].tolist() == ["train", "train", "left out", "validation", "validation"]
    assert split["trained_on"].tolist() == ["", "", "000001.png", "", ""]


def test_a_training_film_that_is_left_out_is_no_reason_to_leave_out_another():
    films = give_split(make_films(patients=30))
    first, *others = films.index[films["patient_id"] == "patient 20"]
    films.loc[others, "split"] = "validation"
    films.loc[first, "left_out"] = "no lesion_box"
    split = split_patients(films, 0, 0)
    assert others
    assert (split["split"][others] == "validation").all()


def test_a_given_split_of_which_nothing_is_left_says_so():
    films = make_films(patients=30)
    films["split"] = np.where(films.duplicated("patient_id"), "validation", "train")
    leaks = (films["split"] == "validation").sum()
    split = split_patients(films, 0, 0)
    assert (split["split"] != "validation").all()
    with pytest.raises(UserError, match=rf"nothing is left of the validation side.*{leaks} films.*leaks\.csv"):
        check_sides(split)


def test_a_side_without_a_class_is_refused_with_what_was_left_out():
    films = make_films(patients=20)
    films["split"] = np.where(films["label"] == "malignant", "train", "validation")
    with pytest.raises(UserError, match="train side has no benign"):
        check_sides(split_patients(films, 0, 0))
    unused = films["label"] == "malignant"
    films = films.assign(split="", left_out=np.where(unused, "no lesion_box", ""))
    with pytest.raises(UserError, match=rf"no malignant film; {unused.sum()} films are left out: no lesion_box"):
        check_sides(split_patients(films, 0, 0))


def test_all_folds_are_checked_before_the_first_is_trained():
    films = split_patients(make_films(patients=40), 0, 0)
    check_sides(films, every_fold=True)
    malignant = films["label"].eq("malignant") & films["fold"].eq("3")
    films.loc[malignant, ["split", "left_out"]] = "left out", "no lesion_box"
    check_sides(films)
    with pytest.raises(UserError, match=rf"^fold 3 has films of one class only; {malignant.sum()} films"):
        check_sides(films, every_fold=True)


def test_a_test_side_loses_what_is_trained_or_validated_on():
    films = make_films(patients=30)
    patients = films["patient_id"].unique()
    sides = dict(zip(patients, ["train"] * 20 + ["validation"] * 5 + ["test"] * 5, strict=True))
    films["split"] = films["patient_id"].map(sides)
    rows = [films.index[films["patient_id"] == patient][-1] for patient in (patients[0], patients[20])]
    assert (films["patient_id"].value_counts()[patients[[0, 20]]] > 1).all()
    films.loc[rows, "split"] = "test"
    split = split_patients(films, 0, 0)
    assert (split["split"][rows] == "left out").all()
    assert (split["left_out"][rows] == "its patient or picture is trained or validated on").all()
    assert split["split"].drop(rows).equals(films["split"].drop(rows))
    check_sides(split)
    split.loc[split["split"].eq("test"), "label"] = "benign"
    with pytest.raises(UserError, match="test side has no malignant film"):
        check_sides(split)


@pytest.mark.parametrize("grouped", [False, True])
def test_too_few_patients_for_the_folds_are_refused_with_the_remedy(grouped):
    films = make_films(patients=20, malignant=0)
    rows = range(8 if grouped else 4)
    films.loc[rows, "label"] = "malignant"
    films.loc[rows, "patient_id"] = [f"other {row}" for row in rows]
    films["group"] = films["patient_id"].replace({f"other {row}": "other 3" for row in rows if row > 3})
    if not grouped:
        films = films.drop(columns="group")
    with pytest.raises(UserError, match=r"4 malignant patients.*5 folds.*split.*labels.csv.*train/ and val/"):
        check_folds(films)
    check_folds(give_split(films))
