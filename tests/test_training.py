"""What an epoch shows, what augmentation does, and runs that are killed, stopped, started twice or fail."""
import functools
import gc
import os
import re
import resource
import shutil
import signal
import types

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


@pytest.fixture
def datasets(tmp_path):
    """A function that makes (films, images, training, validation) of 24 films to train on, 15 of them benign,
    6 held out and 2 excluded."""
    films = make_films(np.arange(32) % 8 > 4, held_out=6)
    films.loc[:1, "split"] = "excluded"
    images = make_noise(32)

    def make(**constants):
        settings = prepare(tmp_path, **{"EPOCHS": 2} | constants)
        return films, images, *common.make_datasets(images, films, settings)

    return make


def collect(batches):
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_training_is_balanced_new_in_every_epoch_and_the_same_whatever_was_before(datasets):
    films, _, training, _ = datasets()
    draws = 2 * films["label"][films["split"] == "train"].value_counts().max()
    epochs = []
    for training.epoch in (0, 1):
        images, labels = collect(training)
        assert (len(images), len(training)) == (draws, 3)
        assert (images.dtype, labels.dtype, labels.mean()) == (np.float32, np.int64, 0.5)
        assert 0 <= images.min() < images.max() <= 255
        epochs.append(images)
    pictures = {image.tobytes() for images in epochs for image in images}
    assert len(pictures) == 2 * draws, "every draw is another picture"
    again = datasets()[2]
    again.epoch = 1
    assert np.array_equal(again[1][0], epochs[1][13:26])
    assert not np.array_equal(epochs[0], collect(datasets(SEED=1)[2])[0])


def test_a_network_gets_the_batches_of_each_epoch_in_order_and_those_of_a_resumed_training(datasets, tmp_path):
    seen = []

    class Watch(keras.layers.Layer):
        def call(self, images):
            tf.py_function(lambda batch: seen.append(batch.numpy()), [images], [])
            return images

    def see(epochs):
        _, _, training, validation = datasets(EPOCHS=epochs)
        inputs = keras.Input((common.IMAGE_SIZE, common.IMAGE_SIZE, 3))
        backbone = keras.Model(inputs, keras.layers.AveragePooling2D(32)(Watch()(inputs)), name="watched")
        model = common.build_model(backbone, {"pretrained": True}, training.settings)
        seen.clear()
        common.train(model, training, validation, training.settings, tmp_path / "run")
        return training, validation

    for first, last in ((0, 1), (1, 3)):
        training, validation = see(last)
        expected = []
        for training.epoch in range(first, last):
            expected += [collect(training)[0], collect(validation)[0]]
        assert np.array_equal(np.concatenate(seen), np.concatenate(expected))


def test_training_shows_the_training_set_only_with_its_own_labels(datasets):
    films, images, training, _ = datasets(EPOCHS=1, BRIGHTNESS=0, CONTRAST=0)
    known = {}
    for index in films.index[films["split"] == "train"]:
        for variant in (images[index], images[index][:, ::-1]):
            known[variant.tobytes()] = films["label"][index]
    shown, labels = collect(training)
    found = [known[np.rint(image[..., 0]).astype(np.uint8).tobytes()] for image in shown]
    assert found == np.take(common.CLASSES, labels).tolist()


def test_validation_is_every_held_out_film_once_as_it_is(datasets):
    films, images, _, validation = datasets(BATCH_SIZE=4)
    held_out = films.index[films["split"] == "validation"]
    assert [len(batch) for batch, _ in validation] == [4, 2]
    shown, labels = collect(validation)
    assert np.array_equal(shown, to_pixels(images[held_out]))
    assert np.take(common.CLASSES, labels).tolist() == films["label"][held_out].tolist()


# ---- augmentation ------------------------------------------------------------------------------


@pytest.fixture
def draw(tmp_path):
    """A function that draws variants of an image: float32 (count, H, W, channels)."""
    plain = {"BRIGHTNESS": 0, "CONTRAST": 0, "SATURATION": 0}

    def call(image, count=300, **strengths):
        settings, seeds = prepare(tmp_path, **plain | strengths), range(count)
        return np.stack([common.augment(image, np.random.default_rng(seed), settings) for seed in seeds])

    return call


GREY = np.linspace(100, 150, 64, dtype=np.float32).reshape(8, 8, 1)  # nothing is clipped
COLOUR = GREY * np.array([1, 0.9, 0.8], np.float32)


