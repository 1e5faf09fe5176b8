"""One run, in the order in which it happens: what resnet50.py and vgg16.py share.

The sections are start, model, batches, training, evaluation and run folder. The last section is what one does with
a finished run: predict new films, and validate it on another collection. Code that needs no network is in data/.
"""
import builtins
import contextlib
import difflib
import gc
import hashlib
import importlib.util
import json
import logging.handlers
import math
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import types
import warnings
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral, Real
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"  # read by Keras when it is imported
QUIET = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3"
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # faster; TensorFlow leaves it off on many processors
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # or GPUs since Ampere multiply float32 with 19 bits
HERE = Path(__file__).resolve().parent

for number, name in ((1, "stdout"), (2, "stderr")):  # pythonw and 2>&- close them
    try:
        os.fstat(number)
    except OSError:  # the next file to be opened would get this number, and TensorFlow would write into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    if getattr(sys, name) is None:
        setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    if hasattr(getattr(sys, name), "reconfigure"):
        getattr(sys, name).reconfigure(errors="replace")  # Windows-1252 lacks many characters

package = importlib.util.find_spec("data")
if package is None or package.origin is None or not (HERE / "data" / "__init__.py").samefile(package.origin):
    place = package and (package.origin or list(package.submodule_search_locations))
    sys.exit(f"Python finds another package named data, or none ({place}): start Python in {HERE}, or put this"
             " folder first in sys.path, and restart the kernel.")
if "keras" in sys.modules and sys.modules["keras"].config.backend() != "tensorflow":
    sys.exit(f"Keras runs on {sys.modules['keras'].config.backend()} already, but the scripts need TensorFlow:"
             " restart Python or the kernel, and import the script before Keras.")

saved_stderr = os.dup(2)
if QUIET:  # TensorFlow writes to it during its import, whatever TF_CPP_MIN_LOG_LEVEL is
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    from data import (CLASSES, UserError, cut_name, explain_write_errors, list_some, log, quote,  # noqa: F401
                      reading, replace, warn)
    from data.duplicates import group_duplicates  # noqa: F401
    from data.films import absolute, find_films, is_synthetic, list_images
    from data.labels import read_cells
    from data.reading import IMAGE_SIZE, read_films
    from data.results.baseline import add_baseline, list_properties, read_trainings, warn_of_giveaways  # noqa: F401
    from data.results.comparison import compare
    from data.results.figures import draw_training_curves, overlay_map, write_figure, write_overlay
    from data.results.files import HISTORY, write_leaks, write_results, write_side, write_table
    from data.results.summary import show_results, write_summary
    from data.runs import (REMEDY, explain_damage, is_bool, is_dict_of, is_folder_name, is_list_of, is_number,
                           is_text, read_array, read_json, read_predictions)
    from data.splits import (FOLDS, check_folds, check_sides, check_unseen, exclude_known,  # noqa: F401
                             has_validation, is_imagenet, list_seen, split_patients)

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
    sys.exit(f"{missing}: pip install -r {HERE / 'requirements.txt'}. If libGL is missing: apt-get install libgl1"
             " libglib2.0-0, or pip install opencv-python-headless in place of opencv-python.")
finally:
    os.dup2(saved_stderr, 2)

RANDOM_NOTE = "random weights: this shows only that the pipeline works"
CHECKPOINT = "checkpoint.npz"  # in the folder of an unfinished run
CHECKPOINT_SECONDS = 60  # the shortest time between two checkpoints
CODE = reading.CODE + [
    reading.parse_code(HERE / name)
    for name in ("common.py", "data/splits.py", "data/results/metrics.py", "data/results/baseline.py",
                 "data/results/files.py")]
IMPORTED = {file: file.read_bytes() for file in
            (HERE / "common.py", *HERE.glob("data/*.py"), *HERE.glob("data/results/*.py"))}


# ---- start -------------------------------------------------------------------------------------


def is_path(value):
    return isinstance(value, (str, os.PathLike)) and str(value).strip() != ""


def is_seed(value):
    return is_number(value, Integral, 0, 2**31 - 1)


CONSTANTS = {  # of a script: a check of the value, and what the value may be in words
    "DATA_DIR": (is_path, "the path of a folder in quotes"),
    "OUTPUT_DIR": (is_path, "the path of a folder in quotes"),
    "CROP": (lambda v: v in ("breast", "lesion", None), '"breast", "lesion" or None'),
    "FOLD": (lambda v: v == "all" or is_number(v, Integral, 0, FOLDS - 1), f'0 to {FOLDS - 1}, or "all"'),
    "SPLIT_SEED": (is_seed, "a whole number from 0 to 2147483647"),
    "WEIGHTS": (lambda v: v is None or is_path(v), '"imagenet", None or the path of a weights file'),
    "UNFROZEN_FRACTION": (lambda v: is_number(v, Real, 0, 1), "a share from 0 to 1, such as 0.5"),
    "HEAD_UNITS": (lambda v: is_number(v, Integral, 1), "a whole number from 1"),
    "DROPOUT": (lambda v: is_number(v, Real, 0, 0.99), "a share from 0 to 0.99, such as 0.3"),
    "LEARNING_RATE": (lambda v: is_number(v, Real, sys.float_info.min), "a number above 0, such as 1e-4"),
    "EPOCHS": (lambda v: is_number(v, Integral, 1), "a whole number from 1"),
    "BATCH_SIZE": (lambda v: is_number(v, Integral, 1), "a whole number from 1"),
    "SEED": (is_seed, "a whole number from 0 to 2147483647"),
    "MIXED_PRECISION": (lambda v: v == "auto" or isinstance(v, bool), '"auto", True or False'),
    "BRIGHTNESS": (lambda v: is_number(v, Real, 0, 1), "a share from 0 to 1, such as 0.1"),
    "CONTRAST": (lambda v: is_number(v, Real, 0, 1), "a share from 0 to 1, such as 0.2"),
    "SATURATION": (lambda v: is_number(v, Real, 0, 1), "a share from 0 to 1, such as 0.2"),
    "THRESHOLD": (lambda v: is_number(v, Real, 0.001, 0.999), "a probability from 0.001 to 0.999, such as 0.5"),
}
FLOATS = ("UNFROZEN_FRACTION", "DROPOUT", "LEARNING_RATE", "BRIGHTNESS", "CONTRAST", "SATURATION", "THRESHOLD")
Settings = namedtuple("Settings", CONSTANTS)
TO_PREDICT = {  # what predict() uses of the settings.json of a run, see data.runs.check
    "note": is_text,
    "constants": {"CROP": CONSTANTS["CROP"][0], "BATCH_SIZE": CONSTANTS["BATCH_SIZE"][0], "THRESHOLD": is_number},
    "collection": {"depths": lambda v: is_dict_of(v, lambda bits: is_number(bits, Integral, 1, 16))},
}
TO_REPORT = TO_PREDICT | {  # what a new result takes over from it: validate() and FOLD = "all"
    "title": is_text,
    "limits": lambda v: isinstance(v, list) and all(map(is_text, v)),
    "constants": {name: is_valid for name, (is_valid, _) in CONSTANTS.items()} | {"DATA_DIR": is_text},
    "model": {"backbone": is_text, "floats": lambda v: is_list_of(v, is_text), "layers": is_number,
              "unfrozen_layers": is_number, "trained_parameters": is_number},
    "weights": {"origin": is_text, "pretrained": is_bool, "sha256": is_text},
}


