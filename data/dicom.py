"""One DICOM file to grey values."""
import warnings

import numpy as np

from data import MAX_PIXELS, UserError

DEPTHS = (8, 10, 12, 14, 16)  # bits that detectors and scanners use
OUTLIERS = 0.001  # share of the pixels that may be brighter than their film's depth: hot pixels


def find_depth(grey):
    """The fewest bits that hold all pixels but OUTLIERS: a 12-bit film read as 16 bits is black."""
    return next(bits for bits in DEPTHS if np.count_nonzero(grey >= 2**bits) <= OUTLIERS * grey.size)


def read_dicom(path):
    """read_picture for a DICOM file; what its tables or window decide is scaled to 16 bits."""
    try:
        import pydicom.pixels
    except ModuleNotFoundError as error:
        raise UserError("DICOM files need one more package: pip install pydicom") from error
    warnings.filterwarnings("ignore", module="pydicom")  # of tags that no one here reads
    data = pydicom.dcmread(path)
    kind = data.get("SOPClassUID", pydicom.uid.UID("")).name or "of unknown class"
    if not data.get("PixelData"):
        raise UserError(f"a DICOM object without an image ({kind})")
    frames, bits = int(data.get("NumberOfFrames") or 1), data.BitsStored
    photometric = data.get("PhotometricInterpretation")
    monochrome = photometric in ("MONOCHROME1", "MONOCHROME2")
    if frames > 1 or not monochrome or bits > 16 or data.Rows * data.Columns > MAX_PIXELS:
        raise UserError(f"a DICOM object ({kind}) of {frames} frames, {data.Columns} x {data.Rows} pixels,"
                        f" {photometric}, {bits} bits: no single film in grey")
    lowest = -(2 ** (bits - 1)) if data.PixelRepresentation else 0
    stored = data.pixel_array.astype(np.int32)
    levels = pydicom.pixels.apply_modality_lut(np.arange(2**bits) + lowest, data)
    data.RescaleSlope, data.RescaleIntercept = 1, 0  # in a window pydicom inverts a film of negative slope
    voi = data.get("VOILUTSequence")
    table = voi or data.get("ModalityLUTSequence")
    black, steps = (0, 2 ** table[0].LUTDescriptor[2] - 1) if table else (lowest, 2**bits - 1)
    if voi:
        voi[0].LUTDescriptor[2] = 16  # pydicom counts the entries of an 8-bit table in 8 bits
    shown = pydicom.pixels.apply_voi_lut(levels, data)
    if table or shown is not levels:
        shown = np.rint((shown - black) / steps * 65535).clip(0, 65535).astype(np.uint16)
        grey, depth, falling = shown.take(stored - lowest, mode="clip"), 16, False
        container = f"{bits} bit DICOM with {'LUT' if table else 'window'}"
    else:
        if lowest:  # of a signed film, few of the values below 0 are in use
            stored -= min(0, int(np.quantile(stored, OUTLIERS, method="lower")))
        grey, depth = stored.clip(0, 65535).astype(np.uint16), bits
        container, falling = f"{bits} bit DICOM", levels[0] > levels[-1]
    unsure = container == "16 bit DICOM"  # many films of 12 bits call themselves so
    if falling != (photometric == "MONOCHROME1"):
        top = int(np.quantile(grey, 1 - OUTLIERS, method="higher")) if unsure else 2**depth - 1
        grey = np.uint16(top) - grey.clip(max=top)
    depth = find_depth(grey) if unsure else depth
    return grey, dict(container=container, depth=depth, format=f"{container}, {photometric}")
