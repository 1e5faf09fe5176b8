"""A finished run in words, on the console and as text that can be quoted, from what it recorded."""
import textwrap
from pathlib import Path

import pandas as pd

from data import log
from data.results.baseline import describe_baseline
from data.results.metrics import RESAMPLES, TITLES, describe_held_out, with_interval
from data.runs import read_json
from data.splits import SETS, count_classes

BACKBONES = {"resnet50": "ResNet50", "vgg16": "VGG16"}
CROPS = {"breast": "cropped to the breast on a black square",
         "lesion": "cropped to the lesion and its surroundings", None: "not cropped"}
PLACES = {"breast": ", and the size and place of the breast", "lesion": ", and the size and place of the lesion",
          None: ""}
TEXT = """\
# {title}

{tables}

In brackets are 95 % confidence intervals over patients. Here, a mammogram is one image: one view of one breast.
A mammogram with a probability of {THRESHOLD} or more is predicted malignant. A patient counts as malignant if
one of the mammograms is labelled malignant. The score of a breast is the mean logit of its views. The score of
a patient is the higher score of the two breasts ({both_breasts}). A random score has an average precision equal
to the share of mammograms that are labelled malignant. With few mammograms{per_fold}, average precision is
biased upwards. Its interval is corrected for this bias, the value is not.{undefined}

## Methods

**Data.** {data} No known patient is in two {sets}, and no two mammograms that the search for duplicates
matched. It misses most copies that were cropped or zoomed in. Mammograms were converted to grey, {crop}, and
resized to 224 x 224 pixels of 8 bits.

**Model.** The backbone is {name}. Its initial weights: {weights}. The head is global average pooling, a dense
layer of {HEAD_UNITS} units (ReLU), dropout of {DROPOUT}, and a dense layer of one unit with a sigmoid. The head
started from random values. The top {unfrozen_layers} of the {layers} Keras layers of the backbone were
trained{frozen}. With the head, {trained_parameters:,} parameters were trained.

**Training.** The smaller class was oversampled in every epoch. Each mammogram was flipped horizontally at
random. Its brightness was shifted by up to {BRIGHTNESS:.0%} of the grey scale, and its contrast changed by up
to {CONTRAST:.0%}. Adam minimised the binary cross-entropy with a constant learning rate of {LEARNING_RATE:g}.
The training had {EPOCHS} epochs with batches of {BATCH_SIZE} ({precision}, seed {SEED}), without early
stopping. The final weights are an exponential moving average over about the last epoch. The program chose
nothing on held-out mammograms: no weights, no epoch and no threshold. They were scored in float32.

**Explanation.** Grad-CAM (Selvaraju et al. 2017) on the last feature maps marks regions that raise the score of
the predicted class. Each map is scaled to its own maximum. Up to four cases of each outcome, with the
probabilities farthest from the threshold, are in gradcam/.{pointing}

**Baseline.** File properties alone are scored by a random forest. It had the same training set and the same
held-out mammograms. It knows format, size, bytes per pixel, bit depth, side, view and the number of mammograms
of the patient. It also knows the brightness of the image (mean, standard deviation, black and white
share){place}. A single property is scored by a decision tree of at most four leaves. The properties with the
highest AUC were chosen on held-out mammograms, so this AUC is optimistic.

**Statistics.** The intervals are Wilson intervals. They use Student's t and the effective sample size, which
comes from {resamples:,} bootstrap resamples of the patients. They are at least as wide as the Clopper-Pearson
interval of an event that no patient had. The interval of a difference of AUCs is Student's t times the standard
error of the paired resamples.

**Software.** Python {python}, TensorFlow {tensorflow}, Keras {keras}, NumPy {numpy}, SciPy {scipy},
scikit-learn {sklearn}, OpenCV {cv2}, code {code}. Device: {device}.

## Limits

Research software, not for clinical use.{note}{limits} The task is to tell benign from malignant findings.
Normal mammograms are no part of it, so it measures neither the detection of cancer nor screening.{detail} The
classes were balanced in training, so probabilities refer to equal shares of both. Accuracy, precision, F1,
Brier score and average precision depend on the share of malignant mammograms, which is far lower in screening.
The intervals hold for mammograms like these. They do not include the variation between trainings of the same
setting. A setting that was chosen as the best of several on the same mammograms looks better than it is.

## CLAIM checklist

Items of the Checklist for Artificial Intelligence in Medical Imaging (2024 update,
https://doi.org/10.1148/ryai.240300) that this folder answers:

{claim}

The other items are left to the authors. Among them are the source of the mammograms (7), the criteria of
inclusion (8), de-identification (11), the acquisition (13) and the reference standard (14 to 18). Patient
characteristics (36) and the clinical role (41) are left to them, too.
"""
UNDEFINED = " A ratio of nothing is undefined, such as the precision if nothing is predicted malignant."
DETAIL = " At 224 x 224 pixels, most microcalcifications of a whole breast are lost."
CLAIM = {  # item of the 2024 update: (what it asks for, place in the folder of a run)
    "9": ("data preprocessing", "Data"),
    "10": ("selection of data subsets", "Data; split.csv"),
    "12": ("missing data", "Data"),
    "19": ("how data were assigned to partitions", "Data; split.csv"),
    "20": ("level at which partitions are disjoint", "Data"),
    "22": ("description of the model", "Model; model.keras"),
    "23": ("software", "Software; versions in settings.json"),
    "24": ("initialization of the parameters", "Model; weights in settings.json"),
    "25": ("training", "Training; history.csv; constants in settings.json"),
    "26": ("selection of the final model", "Training"),
    "27": ("ensembling", "Data"),
    "28": ("metrics", "table; Statistics"),
    "29": ("significance and uncertainty", "table; Statistics"),
    "31": ("explainability", "Explanation; gradcam/"),
    "32": ("evaluation on internal data", "table"),
    "33": ("testing on external data", "table"),
    "35": ("numbers included and excluded", "Data; split.csv"),
    "37": ("performance and its uncertainty", "table; metrics.json"),
    "38": ("diagnostic performance and its precision", "table; roc_curve.png; calibration.png"),
    "39": ("failure analysis", "confusion_matrix.png; false positives and negatives in gradcam/"),
    "40": ("limitations", "Limits"),
}
OF_TRAINING = ("22", "25")  # items with files that only the folder of a training has
IN_FOLDS = "; of each fold in its folder (folds.csv)"
IN_RUN = "; in the folder of the run that is scored"


