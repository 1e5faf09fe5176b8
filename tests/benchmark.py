"""What the speed and memory that the README speaks of are on this machine; run by hand, on an idle one.

    python tests/benchmark.py [SECTION ...]

makes its own films in a temporary folder (10 GB), measures in processes of their own, several times
each, side by side, and prints a table of ratios; all sections take two hours on two cores. Nothing here
is asserted: a busy machine would fail it.
"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
# ------------------------------------------------------------------------------------------------
REPEATS = 5  # of every measurement
FILMS = 500  # of 3000 x 4000 pixels and 16 bits, for the first and the second pass
PICTURES = 25  # different ones among them; the others are links, as each takes a second to make
SOME_FILMS = 100  # of them, for one core against all
SMALL_IMAGES = 2_000, 20_000, 100_000  # of 96 x 96 pixels, for the memory
STEPS = 8  # of training in a row, of one kind, before the next kind has its turn
DRAWS = 52, 104, 208  # images an epoch, for the time of an epoch
EPOCHS = 3  # of the tutorial script and of resnet50.py
LEARNING_RATES = {"first run": "1e-4", "second run": "2e-4"}  # of resnet50.py, which keeps what it read
# ------------------------------------------------------------------------------------------------


# ---- one measurement, in a process of its own --------------------------------------------------


def resident():
    """(now, peak) resident memory of this process in MB."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def read_once(data, outputs, cores):
    """Seconds in read_images and a digest of what it gives, on so many cores."""
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:cores])
    os.cpu_count = lambda: cores
    sys.path.insert(0, str(REPOSITORY))
    import common
    import resnet50

    record = common.start(vars(resnet50) | {"DATA_DIR": data, "OUTPUT_DIR": outputs})
    films = common.find_images(record, data)
    started = time.perf_counter()
    films, images, prints = common.read_images(record, films)
    seconds = time.perf_counter() - started
    digest = common.hashlib.sha256(np.array(images).tobytes() + np.array(prints).tobytes()).hexdigest()
    return {"seconds": seconds, "digest": digest}


def start_training(data, outputs):
    """Resident MB once the first step of ResNet50 is done, and how many images there were."""
    sys.path.insert(0, str(REPOSITORY))
    import common
    import resnet50

    constants = vars(resnet50) | {"DATA_DIR": data, "OUTPUT_DIR": outputs, "WEIGHTS": None}
    record = common.start(constants)
    films, images, prints = common.read_images(record, common.find_images(record, data))
    after_reading = resident()
    films = common.split_patients(record, common.group_copies(record, films, prints), 0, 0)
    after_copies = resident()
    training, _, _ = common.feed(record, images, films, 1, 13, 0)
    model = common.build_model(record, resnet50.build_backbone(), False, 0.5, 1e-4)
    model.fit(training(0), steps_per_epoch=2, shuffle=False, verbose=0)
    return {"images": len(films), "reading": after_reading, "copies": after_copies, "training": resident(),
            "seconds": record["seconds"]}


def rate(function, images):
    """Images a second: `function` takes so many a call, and is called STEPS times."""
    started = time.perf_counter()
    for _ in range(STEPS):
        function()
    return images * STEPS / (time.perf_counter() - started)


