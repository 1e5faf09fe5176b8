"""One film from file to 224 x 224: formats, DICOM, bit depth, crop, and the cache of what was read."""
import ast
import contextlib
import hashlib
import io
import json
import os
import re
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from data import UserError, dicom, duplicates, explain_write_errors, log, replace
from data.dicom import find_depth, read_dicom
from data.films import LESION_BOXES, is_dicom

IMAGE_SIZE = 224  # pixels, both ways
MIN_SIDE = 32  # pixels of the shorter side of a film
THUMBNAIL = 256  # longer side, in pixels, of the film in which the breast is found
BORDER = 20  # of these pixels at most: a white border is no wider
SURROUNDINGS = 0.5  # of a lesion, each way, as a share of its longer side
CONTAINERS = {b"\x89P": "PNG", b"\xff\xd8": "JPEG", b"II": "TIFF", b"MM": "TIFF", b"BM": "BMP"}  # by first bytes
READERS = ("numpy", "opencv", "pydicom", "pylibjpeg", "pyjpegls", "python-gdcm", "pillow")  # what decodes films
RELEASES = [f"{found.name} {found.version}" for found in distributions()
            if str(found.name).lower().startswith(READERS)]


def parse_code(file):
    """A module as text by which a change of what it does is known: without comments and docstrings."""
    tree = ast.parse(Path(file).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node):
            del node.body[0]
    return ast.dump(tree)


CODE = [parse_code(file) for file in (__file__, dicom.__file__, duplicates.__file__)]
VERSION = hashlib.sha256(str(sorted(RELEASES) + CODE).encode()).hexdigest()  # of what reads films


def to_bytes(grey, depth):
    """Grey values of 0 to 2 ** depth - 1 as uint8 of 0 to 255; what is brighter is white."""
    return cv2.convertScaleAbs(grey, alpha=255 / (2**depth - 1))


def is_negative(content):
    """Whether the tag PhotometricInterpretation of a TIFF says that 0 is white; False for BigTIFF."""
    with contextlib.suppress(struct.error), io.BytesIO(content) as film:
        tags = ImageFileDirectory_v2(film.read(8))
        film.seek(tags.next)
        tags.load(film)
        return tags.get(262) == 0
    return False


def read_picture(path):
    """(grey, row) of a file that OpenCV reads: uint8 or uint16 (H, W), native values, black where transparent."""
    content, pixels = np.fromfile(path, np.uint8), None
    kind = CONTAINERS.get(content[:2].tobytes(), "PNM")
    if kind == "TIFF" and (pages := cv2.imcount(str(path))) > 1:
        raise UserError(f"a TIFF of {pages} pages; save the one that is the film")
    with contextlib.suppress(cv2.error):  # of nothing, or of too much
        pixels = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise UserError("not an image that OpenCV can read: empty, cut off or too large")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise UserError(f"its pixels are {pixels.dtype}; save it with 8 or 16 bits")
    grey, channels = pixels, pixels.shape[2] if pixels.ndim == 3 else 1
    if kind == "TIFF" and channels == 4:
        raise UserError("a TIFF of four channels, which may be CMYK; save it in grey")
    if kind == "TIFF" and pixels.dtype == np.uint16 and is_negative(content):  # which OpenCV heeds in 8 bits only
        raise UserError("a TIFF of 16 bits in which 0 is white; save it with 0 as black")
    if channels >= 3:
        grey = cv2.cvtColor(pixels[..., :3], cv2.COLOR_BGR2GRAY)
    if channels == 4:
        grey = (grey * (pixels[..., 3] / np.iinfo(pixels.dtype).max)).astype(pixels.dtype)
    container = f"{8 * grey.itemsize} bit {kind}"  # films of the same one share their grey scale
    colour = "grey" if channels == 1 else "colour"
    return grey, dict(container=container, depth=find_depth(grey), format=f"{container}, {colour}")


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
    corner, shape = (film.left, film.top, 0, 0), (film.width, film.height)
    return (read_boxes(film.lesion_box) - corner) / (shape * 2)


def crop_film(grey, shape, margin):
    """(image, box): the square around a mask (H, W) or int32 points (N, 2), black beyond the film."""
    left, top, width, height = cv2.boundingRect(shape)
    side = int(np.ceil(max(width, height) * (1 + 2 * margin)))
    left, top = left - (side - width) // 2, top - (side - height) // 2
    part = grey[max(0, top) : top + side, max(0, left) : left + side]
    scale, image = IMAGE_SIZE / side, np.zeros((IMAGE_SIZE, IMAGE_SIZE), grey.dtype)
    height, width = (max(1, round(length * scale)) for length in part.shape)
    target = image[round(max(0, -top) * scale) :, round(max(0, -left) * scale) :][:height, :width]
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    target[:] = cv2.resize(part, target.shape[::-1], interpolation=method)
    return image, dict(left=left, top=top, width=side, height=side)


