"""One page of all finished runs: which setting is better, and how sure is that? It knows no networks."""
import html
import math
import os
from numbers import Integral
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import pandas as pd
from scipy import special

from data import UserError, explain_write_errors, log, replace
from data.films import CLASSES
from data.results import metrics
from data.results.metrics import with_interval
from data.runs import (REMEDY, check, is_cell, is_dict_of, is_list_of, is_number, is_text, read_json,
                       read_predictions, read_results, read_table)

SETTINGS = {  # what is used of the settings.json of a run, see data.runs.check
    "note": is_text,
    "constants": lambda v: is_dict_of(v, is_cell),
    "model": {"backbone": is_text, "floats": lambda v: is_list_of(v, is_text)},
    "split": {"given": lambda v: isinstance(v, bool)},
    "seconds": lambda v: is_dict_of(v, is_number),
    "weights": {"sha256": is_text},
}
CONSTANTS = {"DATA_DIR": is_text, "FOLD": is_cell, "WEIGHTS": is_cell, "THRESHOLD": is_number,
             "SEED": lambda v: is_number(v, Integral, 0)}


def read_run(folder, place):
    """(row, films) of a run: its row of runs.csv, and its held-out films. Raises UserError.

    place: where its results lie, the folder itself or the folder of its test side.
    """
    settings = read_json(folder / "settings.json", SETTINGS)
    check(settings["constants"], CONSTANTS, folder / "settings.json")
    results = read_results(place / "metrics.json")
    given = settings["split"]["given"]
    split = read_table(folder / "split.csv", ["path", "label", "group", "film_sha256"] + ["split"] * given)
    films = read_predictions(place / "predictions.csv")
    constants, side = settings["constants"], results["side"]
    row = {"run": folder.name, "side": side, "note": settings["note"], "backbone": settings["model"]["backbone"]}
    row |= {name: value if isinstance(value, str) else str(value).removesuffix(".0")  # 1 and 1.0 are one setting
            for name, value in constants.items() if name.isupper()}
    row["MIXED_PRECISION"] = " and ".join(settings["model"]["floats"])  # "auto" is another on another machine
    row["SPLIT_SEED"] = row.get("SPLIT_SEED", row["SEED"])  # one constant in older versions
    if given:
        row["FOLD"] = "other collection" if "TRAINED_ON" in constants else "given split"
        row["SPLIT_SEED"] = "not used"
    for name in metrics.NAMES:
        if name in results["ci95"]:
            low, high = results["ci95"][name]
            value = "undefined" if results[name] is None else results[name]
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    if "baseline" in results:  # runs of older versions have none
        row["baseline_auc"] = results["baseline"]["auc"]
        row["baseline_auc_low"], row["baseline_auc_high"] = results["baseline"]["ci95"]["auc"]
    row["minutes"] = sum(settings["seconds"].values()) / 60
    row["weights"] = settings["weights"]["sha256"]
    row["link"] = quote(os.fsencode(place.relative_to(folder.parent).as_posix()))
    used = split[split.get("split", split.get("fold", split["label"])).ne("left out")]
    row["films"] = f"{len(used)} films of {used['group'].nunique()} patients"
    names = ["path", "label", "film_sha256"] + ["group"] * (row["FOLD"] != "other collection")
    digests = pd.util.hash_pandas_object(split[names], index=False)
    dealt = f"{settings['split'].get('dealt')} by {row['SPLIT_SEED']}"  # which films, not those of a test set
    row["section"] = f"{digests.sum()}, {dealt}, {given}, {side == 'test'}"  # runs of one are compared
    row["sides"] = str(pd.util.hash_pandas_object(split[["path", "split"]], index=False).sum()) if given else ""
    known = split.set_index("path")
    if not known.index.is_unique or films["path"].map(known["label"]).ne(films["label"]).any():
        raise UserError(f"{place / 'predictions.csv'} and split.csv contradict each other: {REMEDY}.")
    films["group"], films["malignant"] = films["path"].map(known["group"]), films["label"].map(CLASSES.index)
    films["fold"] = films.get("fold", row["FOLD"])  # FOLD "all" has a column
    if films.groupby("fold")["malignant"].nunique().min() < 2:
        raise UserError(f"{place / 'predictions.csv'} has a fold without one of the classes: {REMEDY}.")
    if "logit" in films:  # which tells apart what is 1 in nine digits
        films["probability"] = special.expit(films["logit"].astype(float))
    films["baseline"] = pd.to_numeric(films["baseline"], errors="coerce") if "baseline" in films else math.nan
    films["seed"], films["threshold"] = constants["SEED"], constants["THRESHOLD"]
    return row, films.assign(run=row["link"])


