"""The script that tutorials for this job have: what tests/benchmark.py and tests/leaky_split.py compare with.

    python tests/tutorial.py DATA WEIGHTS EPOCHS generator|films|arrays OUTPUT resnet50|vgg16

One class per folder, a nested backbone whose batch norm follows the batches, fit, predict, and Grad-CAM image
by image. Written to be typical, neither slow nor fast on purpose, and used for nothing else.
"""
import glob
import os
import resource
import sys

import cv2
import matplotlib
import numpy as np
import tensorflow as tf
from sklearn.metrics import classification_report, confusion_matrix, roc_curve
from sklearn.model_selection import train_test_split
from tensorflow import keras
from tensorflow.keras.preprocessing.image import ImageDataGenerator

matplotlib.use("agg")
import matplotlib.pyplot as plt

data, weights, epochs, source, output, backbone = sys.argv[1:]
preprocess_input = getattr(keras.applications, backbone).preprocess_input
epochs = int(epochs)
os.makedirs(output, exist_ok=True)
rng = np.random.default_rng(0)


def list_files():
    paths, labels = [], []
    for label, name in enumerate(["benign", "malignant"]):
        found = sorted(glob.glob(os.path.join(data, name, "**", "*.png"), recursive=True))
        paths += found
        labels += [label] * len(found)
    return np.array(paths), np.array(labels)


def load_arrays(paths):
    images = [cv2.resize(cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB), (224, 224)) for path in paths]
    return np.array(images, dtype=np.float32)


class Films(keras.utils.Sequence):
    """16-bit films in float32: flow_from_directory would clip them, and all tissue would be white."""

    def __init__(self, filepaths, labels, augmented):
        super().__init__()
        self.filepaths, self.labels, self.augmented = filepaths, labels, augmented
        self.on_epoch_end()

    def __len__(self):
        return int(np.ceil(len(self.filepaths) / 13))

    def __getitem__(self, number):
        chosen, images = self.order[13 * number : 13 * (number + 1)], []
        for path in self.filepaths[chosen]:
            film = cv2.imread(path, cv2.IMREAD_UNCHANGED).astype(np.float32)
            film = 255 * (film - film.min()) / (film.max() - film.min())
            image = np.stack([cv2.resize(film, (224, 224))] * 3, axis=-1)
            if self.augmented:
                image = np.clip(image * rng.uniform(0.9, 1.1), 0, 255)
                image = image[:, ::-1] if rng.random() < 0.5 else image
            images.append(image)
        return preprocess_input(np.array(images)), self.labels[chosen]

    def on_epoch_end(self):
        count = len(self.filepaths)
        self.order = rng.permutation(count) if self.augmented else np.arange(count)


augmentation = {"horizontal_flip": True, "brightness_range": (0.9, 1.1),
                "preprocessing_function": preprocess_input}
if source == "generator":
    flow = {"directory": data, "target_size": (224, 224), "batch_size": 13, "class_mode": "binary"}
    train = ImageDataGenerator(validation_split=0.2, **augmentation).flow_from_directory(**flow, subset="training")
    validation = ImageDataGenerator(validation_split=0.2, preprocessing_function=preprocess_input)
    validation = validation.flow_from_directory(**flow, subset="validation", shuffle=False)
    truth = validation.classes
else:
    paths, labels = list_files()
    split = train_test_split(paths, labels, test_size=0.2, stratify=labels, random_state=0)
    paths, held_out, labels, truth = split
    if source == "films":
        train, validation = Films(paths, labels, augmented=True), Films(held_out, truth, augmented=False)
    else:
        train = ImageDataGenerator(**augmentation).flow(load_arrays(paths), labels, batch_size=13)
        validation = (preprocess_input(load_arrays(held_out)), truth)

application = {"resnet50": keras.applications.ResNet50, "vgg16": keras.applications.VGG16}[backbone]
base = application(include_top=False, weights=None, input_shape=(224, 224, 3))
base.load_weights(weights)
for layer in base.layers[: len(base.layers) // 2]:
    layer.trainable = False
model = keras.Sequential([
    keras.Input((224, 224, 3)), base, keras.layers.GlobalAveragePooling2D(),
    keras.layers.Dense(256, activation="relu"), keras.layers.Dropout(0.3),
    keras.layers.Dense(1, activation="sigmoid")])
learning_rate = {"resnet50": 1e-4, "vgg16": 5e-5}[backbone]
model.compile(optimizer=keras.optimizers.Adam(learning_rate), loss="binary_crossentropy", metrics=["accuracy"])
if source == "arrays":  # the first epoch has begun
    model.fit(train, epochs=1, steps_per_epoch=2)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    sys.exit()
history = model.fit(train, validation_data=validation, epochs=epochs)
model.save(os.path.join(output, "model.keras"))

probabilities = model.predict(validation)[:, 0]
print(classification_report(truth, probabilities >= 0.5))
np.savetxt(os.path.join(output, "predictions.txt"), np.column_stack([truth, probabilities]))
plt.imshow(confusion_matrix(truth, probabilities >= 0.5))
plt.savefig(os.path.join(output, "confusion_matrix.png"))
plt.figure()
plt.plot(*roc_curve(truth, probabilities)[:2])
plt.savefig(os.path.join(output, "roc_curve.png"))
plt.figure()
plt.plot(history.history["loss"])
plt.plot(history.history["val_loss"])
plt.savefig(os.path.join(output, "training_curves.png"))


def make_heatmap(image):
    """Grad-CAM as the Keras guide of 2020 has it."""
    last_layer = {"resnet50": "conv5_block3_out", "vgg16": "block5_conv3"}[backbone]
    last_maps = keras.Model(base.inputs, base.get_layer(last_layer).output)
    inputs = x = keras.Input(last_maps.output.shape[1:])
    for layer in model.layers[1:]:
        x = layer(x)
    classifier = keras.Model(inputs, x)
    with tf.GradientTape() as tape:
        maps = last_maps(image)
        tape.watch(maps)
        prediction = classifier(maps)
    weights = tf.reduce_mean(tape.gradient(prediction, maps), axis=(0, 1, 2))
    heatmap = tf.squeeze(maps[0] @ weights[:, None])
    return (tf.maximum(heatmap, 0) / tf.reduce_max(heatmap)).numpy()


for number, path in enumerate(validation.filepaths[:16]):
    picture = cv2.resize(cv2.imread(path), (224, 224))
    heatmap = cv2.resize(make_heatmap(preprocess_input(picture[None, ..., ::-1].astype(np.float32))), (224, 224))
    colour = cv2.applyColorMap(np.uint8(255 * heatmap), cv2.COLORMAP_JET)
    plt.figure()
    plt.imshow(cv2.addWeighted(picture, 0.6, colour, 0.4, 0)[..., ::-1])
    plt.savefig(os.path.join(output, f"grad_cam_{number}.png"))
