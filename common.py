"""One run, in the order in which it happens: what resnet50.py and vgg16.py share.

start, model, datasets, training, evaluation, run folder, all folds together; then what one does with a finished
run: compare it, predict new films, validate it on another collection. What knows films but no networks is in
data/.
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
import time
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"  # read by Keras when it is imported
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default on many processors, and slower there
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # GPUs since Ampere round what they multiply in 32 bits to 19
HERE = Path(__file__).resolve().parent
saved_stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # TensorFlow's C++ writes to it while it is imported
try:
    from data import UserError, explain_write_errors, log, reading, replace
    from data.duplicates import group_duplicates  # noqa: F401
    from data.films import CLASSES, absolute, find_films, is_synthetic, list_images
    from data.reading import IMAGE_SIZE, read_films
    from data.results.comparison import compare
    from data.results.figures import draw_training_curves, overlay_map, write_figure, write_overlay
    from data.results.files import write_leaks, write_results, write_table
    from data.results.summary import show_results
    from data.splits import FOLDS, check_folds, check_sides, check_unseen, leave_out_known, split_patients  # noqa: F401

    import cv2
    import keras
    import matplotlib
    import numpy as np
    import pandas as pd
    import scipy
    import sklearn.metrics
    import tensorflow as tf
    from scipy import special
    from tensorflow.python.framework.ops import gradient_registry
    from tensorflow.python.util._pywrap_util_port import IsMklEnabled as is_onednn_on

except ImportError as missing:
    sys.exit(f"{missing}: pip install -r {HERE / 'requirements.txt'}; where it is libGL that is missing, apt-get"
             " install libgl1 libglib2.0-0, or pip install opencv-python-headless in place of opencv-python.")
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
LOGS = ("loss", "accuracy", "val_loss", "val_accuracy")
CODE = reading.CODE + [
    reading.parse_code(HERE / name)
    for name in ("common.py", "data/splits.py", "data/results/metrics.py", "data/results/files.py")]


# ---- start -------------------------------------------------------------------------------------


def is_path(value):
    return isinstance(value, (str, os.PathLike)) and str(value).strip() != ""


def is_number(value, kind, low, high=sys.float_info.max):
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


CONSTANTS = {  # of a script: what each may be, as a check and in words
    "DATA_DIR": (is_path, "the path of a folder in quotes"),
    "OUTPUT_DIR": (is_path, "the path of a folder in quotes"),
    "CROP": (lambda v: v in ("breast", "lesion", None), '"breast", "lesion" or None'),
    "FOLD": (lambda v: v == "all" or is_number(v, Integral, 0, FOLDS - 1), f'0 to {FOLDS - 1}, or "all"'),
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
        elif isinstance(value, np.integer):
            values[name] = int(value)  # as JSON takes it
        if name == "WEIGHTS" and isinstance(values[name], Path) and not values[name].is_file():
            raise UserError(f"WEIGHTS is {str(value)!r}, but there is no file {values[name]}.")
    return Settings(**values)


def open_console():
    """Print what is logged; returns the handler that keeps it."""
    console = logging.handlers.BufferingHandler(capacity=10**6)
    log.handlers = [logging.StreamHandler(sys.stdout), console]
    log.setLevel(logging.INFO)
    tf.get_logger().setLevel("ERROR")  # it warns of five folds that are five functions
    return console


def start(constants):
    """(settings, console) from globals() of a script: see check_constants and open_console."""
    console, settings = open_console(), check_constants(constants)
    tf.config.experimental.enable_op_determinism()  # without it a GPU adds up in any order
    reset_keras(settings)
    log.info("device: %s; training in %s", describe_device(), " because ".join(choose_precision(settings)))
    return settings, console


def list_gpus():
    """What TensorFlow knows of each GPU, as dicts."""
    return [tf.config.experimental.get_device_details(gpu) for gpu in tf.config.list_physical_devices("GPU")]


def list_bfloat16_flags(cpuinfo="/proc/cpuinfo"):
    """Those of the processor's instructions for bfloat16 that Linux lists; elsewhere none are known."""
    flags = Path(cpuinfo).read_text("utf-8").split() if Path(cpuinfo).exists() else []
    return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]


