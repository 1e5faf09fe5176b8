"""A finished run in words, on the console and as text that can be quoted, from what it recorded."""
import json
import textwrap

import pandas as pd

from data import log
from data.results.baseline import describe_baseline
from data.results.metrics import describe_held_out, with_interval
from data.runs import read_json

CROPS = {"breast": "cropped to the breast", "lesion": "cropped to the lesion and its surroundings",
         None: "not cropped"}
PLACES = {"breast": " and the size and place of the breast", "lesion": " and the size and place of the lesion",
          None: ""}
TEXT = """\
# {title}

{tables}

In brackets 95 % intervals over patients. What is predicted malignant has a probability of {THRESHOLD} or
more. The score of a breast is the mean logit of its views, that of a patient the larger one of both
breasts ({both_breasts}). A patient is malignant when one of the films is. By chance, average precision is
the share of malignant films. On few films{per_fold} it is too high; its interval corrects for
that.{alike}{undefined}

## Methods

{data} {duplicates} films showed the same picture as another; no picture and no known patient is on two
sides. Films were {crop} and resized to 224 x 224 pixels.

A {backbone} (weights: {weights}) with global average pooling, a dense layer of {HEAD_UNITS} units,
dropout of {DROPOUT} and a sigmoid was trained; of its {layers} layers the top {unfrozen_layers} were
trainable{frozen}; together with those on top, these are {trained_parameters:,} parameters. In every
epoch the classes were balanced by repetition, and each film was flipped horizontally at random, its
brightness shifted by up to {BRIGHTNESS:.0%} of the grey scale, and its contrast changed by up to
{CONTRAST:.0%}. Adam with a learning rate of {LEARNING_RATE:g} minimised the binary cross-entropy in
{EPOCHS} epochs with batches of {BATCH_SIZE} ({precision}, seed {SEED}). The weights are an exponential
moving average over about the last epoch; nothing was chosen on the held-out films, which were scored
in float32.

File properties alone are the baseline: a random forest that was trained on the same training films and
scored on the same held-out films. Of each film it knows format, size, side and view, bytes per pixel, bit
depth, the number of films of the patient, the brightness of the image (mean, standard deviation, black
and white share){place}. A property on its own is scored by a decision tree of at most four leaves. The AUC
of the most telling properties is optimistic, as they were picked on the held-out films.

Intervals are Wilson's with Student's t and the effective sample size from a bootstrap over patients.
Software: Python {python}, TensorFlow {tensorflow}, Keras {keras}.

## Limits

Research software, not for clinical use.{note}{limits} The intervals hold for films like these; they do not cover
that another training of the same setting may differ. A setting that was picked as the best of several
on the same films looks better than it is.
"""
UNDEFINED = " A ratio of nothing is undefined, as the precision where nothing is predicted malignant."


def describe_data(settings, split):
    """What the films were, what was excluded, and who was held out."""
    collection, constants = settings["collection"], settings["constants"]
    parts = [f"The data were {collection['images']} mammograms of {collection['patients']} patients"
             f" ({constants['DATA_DIR']})."]
    for reason, count in collection["excluded"].items():
        if reason:
            parts.append(f"{count} films were excluded: {reason}.")
    if unknown := collection["patient_from"].get("unknown", 0):
        parts.append(f"The patients of {unknown} films are unknown; each film counts as a patient of its own, so"
                     " that results may look too good.")
    if "TRAINED_ON" in constants:
        parts.append(f"They were scored by what was trained on other films ({constants['TRAINED_ON']}).")
    given, column = settings["split"]["given"], "split" if "split" in split else "fold"
    tested = split["group"][split[column].eq("test")]
    patients = "the training patients" if len(tested) else "the patients"
    if len(tested) and not given:
        parts.append(f"A test set of {len(tested)} films of {tested.nunique()} patients came with the data; these"
                     " patients are in no other set.")
    if "folds" in settings:
        parts.append(f"Five models were trained, each without another fifth of {patients}, stratified by class.")
        parts.append("The mean of their logits counts." if "TRAINED_ON" in constants else
                     f"Each of {patients} was scored by the model that held it out; counts are added, AUC and"
                     " average precision are means of the folds.")
        if len(tested):
            parts.append("The test set was scored by the mean of their logits.")
    elif "TRAINED_ON" not in constants:
        how = f"A fifth of {patients} was held out, stratified by class"
        if given:
            how = "The split came with the data"
        sides = split.groupby("split")["group"].agg(["size", "nunique"])
        parts.append(f"{how}: " + ", ".join(f"{side} {films} films of {patients} patients"
                                            for side, films, patients in sides.itertuples()) + ".")
    return " ".join(parts)


