"""Grad-CAM, the pointing game, the cases shown and the scores of a run, each against a reference."""
import keras
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics
from tiny import build_tiny, common, make_films, make_noise, prepare, to_pixels

from data import reading
from data.results import figures, metrics
from data.results.files import score

# ---- Grad-CAM ----------------------------------------------------------------------------------


def build_two_channels(bias=0.0, gain=1.0):
    """Feature maps are red / 255 and green / 255; the logit is gain * (2 mean(red) - 3 mean(green)) + bias."""
    inputs = keras.Input((4, 4, 3))
    kernel = np.zeros((1, 1, 3, 2), np.float32)
    kernel[0, 0, 0, 0] = kernel[0, 0, 1, 1] = 1 / 255
    maps = keras.layers.Conv2D(2, 1, use_bias=False)
    logit = keras.layers.Dense(1, name="logit")
    tensor = logit(keras.layers.GlobalAveragePooling2D()(maps(inputs)))
    model = keras.Model(inputs, keras.layers.Activation("sigmoid")(tensor))
    maps.set_weights([kernel])
    logit.set_weights([gain * np.array([[2.0], [-3.0]], np.float32), np.array([bias], np.float32)])
    return model


@pytest.fixture
def red_and_green():
    image = np.zeros((1, 4, 4, 3), np.float32)
    image[0, 0, 0, 0], image[0, 1, 1, 0] = 255, 127.5  # red: evidence for malignant
    image[0, 3, 3, 1], image[0, 1, 1, 1] = 255, 51  # green: evidence for benign
    return image


@pytest.mark.parametrize("gain", [1.0, 1000.0])  # with the second, the sigmoid is saturated
def test_gradcam_known_by_hand(red_and_green, gain):
    malignant, benign = np.zeros((2, 4, 4))
    malignant[0, 0], malignant[1, 1] = 1, (2 * 0.5 - 3 * 0.2) / 2
    benign[3, 3] = 1
    for bias, expected in ((10 * gain, malignant), (-10 * gain, benign)):
        logits, maps = common.make_gradcam(build_two_channels(bias, gain))(red_and_green)
        assert np.allclose(maps[0], expected, atol=1e-5)
        assert (float(logits[0]) > 0) == (bias > 0)


def test_gradcam_explains_the_class_that_the_threshold_gives(red_and_green):
    """The same probability, called malignant by one threshold and benign by another."""
    model = build_two_channels(bias=0.3)
    probability = model.predict(red_and_green, verbose=0).item()
    peaks = []
    for threshold in (probability - 0.01, probability + 0.01):
        _, maps = common.make_gradcam(model, threshold)(red_and_green)
        peaks.append(np.unravel_index(np.argmax(maps[0]), (4, 4)))
    assert peaks == [(0, 0), (3, 3)]


def test_gradcam_without_positive_evidence_is_zero_and_the_figure_says_so(red_and_green):
    red_and_green[..., 0] = 0  # nothing malignant, yet called so
    _, maps = common.make_gradcam(build_two_channels(bias=10))(red_and_green)
    assert np.array_equal(maps, np.zeros((1, 4, 4)))
    films = make_films([0], 1)
    cases = figures.select_cases(films.assign(predicted="malignant", probability=0.9), 0.5)
    figure = figures.draw_cases(cases, films, make_noise(1), maps.numpy())
    assert "no positive evidence" in [text.get_text() for text in figure.findobj(common.matplotlib.text.Text)]


def test_the_overlay_covers_where_the_map_is_strong_and_shows_through_where_it_is_weak():
    cam = np.zeros((2, 2), np.float32)
    cam[0, 0] = 1
    overlay = common.overlay_map(np.full((224, 224), 100, np.uint8), cam)
    assert (overlay.dtype, overlay.shape) == (np.uint8, (224, 224, 3))
    assert overlay[-1, -1].tolist() == [100, 100, 100]
    yellow = np.array(common.matplotlib.colormaps["viridis"](1.0)[:3]) * 255
    assert np.allclose(overlay[0, 0], 0.4 * 100 + 0.6 * yellow, atol=1)


# ---- predictions -------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path):
    """(predictions, maps, films, images, model, settings) of 9 held-out films in batches of 4, at a threshold of
    the median probability."""
    settings = prepare(tmp_path, BATCH_SIZE=4)
    films, images = make_films(np.arange(21) % 2, held_out=9).iloc[::-1], make_noise(21)
    films = films.reset_index(drop=True)  # those that are held out come first
    model, _ = build_tiny(settings, films)
    median = np.median(model.predict(to_pixels(images[:9]), verbose=0))
    settings = settings._replace(THRESHOLD=float(median))
    return *common.evaluate([model], images, films, settings), films, images, model, settings


