"""A run from the outside: its constants, its name, its films, its folder, and where it is started from."""
import contextlib
import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, write_film
from tiny import (build_tiny, common, copy_program, finish_process, finish_run, hasten, import_tiny, make_films,
                  prepare, read_until, spoil, start_process, write_tiny)

import resnet50
import vgg16
from data.results import comparison
from data.results.baseline import FOREST, score_films



@pytest.fixture(scope="module", autouse=True)
def quick_runs():
    with hasten():
        yield


# ---- constants ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("UNFROZEN_FRACTION", 70), ("UNFROZEN_FRACTION", -0.1), ("UNFROZEN_FRACTION", "0.5"), ("FOLD", 5),
     ("FOLD", -1), ("FOLD", 0.5), ("BATCH_SIZE", 0), ("BATCH_SIZE", 13.0), ("BATCH_SIZE", True), ("EPOCHS", 0),
     ("LEARNING_RATE", 0), ("LEARNING_RATE", float("nan")), ("LEARNING_RATE", float("inf")), ("SEED", -1),
     ("SEED", "zero"), ("SPLIT_SEED", -1), ("WEIGHTS", ""), ("WEIGHTS", 7), ("DATA_DIR", None),
     ("OUTPUT_DIR", " "), ("CROP", "Breast"), ("CROP", True), ("MIXED_PRECISION", 1),
     ("BRIGHTNESS", 10), ("CONTRAST", -0.2), ("SATURATION", None), ("DROPOUT", 30), ("DROPOUT", 1),
     ("HEAD_UNITS", 0), ("HEAD_UNITS", 0.5),
     ("THRESHOLD", "0.5"), ("THRESHOLD", 50)],
)
def test_a_wrong_constant_stops_at_once_and_is_named(monkeypatch, name, value):
    """In the script, and where main() is called with it."""
    monkeypatch.setattr(vgg16, name, value)
    for main, constants in ((resnet50.main, {name: value}), (vgg16.main, {})):
        with pytest.raises(common.UserError, match=rf"^{name} is {re.escape(repr(value))}, but must be"):
            main(**constants)


@pytest.mark.parametrize(("name", "nearest"), [
    ("LEARNINGRATE", "LEARNING_RATE"), ("UNFROZEN_FRACTON", "UNFROZEN_FRACTION"), ("epochs", "EPOCHS"),
    ("XYZ", "")])
def test_a_name_that_is_no_constant_is_refused_with_the_nearest(monkeypatch, name, nearest):
    monkeypatch.setattr(vgg16, "DATA_DIR", None)  # or it would train where the name is accepted
    monkeypatch.setattr(vgg16, name if name.isupper() else "LEARNINGRATES", 1, raising=False)
    words = rf"^{name} is no constant .* nearest is [A-Z_]*{nearest}[A-Z_]*: correct"
    with pytest.raises(common.UserError, match=words):
        resnet50.main(DATA_DIR=None, **{name: 1})
    with pytest.raises(common.UserError, match=words if name.isupper() else r"^LEARNINGRATES is no constant"):
        vgg16.main()


def test_the_constants_of_a_call_are_those_of_that_call(monkeypatch, tmp_path):
    """What is imported in capitals, and a private name, are no constants."""
    monkeypatch.setattr(vgg16, "VGG19", common.keras.applications.VGG19, raising=False)
    monkeypatch.setattr(vgg16, "NP", np, raising=False)
    monkeypatch.setattr(vgg16, "_CACHE", {}, raising=False)
    settings, _ = common.start(vars(vgg16), {"UNFROZEN_FRACTION": 1, "THRESHOLD": np.float64(0.4)})
    assert (settings.UNFROZEN_FRACTION, settings.THRESHOLD, vgg16.UNFROZEN_FRACTION) == (1, 0.4, 0.5)
    assert [type(value) for value in (settings.UNFROZEN_FRACTION, settings.THRESHOLD)] == [float, float]


def test_an_edit_of_the_program_after_its_import_is_refused(monkeypatch):
    """As in a notebook."""
    file = REPOSITORY / "data" / "films.py"
    monkeypatch.setitem(common.IMPORTED, file, file.read_bytes() + b"# edited")
    with pytest.raises(common.UserError, match=r"^data/films\.py was edited after its import.*restart the kernel"):
        vgg16.main()


@pytest.mark.parametrize(("here", "hidden", "said"), [
    (True, None, True), (True, "0", True), (True, "-1", False), (False, None, False)])
