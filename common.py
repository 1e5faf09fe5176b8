"""One run, in the order in which it happens: what resnet50.py and vgg16.py share.

start, model, datasets, training, evaluation, figures, run folder; then the comparison of all runs, and the
prediction of one new film. What knows films but no networks is in data/.
"""
import builtins
import contextlib
import gc
import hashlib
import json
import logging.handlers
import math
import os
import platform
import re
import shutil
import signal
import socket
import sys
import textwrap
import time
import warnings
from collections import namedtuple
from numbers import Integral, Real
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"  # read by Keras when it is imported
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
HERE = Path(__file__).resolve().parent
saved_stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorFlow's C++ writes to it while it is imported
try:
    from data import UserError, comparison, duplicates, log, metrics, reading
    from data.comparison import with_interval
    from data.duplicates import FOLDS, check_folds, check_sides, group_duplicates, split_patients  # noqa: F401
    from data.films import CLASSES, check_unseen, find_films, is_synthetic  # noqa: F401
    from data.reading import IMAGE_SIZE, place_boxes, read_films  # noqa: F401

    import cv2
    import keras
    import matplotlib
    import numpy as np
    import pandas as pd
    import scipy
    import sklearn.metrics
    import tensorflow as tf
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

except ImportError as missing:
    if ".so" in str(missing):
        sys.exit(f"OpenCV cannot be loaded ({missing}): apt-get install libgl1 libglib2.0-0, or"
                 " pip uninstall opencv-python and pip install opencv-python-headless.")
    sys.exit(f"{missing}: pip install -r {HERE / 'requirements.txt'}")
finally:
    os.dup2(saved_stderr, 2)

# ------------------------------------------------------------------------------------------------
# augmentation of the training side, drawn anew for every film of every epoch
BRIGHTNESS = 0.1  # largest shift either way, as a share of the grey scale
CONTRAST = 0.2  # largest change either way: factors from 0.8 to 1.2
SATURATION = 0.2  # likewise; part of the recipe, but without effect on grey films
# layers on top of the backbone
HEAD_UNITS = 256  # of the dense layer between the pooled features and the logit
DROPOUT = 0.3  # share of these units that a training step leaves out
# evaluation
THRESHOLD = 0.5  # probability of malignancy from which a film is called malignant
# ------------------------------------------------------------------------------------------------

RANDOM_NOTE = "random weights: this shows only that the pipeline works"
OUTCOMES = ("true_positive", "false_positive", "true_negative", "false_negative")
CASES = 4  # Grad-CAM overlays of each outcome
MODULES = (__file__, duplicates.__file__, metrics.__file__, reading.__file__)
CODE = [reading.parse_code(file) for file in MODULES]  # what decides the results


# ---- start -------------------------------------------------------------------------------------


def is_path(value):
    return isinstance(value, (str, os.PathLike)) and str(value).strip() != ""


def is_number(value, kind, low, high=sys.float_info.max):
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


CONSTANTS = {  # of a script: what each may be, as a check and in words
    "DATA_DIR": (is_path, "the path of a folder in quotes"),
    "OUTPUT_DIR": (is_path, "the path of a folder in quotes"),
    "CROP": (lambda v: v in ("breast", "lesion", None), '"breast", "lesion" or None'),
    "FOLD": (lambda v: is_number(v, Integral, 0, FOLDS - 1), f"a whole number from 0 to {FOLDS - 1}"),
    "WEIGHTS": (lambda v: v is None or is_path(v), '"imagenet", None or the path of a weights file'),
    "UNFROZEN_FRACTION": (lambda v: is_number(v, Real, 1e-9, 1), "a share above 0 up to 1, such as 0.5"),
    "LEARNING_RATE": (lambda v: is_number(v, Real, sys.float_info.min), "a number above 0, such as 1e-4"),
    "EPOCHS": (lambda v: is_number(v, Integral, 1), "a whole number from 1"),
    "BATCH_SIZE": (lambda v: is_number(v, Integral, 1), "a whole number from 1"),
    "SEED": (lambda v: is_number(v, Integral, 0, 2**31 - 1), "a whole number from 0 to 2147483647"),
    "MIXED_PRECISION": (lambda v: v == "auto" or isinstance(v, bool), '"auto", True or False'),
}
MODULE_CONSTANTS = ("BRIGHTNESS", "CONTRAST", "SATURATION", "HEAD_UNITS", "DROPOUT", "THRESHOLD")
Settings = namedtuple("Settings", [*CONSTANTS, *MODULE_CONSTANTS])


