"""One film from file to 224 x 224: formats, depth, crop, bad files and the cache. DICOM is in test_dicom.py."""
import contextlib
import itertools
import os
import runpy
import shutil
import struct
import types
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import REPOSITORY, as_nobody, write_dicom
from PIL import Image, PngImagePlugin

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


def make_table(paths, boxes=()):
    """The table of find_films of these films; boxes: lesion_box by path. Every second film is malignant."""
    labels = np.resize(["benign", "malignant"], len(paths))
    boxes = [dict(boxes).get(path, "") for path in paths]
    return pd.DataFrame({"path": paths, "label": labels, "lesion_box": boxes})


def read(crop=None, boxes=None, module=reading):
    """Read the folder films: (films indexed by path, images by path, fingerprints); boxes: lesion_box by path."""
    paths = sorted(path.name for path in Path("films").iterdir())
    films = make_table(paths, boxes or {})
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


def check_scales(images, expected):
    """Each image, by path, is the film as scaled by these bits: {path: (grey values, bits)}."""
    for path, (grey, bits) in expected.items():
        reference = shrink(grey.clip(max=2**bits - 1) / (2**bits - 1) * 255)
        assert (np.abs(images[path] - reference) > 2).mean() < 0.005, path


def add_label(grey, value=65535, soft=False):
    """A film with a white label, 3 % of it; soft: with edges of all grey values, as after resizing."""
    film = grey.copy()
    film[10:40, 130:190] = value
    if soft:
        film[8:42, 128:192] = cv2.GaussianBlur(film.astype(np.float32), (0, 0), 0.5)[8:42, 128:192]
    return film