# ---- text --------------------------------------------------------------------------------------


def make_claim(is_external, is_ensemble, is_pooled):
    """The items of CLAIM that a run answers, as a Markdown table."""
    unanswered = "32" if is_external else "33"
    lines = ["| item | topic | place |", "| --- | --- | --- |"]
    for item, (topic, place) in CLAIM.items():
        if item == unanswered or (item == "27" and not is_ensemble):
            continue
        if item in OF_TRAINING and is_pooled:
            place += IN_FOLDS
        if item in OF_TRAINING and is_external:
            place += IN_RUN
        lines.append(f"| {item} | {topic} | {place} |")
    return "\n".join(lines)


def describe_split(settings, split):
    """Who was held out, as a list of sentences; split: split.csv."""
    constants, given = settings["constants"], settings["split"]["given"]
    is_external, has_folds = "TRAINED_ON" in constants, "folds" in settings
    tested = split[split["split" if "split" in split else "fold"] == "test"]
    patients = "the training patients" if len(tested) else "the patients"
    parts = []
    if len(tested) and not given:
        parts.append(f"A test set came with the data: {count_classes(tested)}. These patients are in no other"
                     " set.")

    if has_folds and is_external:
        parts.append("Five models were trained, each without another fifth of its patients. The mean of their"
                     " logits counts.")
    elif has_folds:
        parts.append("Five-fold cross-validation was stratified by class and grouped by patient (split seed"
                     f" {constants['SPLIT_SEED']}). Five models were trained, each without another fifth of"
                     f" {patients}. Each of {patients} was scored by the model that was trained without this"
                     " patient. Counts are added over the folds. AUC and average precision are means of the"
                     " folds.")
        if len(tested):
            parts.append("The test set was scored by the mean of their logits.")
    elif not is_external:
        how = "The split came with the data"
        if not given:
            how = (f"A fifth of {patients} was held out, stratified by class (fold {constants['FOLD']}, split seed"
                   f" {constants['SPLIT_SEED']})")
        sets = {**SETS, "excluded": "excluded"}
        counts = [f"{name} {count_classes(split[split['split'] == value])}" for value, name in sets.items()
                  if (split["split"] == value).any()]
        parts.append(f"{how}: {'; '.join(counts)}.")
    return parts


def describe_data(settings, split):
    """What the mammograms were, what was excluded, and who was held out, as text."""
    collection, constants = settings["collection"], settings["constants"]
    parts = [f"The data were {collection['images']} mammograms of {collection['patients']} patients"
             f" ({Path(constants['DATA_DIR']).name}): {count_classes(split)}."]
    files = "; ".join(f"{count} {kind}" for kind, count in collection["format"].items())
    parts.append(f"Files: {files}.")
    parts.append("The labels are those of the data. This program does not know whether they rest on"
                 " histopathology, follow-up or BI-RADS.")
    for reason, count in collection["excluded"].items():
        if reason:
            parts.append(f"{count} mammograms were excluded: {reason}.")
    if unknown := collection["patient_from"].get("unknown", 0):
        parts.append(f"The patients of {unknown} mammograms are unknown. Each of these counts as a patient of its"
                     " own, so results may look too good.")
    if "TRAINED_ON" in constants:
        parts.append(f"The model was trained on another collection ({Path(constants['TRAINED_ON']).name}).")
    parts.append(f"{collection['duplicates']} mammograms showed the same picture as another, also if turned,"
                 " mirrored or re-encoded.")
    return " ".join(parts + describe_split(settings, split))


