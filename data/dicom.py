"""Read one DICOM file as grey values, and check its header against its pixels.

A contradiction is resolved only where the answer is certain, otherwise the file is refused. No message repeats
text of the file, since a damaged byte can put a name or a birth date anywhere. PS3.3 and PS3.5 are parts of the
DICOM standard (https://www.dicomstandard.org/current).
"""
import contextlib
import logging
import math
import re
import struct
import warnings
import zlib
from collections import namedtuple
from functools import partial

import cv2
import numpy as np
from PIL import Image

from data import MAX_PIXELS, UserError

DEPTHS = (8, 10, 12, 14, 16)  # bits that detectors and scanners use
OUTLIERS = 0.001  # share of the pixels that may be brighter than their film's depth: hot pixels
LABEL_EDGES = 0.01  # share of the pixels that may lie between tissue and the white of a label or of padding
RADIOGRAPHS = "X-Ray|Radiography|Secondary Capture|Breast Tomosynthesis"  # in names of SOP classes
MAX_BYTES = 8 * MAX_PIXELS  # of a file after inflation
SIZE_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # of JPEG and JPEG-LS: the size follows
SKIPPED_MARKERS = {0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}  # tables, comments and data of applications
JPEG_START, JPEG2000_START = b"\xff\xd8", b"\xff\x4f\xff\x51"  # of a compressed stream
JP2_START = b"\x00\x00\x00\x0cjP  "  # of a file that holds a JPEG 2000 stream, which DICOM forbids
TILE_START = rb"\xff\x90\x00\x0a(..)"  # in a JPEG 2000 stream, with the number of the tile
STREAM_END = b"\xff\xd9"  # of JPEG, JPEG-LS and JPEG 2000 streams
TAIL = 10  # last bytes of a stream, which have to hold its end: a few padding bytes may follow
UNDEFINED = 0xFFFFFFFF  # length of compressed pixels
LIMIT = 1e100  # a larger number is refused
LARGEST = 2**16  # no whole number in a header is as large
DAMAGED = "its compressed pixels are damaged or of an unusual kind; export it uncompressed"

Pixels = namedtuple("Pixels", "rows columns allocated stored high signed inverted")  # see read_pixel_tags
Stream = namedtuple("Stream", "rows columns samples precision signed tiles")  # see read_stream_header


# ---- grey values -------------------------------------------------------------------------------


def count_values(grey):
    """How many pixels have each value: float (256,) or (65536,) for uint8 or uint16 (H, W)."""
    values = 2 ** (8 * grey.itemsize)
    return cv2.calcHist([grey], [0], None, [values], [0, values]).ravel()


def find_depth(counts):
    """The bit depth of a film, without OUTLIERS and a white label or padding; counts: of count_values.

    A 12-bit film that is scaled as 16 bits is black. A label or padding has a single value, and most of the pixels
    that are too bright for the depth have it.
    """
    pixels = counts.sum()

    for bits in DEPTHS[:-1]:
        brighter = counts[2**bits :]
        white = brighter.max(initial=0)
        others = brighter.sum() - white
        if brighter.sum() <= OUTLIERS * pixels or others <= min(white, LABEL_EDGES * pixels):
            return bits
    return DEPTHS[-1]


# ---- header ------------------------------------------------------------------------------------