def train_and_evaluate(backbone, data, outputs, weights):
    """Images/s of the real pipeline and the bare step, of evaluation and the bare forward pass; and FLOP/s."""
    sys.path.insert(0, str(REPOSITORY))
    import common

    script, keras, tf = __import__(backbone), common.keras, common.tf
    record = common.start(vars(script) | {"DATA_DIR": data, "OUTPUT_DIR": outputs, "WEIGHTS": weights})
    films, images, prints = common.read_images(record, common.find_images(record, data))
    films = common.split_patients(record, common.group_copies(record, films, prints), 0, 0)
    training, validation, _ = common.feed(record, images, films, 1000, 13, 0)
    network = script.build_backbone()
    common.load_weights(record, network, weights, "", "")
    model = common.build_model(record, network, True, 0.5, 1e-5)
    batch, labels = next(iter(training(0)))
    targets = tf.cast(labels, tf.float32)[:, None]

    @tf.function
    def step():
        trained = [variable.value for variable in model.trainable_variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:  # no gradient of what is frozen is counted
            tape.watch(trained)
            loss = tf.reduce_mean(keras.losses.binary_crossentropy(targets, model(batch, training=True)))
        model.optimizer.apply(tape.gradient(loss, trained), model.trainable_variables)

    model.make_train_function()
    draws, held_out = iter(training(0)), validation.unbatch().batch(13, drop_remainder=True).repeat()
    held_out, classify = iter(held_out.prefetch(2)), common.make_classifier(model)
    forward = tf.function(lambda: model(batch, training=False))
    matrix = tf.random.normal([4096, 4096])
    product = tf.function(lambda: tf.matmul(matrix, matrix))
    kinds = {
        "bare step": (step, 13),
        "pipeline": (lambda: model.train_function(draws), 13),
        "forward": (lambda: forward().numpy(), 13),
        "evaluation": (lambda: [part.numpy() for part in classify(next(held_out)[0])], 13),
        "matrix products": (lambda: product().numpy(), 2 * 4096**3 / 1e9),
    }
    found = {name: [] for name in kinds}
    for function, _ in kinds.values():
        function()  # once, to be traced
    for _ in range(REPEATS):
        for name, (function, images_each) in kinds.items():
            found[name].append(rate(function, images_each))
    options = tf.compat.v1.profiler.ProfileOptionBuilder(
        tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()).with_empty_output().build()
    graph = step.get_concrete_function().graph
    flops = tf.compat.v1.profiler.profile(graph, options=options).total_float_ops
    return found | {"GFLOP an image": flops / 13 / 1e9}


def time_epochs(outputs):
    """Seconds of an epoch of ResNet50 with DRAWS images, several times in turn; without validation."""
    sys.path.insert(0, str(REPOSITORY))
    import common
    import resnet50

    record = common.start(vars(resnet50) | {"OUTPUT_DIR": outputs})
    images = np.random.default_rng(0).integers(0, 256, (max(DRAWS) + 2, 224, 224), np.uint8)
    model, seconds = None, {count: [] for count in DRAWS}
    for count in (DRAWS[0], *DRAWS * REPEATS):  # the first is traced, and left out
        films = common.pd.DataFrame({"label": np.resize(common.CLASSES, count + 2), "split": "train"})
        films.loc[count:, "split"] = "validation"
        training, _, steps = common.feed(record, images, films, 1, 13, 0)
        traced = model is not None
        model = model or common.build_model(record, resnet50.build_backbone(), True, 0.5, 1e-5)
        started = time.perf_counter()
        model.fit(training(0), steps_per_epoch=steps, shuffle=False, verbose=0)
        if traced:
            seconds[count].append(time.perf_counter() - started)
    return seconds


def run_script(data, outputs, weights, epochs, learning_rate):
    """resnet50.py as a user runs it: seconds of the import, of the steps, of tracing them, of stages; peak MB.

    steps: all batches of training and validation. The first of each kind is traced, and as long without that
    as the median of its kind.
    """
    begun = time.perf_counter()
    sys.path.insert(0, str(REPOSITORY))
    import common
    import resnet50

    imported, ticks, fit = time.perf_counter() - begun, {"train": [], "test": []}, common.keras.Model.fit

    def tick(kind):
        return lambda *_, **__: ticks[kind].append(time.perf_counter())

    clock = common.keras.callbacks.LambdaCallback(
        **{f"on_{kind}_batch_{when}": tick(kind) for kind in ticks for when in ("begin", "end")})
    common.keras.Model.fit = lambda *arguments, callbacks, **others: fit(
        *arguments, callbacks=[*callbacks, clock], **others)
    vars(resnet50).update(DATA_DIR=data, OUTPUT_DIR=outputs, WEIGHTS=weights, EPOCHS=epochs,
                          LEARNING_RATE=float(learning_rate))
    folder = resnet50.main()
    stages = json.loads((folder / "settings.json").read_text("utf-8"))["seconds"]
    seconds = [np.diff(times)[::2] for times in ticks.values()]
    tracing = sum(first - np.median(others) for first, *others in seconds)
    return {"import": imported, "steps": sum(map(sum, seconds)) - tracing, "tracing": tracing,
            "stages": stages, "peak": resident()[1]}


# ---- in processes of their own -----------------------------------------------------------------


def call(command):
    """(seconds, what it printed) of a command."""
    started = time.perf_counter()
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr)
    return time.perf_counter() - started, process.stdout


def measure(function, *arguments):
    """Run a function of this file; its result, and nothing of what it prints."""
    return json.loads(call([sys.executable, __file__, function.__name__, *arguments])[1].splitlines()[-1])


# ---- films -------------------------------------------------------------------------------------


def make_films(folder, count, pictures):
    """`count` files of 3000 x 4000 pixels, 16 bits: breasts of noise on black, `pictures` different ones."""
    import cv2

    rows, columns = np.mgrid[:4000, :3000].astype(np.float32)
    breast = np.hypot((rows - 2000) / 1700, columns / 2300) < 1
    for number in range(count):
        path = folder / ("benign", "malignant")[number % 2] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < pictures:
            noise = np.random.default_rng(number)
            coarse = cv2.resize(noise.random((40, 30), np.float32), (3000, 4000), interpolation=cv2.INTER_CUBIC)
            film = breast * (9000 + 30000 * coarse + 400 * noise.standard_normal((4000, 3000), np.float32))
            cv2.imwrite(str(path), film.clip(0, 65535).astype(np.uint16), [cv2.IMWRITE_PNG_COMPRESSION, 1])
        else:
            first = number % pictures
            os.link(folder / ("benign", "malignant")[first % 2] / f"{first:04d}.png", path)


