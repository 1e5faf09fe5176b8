"""Films that show the same picture."""
import logging
import mmap
import re
import tracemalloc

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsClassifier

from data.duplicates import fingerprint, group_duplicates, take_fingerprints
from data.splits import FOLDS, split_patients

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
    "negative": lambda film: 255 - film,
    "gamma 1.4": lambda film: tone(film, lambda grey: grey**1.4),
}


def place(film, scale, left=False, grey=0):
    """A film on a canvas of one grey value and of `scale` times its size, in its middle or at its left edge."""
    height, width = (round(scale * side) for side in film.shape)
    canvas = np.full((height, width), grey, np.uint8)
    top, start = (height - len(film)) // 2, 0 if left else (width - film.shape[1]) // 2
    canvas[top : top + len(film), start : start + film.shape[1]] = film
    return canvas


def read(film):
    """The fingerprints that reading a film leaves."""
    return take_fingerprints(cv2.resize(film, (224, 224), interpolation=cv2.INTER_AREA), film.shape)


def make_table(patients):
    paths = [f"{n:06d}.png" for n in range(len(patients))]
    return pd.DataFrame({"path": paths, "patient_id": patients, "label": "benign"})


def group(films, patients=None):
    """group_duplicates of pictures, by default of a patient each."""
    patients = [f"file {n}" for n in range(len(films))] if patients is None else patients
    return group_duplicates(make_table(patients), np.stack([read(film) for film in films]))


def turn_fingerprints(prints, degrees, mirrored=False):
    """Fingerprints of the same pictures turned and mirrored: phases shift, phases change their sign."""
    shift = np.exp(1j * np.radians(degrees) * np.arange(1, prints.shape[-1] + 1))
    return ((prints.conj() if mirrored else prints) * shift).astype(np.complex64)


def make_fingerprints(rng, count):
    """Random ones, of different pictures: complex64 (count, 3, RINGS, WAVES), of norm 1."""
    prints = rng.standard_normal((count, 3, 24, 23, 2)).astype(np.float32).view(np.complex64)[..., 0]
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


@pytest.mark.parametrize("left", [False, True], ids=["centred", "left"])
@pytest.mark.parametrize("scale", [1, 1.25, 1.5, 2, 3])
def test_black_canvases_join_copies_and_no_strangers(films, scale, left):
    """The margin of a canvas is none of the picture, and films that look small on it are not alike."""
    canvases = [place(film, scale, left) for film in films]
    table = group(canvases)
    assert table["group"].tolist() == table["patient_id"].tolist()
    found = group(films + canvases)["group"][len(films) :].to_numpy() == table["group"].to_numpy()
    assert found.mean() >= 0.95, "the noise of a film may be taken for its margin"


@pytest.mark.parametrize("grey", [100, 255])
@pytest.mark.parametrize("scale", [1.25, 1.5])
def test_grey_and_white_canvases_join_copies_and_no_strangers(films, scale, grey):
    canvases = [place(film, scale, grey=grey) for film in films]
    table = group(canvases)
    assert table["group"].tolist() == table["patient_id"].tolist()
    found = group(films + canvases)["group"][len(films) :].to_numpy() == table["group"].to_numpy()
    assert found.mean() >= 0.95


def test_outlines_on_a_canvas_do_not_make_a_duplicate():
    """Ellipses of different texture: whole, the small films see the same outline, and that of the canvas."""
    films = []
    for seed in range(12):
        noise = np.random.default_rng(seed).random((40, 40))
        texture = cv2.resize(noise, (320, 320), interpolation=cv2.INTER_LINEAR)
        shape = cv2.ellipse(np.zeros((320, 320)), (160, 160), (70, 150), 0, 0, 360, 1, -1)
        films.append(place((shape * (100 + 100 * texture)).astype(np.uint8), 3, left=True))
    table = group(films)
    assert table["group"].tolist() == table["patient_id"].tolist()
    assert (np.linalg.norm(read(films[0])[:2], axis=(1, 2)) < 0.93).all(), "or 0.87 may be reached"


