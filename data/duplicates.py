"""Which films show the same picture."""
import mmap
from itertools import combinations_with_replacement

import cv2
import numpy as np

from data import list_some, log, quote, warn
from data.names import connect

RINGS, ANGLES, WAVES = 24, 128, 23  # of a fingerprint: circles, points on each, frequencies kept
DUPLICATE_CORRELATIONS = 0.87, 0.95, 0.87  # of the film, squashed, its content: see take_fingerprints
DARK, BLACK = 0.12, 0.02  # shares of the span of a film, up to which it shows no tissue, and its margin
EVEN, MARGIN = 0.05, 0.05  # shares of the span, in which the values of a margin lie, and of a side, if it is wider
LEAST_SHOWN = 0.6  # share of the circles with tissue, below which films look alike
LARGE_GROUP = 0.05  # share of the patients
BLOCK, BATCH = 1024, 2048  # films compared by magnitudes at once, pairs shifted at once
ROUNDING = 1e-5  # how far 32 bits may put a bound too low


def fingerprint(image, shape):
    """(texture, shown): the texture on circles around the centre of a picture, and how much tissue they show.

    texture: complex64 (RINGS, WAVES), of norm 1. shown: share of the circles that is not black, 0 to 1.
    image: (S, S), uint8, uint16 or float of any scale. shape: the (height, width) in which a circle is round.

    Rotation shifts the phases, mirroring reverses their sign. The spectrum is flattened, large values are damped.
    """
    size, angles = len(image), 2 * np.pi * np.arange(ANGLES) / ANGLES
    radii = (np.arange(RINGS) + 0.5)[:, None] / RINGS / 2  # of the shorter side
    across, down = (size * min(shape) / side for side in reversed(shape))
    x = (size / 2 - 0.5 + across * radii * np.cos(angles)).astype(np.float32)
    y = (size / 2 - 0.5 + down * radii * np.sin(angles)).astype(np.float32)
    smooth = cv2.GaussianBlur(image.astype(np.float32), (0, 0), sigmaX=across / 100, sigmaY=down / 100)
    circles = cv2.remap(smooth, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    spectrum = np.fft.rfft(circles)[:, : WAVES + 1]
    spectrum *= np.arange(WAVES + 1) ** 1.5
    texture = np.fft.irfft(spectrum, ANGLES)
    texture = np.tanh(texture / (np.abs(texture).mean(axis=1, keepdims=True) + 1e-6)) * np.sqrt(radii)
    found = np.fft.rfft(texture)[:, 1 : WAVES + 1].astype(np.complex64)
    shown = np.mean(circles > smooth.min() + DARK * np.ptp(smooth))
    return found / np.float32(np.linalg.norm(found) + 1e-6), shown


def distrust_margins(texture, shown):
    """A texture of a smaller norm if the circles show little but a black margin, as all films look alike there."""
    trust = min(1, shown / LEAST_SHOWN) ** 0.1  # falls slowly, or copies with a little less tissue would be lost
    return texture * np.float32(trust)


def blacken_margins(image):
    """The image (S, S) with a grey or white margin painted black: rows and columns at its edges of one grey value.

    It is returned as it is if no margin is wider than MARGIN of a side: scanned films have white rims.
    """
    low, span, size = image.min(), np.ptp(image), len(image)
    kept = []
    for axis in (1, 0):
        darkest, brightest = np.percentile(image, (5, 95), axis=axis)  # of each row or column, without specks
        is_margin = (brightest - darkest <= EVEN * span) & (darkest > low + DARK * span)
        places = np.flatnonzero(~is_margin)
        if not len(places):
            return image
        first, last = places[[0, -1]]
        if is_margin[0]:
            first += 1  # the edge of the film is blurred with the margin
        if is_margin[-1]:
            last -= 1
        kept.append(slice(first, last + 1))

    if max(max(part.start, size - part.stop) for part in kept) <= MARGIN * size:
        return image

    film = np.full_like(image, low)
    film[tuple(kept)] = image[tuple(kept)]
    return film


def cut_content(image, shape):
    """The smallest rectangle, at any angle, that holds what is not black, squashed to a square: float32 (S, S).

    image, shape: as fingerprint has them. A film has the same content on any black canvas.
    """
    size, image = len(image), image.astype(np.float32)
    content = (image >= image.min() + BLACK * np.ptp(image)).astype(np.uint8)
    content = cv2.morphologyEx(content, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8), borderValue=0)  # without specks
    outlines, _ = cv2.findContours(content, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return image

    pixel = np.array(shape[::-1], np.float32) / size  # its width and height in the film
    points = np.concatenate(outlines)[:, 0].astype(np.float32)
    corners = cv2.boxPoints(cv2.minAreaRect(points * pixel)) / pixel
    square = np.array([[0, size - 1], [0, 0], [size - 1, 0]], np.float32)
    matrix = cv2.getAffineTransform(corners[:3], square)
    return cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)


