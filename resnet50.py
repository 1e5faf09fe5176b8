"""Classify mammograms as benign or malignant with a ResNet50 pretrained on ImageNet.

    python resnet50.py

trains on the films of DATA_DIR and writes metrics, plots, Grad-CAM overlays and the model to a folder of its own
in OUTPUT_DIR. Edit a constant, run again, compare with vgg16.py. Research software, not for clinical use.
"""
import common  # before Keras: it chooses Keras' backend

import keras

# ------------------------------------------------------------------------------------------------
# data
DATA_DIR = "data/phantoms"  # or the folder of your mammograms: see data/README.md for its layout
OUTPUT_DIR = "outputs"  # every run gets a folder of its own in here
CROP = "breast"  # what is cut out of a mammogram: "breast", "lesion" (labels.csv needs lesion_box) or None
FOLD = 0  # which fifth of the patients is held out for validation: 0 to 4; "all": one model for each fifth
SPLIT_SEED = 0  # random seed of the split into fifths; runs with the same value hold out the same patients
# model
WEIGHTS = "imagenet"  # None: random weights; or a path: a weights file without top layers, or a run's model.keras
UNFROZEN_FRACTION = 0.5  # share of the backbone's layers that is trained, from the top: 0 to 1; 0: only the head
HEAD_UNITS = 256  # units of the dense layer after the pooling; it is always trained
DROPOUT = 0.3  # share of these units that dropout sets to 0 in a training step
# training
LEARNING_RATE = 1e-4  # of Adam; vgg16.py has half of it, as training without batch norm is less stable
EPOCHS = 7  # the final weights are an average over about the last epoch
BATCH_SIZE = 13  # mammograms in a training step; set a smaller number if memory is short
SEED = 0  # random seed of the training: weights of the head, order, augmentation, dropout
MIXED_PRECISION = "auto"  # train in 16-bit floats: True, False or "auto" (if the device multiplies them faster)
# augmentation of the training set: new random values for every mammogram in every epoch
BRIGHTNESS = 0.1  # largest increase or decrease, as a share of the grey scale
CONTRAST = 0.2  # largest change up or down: a factor from 0.8 to 1.2
SATURATION = 0.2  # largest change up or down; without effect, as all mammograms are grey
# evaluation
THRESHOLD = 0.5  # probability of malignancy from which a film is predicted malignant
# ------------------------------------------------------------------------------------------------


def build_backbone(weights):
    """ResNet50 without top layers, for raw RGB images in 0..255; weights: "imagenet", None or a path."""
    inputs = keras.Input((common.IMAGE_SIZE, common.IMAGE_SIZE, 3), name="image")
    pixels = keras.applications.resnet50.preprocess_input(inputs)
    return keras.applications.ResNet50(include_top=False, weights=weights, input_tensor=pixels)


def main(**constants):
    """Read the films, run one fold or all of them, show the result; returns its folder.

    constants: other values for this call, by name: main(UNFROZEN_FRACTION=0.6, FOLD="all").
    """
    settings, console = common.start(globals(), constants)
    films = common.find_films(settings.DATA_DIR)
    common.check_folds(films)
    films, images, fingerprints = common.read_films(films, settings.DATA_DIR, settings.CROP, settings.OUTPUT_DIR)
    films = common.group_duplicates(films, fingerprints)
    common.warn_of_giveaways(films, images, settings.CROP, settings.SPLIT_SEED)

    folders = []
    for fold in common.list_folds(films, settings, console):
        split = common.split_patients(films, fold, settings.SPLIT_SEED)
        common.write_leaks(split, settings.OUTPUT_DIR)
        common.check_sides(split, every_fold=settings.FOLD == "all")
        folders.append(run_fold(split, images, fingerprints, settings, console))
    folder = common.pool_folds(folders, split, images, fingerprints, settings)
    common.score_test(folder, split, images, settings)
    common.show_results(folder)
    common.compare(settings.OUTPUT_DIR)
    common.list_unfinished(settings.OUTPUT_DIR)
    return folder


def run_fold(films, images, fingerprints, settings, console):
    """Train, evaluate and explain one split; returns its folder. Its memory is freed before the next fold."""
    backbone, weights = common.load_backbone(build_backbone, films, fingerprints, settings)
    model = common.build_model(backbone, weights, settings)
    folder = common.name_run(settings, films, model, weights)
    if not common.is_complete(folder):
        training, validation = common.make_datasets(images, films, settings)
        model, facts, history = common.train(model, training, validation, settings, folder)
        results = common.evaluate([model], images, films, settings)
        common.write_run(folder, settings, films, images, fingerprints, model, facts, weights, history, results,
                         console)
    return folder


if __name__ == "__main__":
    common.run(main)
