"""Runs that are killed, stopped, crowded out and cut off, and what goes on from them.

KILLS=24 python -m pytest tests/test_interruptions.py -k killed

is the long form: so many kills, over all stages, of both scripts.
"""
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest
from conftest import REPOSITORY
from test_scripts import prepare_script

import common

KILLS = int(os.environ.get("KILLS", "4"))
STAGES = {  # what has been printed when a stage begins
    "reading": b"cache ",
    "first epoch": b"Epoch 1/3",
    "between epochs": b"Epoch 2/3",
    "last epoch": b"Epoch 3/3",
    "evaluation": b"result ",
    "plotting": b"pointing ",
}


class Run:
    """A script in a process of its own, whose console is read as it comes."""

    def __init__(self, folder, name, **options):
        self.console = (folder / "console.txt").open("w+b")
        command, environment = prepare_script(name, folder, EPOCHS=3)
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=self.console,
                                        stderr=subprocess.STDOUT, **options)

    def read(self):
        self.console.seek(0)
        return self.console.read()

    def wait_for(self, words):
        while words not in self.read() and self.process.poll() is None:
            time.sleep(0.02)

    def end(self):
        self.process.wait()
        return self.read().decode()


def read_results(folder):
    """Everything of a finished run that has to be the same: bytes, and the arrays of model.keras."""
    (run,) = (folder / "outputs").glob("[!.]*/")
    names = ("predictions.csv", "metrics.json", "history.csv", "split.csv", "roc_curve.png",
             "grad_cam_example.png")
    results = {name: (run / name).read_bytes() for name in names}
    with zipfile.ZipFile(run / "model.keras") as archive:
        weights = h5py.File(io.BytesIO(archive.read("model.weights.h5")))

    def keep(name, item):
        if isinstance(item, h5py.Dataset):
            results[name] = item[()].tobytes()

    weights.visititems(keep)
    assert len(results) > 30
    return results


@pytest.mark.parametrize("name", ["vgg16", "resnet50"] if KILLS > 6 else ["vgg16"])
def test_a_run_that_is_killed_anywhere_ends_as_if_it_never_was(tmp_path, name):
    chance = random.Random(name)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert "finished" in Run(tmp_path / "whole", name).end()
    consoles, kills = [], 0
    stages = itertools.cycle(STAGES.items() if KILLS > 6 else [*STAGES.items()][:4])
    while kills < KILLS // (2 if KILLS > 6 else 1):
        run, (stage, words) = Run(tmp_path / "killed", name), next(stages)
        run.wait_for(words)
        time.sleep(chance.uniform(0, 2))
        run.process.kill()
        consoles.append(run.end())
        kills += "finished" not in consoles[-1]
        print(f"killed in {stage}: {consoles[-1].splitlines()[-1]!r}")
        assert common.read_runs(tmp_path / "killed" / "outputs") == [] or "finished" in "".join(consoles)
    consoles.append(Run(tmp_path / "killed", name).end())
    assert "finished" in consoles[-1], consoles[-1]
    assert any("continuing  at epoch 2 of 3" in console for console in consoles)
    whole, killed = (read_results(tmp_path / which) for which in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [key for key in whole if whole[key] != killed[key]] == []
    left = [path.name for path in (tmp_path / "killed" / "outputs").iterdir() if path.name.startswith(".")]
    assert sorted(name for name in left if not name.endswith(".lock")) == [".cache"], "nothing else is left behind"


@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, b"import"), (signal.SIGTERM, b"Epoch 1/3")])
def test_a_signal_ends_a_run_within_seconds_and_with_one_line(tmp_path, number, words):
    run = Run(tmp_path, "vgg16")
    if words == b"import":
        time.sleep(1.5)
    else:
        run.wait_for(words)
    run.process.send_signal(number)
    started = time.perf_counter()
    console = run.end()
    assert time.perf_counter() - started < 5
    assert run.process.returncode == 128 + number
    assert console.endswith("\nstopped: run the same command to go on from the last finished epoch\n")
    assert "Traceback" not in console


