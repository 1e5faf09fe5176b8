"""One page of all finished runs: which setting is better, and how sure is that?"""
import html
import math
import os
import re
from collections import namedtuple
from numbers import Integral
from urllib.parse import quote, unquote_to_bytes

import pandas as pd

from data import CLASSES, UserError, explain_write_errors, log, replace
from data.results import metrics
from data.results.metrics import with_interval
from data.results.summary import BACKBONES
from data.runs import (REMEDY, check, is_bool, is_cell, is_dict_of, is_list_of, is_number, is_text, read_json,
                       read_predictions, read_results, read_table)
from data.splits import FOLDS

SETTINGS = {  # what is used of the settings.json of a run, see data.runs.check
    "note": is_text,
    "constants": lambda v: is_dict_of(v, is_cell),
    "model": {"backbone": is_text, "floats": lambda v: is_list_of(v, is_text)},
    "split": {"given": is_bool},
    "seconds": lambda v: is_dict_of(v, is_number),
    "weights": {"sha256": is_text, "pretrained": is_bool},
    "versions": lambda v: is_dict_of(v, is_text),
    "device": is_text,
}
CONSTANTS = {"DATA_DIR": is_text, "FOLD": is_cell, "WEIGHTS": is_cell, "THRESHOLD": is_number,
             "SEED": lambda v: is_number(v, Integral, 0)}
APART = ("DATA_DIR", "OUTPUT_DIR", "FOLD", "SPLIT_SEED", "SEED",  # constants that are no part of a setting
         "SATURATION")  # which does nothing to grey films
RELEASES = {"TensorFlow": "tensorflow", "Keras": "keras", "code": "code"}  # column: name in "versions"
HEADERS = {"UNFROZEN_FRACTION": "trainable layers", "MIXED_PRECISION": "floats"}
PICTURES = ("confusion_matrix", "roc_curve", "precision_recall", "training_curves", "grad_cam_example")
METRICS = ("accuracy", "precision", "recall", "f1", "specificity", "average_precision")


def describe_setting(settings):
    """{column: value} of runs.csv that settings.json has: what was run, and on what."""
    constants = settings["constants"]
    row = {"note": settings["note"], "backbone": settings["model"]["backbone"]}
    for name, value in constants.items():
        if name.isupper():
            row[name] = value if isinstance(value, str) else str(value).removesuffix(".0")  # 1 and 1.0 are one
    for name, version in RELEASES.items():
        row[name] = settings["versions"].get(version)
    row["device"] = "CPU" if settings["device"].startswith("CPU") else "GPU"
    row["MIXED_PRECISION"] = " and ".join(settings["model"]["floats"])  # "auto" is another on another machine
    row["SPLIT_SEED"] = row.get("SPLIT_SEED", row["SEED"])  # one constant in older versions
    if settings["split"]["given"]:
        row["FOLD"] = "other collection" if "TRAINED_ON" in constants else "given split"
        row["SPLIT_SEED"] = "not used"
    row["minutes"] = sum(settings["seconds"].values()) / 60
    row["weights"] = settings["weights"]["sha256"]
    if not settings["weights"]["pretrained"]:
        row["WEIGHTS"], row["weights"] = "random", "random"  # another SEED draws others
    return row


def describe_results(results):
    """{column: value} of runs.csv that metrics.json has: metrics and the baseline, with intervals."""
    row = {}
    for name in metrics.NAMES:
        if name in results["ci95"]:
            row[name] = "undefined" if results[name] is None else results[name]
            row[f"{name}_low"], row[f"{name}_high"] = results["ci95"][name]
    if "baseline" in results:  # runs of older versions have none
        row["baseline_auc"] = results["baseline"]["auc"]
        row["baseline_auc_low"], row["baseline_auc_high"] = results["baseline"]["ci95"]["auc"]
    return row


def describe_films(split, settings, row, side):
    """{column: value} of runs.csv on the films: "section" is the same for runs that are compared.

    split: split.csv; row: of describe_setting.
    """
    given = settings["split"]["given"]
    used = split[split.get("split", split.get("fold", split["label"])).ne("excluded")]
    names = ["path", "label", "film_sha256"]
    if row["FOLD"] != "other collection":
        names.append("group")
    digests = pd.util.hash_pandas_object(split[names], index=False)
    dealt = f"{settings['split'].get('dealt')} by {row['SPLIT_SEED']}"  # which films, not those of a test set
    digits = None
    if given:
        digits = f"{pd.util.hash_pandas_object(split[['path', 'split']], index=False).sum():x}"[-6:]
    return {"films": f"{len(used)} mammograms of {used['group'].nunique()} patients", "split": digits,
            "section": f"{digests.sum()}, {dealt}, {given}, {side == 'test'}"}