def test_films_of_a_container_share_the_depth_of_their_bulk(caplog):
    """No single film, hot pixel, label or padding decides how all others look."""
    caplog.set_level("INFO", logger="mammograms")
    hot, padded = TISSUE.copy(), TISSUE.copy()
    hot[150, 100] = padded[:, 150:] = 65535
    expected = {f"{number:02d}.png": (TISSUE * (number + 1) // 20, 12) for number in range(20)}  # dark ones, too
    expected |= {"hot.png": (hot, 12), "label.png": (add_label(TISSUE), 12), "padded.png": (padded, 12),
                 "soft.png": (add_label(TISSUE, soft=True), 12), "s.tif": (TISSUE * 16, 16)}
    del expected["00.png"]  # which is as dark as the film of another scanner
    for path, (grey, _) in expected.items():
        save(f"films/{path}", grey)
    films, images, _ = read()
    assert films["depth"].tolist() == [bits for _, bits in dict(sorted(expected.items())).values()]
    check_scales(images, expected)
    assert "23 mammograms: 16 bit PNG, 12 bits in use" in caplog.text
    assert caplog.text.count("WARNING") == 1
    assert "1 of 24 mammograms are largely white: they may be inverted, or have a white border: 'padded" \
        in caplog.text

    known = dict(zip(films["container"], films["depth"], strict=True))
    for path in ("01.png", "label.png"):
        image, row = reading.read_image(Path("films", path), depths=known)
        assert np.array_equal(image, images[path]), "a single film is read as in its collection"
        assert {name: films[name][path] for name in row if name in films} == {
            name: value for name, value in row.items() if name in films}
    films, images, _ = reading.read_films(make_table(["01.png", "s.tif"]), Path("films"), None, Path("out"), known)
    assert films["depth"].tolist() == [12, 16], "the depths of a run count"


def test_a_few_deep_films_do_not_decide_how_a_model_sees_new_ones():
    expected = {f"a{number:02d}.png": (TISSUE * 4, 14) for number in range(20)} | {"b.png": (TISSUE * 16, 16)}
    for path, (grey, _) in expected.items():
        save(f"films/{path}", grey)
    films, images, _ = read()
    check_scales(images, expected)
    recorded = reading.find_common_depths(films)
    for path in expected:
        assert np.array_equal(reading.read_image(Path("films", path), depths=recorded)[0], images[path])


def test_films_of_another_scanner_are_scaled_by_their_own_depth_with_a_warning(caplog):
    expected = {f"a{number:02d}.png": (TISSUE, 12) for number in range(20)}
    expected |= {"b.png": (TISSUE * 16, 16), "c.png": (TISSUE // 16, 8)}
    for path, (grey, _) in expected.items():
        save(f"films/{path}", grey)
    _, images, _ = read()
    check_scales(images, expected)
    assert "16 bit PNG mammograms have several bit depths, which may tell the classes apart" in caplog.text
    counts = "1 (1 malignant) by 8 bits, 20 (10 benign, 10 malignant) by 12 bits, 1 (1 benign) by 16 bits"
    assert f"scaled are {counts}\n" in caplog.text
    for path in expected:
        assert np.array_equal(reading.read_image(Path("films", path), depths={"16 bit PNG": 12})[0], images[path])


def test_fingerprints_are_those_of_the_whole_film():
    save("films/a.png", TISSUE)
    whole = cv2.resize(TISSUE, (224, 224), interpolation=cv2.INTER_AREA)
    for crop in (None, "breast"):
        _, _, fingerprints = read(crop)
        assert np.array_equal(fingerprints[0], duplicates.take_fingerprints(whole, (300, 200)))


# ---- what a header declares --------------------------------------------------------------------
SMOOTH = np.rint(TISSUE[::5, ::5] / TISSUE.max() * 255).astype(np.uint8)  # (60, 40)


def write_tiff(path, pixels, order="<", **tags):
    """An uncompressed TIFF of one strip, or of a strip for each plane of pixels (C, H, W), with other tags."""
    planes = np.atleast_3d(pixels.T).T if pixels.ndim == 2 else pixels
    count, height, width = planes.shape
    data = planes.astype(planes.dtype.newbyteorder(order)).tobytes()
    strip, kind = len(data) // count, 1 if count == 1 else 2
    entries = {256: (width,), 257: (height,), 258: (8 * pixels.itemsize,) * count, 259: (1,), 262: (kind,),
               273: tuple(8 + strip * number for number in range(count)), 277: (count,), 278: (height,),
               279: (strip,) * count, 284: (kind,)}
    entries |= {int(tag[1:]): value if isinstance(value, tuple) else (value,) for tag, value in tags.items()}
    start, table, extra = 8 + len(data), b"", b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, extra = struct.pack(f"{order}I", after + len(extra)), extra + packed
        table += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    mark = b"II" if order == "<" else b"MM"
    path.write_bytes(struct.pack(f"{order}2sHI", mark, 42, start) + data + struct.pack(f"{order}H", len(entries))
                     + table + bytes(4) + extra)
    return path


def write_pnm(path, pixels, maxval, magic="P5"):
    """A binary PNM with a comment in its header."""
    data = pixels.astype(">u2" if maxval > 255 else np.uint8).tobytes()
    path.write_bytes(f"{magic} # film\n{pixels.shape[1]} {pixels.shape[0]}\n{maxval}\n".encode() + data)
    return path


def is_read_right(path, expected=SMOOTH, tolerance=1):
    image, _ = reading.read_image(path)
    return np.abs(image - shrink(expected)).max() <= tolerance


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_films_are_turned_as_viewers_show_them(suffix, orientation):
    film = Image.fromarray(SMOOTH)
    stored = {2: film.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: film.rotate(180),
              4: film.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: film.transpose(Image.Transpose.TRANSPOSE),
              6: film.rotate(90, expand=True), 7: film.transpose(Image.Transpose.TRANSVERSE),
              8: film.rotate(-90, expand=True)}.get(orientation, film)  # what has to be turned to show the film
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(f"film{suffix}", exif=exif, quality=100)
    if suffix == ".png":  # the tag may stand at the end, too
        content = Path("film.png").read_bytes()
        start = content.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        Path("film.png").write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", f'<rdf:Description tiff:Orientation="{orientation}"/>')
        stored.save("text.png", pnginfo=text)
        assert is_read_right(Path("text.png"))
    assert is_read_right(Path(f"film{suffix}"), tolerance=4)
    _, row = reading.read_image(Path(f"film{suffix}"))
    assert (row["film_width"], row["film_height"]) == (40, 60), "as lesion boxes count"


@pytest.mark.parametrize("exif", [b"II*", b"MM\0\x82\0\0\0\x08", b"\xff" * 30])
def test_damaged_exif_is_a_reason_and_no_traceback(exif):
    Image.fromarray(SMOOTH).save("film.png", exif=exif)
    with pytest.raises(UserError, match=r"^its EXIF data are damaged, so that its orientation is unknown"):
        reading.read_image(Path("film.png"))


@pytest.mark.parametrize("maxval", [255, 50, 200, 1000, 4095, 65535])
def test_maxval_of_pnm_is_white(maxval):
    levels = np.rint(SMOOTH / 255 * maxval)
    assert is_read_right(write_pnm(Path("a.pgm"), levels, maxval), levels / maxval * 255, tolerance=1.5)
    colour = write_pnm(Path("a.ppm"), np.repeat(levels[..., None], 3, axis=2), maxval, "P6")
    assert is_read_right(colour, levels / maxval * 255, tolerance=2)
    text = f"P2\n40 60\n{maxval}\n" + " ".join(map(str, levels.astype(int).ravel()))
    Path("text.pgm").write_text(text)
    assert is_read_right(Path("text.pgm"), levels / maxval * 255, tolerance=1.5)


def test_tiff_of_every_order_and_kind_is_read_right_or_refused():
    deep = SMOOTH.astype(np.uint16) * 257
    assert is_read_right(write_tiff(Path("a.tif"), SMOOTH))
    assert is_read_right(write_tiff(Path("b.tif"), 255 - SMOOTH, t262=0))
    assert is_read_right(write_tiff(Path("c.tif"), deep, ">"))
    assert is_read_right(write_tiff(Path("d.tif"), np.stack([SMOOTH] * 3)), tolerance=2)
    four_bits = SMOOTH // 16
    packed = (four_bits[:, ::2] << 4) | four_bits[:, 1::2]
    assert is_read_right(write_tiff(Path("e.tif"), packed, t256=40, t258=4), four_bits * 17)
    compressions = "tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate"
    for compression, rows in itertools.product(compressions, (7, 60)):
        for pixels in (SMOOTH, deep, np.dstack([SMOOTH] * 3)):
            Image.fromarray(pixels).save("f.tif", compression=compression, tiffinfo={278: rows})
            assert is_read_right(Path("f.tif"), tolerance=2)
    Image.fromarray(SMOOTH).save("g.tif", compression="jpeg", quality=100)
    assert is_read_right(Path("g.tif"), tolerance=4)
    alpha = np.full_like(deep, 30000)
    for extra, expected in ((0, SMOOTH), (1, SMOOTH), (2, SMOOTH * (30000 / 65535))):  # 2: to be multiplied yet
        colours = np.dstack([deep] * 3 + [alpha]).reshape(60, 160)
        write_tiff(Path("alpha.tif"), colours, t256=40, t258=(16,) * 4, t262=2, t277=4, t338=extra)
        assert is_read_right(Path("alpha.tif"), expected, tolerance=2)
    for path in (write_tiff(Path("h.tif"), deep, t262=0), write_tiff(Path("i.tif"), deep, ">", t262=0),
                 write_tiff(Path("j.tif"), np.stack([deep] * 3))):
        with pytest.raises(UserError, match=r"0 is white|one plane for each colour|of an unusual kind"):
            reading.read_image(path)
    path = write_tiff(Path("webp.tif"), np.dstack([deep] * 3).reshape(60, 120), t256=40, t258=(16,) * 3, t277=3,
                      t262=2, t259=50001)
    with pytest.raises(UserError, match=r"^its pixels are damaged or compressed in an unusual way"):
        reading.read_image(path)
    Image.fromarray(deep).save("k.tif", big_tiff=True)
    assert is_read_right(Path("k.tif"))


@pytest.mark.parametrize(("dtype", "scale", "offset", "is_right"), [
    (np.int16, 16, 0, True), (np.int32, 16, 0, True), (np.uint32, 16, 0, True),
    (np.int8, 1, -128, False), (np.int16, 16, -2000, False), (np.int32, 300, 0, False),
    (np.uint32, 2**24, 0, False),
])
def test_tiff_with_sign_or_32_bits_is_read_where_16_bits_hold_it(dtype, scale, offset, is_right):
    pixels = (SMOOTH.astype(np.int64) * scale + offset).astype(dtype)
    path = write_tiff(Path("film.tif"), pixels, t339=1 if dtype == np.uint32 else 2)
    if is_right:
        assert is_read_right(path, SMOOTH * (4080 / 4095))
    else:
        with pytest.raises(UserError, match="negative or need more than 16 bits"):
            reading.read_image(path)


@pytest.mark.parametrize("tags", [
    {"t256": 39}, {"t256": 20, "t257": 60}, {"t278": 20}, {"t279": 1200}, {"t273": 900},
])
def test_an_uncompressed_tiff_is_held_against_its_header(tags):
    with pytest.raises(UserError, match="its pixels are damaged"):
        reading.read_image(write_tiff(Path("film.tif"), SMOOTH, **tags))


@pytest.mark.parametrize(("header", "tail", "words"), [
    (b"P5\r\n40 60\r\n255\r\n", b"", None),
    (b"P5 #a\r40 #b\n60\n255\n", b"", None),
    (b"P5 00000040 060 000255 ", b"\n", None),
    (b"P5 40 59 255 ", b"", "more pixels than its header declares"),
    (b"P5 40 60 255 ", b"P5 40 60 255 ", "more pixels than its header declares"),
    (b"P5 41 60 255 ", b"", "cut off: it has fewer pixels"),
    (b"P2 40 60 255 #a\n", b"# end", None),
    (b"P2 40 59 255 ", b"", "more pixels than its header declares"),
    (b"P2 40 60 255 ", b" Secret", "its pixels are cut off or damaged"),
    (b"P2 40 60 200 ", b"", "declares 200 as white"),
])
def test_pnm_is_held_against_its_header(header, tail, words):
    data = SMOOTH.tobytes() if header.startswith(b"P5") else " ".join(map(str, SMOOTH.ravel())).encode()
    Path("film.pgm").write_bytes(header + data + tail)
    if words is None:
        assert is_read_right(Path("film.pgm"))
    else:
        with pytest.raises(UserError, match=words):
            reading.read_image(Path("film.pgm"))


def test_chunks_of_png_are_held_against_its_end(monkeypatch):
    """OpenCV reserves as much memory as a chunk claims to have, up to 4 GB."""
    Image.fromarray(SMOOTH).save("film.png")
    content = Path("film.png").read_bytes()
    place = content.index(b"IDAT")
    Path("claims.png").write_bytes(content[: place - 4] + b"\xd0" + content[place - 3 :])
    Path("cut.png").write_bytes(content[:-12])
    monkeypatch.setattr(cv2, "imdecode", None)
    for name in ("claims.png", "cut.png"):
        with pytest.raises(UserError, match="cut off or damaged"):
            reading.read_image(Path(name))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", None])
def test_damaged_strips_are_refused(compression, dtype):
    """Each strip in turn lacks its second half: without compression, the file does."""
    grey = TISSUE.astype(dtype) + np.random.default_rng(0).integers(0, 9, TISSUE.shape).astype(dtype)
    Image.fromarray(grey).save("film.tif", compression=compression, tiffinfo={278: 64})
    content = Path("film.tif").read_bytes()
    with Image.open("film.tif") as film:
        strips = list(zip(film.tag_v2[273], film.tag_v2[279], strict=True))
    for start, length in strips[: None if compression else 1]:
        middle, end = start + length // 2, start + length
        filled = content[:middle] + bytes(end - middle) + content[end:]
        Path("damaged.tif").write_bytes(filled if compression else content[:middle])
        with pytest.raises(UserError, match=r"its pixels are damaged|or one that is damaged"):
            reading.read_image(Path("damaged.tif"))


@pytest.mark.parametrize("crop", [None, "breast"])
@pytest.mark.parametrize("write", [
    lambda path: save(path, np.full((300, 200), 255, np.uint8)),
    lambda path: save(path, np.random.default_rng(0).integers(99, 101, (300, 200)).astype(np.uint8)),
])
def test_a_blank_film_is_refused_whatever_crop_is(write, crop):
    with pytest.raises(UserError, match=r"^a blank image"):
        reading.read_image(write("film.png"), crop)


# ---- what looks wrong to the network -----------------------------------------------------------
def test_masks_grey_backgrounds_and_boxes_in_the_black_are_named(caplog):
    film, breast = draw_film()
    mask = np.zeros_like(film)
    mask[200:260, 50:120] = 255
    grey = (film * (220 / 255) + 35).astype(np.uint8)
    white = np.where(breast, film, 255).astype(np.uint8)
    for name, pixels in (("film", film), ("mask", mask), ("grey", grey), ("white", white)):
        save(f"films/{name}.png", pixels)
    save("films/mask_blurred.jpg", mask)
    films, _, _ = read("breast", {"film.png": "60:250:80:80|300:500:50:60", "grey.png": "60:250:40:40"})
    assert films["excluded"].to_dict() == {"film.png": "", "grey.png": "", "mask.png": "a mask",
                                           "mask_blurred.jpg": "a mask", "white.png": ""}
    for words in ("2 of 5 mammograms are excluded, since they are masks in black and white: 'mask.png', 'mask_b",
                  "2 of 5 mammograms have a background that is not black: CROP may keep it or lose the breast,"
                  " or they may be inverted: 'grey.png', 'white.png'\n",
                  "1 of 5 mammograms have a lesion_box that lies outside of the breast: 'film.png'"):
        assert words in caplog.text
    caplog.clear()
    Path("films/mask.png").unlink()
    read(None)
    assert "background" not in caplog.text, "only CROP would keep it"
    assert "1 of 4 mammograms are largely white: they may be inverted" in caplog.text


def test_negatives_with_a_black_margin_are_named(caplog):
    """The crop finds the white background and takes it for the breast, as in half of the negatives of DDSM."""
    film, breast = draw_film()
    negative = np.where(breast, 255 - film, 255).astype(np.uint8)
    save("films/film.png", cv2.copyMakeBorder(film, 0, 0, 0, 500, cv2.BORDER_CONSTANT))
    save("films/negative.png", cv2.copyMakeBorder(negative, 0, 0, 0, 500, cv2.BORDER_CONSTANT))
    read("breast")
    assert "background" not in caplog.text
    assert "1 of 2 mammograms are largely white: they may be inverted, or have a white border: 'neg" in caplog.text


def test_a_mask_of_0_and_1_is_a_mask_and_not_blank(film):
    film("films/film.png")
    save("films/mask.png", (np.hypot(*np.mgrid[-30:30, -20:20]) < 9).astype(np.uint8))
    for crop in ("breast", "lesion", None):
        films, _, _ = read(crop, {"film.png": "5:5:9:9", "mask.png": "0:0:2:2"})
        assert films["excluded"].tolist() == ["", "a mask"]
    noise = np.random.default_rng(0).random((1600, 1200)) < 0.01
    with pytest.raises(UserError, match=r"^a blank image"):
        reading.read_image(save("noise.png", noise.astype(np.uint8)))


def test_films_of_two_scanners_in_one_container_are_named(caplog):
    """Of 14 bits, a third of which use 12: their white would be grey."""
    for number in range(12):
        save(f"films/{number:02d}.png", TISSUE if number < 4 else TISSUE * 4)
    save("films/tail.png", TISSUE * 16)
    films, _, _ = read()
    assert films["depth"].tolist() == [14] * 12 + [16]
    assert ("4 of 12 16 bit PNG mammograms (2 benign, 2 malignant) use at most 12 bits, but are scaled as 14 bits"
            in caplog.text)


@pytest.mark.parametrize(("bits", "window"), [(12, 65536), (14, None), (12, None)])
def test_dicom_films_that_use_less_of_the_grey_scale_than_they_declare_are_named(caplog, bits, window):
    """Of 12 bits, a third of them with a window, or a number of bits, of a deeper scanner."""
    tags = {"WindowCenter": 2048, "WindowWidth": 4096} if window else {}
    wide = {"WindowCenter": window // 2, "WindowWidth": window} if window else {}
    for number in range(12):
        white = 1 if number < 4 or bits == 12 else 4
        write_dicom(f"films/{number:02d}.dcm", TISSUE * white, bits, **(wide if number < 4 else tags))
    read()
    kind = f"{bits} bit DICOM{' with window' if window else ''}"
    words = f"4 of 12 {kind} mammograms (2 benign, 2 malignant) use at most 12 bits, but are scaled as"
    assert (words in caplog.text) == (bits == 14 or window is not None)


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
            with pytest.raises(UserError, match=r"^its lesion_box reaches beyond the image of 40 x 60 pixels:"):
                reading.read_image(Path("film.png"), crop, box)
    for box, inside in (("30:20:12:10", "30:20:10:10"), ("20:50:5:12", "20:50:5:10")):
        images = [reading.read_image(Path("film.png"), "lesion", text)[0] for text in (box, inside)]
        assert np.array_equal(*images)


def test_lesion_crop_keeps_films_without_a_box_as_excluded(film):
    film("films/a.png")
    film("films/b.png", seed=1)
    everything, _, expected = read("breast", {"a.png": "5:5:10:10"})
    films, _, fingerprints = read("lesion", {"a.png": "5:5:10:10"})
    assert [*films["excluded"], *everything["excluded"]] == ["", "no lesion_box", "", ""]
    assert np.array_equal(fingerprints, expected), "the split does not depend on CROP"
    assert films["film_sha256"].equals(everything["film_sha256"])
    with pytest.raises(UserError, match="needs a lesion_box"):
        reading.read_image(Path("films/b.png"), "lesion")


# ---- bad and odd files -------------------------------------------------------------------------
def save_as(mode, **options):
    return lambda path, image: Image.fromarray(image).convert(mode).save(path, **options)


def write_tiff_without_polarity(path, image):
    """A TIFF of one strip that lacks the tag PhotometricInterpretation."""
    height, width = image.shape
    tags = {256: width, 257: height, 258: 8, 259: 1, 273: 8 + 2 + 12 * 7 + 4, 278: height, 279: image.size}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + image.tobytes())


BAD = {  # by the name of the file: how it is written, and its sentence
    "text.dcm": (lambda path, image: path.write_text("film"), "not a DICOM file, in spite of its name"),
    "dicom.png": (lambda path, image: write_dicom(path, image), "give it a name that ends in .dcm"),
    "bomb.png": (lambda path, image: Image.new("1", (8200, 8200)).save(path), "8200 pixels, which is larger"),
    "large.pgm": (lambda path, image: path.write_text("P5 90000 90000 255 "), "larger than any mammogram"),
    "tiny.png": (lambda path, image: save(path, image[:1, :1]), "1 x 1 pixels, too small"),
    "black.png": (lambda path, image: save(path, image * 0), "a blank image"),
    "float.tif": (lambda path, image: save(path, image.astype(np.float32)), "of 8 or 16 bits; save it in grey"),
    "pages.tif": (save_as("L", save_all=True, append_images=[Image.new("L", (40, 60))] * 2), "3 pages"),
    "moves.png": (save_as("L", save_all=True, append_images=[Image.new("L", (40, 60))]), "2 pages or pictures"),
    "nowhere.png": (lambda path, image: path.symlink_to("nothing.png"), "a link that leads nowhere"),
    "pipe.png": (lambda path, image: os.mkfifo(path), "no file"),
    "bright.pgm": (lambda path, image: write_pnm(path, image, 50), "declares 50 as white (maxval), but"),
    "short.pgm": (lambda path, image: write_pnm(path, image[:50], 255).write_bytes(
        b"P5 40 60 255 " + image[:50].tobytes()), "cut off: it has fewer pixels"),
    "alpha.pgm": (lambda path, image: path.write_bytes(
        b"P7\nWIDTH 40\nHEIGHT 60\nDEPTH 2\nMAXVAL 255\nTUPLTYPE GRAYSCALE_ALPHA\nENDHDR\n" + bytes(4800)),
        "not a PNG, JPEG, TIFF, PGM or BMP image, or one that is damaged or of an unusual kind"),
    **{f"clear {mode}.png": (save_as(mode, transparency=colour), "grey value or colour is transparent")
       for mode, colour in (("L", 9), ("I;16", 9), ("RGB", (9, 9, 9)))},
    "web.png": (save_as("L", format="WEBP"), "not a PNG, JPEG"),
    "unseen.png": (lambda path, image: Image.new("LA", (40, 60), (9, 0)).save(path), "wholly transparent"),
    "polarity.tif": (lambda path, image: write_tiff_without_polarity(path, image), "whether 0 is black or white"),
    "empty.dcm": (lambda path, image: path.touch(), "an empty file"),
    **{f"half.{suffix}": (lambda path, image: cv2.imencode(path.suffix, image)[1][:-300].tofile(path), "cut off")
       for suffix in ("png", "jpg", "bmp")},
    **{f"{name}\n.png": (lambda path, image: path.write_text(""), "an empty file") for name in range(10)},
}
GOOD = {  # readable, if odd: how it is written, and how far grey values may be off
    "cmyk.jpg": (save_as("CMYK", quality=95), 6), "cmyk.tif": (save_as("CMYK"), 2),
    "alpha.png": (save_as("LA"), 1), "grey alpha.tif": (save_as("LA"), 1), "alpha.tif": (save_as("RGBA"), 2),
    "clear.png": (save_as("P", transparency=0), 1),
    "png.bmp": (save_as("L", format="PNG"), 1),
    **{f"palette.{suffix}": (save_as("P"), 1) for suffix in ("png", "bmp", "tif")},
    **{f"bit.{suffix}": (save_as("1"), 255) for suffix in ("png", "bmp", "tif")},
    "link.png": (lambda path, image: path.symlink_to(save("real.png", image).absolute()), 1),
} | dict.fromkeys(["CAPITALS.PNG", "a 'b' \"c\".png", "a\nb.png", "x" * 246 + ".png",
                   "\N{SMILING FACE WITH SUNGLASSES} a,b.png"], (save_as("L"), 1))


def test_odd_files_are_read_and_bad_ones_have_their_sentence_all_at_once():
    for name, (write, _) in (BAD | GOOD).items():
        write(Path("films") / name, SMOOTH)
    with pytest.raises(UserError) as caught:
        read()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{len(BAD)} of {len(BAD | GOOD)} mammograms cannot be read. Repair or remove them")
    assert len(lines) == 21, "twenty of them"
    assert lines[1].startswith(r"  '0\n.png': an empty file")
    reasons = pd.read_csv("out/bad_images.csv").set_index("path")["reason"].to_dict()
    assert reasons.keys() == BAD.keys()
    for name, (_, words) in BAD.items():
        assert words in reasons[name], name
        Path("films", name).unlink()
    for _ in range(2):  # read, then from the cache
        _, images, _ = read()
        assert not Path("out/bad_images.csv").exists()
        for name, (_, tolerance) in GOOD.items():
            assert np.abs(images[name] - shrink(SMOOTH)).max() <= tolerance
            assert images[name].max() > 240


def test_reading_and_writing_are_told_apart(film, tmp_path):
    film("films/a.png")
    film("films/b.png")
    Path("films/a.png").chmod(0)
    tmp_path.chmod(0o777)
    with as_nobody(tmp_path):
        words = r"1 of 2 mammograms cannot be read(.|\n)* 'a.png': .*Permission denied"
        with pytest.raises(UserError, match=words):
            read()
        Path("out/.cache").chmod(0o555)
        with pytest.raises(UserError, match=r"^out cannot be written .*Permission denied"):
            read("breast")


def test_a_film_that_changes_or_vanishes_while_others_are_read_is_a_bad_film(film, monkeypatch):
    for name in ("a", "b", "c"):
        film(f"films/{name}.png")
    decode = reading.read_picture

    def disturb(path):
        if path.name == "a.png":
            path.write_bytes(path.read_bytes() + b"more")
        if path.name == "b.png":
            path.unlink()
        return decode(path)

    monkeypatch.setattr(reading, "read_picture", disturb)
    with pytest.raises(UserError, match=r"^2 of 3 mammograms cannot be read"):
        read()
    reasons = pd.read_csv("out/bad_images.csv")["reason"].tolist()
    assert reasons == ["the file changed while it was read", "no file, or a link that leads nowhere"]


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
    table = make_table([path.name for path in collection])
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
    answers = [np.zeros((3, duplicates.RINGS, duplicates.WAVES), np.complex64)] * 4 + [KeyboardInterrupt] * 4
    with mock.patch.object(duplicates, "take_fingerprints", side_effect=answers), pytest.raises(KeyboardInterrupt):
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
