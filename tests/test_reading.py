"""One film from file to 224 x 224: formats, DICOM against pydicom, bit depth, crop, bad files and the cache."""
import contextlib
import itertools
import os
import runpy
import shutil
import struct
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import REPOSITORY, write_dicom
from PIL import Image
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from data import UserError, dicom, duplicates, reading

import cv2  # isort: skip  # after data.reading, which sets its environment

TISSUE = cv2.resize(np.random.default_rng(0).random((6, 4)), (200, 300), interpolation=cv2.INTER_LINEAR)
TISSUE = (TISSUE * 4000).astype(np.uint16)  # a smooth film of 12 bits
RAMP = np.arange(224 * 224).reshape(224, 224) * 4096 // 224**2  # every value of 12 bits
SQUARES = np.linspace(0, 1, 4096) ** 2


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("films").mkdir()


def read(crop=None, boxes=None, module=reading):
    """Read the folder films: (films indexed by path, images by path, fingerprints); boxes: lesion_box by path."""
    paths = sorted(path.name for path in Path("films").iterdir())
    films = pd.DataFrame({"path": paths, "lesion_box": [(boxes or {}).get(path, "") for path in paths]})
    films, images, fingerprints = module.read_films(films, Path("films"), crop, Path("out"))
    return films.set_index("path"), dict(zip(paths, images, strict=True)), fingerprints


def save(path, pixels):
    assert cv2.imwrite(str(path), pixels)
    return Path(path)


def shrink(grey):
    """What a reader has to make of a film in grey values of 0 to 255, within rounding."""
    return cv2.resize(grey.astype(np.float32), (224, 224), interpolation=cv2.INTER_AREA)


def spoil(*paths):
    """Make films unreadable and leave their size and time of change: they can come from a cache only."""
    for path in paths:
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# ---- formats and bit depth ---------------------------------------------------------------------
@pytest.mark.parametrize(("suffix", "top", "channels", "words", "tolerance"), [
    (".png", 255, 1, "8 bit PNG, grey", 0.75), (".bmp", 255, 1, "8 bit BMP, grey", 0.75),
    (".tif", 255, 1, "8 bit TIFF, grey", 0.75), (".tiff", 255, 1, "8 bit TIFF, grey", 0.75),
    (".pgm", 255, 1, "8 bit PNM, grey", 0.75), (".jpg", 255, 1, "8 bit JPEG, grey", 12),
    (".png", 1023, 1, "16 bit PNG, grey", 1), (".png", 4095, 1, "16 bit PNG, grey", 1),
    (".tif", 16383, 1, "16 bit TIFF, grey", 1), (".pgm", 65535, 1, "16 bit PNM, grey", 1),
    (".png", 255, 3, "8 bit PNG, colour", 1.5), (".png", 65535, 3, "16 bit PNG, colour", 1.5),
    (".png", 255, 4, "8 bit PNG, colour", 2), (".png", 65535, 4, "16 bit PNG, colour", 2),
])
def test_formats_are_scaled_by_the_depth_in_use(film, suffix, top, channels, words, tolerance):
    path = Path(f"film{suffix}")
    pixels = film(path, top=top, dtype=np.uint8 if top == 255 else np.uint16, channels=channels) / top * 255
    image, row = reading.read_image(path)
    assert (image.shape, image.dtype) == ((224, 224), np.uint8)
    luminance = pixels[..., :3] @ [0.114, 0.587, 0.299] if channels > 1 else pixels[..., 0]
    opaque = pixels[..., 3] / 255 if channels == 4 else 1  # what is transparent is black
    assert np.abs(image - shrink(luminance * opaque)).max() <= tolerance
    assert (row["format"], row["container"], 2 ** row["depth"] - 1) == (words, words.split(",")[0], top)
    assert [row[name] for name in ("left", "top", "width", "height")] == [0, 0, 40, 60]