def test_flips_go_both_ways_and_nothing_else_happens_without_strengths(draw):
    drawn = draw(GREY)
    assert np.array_equal(drawn, draw(GREY)), "the same for the same seed"
    flipped = sum(np.allclose(image, GREY[:, ::-1], atol=1e-3) for image in drawn)
    assert flipped + sum(np.allclose(image, GREY, atol=1e-3) for image in drawn) == 300
    assert 100 < flipped < 200


@pytest.mark.parametrize(("constant", "adjust", "scale"), [
    ("BRIGHTNESS", lambda image, change: tf.image.adjust_brightness(image, 255 * change), 0.1),
    ("CONTRAST", lambda image, change: tf.image.adjust_contrast(image, 1 + change), 0.2),
    ("SATURATION", lambda image, change: tf.image.adjust_saturation(image, 1 + change), 0.2)])
def test_a_change_is_that_of_tensorflow_and_two_sided(draw, constant, adjust, scale):
    """Measured by what it does to the reference: the mean, or the spread over the film or the colours."""
    sizes = {"BRIGHTNESS": lambda image: image.mean() / 255, "CONTRAST": lambda image: image[..., 0].std(),
             "SATURATION": lambda image: np.ptp(image, axis=-1).mean()}
    size, changes = sizes[constant], []
    for image in draw(COLOUR, **{constant: scale}):
        change = size(image) - size(COLOUR) if constant == "BRIGHTNESS" else size(image) / size(COLOUR) - 1
        expected = adjust(COLOUR, change).numpy()
        assert np.allclose(image, expected, atol=1e-2) or np.allclose(image, expected[:, ::-1], atol=1e-2)
        changes.append(change)
    assert -1.001 * scale <= min(changes) < -0.9 * scale
    assert 0.9 * scale < max(changes) <= 1.001 * scale
    assert abs(np.mean(changes)) < 0.1 * scale


def test_a_grey_film_is_changed_as_its_three_channels_are_and_has_no_saturation(draw):
    drawn = draw(GREY, BRIGHTNESS=0.1, CONTRAST=0.2, SATURATION=0.2)
    channels = draw(np.repeat(GREY, 3, axis=-1), BRIGHTNESS=0.1, CONTRAST=0.2)
    assert np.allclose(np.repeat(drawn, 3, axis=-1), channels, atol=1e-3)
    assert len(np.unique(drawn.mean(axis=(1, 2, 3)))) == 300


def test_augmented_values_are_clipped(draw):
    image = np.array([0, 255] * 32, np.float32).reshape(8, 8, 1)
    drawn = draw(image, count=50, BRIGHTNESS=0.1, CONTRAST=0.2)
    assert drawn.min() == 0
    assert drawn.max() == 255


# ---- killed, stopped, started again ------------------------------------------------------------


def write_program(folder, painted=True):
    """A copy of the program with a tiny script of three epochs; returns the script."""
    return write_tiny(copy_program(folder, painted) / "tiny.py", EPOCHS=3)


def test_a_run_that_is_stopped_and_killed_ends_as_if_it_never_was_in_strange_surroundings_too(tmp_path):
    """Byte for byte as one that nobody disturbs, with other settings of Keras, of matplotlib, of the locale and of
    hashes, and with a home that cannot be written."""
    plain, script = write_program(tmp_path / "plain"), write_program(tmp_path / "killed")
    undisturbed = start_process([plain], plain.parent)  # whose console is no terminal: a line an epoch
    outputs, settings = script.parent / "outputs", script.parent / "keras" / "keras.json"
    settings.parent.mkdir()
    settings.write_text('{"backend": "jax", "image_data_format": "channels_first", "floatx": "float16",'
                        ' "epsilon": 1e-3}')

    def start():
        return start_process([script], script.parent, KERAS_BACKEND="jax", MPLBACKEND="TkAgg", DISPLAY=None,
                             LC_ALL="de_DE.UTF-8", PYTHONHASHSEED="7", HOME="/proc/nowhere")

    stopped = start()
    read_until(stopped, "epoch 1 of 3: ")
    stopped.send_signal(signal.SIGTERM)
    console = stopped.communicate()[0]
    assert stopped.returncode == 1
    assert console.splitlines()[-1] == "tiny.py: stopped: the same command continues from its last checkpoint."
    assert "Traceback" not in console
    assert not list(outputs.glob("[!.]*/")), "no folder before the run is complete"

    killed = start()
    assert re.search("after epoch [12] of 3", read_until(killed, "epoch 3 of 3: "))
    while not list(outputs.rglob("*.png")):  # killed between its figures
        assert killed.poll() is None
        os.sched_yield()
    killed.kill()
    killed.wait()
    assert not list(outputs.glob("[!.]*/"))

    console = finish_process(start())
    assert "after epoch 3 of 3" in console
    assert "loss" not in console
    epochs = [line for line in finish_process(undisturbed).splitlines() if "loss" in line or "Epoch" in line]
    pattern = r"epoch \d of 3: loss 0\.\d{4}, accuracy 0\.\d{3}; validation: loss 0\.\d{4}, accuracy [01]\.\d{3}"
    assert len([line for line in epochs if re.fullmatch(pattern, line)]) == len(epochs) == 3
    expected, found = read_results(plain.parent / "outputs"), read_results(outputs)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []
    assert not (outputs / f".{found['run']}").exists(), "its checkpoint is dropped"
    assert not list(outputs.rglob("*.partial"))