def pool(runs, films):
    """(films, results) of a setting: what the newest run of each fold held out, measured together."""
    films = films[films["run"].isin(runs)].drop_duplicates("path", keep="last").sort_values("fold", kind="stable")
    return films, metrics.measure(films.malignant, films.probability, films.group, films.seed.iloc[0],
                                  films.threshold.iloc[0], films.fold)


def show_baseline(films):
    """AUC of the file properties alone, and AUC of the network minus it, on what a setting held out, as HTML."""
    if films["baseline"].isna().any():
        return "not recorded"
    alone = metrics.measure(films.malignant, films.baseline, films.group, films.seed.iloc[0], folds=films.fold)
    values = metrics.compare_aucs(films.malignant, films.probability, films.baseline, films.group, films.fold)
    return draw_metric(alone, "auc") + "network minus this<br>{:+.2f} [{:.2f}, {:.2f}]".format(*values)


def subtract_aucs(best, films, pairs):
    """AUC of the best setting minus that of another, on the films that both held out, as HTML."""
    films = best.merge(films, on=["path", "label", "fold"])
    if films.empty:
        return "no fold in common"
    values = metrics.compare_aucs(films.malignant_x, films.probability_x, films.probability_y, films.group_x,
                                  films.fold, confidence=1 - 0.05 / pairs)
    if math.isnan(values[0]):
        return "undefined: one class only"
    return "{:+.2f} [{:+.2f}, {:+.2f}]<br>on {} films".format(*values, len(films))


def fill(template, /, **texts):
    """HTML with texts in it, which are escaped: whatever a run folder holds is shown, and never obeyed."""
    return template.format(**{name: html.escape(str(text)) for name, text in texts.items()})


def draw_metric(results, name):
    """A metric with its interval as text, and as a point on a line from 0 to 1, as HTML."""
    if results[name] is None:
        return "undefined"
    value, low, high = (round(100 * number) for number in (results[name], *results["ci95"][name]))
    return (f'{with_interval(results, name)}<svg viewBox="-3 0 106 8"><path d="M0 4H100M50 1V7"/>'
            f'<path stroke-width="2" d="M{low} 4H{high}"/><circle cx="{value}" cy="4" r="3"/></svg>')


def show_section(runs, films, names, output_dir):
    """Runs on the same films and folds as HTML: a row for each setting (columns `names`), the best first."""
    names = [name for name in names if not runs[name].str.endswith("not recorded").all()]
    groups = [(group, *pool(group["link"], films)) for _, group in runs.groupby([*names, "weights", "sides"])]
    groups.sort(key=lambda group: -(group[2]["auc"] or 0))  # an undefined AUC comes last
    differs = runs[names].nunique() > 1
    table, details, pairs = [], [], math.comb(len(groups), 2)
    for group, held_out, results in groups:
        last = group.iloc[-1]
        setting = ", ".join(last[names][differs]) or last["backbone"]
        name_link = fill("<a href='#{link}'>{setting}</a>", link=last["link"], setting=setting)
        row = {"setting": name_link, "AUC": draw_metric(results, "auc")}
        row["file properties alone"] = show_baseline(held_out)
        if pairs:
            row["best minus this"] = subtract_aucs(groups[0][1], held_out, pairs) if table else ""
        for name in ("accuracy", "precision", "recall", "f1", "specificity", "average_precision"):
            row[name.replace("_", " ")] = draw_metric(results, name)
        folds, patients = fill("{folds}", folds=", ".join(held_out["fold"].unique())), held_out["group"].nunique()
        table.append(row | {"folds": folds, "films": len(held_out), "patients": patients})
        details.append(fill("<h3 id='{link}'>{setting}</h3>", link=last["link"], setting=setting))
        for run in group.to_dict("records"):
            details.append(fill('<p><a href="{link}/">{run}</a>, fold: {FOLD} <mark>{note}</mark></p>', **run))
            place = output_dir / os.fsdecode(unquote_to_bytes(run["link"]))
            image = '<img src="{link}/{name}.png" alt="{name} of {run}" loading="lazy">'
            details += [fill(image, name=name, **run)
                        for name in ("confusion_matrix", "roc_curve", "precision_recall", "training_curves",
                                     "grad_cam_example")
                        if (place / f"{name}.png").exists()]
    sheets = [f"{link}/films.png" for link in runs.drop_duplicates("CROP", keep="last")["link"]]
    title = f"{Path(last['DATA_DIR']).name}: {last['films']}{', test side' * (last['side'] == 'test')}"
    shared = f"All settings: {', '.join(last[names][~differs])}, SPLIT_SEED {last['SPLIT_SEED']}."
    return "\n".join([
        fill("<h2>{title}</h2>", title=title),
        *(fill("<p><mark>{note}</mark></p>", note=note) for note in runs["note"].unique() if note),
        fill("<p>{shared}</p>", shared=shared) + BEST * (pairs > 0),
        *(fill('<a href="{sheet}"><img class="films" src="{sheet}" alt="films as the network sees them"></a>',
               sheet=sheet) for sheet in sheets if (output_dir / os.fsdecode(unquote_to_bytes(sheet))).exists()),
        pd.DataFrame(table).to_html(index=False, escape=False),
        *details,
    ])