def test_predictions_are_those_of_predict_and_each_map_explains_its_own_film(evaluated):
    predictions, maps, films, images, model, settings = evaluated
    assert predictions["path"].tolist() == films["path"][films["split"] == "validation"].tolist()
    expected = model.predict(to_pixels(images[:9]), verbose=0)[:, 0]
    assert np.allclose(predictions["probability"], expected, atol=1e-6)
    explain = common.make_gradcam(model, settings.THRESHOLD)
    for image, found in zip(to_pixels(images[:9]), maps, strict=True):
        assert np.allclose(explain(image[None])[1][0], found, atol=1e-4)


def test_one_threshold_decides_calls_and_metrics(evaluated):
    """Half of the films are called malignant, though all probabilities lie on one side of 0.5 or nearly so."""
    predictions, maps, films, _, _, settings = evaluated
    called = predictions["probability"].to_numpy() >= settings.THRESHOLD
    assert 0 < called.sum() < 9
    assert predictions["predicted"].eq("malignant").tolist() == called.tolist()
    results, _ = score(predictions, maps, films, settings)
    truth = predictions["label"].eq("malignant")
    tn, fp, fn, tp = sklearn.metrics.confusion_matrix(truth, called).ravel().tolist()
    assert results["confusion_matrix"] == {"tn": tn, "fp": fp, "fn": fn, "tp": tp}
    assert results["threshold"] == settings.THRESHOLD