def test_a_gpu_that_tensorflow_does_not_see_gets_a_line(monkeypatch, caplog, here, hidden, said):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if here else None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if hidden:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    common.explain_missing_gpu()
    assert ("pip install 'tensorflow[and-cuda]'" in caplog.text) is said


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    """As a notebook has them that tries seeds in a loop."""
    numbers = {"SEED": 3, "SPLIT_SEED": 1, "FOLD": 2, "EPOCHS": 4, "BATCH_SIZE": 5, "LEARNING_RATE": 0.5}
    settings = prepare(tmp_path, **{name: np.array(value)[()] for name, value in numbers.items()})
    assert json.loads(json.dumps({name: getattr(settings, name) for name in numbers})) == numbers


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


def test_the_name_changes_with_all_that_decides_the_results(name, tmp_path, monkeypatch):
    folders = [name(**constants) for constants in (
        {}, {"UNFROZEN_FRACTION": 0.6}, {"MIXED_PRECISION": True}, {"HEAD_UNITS": 128}, {"DROPOUT": 0.2})]
    assert re.fullmatch(r"tiny-unfrozen50-[0-9a-f]{6}", folders[0].name)
    settings, films = prepare(tmp_path), make_films([0, 1] * 5, held_out=4)
    model, weights = build_tiny(settings, films)
    assert common.name_run(settings, films, model, weights) == folders[0]
    for constants in ({"EPOCHS": 8}, {"SEED": 1}, {"LEARNING_RATE": 1e-3}, {"BATCH_SIZE": 12}, {"BRIGHTNESS": 0.2},
                      {"CONTRAST": 0.1}, {"THRESHOLD": 0.4}):
        folders.append(common.name_run(settings._replace(**constants), films, model, weights))
    for column, value in (("label", "benign"), ("split", "train"), ("image_sha256", "other"), ("group", "other")):
        changed = films.assign(**{column: [*films[column][:9], value]})
        folders.append(common.name_run(settings, changed, model, weights))
    folders.append(common.name_run(settings, films, model, weights | {"sha256": "1"}))
    assert common.reading.parse_code(REPOSITORY / "common.py") in common.CODE, "without its comments"
    for place, name, value in ((common.keras, "__version__", "0"), (common, "CODE", ["edited"]),
                               (common, "describe_gpu", lambda: {"device_name": "a GPU"})):
        monkeypatch.setattr(place, name, value)
        folders.append(common.name_run(settings, films, model, weights))
    assert len(set(folders)) == len(folders)


def test_the_name_says_in_which_precision_auto_trained(name, monkeypatch):
    for flags, mixed in (([], False), (["amx_bf16"], True)):
        monkeypatch.setattr(common, "list_bfloat16_flags", lambda flags=flags: flags)
        assert name(MIXED_PRECISION="auto") == name(MIXED_PRECISION=mixed)


def test_the_name_changes_with_nothing_else(name, tmp_path):
    """Neither with the place of anything, nor with settings that change neither films nor split."""
    weights = {"pretrained": True, "sha256": "1"}
    folder = name(weights=weights | {"origin": "here.h5"}, UNFROZEN_FRACTION=1)
    assert folder == name(weights=weights | {"origin": "there.h5"}, UNFROZEN_FRACTION=1.0)
    moved = name(weights=weights | {"origin": "here.h5"}, UNFROZEN_FRACTION=1, outputs=tmp_path / "elsewhere",
                 DATA_DIR="/elsewhere", FOLD=3, CROP=None, SATURATION=0.1)
    assert (moved.parent, moved.name) == (tmp_path / "elsewhere", folder.name)


# ---- films: folds and given splits -------------------------------------------------------------


def copy_run(place):
    """A copy of the tiny run, place/outputs/run, which a test may change."""
    return shutil.copytree(finish_run()[1], place / "outputs" / "run")


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


def test_a_given_split_of_which_nothing_is_left_says_so(collection, tmp_path):
    script = import_tiny(tmp_path, collection(split=["train", "validation"] * 15))
    with pytest.raises(common.UserError, match=r"leaks\.csv"):
        script.main()
    listed = pd.read_csv(tmp_path / "outputs" / "leaks.csv")
    assert listed["path"].tolist() == sorted(f"{number}.png" for number in range(1, 30, 2))
    assert set(listed["trained_on"]) <= {f"{number}.png" for number in range(0, 30, 2)}


