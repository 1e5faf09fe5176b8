"""Metrics, intervals and the pointing game, against hand counts, scikit-learn and brute force."""
import itertools

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

import common


def measure(labels, probabilities, groups=None):
    groups = np.arange(len(labels)) if groups is None else groups
    return common.measure(np.array(labels), np.array(probabilities), np.array(groups))


def random_case(seed, images=60, ties=True):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(images) % 3 == 0).astype(int)
    probabilities = np.clip(0.4 + 0.2 * labels + 0.2 * rng.standard_normal(images), 0, 1)
    return labels, probabilities.round(1) if ties else probabilities


# ---- metrics -----------------------------------------------------------------------------------


def test_a_case_counted_by_hand():
    labels = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    probabilities = [0.9, 0.8, 0.5, 0.3, 0.7, 0.4, 0.3, 0.2, 0.1, 0.0]  # 0.5 is called malignant
    metrics, _ = measure(labels, probabilities)
    assert metrics["confusion_matrix"] == {"tn": 5, "fp": 1, "fn": 1, "tp": 3}
    assert metrics["accuracy"] == 8 / 10
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == 3 / 4
    assert metrics["specificity"] == 5 / 6
    assert metrics["majority_baseline"] == 6 / 10
    assert metrics["auc"] == pytest.approx((6 + 6 + 5 + 3.5) / 24)
    assert metrics["sensitivity_at_90_specificity"] == 2 / 4  # above 0.7: no false positive
    assert metrics["specificity_at_90_sensitivity"] == 3 / 6  # from 0.3: three false positives


@pytest.mark.parametrize("seed", range(6))
def test_against_scikit_learn_and_brute_force(seed):
    labels, probabilities = random_case(seed)
    metrics, called = measure(labels, probabilities)[0], probabilities >= 0.5
    reference = sklearn.metrics.classification_report(labels, called, output_dict=True)
    assert metrics["precision"] == pytest.approx(reference["1"]["precision"])
    assert metrics["recall"] == pytest.approx(reference["1"]["recall"])
    assert metrics["f1"] == pytest.approx(reference["1"]["f1-score"])
    assert metrics["specificity"] == pytest.approx(reference["0"]["recall"])
    assert metrics["accuracy"] == pytest.approx(reference["accuracy"])
    pairs = list(itertools.product(probabilities[labels == 1], probabilities[labels == 0]))
    assert metrics["auc"] == pytest.approx(sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs))
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, probabilities, drop_intermediate=False)
    assert metrics["sensitivity_at_90_specificity"] == pytest.approx(tpr[fpr <= 0.1 + 1e-9].max())
    assert metrics["specificity_at_90_sensitivity"] == pytest.approx((1 - fpr)[tpr >= 0.9 - 1e-9].max())


@pytest.mark.parametrize("seed", range(6))
def test_weights_count_images_as_often_as_they_are_repeated(seed):
    labels, probabilities = random_case(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(labels)))
    fpr, tpr, metrics = common.count_outcomes(labels, probabilities, weights)
    for row, repeats in enumerate(weights):
        y, p = np.repeat(labels, repeats), np.repeat(probabilities, repeats)
        assert metrics["auc"][row] == pytest.approx(sklearn.metrics.roc_auc_score(y, p))
        assert metrics["f1"][row] == pytest.approx(sklearn.metrics.f1_score(y, p >= 0.5))
        assert sklearn.metrics.auc(fpr[row], tpr[row]) == pytest.approx(metrics["auc"][row])


def test_one_class_is_never_predicted():
    metrics, _ = measure([0, 1, 1], [0.1, 0.2, 0.3])
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == 0
    assert metrics["specificity"] == 1
    assert metrics["majority_baseline"] == pytest.approx(2 / 3)


# ---- intervals ---------------------------------------------------------------------------------


def test_intervals_against_a_loop_over_resampled_patients():
    labels, probabilities = random_case(0, images=90)
    groups = np.repeat(np.arange(30), 3)
    metrics, _ = measure(labels, probabilities, groups)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(2000):
        images = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(0, 30, 30)])
        drawn.append(sklearn.metrics.roc_auc_score(labels[images], probabilities[images]))
    assert metrics["ci95"]["auc"] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.015)


def test_four_views_of_each_patient_do_not_narrow_the_interval():
    labels, probabilities = random_case(1, images=40, ties=False)
    alone = measure(labels, probabilities)[0]["ci95"]["auc"]
    fourfold = np.repeat(labels, 4), np.repeat(probabilities, 4)
    together = measure(*fourfold, np.repeat(np.arange(40), 4))[0]["ci95"]["auc"]
    apart = measure(*fourfold)[0]["ci95"]["auc"]
    assert np.diff(together) == pytest.approx(np.diff(alone), rel=0.1)
    assert np.diff(apart) < 0.7 * np.diff(alone)


