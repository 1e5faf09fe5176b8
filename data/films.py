"""Which mammograms there are, and whose: folder layouts, labels.csv and patients become one table.

A film is one mammogram: an image file, and a row of the table.
"""
import csv
import io
import os
import re
import runpy
import shlex
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import pandas as pd

from data import UserError, log, quote
from data.dicom import import_pydicom, is_without_image, name_class
from data.names import (DATE, ROUNDED, connect, find_companions, first_known, is_nobody, match_patients, read_path,
                        to_key, to_side, to_view)

CLASSES = ("benign", "malignant")  # 0 and 1 wherever a number stands for the label
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".bmp",
                  ".dcm", ".dicom")
HIDDEN = (".", "@eaDir", "#recycle", "$RECYCLE.BIN")  # starts of names: of systems, network drives and bins
VALIDATION_WORDS = ("val", "valid", "validation")  # the first of them that is there counts
COLUMNS = ["path", "label", "split", "patient_id", "lesion_box", "side", "view"]
LESION_BOXES = r"(\d{1,6}:\d{1,6}:[1-9]\d{,5}:[1-9]\d{,5}(\|(?!$)|$))*"  # x:y:width:height, joined by |
PHANTOMS = Path(__file__).resolve().parent / "phantoms"
LAYOUTS = ("DATA_DIR needs labels.csv, or benign/ and malignant/, alone or in train/, val/ and test/:"
           " data/README.md")
SAVE_AS = 'save it as labels.csv (in Excel: "CSV UTF-8")'
OTHER_TABLES = r".*\.(csv|xls[xm]?|ods|tsv)|label.*\.txt"  # files that may be meant to be labels.csv
COLUMN_WORDS = {  # how other tables call a column
    "label": r"label|class|patholog|diagnos|target|malignan|benign|cancer|bi.?rads|outcome|categor|truth|status",
    "path": r"image|img|file|path(?!ol)|dicom|film|scan|picture|^f?name$",
    "patient_id": r"(patient|patienten|\bpat|subject|person|\bcase)[\W_]*(id|no|nr|num|number|code|key|name)?$"
                  r"|^(mrn|pid)$",
    "side": r"laterality|left or right",
    "view": r"(view|image)[\W_]*(position|view)",
}
NORMAL = "normal is not benign, as benign mammograms show a finding, too"
HINTS = {  # what to write where a label or a folder has another name
    r"(normal|healthy).*": f"{NORMAL}: remove images without a finding",
    r"-?[01]([.,]0)?|[+-]|t|f|y|n|true|false|yes|no|pos(itive)?|neg(ative)?":
        "write benign for 0 and malignant for 1, if that is what they mean",
    r"(bi.?rads|acr|categor).*|[2-6][abc]?([.,]0)?":
        "BI-RADS categories are no labels: write benign (often for 2) or malignant (often for 5 and 6), and remove"
        " the other rows",
}
TAGS = ["PatientID", "ImageLaterality", "Laterality", "ViewPosition", "ViewCodeSequence", "SOPClassUID"]
MANY = 8  # films: a patient seldom has more
PUBLIC, TEXT = "public PatientID", "text before side and view"  # sources of patients


def list_some(items):
    """The first 20 items in one line, quoted and shortened, and how many more there are."""
    more = f" and {len(items) - 20} more" if len(items) > 20 else ""
    return ", ".join(map(quote, items[:20])) + more


def warn(problem, items):
    """Warn with the number of items, the problem, and the first of them, if there are any."""
    if len(items):
        log.warning("%d %s: %s", len(items), problem, list_some([*items]))


def is_dicom(path):
    """Whether a file is DICOM, by its suffix or its first bytes."""
    if not os.path.isfile(path):  # reading a pipe or a device may never end
        return False

    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path.suffix.lower() in (".dcm", ".dicom")
    with suppress(OSError), path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def is_image(path):
    """Whether a path is that of an image, by its suffix, whatever there is; otherwise by the first bytes."""
    return path.suffix.lower() in IMAGE_SUFFIXES or is_dicom(path)


