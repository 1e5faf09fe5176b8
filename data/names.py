"""What names and ids tell of a film: its patient, side and view, and whether it is a mask. No file is opened."""
import os
import re
import unicodedata
from itertools import takewhile

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BELOW = r"(?![A-Za-z0-9])[^/]*(?:(?:/\d[^/]*){0,2}/[^/]+)?$"  # of a patient's folder: study, series, file
PATIENTS = {  # how public collections write the patient into the last parts of a path, in any case
    "CBIS-DDSM": r"(?<![a-z0-9])(P_\d{5})_(?:LEFT|RIGHT)_(?:CC|MLO)" + BELOW,
    "CMMD": r"(?<![A-Za-z0-9])(D[12]-\d{4})" + BELOW,
    "DDSM": r"(?<![A-Za-z0-9])([A-D]_\d{4})_\d[._](?:LEFT|RIGHT)_(?:CC|MLO)(?![A-Za-z0-9])[^/]*$",
    "INbreast": r"(?<!\d)\d{8}_([0-9a-f]{16})_MG_[LR]_[^/]*$",
    "mini-MIAS": r"(?<![a-z0-9])mdb(\d{3})(?!\d)[^/]*$",  # of the film: 1 and 2 are one patient
    "VinDr-Mammo": r"(?:^|/)([0-9a-f]{32})[/_][0-9a-f]{32}(?![0-9a-f])[^/]*$",  # of the study
    "CDD-CESM": r"(?<![A-Za-z0-9])(P\d{1,3})_[LR]_(?:DM|CM)_(?:CC|MLO)(?![A-Za-z0-9])[^/]*$",
    "KAU-BCMD": r"(?:^|/)\d{4}_(BC\d+)_ ?(?:CC|MLO)_[LR](?![A-Za-z0-9])[^/]*$",
    "BCDR": r"(?<![A-Za-z0-9])img_(\d+)_\d+_\d+_[LR](?:CC|O|MLO)(?![A-Za-z0-9])[^/]*$",
    "EMBED": r"(?:^|/)(\d{8})/(?:\d+(?:\.\d+){3,}/){2}[^/]+$",
    "RSNA": r"(?:^|/)(\d{1,5})[/_]\d{1,10}\.\w+$",  # other files match, too: see match_patients
}
RSNA_IMAGES = r"[/_]\d{9,10}\.\w+$"  # most of its images, which have random numbers below 2 ** 31
RSNA_FILMS = 16  # no patient has more

NOBODY = {"", "id", "na", "nan", "nat", "nil", "name", "unk", "tbd", "noid", "noname"}  # placeholders for an id
NOBODY_WORD = (  # in a text without numbers
    "no|not|none|null|void|empty|blank|missing|undefined|unspecified|unassigned|unknown|unbekannt|onbekend|inconnue?"
    "|descono?cid[oa]|desconhecid[oa]|sconosciut[oa]|an[oó]n.*|pseudonym.*|deidentified|removed|deleted|redacted"
    "|withheld|hidden|masked|blinded|confidential|keine?|sin|dummy|x{2,}")
NOBODY_CODE = r"#\D+[!?]|#n/?[adv]|-(1|9+)([.,]0)?"  # of spreadsheets and statistics
ROUNDED = r"(?i)\d[.,]\d+e\+?\d+|\de\+\d+"  # what a spreadsheet makes of long numbers

COMPANION = (  # a word in the name of a mask or a drawing
    "(mask|maske|masken|masque|m[aá]scara|msk|roi|seg|segmentation|overlay|annot|annotation|contour|outline|heatmap|label"
    "|bbox|arrow|circle|gradcam|prediction)s?|masked|segmented|annotated|labell?ed|circled|marked|gt|ground|truth"
    "|groundtruth")

SIDES = {"l": "left", "lt": "left", "left": "left", "r": "right", "rt": "right", "right": "right"}
VIEWS = {  # the short names, and DICOM's meanings and codes of the two usual ones (PS3.16, CID 4014)
    "cc": "CC", "craniocaudal": "CC", "399162004": "CC", "r10242": "CC",
    "mlo": "MLO", "mediolateraloblique": "MLO", "399368009": "MLO", "r10226": "MLO",
    "o": "MLO",  # oblique, in BCDR
    **{view.lower(): view for view in ("ML", "LM", "LMO", "XCC", "XCCL", "XCCM", "FB", "SIO", "ISO")}}