@contextlib.contextmanager
def refuse(sentence):
    """Turn whatever pydicom or a decoder raises into a UserError with this sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(sentence) from error


def contradict(declared, found):
    """Raise the UserError of a header that declares something else than there is."""
    raise UserError(f"its header declares {declared}, but the file has {found}")


def import_pydicom():
    """The module pydicom with its decoders; UserError where it is not installed."""
    try:
        import pydicom.pixels
    except ModuleNotFoundError as error:
        raise UserError("DICOM files need one more package: pip install pydicom") from error
    warnings.filterwarnings("ignore", module="pydicom")  # about tags that are not used here
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its messages repeat text of the file
    return pydicom


def check_deflated(path, pydicom):
    """Raise UserError where a deflated file is cut off or would fill the memory."""
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != pydicom.uid.DeflatedExplicitVRLittleEndian:
        return

    start = 144 + meta.FileMetaInformationGroupLength  # preamble, "DICM" and the element that holds the length
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflater.decompress(path.read_bytes()[start:], MAX_BYTES)
    if inflater.unconsumed_tail:
        raise UserError("a deflated DICOM file that is larger than any mammogram")
    if not inflater.eof:
        raise UserError("the file is cut off")


def first_item(data, keyword):
    """The first item of a sequence, {} where there is none."""
    return next(iter(data.get(keyword) or []), {})


def lift_frame_tags(data):
    """Copy window and rescale of the first frame of an enhanced object to where other objects have them, in place.

    PS3.3 C.7.6.16: tags of the frame go before those that all frames share.
    """
    for groups in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for macro in ("FrameVOILUTSequence", "PixelValueTransformationSequence"):
            for element in first_item(first_item(data, groups), macro):
                if element.tag not in data or data[element.tag].is_empty:
                    data[element.tag] = element


def open_dicom(path):
    """A DICOM file as a pydicom Dataset with a transfer syntax. Raises UserError.

    A file named .dcm may lack the preamble and the file meta information, as in old archives.
    """
    pydicom = import_pydicom()
    with refuse("a damaged DICOM file: its header cannot be read"):
        with path.open("rb") as file:
            start = file.read(132)
        if not start:
            raise UserError("an empty file")
        has_preamble = start[128:] == b"DICM"
        if has_preamble:
            check_deflated(path, pydicom)
        data = pydicom.dcmread(path, force=True)
        if not has_preamble and "Rows" not in data and "SOPClassUID" not in data:
            raise UserError("not a DICOM file, in spite of its name")

        is_implicit, is_little_endian = data.original_encoding
        explicit = pydicom.uid.ExplicitVRLittleEndian if is_little_endian else pydicom.uid.ExplicitVRBigEndian
        syntax = pydicom.uid.ImplicitVRLittleEndian if is_implicit else explicit
        data.file_meta.setdefault("TransferSyntaxUID", syntax)
        lift_frame_tags(data)
    return data


def name_class(data):
    """The name of the SOP class in the DICOM standard; "" where the standard does not know it."""
    pydicom = import_pydicom()
    with refuse("a damaged DICOM file: its SOP Class cannot be read"):
        known = pydicom.uid.UID_dictionary
        found = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
        return known[found][0] if found in known else ""


def is_without_image(kind):
    """Whether a kind of DICOM object (see name_class) has no image, such as a directory or a report."""
    return bool(kind) and "Image" not in kind


def is_no_mammogram(kind):
    """Whether a kind of DICOM object (see name_class) cannot be a mammogram, such as a report or an ultrasound."""
    return bool(kind) and not re.search(f"({RADIOGRAPHS}).*Image", kind)


def describe_tag(keyword):
    """The name of a tag in words, such as Window Center."""
    return import_pydicom().datadict.dictionary_description(keyword)


def read_number(data, keyword, default=None):
    """The (first) number of a tag: float. `default` where it is missing or empty; UserError without default."""
    name = describe_tag(keyword)
    with refuse(f"{name} in its header is no number"):
        values = np.ravel(data.get(keyword))
        if not values.size or values[0] in (None, ""):
            if default is None:
                raise UserError(f"{name} is missing in its header")
            return default

        number = float(str(values[0]))  # of text and bytes, too
        if not abs(number) < LIMIT:
            raise ValueError("too large, or no number")
    return number


def read_integer(data, keyword, default=None):
    """read_number for whole numbers from 0 to LARGEST: a larger one may be a date of birth or a PatientID."""
    number = read_number(data, keyword, default)
    if number != int(number) or not 0 <= number < LARGEST:
        raise UserError(f"{describe_tag(keyword)} in its header is no whole number that can be right")
    return int(number)


def read_word(data, keyword):
    """The text of a tag in capitals; "" where it is missing or empty."""
    with refuse(f"{describe_tag(keyword)} in its header cannot be read"):
        return str(data.get(keyword) or "").strip().upper()


def check_kind(data):
    """Raise UserError for anything but a single grey image for display."""
    kind = name_class(data)
    if is_without_image(kind):
        raise UserError(f"a DICOM object without an image ({kind})")

    if "For Processing" in kind or read_word(data, "PresentationIntentType") == "FOR PROCESSING":
        raise UserError("a raw detector image (FOR PROCESSING), which is not meant for display: export the"
                        " mammogram for presentation")

    with refuse("its image is damaged"):
        element = data.get_item("PixelData")
    if not isinstance(element, import_pydicom().dataelem.RawDataElement):  # the type where a value is there
        raise UserError("its image is missing: the DICOM file is cut off, or the pixels were removed")

    named = f"a DICOM object ({kind})" if kind else "a DICOM object"
    frames = read_integer(data, "NumberOfFrames", 1) or 1
    if frames != 1:
        raise UserError(f"{named} of {frames} frames, not a single mammogram")

    samples = read_integer(data, "SamplesPerPixel", 1)
    if samples != 1 or read_word(data, "PhotometricInterpretation") not in ("MONOCHROME1", "MONOCHROME2"):
        raise UserError(f"{named} that is not grey: its Photometric Interpretation is neither MONOCHROME1 nor"
                        " MONOCHROME2")


def read_pixel_tags(data):
    """Pixels: what the header declares about them. Raises UserError for contradictions.

    - rows, columns: int
    - allocated, stored: bits of a pixel in the file, and bits in use
    - high: the highest bit in use, counted from 0
    - signed: bool
    - inverted: whether the lowest value is white
    """
    rows, columns = read_integer(data, "Rows"), read_integer(data, "Columns")
    if min(rows, columns) < 1 or rows * columns > MAX_PIXELS:
        raise UserError(f"{columns} x {rows} pixels, which is no size of a mammogram")

    allocated = read_integer(data, "BitsAllocated")
    stored = read_integer(data, "BitsStored", read_integer(data, "HighBit", allocated - 1) + 1)
    high = read_integer(data, "HighBit", stored - 1)
    if allocated not in (8, 16):
        raise UserError(f"its pixels have {allocated} bits each; export them with 8 or 16 bits")
    if not 1 < stored <= high + 1 <= allocated:
        raise UserError(f"Bits Allocated {allocated}, Bits Stored {stored} and High Bit {high} in its header"
                        " contradict each other")

    signed = read_integer(data, "PixelRepresentation", 0)
    if signed not in (0, 1):
        raise UserError(f"Pixel Representation in its header is {signed}, but has to be 0 or 1")

    inverted = read_word(data, "PhotometricInterpretation") == "MONOCHROME1"
    shape = read_word(data, "PresentationLUTShape")
    if shape and shape != ("INVERSE" if inverted else "IDENTITY"):
        raise UserError("its Photometric Interpretation and its Presentation LUT Shape contradict each other, so"
                        " that it may be a negative")
    return Pixels(rows, columns, allocated, stored, high, bool(signed), inverted)


# ---- pixels ------------------------------------------------------------------------------------


def read_stream_header(frame):
    """Stream: what a compressed stream declares; signed is None and tiles is 0 where it does not say.

    frame: bytes of JPEG (ITU-T T.81), JPEG-LS (T.87) or JPEG 2000 (T.800). Raises any error where it is damaged.
    """
    if frame.startswith(JPEG2000_START):
        right, bottom, left, top, *tile = struct.unpack(">8I", frame[8:40])
        samples, precision = struct.unpack(">HB", frame[40:43])
        width, height, tile_left, tile_top = tile
        tiles = math.ceil((right - tile_left) / width) * math.ceil((bottom - tile_top) / height)
        return Stream(bottom - top, right - left, samples, precision % 128 + 1, precision >= 128, tiles)

    position = 2
    while True:
        marker, length = struct.unpack(">xBH", frame[position : position + 4])
        if marker in SIZE_MARKERS:
            precision, rows, columns, samples = struct.unpack(">BHHB", frame[position + 4 : position + 10])
            return Stream(rows, columns, samples, precision, None, 0)
        if marker not in SKIPPED_MARKERS:
            raise ValueError("the size of the image is not where it has to be")
        position += 2 + length


def check_stream(frame, pixels):
    """Compare what a compressed stream declares with the header, before it is decoded: Stream, or UserError."""
    with refuse(DAMAGED):
        stream = read_stream_header(frame)

    if (stream.rows, stream.columns) != (pixels.rows, pixels.columns):
        contradict(f"{pixels.columns} x {pixels.rows} pixels", f"{stream.columns} x {stream.rows}")
    if stream.samples != 1:
        contradict("a grey image", f"{stream.samples} colours")
    if stream.precision > pixels.allocated:
        contradict(f"{pixels.stored} bits a pixel", stream.precision)
    tiles = set(re.findall(TILE_START, frame, re.DOTALL))
    if STREAM_END not in frame.rstrip(b"\0")[-TAIL:] or len(tiles) < stream.tiles:
        raise UserError("its compressed image ends too early: it may have been cut off when it was copied")
    return stream


def join_fragments(value):
    """The one compressed frame in the value of Pixel Data: bytes. Raises UserError where there are several."""
    starts = JPEG_START, JPEG2000_START, JP2_START
    with refuse(DAMAGED):
        _, *fragments = import_pydicom().encaps.generate_fragments(value)
        frame = b"".join(fragments)

    is_rle = not frame.startswith(starts)
    frames = [part for part in fragments if is_rle or part.startswith(starts)]
    if len(frames) > 1:
        raise UserError("its image has several frames: not a single mammogram")
    return frame[max(0, frame.find(JPEG2000_START)) :] if frame.startswith(JP2_START) else frame


def unpack_bits(packed, count):
    """The first `count` bytes that PackBits (TIFF 6.0, section 9) unpacks: uint8 (N,). ValueError for fewer."""
    return np.frombuffer(Image.frombytes("L", (count, 1), packed, "packbits", "L").tobytes(), np.uint8)


def decode_rle(frame, pixels):
    """The pixels of an RLE frame as stored: uint8 or uint16 (H, W). Raises UserError.

    A segment holds one byte of each pixel, the first segment the highest (PS3.5 annex G). The decoder of pydicom
    is slower. It ignores surplus pixels, which shears films. Less than a line of them is padding.
    """
    size, line = pixels.rows * pixels.columns, min(pixels.rows, pixels.columns)
    with refuse(DAMAGED):
        count, *starts = struct.unpack("<16I", frame[:64])
        if 8 * count != pixels.allocated:
            raise ValueError("another number of bits")
        ends = [*starts[1:count], len(frame)]
        segments = [frame[start:end] for start, end in zip(starts, ends, strict=False)]
        planes = np.stack([unpack_bits(segment, size) for segment in segments], axis=-1)

    for segment in segments:
        with contextlib.suppress(ValueError):
            unpack_bits(segment, size + line)
            contradict(f"{pixels.columns} x {pixels.rows} pixels", "more")
    return planes.view(f">u{count}").astype(f"u{count}").reshape(pixels.rows, pixels.columns)


def check_length(element, pixels):
    """Raise UserError where uncompressed pixels are more or fewer than declared; element: of Pixel Data."""
    expected, found = pixels.rows * pixels.columns * pixels.allocated // 8, len(element.value)
    if found < element.length:
        raise UserError(f"the file is cut off: it has {found} of {element.length} bytes of pixels")
    if found not in (expected, expected + expected % 2):  # a value of odd length is padded
        size = f"{pixels.columns} x {pixels.rows} pixels of {pixels.allocated} bits"
        contradict(f"{size}, which are {expected} bytes", found)


def decode(data, pixels):
    """(raw, stream): the pixels as stored, uint8 or uint16 (H, W), and Stream or None. Raises UserError."""
    pydicom = import_pydicom()
    with refuse("its transfer syntax is unknown"):
        syntax = data.file_meta.TransferSyntaxUID
        compressed = syntax.is_encapsulated
    element = data.get_item("PixelData")
    if compressed and element.length != UNDEFINED:
        contradict("compressed pixels", "uncompressed pixels")
    if not compressed and element.length == UNDEFINED:
        contradict("uncompressed pixels", "compressed pixels")

    source, stream = element.value, None
    if compressed:
        frame = join_fragments(element.value)
        if syntax == pydicom.uid.RLELossless:
            return decode_rle(frame, pixels), None
        stream = check_stream(frame, pixels)
        source = pydicom.encaps.encapsulate([frame])  # exactly what was checked
    else:
        check_length(element, pixels)

    with refuse(f"its compression ({syntax.name}) cannot be read; export it uncompressed"):
        decoder = pydicom.pixels.get_decoder(syntax)
    is_extended = syntax == pydicom.uid.JPEGExtended12Bit and pixels.stored > 8  # which only pylibjpeg reads
    if not decoder.is_available or (is_extended and "pylibjpeg" not in decoder.available_plugins):
        raise UserError(f"its compression ({syntax.name}) needs more packages: pip install pylibjpeg"
                        " pylibjpeg-libjpeg pylibjpeg-openjpeg")
    is_signed = stream is not None and stream.signed is True  # some plugins shift such a stream to 0 without it
    with refuse(DAMAGED if compressed else "its pixels cannot be read"):
        raw, _ = decoder.as_array(
            source, raw=True, rows=pixels.rows, columns=pixels.columns, samples_per_pixel=1,
            number_of_frames=1, photometric_interpretation="MONOCHROME2", bits_allocated=pixels.allocated,
            bits_stored=pixels.stored, pixel_representation=int(is_signed), pixel_keyword="PixelData",
            pixel_vr=element.VR or "OW", correct_unused_bits=False, apply_j2k_sign_correction=False)
        if raw.shape != (pixels.rows, pixels.columns) or 8 * raw.itemsize != pixels.allocated:
            raise ValueError("another shape or another number of bits")
    raw = np.ascontiguousarray(raw, raw.dtype.newbyteorder("="))
    return raw.view(f"u{raw.itemsize}"), stream


# ---- meaning of the pixels ---------------------------------------------------------------------


def to_signed(numbers, bits):
    """What unsigned numbers below 2 ** bits mean in two's complement."""
    return np.where(numbers < 2 ** (bits - 1), numbers, numbers - 2**bits)