def run(main):
    """Call main(). A UserError, Ctrl-C or SIGTERM ends the script with one sentence and exit status 1.

    In a notebook or outside of the main thread, it raises UserError instead.
    """
    script = Path(main.__code__.co_filename).name
    in_main_thread = threading.current_thread() is threading.main_thread()  # only this thread handles signals
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main_thread else None
    try:
        if sys.argv[1:] and Path(sys.argv[0]).name == script:  # in a notebook, the arguments are Jupyter's
            raise UserError("the script takes no arguments: edit the constants at the top of the file.")
        return main()
    except (UserError, KeyboardInterrupt) as error:
        sentence = str(error) or "stopped: the same command continues from its last checkpoint."
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, on_sigterm)
    gc.collect()  # the threads of the batches have to end before the interpreter does
    if is_notebook() or not in_main_thread:  # where sys.exit() would not show the sentence
        raise UserError(sentence)
    return sys.exit(f"\n{script}: {sentence}")


def is_notebook():
    return hasattr(builtins, "get_ipython")


def shorten(path):
    """A path as text, relative to the scripts' folder or to ~ where it lies there."""
    for place, prefix in ((HERE, ""), (Path(os.path.expanduser("~")), "~/")):
        if path.is_relative_to(place):
            return prefix + path.relative_to(place).as_posix()
    return str(path)


def check_names(script, changes):
    """Raise UserError for an unknown constant: a name in capitals in globals() of a script, or in `changes`."""
    written = [name for name, value in script.items() if name.isupper() and not name.startswith("_")
               and not callable(value) and not isinstance(value, types.ModuleType)]  # such as VGG16 of Keras
    for name in (*changes, *written):
        if name not in CONSTANTS:
            nearest, *_ = difflib.get_close_matches(name.upper(), CONSTANTS, n=1, cutoff=0)
            raise UserError(f"{name} is no constant of the scripts, the nearest is {nearest}: correct the name."
                            " Write names of your own in lower case.")


def check_constants(constants):
    """The constants of a script as a namedtuple, with absolute Paths.

    Paths are relative to the scripts' folder. Raises UserError if a constant is missing or has a wrong value.
    """
    values = {}
    for name, (is_valid, description) in CONSTANTS.items():
        if name not in constants:
            raise UserError(f"{name} is missing at the top of the script: set it to {description}.")
        value = values[name] = constants[name]
        if not is_valid(value):
            raise UserError(f"{name} is {quote(value)}, but must be {description}.")
        if name in ("DATA_DIR", "OUTPUT_DIR") or (name == "WEIGHTS" and value not in (None, "imagenet")):
            values[name] = Path(os.path.abspath(HERE / os.path.expanduser(value)))
        elif name in FLOATS:
            values[name] = float(value)  # so that 1 and 1.0 are the same run
        elif isinstance(value, np.integer):
            values[name] = int(value)  # for JSON
        if name == "WEIGHTS" and isinstance(values[name], Path) and not values[name].is_file():
            raise UserError(f"WEIGHTS is {quote(str(value))}, but there is no file {values[name]}.")
    return Settings(**values)


def open_console():
    """Print the log; returns the handler that keeps its records. Raises UserError if code was edited meanwhile."""
    for file, content in IMPORTED.items():
        if not file.is_file() or file.read_bytes() != content:
            raise UserError(f"{shorten(file)} was edited after its import, so the edit has no effect: restart the"
                            " kernel or Python.")
    console = logging.handlers.BufferingHandler(capacity=10**6)
    log.handlers = [logging.StreamHandler(sys.stdout), console]
    log.setLevel(logging.INFO)
    tf.get_logger().setLevel("ERROR")  # it warns because each of five folds compiles a function
    return console


def start(script, changes):
    """(settings, console) of a run: see check_constants and open_console.

    script: globals() of the script; changes: constants that main() was called with.
    """
    console = open_console()
    check_names(script, changes)
    settings = check_constants(script | changes)
    choose_gpu()
    tf.config.experimental.enable_op_determinism()  # without it, a GPU adds numbers in any order
    reset_keras(settings)
    explain_missing_gpu()
    log.info("device: %s; training in %s", describe_device(), " because ".join(choose_precision(settings)))
    return settings, console


def choose_gpu():
    """Use the first GPU that CUDA_VISIBLE_DEVICES allows, and only as much of its memory as is needed."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        with contextlib.suppress(RuntimeError, ValueError):  # a notebook may have used the GPU already
            tf.config.set_visible_devices(gpus[0], "GPU")
            tf.config.experimental.set_memory_growth(gpus[0], True)


def explain_missing_gpu():
    """Warn, with the remedy, if the system has a GPU that TensorFlow does not see."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if describe_gpu() is None and shutil.which("nvidia-smi") and not hidden:
        log.warning("nvidia-smi is installed, but TensorFlow sees no GPU: pip install 'tensorflow[and-cuda]' (on"
                    " Windows, in WSL2), and start again")


def describe_gpu():
    """TensorFlow's details of the GPU that trains, as a dict; None without a GPU."""
    gpus = tf.config.get_visible_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0]) if gpus else None


def list_bfloat16_flags(cpuinfo="/proc/cpuinfo"):
    """The processor's instructions for bfloat16, as a list. Only Linux tells them."""
    flags = Path(cpuinfo).read_text("utf-8").split() if Path(cpuinfo).exists() else []
    return [name for name in ("amx_bf16", "avx512_bf16") if name in flags]