def make_small(folder, count, side=96):
    """`count` square files of that many pixels a side, all different."""
    import cv2

    for number in range(count):
        path = folder / ("benign", "malignant")[number % 2] / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (48, 48), np.uint8)
        cv2.imwrite(str(path), cv2.resize(noise, (side, side)), [cv2.IMWRITE_PNG_COMPRESSION, 1])


def show(what, values, least):
    """A row of the table: minimum, median and maximum, and what is asked for."""
    print(f"| {what} | {min(values):.3g} | {np.median(values):.3g} | {max(values):.3g} | {least} |", flush=True)


def make_weights(folder):
    """Weights files of both backbones, random but whole, so that batch norm is frozen as in pretrained ones."""
    sys.path.insert(0, str(REPOSITORY))
    import common
    import resnet50
    import vgg16

    common.keras.utils.set_random_seed(1)  # not that of the scripts, who would take them for missing
    for script in (resnet50, vgg16):
        script.build_backbone().save_weights(Path(folder) / f"{script.__name__}.weights.h5")


def measure_training(place):
    """Throughput of training and evaluation against the bare functions, and against the processor's."""
    make_small(place / "small", 240, 224)
    measure(make_weights, place)
    for backbone, least in (("resnet50", 0.80), ("vgg16", 0.95)):
        found = measure(train_and_evaluate, backbone, place / "small", place / "outputs",
                        place / f"{backbone}.weights.h5")
        work = found.pop("GFLOP an image")
        show(f"{backbone}: training pipeline / bare step", np.divide(found["pipeline"], found["bare step"]), 0.97)
        show(f"{backbone}: evaluation with Grad-CAM / bare forward pass",
             np.divide(found["evaluation"], found["forward"]), 0.95)
        show(f"{backbone}: FLOP/s of the training pipeline / of matrix products",
             work * np.divide(found["pipeline"], found["matrix products"]), least)
        for name, rates in found.items():
            show(f"{backbone}: {name}, {'GFLOP' if 'matrix' in name else 'images'}/s", rates, "")
        show(f"{backbone}: GFLOP of a training step an image", [work], "")


def race(place, data, source, runs, seconds):
    """Append the seconds of the tutorial, of resnet50.py, and of it with another learning rate; and its parts.

    runs: {name: learning rate}, one after the other on the same OUTPUT_DIR.
    """
    number = len(seconds["tutorial"])
    weights, outputs = place / "resnet50.weights.h5", place / f"outputs-{data.name}-{number}"
    tutorial = [sys.executable, REPOSITORY / "tests" / "tutorial.py", data, weights, EPOCHS, source]
    seconds["tutorial"].append(call([*tutorial, place / f"tutorial-{number}"])[0])
    for name, rate in runs.items():
        started = time.perf_counter()
        parts = measure(run_script, data, outputs, weights, EPOCHS, rate)
        seconds[name].append(time.perf_counter() - started)
        seconds["parts"].append(parts | {"rest": seconds[name][-1] - parts["steps"]})


def measure_tutorial(place):
    """The whole process against the common tutorial script, on small images and on films."""
    measure(make_weights, place)
    make_small(place / "images", 240, 224)
    make_films(place / "films", 240, PICTURES)
    for data, source, least in ((place / "images", "generator", {"first run": 1.2}),
                                (place / "films", "films", {"first run": 3, "second run": 4})):
        seconds = {name: [] for name in ("tutorial", *least, "parts")}
        runs = {name: rate for name, rate in LEARNING_RATES.items() if name in least}
        for _ in range(REPEATS):
            race(place, data, source, runs, seconds)
        parts, what = seconds.pop("parts"), f"240 {data.name}, {EPOCHS} epochs"
        for name, ratio in least.items():
            show(f"{what}: tutorial / {name}, seconds", np.divide(seconds["tutorial"], seconds[name]), ratio)
        for name, values in seconds.items():
            show(f"{what}: {name}, seconds", values, "")
        for name, words in {"steps": "steps of training and validation", "rest": "everything but these steps",
                            "import": "of it import", "tracing": "of it tracing"}.items():
            show(f"{what}: {words}, seconds", [part[name] for part in parts], "under 30" if name == "rest" else "")
        for name in parts[0]["stages"]:
            show(f"{what}: stage {name}, seconds", [part["stages"][name] for part in parts], "")
        show(f"{what}: peak memory, MB", [part["peak"] for part in parts], "under 2000")


