"""Which mammograms there are, and whose: folders, labels.csv and DICOM headers become one table.

A film is one mammogram: an image file, and a row of the table.
"""
import os
import re
import runpy
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pandas as pd

from data import CLASSES, UserError, list_some, log, warn
from data.dicom import import_pydicom, is_no_mammogram, is_without_image, name_class
from data.labels import COLUMNS, NORMAL, SAVE_AS, VALIDATION_WORDS, read_labels, suggest_labels
from data.names import find_companions, first_known, read_path, to_side, to_view
from data.patients import (PATIENT_ID, STUDY, check_patients, check_tags, choose_texts, compare_sources,
                           drop_shared_folders, fill_gaps, find_ids, find_sources, name_patients)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".pgm", ".ppm", ".pnm", ".bmp",
                  ".dcm", ".dicom")
HIDDEN = (".", "@eaDir", "#recycle", "$RECYCLE.BIN")  # starts of names: of systems, network drives and bins
PHANTOMS = Path(__file__).resolve().parent / "phantoms"
LAYOUTS = ("DATA_DIR needs labels.csv, or benign/ and malignant/, alone or in train/, val/ and test/:"
           " data/README.md")
OTHER_TABLES = r".*\.(csv|xls[xm]?|ods|tsv|csv\.txt)|label.*\.txt"  # files that may be meant to be labels.csv
TAGS = ["PatientID", "PatientBirthDate", "StudyInstanceUID", "ImageLaterality", "Laterality", "ViewPosition",
        "ViewCodeSequence", "SOPClassUID"]
HEADER = ["PatientID", "PatientBirthDate", "StudyInstanceUID", "side", "view", "kind"]  # columns of read_headers


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


# ---- folders, and what DICOM files declare -----------------------------------------------------


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


def read_header(path):
    """HEADER of a DICOM file, as a dict; "" is what it lacks. Raises UserError without pydicom.

    kind: the name of its class where that is no mammogram, such as a report.
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
    found = {"side": side, "view": to_view(texts["ViewPosition"]), "kind": kind if is_no_mammogram(kind) else ""}
    return {name: texts.get(name) for name in HEADER} | found


def read_headers(paths, folder):
    """Table of HEADER of the DICOM files among `paths` (Series), "" for others."""
    dicom = [index for index, path in paths.items() if is_dicom(folder / path)]
    with ThreadPoolExecutor() as pool:  # for network drives
        rows = list(pool.map(read_header, [folder / path for path in paths[dicom]]))
    return pd.DataFrame(rows, dicom, HEADER, dtype=str).reindex(paths.index, fill_value="")


def check_kinds(films, headers):
    """(films, headers) without reports, a DICOMDIR and the like, which are named. So are other images."""
    def name_kinds(chosen):
        return ", ".join(sorted({*headers["kind"][chosen]}))

    empty = headers["kind"].map(is_without_image).astype(bool)
    warn(f"DICOM objects without an image are ignored ({name_kinds(empty)})", films["path"][empty])
    other = headers["kind"].ne("") & ~empty
    warn(f"DICOM files declare another kind of image ({name_kinds(other)}): remove those that are no mammograms",
         films["path"][other])
    return films[~empty].reset_index(drop=True), headers[~empty].reset_index(drop=True)


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


# ---- the table ---------------------------------------------------------------------------------


def is_synthetic(films):
    """Whether all films are phantoms."""
    return all(Path(path).name.startswith("synthetic_") for path in films["path"])


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


def check_paths(films, paths):
    """Warn of films whose path names another class or set, or no finding; paths: see drop_shared_folders."""
    words = paths.str.lower()
    named = {label: words.str.contains(rf"(?<!non[-_ ])(?<!not[-_ ]){label}") for label in CLASSES}
    other = named["malignant"].where(films["label"].eq("benign"), named["benign"])
    warn("images have the other class in their path: check their label", films["path"][other])
    normal = words.str.contains(r"(?:^|/)(?:normal|healthy)s?(?![a-z])")
    warn(f"images are named normal or healthy, but {NORMAL}: check their label", films["path"][normal])

    sets = words.str.extract(r"(?:^|/)(train|val|valid|validation|test)(?:ing)?/", expand=False)
    other = sets.notna() & sets.str.replace(r"^val\w*", "validation", regex=True).ne(films["split"])
    warn("images lie in a folder of another set than their split, or have none. The folder does not count: write a"
         " column split into labels.csv, if it should", films["path"][other])


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
        ignored = []
        if file.is_file():
            films = read_labels(file)
            tell_of_unlisted(films, folder)
        else:
            films, ignored = read_folders(folder)
        companions = films["path"].isin(warn_of_companions(films["path"]))
        films = films[~companions].sort_values("path", ignore_index=True)
        films, headers = check_kinds(films, read_headers(films["path"], folder))
        if missing := [label for label in CLASSES if label not in {*films["label"]}]:
            refuse_folder(folder, missing, ignored)
    except OSError as error:
        problem = f"{error.strerror}: {error.filename}" if error.filename else error
        raise UserError(f"{folder} cannot be used ({problem}). {LAYOUTS}") from error

    warn("files or folders are ignored, as they are no images in a folder benign... or malignant...", ignored)
    tables = [name for name in ignored if re.fullmatch(OTHER_TABLES, name.lower())]
    warn(f"tables are not read. If one has the patients, {SAVE_AS}", tables)
    if any(Path(name).name.lower().startswith("normal") for name in ignored):
        log.warning("%s: images without a finding are not used", NORMAL)
    return films, headers


def find_films(folder):
    """The films in a folder (absolute Path) by path: COLUMNS and patient_from, all str. Raises UserError.

    side is "left", "right" or "", view "CC", "MLO", another short name or "".
    """
    films, headers = find_images(folder)
    paths = drop_shared_folders(films["path"])
    check_paths(films, paths)
    named = pd.DataFrame(map(read_path, paths), columns=["side", "view", "text"], dtype=str)
    films = name_sides(films, headers, named)

    ids = find_ids(films["patient_id"], "patient_id")
    tags, studies = (find_ids(headers[name], name) for name in (PATIENT_ID, STUDY))
    check_tags(tags, headers["PatientBirthDate"], studies)
    texts = choose_texts(named["text"])
    sources = find_sources(ids, paths, tags, studies, texts)
    films = fill_gaps(name_patients(films, sources), texts)
    compare_sources(films, ids, sources)
    origins = ", ".join(f"{source} ({count})" for source, count in films["patient_from"].value_counts().items())
    patients = films["patient_id"].nunique()
    log.info("%d images of %d patients. Source of the patient: %s", len(films), patients, origins)
    check_patients(films)
    return films