def test_too_few_patients_are_found_before_any_film_is_read(collection, tmp_path):
    data = collection(patient_id=[f"p{number // 2 % 2}" for number in range(30)])
    for file in data.glob("*.png"):
        file.write_text("no film, which nobody has noticed yet")
    words = r"1 patients with benign mammograms\. .*5 folds need 5 of each class"
    with pytest.raises(common.UserError, match=words):
        import_tiny(tmp_path, data).main()


# ---- a complete run ----------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(capsys):
    script, folder, first = finish_run()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}
    assert script.main() == folder
    console = capsys.readouterr().out
    assert "loss" not in console
    assert re.search(rf"delete.*{folder.name}", console)
    results = [line for line in first.splitlines() if re.match(r"accuracy|AUC", line)]
    assert len(results) == 2
    assert set(results) <= set(console.splitlines())
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()
            and path.name != ".cache"] == [folder.name], "nothing else is left behind"


def test_a_run_that_another_process_completes_while_the_page_is_written_is_on_it(tmp_path, monkeypatch):
    _, folder, _ = finish_run()
    shutil.copytree(folder, tmp_path / "first")
    show_section = comparison.show_section

    def complete_another(*arguments):
        shutil.copytree(folder, tmp_path / "second", dirs_exist_ok=True)
        return show_section(*arguments)

    monkeypatch.setattr(comparison, "show_section", complete_another)
    common.compare(tmp_path)
    assert sorted(pd.read_csv(tmp_path / "runs.csv")["run"]) == ["first", "second"]
    assert "second" in (tmp_path / "report.html").read_text("utf-8")