def list_files(folder, unlisted=None):
    """All below a folder but what is HIDDEN; links are not followed.

    Folders that cannot be listed are added to `unlisted`, a list. Without one they raise OSError.
    """
    try:
        paths = [(path, path.is_dir() and not path.is_symlink()) for path in folder.iterdir()]
    except OSError:
        if unlisted is None:
            raise
        unlisted.append(folder)
        paths = []

    for path, is_folder in paths:
        if path.name.startswith(HIDDEN):
            continue
        if is_folder:
            yield from list_files(path, unlisted)
        else:
            yield path


def absolute(path):
    """The Path of a file or a folder; what is relative counts from the working directory."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def list_images(films):
    """Absolute paths of a film, of a list of films, or of all images in a folder: UserError if it has none.

    Folders below it that cannot be listed are named, and are among the paths: nobody takes the list for complete.
    """
    if not isinstance(films, (str, os.PathLike)):
        return [absolute(film) for film in films]
    path, unlisted = absolute(films), []
    if not os.path.isdir(path):
        return [path]

    images = sorted(filter(is_image, list_files(path, unlisted)))
    warn("folders cannot be listed, so their images are missing", [str(folder) for folder in unlisted])
    if not images:
        raise UserError(f"{path} has no image that can be found: {', '.join(IMAGE_SUFFIXES)}.")
    names = [image.relative_to(path).as_posix() for image in images]
    ignored = {path / name for name in warn_of_companions(names)}
    return [image for image in images if image not in ignored] + unlisted


def warn_of_companions(paths):
    """The masks and drawings among the paths, see find_companions. They are named in a warning."""
    companions = find_companions(paths)
    warn("masks or drawings beside an image of the same name are ignored", companions)
    return companions


# ---- layouts -----------------------------------------------------------------------------------


def read_folders(root):
    """Table of the images in class folders, and the names of all else."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    validation = [word for word in VALIDATION_WORDS if word in folders][:1]
    sets = {root: ""}
    if "train" in folders and (validation or "test" in folders):
        splits = {"train": "train", "test": "test", **dict.fromkeys(validation, "validation")}
        sets = {folders[word]: split for word, split in splits.items() if word in folders}

    rows, ignored = [], [path for path in root.iterdir() if root not in sets and path not in sets]
    for place, split in sets.items():
        for top in place.iterdir():
            label = next((label for label in CLASSES if top.name.lower().startswith(label)), "")
            if not (label and top.is_dir()):
                ignored.append(top)
                continue
            for path in list_files(top):
                if is_image(path):
                    rows.append((path.relative_to(root).as_posix(), label, split, "", "", "", ""))
                else:
                    ignored.append(path)
    ignored.sort(key=lambda path: (len(path.parts), path))  # the uppermost first
    names = [str(path.relative_to(root)) for path in ignored if not path.name.startswith(".")]

    if foreign := [os.fsencode(path) for path, *_ in rows if os.fsencode(path) != path.encode(errors="ignore")]:
        shown = ", ".join(path.decode(errors="backslashreplace") for path in foreign[:20])
        raise UserError(f"{root} has {len(foreign)} files whose names are not in UTF-8: rename {shown}.")
    return pd.DataFrame(rows, columns=COLUMNS, dtype=str), names


