"""DICOM films against pydicom, the standard and hand-made files: headers are held against pixels."""
import itertools
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from conftest import write_dicom
from PIL import Image
from pydicom.encaps import encapsulate, generate_fragments
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from data import UserError, dicom, reading

RAMP = np.arange(224 * 224).reshape(224, 224) * 4096 // 224**2  # every value of 12 bits
SQUARES = np.linspace(0, 1, 4096) ** 2
SECRETS = "Secret", "H-4711", "1961"  # of every film that write_dicom() writes
JPEG2000, RLE = pydicom.uid.JPEG2000Lossless, pydicom.uid.RLELossless


@pytest.fixture(autouse=True)
def work_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("films").mkdir()


def read(path="film.dcm"):
    return reading.read_image(Path(path))[0]


def read_all():
    """The films of the folder films as read_films gives them: (table by path, images by path)."""
    paths = sorted(path.name for path in Path("films").iterdir())
    films = pd.DataFrame({"path": paths, "label": "benign", "lesion_box": ""})
    films, images, _ = reading.read_films(films, Path("films"), None, Path("out"))
    return films.set_index("path"), dict(zip(paths, images, strict=True))


def is_shown_as(expected, path="film.dcm"):
    """Whether a film of 224 x 224 pixels is read as these brightnesses, 0 to 1."""
    return np.abs(read(path) / 255 - expected).max() < 0.004


def refuse(words, path="film.dcm"):
    """Check that a film is refused in one short sentence without a person's name and a library's words."""
    with pytest.raises(UserError, match=words) as caught:
        read(path)
    sentence = str(caught.value)
    assert len(sentence) < 250
    for word in (*SECRETS, "None", "attribute", "force=", "unpack", "broadcast", "operand", "plugin", "\n"):
        assert word not in sentence


def change(path="film.dcm", out="film.dcm", **tags):
    """Write a DICOM file again with other tags; those that are None are removed."""
    data = pydicom.dcmread(path)
    for tag, value in tags.items():
        if value is None:
            delattr(data, tag)
        elif tag.startswith("PixelPadding"):
            data.add_new(tag, "US", value or None)
        else:
            setattr(data, tag, value)
    data.save_as(out)
    return Path(out)


def write_raw_tag(keyword, vr, value, path="film.dcm"):
    """Append a tag with any bytes to a file of explicit VR, in the place where its number belongs."""
    content = Path(path).read_bytes()
    tag = pydicom.tag.Tag(keyword)
    value += b" " * (len(value) % 2)
    element = struct.pack("<HH2sH", tag.group, tag.element, vr, len(value)) + value
    data = pydicom.dcmread(path)
    following = min(other for other in data.keys() if other > tag)  # noqa: SIM118
    place = data.get_item(following).value_tell
    place = content.rindex(struct.pack("<HH", following.group, following.element), 0, place)
    Path(path).write_bytes(content[:place] + element + content[place:])


# ---- tables, windows and polarity --------------------------------------------------------------
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
    (RAMP, 12, {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"}, 1 - RAMP / 4095),
    (RAMP, 12, {"PresentationLUTShape": "IDENTITY"}, RAMP / 4095),
])
def test_dicom_is_scaled_by_its_bits_window_or_table(pixels, bits, tags, expected):
    image, _ = reading.read_image(write_dicom("film.dcm", pixels, bits, **tags))
    assert np.abs(image / 255 - expected).max() < 0.004


def test_compressed_dicom_of_any_name_is_read_or_asks_for_its_decoder(monkeypatch):
    write_dicom("1.2.840", RAMP)
    expected = read("1.2.840")
    for name, syntax in (("a.DICOM", RLE), ("IM0001", JPEG2000)):
        write_dicom(name, RAMP, syntax=syntax)
        assert np.array_equal(read(name), expected)
    monkeypatch.setattr(pydicom.pixels.get_decoder(syntax), "_available", {})
    refuse(r"^its compression \(JPEG 2000.*\) needs more packages: pip install pylibjpeg", "IM0001")
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    with pytest.raises(UserError, match=r"^DICOM files need one more package: pip install pydicom$"):
        read("1.2.840")