def read_held_out(file, split, fold):
    """The held-out films of a run, from predictions.csv, of a fold or "test set"; split: split.csv. UserError."""
    films, known = read_predictions(file), split.set_index("path")
    if not known.index.is_unique or films["path"].map(known["label"]).ne(films["label"]).any():
        raise UserError(f"{file} and split.csv contradict each other: {REMEDY}.")

    films["group"], films["malignant"] = films["path"].map(known["group"]), films["label"].map(CLASSES.index)
    films["fold"] = films.get("fold", fold)  # FOLD "all" has a column
    if films.groupby("fold")["malignant"].nunique().min() < 2:
        raise UserError(f"{file} has a fold without one of the classes: {REMEDY}.")
    films["baseline"] = pd.to_numeric(films["baseline"], errors="coerce") if "baseline" in films else math.nan
    return films


def read_run(folder, place):
    """(row, films) of a run: its row of runs.csv, and its held-out films. Raises UserError.

    place: where its results lie, the folder itself or the folder of its test set.
    """
    settings = read_json(folder / "settings.json", SETTINGS)
    constants = settings["constants"]
    check(constants, CONSTANTS, folder / "settings.json")
    results = read_results(place / "metrics.json")
    columns = ["path", "label", "group", "film_sha256"]
    if settings["split"]["given"]:
        columns.append("split")
    split = read_table(folder / "split.csv", columns)

    setting = describe_setting(settings)
    row = {"run": folder.name, "side": results["side"]} | setting | describe_results(results)
    row["link"] = quote(os.fsencode(place.relative_to(folder.parent).as_posix()))
    row |= describe_films(split, settings, setting, results["side"])
    fold = "test set" if results["side"] == "test" else setting["FOLD"]  # the same whatever FOLD is
    films = read_held_out(place / "predictions.csv", split, fold)
    return row, films.assign(seed=constants["SEED"], threshold=constants["THRESHOLD"], run=row["link"])


# ---- settings ----------------------------------------------------------------------------------

# Runs that differ in fold and SEED only. cells: {column: value} of what tells the setting from others; runs: rows
# of the table of runs; films: what was held out, indexed by path and fold; scores: probabilities with the same
# index, a column for each training; results: of metrics.measure_trainings.
Setting = namedtuple("Setting", "name cells runs films scores results")


def measure(films, scores):
    """metrics.measure_trainings of the films and scores of a setting, or of a part of them."""
    return metrics.measure_trainings(films["malignant"], scores.T, films["group"], films["seed"].iloc[0],
                                     films["threshold"].iloc[0], films.index.get_level_values("fold"))


def choose_names(runs, columns):
    """The columns in which settings differ, without those that separate no more settings than the ones before."""
    chosen = ["backbone"]
    for column in columns:
        if runs.groupby([*chosen, column]).ngroups > runs.groupby(chosen).ngroups:
            chosen.append(column)
    return chosen


def make_setting(runs, films, columns, named_by):
    """The Setting of some runs. Of the same fold and SEED the newest run counts.

    columns: those that differ between settings; named_by: those of the name, see choose_names.
    Trainings count together if they held out the same films; those that held out most films count.
    """
    films = films[films["run"].isin(runs["link"])].drop_duplicates(["seed", "path"], keep="last")
    groups = {}  # trainings by what they held out
    for _, training in films.groupby("seed"):
        training = training.sort_values("fold", kind="stable").set_index(["path", "fold"])
        groups.setdefault(frozenset(training.index), []).append(training)
    trainings = max(groups.values(), key=lambda group: (len(group[0]), len(group)))
    films = trainings[0]
    scores = pd.DataFrame({number: part["probability"] for number, part in enumerate(trainings)}, films.index)

    last = runs.iloc[-1]
    plain = ("backbone", "trainable layers")  # values that are clear without a name
    name = ", ".join(last[column] if column in plain else f"{column} {last[column]}" for column in named_by)
    cells = {column: last[column] for column in ("backbone", *columns)}
    return Setting(name, cells, runs, films, scores, measure(films, scores))