def read_text(file):
    """The text of a labels.csv in UTF-8, UTF-16 or Windows-1252. Raises UserError."""
    content = file.read_bytes()
    if content.startswith((b"PK", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{file} is a workbook: {SAVE_AS}.")

    encodings = {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252"}
    if b"\0" in content[:4]:  # letters of two bytes, the lower one first unless a byte order mark says otherwise
        encodings = {"utf-16-be" if content.startswith(b"\0") else "utf-16": "UTF-16"}
    for encoding, name in encodings.items():
        with suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            if name != "UTF-8":
                log.info("labels.csv is not in UTF-8: it was read as %s", name)
            return text.lstrip("\ufeff")
    raise UserError(f"{file} is no text in UTF-8, UTF-16 or Windows-1252: {SAVE_AS}.")


def find_separator(header):
    """What separates the columns: the character that finds most of COLUMNS in the first row, or most columns."""
    def count(separator):
        cells = [cell.strip(' "\r\n').lower() for cell in header.split(separator)]
        return len({*cells} & {*COLUMNS}), len(cells)

    return max(",;\t|", key=count)


def read_cells(file, required=("path", "label")):
    """The table of a labels.csv as it is written, all str, with the `required` columns. Raises UserError.

    Comments, a line sep=;, empty rows and empty columns at the end do not count. The first row has the names.
    """
    lines, comments = list(io.StringIO(read_text(file), newline="")), []
    for number, line in enumerate(lines):
        first = re.split(r"[,;\t|]", line)[0].strip(' "\r\n')
        is_comment = first.startswith("#") and not os.path.isfile(file.parent / first)
        if is_comment:
            comments.append(line.strip())
        if is_comment or first.lower() == "sep=":
            lines[number] = "\n"
    if comments:
        log.info("%d lines of %s start with # and are ignored: %s", len(comments), file.name, list_some(comments))
    separator = find_separator(next(filter(str.strip, lines), ""))

    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    rows = {0: []}  # by their last line
    try:
        for cells in reader:
            rows[reader.line_num] = [cell.strip() for cell in cells]
    except csv.Error as error:
        raise UserError(f"{file}, line {max(rows) + 1}: remove the quotation mark that is not closed or stands"
                        " inside of a cell.") from error

    rows = {number: cells for number, cells in rows.items() if any(cells)}
    if not rows:
        raise UserError(f"{file} is empty: it needs a first row with path and label, and a row for each image.")
    names, *others = rows.values()
    names = [name.lower() for name in names]
    while not names[-1]:
        names.pop()
    if not {*required} <= {*names} or any(names.count(name) > 1 for name in COLUMNS):
        raise UserError(f"{file} needs columns {' and '.join(required)}, each once; it has {list_some(names)}:"
                        f" {suggest_names(names) or 'name them in the first row'}.")
    for number, cells in rows.items():
        if any(cells[len(names) :]):
            raise UserError(f"{file}, line {number} has {len(cells)} cells, but the first row has {len(names)}:"
                            f" name the columns, or put a cell that holds {separator!r} into quotation marks.")
    cells = [(cells + [""] * len(names))[: len(names)] for cells in others]
    return pd.DataFrame(cells, columns=names, dtype=str)


def suggest_names(names):
    """What to rename, as words of a sentence, where columns seem to be those that are missing."""
    missing = [column for column in COLUMN_WORDS if column not in names]
    others = [name for name in names if name not in COLUMNS]
    return "; ".join(f"rename {name!r} to {column}" for column in missing for name in others
                     if re.search(COLUMN_WORDS[column], name))


def suggest_labels(words):
    """What to write instead of these labels, as sentences after a space."""
    return "".join(f" {hint[0].upper()}{hint[1:]}." for pattern, hint in HINTS.items()
                   if any(re.fullmatch(pattern, word.casefold()) for word in words))


def spell_path(path, folder):
    """A path of labels.csv with slashes, and accents as the file has them: Unicode writes them in two ways."""
    path = Path(path.replace("\\", "/")).as_posix()
    if path.isascii():
        return path
    spellings = [path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)]
    return next((spelling for spelling in spellings if os.path.isfile(folder / spelling)), path)


def is_rounded(ids):
    """Whether a spreadsheet has rounded each id: by its form, or as all long numbers end in 0 after 15 digits."""
    numbers = ids[ids.str.fullmatch(r"\d{16,}")]
    all_end_in_0 = numbers.nunique() > 2 and numbers.str[15:].str.strip("0").eq("").all()
    return ids.str.fullmatch(ROUNDED) | (ids.isin(numbers) & all_end_in_0)


def read_labels(file):
    """Table of a labels.csv. Raises UserError for what is wrong."""
    table = read_cells(file)
    if others := [name for name in table if name not in COLUMNS]:
        log.info("columns of labels.csv that are not used: %s", list_some(others))
        if advice := suggest_names(table.columns.tolist()):
            log.warning("to use these columns, %s", advice)

    table = table[[name for name in COLUMNS if name in table]].reindex(columns=COLUMNS, fill_value="")
    table["path"] = [spell_path(path, file.parent) for path in table["path"]]
    table[["label", "split"]] = table[["label", "split"]].apply(lambda column: column.str.lower())
    files = pd.Index([os.path.normpath(file.parent / path) for path in table["path"]])
    words = ("train", *VALIDATION_WORDS, "test") if table["split"].any() else ("",)
    for column, problem, right in (
        ("label", "rows have a label other than benign or malignant", table["label"].isin(CLASSES)),
        ("split", f"rows have a split other than {', '.join(words)}", table["split"].isin(words)),
        ("path", "paths name no file", pd.Series(map(os.path.isfile, files), dtype=bool)),
        ("path", "paths have rows that contradict each other", ~files.duplicated() | table.duplicated()),
        ("lesion_box", "rows have a lesion_box other than x:y:width:height",
         table["lesion_box"].str.fullmatch(LESION_BOXES)),
        ("side", "rows have a side other than left or right",
         table["side"].map(lambda side: to_side(side) != "" or is_nobody(side)).astype(bool)),
        ("patient_id", "rows have a patient_id that a spreadsheet has rounded (format the column as text, and"
                       " enter the ids again)", ~is_rounded(table["patient_id"])),
    ):
        if not right.all():
            found = table[column][~right].unique()
            advice = ""
            if column == "label":
                advice = suggest_labels(found) or " Write benign or malignant."
            elif "contradict" in problem:
                advice = " Write one row for each image, with its lesion boxes joined by |."
            raise UserError(f"{file}: {(~right).sum()} {problem}: {list_some(found)}.{advice}")

    views = table["view"].map(lambda view: "" if is_nobody(view) else to_view(view) or view.upper())
    table = table.assign(side=table["side"].map(to_side), view=views)

    validation, *others = [word for word in VALIDATION_WORDS if word in {*table["split"]}] or [""]
    repeated, unused = table.duplicated(), table["split"].isin(others)
    warn("rows of labels.csv are excluded, as they are repeated", table["path"][repeated])
    warn(f"rows of labels.csv are excluded, as the validation set is split {validation!r}", table["path"][unused])
    return table[~(repeated | unused)].replace({"split": {validation: "validation"} if validation else {}})


def read_header(path):
    """(PatientID, side, view, kind) of a DICOM file, "" what it lacks. Raises UserError without pydicom.

    kind: the name of its class where that has no image, as of a report.
    """
    pydicom = import_pydicom()
    texts, kind = dict.fromkeys(TAGS, ""), ""
    with suppress(Exception):  # bad files are reported when read
        data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=TAGS, force=True)
        kind = name_class(data)
        for tag in TAGS:
            texts[tag] = str(data.get(tag) or "").strip()
        code = data.ViewCodeSequence[0]
        named = to_view(code.get("CodeMeaning", "")) or to_view(code.get("CodeValue", ""))
        texts["ViewPosition"] = named or texts["ViewPosition"]
    side = to_side(texts["ImageLaterality"]) or to_side(texts["Laterality"])
    return texts["PatientID"], side, to_view(texts["ViewPosition"]), kind if is_without_image(kind) else ""


def read_headers(paths, folder):
    """Table of PatientID, side, view and kind of the DICOM files among `paths` (Series), "" for others."""
    dicom = [index for index, path in paths.items() if is_dicom(folder / path)]
    with ThreadPoolExecutor() as pool:  # for network drives
        rows = list(pool.map(read_header, [folder / path for path in paths[dicom]]))
    names = ["PatientID", "side", "view", "kind"]
    return pd.DataFrame(rows, dicom, names, dtype=str).reindex(paths.index, fill_value="")


def tell_of_unlisted(films, folder):
    """Log how many images in the folder of labels.csv have no row."""
    names = [path.relative_to(folder).as_posix() for path in list_files(folder, [])
             if path.suffix.lower() in IMAGE_SUFFIXES]
    unlisted = {*names} - {*films["path"]} - {*find_companions(names)}
    if unlisted:  # a row may reach its image in another way, such as by a link
        listed = {os.path.realpath(folder / path) for path in films["path"]}
        unlisted = sorted(name for name in unlisted if os.path.realpath(folder / name) not in listed)
    if unlisted:
        log.info("%d images have no row in labels.csv and are not used: %s", len(unlisted), list_some(unlisted))


def check_labels(films, paths):
    """Warn of films whose path names the other class, or no finding; paths: see drop_shared_folders."""
    words = paths.str.lower()
    named = {label: words.str.contains(rf"(?<!non[-_ ])(?<!not[-_ ]){label}") for label in CLASSES}
    other = named["malignant"].where(films["label"].eq("benign"), named["benign"])
    warn("images have the other class in their path: check their label", films["path"][other])
    normal = words.str.contains(r"(?:^|/)(?:normal|healthy)s?(?![a-z])")
    warn(f"images are named normal or healthy, but {NORMAL}: check their label", films["path"][normal])


def drop_what_has_no_image(films, headers):
    """(films, headers) without reports, presentation states, a DICOMDIR and the like, which are named."""
    other = headers["kind"].ne("")
    kinds = ", ".join(sorted({*headers["kind"][other]}))
    warn(f"DICOM objects without an image are ignored ({kinds})", films["path"][other])
    return films[~other].reset_index(drop=True), headers[~other].reset_index(drop=True)


# ---- patients, sides and views -----------------------------------------------------------------


def name_sides(films, headers, named):
    """films with each side and view as labels.csv has it, else DICOM, else the name of the file."""
    for column in ("side", "view"):
        sources = {"labels.csv": films[column], "DICOM": headers[column], "name": named[column]}
        known = pd.DataFrame(sources).replace("", None)
        first = first_known(known)
        differ = (known.notna() & known.ne(first, axis=0)).any(axis=1)
        warn(f"images have several values of {column}: labels.csv counts first, then DICOM tags, then the name",
             films["path"][differ])
        films = films.assign(**{column: first.fillna("")})
    return films


def drop_shared_folders(paths):
    """The paths (Series) without the first folders where these are the same for all: they name no patient."""
    parts = paths.str.split("/")
    shared = list(takewhile(lambda folders: len({*folders}) == 1, zip(*parts.str[:-1], strict=False)))
    return parts.str[len(shared) :].str.join("/")


def count_equal(ids):
    """How many films have the id of each film; NaN where it is missing."""
    keys = ids.map(to_key, na_action="ignore")
    return keys.map(keys.value_counts())


def find_ids(ids, source):
    """The ids that name a patient, else None: neither a placeholder nor one id that all films share does."""
    known = ids.mask(ids.map(is_nobody), None)
    placeholders = known.isna() & ids.ne("")
    if placeholders.any():
        log.info("the %s of %d images is a placeholder: it counts as unknown", source, placeholders.sum())

    counts = count_equal(known).dropna()
    is_one = len(ids) > 1 and counts.eq(len(counts)).all()
    if is_one and len(counts) >= min(len(ids), MANY + 1):
        log.warning("all images have the same %s: it counts as unknown", source)
        known[:] = None
    return known


def limit_films(films):
    """How many films may share an id or a text of a patient, at most: a tenth of all, or MANY if that is more."""
    return max(len(films) / 10, MANY)


def choose_texts(texts):
    """The texts (Series) of read_path that may name a patient; missing where there is none.

    A date at the end does not count, unless too many films for a patient have the text without it. A text that
    very many films share is missing: it names no patient.
    """
    undated = texts.str.replace(rf"[ _./-]+{DATE}$", "", regex=True)
    too_many = count_equal(undated) > 4 * MANY
    texts = undated.mask(too_many | ~undated.str.contains(r"\d"), texts)
    return texts.mask(texts.eq("") | (count_equal(texts) > limit_films(texts)), None)


def find_sources(ids, paths, tags, texts):
    """Table of patients with a column for each source, the best first; missing where it does not know the patient.

    ids: of labels.csv. paths: see drop_shared_folders. tags: PatientIDs. texts: see choose_texts. They are used
    only if no other source knows the patient, or if the other sources give every film a different id. A PatientID
    that very many films share is ignored, if another source knows the patient.
    """
    limit = limit_films(paths)
    sources = match_patients(paths).rename(columns="file name ({})".format)
    sources.insert(0, "labels.csv", first_known(match_patients(ids)).fillna(ids))
    sources[PUBLIC] = first_known(match_patients(tags))  # CBIS-DDSM's PatientIDs are one for each image

    common = count_equal(tags).gt(limit) & sources.notna().any(axis=1)
    if common.any():
        log.warning("%d images have a PatientID that more than %d images share: it is ignored", common.sum(),
                    limit)
    sources["PatientID"] = tags.mask(common | sources[PUBLIC].notna(), None)

    of_images = sources.apply(count_equal).eq(1).all()
    known = sources.loc[:, ~of_images].notna().any(axis=1)
    texts = texts.mask(known, None)
    sources[TEXT] = texts if count_equal(texts).max() > 1 else None
    return sources


def name_patients(films, sources):
    """films with every patient_id, and patient_from, the best source that knows the patient, or "unknown".

    Two films are of one patient if a source has the same id for both, or if their best sources have the same id.
    The best source of all these films names the patient. A PatientID may be a hospital's, so it is replaced by
    dicom_00001, dicom_00002 ... A film of an unknown patient has its path.
    """
    keys = sources.map(to_key, na_action="ignore")
    edges = keys.assign(best=first_known(keys)).stack().dropna()  # from films to ids
    rows, columns = edges.index.get_level_values(0), edges.index.get_level_values(1)
    ids = len(films) + edges.groupby([columns, edges.to_numpy()]).ngroup()
    groups, _ = pd.factorize(connect((rows, ids), len(films) + len(edges))[: len(films)])

    names = first_known(sources.drop(columns="PatientID").groupby(groups).first())
    hidden = names.isna() & sources["PatientID"].groupby(groups).first().notna()
    names[hidden] = [f"dicom_{number:05d}" for number in range(1, hidden.sum() + 1)]
    origins = sources.assign(unknown="").notna().idxmax(axis=1).replace(PUBLIC, "PatientID")
    return films.assign(patient_id=pd.Series(groups).map(names).fillna(films["path"]), patient_from=origins)


def fill_gaps(films, texts):
    """films in which those of unknown patients have the one patient whom the other films of their text have.

    Warns where films of a text have several patients, whose ids may be those of breasts or images. texts: see
    choose_texts.
    """
    known = ~films["patient_from"].isin(["unknown", TEXT])
    columns = ["patient_id", "patient_from"]
    others = films[columns].where(known).groupby(texts.map(to_key, na_action="ignore"))
    numbers = others["patient_id"].transform("nunique")
    gaps = ~known & numbers.eq(1)
    if gaps.any():
        log.info("%d images of unknown patients have the same text before side and view as images of one patient,"
                 " and count as this patient: %s", gaps.sum(), list_some(films["path"][gaps].tolist()))
        films = films.assign(**films[columns].mask(gaps, others.transform("first")))

    several = films[known & numbers.gt(1) & ~texts.str.fullmatch(DATE).eq(True)]
    if len(several):
        first = several[texts[several.index] == texts[several.index[0]]].drop_duplicates("patient_id")
        log.warning("%d images have the same text before side and view as an image of another patient, such as %s."
                    " If the ids are those of breasts, examinations or images, results look too good. Write ids of"
                    " patients into labels.csv", len(several), list_some(first["path"].tolist()[:2]))
    return films


def compare_sources(films, ids, sources):
    """Tell of ids in labels.csv that are spelled in several ways, or that other sources join."""
    keys = ids.dropna().drop_duplicates().map(to_key)
    spellings = keys[keys.duplicated(keep=False)]
    if len(spellings):
        log.info("%d ids in labels.csv count as %d, as case, spaces, leading zeros and .0 make no difference: %s",
                 len(spellings), spellings.nunique(), list_some(ids[spellings.index].tolist()))

    patients = films["patient_id"][ids.notna()].nunique()
    if patients < keys.nunique():
        others = sources[ids.notna()].dropna(axis=1, how="all").columns
        shown = {"the file names": f"file name|{TEXT}", "the PatientIDs": "PatientID"}
        shown = [name for name, words in shown.items() if others.str.contains(words).any()]
        log.warning("%d ids in labels.csv, but %s show %d patients: joined", keys.nunique(),
                    " and ".join(shown) or "they", patients)


def check_patients(films):
    """Tell of patients with very many films, and how patients were guessed or are unknown."""
    counts = pd.crosstab(films["patient_id"], films["label"])
    large = counts.sum(axis=1) > max(len(films) / 10, 4)  # 4: the usual views
    mixed = (counts > counts.sum() / 2).all(axis=1)
    for patient, numbers in counts[large | mixed].iterrows():
        shares = " and ".join(f"{numbers[label]} of {counts[label].sum()} {label}" for label in CLASSES)
        log.warning("patient %r has %s images: if these are several patients, write patient_id into labels.csv",
                    patient, shares)

    if len(films) > MANY and films["patient_id"].is_unique and films["patient_from"].ne("unknown").all():
        log.warning("each of %d images has a patient of its own: if the ids are those of images, results look too"
                    " good. Write ids of patients into labels.csv", len(films))

    guessed = films[films["patient_from"].eq(TEXT)]
    if len(guessed):
        patients = guessed.drop_duplicates("patient_id")
        examples = ", ".join(f"{film.patient_id!r} of {film.path!r}" for film in patients[:3].itertuples())
        log.info("%d patients of %d images are guessed from the text before side and view, such as %s. If this is"
                 " wrong, write patient_id into labels.csv", len(patients), len(guessed), examples)

    unknown = films[films["patient_from"].eq("unknown")]
    if len(unknown):
        film = unknown.iloc[0]
        log.warning("%d images are of unknown patients, such as %s: each counts as a patient of its own. If some"
                    " share a patient, results look too good: write labels.csv with columns path,label,patient_id"
                    " and rows such as %s,%s,patient 1", len(unknown), list_some(unknown["path"][:3].tolist()),
                    film["path"], film["label"])


def is_synthetic(films):
    """Whether all films are phantoms."""
    return all(Path(path).name.startswith("synthetic_") for path in films["path"])


# ---- the table ---------------------------------------------------------------------------------


def refuse_folder(folder, missing, ignored):
    """Raise the UserError of a folder that lacks a class, with what to do."""
    missing = " and no ".join(missing)
    if (folder / "labels.csv").is_file():
        raise UserError(f"{folder / 'labels.csv'} has no {missing} image, but both classes are needed.")

    problem = f"{folder} has no {missing} image (ignored: {list_some(ignored)})."
    if tables := [path.name for path in folder.iterdir() if re.fullmatch(OTHER_TABLES, path.name.lower())]:
        raise UserError(f"{problem} {list_some(tables)} is not read: {SAVE_AS}.")
    if (folder / "prepare.py").is_file():
        command = shlex.join(["python", str(folder / "prepare.py")])
        raise UserError(f"{problem} Run prepare.py first: {command} (its first lines say how).")
    raise UserError(f"{problem}{suggest_labels([Path(name).name for name in ignored])} {LAYOUTS}")


def find_images(folder):
    """(films, headers): the table of the images in a folder, and that of read_headers. Raises UserError."""
    file = folder / "labels.csv"
    try:
        if folder.resolve() == PHANTOMS and not (file.is_file() and any(folder.glob("images/*.png"))):
            log.info("making synthetic mammograms")
            runpy.run_path(str(PHANTOMS / "prepare.py"))["make_phantoms"](PHANTOMS)
        films, ignored = (read_labels(file), []) if file.is_file() else read_folders(folder)
        if file.is_file():
            tell_of_unlisted(films, folder)
        companions = films["path"].isin(warn_of_companions(films["path"]))
        films = films[~companions].sort_values("path", ignore_index=True)
        films, headers = drop_what_has_no_image(films, read_headers(films["path"], folder))
        if missing := [label for label in CLASSES if label not in {*films["label"]}]:
            refuse_folder(folder, missing, ignored)
    except OSError as error:
        problem = f"{error.strerror}: {error.filename}" if error.filename else error
        raise UserError(f"{folder} cannot be used ({problem}). {LAYOUTS}") from error

    warn("files or folders are ignored, as they are no images in a folder benign... or malignant...", ignored)
    if any(Path(name).name.lower().startswith("normal") for name in ignored):
        log.warning("%s: images without a finding are not used", NORMAL)
    return films, headers


def find_films(folder):
    """The films in a folder (absolute Path) by path: COLUMNS and patient_from, all str. Raises UserError.

    side is "left", "right" or "", view "CC", "MLO", another short name or "".
    """
    films, headers = find_images(folder)
    paths = drop_shared_folders(films["path"])
    check_labels(films, paths)
    named = pd.DataFrame(map(read_path, paths), columns=["side", "view", "text"], dtype=str)
    films = name_sides(films, headers, named)

    ids, tags = find_ids(films["patient_id"], "patient_id"), find_ids(headers["PatientID"], "PatientID")
    texts = choose_texts(named["text"])
    sources = find_sources(ids, paths, tags, texts)
    films = fill_gaps(name_patients(films, sources), texts)
    compare_sources(films, ids, sources)
    origins = ", ".join(f"{source} ({count})" for source, count in films["patient_from"].value_counts().items())
    log.info("%d images of %d patients, known from %s", len(films), films["patient_id"].nunique(), origins)
    check_patients(films)
    return films
