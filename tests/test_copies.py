"""Copies of one picture under other names, and what they do to a split."""
import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsClassifier

import common


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


def take_prints(film):
    """The two fingerprints that reading a film leaves."""
    image = cv2.resize(film, (224, 224), interpolation=cv2.INTER_AREA)
    return np.stack([common.fingerprint(image, film.shape), common.fingerprint(image, (1, 1))])


def group(record, films, patients):
    table = pd.DataFrame({"path": [f"{n:05d}.png" for n in range(len(films))], "patient_id": patients})
    return common.group_copies(record, table, np.stack([take_prints(film) for film in films]))["group"].tolist()


def test_no_two_patients_are_joined(record, films):
    patients = [f"patient {n}" for n in range(len(films))]
    assert group(record, films, patients) == patients
    assert record["copies"] == {"pairs": 0, "images": 0}


@pytest.mark.parametrize("squared", [False, True], ids=["as they are", "squared"])
@pytest.mark.parametrize("kind", COPIES)
def test_copies_land_with_their_source_and_with_no_other(record, films, kind, squared):
    if squared:
        films = [cv2.resize(film, (227, 227), interpolation=cv2.INTER_AREA) for film in films]
    copies = [COPIES[kind](film) for film in films]
    names = [f"file {n}" for n in range(2 * len(films))]
    assert group(record, films + copies, names) == names[: len(films)] * 2


def test_all_images_of_joined_patients_share_a_group(record, films):
    patients = ["a", "a", "b", "b", "c", "d"]
    pictures = [films[0], films[1], COPIES["mirrored"](films[1]), films[2], films[3], turn(films[2], 40)]
    assert group(record, pictures, patients) == ["a", "a", "a", "a", "c", "a"]
    assert record["copies"] == {"pairs": 2, "images": 4}


def test_proposals_in_blocks_find_what_brute_force_finds(films):
    pictures = films[:10] + [turn(film, 77) for film in films[:10]]
    prints = np.stack([take_prints(film)[0] for film in pictures])
    every = np.array([(a, b) for a in range(20) for b in range(20) if a != b])
    brute = every[common.correlate(*prints[every.T]) >= common.COPY_CORRELATION]
    found = common.find_pairs(prints, common.COPY_CORRELATION, block=7)
    assert set(map(tuple, found)) == set(map(tuple, brute))
    assert {(n, n + 10) for n in range(10)} <= set(map(tuple, found))


def test_random_labels_are_learnt_from_copies_by_an_image_level_split_only(record, films):
    """Seven pictures of each film, with a random label: a nearest neighbour needs but a copy to know it."""
    kinds = [COPIES[name] for name in ("the same bytes", "resized to 150 x 300", "JPEG of quality 40", "darker",
                                       "of more contrast", "gamma 0.7", "gamma 1.4")]
    pictures = [kind(film) for film in films for kind in kinds]
    labels = np.repeat(np.random.default_rng(0).permutation(np.arange(len(films)) % 2), len(kinds))
    names = [f"file {n}" for n in range(len(pictures))]
    table = pd.DataFrame({"label": np.take(common.CLASSES, labels), "patient_id": names, "split": ""})
    pixels = np.stack([cv2.resize(film, (16, 16), interpolation=cv2.INTER_AREA).ravel() for film in pictures])
    pixels = (pixels - pixels.mean(axis=1, keepdims=True)) / pixels.std(axis=1, keepdims=True)

    def score(groups):
        right = []
        for fold in range(common.FOLDS):
            train = common.split_patients(record, table.assign(group=groups), fold, 0)["split"].eq("train")
            classifier = KNeighborsClassifier(1).fit(pixels[train], labels[train])
            right += (classifier.predict(pixels[~train]) == labels[~train]).tolist()
        return np.mean(right)

    assert score(names) > 0.95
    assert score(group(record, pictures, names)) < 0.65
