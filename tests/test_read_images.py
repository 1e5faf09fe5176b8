"""Reading films: formats, DICOM, what CROP keeps, and the cache."""
import base64
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import find
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, MRImageStorage

import common


# ---- formats -----------------------------------------------------------------------------------


def reference(grey):
    """What a reader has to make of an 8-bit grey image, within rounding."""
    return cv2.resize(grey, (common.IMAGE_SIZE, common.IMAGE_SIZE), interpolation=cv2.INTER_AREA).astype(int)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".pgm", ".bmp"])
def test_8_bit_grey(film, tmp_path, suffix):
    pixels = film(tmp_path / f"film{suffix}")
    image, cut, kind, _ = common.read_image(tmp_path / f"film{suffix}")
    assert (image.shape, image.dtype, cut, kind) == ((224, 224), np.uint8, (0, 0, 40, 60), "8 bit grey")
    assert np.array_equal(image, reference(pixels[..., 0]))


def test_jpeg(film, tmp_path):
    pixels = film(tmp_path / "film.jpg")
    assert np.abs(common.read_image(tmp_path / "film.jpg")[0] - reference(pixels[..., 0])).max() <= 12


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
@pytest.mark.parametrize("bits", [12, 14, 16])
def test_more_bits_are_scaled_by_the_depth_in_use(film, tmp_path, suffix, bits):
    pixels = film(tmp_path / f"film{suffix}", top=2**bits - 1, dtype=np.uint16)
    image, _, kind, _ = common.read_image(tmp_path / f"film{suffix}")
    assert kind == ("16 bit grey" if bits == 16 else f"{bits} bit grey in 16")
    assert image.max() > 200, "a film that is read as black"
    eight = (pixels[..., 0] / (2**bits - 1) * 255).astype(np.float32)
    assert np.abs(image - reference(eight)).max() <= 1


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_colour_becomes_its_luminance(film, tmp_path, dtype, top):
    pixels = film(tmp_path / "film.png", top=top, dtype=dtype, channels=3)
    image, _, kind, _ = common.read_image(tmp_path / "film.png")
    blue, green, red = np.moveaxis(pixels / top * 255, -1, 0)
    assert "colour" in kind
    luminance = (0.299 * red + 0.587 * green + 0.114 * blue).astype(np.float32)
    assert np.abs(image - reference(luminance)).max() <= 1.5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_parts_are_black(tmp_path, dtype):
    top = np.iinfo(dtype).max
    pixels = np.full((64, 64, 4), round(200 / 255 * top), dtype)
    pixels[:, :32, 3], pixels[:, 32:, 3] = 0, top
    cv2.imwrite(str(tmp_path / "film.png"), pixels)
    image, _, kind, _ = common.read_image(tmp_path / "film.png")
    assert kind == f"{8 * pixels.itemsize} bit colour with alpha"
    assert image[:, :100].max() == 0
    assert image[:, 124:].min() == 200


def test_all_bad_images_are_listed_at_once_and_before_training(record, film, tmp_path):
    film(tmp_path / "benign" / "good.png")
    film(tmp_path / "malignant" / "good.png")
    (tmp_path / "benign" / "empty.png").write_bytes(b"")
    (tmp_path / "benign" / "text.png").write_text("not a picture")
    cv2.imwrite(str(tmp_path / "malignant" / "black.png"), np.zeros((50, 50), np.uint8))
    cv2.imwrite(str(tmp_path / "malignant" / "float.tif"), np.random.default_rng(0).random((50, 50), np.float32))
    with pytest.raises(common.UserError) as caught:
        common.read_images(record, find(record, tmp_path))
    for words in ("4 of 6 images", "benign/empty.png: an empty file", "benign/text.png: not an image",
                  "malignant/black.png: all its pixels are equal", "malignant/float.tif: its pixels are float32"):
        assert words in str(caught.value)