def test_a_folder_deleted_underneath_is_a_sentence(tmp_path):
    run = Run(tmp_path, "vgg16")
    run.wait_for(b"Epoch 1/3")
    shutil.rmtree(tmp_path / "outputs")
    console = run.end()
    assert run.process.returncode == 1
    assert "cannot be written (No such file or directory): mend that, or choose another OUTPUT_DIR" in console
    assert "Traceback" not in console


@pytest.mark.parametrize("most", [1e6, 1e8], ids=["cache", "state"])
def test_a_full_disk_is_a_sentence_and_costs_no_earlier_result(tmp_path, most):
    """A limit on the size of files: writing more fails as on a full disk."""
    earlier = tmp_path / "outputs" / "vgg16-unfrozen50-000000"
    earlier.mkdir(parents=True)
    (earlier / "metrics.json").write_text("{}")
    limit = (int(most), int(most))
    run = Run(tmp_path, "vgg16", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    console = run.end()
    assert run.process.returncode == 1
    assert "cannot be written (" in console
    assert "Traceback" not in console
    assert (earlier / "metrics.json").read_text() == "{}"
    assert not list((tmp_path / "outputs").rglob("*.partial"))


# ---- in one process ----------------------------------------------------------------------------


@pytest.fixture
def named(named):
    """The same, and where its run writes."""
    return *named, common.locate(named[0]["constants"]["OUTPUT_DIR"])


def test_a_failed_run_leaves_nothing_and_keeps_the_earlier_one(named):
    outputs = named[2]
    with common.run_folder(*named) as folder:
        (folder / "file.txt").write_text("first")
    with pytest.raises(ZeroDivisionError), common.run_folder(*named) as folder:
        (folder / "file.txt").write_text("second")
        raise ZeroDivisionError
    (run,) = outputs.glob("[!.]*")
    assert (run / "file.txt").read_text() == "first"
    with common.run_folder(*named) as folder:
        (folder / "other.txt").write_text("third")
    assert [path.name for path in outputs.iterdir() if not path.name.startswith(".")] == [run.name]
    assert [path.name for path in run.iterdir()] == ["other.txt"]


def test_a_run_killed_between_its_two_renames_is_put_right(named):
    with common.run_folder(*named) as folder:
        (folder / "file.txt").write_text("first")
    (run,) = named[2].glob("[!.]*")
    work = run.with_name(f".{run.name}")
    (work / "new").mkdir(parents=True)
    run.rename(work / "old")
    with pytest.raises(ZeroDivisionError), common.run_folder(*named) as folder:
        assert (run / "file.txt").read_text() == "first"
        raise ZeroDivisionError
    assert (run / "file.txt").read_text() == "first"


def test_the_same_run_twice_at_once_is_refused_by_name(named):
    with common.run_folder(*named):
        words = r"another process is at vgg16-unfrozen50-[0-9a-f]{6}: wait"
        with pytest.raises(common.UserError, match=words), common.run_folder(*named):
            pass
        record, films, outputs = named
        with common.run_folder(record | {"weights": {"sha256": "other"}}, films, outputs):
            pass
    with common.run_folder(*named):
        pass


def test_a_state_is_of_its_code_and_its_releases_only(named, tmp_path, monkeypatch):
    record = named[0]
    names = {common.name_state(record, tmp_path / "new"), common.name_state(record, tmp_path / "new")}
    names.add(common.name_state(record | {"versions": {}}, tmp_path / "new"))
    monkeypatch.setattr(common, "SOURCE", "another")
    names.add(common.name_state(record, tmp_path / "new"))
    assert len(names) == 3


def test_a_file_that_is_written_aside_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), common.write_aside(tmp_path / "file") as stream:
        stream.write(b"new")
        stream.flush()
        assert (tmp_path / "file").read_text() == "old"
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_leftovers_of_killed_writers_go_after_a_day(record):
    outputs = common.locate(record["constants"]["OUTPUT_DIR"])
    for name, age in ((".a.partial", 25), (".cache/.b.partial", 25), (".c.partial", 23)):
        (outputs / name).write_text("")
        os.utime(outputs / name, (time.time() - 3600 * age,) * 2)
    common.start(record["constants"])
    assert sorted(path.name for path in outputs.rglob("*.partial")) == [".c.partial"]


