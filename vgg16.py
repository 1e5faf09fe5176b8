"""Classify mammograms as benign or malignant with a VGG16 pretrained on ImageNet.

    python vgg16.py

trains on the images of DATA_DIR and writes metrics, plots, Grad-CAM overlays and the model to a
folder of its own in OUTPUT_DIR. Edit a constant, run again, compare with resnet50.py.
Research software, not for clinical use.
"""
import common  # before Keras: it chooses Keras' backend and quiets TensorFlow

import keras

# ------------------------------------------------------------------------------------------------
# data
DATA_DIR = "data/phantoms"  # or the folder of your mammograms: see data/README.md for its layout
OUTPUT_DIR = "outputs"  # every run gets a folder of its own in here
CROP = "breast"  # what is cut out of a film: "breast", "lesion" (labels.csv needs lesion_box) or None
FOLD = 0  # which fifth of the patients is held out: 0, 1, 2, 3 or 4
# model
WEIGHTS = "imagenet"  # or None for random weights, or the path of a weights file without top layers
UNFROZEN_FRACTION = 0.5  # share of the backbone's layers that trains: the top 0.5, 0.6, 0.7; any in (0, 1]
# training
LEARNING_RATE = 5e-5  # of Adam; resnet50.py takes twice as much: its batch norm bears larger steps
EPOCHS = 7  # the weights of the last one are kept
BATCH_SIZE = 13  # images a step; fewer where memory is short
SEED = 0  # of the split, the new weights, the order, the augmentation and the dropout
MIXED_PRECISION = "auto"  # 16-bit floats with XLA: where all GPUs have tensor cores; or True or False
# ------------------------------------------------------------------------------------------------

IMAGENET_MD5 = "6d6bbae143d832006294945121d1f1fc"
IMAGENET_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
)


def build_backbone():
    """VGG16 without top layers and with random weights, for raw RGB images in 0..255."""
    inputs = keras.Input((common.IMAGE_SIZE, common.IMAGE_SIZE, 3), name="image")
    pixels = keras.applications.vgg16.preprocess_input(inputs)
    return keras.applications.VGG16(include_top=False, weights=None, input_tensor=pixels)


def main():
    """Train, evaluate and explain; returns the folder of the run."""
    record = common.start(globals())
    films = common.find_images(record, DATA_DIR)
    films, images, prints = common.read_images(record, films)
    films = common.group_copies(record, films, prints)
    films = common.split_patients(record, films, FOLD, SEED)
    training, validation, steps = common.feed(record, images, films, EPOCHS, BATCH_SIZE, SEED)
    backbone = build_backbone()
    pretrained = common.load_weights(record, backbone, WEIGHTS, IMAGENET_URL, IMAGENET_MD5)
    model = common.build_model(record, backbone, pretrained, UNFROZEN_FRACTION, LEARNING_RATE)
    with common.run_folder(record, films, OUTPUT_DIR) as folder:
        history = common.train(record, model, training, validation, EPOCHS, steps, folder)
        common.save_model(record, model, folder)
        predictions, maps, metrics, band = common.evaluate(record, model, validation, films)
        cases = common.explain(record, images, films, predictions, maps, metrics)
        common.report(record, folder, films, history, predictions, metrics, band, cases)
        common.save_json(record, folder / "settings.json")
    common.compare(OUTPUT_DIR)
    return common.locate(record["run_folder"])


if __name__ == "__main__":
    common.run(main)
