"""What a run writes and what the page over all runs says, without training anything."""
import json
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser

import cv2
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

import common

NASTY = "benign/a <b>&\"'$x$ é.png"


@pytest.fixture
def write_run(record, tmp_path):
    """Write a run folder as main() does, from made-up probabilities; returns it."""

    def write(name="vgg16-unfrozen50-aaaaaa", fold=0, skill=1.0, note="", seed=0, prefix="film", leak=None,
              **constants):
        rng = np.random.default_rng(seed)
        films = pd.DataFrame({"path": [NASTY, *(f"{prefix}_{n}.png" for n in range(39))]})
        films["label"] = np.take(common.CLASSES, np.arange(40) % 2)
        films["patient_id"] = films["group"] = [f"{n // 2:03d}" for n in range(40)]
        films = films.assign(split="validation", lesion_box="10:10:50:50", left=0, top=0, width=100, height=100)
        if leak:
            films["trained_on"] = leak
            films.loc[39, "split"] = "left out"
        labels = np.arange(40) % 2
        probabilities = np.clip(0.5 + skill * (labels - 0.5) * 0.3 + 0.2 * rng.standard_normal(40), 0, 1)
        predictions = films[["path", "patient_id", "label"]].assign(
            probability=probabilities, predicted=np.take(common.CLASSES, probabilities >= 0.5))
        metrics, band = common.measure(labels, probabilities, films["group"])
        metrics |= {"validation_images": 40, "validation_patients": 20}
        side = {name: {"images": 20, "patients": 20} for name in common.CLASSES}
        this = record | {
            "note": note, "held_out": "40 images of 20 held-out patients", "patients_from": {"labels.csv": 40},
            "constants": record["constants"] | {"FOLD": fold} | constants, "copies": {"pairs": 0, "images": 0},
            "split": {"how": "by hand", "train": side, "validation": side}, "weights": {"origin": "<none>"},
            "model": {"backbone": name.split("-")[0], "layers": 19, "unfrozen_layers": 10, "batch_norm": "none"},
        }
        cases = common.select_cases(predictions, most=1)
        cases = cases.assign(hit="", image=[rng.integers(0, 255, (224, 224), np.uint8) for _ in range(len(cases))],
                             cam=list(rng.random((len(cases), 7, 7))), boxes=[np.zeros((0, 4))] * len(cases))
        folder = tmp_path / name
        folder.mkdir()
        history = pd.DataFrame({"epoch": [1, 2], "loss": [0.7, 0.5], "accuracy": [0.5, 0.7],
                                "val_loss": [0.71, 0.6], "val_accuracy": [0.5, 0.6]})
        common.report(this, folder, films, history, predictions, metrics, band, cases)
        common.save_json(this, folder / "settings.json")
        return folder

    return write


# ---- figures -----------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of what is drawn while a test runs."""
    figures, save = {}, common.save_figure

    def keep(record, figure, path):
        save(record, figure, path)
        figures[path.name] = figure

    monkeypatch.setattr(common, "save_figure", keep)
    return figures


def test_every_figure_says_what_the_run_is_worth(write_run, drawn):
    write_run(note="synthetic phantoms")
    assert len(drawn) >= 4 + 2
    for figure in drawn.values():
        assert "SYNTHETIC PHANTOMS" in figure.get_supxlabel()