def read_metrics(folder):
    """The metrics.json of a run, and that of its test side where there is one."""
    files = folder / "metrics.json", folder / "test" / "metrics.json"
    return [read_json(file, {}) for file in files if file.exists()]


def calls_one_class(results):
    counts = results["confusion_matrix"]
    return 0 in (counts["tp"] + counts["fp"], counts["tn"] + counts["fn"])


def count_breasts(results):
    """How many patients had films of both breasts, as text."""
    if "per_patient" not in results:
        return "no score per patient, as all are malignant"
    patients = results["validation_patients"]
    return f"{results['per_patient']['both_breasts']} of {patients} patients had both"


def make_table(results):
    """A metrics.json as a Markdown table: every metric per film and per patient."""
    parts = results, results.get("per_patient")  # None where every patient is malignant
    baselines = [f"{part['majority_baseline']:.2f}" if part else "1.00" for part in parts]
    rows = [[describe_held_out(results), "per film", "per patient"], ["---"] * 3,
            ["accuracy of the majority class alone", *baselines]]
    for name in results["ci95"]:
        cells = [with_interval(part, name) if part else "one class only" for part in parts]
        rows.append([name.replace("_", " "), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_summary(folder):
    """Write summary.md: the metrics as a table, methods and limits in plain English."""
    settings = json.loads((folder / "settings.json").read_text("utf-8"))
    split = pd.read_csv(folder / "split.csv", dtype=str, keep_default_na=False)
    constants, note, sides = settings["constants"], settings["note"], read_metrics(folder)
    tables = "\n\n".join(map(make_table, sides))
    text = TEXT.format(
        **constants, **settings["model"], **settings["versions"], title=settings["title"],
        tables="\n\n".join(f"{make_table(side)}\n\n{describe_baseline(side['baseline'])}" for side in sides),
        data=describe_data(settings, split),
        duplicates=settings["collection"]["duplicates"], crop=CROPS[constants["CROP"]],
        weights=settings["weights"]["origin"], precision=" and ".join(settings["model"]["floats"]),
        frozen=", but for any batch normalization" if settings["weights"]["pretrained"] else "",
        both_breasts=count_breasts(sides[0]), place=PLACES[constants["CROP"]],
        limits="".join(f" {limit}" for limit in settings["limits"]),
        alike=" All films were called the same class." * any(map(calls_one_class, sides)),
        undefined=UNDEFINED * ("undefined" in tables),
        per_fold=" in a fold" if "fold" in split else "",
        note=f" {note.capitalize()}." if note else "")
    paragraphs = [block if block.startswith(("#", "|")) else textwrap.fill(block, 100, break_long_words=False)
                  for block in text.split("\n\n")]
    (folder / "summary.md").write_text("\n\n".join(paragraphs).rstrip() + "\n", "utf-8", newline="\n")


def show_results(folder):
    """Log the metrics of a complete run, and what they were measured on."""
    for results in read_metrics(folder):
        for name in results["ci95"]:
            log.info("%-17s %s", name.replace("_", " "), with_interval(results, name))
        log.info("on %s, with 95 %% intervals over patients; the majority class alone has accuracy %.2f",
                 describe_held_out(results), results["majority_baseline"])
        if "per_patient" in results:
            log.info("per patient (%s): AUC %s, sensitivity %s, specificity %s", count_breasts(results),
                     *(with_interval(results["per_patient"], name) for name in ("auc", "recall", "specificity")))
        log.info("%s", describe_baseline(results["baseline"]))
        for name, game in results.get("pointing_game", {}).items():
            log.info("the Grad-CAM peak is in the lesion box of %d of %d %s; peaks of other films: %.2f",
                     game["hits"], game["images"], name.replace("_", " "), game["other_films"])
        if calls_one_class(results):
            log.warning("*** all films were called the same class ***")
        if results["note"]:
            log.warning("*** %s ***", results["note"])
