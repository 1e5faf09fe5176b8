"""A finished run in words, on the console and as text that can be quoted, from what it recorded."""
import json
import textwrap

import pandas as pd

from data import log
from data.results.baseline import describe_baseline
from data.results.metrics import TITLES, describe_held_out, with_interval
from data.runs import read_json
from data.splits import SETS

CROPS = {"breast": "cropped to the breast", "lesion": "cropped to the lesion and its surroundings",
         None: "not cropped"}
PLACES = {"breast": " and the size and place of the breast", "lesion": " and the size and place of the lesion",
          None: ""}
TEXT = """\
# {title}

{tables}

In brackets are 95 % intervals over patients. A mammogram with a probability of {THRESHOLD} or more is predicted
malignant. The score of a breast is the mean logit of its views. The score of a patient is the larger one of
both breasts ({both_breasts}). A patient is malignant if one of the mammograms is. By chance, the average
precision is the share of malignant mammograms. It is too high on few mammograms{per_fold}; its interval
corrects for that.{alike}{undefined}

## Methods

**Data.** {data} {duplicates} mammograms showed the same picture as another. No picture and no known patient is
in two sets. Mammograms were {crop} and resized to 224 x 224 pixels.

**Model.** The network is a {backbone} (weights: {weights}). Global average pooling, a dense layer of
{HEAD_UNITS} units, dropout of {DROPOUT} and a sigmoid follow. The top {unfrozen_layers} of its {layers} layers
were trainable{frozen}. With the layers that follow, {trained_parameters:,} parameters were trained.

**Training.** The classes were balanced by repetition in every epoch. Each mammogram was flipped horizontally at
random. Its brightness was shifted by up to {BRIGHTNESS:.0%} of the grey scale, and its contrast changed by up
to {CONTRAST:.0%}. Adam minimised the binary cross-entropy with a learning rate of {LEARNING_RATE:g}. The
training had {EPOCHS} epochs with batches of {BATCH_SIZE} ({precision}, seed {SEED}). The final weights are an
exponential moving average over about the last epoch. Nothing was chosen on held-out mammograms. They were
scored in float32.

**Explanation.** Grad-CAM (Selvaraju et al. 2017) on the last feature maps shows the evidence for the predicted
class. The most confident cases are in gradcam/.{pointing}

**Baseline.** File properties alone are scored by a random forest. It had the same training set and the same
held-out mammograms. It knows format, size, bytes per pixel, bit depth, side, view and the number of mammograms
of the patient. It also knows the brightness of the image (mean, standard deviation, black and white
share){place}. A single property is scored by a decision tree of at most four leaves. The AUC of the most
telling properties is optimistic, as they were chosen on held-out mammograms.

**Statistics.** Intervals are Wilson's, with Student's t and the effective sample size from a bootstrap over
patients.

**Software.** Python {python}, TensorFlow {tensorflow}, Keras {keras}. Device: {device}.

## Limits

Research software, not for clinical use.{note}{limits} The intervals hold for mammograms like these. They do not
cover that another training of the same setting may differ. A setting that was chosen as the best of several on
the same mammograms looks better than it is.

## CLAIM checklist

Items of the Checklist for Artificial Intelligence in Medical Imaging (2024 update,
https://doi.org/10.1148/ryai.240300) that this folder answers:

{claim}

The other items are left to the authors. Among them are the source of the mammograms (7), the criteria of
inclusion (8), the acquisition (13) and the reference standard (14 to 18).
"""
UNDEFINED = " A ratio of nothing is undefined, such as the precision if nothing is predicted malignant."
CLAIM = {  # item of the 2024 update: (what it asks for, place in the folder of a run)
    "9": ("data preprocessing", "Data"),
    "12": ("missing data", "Data; leaks.csv"),
    "19": ("how data were assigned to partitions", "Data; split.csv"),
    "20": ("level at which partitions are disjoint", "Data"),
    "22": ("description of the model", "Model; model.keras"),
    "23": ("software", "Software; versions in settings.json"),
    "24": ("initialization of the parameters", "Model; weights in settings.json"),
    "25": ("training", "Training; history.csv; constants in settings.json"),
    "26": ("selection of the final model", "Training"),
    "27": ("ensembling", "Data"),
    "28": ("metrics", "table; Statistics; metrics.json"),
    "29": ("uncertainty", "table; Statistics"),
    "31": ("explainability", "Explanation; gradcam/"),
    "32": ("evaluation on internal data", "table; roc_curve.png"),
    "33": ("testing on external data", "table; roc_curve.png"),
    "35": ("numbers included and excluded", "Data; split.csv"),
    "37": ("performance and its uncertainty", "table; calibration.png"),
    "38": ("diagnostic performance and its precision", "table; confusion_matrix.png"),
    "39": ("failure analysis", "false positives and negatives in gradcam/; predictions.csv"),
    "40": ("limitations", "Limits"),
}


def make_claim(constants, settings):
    """The items of CLAIM that a run answers, as a Markdown table."""
    is_external, is_ensemble = "TRAINED_ON" in constants, "folds" in settings
    other = {"32" if is_external else "33"}
    if not (is_external and is_ensemble):
        other.add("27")
    rows = [f"| {item} | {topic} | {place} |" for item, (topic, place) in CLAIM.items() if item not in other]
    return "\n".join(["| item | topic | place |", "| --- | --- | --- |", *rows])


