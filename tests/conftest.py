"""What the tests share: small films, and a record as common.start() opens it."""
import os
import runpy
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the same answers on every machine
REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402

import common  # noqa: E402
import resnet50  # noqa: E402
import vgg16  # noqa: E402


@pytest.fixture(params=[resnet50, vgg16], ids=["resnet50", "vgg16"])
def script(request):
    return request.param


@pytest.fixture
def record(tmp_path_factory):
    """As common.start() opens it, with CROP = None and an OUTPUT_DIR of its own."""
    return common.start(vars(resnet50) | {"CROP": None, "OUTPUT_DIR": str(tmp_path_factory.mktemp("outputs"))})


def find(record, folder):
    """find_images() with DATA_DIR set to a folder."""
    record["constants"]["DATA_DIR"] = str(folder)
    return common.find_images(record, str(folder))


@pytest.fixture
def named(record):
    """A record that is ready to be named, and a table of images."""
    record |= {"weights": {"sha256": "1"}, "model": {"backbone": "vgg16"}}
    return record, pd.DataFrame({"path": ["a.png"], "label": ["benign"], "sha256": "2"})


@pytest.fixture(scope="session")
def phantoms():
    """The functions and constants of data/phantoms/prepare.py."""
    return runpy.run_path(str(REPOSITORY / "data" / "phantoms" / "prepare.py"))


@pytest.fixture
def film():
    """Write a random smooth film, 60 x 40 of any dtype, to a path; returns its pixels."""

    def write(path, top=255, dtype=np.uint8, channels=1, seed=0):
        rng = np.random.default_rng(seed)
        pixels = cv2.resize(rng.random((6, 4, channels)), (40, 60)).reshape(60, 40, channels)
        pixels = (pixels / pixels.max() * top).astype(dtype)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), pixels)
        return pixels

    return write
