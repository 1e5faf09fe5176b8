"""Backbones, freezing, weights files and downloads, each against a reference."""
import math
import shutil
import socket

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import build_backbone, build_tiny, common, make_films, make_noise, prepare, to_pixels

import resnet50
import vgg16

APPLICATIONS = {
    "resnet50": (resnet50, keras.applications.ResNet50, keras.applications.resnet50.preprocess_input),
    "vgg16": (vgg16, keras.applications.VGG16, keras.applications.vgg16.preprocess_input),
}
FILMS = make_films([0, 1] * 4, held_out=4, path=[f"synthetic_{n}.png" for n in range(8)])


@pytest.fixture(scope="module")
def backbones():
    """{name: (script, backbone, that of keras.applications, its preprocess_input)}, of the same random weights."""
    found = {}
    for name, (script, application, preprocess_input) in APPLICATIONS.items():
        plain = application(include_top=False, weights=None, input_shape=(224, 224, 3))
        backbone = script.build_backbone(None)
        backbone.set_weights(plain.get_weights())
        found[name] = script, backbone, plain, preprocess_input
    return found


# ---- backbone ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", APPLICATIONS)
def test_the_backbone_takes_raw_images_and_preprocesses_them_as_keras_does(backbones, name):
    _, backbone, plain, preprocess_input = backbones[name]
    images = np.random.default_rng(0).uniform(0, 255, (1, 224, 224, 3)).astype(np.float32)
    expected = plain.predict(preprocess_input(images.copy()), verbose=0)
    features = backbone.predict(images, verbose=0)
    assert np.allclose(features, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "fraction", "layers", "percent"),
    [  # counted on keras.applications with an independent script
        ("resnet50", 0.5, 88, 90.7), ("resnet50", 0.6, 105, 95.0), ("resnet50", 0.7, 123, 97.1),
        ("resnet50", 1, 175, 100), ("vgg16", 0.5, 10, 92.2), ("vgg16", 0.6, 11, 96.2), ("vgg16", 0.7, 13, 98.2),
        ("vgg16", 0.001, 1, 0), ("resnet50", 0, 0, 0),
    ],
)
def test_the_top_trains_and_the_rest_is_frozen(backbones, tmp_path, name, fraction, layers, percent):
    _, backbone, plain, _ = backbones[name]
    settings = prepare(tmp_path, UNFROZEN_FRACTION=fraction, WEIGHTS="imagenet")
    for layer in backbone.layers:
        layer.trainable = True
    _, weights = common.load_backbone(lambda _: backbone, FILMS, None, settings)  # as if they had been downloaded
    model = common.build_model(backbone, weights, settings)
    facts = common.describe_model(model, settings)
    assert facts["layers"] == len(plain.layers)
    assert facts["unfrozen_layers"] == layers
    frozen = {layer.name for layer in plain.layers[: len(plain.layers) - layers]}
    top = [layer for layer in plain.layers if layer.name not in frozen]
    parameters = sum(math.prod(w.shape) for layer in top for w in layer.weights)
    assert facts["unfrozen_parameters"] == parameters
    assert round(100 * parameters / plain.count_params(), 1) == percent
    assert facts["trained_parameters"] == sum(math.prod(weight.shape) for weight in model.trainable_weights)
    norms = {layer.name for layer in plain.layers if isinstance(layer, keras.layers.BatchNormalization)}
    trained = {weight.path.split("/")[0] for weight in model.trainable_weights}
    assert trained.isdisjoint(frozen | norms)
    weighty = {layer.name for layer in top if layer.weights}
    assert trained == (weighty - norms) | {"head", "logit"}


@pytest.mark.parametrize(("name", "shape"), [("resnet50", (1, 7, 7)), ("vgg16", (1, 14, 14))])
def test_the_head_and_the_maps_of_grad_cam(backbones, tmp_path, name, shape):
    settings = prepare(tmp_path, DROPOUT=0.4, HEAD_UNITS=17)
    _, backbone, _, _ = backbones[name]
    _, weights = common.load_backbone(lambda _: backbone, FILMS, None, settings)
    model = common.build_model(backbone, weights, settings)
    names = [type(layer).__name__ for layer in model.layers[-5:]]
    assert names == ["GlobalAveragePooling2D", "Dense", "Dropout", "Dense", "Activation"]
    assert (model.get_layer("dropout").rate, model.get_layer("head").units) == (0.4, 17)
    assert model.output_shape == (None, 1)
    _, maps = common.make_gradcam(model)(to_pixels(make_noise(1)))
    assert maps.shape == shape


