"""Figures of one run: curves, confusion matrix, calibration, and Grad-CAM maps over the films."""
import textwrap
import warnings
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pandas as pd
import sklearn.metrics
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data import CLASSES, replace
from data.reading import IMAGE_SIZE, place_boxes
from data.results.metrics import GRID, describe_held_out, with_interval

SHEET, ROWS = 8, 8  # films of a row of the contact sheet, and its rows
OUTCOMES = ("true_positive", "false_positive", "true_negative", "false_negative")
CASES = 4  # Grad-CAM overlays of each outcome


def draw_training_curves(*histories):
    """Loss and accuracy over the epochs; of several folds the mean, and a thin line for each.

    histories: tables with columns epoch, loss, accuracy, val_loss and val_accuracy, one for each fold.
    """
    figure = Figure((9, 4.8), layout="constrained")
    epochs, folds = histories[0]["epoch"], len(histories)
    means = "; thick: mean of the folds" if folds > 1 else ""
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for column, style, color, label in ((name, "o-", "C0", f"training (augmented, with dropout){means}"),
                                            (f"val_{name}", "s--", "C1", f"validation{means}")):
            values = np.array([history[column] for history in histories])
            axes.plot(epochs, values.mean(axis=0), style, color=color, label=label)
            if folds > 1:
                axes.plot(epochs, values.T, style[1:], color=color, lw=0.7, alpha=0.6)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch", ylabel={"loss": "binary cross-entropy"}.get(name, name))
        top = 1.02 if name == "accuracy" else 1.05 * axes.get_ylim()[1]  # room for the markers
        axes.set_ylim(0, top)
        add_legend(axes)
    return figure