def test_each_container_has_the_depth_of_its_films_but_hot_pixels_whenever_that_is_known(caplog):
    caplog.set_level("INFO", logger="mammograms")
    save("films/dark.png", TISSUE // 8)
    alone, _, _ = read()
    assert alone["depth"].tolist() == [10], "all that is known yet"
    hot, eight = TISSUE.copy(), (TISSUE // 16).astype(np.uint8)
    hot[150, 100] = 65535
    for name, pixels in (("full.png", TISSUE), ("hot.png", hot), ("s.tif", TISSUE * 16), ("t.bmp", eight)):
        save(f"films/{name}", pixels)
    films, images, fingerprints = read()
    assert films["depth"].tolist() == [12, 12, 12, 16, 8]
    assert "1 films are 16 bit PNG, read with 12 bits, of which they use 10" in caplog.text
    same = films[:1].eq(alone).iloc[0]
    assert same["film_sha256"] and not same["image_sha256"]
    whole = cv2.resize(TISSUE, (224, 224), interpolation=cv2.INTER_AREA)
    assert np.array_equal(fingerprints[1], [duplicates.fingerprint(whole, (300, 200)),
                                            duplicates.fingerprint(whole, (1, 1))])
    assert min(np.vdot(fingerprints[1, 1], other[1]).real for other in fingerprints) > 0.95, "of norm 1"
    for path, image in images.items():
        white = 4095 * 8 if path == "dark.png" else 4095
        assert (np.abs(image - shrink(TISSUE / white * 255)) > 2).sum() <= 4, "the hot pixel and its neighbours"
        depths = dict(zip(films["container"], films["depth"], strict=True))
        expected, row = reading.read_image(Path("films") / path, depths=depths)
        assert np.array_equal(image, expected), "a single film is read as in its collection"
        assert {name: films[name][path] for name in row} == row


# ---- DICOM -------------------------------------------------------------------------------------
def make_lut(values, first, bits):
    """A sequence of one lookup table that maps `first` and what follows to int values of `bits`."""
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [len(values), first, bits], np.rint(values).astype("<u2").tobytes()
    return [table]


@pytest.mark.filterwarnings("ignore:Applying a VOI LUT on a float")
@pytest.mark.parametrize("voi", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID", "LUT"])
@pytest.mark.parametrize("slope", [None, 2, -0.5, "LUT"])
def test_dicom_is_shown_as_pydicom_shows_it(slope, voi):
    """The result is an increasing affine function of what pydicom shows: tables and window, then MONOCHROME1."""
    for photometric, signed in itertools.product(["MONOCHROME1", "MONOCHROME2"], [False, True]):
        pixels, tags = RAMP - 2048 * signed, {"PhotometricInterpretation": photometric}
        if slope == "LUT":
            tags["ModalityLUTSequence"] = make_lut(65535 * SQUARES, -2048 * signed, 16)
        elif slope:
            tags |= {"RescaleSlope": slope, "RescaleIntercept": -(slope * pixels).min()}
        if voi == "LUT":  # it goes before the window
            tags["VOILUTSequence"] = make_lut(1023 * SQUARES[:3000], 100, 10)
        if voi:
            tags |= {"WindowCenter": [1200, 1], "WindowWidth": [1801, 2], "VOILUTFunction": voi}
        image, row = reading.read_image(write_dicom("film.dcm", pixels, **tags))
        data = pydicom.dcmread("film.dcm")
        levels = apply_modality_lut(data.pixel_array, data)
        data.RescaleSlope, data.RescaleIntercept = 1, 0  # in apply_windowing a negative slope inverts the film
        expected = apply_voi_lut(levels, data).astype(float).ravel() * (-1 if photometric == "MONOCHROME1" else 1)
        gain, offset = np.polyfit(expected, image.ravel(), 1)
        assert gain * np.ptp(expected) > 50
        assert np.abs(gain * expected + offset - image.ravel()).max() < 1
        suffix = " with LUT" if "LUT" in (slope, voi) else " with window" if voi else ""
        assert row["format"] == f"12 bit DICOM{suffix}, {photometric}"


@pytest.mark.parametrize(("pixels", "bits", "tags", "expected"), [
    *((RAMP * (2**bits - 1) // 4095, bits, {}, RAMP / 4095) for bits in (8, 10, 12, 14, 16)),
    (RAMP, 16, {}, RAMP / 4095),  # 12 bits that call themselves 16
    (RAMP, 16, {"PhotometricInterpretation": "MONOCHROME1"}, 1 - RAMP / 4095),
    (RAMP // 16, 12, {}, RAMP // 16 / 4095),  # dark, but it states its depth
    (RAMP // 16, 12, {"PhotometricInterpretation": "MONOCHROME1"}, 1 - RAMP // 16 / 4095),
    (RAMP - 2048, 16, {}, RAMP / 4095),
    (2000 + RAMP // 2, 16, {"PixelRepresentation": 1}, (2000 + RAMP // 2) / 4095),
    (RAMP, 12, {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": [3000, 1], "WindowWidth": [1001, 2]},
     np.clip((2 * RAMP - 3099.5) / 1000 + 0.5, 0, 1)),  # DICOM PS3.3 C.11.2.1.2.1
    (RAMP, 12, {"VOILUTSequence": make_lut(255 * SQUARES, 0, 8)}, SQUARES[RAMP]),
    (RAMP, 12, {"ModalityLUTSequence": make_lut(65535 * SQUARES, 0, 16)}, SQUARES[RAMP]),
])
def test_dicom_is_scaled_by_its_bits_window_or_table(pixels, bits, tags, expected):
    image, _ = reading.read_image(write_dicom("film.dcm", pixels, bits, **tags))
    assert np.abs(image / 255 - expected).max() < 0.004


def test_compressed_dicom_of_any_name_is_read_or_asks_for_its_decoder(monkeypatch):
    expected, _ = reading.read_image(write_dicom("1.2.840", RAMP))
    for name, syntax in (("a.DICOM", pydicom.uid.RLELossless), ("IM0001", pydicom.uid.JPEG2000Lossless)):
        path = write_dicom(name, RAMP, syntax=syntax)
        assert np.array_equal(reading.read_image(path)[0], expected)
    monkeypatch.setattr(pydicom.pixels.get_decoder(syntax), "_available", {})
    with pytest.raises(UserError, match=r"^Unable to decompress 'JPEG 2000.* missing dependencies: .*requires"):
        reading.read_image(path)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    with pytest.raises(UserError, match=r"^DICOM files need one more package: pip install pydicom$"):
        reading.read_image(path)


def test_negative_films_of_16_bits_keep_one_grey_scale_whatever_their_air_is():
    """The tissue of 1,000 to 3,000 has no known white: what is black is the air of each film."""
    for air in (4000, 5000):
        pixels = np.where(RAMP < 2048, 1000 + RAMP * 2000 // 2048, air)
        write_dicom(f"films/{air}.dcm", pixels, 16, PhotometricInterpretation="MONOCHROME1")
    films, images, _ = read()
    for air in (4000, 5000):
        expected = (air - 1000 - np.arange(2048) * 2000 // 2048) / 4095 * 255
        assert np.abs(images[f"{air}.dcm"][RAMP < 2048] - expected[RAMP[RAMP < 2048]]).max() <= 1
        assert (images[f"{air}.dcm"][RAMP >= 2048] == 0).all()
    assert films["depth"].eq(12).all()


@pytest.mark.parametrize(("tags", "words"), [
    ({"PixelData": None, "SOPClassUID": pydicom.uid.MammographyCADSRStorage}, "without an image .Mammography"),
    ({"NumberOfFrames": 50, "SOPClassUID": pydicom.uid.BreastTomosynthesisImageStorage}, "Tomo.* 50 frames"),
    ({"PhotometricInterpretation": "PALETTE COLOR", "SOPClassUID": pydicom.uid.MRImageStorage}, "MR.* PALETTE"),
    ({"BitsStored": 32}, "32 bits: no single film in grey$"), ({"Rows": 640}, "."),
    ({"Rows": 9000, "Columns": 9000}, "9000 x 9000 pix"), ({"WindowCenter": 5, "WindowWidth": 0}, "Window Width"),
    ({"RescaleSlope": 0, "RescaleIntercept": 5, "WindowCenter": 5, "WindowWidth": 9}, "its pixels are equal"),
])
def test_what_is_no_single_grey_image_is_refused_by_name(tags, words):
    with pytest.raises(UserError, match=words):
        reading.read_image(write_dicom("film.dcm", RAMP, **tags))


def test_no_identifying_tag_reaches_the_table_or_a_file(capsys, caplog):
    content = write_dicom("films/a.dcm", RAMP).read_bytes()
    Path("films/bad.dcm").write_bytes(content[:2000])
    with pytest.raises(UserError) as caught:
        read()
    Path("films/bad.dcm").unlink()
    shown = capsys.readouterr().out + caplog.text + str(caught.value) + read()[0].to_csv()
    written = [path.read_bytes() for path in Path("out").rglob("*") if path.is_file()]
    for secret in (b"Secret", b"H-4711", b"1961"):
        assert secret in content and secret not in b"".join([shown.encode(), *written])


# ---- crop --------------------------------------------------------------------------------------
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


def cut_out(film, row):
    """The part of a film that a crop box tells, black beyond it: (224, 224)."""
    left, top, side, height = (row[name] for name in ("left", "top", "width", "height"))
    assert side == height
    part = np.pad(film, side)[top + side : top + 2 * side, left + side : left + 2 * side]
    return cv2.resize(part, (224, 224), interpolation=cv2.INTER_AREA if side > 224 else cv2.INTER_LINEAR)


@pytest.mark.parametrize(("shape", "depth", "dtype"), [((300, 200), 8, np.uint8), ((600, 400), 16, np.uint16),
                                                       ((700, 900), 12, np.uint16)])
@pytest.mark.parametrize("turns", range(4))
def test_breast_without_label_tape_border_and_hot_pixels(shape, depth, dtype, turns):
    film, breast = (np.rot90(array, turns).copy() for array in draw_film(shape, 2**depth - 1, dtype))
    white = film == film.max()
    film[::60, ::60] = np.iinfo(dtype).max
    found = reading.find_breast(film, depth).astype(bool)
    assert (found & breast).sum() / (found | breast).sum() > 0.95
    assert found[white].mean() < 0.1, "a pixel of the small film at most"
    image, row = reading.read_image(save("film.png", film), "breast", depths={"16 bit PNG": depth})
    longer = max(np.ptp(np.flatnonzero(breast.any(axis=axis))) for axis in (0, 1))
    assert row["width"] == pytest.approx(longer, rel=0.05)
    expected = cut_out(film.clip(max=2**depth - 1) / (2**depth - 1) * 255 * found, row)
    assert np.corrcoef(image.ravel(), expected.ravel())[0, 1] > 0.99, "it is there in the film, in its shape"
    assert (image == 0).mean() > 0.1, "on black"


def test_bright_tissue_and_films_that_are_full_of_tissue_stay():
    film, _ = draw_film()
    film[film == 255] = 0
    film[250:350, :12] = 240  # brighter than all else, as the pectoral muscle is
    assert reading.find_breast(film, 8)[250:350, :12].all()
    noise = np.random.default_rng(0).integers(100, 200, (300, 200)).astype(np.uint8)
    assert reading.find_breast(noise, 8).mean() > 0.9


@pytest.mark.parametrize(("box", "expected"), [
    ("100:200:40:20", (80, 170, 80)), ("0:0:30:50", (-35, -25, 100)), ("270:350:30:50", (235, 325, 100)),
    ("150:100:20:20|50:120:20:40", (-10, 10, 240)), ("276:76:448:448", (52, -148, 896)),
])
def test_lesions_are_cropped_with_their_surroundings_and_averaged(box, expected):
    film = np.random.default_rng(0).integers(1, 255, (1000, 1000) if "448" in box else (400, 300)).astype(np.uint8)
    image, row = reading.read_image(save("film.png", film), "lesion", box)
    assert (row["left"], row["top"], row["width"]) == expected
    part = cut_out(film, row)
    assert ((image == 0) == (part == 0)).mean() > 0.98, "black beyond the film"
    assert np.corrcoef(image.ravel(), part.ravel())[0, 1] > 0.9


def test_lesions_outside_of_their_film_are_refused_but_for_two_pixels_of_rounding(film):
    film("film.png")
    for box in ("200:10:5:5", "0:0:400:400", "1:1:5:5|30:10:50:5", "40:10:1:1", "10:60:1:1", "39:10:4:1"):
        for crop in ("lesion", "breast", None):
            with pytest.raises(UserError, match=r"^its lesion_box reaches beyond the film of 40 x 60 pixels$"):
                reading.read_image(Path("film.png"), crop, box)
    for box, inside in (("30:20:12:10", "30:20:10:10"), ("20:50:5:12", "20:50:5:10")):
        images = [reading.read_image(Path("film.png"), "lesion", text)[0] for text in (box, inside)]
        assert np.array_equal(*images)


def test_lesion_crop_keeps_films_without_a_box_as_left_out(film):
    film("films/a.png")
    film("films/b.png", seed=1)
    everything, _, expected = read("breast", {"a.png": "5:5:10:10"})
    films, _, fingerprints = read("lesion", {"a.png": "5:5:10:10"})
    assert [*films["left_out"], *everything["left_out"]] == ["", "no lesion_box", "", ""]
    assert np.array_equal(fingerprints, expected), "the split does not depend on CROP"
    assert films["film_sha256"].equals(everything["film_sha256"])
    with pytest.raises(UserError, match="needs a lesion_box"):
        reading.read_image(Path("films/b.png"), "lesion")


# ---- bad and odd files -------------------------------------------------------------------------
def save_as(mode, **options):
    return lambda path, image: Image.fromarray(image).convert(mode).save(path, **options)


def save_negative(path, image):
    """A TIFF of 16 bits whose tag 262, PhotometricInterpretation, is 0; big-endian if the file is called so."""
    order, mark = (">", b"MM") if "big" in path.name else ("<", b"II")
    height, width = image.shape
    values = {256: width, 257: height, 258: 16, 259: 1, 262: 0, 273: 8, 277: 1, 278: height, 279: 2 * image.size}
    tags = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    header = struct.pack(f"{order}2sHI", mark, 42, 8 + 2 * image.size)
    pixels, count = image.astype(f"{order}u2").tobytes(), struct.pack(f"{order}H", len(values))
    path.write_bytes(header + pixels + count + tags + bytes(4))


BAD = {  # by the name of the file: how it is written, and its sentence
    "text.dcm": (lambda path, image: path.write_text("film"), "'DICM' prefix is missing"),
    "bomb.png": (lambda path, image: Image.new("1", (8200, 8200)).save(path), "empty, cut off or too large"),
    "tiny.png": (lambda path, image: save(path, image[:1, :1]), "1 x 1 pixels, too small"),
    "black.png": (lambda path, image: save(path, image * 0), "all its pixels are equal"),
    "float.tif": (lambda path, image: save(path, image.astype(np.float32)), "its pixels are float32"),
    "cmyk.tif": (save_as("CMYK"), "four channels, which may be CMYK"),
    **{name: (save_negative, "in which 0 is white") for name in ("negative.tif", "big-endian negative.tif")},
    "pages.tif": (save_as("L", save_all=True, append_images=[Image.new("L", (40, 60))] * 2), "a TIFF of 3 pages"),
    "nowhere.png": (lambda path, image: path.symlink_to("nothing.png"), "a link that leads nowhere"),
    "pipe.png": (lambda path, image: os.mkfifo(path), "no file"),
    **{f"half.{suffix}": (lambda path, image: cv2.imencode(path.suffix, image)[1][:-300].tofile(path), "cut off")
       for suffix in ("png", "jpg", "tif")},
    **{f"{name}\n.png": (lambda path, image: path.write_text(""), "not an image") for name in range(10)},
}
GOOD = {  # readable, if odd: how it is written, and how far grey values may be off
    "cmyk.jpg": (save_as("CMYK", quality=95), 6), "palette.png": (save_as("P"), 1),
    "palette.bmp": (save_as("P"), 1), "alpha.png": (save_as("LA"), 1), "png.bmp": (save_as("L", format="PNG"), 1),
    "bit.png": (save_as("1"), 255), "bit.tif": (save_as("1"), 255), "bit.bmp": (save_as("1"), 255),
    "link.png": (lambda path, image: path.symlink_to(save("real.png", image).absolute()), 1),
} | dict.fromkeys(["CAPITALS.PNG", "a 'b' \"c\".png", "a\nb.png", "x" * 246 + ".png",
                   "\N{SMILING FACE WITH SUNGLASSES} a,b.png"], (save_as("L"), 1))


def test_odd_files_are_read_and_bad_ones_have_their_sentence_all_at_once():
    smooth = np.rint(TISSUE[::5, ::5] / TISSUE.max() * 255).astype(np.uint8)
    for name, (write, _) in (BAD | GOOD).items():
        write(Path("films") / name, smooth)
    with pytest.raises(UserError) as caught:
        read()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{len(BAD)} of {len(BAD | GOOD)} films cannot be read; repair or remove them (all")
    assert len(lines) == 21, "twenty of them"
    assert lines[1].startswith(r"  '0\n.png': not an image")
    reasons = pd.read_csv("out/bad_images.csv").set_index("path")["reason"].to_dict()
    assert reasons.keys() == BAD.keys()
    for name, (_, words) in BAD.items():
        assert words in reasons[name]
        Path("films", name).unlink()
    for _ in range(2):  # read, then from the cache
        _, images, _ = read()
        assert not Path("out/bad_images.csv").exists()
        for name, (_, tolerance) in GOOD.items():
            assert np.abs(images[name] - shrink(smooth)).max() <= tolerance
            assert images[name].max() > 240


def test_reading_and_writing_are_told_apart(film, tmp_path):
    """As nobody, since root may read everything."""
    film("films/a.png")
    film("films/b.png")
    Path("films/a.png").chmod(0)
    tmp_path.chmod(0o777)
    user = os.geteuid()
    for parent in () if user else tmp_path.parents[:-2]:
        parent.chmod(parent.stat().st_mode | 1)
    os.seteuid(user or 65534)
    try:
        with pytest.raises(UserError, match=r"1 of 2 films cannot be read(.|\n)* 'a.png': .*Permission denied"):
            read()
        Path("out/.cache").chmod(0o555)
        with pytest.raises(UserError, match=r"^out cannot be written .*Permission denied"):
            read("breast")
    finally:
        os.seteuid(user)


def test_any_mutated_image_is_read_or_refused():
    rng = np.random.default_rng(0)
    samples = [save(f"a.{suffix}", TISSUE[::5, ::5].astype(np.uint8)) for suffix in ("png", "jpg", "tif", "bmp")]
    samples += [write_dicom("film.dcm", RAMP), write_dicom("c.dcm", RAMP, syntax=pydicom.uid.JPEG2000Lossless)]
    for path in samples * 15:
        content = np.fromfile(path, np.uint8)
        places = rng.integers(0, rng.choice([400, len(content)]), rng.integers(1, 8))  # headers are where it hurts
        content[places] = rng.integers(0, 256, len(places))
        changed = path.with_stem("changed")
        content[: rng.choice([len(content), rng.integers(len(content))])].tofile(changed)
        with contextlib.suppress(UserError):
            image, row = reading.read_image(changed, "breast")
            assert (image.shape, image.dtype, row["depth"] <= 16) == ((224, 224), np.uint8, True)


# ---- cache -------------------------------------------------------------------------------------
def find_opened(**arguments):
    """The names of the spoiled films that are not taken from the cache."""
    with contextlib.suppress(UserError):
        read(**arguments)
        return []
    return pd.read_csv("out/bad_images.csv")["path"].tolist()


@pytest.fixture
def collection(film):
    """Six films of 8 bits and two of 12, and their paths."""
    for seed, (suffix, top) in enumerate([*[(".png", 255)] * 6, (".tif", 511), (".tif", 4095)]):
        film(f"films/{seed}{suffix}", seed=seed, top=top, dtype=np.uint8 if top == 255 else np.uint16)
    return sorted(Path("films").iterdir())


def test_the_second_time_nothing_is_opened_unless_the_cache_is_damaged(collection):
    films, images, fingerprints = read()
    for part in (slice(None), slice(0), slice(-1), slice(1000, None)):
        for file in Path("out/.cache").iterdir():
            file.write_bytes(file.read_bytes()[part])
        read()  # it is written again
    spoil(*collection)
    same_films, same_images, same_fingerprints = read()
    assert films.equals(same_films)
    assert np.array_equal(list(images.values()), list(same_images.values()))
    assert np.array_equal(fingerprints, same_fingerprints)


def test_readers_of_different_tables_at_once_get_memory_maps_in_the_order_of_theirs(collection):
    """As when both scripts start together while one has an edited labels.csv."""
    table = pd.DataFrame({"path": [path.name for path in collection], "lesion_box": ""})
    tables = [table.drop(index=n).sample(frac=1, random_state=n).reset_index(drop=True) for n in range(4)] * 3
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda part: reading.read_films(part, Path("films"), None, Path("out")), tables))
    shutil.rmtree("out")  # what is in use stays readable
    for part, (films, images, fingerprints) in zip(tables, results, strict=True):
        assert films["path"].equals(part["path"])
        assert isinstance(images, np.memmap) and isinstance(fingerprints, np.memmap)
        depths = dict(zip(films["container"], films["depth"], strict=True))
        for path, image in zip(films["path"], images, strict=True):
            assert np.array_equal(image, reading.read_image(Path("films") / path, depths=depths)[0])


def test_only_what_changed_is_read_anew(collection, film):
    read()
    spoil(*collection)
    os.utime("films/1.png", ns=(1, 1))
    film("films/2.png", seed=99)
    film("films/9.png", seed=9)
    Path("films/0.png").write_bytes(b"x")
    Path("films/5.png").unlink()
    for _ in range(2):  # good films are kept when others are bad
        assert find_opened() == ["0.png", "1.png"]
        spoil(Path("films/9.png"))
    assert find_opened(boxes={"4.png": "1:1:5:5"}) == ["0.png", "1.png", "4.png"]
    assert len(find_opened(crop="breast")) == 7
    shutil.rmtree("out")
    assert len(find_opened()) == 7


def test_an_interrupted_reading_is_taken_up_again(collection):
    answers = [np.zeros((duplicates.RINGS, duplicates.WAVES), np.complex64)] * 8 + [KeyboardInterrupt] * 8
    with mock.patch.object(duplicates, "fingerprint", side_effect=answers), pytest.raises(KeyboardInterrupt):
        read()
    spoil(*collection)
    assert 0 < len(find_opened()) < 8


@pytest.mark.parametrize(("old", "new", "opened"), [
    ("MIN_SIDE = 32", "MIN_SIDE = 30", 8), ("0.97 * thumb", "0.96 * thumb", 8), ("WAVES = 24", "WAVES = 20", 8),
    ("  # pixels, both ways", "  # another comment\n", 0), ("pydicom", None, 8), ("matplotlib", None, 0),
])
def test_another_way_of_reading_has_another_cache(collection, monkeypatch, old, new, opened):
    read()
    spoil(*collection)
    names = "reading.py", "dicom.py", "duplicates.py"
    sources = {name: (REPOSITORY / "data" / name).read_text("utf-8") for name in names}
    assert not new or "".join(sources.values()).count(old) == 1
    for name, source in sources.items():
        Path(name).write_text(source.replace(old, new or old), "utf-8")
    installed = [*metadata.distributions(), *[types.SimpleNamespace(name=old, version="99.0")] * (not new)]
    monkeypatch.setattr(metadata, "distributions", lambda: installed)
    monkeypatch.setattr(duplicates, "__file__", "duplicates.py")
    monkeypatch.setattr(dicom, "__file__", "dicom.py")
    changed = types.SimpleNamespace(**runpy.run_path("reading.py"))
    assert len(find_opened(module=changed)) == opened
    assert find_opened() == [], "and the old one is still there"
