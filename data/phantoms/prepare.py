"""Make synthetic mammograms, the data that the scripts run on when you have none of your own.

    python data/phantoms/prepare.py

writes 240 images of 120 invented patients (a CC and an MLO view each) to data/phantoms/images, and
labels.csv beside this folder. The same SEED gives the same bytes. data/films.py calls it if the images
are missing. A phantom shows that a pipeline learns and measures. It does not show how good the pipeline
would be on patients.

A breast is an outline against the chest wall, filled with noise of a power-law spectrum (Burgess,
Jacobson and Judy 2001, Med. Phys. 28:419: exponent about 3 in mammograms). It holds one mass: a
benign one is oval and circumscribed, a malignant one irregular and spiculated, some with
microcalcifications. Both vary until they overlap, so that some cases stay hard.
"""
import secrets
import sys
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

# ------------------------------------------------------------------------------------------------
BENIGN_PATIENTS = 65  # with two views each
MALIGNANT_PATIENTS = 55  # fewer than benign ones, as in most collections
SEED = 0  # any whole number; another one makes other patients
HEIGHT, WIDTH = 320, 256  # pixels
SPECTRUM_EXPONENT = 3.0  # power falls with spatial frequency as f ** -3
MASS_CONTRAST = 0.15, 0.28  # how much brighter than its surroundings a mass is, of a full scale of 1
SPICULES = 7, 12  # how many lines radiate from a malignant mass
SPICULE_LENGTH = 1.35, 2.4  # in radii of the mass, from its centre
SPICULE_CONTRAST = 0.35, 0.7  # of the contrast of the mass, where they are plain
OCCULT = 0.5  # share of malignant patients whose mass looks nearly benign in one of their two views
MICROCALCIFIED = 0.3  # share of malignant masses that hold microcalcifications
# ------------------------------------------------------------------------------------------------

ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)


def make_tissue(rng, shape=(HEIGHT, WIDTH), exponent=SPECTRUM_EXPONENT):
    """Noise whose power spectrum falls as f ** -exponent: float, mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    frequency[0, 0] = np.inf  # no power at frequency 0: the mean is 0
    spectrum = np.fft.rfft2(rng.standard_normal(shape)) * frequency ** (-exponent / 2)
    tissue = np.fft.irfft2(spectrum, shape)
    return tissue / tissue.std()


def draw_breast(rng, view):
    """(depth, middle, half_height, reach): depth below the skin, and the size of the breast in pixels.

    depth: float (HEIGHT, WIDTH), 0 outside the breast to 1 well inside.
    The chest wall is the left edge. An MLO view hangs lower than a CC view.
    """
    middle = HEIGHT * (rng.uniform(0.52, 0.58) if view == "MLO" else rng.uniform(0.47, 0.53))
    half_height = HEIGHT * rng.uniform(0.36, 0.42)
    reach = WIDTH * rng.uniform(0.72, 0.88)
    radius = np.hypot((ROWS - middle) / half_height, COLUMNS / reach)
    return np.clip((1 - radius) / 0.25, 0, 1) ** 0.5, middle, half_height, reach


def draw_mass(rng, plainness, radius, row, column):
    """One mass around (row, column): float (HEIGHT, WIDTH), 0 outside to 1 in its middle.

    plainness: how malignant it looks, 0 (oval, circumscribed) to 1 (irregular, ill-defined, spiculated).
    """
    angle = np.arctan2(ROWS - row, COLUMNS - column)
    distance = np.hypot(ROWS - row, COLUMNS - column) / radius
    turn, flattening = rng.uniform(0, 2 * np.pi), rng.uniform(0.72, 1.0)
    contour = flattening / np.hypot(flattening * np.cos(angle - turn), np.sin(angle - turn))
    for wave in range(2, 8):  # few waves are gentle lobes, many an irregular contour
        height = 0.04 if wave < 4 else 0.08 * plainness
        contour += rng.uniform(0, height) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi))
    margin = rng.uniform(0.1, 0.3) + 0.1 * plainness  # width, in radii
    mass = np.clip((contour - distance) / margin + 0.5, 0, 1)
    brightness = plainness * rng.uniform(*SPICULE_CONTRAST)
    first, count = rng.uniform(0, 2 * np.pi), rng.integers(*SPICULES, endpoint=True)
    for spicule in range(count):
        direction = first + 2 * np.pi * (spicule + rng.uniform(-0.3, 0.3)) / count
        length = rng.uniform(*SPICULE_LENGTH)
        along = distance * np.cos(angle - direction)
        across = radius * distance * np.sin(angle - direction)  # pixels
        taper = np.clip(1 - along / length, 0, 1) * (along > 0)
        width = 0.8 + 1.8 * taper  # pixels
        line = np.sqrt(taper) * np.exp(-((across / width) ** 2))
        mass = np.maximum(mass, brightness * line)
    return mass


def draw_microcalcifications(rng, radius, row, column):
    """A cluster of bright specks within the mass: float (HEIGHT, WIDTH), 0 to 1."""
    specks = np.zeros((HEIGHT, WIDTH))
    for _ in range(rng.integers(5, 12, endpoint=True)):
        y, x = row + rng.normal(0, 0.4 * radius), column + rng.normal(0, 0.4 * radius)
        size = rng.uniform(0.7, 1.1)  # pixels
        specks = np.maximum(specks, np.exp(-((ROWS - y) ** 2 + (COLUMNS - x) ** 2) / (2 * size**2)))
    return specks


def make_view(rng, view, side, plainness, radius, contrast, calcified):
    """One image: uint8 (HEIGHT, WIDTH), and the box of its mass as (x, y, width, height) in pixels."""
    depth, middle, half_height, reach = draw_breast(rng, view)
    image = 0.34 + 0.10 * make_tissue(rng) + rng.uniform(-0.05, 0.05)
    if view == "MLO":  # the pectoral muscle: a bright triangle in the upper corner
        edge = rng.uniform(0.22, 0.32) * WIDTH * (1 - ROWS / (rng.uniform(0.4, 0.55) * HEIGHT))
        image += 0.22 * np.clip((edge - COLUMNS) / 6 + 0.5, 0, 1)
    bearing = rng.uniform(-0.8, 0.8)
    row = middle + 0.55 * half_height * np.sin(bearing) * rng.uniform(0.5, 1)
    column = reach * (0.28 + 0.34 * np.cos(bearing) * rng.uniform(0.4, 1))
    image += contrast * draw_mass(rng, plainness, radius, row, column)
    if calcified:
        image += 0.3 * draw_microcalcifications(rng, radius, row, column)
    image = image * depth + rng.normal(0, 0.012, (HEIGHT, WIDTH))  # and the grain of the film
    half = 1.25 * radius
    x, y, width, height = column - half, row - half, 2 * half, 2 * half
    if side == "RIGHT":
        image, x = image[:, ::-1], WIDTH - x - width
    image = np.ascontiguousarray(np.clip(image, 0, 1) * 255).astype(np.uint8)
    corner = 8 if side == "RIGHT" else WIDTH - 92
    for line, text in enumerate((f"{side[0]} {view}", "SYNTHETIC")):
        place = (corner, 16 + 14 * line)
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 210, 1, cv2.LINE_AA)
    return image, [round(number) for number in (x, y, width, height)]


def write_atomically(path, content):
    """Write bytes to a file that appears whole or not at all."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    part.write_bytes(content)
    part.replace(path)


