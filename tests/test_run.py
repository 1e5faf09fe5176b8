"""A run from the outside: its constants, its name, its films, its folder, and where it is started from."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY
from tiny import (build_tiny, common, copy_program, finish_process, finish_run, import_tiny, make_films, prepare,
                  read_results, read_until, start_process, write_tiny)

import resnet50
import vgg16

# ---- constants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("UNFROZEN_FRACTION", 70), ("UNFROZEN_FRACTION", 0), ("UNFROZEN_FRACTION", "0.5"), ("FOLD", 5), ("FOLD", -1),
     ("FOLD", 0.5), ("BATCH_SIZE", 0), ("BATCH_SIZE", 13.0), ("BATCH_SIZE", True), ("EPOCHS", 0),
     ("LEARNING_RATE", 0), ("LEARNING_RATE", float("nan")), ("LEARNING_RATE", float("inf")), ("SEED", -1),
     ("SEED", "zero"), ("WEIGHTS", ""), ("WEIGHTS", 7), ("DATA_DIR", None), ("OUTPUT_DIR", " "),
     ("CROP", "Breast"), ("CROP", True), ("MIXED_PRECISION", 1)],
)
def test_a_wrong_constant_stops_at_once_and_is_named(monkeypatch, name, value):
    for script in (resnet50, vgg16):
        monkeypatch.setattr(script, name, value)
        with pytest.raises(common.UserError, match=rf"^{name} is {re.escape(repr(value))}, but has to be"):
            script.main()


@pytest.mark.parametrize("name", ["DATA_DIR", "CROP", "EPOCHS", "MIXED_PRECISION"])
def test_a_deleted_constant_is_named(monkeypatch, name):
    monkeypatch.delattr(vgg16, name)
    with pytest.raises(common.UserError, match=rf"^{name} is missing"):
        vgg16.main()


def test_paths_count_from_the_scripts_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [prepare(tmp_path, DATA_DIR=path).DATA_DIR for path in ("data/phantoms", "~/films", tmp_path)]
    assert found == [REPOSITORY / "data" / "phantoms", tmp_path / "films", tmp_path]


def test_an_output_dir_that_cannot_be_written_and_missing_weights_stop_at_once(collection, tmp_path):
    (tmp_path / "file").write_text("")
    script = import_tiny(tmp_path, collection(), OUTPUT_DIR=str(tmp_path / "file"))
    with pytest.raises(common.UserError, match=r"file.*cannot be written"):
        script.main()
    with pytest.raises(common.UserError, match=r"^WEIGHTS is 'nowhere.h5', but there is no file"):
        prepare(tmp_path, WEIGHTS="nowhere.h5")


# ---- the name of a run -------------------------------------------------------------------------


@pytest.fixture
def name(tmp_path):
    """A function that names the run of these constants on ten films."""

    def call(outputs=tmp_path, weights=None, **constants):
        films = make_films([0, 1] * 5, held_out=4)
        settings = prepare(outputs, **constants)
        model, origin = build_tiny(settings, films)
        return common.name_run(settings, films, model, weights or origin)

    return call


def test_the_name_changes_with_all_that_decides_the_results(name, tmp_path):
    folders = [name(**constants) for constants in (
        {}, {"UNFROZEN_FRACTION": 0.6}, {"MIXED_PRECISION": True}, {"HEAD_UNITS": 128}, {"DROPOUT": 0.2})]
    assert re.fullmatch(r"tiny-unfrozen50-[0-9a-f]{6}", folders[0].name)
    settings, films = prepare(tmp_path), make_films([0, 1] * 5, held_out=4)
    model, weights = build_tiny(settings, films)
    assert common.name_run(settings, films, model, weights) == folders[0]
    for constants in ({"EPOCHS": 8}, {"SEED": 1}, {"LEARNING_RATE": 1e-3}, {"BATCH_SIZE": 12}, {"BRIGHTNESS": 0.2},
                      {"CONTRAST": 0.1}, {"SATURATION": 0.1}, {"THRESHOLD": 0.4}):
        folders.append(common.name_run(settings._replace(**constants), films, model, weights))
    for column, value in (("label", "benign"), ("split", "train"), ("image_sha256", "other"), ("group", "other")):
        changed = films.assign(**{column: [*films[column][:9], value]})
        folders.append(common.name_run(settings, changed, model, weights))
    folders.append(common.name_run(settings, films, model, weights | {"sha256": "1"}))
    assert len(set(folders)) == len(folders)


def test_the_name_changes_with_nothing_else(name, tmp_path):
    """Neither with the place of anything, nor with settings that change neither films nor split."""
    weights = {"pretrained": True, "sha256": "1"}
    folder = name(weights=weights | {"origin": "here.h5"}, UNFROZEN_FRACTION=1)
    assert folder == name(weights=weights | {"origin": "there.h5"}, UNFROZEN_FRACTION=1.0)
    moved = name(weights=weights | {"origin": "here.h5"}, UNFROZEN_FRACTION=1, outputs=tmp_path / "elsewhere",
                 DATA_DIR="/elsewhere", FOLD=3, CROP=None)
    assert (moved.parent, moved.name) == (tmp_path / "elsewhere", folder.name)


# ---- films: folds and given splits -------------------------------------------------------------


@pytest.fixture
def collection(film, tmp_path):
    """A function that makes 30 films of 15 patients with a labels.csv; every third film has a lesion_box."""

    def make(**columns):
        rows = []
        for number in range(30):
            film(tmp_path / "films" / f"{number}.png", seed=number)
            rows.append((f"{number}.png", common.CLASSES[number // 2 % 2], f"p{number // 2}",
                         "" if number % 3 else "10:10:20:20"))
        table = pd.DataFrame(rows, columns=["path", "label", "patient_id", "lesion_box"]).assign(**columns)
        table.to_csv(tmp_path / "films" / "labels.csv", index=False)
        return tmp_path / "films"

    return make


def find_and_split(data, outputs, crop, fold=0):
    films, _, fingerprints = common.read_films(common.find_films(data), data, crop, outputs)
    return common.split_patients(common.group_duplicates(films, fingerprints), fold, 0)


def test_folds_do_not_depend_on_the_crop(collection, tmp_path):
    data = collection()
    for fold in range(5):
        breast, lesion = (find_and_split(data, tmp_path / "outputs", crop, fold) for crop in ("breast", "lesion"))
        boxed = lesion["lesion_box"] != ""
        assert lesion["split"][boxed].equals(breast["split"][boxed])
        assert set(lesion["split"][~boxed]) == {"left out"}
        assert (lesion["left_out"][~boxed] != "").all()
        assert set(breast["split"]) == {"train", "validation"}
        assert breast.groupby("patient_id")["split"].nunique().max() == 1


def test_a_given_split_loses_its_leaks_and_one_of_which_nothing_is_left_says_so(collection, film, tmp_path):
    """Patients on both sides, and a copy of a film that is trained on."""
    split = np.where(np.arange(30) < 20, "train", "validation")
    split[1] = "validation"  # the other film of patient 0
    data = collection(split=split)
    shutil.copy(data / "2.png", data / "25.png")
    films = find_and_split(data, tmp_path / "outputs", None).set_index("path")
    leaks = films[films["split"] == "left out"]
    assert set(leaks.index) == {"1.png", "24.png", "25.png"}, "the copy and the other film of its patient, too"
    trained_on = films.loc[leaks["trained_on"]]
    assert set(trained_on["split"]) == {"train"}
    assert films.loc["1.png", "trained_on"] == "0.png"

    data = collection(split=["train", "validation"] * 15)
    script = import_tiny(tmp_path, data)
    with pytest.raises(common.UserError, match=r"leaks\.csv"):
        script.main()
    listed = pd.read_csv(tmp_path / "outputs" / "leaks.csv")
    assert listed["path"].tolist() == sorted(f"{number}.png" for number in range(1, 30, 2))
    assert set(listed["trained_on"]) <= {f"{number}.png" for number in range(0, 30, 2)}


def test_too_few_patients_are_found_before_any_film_is_read(collection, tmp_path):
    data = collection(patient_id=[f"p{number // 2 % 2}" for number in range(30)])
    for file in data.glob("*.png"):
        file.write_text("no film, which nobody has noticed yet")
    with pytest.raises(common.UserError, match=r"(?s)patient.*split"):
        import_tiny(tmp_path, data).main()


# ---- a complete run ----------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(capsys):
    script, folder, first = finish_run()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}
    assert script.main() == folder
    console = capsys.readouterr().out
    assert "Epoch" not in console
    assert re.search(rf"delete.*{folder.name}", console)
    results = [line for line in first.splitlines() if re.match(r"accuracy|auc", line)]
    assert len(results) == 2
    assert set(results) <= set(console.splitlines())
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()
            and path.name != ".cache"] == [folder.name], "nothing else is left behind"


def test_a_backbone_of_ones_own_takes_part_in_the_comparison():
    _, folder, _ = finish_run()
    assert folder.name.startswith("tiny-unfrozen50-")
    table = pd.read_csv(folder.parent / "runs.csv")
    assert table.astype(str).apply(lambda column: column.str.contains("tiny")).to_numpy().any()
    assert "tiny" in (folder.parent / "report.html").read_text("utf-8")


def test_copies_of_a_film_are_on_one_side_of_the_split():
    """Though the phantom that is mirrored has another patient's name."""
    _, folder, _ = finish_run()
    split = pd.read_csv(folder / "split.csv")
    assert split["group"].nunique() == split["patient_id"].nunique() - 1
    assert split.groupby("group")["split"].nunique().max() == 1
    assert split.groupby("patient_id")["split"].nunique().max() == 1


