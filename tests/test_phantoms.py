"""The synthetic mammograms."""
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

SCRIPT = REPOSITORY / "data" / "phantoms" / "prepare.py"


def test_the_same_seed_gives_the_same_bytes(phantoms, tmp_path):
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        phantoms["make_phantoms"](folder, benign=2, malignant=2, seed=seed)
    first, again, other = ({path.name: path.read_bytes() for path in folder.rglob("*.*")} for folder in folders)
    assert len(first) == 8 + 1
    assert first == again
    assert all(content != first.get(name) for name, content in other.items())


def test_two_first_runs_at_once_see_whole_files_only(tmp_path):
    """Both make the same phantoms; whatever is there at any moment can be read, and a table is complete."""
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r})['make_phantoms']({str(tmp_path)!r}, 4, 4)"
    (tmp_path / "labels.csv").write_text("path,label\nimages/gone.png,benign\n")  # the images were deleted
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    looks = 0
    while any(run.poll() is None for run in runs):
        images = list(tmp_path.glob("images/[!.]*.png"))
        for image in images:
            assert image.read_bytes().endswith(b"IEND\xaeB`\x82")
            looks += 1
        if images and (tmp_path / "labels.csv").exists():
            assert len(list(tmp_path.glob("images/[!.]*.png"))) == 16
    assert [run.returncode for run in runs] == [0, 0]
    assert looks > 16
    assert len(pd.read_csv(tmp_path / "labels.csv")) == len([*tmp_path.rglob("*.png")]) == 16
    assert len(list(tmp_path.rglob("*"))) == 16 + 2, "nothing half written"


def test_the_table(phantoms, tmp_path):
    table = phantoms["make_phantoms"](tmp_path, benign=4, malignant=3)
    assert pd.read_csv(tmp_path / "labels.csv", dtype=str).equals(table.astype(str))
    assert table.groupby("patient_id").size().tolist() == [2] * 7
    assert table.groupby("label")["patient_id"].nunique().to_dict() == {"benign": 4, "malignant": 3}
    assert table["path"].str.contains("synthetic").all()
    for row in table.itertuples():
        image = cv2.imread(str(tmp_path / row.path), cv2.IMREAD_UNCHANGED)
        assert (image.dtype, image.ndim) == (np.uint8, 2)
        x, y, width, height = map(int, row.lesion_box.split(":"))
        inside = image[y : y + height, x : x + width]
        assert inside.shape == (height, width), "the box lies within the image"
        around = image[max(0, y - 20) : y + height + 20, max(0, x - 20) : x + width + 20]
        assert inside.mean() > around.mean(), "the mass is brighter than its surroundings"
        mirrored = image[:, ::-1][y : y + height, x : x + width]
        assert inside.mean() > mirrored.mean(), "and than what lies on the other side of the film"


def test_tissue_has_the_power_spectrum_of_mammograms(phantoms):
    """The slope of log power over log frequency, averaged over all directions of 20 images."""
    tissues = [phantoms["make_tissue"](np.random.default_rng(seed)) for seed in range(20)]
    power = np.mean([np.abs(np.fft.fft2(tissue)) ** 2 for tissue in tissues], axis=0)
    height, width = power.shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    band = (frequency > 0.02) & (frequency < 0.4)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert slope == pytest.approx(-3, abs=0.1)
    assert np.mean(tissues) == pytest.approx(0, abs=1e-6)


def test_malignant_masses_are_less_compact(phantoms):
    """The perimeter of a plain malignant mass is longer for its area than that of a benign one."""

    def roundness(plainness, seed):
        mass = phantoms["draw_mass"](np.random.default_rng(seed), plainness, 20, 160, 120)
        contours, _ = cv2.findContours((mass > 0.3).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        contour = max(contours, key=cv2.contourArea)
        return 4 * np.pi * cv2.contourArea(contour) / cv2.arcLength(contour, True) ** 2

    benign, malignant = (np.array([roundness(plainness, seed) for seed in range(30)]) for plainness in (0, 1))
    assert benign.min() > malignant.max()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "prepare.py").write_bytes(SCRIPT.read_bytes())
    (tmp_path / "images").write_text("in the way")
    failed = subprocess.run([sys.executable, tmp_path / "prepare.py"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("The phantoms could not be made: ")
