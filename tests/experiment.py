"""The experiment of the README: how many layers should train? Both networks on the lesion crops of mini-MIAS.

    python data/mini_mias/prepare.py      first, see data/README.md
    python tests/experiment.py

trains what is missing in outputs/example/experiment.csv, which takes hours on two CPU cores, and draws
outputs/example/experiment.png from it. The table has a row for each held-out mammogram. A column such as
"vgg16 0.5 2" has the logits of vgg16.py with UNFROZEN_FRACTION 0.5 and SEED 2, by the model of each fold that did
not see the patient.
"""
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
import pandas as pd  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from scipy.special import expit  # noqa: E402

from data.results import metrics  # noqa: E402

# ------------------------------------------------------------------------------------------------
WEIGHTS = {"resnet50": "imagenet", "vgg16": "imagenet"}  # or the path of a weights file
SHARES = (0, 0.5, 0.6, 0.7)  # UNFROZEN_FRACTION
SEEDS = (0, 1, 2)
OUTPUT_DIR = "outputs"
# ------------------------------------------------------------------------------------------------

TABLE = REPOSITORY / "outputs/example/experiment.csv"
FILMS = ["path", "label", "fold", "group", "baseline"]  # columns that all trainings share
NAMES = {"resnet50": "ResNet50", "vgg16": "VGG16"}


def train(network, share, seed):
    """The table of one training of each fold: FILMS and logit, by path."""
    import resnet50
    import vgg16
    script = {"resnet50": resnet50, "vgg16": vgg16}[network]
    folder = script.main(DATA_DIR="data/mini_mias", CROP="lesion", FOLD="all", UNFROZEN_FRACTION=share, SEED=seed,
                         WEIGHTS=WEIGHTS[network], OUTPUT_DIR=OUTPUT_DIR)
    predictions = pd.read_csv(folder / "predictions.csv")
    groups = pd.read_csv(folder / "split.csv", usecols=["path", "group"])
    found = predictions.merge(groups, on="path")
    found["path"] = found["path"].map(os.path.basename)  # wherever the films lie
    return found.sort_values("path", ignore_index=True)


def train_missing(table):
    """The table with a column for each training; it is written after each. table: None if there is none."""
    for seed in SEEDS:
        for network in NAMES:
            for share in SHARES:
                column = f"{network} {share:g} {seed}"
                if table is not None and column in table:
                    continue
                found = train(network, share, seed)
                table = found[FILMS] if table is None else table
                assert table["path"].equals(found["path"]), "another download of mini-MIAS, or another split"
                table = table.assign(**{column: found["logit"]})
                table.to_csv(TABLE, index=False, float_format="%.9g", lineterminator="\n")
    return table


def read_scores(table, network, share):
    """Probabilities of the trainings of one share: float (trainings, mammograms)."""
    columns = [name for name in table if name.startswith(f"{network} {share:g} ")]
    return expit(table[columns].to_numpy().T)


def measure(table):
    """A table with network, share, the AUC of each training, their mean with its interval, and their SD."""
    malignant, patients, folds = table["label"].eq("malignant").to_numpy(int), table["group"], table["fold"]
    rows = []
    for network in NAMES:
        for share in SHARES:
            scores = read_scores(table, network, share)
            if not len(scores):
                continue
            results = metrics.measure_trainings(malignant, scores, patients, folds=folds)
            each = [metrics.measure(malignant, score, patients, folds=folds)["auc"] for score in scores]
            difference = metrics.compare_aucs(malignant, scores, table["baseline"], patients, folds,
                                              second_varies=False)
            rows.append({"network": network, "share": share, "each": each, "auc": results["auc"],
                         "interval": results["ci95"]["auc"], "sd": results["sd"]["auc"], "minus": difference})
    return pd.DataFrame(rows)


def compare_shares(table, rows):
    """Print the AUC of each network's best share minus that of its other shares, with Bonferroni intervals."""
    malignant, patients, folds = table["label"].eq("malignant").to_numpy(int), table["group"], table["fold"]
    for network, part in rows.groupby("network"):
        best = part.loc[part["auc"].idxmax(), "share"]
        others = [share for share in part["share"] if share != best]
        for share in others:
            scores = [read_scores(table, network, one) for one in (best, share)]
            difference, low, high = metrics.compare_aucs(malignant, *scores, patients, folds,
                                                         confidence=1 - 0.05 / len(others))
            print(f"{NAMES[network]}: {best:.0%} minus {share:.0%}: {difference:+.3f} [{low:.3f}, {high:.3f}]")


def draw(table, rows):
    """AUC over the share of trainable layers: intervals, single trainings, and the file properties alone."""
    malignant = table["label"].eq("malignant").to_numpy(int)
    alone = metrics.measure(malignant, table["baseline"].to_numpy(), table["group"], folds=table["fold"])
    figure = Figure((7, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhspan(*alone["ci95"]["auc"], color="C7", alpha=0.15)
    axes.axhline(alone["auc"], color="C7", label=f"file properties alone {metrics.with_interval(alone, 'auc')}")
    axes.axhline(0.5, color="k", ls=":", lw=1, label="chance")

    for shift, marker, color, network in ((-0.1, "s", "C0", "resnet50"), (0.1, "o", "C1", "vgg16")):
        part = rows[rows["network"] == network]
        if part.empty:
            continue
        places = [SHARES.index(share) + shift for share in part["share"]]
        for place, row in zip(places, part.itertuples(), strict=True):
            axes.plot([place, place], row.interval, color=color, lw=2)
            axes.plot([place + 0.06] * len(row.each), row.each, ".", color=color, ms=5)
        axes.plot(places, part["auc"], marker, color=color, ms=8, label=f"{NAMES[network]}, mean of the trainings")

    axes.set_xticks(range(len(SHARES)), [f"{100 * share:g} %" for share in SHARES])
    axes.set(xlabel="trainable layers of the backbone (0 %: the head alone)", ylabel="AUC", ylim=(0.3, 1))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", ncols=2, fontsize=8)
    patients = table["group"].nunique()
    axes.set_title(f"mini-MIAS lesion crops: {len(table)} held-out mammograms of {patients} patients, five folds\n"
                   "bars: 95 % intervals over patients and trainings; dots: single trainings", fontsize=9)
    figure.savefig(TABLE.with_suffix(".png"), dpi=150)


def main():
    table = train_missing(pd.read_csv(TABLE) if TABLE.exists() else None)
    rows = measure(table)
    print(rows.to_string(float_format="{:.3f}".format))
    compare_shares(table, rows)
    draw(table, rows)


if __name__ == "__main__":
    main()