def find_padding(data, meanings):
    """Which stored numbers are padding around the film: bool array as long as `meanings`, what each number means.

    PS3.3 C.7.5.1.1.2. A signed limit may be written as an unsigned one, and the reverse.
    """
    first = read_number(data, "PixelPaddingValue", math.nan)
    last = read_number(data, "PixelPaddingRangeLimit", first)
    if math.isnan(first):
        return np.zeros(len(meanings), bool)

    limits = meanings[[int(first) % len(meanings), int(last) % len(meanings)]]
    return (meanings >= limits.min()) & (meanings <= limits.max())


def find_overlay_bits(data):
    """The bits of a pixel that hold overlays, as a sum of powers of 2 (PS3.3 C.9.2, retired)."""
    overlays = 0
    for group in range(0x6000, 0x6020, 2):
        with refuse("Overlay Bit Position in its header is no number"):
            position = data.get((group, 0x0102))
            if position is not None and position.value and (group, 0x3000) not in data:
                overlays |= 1 << min(int(position.value), 16)
    return overlays


def read_values(data, counts, pixels, stream):
    """(values, padding): the grey value of each stored number, int, and whether it is padding, bool.

    counts: of count_values; both arrays are as long. Raises UserError where the pixels contradict the header.
    """
    numbers = np.arange(len(counts))
    padding = find_padding(data, to_signed(numbers, pixels.allocated) if pixels.signed else numbers)
    used = (counts > 0) & ~padding

    unused_below = pixels.high + 1 - pixels.stored
    if unused_below and (numbers[used] % 2**unused_below).any():
        contradict(f"{pixels.stored} bits a pixel up to bit {pixels.high}", "values in the bits below, too")

    values = numbers % 2 ** (pixels.high + 1) >> unused_below
    beyond = (numbers & ~find_overlay_bits(data)) >> (pixels.high + 1)
    all_ones = 2 ** (pixels.allocated - pixels.high - 1) - 1
    is_negative = pixels.signed & (values >= 2 ** (pixels.stored - 1))
    fits = (beyond == 0) | (is_negative & (beyond == all_ones))
    if not fits[used].all():
        needed = int(numbers[used & ~fits].max()).bit_length() - unused_below
        contradict(f"{pixels.stored} bits a pixel", needed)

    if stream and stream.signed not in (None, pixels.signed) and (numbers[used] >> (stream.precision - 1)).any():
        if pixels.signed:
            contradict("signed pixels", "unsigned pixels")
        contradict("unsigned pixels", "signed pixels")
    return to_signed(values, pixels.stored) if pixels.signed else values, padding