def test_what_is_recorded_of_the_model_is_what_the_model_says(tmp_path):
    settings = prepare(tmp_path, MIXED_PRECISION=True)
    try:
        model, _ = build_tiny(settings, FILMS)
        facts = common.describe_model(model, settings)
    finally:
        prepare(tmp_path)
    assert facts["floats"] == ["bfloat16", "float32"]
    assert model.get_layer("high").compute_dtype == "bfloat16"


# ---- batch norm --------------------------------------------------------------------------------


def fit_tiny(folder, pretrained, fraction):
    """{layer: whether its weights are what they were} after an epoch on noise with a large learning rate."""
    settings = prepare(folder, UNFROZEN_FRACTION=fraction, LEARNING_RATE=0.01, EPOCHS=1)
    if pretrained:
        build_backbone(None).save_weights(folder / "tiny.weights.h5")
        settings = settings._replace(WEIGHTS=folder / "tiny.weights.h5")
    films = make_films(np.arange(20) % 2, held_out=4)
    model, _ = build_tiny(settings, films)
    before = {layer.name: layer.get_weights() for layer in model.layers if layer.weights}
    training, validation = common.make_datasets(make_noise(20), films, settings)
    common.train(model, training, validation, settings, folder / "run")
    return {name: all(map(np.array_equal, weights, model.get_layer(name).get_weights()))
            for name, weights in before.items()}


def test_batch_norm_of_a_pretrained_backbone_is_untouched_by_training(tmp_path):
    untouched = fit_tiny(tmp_path, pretrained=True, fraction=1.0)
    assert untouched == {"low": False, "low_norm": True, "high": False, "high_norm": True, "head": False,
                         "logit": False}


def test_batch_norm_of_a_random_backbone_trains_where_it_is_unfrozen(tmp_path):
    untouched = fit_tiny(tmp_path, pretrained=False, fraction=0.5)
    assert untouched == {"low": True, "low_norm": True, "high": False, "high_norm": False, "head": False,
                         "logit": False}


# ---- batch norm folded into the kernels --------------------------------------------------------


