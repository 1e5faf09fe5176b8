"""Read one film file as an image of 224 x 224: formats, bit depth, crop, and the cache of films."""
import ast
import contextlib
import hashlib
import io
import json
import math
import os
import re
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL import Image
from PIL.ExifTags import Base as Tag

from data import MAX_PIXELS, UserError, dicom, duplicates, explain_write_errors, log, replace, warn
from data.dicom import count_values, find_depth, read_dicom, refuse, unpack_bits
from data.films import is_dicom
from data.labels import LESION_BOXES

IMAGE_SIZE = 224  # pixels, both ways
MIN_SIDE = 32  # pixels of the shorter side of a film
THUMBNAIL = 256  # longer side, in pixels, of the film in which the breast is found
BORDER = 20  # width of the widest white border, in pixels of the thumbnail
SURROUNDINGS = 0.5  # of a lesion, each way, as a share of its longer side
BLANK = 2  # grey levels of 256 by which the pixels of a blank film may differ
UNCROPPED = 0.9  # share of a film: if CROP keeps more, it found no background
BRIGHT = 0.2  # brightness of the background, as a share of the white of the film: real films have 0.12 or less
WHITE = 0.15  # share of a film that is white: at most 0.10 of real films, 0.16 or more of their negatives
WHITE_CROP = 0.09  # the same of what CROP "breast" keeps: 1 of 735 real films has more, 3 of their negatives less
BOX_INSIDE = 0.1  # share of a lesion box that has to be breast: of mini-MIAS 0 in two films, above 0.5 in others
UNEXPLAINED = 0.02  # share of variance off black and white: below 0.01 in masks, above 0.04 in lesion crops
DECIDING = 0.1  # share of the films of a container that decides its bit depth
SHALLOW = 0.25  # share of the films of a container that may be dark by chance
OTHER_SCANNER = 4  # bits by which films of another scanner are shallower
THREADS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
FORMATS = ("PNG", "JPEG", "TIFF", "PPM", "BMP")  # of Pillow, by content
MODES = {  # of Pillow that are read
    "1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "I;16", "I;16L", "I;16B",
}
EXIF_TEXTS = {"xmp", "Raw profile type exif"}  # in which a PNG may hold its orientation, too
NO_COMPRESSION, DEFLATE, PACKBITS = 1, (8, 32946), 32773  # values of the tag Compression of TIFF 6.0
WHITE_IS_ZERO, YCBCR = 0, 6  # of PhotometricInterpretation
SEPARATE_PLANES = 2  # of PlanarConfiguration
UNSIGNED, MULTIPLIED = {1, 4}, (1,)  # of SampleFormat, and of ExtraSamples where the opacity is in the colours
ANEW = "export it anew, as PNG for example"
NO_FILE = "no file, or a link that leads nowhere"
BEYOND = "its pixels are negative or need more than 16 bits; save it with 8 or 16 bits, unsigned"
READERS = ("numpy", "opencv", "pydicom", "pylibjpeg", "pyjpegls", "python-gdcm", "pillow")  # of films
warnings.filterwarnings("ignore", module="PIL")  # about tags that are not used here
RELEASES = [f"{found.name} {found.version}" for found in distributions()
            if str(found.name).lower().startswith(READERS)]


