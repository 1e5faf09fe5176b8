"""Why others publish 0.98: the same films and the same network, counted in two ways. Run it by hand.

    python data/mini_mias/prepare.py
    python tests/leaky_split.py RESNET50_WEIGHTS VGG16_WEIGHTS FOLDER

The best-known collection for this task (Mendeley Data ywsbh3ndr8) holds 7,632 turned and mirrored copies of 106
INbreast lesions, and more, and tutorials split it by image. Here every lesion crop of mini-MIAS becomes COPIES
images with names that tell nothing, in FOLDER/copies. Those of a fifth of the patients are kept out;
tests/tutorial.py trains on the others and splits them by image. resnet50.py and vgg16.py get the same images and
find out by themselves which show the same film. Then all models are shown the patients that were kept out. Prints
a table, with 95 % intervals over what each counts as independent: images in the tutorial, films elsewhere. Takes
1 to 3 hours on two cores.
"""
import importlib
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import common  # noqa: E402  (before Keras: it chooses Keras' backend)
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from data.results.metrics import measure, with_interval  # noqa: E402

# ------------------------------------------------------------------------------------------------
COPIES = 12  # of each lesion crop, an even number: half of them are mirrored
EPOCHS = 7
COLLECTION = REPOSITORY / "data" / "mini_mias"
# ------------------------------------------------------------------------------------------------


def make_copies(image):
    """COPIES turned and mirrored variants of an image, the first as it is."""
    middle = (image.shape[0] - 1) / 2, (image.shape[1] - 1) / 2
    for number in range(COPIES):
        angle, mirrored = 720 / COPIES * (number // 2), number % 2
        turn = cv2.getRotationMatrix2D(middle, angle, 1)
        turned = cv2.warpAffine(image, turn, image.shape[::-1], borderMode=cv2.BORDER_REFLECT)
        yield turned[:, ::-1] if mirrored else turned


def read_crops(folder):
    """(films, images) of the lesion crops; column `seen` is True for four fifths of the patients."""
    films, images, fingerprints = common.read_films(common.find_films(COLLECTION), COLLECTION, "lesion", folder)
    films = common.split_patients(common.group_duplicates(films, fingerprints), fold=0, seed=0)
    films = films[films["excluded"] == ""]
    return films.assign(seen=films["split"] == "train"), images


def write_copies(films, images, folder):
    """Write the copies of the films as FOLDER/<label>/<number>.png in random order."""
    numbers = iter(np.random.default_rng(0).permutation(len(films) * COPIES))
    for index, label in films["label"].items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        for copy in make_copies(images[index]):
            cv2.imwrite(str(folder / label / f"{next(numbers):05d}.png"), copy)


def show(results):
    """Accuracy and AUC with their intervals, as text."""
    return [with_interval(results, name) for name in ("accuracy", "auc")]


def score(labels, probabilities, groups):
    """What show() gives of these."""
    return show(measure(np.asarray(labels), np.asarray(probabilities), groups, threshold=0.5))


def score_others(file, films, images, preprocess=lambda pixels: pixels):
    """End of a row: the model of a file on the films of the patients that were kept out."""
    films = films[~films["seen"]]
    pixels = np.repeat(images[films.index][..., None], 3, axis=-1).astype(np.float32)
    probabilities = common.keras.models.load_model(file).predict(preprocess(pixels), verbose=0)[:, 0]
    return len(films), *score(films["label"].eq("malignant").astype(int), probabilities, films["group"])


def run_tutorial(name, weights, films, images, folder):
    """Rows of the table: the tutorial's own split, and its model on films of other patients."""
    output = folder / f"tutorial-{name}"
    arguments = [folder / "copies", weights, EPOCHS, "generator", output, name]
    if not (output / "predictions.txt").exists():  # a second call continues where the first was stopped
        subprocess.run([sys.executable, REPOSITORY / "tests" / "tutorial.py", *map(str, arguments)], check=True)
    labels, probabilities = np.loadtxt(output / "predictions.txt").T
    yield "tutorial, split by image", len(labels), *score(labels.astype(int), probabilities, range(len(labels)))
    preprocess = getattr(common.keras.applications, name).preprocess_input
    yield "its model, other patients", *score_others(output / "model.keras", films, images, preprocess)


def run_script(name, weights, films, images, folder):
    """Rows of the table: the script of this project on the same images, and its model on the other patients."""
    script = importlib.import_module(name)
    vars(script).update(DATA_DIR=folder / "copies", OUTPUT_DIR=folder / "outputs", WEIGHTS=weights, CROP=None,
                        EPOCHS=EPOCHS, MIXED_PRECISION=False)  # 32 bits, as in the tutorial
    output = script.main()
    results = json.loads((output / "metrics.json").read_text("utf-8"))
    yield f"{name}.py, split by film", results["validation_images"], *show(results)
    yield "its model, other patients", *score_others(output / "model.keras", films, images)


def main(resnet50, vgg16, folder):
    folder, rows = Path(folder).resolve(), []
    films, images = read_crops(folder)
    if not (folder / "copies").exists():
        write_copies(films[films["seen"]], images, folder / "copies")
    for name, weights in (("resnet50", resnet50), ("vgg16", vgg16)):
        weights = Path(weights).resolve()
        for run in (run_tutorial, run_script):
            for row in run(name, weights, films, images, folder):
                rows.append((name, *row))
                print(*rows[-1], sep=" | ", flush=True)
    table = pd.DataFrame(rows, columns=["network", "who counts", "held-out images", "accuracy", "AUC"])
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