def test_images_come_in_the_order_of_the_table(record, film, tmp_path):
    for seed, name in enumerate(("benign/b.png", "benign/a.png", "malignant/c.png")):
        film(tmp_path / name, seed=seed)
    table, images, _ = common.read_images(record, find(record, tmp_path))
    assert images.shape == (3, 224, 224)
    assert table[common.CUT].to_numpy().tolist() == [[0, 0, 40, 60]] * 3
    for path, image in zip(table["path"], images, strict=True):
        assert np.array_equal(image, common.read_image(tmp_path / path)[0])


# ---- DICOM -------------------------------------------------------------------------------------

SECRET = "Secret^Person"
# the ramp below as lossless JPEG, by gdcmconv, which pydicom cannot write
RAMP_LOSSLESS = zlib.decompress(base64.b64decode(
    "eNr7f+P/YQZuAQYHBgdGRkGG/0cYxBgYGRkZkAEju8D/WwwcQFGg+KlVqOCCaCgqWKCFqmC1A5qCsAY0I9YyoqmIYkJTsYUVTUUG"
    "16gzRp0x6owh44z6/zcZANTFEOU="
))


@pytest.fixture
def dicom(tmp_path):
    """Write pixels, int (H, W), as a DICOM file of `bits` in 16; tags replace those of the mammogram."""

    def write(name, pixels, bits=12, syntax=pydicom.uid.ExplicitVRLittleEndian, **tags):
        data = pydicom.Dataset()
        data.SOPClassUID = pydicom.uid.DigitalMammographyXRayImageStorageForPresentation
        data.SOPInstanceUID = pydicom.uid.generate_uid()
        data.PatientName, data.PatientBirthDate, data.PatientID = SECRET, "19610203", "H-4711"
        data.InstitutionName, data.Rows, data.Columns = "Secret Hospital", *pixels.shape[:2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
        data.PixelRepresentation = int(pixels.min() < 0)
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
        data.PixelData = pixels.astype(np.int16 if pixels.min() < 0 else np.uint16).tobytes()
        if syntax == JPEG2000Lossless:
            data.compress(syntax)
        elif syntax == JPEGLosslessSV1:
            data.PixelData = pydicom.encaps.encapsulate([RAMP_LOSSLESS])
        data.file_meta.TransferSyntaxUID = syntax
        for tag, value in tags.items():
            if value is None:
                delattr(data, tag)
            else:
                setattr(data, tag, value)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def ramp():
    """Every value of 12 bits, and the grey that each should become."""
    return np.arange(4096).reshape(64, 64), np.arange(4096).reshape(64, 64) / 4095


def shown(path):
    """A DICOM file as shares of its full scale: float (H, W)."""
    grey, depth, _ = common.read_film(path)
    assert grey.dtype == np.uint16
    return grey / (2**depth - 1)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_dicom_is_scaled_by_its_bits(dicom, bits):
    pixels = (np.arange(4096) * (2**bits - 1) // 4095).reshape(64, 64)
    path = dicom("film.dcm", pixels, bits)
    assert np.array_equal(shown(path), pixels / (2**bits - 1))
    assert common.read_film(path)[2] == f"{bits} bit DICOM MONOCHROME2"


def test_12_bits_that_call_themselves_16_are_not_black(dicom, ramp):
    assert np.array_equal(shown(dicom("film.dcm", ramp[0], 16)), ramp[1])


@pytest.mark.parametrize("bits", [12, 16])
def test_monochrome1_is_inverted(dicom, ramp, bits):
    path = dicom("film.dcm", ramp[0], bits, PhotometricInterpretation="MONOCHROME1")
    assert np.allclose(shown(path), 1 - ramp[1])


@pytest.mark.parametrize(("bits", "lowest"), [(12, -2048), (16, -2048), (16, 0)])
def test_signed_pixels_start_at_their_lowest(dicom, ramp, bits, lowest):
    path = dicom("film.dcm", ramp[0] + lowest, bits, PixelRepresentation=1)
    assert np.allclose(shown(path), ramp[1])


def test_a_falling_rescale_slope_turns_the_film_round(dicom, ramp):
    assert np.allclose(shown(dicom("film.dcm", ramp[0], RescaleSlope=-1, RescaleIntercept=4095)), 1 - ramp[1])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_window_is_applied_as_the_standard_says(dicom, ramp, photometric):
    path = dicom("film.dcm", ramp[0], PhotometricInterpretation=photometric, RescaleSlope=2, RescaleIntercept=-100,
                 WindowCenter=[3000, 1], WindowWidth=[1001, 2])
    values = 2.0 * ramp[0] - 100
    expected = np.clip((values - 2999.5) / 1000 + 0.5, 0, 1)  # DICOM PS3.3 C.11.2.1.2.1
    expected = 1 - expected if photometric == "MONOCHROME1" else expected
    assert np.abs(shown(path) - expected).max() < 1e-4
    assert common.read_film(path)[2] == f"12 bit DICOM {photometric} with window"


def test_a_voi_lut_goes_before_the_window(dicom, ramp):
    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.LUTData = np.rint(1023 * np.linspace(0, 1, 4096) ** 2).astype("<u2").tobytes()
    path = dicom("film.dcm", ramp[0], VOILUTSequence=[table], WindowCenter=10, WindowWidth=10)
    assert np.abs(shown(path) - ramp[1] ** 2).max() < 1e-3
    assert "with VOI LUT" in common.read_film(path)[2]


@pytest.mark.parametrize(("syntax", "package"),
                         [(JPEG2000Lossless, "pylibjpeg-openjpeg"), (JPEGLosslessSV1, "pylibjpeg-libjpeg")])
def test_compressed_dicom_is_read_or_names_its_decoder(dicom, ramp, monkeypatch, syntax, package):
    path = dicom("film.dcm", ramp[0], syntax=syntax)
    assert np.array_equal(shown(path), ramp[1])
    monkeypatch.setattr(pydicom.pixels.get_decoder(syntax), "_available", {})
    with pytest.raises(common.UserError, match=rf"compressed as JPEG.*: pip install pylibjpeg {package}$"):
        common.read_film(path)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"PixelData": None, "SOPClassUID": pydicom.uid.MammographyCADSRStorage},
         "without an image .Mammography CAD SR"),
        ({"NumberOfFrames": 50, "SOPClassUID": pydicom.uid.BreastTomosynthesisImageStorage},
         "50 frames .Breast Tomosynthesis"),
        ({"PhotometricInterpretation": "PALETTE COLOR", "SOPClassUID": MRImageStorage},
         "PALETTE COLOR of 12 bits .MR Image"),
        ({"BitsStored": 32}, "32 bits"),
        ({"Rows": 640}, "."),
        ({"WindowCenter": 5, "WindowWidth": 0}, "Window Width"),
    ],
)
def test_what_is_no_single_grey_image_is_refused_by_name(dicom, ramp, tags, words):
    with pytest.raises(common.UserError, match=words):
        common.read_film(dicom("film.dcm", ramp[0], **tags))