def parse_code(file):
    """The code of a module as text, without comments and docstrings: it differs where the behaviour may."""
    tree = ast.parse(Path(file).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


CODE = [parse_code(file) for file in (__file__, dicom.__file__, duplicates.__file__)]
VERSION = hashlib.sha256(str(sorted(RELEASES) + CODE).encode()).hexdigest()  # of the code that reads films


def to_bytes(grey, depth):
    """Grey values of 0 to 2 ** depth - 1 as uint8 of 0 to 255; what is brighter is white."""
    return cv2.convertScaleAbs(grey, alpha=255 / (2**depth - 1))


def open_picture(content):
    """The header of a PNG, JPEG, TIFF, PNM or BMP file as a Pillow image that is not decoded yet.

    content: bytes of the file; its name does not count. Raises UserError.
    """
    if not content:
        raise UserError("an empty file")
    if content[128:132] == b"DICM":
        raise UserError("a DICOM file under another name: give it a name that ends in .dcm")
    with refuse(f"not a PNG, JPEG, TIFF, PGM or BMP image, or one that is damaged or of an unusual kind; {ANEW}"):
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise UserError("an image that is larger than any mammogram") from error
        pages = getattr(image, "n_frames", 1)

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels, which is larger than any mammogram")
    if pages > 1:
        raise UserError(f"{pages} pages or pictures in one file; save the one that is the mammogram")
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        raise UserError("a PNG in which one grey value or colour is transparent; save it without transparency")
    if image.mode not in MODES:
        raise UserError("its pixels are neither grey nor red, green and blue of 8 or 16 bits; save it in grey")
    return image


def check_chunks(content):
    """Raise an error where a chunk of a PNG exceeds the file: OpenCV would allocate gigabytes for it."""
    place = 8
    while content[place + 4 : place + 8] != b"IEND":
        place += 12 + int.from_bytes(content[place : place + 4], "big")
        if place >= len(content):
            raise ValueError("a chunk is cut off")


def find_parts(tags):
    """(offsets, lengths, sizes) of the strips or tiles of a TIFF; tags: of Pillow.

    sizes: (least, most) bytes of each, unpacked: the last strip of a plane may be shorter than the others, or not.
    """
    width, height = tags[Tag.ImageWidth], tags[Tag.ImageLength]
    bits, samples = tags.get(Tag.BitsPerSample, (1,))[0], tags.get(Tag.SamplesPerPixel, 1)
    planes = samples if tags.get(Tag.PlanarConfiguration) == SEPARATE_PLANES else 1
    pixel = bits * samples / planes / 8  # bytes

    if Tag.TileOffsets in tags:
        columns, rows = tags[Tag.TileWidth], tags[Tag.TileLength]
        size = math.ceil(columns * pixel) * rows
        count = math.ceil(width / columns) * math.ceil(height / rows)
        return tags[Tag.TileOffsets], tags[Tag.TileByteCounts], [(size, size)] * count * planes

    row = math.ceil(width * pixel)
    rows = min(tags.get(Tag.RowsPerStrip, height), height)
    sizes = [(row * min(rows, height - top), row * rows) for top in range(0, height, rows)]
    return tags[Tag.StripOffsets], tags[Tag.StripByteCounts], sizes * planes


def check_part(part, compression, least, most):
    """Raise an error where a strip or a tile of a TIFF does not unpack to `least` to `most` bytes."""
    if compression == PACKBITS:
        unpack_bits(part, least)
        unpacked = least
        with contextlib.suppress(ValueError):
            unpacked = len(unpack_bits(part, most + 1))
    elif compression in DEFLATE:
        inflater = zlib.decompressobj()
        unpacked = len(inflater.decompress(part, most + 1))
        if not inflater.eof:
            raise ValueError("no end, or another checksum")
    else:
        unpacked = len(part)

    if not least <= unpacked <= most:
        raise ValueError("another number of bytes")


def check_parts(tags, content):
    """Raise an error for damage in a TIFF that the decoders ignore; tags: of Pillow.

    They check neither the checksum of deflate nor the number of bytes. LZW has no checksum: Pillow finds its
    damage where a code is impossible.
    """
    compression = tags.get(Tag.Compression, NO_COMPRESSION)
    has_small_colours = tags.get(Tag.PhotometricInterpretation) == YCBCR  # of a lower resolution than the grey
    if has_small_colours or compression not in (NO_COMPRESSION, *DEFLATE, PACKBITS):
        return

    for start, length, (least, most) in zip(*find_parts(tags), strict=True):
        check_part(content[start : start + length], compression, least, most)


def check_tiff(tags, mode):
    """Whether a TIFF has colours of 16 bits, which Pillow would round; tags, mode: of Pillow.

    Raises UserError for what is not read right.
    """
    if Tag.PhotometricInterpretation not in tags:
        raise UserError(f"a TIFF that does not say whether 0 is black or white; {ANEW}")
    is_deep = max(tags.get(Tag.BitsPerSample, (1,))) > 8
    if not is_deep and not UNSIGNED.issuperset(tags.get(Tag.SampleFormat, UNSIGNED)):
        raise UserError(BEYOND)
    if is_deep and tags.get(Tag.PhotometricInterpretation) == WHITE_IS_ZERO:
        raise UserError("a TIFF of 16 bits in which 0 is white; save it with 0 as black")
    has_deep_colours = is_deep and not mode.startswith("I")
    if has_deep_colours and tags.get(Tag.PlanarConfiguration) == SEPARATE_PLANES:
        raise UserError("a TIFF of 16 bits with one plane for each colour; save it in grey")
    return has_deep_colours


def decode_pnm(content):
    """The luminance of a PGM or PPM file: uint8 or uint16 (H, W). Raises an error where it is damaged.

    The maxval of the header is scaled to white, as Netpbm defines it.
    """
    header = re.match(rb"P([2356])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+0*(\d{1,5})" + rb"(?:\r\n|\s)", content)
    width, height, maxval = (int(number) for number in header.groups()[1:])
    shape = (height, width) if header[1] in b"25" else (height, width, 3)
    dtype, white = (np.dtype(np.uint8), 255) if maxval < 256 else (np.dtype(">u2"), 65535)

    body, size = memoryview(content)[header.end() :], math.prod(shape) * dtype.itemsize
    if header[1] in b"23":  # text with comments
        words = re.sub(rb"#[^\r\n]*", b"", body).split()
        body = np.array([int(word) for word in words], dtype).tobytes()
    if len(body) < size:
        raise UserError("the file is cut off: it has fewer pixels than its header declares")
    if bytes(body[size:]).strip():
        raise UserError("it has more pixels than its header declares")
    pixels = np.frombuffer(body[:size], dtype).reshape(shape)
    if pixels.max() > maxval:
        raise UserError(f"its header declares {maxval} as white (maxval), but it has pixels of {pixels.max()}")

    pixels = pixels.astype(dtype.newbyteorder("="))
    if maxval != white:
        pixels = np.rint(pixels * np.float32(white / maxval)).astype(pixels.dtype)
    return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)