def test_confident_films_do_not_tie(tmp_path):
    """Logits of 20 to 30, whose probabilities are 1 in 32 bits and in nine digits."""
    settings, films = prepare(tmp_path), make_films([0, 1] * 4, held_out=8)
    images = np.arange(0, 80, 10, np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    model = build_two_channels(bias=30, gain=36)
    predictions, maps = common.evaluate([model], images, films, settings)
    expected = 30 - 36 * images[:, 0, 0].astype(float) / 255
    assert predictions["logit"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert predictions["probability"].astype(np.float32).nunique() == 1
    results, _ = score(predictions, maps, films, settings)
    assert results["auc"] == sklearn.metrics.roc_auc_score([0, 1] * 4, expected) != 0.5


def test_scores_are_those_of_measure_over_groups(tmp_path):
    settings, rng = prepare(tmp_path), np.random.default_rng(0)
    films = make_films(rng.integers(0, 2, 80), held_out=60, group=[f"{n // 2:03d}" for n in range(80)])
    held_out = films[films["split"] == "validation"]
    truth = held_out["label"].eq("malignant").to_numpy(int)
    probabilities = np.clip(0.4 + 0.2 * truth + 0.2 * rng.standard_normal(60), 0, 1)
    predictions = held_out[["path", "patient_id", "label"]].assign(
        probability=probabilities, predicted=np.take(common.CLASSES, probabilities >= 0.5))
    results, _ = score(predictions, np.zeros((60, 2, 2)), films, settings)
    groups = held_out["group"].to_numpy()
    measured = metrics.measure(truth, probabilities, groups, settings.SEED, settings.THRESHOLD)
    assert measured == {name: results[name] for name in measured}
    assert (results["validation_images"], results["validation_patients"]) == (60, 30)
    assert "pointing_game" not in results, "no film has a box"


def test_a_patient_is_scored_by_breast_and_patients_with_both_are_counted(tmp_path):
    """One sick breast of four films is not diluted by the other one; film 7 is of an unknown side."""
    settings = prepare(tmp_path)
    films = make_films([0, 0, 1, 1, 0, 0, 0, 0], 8, group=list("aaaabbcc"),
                       side=["left", "left", "right", "right", "left", "left", "right", ""])
    predictions = films[["path", "patient_id", "label"]].assign(
        probability=[0.1, 0.1, 0.8, 0.8, 0.3, 0.2, 0.1, 0.4], predicted="benign")
    results = score(predictions, np.zeros((8, 2, 2)), films, settings)[0]["per_patient"]
    assert results["confusion_matrix"] == {"tn": 2, "fp": 0, "fn": 0, "tp": 1}, "0.4 is the mean of all four films"
    assert results["both_breasts"] == 1


def test_the_most_confident_cases_of_every_outcome_are_shown():
    rng, threshold = np.random.default_rng(0), 0.3
    table = pd.DataFrame({"label": rng.choice(common.CLASSES, 60), "probability": rng.random(60)})
    table["predicted"] = np.where(table["probability"] >= threshold, "malignant", "benign")
    cases = figures.select_cases(table, threshold)
    for outcome, label in (("true_positive", "malignant"), ("false_positive", "benign"),
                           ("true_negative", "benign"), ("false_negative", "malignant")):
        called = "malignant" if outcome.endswith("positive") else "benign"
        group = table[(table["label"] == label) & (table["predicted"] == called)]
        expected = sorted(group["probability"], key=lambda p: -abs(p - threshold))[: figures.CASES]
        assert cases.loc[cases["outcome"] == outcome, "probability"].tolist() == expected


# ---- pointing game -----------------------------------------------------------------------------


def play(films, maps, true_positives):
    boxes = [reading.place_boxes(film) for film in films.itertuples()]
    return metrics.play_pointing_game(boxes, maps, true_positives)


def test_the_pointing_game_by_hand():
    """Films of 100 x 200 pixels, of which the lower half is the image."""
    boxes = ["0:100:50:50", "50:100:50:50|0:150:50:50", "50:150:50:50", "0:100:50:50"]
    films = make_films([1, 1, 1, 1], 4, lesion_box=boxes, top=100)
    maps = np.zeros((4, 2, 2))
    maps[0, 0, 0] = maps[1, 1, 0] = maps[2, 0, 1] = 1  # a hit in the only box, one in the second, a miss
    game = play(films, maps, np.array([True, False, True, True]))  # and an empty map
    # peaks of others: film 0 none, film 1 that of film 2, film 2 none, film 3 that of film 0
    assert game["images"] == {"images": 4, "hits": 2, "share": 2 / 4,
                              "other_films": pytest.approx((0 + 1 / 3 + 0 + 1 / 3) / 4)}
    assert game["true_positives"] == {"images": 3, "hits": 1, "share": pytest.approx(1 / 3),
                                      "other_films": pytest.approx(1 / 9)}


def test_pointing_at_the_middle_is_no_better_than_the_baseline():
    rng = np.random.default_rng(0)
    films = make_films([1] * 200, 200, lesion_box=[f"{x}:{y}:25:25" for x, y in rng.integers(20, 60, (200, 2))])
    maps = np.zeros((200, 14, 14))
    maps[np.arange(200), rng.integers(5, 9, 200), rng.integers(5, 9, 200)] = 1
    game = play(films, maps, np.ones(200, bool))["images"]
    assert game["share"] == pytest.approx(game["other_films"], abs=0.08)
    assert game["other_films"] > 1.5 * 25**2 / 100**2, "the share of the area would flatter it"


@pytest.mark.parametrize("crop", ["breast", None, "lesion"])
def test_the_pointing_game_is_played_where_the_box_is_not_the_middle_anyway(tmp_path, crop):
    settings = prepare(tmp_path, CROP=crop)
    boxes = ["0:0:50:50", "0:0:50:50", "", "0:0:50:50"]
    films = make_films([1, 1, 1, 0], 4, lesion_box=boxes)
    predictions = films[["path", "patient_id", "label"]].assign(
        probability=[0.9, 0.1, 0.9, 0.9], predicted=["malignant", "benign", "malignant", "malignant"])
    maps = np.zeros((4, 2, 2))
    maps[:, 0, 0] = 1
    results, _ = score(predictions, maps, films, settings)
    if crop == "lesion":
        assert "pointing_game" not in results
    else:
        game = results["pointing_game"]
        assert (game["images"]["images"], game["true_positives"]["images"]) == (3, 1)


def test_shuffled_weights_do_not_point_at_the_mass(phantoms):
    """The sanity check of Adebayo et al. (2018), on a filter whose maps are known to answer to masses."""
    rng, boxes, images = np.random.default_rng(0), [], []
    for number in range(24):
        image, box = phantoms["make_view"](np.random.default_rng((2, number)), "CC", "LEFT", 0, 16, 0.5, False)
        images.append(common.cv2.resize(image, (224, 224), interpolation=common.cv2.INTER_AREA))
        boxes.append(":".join(map(str, box)))
    films = make_films([1] * 24, 24, lesion_box=boxes, width=phantoms["WIDTH"], height=phantoms["HEIGHT"])
    y, x = np.mgrid[-8:9, -8:9]
    disc, ring = np.hypot(x, y) < 3.5, (np.hypot(x, y) >= 4.5) & (np.hypot(x, y) < 8)
    filtered = disc / disc.sum() - ring / ring.sum()  # a mass is brighter than what surrounds it
    inputs = keras.Input((224, 224, 3))
    maps = keras.layers.Conv2D(1, 17, padding="same", activation="relu")
    logit = keras.layers.Dense(1, name="logit")
    tensor = logit(keras.layers.GlobalAveragePooling2D()(maps(keras.layers.AveragePooling2D(4)(inputs))))
    model = keras.Model(inputs, keras.layers.Activation("sigmoid")(tensor))
    logit.set_weights([np.ones((1, 1)), np.zeros(1)])
    explain = common.make_gradcam(model)

    def play_with(kernel):
        maps.set_weights([np.repeat(kernel[..., None, None], 3, axis=2), np.full(1, -20.0)])
        cams = explain(to_pixels(images))[1].numpy()
        game = play(films, cams, np.ones(24, bool))["images"]
        return game["share"] - game["other_films"]

    assert play_with(filtered) > 0.4
    shuffled = [play_with(rng.permutation(filtered.ravel()).reshape(filtered.shape)) for _ in range(5)]
    assert np.mean(shuffled) < 0.2