def describe_pointing(results):
    """How often the peak of a Grad-CAM map lies in the lesion box, as sentences after a space."""
    sentences = []
    for name, game in results.get("pointing_game", {}).items():
        shown = f"{game['hits']} of {game['images']} {name.replace('_', ' ')}"
        sentences.append(f" The peak lies in the lesion box of {shown} ({game['share']:.2f}; peaks of other"
                         f" mammograms: {game['other_films']:.2f}).")
    return "".join(sentences)


def predicts_one_class(results):
    counts = results["confusion_matrix"]
    return 0 in (counts["tp"] + counts["fp"], counts["tn"] + counts["fn"])


def count_breasts(results):
    """How many patients had films of both breasts, as text."""
    if "per_patient" not in results:
        return "no score per patient, as all are malignant"
    patients = results["validation_patients"]
    return f"{results['per_patient']['both_breasts']} of {patients} patients have mammograms of both breasts"


def make_table(results):
    """A metrics.json as a Markdown table: every metric per mammogram and per patient."""
    parts = results, results.get("per_patient")  # None where every patient is malignant
    baselines = [f"{part['majority_baseline']:.2f}" if part else "1.00" for part in parts]
    rows = [[describe_held_out(results), "per mammogram", "per patient"], ["---"] * 3,
            ["accuracy of always predicting the larger class", *baselines]]
    for name in results["ci95"]:
        cells = [with_interval(part, name) if part else "one class only" for part in parts]
        rows.append([TITLES[name], *cells])
    for name, keys in (("true positives, false positives", ("tp", "fp")),
                       ("true negatives, false negatives", ("tn", "fn"))):
        cells = [", ".join(str(part["confusion_matrix"][key]) for key in keys) if part else "" for part in parts]
        rows.append([name, *cells])

    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if predicts_one_class(results):
        return f"**The same class was predicted for all mammograms.**\n\n{table}"
    return table


# ---- summary.md and console --------------------------------------------------------------------


def read_metrics(folder):
    """The metrics.json of a run, and that of its test set where there is one."""
    files = folder / "metrics.json", folder / "test" / "metrics.json"
    return [read_json(file, {}) for file in files if file.exists()]


def write_summary(folder):
    """Write summary.md: the metrics as a table, methods, limits, and where CLAIM's items are answered."""
    settings = read_json(folder / "settings.json", {})
    split = pd.read_csv(folder / "split.csv", dtype=str, keep_default_na=False)
    constants, note, sides = settings["constants"], settings["note"], read_metrics(folder)
    is_external, is_pooled = "TRAINED_ON" in constants, "fold" in split
    is_ensemble = "folds" in settings and (is_external or len(sides) > 1)
    tables = "\n\n".join(f"{make_table(side)}\n\n{describe_baseline(side['baseline'])}" for side in sides)
    backbone = settings["model"]["backbone"]

    text = TEXT.format(
        **constants, **settings["model"], **settings["versions"], title=settings["title"], tables=tables,
        data=describe_data(settings, split), sets="folds" if is_pooled else "sets",
        crop=CROPS[constants["CROP"]], place=PLACES[constants["CROP"]],
        detail="" if constants["CROP"] == "lesion" else DETAIL,
        name=BACKBONES.get(backbone, backbone), weights=settings["weights"]["origin"],
        frozen=", except any batch normalization" if settings["weights"]["pretrained"] else "",
        precision=" and ".join(settings["model"]["floats"]), device=settings["device"],
        pointing=describe_pointing(sides[0]), both_breasts=count_breasts(sides[0]),
        per_fold=" in a fold" if is_pooled else "", resamples=RESAMPLES,
        undefined=UNDEFINED if "undefined" in tables else "",
        limits="".join(f" {limit}" for limit in settings["limits"]),
        note=f" {note.capitalize()}." if note else "",
        claim=make_claim(is_external, is_ensemble, is_pooled))
    wrapper = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)  # which would split names
    paragraphs = [block if block.startswith(("#", "|")) else wrapper.fill(block) for block in text.split("\n\n")]
    (folder / "summary.md").write_text("\n\n".join(paragraphs).rstrip() + "\n", "utf-8", newline="\n")


def show_results(folder):
    """Log the metrics of a complete run, and what they were measured on."""
    for results in read_metrics(folder):
        for name in results["ci95"]:
            log.info("%-20s %s", TITLES[name], with_interval(results, name))
        log.info("on %s, with 95 %% intervals over patients; always predicting the larger class has accuracy %.2f",
                 describe_held_out(results), results["majority_baseline"])
        if "per_patient" in results:
            log.info("per patient (%s): AUC %s, sensitivity %s, specificity %s", count_breasts(results),
                     *(with_interval(results["per_patient"], name) for name in ("auc", "recall", "specificity")))
        log.info("%s", describe_baseline(results["baseline"]))
        if pointing := describe_pointing(results):
            log.info("Grad-CAM:%s", pointing)
        if predicts_one_class(results):
            log.warning("*** the same class was predicted for all mammograms ***")
        if results["note"]:
            log.warning("*** %s ***", results["note"])