def apply_table(data, keyword, values):
    """(entries, brightness): what the lookup table of a sequence has for values (N,), int and 0 to 1.

    PS3.3 C.11.1 and C.11.2. None where the header has no table. Entries of 8 bits may be packed, two in a word.
    Values beyond the table have its first or last entry. Raises UserError.
    """
    with refuse("a lookup table in its header is damaged"):
        item = first_item(data, keyword)
        if not item or not (item.get("LUTDescriptor") or item.get("LUTData")):
            return None

        count, first, bits = (int(number) for number in item.LUTDescriptor)
        order = "<u2" if data.file_meta.TransferSyntaxUID.is_little_endian else ">u2"
        words = item.LUTData
        words = np.frombuffer(words, order) if isinstance(words, bytes) else np.ravel(words).astype(order)
    count = count or 2**16

    if len(words) == (count + 1) // 2 and bits == 8:
        words = words.view(np.uint8)[:count]
    if len(words) != count:
        contradict(f"a lookup table of {count} entries", len(words))
    needed = int(words.max()).bit_length()
    if not 8 <= bits <= 16 or needed > bits:
        contradict(f"a lookup table of {bits} bits", f"one of {needed}")

    if values.min() < 0 and first >= 2**15:  # a negative number, written without sign
        first -= 2**16
    entries = words[np.rint(values - first).clip(0, count - 1).astype(int)].astype(int)
    if bits == 16:  # which is often declared for fewer
        bits = next(depth for depth in DEPTHS if depth >= needed)
    return entries, entries / (2**bits - 1)