def rank(settings):
    """(ranked, others): the settings that held out the same films, most of all, and those that held out others.

    Both lists start with the highest AUC.
    """
    settings = sorted(settings, key=lambda setting: -setting.results["auc"])
    held_out = [frozenset(setting.films.index) for setting in settings]
    most = max(held_out, key=lambda films: (len(films), held_out.count(films)))
    ranked = [setting for setting, films in zip(settings, held_out, strict=True) if films == most]
    others = [setting for setting, films in zip(settings, held_out, strict=True) if films != most]
    return ranked, others


def subtract_aucs(best, other, pairs):
    """(difference, low, high): AUC of the best setting minus that of another, on the films of both, or None.

    pairs: the number of comparisons in the Bonferroni correction.
    """
    common = best.films.index.intersection(other.films.index, sort=False)
    if common.empty:
        return None
    films, first, second = best.films.loc[common], best.scores.loc[common], other.scores.loc[common]
    values = metrics.compare_aucs(films["malignant"], first.T, second.T, films["group"],
                                  common.get_level_values("fold"), confidence=1 - 0.05 / pairs)
    return None if math.isnan(values[0]) else values  # of films of one class


# ---- words -------------------------------------------------------------------------------------


def to_percent(text):
    return f"{100 * float(text):g}\u00a0%" if re.fullmatch(r"[01](\.\d+)?", text) else text