def test_two_equal_runs_at_the_same_time_end_well(tmp_path):
    """The results of one of them stay, and no checkpoint."""
    script = write_program(tmp_path / "program", painted=False)
    consoles = [finish_process(process) for process in [start_process([script], script.parent) for _ in range(2)]]
    outputs = script.parent / "outputs"
    (run,) = [path.name for path in outputs.iterdir() if path.is_dir() and path.name != ".cache"]
    assert not run.startswith(".")
    assert pd.read_csv(outputs / "runs.csv")["run"].tolist() == [run]
    assert run in (outputs / "report.html").read_text("utf-8")
    for console in consoles:
        assert re.search(r"AUC .*\[", console)


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


def train_tiny(place, folder="run", **constants):
    """Train the tiny backbone on 26 films of noise, with 9 held out, from its checkpoint below `place` if any.

    Returns (history, predictions, model).
    """
    films, images = make_films(np.arange(35) % 2, held_out=9), make_noise(35)
    settings = prepare(place, **{"LEARNING_RATE": 1e-2} | constants)
    model, _ = build_tiny(settings, films)
    training, validation = common.make_datasets(images, films, settings)
    trained, facts, history = common.train(model, training, validation, settings, place / folder)
    assert facts == common.describe_model(model, settings), "of the model that was trained"
    predictions, _ = common.evaluate([trained], images, films, settings)
    assert getattr(trained, "optimizer", None) is None, "which would be two thirds of the file"
    return history, predictions, model


@pytest.fixture
def fit(tmp_path):
    yield functools.partial(train_tiny, tmp_path)
    prepare(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(history, predictions, weights) of a training of two epochs that nothing disturbs."""
    history, predictions, model = train_tiny(tmp_path_factory.mktemp("whole"), EPOCHS=2)
    return history, predictions, model.get_weights()


def equal(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_from_a_checkpoint_equals_training_at_once(fit, whole):
    """Weights, moving averages, the optimizer and the dropout's random numbers are all put back."""
    history, predictions, weights = whole
    fit(EPOCHS=1)  # the end of the training is one of a checkpoint, too
    again, repeated, continued = fit(EPOCHS=2)
    assert again.drop(columns="seconds").equals(history.drop(columns="seconds"))
    assert repeated.equals(predictions)
    assert equal(continued.get_weights(), weights)
    assert again["seconds"].is_monotonic_increasing
    assert history["epoch"].tolist() == [1, 2]
    assert history["loss"].nunique() == 2, "it learned something"


def test_a_damaged_checkpoint_is_named(fit, tmp_path):
    fit(EPOCHS=1)
    file = tmp_path / ".run" / "checkpoint.npz"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(common.UserError, match=r"checkpoint\.npz is damaged.*delete it"):
        fit(EPOCHS=2)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "settings.json").write_text("")
    history, _, _ = fit(EPOCHS=2)
    assert history["epoch"].tolist() == [1, 2], "of a run that another process has completed it is none"