def measure_tutorial_memory(place):
    """Peak memory against the tutorial script that reads all into an array, once the first epoch has begun."""
    measure(make_weights, place)
    make_small(place / "many", 10_000, 224)
    tutorial = [sys.executable, REPOSITORY / "tests" / "tutorial.py", place / "many",
                place / "resnet50.weights.h5", 1, "arrays", place / "tutorial"]
    theirs, ours = [], []
    for number in range(REPEATS):
        theirs.append(int(call(tutorial)[1].split()[-1]) / 1e3)
        ours.append(measure(start_training, place / "many", place / f"outputs-{number}")["training"][1])
    show("10,000 images of 224 pixels: peak MB, ours / tutorial", np.divide(ours, theirs), "under 0.33")
    show("10,000 images of 224 pixels: peak MB, ours", ours, "")
    show("10,000 images of 224 pixels: peak MB, tutorial", theirs, "")


def measure_growth(place):
    """The time of an epoch over the images in it."""
    seconds = {int(count): times for count, times in measure(time_epochs, place / "outputs").items()}
    for count, times in seconds.items():
        show(f"{count} images: seconds of an epoch", times, "")
    fits = [np.polyfit(DRAWS, [seconds[count][number] for count in DRAWS], 1) for number in range(REPEATS)]
    show("time of an epoch, fitted: ms an image", [1e3 * slope for slope, _ in fits], "")
    show("time of an epoch, fitted: seconds without any image", [rest for _, rest in fits], "")
    show("time of an epoch an image: the longest epoch / half of it",
         np.divide(seconds[DRAWS[2]], seconds[DRAWS[1]]) * DRAWS[1] / DRAWS[2], "1 is linear")


def measure_films(place):
    """The first pass over large films, and the second, from the cache."""
    make_films(place / "films", FILMS, PICTURES)
    for path in sorted((place / "films").rglob("*.png"))[:: FILMS // SOME_FILMS]:
        (place / "some" / path.parent.name).mkdir(exist_ok=True, parents=True)
        os.link(path, place / "some" / path.parent.name / path.name)
    cores = os.cpu_count()
    seconds = {1: [], cores: []}
    for number in range(REPEATS):
        for count in seconds:
            outputs = place / f"{count}-{number}"
            seconds[count].append(measure(read_once, place / "some", outputs, count)["seconds"])
    ratios = np.divide(seconds[1], seconds[cores])
    show(f"first pass over {SOME_FILMS} films: one core / {cores} cores, seconds", ratios, "1.7 on 2 cores")
    first = measure(read_once, place / "films", place / "outputs", cores)
    second = [measure(read_once, place / "films", place / "outputs", cores) for _ in range(REPEATS)]
    ratios = [first["seconds"] / again["seconds"] for again in second]
    show(f"{FILMS} films: first pass / second pass, seconds", ratios, 50)
    show("first pass, seconds", [first["seconds"]], "")
    show("second pass, seconds", [again["seconds"] for again in second], "")
    show("second pass: the same bytes (1 is yes)", [again["digest"] == first["digest"] for again in second], 1)


def measure_memory(place):
    """Resident memory, with ever more small images, until the first steps of training are done."""
    points = []
    for count in SMALL_IMAGES:
        if not (place / f"small-{count}").exists():
            make_small(place / f"small-{count}", count)
        points.append(measure(start_training, place / f"small-{count}", place / "outputs"))
        for stage in ("reading", "copies", "training"):
            now, peak = points[-1][stage]
            show(f"{count:,} small images, resident MB after {stage} (peak {peak:,.0f})", [now], "under 3000")
    for stage in ("reading", "training"):
        slope = np.polyfit(SMALL_IMAGES, [1e3 * point[stage][1] for point in points], 1)[0]
        show(f"peak memory until {stage}, kB per image (fitted)", [slope], "under 60")


SECTIONS = (measure_training, measure_growth, measure_tutorial, measure_tutorial_memory, measure_films,
            measure_memory)


def main():
    """All sections, or those that are named."""
    print("| what | minimum | median | maximum | asked for |\n|---|---|---|---|---|", flush=True)
    for section in SECTIONS:
        if section.__name__ in sys.argv or not sys.argv[1:]:
            with tempfile.TemporaryDirectory() as place:
                section(Path(place))


if __name__ == "__main__":
    name, *arguments = sys.argv[1:] or [""]
    if not name or globals()[name] in SECTIONS:
        main()
    else:
        print(json.dumps(globals()[name](*(int(word) if word.isdigit() else word for word in arguments))))
