"""Who is held out, what an epoch shows, and what augmentation does."""
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import common


def make_films(patients=60, malignant=0.4, mixed=0.0, seed=0):
    """A table of one to five images a patient, in random order."""
    rng = np.random.default_rng(seed)
    rows = []
    for patient in range(patients):
        label = rng.random() < malignant
        for view in range(rng.integers(1, 6)):
            other = rng.random() < mixed
            rows.append((f"{patient}_{view}.png", common.CLASSES[int(label != other)], f"patient {patient}"))
    films = pd.DataFrame(rows, columns=["path", "label", "patient_id"]).sample(frac=1, random_state=seed)
    return films.assign(split="", lesion_box="", group=films["patient_id"]).reset_index(drop=True)


# ---- split -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_stands_on_both_sides_and_every_one_is_held_out_once(record, seed):
    films = make_films(mixed=0.1, seed=seed)
    held_out = Counter()
    for fold in range(common.FOLDS):
        split = common.split_patients(record, films, fold, seed)
        sides = split.groupby("patient_id")["split"].agg(set)
        assert all(len(side) == 1 for side in sides)
        assert set(split["label"][split["split"] == "validation"]) == set(common.CLASSES)
        held_out.update(split["path"][split["split"] == "validation"])
    assert held_out == Counter(dict.fromkeys(films["path"], 1))


def test_the_seed_moves_the_split(record):
    films = make_films()
    split = common.split_patients(record, films, 0, 0)
    assert split["split"].equals(common.split_patients(record, films, 0, 0)["split"])
    assert not split["split"].equals(common.split_patients(record, films, 0, 1)["split"])


def test_folds_keep_the_prevalence(record):
    films = make_films(patients=400)
    prevalence = films["label"].eq("malignant").mean()
    for fold in range(common.FOLDS):
        split = common.split_patients(record, films, fold, 0)
        held_out = split[split["split"] == "validation"]
        assert held_out["label"].eq("malignant").mean() == pytest.approx(prevalence, abs=0.03)
        assert len(held_out) == pytest.approx(len(films) / common.FOLDS, rel=0.05)


def test_the_counts_that_are_printed_and_recorded(record, capsys):
    films = make_films(patients=100)
    split = common.split_patients(record, films, 0, 0)
    printed = capsys.readouterr().out
    for side in ("train", "validation"):
        for label in common.CLASSES:
            rows = split[(split["split"] == side) & (split["label"] == label)]
            patients = len(set(rows["patient_id"]))
            assert record["split"][side][label] == {"images": len(rows), "patients": patients}
            assert f"{label} {len(rows)} images of {patients} patients" in printed


def test_a_given_split_is_kept_but_for_patients_on_both_sides(record):
    films = make_films(patients=30)
    films["split"] = np.where(films["patient_id"].isin([f"patient {n}" for n in range(10)]), "validation", "train")
    leak = films.index[films["patient_id"] == "patient 20"][0]
    films.loc[films["patient_id"] == "patient 20", "split"] = "train"
    films.loc[leak, "split"] = "validation"
    split = common.split_patients(record, films, 3, 0)
    assert split["split"][leak] == "left out"
    assert split["split"].drop(leak).equals(films["split"].drop(leak))
    named = split.set_index("path").loc[split["trained_on"][leak]]
    assert (named["patient_id"], named["split"]) == ("patient 20", "train")
    assert split["trained_on"].drop(leak).isna().all()
    assert any("1 of " in line and "trained on" in line for line in record["console"])


def test_too_few_patients_and_one_sided_splits_are_refused(record):
    films = make_films(patients=20, malignant=0)
    films.loc[:2, "label"] = "malignant"
    films.loc[:2, "patient_id"] = films.loc[:2, "group"] = ["x", "y", "z"]
    with pytest.raises(common.UserError, match="3 malignant patients, but 5 folds"):
        common.split_patients(record, films, 0, 0)
    films["split"] = np.where(films["label"] == "malignant", "train", "validation")
    with pytest.raises(common.UserError, match="train side has no benign"):
        common.split_patients(record, films, 0, 0)