# ---- start and end of a script -----------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    """A function that runs a main() as a script does; returns what it ends with."""

    def call(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["test_run.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            common.run(main)
        return caught.value.code

    return call


def test_mistakes_and_stops_are_one_sentence_and_leave_no_handler(run):
    def fail():
        raise common.UserError("EPOCHS is 0.")

    def interrupt():
        os.kill(os.getpid(), signal.SIGINT)

    def terminate():
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert run(fail).strip() == "test_run.py: EPOCHS is 0."
    for stop in (interrupt, terminate):
        assert re.fullmatch(r"test_run\.py: stopped: the same command continues .*", run(stop).strip())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_arguments_are_answered_with_a_sentence(run):
    sentence = run(lambda: pytest.fail("it starts"), "--help")
    assert "no arguments" in sentence
    assert "\n" not in sentence.strip()


def test_an_error_that_nobody_expected_keeps_its_traceback(monkeypatch):
    """An OSError of reading is none of writing either."""

    def fail():
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "argv", ["test_run.py"])
    with pytest.raises(OSError, match="Input/output error"):
        common.run(fail)


@pytest.mark.parametrize(
    ("module", "message", "words"),
    [("cv2", "libGL.so.1: cannot open shared object file",
      ["libGL.so.1", "apt-get install libgl1 libglib2.0-0", "pip install opencv-python-headless"]),
     ("pandas", "No module named 'pandas'", [f"pip install -r {REPOSITORY / 'requirements.txt'}"])],
)
def test_what_is_not_installed_is_one_sentence_with_the_remedy(tmp_path, module, message, words):
    (tmp_path / f"{module}.py").write_text(f"raise ImportError({message!r})")
    process = subprocess.run([sys.executable, "-c", "import resnet50"], cwd=REPOSITORY, capture_output=True,
                             text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    (line,) = process.stderr.splitlines()
    assert message in line
    assert all(word in line for word in words)


# ---- notebooks ---------------------------------------------------------------------------------

NOTEBOOK = """
import os, signal
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
for number, cell in enumerate(['''
import matplotlib, os, signal, sys
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
sys.path.insert(0, os.getcwd())
import resnet50
print(matplotlib.get_backend(), os.environ["MPLBACKEND"])
''', "%run broken.py", "%run tiny.py", "%run tiny.py", '''
print(handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)])
''']):
    print(f"cell {number}", flush=True)
    shell.run_cell(cell)
print("end")
"""


def test_a_notebook_keeps_its_plots_and_signals_and_sees_sentences(tmp_path):
    """Ctrl-C in the third cell; the fourth, the same, continues, and ends as if nothing had happened."""
    folder = copy_program(tmp_path / "program")
    shutil.copy(REPOSITORY / "resnet50.py", folder)
    write_tiny(folder / "broken.py", EPOCHS=0)
    write_tiny(folder / "tiny.py", EPOCHS=2)
    arguments = ["-c", f"import os; os.chdir({str(folder)!r})\n{NOTEBOOK}"]
    process = start_process(arguments, folder, MPLBACKEND="svg", IPYTHONDIR=str(tmp_path))
    console = read_until(process, "Epoch 2/2")
    process.send_signal(signal.SIGINT)
    console += finish_process(process)
    cells = re.split(r"(?m)^cell \d\n", console)[1:]
    assert cells[0].splitlines()[-1] == "svg svg"
    assert cells[1].splitlines()[-1].startswith("EPOCHS is 0, but has to be")
    assert cells[2].strip().splitlines()[-1].startswith("stopped: the same command continues")
    assert "after epoch 1 of 2" in cells[3]
    assert "finished" in cells[3]
    assert cells[4].split() == ["True", "end"]
    assert "Traceback" not in console
    assert read_results(folder / "outputs")["history.csv"].count(b"\n") == 3


# ---- one new film ------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "box"), [(None, ""), ("breast", ""), ("lesion", "9:20:12:10")])
def test_predict_reads_a_film_as_training_does(film, tmp_path, monkeypatch, crop, box):
    """At the bit depth of the collection; paths count from the working directory."""
    settings = prepare(tmp_path, CROP=crop)
    model, _ = build_tiny(settings, make_films([0, 1], 1))
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run" / "model.keras")
    film(tmp_path / "film.png", top=4095, dtype=np.uint16)
    depths = {"16 bit PNG": 14}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(
        {"constants": {"CROP": crop, "THRESHOLD": 0.5}, "collection": {"depths": depths}}))
    monkeypatch.chdir(tmp_path)
    image, _ = common.reading.read_image(tmp_path / "film.png", crop, box, depths)
    assert image.max() < 70, "a quarter of the grey scale"
    pixels = np.repeat(image[None, ..., None], 3, axis=-1).astype(np.float32)
    for run in ("run", "run/model.keras"):
        probability, overlay = common.predict(run, "film.png", box)
        assert probability == pytest.approx(model.predict(pixels, verbose=0).item(), abs=1e-6)
    expected = common.overlay_map(image, common.make_gradcam(model)(pixels)[1][0].numpy())
    assert np.array_equal(overlay, expected)


def test_predict_names_what_it_cannot_read(film, tmp_path):
    _, folder, _ = finish_run()
    film(tmp_path / "film.png")
    for run, path, words in ((tmp_path / "old.h5", tmp_path / "film.png", r"old\.h5"),
                             (tmp_path / "nothing", tmp_path / "film.png", "nothing"),
                             (folder, tmp_path / "missing.png", "no file|No such file")):
        with pytest.raises(common.UserError, match=words):
            common.predict(run, path)
    shutil.copy(folder / "model.keras", tmp_path)
    with pytest.raises(common.UserError, match=r"settings\.json"):
        common.predict(tmp_path / "model.keras", tmp_path / "film.png")
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    settings["constants"]["CROP"] = "lesion"
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(common.UserError, match="lesion_box"):
        common.predict(tmp_path, tmp_path / "film.png")


def test_predict_gives_what_the_run_gave():
    script, folder, _ = finish_run()
    row = pd.read_csv(folder / "predictions.csv").iloc[0]
    probability, overlay = common.predict(folder, Path(script.DATA_DIR) / row["path"])
    assert probability == pytest.approx(row["probability"], abs=1e-6)
    assert (overlay.dtype, overlay.shape) == (np.uint8, (224, 224, 3))
