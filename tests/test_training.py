"""What an epoch shows, what augmentation does, and runs that are killed, stopped, started twice or fail."""
import gc
import os
import re
import resource
import shutil
import signal

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from tiny import (build_tiny, common, copy_program, finish_process, make_films, make_noise,
                  prepare, read_results, read_until, start_process, to_pixels, write_tiny)

# ---- datasets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("benign", "malignant"), [(10, 10), (10, 7), (3, 11), (1, 5)])
def test_an_epoch_is_balanced_and_shows_every_film(benign, malignant):
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
def datasets(tmp_path):
    """A function that makes the datasets of 24 films to train on, 15 of them benign, 6 held out and 2 left out."""
    films = make_films(np.arange(32) % 8 > 4, held_out=6)
    films.loc[:1, "split"] = "left out"
    images = make_noise(32)

    def make(first=0, **constants):
        settings = prepare(tmp_path, **{"EPOCHS": 2} | constants)
        training, validation, steps = common.make_datasets(images, films, settings)
        return films, images, training(first), validation, steps

    return make


def collect(dataset, threads=0):
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    images, labels, *_ = zip(*dataset.with_options(options).as_numpy_iterator(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_training_is_reproducible_whatever_the_threads_and_new_in_every_epoch(datasets):
    films, _, training, _, steps = datasets()
    images, labels = collect(training, threads=1)
    for expected, found in zip((images, labels), collect(datasets()[2], threads=7), strict=True):
        assert np.array_equal(expected, found)
    draws = 2 * films["label"][films["split"] == "train"].value_counts().max()
    assert len(images) == 2 * draws
    assert steps == -(-draws // 13)
    assert labels[:draws].mean() == labels[draws:].mean() == 0.5
    assert len({image.tobytes() for image in images}) == 2 * draws, "every draw is another picture"
    assert images.min() >= 0
    assert images.max() <= 255
    assert not np.array_equal(images, collect(datasets(SEED=1)[2])[0])
    assert np.array_equal(collect(datasets(first=1)[2])[0], images[draws:]), "whatever was before it"


def test_training_shows_the_training_side_only_with_its_own_labels(datasets):
    films, images, training, _, _ = datasets(EPOCHS=1, BRIGHTNESS=0, CONTRAST=0, SATURATION=0)
    known = {}
    for index in films.index[films["split"] == "train"]:
        for variant in (images[index], images[index][:, ::-1]):
            known[variant.tobytes()] = films["label"][index]
    shown = [np.rint(image[..., 0]).astype(np.uint8).tobytes() for image in collect(training)[0]]
    assert [known[image] for image in shown] == np.take(common.CLASSES, collect(training)[1]).tolist()


def test_validation_is_every_held_out_film_once_as_it_is(datasets):
    films, images, _, validation, _ = datasets()
    held_out = films.index[films["split"] == "validation"]
    shown, labels = collect(validation)
    assert np.array_equal(shown, to_pixels(images[held_out]))
    assert np.take(common.CLASSES, labels).tolist() == films["label"][held_out].tolist()


# ---- augmentation ------------------------------------------------------------------------------


@pytest.fixture
def draw(tmp_path):
    """A function that draws variants of an image: float32 (count, H, W, 3)."""
    plain = {"BRIGHTNESS": 0, "CONTRAST": 0, "SATURATION": 0}

    def call(image, count=300, **strengths):
        settings = prepare(tmp_path, **plain | strengths)
        augment = tf.function(lambda seed: common.augment(tf.constant(image), seed, settings))
        return np.stack([augment(tf.constant([7, number])) for number in range(count)])

    return call


@pytest.fixture
def ramp():
    """float32 (8, 8, 3) in 100..150, so that nothing is clipped."""
    return np.repeat(np.linspace(100, 150, 64, dtype=np.float32).reshape(8, 8, 1), 3, axis=-1)


def test_flips_go_both_ways_and_nothing_else_happens_without_strengths(ramp, draw):
    drawn = draw(ramp)
    assert np.array_equal(drawn, draw(ramp)), "the same for the same seed"
    flipped = sum(np.allclose(image, ramp[:, ::-1], atol=1e-3) for image in drawn)
    assert flipped + sum(np.allclose(image, ramp, atol=1e-3) for image in drawn) == 300
    assert 100 < flipped < 200


def test_brightness_is_two_sided(ramp, draw):
    shifts = (draw(ramp, BRIGHTNESS=0.1).mean(axis=(1, 2, 3)) - ramp.mean()) / 255
    assert -0.1001 <= shifts.min() < -0.09
    assert 0.09 < shifts.max() <= 0.1001
    assert abs(shifts.mean()) < 0.01


def test_contrast_is_two_sided(ramp, draw):
    factors = draw(ramp, CONTRAST=0.2).std(axis=(1, 2, 3)) / ramp.std()
    assert 0.799 <= factors.min() < 0.82
    assert 1.18 < factors.max() <= 1.201
    assert abs(factors.mean() - 1) < 0.02


def test_saturation_is_two_sided_on_colour_and_nothing_on_grey(ramp, draw):
    for image in draw(ramp, count=20, SATURATION=0.2):
        assert np.allclose(np.sort(image, axis=None), np.sort(ramp, axis=None), atol=1e-3)
    colour = ramp * np.array([1, 0.9, 0.8], np.float32)
    factors = np.ptp(draw(colour, SATURATION=0.2), axis=-1).mean(axis=(1, 2)) / np.ptp(colour, axis=-1).mean()
    assert 0.799 <= factors.min() < 0.82
    assert 1.18 < factors.max() <= 1.201


def test_augmented_values_are_clipped(draw):
    image = np.repeat(np.array([0, 255] * 32, np.float32).reshape(8, 8, 1), 3, axis=-1)
    drawn = draw(image, count=50, BRIGHTNESS=0.1, CONTRAST=0.2, SATURATION=0.2)
    assert drawn.min() >= 0
    assert drawn.max() <= 255


# ---- killed, stopped, started again ------------------------------------------------------------


def write_program(folder):
    """A copy of the program with a tiny script of three epochs; returns the script."""
    return write_tiny(copy_program(folder) / "tiny.py", EPOCHS=3)


def test_a_run_that_is_killed_ends_as_if_it_never_was_in_strange_surroundings_too(tmp_path):
    """Byte for byte as one that nobody disturbs, with other settings of Keras, of matplotlib, of the locale and of
    hashes, and with a home that cannot be written."""
    plain, script = write_program(tmp_path / "plain"), write_program(tmp_path / "killed")
    undisturbed = start_process([plain], plain.parent)
    outputs, code, settings = (script.parent / name for name in ("outputs", "common.py", "keras/keras.json"))
    text = code.read_text("utf-8")
    settings.parent.mkdir()
    settings.write_text('{"backend": "jax", "image_data_format": "channels_first", "floatx": "float16",'
                        ' "epsilon": 1e-3}')

    def start():
        return start_process([script], script.parent, KERAS_BACKEND="jax", MPLBACKEND="TkAgg", DISPLAY=None,
                             LC_ALL="de_DE.UTF-8", PYTHONHASHSEED="7", HOME="/proc/nowhere")

    killed = start()
    read_until(killed, "Epoch 2/3")
    killed.kill()
    killed.wait()
    assert not list(outputs.glob("[!.]*/")), "no folder before the run is complete"

    code.write_text(f"{text}\nANOTHER = 1\n", "utf-8")  # other code: another run
    stopped = start()
    console = read_until(stopped, "Epoch 1/3")
    assert "continuing" not in console
    stopped.send_signal(signal.SIGTERM)
    console = stopped.communicate()[0]
    assert stopped.returncode == 1
    assert console.splitlines()[-1] == (
        "tiny.py: stopped: the same command continues after the last finished epoch.")
    assert "Traceback" not in console

    code.write_text(f"# a remark\n{text}", "utf-8")  # a comment: the same run
    killed = start()
    assert "after epoch 1 of 3" in read_until(killed, "Epoch 3/3")
    while not list(outputs.rglob("*.png")):  # killed between its figures
        assert killed.poll() is None
        os.sched_yield()
    killed.kill()
    killed.wait()
    assert not list(outputs.glob("[!.]*/"))

    console = finish_process(start())
    assert "after epoch 3 of 3" in console
    assert "Epoch" not in console
    finish_process(undisturbed)
    expected, found = read_results(plain.parent / "outputs"), read_results(outputs)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    assert not (outputs / f".{found['run']}").exists(), "its checkpoint is dropped"
    assert not list(outputs.rglob("*.partial"))


def test_equal_runs_at_the_same_time_end_well_and_the_page_has_all_runs(tmp_path):
    """Two equal runs and one of another fold: the results of one of the equal ones stay, and no checkpoint."""
    script = write_program(tmp_path / "program")
    other = write_tiny(script.with_name("other.py"), EPOCHS=3, FOLD=1)
    consoles = [finish_process(process) for process in
                [start_process([file], script.parent) for file in (script, script, other)]]
    outputs = script.parent / "outputs"
    runs = sorted(path.name for path in outputs.iterdir() if path.is_dir() and path.name != ".cache")
    assert len(runs) == 2
    assert not [name for name in runs if name.startswith(".")]
    assert sorted(pd.read_csv(outputs / "runs.csv")["run"]) == runs
    assert all(name in (outputs / "report.html").read_text("utf-8") for name in runs)
    for console, words in zip(consoles, (r"auc .*\[", r"auc .*\[", "finished: "), strict=True):
        assert re.search(words, console)
    assert finish_process(start_process([script], script.parent)).count("complete already") == 1


def test_the_first_of_two_equal_runs_that_is_complete_stays(tmp_path):
    """What the second has begun is dropped, whether it cannot be written any more or would come too late."""
    folder = tmp_path / "tiny-unfrozen50-123456"
    for late in (False, True):
        with common.make_folder(folder) as second:
            with common.make_folder(folder) as first:
                (first / "settings.json").write_text("first")
            if late:
                second.mkdir(parents=True, exist_ok=True)
            (second / "settings.json").write_text("second")
        assert [path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()] == ["first"]
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.keras").write_text("what an interrupted deletion left")
    with common.make_folder(folder) as new:
        (new / "settings.json").write_text("new")
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


# ---- in this process: checkpoints, 16-bit floats ------------------------------------------------


@pytest.fixture
def fit(tmp_path):
    """A function that trains the tiny backbone on 26 films of noise, with 9 held out, from its checkpoint if any;
    returns (history, predictions, model)."""
    films, images = make_films(np.arange(35) % 2, held_out=9), make_noise(35)

    def call(folder="run", source=None, **constants):
        settings = prepare(tmp_path, **{"LEARNING_RATE": 1e-2} | constants)
        model, _ = build_tiny(settings, films)
        training, validation, steps = common.make_datasets(images, films, settings)
        place = tmp_path / folder
        trained, facts, history = common.train(model, source or training, validation, steps, settings, place)
        assert facts == common.describe_model(model, settings), "of the model that was trained"
        predictions, _ = common.evaluate([trained], images, films, settings)["validation"]
        assert getattr(trained, "optimizer", None) is None, "which would be two thirds of the file"
        return history, predictions, model

    yield call
    prepare(tmp_path)


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_from_a_checkpoint_equals_training_at_once(fit):
    """Weights, moving averages, the optimizer and the dropout's random numbers are all put back."""
    history, predictions, model = fit("whole", EPOCHS=3)
    fit("parts", EPOCHS=1)
    again, repeated, continued = fit("parts", EPOCHS=3)
    assert again.drop(columns="seconds").equals(history.drop(columns="seconds"))
    assert repeated.equals(predictions)
    assert equal(continued.get_weights(), model.get_weights())
    assert again["seconds"].is_monotonic_increasing
    assert history["epoch"].tolist() == [1, 2, 3]
    assert history["loss"].nunique() == 3, "it learned something"


@pytest.mark.parametrize("batch_size", [2, 13])
def test_the_weights_are_an_average_over_about_the_last_epoch(tmp_path, batch_size):
    """Against the weights after each step of a plain Adam, averaged by hand; and every epoch is validated so."""
    films, images = make_films(np.arange(35) % 2, held_out=9), make_noise(35)
    settings = prepare(tmp_path, EPOCHS=2, LEARNING_RATE=1e-2, BATCH_SIZE=batch_size)
    model, _ = build_tiny(settings, films)
    training, validation, steps = common.make_datasets(images, films, settings)
    assert steps == 26 / batch_size
    trained, _, history = common.train(model, training, validation, steps, settings, tmp_path / "run")
    predictions, _ = common.evaluate([trained], images, films, settings)["validation"]

    prepare(tmp_path)  # the same random numbers again
    plain, _ = build_tiny(settings, films)
    plain.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
    taken = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: taken.append(plain.get_weights()))
    plain.fit(training(0), epochs=2, steps_per_epoch=steps, shuffle=False, callbacks=[note], verbose=0)
    names = [weight.path for weight in model.weights]
    trained = {weight.path for weight in model.trainable_weights}
    expected = taken[0]
    for weights in taken[1:]:
        expected = [old + (new - old) / steps for old, new in zip(expected, weights, strict=True)]
    assert len(taken) == 2 * steps
    for name, found, average, last in zip(names, model.get_weights(), expected, taken[-1], strict=True):
        if name in trained:
            assert np.allclose(found, average, atol=1e-5), name
            assert not np.allclose(found, last, atol=1e-4), name
    truth = predictions["label"].eq("malignant")
    chances = np.where(truth, predictions["probability"], 1 - predictions["probability"])
    assert history["val_loss"].iloc[-1] == pytest.approx(-np.log(chances).mean(), abs=1e-5)
    assert history["val_accuracy"].iloc[-1] == pytest.approx((truth == (predictions["probability"] >= 0.5)).mean())


def count_graphs():
    gc.collect()
    return sum(issubclass(type(found), tf.Graph) for found in gc.get_objects())


def test_nothing_of_a_training_stays_in_memory(fit):
    graphs = []
    for folder in ("first", "second"):
        fit(folder, EPOCHS=1)
        keras.backend.clear_session()
        graphs.append(count_graphs())
    assert graphs[1] <= graphs[0]


@pytest.mark.parametrize("floats", ["bfloat16", "float16"])
def test_training_in_16_bits_keeps_weights_in_32_and_is_evaluated_in_32(fit, tmp_path, monkeypatch, floats):
    """What training left is scored as the saved model scores it: as the same network built in 32 bits."""
    monkeypatch.setattr(common, "choose_precision", lambda settings: (f"mixed_{floats}", "of the test"))
    history, predictions, model = fit(EPOCHS=2)
    assert model.get_layer("high").compute_dtype == floats
    assert model.get_layer("probability").compute_dtype == "float32"
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert model.output.dtype == "float32"
    assert predictions["probability"].nunique() == len(predictions)
    assert history["loss"].nunique() == 2, "it learned something"
    fit("parts", EPOCHS=1)
    assert fit("parts", EPOCHS=2)[1].equals(predictions), "from its checkpoint"
    weights, pixels = model.get_weights(), to_pixels(make_noise(35)[26:])
    rounded = model(pixels, training=False).numpy()[:, 0]
    monkeypatch.undo()
    plain, _ = build_tiny(prepare(tmp_path), make_films(np.arange(35) % 2, held_out=9))
    plain.set_weights(weights)
    exact = plain(pixels, training=False).numpy()[:, 0]
    assert np.allclose(predictions["probability"], exact, rtol=1e-6)
    assert not np.allclose(rounded, exact, rtol=1e-6)


def test_a_step_is_traced_once_though_the_last_batch_is_smaller(fit, monkeypatch):
    traces = []
    for name in ("train_step", "test_step"):
        step = getattr(keras.Model, name)
        monkeypatch.setattr(keras.Model, name, lambda model, data, name=name, step=step: (
            traces.append(name), step(model, data))[1])
    fit(BATCH_SIZE=4, EPOCHS=2)
    assert traces == ["train_step", "test_step"]


def test_the_accuracy_of_the_training_is_that_of_the_threshold(fit):
    history, predictions, _ = fit("half", EPOCHS=1)
    truth, probabilities = predictions["label"].eq("malignant"), predictions["probability"]
    between = np.sort(probabilities)[:-1] + np.diff(np.sort(probabilities)) / 2
    accuracies = {float(limit): (probabilities.ge(limit) == truth).mean() for limit in (0.5, *between)}
    assert history["val_accuracy"].item() == pytest.approx(accuracies[0.5])
    threshold = next(limit for limit in accuracies if accuracies[limit] != accuracies[0.5])
    shifted, again, _ = fit("shifted", EPOCHS=1, THRESHOLD=threshold)
    assert again["probability"].equals(probabilities), "the training does not depend on it"
    assert shifted["val_accuracy"].item() == pytest.approx(accuracies[threshold])


# ---- failures ----------------------------------------------------------------------------------


def test_training_that_diverges_stops_with_a_sentence(fit):
    for constants in ({"LEARNING_RATE": 1e38}, {"LEARNING_RATE": 1e20, "MIXED_PRECISION": True}):
        with pytest.raises(common.UserError, match=r"^training diverged.*lower LEARNING_RATE"):
            fit(EPOCHS=3, **constants)
    assert fit(EPOCHS=1)[0]["epoch"].tolist() == [1], "there is nothing to continue from"


def test_a_batch_that_does_not_fit_into_memory_is_a_sentence(fit):
    def exhaust(first):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    words = r"^out of memory \(CPU with \d+ cores, oneDNN (on|off)\): lower BATCH_SIZE"
    with pytest.raises(common.UserError, match=words):
        fit(source=exhaust, EPOCHS=1)


def test_an_error_of_the_program_keeps_its_traceback(fit):
    def fail(first):
        raise OSError(5, "Input/output error")  # of reading: nothing is being written

    with pytest.raises(OSError, match="Input/output error"):
        fit(source=fail, EPOCHS=1)


def test_a_folder_deleted_underneath_is_a_sentence(fit, tmp_path):
    batch = to_pixels(make_noise(4)), np.array([0, 1, 0, 1])

    def delete(first):
        shutil.rmtree(tmp_path)
        return tf.data.Dataset.from_tensors(batch).repeat()

    with pytest.raises(common.UserError, match=r"cannot be written \(No such file or directory\).*OUTPUT_DIR"):
        fit(source=delete, EPOCHS=1)


def test_a_full_disk_is_a_sentence_and_costs_no_earlier_epoch(fit, tmp_path):
    """A limit on the size of files, less than a checkpoint has: writing more fails as on a full disk."""
    fit(EPOCHS=1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert max(map(len, before.values())) > 8000
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(common.UserError, match=r"cannot be written \(.*OUTPUT_DIR"):
            fit(EPOCHS=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in before} == before
    assert len(fit(EPOCHS=2)[0]) == 2


def test_a_training_ends_well_though_another_process_has_completed_the_run(fit, tmp_path, monkeypatch):
    """Its checkpoint can be written or not; a full disk is no reason to fail then."""
    save = np.savez

    def complete(*arguments):
        shutil.rmtree(tmp_path / ".run")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "settings.json").write_text("")
        save(*arguments)

    history, predictions, _ = fit("whole", EPOCHS=2)
    monkeypatch.setattr(np, "savez", complete)
    again, repeated, _ = fit("run", EPOCHS=2)
    assert again.drop(columns="seconds").equals(history.drop(columns="seconds"))
    assert repeated.equals(predictions)


@pytest.mark.parametrize(("mixed", "gpus", "flags", "onednn", "policy", "reason"), [
    ("auto", [(7, 0), (6, 1)], [], True, "mixed_float16", "the GPU has tensor cores"),
    ("auto", [(6, 1), (7, 0)], ["amx_bf16"], True, "float32", "the GPU has no tensor cores"),
    ("auto", [], [], True, "float32", "the processor has no known instructions for bfloat16"),
    ("auto", [], ["avx512_bf16"], True, "mixed_bfloat16", "the processor has avx512_bf16"),
    ("auto", [], ["avx512_bf16"], False, "float32", "the processor has avx512_bf16, but oneDNN is off"),
    ("auto", [], ["amx_bf16", "x"], True, "mixed_bfloat16", "the processor has amx_bf16 and x"),
    (True, [(6, 1)], [], True, "mixed_float16", "MIXED_PRECISION is True"),
    (True, [], [], False, "mixed_bfloat16", "MIXED_PRECISION is True"),
    (False, [(7, 0)], ["amx_bf16"], True, "float32", "MIXED_PRECISION is False"),
])
def test_auto_is_16_bits_where_the_device_multiplies_them_faster(
        tmp_path, monkeypatch, capsys, mixed, gpus, flags, onednn, policy, reason):
    visible, growing = [], []
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpu, kind: visible.append(gpu))
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: visible)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, on: growing.append(gpu))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {"compute_capability": gpu})
    monkeypatch.setattr(common, "list_bfloat16_flags", lambda: flags)
    monkeypatch.setattr(common, "is_onednn_on", lambda: onednn)
    prepare(tmp_path, MIXED_PRECISION=mixed)
    assert visible == growing == gpus[:1], "the first alone, and no more of its memory than is needed"
    assert keras.config.dtype_policy().name == policy
    assert f"training in {policy} because {reason}\n" in capsys.readouterr().out
    monkeypatch.undo()
    prepare(tmp_path)


def test_the_flags_of_a_processor_are_read_as_words(tmp_path):
    """As Linux has them in /proc/cpuinfo; elsewhere there is no such file."""
    cpuinfo = tmp_path / "cpuinfo"
    for flags, found in (("fpu avx512_bf16 amx_bf16 amx_tile", ["amx_bf16", "avx512_bf16"]),
                         ("fpu avx512_bf16", ["avx512_bf16"]), ("fpu avx512bw my_avx512_bf16x", [])):
        cpuinfo.write_text(f"processor\t: 0\nmodel name\t: Some\nflags\t\t: {flags}\nbugs\t\t: spectre_v1\n")
        assert common.list_bfloat16_flags(cpuinfo) == found
    assert common.list_bfloat16_flags(tmp_path / "none") == []
