"""What the speed and memory that the README speaks of are on this machine; run by hand, on an idle one.

    python tests/benchmark.py

makes its own films in a temporary folder (10 GB), measures in processes of their own, several times
each, and prints a table of ratios. Nothing here is asserted: a busy machine would fail it.
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


def measure(function, *arguments):
    """Run a function of this file in a process of its own; its result, and nothing of what it prints."""
    command = [sys.executable, __file__, function.__name__, *map(str, arguments)]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


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


def make_small(folder, count):
    """`count` files of 96 x 96 pixels, all different."""
    import cv2

    for number in range(count):
        path = folder / ("benign", "malignant")[number % 2] / f"{number // 1000:03d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (48, 48), np.uint8)
        cv2.imwrite(str(path), cv2.resize(noise, (96, 96)), [cv2.IMWRITE_PNG_COMPRESSION, 1])


def show(what, values, least):
    """A row of the table: minimum, median and maximum, and what is asked for."""
    print(f"| {what} | {min(values):.3g} | {np.median(values):.3g} | {max(values):.3g} | {least} |", flush=True)


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


def main():
    print("| what | minimum | median | maximum | asked for |\n|---|---|---|---|---|", flush=True)
    for section in (measure_films, measure_memory):
        with tempfile.TemporaryDirectory() as place:
            section(Path(place))


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(globals()[sys.argv[1]](*(int(a) if a.isdigit() else a for a in sys.argv[2:]))))
    else:
        main()