def test_the_figures_show_the_numbers_of_the_tables(write_run, drawn):
    folder = write_run()
    predictions = pd.read_csv(folder / "predictions.csv")
    malignant = predictions["label"].eq("malignant")
    fpr, tpr, _ = sklearn.metrics.roc_curve(malignant, predictions["probability"])
    axes = drawn["roc_curve.png"].axes[0]
    assert np.allclose(axes.get_lines()[0].get_xydata(), np.column_stack([fpr, tpr]))
    metrics = json.loads((folder / "metrics.json").read_text())
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert f"AUC {common.with_interval(metrics, 'auc')}" in legend
    axes = drawn["confusion_matrix.png"].axes[0]
    counts = metrics["confusion_matrix"]
    assert [text.get_text() for text in axes.texts] == [str(counts[name]) for name in ("tn", "fp", "fn", "tp")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["benign", "malignant"]
    loss, accuracy = drawn["training_curves.png"].axes
    assert [line.get_ydata().tolist() for line in loss.get_lines()] == [[0.7, 0.5], [0.71, 0.6]]
    assert [line.get_ydata().tolist() for line in accuracy.get_lines()] == [[0.5, 0.7], [0.5, 0.6]]


def test_the_overlay_covers_where_the_map_is_strong_and_shows_through_where_it_is_weak():
    image = np.full((224, 224), 100, np.uint8)
    cam = np.zeros((2, 2))
    cam[0, 0] = 1
    overlay = common.lay_over(image, cam)
    assert overlay[-1, -1].tolist() == [100, 100, 100]
    yellow = np.array(common.matplotlib.colormaps["viridis"](1.0)[:3]) * 255
    assert np.allclose(overlay[0, 0], 0.4 * 100 + 0.6 * yellow, atol=1)


def test_what_was_left_out_is_listed_with_what_it_copies(write_run):
    assert not (write_run() / "leaks.csv").exists()
    leaks = pd.read_csv(write_run("vgg16-unfrozen50-bbbbbb", leak="film_3.png") / "leaks.csv")
    assert leaks[["path", "trained_on"]].to_numpy().tolist() == [["film_38.png", "film_3.png"]]


# ---- runs.csv and report.html ------------------------------------------------------------------


def test_runs_csv_is_rebuilt_from_the_folders(write_run, tmp_path):
    write_run("vgg16-unfrozen50-aaaaaa")
    gone = write_run("resnet50-unfrozen60-bbbbbb", skill=0.2)
    (tmp_path / ".resnet50-unfinished").mkdir()
    common.compare(tmp_path)
    table = pd.read_csv(tmp_path / "runs.csv")
    assert table["run"].tolist() == ["resnet50-unfrozen60-bbbbbb", "vgg16-unfrozen50-aaaaaa"]
    metrics = json.loads((gone / "metrics.json").read_text())
    row = table.iloc[0]
    assert [row["auc"], row["auc_low"], row["auc_high"]] == [metrics["auc"], *metrics["ci95"]["auc"]]
    shutil.rmtree(gone)
    common.compare(tmp_path)
    assert pd.read_csv(tmp_path / "runs.csv")["run"].tolist() == ["vgg16-unfrozen50-aaaaaa"]


def test_a_folder_that_cannot_be_read_is_said_and_left_out(write_run, tmp_path, capsys):
    write_run("vgg16-unfrozen50-aaaaaa")
    broken = write_run("vgg16-unfrozen50-bbbbbb")
    (broken / "metrics.json").write_text("{}")
    common.compare(tmp_path)
    assert pd.read_csv(tmp_path / "runs.csv")["run"].tolist() == ["vgg16-unfrozen50-aaaaaa"]
    assert "vgg16-unfrozen50-bbbbbb in the comparison: KeyError" in capsys.readouterr().out


def test_runs_that_finish_together_are_all_compared(write_run, tmp_path):
    """The second waits until the first has read and written, and reads then."""
    write_run("vgg16-unfrozen50-aaaaaa")
    with common.lock(tmp_path / ".report.lock"):
        second = threading.Thread(target=common.compare, args=(tmp_path,))
        second.start()
        second.join(0.5)
        assert second.is_alive()
        assert not (tmp_path / "runs.csv").exists()
        write_run("vgg16-unfrozen50-bbbbbb")
    second.join()
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 2


def test_folds_of_one_setting_are_pooled_and_settings_are_not(write_run, tmp_path):
    folders = [write_run(f"vgg16-unfrozen50-{n}", fold=n, seed=n) for n in range(3)]
    write_run("vgg16-unfrozen60-3", UNFROZEN_FRACTION=0.6)
    (row,) = common.pool_folds(pd.DataFrame([run["row"] for run in common.read_runs(tmp_path)])).to_dict("records")
    aucs = [json.loads((folder / "metrics.json").read_text())["auc"] for folder in folders]
    assert row["folds"] == "0, 1, 2"
    assert row["auc"] == f"{np.mean(aucs):.2f} ± {np.std(aucs, ddof=1):.2f}"


def test_two_settings_on_the_same_patients(write_run, tmp_path):
    write_run("vgg16-a", skill=2.0)
    write_run("vgg16-b", skill=0.0, seed=1)
    write_run("vgg16-c", skill=2.0, seed=2)
    write_run("vgg16-d", prefix="another")
    pairs = common.compare_pairs(common.read_runs(tmp_path)).set_index(["first", "second"])
    assert sorted(pairs.index) == [("vgg16-a", "vgg16-b"), ("vgg16-a", "vgg16-c"), ("vgg16-b", "vgg16-c")]
    assert pairs.loc[("vgg16-a", "vgg16-b"), "verdict"] == "the first is better"
    assert pairs.loc[("vgg16-b", "vgg16-c"), "verdict"] == "the second is better"
    assert pairs.loc[("vgg16-a", "vgg16-c"), "verdict"] == "no evidence of a difference"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_self_contained_and_escaped(write_run, tmp_path):
    write_run(note="synthetic <script>alert(1)</script>", DATA_DIR="<img src=x>")
    common.compare(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Page(text).tags
    assert "script" not in {tag for tag, _ in tags}
    images = [attributes for tag, attributes in tags if tag == "img"]
    assert len(images) == 6
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 20 for image in images)
    assert not re.search(r'(?:src|href)="(?!data:)', text)
    assert "not for clinical use" in text
    assert ("p", {"class": "badge"}) in tags
    assert "<!--" not in text.replace("<!doctype", "")


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_screen(write_run, tmp_path, width):
    for number in range(3):
        write_run(f"vgg16-unfrozen50-{number}", fold=number, DATA_DIR="/a_very_long_name" * 20)
    common.compare(tmp_path)
    (tmp_path / "frame.html").write_text(
        f'<iframe id="page" src="report.html" width="{width}" height="800" onload="let d ='
        " document.getElementById('page').contentDocument; document.title = [d.documentElement.scrollWidth,"
        " [...d.images].every(i => i.naturalWidth > 0)].join()\"></iframe>")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
                 f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run(["chromium", *arguments, (tmp_path / "frame.html").as_uri()], capture_output=True,
                         text=True, timeout=60, check=True).stdout
    scroll_width, loaded = re.search(r"<title>(\d+),(\w+)</title>", dom).groups()
    assert int(scroll_width) <= width
    assert loaded == "true"


# ---- one new image -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [(None, ""), ("breast", ""), ("lesion", "9:20:12:10")])
def test_predict_reads_a_film_as_training_does(film, tmp_path, how):
    keras = common.keras
    inputs = keras.Input((224, 224, 3))
    maps = keras.layers.Conv2D(2, 32, strides=32, name="maps")(inputs / 255)
    logit = keras.layers.Dense(1, name="logit")(keras.layers.GlobalAveragePooling2D(name="pooled")(maps))
    model = keras.Model(inputs, keras.layers.Activation("sigmoid")(logit))
    model.save(tmp_path / "model.keras")
    film(tmp_path / "film.png", top=4095, dtype=np.uint16)
    crop, box = how
    (tmp_path / "settings.json").write_text(json.dumps({"constants": {"CROP": crop}}))
    probability, overlay = common.predict(tmp_path / "model.keras", tmp_path / "film.png", box)
    image = common.read_image(tmp_path / "film.png", crop, box)[0]
    pixels = np.repeat(image[None, ..., None], 3, axis=-1).astype(np.float32)
    assert probability == pytest.approx(float(model.predict(pixels, verbose=0)[0, 0]), abs=1e-6)
    assert np.array_equal(overlay, common.lay_over(image, common.make_classifier(model)(pixels)[1][0].numpy()))
    assert cv2.imwrite(str(tmp_path / "overlay.png"), overlay)
    with pytest.raises(common.UserError, match=r"old\.h5 is no model\.keras"):
        common.predict(tmp_path / "old.h5", tmp_path / "film.png")
    with pytest.raises(common.UserError, match=r"nothing\.keras"):
        common.predict(tmp_path / "nothing.keras", tmp_path / "film.png")
    if crop == "lesion":
        with pytest.raises(common.UserError, match=r"with CROP = .lesion. needs a lesion_box"):
            common.predict(tmp_path / "model.keras", tmp_path / "film.png")
    (tmp_path / "settings.json").unlink()
    with pytest.raises(common.UserError, match=r"settings\.json"):
        common.predict(tmp_path / "model.keras", tmp_path / "film.png")
