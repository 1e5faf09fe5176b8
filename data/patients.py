"""Whose film it is: labels.csv, names of collections, PatientIDs and other names are compared and joined."""
import os
import re
from itertools import takewhile

import pandas as pd

from data import CLASSES, list_some, log, quote, warn
from data.names import DATE, DATE_AND_TIME, ID_ENDING, connect, first_known, is_nobody, match_patients, to_key

MANY = 8  # films: a patient seldom has more
SINGLE = 0.98  # patients a film: if there are more, the ids may be those of films (DDSM has 0.971)
PUBLIC, TEXT = "public PatientID", "text before side and view"  # sources of patients
PATIENT_ID, STUDY = "PatientID", "StudyInstanceUID"  # more of them, which may be a hospital's and are not shown


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


def join_endings(ids, source):
    """The ids, as of breasts, without side, view or date at the end, where several differ by nothing else.

    An id that very many films share without its end keeps it. source: where the ids are from.
    """
    stems = ids.map(lambda text: re.sub(ID_ENDING, "", text), na_action="ignore")
    numbers = ids.groupby(stems.map(to_key, na_action="ignore")).transform("nunique")
    has_number = stems.astype(str).str.contains(r"\d")
    has_few = count_equal(stems) <= limit_films(ids, 4 * MANY)
    joined = stems.ne(ids) & numbers.gt(1) & has_number & has_few
    if joined.any():
        log.info("the %s of %d images ends in a side, a view or a date, which is ignored", source, joined.sum())
    return ids.mask(joined, stems)


def check_tags(tags, births, studies):
    """Warn of PatientIDs and studies of DICOM headers that contradict each other. No value is shown."""
    several = births[births.ne("")].groupby(tags).nunique().gt(1).sum()
    if several:
        log.warning("%d PatientIDs have several dates of birth: if these are different patients, write patient_id"
                    " into labels.csv", several)
    several = tags.groupby(studies).nunique().gt(1).sum()
    if several:
        log.warning("%d studies have images of several PatientIDs: a study is of one patient, so these PatientIDs"
                    " are joined", several)


def limit_films(films, least=MANY):
    """How many films may share an id or a text of a patient: at most a tenth of all, or `least` if it is more."""
    return max(len(films) / 10, least)


def choose_texts(texts):
    """The texts (Series) of read_path that may name a patient; missing where there is none.

    A date at the end, or as a folder, does not count, unless too many films for a patient have the text without
    it. A text that very many films share is missing: it names no patient.
    """
    undated = texts.str.replace(rf"[ _./-]+{DATE_AND_TIME}$|(?:^|(?<=/)){DATE_AND_TIME}/", "", regex=True)
    too_many = count_equal(undated) > 4 * MANY
    texts = undated.mask(too_many | ~undated.str.contains(r"\d"), texts)
    return texts.mask(texts.eq("") | (count_equal(texts) > limit_films(texts)), None)


def find_sources(ids, paths, tags, studies, texts):
    """Table of patients with a column for each source, the best first; missing where it does not know the patient.

    ids: of labels.csv. paths: see drop_shared_folders. tags: PatientIDs. studies: StudyInstanceUIDs. texts: see
    choose_texts. They are used only if no other source but the study knows the patient, or if the other sources
    give every film a different id. A PatientID that very many films share is ignored, if another source knows the
    patient. So is a study.
    """
    limit = limit_films(paths)
    sources = match_patients(paths).rename(columns="file name ({})".format)
    sources.insert(0, "labels.csv", first_known(match_patients(ids)).fillna(join_endings(ids, "patient_id")))
    sources[PUBLIC] = first_known(match_patients(tags))  # CBIS-DDSM's PatientIDs are one for each image

    common = count_equal(tags).gt(limit) & sources.notna().any(axis=1)
    if common.any():
        log.warning("%d images have a PatientID that more than %d images share: it is ignored", common.sum(),
                    limit)
    sources[PATIENT_ID] = join_endings(tags, PATIENT_ID).mask(common | sources[PUBLIC].notna(), None)

    of_images = sources.apply(count_equal).max().eq(1) & sources.notna().mean().gt(0.9)
    known = sources.loc[:, ~of_images].notna().any(axis=1)
    texts = texts.mask(known, None)
    sources[TEXT] = texts if count_equal(texts).max() > 1 else None
    sources[STUDY] = studies.mask(count_equal(studies) > limit, None)  # a patient has several
    return sources


