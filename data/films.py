"""Which films there are: folder layouts, labels.csv and patients become one table."""
import io
import os
import runpy
from pathlib import Path

import pandas as pd

from data import UserError, log

CLASSES = ("benign", "malignant")  # 0 and 1 wherever a number stands for the label
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".pgm", ".bmp", ".dcm", ".dicom")
VALIDATION_WORDS = ("val", "valid", "validation", "test")  # the first there is; test beside it stays test
COLUMNS = ["path", "label", "split", "patient_id", "lesion_box"]
LESION_BOXES = r"(\d{1,6}:\d{1,6}:[1-9]\d{,5}:[1-9]\d{,5}(\|(?!$)|$))*"  # x:y:width:height, joined by |
PATIENT_NAMES = {  # how public collections write the patient into the name of a file or folder
    "CBIS-DDSM": r"(?<![A-Za-z0-9])(P_\d{5})(?!\d)",
    "DDSM": r"(?<![A-Za-z0-9])([A-D]_\d{4})_\d\.(?:LEFT|RIGHT)_(?:CC|MLO)",
    "INbreast": r"(?<!\d)\d{8}_([0-9a-f]{16})_MG_[LR]_",
    "mini-MIAS": r"(?i)(?<![a-z0-9])mdb(\d{3})(?!\d)",  # of the film: 1 and 2 are one patient
}
PHANTOMS = Path(__file__).resolve().parent / "phantoms"
LAYOUTS = "DATA_DIR needs benign/ and malignant/, or train/ and val/ with these, or labels.csv: data/README.md"


def list_some(items):
    """The first 20 items in one line, quoted, and how many more there are."""
    more = f" and {len(items) - 20} more" if len(items) > 20 else ""
    return ", ".join(map(repr, items[:20])) + more


def is_dicom(path):
    """Whether a file is DICOM, by its suffix or its first bytes."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return path.suffix.lower() in (".dcm", ".dicom")
    return path.is_file() and os.access(path, os.R_OK) and path.open("rb").read(132)[128:] == b"DICM"


def is_image(path):
    return path.suffix.lower() in IMAGE_SUFFIXES or is_dicom(path)


def list_files(folder):
    """All below a folder but what is hidden; links are not followed."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield from list_files(path) if path.is_dir() and not path.is_symlink() else [path]


def absolute(path):
    """The Path of a file or a folder; what is relative counts from the working directory."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def list_images(films):
    """Absolute paths of a film, of a list of films, or of all images in a folder: UserError if it has none."""
    if not isinstance(films, (str, os.PathLike)):
        return [absolute(film) for film in films]
    path = absolute(films)
    images = sorted(filter(is_image, list_files(path))) if path.is_dir() else [path]
    if not images:
        raise UserError(f"{path} has no image: {', '.join(IMAGE_SUFFIXES)}.")
    return images


def read_folders(root):
    """Table of the images in class folders, and the names of all else."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    held_out = [folders[word] for word in VALIDATION_WORDS if word in folders]
    sides = {root: ""}
    if "train" in folders and held_out:
        test = {folders["test"]: "test"} if "test" in folders else {}
        sides = {folders["train"]: "train", **test, held_out[0]: "validation"}  # of equal keys the last counts
    tops = {top: split for side, split in sides.items() for top in side.iterdir()}
    classes = {top: label for top in tops if top.is_dir()
               for label in CLASSES if top.name.lower().startswith(label)}
    files = {path: (classes[top], tops[top]) for top in classes for path in list_files(top)}
    images = list(filter(is_image, files))
    ignored = sorted({*root.iterdir(), *tops} - {*sides, *classes}) + sorted({*files} - {*images})
    names = [str(path.relative_to(root)) for path in ignored if not path.name.startswith(".")]
    rows = [(os.fsencode(path.relative_to(root).as_posix()).decode(), *files[path], "", "") for path in images]
    return pd.DataFrame(rows, columns=COLUMNS, dtype=str), list_some(names)


