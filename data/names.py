"""What names and ids tell of a film: its patient, side and view, and whether it is a mask. No file is opened."""
import os
import re
import unicodedata
from itertools import takewhile

import pandas as pd

BELOW = r"(?![A-Za-z0-9])[^/]*(?:(?:/\d[^/]*){0,2}/[^/]+)?$"  # of a patient's folder: study, series, file
PATIENTS = {  # how public collections write the patient into the last parts of a path
    "CBIS-DDSM": r"(?i)(?<![a-z0-9])(P_\d{5})_(?:LEFT|RIGHT)_(?:CC|MLO)" + BELOW,
    "CMMD": r"(?<![A-Za-z0-9])(D[12]-\d{4})" + BELOW,
    "DDSM": r"(?<![A-Za-z0-9])([A-D]_\d{4})_\d[._](?:LEFT|RIGHT)_(?:CC|MLO)(?![A-Za-z0-9])[^/]*$",
    "INbreast": r"(?<!\d)\d{8}_([0-9a-f]{16})_MG_[LR]_[^/]*$",
    "mini-MIAS": r"(?i)(?<![a-z0-9])mdb(\d{3})(?!\d)[^/]*$",  # of the film: 1 and 2 are one patient
    "VinDr-Mammo": r"(?:^|/)([0-9a-f]{32})[/_][0-9a-f]{32}(?![0-9a-f])[^/]*$",  # of the study
    "CDD-CESM": r"(?<![A-Za-z0-9])(P\d{1,3})_[LR]_(?:DM|CM)_(?:CC|MLO)(?![A-Za-z0-9])[^/]*$",
    "KAU-BCMD": r"(?:^|/)\d{4}_(BC\d+)_ ?(?:CC|MLO)_[LR](?![A-Za-z0-9])[^/]*$",
    "EMBED": r"(?:^|/)(\d{8})/(?:\d+(?:\.\d+){3,}/){2}[^/]+$",
    "RSNA": r"(?:^|/)(\d{1,5})[/_]\d{1,10}\.\w+$",  # which other files match, too: see match_patients
}
RSNA_IMAGES = r"[/_]\d{9,10}\.\w+$"  # most of its images, which have random numbers below 2 ** 31
RSNA_FILMS = 16  # no patient has more
NOBODY = {  # placeholders for an id, without the word patient, spaces and punctuation
    "", "id", "na", "nan", "nat", "none", "null", "nil", "name", "unknown", "unk", "unspecified", "undefined",
    "missing", "removed", "deleted", "redacted", "withheld", "anon", "anonym", "anonymous", "anonymized",
    "anonymised", "deidentified", "notavailable", "notapplicable", "notknown", "notspecified", "noid", "noname",
    "tbd", "unbekannt", "anonymisiert", "inconnu", "desconocido"}
ROUNDED = r"(?i)\d[.,]\d+e\+?\d+|\de\+\d+|[1-9]\d{14}000+"  # what a spreadsheet makes of long numbers
COMPANIONS = {  # in the names of masks and drawings
    "mask", "masks", "roi", "rois", "seg", "segmentation", "segmentations", "overlay", "overlays", "annotation",
    "annotations", "annotated", "contour", "contours", "heatmap", "label", "labels", "gt", "ground", "truth"}
SIDES = {"l": "left", "left": "left", "r": "right", "right": "right"}
VIEWS = {  # the short names, and DICOM's meanings and codes of the two usual ones (PS3.16, CID 4014)
    "cc": "CC", "craniocaudal": "CC", "399162004": "CC", "r10242": "CC",
    "mlo": "MLO", "mediolateraloblique": "MLO", "399368009": "MLO", "r10226": "MLO",
    **{view.lower(): view for view in ("ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO")}}
VIEW = "cc|mlo|ml|lm|lmo|xcc|xccl|xccm"  # in names
NAMED_SIDE = re.compile(rf"(?i)(?<![^\W_])(left|right|l|r)(?=(?:(?:{VIEW})\d?)?(?![^\W_]))")
NAMED_VIEW = re.compile(rf"(?i)(?<![^\W_])(?:left|right|l|r)?({VIEW})\d?(?![^\W_])")
SORTED_BY = r"(?i)(benign|malignant).*|train|val|valid|validation|test|left|right|l|r|cc|mlo"  # folders


def to_key(text):
    """What all spellings of an id share. Case, spaces, zeros in front of a number and ".0" after it do not count.

    0007, 7 and 7.0 are one id, P 12 and p12 are one; P1 and P10, A_1 and A-1 are two.
    """
    key = re.sub(r"\s+", "", unicodedata.normalize("NFKC", text).casefold())
    key = re.sub(r"^(\d+)[.,]0+$", r"\1", key)
    return re.sub(r"(?<![\d.])0+(?=\d)", "", key)