def test_a_text_file_called_dcm(tmp_path):
    (tmp_path / "film.dcm").write_text("not a film")
    with pytest.raises(common.UserError, match=r"^not a DICOM file$"):
        common.read_film(tmp_path / "film.dcm")


def test_dicom_files_are_found_whatever_their_names(record, dicom, ramp, tmp_path):
    for name in ("benign/film.dcm", "benign/1.2.840.113", "malignant/IM0001"):
        dicom(name, ramp[0])
    (tmp_path / "benign" / "DICOMDIR.txt").write_text("no film")
    table = find(record, tmp_path)
    assert table["path"].tolist() == ["benign/1.2.840.113", "benign/film.dcm", "malignant/IM0001"]
    assert common.read_images(record, table)[0]["format"].tolist() == ["12 bit DICOM MONOCHROME2"] * 3


def test_dicom_without_pydicom_is_one_sentence(record, dicom, ramp, tmp_path, monkeypatch):
    for name in ("benign/film.dcm", "malignant/film.dcm"):
        dicom(name, ramp[0])
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    with pytest.raises(common.UserError, match=r"^DICOM files need one more package: pip install pydicom$"):
        find(record, tmp_path)


def test_patients_come_from_patient_id_where_nothing_else_names_them(record, dicom, ramp, tmp_path):
    ids = {"benign/a.dcm": "H-4711", "benign/b.dcm": "H-4712", "malignant/c.dcm": "H-4711", "malignant/d.dcm": "",
           "malignant/e.dcm": "Mass-Training_P_00007_LEFT_CC", "malignant/Calc-Test_P_00009_LEFT_CC.dcm": "H-4711"}
    for name, patient in ids.items():
        dicom(name, ramp[0], PatientID=patient)
    table = find(record, tmp_path).set_index("path")["patient_id"]
    assert table["benign/a.dcm"] == table["malignant/c.dcm"] != table["benign/b.dcm"]
    assert table["malignant/d.dcm"] == "malignant/d.dcm"
    assert table["malignant/e.dcm"] == "P_00007"
    assert table["malignant/Calc-Test_P_00009_LEFT_CC.dcm"] == "P_00009"
    assert record["patients_from"] == {"PatientID": 4, "CBIS-DDSM": 1, "nowhere": 1}


