"""One page of all finished runs: which setting is better, and how sure is that? It knows no networks."""
import html
import json
import math
import os
from pathlib import Path
from urllib.parse import quote, unquote

import pandas as pd
from scipy import special

from data import explain_write_errors, log, replace
from data.films import CLASSES
from data.results import metrics
from data.results.metrics import with_interval


def read_run(folder, place):
    """(row, films) of a run: its row of runs.csv, and its held-out films. Raises whatever is wrong with it.

    place: where its results lie, the folder itself or the folder of its test side.
    """
    settings, results = (json.loads(file.read_bytes())
                         for file in (folder / "settings.json", place / "metrics.json"))
    films, split = (pd.read_csv(file, dtype=str, keep_default_na=False)
                    for file in (place / "predictions.csv", folder / "split.csv"))
    constants, side = settings["constants"], results["side"]
    row = {"run": folder.name, "side": side, "note": settings["note"], "backbone": settings["model"]["backbone"]}
    row |= {name: value if isinstance(value, str) else str(value).removesuffix(".0")  # 1 and 1.0 are one setting
            for name, value in constants.items()}
    row["MIXED_PRECISION"] = " and ".join(settings["model"]["floats"])  # "auto" is another on another machine
    if given := bool(settings["split"]["given"]):
        row["FOLD"] = "other collection" if "TRAINED_ON" in constants else "given split"
    for name, (low, high) in results["ci95"].items():
        value = "undefined" if results[name] is None else results[name]
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    row["minutes"] = sum(settings["seconds"].values()) / 60
    row["weights"] = settings["weights"]["sha256"]
    row["link"] = quote(place.relative_to(folder.parent).as_posix())
    row["films"] = f"{len(split)} films of {split['group'].nunique()} patients"
    names = ["path", "label", "film_sha256"] + ["group"] * (row["FOLD"] != "other collection")
    digests = pd.util.hash_pandas_object(split[names], index=False)
    row["section"] = f"{digests.sum()}, SEED {row['SEED']}, {given}, {side == 'test'}"  # runs of one are compared
    row["sides"] = str(pd.util.hash_pandas_object(split[["path", "split"]], index=False).sum()) if given else ""
    films = films.merge(split[["path", "group"]], on="path", validate="1:1")
    films["malignant"] = films["label"].map(CLASSES.index)
    if films["malignant"].nunique() < 2:
        raise ValueError("a class is missing in predictions.csv")
    films["probability"] = films["probability"].astype(float)
    if "logit" in films:  # which tells apart what is 1 in nine digits
        films["probability"] = special.expit(films["logit"].astype(float))
    films["seed"], films["threshold"] = int(row["SEED"]), float(row["THRESHOLD"])
    return row, films.assign(run=row["link"], fold=films.get("fold", row["FOLD"]))  # FOLD "all" has a column


def pool(runs, films):
    """(films, results) of a setting: what the newest run of each fold held out, measured together."""
    films = films[films["run"].isin(runs)].drop_duplicates("path", keep="last").sort_values("fold", kind="stable")
    return films, metrics.measure(films.malignant, films.probability, films.group, films.seed.iloc[0],
                                  films.threshold.iloc[0], films.fold)


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
        row = {"setting": f"<a href='#{last['link']}'>{setting}</a>", "AUC": draw_metric(results, "auc")}
        if pairs:
            row["best minus this"] = subtract_aucs(groups[0][1], held_out, pairs) if table else ""
        for name in ("accuracy", "precision", "recall", "f1", "specificity", "average_precision"):
            row[name.replace("_", " ")] = draw_metric(results, name)
        folds, patients = ", ".join(held_out["fold"].unique()), held_out["group"].nunique()
        table.append(row | {"folds": folds, "films": len(held_out), "patients": patients})
        details.append(f"<h3 id='{last['link']}'>{setting}</h3>")
        for run in group.itertuples():
            details.append(f'<p><a href="{run.link}/">{run.run}</a>, fold: {run.FOLD} <mark>{run.note}</mark></p>')
            details += [f'<img src="{run.link}/{name}.png" alt="{name} of {run.run}" loading="lazy">'
                        for name in ("confusion_matrix", "roc_curve", "precision_recall", "training_curves",
                                     "grad_cam_example")
                        if (output_dir / unquote(run.link) / f"{name}.png").exists()]
    return "\n".join([
        f"<h2>{Path(last['DATA_DIR']).name}: {last['films']}{', test side' * (last['side'] == 'test')}</h2>",
        *(f"<p><mark>{note}</mark></p>" for note in runs["note"].unique() if note),
        f"<p>All settings: {', '.join(last[names][~differs])}, SEED {last['SEED']}.</p>" + BEST * (pairs > 0),
        pd.DataFrame(table).to_html(index=False, escape=False),
        *details,
    ])


def compare(output_dir):
    """Write runs.csv and report.html: which setting in OUTPUT_DIR (Path) is better, and how sure is that?"""
    found = []
    for file in sorted(output_dir.glob("[!.]*/settings.json"), key=os.path.getmtime):
        try:
            places = [file.parent, *file.parent.glob("test")]
            found += [read_run(file.parent, place) for place in places]
        except Exception as error:  # whatever is wrong with one folder, the others are shown
            log.warning("left out of the comparison: %s (%r)", file.parent.name, error)
    if not found:
        return
    rows, films = zip(*found, strict=True)
    runs, films = pd.DataFrame(rows, dtype=object).fillna("not recorded").astype(str), pd.concat(films)
    names = [name for name in runs if name.isupper() and name not in ("DATA_DIR", "OUTPUT_DIR", "FOLD", "SEED")]
    texts = runs.map(html.escape)
    texts["WEIGHTS"] = texts.groupby(["section", "weights"])["WEIGHTS"].transform("last")  # one text a file
    texts[names] = texts[names].radd([f"{name} " for name in names])
    names = ["backbone", *names]
    sections = [show_section(section, films, names, output_dir)
                for _, section in texts.groupby("section", sort=False)]
    for name, text in (("runs.csv", runs.to_csv(index=False)), ("report.html", PAGE + "\n".join(sections))):
        with explain_write_errors(output_dir), replace(output_dir / name) as temporary:
            temporary.write_text(text, "utf-8", newline="")


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
svg { display: block; width: 7rem; fill: #0072b2; stroke: #0072b2; }
@media print { @page { size: landscape; } table { display: table; } img, tr { break-inside: avoid; } }
</style>
<h1>Mammograms: benign or malignant</h1>
<p><strong>Research software, not for clinical use.</strong> In brackets: 95 % intervals over patients. Folds are
pooled: counts are added, AUC and average precision are their mean. Claims of the original work, not measured here:
ResNet50 accuracy .85, precision .86, recall .84, F1 .85; VGG16 .83, .84, .82, .83.</p>
"""