def compare(output_dir):
    """Write runs.csv and report.html: which setting in OUTPUT_DIR (Path) is better, and how sure is that?"""
    found, files = [], set(output_dir.glob("[!.]*/settings.json"))
    for file in sorted(files, key=os.path.getmtime):
        try:
            places = [file.parent, *file.parent.glob("test")]
            found += [read_run(file.parent, place) for place in places]
        except UserError as error:  # the others are shown
            log.warning("left out of the comparison: %s", error)
    if not found:
        return
    rows, films = zip(*found, strict=True)
    runs, films = pd.DataFrame(rows, dtype=object).fillna("not recorded").astype(str), pd.concat(films)
    apart = ("DATA_DIR", "OUTPUT_DIR", "FOLD", "SPLIT_SEED", "SATURATION")  # the last does nothing to grey films
    names = [name for name in runs if name.isupper() and name not in apart]
    texts = runs.copy()
    texts["WEIGHTS"] = texts.groupby(["section", "weights"])["WEIGHTS"].transform("last")  # one text a file
    texts[names] = texts[names].radd([f"{name} " for name in names])
    names = ["backbone", *names]
    sections = [show_section(section, films, names, output_dir)
                for _, section in texts.groupby("section", sort=False)]
    for name, text in (("runs.csv", runs.to_csv(index=False)), ("report.html", PAGE + "\n".join(sections))):
        with explain_write_errors(output_dir), replace(output_dir / name) as temporary:
            temporary.write_text(text, "utf-8", "replace", newline="")  # of names that are no UTF-8
    if files != set(output_dir.glob("[!.]*/settings.json")):  # another process has completed a run meanwhile
        compare(output_dir)


BEST = """<p>The best was picked on these patients: its figures are optimistic. A difference is that of two
trained models on the same patients, not of two settings: another training may differ. The intervals of all pairs
hold together with 95 % (Bonferroni).</p>"""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Mammograms: benign or malignant</title>
<style>
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 78rem; margin: auto; padding: 1rem; }
h2, h3, p, td { overflow-wrap: anywhere; }
table { display: block; overflow-x: auto; border: 0; font-size: 0.8rem; }
th, td { padding: 0.3rem; text-align: left; border: 0; border-bottom: 1px solid #8886; white-space: nowrap; }
td:first-child { white-space: normal; min-width: 9rem; }
mark { background: #b22222; color: #fff; }
img { max-width: 100%; max-height: 25rem; }
img.films { max-height: none; }
svg { display: block; width: 7rem; fill: #0072b2; stroke: #0072b2; }
@media print { @page { size: landscape; } table { display: table; } img, tr { break-inside: avoid; } }
</style>
<h1>Mammograms: benign or malignant</h1>
<p><strong>Research software, not for clinical use.</strong> In brackets: 95 % intervals over patients. Folds are
pooled: counts are added, AUC and average precision are their mean. "File properties alone" is a random forest that
knows format, size and brightness of the films: only what a network does better is its own. Claims of the original
work, not measured here: ResNet50 accuracy .85, precision .86, recall .84, F1 .85; VGG16 .83, .84, .82, .83.</p>
"""