def test_a_checkpoint_is_written_where_a_minute_has_passed_and_at_the_end(fit, monkeypatch):
    """On a clock of the test, with epochs of 40 seconds."""
    written, clock = [], iter(range(0, 9999, 40))
    monkeypatch.setattr(common, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(common, "save_checkpoint", lambda _, rows, __: written.append(len(rows)))
    fit(EPOCHS=5)
    assert written == [2, 4, 5]


@pytest.mark.parametrize("batch_size", [2, 13])
def test_the_weights_are_an_average_over_about_the_last_epoch(tmp_path, batch_size):
    """Against the weights after each step of a plain Adam, averaged by hand; and every epoch is validated so."""
    films, images = make_films(np.arange(35) % 2, held_out=9), make_noise(35)
    settings = prepare(tmp_path, EPOCHS=2, LEARNING_RATE=1e-2, BATCH_SIZE=batch_size)
    model, _ = build_tiny(settings, films)
    training, validation = common.make_datasets(images, films, settings)
    steps = len(training)
    assert steps == 26 / batch_size
    trained, _, history = common.train(model, training, validation, settings, tmp_path / "run")
    predictions, _ = common.evaluate([trained], images, films, settings)

    prepare(tmp_path)  # the same random numbers again
    plain, _ = build_tiny(settings, films)
    network = common.fold_batch_norm(plain)  # which draws a number for the dropout, but folds nothing here
    network.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
    taken = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: setattr(training, "epoch", epoch),
        on_train_batch_end=lambda *_, **__: taken.append(plain.get_weights()))
    network.fit(training, epochs=2, shuffle=False, callbacks=[note], verbose=0)
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
    if floats == "float16":  # whose loss is scaled, which a checkpoint has to put back
        fit("parts", EPOCHS=1)
        assert fit("parts", EPOCHS=2)[1].equals(predictions)
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


def test_the_accuracy_of_the_training_is_that_of_the_threshold(fit, whole):
    history, predictions, _ = whole
    truth, probabilities = predictions["label"].eq("malignant"), predictions["probability"]
    between = np.sort(probabilities)[:-1] + np.diff(np.sort(probabilities)) / 2
    accuracies = {float(limit): (probabilities.ge(limit) == truth).mean() for limit in (0.5, *between)}
    assert history["val_accuracy"].iloc[-1] == pytest.approx(accuracies[0.5])
    threshold = next(limit for limit in accuracies if accuracies[limit] != accuracies[0.5])
    shifted, again, _ = fit(EPOCHS=2, THRESHOLD=threshold)
    assert again["probability"].equals(probabilities), "the training does not depend on it"
    assert shifted["val_accuracy"].iloc[-1] == pytest.approx(accuracies[threshold])


# ---- failures ----------------------------------------------------------------------------------


def test_training_that_diverges_stops_with_a_sentence(fit):
    for constants in ({"LEARNING_RATE": 1e38}, {"LEARNING_RATE": 1e20, "MIXED_PRECISION": True}):
        with pytest.raises(common.UserError, match=r"^the training diverged.*lower LEARNING_RATE"):
            fit(EPOCHS=3, **constants)
    assert fit(EPOCHS=1)[0]["epoch"].tolist() == [1], "there is nothing to continue from"


@pytest.mark.parametrize(("error", "found", "words"), [
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), common.UserError,
     r"^out of memory \(CPU with \d+ cores, oneDNN (on|off)\): lower BATCH_SIZE"),
    (OSError(5, "Input/output error"), OSError, "Input/output error"),  # of reading: nothing is being written
])
def test_too_little_memory_is_a_sentence_and_an_error_of_the_program_keeps_its_traceback(
        fit, monkeypatch, error, found, words):
    def fail(batches, number):
        raise error

    monkeypatch.setattr(common.TrainingBatches, "__getitem__", fail)
    with pytest.raises(found, match=words):
        fit(EPOCHS=1)


def test_a_folder_deleted_underneath_is_a_sentence(fit, tmp_path, monkeypatch):
    def delete(batches, number):
        shutil.rmtree(tmp_path, ignore_errors=True)
        return to_pixels(make_noise(4)), np.array([0, 1, 0, 1])

    monkeypatch.setattr(common.TrainingBatches, "__getitem__", delete)
    with pytest.raises(common.UserError, match=r"cannot be written \(No such file or directory\).*OUTPUT_DIR"):
        fit(EPOCHS=1)


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


def test_a_training_ends_well_though_another_process_has_completed_the_run(fit, whole, tmp_path, monkeypatch):
    """Its checkpoint can be written or not; a full disk is no reason to fail then."""
    save = np.savez

    def complete(*arguments):
        shutil.rmtree(tmp_path / ".run")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "settings.json").write_text("")
        save(*arguments)

    history, predictions, _ = whole
    monkeypatch.setattr(np, "savez", complete)
    again, repeated, _ = fit(EPOCHS=2)
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
