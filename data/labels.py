"""labels.csv: the table as a spreadsheet or an editor wrote it, held against the files that it names."""
import csv
import io
import os
import re
import unicodedata
from contextlib import suppress
from pathlib import Path

import pandas as pd

from data import CLASSES, UserError, list_some, log, warn
from data.names import ROUNDED, is_nobody, to_side, to_view

VALIDATION_WORDS = ("val", "valid", "validation")  # the first of them that is there counts
COLUMNS = ["path", "label", "split", "patient_id", "lesion_box", "side", "view"]
LESION_BOXES = r"(\d{1,6}:\d{1,6}:[1-9]\d{,5}:[1-9]\d{,5}(\|(?!$)|$))*"  # x:y:width:height, joined by |
SAVE_AS = 'save it as labels.csv (in Excel: "CSV UTF-8")'
COLUMN_WORDS = {  # how other tables call a column
    "label": r"label|class|patholog|diagnos|target|malignan|benign|cancer|bi.?rads|outcome|categor|truth|status",
    "path": r"image|img|file|path(?!ol)|dicom|film|scan|picture|^f?name$",
    "patient_id": r"(patient|patienten|\bpat|subject|person|client|\bcase)[\W_]*"
                  r"(id|no|nr|num|number|code|key|name)?$"
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

    Comments, a line sep=;, empty rows and empty columns at the end do not count. The first row has the names. The
    index has the numbers of the lines.
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
    header, *others = rows
    names = [name.lower() for name in rows[header]]
    while not names[-1]:
        names.pop()
    if not {*required} <= {*names} or any(names.count(name) > 1 for name in COLUMNS):
        raise UserError(f"{file} needs columns {' and '.join(required)}, each once; it has {list_some(names)}:"
                        f" {suggest_names(names) or 'name them in the first row'}.")
    for number, cells in rows.items():
        if any(cells[len(names) :]):
            raise UserError(f"{file}, line {number} has {len(cells)} cells, but the first row has {len(names)}:"
                            f" name the columns, or put a cell that holds {separator!r} into quotation marks.")
    cells = [(rows[number] + [""] * len(names))[: len(names)] for number in others]
    return pd.DataFrame(cells, others, names, dtype=str)


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


def check_rows(table, file):
    """Raise a UserError for the first column of COLUMNS that has wrong cells, with these and what to write."""
    files = pd.Index([os.path.normpath(file.parent / path) for path in table["path"]])
    words = ("train", *VALIDATION_WORDS, "test") if table["split"].any() else ("",)
    is_label = table["label"].isin(CLASSES)
    is_side = table["side"].map(lambda side: to_side(side) != "" or is_nobody(side)).astype(bool)
    for column, right, problem, advice in (
        ("label", is_label, "rows have a label other than benign or malignant",
         suggest_labels(table["label"][~is_label].unique()) or " Write benign or malignant."),
        ("split", table["split"].isin(words), f"rows have a split other than {', '.join(words)}",
         " Write one of them into each row, or remove the column."),
        ("path", pd.Series(map(os.path.isfile, files), table.index, dtype=bool), "paths name no file",
         f" Write paths of files, relative to the folder of {file.name}."),
        ("path", ~files.duplicated() | table.duplicated(), "paths have rows that contradict each other",
         " Write one row for each image, with its lesion boxes joined by |."),
        ("lesion_box", table["lesion_box"].str.fullmatch(LESION_BOXES),
         "rows have a lesion_box other than x:y:width:height",
         " Write whole numbers of pixels, or nothing where no lesion is marked."),
        ("side", is_side, "rows have a side other than left or right", " Write left, right or nothing."),
        ("patient_id", ~is_rounded(table["patient_id"]), "rows have a patient_id that a spreadsheet has rounded"
         " (format the column as text, and enter the ids again)", ""),
    ):
        if not right.all():
            wrong = table[column][~right]
            raise UserError(f"{file}, line {wrong.index[0]}: {len(wrong)} {problem}: {list_some(wrong.unique())}."
                            f"{advice}")


def read_labels(file):
    """Table of a labels.csv: COLUMNS, all str, a row for each image. Raises UserError for what is wrong."""
    table = read_cells(file)
    if others := [name for name in table if name not in COLUMNS]:
        log.info("columns of labels.csv that are not used: %s", list_some(others))
        if advice := suggest_names(table.columns.tolist()):
            log.warning("to use these columns, %s", advice)

    table = table[[name for name in COLUMNS if name in table]].reindex(columns=COLUMNS, fill_value="")
    table["path"] = [spell_path(path, file.parent) for path in table["path"]]
    table[["label", "split"]] = table[["label", "split"]].apply(lambda column: column.str.lower())
    check_rows(table, file)
    views = table["view"].map(lambda view: "" if is_nobody(view) else to_view(view) or view.upper())
    table = table.assign(side=table["side"].map(to_side), view=views)

    validation, *others = [word for word in VALIDATION_WORDS if word in {*table["split"]}] or [""]
    repeated, unused = table.duplicated(), table["split"].isin(others)
    warn("rows of labels.csv are excluded, as they are repeated", table["path"][repeated])
    warn(f"rows of labels.csv are excluded, as the validation set is split {validation!r}", table["path"][unused])
    return table[~(repeated | unused)].replace({"split": dict.fromkeys(VALIDATION_WORDS, "validation")})
