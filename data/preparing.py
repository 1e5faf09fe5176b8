"""What the prepare.py of a collection needs: from the files and tables of a download to labels.csv."""
import argparse
import io
import os
import re
import sys
from pathlib import Path

import pandas as pd
import PIL.Image

from data import UserError, replace
from data.dicom import import_pydicom
from data.films import absolute

DATA = Path(__file__).resolve().parent


def find_download(place, folder):
    """The absolute Path of the folder of a download: `folder` where no place is named. Raises UserError."""
    download = absolute(place or folder)
    if not download.is_dir():
        raise UserError(f"There is no folder {download}: name the folder of the download.")
    return download


def list_files(download):
    """Sorted Paths of all files below a folder, without hidden ones. Links are followed, each folder once."""
    files, seen = [], set()
    for folder, below, names in os.walk(download, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort()
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def name_files(files, pattern):
    """{first group of the pattern, in lower case: Path} of the files whose whole name matches.

    Raises UserError where two files have the same name.
    """
    named = {}
    for path in files:
        if match := re.fullmatch(pattern, path.name, re.IGNORECASE):
            name = match[1].lower()
            if name in named:
                raise UserError(f"{named[name]} and {path} are the same mammogram: remove one of them.")
            named[name] = path
    return named


def find_table(files, folder, name, pattern=None):
    """The Path of a table, by its name or a pattern of names: among the files, or in `folder`.

    A CSV is preferred to an XLSX. Raises UserError where there is none, or where there are copies that differ.
    """
    matches = [path for path in (*files, *sorted(folder.iterdir()))
               if re.fullmatch(pattern or re.escape(name), path.name, re.IGNORECASE)]
    if not matches:
        raise UserError(f"{name} is missing: put it into {folder}, or anywhere below the download.")
    path, *copies = [path for path in matches if path.suffix.lower() == ".csv"] or matches
    if any(copy.read_bytes() != path.read_bytes() for copy in copies):
        raise UserError(f"{name} differs between {', '.join(map(str, (path, *copies)))}: keep one of them.")
    return path


def read_sheet(path):
    """The first sheet of an XLSX file as a table, all str. Raises UserError without openpyxl."""
    try:
        return pd.read_excel(path, dtype=str, keep_default_na=False, engine="openpyxl")
    except ImportError as error:
        raise UserError(f"{path} needs one more package: pip install openpyxl. Or save it as CSV.") from error


def read_text(path):
    """A CSV file as a table, all str: in UTF-8 or UTF-16, separated by commas, semicolons or tabs."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = content.decode(encoding, errors="replace")  # what is read here is plain ASCII
    separator = max(",;\t", key=text.partition("\n")[0].count)
    return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)


def read_table(path, columns):
    """The table of a CSV or XLSX file: the values of `columns`, all str, without spaces around them.

    columns: {name in the file, in lower case, with spaces for underscores: name here}. Raises UserError.
    """
    try:
        table = read_sheet(path) if path.suffix.lower() == ".xlsx" else read_text(path)
    except (UserError, OSError):
        raise
    except Exception as error:  # pandas and openpyxl raise whatever a damaged file leads them to
        raise UserError(f"{path} cannot be read as a table: get it anew.") from error
    table.columns = table.columns.astype(str).str.strip().str.lower().str.replace("_", " ")
    if missing := [column for column in columns if column not in table]:
        raise UserError(f"{path} has no column {' and no column '.join(missing)}: get it anew.")
    return table[list(columns)].rename(columns=columns).apply(lambda column: column.str.strip())


def read_header(path, tags):
    """These tags of a DICOM file, as a pydicom Dataset; None where the file cannot be read."""
    pydicom = import_pydicom()
    try:
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except Exception:  # pydicom raises whatever a damaged file leads it to
        return None


def read_shape(path):
    """(height, width) of an image, from its header; None where that cannot be read."""
    if path.suffix.lower() == ".dcm":
        header = read_header(path, ["Rows", "Columns"])
        return (header.Rows, header.Columns) if header and {"Rows", "Columns"} <= {*header.dir()} else None
    try:
        with PIL.Image.open(path) as image:
            return image.height, image.width
    except OSError:  # Pillow's errors are of this kind
        return None


def name_path(path, folder):
    """A path as labels.csv in `folder` has it: relative where it lies below, with slashes."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def compare_counts(what, found, published):
    """Print counts beside the published ones."""
    print(f"{what}: {found},", "as published" if found == published else f"but published were {published}")


def write_labels(labels, missing, folder, what="films", advice=""):
    """Write labels.csv, and missing.csv where something is missing, to `folder`; print what they hold.

    labels: table with the columns of labels.csv; missing: table with path and reason. what: name of the images;
    advice: what to set besides DATA_DIR. Raises UserError where nothing was found, and leaves labels.csv as it is.
    """
    if labels.empty:
        raise UserError(f"No {what} were found for labels.csv: name the folder of the whole download.")
    for name, table in (("labels.csv", labels), ("missing.csv", missing)):
        if table.empty:
            (folder / name).unlink(missing_ok=True)  # of an earlier run
            continue
        with replace(folder / name) as temporary:
            table.sort_values("path", kind="stable").to_csv(temporary, index=False, lineterminator="\n")
    if len(missing):
        print(f"{folder / 'missing.csv'}: {len(missing)} images are missing or cannot be used; it says why")
    print(f"{folder / 'labels.csv'}: {len(labels)} {what} of {labels['patient_id'].nunique()} patients")
    groups = labels.groupby(["split", "label"] if "split" in labels else ["label"])
    print(groups.agg(**{what: ("path", "size"), "patients": ("patient_id", "nunique")}).to_string())
    place = f"data/{folder.name}" if folder.parent == DATA else folder.as_posix()
    print(f'next: set DATA_DIR = "{place}"{advice} at the top of resnet50.py or vgg16.py')


def run(prepare, description, **flags):
    """Call prepare(download, **flags) with what the command line says; errors of the user end in one sentence.

    description: the docstring of the script; flags: {name of an option that is on or off: its help}.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("download", metavar="DOWNLOAD", nargs="*", help="the folder of the download")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    options = vars(parser.parse_args())
    download = " ".join(options.pop("download"))  # spaces in a path need no quotes
    try:
        prepare(download, **options)
    except UserError as error:
        sys.exit(str(error))
    except OSError as error:  # no right to read or write, a full disk
        sys.exit(f"labels.csv could not be made: {error}")