def choose_precision(settings):
    """(dtype policy of the training, reason): "auto" takes 16 bits where the device multiplies them faster.

    The features of the device decide, not a timing: the same device always gives the same results.
    """
    gpu, flags = describe_gpu(), list_bfloat16_flags()
    sixteen_bits = "mixed_bfloat16" if gpu is None else "mixed_float16"  # bfloat16 needs no loss scaling
    if settings.MIXED_PRECISION != "auto":
        mixed, reason = settings.MIXED_PRECISION, f"MIXED_PRECISION is {settings.MIXED_PRECISION}"
    elif gpu is not None:  # tensor cores came with compute capability 7
        mixed = gpu.get("compute_capability", (0,)) >= (7,)
        reason = f"the GPU has {'' if mixed else 'no '}tensor cores"
    else:
        mixed = bool(flags) and is_onednn_on()  # only oneDNN uses these instructions
        reason = f"the processor has {' and '.join(flags) or 'no known instructions for bfloat16'}"
        if flags and not is_onednn_on():
            reason += ", but oneDNN is off"
    return sixteen_bits if mixed else "float32", reason


def reset_keras(settings):
    """Reset Keras and all random generators to the state in which every training starts."""
    keras.backend.clear_session()  # frees the models of an earlier fold
    keras.config.set_image_data_format("channels_last")  # the user's keras.json may have another value
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(choose_precision(settings)[0])
    keras.utils.set_random_seed(settings.SEED)


def describe_device():
    gpu = describe_gpu()
    if gpu is not None:
        return gpu.get("device_name", "GPU")
    return f"CPU with {os.cpu_count()} cores, oneDNN {'on' if is_onednn_on() else 'off'}"


def list_folds(films, settings, console):
    """Yield each fold to run; FOLD once, if the data has a validation set.

    Before each fold, Keras is reset, and `console` drops the records of the fold before: settings.json keeps the
    console of its own fold.
    """
    shared, given = len(console.buffer), has_validation(films)
    folds = [settings.FOLD]
    if settings.FOLD == "all" and not given:
        folds = range(FOLDS)

    for fold in folds:
        del console.buffer[shared:]
        reset_keras(settings)
        log.info("validation set: that of the data; FOLD is not used" if given else
                 f"validation set: fold {fold} (of 0 to {FOLDS - 1}), whole patients, stratified by class")
        yield fold


# ---- model -------------------------------------------------------------------------------------


def load_backbone(build_backbone, films, fingerprints, settings):
    """(backbone, weights): build_backbone(WEIGHTS), and a dict with origin, pretrained and sha256 of its weights.

    If the ImageNet weights cannot be downloaded, a run on phantoms starts from random weights, and all files and
    figures say so. With real films, UserError is raised. A file of another network raises UserError, too, and so
    do weights that were trained on held-out patients. The origin of ImageNet weights is "imagenet", whatever file
    holds them.
    """
    source, origin = settings.WEIGHTS, settings.WEIGHTS
    if isinstance(source, Path):
        source, origin = str(source), shorten(source)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds: some firewalls drop packets without an answer
    try:
        if str(source).endswith(".keras"):
            check_archive(source)
        with warnings.catch_warnings():
            for words in ("Skipping", "A total of .* could not be loaded"):  # layers would stay random
                warnings.filterwarnings("error", f"(?s){words}", UserWarning)
            backbone = build_backbone(source)
    except Exception as error:  # Keras, h5py and urllib raise many kinds
        if source is None or isinstance(error, (NameError, AttributeError, TypeError)):
            raise  # a mistake in build_backbone()
        if source != "imagenet":
            raise UserError(f"WEIGHTS: {source} has no weights of this backbone without top layers, or is damaged:"
                            " choose another file.") from error
        reason = str(error).strip().splitlines()[0]
        sentence = (f"No ImageNet weights ({reason}): download this file in another way, for example with a"
                    " browser, and set WEIGHTS to its path.")
        if not is_synthetic(films):
            raise UserError(sentence) from error
        log.warning("*** random weights *** %s", sentence)
        backbone, origin = build_backbone(None), None
    finally:
        socket.setdefaulttimeout(timeout)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in backbone.get_weights())).hexdigest()
    if isinstance(settings.WEIGHTS, Path) and is_imagenet(settings.WEIGHTS, digest):
        origin = "imagenet"
    elif isinstance(settings.WEIGHTS, Path):
        check_unseen(films, fingerprints, settings)
    log.info("weights: %s", origin or RANDOM_NOTE)
    return backbone, {"origin": origin or RANDOM_NOTE, "pretrained": bool(origin), "sha256": digest}


def count_unfrozen(layers, settings):
    """The number of trainable layers: UNFROZEN_FRACTION of all, rounded half up, at least 1 unless it is 0."""
    count = math.floor(round(settings.UNFROZEN_FRACTION * len(layers), 6) + 0.5)
    return max(count, 1) if settings.UNFROZEN_FRACTION > 0 else 0


def build_model(backbone, weights, settings):
    """The classifier: RGB images, float (B, 224, 224, 3) in 0..255, to P(malignant), float (B, 1).

    The top UNFROZEN_FRACTION of the backbone's layers is trainable. In a pretrained backbone all
    BatchNormalization layers are frozen: otherwise their statistics would follow batches of 13 films. Calling the
    backbone with training=False does not prevent this in Keras 3.
    """
    for layer in backbone.layers[: len(backbone.layers) - count_unfrozen(backbone.layers, settings)]:
        layer.trainable = False
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization) and weights["pretrained"]:
            layer.trainable = False
    full = {"dtype": "float32"}  # with MIXED_PRECISION, too: probabilities are not rounded
    features = keras.layers.GlobalAveragePooling2D(name="pooled", **full)(backbone.output)
    features = keras.layers.Dense(settings.HEAD_UNITS, activation="relu", name="head", **full)(features)
    features = keras.layers.Dropout(settings.DROPOUT, name="dropout", **full)(features)
    logit = keras.layers.Dense(1, name="logit", **full)(features)
    probability = keras.layers.Activation("sigmoid", name="probability", **full)(logit)
    model = keras.Model(backbone.inputs[0], probability, name=backbone.name)
    log.info("{backbone}: the top {unfrozen_layers} of {layers} layers and the head are trainable, with"
             " {trained_parameters:,} parameters".format(**describe_model(model, settings)))
    return model


def describe_model(model, settings):
    """A dict of facts about the model. Layers and parameters are those of the backbone, without the head."""
    layers = model.layers[: model.layers.index(model.get_layer("pooled"))]
    unfrozen = layers[len(layers) - count_unfrozen(layers, settings) :]
    return {
        "backbone": model.name,
        "layers": len(layers),
        "unfrozen_layers": len(unfrozen),
        "parameters": sum(layer.count_params() for layer in layers),
        "unfrozen_parameters": sum(layer.count_params() for layer in unfrozen),
        "trained_parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        "floats": sorted({layer.compute_dtype for layer in model.layers}),
    }