def decode_picture(image, content):
    """The luminance (ITU-R BT.601) of an image of Pillow: uint8 or uint16 (H, W). Raises an error for damage.

    content: bytes of its file. Pillow finds all damage but that inside of the data of a JPEG. OpenCV is faster for
    PNG and keeps colours of 16 bits.
    """
    if content.startswith((b"P2", b"P3", b"P5", b"P6")):
        return decode_pnm(content)

    has_deep_colours = False
    if image.format == "TIFF":
        has_deep_colours = check_tiff(image.tag_v2, image.mode)
        check_parts(image.tag_v2, content)
    if image.format == "PNG":
        check_chunks(content)
    else:
        image.load()

    if image.format == "PNG" or has_deep_colours:
        flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        return pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)

    grey = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    if grey.itemsize > 2 and (grey.min() < 0 or grey.max() >= 2**16):
        raise UserError(BEYOND)
    return grey if grey.dtype == np.uint8 else grey.astype(np.uint16, copy=False)


def find_opacity(image, content):
    """How opaque each pixel of an image of Pillow is: uint8 (H, W), or None where all are.

    content: bytes of its file. Pillow decodes them separately, since its memory has to be free again before OpenCV
    needs as much.
    """
    tags = getattr(image, "tag_v2", {})
    is_in_colours = tags.get(Tag.ExtraSamples) == MULTIPLIED and max(tags[Tag.BitsPerSample]) > 8
    if is_in_colours or not image.has_transparency_data:  # OpenCV leaves it there, Pillow takes it out
        return None

    image = open_picture(content)
    if "A" not in image.getbands():
        image = image.convert("RGBA")
    return np.asarray(image.getchannel("A"))


def find_orientation(image, content):
    """The orientation of EXIF 2.3, 1 to 8, of an image of Pillow; content: bytes of its file. Raises UserError."""
    may_be_turned = b"eXIf" in content or not EXIF_TEXTS.isdisjoint(image.info)
    if image.format == "PNG" and not may_be_turned:
        return 1  # Pillow would decode the film to look for the tag at its end
    with refuse(f"its EXIF data are damaged, so that its orientation is unknown; {ANEW}"):
        return image.getexif().get(Tag.Orientation, 1)