def test_intervals_are_seeded_and_hold_the_metric():
    labels, probabilities = random_case(2)
    (one, band), (two, _) = measure(labels, probabilities), measure(labels, probabilities)
    assert one == two
    assert len(one["ci95"]) == 8
    for name, (low, high) in one["ci95"].items():
        assert 0 <= low <= one[name] <= high <= 1
    grid, low, high = band
    assert (grid[0], grid[-1]) == (0, 1)
    assert (low <= high).all()
    assert common.with_interval({"auc": 0.714, "ci95": {"auc": [0.638, 0.781]}}, "auc") == "0.71 [0.64, 0.78]"


# ---- pointing game -----------------------------------------------------------------------------


def test_the_pointing_game_by_hand():
    boxes = ["0:0:50:50", "50:0:50:50|0:50:50:50", "50:50:50:50", "0:0:50:50"]
    films = pd.DataFrame({"lesion_box": boxes, "left": 0, "top": 0, "width": 100, "height": 100})
    maps = np.zeros((4, 2, 2))
    maps[0, 0, 0] = maps[1, 1, 0] = maps[2, 0, 1] = 1  # a hit in the only box, one in the second box, a miss
    hits, game = common.play_pointing_game(films, maps, np.array([True, False, True, True]))  # and an empty map
    assert hits.tolist() == [True, True, False, False]
    assert game["images"]["images"] == 4
    assert game["images"]["share"] == 2 / 4
    assert game["images"]["chance"] == pytest.approx((0 + 1 / 3 + 0 + 1 / 3) / 4)
    assert game["true_positives"] == {"images": 3, "hits": 1, "share": 1 / 3, "chance": pytest.approx(1 / 9)}


def test_pointing_at_the_middle_is_no_better_than_chance():
    rng = np.random.default_rng(0)
    corners = rng.integers(20, 60, (200, 2))
    films = pd.DataFrame({"lesion_box": [f"{x}:{y}:25:25" for x, y in corners]})
    films[common.CUT] = 0, 0, 100, 100
    maps = np.zeros((200, 14, 14))
    maps[np.arange(200), rng.integers(5, 9, 200), rng.integers(5, 9, 200)] = 1
    _, game = common.play_pointing_game(films, maps, np.ones(200, bool))
    assert game["images"]["share"] == pytest.approx(game["images"]["chance"], abs=0.08)
    assert game["images"]["chance"] > 1.5 * 25**2 / 100**2, "the share of the area would flatter it"


def test_shuffled_weights_do_not_point_at_the_mass(phantoms):
    """The sanity check of Adebayo et al. (2018), on a filter whose maps are known to answer to masses."""
    keras = common.keras
    rng = np.random.default_rng(0)
    rows, images = [], []
    for number in range(24):
        view = phantoms["make_view"](np.random.default_rng((2, number)), "CC", "LEFT", 0, 16, 0.5, False)
        images.append(common.cv2.resize(view[0], (224, 224), interpolation=common.cv2.INTER_AREA))
        rows.append((":".join(map(str, view[1])), phantoms["WIDTH"], phantoms["HEIGHT"]))
    films = pd.DataFrame(rows, columns=["lesion_box", "width", "height"]).assign(left=0, top=0)
    pixels = np.repeat(np.stack(images)[..., None], 3, axis=-1).astype(np.float32)
    y, x = np.mgrid[-8:9, -8:9]
    disc, ring = np.hypot(x, y) < 3.5, (np.hypot(x, y) >= 4.5) & (np.hypot(x, y) < 8)
    kernel = disc / disc.sum() - ring / ring.sum()  # a mass is brighter than what surrounds it

    def play(kernel):
        inputs = keras.Input((224, 224, 3))
        small = keras.layers.AveragePooling2D(4)(inputs)
        maps = keras.layers.Conv2D(1, 17, padding="same", activation="relu", name="maps")
        logit = keras.layers.Dense(1, name="logit")
        answer = logit(keras.layers.GlobalAveragePooling2D()(maps(small)))
        model = keras.Model(inputs, keras.layers.Activation("sigmoid")(answer))
        maps.set_weights([np.repeat(kernel[..., None, None], 3, axis=2), np.full(1, -20.0)])
        logit.set_weights([np.ones((1, 1)), np.zeros(1)])
        cams = common.make_classifier(model)(pixels)[1].numpy()
        return common.play_pointing_game(films, cams, np.ones(24, bool))[1]["images"]

    trained = play(kernel)
    shuffled = [play(rng.permutation(kernel.ravel()).reshape(kernel.shape)) for _ in range(5)]
    assert trained["share"] > trained["chance"] + 0.4
    assert np.mean([game["share"] - game["chance"] for game in shuffled]) < 0.2