class FoldedConvolution(keras.layers.Layer):
    """A convolution and the frozen batch norm after it in one pass, with the variables of both layers.

    The batch norm of conv(x, kernel) + bias is conv(x, s * kernel) + s * (bias - mean) + beta.
    Here s is gamma / sqrt(variance + epsilon). This passes over the feature maps once instead of four times.
    """

    def __init__(self, convolution, norm):
        super().__init__(dtype=convolution.dtype_policy, autocast=False)  # scales the kernel before rounding
        self.convolution, self.norm = convolution, norm

    def call(self, inputs):
        convolution, norm = self.convolution, self.norm
        scale = keras.ops.rsqrt(norm.moving_variance + norm.epsilon)
        if norm.scale:
            scale = scale * norm.gamma
        shift = -norm.moving_mean
        if convolution.use_bias:
            shift = shift + convolution.bias
        shift = shift * scale
        if norm.center:
            shift = shift + norm.beta

        convolve = keras.ops.conv
        if isinstance(convolution, keras.layers.DepthwiseConv2D):
            convolve = keras.ops.depthwise_conv
            scale = keras.ops.reshape(scale, convolution.kernel.shape[2:])  # (channels, multiplier)
        kernel = convolution.kernel * scale
        inputs, kernel, shift = (keras.ops.cast(part, self.compute_dtype) for part in (inputs, kernel, shift))
        features = convolve(inputs, kernel, strides=convolution.strides, padding=convolution.padding,
                            dilation_rate=convolution.dilation_rate, data_format=convolution.data_format)
        return tf.nn.bias_add(features, shift)

    def compute_output_shape(self, input_shape):
        return self.convolution.compute_output_shape(input_shape)


def can_fold(convolution, norm):
    """Whether `norm` is a frozen batch norm over channels, and `convolution` has no activation."""
    return (type(convolution) in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
            and convolution.activation is keras.activations.linear and convolution.data_format == "channels_last"
            and type(norm) is keras.layers.BatchNormalization and norm.axis in (-1, 3) and not norm.trainable
            and norm.compute_dtype == convolution.compute_dtype)


def fold_batch_norm(model):
    """A model with the same variables and the same output that computes faster: see FoldedConvolution.

    `model` itself does not change, and is the one to save.
    """
    made_by = {}  # id of a tensor: (layer, its inputs, the tensor)

    def call(layer, *inputs, **arguments):
        before, features, _ = made_by.get(id(inputs[0]) if inputs else None, (None, None, None))
        if can_fold(before, layer):
            output = FoldedConvolution(before, layer)(*features)
        else:
            output = layer(*inputs, **arguments)
        made_by[id(output)] = layer, inputs, output
        return output

    return keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)


# ---- batches -----------------------------------------------------------------------------------


def draw_epoch(labels, seed, epoch):
    """The films of an epoch in random order: int64 indices, as many of each class as the majority class has.

    labels: int (N,), 0 or 1. Each film of the smaller class is repeated equally often, a random part of them once
    more. The result depends on (seed, epoch) only, so that a resumed run draws the same epochs.
    """
    rng = np.random.default_rng((seed, epoch))
    majority = np.bincount(labels).max()
    chosen = []
    for label in (0, 1):
        members = np.flatnonzero(labels == label)
        rounds = math.ceil(majority / len(members))
        chosen.append(np.concatenate([rng.permutation(members) for _ in range(rounds)])[:majority])
    return rng.permutation(np.concatenate(chosen))


def augment(image, rng, settings):
    """A random variant of `image`, float32 (H, W, channels) in 0..255: flip, brightness, contrast, saturation."""
    flip, shift, contrast, saturation = rng.uniform(-1, 1, 4).tolist()
    if flip < 0:
        image = image[:, ::-1]
    mean = image.mean(axis=(0, 1))
    image = mean + 255 * settings.BRIGHTNESS * shift + (1 + settings.CONTRAST * contrast) * (image - mean)
    if image.shape[-1] > 1:  # saturation changes nothing in a grey film
        brightest = image.max(axis=-1, keepdims=True)
        image = brightest + (1 + settings.SATURATION * saturation) * (image - brightest)
    return image.clip(0, 255)


class HeldOutBatches(keras.utils.PyDataset):
    """Batches of every film of `rows`, once, in order and not augmented.

    A batch is float32 (B, IMAGE_SIZE, IMAGE_SIZE, 3) in 0..255, and int64 labels (B,).

    images: uint8 (N, IMAGE_SIZE, IMAGE_SIZE). labels: int64 (N,), 1 is malignant. rows: int (M,), of the set.
    """

    def __init__(self, images, labels, rows, settings):
        super().__init__(workers=2, max_queue_size=4)  # in threads
        self.images, self.labels, self.rows, self.settings = images, labels, rows, settings

    def __len__(self):
        return math.ceil(len(self.rows) / self.settings.BATCH_SIZE)

    def __getitem__(self, number):
        size = self.settings.BATCH_SIZE
        rows = self.rows[number * size : (number + 1) * size]
        return np.repeat(self.images[rows][..., None], 3, axis=-1).astype(np.float32), self.labels[rows]


class TrainingBatches(HeldOutBatches):
    """The class-balanced batches of one epoch; (seed, epoch, place in the epoch) seeds the augmentation of a film.

    A batch depends on `epoch` and its number only.
    """

    epoch = 0  # counted from 0; train() sets it

    def __len__(self):
        return math.ceil(2 * np.bincount(self.labels[self.rows]).max() / self.settings.BATCH_SIZE)

    def __getitem__(self, number):
        seed, size = self.settings.SEED, self.settings.BATCH_SIZE
        order = draw_epoch(self.labels[self.rows], seed, self.epoch)
        rows = self.rows[order[number * size : (number + 1) * size]]

        films = []
        for place, row in enumerate(rows, number * size + 1):  # (seed, epoch, 0) seeds as (seed, epoch) does
            grey = self.images[row, ..., None].astype(np.float32)
            films.append(augment(grey, np.random.default_rng((seed, self.epoch, place)), self.settings))
        return np.repeat(films, 3, axis=-1), self.labels[rows]


def make_datasets(images, films, settings):
    """(training, validation): TrainingBatches and HeldOutBatches of the sets of a split."""
    labels = films["label"].eq("malignant").to_numpy(np.int64)
    training, held_out = (np.flatnonzero(films["split"] == name) for name in ("train", "validation"))
    return TrainingBatches(images, labels, training, settings), HeldOutBatches(images, labels, held_out, settings)