def name_patients(films, sources):
    """films with every patient_id, and patient_from, the best source that knows the patient, or "unknown".

    Two films are of one patient if a source has the same id for both, or if their best sources have the same id.
    The best source of all these films names the patient. PatientIDs and studies may be a hospital's, so they are
    replaced by dicom_00001, dicom_00002 ... A film of an unknown patient has its path.
    """
    keys = sources.map(to_key, na_action="ignore")
    edges = keys.assign(best=first_known(keys)).stack().dropna()  # from films to ids
    rows, columns = edges.index.get_level_values(0), edges.index.get_level_values(1)
    ids = len(films) + edges.groupby([columns, edges.to_numpy()]).ngroup()
    groups, _ = pd.factorize(connect((rows, ids), len(films) + len(edges))[: len(films)])

    names = first_known(sources.drop(columns=[PATIENT_ID, STUDY]).groupby(groups).first())
    hidden = names.isna() & sources[[PATIENT_ID, STUDY]].groupby(groups).first().notna().any(axis=1)
    names[hidden] = [f"dicom_{number:05d}" for number in range(1, hidden.sum() + 1)]
    origins = sources.assign(unknown="").notna().idxmax(axis=1).replace(PUBLIC, PATIENT_ID)
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
    """Tell of ids in labels.csv that are spelled in several ways, or that other sources join or separate."""
    keys = ids.dropna().drop_duplicates().map(to_key)
    spellings = keys[keys.duplicated(keep=False)]
    if len(spellings):
        log.info("%d ids in labels.csv count as %d, as case, spaces, leading zeros, .0 and typography make no"
                 " difference: %s", len(spellings), spellings.nunique(), list_some(ids[spellings.index].tolist()))

    patients = films["patient_id"][ids.notna()].nunique()
    if patients < keys.nunique():
        others = sources[ids.notna()].dropna(axis=1, how="all").columns
        shown = {"the file names": f"file name|{TEXT}", "the PatientIDs": PATIENT_ID, "the studies": STUDY}
        shown = [name for name, words in shown.items() if others.str.contains(words).any()]
        found = films["patient_id"][keys.drop_duplicates().index]
        joined = found[found.duplicated(keep=False)]
        examples = ids[joined[joined == joined.iloc[0]].index].tolist()
        log.warning("%d ids in labels.csv, but %s show %d patients: joined, such as %s", keys.nunique(),
                    " and ".join(shown) or "they", patients, list_some(examples[:2]))

    named = sources.filter(like="file name").groupby(ids.map(to_key, na_action="ignore")).nunique().sum(axis=1)
    if named.gt(1).any():
        log.warning("%d ids in labels.csv have images that the file names assign to several patients, such as %s:"
                    " each id counts as one patient. If collections were joined, make their ids different",
                    named.gt(1).sum(), quote(named.idxmax()))


def check_numbers(texts):
    """Warn where texts that were taken for patients share their first number that is no date."""
    start = os.path.commonprefix(texts.tolist())  # noqa: RUF071  such as the name of a hospital
    shared = re.sub(r"\d+$", "", start)
    undated = texts.str[len(shared) :].str.replace(rf"{DATE_AND_TIME}|(?<!\d)(?:19|20)\d\d(?!\d)", "", regex=True)
    numbers = undated.str.extract(r"(\d+)", expand=False)
    several = texts.groupby(numbers).transform("nunique").gt(1) & (count_equal(numbers) <= limit_films(texts))
    if several.any():
        first = texts[several & numbers.eq(numbers[several].iloc[0])].unique().tolist()
        log.warning("%d of the guessed patients share their first number with another, such as %s. If these are"
                    " one patient, results look too good. Write patient_id into labels.csv",
                    texts[several].nunique(), list_some(first[:2]))


def check_breasts(films):
    """Warn of images whose breast has the other label in another image."""
    known = films[films["patient_from"].ne("unknown") & films["side"].ne("")]
    labels = known.groupby(["patient_id", "side"])["label"].transform("nunique")
    warn("images show a breast that has the other label in another image: check the labels",
         known["path"][labels.gt(1)])


def check_patients(films):
    """Tell of patients with very many films, and how patients were guessed or are unknown."""
    counts = pd.crosstab(films["patient_id"], films["label"])
    large = counts.sum(axis=1) > max(len(films) / 10, 4)  # 4: the usual views
    mixed = (counts > counts.sum() / 2).all(axis=1)
    has_number = counts.index.str.contains(r"\d") & ~counts.index.str.fullmatch("0+|9{3,}")
    odd = ~has_number & (has_number.mean() > 0.9) & (counts.sum(axis=1) > MANY)  # it may stand for "unknown"
    for patient, numbers in counts[large | mixed | odd].iterrows():
        shares = " and ".join(f"{numbers[label]} of {counts[label].sum()} {label}" for label in CLASSES)
        log.warning("patient %r has %s images: if these are several patients, write patient_id into labels.csv",
                    patient, shares)

    check_breasts(films)
    known = films[films["patient_from"].ne("unknown")]
    if len(films) > MANY and known["patient_id"].nunique() > SINGLE * len(films):
        log.warning("%d images have %d patients: if the ids are those of images, results look too good. Write ids"
                    " of patients into labels.csv", len(films), known["patient_id"].nunique())

    studies = films[films["patient_from"].eq(STUDY)]
    warn("images have no patient, but a study: if a patient was examined twice, results look too good. Write"
         " patient_id into labels.csv", studies["path"])

    guessed = films[films["patient_from"].eq(TEXT)]
    if len(guessed):
        patients = guessed.drop_duplicates("patient_id")
        check_numbers(guessed["patient_id"])
        is_doubtful = len(guessed) > MANY and len(patients) > 0.9 * len(guessed)
        tell = log.warning if is_doubtful else log.info
        examples = ", ".join(f"{film.patient_id!r} of {film.path!r}" for film in patients[:3].itertuples())
        tell("%d patients of %d images are guessed from the text before side and view, such as %s. If this is"
             " wrong, write patient_id into labels.csv", len(patients), len(guessed), examples)

    unknown = films[films["patient_from"].eq("unknown")]
    if len(unknown):
        film = unknown.iloc[0]
        log.warning("%d images are of unknown patients, such as %s: each counts as a patient of its own. If some"
                    " share a patient, results look too good: write labels.csv with columns path,label,patient_id"
                    " and rows such as %s,%s,patient 1", len(unknown), list_some(unknown["path"][:3].tolist()),
                    film["path"], film["label"])
