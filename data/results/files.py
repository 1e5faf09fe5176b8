"""The files of a result: predictions, metrics, their figures and overlays, who was held out, the baseline."""
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from data import cut_name, explain_write_errors
from data.reading import place_boxes
from data.results import metrics
from data.results.baseline import add_baseline, list_properties, list_trainings, measure_baseline
from data.results.figures import (draw_calibration, draw_cases, draw_confusion_matrix, draw_films,
                                  draw_precision_recall, draw_roc_curve, draw_training_curves, select_cases,
                                  write_figure)
from data.results.summary import write_summary
from data.runs import explain_damage, read_results, read_table

HISTORY = ["epoch", "loss", "accuracy", "val_loss", "val_accuracy"]  # columns of history.csv


def list_scores(predictions, films):
    """What metrics.py measures: labels (1 malignant), probabilities, patients, and folds or None, as a dict."""
    return {"labels": predictions["label"].eq("malignant").to_numpy(int),
            "probabilities": predictions["probability"].to_numpy(),
            "patients": films.loc[predictions.index, "group"].to_numpy(),
            "folds": predictions["fold"].to_numpy() if "fold" in predictions else None}


def score(predictions, maps, films, settings):
    """(results, bands): the content of metrics.json, and the bands of metrics.measure_with_curves.

    results: every metric over films and over patients, and the pointing game.
    """
    scores, held_out = list_scores(predictions, films), films.loc[predictions.index]
    results, bands = metrics.measure_with_curves(**scores, seed=settings.SEED, threshold=settings.THRESHOLD)
    results |= {"validation_images": len(held_out), "validation_patients": held_out["group"].nunique(),
                "side": held_out["split"].iloc[0] if scores["folds"] is None else "all folds"}
    patients = metrics.average_films(**scores, sides=held_out["side"].to_numpy())
    if len({*patients["labels"]}) == 2:  # all are malignant where each has a film of both classes
        results["per_patient"] = metrics.measure(**patients, seed=settings.SEED, threshold=settings.THRESHOLD)
        breasts = held_out[held_out["side"] != ""].groupby("group")["side"].nunique()
        results["per_patient"]["both_breasts"] = int(breasts.eq(2).sum())  # patients
    boxed = held_out["lesion_box"].ne("").to_numpy()
    if boxed.any() and settings.CROP != "lesion":  # where the box is in the middle, like many peaks
        boxes = [place_boxes(film) for film in held_out[boxed].itertuples()]
        found = predictions["label"].eq("malignant") & predictions["predicted"].eq("malignant")
        results["pointing_game"] = metrics.play_pointing_game(boxes, maps[boxed], found.to_numpy()[boxed])
    return results, bands


def write_table(table, file, note=""):
    """Write a CSV; nine digits give a float32 back exactly."""
    table = table.assign(note=note) if note else table
    table.to_csv(file, index=False, float_format="%.9g", lineterminator="\n")


def write_json(content, file):
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_leaks(films, folder):
    """Write leaks.csv, if there are any: films that are excluded, as a film of another set shows the same."""
    leaks = films[films["trained_on"].ne("") | films["tested_on"].ne("")]
    with explain_write_errors(folder):
        (folder / "leaks.csv").unlink(missing_ok=True)  # of an earlier run
        if len(leaks):
            write_table(leaks[["path", "label", "patient_id", "trained_on", "tested_on"]], folder / "leaks.csv")


def write_side(folder, settings, films, images, predictions, maps, ranked, title, note):
    """Write what belongs to one side of a split: predictions, metrics, their figures and the overlays.

    ranked: the file properties that tell most on their own, see baseline.rank_properties.
    """
    (folder / "gradcam").mkdir(parents=True)
    results, bands = score(predictions, maps, films, settings)
    scores, alone = list_scores(predictions, films), predictions["baseline"].to_numpy()
    results |= {"baseline": measure_baseline(scores, alone, ranked, settings.SEED), "note": note}
    write_table(predictions, folder / "predictions.csv", note)
    write_json(results, folder / "metrics.json")
    np.save(folder / "maps.npy", maps)
    cases = select_cases(predictions, settings.THRESHOLD)
    maps = dict(zip(predictions.index, maps, strict=True))
    for name, figure in (
        ("confusion_matrix", draw_confusion_matrix(predictions, results)),
        ("roc_curve", draw_roc_curve(scores, alone, results, bands["roc"])),
        ("precision_recall", draw_precision_recall(scores, results, bands["precision_recall"])),
        ("calibration", draw_calibration(scores, results)),
        ("grad_cam_example", draw_cases(cases, films, images, maps)),
    ):
        write_figure(figure, folder / f"{name}.png", title, note)
    for case in cases.itertuples():
        figure = draw_cases(cases.loc[[case.Index]], films, images, maps, [case.outcome], columns=1, panel=3.3)
        stem = cut_name(re.sub(r"[^\w.-]", "_", Path(case.path).stem))
        name = f"{case.outcome}_{case.number + 1:02d}_{stem}.png"
        write_figure(figure, folder / "gradcam" / name, f"{title}\n{case.path}", note, [".png"], dpi=100)


def write_folds(folder, output_dir, names, predictions, title, note):
    """Write folds.csv and the training curves of all folds, from the folders of the folds in output_dir."""
    rows, histories = [], []
    for (fold, films), name in zip(predictions.groupby("fold"), names, strict=True):
        history = read_table(output_dir / name / "history.csv", HISTORY)[HISTORY]
        with explain_damage(output_dir / name / "history.csv"):
            histories.append(history.astype(float))
        results, row = read_results(output_dir / name / "metrics.json"), {"fold": fold, "films": len(films)}
        for metric in ("auc", "accuracy"):
            low, high = results["ci95"][metric]
            row |= {metric: results[metric], f"{metric}_low": low, f"{metric}_high": high}
        rows.append(row | {"run": name})
    write_table(pd.DataFrame(rows), folder / "folds.csv", note)
    write_figure(draw_training_curves(*histories), folder / "training_curves.png", title, note)


def write_results(folder, settings, films, images, predictions, maps, recorded, trainings=None):
    """Write the files that every result has.

    recorded: the content of settings.json. trainings: baseline.read_trainings() of the run, if the models were
    trained on another collection.
    """
    note = recorded["note"]
    held_out = "fold" if "fold" in predictions else "split"  # the column that says which films were held out
    properties = list_properties(films, images, settings.CROP)
    table = films.loc[films["excluded"] == "", ["path", "label", held_out]].join(properties)
    write_table(table, folder / "properties.csv", note)
    title = f"{settings.DATA_DIR.name}: mammograms as the network sees them"
    write_figure(draw_films(films, images, properties["mean_grey"]), folder / "films.png", title, note, [".png"])
    trainings = trainings or list_trainings(table)
    predictions, ranked = add_baseline(predictions, properties, trainings)
    write_side(folder, settings, films, images, predictions, maps, ranked, recorded["title"], note)
    if held_out == "fold":
        write_folds(folder, settings.OUTPUT_DIR, recorded["folds"], predictions, recorded["title"], note)
    columns = ["path", "label", "patient_id", held_out, "group", "film_sha256"]
    write_table(films[columns], folder / "split.csv", note)
    write_leaks(films, folder)
    write_json(recorded, folder / "settings.json")
    write_summary(folder)