def turn_upright(grey, orientation):
    """A film (H, W) as viewers show it: orientation is that of EXIF 2.3, 1 to 8, 1 where it is upright."""
    if orientation in (5, 6, 7, 8):
        grey = grey.T
    if orientation in (3, 4, 7, 8):
        grey = grey[::-1]
    if orientation in (2, 3, 6, 7):
        grey = grey[:, ::-1]
    return np.ascontiguousarray(grey)


def read_picture(path):
    """(grey, row) of a PNG, JPEG, TIFF, PNM or BMP film: uint8 or uint16 (H, W); see read_dicom. UserError.

    Transparent pixels are black.
    """
    content = path.read_bytes()
    image = open_picture(content)
    damaged = "damaged or compressed in an unusual way" if image.format == "TIFF" else "cut off or damaged"
    with refuse(f"its pixels are {damaged}; {ANEW}"):
        opacity = find_opacity(image, content)
        grey = decode_picture(image, content)
    if opacity is not None:
        if not opacity.any():
            raise UserError("an image that is wholly transparent; save it without transparency")
        grey = cv2.multiply(grey, opacity.astype(grey.dtype), scale=1 / 255)
    if image.format != "TIFF":  # which the decoders turn
        grey = turn_upright(grey, find_orientation(image, content))

    kind = {"PPM": "PNM"}.get(image.format, image.format)
    container = f"{8 * grey.itemsize} bit {kind}"
    colour = "grey" if image.mode.startswith(("1", "L", "I")) else "colour"
    depth = find_depth(count_values(grey))
    return grey, {"container": container, "depth": depth, "used": depth, "format": f"{container}, {colour}"}


def find_breast(grey, depth):
    """The largest bright component of a film, without labels, tape and borders: uint8 (H, W) of 0 and 1."""
    scale = THUMBNAIL / max(grey.shape)
    size = [max(1, round(side * scale)) for side in reversed(grey.shape)]
    thumbnail = cv2.medianBlur(to_bytes(cv2.resize(grey, size, interpolation=cv2.INTER_AREA), depth), 5)
    otsu, _ = cv2.threshold(thumbnail, 0, 255, cv2.THRESH_OTSU)
    bright = thumbnail > 0.4 * otsu  # the skin is darker than Otsu's threshold
    white = (thumbnail >= 0.97 * thumbnail.max()) & (thumbnail.max() >= 250)  # unexposed film
    for turns in range(4):  # a border is white from its edge inwards and soon ends, white tissue does not
        run = np.logical_and.accumulate(np.rot90(white, turns))
        np.rot90(bright, turns)[run & (run.sum(axis=0) <= BORDER)] = False
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (11, 11))  # it separates labels from the breast
    bright = cv2.morphologyEx(bright.astype(np.uint8), cv2.MORPH_OPEN, disc, borderValue=0)  # at the edges, too
    outlines, _ = cv2.findContours(bright, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return np.ones(grey.shape, np.uint8)
    breast = cv2.fillPoly(np.zeros_like(bright), [max(outlines, key=cv2.contourArea)], 1)
    return cv2.resize(breast, grey.shape[::-1], interpolation=cv2.INTER_NEAREST)


def read_boxes(lesion_box):
    """The boxes of a lesion_box: int (K, 4), x, y, width and height in pixels of the film."""
    return np.array([box.split(":") for box in lesion_box.split("|") if box], int).reshape(-1, 4)


def place_boxes(film):
    """The lesion boxes of a row of the table: float (K, 4), x, y, width and height as shares of its image."""
    corner = film.left, film.top, 0, 0
    size = film.width, film.height, film.width, film.height
    return (read_boxes(film.lesion_box) - corner) / size


def crop_film(grey, region, margin):
    """(image, box): the square around a region of a film, black beyond the film.

    region: a mask (H, W), or int32 points (N, 2). margin: added on each side, as a share of its longer side.
    image: (IMAGE_SIZE, IMAGE_SIZE), of the dtype of grey. box: a dict of left, top, width and height in pixels of
    the film.
    """
    left, top, width, height = cv2.boundingRect(region)
    side = int(np.ceil(max(width, height) * (1 + 2 * margin)))
    left, top = left - (side - width) // 2, top - (side - height) // 2
    part = grey[max(0, top) : top + side, max(0, left) : left + side]

    scale = IMAGE_SIZE / side
    x, y = round(max(0, -left) * scale), round(max(0, -top) * scale)  # where the film starts in the image
    width = min(max(1, round(part.shape[1] * scale)), IMAGE_SIZE - x)
    height = min(max(1, round(part.shape[0] * scale)), IMAGE_SIZE - y)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE), grey.dtype)
    image[y : y + height, x : x + width] = cv2.resize(part, (width, height), interpolation=method)
    return image, dict(left=left, top=top, width=side, height=side)


