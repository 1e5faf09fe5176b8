"""The synthetic mammograms."""
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
from test_scripts import prepare_script

import common
import resnet50


def test_the_same_seed_gives_the_same_bytes(phantoms, tmp_path):
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        phantoms["make_phantoms"](folder, benign=2, malignant=2, seed=seed)
    names = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.*"))
    assert len(names) == 8 + 1
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    images = [name for name in names if name.suffix == ".png" and (folders[2] / name).exists()]
    assert images
    assert all((folders[0] / name).read_bytes() != (folders[2] / name).read_bytes() for name in images)


def test_two_first_runs_at_once_see_whole_files_only(tmp_path):
    """Both make the same phantoms; whatever is there at any moment can be read."""
    prepare_script("vgg16", tmp_path, BENIGN_PATIENTS=15, MALIGNANT_PATIENTS=15)
    folder = tmp_path / "data" / "phantoms"
    both = [subprocess.Popen([sys.executable, folder / "prepare.py"], stdout=subprocess.DEVNULL) for _ in range(2)]
    looks = 0
    while any(process.poll() is None for process in both):
        if (folder / "labels.csv").exists():
            assert len(pd.read_csv(folder / "labels.csv")) == 60
        for image in folder.glob("images/[!.]*.png"):
            assert image.read_bytes().endswith(b"IEND\xaeB`\x82")
            looks += 1
    assert [process.returncode for process in both] == [0, 0]
    assert looks > 60
    assert len(list(folder.rglob("*.png"))) == 60
    assert not list(folder.rglob("*.partial"))


def test_the_table(phantoms, tmp_path):
    table = phantoms["make_phantoms"](tmp_path, benign=3, malignant=2)
    assert pd.read_csv(tmp_path / "labels.csv", dtype=str).equals(table.astype(str))
    assert table.groupby("patient_id").size().tolist() == [2] * 5
    assert table.groupby("label")["patient_id"].nunique().to_dict() == {"benign": 3, "malignant": 2}
    assert table["path"].str.contains("synthetic").all()
    for row in table.itertuples():
        image = cv2.imread(str(tmp_path / row.path), cv2.IMREAD_UNCHANGED)
        assert (image.dtype, image.ndim) == (np.uint8, 2)
        x, y, width, height = map(int, row.lesion_box.split(":"))
        inside = image[y:y + height, x:x + width]
        assert inside.shape == (height, width), "the box lies within the image"
        around = image[max(0, y - 20):y + height + 20, max(0, x - 20):x + width + 20]
        assert inside.mean() > around.mean(), "the mass is brighter than its surroundings"


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

    benign, malignant = (np.array([roundness(p, seed) for seed in range(30)]) for p in (0, 1))
    assert benign.min() > malignant.max()


def test_the_default_collection(phantoms):
    assert 2 * (phantoms["BENIGN_PATIENTS"] + phantoms["MALIGNANT_PATIENTS"]) == 240


def test_a_script_makes_its_phantoms_where_there_are_none(phantoms, record, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "data" / "phantoms"
    folder.mkdir(parents=True)
    source = (common.PHANTOMS / "prepare.py").read_text()
    for name, count in (("BENIGN_PATIENTS", 5), ("MALIGNANT_PATIENTS", 5)):
        source = source.replace(f"{name} = {phantoms[name]}", f"{name} = {count}")
    (folder / "prepare.py").write_text(source)
    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(common, "PHANTOMS", folder)
    table = common.find_images(record, resnet50.DATA_DIR)
    assert len(table) == 20
    assert record["note"] == "synthetic phantoms"
    assert "SYNTHETIC" in capsys.readouterr().out