def test_state_puts_everything_back(tmp_path):
    keras = common.keras

    def build():
        inputs = keras.Input((8,))
        hidden = keras.layers.BatchNormalization()(keras.layers.Dense(8, activation="relu")(inputs))
        output = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Dropout(0.5)(hidden))
        model = keras.Model(inputs, output)
        model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy")
        model.optimizer.build(model.trainable_variables)
        return model

    rng = np.random.default_rng(0)
    x, y = rng.random((64, 8)).astype(np.float32), rng.integers(0, 2, (64, 1))
    keras.utils.set_random_seed(1)
    whole = build()
    whole.fit(x, y, epochs=4, shuffle=False, verbose=0)
    keras.utils.set_random_seed(1)
    first = build()
    first.fit(x, y, epochs=2, shuffle=False, verbose=0)
    common.save_state(first, [[1.0, 2.0, 3.0, 1 / 3, 7.5]] * 2, tmp_path / "a.state")
    keras.utils.set_random_seed(77)
    second = build()
    assert common.load_state(second, tmp_path / "b.state") == []
    assert common.load_state(second, tmp_path / "a.state") == [[1.0, 2.0, 3.0, 1 / 3, 7.5]] * 2
    second.fit(x, y, epochs=4, initial_epoch=2, shuffle=False, verbose=0)
    assert all(np.array_equal(a, b) for a, b in zip(whole.get_weights(), second.get_weights(), strict=True))


# ---- surroundings ------------------------------------------------------------------------------


def run_python(code, **environment):
    """The console of a few lines of Python in this folder; `None` removes a variable."""
    environment = {key: value for key, value in (os.environ | environment).items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True,
                          text=True, check=False)


def test_opencv_without_its_libraries_names_both_remedies(tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    process = run_python("import resnet50", PYTHONPATH=str(tmp_path))
    assert process.returncode == 1
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    for words in ("libGL.so.1", "apt-get install libgl1 libglib2.0-0", "pip install opencv-python-headless"):
        assert words in line


def test_a_missing_package_names_the_requirements(tmp_path):
    (tmp_path / "pandas.py").write_text("raise ModuleNotFoundError(\"No module named 'pandas'\")")
    process = run_python("import resnet50", PYTHONPATH=str(tmp_path))
    words = f"No module named 'pandas': pip install -r {REPOSITORY / 'requirements.txt'}"
    assert process.stderr.splitlines() == [words]


def test_strange_settings_change_nothing(tmp_path):
    """Of Keras, of matplotlib, of the locale, and of a home that cannot be written."""
    code = f"""if True:
        import common, vgg16
        record = common.start(vars(vgg16) | dict(OUTPUT_DIR={str(tmp_path)!r}))
        model = common.build_model(record, vgg16.build_backbone(), True, 0.5, 1e-4)
        print(model.count_params(), model.get_layer("pooled").dtype_policy.compute_dtype,
              float(model.get_weights()[0].sum()), common.keras.config.backend(), common.matplotlib.get_backend())
    """
    (tmp_path / "keras.json").write_text(json.dumps(
        {"backend": "jax", "image_data_format": "channels_first", "floatx": "float16", "epsilon": 1e-7}))
    plain = run_python(code)
    strange = run_python(code, KERAS_BACKEND="jax", KERAS_HOME=str(tmp_path), MPLBACKEND="TkAgg", DISPLAY=None,
                         LC_ALL="de_DE.UTF-8", PYTHONHASHSEED="7", HOME="/proc/nowhere")
    assert plain.stderr == strange.stderr == ""
    assert plain.stdout.splitlines()[-1] == strange.stdout.splitlines()[-1]
