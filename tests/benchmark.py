"""Speed and memory on this machine, as ratios. Run it by hand, on an idle machine; nothing is asserted.

    python tests/benchmark.py [training|process|reading|growth]

prints minimum, median and maximum over REPEATS rounds, in two hours on two cores. What is compared takes turns
within a round, so that a machine that slows down slows all of it. Films are invented, up to 16 GB of files.

training: the real pipeline (from memory, with balancing, augmentation and metrics) against the bare compiled
step, which is forward, backward and Adam on one batch in memory; FLOP/s against those of a matrix product (the
3 x 3 convolutions of VGG16 need fewer multiplications than are counted); evaluation with Grad-CAM against the bare
forward pass; step and forward pass with frozen batch norm folded into the convolutions against the same without.
Half of the layers train, in batches of 13; weights are random, batch norm is frozen as in pretrained ones. All is
in 32 bits and, where "auto" takes 16, in these, too.

process: resnet50.py from start to exit against tests/tutorial.py, the script that tutorials for this job have,
on the same films and weights, both in 32 bits; again with another learning rate, when all films have been read.

reading: films of 12 megapixels and 16 bits for the first time, and from the cache: 78 times as fast on two cores
of an Intel Xeon (Sapphire Rapids).

growth: peak memory until two steps of training are done, in 32 bits: 2.1 GB with 100,000 small images there. The
search for duplicates compares all pairs: its time grows with the square of the films, that of all else is linear.

No GPU has been measured.
"""
import contextlib
import importlib
import itertools
import json
import os
import resource
import runpy
import sys
import tempfile
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