def test_turned_copies_on_another_canvas_are_found(films):
    films = [film for film in films if (film[:, [0, -1]] > 0).any()]
    films = [cv2.copyMakeBorder(film[8:-8, 8:-8], 8, 8, 8, 8, cv2.BORDER_CONSTANT, value=200) for film in films]
    table = group(films + [turn(place(film, 2), 25) for film in films])
    assert table["group"].tolist() == table["patient_id"].tolist()[: len(films)] * 2


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
    prints = [turn_fingerprints(read(film), degrees, mirrored=degrees % 20 == 0)
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
    assert "2 mammograms show the same picture" in caplog.text


def alter(rng, prints, kind, strength):
    """Fingerprints made less like themselves in one of three ways."""
    if kind == "noise":
        prints = prints + strength * make_fingerprints(rng, 1)[0]
    elif kind == "phases":  # each wave turned by another angle: the bounds on the correlation stay at 1
        prints = prints * np.exp(1j * strength * rng.standard_normal(23))
    else:  # magnitudes only: the correlation is as large as its first bound
        prints = prints * np.exp(strength * rng.standard_normal((3, 24, 23)))
    return (prints / np.linalg.norm(prints, axis=(1, 2), keepdims=True)).astype(np.complex64)


@pytest.mark.parametrize("kind", ["noise", "phases", "magnitudes"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_groups_are_those_of_brute_force_over_all_pairs_and_shifts(kind, column):
    """60 pictures and a copy of each, ever less like it; the other fingerprints of each copy tell nothing."""
    rng = np.random.default_rng(0)
    sources = make_fingerprints(rng, 60)
    copies = np.stack([turn_fingerprints(alter(rng, source, kind, strength), 360 / 128 * rng.integers(128), odd)
                       for source, strength, odd in
                       zip(sources, np.linspace(0.1, 0.8, 60), np.arange(60) % 2 == 1, strict=True)])
    others = [number for number in range(3) if number != column]
    copies[:, others] = make_fingerprints(rng, 60)[:, others]
    prints, threshold = np.concatenate([sources, copies]), (0.87, 0.95, 0.87)[column]
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
        scaled, _ = fingerprint((image.astype(float) * factor).astype(dtype), film.shape)
        texture, _ = fingerprint(image, film.shape)
        assert np.vdot(texture, scaled).real > 0.9999


def test_random_labels_are_learnt_from_copies_by_an_image_level_split_only(films):
    """Seven pictures of each film, with a random label: a nearest neighbour needs but a copy to know it."""
    kinds = [COPIES[name] for name in ("the same bytes", "resized to 150 x 300", "JPEG of quality 40", "darker",
                                       "of more contrast", "gamma 0.7", "gamma 1.4")]
    pictures = [kind(film) for film in films for kind in kinds]
    labels = np.repeat(np.random.default_rng(0).permutation(np.arange(len(films)) % 2), len(kinds))
    table = group(pictures).assign(label=np.take(CLASSES, labels), split="", excluded="")
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


def test_copies_of_one_picture_under_both_labels_are_named(caplog):
    films = make_table(["a", "b", "c", "d"]).assign(label=["benign", "malignant", "benign", "benign"])
    prints = make_fingerprints(np.random.default_rng(0), 4)
    prints[1], prints[3] = prints[0], prints[2]
    group_duplicates(films, prints)
    assert "2 mammograms show the same picture under both labels" in caplog.text
    named = [record.getMessage() for record in caplog.records if "both labels" in record.getMessage()]
    assert named == ["2 mammograms show the same picture under both labels, one of which is wrong:"
                     " '000000.png', '000001.png'"]


def test_films_that_join_patients_are_listed_in_pairs(caplog):
    caplog.set_level(logging.INFO)
    prints = make_fingerprints(np.random.default_rng(0), 60)
    prints[[3, 7, 8]] = prints[2]
    group_duplicates(make_table([*"aabbcdefgg", *map(str, range(50))]), prints)
    assert ("2 pairs of mammograms of different patients show the same picture: '000002.png = 000007.png',"
            " '000002.png = 000008.png'") in caplog.text


@pytest.mark.parametrize(("copies", "warned"), [(3, False), (4, True)])
def test_a_group_of_more_than_a_twentieth_of_the_patients_is_a_warning(caplog, copies, warned):
    prints = make_fingerprints(np.random.default_rng(0), 60)
    prints[:copies] = prints[0]
    group_duplicates(make_table([f"p{number}" for number in range(60)]), prints)
    assert (f"{copies} of 60 patients are joined as one, with 'p0'" in caplog.text) == warned


def test_copies_of_one_patient_join_nobody(caplog):
    caplog.set_level(logging.INFO)
    prints = make_fingerprints(np.random.default_rng(0), 4)
    prints[:3] = prints[0]
    group_duplicates(make_table(["a", "a", "a", "b"]), prints)
    assert "pairs" not in caplog.text and "joined as one" not in caplog.text