def is_nobody(text):
    """Whether an id is a placeholder: nan, N/A, #REF!, unknown, removed, Anonymous^Patient, xxx, ? and so on."""
    word = re.sub(r"[\W_]+", "", text.casefold()).replace("patient", "")
    return word in NOBODY or bool(re.fullmatch("x{2,}", word) or re.fullmatch(r"#\D+[!?]", text))


def to_side(text):
    """"left", "right" or "" of a text such as L, Right or LEFT BREAST."""
    words = text.casefold().split()
    return SIDES.get(words[0], "") if words else ""


def to_view(text):
    """The short name of a view, such as CC of cc, cranio-caudal or a code of DICOM, else ""."""
    return VIEWS.get(re.sub(r"[\W_]+", "", text.casefold()), "")


def first_known(table):
    """The first value of each row that is not missing, or NaN."""
    known = table.iloc[:, 0].astype(object)  # a column without any value would hold numbers
    for name in table.columns[1:]:
        known = known.where(known.notna(), table[name])
    return known


def match_patients(names):
    """The patients that names (Series) have as PATIENTS says: a column a collection, else NaN.

    The plain numbers of RSNA count only where all of them together look like that collection.
    """
    patients = pd.DataFrame({collection: names.str.extract(pattern, expand=False)
                             for collection, pattern in PATIENTS.items()})
    films = patients["mini-MIAS"].dropna().astype(int)
    patients["mini-MIAS"] = films.add(1).floordiv(2).map("mias_{:03d}".format)
    rsna = patients["RSNA"].dropna()
    images = names[rsna.index].str.contains(RSNA_IMAGES)
    years = rsna.str.fullmatch(r"(19|20)\d\d")
    if rsna.empty or images.mean() < 0.5 or rsna.value_counts().max() > RSNA_FILMS or years.all():
        patients["RSNA"] = None
    return patients


def read_path(path):
    """(side, view, text) of a path, each "" where not clear. Films of the same text may be one patient's.

    The text is what stands before side and view, without folders that sort films by class, set, side or view.
    """
    if film := re.search(PATIENTS["mini-MIAS"], path):  # films of even numbers are left, and all are MLO
        return "right" if int(film[1]) % 2 else "left", "MLO", ""
    stem = os.path.splitext(path)[0]
    for start in (stem.rfind("/") + 1, 0):  # in the name of the file, else in its folders, too
        sides, views = list(NAMED_SIDE.finditer(stem, start)), list(NAMED_VIEW.finditer(stem, start))
        side, view = {SIDES[found[1].lower()] for found in sides}, {found[1].upper() for found in views}
        side, view = (words.pop() if len(words) == 1 else "" for words in (side, view))
        if side and view:
            *folders, name = stem[: min(sides[0].start(), views[0].start())].split("/")
            folders = [folder for folder in folders if not re.fullmatch(SORTED_BY, folder)]
            if view == "ML" and re.search(PATIENTS["INbreast"], path):
                view = "MLO"  # as its table has it
            return side, view, "/".join([*folders, name]).rstrip(" _.-/")
    letters_only = all(len(found[1]) == 1 for found in sides)  # which may mean anything
    return "" if letters_only else side, view if view in ("CC", "MLO") else "", ""


def split_words(name):
    """The words and numbers of a name: "benign (1)_Mask2" has benign, 1, mask, 2."""
    return tuple(re.findall(r"[^\W\d_]+|\d+", name.casefold()))


def find_companions(paths):
    """Those of the paths that are masks or drawings, as a sorted list.

    Such are 1_mask.png, 1_Mask_2.png and masks/1.png, but only where there is an image 1, of whatever suffix,
    beside the file or the folder.
    """
    images, marked = set(), {}
    for path in paths:
        *folders, name = path.split("/")
        words = split_words(os.path.splitext(name)[0])
        plain = tuple(word for word in words if word not in COMPANIONS)
        home = list(takewhile(lambda folder: COMPANIONS.isdisjoint(split_words(folder)), folders))
        if plain == words and home == folders:
            images.update((*folders[:level], words) for level in range(len(folders) + 1))
        else:
            numberless = plain[:-1] if plain and plain[-1].isdigit() else plain  # of the second mask of a film
            marked[path] = {(*home, plain), (*home, numberless)}
    return sorted(path for path, places in marked.items() if not images.isdisjoint(places))
