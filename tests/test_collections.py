"""From a download of each collection, in each of its forms, to the first batch."""
import runpy

import numpy as np
import pytest
from conftest import REPOSITORY
from test_cbis_ddsm import make_cbis
from test_mini_mias import make_mias
from tiny import common, prepare

FORMS = [
    ("mini_mias", "archive", "breast"), ("mini_mias", "folder", "lesion"), ("mini_mias", "folder", None),
    ("cbis_ddsm", "tcia classic", "films"), ("cbis_ddsm", "tcia descriptive", "crops"),
    ("cbis_ddsm", "kaggle", "films"), ("cbis_ddsm", "kaggle", "crops"),
]


def prepare_collection(collection, form, part, folder):
    """Make a small download and its labels.csv in `folder`; returns what to set DATA_DIR and CROP to."""
    script = runpy.run_path(str(REPOSITORY / "data" / collection / "prepare.py"))
    (folder / "data").mkdir()
    if collection == "mini_mias":
        script["prepare"](make_mias(folder / "download", form), folder / "data")
        return folder / "data", part
    make_cbis(folder / "download", form)
    script["main"](folder / "download", part == "crops", folder / "data")
    return folder / "data", "breast" if part == "films" else None


@pytest.mark.parametrize(("collection", "form", "part"), FORMS)
def test_from_download_to_first_batch(tmp_path, collection, form, part):
    data, crop = prepare_collection(collection, form, part, tmp_path)
    settings = prepare(tmp_path / "outputs", CROP=crop)
    films = common.find_films(data)
    assert set(films["patient_from"]) == {"labels.csv"}
    given = "" not in set(films["split"])
    assert given == (collection == "cbis_ddsm"), "which brings its own split"
    films, images, fingerprints = common.read_films(films, data, crop, settings.OUTPUT_DIR)
    films = common.group_duplicates(films, fingerprints)
    films = common.split_patients(films, 0, 0)
    assert films.loc[films["split"] != "left out"].groupby("group")["split"].nunique().max() == 1
    for batch, labels in (batches[0] for batches in common.make_datasets(images, films, settings)):
        assert batch.shape[1:] == (224, 224, 3)
        assert len(batch) == len(labels) > 1
        assert min(np.std(image) for image in batch) > 5, "none is black"