def choose_precision(settings):
    """(Keras' dtype policy of the training, why): "auto" takes 16 bits where the device multiplies them faster.

    It goes by what the device has and not by a timing, as the choice decides the result.
    """
    gpus, flags = list_gpus(), list_bfloat16_flags()
    sixteen_bits = "mixed_float16" if gpus else "mixed_bfloat16"  # which needs no loss scaling
    if settings.MIXED_PRECISION != "auto":
        mixed, reason = settings.MIXED_PRECISION, f"MIXED_PRECISION is {settings.MIXED_PRECISION}"
    elif gpus:  # tensor cores came with compute capability 7
        mixed = all(gpu.get("compute_capability", (0,)) >= (7,) for gpu in gpus)
        reason = f"{'all' if mixed else 'not all'} GPUs have tensor cores"
    else:
        mixed = bool(flags) and is_onednn_on()  # which is what TensorFlow uses these instructions through
        reason = f"the processor has {' and '.join(flags) or 'no known instructions for bfloat16'}"
        reason += "" if is_onednn_on() or not flags else ", but oneDNN is off"
    return sixteen_bits if mixed else "float32", reason


def reset_keras(settings):
    """Put Keras and all random generators into the state in which every training starts."""
    keras.backend.clear_session()  # strategy and dtype policy, too, and models and datasets of an earlier fold
    keras.config.set_image_data_format("channels_last")  # whatever the user's keras.json has
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(choose_precision(settings)[0])
    keras.utils.set_random_seed(settings.SEED)
    if len(tf.config.list_physical_devices("GPU")) > 1:  # each gets an equal part of every batch
        tf.distribute.experimental_set_strategy(tf.distribute.MirroredStrategy())


def describe_device():
    cpu = f"CPU with {os.cpu_count()} cores, oneDNN {'on' if is_onednn_on() else 'off'}"
    return ", ".join(gpu.get("device_name", "GPU") for gpu in list_gpus()) or cpu


def list_folds(films, settings, console):
    """Yield the number of each fold to run.

    Before each, Keras starts afresh and `console` forgets the lines of the fold before, so that settings.json
    tells of its own fold only.
    """
    shared, given = len(console.buffer), films["split"].ne("").any()  # given splits have no folds
    for fold in range(FOLDS) if settings.FOLD == "all" and not given else [settings.FOLD]:
        del console.buffer[shared:]
        reset_keras(settings)
        log.info("the split is that of the data; FOLD is not used" if given else
                 f"fold {fold} of 0 to {FOLDS - 1} is held out: whole patients, stratified by class")
        yield fold


# ---- model -------------------------------------------------------------------------------------


def load_backbone(build_backbone, films, fingerprints, settings):
    """(backbone, weights): build_backbone(WEIGHTS), and a dict of origin, pretrained and sha256 of its weights.

    Where the ImageNet weights cannot be downloaded, phantoms are trained from random weights, which every
    file and figure then states; real films raise UserError, as do a file of another network and weights that
    were trained on held-out patients.
    """
    check_unseen(films, fingerprints, settings)
    source, origin = settings.WEIGHTS, settings.WEIGHTS
    if isinstance(source, Path):
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
    """The classifier: raw RGB float (B, 224, 224, 3) in 0..255 to P(malignant), (B, 1).

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
    log.info("the top {unfrozen_layers} of {layers} layers of {backbone} train: with those on top of it,"
             " {trained_parameters:,} parameters".format(**describe_model(model, settings)))
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

    These are the films as they are shown and split, the network, its precision and weights, the constants of
    the training, the code and the releases. Where DATA_DIR lies does not count, nor do FOLD and CROP where they
    change nothing.
    """
    names = ("LEARNING_RATE", "EPOCHS", "BATCH_SIZE", "SEED", *MODULE_CONSTANTS)
    decisive = [films.to_csv(index=False), model.to_json(), [weight.path for weight in model.trainable_weights],
                weights["sha256"], CODE, [getattr(settings, name) for name in names],
                [module.__version__ for module in (tf, keras, np, scipy)]]
    percent = 100 * settings.UNFROZEN_FRACTION
    return settings.OUTPUT_DIR / f"{model.name}-unfrozen{percent:g}-{hash_to_digits(decisive)}"