def perturb(model):
    """Biases, statistics, scales and shifts that change what is computed; returns the model."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        for weight in layer.weights:
            if len(weight.shape) == 1:
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def count_folded(model):
    return sum(isinstance(layer, common.FoldedConvolution) for layer in model.layers)


def fill(inputs):
    """Two images of noise for a model with these inputs."""
    return np.random.default_rng(1).standard_normal((2, *inputs.shape[1:])).astype(np.float32)


class Doubled(keras.layers.Conv2D):
    def call(self, inputs):
        return 2 * super().call(inputs)


@pytest.mark.parametrize(("folds", "convolution", "norm"), [
    (True, keras.layers.Conv2D(6, 3), {}),
    (True, keras.layers.Conv2D(6, 3, strides=2, padding="same", use_bias=False), {"axis": 3, "epsilon": 0.1}),
    (True, keras.layers.Conv2D(6, 3, dilation_rate=2, trainable=False), {"scale": False}),
    (True, keras.layers.Conv2D(6, 1, groups=2, use_bias=False), {"center": False}),
    (True, keras.layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2), {"scale": False, "center": False}),
    (True, keras.layers.DepthwiseConv2D((3, 5), padding="same", use_bias=False, trainable=False), {}),
    (False, keras.layers.Conv2D(6, 3), {"trainable": True}),
    (False, keras.layers.Conv2D(6, 3, activation="relu"), {}),
    (False, keras.layers.Conv2D(6, 3), {"axis": 1}),
    (False, Doubled(6, 3), {}),
    (False, keras.layers.SeparableConv2D(6, 3), {}),
    (False, keras.layers.ReLU(), {}),
])
def test_folding_changes_neither_outputs_nor_gradients(tmp_path, folds, convolution, norm):
    """In 32 bits, against the same layers one after the other; without a trace in the model and its file."""
    prepare(tmp_path)
    inputs = keras.Input((8, 8, 4))
    tensor = keras.layers.BatchNormalization(**{"trainable": False} | norm)(convolution(inputs))
    model = perturb(keras.Model(inputs, keras.layers.Conv2D(2, 1, name="last")(tensor)))
    description = model.to_json()
    folded = common.fold_batch_norm(model)
    assert count_folded(folded) == folds
    assert {id(weight) for weight in folded.weights} == {id(weight) for weight in model.weights}
    results = []
    for network in (model, folded):
        with tf.GradientTape() as tape:
            output = network(fill(inputs), training=False)
            loss = tf.reduce_sum(output ** 2)
        gradients = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
        results.append([output, *gradients])
    for expected, found in zip(*results, strict=True):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert model.to_json() == description
    if type(convolution) is not Doubled:
        model.save(tmp_path / "model.keras")
        assert np.array_equal(keras.models.load_model(tmp_path / "model.keras").predict(fill(inputs), verbose=0),
                              model.predict(fill(inputs), verbose=0))


def test_a_convolution_that_is_needed_as_it_is_or_twice_stays_right(tmp_path):
    prepare(tmp_path)
    inputs = keras.Input((8, 8, 4))
    shared, needed = keras.layers.Conv2D(4, 3, padding="same"), keras.layers.Conv2D(4, 3, padding="same")
    norms = [keras.layers.BatchNormalization(trainable=False) for _ in range(3)]
    once = norms[0](shared(inputs))
    twice = norms[1](shared(once))
    plain = needed(twice)
    model = perturb(keras.Model(inputs, [keras.layers.Add()([plain, norms[2](plain)]), once, norms[0](plain)]))
    folded = common.fold_batch_norm(model)
    assert count_folded(folded) == 4
    for expected, found in zip(model(fill(inputs)), folded(fill(inputs)), strict=True):
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("application", "count"), [("EfficientNetB0", 49), ("DenseNet121", 59)])
def test_folding_serves_other_backbones_of_keras(tmp_path, application, count):
    """Those norms of DenseNet that come before a convolution stay."""
    prepare(tmp_path)
    build = getattr(keras.applications, application)
    model = perturb(build(include_top=False, weights=None, input_shape=(32, 32, 3)))
    for layer in model.layers:
        layer.trainable = False
    folded = common.fold_batch_norm(model)
    assert count_folded(folded) == count
    expected, found = (network(100 * fill(model.inputs[0]), training=False).numpy() for network in (model, folded))
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_training_and_grad_cam_fold_what_is_frozen(tmp_path, monkeypatch, pretrained, mixed):
    """With the numbers of a network that is not folded; in 16 bits they are rounded elsewhere."""
    settings = prepare(tmp_path, EPOCHS=1, MIXED_PRECISION=mixed, DROPOUT=0.0)
    films, images = make_films(np.arange(20) % 2, held_out=4), make_noise(20)
    training, validation = common.make_datasets(images, films, settings)
    fold, counts, results = common.fold_batch_norm, [], []

    def watch(model):
        folded = fold(model)
        counts.append(count_folded(folded))
        return folded

    for name, use in (("folded", watch), ("plain", lambda model: model)):
        monkeypatch.setattr(common, "fold_batch_norm", use)
        prepare(tmp_path, MIXED_PRECISION=mixed)
        model = common.build_model(perturb(build_backbone(None)), {"pretrained": pretrained}, settings)
        trained, _, history = common.train(model, training, validation, settings, tmp_path / name)
        predictions, maps = common.evaluate([trained], images, films, settings)
        assert count_folded(trained) == 0
        results.append([history[["loss", "val_loss"]], *trained.get_weights(), predictions["probability"], maps])
    assert counts == [2 if pretrained else 1] * 2, "the lower one does not train in either case"
    tolerance = 0.1 if mixed else 1e-4
    for found, expected in zip(*results, strict=True):
        assert np.allclose(found, expected, rtol=tolerance, atol=tolerance)
    prepare(tmp_path)


# ---- weights files -----------------------------------------------------------------------------


def test_weights_files_are_loaded_whole_and_known_by_their_content(tmp_path):
    keras.utils.set_random_seed(5)
    expected = build_backbone(None)
    expected.save_weights(tmp_path / "tiny.weights.h5")
    shutil.copy(tmp_path / "tiny.weights.h5", tmp_path / "moved.weights.h5")
    digests = []
    for name in ("tiny", "moved"):
        settings = prepare(tmp_path, WEIGHTS=str(tmp_path / f"{name}.weights.h5"))
        backbone, weights = common.load_backbone(build_backbone, FILMS, None, settings)
        assert all(map(np.array_equal, backbone.get_weights(), expected.get_weights()))
        assert weights["origin"] == str(tmp_path / f"{name}.weights.h5")
        digests.append(weights["sha256"])
    assert digests[0] == digests[1]
    keras.utils.set_random_seed(6)
    assert common.load_backbone(build_backbone, FILMS, None, prepare(tmp_path, SEED=1))[1]["sha256"] != digests[0]


def test_wrong_weights_files_are_refused(tmp_path, backbones):
    (tmp_path / "text.weights.h5").write_text("not weights")
    build_backbone(None).save_weights(tmp_path / "tiny.weights.h5")
    backbones["vgg16"][1].save_weights(tmp_path / "vgg16.weights.h5")
    whole = (tmp_path / "vgg16.weights.h5").read_bytes()
    (tmp_path / "half.weights.h5").write_bytes(whole[: len(whole) // 2])
    for script, name in ((vgg16, "text"), (vgg16, "half"), (vgg16, "tiny"), (resnet50, "vgg16")):
        settings = prepare(tmp_path, WEIGHTS=str(tmp_path / f"{name}.weights.h5"))
        with pytest.raises(common.UserError, match=rf"^WEIGHTS: .*{name}\.weights\.h5 has no weights") as caught:
            common.load_backbone(script.build_backbone, FILMS, None, settings)
        assert "\n" not in str(caught.value)
    backbones["vgg16"][2].save(tmp_path / "notop.h5")  # the format of the files that Keras downloads
    settings = prepare(tmp_path, WEIGHTS=str(tmp_path / "notop.h5"))
    backbone, _ = common.load_backbone(vgg16.build_backbone, FILMS, None, settings)
    assert all(map(np.array_equal, backbone.get_weights(), backbones["vgg16"][1].get_weights()))


def test_only_a_warning_of_layers_without_weights_is_an_error(tmp_path, monkeypatch):
    """MobileNet warns of an undefined input_shape where it gets an input_tensor."""
    build, shape = keras.applications.MobileNet, (common.IMAGE_SIZE, common.IMAGE_SIZE, 3)
    expected = build(include_top=False, weights=None, input_shape=shape)
    file = str(tmp_path / "mobilenet.weights.h5")
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *_, **__: file)
    expected.save_weights(file)

    def build_mobilenet(weights):
        pixels = keras.applications.mobilenet.preprocess_input(keras.Input(shape))
        return build(include_top=False, weights=weights, input_tensor=pixels)

    def build_partly(weights):
        backbone = build_backbone(None)
        backbone.load_weights(file, skip_mismatch=True)
        return backbone

    settings = prepare(tmp_path, WEIGHTS="imagenet")
    with pytest.warns(UserWarning, match="input_shape"):
        backbone, weights = common.load_backbone(build_mobilenet, FILMS, None, settings)
    assert weights["pretrained"]
    assert all(map(np.array_equal, backbone.get_weights(), expected.get_weights()))
    with pytest.raises(common.UserError, match=r"^No ImageNet weights \(Skipping"):
        common.load_backbone(build_partly, FILMS.assign(path="film.png"), None, settings)


def test_weights_none_is_random_and_says_so(tmp_path, caplog):
    _, weights = common.load_backbone(build_backbone, FILMS.assign(path="film.png"), None, prepare(tmp_path))
    assert weights["origin"].startswith("random weights")
    assert weights["origin"] in caplog.text


# ---- weights that have seen the held-out patients ----------------------------------------------


# ---- downloads ---------------------------------------------------------------------------------


def test_without_a_network_real_films_stop_and_phantoms_continue_under_a_banner(tmp_path, caplog):
    settings = prepare(tmp_path, WEIGHTS="imagenet")
    with pytest.raises(common.UserError, match=r"No ImageNet weights \(URL fetch failure on https://"
                                               r"example.invalid/tiny.h5\).*set WEIGHTS to its path"):
        common.load_backbone(build_backbone, FILMS.assign(path="film.png"), None, settings)
    _, weights = common.load_backbone(build_backbone, FILMS, None, settings)
    assert "random weights" in weights["origin"]
    assert "only that the pipeline works" in weights["origin"]
    assert "*** random weights" in caplog.text
    assert "https://example.invalid/tiny.h5" in caplog.text


def test_a_mistake_in_the_script_is_no_missing_download(tmp_path):
    with pytest.raises(NameError):
        common.load_backbone(lambda weights: undefined, FILMS, None, prepare(tmp_path, WEIGHTS="imagenet"))  # noqa: F821


def test_a_network_that_swallows_packets_does_not_hang_a_run(tmp_path):
    settings = prepare(tmp_path, WEIGHTS="imagenet")
    timeouts = []

    def download(weights):
        timeouts.append(socket.getdefaulttimeout())
        return build_backbone(None)

    common.load_backbone(download, FILMS, None, settings)
    assert 0 < timeouts[0] <= 60
    assert socket.getdefaulttimeout() is None, "that of other connections is what it was"


def test_a_training_step_of_resnet50_is_repeatable(tmp_path):
    """TensorFlow reorders sums of several additions, in another way in each trace."""
    settings = prepare(tmp_path, BATCH_SIZE=4)
    films = make_films([0, 1] * 3, held_out=2)
    training, _ = common.make_datasets(make_noise(6), films, settings)

    def train():
        common.reset_keras(settings)
        backbone = resnet50.build_backbone(None)
        for number, layer in enumerate(backbone.layers):
            if isinstance(layer, keras.layers.BatchNormalization):
                rng = np.random.default_rng(number)
                layer.set_weights([rng.uniform(0.5, 1, weight.shape) for weight in layer.weights])
        network = common.fold_batch_norm(common.build_model(backbone, {"pretrained": True}, settings))
        common.compile_model(network, 2, settings)
        network.fit(training, shuffle=False, verbose=0)
        return network.get_weights()

    assert all(map(np.array_equal, train(), train()))