SIDE, VIEW = "left|right|lt|rt|l|r", "xccl|xccm|xcc|cc|mlo|ml|lmo|lm|(?-i:(?<=[LR])O)"  # in names
SIDE_OR_VIEW = re.compile(  # such as L, CC, LCC, RIGHT_, mlo2 or MLOR, but no part of another word
    rf"(?i)(?<![^\W_])(?=[a-z])({SIDE})?(?:({VIEW})\d?({SIDE})?)?(?![^\W_])")
SORTING = (  # words in names of folders that sort by set or finding
    "train(ing)?|val(id(ation)?)?|test(ing)?|cancers?|mass(es)?|(micro)?calc(ification)?s?|asymmetr(y|ies)"
    "|arch(itectural)?|distortions?|originals?|augment(ed|ation|ations)?|folds? ?\\d+")
SORTED_BY = (  # folders that name no patient
    rf"(?i)(benign|malignant|bi[-_ ]?rads?).*|({SORTING})([ _-]+({SORTING}|sets?|data|images?|cases?|full))*"
    "|(left|right)([ _-]?breasts?)?|l|r|cc|mlo")
DATE = (  # such as 20190301, 2019-03-01 or 01.03.2019
    r"(?:(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[1-9]|[12]\d|3[01])[-_.](?:0[1-9]|1[0-2])[-_.](?:19|20)\d\d)")
DATE_AND_TIME = rf"{DATE}(?:[-_. T]?(?:[01]\d|2[0-3])[-_.:]?[0-5]\d[-_.:]?[0-5]\d)?"
ID_ENDING = (  # of an id of a breast, examination or image, such as 7_L, 7L or 7-R-CC
    rf"(?i)(?:(?:[ _./-]+|(?<=\d)(?=[a-z]))(?:{SIDE}|{VIEW}|{DATE_AND_TIME}))+$")


def to_key(text):
    """What all spellings of an id share. Case, spaces, leading zeros and a trailing ".0" do not count.

    0007, 7 and 7.0 are one id, P 12 and p12 are one; P1 and P10, A_1 and A-1 are two. Nor does what cannot be seen
    in a spreadsheet: marks of text, invisible characters, the length of a dash, the script of the digits.
    """
    key = unicodedata.normalize("NFKC", text).casefold()
    key = re.sub(r'^="(.*)"$|^\'', r"\1", key)  # these mark text in a spreadsheet
    kinds = [unicodedata.category(letter) for letter in key]
    key = "".join("-" if kind == "Pd" else letter for letter, kind in zip(key, kinds, strict=True) if kind != "Cf")
    key = re.sub(r"\d", lambda digit: str(unicodedata.digit(digit[0])), re.sub(r"\s+", "", key))
    key = re.sub(r"^(\d+)[.,]00?$", r"\1", key)  # three zeros would be thousands
    return re.sub(r"(?<![\d.,])0+(?=\d)", "", key)


def is_nobody(text):
    """Whether an id is a placeholder: nan, N/A, #REF!, -1, unknown, removed, Anonymous^Patient, xxx ..."""
    text = text.casefold()
    if re.fullmatch(NOBODY_CODE, text):
        return True

    words = re.findall(r"[^\W_]+", text.replace("patient", " "))
    whole = "".join(words)
    placeholders = [word for word in [whole, *words] if re.fullmatch(NOBODY_WORD, word)]
    return whole in NOBODY or (whole.isalpha() and bool(placeholders))


def to_side(text):
    """"left", "right" or "" of a text such as L, Right or LEFT BREAST."""
    words = text.casefold().split()
    return SIDES.get(words[0], "") if words else ""


def to_view(text):
    """The short name of a view, such as CC of cc, LCC, cranio-caudal or a code of DICOM, else ""."""
    word = re.sub(r"[\W_]+", "", text.casefold())
    return VIEWS.get(re.sub(rf"^({SIDE})(?=(cc|mlo)$)", "", word), "")