def test_a_patient_id_of_the_table_is_known_again_in_the_files(record, dicom, ramp, tmp_path):
    for name in ("L.dcm", "R.dcm", "M.dcm"):
        dicom(name, ramp[0], PatientID="P-17" if name != "M.dcm" else "P-18")
    rows = ("path,label,patient_id", "L.dcm,benign,P-17", "R.dcm,benign,", "M.dcm,malignant,")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    assert find(record, tmp_path).set_index("path")["patient_id"].to_dict() == {
        "L.dcm": "P-17", "R.dcm": "P-17", "M.dcm": "dicom_00001"}


def test_no_identifying_tag_reaches_an_output(record, dicom, ramp, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(12):
        name = f"films/{common.CLASSES[number % 2]}/{number}.dcm"
        dicom(name, rng.permutation(ramp[0]), PatientID=f"H-{4711 + number}")
    films, _, prints = common.read_images(record, find(record, tmp_path / "films"))
    films = common.split_patients(record, common.group_copies(record, films, prints), 0, 0)
    films.to_csv(common.locate(record["constants"]["OUTPUT_DIR"]) / "split.csv")
    common.save_json(record, common.locate(record["constants"]["OUTPUT_DIR"]) / "settings.json")
    written = [path for path in common.locate(record["constants"]["OUTPUT_DIR"]).rglob("*") if path.is_file()]
    assert len(written) == 3, "table, settings and cache"
    for content in (capsys.readouterr().out.encode(), *(path.read_bytes() for path in written)):
        for secret in (b"Secret", b"H-47", b"1961"):
            assert secret not in content


# ---- what CROP keeps ---------------------------------------------------------------------------


def draw_film(shape=(600, 400), top=255, dtype=np.uint8):
    """A breast at the left edge with a label, a strip of tape and a white border; and its mask."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] / np.array(shape)[:, None, None]
    breast = np.hypot((rows - 0.5) / 0.4, columns / 0.6) < 1
    film = np.where(breast, 0.45 + 0.2 * np.sin(9 * rows) * np.cos(7 * columns), 0.02)
    film[(rows < 0.1) & (columns > 0.7) & (columns < 0.9)] = 0.9  # a label
    film[(rows > 0.95) & (columns > 0.1)] = 0.5  # tape
    film[:, -round(0.02 * shape[1]) :] = 1  # a border on the far side
    film[:, : round(0.02 * shape[1])] = 1  # and one that touches the breast
    return (film * top).astype(dtype), breast & (columns >= 0.02)


@pytest.mark.parametrize(("top", "dtype"), [(255, np.uint8), (4095, np.uint16), (65535, np.uint16)])
@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("shape", [(300, 200), (600, 400), (1500, 1200)])
def test_breast_without_label_tape_and_border(top, dtype, turns, shape):
    film, breast = (np.ascontiguousarray(np.rot90(a, turns)) for a in draw_film(shape, top, dtype))
    found = common.find_breast(film, common.guess_depth(film)).astype(bool)
    assert found.shape == film.shape
    assert (found & breast).sum() / (found | breast).sum() > 0.95
    assert found[film == film.max()].mean() < 0.1, "a pixel of the small film at most"


def test_bright_tissue_at_the_edge_of_a_film_without_borders_stays():
    film, _ = draw_film()
    film[film == 255] = 0
    film[250:350, :12] = 240  # brighter than all else, as the pectoral muscle is
    assert common.find_breast(film, 8)[250:350, :12].all()


def test_breast_of_an_even_or_a_full_film_is_all_of_it():
    film = np.full((300, 200), 100, np.uint8)
    film[150, 100] = 101
    assert common.find_breast(film, 8).mean() > 0.97
    noise = np.random.default_rng(0).integers(100, 200, (300, 200)).astype(np.uint8)
    assert common.find_breast(noise, 8).mean() > 0.9


@pytest.mark.parametrize("shape", [(600, 400), (400, 600), (100, 90), (3000, 2000)])
def test_crop_keeps_the_shape_of_the_breast_on_black(tmp_path, shape):
    film, breast = draw_film(shape)
    cv2.imwrite(str(tmp_path / "film.png"), film)
    image, (_, _, width, height), _, _ = common.read_image(tmp_path / "film.png", "breast")
    assert width == height
    rows, columns = (np.flatnonzero(breast.any(axis=axis)) for axis in (1, 0))
    assert width == pytest.approx(max(np.ptp(rows), np.ptp(columns)), rel=0.05)
    lit = image > 10
    shown = np.ptp(np.flatnonzero(lit.any(axis=1))) / np.ptp(np.flatnonzero(lit.any(axis=0)))
    assert shown == pytest.approx(np.ptp(rows) / np.ptp(columns), rel=0.05)
    assert max(np.ptp(np.flatnonzero(lit.any(axis=axis))) for axis in (0, 1)) >= 215
    assert (image == 0).mean() > 0.1


@pytest.mark.parametrize("crop", ["breast", "lesion", None])
@pytest.mark.parametrize("shape", [(300, 200), (900, 1200)])
def test_boxes_follow_what_is_cut_out(record, tmp_path, crop, shape):
    film, _ = draw_film(shape)
    y, x = (round(0.4 * shape[0]), round(0.2 * shape[1]))
    height, width = (round(0.15 * side) for side in shape)
    film[film > 200] = 100
    film[y : y + height, x : x + width] = 255
    (tmp_path / "films").mkdir()
    rows = []
    for label in common.CLASSES:
        cv2.imwrite(str(tmp_path / "films" / f"{label}.png"), film)
        rows.append((f"{label}.png", label, f"{x}:{y}:{width}:{height}"))
    table = pd.DataFrame(rows, columns=["path", "label", "lesion_box"])
    table.to_csv(tmp_path / "films" / "labels.csv", index=False)
    record["constants"]["CROP"] = crop
    films, images, _ = common.read_images(record, find(record, tmp_path / "films"))
    (box,) = common.place_boxes(films.loc[0])
    lesion = images[0] > 200
    rows, columns = (np.flatnonzero(lesion.any(axis=axis)) for axis in (1, 0))
    seen = np.array([columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1])
    assert np.abs(box * 224 - seen).max() <= 2.5


@pytest.mark.parametrize(("box", "side"),
                         [("100:200:40:20", 80), ("0:0:30:50", 100), ("150:100:20:20|50:120:20:40", 240)])
def test_lesions_are_cut_out_with_their_surroundings(tmp_path, box, side):
    film = np.random.default_rng(0).integers(1, 255, (400, 300)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "film.png"), film)
    image, (left, top, width, height), _, _ = common.read_image(tmp_path / "film.png", "lesion", box)
    assert (width, height) == (side, side)
    for x, y, w, h in common.read_boxes(box):
        assert left <= x - side / 8 + 1 and x + w + side / 8 - 1 <= left + side
        assert top <= y - side / 8 + 1 and y + h + side / 8 - 1 <= top + side
    padded = np.pad(film, side)[top + side : top + 2 * side, left + side : left + 2 * side]
    how = cv2.INTER_AREA if side > 224 else cv2.INTER_LINEAR
    assert np.abs(cv2.resize(padded, (224, 224), interpolation=how).astype(int) - image)[8:-8, 8:-8].mean() < 25


def test_a_lesion_outside_of_its_film_is_bad_input(tmp_path, film):
    film(tmp_path / "film.png")
    for crop in ("lesion", "breast", None):
        for box in ("200:10:5:5", "0:0:400:400", "1:1:5:5|30:10:50:5"):
            with pytest.raises(common.UserError, match="its lesion_box reaches beyond the film of 40 x 60 pixels"):
                common.read_image(tmp_path / "film.png", crop, box)


def test_lesion_crop_needs_boxes_and_says_who_has_none(record, film, tmp_path):
    record["constants"]["CROP"] = "lesion"
    for name in "abcd":
        film(tmp_path / f"{name}.png", seed=ord(name))
    table = "path,label,lesion_box\na.png,benign,{0}\nb.png,benign,\nc.png,malignant,{0}\nd.png,malignant,\n"
    (tmp_path / "labels.csv").write_text(table.format("5:5:10:10"))
    assert common.read_images(record, find(record, tmp_path))[0]["path"].tolist() == ["a.png", "c.png"]
    assert record["without_box"] == ["b.png", "d.png"]
    (tmp_path / "labels.csv").write_text(table.format(""))
    with pytest.raises(common.UserError, match=r'^CROP is "lesion", but no images of both classes have'):
        common.read_images(record, find(record, tmp_path))


# ---- cache -------------------------------------------------------------------------------------


@pytest.fixture
def collection(record, film, tmp_path):
    """A folder of 6 films, and a function that reads it and tells which films were opened for that."""
    for seed in range(6):
        film(tmp_path / common.CLASSES[seed % 2] / f"{seed}.png", seed=seed)

    def read(monkeypatch):
        opened = []
        reading = common.read_image
        with monkeypatch.context() as patch:
            patch.setattr(common, "read_image", lambda path, *how: opened.append(path.name) or reading(path, *how))
            found = common.read_images(record, find(record, tmp_path))
        return sorted(opened), *found

    return read


def test_the_second_time_nothing_is_opened_and_the_bytes_are_the_same(collection, monkeypatch):
    opened, films, images, prints = collection(monkeypatch)
    assert opened == [f"{n}.png" for n in range(6)]
    again, same_films, same_images, same_prints = collection(monkeypatch)
    assert again == []
    assert films.equals(same_films)
    assert np.array_equal(images, same_images)
    assert np.array_equal(prints, same_prints)
    assert isinstance(images.base, np.memmap) or isinstance(images, np.memmap)


def test_only_what_changed_is_read_anew(collection, film, monkeypatch, tmp_path):
    _, before, images, _ = collection(monkeypatch)
    images = np.array(images)
    film(tmp_path / "benign" / "2.png", seed=99)
    film(tmp_path / "benign" / "7.png", seed=7)
    (tmp_path / "malignant" / "5.png").unlink()
    os.utime(tmp_path / "malignant" / "1.png", ns=(1, 1))
    opened, films, changed, _ = collection(monkeypatch)
    assert opened == ["1.png", "2.png", "7.png"]
    for path, image, digest in zip(films["path"], changed, films["sha256"], strict=True):
        assert np.array_equal(image, common.read_image(tmp_path / path)[0])
        old = before.index[before["path"] == path]
        if len(old):
            same = "2.png" not in path
            assert (digest == before["sha256"][old[0]]) == np.array_equal(image, images[old[0]]) == same


@pytest.mark.parametrize(
    "change",
    [lambda record, patch: record["constants"].update(CROP="breast"),
     lambda record, patch: patch.setattr(common, "RINGS", common.RINGS),
     lambda record, patch: patch.setattr(common, "THUMB", 200),
     lambda record, patch: patch.setattr(common, "SOURCE", common.SOURCE.replace("0.97 * thumb", "0.9 * thumb")),
     lambda record, patch: patch.setattr(common, "SOURCE", common.SOURCE.replace("2000  # of", "100  # of")),
     lambda record, patch: record["versions"].update(pydicom="0.1")],
    ids=["CROP", "nothing", "THUMB", "code", "nothing that reads", "release"],
)
def test_another_way_of_reading_is_another_cache(collection, record, monkeypatch, change, request):
    collection(monkeypatch)
    change(record, monkeypatch)
    assert len(collection(monkeypatch)[0]) == (0 if "nothing" in request.node.name else 6)


def test_a_deleted_cache_is_made_again_and_one_in_use_stays_readable(collection, record, monkeypatch):
    _, _, images, _ = collection(monkeypatch)
    (cache,) = (common.locate(record["constants"]["OUTPUT_DIR"]) / ".cache").iterdir()
    cache.unlink()
    assert len(collection(monkeypatch)[0]) == 6
    assert np.array(images).any()


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: content[9:],
                                    lambda content: content[:-8] + b"\xff" * 8])
def test_a_damaged_cache_is_made_again(collection, record, monkeypatch, damage):
    _, _, images, _ = collection(monkeypatch)
    images = np.array(images)
    (cache,) = (common.locate(record["constants"]["OUTPUT_DIR"]) / ".cache").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    opened, _, again, _ = collection(monkeypatch)
    assert len(opened) == 6
    assert np.array_equal(images, again)


def test_good_films_are_kept_when_others_are_bad(collection, monkeypatch, film, tmp_path):
    (tmp_path / "benign" / "bad.png").write_text("no film")
    with pytest.raises(common.UserError, match=r"1 of 7 images(.|\n)*\n  benign/bad.png: not an image"):
        collection(monkeypatch)
    film(tmp_path / "benign" / "bad.png", seed=50)
    assert collection(monkeypatch)[0] == ["bad.png"]


def test_an_interrupted_reading_leaves_no_cache(collection, record, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "fingerprint", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collection(monkeypatch)
    assert list((common.locate(record["constants"]["OUTPUT_DIR"]) / ".cache").iterdir()) == []
    assert len(collection(monkeypatch)[0]) == 6


def test_two_readers_of_different_tables_at_once_both_get_theirs(record, film, tmp_path):
    """As when both scripts start together while one has an edited labels.csv."""
    for seed in range(8):
        film(tmp_path / common.CLASSES[seed % 2] / f"{seed}.png", seed=seed)
    table = find(record, tmp_path)
    tables = [table[table["path"].str[-5] != str(n)].reset_index(drop=True) for n in range(4)] * 3

    def read(part):
        time.sleep(0.001 * len(part))
        films, images, _ = common.read_images(record | {"seconds": {}, "console": []}, part)
        digests = [common.hashlib.sha256(image).hexdigest() for image in images]
        return digests == films["sha256"].tolist(), films["path"]

    with ThreadPoolExecutor(6) as pool:
        for part, (right, paths) in zip(tables, pool.map(read, tables), strict=True):
            assert right
            assert paths.tolist() == part["path"].tolist()