def read_labels(file):
    """Table of a labels.csv. Raises UserError for what is wrong."""
    try:  # the header is a row, too: a longer row is an error
        text = file.read_text("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        cells = pd.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, na_filter=False)
    except ValueError as error:
        raise UserError(f"{file} is no table ({str(error).strip()}): save it as CSV in UTF-8.") from error
    cells = cells.map(str.strip)
    names = cells.loc[0].str.lower().tolist()
    if not {"path", "label"} <= {*names} or len({*names}) < len(names):
        raise UserError(f"{file} needs columns path and label, each once; it has {list_some(names)}.")
    if others := [name for name in names if name not in COLUMNS]:
        log.info("columns of labels.csv that are not used: %s", list_some(others))
    table = cells[1:].set_axis(names, axis=1).reindex(columns=COLUMNS, fill_value="")
    table["path"] = [Path(path.replace("\\", "/")).as_posix() for path in table["path"]]
    table[["label", "split"]] = table[["label", "split"]].apply(lambda column: column.str.lower())
    files = pd.Index([os.path.normpath(file.parent / path) for path in table["path"]])
    boxes = table["lesion_box"].str.fullmatch(LESION_BOXES)
    words = ("train", *VALIDATION_WORDS) if table["split"].any() else ("",)
    for column, problem, wrong in (
        ("label", "rows have a label other than benign or malignant", ~table["label"].isin(CLASSES)),
        ("split", f"rows have a split other than {', '.join(words)}", ~table["split"].isin(words)),
        ("path", "paths name no file", [not os.path.isfile(path) for path in files]),
        ("path", "paths have rows that contradict each other", files.duplicated() & ~table.duplicated()),
        ("lesion_box", "rows have a lesion_box other than x:y:width:height", ~boxes),
    ):
        if any(wrong):
            raise UserError(f"{file}: {sum(wrong)} {problem}: {list_some(table[column][wrong].unique())}.")
    held_out = [word for word in VALIDATION_WORDS if word in {*table["split"]}]
    unused = [word for word in held_out[1:] if word != "test"]
    left_out = table.duplicated() | table["split"].isin(unused)
    if left_out.any():
        log.warning("%d rows of labels.csv are left out: repeated, or of %s", left_out.sum(), unused)
    return table[~left_out].replace({"split": dict.fromkeys(held_out[:1], "validation")})


def match_names(names):
    """Patients in names as PATIENT_NAMES has them: a column a collection, else NaN."""
    patients = pd.DataFrame({f"file name ({collection})": names.str.extract(pattern, expand=False)
                             for collection, pattern in PATIENT_NAMES.items()})
    films = patients["file name (mini-MIAS)"].dropna().astype(int)
    return patients.assign(**{films.name: films.add(1).floordiv(2).map("mias_{:03d}".format)})


def read_patient_id(path):
    """PatientID of a DICOM file, or "". Raises UserError without pydicom."""
    try:
        import pydicom
        tags = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(tags.get("PatientID") or "").strip()
    except ModuleNotFoundError as error:
        raise UserError("DICOM files need one more package: pip install pydicom") from error
    except Exception:  # bad files are reported when read
        return ""


def name_patients(films, folder):
    """films with every patient_id and patient_from, the first source that knows the patient, else the path.

    A PatientID, maybe a hospital's, becomes dicom_00001 and so on unless a collection or other films have it.
    """
    paths = films["path"]
    patients = match_names(paths)
    patients.insert(0, "labels.csv", films["patient_id"].replace("", None))
    unnamed = patients.isna().all(axis=1) & paths.map(lambda path: is_dicom(folder / path))
    tags = paths[unnamed].map(lambda path: read_patient_id(folder / path)).replace("", None).dropna()
    numbers = pd.Series(tags.factorize()[0] + 1, tags.index).map("dicom_{:05d}".format)
    numbers = numbers.mask(tags.isin(patients.stack()), tags)
    patients["PatientID"] = match_names(tags).assign(number=numbers).stack().groupby(level=0).first()
    patients["unknown"] = paths
    names, sources = patients.stack().groupby(level=0).first(), patients.notna().idxmax(axis=1)
    return films.assign(patient_id=names, patient_from=sources)


def is_synthetic(films):
    """Whether all films are phantoms."""
    return all(Path(path).name.startswith("synthetic_") for path in films["path"])


def find_films(folder):
    """The films in a folder (absolute Path) by path: COLUMNS and patient_from, all str. Raises UserError."""
    file = folder / "labels.csv"
    try:
        if folder.resolve() == PHANTOMS and not (file.is_file() and any(folder.glob("images/*.png"))):
            log.info("making synthetic mammograms")
            runpy.run_path(str(PHANTOMS / "prepare.py"))["make_phantoms"](PHANTOMS)
        films, ignored = (read_labels(file), "") if file.is_file() else read_folders(folder)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{folder} cannot be used ({error}). {LAYOUTS}") from error
    if missing := [label for label in CLASSES if label not in {*films["label"]}]:
        raise UserError(f"{folder} has no {' and no '.join(missing)} image (ignored: {ignored}). {LAYOUTS}")
    if ignored:
        log.warning("ignored, as no image in a folder benign... or malignant...: %s", ignored)
    films = name_patients(films.sort_values("path", ignore_index=True), folder).assign(side="", view="")
    sources = films["patient_from"].value_counts().to_dict()
    log.info("%d films of %d patients, known from %s", len(films), films["patient_id"].nunique(), sources)
    if "unknown" in sources:
        log.warning("a film of an unknown patient counts as a patient of its own: where some share one,"
                    " results look too good (name them in labels.csv)")
    return films