def apply_window(data, levels):
    """The brightness of levels, 0 to 1, in the window of the header; None without window (PS3.3 C.11.2.1.2)."""
    center = read_number(data, "WindowCenter", math.nan)
    width = read_number(data, "WindowWidth", math.nan)
    if math.isnan(center) or math.isnan(width):
        return None

    function = read_word(data, "VOILUTFunction") or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise UserError("VOI LUT Function in its header is unknown")
    if width <= 0 or (width < 1 and function == "LINEAR"):
        raise UserError(f"Window Width in its header is {width:g}, so that nothing would be seen")

    if function == "SIGMOID":
        return (1 + np.tanh(2 * (levels - center) / width)) / 2
    if function == "LINEAR":
        center, width = center - 0.5, max(width - 1, 1e-6)  # a width of 1 is a step
    return ((levels - center) / width + 0.5).clip(0, 1)


def render(data, values, counts, pixels, stream):
    """(grey, row): the brightness of each stored number, uint16, and the row of read_dicom.

    values: of read_values; counts: how many pixels have each, without padding. The result of a lookup table or a
    window is scaled to 16 bits. Otherwise the values are the brightness.
    """
    modality = apply_table(data, "ModalityLUTSequence", values)
    slope = 1 if modality else read_number(data, "RescaleSlope", 1)
    if slope == 0:
        raise UserError("Rescale Slope in its header is 0, so that all pixels would be equal")
    if modality:
        levels, brightness = modality
    else:
        levels, brightness = values * slope + read_number(data, "RescaleIntercept", 0), None

    voi = apply_table(data, "VOILUTSequence", levels)
    if voi:
        _, brightness = voi
    elif (window := apply_window(data, levels)) is not None:
        brightness = window

    quantile = partial(np.quantile, weights=counts, method="inverted_cdf")
    container, depth = f"{pixels.stored} bit DICOM", pixels.stored
    unsure = brightness is None and depth == 16  # many films of 12 bits declare 16
    if brightness is not None:
        container += " with LUT" if modality or voi else " with window"
        grey, depth = np.rint(brightness * 65535), 16
    else:
        if stream and stream.precision < pixels.stored < 16:  # the white is unknown
            contradict(f"{pixels.stored} bits a pixel", stream.precision)
        lowest = quantile(values, OUTLIERS) if pixels.signed else 0
        grey = (values - min(0, lowest)).clip(0, 65535)  # few of the values below 0 are in use

    is_falling = brightness is None and slope < 0
    if is_falling != pixels.inverted:
        white = quantile(grey, 1 - OUTLIERS) if unsure else 2**depth - 1
        grey = white - grey.clip(max=white)
    grey = grey.astype(np.uint16)
    used = find_depth(np.bincount(grey, counts, 2**16))
    if unsure:
        depth = used
    photometric = "MONOCHROME1" if pixels.inverted else "MONOCHROME2"
    row = {"container": container, "depth": depth, "used": used, "format": f"{container}, {photometric}"}
    return grey, row


def read_dicom(path):
    """(grey, row) of a DICOM film: uint16 (H, W), from 0, black; and its container, depth, used and format.

    - container: the kind of file, such as 12 bit DICOM, whose films share a grey scale
    - depth: bits of the grey scale; used: bits that the brightest pixels need
    - format: for people

    Raises UserError.
    """
    data = open_dicom(path)
    check_kind(data)
    pixels = read_pixel_tags(data)
    raw, stream = decode(data, pixels)

    counts = count_values(raw)
    values, padding = read_values(data, counts, pixels, stream)
    counts = np.where(padding, 0, counts)
    if not counts.any():
        raise UserError("all its pixels are padding")

    grey, row = render(data, values, counts, pixels, stream)
    grey[padding] = 0  # last, so that padding is black in negatives, too
    return cv2.LUT(raw, grey), row