# ------------------------------------------------------------------------------------------------
REPEATS = 5  # rounds, of what measures time; memory hardly varies
STEPS = 8  # calls in a row of one kind, before the next kind has its turn
EPOCHS = 3  # of the tutorial script and of resnet50.py
IMAGES = 240  # for training and for the whole process
FILMS = 500  # for the first and the second reading
SMALL_IMAGES = 10_000, 100_000  # for the growth of memory
FILM = {"pictures": 26, "size": (3000, 4000), "dtype": np.uint16}  # 26 different ones: each takes a second
# ------------------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def make_films(folder, count, pictures, size, dtype):
    """Write PNG films of breasts of noise: so many different pictures, an even number, and links to them."""
    rng, (width, height), white = np.random.default_rng(0), size, np.iinfo(dtype).max
    rows, columns = np.mgrid[-1 : 1 : height * 1j, 0 : 1 : width * 1j]
    breast = np.hypot(rows / 0.85, columns / 0.75) < 1
    files = [folder / ("benign", "malignant")[number % 2] / f"{number // 1000}" / f"{number}.png"
             for number in range(count)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        if number >= pictures:
            os.link(files[number % pictures], file)
            continue
        texture = cv2.resize(rng.random((40, 30), np.float32), size, interpolation=cv2.INTER_CUBIC)
        grain = rng.standard_normal((height, width), np.float32)
        film = (breast * (0.15 + 0.5 * texture + 0.006 * grain) * white).clip(0, white)
        cv2.imwrite(str(file), film.astype(dtype), [cv2.IMWRITE_PNG_COMPRESSION, 1])


# ---- what runs in a process of its own ---------------------------------------------------------


def call(function, arguments):
    """(result, peak) of a function: nothing of what it prints, and the peak memory of this process in MB."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        result = function(*arguments)
    return result, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(function, *arguments):
    """(seconds, peak, result) of a function of this file in a new process, from its start to its exit."""
    started = time.perf_counter()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        result, peak = pool.submit(call, function, arguments).result()
    return time.perf_counter() - started, peak, result


def make_step(network, optimizer, images, labels):
    """The bare training step of a network: forward, backward and optimizer."""
    import keras
    import tensorflow as tf

    @tf.function
    def step():
        trained = [variable.value for variable in network.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:  # no gradient of what is frozen is counted
            tape.watch(trained)
            loss = tf.reduce_mean(keras.losses.binary_crossentropy(labels, network(images, training=True)))
        optimizer.apply(tape.gradient(loss, trained), network.trainable_variables)

    return step


def make_calls(name, outputs, mixed):
    """(settings, calls, graph): what is timed of one backbone in one precision, and the graph of the bare step."""
    import common
    import tensorflow as tf

    script = importlib.import_module(name)
    changes = {"OUTPUT_DIR": outputs, "WEIGHTS": None, "EPOCHS": 1000, "MIXED_PRECISION": mixed}
    settings, _ = common.start(vars(script), changes)
    films = pd.DataFrame({"label": np.resize(common.CLASSES, IMAGES),
                          "split": np.resize(["train", "train", "train", "train", "validation"], IMAGES)})
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 224, 224), np.uint8)
    training, validation = common.make_datasets(pixels, films, settings)
    model = common.build_model(script.build_backbone(None), {"pretrained": True}, settings)
    network = common.fold_batch_norm(model)
    for kind in (model, network):
        common.compile_model(kind, len(training), settings)
    images, labels = map(tf.constant, training[0])
    signature = tuple(tf.TensorSpec((None, *part.shape[1:]), part.dtype) for part in (images, labels))

    def feed(dataset):
        """Its full batches, made ahead as they are for fit()."""
        numbers = itertools.cycle(range(len(dataset) - 1))
        generator = tf.data.Dataset.from_generator(
            lambda: (dataset[number] for number in numbers), output_signature=signature)
        return iter(generator.prefetch(2))

    batches, held_out, explain = feed(training), feed(validation), common.make_gradcam(model)
    labels = tf.cast(labels, tf.float32)[:, None]
    step = make_step(network, network.optimizer, images, labels)
    network.make_train_function()
    return settings, {
        "bare step": step,
        "bare step, not folded": make_step(model, model.optimizer, images, labels),
        "training": lambda: network.train_function(batches),
        "forward pass": tf.function(lambda: network(images, training=False)),
        "forward pass, not folded": tf.function(lambda: model(images, training=False)),
        "evaluation": lambda: [part.numpy() for part in explain(next(held_out)[0])],
    }, step.get_concrete_function().graph


def time_steps(name, outputs):
    """The table of measure_training for one backbone; 16 bits are those of "auto", if it takes any."""
    import common
    import tensorflow as tf

    settings, calls, graph = make_calls(name, outputs, False)
    matrix = tf.random.normal([4096, 4096])
    calls["matrix product"] = tf.function(lambda: tf.matmul(matrix, matrix))
    sixteen_bits = common.choose_precision(settings._replace(MIXED_PRECISION="auto"))[0] != "float32"
    if sixteen_bits:
        _, more, _ = make_calls(name, outputs, "auto")
        calls |= {f"{kind}, 16 bits": function for kind, function in more.items()}
    rounds = [{kind: STEPS / timeit.timeit(function, number=STEPS) for kind, function in calls.items()}
              for _ in range(1 + REPEATS)]
    rates = pd.DataFrame(rounds[1:])  # calls a second, without those of the first round, which are traced
    profiler = tf.compat.v1.profiler
    options = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation()).with_empty_output()
    flops = rates["training"] * profiler.profile(graph, options=options.build()).total_float_ops
    product_flops = rates["matrix product"] * 2 * 4096**3
    table = {"FLOP/s, training / matrix product": flops / product_flops,
             "matrix product, GFLOP/s": product_flops / 1e9}
    for bits in ("", ", 16 bits") if sixteen_bits else ("",):
        training, step, forward, evaluation = (
            rates[f"{kind}{bits}"] for kind in ("training", "bare step", "forward pass", "evaluation"))
        table |= {
            f"training{bits}, images/s": settings.BATCH_SIZE * training,
            f"forward pass{bits}, images/s": settings.BATCH_SIZE * forward,
            f"evaluation with Grad-CAM{bits}, images/s": settings.BATCH_SIZE * evaluation,
            f"training / bare step{bits}": training / step,
            f"evaluation with Grad-CAM / forward pass{bits}": evaluation / forward,
            f"bare step, folded / not folded{bits}": step / rates[f"bare step, not folded{bits}"],
            f"forward pass, folded / not folded{bits}": forward / rates[f"forward pass, not folded{bits}"],
        }
    if sixteen_bits:
        table["training, 16 bits / 32 bits"] = rates["training, 16 bits"] / rates["training"]
    return pd.DataFrame(table).add_prefix(f"{name}: ")


def make_weights(file):
    import keras

    keras.applications.ResNet50(include_top=False, weights=None).save_weights(file)


def run_tutorial(data, weights, epochs, source, output):
    sys.argv = ["tutorial.py", *map(str, (data, weights, epochs, source, output, "resnet50"))]
    with contextlib.suppress(SystemExit):  # of source "arrays", once the first epoch has begun
        runpy.run_path(str(REPOSITORY / "tests" / "tutorial.py"))


def run_script(data, weights, learning_rate, outputs):
    """Run resnet50.py as a user does; returns the seconds of its import and of its training."""
    imported = timeit.timeit("import resnet50", number=1)
    import resnet50

    vars(resnet50).update({"DATA_DIR": data, "OUTPUT_DIR": outputs, "WEIGHTS": weights, "EPOCHS": EPOCHS,
                           "LEARNING_RATE": learning_rate, "MIXED_PRECISION": False})
    settings = json.loads((resnet50.main() / "settings.json").read_text("utf-8"))
    return imported, settings["seconds"]["training"]


def time_reading(data, outputs):
    """Seconds of read_films."""
    from data.films import find_films
    from data.reading import read_films

    films = find_films(data)
    return timeit.timeit(lambda: read_films(films, data, "breast", outputs), number=1)


def start_training(data, outputs):
    """Run resnet50.py until two steps of its training are done."""
    import common
    import resnet50

    def train(model, training, _, settings, *__):
        common.compile_model(model, len(training), settings)
        model.fit(training, steps_per_epoch=2, shuffle=False)
        sys.exit()

    common.train = train
    vars(resnet50).update({"DATA_DIR": data, "OUTPUT_DIR": outputs, "WEIGHTS": None, "MIXED_PRECISION": False})
    with contextlib.suppress(SystemExit):
        resnet50.main()


# ---- measurements: a table each, with a row a round --------------------------------------------


def measure_training(folder):
    return pd.concat([run(time_steps, name, folder)[2] for name in ("resnet50", "vgg16")], axis=1)


def measure_process(folder):
    weights, rounds = folder / "resnet50.weights.h5", []
    run(make_weights, weights)
    make_films(folder / "images", IMAGES, IMAGES, (224, 224), np.uint8)
    make_films(folder / "films", IMAGES, **FILM)
    for number in range(REPEATS):
        rounds.append({})
        for data, source in (("images", "generator"), ("films", "films")):
            tutorial, *_ = run(run_tutorial, folder / data, weights, EPOCHS, source, folder / "tutorial")
            rounds[-1][f"{data}: tutorial, s"] = tutorial
            for name, learning_rate in (("first run", 1e-4), ("second run", 2e-4)):
                seconds, peak, (imported, training) = run(
                    run_script, folder / data, weights, learning_rate, folder / f"{data}-{number}")
                facts = {"all, s": seconds, "all but training, s": seconds - training, "import, s": imported,
                         "peak memory, MB": peak, "tutorial / all": tutorial / seconds}
                rounds[-1] |= {f"{data}, {name}: {fact}": value for fact, value in facts.items()}
    return pd.DataFrame(rounds)


def measure_reading(folder):
    make_films(folder / "films", FILMS, **FILM)
    rounds = []
    for number in range(REPEATS):
        first, second = (run(time_reading, folder / "films", folder / str(number))[2] for _ in range(2))
        rounds.append({"first, s": first, "second, s": second, "first / second": first / second})
    return pd.DataFrame(rounds)


def measure_growth(folder):
    weights, peaks = folder / "resnet50.weights.h5", {}
    for count in SMALL_IMAGES:
        make_films(folder / str(count), count, count, (96, 96), np.uint8)
        _, peaks[f"{count:,} images: peak memory, MB"], _ = run(start_training, folder / str(count), folder)
    few, many = peaks.values()
    run(make_weights, weights)
    _, tutorial, _ = run(run_tutorial, folder / str(SMALL_IMAGES[0]), weights, 1, "arrays", folder)
    return pd.DataFrame([peaks | {"growth, kB an image": 1e3 * (many - few) / np.diff(SMALL_IMAGES)[0],
                                  "tutorial: peak memory, MB": tutorial, "resnet50 / tutorial": few / tutorial}])


if __name__ == "__main__":
    for name in sys.argv[1:] or ("training", "process", "reading", "growth"):
        with tempfile.TemporaryDirectory() as folder:
            rounds = globals()[f"measure_{name}"](Path(folder))
        table = rounds.agg(["min", "median", "max"]).T.to_string(float_format="{:.4g}".format)
        print(f"\n{name}\n{table}", flush=True)