# ---- training ----------------------------------------------------------------------------------


def name_run(settings, films, model, weights):
    """The folder of a run: OUTPUT_DIR/<backbone>-unfrozen<percent>-<6 hex digits of what decides its result>.

    The digits depend on the images and their split, the network, its weights and its precision. They depend on the
    constants of the training, the code, the releases of the packages, and whether a GPU trains. DATA_DIR, FOLD and
    CROP count through the images and their split. SATURATION does not count, as all films are grey.
    """
    names = ("LEARNING_RATE", "EPOCHS", "BATCH_SIZE", "SEED", "BRIGHTNESS", "CONTRAST", "THRESHOLD")
    decisive = [films.to_csv(index=False), model.to_json(), [weight.path for weight in model.trainable_weights],
                weights["sha256"], CODE, [getattr(settings, name) for name in names],
                [module.__version__ for module in (tf, keras, np, scipy, sklearn)], describe_gpu() is not None]
    percent = 100 * settings.UNFROZEN_FRACTION
    return settings.OUTPUT_DIR / f"{model.name}-unfrozen{percent:g}-{hash_to_digits(decisive)}"


def hash_to_digits(decisive):
    """Six hexadecimal digits of the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:6]


def name_unfinished(folder):
    """The hidden folder of an unfinished run, beside its final folder."""
    return folder.with_name(f".{folder.name}")


def has_results(folder):
    """Whether a folder holds a complete result; settings.json is there only when all files are."""
    return (folder / "settings.json").is_file()


def is_complete(folder):
    """Whether the folder of a run holds its results already; logs how to repeat the run.

    Removes the hidden folder of a complete run, if there is one.
    """
    complete = has_results(folder)
    if complete:
        shutil.rmtree(name_unfinished(folder), ignore_errors=True)  # the run was killed after its last file
    log.info("this run is complete, delete its folder to repeat it: %s" if complete else "results will be in: %s",
             shorten(folder))
    return complete


def list_variables(model):
    """All variables that a training changes: weights, the optimizer's variables and the state of the dropout."""
    return [*model.variables, *model.optimizer.variables]


@contextlib.contextmanager
def write_unless_complete(folder):
    """Turn an OSError into a UserError, unless another process has completed the same run.

    Processes with the same run need no lock. They share a checkpoint, and the first to rename its folder has
    written the result. It removes the checkpoint, which others may be writing.
    """
    try:
        with explain_write_errors(folder):
            yield
    except UserError:
        if not has_results(folder):
            raise
        log.info("another process has completed this run")


def save_checkpoint(model, history, folder):
    """Write the history of a run (a row for each finished epoch) and all variables."""
    checkpoint = name_unfinished(folder) / CHECKPOINT
    with write_unless_complete(folder):
        checkpoint.parent.mkdir(exist_ok=True)
        with replace(checkpoint) as temporary:
            np.savez(temporary, history, *list_variables(model))  # copies one array at a time


def load_checkpoint(model, folder):
    """Restore all variables of a run; returns the rows of its history, [] without a checkpoint.

    Raises UserError if the checkpoint is damaged.
    """
    checkpoint = name_unfinished(folder) / CHECKPOINT
    if not checkpoint.exists():
        return []
    with write_unless_complete(folder), explain_damage(checkpoint), np.load(checkpoint) as arrays:
        names = iter(arrays.files)
        history = arrays[next(names)]
        for variable, name in zip(list_variables(model), names, strict=True):
            variable.assign(arrays[name])
        return history.tolist()
    return []  # another process has completed the run, and removes the checkpoint


def compile_model(model, steps, settings):
    """Compile the model for epochs of `steps`. Adam keeps an average of the weights over about one epoch."""
    adam = keras.optimizers.Adam(settings.LEARNING_RATE, use_ema=True, ema_momentum=1 - 1 / steps)
    # a metric given by name traces the training step twice; in Keras, XLA and determinism exclude each other
    accuracy = keras.metrics.BinaryAccuracy(name="accuracy", threshold=settings.THRESHOLD)
    model.compile(adam, keras.losses.BinaryCrossentropy(), metrics=[accuracy], jit_compile=False)
    model.optimizer.build(model.trainable_variables)


def train(model, training, validation, settings, folder):
    """Train for all epochs: (trained, facts, history).

    trained: see to_float32; facts: see describe_model; history: a table with columns HISTORY and seconds.

    The final weights are an average over about the last epoch (Polyak and Juditsky 1992), as weights of a single
    step vary too much. The validation of each epoch uses averaged weights, too. It chooses nothing.

    A checkpoint is written at the end of an epoch, if the last one is older than CHECKPOINT_SECONDS, and after the
    last epoch. An interrupted training continues from it, with the same numbers as without interruption. Raises
    UserError if the training diverges, or if a batch does not fit into memory.
    """
    network = fold_batch_norm(model)
    compile_model(network, len(training), settings)
    rows = load_checkpoint(network, folder)
    if rows:
        log.info("continuing after epoch %d of %d", len(rows), settings.EPOCHS)
    before, started = rows[-1][-1] if rows else 0, time.perf_counter()
    saved, watched = started, is_notebook() or sys.stdout.isatty()

    def begin(epoch, logs):
        training.epoch = epoch  # before the threads make its batches

    def keep(epoch, logs):
        nonlocal saved
        now = time.perf_counter()
        rows.append([*(logs[name] for name in HISTORY[1:]), before + now - started])
        if len(rows) == settings.EPOCHS or now - saved >= CHECKPOINT_SECONDS:
            save_checkpoint(network, rows, folder)
            saved = now
        if not watched:
            log.info("epoch %d of %d: loss %.4f, accuracy %.3f; validation: loss %.4f, accuracy %.3f", len(rows),
                     settings.EPOCHS, *rows[-1][:-1])

    known = {*gradient_registry.list()}
    swap = keras.callbacks.SwapEMAWeights()
    swap._tf_swap_variables = swap._backend_swap_variables  # the former swaps by sums, which are rounded
    callbacks = [keras.callbacks.TerminateOnNaN(), swap,
                 keras.callbacks.LambdaCallback(on_epoch_begin=begin, on_epoch_end=keep)]
    try:
        if len(rows) < settings.EPOCHS:
            network.fit(training, epochs=settings.EPOCHS, initial_epoch=len(rows), validation_data=validation,
                        shuffle=False, callbacks=callbacks, verbose=int(watched))
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(f"out of memory ({describe_device()}): lower BATCH_SIZE.") from error
    finally:
        for name in {*gradient_registry.list()} - known:  # TensorFlow would keep 350 MB for each fold
            del gradient_registry._registry[name]
    network.optimizer.finalize_variable_values(network.trainable_variables)  # if fit() had nothing left to do
    finite = all(np.isfinite(part).all() for part in (rows, *model.weights))  # the loss may not show NaN weights
    if not finite or len(rows) < settings.EPOCHS:
        shutil.rmtree(name_unfinished(folder), ignore_errors=True)
        raise UserError("the training diverged (loss or weights are not finite): lower LEARNING_RATE.")
    history = pd.DataFrame(rows, columns=[*HISTORY[1:], "seconds"])
    history.insert(0, HISTORY[0], range(1, settings.EPOCHS + 1))
    return to_float32(model), describe_model(model, settings), history