def run(main):
    """Call main(); a UserError, Ctrl-C or SIGTERM ends the script with one sentence and exit status 1."""
    script = Path(main.__code__.co_filename).name
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if sys.argv[1:] and Path(sys.argv[0]).name == script:  # in a notebook, the arguments are those of Jupyter
            raise UserError("there are no arguments: edit the constants at the top of the file, then run it.")
        return main()
    except (UserError, KeyboardInterrupt) as error:
        sentence = str(error) or "stopped: the same command continues after the last finished epoch."
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    gc.collect()  # the datasets that `error` referred to: their threads have to end before the interpreter does
    if hasattr(builtins, "get_ipython"):  # which would report sys.exit() as an exception
        raise UserError(sentence)
    return sys.exit(f"\n{script}: {sentence}")


def shorten(path):
    """A path as a person would write it: below the scripts' folder, or below ~."""
    for place, prefix in ((HERE, ""), (Path(os.path.expanduser("~")), "~/")):
        if path.is_relative_to(place):
            return prefix + path.relative_to(place).as_posix()
    return str(path)


@contextlib.contextmanager
def explain_write_errors(place):
    """Turn an OSError while something is written, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror or 'the disk may be full'}): free space, get"
                        " the right to write, or choose another OUTPUT_DIR, and run the command again.") from error


def check_constants(constants):
    """The constants of a script and MODULE_CONSTANTS as a namedtuple, with absolute Paths.

    Paths count from the scripts' folder. Raises UserError that names the constant that is missing or wrong.
    """
    values = {name: globals()[name] for name in MODULE_CONSTANTS}
    for name, (is_valid, description) in CONSTANTS.items():
        if name not in constants:
            raise UserError(f"{name} is missing at the top of the script: it has to be {description}.")
        value = values[name] = constants[name]
        if not is_valid(value):
            raise UserError(f"{name} is {value!r}, but has to be {description}.")
        if name in ("DATA_DIR", "OUTPUT_DIR") or (name == "WEIGHTS" and value not in (None, "imagenet")):
            values[name] = Path(os.path.abspath(HERE / os.path.expanduser(value)))
        elif name in ("UNFROZEN_FRACTION", "LEARNING_RATE"):
            values[name] = float(value)  # 1 and 1.0 are one setting
        if name == "WEIGHTS" and isinstance(values[name], Path) and not values[name].is_file():
            raise UserError(f"WEIGHTS is {str(value)!r}, but there is no file {values[name]}.")
    return Settings(**values)


def start(constants):
    """(settings, console) from globals() of a script: see check_constants, and the handler that keeps the log.

    Seeds every generator and prepares Keras and the devices.
    """
    console = logging.handlers.BufferingHandler(capacity=10**6)
    log.handlers = [logging.StreamHandler(sys.stdout), console]
    log.setLevel(logging.INFO)
    settings, gpus = check_constants(constants), tf.config.list_physical_devices("GPU")
    mixed = settings.MIXED_PRECISION
    if mixed == "auto":  # tensor cores came with compute capability 7
        details = map(tf.config.experimental.get_device_details, gpus)
        mixed = bool(gpus) and all(gpu.get("compute_capability", (0,)) >= (7,) for gpu in details)
    keras.backend.clear_session()  # which resets the dtype policy, too
    keras.config.set_image_data_format("channels_last")  # whatever the user's keras.json has
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("mixed_float16" if mixed else "float32")
    if len(gpus) > 1:  # each gets an equal part of every batch
        tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy())
    keras.utils.set_random_seed(settings.SEED)
    tf.config.experimental.enable_op_determinism()  # without it a GPU adds up in any order
    log.info("device: %s, %s", describe_device(), keras.config.dtype_policy().name)
    return settings, console


def describe_device():
    gpus = map(tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU"))
    return ", ".join(gpu.get("device_name", "GPU") for gpu in gpus) or f"CPU with {os.cpu_count()} cores"


# ---- model -------------------------------------------------------------------------------------


def load_backbone(build_backbone, films, settings):
    """(backbone, weights): build_backbone(WEIGHTS), and a dict of origin, pretrained and sha256 of its weights.

    Where the ImageNet weights cannot be downloaded, phantoms are trained from random weights, which every
    file and figure then states; real films raise UserError, as does a file of another network.
    """
    source, origin = settings.WEIGHTS, settings.WEIGHTS
    if isinstance(source, Path):
        check_unseen(source, films)
        source, origin = str(source), shorten(source)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds: a network that swallows packets would hang the run
    try:
        with warnings.catch_warnings(action="error", category=UserWarning):  # of layers that stay without weights
            backbone = build_backbone(source)
    except Exception as error:  # Keras and h5py raise whatever the network or the file leads them to
        if source is None or isinstance(error, (NameError, AttributeError, TypeError)):
            raise  # a mistake in the script
        reason = str(error).strip().splitlines()[0]
        if source != "imagenet":
            raise UserError(f"WEIGHTS: {source} holds no such backbone without top layers ({reason}).") from error
        sentence = f"No ImageNet weights ({reason}): fetch that file elsewhere, and set WEIGHTS to its path."
        if not is_synthetic(films):
            raise UserError(sentence) from error
        log.warning("*** random weights *** %s", sentence)
        backbone, origin = build_backbone(None), None
    finally:
        socket.setdefaulttimeout(timeout)
    log.info("weights: %s", origin or RANDOM_NOTE)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in backbone.get_weights())).hexdigest()
    return backbone, {"origin": origin or RANDOM_NOTE, "pretrained": bool(origin), "sha256": digest}


def count_unfrozen(layers, settings):
    return max(1, math.floor(round(settings.UNFROZEN_FRACTION * len(layers), 6) + 0.5))


def build_model(backbone, weights, settings):
    """The compiled classifier: raw RGB float (B, 224, 224, 3) in 0..255 to P(malignant), (B, 1).

    The top UNFROZEN_FRACTION of the backbone's layers trains (half a layer counts as one), the rest is
    frozen. In a pretrained backbone every BatchNormalization is frozen, too: its statistics would follow
    batches of 13 films, and calling it with training=False does not keep Keras from that.
    """
    for layer in backbone.layers[: -count_unfrozen(backbone.layers, settings)]:
        layer.trainable = False
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization) and weights["pretrained"]:
            layer.trainable = False
    full = {"dtype": "float32"}  # with MIXED_PRECISION too, so that no probability and no metric is rounded
    features = keras.layers.GlobalAveragePooling2D(name="pooled", **full)(backbone.output)
    features = keras.layers.Dense(settings.HEAD_UNITS, activation="relu", name="head", **full)(features)
    features = keras.layers.Dropout(settings.DROPOUT, name="dropout", **full)(features)
    logit = keras.layers.Dense(1, name="logit", **full)(features)
    probability = keras.layers.Activation("sigmoid", name="probability", **full)(logit)
    model = keras.Model(backbone.inputs[0], probability, name=backbone.name)
    # metrics by name would have the training step traced twice; XLA and determinism exclude each other in Keras
    accuracy = keras.metrics.BinaryAccuracy(name="accuracy", threshold=settings.THRESHOLD)
    model.compile(keras.optimizers.Adam(settings.LEARNING_RATE), keras.losses.BinaryCrossentropy(),
                  weighted_metrics=[accuracy], jit_compile=False)
    log.info("the top {unfrozen_layers} of {layers} layers of {backbone} train, with {unfrozen_parameters:,} of"
             " {parameters:,} parameters".format(**describe_model(model, settings)))
    return model


def describe_model(model, settings):
    """Facts that the model itself tells; layers and parameters are those of the backbone."""
    layers = model.layers[: model.layers.index(model.get_layer("pooled"))]
    unfrozen = layers[-count_unfrozen(layers, settings) :]
    return {
        "backbone": model.name,
        "layers": len(layers),
        "unfrozen_layers": len(unfrozen),
        "parameters": sum(layer.count_params() for layer in layers),
        "unfrozen_parameters": sum(layer.count_params() for layer in unfrozen),
        "trained_parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        "floats": sorted({layer.compute_dtype for layer in model.layers}),
        "xla": bool(model.jit_compile),
        "devices": model.distribute_strategy.num_replicas_in_sync,
    }


# ---- datasets ----------------------------------------------------------------------------------


def draw_epoch(labels, seed, epoch):
    """Which films an epoch shows, in order: int64 indices, twice as many as the majority class has.

    labels: int (N,), 0 or 1. The minority is repeated whole as often as it fits, then filled up with a
    random part of it. It depends on (seed, epoch) alone, so that any epoch can be drawn again.
    """
    rng = np.random.default_rng((seed, epoch))
    majority = np.bincount(labels).max()
    chosen = []
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        rounds = math.ceil(majority / len(members))
        chosen.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:majority])
    return rng.permutation(np.concatenate(chosen))


def augment(image, seed, settings):
    """A random variant of `image`, float32 (H, W, 3) in 0..255; the same for the same seed, int (2,)."""
    flip, *seeds = tf.unstack(tf.random.split(seed, 4))
    shift, contrast, saturation = (tf.random.stateless_uniform([], key, -1, 1) for key in seeds)
    image = tf.image.stateless_random_flip_left_right(image, flip)
    image = tf.image.adjust_brightness(image, 255 * settings.BRIGHTNESS * shift)
    image = tf.image.adjust_contrast(image, 1 + settings.CONTRAST * contrast)
    image = tf.image.adjust_saturation(image, 1 + settings.SATURATION * saturation)
    return tf.clip_by_value(image, 0, 255)


def make_datasets(images, films, settings):
    """(training, validation, steps): two sources of batches, and the batches of an epoch.

    A batch is float32 (B, IMAGE_SIZE, IMAGE_SIZE, 3) in 0..255 and int64 labels (B,). training(first) is
    the tf.data.Dataset of all epochs from `first`, counted from 0: balanced, every film augmented by (seed,
    epoch, place in the epoch). validation is that of every held-out film once, in the table's order, with
    weights, float32 (B,): several devices need full batches, which films of weight 0 fill up; the weights of
    the others make up for these, as Keras takes the mean over films and not over weights.
    """
    labels = films["label"].eq("malignant").to_numpy(np.int64)
    train, held_out = (np.flatnonzero(films["split"] == side) for side in ("train", "validation"))
    devices = tf.distribute.get_strategy().num_replicas_in_sync
    batch_size = math.ceil(settings.BATCH_SIZE / devices) * devices
    options = tf.data.Options()
    options.autotune.enabled = False  # its thread sleeps ever longer, and the last batch waits until it wakes

    def fill(indices):
        return indices if devices == 1 else np.resize(indices, math.ceil(len(indices) / batch_size) * batch_size)

    def draw(epoch):
        return fill(train[draw_epoch(labels[train], settings.SEED, int(epoch))])

    def load(index):
        grey = tf.numpy_function(lambda i: images[i], [index], tf.uint8, stateful=False)
        grey = tf.ensure_shape(grey, (IMAGE_SIZE, IMAGE_SIZE))
        return tf.repeat(tf.cast(grey, tf.float32)[..., None], 3, axis=-1), tf.gather(labels, index)

    def make_epoch(epoch):
        def load_augmented(place, index):
            image, label = load(index)
            seed = tf.random.fold_in([tf.constant(settings.SEED, tf.int64), epoch], place)
            return augment(image, seed, settings), label

        order = tf.numpy_function(draw, [epoch], tf.int64, stateful=False)
        order = tf.data.Dataset.from_tensor_slices(tf.ensure_shape(order, (None,))).enumerate()
        return order.map(load_augmented, num_parallel_calls=os.cpu_count()).batch(batch_size)

    def training(first):
        epochs = tf.data.Dataset.range(first, settings.EPOCHS)
        return epochs.flat_map(make_epoch).prefetch(2).with_options(options)

    shown = fill(held_out)
    weights = np.where(np.arange(len(shown)) < len(held_out), len(shown) / len(held_out), 0).astype(np.float32)
    validation = tf.data.Dataset.from_tensor_slices((shown, weights)).map(
        lambda index, weight: (*load(index), weight), num_parallel_calls=os.cpu_count())
    steps = math.ceil(len(draw(0)) / batch_size)
    return training, validation.batch(batch_size).prefetch(2).with_options(options), steps


# ---- training ----------------------------------------------------------------------------------


def name_run(settings, films, model, weights):
    """The folder of a run: OUTPUT_DIR/<backbone>-unfrozen<percent>-<6 hex digits of what decides its results>.

    These are the films as they are shown and split, the network, its weights, the constants of the training,
    the code and the releases. Where DATA_DIR lies does not count, nor do FOLD and CROP where they change nothing.
    """
    names = ("LEARNING_RATE", "EPOCHS", "BATCH_SIZE", "SEED", *MODULE_CONSTANTS)
    decisive = [films.to_csv(index=False), model.to_json(), [weight.path for weight in model.trainable_weights],
                weights["sha256"], CODE, [getattr(settings, name) for name in names],
                [module.__version__ for module in (tf, keras, np, scipy)]]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    percent = 100 * settings.UNFROZEN_FRACTION
    return settings.OUTPUT_DIR / f"{model.name}-unfrozen{percent:g}-{digest[:6]}"


def is_complete(folder):
    """Whether the folder of a run holds its results already; logs how to repeat it."""
    complete = (folder / "settings.json").is_file()
    log.info("complete already, delete the folder to repeat it: %s" if complete else "results will be in %s",
             shorten(folder))
    return complete


def name_unfinished(folder):
    """The hidden folder beside that of a run, from which the run continues until it is complete."""
    return folder.with_name(f".{folder.name}")


def save_checkpoint(model, history, file):
    """Write the history, a row for each finished epoch, and all variables (weights, optimizer, dropout)."""
    partial = file.with_suffix(f".{os.getpid()}")
    with explain_write_errors(file):
        try:
            with partial.open("wb") as stream:
                for array in (history, *map(np.asarray, [*model.variables, *model.optimizer.variables])):
                    np.save(stream, array)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def load_checkpoint(model, file):
    """Restore all variables; returns the rows of the history, none where there is no such file."""
    if not file.exists():
        return []
    with file.open("rb") as stream:
        history = np.load(stream)
        for variable in [*model.variables, *model.optimizer.variables]:
            variable.assign(np.load(stream))
    return history.tolist()


def train(model, training, validation, steps, settings, folder):
    """Fit all epochs, keep the last: a table of epoch, loss, accuracy, val_loss, val_accuracy, seconds.

    Nothing is chosen on the validation side. After every epoch a checkpoint is written, and the next call
    continues from it with the same numbers. Raises UserError where the training diverges or a batch does
    not fit into memory.
    """
    columns, checkpoint = ["loss", "accuracy", "val_loss", "val_accuracy"], name_unfinished(folder) / "checkpoint"
    with explain_write_errors(folder):
        checkpoint.parent.mkdir(exist_ok=True)
    model.optimizer.build(model.trainable_variables)
    rows = load_checkpoint(model, checkpoint)
    if rows:
        log.info("continuing after epoch %d of %d", len(rows), settings.EPOCHS)
    before, started = rows[-1][-1] if rows else 0, time.perf_counter()

    def keep(epoch, logs):
        rows.append([*(logs[name] for name in columns), before + time.perf_counter() - started])
        save_checkpoint(model, rows, checkpoint)

    callbacks = [keras.callbacks.TerminateOnNaN(), keras.callbacks.LambdaCallback(on_epoch_end=keep)]
    try:
        if len(rows) < settings.EPOCHS:
            model.fit(training(len(rows)), epochs=settings.EPOCHS, initial_epoch=len(rows), steps_per_epoch=steps,
                      validation_data=validation, shuffle=False, callbacks=callbacks)
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(f"out of memory ({describe_device()}): lower BATCH_SIZE (a new run).") from error
    finite = all(np.isfinite(part).all() for part in (rows, *model.weights))  # a ReLU can hide NaN from the loss
    if not finite or len(rows) < settings.EPOCHS:
        shutil.rmtree(name_unfinished(folder))
        raise UserError("training diverged, its numbers are not finite: lower LEARNING_RATE.")
    history = pd.DataFrame(rows, columns=[*columns, "seconds"])
    history.insert(0, "epoch", range(1, settings.EPOCHS + 1))
    return history


# ---- evaluation --------------------------------------------------------------------------------


def make_gradcam(model, threshold=THRESHOLD):
    """A compiled function from images, float32 (B, H, W, 3) in 0..255, to P(malignant) and Grad-CAM maps.

    P(malignant) is float32 (B,); Grad-CAM of the predicted class (Selvaraju et al. 2017) on the last feature
    maps is float32 (B, h, w) in 0..1. The logit is differentiated, as a saturated sigmoid has no gradient;
    for a film predicted benign it is negated. A map without evidence for the prediction is 0 everywhere.
    """
    pooling = (keras.layers.MaxPooling2D, keras.layers.GlobalAveragePooling2D)  # which make maps coarser
    maps = next(layer.output for layer in reversed(model.layers)
                if len(layer.output.shape) == 4 and not isinstance(layer, pooling))
    bottom = keras.Model(model.inputs[0], maps)
    top = keras.Model(maps, [model.get_layer("logit").output, model.output])

    @tf.function(input_signature=[tf.TensorSpec(model.inputs[0].shape, tf.float32)])
    def explain(images):
        features = bottom(images, training=False)
        with tf.GradientTape() as tape:
            tape.watch(features)
            logit, probability = (output[:, 0] for output in top(features, training=False))
            evidence = tf.where(probability >= threshold, logit, -logit)
        gradient, features = (tf.cast(part, tf.float32) for part in (tape.gradient(evidence, features), features))
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        cams = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
        return probability, tf.math.divide_no_nan(cams, tf.reduce_max(cams, axis=(1, 2), keepdims=True))

    return explain


def evaluate(model, validation, films, settings):
    """(predictions, maps) of the held-out films, in the order and with the index of `films`.

    predictions: path, patient_id, label, probability (of malignancy), predicted; maps: Grad-CAM, (N, h, w).
    """
    held_out = films[films["split"] == "validation"]
    explain = make_gradcam(model, settings.THRESHOLD)
    parts = [[part.numpy() for part in explain(images)] for images, _, _ in validation]
    probabilities, maps = (np.concatenate(part)[: len(held_out)] for part in zip(*parts, strict=True))
    probabilities = probabilities.astype(float)
    return held_out[["path", "patient_id", "label"]].assign(
        probability=probabilities, predicted=np.take(CLASSES, probabilities >= settings.THRESHOLD)), maps


def measure(labels, probabilities, patients, seed=0):
    """Every metric at THRESHOLD with its 95 % interval over patients, as a dict; see data.metrics.measure."""
    return metrics.measure(labels, probabilities, patients, seed, THRESHOLD)


def score(predictions, maps, films, settings):
    """The content of metrics.json: every metric on the held-out films, their number, and the pointing game."""
    held_out = films.loc[predictions.index]
    malignant = predictions["label"].eq("malignant").to_numpy()
    results = metrics.measure(malignant.astype(int), predictions["probability"].to_numpy(),
                              held_out["group"].to_numpy(), settings.SEED, settings.THRESHOLD)
    results |= {"validation_images": len(held_out), "validation_patients": held_out["patient_id"].nunique()}
    boxed = held_out["lesion_box"].ne("").to_numpy()
    if boxed.any() and settings.CROP != "lesion":  # whose box is always in the middle, where any peak would hit
        found = malignant & predictions["predicted"].eq("malignant").to_numpy()
        results["pointing_game"] = play_pointing_game(held_out[boxed], maps[boxed], found[boxed])
    return results


def play_pointing_game(films, maps, true_positives):
    """How often the peak of a map lies in a lesion box of its film (Zhang et al. 2016), as a dict.

    films: N rows with a lesion_box; maps: float (N, h, w), an empty one is a miss; true_positives: bool (N,).
    The baseline is how often the peaks of the other films lie in a film's boxes, so that a habit of pointing
    at the middle does not count as skill.
    """
    rows, columns = np.unravel_index(maps.reshape(len(maps), -1).argmax(axis=1), maps.shape[1:])
    x, y = (columns + 0.5) / maps.shape[2], (rows + 0.5) / maps.shape[1]
    inside = np.zeros((len(films), len(films)), bool)  # the boxes of a film in rows, the peak of a map in columns
    for row, film in enumerate(films.itertuples()):
        for left, top, width, height in place_boxes(film):
            inside[row] |= (left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)
    inside &= maps.any(axis=(1, 2))
    hits, game = inside.diagonal(), {}
    others = (inside.sum(axis=1) - hits) / max(1, len(films) - 1)
    for name, chosen in (("images", np.ones(len(films), bool)), ("true_positives", true_positives)):
        if chosen.any():
            game[name] = {"images": int(chosen.sum()), "hits": int(hits[chosen].sum()),
                          "share": float(hits[chosen].mean()), "other_films": float(others[chosen].mean())}
    return game


def describe_held_out(results):
    return f"{results['validation_images']} held-out films of {results['validation_patients']} patients"


def show_results(folder):
    """Log the metrics of a complete run, and what they were measured on."""
    results = json.loads((folder / "metrics.json").read_text("utf-8"))
    for name in results["ci95"]:
        log.info("%-29s %s", name.replace("_", " "), with_interval(results, name))
    log.info("on %s, with 95 %% intervals over patients; thresholds of the last two are read off these films; the"
             " majority class alone has accuracy %.2f", describe_held_out(results), results["majority_baseline"])
    for name, game in results.get("pointing_game", {}).items():
        log.info("the Grad-CAM peak is in the lesion box of %d of %d %s; peaks of other films: %.2f",
                 game["hits"], game["images"], name.replace("_", " "), game["other_films"])
    counts = results["confusion_matrix"]
    if 0 in (counts["tp"] + counts["fp"], counts["tn"] + counts["fn"]):
        log.warning("*** all films were called the same class ***")
    if results["note"]:
        log.warning("*** %s ***", results["note"])


# ---- figures -----------------------------------------------------------------------------------


def draw_training_curves(history):
    figure = Figure((9, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        axes.plot(history["epoch"], history[name], "o-", label="training (augmented, with dropout)")
        axes.plot(history["epoch"], history[f"val_{name}"], "s--", label="validation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set(xlabel="epoch", ylabel={"loss": "binary cross-entropy"}.get(name, name), ylim=(0, None))
    axes.set_ylim(0, 1.02)
    return figure


def draw_confusion_matrix(predictions, results):
    figure = Figure((5, 4.8), layout="constrained")
    axes = figure.subplots()
    sklearn.metrics.ConfusionMatrixDisplay.from_predictions(
        predictions["label"], predictions["predicted"], labels=CLASSES, ax=axes, cmap="Blues", colorbar=False,
        text_kw={"fontsize": 22})
    axes.set(xlabel=f"predicted (threshold {results['threshold']})", ylabel="true")
    axes.set_title(f"{describe_held_out(results)}\nsensitivity {with_interval(results, 'recall')}, specificity"
                   f" {with_interval(results, 'specificity')}", fontsize=9)
    return figure


def draw_roc_curve(predictions, results, band):
    figure = Figure((5, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(*band, alpha=0.2, label="95 % of bootstrap curves, over patients")
    sklearn.metrics.RocCurveDisplay.from_predictions(
        predictions["label"], predictions["probability"], pos_label="malignant", ax=axes, plot_chance_level=True)
    axes.get_lines()[0].set_label(f"AUC {with_interval(results, 'auc')}")
    axes.plot(1 - results["specificity"], results["recall"], "ko", label=f"threshold {results['threshold']}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title(describe_held_out(results), fontsize=10)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def overlay_map(image, cam):
    """The map over the image, uint8 (IMAGE_SIZE, IMAGE_SIZE, 3) RGB: strong evidence covers it."""
    heat = cv2.resize(cam, image.shape, interpolation=cv2.INTER_LINEAR)[..., None]
    colour = matplotlib.colormaps["viridis"](heat[..., 0])[..., :3] * 255
    return np.rint(image[..., None] * (1 - 0.6 * heat) + colour * 0.6 * heat).astype(np.uint8)


def select_cases(predictions, threshold):
    """The CASES most confident rows of `predictions` of each outcome, with columns for it and its number."""
    correct = np.where(predictions["predicted"] == predictions["label"], "true_", "false_")
    called = np.where(predictions["predicted"] == "malignant", "positive", "negative")
    ranked = predictions.assign(outcome=np.char.add(correct, called))
    ranked = ranked.sort_values("probability", key=lambda p: -abs(p - threshold), kind="stable")
    ranked["number"] = ranked.groupby("outcome").cumcount()
    return ranked[ranked["number"] < CASES]


def draw_cases(cases, films, images, maps, outcomes=OUTCOMES, columns=CASES, panel=1.5):
    """A row of panels for each outcome: every case as the model sees it, and with its map over it.

    Lesion boxes are dashed. cases: see select_cases; images, maps: by the index of the cases; panel: inches.
    """
    size = (2 * panel * columns + 1, (panel + 0.2) * len(outcomes) + 0.8)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(outcomes), 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for panels, outcome in zip(grid, outcomes, strict=True):
        rows = list(cases[cases["outcome"] == outcome].itertuples())
        panels[0].set_ylabel(outcome.replace("_", "\n") + ("" if rows else "\n(none)"), fontsize=11)
        for case, pair in zip(rows, panels.reshape(-1, 2), strict=False):
            image, cam = images[case.Index], maps[case.Index]
            for axes, pixels in zip(pair, (image, overlay_map(image, cam)), strict=True):
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
                for left, top, width, height in place_boxes(films.loc[case.Index]) * IMAGE_SIZE:
                    axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="white", lw=0.8, ls="--"))
            pair[0].set_title(case.label, fontsize=10)
            pair[1].set_title(f"P(malignant) {case.probability:.2f}", fontsize=10)
            if not cam.any():
                pair[1].set_xlabel("no positive evidence", fontsize=9)
    return figure


def write_figure(figure, file, title, note):
    """Write a PNG under a title, with what the run has to state about itself below it."""
    figure.suptitle(title, fontsize=11, parse_math=False)
    if note:
        figure.supxlabel(textwrap.fill(note.upper(), int(12 * figure.get_figwidth())), fontsize=8,
                         color="firebrick", fontweight="bold")
    with warnings.catch_warnings(action="ignore"):  # of characters in a file name that no font here has
        figure.savefig(file, dpi=120)


# ---- run folder --------------------------------------------------------------------------------


def write_table(table, file, note=""):
    """Write a CSV; nine digits give a float32 back exactly."""
    table = table.assign(note=note) if note else table
    table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")


def write_json(content, file):
    file.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def write_leaks(films, folder):
    """Write leaks.csv, if there are any: validation films left out, and what they show of the training side."""
    leaks = films[films["trained_on"] != ""]
    (folder / "leaks.csv").unlink(missing_ok=True)  # of an earlier run
    if len(leaks):
        write_table(leaks[["path", "label", "patient_id", "trained_on"]], folder / "leaks.csv")


def write_run(folder, settings, films, images, model, weights, history, predictions, maps, console):
    """Write all files of a run, then give their folder its name, and remove the checkpoint."""
    notes = ["synthetic phantoms"] * is_synthetic(films) + [weights["origin"]] * (not weights["pretrained"])
    note, facts = "; ".join(notes), describe_model(model, settings)
    results = score(predictions, maps, films, settings) | {"note": note}
    truth = predictions["label"].eq("malignant").to_numpy(int), predictions["probability"].to_numpy()
    band = metrics.compute_roc_band(*truth, films.loc[predictions.index, "group"].to_numpy(), settings.SEED)
    cases = select_cases(predictions, settings.THRESHOLD)
    maps = dict(zip(predictions.index, maps, strict=True))
    figures = {
        "training_curves": draw_training_curves(history),
        "confusion_matrix": draw_confusion_matrix(predictions, results),
        "roc_curve": draw_roc_curve(predictions, results, band),
        "grad_cam_example": draw_cases(cases, films, images, maps),
    }
    title = "{backbone}, top {unfrozen_layers} of {layers} layers trained".format(**facts)
    columns = ["path", "label", "patient_id", "split", "group", "film_sha256"]
    with explain_write_errors(folder):
        new = name_unfinished(folder) / f"new-{os.getpid()}"
        shutil.rmtree(new, ignore_errors=True)
        (new / "gradcam").mkdir(parents=True)
        write_table(films[columns], new / "split.csv", note)
        write_table(history.drop(columns="seconds"), new / "history.csv", note)
        write_table(predictions, new / "predictions.csv", note)
        write_leaks(films, new)
        write_json(results, new / "metrics.json")
        for name, figure in figures.items():
            write_figure(figure, new / f"{name}.png", title, note)
        for case in cases.itertuples():
            figure = draw_cases(cases.loc[[case.Index]], films, images, maps, [case.outcome], columns=1, panel=3.3)
            stem = re.sub(r"[^\w.-]", "_", Path(case.path).stem)[:100]
            name = f"{case.outcome}_{case.number + 1:02d}_{stem}.png"
            write_figure(figure, new / "gradcam" / name, f"{title}\n{case.path}", note)
        # without the optimizer, which would be two thirds of the file
        keras.Model(model.inputs[0], model.output, name=model.name).save(new / "model.keras")
        write_json(describe_run(settings, films, facts, weights, history, note, console), new / "settings.json")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    shutil.rmtree(name_unfinished(folder), ignore_errors=True)
    log.info("finished: %s", shorten(folder))


def describe_run(settings, films, facts, weights, history, note, console):
    """The content of settings.json: what was asked for, and what the films, the model and the machine are."""
    sides = films.groupby(["split", "label"])["patient_id"].agg(["size", "nunique"])
    pictures = films[["film_sha256", "label"]].sort_values(["film_sha256", "label"]).to_csv(index=False)
    collection = {"sha256": hashlib.sha256(pictures.encode()).hexdigest(), "images": len(films),
                  "patients": films["patient_id"].nunique(), "duplicates": int(films["duplicate"].sum()),
                  "depths": films.groupby("container")["depth"].first().to_dict()}
    collection |= {name: films[name].value_counts().to_dict() for name in ("patient_from", "format", "left_out")}
    modules = (tf, keras, np, scipy, pd, matplotlib, sklearn, cv2)
    versions = {module.__name__: module.__version__ for module in modules}
    started = console.buffer[0].created
    return {
        "note": note,
        "constants": {name: shorten(value) if isinstance(value, Path) else value
                      for name, value in settings._asdict().items()},
        "model": facts,
        "weights": weights,
        "collection": collection,
        "split": {"given": bool(films["fold"].eq("").all())} | {
            f"{side}, {label}": f"{size} films of {patients} patients"
            for (side, label), (size, patients) in sides.iterrows()},
        "versions": {"python": platform.python_version()} | versions,
        "device": describe_device(),
        "seconds": {"training": round(history["seconds"].iloc[-1], 1), "total": round(time.time() - started, 1)},
        "console": [f"{record.created - started:7.1f} s  {record.getMessage()}" for record in console.buffer],
    }


# ---- after a run -------------------------------------------------------------------------------


def compare(output_dir):
    """Write runs.csv and report.html into OUTPUT_DIR, see data.comparison.compare."""
    with explain_write_errors(output_dir):
        comparison.compare(output_dir)


def predict(run, film, lesion_box=""):
    """(probability, overlay) of one new film: P(malignant), and its Grad-CAM, uint8 (224, 224, 3) RGB.

    run: the folder of a run, or its model.keras; film: a file. Paths count from the working directory. The film
    is read and cropped as in training; lesion_box is needed with CROP = "lesion" only. Raises UserError where
    the film, the model or the settings.json beside it cannot be read.
    """
    run, film = (Path(os.path.abspath(os.path.expanduser(path))) for path in (run, film))
    file = run / "model.keras" if run.is_dir() else run
    try:
        settings = json.loads(file.with_name("settings.json").read_text("utf-8"))
        crop, threshold = settings["constants"]["CROP"], settings["constants"]["THRESHOLD"]
        model = keras.models.load_model(file, safe_mode=True)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{file} and the settings.json beside it cannot be loaded ({error}).") from error
    image, _ = reading.read_image(film, crop, lesion_box, settings["collection"]["depths"])
    pixels = np.repeat(image[None, ..., None], 3, axis=-1).astype(np.float32)
    probabilities, maps = make_gradcam(model, threshold)(pixels)
    return float(probabilities[0]), overlay_map(image, maps[0].numpy())