def is_mask(grey, depth=16):
    """Whether an image is black and white, as masks of lesions are, apart from edges that JPEG has blurred.

    The distance from black and white is compared with the variance. A dark film with a few bright specks is close
    to black and white, too, but its variance is small.
    """
    step = 1 + min(grey.shape) // 1000  # enough pixels to tell
    sample = grey[::step, ::step].clip(max=2**depth - 1).astype(np.float32)
    white = sample.max()
    distance = np.minimum(sample, white - sample)
    return bool(sample.min() <= 0.1 * white and np.mean(distance**2) <= UNEXPLAINED * sample.var())


@contextlib.contextmanager
def explain_read_errors():
    """Turn an OSError while a film is opened or read into a UserError."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(NO_FILE) from error
    except OSError as error:
        raise UserError(f"the file cannot be opened ({error.strerror or 'the drive does not answer'})") from error


def read_file(path):
    """read_dicom or read_picture, and the size of the file. UserError where it cannot be opened or has changed."""
    with explain_read_errors():
        if not path.is_file():  # a pipe would never end
            raise UserError(NO_FILE)
        before = path.stat()
        grey, row = read_dicom(path) if is_dicom(path) else read_picture(path)
        after = path.stat()

    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError("the file changed while it was read")
    return grey, row | {"bytes": after.st_size}


def has_bright_background(grey, breast):
    """Whether the background of a film is not black, so that CROP may keep it; breast: of find_breast."""
    step = 1 + min(grey.shape) // 500  # enough pixels to tell
    sample, inside = grey[::step, ::step], breast[::step, ::step].astype(bool)
    if inside.mean() > UNCROPPED:
        return True
    return bool(np.median(sample[~inside]) > BRIGHT * np.percentile(sample, 99))


def has_white_background(grey, depth, limit):
    """Whether so much of a film is white that it may be a negative; limit: WHITE or WHITE_CROP."""
    step = 1 + min(grey.shape) // 500  # enough pixels to tell
    return bool(np.mean(grey[::step, ::step] > 0.95 * (2**depth - 1)) > limit)


def has_box_outside(boxes, breast):
    """Whether a lesion box lies outside of the breast: less than BOX_INSIDE of it shows tissue."""
    shares = [breast[top : top + height, left : left + width].mean() for left, top, width, height in boxes]
    return any(share < BOX_INSIDE for share in shares)


def read_native(path, crop, lesion_box):
    """(image, fingerprints, row): read_film before the scaling to 8 bits, which needs the whole collection.

    Raises UserError.
    """
    grey, row = read_file(path)
    height, width = grey.shape
    boxes = read_boxes(lesion_box)
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{width} x {height} pixels, too small for a mammogram")
    if (starts >= (width, height)).any() or (ends > (width + 2, height + 2)).any():  # 2 for rounding
        raise UserError(f"its lesion_box reaches beyond the image of {width} x {height} pixels: it"
                        " has to be x:y:width:height, not two corners")

    whole = image = cv2.resize(grey, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    shows_mask = is_mask(grey, row["depth"]) and bool(np.ptp(whole) > grey.max() / 2)
    if np.ptp(to_bytes(whole, row["depth"])) <= BLANK and not shows_mask:  # a mask of 0 and 1 looks blank
        window = " in the window of its header" if "window" in row["container"] else ""
        raise UserError(f"a blank image: all its pixels are equal, or nearly so{window}")

    box = {"left": 0, "top": 0, "width": width, "height": height}
    breast = find_breast(grey, row["depth"]) if crop == "breast" or lesion_box else None
    if crop == "breast":
        image, box = crop_film(grey * breast, breast, 0)
    elif crop == "lesion" and lesion_box:
        corners = np.minimum(np.concatenate([starts, ends - 1]), (width - 1, height - 1))
        image, box = crop_film(grey, corners.astype(np.int32), SURROUNDINGS)
    if image.min() == image.max() and not shows_mask:
        raise UserError("all pixels that CROP keeps are equal")

    fingerprints = duplicates.take_fingerprints(whole, grey.shape)
    is_film = not shows_mask
    shown, limit = (image, WHITE_CROP) if crop == "breast" else (grey, WHITE)
    found = {"film_width": width, "film_height": height, "is_mask": shows_mask,
             "is_uncropped": is_film and crop == "breast" and has_bright_background(grey, breast),
             "is_white": is_film and has_white_background(shown, row["depth"], limit),
             "box_outside": is_film and bool(lesion_box) and has_box_outside(boxes, breast),
             "film_sha256": hashlib.sha256(whole).hexdigest()}
    return image, fingerprints, row | box | found


def choose_depth(depth, common):
    """The bits by which a film is scaled that needs `depth`, where the films of its container need `common`.

    A film that is deeper, or shallower by four bits or more, comes from another scanner: its own bits count.
    """
    return common if common - OTHER_SCANNER < depth <= common else depth


def read_film(path, crop=None, lesion_box="", depths=None):
    """(image, fingerprints, row) of one film as read_films has them; depths: bits by container, see choose_depth.

    image: uint8 (IMAGE_SIZE, IMAGE_SIZE). Raises UserError.
    """
    if not re.fullmatch(LESION_BOXES, str(lesion_box)):
        raise UserError(f"{path} has the lesion_box {lesion_box!r}, but it has to be x:y:width:height in pixels.")
    if crop == "lesion" and not lesion_box:
        raise UserError(f'{path} needs a lesion_box, as CROP is "lesion": x:y:width:height in pixels.')
    image, fingerprints, row = read_native(path, crop, lesion_box)
    depth = choose_depth(row["depth"], (depths or {}).get(row["container"], row["depth"]))
    return to_bytes(image, depth), fingerprints, row | {"depth": depth}


def read_image(path, crop=None, lesion_box="", depths=None):
    """(image, row) of read_film."""
    image, _, row = read_film(path, crop, lesion_box, depths)
    return image, row


def read_cached(path, lesion_box, crop, cache):
    """read_native, from the folder `cache` where nothing changed; of a bad film, row holds the reason only."""
    try:
        with explain_read_errors():
            stat = path.stat()
        key = [str(path), stat.st_size, stat.st_mtime_ns, crop, lesion_box, VERSION]
        file = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
        with contextlib.suppress(Exception), np.load(file) as film:  # there may be none, or a damaged one
            return film["image"], film["fingerprints"], json.loads(str(film["row"]))
        image, fingerprints, row = read_native(path, crop, lesion_box)
    except UserError as error:
        return None, None, {"reason": str(error)}

    with explain_write_errors(cache.parent), replace(file) as temporary:  # another process may write the same film
        np.savez(temporary, image=image, fingerprints=fingerprints, row=json.dumps(row))
    return image, fingerprints, row


def describe_classes(films):
    """How many films of each class there are, as text: 12 benign, 8 malignant."""
    return ", ".join(f"{count} {label}" for label, count in films["label"].value_counts().sort_index().items())


def tell_of_shallow(films, container, depth):
    """Warn where many films of a container use a quarter of the grey scale or less; depth: bits of that scale."""
    shallow = films[films["used"] <= depth - 2]
    if len(shallow) >= SHALLOW * len(films):
        log.warning("%d of %d %s mammograms (%s) use at most %d bits, but are scaled as %d bits. If they come"
                    " from another scanner, they are too dark", len(shallow), len(films), container,
                    describe_classes(shallow), shallow["used"].max(), depth)


def find_common_depths(films):
    """{container: bits}: the largest bit depth that at least a tenth of the films of a container need.

    So no single film decides how the others look. The column depth may also hold the result of share_depths.
    """
    depths = films.groupby("container")["depth"].quantile(1 - DECIDING, interpolation="higher")
    return depths.astype(int).to_dict()


def share_depths(films, known):
    """The bits by which each film is scaled: int (N,). Logs them, and warns where films of a container differ.

    known: {container: bits} of an earlier run, which are used instead of find_common_depths.
    """
    common = find_common_depths(films) | known
    depths = np.array([choose_depth(film.depth, common[film.container]) for film in films.itertuples()])
    for container, part in films.groupby("container"):
        groups = [(depth, part[depths[part.index] == depth]) for depth in np.unique(depths[part.index])]
        if len(groups) == 1:
            log.info("%d mammograms: %s, %d bits in use", len(part), container, groups[0][0])
        else:
            counts = [f"{len(group)} ({describe_classes(group)}) by {depth} bits" for depth, group in groups]
            log.warning("%s mammograms have several bit depths, which may tell the classes apart: scaled are %s",
                        container, ", ".join(counts))
        for depth, group in groups:
            tell_of_shallow(group, container, depth)
    return depths


def tell_of_films(films):
    """Warn of films that may look wrong to the network, and why."""
    for column, sentence in (
        ("is_mask", "are excluded, since they are masks in black and white"),
        ("is_uncropped", "have a background that is not black: CROP may keep it or lose the breast, or they may be"
                         " inverted"),
        ("is_white", "are largely white: they may be inverted, or have a white border"),
        ("box_outside", "have a lesion_box that lies outside of the breast"),
    ):
        warn(f"of {len(films)} mammograms {sentence}", films["path"][films[column]])


def read_films(films, folder, crop, output_dir, known=None):
    """(films, images, fingerprints): the table with more columns, and memory maps in its order. Raises UserError.

    images: uint8 (N, IMAGE_SIZE, IMAGE_SIZE); fingerprints: complex64 (N, ...), see data.duplicates. Films of a
    container are scaled alike: see share_depths, and known there.

    The new columns are container, format and bytes (of the file), depth (bits), film_width, film_height,
    film_sha256, image_sha256, and excluded (the reason, or ""). What CROP keeps is in left, top, width and height,
    in pixels of the film.
    """
    cache, listing = output_dir / ".cache", output_dir / "bad_images.csv"
    paths, boxes = [folder / path for path in films["path"]], films["lesion_box"]
    rows = []
    with explain_write_errors(output_dir):
        cache.mkdir(parents=True, exist_ok=True)
        listing.unlink(missing_ok=True)  # of an earlier run
        natives, pictures, prints = (tempfile.TemporaryFile(dir=cache) for _ in range(3))  # noqa: SIM115
    with ThreadPoolExecutor(THREADS) as pool:  # OpenCV and NumPy release Python's lock
        for image, fingerprints, row in pool.map(partial(read_cached, crop=crop, cache=cache), paths, boxes):
            rows.append(row)
            if "reason" not in row:
                with explain_write_errors(output_dir):
                    natives.write(image.astype(np.uint16))
                    prints.write(fingerprints)
                fingerprints_shape = fingerprints.shape
            if len(rows) % 500 == 0:
                log.info("%d of %d mammograms are read", len(rows), len(films))

    films = films.join(pd.DataFrame(rows))
    if "reason" in films:
        bad = films[["path", "reason"]].dropna()
        with explain_write_errors(output_dir):
            bad.to_csv(listing, index=False)
        lines = "".join(f"\n  {path!r}: {reason}" for path, reason in bad.head(20).to_numpy())
        raise UserError(f"{len(bad)} of {len(films)} mammograms cannot be read. Repair or remove them (all are"
                        f" in {listing}):{lines}")

    depths, hashes = share_depths(films, known or {}), []
    shape = len(films), IMAGE_SIZE, IMAGE_SIZE
    with explain_write_errors(output_dir):
        for native, depth in zip(np.memmap(natives, np.uint16, "r", shape=shape), depths, strict=True):
            image = to_bytes(native, depth)
            hashes.append(hashlib.sha256(image).hexdigest())
            pictures.write(image)
        images = np.memmap(pictures, np.uint8, "r", shape=shape)
        prints = np.memmap(prints, np.complex64, "r", shape=(len(films), *fingerprints_shape))

    tell_of_films(films)
    lacks_box = films["lesion_box"].eq("") & (crop == "lesion")
    excluded = np.select([films["is_mask"], lacks_box], ["a mask", "no lesion_box"], "")
    columns = films.drop(columns=["used", "is_mask", "is_uncropped", "is_white", "box_outside"])
    return columns.assign(depth=depths, image_sha256=hashes, excluded=excluded), images, prints
