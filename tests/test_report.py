"""What a run writes: its figures show the numbers of its tables, and nothing tells who a patient is."""
import contextlib
import io
import itertools
import json
import logging.handlers
import re
import zipfile

import matplotlib.figure
import numpy as np
import pandas as pd
import pydicom.data
import pytest
import sklearn.calibration
import sklearn.metrics
from tiny import build_tiny, common, hasten, import_tiny, make_films, make_noise, prepare

from data.results import metrics
from data.results.baseline import describe_baseline
from data.results.figures import draw_films, draw_training_curves, select_cases, write_figure

NASTY = "benign/a <b>&\"'$x$ é.png"


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a run of made-up probabilities; returns its folder, the predictions and the figures.

    The figures are kept by name instead of being painted.
    """

    def write(probabilities=None, **columns):
        figures, films, images = {}, make_films(np.arange(50) % 2, held_out=40), make_noise(50)
        films.loc[10, "path"] = NASTY
        films = films.assign(lesion_box="10:10:50:50").assign(**columns)
        settings = prepare(tmp_path / "outputs")
        model, weights = build_tiny(settings, films)
        held_out = films[films["split"] == "validation"]
        labels, rng = held_out["label"].eq("malignant").to_numpy(), np.random.default_rng(0)
        if probabilities is None:
            probabilities = np.clip(0.3 + 0.4 * labels + 0.2 * rng.standard_normal(len(labels)), 0, 1)
        predictions = held_out[["path", "patient_id", "label"]].assign(
            probability=probabilities, predicted=np.take(common.CLASSES, probabilities >= settings.THRESHOLD))
        history = pd.DataFrame({"epoch": [1, 2], "loss": [0.7, 0.5], "accuracy": [0.5, 0.7],
                                "val_loss": [0.71, 0.6], "val_accuracy": [0.5, 0.6], "seconds": [1.0, 2.0]})
        console = logging.handlers.BufferingHandler(100)
        common.log.addHandler(console)
        common.log.warning("the first line of the console")
        common.log.warning("File properties alone tell the classes apart.", extra={"limit": True})
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig",
                            lambda figure, file, **options: figures.update({file.name: figure}))
        folder = tmp_path / "outputs" / "tiny-unfrozen50-aaaaaa"
        folder.with_name(f".{folder.name}").mkdir(parents=True)
        results = predictions, rng.random((len(held_out), 7, 7), np.float32)
        facts = common.describe_model(model, settings)
        common.write_run(folder, settings, films, images, np.zeros((50, 2, 24, 23), np.complex64), model, facts,
                         weights, history, results, console)
        return folder, predictions, figures

    yield write
    common.log.handlers = []


def read_texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_the_figures_show_the_numbers_of_the_tables(written):
    folder, _, figures = written()
    predictions = pd.read_csv(folder / "predictions.csv")
    results = json.loads((folder / "metrics.json").read_text("utf-8"))
    malignant = predictions["label"].eq("malignant")
    fpr, tpr, _ = sklearn.metrics.roc_curve(malignant, predictions["probability"])
    axes = figures["roc_curve.png"].axes[0]
    assert np.allclose(axes.get_lines()[0].get_xydata(), np.column_stack([fpr, tpr]))
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "AUC {:.2f} [{:.2f}, {:.2f}]".format(results["auc"], *results["ci95"]["auc"]) in legend
    assert "threshold 0.5" in legend
    alone = results["baseline"]
    assert f"file properties alone, AUC {metrics.with_interval(alone, 'auc')}" in legend
    fpr, tpr, _ = sklearn.metrics.roc_curve(malignant, predictions["baseline"])
    (line,) = (line for line in axes.get_lines() if line.get_label().startswith("file properties alone"))
    assert np.allclose(line.get_xydata(), np.column_stack([fpr, tpr]))
    assert alone["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(malignant, predictions["baseline"]))
    assert alone["difference"][0] == pytest.approx(results["auc"] - alone["auc"])
    points = [line.get_xydata()[0].tolist() for line in axes.get_lines() if len(line.get_xydata()) == 1]
    assert points[0] == pytest.approx([1 - results["specificity"], results["recall"]])
    axes = figures["precision_recall.png"].axes[0]
    precision, recall, _ = sklearn.metrics.precision_recall_curve(malignant, predictions["probability"])
    line, chance, point = axes.get_lines()
    assert np.allclose(line.get_xydata()[:-1], np.column_stack([recall, precision])[:-1])
    assert chance.get_ydata()[0] == malignant.mean()
    assert point.get_xydata()[0].tolist() == pytest.approx([results["recall"], results["precision"]])
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    interval = results["ci95"]["average_precision"]
    assert "average precision {:.2f} [{:.2f}, {:.2f}]".format(results["average_precision"], *interval) in legend
    axes = figures["confusion_matrix.png"].axes[0]
    counts = results["confusion_matrix"]
    assert [text.get_text() for text in axes.texts] == [str(counts[name]) for name in ("tn", "fp", "fn", "tp")]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["benign", "malignant"]
    assert "0.5" in axes.get_xlabel()
    points = sklearn.calibration.calibration_curve(
        malignant, predictions["probability"], n_bins=2, strategy="quantile")
    axes = figures["calibration.png"].axes[0]
    assert np.allclose(axes.get_lines()[-1].get_xydata().T[::-1], points)
    assert [text.get_text() for text in axes.texts] == [f"{20 * share:.0f} of 20" for share in points[0]]
    loss, accuracy = figures["training_curves.png"].axes
    assert [line.get_ydata().tolist() for line in loss.get_lines()] == [[0.7, 0.5], [0.71, 0.6]]
    assert [line.get_ydata().tolist() for line in accuracy.get_lines()] == [[0.5, 0.7], [0.5, 0.6]]
    expected = select_cases(predictions, 0.5)
    texts = read_texts(figures["grad_cam_example.png"])
    assert {f"P(malignant) {p:.3f}" for p in expected["probability"]} <= set(texts)
    kinds = pd.Series([name.rpartition(".")[2] for name in figures])
    assert kinds.value_counts().to_dict() == {"png": 7 + len(expected), "pdf": 6}, "films.png has no PDF"
    assert figures["grad_cam_example.png"].axes[-1].get_ylabel().startswith("evidence"), "a colour bar"


def test_equal_probabilities_are_one_point_of_the_calibration(written):
    _, _, figures = written(np.full(40, 0.4))
    axes = figures["calibration.png"].axes[0]
    assert axes.get_lines()[-1].get_xydata().tolist() == [[pytest.approx(0.4), 0.5]]
    assert [text.get_text() for text in axes.texts] == ["20 of 40"]


def test_no_line_of_the_summary_ends_within_a_word(written):
    folder, _, _ = written()
    assert not re.search(r"\w-\n", (folder / "summary.md").read_text("utf-8"))


def test_where_no_film_is_predicted_malignant_the_precision_is_undefined_everywhere(written):
    folder, _, figures = written(np.linspace(0.1, 0.4, 40))
    results = json.loads((folder / "metrics.json").read_text("utf-8"), parse_constant=pytest.fail)  # of NaN
    assert (results["precision"], results["per_patient"]["precision"]) == (None, None)
    assert len(figures["precision_recall.png"].axes[0].get_lines()) == 2, "no point of the threshold"
    summary = (folder / "summary.md").read_text("utf-8")
    assert "| precision | undefined | undefined |" in summary
    assert "ratio of nothing is undefined" in " ".join(summary.split())
    console = logging.handlers.BufferingHandler(100)
    common.log.handlers = [console]
    common.log.setLevel(logging.INFO)
    common.show_results(folder)
    assert any(record.getMessage().split() == ["precision", "undefined"] for record in console.buffer)
    common.compare(folder.parent)
    assert "<td>undefined</td>" in (folder.parent / "report.html").read_text("utf-8")
    runs = pd.read_csv(folder.parent / "runs.csv")
    assert (runs["precision"][0], runs["precision_low"][0], runs["recall"][0]) == ("undefined", 0, 0)


def test_words_about_a_run_state_what_the_files_alone_give_away(written, caplog):
    folder, _, _ = written()
    results = json.loads((folder / "metrics.json").read_text("utf-8"))
    sentence = describe_baseline(results["baseline"])
    methods, limits = " ".join((folder / "summary.md").read_text("utf-8").split()).split("## Limits")
    assert sentence in methods
    assert "File properties alone tell the classes apart." in limits
    assert "the first line of the console" not in limits
    common.log.propagate = True
    common.show_results(folder)
    assert sentence in caplog.messages


def test_the_contact_sheet_shows_each_class_of_each_container_from_its_darkest_to_its_brightest_film():
    """Of 100 films, of which few are DICOM and one was excluded; and likewise for each set of a given split."""
    rng = np.random.default_rng(0)
    films, images = make_films(np.arange(100) % 2, held_out=40), rng.integers(0, 40, (100, 224, 224), np.uint8)
    level = rng.permutation(100)
    images += level.astype(np.uint8)[:, None, None]
    containers = ["12 bit DICOM", "8 bit JPEG", "8 bit PNG"]
    films = films.assign(container=np.repeat(containers, [5, 35, 60]), fold="0")
    films.loc[1, "lesion_box"], films.loc[99, "excluded"] = "10:20:30:40|0:0:5:5", "no lesion_box"
    figure = draw_films(films, images, pd.Series(images.mean(axis=(1, 2)), films.index))
    shown = [np.flatnonzero([np.array_equal(panel.get_array(), image) for image in images]).item()
             for panel in figure.axes[0].get_images()]
    expected = []
    for container, label in itertools.product(containers, common.CLASSES):
        members = (films["container"] == container) & (films["label"] == label) & (films["excluded"] == "")
        rows = films.index[members]
        ordered = sorted(rows, key=lambda row: level[row])
        expected += [ordered[round(place)] for place in np.linspace(0, len(rows) - 1, min(8, len(rows)))]
    assert shown == expected
    texts = read_texts(figure)
    assert {"benign\n12 bit DICOM\n3 of 3", "malignant\n8 bit PNG\n8 of 29"} <= set(texts)
    assert {"001", "004"} <= set(texts), "the names of the files"
    place = np.array(figure.axes[0].get_images()[shown.index(1)].get_extent())[[0, 3]]
    boxes = [[*patch.get_xy() - place, patch.get_width(), patch.get_height()] for patch in figure.axes[0].patches]
    assert np.allclose(boxes, [[0.1, 0.2, 0.3, 0.4], [0, 0, 0.05, 0.05]])
    given = films.assign(split=["train"] * 60 + ["test"] * 40, container="8 bit PNG", fold="")
    assert {"benign\ntest\n8 bit PNG\n8 of 20", "benign\ntrain\n8 bit PNG\n8 of 30"} <= {
        *read_texts(draw_films(given, images, pd.Series(level)))}
    many = films.assign(container=[f"{number // 20} bit PNG" for number in range(100)])
    texts = " ".join(read_texts(draw_films(many, images, pd.Series(level))))
    assert "19 mammograms are of other containers or sets" in texts, "the container with the fewest films"


def test_the_same_figure_gives_the_same_bytes_with_text_that_stays_text(tmp_path):
    """And its PDF has the size of the PNG in inches."""
    history = {"epoch": [1, 2], "loss": [0.7, 0.5], "accuracy": [0.5, 0.7], "val_loss": [0.7, 0.6],
               "val_accuracy": [0.5, 0.6]}
    written = []
    for name in ("a", "b"):
        write_figure(draw_training_curves(pd.DataFrame(history)), tmp_path / f"{name}.png", NASTY, "a note")
        written.append([(tmp_path / f"{name}{suffix}").read_bytes() for suffix in (".png", ".pdf")])
    assert written[0] == written[1]
    png, pdf = written[0]
    width, height = np.frombuffer(png[16:24], ">u4") / 200
    assert f"/MediaBox [ 0 0 {72 * width:g} {72 * height:g} ]".encode() in pdf
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf


def test_each_case_is_shown_with_its_own_film_and_boxes(written):
    """Of 50 films of noise, by the pixels of the panels."""
    boxes = [f"{number}:0:10:20" for number in range(50)]
    _, predictions, figures = written(lesion_box=boxes)
    images = make_noise(50)
    cases = select_cases(predictions, 0.5)
    shown = 0
    for case in cases.itertuples():
        (figure,) = (figure for name, figure in figures.items() if name.startswith(
            f"{case.outcome}_") and any(case.path in text for text in read_texts(figure)))
        panels = [axes for axes in figure.axes if axes.get_images()]
        assert np.array_equal(panels[0].get_images()[0].get_array(), images[case.Index])
        (box,) = panels[0].patches
        assert np.allclose(np.array([*box.get_xy(), box.get_width(), box.get_height()]) / common.IMAGE_SIZE,
                           [case.Index / 100, 0, 0.1, 0.2])
        shown += 1
    assert shown >= 8


def test_a_long_name_fits_into_that_of_an_overlay(written):
    """Names have at most 255 bytes, and these characters three each."""
    folder, _, figures = written(path=[f"{number:03d}{'乳' * 82}.png" for number in range(50)])
    overlays = [name for name in figures if name.startswith(("true_", "false_"))]
    assert len(overlays) >= 8
    for name in overlays:
        (folder / "gradcam" / name).touch()
        assert re.fullmatch(r"(true|false)_(posi|nega)tive_0[1-4]_\d{3}乳{20,}\.png", name)


def test_every_figure_and_table_states_what_the_run_is_worth(written):
    paths = [f"synthetic_{number}.png" for number in range(50)]
    folder, _, figures = written(path=paths)
    for figure in figures.values():
        assert "SYNTHETIC PHANTOMS" in figure.get_supxlabel()
        assert "RANDOM WEIGHTS" in figure.get_supxlabel()
    for file in [*folder.glob("*.csv"), *folder.glob("*.json")]:
        assert "synthetic phantoms" in file.read_text("utf-8")


def test_tables_are_written_as_they_are(written):
    """Names of any characters, and probabilities to the last bit of 32."""
    probabilities = np.random.default_rng(1).random(40, np.float32)
    folder, predictions, _ = written(probabilities.astype(float))
    found = pd.read_csv(folder / "predictions.csv")
    assert NASTY in found["path"].tolist()
    assert found["path"].tolist() == predictions["path"].tolist()
    assert np.array_equal(found["probability"].astype(np.float32), probabilities)
    history = pd.read_csv(folder / "history.csv")
    assert history["val_loss"].tolist() == [0.71, 0.6]
    assert "seconds" not in history, "which differ from run to run"


def test_leaks_that_cannot_be_written_are_a_sentence(tmp_path):
    films = make_films([0, 1] * 5, held_out=4).assign(trained_on="0001.png", tested_on="")
    (tmp_path / "leaks.csv").mkdir()
    with pytest.raises(common.UserError, match="cannot be written"):
        common.write_leaks(films, tmp_path)


def test_a_run_with_nothing_excluded_has_no_list_of_leaks_and_replaces_an_earlier_one(written, tmp_path):
    earlier = tmp_path / "outputs" / "tiny-unfrozen50-aaaaaa"
    earlier.mkdir(parents=True)
    (earlier / "leaks.csv").write_text("of an older version")
    (earlier / "unfinished.txt").write_text("")
    folder, _, _ = written()
    assert folder == earlier
    assert not (folder / "leaks.csv").exists()
    assert not (folder / "unfinished.txt").exists()
    assert not folder.with_name(f".{folder.name}").exists()


def test_settings_tell_what_was_run(written):
    containers = ["8 bit PNG"] * 25 + ["16 bit PNG"] * 25
    folder, _, _ = written(container=containers, depth=[8] * 25 + [12] * 24 + [16], patient_from=["unknown"] * 50,
                           duplicate=[True] * 2 + [False] * 48)
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert settings["constants"]["EPOCHS"] == 7
    assert settings["constants"]["DROPOUT"] == 0.3
    assert settings["collection"]["depths"] == {"8 bit PNG": 8, "16 bit PNG": 12}, "not of one film"
    assert settings["collection"]["patient_from"] == {"unknown": 50}
    assert settings["collection"]["duplicates"] == 2
    assert settings["model"]["floats"] == ["float32"]
    assert settings["versions"]["keras"] == common.keras.__version__
    assert any("the first line of the console" in line for line in settings["console"])
    assert settings["split"]["validation, benign"] == "20 mammograms of 20 patients"


# ---- no name of a patient ----------------------------------------------------------------------

SECRETS = {"PatientName": "Doeberry^Janette", "PatientID": "HOSP-4711-", "PatientBirthDate": "19440229",
           "AccessionNumber": "ACC0815", "InstitutionName": "Saint Elsewhere", "StudyDate": "20010911",
           "ReferringPhysicianName": "Quackenbush", "OtherPatientIDs": "SSN-078-05"}


UNBOXED = (0, 2, 5, 7)  # films without a lesion_box, of patients with another film that has one


@pytest.fixture(scope="module")
def clinical(tmp_path_factory):
    """The outputs of a run with CROP "lesion" on 24 DICOM films of 12 patients, some without a box."""
    place = tmp_path_factory.mktemp("clinical")
    (place / "films").mkdir()
    rows = []
    for number in range(24):
        data = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm", download=False))
        pixels = np.random.default_rng(number).integers(0, 4096, (16, 16)).astype(np.uint16)
        data.Rows, data.Columns, data.PixelRepresentation = 128, 128, 0
        data.PixelData = np.kron(pixels, np.ones((8, 8), np.uint16)).tobytes()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        for name, value in SECRETS.items():
            setattr(data, name, value + str(number // 2) * (name == "PatientID"))
        data.save_as(place / "films" / f"{number:02d}.dcm", enforce_file_format=True)
        box = "" if number in UNBOXED else "30:30:40:40"
        rows.append((f"{number:02d}.dcm", common.CLASSES[number // 2 % 2], box))
    pd.DataFrame(rows, columns=["path", "label", "lesion_box"]).to_csv(place / "films" / "labels.csv", index=False)
    script = import_tiny(place, place / "films", CROP="lesion", WEIGHTS=None, EPOCHS=1)
    console = io.StringIO()
    with contextlib.redirect_stdout(console), hasten():
        folder = script.main()
    return folder, console.getvalue()


def read_everything(folder):
    """(name, bytes) of each file below a folder, those in archives unpacked."""
    for file in folder.rglob("*"):
        if file.is_file():
            yield str(file), file.read_bytes()
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    yield from ((f"{file}: {name}", archive.read(name)) for name in archive.namelist())


def test_no_identifying_tag_is_in_anything_that_is_written(clinical):
    folder, console = clinical
    files = dict(read_everything(folder.parent)) | {"console": console.encode()}
    assert len(files) > 30
    for secret in SECRETS.values():
        assert [name for name, content in files.items() if secret.encode() in content] == []


def test_patients_are_known_by_their_id_and_by_an_alias(clinical):
    folder, _ = clinical
    split = pd.read_csv(folder / "split.csv")
    assert split["patient_id"].nunique() == 12
    assert split["patient_id"].str.fullmatch(r"dicom_\d{5}").all()
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert settings["collection"]["patient_from"] == {"PatientID": 24}


def test_lesion_crops_leave_out_films_without_a_box_and_the_pointing_game(clinical):
    folder, _ = clinical
    split = pd.read_csv(folder / "split.csv").set_index("path")
    assert set(split.index[split["split"] == "excluded"]) == {f"{number:02d}.dcm" for number in UNBOXED}
    assert "pointing_game" not in json.loads((folder / "metrics.json").read_text("utf-8"))
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert 4 in settings["collection"]["excluded"].values()