def to_float32(model):
    """The model without its optimizer, in float32, whatever precision it was trained in."""
    trained = keras.Model(model.inputs[0], model.output, name=model.name)
    if "float16" in (description := trained.to_json()):
        trained = keras.models.model_from_json(re.sub("mixed_b?float16", "float32", description))
        for variable, value in zip(trained.weights, model.weights, strict=True):
            variable.assign(value)
    return trained


# ---- evaluation --------------------------------------------------------------------------------


def make_gradcam(model, threshold=0.5):
    """A compiled function from images, float32 (B, H, W, 3) in 0..255, to logits and Grad-CAM maps.

    Logits of P(malignant) are float32 (B,). Grad-CAM of the predicted class (Selvaraju et al. 2017) on the last
    feature maps is float32 (B, h, w) in 0..1. The logit is differentiated, as a saturated sigmoid has no gradient.
    If the prediction is benign, the logit is negated. A map without positive evidence is 0 everywhere.
    """
    pooling = (keras.layers.MaxPooling2D, keras.layers.GlobalAveragePooling2D)  # the maps before them are finer
    maps = next(layer.output for layer in reversed(model.layers)
                if len(layer.output.shape) == 4 and not isinstance(layer, pooling))
    bottom = fold_batch_norm(keras.Model(model.inputs[0], maps))
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

    With several models, logits are averaged, and so are the maps.
    """
    functions = [make_gradcam(model, threshold) for model in models]

    def explain(images):
        pixels = np.repeat(images[..., None], 3, axis=-1).astype(np.float32)
        logits, maps = zip(*(function(pixels) for function in functions), strict=True)
        return np.mean(logits, axis=0, dtype=float), np.mean(maps, axis=0)

    return explain


def evaluate(models, images, films, settings, side="validation"):
    """(predictions, maps) of the films of one set: side is "validation" or "test".

    predictions: a table with path, patient_id, label, probability (of malignancy), predicted and logit, with the
    order and the index of `films`. maps: Grad-CAM, (N, h, w). For several models see make_explainer.
    """
    gc.collect()  # frees the optimizer after a training: three times the memory of the weights
    explain = make_explainer(models, settings.THRESHOLD)
    rows, size = np.flatnonzero(films["split"] == side), settings.BATCH_SIZE
    parts = [explain(images[rows[start : start + size]]) for start in range(0, len(rows), size)]
    logits, maps = map(np.concatenate, zip(*parts, strict=True))
    probabilities = special.expit(logits)
    predicted = np.where(probabilities >= settings.THRESHOLD, "malignant", "benign")
    predictions = films.iloc[rows][["path", "patient_id", "label"]].assign(
        probability=probabilities, predicted=predicted, logit=logits)
    return predictions, maps


# ---- run folder --------------------------------------------------------------------------------


@contextlib.contextmanager
def make_folder(folder, again=False):
    """A new folder for the files of a result. At the end it is renamed to `folder`, and its checkpoint is removed.

    If another process has written the same result meanwhile, that one stays. With `again`, it is replaced.
    """
    write = explain_write_errors if again else write_unless_complete
    new = name_unfinished(folder) / f"new-{secrets.token_hex(8)}"
    try:
        with write(folder):
            new.mkdir(parents=True)
            yield new
            if again or not has_results(folder):
                shutil.rmtree(folder, ignore_errors=True)  # an earlier result, or remains of one
            new.rename(folder)  # fails if there are results
        shutil.rmtree(name_unfinished(folder), ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        with contextlib.suppress(OSError):  # it is not empty if there is a checkpoint
            name_unfinished(folder).rmdir()
    log.info("finished: %s", shorten(folder))


def write_note(films, of_model):
    """What a reader has to know first about a result, as text, "" for nothing; of_model: the same of the model."""
    notes = ["synthetic phantoms"] if is_synthetic(films) else []
    if of_model:
        notes.append(of_model)
    return "; ".join(notes)


def write_run(folder, settings, films, images, fingerprints, trained, facts, weights, history, results, console):
    """Write all files of a run, and remove its checkpoint; see load_backbone, train and evaluate."""
    note = write_note(films, "" if weights["pretrained"] else weights["origin"])
    title = "{backbone}, top {unfrozen_layers} of {layers} layers trained".format(**facts)
    recorded = describe_run(settings, films, console) | {"note": note, "title": title, "model": facts}
    recorded |= {"weights": weights, "seconds": {"training": round(history["seconds"].iloc[-1], 1)}}
    fold = films["fold"][films["split"].eq("validation")].iloc[0]
    if fold:  # with FOLD = "all", too, each folder says which fold it is
        recorded["constants"]["FOLD"] = int(fold)
    with make_folder(folder) as new:
        write_results(new, settings, films, images, *results, recorded)
        write_figure(draw_training_curves(history), new / "training_curves.png", title, note)
        write_table(history.drop(columns="seconds"), new / "history.csv", note)
        np.save(new / "fingerprints.npy", fingerprints)
        trained.save(new / "model.keras")
    left = FOLDS - 1 - int(fold) if fold else 0
    if settings.FOLD == "all" and left:
        minutes = left * history["seconds"].iloc[-1] / 60
        log.info("%d of %d folds remain: about %.1f minutes of training, less if some are complete", left, FOLDS,
                 minutes)


def describe_run(settings, films, console):
    """The part of settings.json on constants, films, machine and console, as a dict."""
    sides = films.groupby(["split", "label"])["group"].agg(["size", "nunique"])
    dealt = films["path"][films["fold"].ne("")]
    collection = {"images": len(films), "patients": films["group"].nunique(),
                  "duplicates": int(films["duplicate"].sum()),
                  "depths": reading.find_common_depths(films)}
    collection |= {name: films[name].value_counts().to_dict() for name in ("patient_from", "format", "excluded")}
    modules = (tf, keras, np, scipy, pd, matplotlib, sklearn, cv2)
    started = console.buffer[0].created
    return {
        "constants": {name: shorten(value) if isinstance(value, Path) else value
                      for name, value in settings._asdict().items()},
        "collection": collection,
        "split": {"given": bool(dealt.empty), "dealt": hash_to_digits(dealt.tolist())} | {
            f"{side}, {label}": f"{size} mammograms of {patients} patients"
            for (side, label), (size, patients) in sides.iterrows()},
        "versions": {"python": platform.python_version(), "code": hash_to_digits(CODE)} | {
            module.__name__: module.__version__ for module in modules},
        "device": describe_device(),
        "limits": [record.getMessage() for record in console.buffer if hasattr(record, "limit")],
        "console": [f"{record.created - started:7.1f} s  {record.getMessage()}" for record in console.buffer],
    }


def pool_folds(folders, films, images, fingerprints, settings):
    """The folder with the result of all folds: each film is scored by the model that did not see its patient.

    films, images, fingerprints: those of any of the folds. A single folder is returned as it is. In split.csv,
    films that are in no fold have the fold "test" or "excluded".
    """
    if len(folders) == 1:
        return folders[0]
    digits = hash_to_digits([folder.name for folder in folders])
    folder = folders[0].with_name(f"{folders[0].name.rpartition('-')[0]}-all-{digits}")
    if is_complete(folder):
        return folder
    parts = [read_predictions(part / "predictions.csv") for part in folders]
    fold = films["fold"].mask(films["split"].eq("test"), "test")
    films = films.assign(fold=fold.mask(films["excluded"].ne(""), "excluded"))
    predictions = pd.concat(parts).drop(columns="note", errors="ignore")
    if sorted(predictions["path"]) != sorted(films["path"][films["fold"].str.isdigit()]):
        names = ", ".join(part.name for part in folders)
        raise UserError(f"the predictions.csv of {names} do not have each mammogram once: {REMEDY}.")
    maps = np.concatenate([read_array(place / "maps.npy", np.float32, (len(part), None, None))
                           for place, part in zip(folders, parts, strict=True)])
    records = [read_json(part / "settings.json", TO_REPORT | {"seconds": {"training": is_number}})
               for part in folders]
    predictions.index = pd.Index(films["path"]).get_indexer(predictions["path"])
    predictions["fold"] = films["fold"]
    recorded = records[-1] | {"folds": [part.name for part in folders]}
    recorded["split"] = {"given": False, "dealt": recorded["split"]["dealt"]}
    recorded["seconds"] = {"training": sum(record["seconds"]["training"] for record in records)}
    recorded["constants"]["FOLD"] = "all"
    recorded["title"] += ", all folds"
    with make_folder(folder) as new:
        write_results(new, settings, films, images, predictions, maps, recorded)
        np.save(new / "fingerprints.npy", fingerprints)
    return folder


def score_test(folder, films, images, settings):
    """Score the test set, if the data has one, and write the result to test/ in the folder of the run.

    This happens once, at the end. With FOLD = "all" the logits of the five models are averaged.
    """
    if not films["split"].eq("test").any():
        return
    if not (folder / "test").is_dir():
        _, models, recorded = load_run(folder)
        predictions, maps = evaluate(models, images, films, settings, "test")
        trainings, title = read_trainings(folder / "properties.csv"), recorded["title"]
        predictions, ranked = add_baseline(predictions, list_properties(films, images, settings.CROP), trainings)
        with make_folder(folder / "test") as new:
            write_side(new, settings, films, images, predictions, maps, ranked, title, recorded["note"])
    with explain_write_errors(folder):
        write_summary(folder)


def list_unfinished(output_dir):
    """Log the folders of unfinished runs, and how much they hold."""
    sizes = {}
    for folder in output_dir.glob(".*-unfrozen*"):
        with contextlib.suppress(FileNotFoundError):  # another process has just completed it
            sizes[folder.name] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if sizes:
        log.info("%d unfinished runs in %s hold %.0f MB (%s). Other processes may still train some of them. The"
                 " same constants continue them. Delete the folders that you do not need", len(sizes),
                 shorten(output_dir), sum(sizes.values()) / 1e6, list_some(sorted(sizes)))


# ---- after a run -------------------------------------------------------------------------------


def check_archive(file):
    """Raise UserError if a model.keras is damaged. Keras does not check the checksums of the archive."""
    with explain_damage(file), zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged:
        raise UserError(f"{file} is damaged: {REMEDY}.")


def load_model(file):
    """Load the model of a run. Raises UserError if the file is damaged, or holds another model."""
    check_archive(file)
    with explain_damage(file):
        model = keras.models.load_model(file, compile=False, safe_mode=True)
        shapes = model.input_shape, model.get_layer("logit").output.shape, model.output_shape
        fits = shapes == ((None, IMAGE_SIZE, IMAGE_SIZE, 3), (None, 1), (None, 1))
        finite = all(np.isfinite(weight).all() for weight in model.get_weights())
        make_gradcam(model)
    if not (fits and finite):
        raise UserError(f"{file} is not the model of a run: {REMEDY}.")
    return model


def load_run(run, used=TO_PREDICT):
    """(folder, models, recorded) of a run.

    run: the folder of a run, its model.keras, or the folder of all folds, which has five models. It is relative to
    the working directory. recorded: its settings.json, with the values of `used`. Raises UserError.
    """
    run = absolute(run)
    folder = run if os.path.isdir(run) else run.parent
    if not os.path.isfile(folder / "settings.json"):
        raise UserError(f"{run} is no run: there is no {folder / 'settings.json'}.")
    recorded = read_json(folder / "settings.json", used)
    if "TRAINED_ON" in recorded["constants"]:
        raise UserError(f"{run} is a result of validate(), which has no model: choose the run that it scored.")
    names = recorded.get("folds", [folder.name])
    if not is_list_of(names, is_folder_name) or len(names) > FOLDS:
        raise UserError(f"{folder / 'settings.json'} has {quote(names)} for folds, which no run writes: {REMEDY}.")
    return folder, [load_model(folder.parent / name / "model.keras") for name in names], recorded


def match_boxes(lesion_boxes, paths):
    """{path: lesion_box} of the films; lesion_boxes: see predict. Warns of boxes without a film."""
    folder = Path()
    if isinstance(lesion_boxes, (str, os.PathLike)):
        file = absolute(lesion_boxes)
        if not os.path.isfile(file):
            raise UserError(f"lesion_boxes is {quote(str(lesion_boxes))}, but there is no such file.")
        table, folder = read_cells(file, ["path", "lesion_box"]), file.parent
        lesion_boxes = {row.path: row.lesion_box for row in table.itertuples() if row.lesion_box}

    named, boxes, unused = {}, {}, []
    for path in {*paths}:
        named.setdefault(path.name, []).append(path)
    for key, box in (lesion_boxes or {}).items():
        path, same_name = absolute(folder / key), named.get(Path(key).name, [])
        if path in same_name:
            boxes[path] = box
        elif len(same_name) == 1:
            boxes.setdefault(same_name[0], box)
        else:
            unused.append(str(key))
    warn("lesion boxes belong to no mammogram, or to several of that name", unused)
    return boxes


def predict(run, films, overlays=None, lesion_boxes=None):
    """A table of new films: path, probability (of malignancy), predicted, trained_on, reason.

    trained_on: True, False or "unknown", see list_seen. reason: why a film has no probability, else "".

    run: see load_run; films: a file, a list of files, or a folder with all its images. They are read and cropped
    as in training. lesion_boxes: a dict by path or file name, or the path of a labels.csv; CROP = "lesion" needs
    it. overlays: a folder for Grad-CAM overlays with probability and boxes, <number of the row>_<name>.png. Paths
    are relative to the working directory.
    """
    open_console()
    folder, models, recorded = load_run(run)
    if recorded["note"]:
        log.warning("*** the model: %s ***", recorded["note"])
    constants, depths = recorded["constants"], recorded["collection"]["depths"]
    paths, size = list_images(films), constants["BATCH_SIZE"]
    rows, prints, kinds = [], [], set()  # kinds: containers
    overlays = overlays and absolute(overlays)
    boxes = match_boxes(lesion_boxes, paths)

    def read(path):
        box = boxes.get(path, "")
        try:
            image, fingerprints, row = reading.read_film(path, constants["CROP"], box, depths)
            if row["is_mask"]:
                raise UserError("a mask in black and white, not a mammogram")
            kinds.add(row["container"])
            return image, fingerprints, "", reading.place_boxes(pd.Series(row | {"lesion_box": box}))
        except UserError as error:
            return np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8), None, str(error), None

    explain = make_explainer(models, constants["THRESHOLD"])
    with ThreadPoolExecutor(reading.THREADS) as pool:
        for start in range(0, len(paths), size):
            batch = paths[start : start + size]
            images, fingerprints, reasons, placed = zip(*pool.map(read, batch), strict=True)
            prints += fingerprints
            results = zip(batch, images, reasons, placed, *explain(np.stack(images)), strict=True)
            for path, image, reason, lesions, logit, cam in results:
                if not reason and np.isnan(logit):
                    reason = "the model gives no number for this mammogram, and may be damaged"
                if overlays and not reason:
                    file = overlays / f"{len(rows):05d}_{cut_name(path.stem)}.png"
                    try:
                        write_overlay(overlay_map(image, cam), file, special.expit(logit), lesions)
                    except (OSError, ValueError) as error:  # the table matters more
                        log.warning("overlays are missing from row %d on: %s cannot be written (%s). The table is"
                                    " complete.", len(rows), quote(str(file)),
                                    getattr(error, "strerror", "no file can have this name"))
                        overlays = None
                rows.append((str(path), np.nan if reason else special.expit(logit), reason))
            log.info("%d of %d mammograms", len(rows), len(paths))
    if new := kinds - {*depths}:
        log.warning("the run was trained without %s: each such mammogram is scaled by its own bit depth",
                    " and ".join(sorted(new)))
    table = pd.DataFrame(rows, columns=["path", "probability", "reason"])
    calls = np.where(table["probability"] >= constants["THRESHOLD"], "malignant", "benign")
    table.insert(2, "predicted", np.where(table["reason"] == "", calls, ""))
    table.insert(3, "trained_on", list_seen(paths, prints, folder))
    return table


def validate(run, data_dir):
    """Score a second labelled collection; returns the folder <run>-on-<collection>-<digits> beside the run.

    data_dir: a folder in any layout of DATA_DIR, relative to the working directory. Films are excluded (leaks.csv)
    if the run was trained on the same picture or on the same patient_id, except ids such as dicom_00001.
    """
    console = open_console()
    source, models, recorded = load_run(run, TO_REPORT)
    for file in (source / "split.csv", source / "fingerprints.npy", source / "properties.csv"):
        if not os.path.isfile(file):
            raise UserError(f"{file} is missing, which lists the training set: {REMEDY}.")
    data_dir, trained_on = absolute(data_dir), recorded["constants"]["DATA_DIR"]
    constants = recorded["constants"] | {"DATA_DIR": data_dir, "OUTPUT_DIR": source.parent}
    settings = Settings(**{name: constants[name] for name in CONSTANTS})
    trainings = read_trainings(source / "properties.csv")
    films = find_films(data_dir).assign(split="validation")
    films, images, fingerprints = read_films(
        films, data_dir, settings.CROP, settings.OUTPUT_DIR, recorded["collection"]["depths"])
    films = exclude_known(films, fingerprints, data_dir.name, source)
    write_leaks(films, settings.OUTPUT_DIR)
    if films["split"].ne("validation").all():
        reasons = "; ".join(f"{count}: {reason}" for reason, count in films["excluded"].value_counts().items())
        raise UserError(f"{data_dir} has no mammogram that {source.name} can be scored on ({reasons}).")
    check_sides(films, ["validation"])
    predictions, maps = evaluate(models, images, films, settings)
    if predictions["probability"].isna().any():
        raise UserError(f"the model of {source} gives no number for some mammograms, and may be damaged:"
                        f" {REMEDY}.")
    note = write_note(films, f"the model: {recorded['note']}" if recorded["note"] else "")
    title = f"{recorded['title']}, trained on {Path(trained_on).name}"
    name = cut_name(f"{source.name}-on-{data_dir.name}", 200)
    folder = source.with_name(f"{name}-{hash_to_digits(films['film_sha256'].tolist())}")
    limits = {"limits": recorded["limits"]}  # those of the training
    recorded |= describe_run(settings, films, console) | limits | {"note": note, "title": title, "seconds": {}}
    recorded["model"] = {name: recorded["model"][name] for name in TO_REPORT["model"]}
    recorded["constants"] |= {"TRAINED_ON": trained_on, "MODEL": source.name}
    with make_folder(folder, again=True) as new:
        write_results(new, settings, films, images, predictions, maps, recorded, trainings)
    show_results(folder)
    compare(settings.OUTPUT_DIR)
    return folder