def test_negative_films_of_16_bits_keep_one_grey_scale_whatever_their_air_is():
    """The tissue of 1,000 to 3,000 has no known white: what is black is the air of each film."""
    for air in (4000, 5000):
        pixels = np.where(RAMP < 2048, 1000 + RAMP * 2000 // 2048, air)
        write_dicom(f"films/{air}.dcm", pixels, 16, PhotometricInterpretation="MONOCHROME1")
    films, images = read_all()
    for air in (4000, 5000):
        expected = (air - 1000 - np.arange(2048) * 2000 // 2048) / 4095 * 255
        assert np.abs(images[f"{air}.dcm"][RAMP < 2048] - expected[RAMP[RAMP < 2048]]).max() <= 1
        assert (images[f"{air}.dcm"][RAMP >= 2048] == 0).all()
    assert films["depth"].eq(12).all()


@pytest.mark.parametrize("vr", ["OW", "US"])
@pytest.mark.parametrize("sequence", ["ModalityLUTSequence", "VOILUTSequence"])
def test_a_lookup_table_is_held_against_its_descriptor(sequence, vr):
    def write(values, descriptor):
        item = pydicom.Dataset()
        item.LUTDescriptor = descriptor
        if len(values) % 2 and values.itemsize == 1:
            values = np.append(values, np.uint8(0))
        words = values.view("<u2")
        item.add_new("LUTData", vr, words.tobytes() if vr == "OW" else words.tolist())
        write_dicom("film.dcm", RAMP, **{sequence: [item]})

    for bits in (8, 9, 12, 16):  # pydicom fails on Modality LUTs of 12
        write(np.rint(SQUARES * (2**bits - 1)).astype("<u2"), [4096, 0, bits])
        assert is_shown_as(SQUARES[RAMP])
    write(np.rint(SQUARES * 1000).astype("<u2"), [4096, 0, 12])  # a dark film
    assert is_shown_as(SQUARES[RAMP] * 1000 / 4095)
    write(np.rint(SQUARES * 4095).astype("<u2"), [4096, 0, 16])  # says 16 bits of 12
    assert is_shown_as(SQUARES[RAMP])
    packed = np.rint(SQUARES * 255).astype(np.uint8)
    write(packed, [4096, 0, 8])
    assert is_shown_as(SQUARES[RAMP])
    write(packed[:4095], [4095, 0, 8])
    assert is_shown_as(SQUARES[RAMP.clip(max=4094)])
    write(np.rint(SQUARES * 4095).astype("<u2"), [4096, 0, 10])
    refuse("declares a lookup table of 10 bits, but the file has one of 12")
    write(np.rint(SQUARES[:4000] * 4095).astype("<u2"), [4096, 0, 12])
    refuse("declares a lookup table of 4096 entries, but the file has 4000")


@pytest.mark.parametrize("first", [-2048, 63488])
def test_the_first_value_of_a_table_for_signed_pixels_may_be_written_without_sign(first):
    table = make_lut(65535 * SQUARES, 0, 16)
    write_dicom("film.dcm", RAMP - 2048, VOILUTSequence=table)
    data = pydicom.dcmread("film.dcm")
    item = data.VOILUTSequence[0]
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [4096, first if first > 0 else -2048, 16])
    if first < 0:
        item.LUTDescriptor = [4096, first, 16]
    data.save_as("film.dcm")
    assert is_shown_as(SQUARES[RAMP])


# ---- padding -----------------------------------------------------------------------------------
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("bits", "signed", "stored", "tags"), [
    (12, False, 0, {"PixelPaddingValue": 0}), (12, False, 4095, {"PixelPaddingValue": 4095}),
    (16, True, -2000, {"PixelPaddingValue": -2000}), (16, True, -2000, {"PixelPaddingValue": 63536}),
    (16, False, 63536, {"PixelPaddingValue": -2000}), (12, False, 65535, {"PixelPaddingValue": 65535}),
    (16, True, -1500, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1000}),
    (16, False, 60000, {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": 50000}),
])
def test_padding_is_black_and_no_part_of_the_grey_scale(bits, signed, stored, tags, photometric):
    """Both a negative and a positive show the same film as without padding, black around it."""
    inside = (RAMP > 1000) & (RAMP < 3000)
    pixels = np.where(inside, RAMP, stored)
    write_dicom("film.dcm", pixels.astype(np.int32), 16, PhotometricInterpretation=photometric)
    data = pydicom.dcmread("film.dcm")
    data.BitsStored, data.HighBit = bits, bits - 1
    for keyword, value in tags.items():
        data.add_new(keyword, "SS" if value < 0 or (signed and value < 2**15) else "US", value)
    data.PixelRepresentation = int(signed)
    data.save_as("film.dcm")
    image = read()
    assert (image[~inside] == 0).all()
    shown = RAMP[inside] if photometric == "MONOCHROME2" else -RAMP[inside]
    gain, offset = np.polyfit(shown, image[inside], 1)
    assert gain == pytest.approx(255 / 4095, rel=0.01)
    assert np.abs(gain * shown + offset - image[inside]).max() < 1


def test_padding_is_black_in_a_window_too_and_a_film_of_padding_is_refused():
    window = {"WindowCenter": 2048, "WindowWidth": 4096, "PhotometricInterpretation": "MONOCHROME1"}
    pixels = np.where(RAMP < 500, 0, RAMP)
    write_dicom("film.dcm", pixels, **window)
    data = pydicom.dcmread("film.dcm")
    data.add_new("PixelPaddingValue", "US", 0)
    data.save_as("film.dcm")
    assert (read()[RAMP < 500] == 0).all()
    change(PixelPaddingRangeLimit=4095)
    refuse("all its pixels are padding")


# ---- bits --------------------------------------------------------------------------------------
def test_high_bit_is_heeded_where_the_bits_below_are_empty():
    write_dicom("film.dcm", RAMP << 4, 16)
    change(BitsStored=12, HighBit=15)
    assert is_shown_as(RAMP / 4095)
    write_dicom("film.dcm", RAMP)
    change(HighBit=15)
    refuse("declares 12 bits a pixel up to bit 15, but the file has values in the bits below")


def test_pixels_beyond_the_bits_are_refused_unless_they_are_an_overlay():
    write_dicom("film.dcm", RAMP * 16, 16)
    change(BitsStored=12, HighBit=11)
    refuse("declares 12 bits a pixel, but the file has 16")
    for syntax in (None, JPEG2000, RLE):
        write_dicom("film.dcm", RAMP | (RAMP > 2000) * 2**13, 16, syntax=syntax)
        change(BitsStored=12, HighBit=11)
        refuse("declares 12 bits a pixel, but the file has 14")
        data = pydicom.dcmread("film.dcm")
        data.add_new((0x6000, 0x0100), "US", 16)
        data.add_new((0x6000, 0x0102), "US", 999)
        data.save_as("film.dcm")
        refuse("declares 12 bits a pixel, but the file has 14")
        data[0x6000, 0x0102].value = 13
        data.save_as("film.dcm")
        assert is_shown_as(RAMP / 4095)


def test_signed_pixels_may_fill_the_upper_bits_with_their_sign_or_with_nothing():
    for mask in (0xFFFF, 0x0FFF):
        write_dicom("film.dcm", (RAMP - 2048) & mask, 16)
        change(BitsStored=12, HighBit=11, PixelRepresentation=1)
        assert is_shown_as(RAMP / 4095)


def test_depth_and_sign_of_a_jpeg_2000_stream_are_held_against_the_header():
    write_dicom("film.dcm", RAMP, syntax=JPEG2000)
    change(out="16.dcm", BitsStored=16, HighBit=15)  # often said of 12 bits
    assert is_shown_as(RAMP / 4095, "16.dcm")
    change(out="14.dcm", BitsStored=14, HighBit=13)
    refuse("declares 14 bits a pixel, but the file has 12", "14.dcm")
    change("14.dcm", "14.dcm", WindowCenter=2048, WindowWidth=4096)
    assert is_shown_as(RAMP / 4095, "14.dcm"), "a window says which number is white"
    change(out="10.dcm", BitsStored=10, HighBit=9)
    refuse("declares 10 bits a pixel, but the file has 12", "10.dcm")
    change(out="signed.dcm", PixelRepresentation=1)
    refuse("declares signed pixels, but the file has unsigned pixels", "signed.dcm")
    write_dicom("film.dcm", RAMP // 2, syntax=JPEG2000)
    change(PixelRepresentation=1)
    assert is_shown_as(RAMP // 2 / 4095), "without any value that the sign would change"
    write_dicom("film.dcm", RAMP - 2048, syntax=JPEG2000)
    assert is_shown_as(RAMP / 4095)
    change(PixelRepresentation=0)
    refuse("declares 12 bits a pixel, but the file has 16")


def test_signed_jpeg_2000_is_the_same_with_every_decoder(monkeypatch):
    """That of Pillow shifts signed values to 0 unless it is told that they are signed."""
    decoder = pydicom.pixels.get_decoder(JPEG2000)
    plugins = dict(decoder._available)
    assert "pillow" in plugins
    for pixels, bits in ((RAMP - 2048, 12), (RAMP * 16 - 32768, 16)):
        write_dicom("film.dcm", pixels, bits, syntax=JPEG2000)
        for plugin, function in plugins.items():
            monkeypatch.setattr(decoder, "_available", {plugin: function})
            assert is_shown_as(RAMP / 4095), plugin


def test_a_stream_may_be_followed_by_zeros_and_lie_in_fragments_with_an_offset_each():
    data = pydicom.dcmread(write_dicom("film.dcm", RAMP, syntax=JPEG2000))
    _, *fragments = generate_fragments(data.PixelData)
    frame = b"".join(fragments)
    half = len(frame) // 4 * 2
    data.PixelData = encapsulate([frame[:half], frame[half:] + bytes(300 + len(frame) % 2)])
    data.save_as("film.dcm")
    assert is_shown_as(RAMP / 4095)


@pytest.mark.parametrize("groups", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_the_window_of_an_enhanced_object_of_one_frame_counts(groups):
    """The reference is the same film with the window where other objects have it."""
    window = {"WindowCenter": 1500, "WindowWidth": 2000, "VOILUTFunction": "LINEAR_EXACT"}
    expected = read(write_dicom("plain.dcm", RAMP, **window, RescaleSlope=2, RescaleIntercept=-1000))
    voi, values, group = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    for tag, value in window.items():
        setattr(voi, tag, value)
    values.RescaleSlope, values.RescaleIntercept = 2, -1000
    group.FrameVOILUTSequence, group.PixelValueTransformationSequence = [voi], [values]
    tags = {"SOPClassUID": pydicom.uid.BreastTomosynthesisImageStorage, "NumberOfFrames": 1, "WindowCenter": None}
    write_dicom("film.dcm", RAMP, **tags, **{groups: [group]})
    assert np.array_equal(read(), expected)
    if groups.startswith("PerFrame"):  # which goes before what all frames share
        other, shared = pydicom.Dataset(), pydicom.Dataset()
        other.WindowCenter, other.WindowWidth = 9, 9
        shared.FrameVOILUTSequence = [other]
        write_dicom("film.dcm", RAMP, SharedFunctionalGroupsSequence=[shared], **tags, **{groups: [group]})
        assert np.array_equal(read(), expected)


# ---- pixels that are missing, too many or compressed wrongly -----------------------------------
def write_jpeg(path, marker, rows, columns, precision=8, tail=b"\xff\xd9", before=b""):
    """A DICOM film whose compressed stream is a JPEG header with this size, some bytes and an end."""
    size = struct.pack(">BHBHHBBBB", marker, 11, precision, rows, columns, 1, 1, 0x11, 0)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + bytes(500)
    stream = b"\xff\xd8" + before + b"\xff" + size + scan + tail
    write_dicom(path, np.zeros((100, 80), int), 8)
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR = "OB"
    data.save_as(path)


@pytest.mark.parametrize("marker", [0xC0, 0xC1, 0xC3, 0xF7])
def test_a_compressed_stream_is_held_against_the_header_before_it_is_decoded(marker, monkeypatch):
    opened = []
    monkeypatch.setattr(pydicom.pixels.decoders.base.DecodeRunner, "decode", lambda *_: opened.append(1))
    write_jpeg("film.dcm", marker, 60000, 60000)
    refuse("declares 80 x 100 pixels, but the file has 60000 x 60000")
    write_jpeg("film.dcm", marker, 100, 81)
    refuse("declares 80 x 100 pixels, but the file has 81 x 100")
    write_jpeg("film.dcm", marker, 100, 80, tail=b"")
    refuse("its compressed image ends too early")
    write_jpeg("film.dcm", marker, 100, 80, precision=16)
    refuse("declares 8 bits a pixel, but the file has 16")
    hierarchical, extension = b"\xff\xde\x00\x0b\x08\xea\x60\xea\x60\x01\x01\x11\x00", b"\xff\xf8\x00\x04\x04\x00"
    for before in (hierarchical, extension, b"\xff\xc4\x7f\xff", b"\x00" * 9):
        write_jpeg("film.dcm", marker, 100, 80, before=before)
        refuse("its compressed pixels are damaged")
    assert not opened


@pytest.mark.parametrize("syntax", [JPEG2000, RLE])
def test_a_stream_that_ends_early_and_several_frames_are_refused(syntax):
    path = write_dicom("film.dcm", RAMP, syntax=syntax)
    data = pydicom.dcmread(path)
    frame = b"".join(list(generate_fragments(data.PixelData))[1:])
    for part in (frame[: len(frame) // 2], frame[:-20], frame[: len(frame) // 2] + bytes(len(frame) // 2)):
        data.PixelData = encapsulate([part])
        data.save_as("cut.dcm")
        refuse("its compressed (image ends too early|pixels are damaged)", "cut.dcm")
    data.PixelData = encapsulate([frame, frame], has_bot=False)
    data.save_as("two.dcm")
    refuse("its image has several frames", "two.dcm")
    data.PixelData = encapsulate([frame], fragments_per_frame=3, has_bot=False)
    data.save_as("parts.dcm")
    if syntax == RLE:
        refuse("its image has several frames", "parts.dcm")
    else:
        assert is_shown_as(RAMP / 4095, "parts.dcm")


@pytest.mark.parametrize("pixels", [RAMP, RAMP[:99, :77] // 16, RAMP[:99, :77] * 0 + 7])
@pytest.mark.parametrize("tags", [{}, {"Rows": -1}, {"Columns": -1}, {"Rows": 1}, {"Columns": 1}])
def test_an_rle_frame_has_as_many_pixels_as_declared(pixels, tags):
    """pydicom shears what has more. A film of odd size has a byte of padding."""
    write_dicom("film.dcm", pixels, 12 if pixels.max() > 255 else 8, syntax=RLE)
    change(**{tag: pixels.shape[tag == "Columns"] + more for tag, more in tags.items()})
    if not tags:
        data = pydicom.dcmread("film.dcm")
        stored = dicom.decode(data, dicom.read_pixel_tags(data))[0]
        assert np.array_equal(stored, data.pixel_array) and np.array_equal(stored, pixels)
    elif -1 in tags.values():
        refuse("but the file has more")
    else:
        refuse("its compressed pixels are damaged")


def test_jpeg_2000_without_some_of_its_tiles_is_refused_and_with_a_container_read():
    def write(stream):
        data = pydicom.dcmread(write_dicom("film.dcm", RAMP // 16, 8))
        data.file_meta.TransferSyntaxUID = JPEG2000
        data.PixelData = encapsulate([stream])
        data["PixelData"].VR = "OB"
        data.save_as("film.dcm")

    film = Image.fromarray((RAMP // 16).astype(np.uint8))
    film.save("film.jp2", tile_size=(100, 100))
    write(Path("film.jp2").read_bytes())
    assert is_shown_as(RAMP // 16 / 255)
    film.save("film.j2k", tile_size=(100, 100))
    stream = Path("film.j2k").read_bytes()
    write(stream[: stream.rindex(b"\xff\x90\x00\x0a")] + stream[-2:])
    refuse("its compressed image ends too early")


@pytest.mark.parametrize("syntax", [None, RLE])
@pytest.mark.parametrize(("kind", "words"), [
    (b"US", "its image is missing"), (b"ZZ", "its image is damaged"),
    (b"OW\0\0\0\0\0\0", "its image is missing"), (b"SQ", "header cannot be read"),
])
def test_damage_to_the_tag_of_the_pixels_is_named(kind, words, syntax):
    content = write_dicom("film.dcm", RAMP, syntax=syntax).read_bytes()
    place = content.rindex(b"\xe0\x7f\x10\x00") + 4
    Path("film.dcm").write_bytes(content[:place] + kind + content[place + len(kind) :])
    if kind == b"SQ" and syntax is None:
        assert is_shown_as(RAMP / 4095)
    else:
        refuse(words)


@pytest.mark.parametrize("syntax", [None, JPEG2000, RLE])
def test_a_file_that_is_cut_off_says_so(syntax):
    content = write_dicom("film.dcm", RAMP, syntax=syntax).read_bytes()
    for share in (0.3, 0.5, 0.9, 0.999):
        Path("film.dcm").write_bytes(content[: int(len(content) * share)])
        refuse("cut off")


UID = pydicom.uid


@pytest.mark.parametrize(("tags", "words"), [
    ({"Rows": 200}, r"declares 224 x 200 pixels of 16 bits, which are 89600 bytes, but the file has 100352"),
    ({"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}, "which are 50176 bytes, but the file has 100352"),
    ({"BitsAllocated": 32, "BitsStored": 32}, "its pixels have 32 bits each"),
    ({"BitsStored": 17}, "Bits Allocated 16, Bits Stored 17 and High Bit 11 in its header contradict each other"),
    ({"Rows": 0}, "224 x 0 pixels, which is no size"),
    ({"Rows": 9000, "Columns": 9000}, "9000 x 9000 pixels, which is no size of a mammogram"),
    ({"PixelRepresentation": 7}, "Pixel Representation in its header is 7"),
    # tags without a default, in words
    ({"Rows": None}, "^Rows is missing in its header$"), ({"Columns": None}, "^Columns is missing in its header$"),
    ({"BitsAllocated": None}, "^Bits Allocated is missing in its header$"),
    ({"PhotometricInterpretation": None}, "Interpretation is neither"),
    ({"PixelData": None}, "its image is missing"),
    # what is no single grey image, by name
    ({"SamplesPerPixel": 3, "PlanarConfiguration": 0}, "that is not grey"),
    ({"PhotometricInterpretation": "SECRET"}, "that is not grey"),
    ({"PhotometricInterpretation": "PALETTE COLOR", "SOPClassUID": UID.MRImageStorage}, "MR.* not grey"),
    ({"NumberOfFrames": 2}, "of 2 frames, not a single mammogram"),
    ({"NumberOfFrames": 50, "SOPClassUID": UID.BreastTomosynthesisImageStorage}, "Tomo.* of 50 frames"),
    ({"SOPClassUID": UID.MammographyCADSRStorage}, r"without an image \(Mammography CAD SR Storage\)$"),
    ({"SOPClassUID": UID.GrayscaleSoftcopyPresentationStateStorage}, "without an image .Grayscale Softcopy"),
    ({"SOPClassUID": UID.DigitalMammographyXRayImageStorageForProcessing}, "raw detector image .*presentation"),
    ({"PresentationIntentType": "FOR PROCESSING"}, "raw detector image .*for presentation"),
    # what may be a negative
    ({"PresentationLUTShape": "INVERSE"}, "contradict each other, so that it may be a negative"),
    ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, "may be a negative"),
])
def test_a_header_that_is_not_that_of_a_film_is_refused(tags, words):
    write_dicom("film.dcm", RAMP)
    change(**tags)
    refuse(words)


def test_compressed_and_declared_uncompressed_contradict_each_other():
    write_dicom("film.dcm", RAMP)
    names = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"  # not compressed, RLE
    Path("film.dcm").write_bytes(Path("film.dcm").read_bytes().replace(*names))
    refuse("declares compressed pixels, but the file has uncompressed pixels")
    write_dicom("film.dcm", RAMP, syntax=RLE)
    Path("film.dcm").write_bytes(Path("film.dcm").read_bytes().replace(*reversed(names)))
    refuse("declares uncompressed pixels, but the file has compressed pixels")


def test_a_deflated_file_is_read_up_to_a_limit(monkeypatch):
    data = pydicom.dcmread(write_dicom("film.dcm", RAMP))
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as("film.dcm")
    assert is_shown_as(RAMP / 4095)
    content = Path("film.dcm").read_bytes()
    for share in (0.6, 0.99):
        Path("film.dcm").write_bytes(content[: int(len(content) * share)])
        refuse("^the file is cut off$")
    start = 144 + pydicom.filereader.read_file_meta_info("film.dcm").FileMetaInformationGroupLength
    deflater = zlib.compressobj(9, wbits=-15)
    bomb = deflater.compress(bytes(2**24)) + deflater.flush()
    Path("film.dcm").write_bytes(content[:start] + bomb)
    monkeypatch.setattr(dicom, "MAX_BYTES", 2**23)
    refuse("a deflated DICOM file that is larger than any mammogram")


# ---- tags that are missing, empty or text ------------------------------------------------------
@pytest.mark.parametrize("tags", [
    {"BitsStored": None}, {"BitsStored": None, "HighBit": None}, {"HighBit": None}, {"PixelRepresentation": None},
    {"SamplesPerPixel": None}, {"NumberOfFrames": ""}, {"WindowCenter": "", "WindowWidth": ""},
    {"WindowCenter": 9}, {"RescaleSlope": 2}, {"RescaleIntercept": -100}, {"VOILUTFunction": ""},
    {"SOPClassUID": None}, {"SOPClassUID": "1.2.3.4"}, {"VOILUTSequence": []}, {"PixelPaddingValue": ""},
    {"VOILUTSequence": [pydicom.Dataset()]}, {"ModalityLUTSequence": [pydicom.Dataset()]},
])
def test_a_tag_that_is_missing_or_empty_has_its_default(tags):
    write_dicom("film.dcm", RAMP, NumberOfFrames=1)
    change(**tags)
    assert is_shown_as(RAMP / 4095)


@pytest.mark.parametrize(("keyword", "vr", "value", "words"), [
    ("WindowCenter", b"DS", b"2048,5", "^Window Center in its header is no number$"),
    ("WindowCenter", b"DS", b"Secret^Person", "^Window Center in its header is no number$"),
    ("RescaleSlope", b"DS", b"0", "^Rescale Slope in its header is 0"),
    ("WindowWidth", b"DS", b"0", "^Window Width in its header is 0, so that nothing would be seen$"),
    ("RescaleIntercept", b"DS", b"1e999", "^Rescale Intercept in its header is no number$"),
    ("PixelPaddingValue", b"LO", b"H-4711", "^Pixel Padding Value in its header is no number$"),
    ("NumberOfFrames", b"IS", b"19610203x", "^Number of Frames in its header is no number$"),
    ("VOILUTFunction", b"CS", b"SECRET", "^VOI LUT Function in its header is unknown$"),
    ("NumberOfFrames", b"IS", b"19610203", "^Number of Frames in its header is no whole number that can be r"),
    ("RescaleSlope", b"DS", b"1e300", "^Rescale Slope in its header is no number$"),
    ("VOILUTSequence", b"US", b"5 ", "^a lookup table in its header is damaged$"),
    ("ModalityLUTSequence", b"US", b"5 ", "^a lookup table in its header is damaged$"),
    (0x60000102, b"ZZ", b"5 ", "^Overlay Bit Position in its header is no number$"),
])
def test_a_tag_with_nonsense_is_named_and_not_repeated(keyword, vr, value, words):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    window.pop(keyword, None)
    write_dicom("film.dcm", RAMP, **window)
    write_raw_tag(keyword, vr, value)
    refuse(words)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_a_window_of_no_more_than_one_value_is_a_step(function):
    write_dicom("film.dcm", RAMP, WindowCenter=2048.5, WindowWidth=1, VOILUTFunction=function)
    assert (read()[RAMP < 2046] <= 3).all() and (read()[RAMP > 2050] >= 252).all()


@pytest.mark.parametrize("syntax", [pydicom.uid.ExplicitVRLittleEndian, pydicom.uid.ImplicitVRLittleEndian])
def test_a_file_named_dcm_may_lack_preamble_and_meta_information(syntax):
    data = pydicom.dcmread(write_dicom("film.dcm", RAMP))
    explicit = syntax == pydicom.uid.ExplicitVRLittleEndian
    pydicom.dcmwrite("bare.dcm", pydicom.Dataset(data), implicit_vr=not explicit, little_endian=True,
                     enforce_file_format=False)
    assert Path("bare.dcm").read_bytes()[128:132] != b"DICM"
    assert is_shown_as(RAMP / 4095, "bare.dcm")
    report = pydicom.Dataset()
    report.SOPClassUID = pydicom.uid.MammographyCADSRStorage
    pydicom.dcmwrite("bare.dcm", report, implicit_vr=not explicit, little_endian=True, enforce_file_format=False)
    refuse("without an image .Mammography CAD SR", "bare.dcm")


# ---- privacy -----------------------------------------------------------------------------------
def test_no_damaged_byte_puts_a_person_into_a_sentence_a_table_or_a_file(capfd, caplog):
    """Every byte of the header in turn has another value: some make a tag swallow those that follow."""
    content = write_dicom("films/a.dcm", RAMP[:40, :40]).read_bytes()
    end = content.index(b"\xe0\x7f\x10\x00")
    shown = []
    for place in range(128, end):
        Path("b.dcm").write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            shown.append(str(reading.read_image(Path("b.dcm"))[1]))
        except UserError as error:
            shown.append(str(error))
    Path("films/bad.dcm").write_bytes(content[:2000])
    with pytest.raises(UserError) as caught:
        read_all()
    Path("films/bad.dcm").unlink()
    shown += [str(caught.value), read_all()[0].to_csv(), caplog.text, *capfd.readouterr()]
    written = [path.read_bytes() for path in Path("out").rglob("*") if path.is_file()]
    for secret in SECRETS:
        assert secret.encode() in content
        assert secret not in "".join(shown) and secret.encode() not in b"".join(written)