def cut_folders(text):
    """The last part of a path, of Windows, too."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1]


def name_values(runs):
    """The rows of runs.csv with the names and values that the page shows."""
    shown = runs.replace({"backbone": BACKBONES}).rename(columns=HEADERS)
    shown["WEIGHTS"] = shown.groupby(["section", "weights"])["WEIGHTS"].transform("last")  # one text a file
    for name, shorten in (("trainable layers", to_percent), ("WEIGHTS", cut_folders), ("TRAINED_ON", cut_folders)):
        if name in shown:
            shown[name] = shown[name].map(shorten)
    files = shown.groupby(["section", "backbone", "WEIGHTS"])["weights"].transform("nunique")
    shown.loc[files > 1, "WEIGHTS"] += " " + shown["weights"].str[:6]  # files of the same name
    return shown


def describe_folds(folds):
    """Which folds were held out, as text: fold 0 only."""
    if len(folds) == FOLDS or "all" in folds:
        return "all folds"
    if not all(fold.isdigit() for fold in folds):
        return ", ".join(folds)
    noun = "fold" if len(folds) == 1 else "folds"
    return f"{noun} {', '.join(folds)} only"


def answer(best, others, differences):
    """One sentence: which setting is better. differences: subtract_aucs of each of the others."""
    if not others:
        return f"{best.name} is the only setting: AUC {with_interval(best.results, 'auc')}."

    claims, alike = [], 0
    for other, difference in zip(others, differences, strict=True):
        if difference is None:
            continue
        value, low, high = difference
        once = " (one training of each)" if best.scores.shape[1] == other.scores.shape[1] == 1 else ""
        if low > 0:
            text = metrics.describe_difference(value, low, high)
            claims.append(f"{best.name} is better than {other.name}: {text}{once}")
        elif high < 0:
            text = metrics.describe_difference(-value, -high, -low)
            claims.append(f"{other.name} is better than {best.name}: {text}{once}")
        else:
            alike += 1

    if not claims and not alike:
        return f"No setting can be compared with the best ({best.name}): none held out the same mammograms."
    if not claims:
        return f"No setting can be told from the best ({best.name}): all differences include 0."
    if alike:
        noun = "setting" if alike == 1 else "settings"
        claims.append(f"{alike} other {noun} cannot be told from the best")
    return "; ".join(claims) + "."


# ---- HTML --------------------------------------------------------------------------------------


def fill(template, /, **texts):
    """HTML with texts in it, which are escaped: whatever a run folder holds is shown, and never obeyed."""
    return template.format(**{name: html.escape(str(text)) for name, text in texts.items()})


def draw_metric(results, name):
    """A metric with its interval as text, and as a point on a line from 0 to 1."""
    if results[name] is None:
        return "undefined"
    value, low, high = (round(100 * number) for number in (results[name], *results["ci95"][name]))
    return (f'{with_interval(results, name)}<svg viewBox="-3 0 106 8"><path d="M0 4H100M50 1V7"/>'
            f'<path stroke-width="2" d="M{low} 4H{high}"/><circle cx="{value}" cy="4" r="3"/></svg>')


def show_baseline(setting):
    """AUC of the file properties alone, and AUC of the network minus it, on what a setting held out."""
    films, folds = setting.films, setting.films.index.get_level_values("fold")
    if films["baseline"].isna().any():
        return "not recorded"
    scores = films["malignant"], films["baseline"], films["group"]
    alone = metrics.measure(*scores, films["seed"].iloc[0], folds=folds)
    values = metrics.compare_aucs(films["malignant"], setting.scores.T, films["baseline"], films["group"], folds,
                                  second_varies=False)
    return f"{draw_metric(alone, 'auc')}AUC of the network minus this<br>{metrics.describe_difference(*values)}"


def show_difference(best, other, difference):
    """What subtract_aucs gives; where a setting held out other films, both AUCs on the common ones, too."""
    if difference is None:
        return "no common mammograms"
    text = metrics.describe_difference(*difference)
    common = best.films.index.intersection(other.films.index)
    if len(common) == len(best.films) == len(other.films):
        return text
    first, second = (measure(setting.films.loc[common], setting.scores.loc[common])["auc"]
                     for setting in (best, other))
    return f"{first:.2f} against {second:.2f}<br>on the {len(common)} common mammograms:<br>{text}"


def show_table(settings, differences):
    """A row for each setting; differences: show_difference of each, or None where there is one setting only."""
    rows = []
    for setting, difference in zip(settings, differences, strict=True):
        row = {html.escape(name): fill("<span>{value}</span>", value=value)
               for name, value in setting.cells.items()}
        row["backbone"] = fill("<span><a href='#{link}'>{name}</a></span>", link=setting.runs["link"].iloc[-1],
                               name=setting.cells["backbone"])
        row |= {"AUC": draw_metric(setting.results, "auc"), "file properties alone": show_baseline(setting)}
        if difference is not None:
            row["AUC of the best minus this"] = difference
        count, deviation = setting.results["trainings"], setting.results["sd"]["auc"]
        row["trainings"] = "1" if count == 1 else f"{count}<br>SD of AUC {deviation:.2f}"
        row["held out"] = fill("{folds}<br>{films} mammograms<br>of {patients} patients", films=len(setting.films),
                               folds=describe_folds(setting.films.index.unique("fold")),
                               patients=setting.films["group"].nunique())
        row |= {metrics.TITLES[name]: draw_metric(setting.results, name) for name in METRICS}
        rows.append(row)
    return pd.DataFrame(rows).to_html(index=False, escape=False)


def find_place(output_dir, link):
    """The path of a link of report.html."""
    return output_dir / os.fsdecode(unquote_to_bytes(link))


def show_runs(setting, output_dir):
    """The runs of a setting with their figures, the newest first."""
    parts = [fill("<h3 id='{link}'>{name}</h3>", link=setting.runs["link"].iloc[-1], name=setting.name)]
    for run in setting.runs[::-1].to_dict("records"):
        place = find_place(output_dir, run["link"])
        parts.append(fill("<details><summary><a href='{link}/'>{run}</a>, {fold}, SEED {SEED} <mark>{note}</mark>"
                          "</summary>", fold=describe_folds([run["FOLD"]]), **run))
        parts += [fill("<img src='{link}/{name}.png' alt='{name} of {run}' loading='lazy'>", name=name, **run)
                  for name in PICTURES if (place / f"{name}.png").exists()]
        parts.append("</details>")
    return parts


def show_section(runs, films, names, output_dir):
    """Runs on the same films and folds; names: columns of what decides a result, but for fold and SEED."""
    names = [name for name in names if runs[name].ne("not recorded").any()]
    differs = [name for name in names if runs[name].nunique() > 1]
    named_by = choose_names(runs, differs)
    settings = [make_setting(group, films, differs, named_by) for _, group in runs.groupby([*names, "weights"])]
    ranked, others = rank(settings)
    best, *rest = ranked + others
    differences = [subtract_aucs(best, other, math.comb(len(settings), 2)) for other in rest]
    cells = ["" if rest else None, *map(show_difference, [best] * len(rest), rest, differences)]

    last = runs.iloc[-1]
    title = f"{cut_folders(last['DATA_DIR'])}: {last['films']}"
    if last["side"] == "test":
        title += ", test set"
    same = ", ".join(f"{name} {last[name]}" for name in names if name not in differs)
    sheets = [f"{link}/films.png" for link in runs.drop_duplicates("CROP", keep="last")["link"]]
    return "\n".join([
        fill("<h2>{title}</h2>", title=title),
        fill("<p><strong>{answer}</strong></p>", answer=answer(best, rest, differences)),
        *(fill("<p><mark>{note}</mark></p>", note=note) for note in runs["note"].unique() if note),
        show_table(ranked, cells[: len(ranked)]),
        OTHERS + show_table(others, cells[len(ranked) :]) if others else "",
        BEST if rest else "",
        fill("<p>The same in all settings: {same}, SPLIT_SEED {seed}.</p>", same=same, seed=last["SPLIT_SEED"]),
        *(fill("<a href='{sheet}'><img class='films' src='{sheet}' alt='mammograms as the network sees them'></a>",
               sheet=sheet) for sheet in sheets if find_place(output_dir, sheet).exists()),
        *(part for setting in (best, *rest) for part in show_runs(setting, output_dir)),
    ]).replace("<details>", "<details open>", 1)  # of the best


# ---- page --------------------------------------------------------------------------------------


def compare(output_dir):
    """Write runs.csv and report.html: which setting in OUTPUT_DIR (Path) is better, and how sure is that?"""
    found, files = [], set(output_dir.glob("[!.]*/settings.json"))
    for file in sorted(files, key=os.path.getmtime):
        try:
            places = [file.parent, *file.parent.glob("test")]
            found += [read_run(file.parent, place) for place in places]
        except UserError as error:  # the others are shown
            log.warning("excluded from the comparison: %s", error)
    if not found:
        return
    rows, films = zip(*found, strict=True)
    runs, films = pd.DataFrame(rows, dtype=object).fillna("not recorded").astype(str), pd.concat(films)
    constants = [name for name in runs if name.isupper() and name not in APART]
    names = ["backbone", *(HEADERS.get(name, name) for name in constants), *RELEASES, "device", "split"]
    sections = [show_section(section, films, names, output_dir)
                for _, section in name_values(runs).groupby("section", sort=False)]
    for name, text in (("runs.csv", runs.to_csv(index=False)), ("report.html", PAGE + "\n".join(sections))):
        with explain_write_errors(output_dir), replace(output_dir / name) as temporary:
            temporary.write_text(text, "utf-8", "replace", newline="")  # of names that are no UTF-8
    if files != set(output_dir.glob("[!.]*/settings.json")):  # another process has completed a run meanwhile
        compare(output_dir)


OTHERS = """<p>These settings held out fewer or other mammograms. Each is compared with the best setting on the
mammograms that both held out.</p>"""
BEST = """<p>The best setting was chosen on these patients, so its metrics are optimistic. The intervals of the
differences are simultaneous 95 % intervals (Bonferroni). With one training of each setting, they cover the
variation between patients only: train again with other values of SEED.</p>"""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Mammograms: benign or malignant</title>

<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 78rem; margin: auto; padding: 1rem; }
h2, h3, p, td, summary { overflow-wrap: anywhere; }

table { display: block; overflow-x: auto; border: 0; font-size: 0.8rem; }
th, td { padding: 0.3rem; text-align: left; border: 0; border-bottom: 1px solid #8886; }
td { white-space: nowrap; }

span { display: inline-block; max-width: 12rem; white-space: normal; overflow-wrap: anywhere; }

mark { background: #b22222; color: #fff; }
img { max-width: 100%; max-height: 25rem; }
img.films { max-height: none; }

svg { display: block; width: 7rem; fill: #0072b2; stroke: #0072b2; }

@media print { @page { size: landscape; } table { display: table; } img, tr { break-inside: avoid; } }
</style>

<h1>Mammograms: benign or malignant</h1>

<p><strong>Research software, not for clinical use.</strong> In brackets are 95 % intervals over patients, and
over trainings if a setting has several. Folds are pooled: counts are added, AUC and average precision are means
of the folds. "File properties alone" is a random forest that knows format, size and brightness of the files. A
network has learnt something about lesions only if it does better.</p>
"""