def add_legend(axes):
    """A legend below the axes, where it covers nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=8)


def draw_confusion_matrix(predictions, results):
    figure = Figure((5, 4.8), layout="constrained")
    axes = figure.subplots()
    sklearn.metrics.ConfusionMatrixDisplay.from_predictions(
        predictions["label"], predictions["predicted"], labels=CLASSES, ax=axes, cmap="Blues", colorbar=False,
        text_kw={"fontsize": 22})
    axes.set(xlabel=f"predicted (threshold {results['threshold']})", ylabel="true")
    axes.set_title(f"{describe_held_out(results)}\nsensitivity {with_interval(results, 'recall')}, specificity"
                   f" {with_interval(results, 'specificity')}", fontsize=9)
    return figure


def average_roc(labels, probabilities, folds):
    """False and true positive rates of a ROC curve; with folds, the mean of their curves."""
    if folds is None:
        return sklearn.metrics.roc_curve(labels, probabilities)[:2]
    curves = [sklearn.metrics.roc_curve(labels[folds == fold], probabilities[folds == fold])[:2]
              for fold in np.unique(folds) if np.ptp(labels[folds == fold])]  # of one class there is none
    return GRID, np.mean([np.interp(GRID, *curve) for curve in curves], axis=0)


def draw_roc_curve(scores, baseline, results, band):
    """The ROC curve of the network, or the mean of the folds, with its band, and that of the file properties.

    scores: see data.results.files.list_scores. baseline: float (N,), what the files alone say of these films.
    band: that of data.results.metrics.measure_with_curves.
    """
    low, high, mean = band
    figure = Figure((5, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(GRID, low, high, alpha=0.2, label="pointwise 95 % bootstrap band, over patients")
    folds, label = scores["folds"], f"AUC {with_interval(results, 'auc')}"
    if folds is None:
        fpr, tpr, _ = sklearn.metrics.roc_curve(scores["labels"], scores["probabilities"])
        axes.plot(fpr, tpr, label=label)
    else:
        axes.plot(GRID, mean, label=f"mean of the folds, {label}")
        for fold in np.unique(folds):
            labels, probabilities = (scores[name][folds == fold] for name in ("labels", "probabilities"))
            fpr, tpr, _ = sklearn.metrics.roc_curve(labels, probabilities)
            axes.plot(fpr, tpr, color="0.6", lw=0.8, zorder=1, label="each fold" if fold == folds.min() else None)
    axes.plot(*average_roc(scores["labels"], baseline, folds), color="C1", lw=0.8,
              label=f"file properties alone, AUC {with_interval(results['baseline'], 'auc')}")
    axes.plot([0, 1], [0, 1], "k--", label="chance (AUC 0.50)")
    axes.plot(1 - results["specificity"], results["recall"], "ko", label=f"threshold {results['threshold']}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.set_title(describe_held_out(results), fontsize=10)
    add_legend(axes)
    return figure


def draw_precision_recall(scores, results, band):
    """The precision-recall curve, or the mean of the folds, with its band; the arguments as in draw_roc_curve."""
    labels, probabilities, folds = (scores[name] for name in ("labels", "probabilities", "folds"))
    low, high, mean = band
    figure = Figure((5, 6.2), layout="constrained")
    axes = figure.subplots()
    axes.fill_between(GRID, low, high, alpha=0.2, label="pointwise 95 % bootstrap band, over patients")

    def draw_steps(chosen, **style):
        precision, recall, _ = sklearn.metrics.precision_recall_curve(labels[chosen], probabilities[chosen])
        precision[-1] = precision[-2]  # scikit-learn's precision of no film is 1
        axes.plot(recall, precision, drawstyle="steps-post", **style)

    label = f"average precision {with_interval(results, 'average_precision')}"
    if folds is None:
        draw_steps(slice(None), label=label)
    else:
        axes.plot(GRID, mean, label=f"mean of the folds, {label}")
        for fold in np.unique(folds):
            label = "each fold" if fold == folds.min() else None
            draw_steps(folds == fold, color="0.6", lw=0.8, zorder=1, label=label)
    share = labels.mean()
    axes.axhline(share, color="k", ls="--", label=f"chance (share labelled malignant {share:.2f})")
    if results["precision"] is not None:
        axes.plot(results["recall"], results["precision"], "ko", label=f"threshold {results['threshold']}")
    axes.set(xlabel="recall (sensitivity)", ylabel="precision", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(describe_held_out(results), fontsize=10)
    add_legend(axes)
    return figure


def draw_calibration(scores, results):
    """How often films of about the same probability are malignant: a point for about 25 films, at most 10."""
    films = pd.DataFrame({"probability": scores["probabilities"], "malignant": scores["labels"]})
    count = min(10, max(2, len(films) // 25))
    bins = pd.qcut(films["probability"], count, labels=False, duplicates="drop").fillna(0)  # NaN: all are equal
    groups = films.groupby(bins)
    points = groups.agg({"probability": "mean", "malignant": ["mean", "sum", "size"]})

    figure = Figure((5, 5.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "k:", label="perfect calibration")
    axes.plot(points["probability", "mean"], points["malignant", "mean"], "s-",
              label=f"labelled malignant, of all in a bin; Brier score {with_interval(results, 'brier')}")
    for x, y, malignant, size in points.itertuples(index=False):
        above = -8 if y > 0.9 else 8  # points; there may be no room above
        axes.annotate(f"{malignant:.0f} of {size:.0f}", (x, y), (0, above), textcoords="offset points",
                      ha="center", va="top" if above < 0 else "bottom", fontsize=8,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
    axes.set(xlabel="predicted probability of malignancy (mean of the bin)", ylabel="share labelled malignant",
             xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(describe_held_out(results), fontsize=10)
    add_legend(axes)
    return figure


def overlay_map(image, cam):
    """The map over the image, uint8 (IMAGE_SIZE, IMAGE_SIZE, 3) RGB: strong evidence covers it."""
    heat = cv2.resize(cam, image.shape, interpolation=cv2.INTER_LINEAR)[..., None]
    colour = matplotlib.colormaps["viridis"](heat[..., 0])[..., :3] * 255
    return np.rint(image[..., None] * (1 - 0.6 * heat) + colour * 0.6 * heat).astype(np.uint8)


def write_overlay(overlay, file, probability, boxes):
    """Write an overlay as PNG, whatever characters its name has, with its lesion boxes, and P(malignant) below it.

    overlay: uint8 (H, W, 3) RGB; boxes: float (K, 4), see data.reading.place_boxes.
    """
    size = overlay.shape[0]
    canvas = cv2.copyMakeBorder(overlay[..., ::-1], 0, 24, 0, 0, cv2.BORDER_CONSTANT)
    for left, top, width, height in np.rint(boxes * size).astype(int):
        cv2.rectangle(canvas, (left, top, width + 1, height + 1), (255, 255, 255))
    cv2.putText(canvas, f"P(malignant) {probability:.3f}", (6, size + 17), cv2.FONT_HERSHEY_SIMPLEX, 0.5,
                (255, 255, 255), lineType=cv2.LINE_AA)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replace(file) as temporary:
        temporary.write_bytes(cv2.imencode(".png", canvas)[1].tobytes())


def draw_films(films, images, brightness):
    """A contact sheet: a row of up to SHEET films for each class of a container, and of a set of a given split.

    A row goes in equal steps from its darkest to its brightest film. Masks, inverted images and failed crops stand
    at its ends. Lesion boxes are dashed.

    images: uint8 (N, S, S). brightness: mean grey values (N,), as in `films`.
    """
    used = films[films["excluded"] == ""]
    sets = used["split"].where(used["fold"] == "", "")  # a fold is a random part
    kinds = (sets + "\n" + used["container"]).str.strip()
    shown = kinds.value_counts().index[: ROWS // 2]
    groups = used[kinds.isin(shown)].groupby([kinds, "label"]).groups
    size, step, line = min(1.8, 7.5 / len(groups)), 1.05, 1.15  # inches of a film; from film to film, in films
    figure = Figure((size * step * SHEET + 1.6, size * line * len(groups) + 0.8), layout="constrained")
    axes = figure.subplots()
    for row, ((kind, label), members) in enumerate(groups.items()):
        ordered = brightness[members].sort_values(kind="stable").index
        places = np.unique(np.linspace(0, len(ordered) - 1, SHEET).round().astype(int))
        axes.text(-0.1, line * row + 0.5, f"{label}\n{kind}\n{len(places)} of {len(ordered)}", ha="right",
                  va="center", fontsize=9)
        for column, film in enumerate(ordered[places]):
            left, top = step * column, line * row
            axes.imshow(images[film], cmap="gray", vmin=0, vmax=255, extent=(left, left + 1, top + 1, top))
            for x, y, width, height in place_boxes(films.loc[film]):
                axes.add_patch(Rectangle((left + x, top + y), width, height, fill=False, ec="yellow", ls="--"))
            name = Path(films.loc[film, "path"]).stem[-int(16 * size) :]
            axes.text(left, top + 1.02, name, fontsize=7, va="top", parse_math=False)
    axes.set(xlim=(-1.4 / size, step * SHEET), ylim=(line * len(groups), 0))
    axes.set_axis_off()
    missing = used.index.size - sum(map(len, groups.values()))
    more = f"; {missing} mammograms are of other containers or sets" if missing else ""
    axes.set_title(f"in each row from the darkest to the brightest{more}", fontsize=9)
    return figure


def select_cases(predictions, threshold):
    """The CASES most confident rows of `predictions` of each outcome, with columns for it and its number."""
    correct = np.where(predictions["predicted"] == predictions["label"], "true_", "false_")
    called = np.where(predictions["predicted"] == "malignant", "positive", "negative")
    ranked = predictions.assign(outcome=np.char.add(correct, called))
    ranked = ranked.sort_values("probability", key=lambda p: -abs(p - threshold), kind="stable")
    ranked["number"] = ranked.groupby("outcome").cumcount()
    return ranked[ranked["number"] < CASES]


def draw_cases(cases, films, images, maps, outcomes=OUTCOMES, columns=CASES, panel=1.5):
    """A row of panels for each outcome: every case as the model sees it, and with its map over it.

    Lesion boxes are dashed; of several outcomes there is a colour bar. cases: see select_cases; images, maps: by
    the index of the cases; panel: inches.
    """
    size = (2 * panel * columns + 1.6, (panel + 0.2) * len(outcomes) + 0.8)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(outcomes), 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for panels, outcome in zip(grid, outcomes, strict=True):
        rows = list(cases[cases["outcome"] == outcome].itertuples())
        panels[0].set_ylabel(outcome.replace("_", "\n") + ("" if rows else "\n(none)"), fontsize=11)
        for case, pair in zip(rows, panels.reshape(-1, 2), strict=False):
            image, cam = images[case.Index], maps[case.Index]
            for axes, pixels in zip(pair, (image, overlay_map(image, cam)), strict=True):
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
                for left, top, width, height in place_boxes(films.loc[case.Index]) * IMAGE_SIZE:
                    axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="white", lw=0.8, ls="--"))
            pair[0].set_title(case.label, fontsize=10)
            pair[1].set_title(f"P(malignant) {case.probability:.3f}", fontsize=10)
            if not cam.any():
                pair[1].set_xlabel("no positive evidence", fontsize=9)
    if len(outcomes) > 1:
        ramp = overlay_map(np.full((IMAGE_SIZE, IMAGE_SIZE), 128, np.uint8), np.linspace(0, 1, 256)[None])
        colours = ScalarMappable(cmap=ListedColormap(ramp[0] / 255))
        figure.colorbar(colours, ax=grid, aspect=40,
                        label="evidence for the prediction (Grad-CAM, relative to its maximum)")
    return figure


def write_figure(figure, file, title, note, suffixes=(".png", ".pdf"), dpi=200):
    """Write a figure as PNG and PDF, with a title above it and the note of the run below it.

    The same figure gives the same bytes.
    """
    figure.suptitle(title, fontsize=11, parse_math=False)
    if note:
        figure.supxlabel(textwrap.fill(note.upper(), int(12 * figure.get_figwidth())), fontsize=8,
                         color="firebrick")
    for suffix in suffixes:
        metadata = {"CreationDate": None} if suffix == ".pdf" else None
        with (warnings.catch_warnings(action="ignore"),  # of characters in a file name that no font here has
              matplotlib.rc_context({"pdf.fonttype": 42})):  # text stays text
            figure.savefig(file.with_suffix(suffix), dpi=dpi, metadata=metadata)
        figure.set_layout_engine("none")  # the PDF looks as the PNG does