def take_fingerprints(image, shape):
    """Textures of the film, of its squashed image and of its content: complex64 (3, RINGS, WAVES).

    The first two find a film with changed grey values, the last a film on another canvas. Films that are squashed
    and then rotated have similar corners: two patients reach a correlation of 0.88.
    """
    film = blacken_margins(image)
    prints = []
    for circle in (shape, (1, 1)):
        texture, shown = fingerprint(image, circle)
        if film is not image:
            _, shown = fingerprint(film, circle)
        prints.append(distrust_margins(texture, shown))
    content, _ = fingerprint(cut_content(film, shape), (1, 1))  # without margin
    return np.stack([*prints, content])


def find_pictures(fingerprints, threshold, pictures):
    """The number of the picture that each film shows: int (N,), from those known so far.

    fingerprints: complex64 (N, RINGS, WAVES). The product of their magnitudes is never less than the correlation
    at any angle, plain or mirrored (Cauchy-Schwarz). Films of one picture are not compared again.
    """
    magnitudes = np.abs(fingerprints).reshape(len(fingerprints), -1)
    for top, left in combinations_with_replacement(range(0, len(magnitudes), BLOCK), 2):
        bounds = magnitudes[top : top + BLOCK] @ magnitudes[left : left + BLOCK].T
        pairs = np.argwhere(bounds >= threshold - ROUNDING).T
        pairs += [[top], [left]]
        while (apart := pictures[pairs[0]] != pictures[pairs[1]]).any():
            batch, pairs = np.split(pairs[:, apart], [BATCH], axis=1)
            first, second = fingerprints[batch]
            waves = np.stack([(first * second.conj()).sum(axis=1), (first * second).sum(axis=1)])
            shifted = np.fft.irfft(np.pad(waves, ((0, 0), (0, 0), (1, 0))), ANGLES) * ANGLES / 2
            duplicates = batch[:, np.abs(shifted).max(axis=(0, 2)) >= threshold]  # of negatives it is -1
            pictures = connect(pictures[duplicates], len(pictures))[pictures]
    return pictures


def find_groups(films, fingerprints):
    """The table with its columns group (str), picture (int) and duplicate (bool).

    Films with one number in picture show the same. group is one patient_id for a patient and all duplicates of the
    films.

    fingerprints: complex64 (N, 3, RINGS, WAVES), of take_fingerprints.
    """
    pictures = np.arange(len(films))
    for number in range(fingerprints.shape[1]):
        pictures = find_pictures(fingerprints[:, number], DUPLICATE_CORRELATIONS[number], pictures)
    if isinstance(fingerprints.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        fingerprints.base.madvise(mmap.MADV_DONTNEED)  # or its pages count as memory
    patients = films.groupby("patient_id").ngroup().to_numpy()
    groups = connect(np.stack([pictures, len(films) + patients]), 2 * len(films))[pictures]
    return films.assign(group=films.groupby(groups)["patient_id"].transform("first"), picture=pictures,
                        duplicate=np.bincount(pictures)[pictures] > 1)


def tell_of_joined(films):
    """Log which films joined patients, and warn of a group that holds too many of them."""
    one_each = films.drop_duplicates(["picture", "patient_id"])
    sources = one_each.groupby("picture")["path"].transform("first")
    joined = one_each["path"] != sources
    pairs = (sources + " = " + one_each["path"])[joined].tolist()
    if pairs:
        log.info("%d pairs of mammograms of different patients show the same picture: %s", len(pairs),
                 list_some(pairs))

    patients = films.groupby("group")["patient_id"].nunique()
    most = patients.max()
    if most > max(1, LARGE_GROUP * patients.sum()):
        log.warning("%d of %d patients are joined as one, with %s: compare their mammograms, as those of different"
                    " patients may only look alike", most, patients.sum(), quote(patients.idxmax()))


def group_duplicates(films, fingerprints):
    """find_groups, and tell of duplicates, of those with different labels, and of patients with both classes."""
    films = find_groups(films, fingerprints)
    if films["duplicate"].any():
        log.info("%d mammograms show the same picture as another. Their patients stay in one set, and count as"
                 " one", films["duplicate"].sum())
        tell_of_joined(films)
    labels = films.groupby("picture")["label"].transform("nunique")
    warn("mammograms show the same picture under both labels, one of which is wrong", films["path"][labels > 1])
    if mixed := films.groupby("group")["label"].nunique().gt(1).sum():
        log.info("%d patients have benign and malignant mammograms", mixed)
    return films
