"""From a download of each collection, in each of its forms, to the first batch."""
import runpy

import numpy as np
import pytest
from conftest import REPOSITORY
from test_cbis_ddsm import make_cbis
from test_mini_mias import make_mias

import common

FORMS = [("mini_mias", form, crop) for form in ("folder", "archive") for crop in ("breast", "lesion", None)]
FORMS += [("cbis_ddsm", form, what) for what in ("films", "crops")
          for form in ("tcia classic", "tcia descriptive", "kaggle", "kaggle without dicom_info")]


def prepare_collection(collection, form, what, folder):
    """Make a small download and its labels.csv in `folder`; returns what to set DATA_DIR and CROP to."""
    script = runpy.run_path(str(REPOSITORY / "data" / collection / "prepare.py"))
    (folder / "data").mkdir()
    if collection == "mini_mias":
        script["prepare"](make_mias(folder / "download", form), folder / "data")
        return folder / "data", what
    make_cbis(folder / "download", form)
    script["main"](folder / "download", what == "crops", folder / "data")
    return folder / "data", "breast" if what == "films" else None


@pytest.mark.parametrize(("collection", "form", "what"), FORMS)
def test_from_download_to_first_batch(record, tmp_path, collection, form, what):
    data, crop = prepare_collection(collection, form, what, tmp_path)
    record["constants"] |= {"DATA_DIR": str(data), "CROP": crop}
    films, images, prints = common.read_images(record, common.find_images(record, str(data)))
    assert set(record["patients_from"]) == {"labels.csv"}
    films = common.split_patients(record, common.group_copies(record, films, prints), 0, 0)
    training, validation, _ = common.feed(record, images, films, 1, 13, 0)
    for batch, labels, *_ in (next(iter(training(0))), next(iter(validation))):
        assert batch.shape[1:] == (224, 224, 3)
        assert len(batch) == len(labels) > 1
        assert float(np.std(batch)) > 5, "not black"
    assert record["split"]["how"].startswith("fold 0" if collection == "mini_mias" else "as the data brings it")