def describe_data(settings, split):
    """What the mammograms were, what was excluded, and who was held out."""
    collection, constants = settings["collection"], settings["constants"]
    parts = [f"The data were {collection['images']} mammograms of {collection['patients']} patients"
             f" ({constants['DATA_DIR']})."]
    for reason, count in collection["excluded"].items():
        if reason:
            parts.append(f"{count} mammograms were excluded: {reason}.")
    if unknown := collection["patient_from"].get("unknown", 0):
        parts.append(f"The patients of {unknown} mammograms are unknown. Each of these counts as a patient of its"
                     " own, so results may look too good.")
    if "TRAINED_ON" in constants:
        parts.append(f"The model was trained on another collection ({constants['TRAINED_ON']}).")

    given, column = settings["split"]["given"], "split" if "split" in split else "fold"
    tested = split["group"][split[column].eq("test")]
    patients = "the training patients" if len(tested) else "the patients"
    if len(tested) and not given:
        parts.append(f"A test set of {len(tested)} mammograms of {tested.nunique()} patients came with the data."
                     " These patients are in no other set.")
    if "folds" in settings:
        parts.append(f"Five models were trained, each without another fifth of {patients}, stratified by class.")
        parts.append("The mean of their logits counts." if "TRAINED_ON" in constants else
                     f"Each of {patients} was scored by the model that held it out. Counts are added. AUC and"
                     " average precision are means of the folds.")
        if len(tested):
            parts.append("The test set was scored by the mean of their logits.")
    elif "TRAINED_ON" not in constants:
        how = f"A fifth of {patients} was held out, stratified by class"
        if given:
            how = "The split came with the data"
        names = {**SETS, "excluded": "excluded"}
        sides = split.groupby("split")["group"].agg(["size", "nunique"])
        parts.append(f"{how}: " + ", ".join(f"{names[side]} {films} mammograms of {patients} patients"
                                            for side, films, patients in sides.itertuples()) + ".")
    return " ".join(parts)


def describe_pointing(results):
    """How often the peak of a Grad-CAM map lies in the lesion box, as sentences after a space."""
    sentences = []
    for name, game in results.get("pointing_game", {}).items():
        shown = f"{game['hits']} of {game['images']} {name.replace('_', ' ')}"
        sentences.append(f" The peak lies in the lesion box of {shown}"
                         f" (peaks of other mammograms: {game['other_films']:.2f}).")
    return "".join(sentences)


def read_metrics(folder):
    """The metrics.json of a run, and that of its test side where there is one."""
    files = folder / "metrics.json", folder / "test" / "metrics.json"
    return [read_json(file, {}) for file in files if file.exists()]


def predicts_one_class(results):
    counts = results["confusion_matrix"]
    return 0 in (counts["tp"] + counts["fp"], counts["tn"] + counts["fn"])


def count_breasts(results):
    """How many patients had films of both breasts, as text."""
    if "per_patient" not in results:
        return "no score per patient, as all are malignant"
    patients = results["validation_patients"]
    return f"{results['per_patient']['both_breasts']} of {patients} patients had both"


def make_table(results):
    """A metrics.json as a Markdown table: every metric per mammogram and per patient."""
    parts = results, results.get("per_patient")  # None where every patient is malignant
    baselines = [f"{part['majority_baseline']:.2f}" if part else "1.00" for part in parts]
    rows = [[describe_held_out(results), "per mammogram", "per patient"], ["---"] * 3,
            ["accuracy of the majority class alone", *baselines]]
    for name in results["ci95"]:
        cells = [with_interval(part, name) if part else "one class only" for part in parts]
        rows.append([TITLES.get(name, name), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_summary(folder):
    """Write summary.md: the metrics as a table, methods, limits, and where CLAIM's items are answered."""
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
        frozen=", except any batch normalization" if settings["weights"]["pretrained"] else "",
        pointing=describe_pointing(sides[0]), claim=make_claim(constants, settings), device=settings["device"],
        both_breasts=count_breasts(sides[0]), place=PLACES[constants["CROP"]],
        limits="".join(f" {limit}" for limit in settings["limits"]),
        alike=" All mammograms were predicted the same class." * any(map(predicts_one_class, sides)),
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
            log.info("%-17s %s", TITLES.get(name, name), with_interval(results, name))
        log.info("on %s, with 95 %% intervals over patients; the majority class alone has accuracy %.2f",
                 describe_held_out(results), results["majority_baseline"])
        if "per_patient" in results:
            log.info("per patient (%s): AUC %s, sensitivity %s, specificity %s", count_breasts(results),
                     *(with_interval(results["per_patient"], name) for name in ("auc", "recall", "specificity")))
        log.info("%s", describe_baseline(results["baseline"]))
        if pointing := describe_pointing(results):
            log.info("Grad-CAM:%s", pointing)
        if predicts_one_class(results):
            log.warning("*** all mammograms were predicted the same class ***")
        if results["note"]:
            log.warning("*** %s ***", results["note"])