def make_phantoms(folder, benign=BENIGN_PATIENTS, malignant=MALIGNANT_PATIENTS, seed=SEED):
    """Write images/*.png and labels.csv below `folder`; returns the table.

    benign, malignant: patients of each class. The table is written last, so a folder that has one
    is complete, and two runs that make it at once write the same.
    """
    folder = Path(folder)
    if not any(folder.glob("images/*.png")):
        (folder / "labels.csv").unlink(missing_ok=True)  # its images were deleted
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for patient in range(benign + malignant):
        rng = np.random.default_rng((seed, patient))
        label = "benign" if patient < benign else "malignant"
        side = str(rng.choice(("LEFT", "RIGHT")))
        radius, contrast = rng.uniform(13, 24), rng.uniform(*MASS_CONTRAST)
        calcified = label == "malignant" and rng.random() < MICROCALCIFIED
        occult = rng.choice(("CC", "MLO")) if patient % 10 < 10 * OCCULT else None
        for view in ("CC", "MLO"):
            plainness = rng.uniform(0, 0.4) if view == occult else rng.uniform(0.75, 1)
            if label == "benign":
                plainness = 0
            image, box = make_view(rng, view, side, plainness, radius, contrast, calcified)
            path = f"images/synthetic_{patient:04d}_{side}_{view}.png"
            write_atomically(folder / path, cv2.imencode(".png", image)[1].tobytes())
            rows.append((path, label, f"synthetic_{patient:04d}", ":".join(map(str, box))))
    table = pd.DataFrame(rows, columns=["path", "label", "patient_id", "lesion_box"])
    write_atomically(folder / "labels.csv", table.to_csv(index=False).encode())
    return table


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    try:
        (here / "labels.csv").unlink(missing_ok=True)  # of other constants
        print(f"{len(make_phantoms(here))} synthetic mammograms in {here}")
    except OSError as error:  # no right to write, a full disk
        sys.exit(f"The phantoms could not be made: {error}")