def test_unfinished_runs_are_listed_with_what_they_hold(tmp_path, caplog):
    caplog.set_level("INFO", "mammograms")
    for name, megabytes in ((".tiny-unfrozen50-aaaaaa", 2), (".tiny-unfrozen60-bbbbbb", 3), (".cache", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.npz").write_bytes(bytes(megabytes * 10**6))
    common.list_unfinished(tmp_path)
    (line,) = caplog.messages
    assert line.startswith(f"2 unfinished runs in {tmp_path} hold 5 MB ('.tiny-unfrozen50-aaaaaa', '.tiny")
    shutil.rmtree(tmp_path / ".tiny-unfrozen50-aaaaaa")
    shutil.rmtree(tmp_path / ".tiny-unfrozen60-bbbbbb")
    common.list_unfinished(tmp_path)
    assert caplog.messages == [line]


def test_copies_of_a_film_are_on_one_side_of_the_split():
    """Though the phantom that is mirrored has another patient's name."""
    _, folder, _ = finish_run()
    split = pd.read_csv(folder / "split.csv")
    assert split["group"].nunique() == split["patient_id"].nunique() - 1
    assert split.groupby("group")["split"].nunique().max() == 1
    assert split.groupby("patient_id")["split"].nunique().max() == 1


def test_the_model_of_a_run_is_refused_for_another_fold_and_loaded_for_its_own(tmp_path):
    script, folder, _ = finish_run()
    again = import_tiny(tmp_path, script.DATA_DIR, WEIGHTS=str(folder / "model.keras"), FOLD=2)
    with pytest.raises(common.UserError, match=r"^WEIGHTS: .* was trained on (\d+) of the \1 held-out patients"):
        again.main()
    loaded = []

    def keep(backbone, weights, settings):
        loaded.append(backbone)
        raise common.UserError("enough")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(common.UserError, match="enough"):
        patch.setattr(common, "build_model", keep)
        again.main(FOLD=0)
    model = common.keras.models.load_model(folder / "model.keras")
    for layer in loaded[0].layers:
        assert all(map(np.array_equal, layer.get_weights(), model.get_layer(layer.name).get_weights()))


def test_the_tables_of_a_run_on_phantoms_play_the_pointing_game():
    _, folder, console = finish_run()
    game = json.loads((folder / "metrics.json").read_text("utf-8"))["pointing_game"]["images"]
    assert game["share"] == pytest.approx(game["hits"] / game["images"])
    assert f"{game['hits']} of {game['images']} images" in console


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
    assert "takes no arguments" in sentence
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


def test_another_package_called_data_and_another_backend_are_said_at_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("")
    (tmp_path / "keras.py").write_text("class config:\n    backend = lambda: 'jax'")
    for code, words in (
            (f"import sys; sys.path.append({str(REPOSITORY)!r}); import vgg16",
             [str(tmp_path / "data" / "__init__.py"), f"start Python in {REPOSITORY}"]),
            (f"import keras, sys; sys.path.insert(0, {str(REPOSITORY)!r}); import vgg16",
             ["Keras runs on jax already", "restart"])):
        process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                                 check=False)
        assert (process.returncode, process.stdout) == (1, "")
        (line,) = process.stderr.splitlines()
        assert all(word in line for word in words)


def test_a_run_needs_neither_the_main_thread_nor_stderr_nor_unicode(tmp_path):
    """As below a window of pythonw, with 2>&-, or on a console of Windows-1252."""
    code = """
import threading, common

def main():
    common.open_console()
    common.log.info("caf\u00e9 \u2713")
    print(common.os.environ["TF_CPP_MIN_LOG_LEVEL"], flush=True)
    raise common.UserError("an end")

def run():
    try:
        common.run(main)
    except common.UserError as error:
        print(error, file=common.sys.stderr)
        print(error, flush=True)

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "TF_CPP_MIN_LOG_LEVEL": "2"}
    process = subprocess.run(["sh", "-c", f"exec {sys.executable} -c '{code}' <&- 2>&-"], cwd=REPOSITORY,
                             stdout=subprocess.PIPE, env=environment, check=False)
    assert process.stdout.decode("cp1252").splitlines() == ["caf\u00e9 ?", "2", "an end"]
    assert process.returncode == 0


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
    folder = copy_program(tmp_path / "program", painted=False)
    shutil.copy(REPOSITORY / "resnet50.py", folder)
    write_tiny(folder / "broken.py", EPOCHS=0)
    write_tiny(folder / "tiny.py", EPOCHS=6)
    arguments = ["-c", f"import os; os.chdir({str(folder)!r})\n{NOTEBOOK}"]
    process = start_process(arguments, folder, MPLBACKEND="svg", IPYTHONDIR=str(tmp_path))
    console = read_until(process, "Epoch 2/6")
    process.send_signal(signal.SIGINT)
    console += finish_process(process)
    cells = re.split(r"(?m)^cell \d\n", console)[1:]
    assert cells[0].splitlines()[-1] == "svg svg"
    assert cells[1].splitlines()[-1].startswith("EPOCHS is 0, but must be")
    assert cells[2].strip().splitlines()[-1].startswith("stopped: the same command continues")
    assert re.search(r"continuing after epoch [1-5] of 6", cells[3])
    assert "finished" in cells[3]
    assert cells[4].split() == ["True", "end"]
    assert "Traceback" not in console
    (history,) = (folder / "outputs").glob("[!.]*/history.csv")
    assert len(pd.read_csv(history)) == 6


# ---- new films ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("crop", "box", "threshold", "run"), [
    (None, "", 0.01, "run"), ("breast", "", 0.99, "run/model.keras"), ("lesion", "9:20:12:10", 0.5, "run")])
def test_predict_reads_a_film_as_training_does(film, tmp_path, monkeypatch, crop, box, threshold, run):
    """At the bit depth of the collection; paths count from the working directory."""
    settings = prepare(tmp_path, CROP=crop)
    model, _ = build_tiny(settings, make_films([0, 1], 1))
    (tmp_path / "run").mkdir()
    model.save(tmp_path / "run" / "model.keras")
    film(tmp_path / "film.png", top=4095, dtype=np.uint16)
    depths = {"16 bit PNG": 14}
    (tmp_path / "run" / "settings.json").write_text(json.dumps(
        {"note": "", "constants": {"CROP": crop, "THRESHOLD": threshold, "BATCH_SIZE": 2},
         "collection": {"depths": depths}}))
    monkeypatch.chdir(tmp_path)
    image, _ = common.reading.read_image(tmp_path / "film.png", crop, box, depths)
    assert image.max() < 70, "a quarter of the grey scale"
    pixels = np.repeat(image[None, ..., None], 3, axis=-1).astype(np.float32)
    table = common.predict(run, "film.png", "overlays", {"film.png": box})
    assert table["path"].tolist() == [str(tmp_path / "film.png")]
    assert table["probability"].item() == pytest.approx(model.predict(pixels, verbose=0).item(), abs=1e-6)
    overlay = common.overlay_map(image, common.make_gradcam(model, threshold)(pixels)[1][0].numpy())
    boxes = [[1 / 4, 7 / 24, 1 / 2, 5 / 12]] if box else np.empty((0, 4))  # of a crop of 24 pixels from (3, 13)
    common.write_overlay(overlay, tmp_path / "expected.png", table["probability"].item(), np.array(boxes))
    assert table["predicted"].item() == common.CLASSES[table["probability"].item() >= threshold]
    assert (tmp_path / "overlays" / "00000_film.png").read_bytes() == (tmp_path / "expected.png").read_bytes()


def test_a_run_that_cannot_be_loaded_is_a_sentence(film, tmp_path):
    _, folder, _ = finish_run()
    film(tmp_path / "film.png")
    for run in (tmp_path / "old.h5", tmp_path / "nothing"):
        with pytest.raises(common.UserError, match=run.name):
            common.predict(run, tmp_path / "film.png")
    shutil.copy(folder / "model.keras", tmp_path)
    with pytest.raises(common.UserError, match=r"settings\.json"):
        common.predict(tmp_path / "model.keras", tmp_path / "film.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.UserError, match="empty has no image"):
        common.predict(folder, tmp_path / "empty")


def save_other(file, size=224, logit="logit", units=1, value=0.0):
    """Save a model that could be that of a run but for the arguments; weights are `value` or -`value`."""
    keras = common.keras
    inputs = keras.Input((size, size, 3))
    tensor = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3, strides=32)(inputs))
    tensor = keras.layers.Activation("sigmoid")(keras.layers.Dense(units, name=logit)(tensor))
    model = keras.Model(inputs, tensor)
    model.set_weights([np.resize([value, -value if weight.ndim == 4 else value], weight.shape)
                       for weight in model.get_weights()])
    model.save(file)


def flip_bit(file):
    """In the middle of the weights, which the archive has a checksum of."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def drop_config(file):
    """Leave the weights alone in the archive."""
    with zipfile.ZipFile(file) as archive:
        weights = archive.read("model.weights.h5")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.weights.h5", weights)


SETTINGS = [  # what predict() uses of them
    b"", b"{", b"[]", b"[" * 10**6, b"\xff\xfe\x00", b"\x00" * 100, Path.unlink, {"constants": []},
    *[{"constants": {"THRESHOLD": value}} for value in ("0.5", None, float("nan"), True, [0.5])],
    *[{"constants": {"CROP": value}} for value in ("Breast", ["breast"], 0)],
    *[{"constants": {"BATCH_SIZE": value}} for value in (0, 2.5, "13")],
    *[{"collection": {"depths": value}} for value in ({"8 bit PNG": "8"}, {"8 bit PNG": 99}, [8], None)],
    *[{"note": value} for value in (3, ["note"], "\x1b[31m", "a\nb", "x" * 10**6)],
    *[{"folds": value} for value in ([], "run", [["run"]], [None], ["../run"], ["/etc"], [".."], [""])],
    *[{"folds": value} for value in (["run"] * 99, ["C:\\run"], ["no such run"])],
]
MODELS = [
    b"", b"text", pickle.dumps({"a": np.ones(3)}), Path.unlink, drop_config, flip_bit,
    lambda file: file.unlink() or file.mkdir(), lambda file: file.write_bytes(file.read_bytes()[:-100]),
    lambda file: save_other(file, size=96), lambda file: save_other(file, logit="score"),
    lambda file: save_other(file, units=2), lambda file: save_other(file, value=float("nan")),
    lambda file: common.keras.Sequential([common.keras.Input((3,)), common.keras.layers.Dense(1)]).save(file),
]
REPORTED = [  # what validate() uses of settings.json, too
    *[{"constants": {name: value}} for name, value in (
        ("DATA_DIR", None), ("SEED", "0"), ("EPOCHS", 1e999), ("DROPOUT", "{0.__class__}"), ("HEAD_UNITS", None))],
    {"title": None}, {"model": 3}, {"model": {"layers": "many"}}, {"model": {"floats": [32]}},
    {"weights": {"pretrained": "yes"}}, {"weights": {"origin": 3}},
]
TABLES = [  # test_splits.py has more of them
    ("split.csv", b"path,label\n"), ("split.csv", Path.unlink), ("fingerprints.npy", Path.unlink),
    ("properties.csv", b""), ("properties.csv", Path.unlink),
]
CODE_WORDS = r"Errno|Error|Traceback|object|dtype|codec|(?<!\.)[Kk]eras|pickle|h5|tensor|module|attribute"


@pytest.mark.parametrize(("command", "name", "change"), [
    *[("predict", "settings.json", change) for change in SETTINGS],
    *[("predict", "model.keras", change) for change in MODELS],
    *[("validate", "settings.json", change) for change in REPORTED],
    *[("validate", name, change) for name, change in TABLES],
])
def test_a_damaged_or_foreign_run_is_a_sentence(tmp_path, command, name, change):
    """It names the file, and tells nothing of Python or of a library."""
    run = copy_run(tmp_path)
    spoil(run / name, change)
    write_classes(tmp_path / "films", 2)
    with pytest.raises(common.UserError) as caught:
        getattr(common, command)(run, tmp_path / "films")
    assert re.search(rf"{name}|no such run", str(caught.value))
    assert not re.search(CODE_WORDS, str(caught.value).replace(str(run), "")), caught.value
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_run_cannot_lead_to_another_place(tmp_path):
    run = copy_run(tmp_path)
    shutil.copytree(run, tmp_path / "elsewhere")
    for names in (["../elsewhere"], [str(tmp_path / "elsewhere")]):
        spoil(run / "settings.json", {"folds": names})
        with pytest.raises(common.UserError, match="which no run writes"):
            common.predict(run, tmp_path / "film.png")


def test_a_model_without_a_number_gives_a_reason(collection, tmp_path):
    """Its weights are finite, but not what they add up to."""
    run = copy_run(tmp_path)
    save_other(run / "model.keras", value=3e38)
    (row,) = common.predict(run, collection() / "1.png").itertuples()
    assert np.isnan(row.probability)
    assert (row.predicted, "no number" in row.reason) == ("", True)
    with pytest.raises(common.UserError, match="no number"):
        common.validate(run, tmp_path / "films")


@pytest.mark.parametrize("trouble", ["file", "full", "long", "nul"])
def test_predict_gives_the_table_though_overlays_cannot_be_written(film, tmp_path, monkeypatch, capsys, trouble):
    overlays = tmp_path / {"nul": "\0", "long": "x" * 5000}.get(trouble, "overlays")
    if trouble == "file":
        overlays.write_text("in the way")
    if trouble == "full":  # from the second overlay on
        write = iter([Path.write_bytes])
        monkeypatch.setattr(Path, "write_bytes", lambda *given: next(write, run_out_of_space)(*given))
    for number in range(3):
        film(tmp_path / "films" / f"{number}.png", seed=number)
    expected = common.predict(finish_run()[1], tmp_path / "films")
    table = common.predict(finish_run()[1], tmp_path / "films", overlays=overlays)
    assert table.equals(expected)
    assert expected["reason"].eq("").all()
    console = capsys.readouterr().out
    assert console.count("cannot be written") == 1
    assert ("from row 1 on" in console) == (trouble == "full")
    if trouble == "full":
        assert [path.name for path in overlays.iterdir()] == ["00000_0.png"], "nothing that is half written"


def run_out_of_space(path, content):
    path.touch()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_predict_says_of_each_path_why_it_has_no_probability(film, tmp_path):
    names = ["乳" * 83 + ".png", "x" + "乳" * 83 + ".png", "a" * 251 + ".png", os.fsdecode(b"\xff.png")]
    for name in names:
        film(tmp_path / "film.png")
        (tmp_path / "film.png").rename(tmp_path / name)
    (tmp_path / "link.png").symlink_to("nowhere.png")
    (tmp_path / "folder.png").mkdir()
    assert common.cv2.imwrite(str(tmp_path / "mask.png"), np.kron([[0, 255], [0, 0]], np.ones((40, 40))))
    wrong = ["missing.png", "folder.png", "link.png", "x" * 5000, "a\0b.png", os.devnull, tmp_path, "mask.png"]
    paths = [tmp_path / name for name in [*names, names[0], *wrong]]
    table = common.predict(finish_run()[1], paths, overlays=tmp_path / "overlays")
    assert table["path"].tolist() == list(map(str, paths))
    assert table["probability"].notna().tolist() == [True] * 5 + [False] * len(wrong)
    assert table["reason"].ne("").tolist() == [False] * 5 + [True] * len(wrong)
    assert table["reason"].iloc[-1] == "a mask in black and white, not a mammogram"
    written = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    assert [name[:6] for name in written] == [f"{number:05d}_" for number in range(5)]
    assert written[0] == f"00000_{'乳' * 33}.png"


def test_predict_gives_what_the_run_gave_and_lists_what_cannot_be_read(film, tmp_path, capsys):
    script, folder, _ = finish_run()
    expected = pd.read_csv(folder / "predictions.csv").set_index("path")
    for path in expected.index:
        shutil.copy(Path(script.DATA_DIR) / path, tmp_path)
    (tmp_path / "broken.png").write_text("no film")
    (tmp_path / "notes.txt").write_text("no film either")
    table = common.predict(folder, tmp_path, overlays=tmp_path / "overlays").set_index("path")
    assert len(table) == len(expected) + 1
    console = capsys.readouterr().out
    assert "trained without" not in console
    assert "*** the model: synthetic phantoms; random weights" in console
    for path in expected.index:
        row = table.loc[str(tmp_path / Path(path).name)]
        assert row["probability"] == pytest.approx(expected["probability"][path], abs=1e-6)
        assert (row["predicted"], row["reason"]) == (expected["predicted"][path], "")
    broken = table.loc[str(tmp_path / "broken.png")]
    assert np.isnan(broken["probability"]) and broken["predicted"] == ""
    assert "one that is damaged" in broken["reason"]
    assert len(list((tmp_path / "overlays").iterdir())) == len(expected)
    paths = [tmp_path / "missing.png", *sorted(tmp_path.glob("synthetic*"))[:3]]
    boxes = {paths[1]: "1:1:20:20", f"elsewhere/{paths[2].name}": "1,1,20,20", "nobody.png": "1:1:2:2"}
    listed = common.predict(folder, paths, lesion_boxes=boxes)
    assert listed["path"].tolist() == list(map(str, paths))
    assert (listed["reason"] == "").tolist() == [False, True, False, True]
    assert "x:y:width:height" in listed["reason"][2]
    console = capsys.readouterr().out
    assert "1 lesion boxes belong to no mammogram, or to several of that name: 'nobody.png'" in console
    (tmp_path / "labels.csv").write_text(f"path;lesion_box\n{paths[2].name};1,1,20,20\n{paths[3].name};\n")
    again = common.predict(folder, paths, lesion_boxes=tmp_path / "labels.csv")
    assert again.equals(listed)
    film(tmp_path / "deep.png", top=4095, dtype=np.uint16)
    assert common.predict(folder, tmp_path / "deep.png")["reason"].item() == ""
    assert "trained without 16 bit PNG: each such mammogram is scaled by its own" in capsys.readouterr().out


# ---- another collection ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """(run, folder, console) of the tiny run on 20 films of noise, 2 copies of training films, 1 patient of it."""
    script, run, _ = finish_run()
    place = tmp_path_factory.mktemp("elsewhere") / "other"
    trained = pd.read_csv(run / "split.csv").query("split == 'train'").reset_index(drop=True)
    rows = [(f"{number}.png", common.CLASSES[number // 2 % 2], f"new {number // 2}") for number in range(20)]
    rows.append(("known.png", "benign", trained["patient_id"][0]))
    for number, (name, *_) in enumerate(rows):
        write_film(place / name, seed=number)
    for number, path in enumerate(trained["path"][5:7]):
        image = common.cv2.imread(str(Path(script.DATA_DIR) / path), common.cv2.IMREAD_UNCHANGED)
        assert common.cv2.imwrite(str(place / f"copy{number}.png"), image[::-1, ::-1])
        rows.append((f"copy{number}.png", "malignant", f"renamed {number}"))
    pd.DataFrame(rows, columns=["path", "label", "patient_id"]).to_csv(place / "labels.csv", index=False)
    copy, console = copy_run(place.parent), io.StringIO()
    with contextlib.redirect_stdout(console):
        folder = common.validate(copy, place)
    return copy, folder, console.getvalue()


def write_classes(folder, count, **options):
    """Films in folders benign and malignant, by turns."""
    for number in range(count):
        write_film(folder / common.CLASSES[number % 2] / f"{number}.png", seed=100 + number, **options)


def test_validation_on_other_films_leaves_out_what_was_trained_on(validated):
    run, folder, _ = validated
    assert folder.name.startswith(f"{run.name}-on-other-")
    leaks = pd.read_csv(folder / "leaks.csv")
    assert sorted(leaks["path"]) == ["copy0.png", "copy1.png", "known.png"]
    trained = pd.read_csv(run / "split.csv").query("split == 'train'")
    assert set(leaks["trained_on"]) <= set(trained["path"])
    predictions = pd.read_csv(folder / "predictions.csv")
    assert sorted(predictions["path"]) == sorted(f"{number}.png" for number in range(20))
    single = common.predict(run, [folder.parent.parent / "other" / path for path in predictions["path"]])
    assert np.allclose(single["probability"], predictions["probability"], atol=1e-6)


def test_two_collections_of_one_name_have_results_of_their_own_which_have_no_model(validated, tmp_path):
    run, first, _ = validated
    write_classes(tmp_path / "other", 4)
    second = common.validate(run, tmp_path / "other")
    assert second.name.startswith(f"{run.name}-on-other-")
    assert second != first
    spoil(second / "settings.json", {"folds": [run.name]})  # its models exist
    for command in (common.validate, common.predict):
        with pytest.raises(common.UserError, match=r"validate\(\), which has no model"):
            command(second, tmp_path / "other")


def test_validation_scales_films_as_predict_does(tmp_path):
    """By the bits of the films that the run saw, though these here use fewer."""
    run, dark = copy_run(tmp_path), tmp_path / ("暗" * 83)
    spoil(run / "settings.json", {"collection": {"depths": {"16 bit PNG": 12}}})
    write_classes(dark, 4, top=1000, dtype=np.uint16)  # 10 bits: with 4 fewer, they would be another scanner's
    write_film(dark / "benign" / "bright.png", top=65000, dtype=np.uint16)  # which is the other films' no business
    folder = common.validate(run, dark)
    assert re.fullmatch(r"run-on-暗+-[0-9a-f]{6}", folder.name), "the name is cut between characters"
    predictions = pd.read_csv(folder / "predictions.csv")
    single = common.predict(run, [dark / path for path in predictions["path"]])
    assert np.allclose(single["probability"], predictions["probability"], atol=1e-6)


def test_validation_without_lesion_boxes_says_so(tmp_path):
    run = copy_run(tmp_path)
    spoil(run / "settings.json", {"constants": {"CROP": "lesion"}})
    write_classes(tmp_path / "other", 2)
    with pytest.raises(common.UserError, match=r"no mammogram that .* can be scored on \(2: no lesion_box\)"):
        common.validate(run, tmp_path / "other")


def test_validation_on_its_own_films_is_refused(validated, tmp_path):
    run, _, _ = validated
    films = Path(finish_run()[0].DATA_DIR)
    split = pd.read_csv(run / "split.csv").query("split == 'train'").drop(columns="split")
    split.assign(path=[str(films / path) for path in split["path"]]).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(common.UserError, match=r"no mammogram that .* can be scored on .*in the training set"):
        common.validate(run, tmp_path)


def test_validation_on_other_films_is_a_result_of_its_own(validated):
    run, folder, console = validated
    results = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert (results["validation_images"], results["validation_patients"]) == (20, 10)
    assert sum(results["per_patient"]["confusion_matrix"].values()) == 10
    training, here = (pd.read_csv(place / "properties.csv", keep_default_na=False) for place in (run, folder))
    properties = here.drop(columns=["path", "label", "split", "note"])
    expected = score_films(FOREST, training[training["split"] == "train"], properties).set_axis(here["path"])
    predictions = pd.read_csv(folder / "predictions.csv")
    assert predictions["baseline"].tolist() == pytest.approx(expected[predictions["path"]].tolist())
    for name in ("roc_curve.png", "confusion_matrix.png", "calibration.png", "grad_cam_example.png", "summary.md"):
        assert (folder / name).is_file()
    assert "20 held-out mammograms of 10 patients" in console
    counts = "10 benign mammograms of 5 patients and 10 malignant mammograms of 5 patients"
    assert f"validation set: {counts}" in console
    assert "FOLD is not used" not in console and "\ntraining set: " not in console, "of the run"
    runs = pd.read_csv(folder.parent / "runs.csv").set_index("run")
    assert runs["auc"][folder.name] == pytest.approx(results["auc"])
    assert folder.name in (folder.parent / "report.html").read_text("utf-8")
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    assert settings["constants"]["TRAINED_ON"] == json.loads(
        (run / "settings.json").read_text("utf-8"))["constants"]["DATA_DIR"]