def hash_to_digits(decisive):
    """Six hexadecimal digits of the SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:6]


def name_unfinished(folder):
    """The hidden folder beside that of a run, from which the run continues until it is complete."""
    return folder.with_name(f".{folder.name}")


def is_complete(folder):
    """Whether the folder of a run holds its results already; logs how to repeat it."""
    complete = (folder / "settings.json").is_file()
    if complete:
        shutil.rmtree(name_unfinished(folder), ignore_errors=True)  # of a run killed after its last file
    sentence = "complete already, delete the folder to repeat it" if complete else "results will be in"
    log.info("%s: %s", sentence, shorten(folder))
    return complete


def list_variables(model):
    """All that changes in a training: weights, averages and moments of the optimizer, state of the dropout."""
    return [*model.variables, *model.optimizer.variables]


def save_checkpoint(model, history, file):
    """Write the history, a row for each finished epoch, and all variables."""
    with explain_write_errors(file), replace(file) as temporary:
        np.savez(temporary, history, *list_variables(model))  # one copy of one array at a time


def load_checkpoint(model, file):
    """Restore all variables; returns the rows of the history, none where there is no such file."""
    if not file.exists():
        return []
    with np.load(file) as arrays:
        names = iter(arrays.files)
        history = arrays[next(names)]
        for variable, name in zip(list_variables(model), names, strict=True):
            variable.assign(arrays[name])
    return history.tolist()


def compile_model(model, steps, settings):
    """Make the model ready for epochs of `steps`; Adam averages the weights over about the last epoch."""
    adam = keras.optimizers.Adam(settings.LEARNING_RATE, use_ema=True, ema_momentum=1 - 1 / steps)
    # metrics by name would have the training step traced twice; XLA and determinism exclude each other in Keras
    accuracy = keras.metrics.BinaryAccuracy(name="accuracy", threshold=settings.THRESHOLD)
    model.compile(adam, keras.losses.BinaryCrossentropy(), weighted_metrics=[accuracy], jit_compile=False)
    model.optimizer.build(model.trainable_variables)


def train(model, training, validation, steps, settings, folder):
    """Fit all epochs: (trained, facts, history).

    trained: see to_float32; facts: see describe_model; history: a table with columns epoch, LOGS and seconds.
    The model ends with, and every epoch is validated with, averaged weights: those of the last step alone are a
    lottery (Polyak and Juditsky 1992). Nothing is chosen on the validation side. After every epoch a checkpoint is
    written, from which the next call continues with the same numbers. Raises UserError where the training diverges
    or a batch does not fit into memory.
    """
    checkpoint = name_unfinished(folder) / "checkpoint.npz"
    with explain_write_errors(folder):
        checkpoint.parent.mkdir(exist_ok=True)
    compile_model(model, steps, settings)
    rows = load_checkpoint(model, checkpoint)
    if rows:
        log.info("continuing after epoch %d of %d", len(rows), settings.EPOCHS)
    before, started = rows[-1][-1] if rows else 0, time.perf_counter()

    def keep(epoch, logs):
        rows.append([*(logs[name] for name in LOGS), before + time.perf_counter() - started])
        save_checkpoint(model, rows, checkpoint)

    known = {*gradient_registry.list()}
    swap = keras.callbacks.SwapEMAWeights()
    swap._tf_swap_variables = swap._backend_swap_variables  # exact: the former adds and subtracts, and so rounds
    callbacks = [keras.callbacks.TerminateOnNaN(), swap, keras.callbacks.LambdaCallback(on_epoch_end=keep)]
    try:
        if len(rows) < settings.EPOCHS:
            model.fit(training(len(rows)), epochs=settings.EPOCHS, initial_epoch=len(rows), steps_per_epoch=steps,
                      validation_data=validation, shuffle=False, callbacks=callbacks)
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(f"out of memory ({describe_device()}): lower BATCH_SIZE (a new run).") from error
    finally:
        for name in {*gradient_registry.list()} - known:  # or TensorFlow keeps each fold's graph, 350 MB
            del gradient_registry._registry[name]
    model.optimizer.finalize_variable_values(model.trainable_variables)  # as fit() does, where it was called
    finite = all(np.isfinite(part).all() for part in (rows, *model.weights))  # a ReLU can hide NaN from the loss
    if not finite or len(rows) < settings.EPOCHS:
        shutil.rmtree(name_unfinished(folder))
        raise UserError("training diverged, its numbers are not finite: lower LEARNING_RATE.")
    history = pd.DataFrame(rows, columns=[*LOGS, "seconds"])
    history.insert(0, "epoch", range(1, settings.EPOCHS + 1))
    return to_float32(model), describe_model(model, settings), history


def to_float32(model):
    """The model without its optimizer, computing in 32 bits, whatever it was trained in."""
    trained = keras.Model(model.inputs[0], model.output, name=model.name)
    if "float16" in (description := trained.to_json()):
        trained = keras.models.model_from_json(re.sub("mixed_b?float16", "float32", description))
        for variable, value in zip(trained.weights, model.weights, strict=True):
            variable.assign(value)
    return trained


# ---- evaluation --------------------------------------------------------------------------------


def make_gradcam(model, threshold=THRESHOLD):
    """A compiled function from images, float32 (B, H, W, 3) in 0..255, to logits and Grad-CAM maps.

    Logits of P(malignant) are float32 (B,); Grad-CAM of the predicted class (Selvaraju et al. 2017) on the last
    feature maps is float32 (B, h, w) in 0..1. The logit is differentiated, as a saturated sigmoid has no gradient;
    for a film predicted benign it is negated. A map without evidence for the prediction is 0 everywhere.
    """
    pooling = (keras.layers.MaxPooling2D, keras.layers.GlobalAveragePooling2D)  # which make maps coarser
    maps = next(layer.output for layer in reversed(model.layers)
                if len(layer.output.shape) == 4 and not isinstance(layer, pooling))
    bottom = keras.Model(model.inputs[0], maps)
    top = keras.Model(maps, model.get_layer("logit").output)

    @tf.function(input_signature=[tf.TensorSpec(model.inputs[0].shape, tf.float32)])
    def explain(images):
        features = bottom(images, training=False)
        with tf.GradientTape() as tape:
            tape.watch(features)
            logit = top(features, training=False)[:, 0]
            evidence = tf.where(logit >= special.logit(threshold), logit, -logit)
        gradient, features = (tf.cast(part, tf.float32) for part in (tape.gradient(evidence, features), features))
        weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)
        cams = tf.nn.relu(tf.reduce_sum(weights * features, axis=-1))
        return logit, tf.math.divide_no_nan(cams, tf.reduce_max(cams, axis=(1, 2), keepdims=True))

    return explain


def make_explainer(models, threshold):
    """A function from grey images, uint8 (B, H, W), to logits, float (B,), and Grad-CAM maps (B, h, w).

    Of several models it gives the mean logit, and the mean of the maps, each of which explains its own model.
    """
    functions = [make_gradcam(model, threshold) for model in models]

    def explain(images):
        pixels = np.repeat(images[..., None], 3, axis=-1).astype(np.float32)
        logits, maps = zip(*(function(pixels) for function in functions), strict=True)
        return np.mean(logits, axis=0, dtype=float), np.mean(maps, axis=0)

    return explain


def evaluate(models, images, films, settings):
    """{side: (predictions, maps)} of the sides "validation" and "test" of the split that have films.

    predictions: path, patient_id, label, probability (of malignancy), predicted, logit (of which confident films
    have different ones), in the order and with the index of `films`; maps: Grad-CAM, (N, h, w). Of several models
    see make_explainer.
    """
    gc.collect()  # after a training, the optimizer: three times the weights, in a cycle with its model
    explain, results = make_explainer(models, settings.THRESHOLD), {}
    for side in ("validation", "test"):
        rows, size = np.flatnonzero(films["split"] == side), settings.BATCH_SIZE
        if len(rows):
            parts = [explain(images[rows[start : start + size]]) for start in range(0, len(rows), size)]
            logits, maps = map(np.concatenate, zip(*parts, strict=True))
            probabilities = special.expit(logits)
            predictions = films.iloc[rows][["path", "patient_id", "label"]].assign(
                probability=probabilities, predicted=np.take(CLASSES, probabilities >= settings.THRESHOLD),
                logit=logits)
            results[side] = predictions, maps
    return results


# ---- run folder --------------------------------------------------------------------------------


@contextlib.contextmanager
def make_folder(folder):
    """A new folder, which takes the place of `folder` and of its checkpoint once all files are written."""
    new = name_unfinished(folder) / f"new-{os.getpid()}"
    try:
        with explain_write_errors(folder):
            new.mkdir(parents=True)
            yield new
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
        shutil.rmtree(name_unfinished(folder), ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):  # a checkpoint stays
            name_unfinished(folder).rmdir()
    log.info("finished: %s", shorten(folder))


def write_run(folder, settings, films, images, fingerprints, trained, facts, weights, history, results, console):
    """Write all files of a run, and remove the checkpoint; see load_backbone, train and evaluate."""
    notes = ["synthetic phantoms"] * is_synthetic(films) + [weights["origin"]] * (not weights["pretrained"])
    note = "; ".join(notes)
    title = "{backbone}, top {unfrozen_layers} of {layers} layers trained".format(**facts)
    recorded = describe_run(settings, films, console) | {"note": note, "title": title, "model": facts}
    recorded |= {"weights": weights, "seconds": {"training": round(history["seconds"].iloc[-1], 1)}}
    with make_folder(folder) as new:
        write_results(new, settings, films, images, results, recorded)
        write_figure(draw_training_curves(history), new / "training_curves.png", title, note)
        write_table(history.drop(columns="seconds"), new / "history.csv", note)
        np.save(new / "fingerprints.npy", fingerprints)
        trained.save(new / "model.keras")
    fold = films["fold"][films["split"].eq("validation")].iloc[0]
    if settings.FOLD == "all" and fold and (left := FOLDS - 1 - int(fold)):
        minutes = left * history["seconds"].max() / 60
        log.info("%d of %d folds are left: about %.1f minutes of training, less where one is complete already",
                 left, FOLDS, minutes)


def describe_run(settings, films, console):
    """What settings.json tells of the constants, the films, the machine and the run."""
    sides = films.groupby(["split", "label"])["group"].agg(["size", "nunique"])
    collection = {"images": len(films), "patients": films["group"].nunique(),
                  "duplicates": int(films["duplicate"].sum()),
                  "depths": films.groupby("container")["depth"].max().astype(int).to_dict()}
    collection |= {name: films[name].value_counts().to_dict() for name in ("patient_from", "format", "left_out")}
    modules = (tf, keras, np, scipy, pd, matplotlib, sklearn, cv2)
    started = console.buffer[0].created
    return {
        "constants": {name: shorten(value) if isinstance(value, Path) else value
                      for name, value in settings._asdict().items()},
        "collection": collection,
        "split": {"given": bool(films["fold"].eq("").all())} | {
            f"{side}, {label}": f"{size} films of {patients} patients"
            for (side, label), (size, patients) in sides.iterrows()},
        "versions": {"python": platform.python_version()} | {
            module.__name__: module.__version__ for module in modules},
        "device": describe_device(),
        "console": [f"{record.created - started:7.1f} s  {record.getMessage()}" for record in console.buffer],
    }


def pool_folds(folders, films, images, fingerprints, settings):
    """The folder of the one result of all folds: every patient scored by the model that held it out.

    films, images, fingerprints: those of all folds. A single folder is its own result.
    """
    if len(folders) == 1:
        return folders[0]
    digits = hash_to_digits([folder.name for folder in folders])
    folder = folders[0].with_name(f"{folders[0].name.rpartition('-')[0]}-all-{digits}")
    if is_complete(folder):
        return folder
    parts = [pd.read_csv(part / "predictions.csv", dtype=str, keep_default_na=False) for part in folders]
    maps = np.concatenate([np.load(part / "maps.npy") for part in folders])
    records = [json.loads((part / "settings.json").read_text("utf-8")) for part in folders]
    films = films.assign(fold=films["fold"].mask(films["left_out"] != "", "left out"))
    predictions = pd.concat(parts).drop(columns="note", errors="ignore").astype({"logit": float})
    predictions["probability"] = special.expit(predictions["logit"])
    predictions.index = pd.Index(films["path"]).get_indexer(predictions["path"])
    predictions["fold"] = films["fold"]
    recorded = records[-1] | {"folds": [part.name for part in folders], "split": {"given": False}}
    recorded["seconds"] = {"training": sum(record["seconds"]["training"] for record in records)}
    recorded["constants"]["FOLD"] = "all"
    recorded["title"] += ", all folds"
    with make_folder(folder) as new:
        write_results(new, settings, films, images, {"all folds": (predictions, maps)}, recorded, held_out="fold")
        np.save(new / "fingerprints.npy", fingerprints)
    return folder


# ---- after a run -------------------------------------------------------------------------------


def load_run(run):
    """(folder, models, recorded) of a run: its folder, its model.keras, or the folder of all folds (five models).

    recorded: its settings.json. A path counts from the working directory. Raises UserError.
    """
    run = absolute(run)
    folder = run if run.is_dir() else run.parent
    try:
        recorded = json.loads((folder / "settings.json").read_text("utf-8"))
        _ = recorded["constants"]["THRESHOLD"], recorded["collection"]["depths"]  # KeyError of older versions
        if "TRAINED_ON" in recorded["constants"]:
            raise ValueError("it is the result of validate(), which has no model")
        files = [folder.with_name(name) / "model.keras" for name in recorded.get("folds", [folder.name])]
        return folder, [keras.models.load_model(file, safe_mode=True) for file in files], recorded
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{run} and the settings.json in its folder cannot be loaded ({error}).") from error


def predict(run, films, overlays=None, lesion_boxes=None):
    """Table of new films: path, probability (of malignancy), predicted, reason (why a film cannot be read).

    run: see load_run; films: a file, a list of files, or a folder, whose images are all taken. They are read and
    cropped as in training; lesion_boxes, a dict of paths, is needed with CROP = "lesion" only. overlays: a folder
    for Grad-CAM overlays, <number of the row>_<name>.png. Paths count from the working directory.
    """
    open_console()
    _, models, recorded = load_run(run)
    if recorded.get("note"):
        log.warning("*** the model: %s ***", recorded["note"])
    constants, depths = recorded["constants"], recorded["collection"]["depths"]
    paths, rows, kinds, size = list_images(films), [], set(), constants["BATCH_SIZE"]
    boxes = {absolute(path): box for path, box in (lesion_boxes or {}).items()}

    def read(path):
        try:
            image, row = reading.read_image(path, constants["CROP"], boxes.get(path, ""), depths)
            kinds.add(row["container"])
            return image, ""
        except UserError as error:
            return np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8), str(error)

    explain = make_explainer(models, constants["THRESHOLD"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            images, reasons = zip(*pool.map(read, batch), strict=True)
            results = zip(batch, images, reasons, *explain(np.stack(images)), strict=True)
            for path, image, reason, logit, cam in results:
                if overlays and not reason:
                    file = Path(os.path.expanduser(overlays)) / f"{len(rows):05d}_{path.stem[:100]}.png"
                    write_overlay(overlay_map(image, cam), file)
                rows.append((str(path), np.nan if reason else special.expit(logit), reason))
            log.info("%d of %d films", len(rows), len(paths))
    if new := kinds - {*depths}:
        log.warning("the run saw no %s: each is scaled by its own bit depth", " and no ".join(sorted(new)))
    table = pd.DataFrame(rows, columns=["path", "probability", "reason"])
    calls = np.take(CLASSES, table["probability"] >= constants["THRESHOLD"])
    table.insert(2, "predicted", np.where(table["reason"] == "", calls, ""))
    return table


def validate(run, data_dir):
    """Score a second labelled collection with a run; returns the folder <run>-on-<collection>-<digits> beside it.

    data_dir: any layout that DATA_DIR takes; it counts from the working directory. Films that show a picture or
    have a patient_id that the run was trained on are left out (leaks.csv); dicom_00001 and so on are no such ids.
    """
    console = open_console()
    source, models, recorded = load_run(run)
    files = source / "split.csv", source / "fingerprints.npy"
    if not {*Settings._fields} <= {*recorded["constants"]} or not all(map(Path.is_file, files)):
        raise UserError(f"{source} is no run, or was made by an older version: run its script again.")
    data_dir, trained_on = absolute(data_dir), recorded["constants"]["DATA_DIR"]
    constants = recorded["constants"] | {"DATA_DIR": data_dir, "OUTPUT_DIR": source.parent}
    settings = Settings(*map(constants.get, Settings._fields))
    films = find_films(data_dir).assign(split="validation")
    films, images, fingerprints = read_films(
        films, data_dir, settings.CROP, settings.OUTPUT_DIR, recorded["collection"]["depths"])
    films = leave_out_known(films, fingerprints, data_dir.name, source)
    write_leaks(films, settings.OUTPUT_DIR)
    if films["split"].ne("validation").all():
        reasons = "; ".join(f"{count}: {reason}" for reason, count in films["left_out"].value_counts().items())
        raise UserError(f"{data_dir} has no film that {source.name} can be scored on ({reasons}).")
    check_sides(films, ["validation"])
    results = evaluate(models, images, films, settings)
    notes = ["synthetic phantoms" * is_synthetic(films), recorded["note"] and f"the model: {recorded['note']}"]
    note, title = "; ".join(filter(None, notes)), f"{recorded['title']}, trained on {Path(trained_on).name}"
    folder = source.with_name(f"{source.name}-on-{data_dir.name}-{hash_to_digits(films['film_sha256'].tolist())}")
    recorded |= describe_run(settings, films, console) | {"note": note, "title": title, "seconds": {}}
    recorded["constants"] |= {"TRAINED_ON": trained_on, "MODEL": source.name}
    with make_folder(folder) as new:
        write_results(new, settings, films, images, results, recorded)
    show_results(folder)
    compare(settings.OUTPUT_DIR)
    return folder