def connect(edges, count):
    """The connected component of each of `count` nodes: int (count,); edges: int (2, E)."""
    graph = coo_array((np.ones(len(edges[0])), edges), (count, count))
    return connected_components(graph, directed=False)[1]


def first_known(table):
    """The first value of each row that is not missing, or NaN."""
    return table.astype(object).bfill(axis=1).iloc[:, 0]


def match_patients(names):
    """The patients that names (Series) have as PATIENTS says: a column a collection, else NaN.

    The plain numbers of RSNA count only where all of them together look like that collection.
    """
    patients = pd.DataFrame({collection: names.str.extract(pattern, flags=re.IGNORECASE, expand=False)
                             for collection, pattern in PATIENTS.items()})

    films = patients["mini-MIAS"].dropna().astype(int)
    patients["mini-MIAS"] = films.add(1).floordiv(2).map("mias_{:03d}".format)

    rsna = patients["RSNA"].dropna()
    images = names[rsna.index].str.contains(RSNA_IMAGES)
    years = rsna.str.fullmatch(r"(19|20)\d\d")
    if rsna.empty or images.mean() < 0.5 or rsna.value_counts().max() > RSNA_FILMS or years.all():
        patients["RSNA"] = None
    if patients["EMBED"].dropna().str.fullmatch(DATE).all():  # folders of days, as a DICOM archive has them
        patients["EMBED"] = None
    return patients


def read_path(path):
    """(side, view, text) of a path, each "" where not clear. Films of the same text may be one patient's.

    The text is what stands before side and view, without folders of SORTED_BY.
    """
    if film := re.search(PATIENTS["mini-MIAS"], path, re.IGNORECASE):  # even numbers are left, and all are MLO
        return "right" if int(film[1]) % 2 else "left", "MLO", ""

    stem = os.path.splitext(path)[0]
    *folders, name = stem.split("/")
    folders = [f"{folder}/" for folder in folders if not re.fullmatch(SORTED_BY, folder)]
    for place, start in ((name, len("".join(folders))), (stem, 0)):  # the name of the file goes before its folders
        found = SIDE_OR_VIEW.findall(place)
        letters = {word.lower() for before, _, after in found for word in (before, after) if word}
        sides = {SIDES[word] for word in letters}
        views = {VIEWS[view.lower()] for _, view, _ in found if view}
        side = sides.pop() if len(sides) == 1 else ""
        view = views.pop() if len(views) == 1 else ""
        if side and view:
            if view == "ML" and re.search(PATIENTS["INbreast"], path, re.IGNORECASE):
                view = "MLO"  # as its table has it
            kept = "".join([*folders, name])
            first = SIDE_OR_VIEW.search(kept, start)
            return side, view, kept[: first.start()].rstrip(" _.-/") if first else ""

    is_word = bool(letters & {"left", "right"})  # a letter alone may mean anything
    return side if is_word else "", view if view in ("CC", "MLO") else "", ""


def split_words(name):
    """The words and numbers of a name: "benign (1)_leftMask2" has benign, 1, left, mask, 2."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return tuple(re.findall(r"[^\W\d_]+|\d+", apart.casefold()))


def remove_marks(words):
    """The words of a name without those that mean a mask or a drawing."""
    return tuple(word for word in words if not re.fullmatch(COMPANION, word))


def find_companions(paths):
    """Those of the paths that are masks or drawings, as a sorted list.

    Such are 1_mask.png, 1_Mask_2.png, 1_lesion_mask.png and masks/1.png, but only where there is an image 1, of
    whatever suffix, beside the file or the folder.
    """
    images, marked = set(), {}
    for path in paths:
        *folders, name = path.split("/")
        words = split_words(os.path.splitext(name)[0])
        plain = remove_marks(words)
        home = list(takewhile(lambda folder: remove_marks(split_words(folder)) == split_words(folder), folders))
        if plain == words and home == folders:
            images.update((*folders[:level], words) for level in range(len(folders) + 1))
        else:
            marked[path] = {(*home, plain[:length]) for length in range(1, len(plain) + 1)}
    return sorted(path for path, places in marked.items() if not images.isdisjoint(places))