# ---- feed --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("benign", "malignant"), [(10, 10), (10, 7), (3, 11), (1, 5)])
def test_an_epoch_is_balanced_and_shows_every_image(benign, malignant):
    labels = np.random.default_rng(0).permutation([0] * benign + [1] * malignant)
    majority = max(benign, malignant)
    order = common.draw_epoch(labels, 0, 0)
    assert np.bincount(labels[order]).tolist() == [majority, majority]
    shown = np.bincount(order, minlength=len(labels))
    for label, count in ((0, benign), (1, malignant)):
        assert set(shown[labels == label]) <= {majority // count, -(-majority // count)}


def test_the_classes_of_an_epoch_are_mixed():
    labels = np.repeat([0, 1], 100)
    first_half = labels[common.draw_epoch(labels, 0, 0)][:100]
    assert 30 < first_half.sum() < 70
    assert 30 < np.abs(np.diff(first_half)).sum() < 70


def test_epochs_differ_and_can_be_drawn_again():
    labels = np.array([0, 1] * 20)
    first, second = common.draw_epoch(labels, 0, 0), common.draw_epoch(labels, 0, 1)
    assert not np.array_equal(first, second)
    assert np.array_equal(second, common.draw_epoch(labels, 0, 1))
    assert not np.array_equal(second, common.draw_epoch(labels, 1, 1))


@pytest.fixture
def fed(record):
    """feed() on 30 random images of 17 patients or so, its training from epoch `first`."""
    films = common.split_patients(record, make_films(patients=30), 0, 0)
    images = np.random.default_rng(0).integers(0, 256, (len(films), 224, 224), np.uint8)

    def call(epochs=2, seed=0, first=0):
        training, *others = common.feed(record, images, films, epochs, 13, seed)
        return films, images, training(first), *others

    return call


def collect(dataset, threads=0):
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    images, labels, *_ = zip(*dataset.with_options(options).as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_training_is_reproducible_whatever_the_threads_and_new_in_every_epoch(fed):
    films, _, training, _, steps = fed()
    one, many = collect(training, threads=1), collect(fed()[2], threads=7)
    assert np.array_equal(one[0], many[0])
    assert np.array_equal(one[1], many[1])
    trained_on = films["label"][films["split"] == "train"]
    draws = 2 * trained_on.value_counts().max()
    assert len(one[0]) == 2 * draws
    assert steps == -(-draws // 13)
    assert one[1][:draws].mean() == one[1][draws:].mean() == 0.5
    assert len({image.tobytes() for image in one[0]}) == 2 * draws, "every draw is another picture"
    assert one[0].min() >= 0
    assert one[0].max() <= 255
    assert not np.array_equal(one[0], collect(fed(seed=1)[2])[0])
    assert np.array_equal(collect(fed(first=1)[2])[0], one[0][draws:]), "an epoch does not depend on those before"


def test_training_shows_the_training_side_only_with_its_own_labels(fed, monkeypatch):
    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION"):
        monkeypatch.setattr(common, name, 0.0)
    films, images, training, _, _ = fed(epochs=1)
    known = {}
    for index in films.index[films["split"] == "train"]:
        for variant in (images[index], images[index][:, ::-1]):
            known[np.ascontiguousarray(variant).tobytes()] = films["label"][index]
    for image, label in zip(*collect(training), strict=True):
        assert known[np.rint(image[..., 0]).astype(np.uint8).tobytes()] == common.CLASSES[label]


def test_validation_is_every_held_out_image_once_as_it_is(fed):
    films, images, _, validation, _ = fed()
    held_out = films.index[films["split"] == "validation"]
    shown, labels = collect(validation)
    assert np.array_equal(shown, np.repeat(images[held_out][..., None], 3, axis=-1))
    assert [common.CLASSES[label] for label in labels] == films["label"][held_out].tolist()


# ---- augmentation ------------------------------------------------------------------------------


def draws_of(image, monkeypatch, count=300, **strengths):
    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION"):
        monkeypatch.setattr(common, name, strengths.get(name, 0.0))
    return [common.augment(image, tf.constant([7, number])).numpy() for number in range(count)]


@pytest.fixture
def ramp():
    """float32 (8, 8, 3) in 100..150, so that nothing is clipped."""
    return np.repeat(np.linspace(100, 150, 64, dtype=np.float32).reshape(8, 8, 1), 3, axis=-1)


def test_flips_go_both_ways_and_nothing_else_happens_without_strengths(ramp, monkeypatch):
    flipped = [np.allclose(draw, ramp[:, ::-1], atol=1e-3) for draw in draws_of(ramp, monkeypatch)]
    same = [np.allclose(draw, ramp, atol=1e-3) for draw in draws_of(ramp, monkeypatch)]
    assert sum(flipped) + sum(same) == 300
    assert 100 < sum(flipped) < 200


def test_brightness_is_two_sided(ramp, monkeypatch):
    shifts = np.array([draw.mean() - ramp.mean() for draw in draws_of(ramp, monkeypatch, BRIGHTNESS=0.1)]) / 255
    assert -0.1 <= shifts.min() < -0.09
    assert 0.09 < shifts.max() <= 0.1
    assert abs(shifts.mean()) < 0.01


def test_contrast_is_two_sided(ramp, monkeypatch):
    factors = np.array([draw.std() / ramp.std() for draw in draws_of(ramp, monkeypatch, CONTRAST=0.2)])
    assert 0.799 <= factors.min() < 0.82
    assert 1.18 < factors.max() <= 1.201
    assert abs(factors.mean() - 1) < 0.02


def test_saturation_is_two_sided_on_colour_and_nothing_on_grey(ramp, monkeypatch):
    for draw in draws_of(ramp, monkeypatch, count=20, SATURATION=0.2):
        assert np.allclose(np.sort(draw, axis=None), np.sort(ramp, axis=None), atol=1e-3)
    colour = ramp * np.array([1, 0.9, 0.8], np.float32)
    spread = np.array([(draw.max(-1) - draw.min(-1)).mean() for draw in
                       draws_of(colour, monkeypatch, SATURATION=0.2)]) / (colour.max(-1) - colour.min(-1)).mean()
    assert 0.799 <= spread.min() < 0.82
    assert 1.18 < spread.max() <= 1.201


def test_augmented_values_are_clipped():
    image = np.repeat(np.array([0, 255] * 32, np.float32).reshape(8, 8, 1), 3, axis=-1)
    for number in range(50):
        draw = common.augment(image, tf.constant([7, number])).numpy()
        assert draw.min() >= 0
        assert draw.max() <= 255