def read_native(path, crop, lesion_box):
    """(image, fingerprints, row): read_image before the scaling to 8 bits, which needs the whole collection."""
    try:
        grey, row = read_dicom(path) if is_dicom(path) else read_picture(path)
    except Exception as error:  # OpenCV and pydicom raise whatever the file leads them to
        raise UserError(" ".join(str(error).split()) or repr(error)) from error
    height, width = grey.shape
    boxes = read_boxes(lesion_box)
    starts, ends = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{width} x {height} pixels, too small for a film")
    if (starts >= (width, height)).any() or (ends > (width + 2, height + 2)).any():  # 2 for rounding
        raise UserError(f"its lesion_box reaches beyond the film of {width} x {height} pixels")
    whole = image = cv2.resize(grey, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    box = dict(left=0, top=0, width=width, height=height)
    if crop == "breast":
        breast = find_breast(grey, row["depth"])
        image, box = crop_film(grey * breast, breast, 0)
    elif crop == "lesion" and lesion_box:
        corners = np.minimum(np.concatenate([starts, ends - 1]), (width - 1, height - 1))
        image, box = crop_film(grey, corners.astype(np.int32), SURROUNDINGS)
    if image.min() == image.max():
        raise UserError("all its pixels are equal, or all that CROP keeps")
    shapes = grey.shape, (1, 1)  # in which circles are round: the film, and its squashed image
    fingerprints = np.stack([duplicates.fingerprint(whole, shape) for shape in shapes])
    box |= {"film_width": width, "film_height": height, "bytes": path.stat().st_size}
    return image, fingerprints, row | box | {"film_sha256": hashlib.sha256(whole).hexdigest()}


def read_image(path, crop=None, lesion_box="", depths=None):
    """(image, row) of a film as in read_films; depths: bits by container, a deeper film has its own. UserError."""
    if not re.fullmatch(LESION_BOXES, str(lesion_box)):
        raise UserError(f"{path} has the lesion_box {lesion_box!r}, but it has to be x:y:width:height in pixels.")
    if crop == "lesion" and not lesion_box:
        raise UserError(f'{path} needs a lesion_box, as CROP is "lesion": x:y:width:height in pixels.')
    image, _, row = read_native(path, crop, lesion_box)
    depth = max((depths or {}).get(row["container"], 0), row["depth"])
    return to_bytes(image, depth), row | {"depth": depth}


def read_cached(path, lesion_box, crop, cache):
    """read_native, from the folder `cache` where nothing changed; of a bad film, row holds the reason only."""
    if not os.path.isfile(path):
        return None, None, {"reason": "no file, or a link that leads nowhere"}
    stat = path.stat()
    key = [str(path), stat.st_size, stat.st_mtime_ns, crop, lesion_box, VERSION]
    file = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
    with contextlib.suppress(Exception), np.load(file) as film:  # there may be none, or a damaged one
        return film["image"], film["fingerprints"], json.loads(str(film["row"]))
    try:
        image, fingerprints, row = read_native(path, crop, lesion_box)
    except UserError as error:
        return None, None, {"reason": str(error)}
    with replace(file) as temporary:  # another process may write the same film
        np.savez(temporary, image=image, fingerprints=fingerprints, row=json.dumps(row))
    return image, fingerprints, row


def read_films(films, folder, crop, output_dir, known=None):
    """(films, images, fingerprints): the table with more columns, and memory maps in its order. Raises UserError.

    images: uint8 (N, IMAGE_SIZE, IMAGE_SIZE); fingerprints: complex64 (N, 2, RINGS, WAVES). Films of a container
    are scaled alike, by the bits of the deepest of them. known: bits by container of a run, which count instead
    for all but deeper films, as in read_image.
    """
    cache, listing = output_dir / ".cache", output_dir / "bad_images.csv"
    paths, boxes = [folder / path for path in films["path"]], films["lesion_box"]
    read, rows, hashes = partial(read_cached, crop=crop, cache=cache), [], []
    with explain_write_errors(output_dir):
        cache.mkdir(parents=True, exist_ok=True)
        listing.unlink(missing_ok=True)  # of an earlier run
        pictures, prints = (tempfile.TemporaryFile(dir=cache) for _ in range(2))  # noqa: SIM115
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV and NumPy release Python's lock
            for _, _, row in pool.map(read, paths, boxes):
                rows.append(row)
                if len(rows) % 500 == 0:
                    log.info("%d of %d films are read", len(rows), len(films))
        films = films.join(pd.DataFrame(rows))
        if "reason" in films:
            bad = films[["path", "reason"]].dropna()
            bad.to_csv(listing, index=False)
            lines = "".join(f"\n  {path!r}: {reason}" for path, reason in bad.head(20).to_numpy())
            raise UserError(f"{len(bad)} of {len(films)} films cannot be read; repair or remove them (all are"
                            f" in {listing}):{lines}")
        bits = films.groupby("container")["depth"].max().to_dict() | (known or {})
        depths = np.maximum(films["container"].map(bits), films["depth"])
        for (container, depth, used), count in films.groupby(["container", depths, "depth"]).size().items():
            log.info("%d films are %s, read with %d bits, of which they use %d", count, container, depth, used)
        for (image, fingerprints, _), depth in zip(map(read, paths, boxes), depths, strict=True):
            image = to_bytes(image, depth)
            hashes.append(hashlib.sha256(image).hexdigest())
            pictures.write(image)
            prints.write(fingerprints)
        images = np.memmap(pictures, np.uint8, "r", shape=(len(films), IMAGE_SIZE, IMAGE_SIZE))
        prints = np.memmap(prints, np.complex64, "r", shape=(len(films), *fingerprints.shape))
    left_out = np.where((films["lesion_box"] == "") & (crop == "lesion"), "no lesion_box", "")
    return films.assign(depth=depths, image_sha256=hashes, left_out=left_out), images, prints
