"""Backbones, weights, freezing, metrics and Grad-CAM, each against a reference."""
import contextlib
import hashlib
import math
import socket
import threading
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import common
import resnet50
import vgg16

APPLICATIONS = {
    "resnet50": (keras.applications.ResNet50, keras.applications.resnet50.preprocess_input),
    "vgg16": (keras.applications.VGG16, keras.applications.vgg16.preprocess_input),
}
URL, MD5 = "https://example.invalid/weights.h5", "0" * 32


def plain_backbone(name):
    return APPLICATIONS[name][0](include_top=False, weights=None, input_shape=(224, 224, 3))


def tiny_backbone():
    """Eight layers with batch norm, which train in a moment."""
    layers = [keras.layers.Conv2D(4, 3, name="low"), keras.layers.BatchNormalization(name="low_bn"),
              keras.layers.ReLU(), keras.layers.MaxPooling2D(8), keras.layers.Conv2D(4, 3, name="high"),
              keras.layers.BatchNormalization(name="high_bn"), keras.layers.ReLU(name="last")]
    keras.utils.set_random_seed(0)
    inputs = tensor = keras.Input((224, 224, 3), name="image")
    for layer in layers:
        tensor = layer(tensor)
    return keras.Model(inputs, tensor, name="tiny")


# ---- backbone ----------------------------------------------------------------------------------


def test_the_backbone_takes_raw_images_and_preprocesses_them_as_keras_does(script):
    backbone, plain = script.build_backbone(), plain_backbone(script.__name__)
    plain.set_weights(backbone.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (2, 224, 224, 3)).astype(np.float32)
    expected = plain.predict(APPLICATIONS[script.__name__][1](images.copy()), verbose=0)
    features = backbone.predict(images, verbose=0)
    assert np.allclose(features, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("script", "fraction", "layers", "percent"),
    [  # counted on keras.applications with an independent script
        (resnet50, 0.5, 88, 90.7), (resnet50, 0.6, 105, 95.0), (resnet50, 0.7, 123, 97.1), (resnet50, 1, 175, 100),
        (vgg16, 0.5, 10, 92.2), (vgg16, 0.6, 11, 96.2), (vgg16, 0.7, 13, 98.2), (vgg16, 0.001, 1, 0),
    ],
)
def test_the_top_of_the_backbone_trains_and_the_rest_is_frozen(record, script, fraction, layers, percent):
    backbone, plain = script.build_backbone(), plain_backbone(script.__name__)
    model = common.build_model(record, backbone, True, fraction, 1e-4)
    assert len(backbone.layers) == len(plain.layers) == record["model"]["layers"]
    assert record["model"]["unfrozen_layers"] == layers
    parameters = sum(math.prod(w.shape) for layer in plain.layers[-layers:] for w in layer.weights)
    assert record["model"]["unfrozen_parameters"] == parameters
    assert round(100 * parameters / plain.count_params(), 1) == percent
    frozen = {layer.name for layer in plain.layers[1:-layers]}
    norms = {layer.name for layer in plain.layers if isinstance(layer, keras.layers.BatchNormalization)}
    trained = {weight.path.split("/")[0] for weight in model.trainable_weights}
    assert trained.isdisjoint(frozen | norms)
    weighty = {layer.name for layer in plain.layers[-layers:] if layer.weights}
    assert trained == (weighty - norms) | {"head", "logit"}


def fit_tiny(record, pretrained, fraction=1.0):
    """{layer: (weights before, weights after)} of an epoch on noise, with the learning rate of nobody."""
    backbone = tiny_backbone()
    model = common.build_model(record, backbone, pretrained, fraction, 0.01)
    before = {layer.name: layer.get_weights() for layer in backbone.layers if layer.weights}
    images = np.random.default_rng(0).uniform(0, 255, (16, 224, 224, 3)).astype(np.float32)
    model.fit(images, np.arange(16) % 2, batch_size=8, verbose=0)
    return {name: (weights, model.get_layer(name).get_weights()) for name, weights in before.items()}


def same(pair):
    return all(np.array_equal(a, b) for a, b in zip(*pair, strict=True))


def test_batch_norm_of_a_pretrained_backbone_is_untouched_by_training(record):
    weights = fit_tiny(record, pretrained=True)
    assert same(weights["low_bn"])
    assert same(weights["high_bn"])
    assert not same(weights["low"])
    assert not same(weights["high"])


def test_batch_norm_of_a_random_backbone_trains_where_it_is_unfrozen(record):
    weights = fit_tiny(record, pretrained=False, fraction=0.5)
    assert same(weights["low"])
    assert same(weights["low_bn"])
    assert not same(weights["high_bn"])


def test_the_head_and_the_layer_of_grad_cam(record, script):
    model = common.build_model(record, script.build_backbone(), True, 0.5, 1e-4)
    names = [type(layer).__name__ for layer in model.layers[-5:]]
    assert names == ["GlobalAveragePooling2D", "Dense", "Dropout", "Dense", "Activation"]
    assert model.get_layer("dropout").rate == common.DROPOUT
    maps = {"resnet50": ("conv5_block3_out", (7, 7)), "vgg16": ("block5_conv3", (14, 14))}[script.__name__]
    assert common.last_feature_maps(model) == maps[0]
    assert model.get_layer(maps[0]).output.shape[1:3] == maps[1]
    assert model.output_shape == (None, 1)


# ---- weights -----------------------------------------------------------------------------------


def test_weights_files_are_loaded_whole(record, tmp_path):
    plain = plain_backbone("vgg16")
    plain.save_weights(tmp_path / "plain.weights.h5")
    keras.utils.set_random_seed(99)
    backbone = vgg16.build_backbone()
    assert common.load_weights(record, backbone, str(tmp_path / "plain.weights.h5"), URL, MD5)
    for loaded, expected in zip(backbone.get_weights(), plain.get_weights(), strict=True):
        assert np.array_equal(loaded, expected)
    sha256 = hashlib.sha256((tmp_path / "plain.weights.h5").read_bytes()).hexdigest()
    assert record["weights"] == {"origin": str(tmp_path / "plain.weights.h5"), "sha256": sha256}
    assert record["note"] == ""


def test_wrong_weights_files_are_refused(record, tmp_path):
    (tmp_path / "text.weights.h5").write_text("not weights")
    vgg16.build_backbone().save_weights(tmp_path / "vgg16.weights.h5")
    whole = (tmp_path / "vgg16.weights.h5").read_bytes()
    (tmp_path / "cut.weights.h5").write_bytes(whole[: len(whole) // 2])
    for name in ("text", "vgg16", "cut"):
        with pytest.raises(common.UserError, match=rf"WEIGHTS: .*{name}\.weights\.h5 holds no resnet50"):
            common.load_weights(record, resnet50.build_backbone(), tmp_path / f"{name}.weights.h5", URL, MD5)
    tiny_backbone().save_weights(tmp_path / "tiny.weights.h5")
    ignoring = tiny_backbone()
    ignoring.load_weights = lambda file: None
    with pytest.raises(common.UserError, match="leaves layers without weights"):
        common.load_weights(record, ignoring, tmp_path / "tiny.weights.h5", URL, MD5)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise Exception(f"URL fetch failure on {URL}: None -- [Errno -2] Name or service not known")

    monkeypatch.setattr(keras.utils, "get_file", fail)


def test_without_a_network_real_data_stops_and_phantoms_go_on_under_a_banner(record, no_network, capsys):
    with pytest.raises(common.UserError, match=rf"{URL}.*WEIGHTS"):
        common.load_weights(record, tiny_backbone(), "imagenet", URL, MD5)
    record["note"] = "synthetic phantoms"
    assert not common.load_weights(record, tiny_backbone(), "imagenet", URL, MD5)
    assert "random weights" in record["note"]
    assert "only that the pipeline works" in record["note"]
    assert "*** random weights" in capsys.readouterr().out


def test_a_foreign_file_in_the_cache_is_named_and_kept(record, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    cached = tmp_path / "models" / "weights.h5"
    cached.parent.mkdir()
    cached.write_text("mine")
    record["note"] = "synthetic phantoms"
    with pytest.raises(common.UserError, match=str(cached)):
        common.load_weights(record, tiny_backbone(), "imagenet", URL, MD5)
    assert cached.read_text() == "mine"


@pytest.fixture
def serve():
    """A server on this machine that answers with the bytes it is given, or with nothing at all."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def answer(content):
            def wait():
                with contextlib.suppress(OSError):
                    while True:
                        client = stack.enter_context(server.accept()[0])
                        client.recv(10_000)
                        if content:
                            client.sendall(content)
                            client.close()

            threading.Thread(target=wait, daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}/weights.h5"

        yield answer


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "timed out"), (b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\nhalf", "got only 4 out of 1000"),
     (b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nelse", "does not match"), (b"HTTP/1.0 404 No\r\n\r\n", "No")],
    ids=["swallows packets", "breaks off", "another file", "not there"],
)
def test_a_download_that_fails_leaves_nothing(record, monkeypatch, tmp_path, serve, content, words):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    patience = []
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(common.socket, "setdefaulttimeout", lambda s: (patience.append(s), set_timeout(1)))
    try:
        with pytest.raises(common.UserError, match=rf"cannot be downloaded \(.*{words}.*set WEIGHTS to the path"):
            common.load_weights(record, tiny_backbone(), "imagenet", serve(content), MD5)
    finally:
        set_timeout(None)
    assert patience == [20]
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_a_download_is_kept_once_it_is_whole(monkeypatch, tmp_path, serve):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = serve(b"HTTP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nfile")
    md5 = hashlib.md5(b"file").hexdigest()
    path, reason = common.fetch_imagenet(url, md5)
    assert (path, reason) == (tmp_path / "home" / "models" / "weights.h5", "")
    assert path.read_bytes() == b"file"
    assert common.fetch_imagenet("http://nowhere.invalid/weights.h5", md5) == (path, "")


def test_weights_none_is_random_and_says_so(record):
    assert not common.load_weights(record, tiny_backbone(), None, URL, MD5)
    assert record["note"] == "random weights, not pretrained"
    assert record["weights"]["sha256"] is None


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("learning_rate", [1e38, 1e20])
def test_training_that_diverges_stops_with_a_sentence(record, learning_rate, tmp_path):
    model = common.build_model(record, tiny_backbone(), False, 1.0, learning_rate)
    images = np.random.default_rng(0).uniform(0, 255, (4, 224, 224, 3)).astype(np.float32)
    dataset = tf.data.Dataset.from_tensors((images, np.array([0, 1, 0, 1])))
    with pytest.raises(common.UserError, match=r"left the finite numbers.*LEARNING_RATE"):
        common.train(record, model, lambda first: dataset.repeat(5), dataset, 1, 5, tmp_path / "new")
    assert list(tmp_path.iterdir()) == [], "nothing to go on from"


def test_a_batch_that_does_not_fit_into_memory_is_a_sentence(record, tmp_path):
    model = common.build_model(record, tiny_backbone(), False, 1.0, 1e-4)
    huge = tf.data.Dataset.from_tensors(2**24).map(  # 10 TB
        lambda n: (tf.random.uniform([n, 224, 224, 3]), tf.random.uniform([n])))
    with pytest.raises(common.UserError, match=r"memory of CPU, \d+ cores is too small .* lower BATCH_SIZE"):
        common.train(record, model, lambda first: huge, huge, 1, 1, tmp_path / "new")


def test_a_gpu_that_tensorflow_cannot_use_is_said(monkeypatch, tmp_path, capsys):
    constants = vars(resnet50) | {"OUTPUT_DIR": str(tmp_path)}
    common.start(constants)
    assert "GPU" not in capsys.readouterr().out
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    record = common.start(constants)
    assert "TensorFlow sees it after pip install 'tensorflow[and-cuda]'" in capsys.readouterr().out
    assert record["device"].startswith("CPU")


# ---- Grad-CAM ----------------------------------------------------------------------------------


def two_channel_net(bias=0.0, gain=1.0):
    """Feature maps are red / 255 and green / 255; the logit is gain * (2 mean(red) - 3 mean(green)) + bias."""
    inputs = keras.Input((4, 4, 3))
    kernel = np.zeros((1, 1, 3, 2), np.float32)
    kernel[0, 0, 0, 0] = kernel[0, 0, 1, 1] = 1 / 255
    maps = keras.layers.Conv2D(2, 1, use_bias=False, name="maps")
    logit = keras.layers.Dense(1, name="logit")
    tensor = logit(keras.layers.GlobalAveragePooling2D()(maps(inputs)))
    model = keras.Model(inputs, keras.layers.Activation("sigmoid")(tensor))
    maps.set_weights([kernel])
    logit.set_weights([gain * np.array([[2.0], [-3.0]], np.float32), np.array([bias], np.float32)])
    return model


@pytest.fixture
def red_and_green():
    image = np.zeros((1, 4, 4, 3), np.float32)
    image[0, 0, 0, 0], image[0, 1, 1, 0] = 255, 127.5  # red: evidence for malignant
    image[0, 3, 3, 1], image[0, 1, 1, 1] = 255, 51  # green: evidence for benign
    return image


@pytest.mark.parametrize("gain", [1.0, 1000.0])  # with the second, the sigmoid is saturated
def test_gradcam_known_by_hand(red_and_green, gain):
    malignant = np.zeros((4, 4))
    malignant[0, 0], malignant[1, 1] = 1, (2 * 0.5 - 3 * 0.2) / 2
    benign = np.zeros((4, 4))
    benign[3, 3] = 1
    for bias, expected in ((10 * gain, malignant), (-10 * gain, benign)):
        cam = common.make_gradcam(two_channel_net(bias, gain), "maps", red_and_green, np.array([bias > 0]))
        assert np.allclose(cam[0], expected, atol=1e-5)


def test_gradcam_without_positive_evidence_is_zero_and_said(red_and_green):
    red_and_green[..., 0] = 0  # nothing malignant, yet called so
    cam = common.make_gradcam(two_channel_net(bias=10), "maps", red_and_green, np.array([True]))
    assert np.array_equal(cam, np.zeros((1, 4, 4)))
    axes = common.Figure().subplots()
    case = SimpleNamespace(image=np.full((224, 224), 9, np.uint8), cam=cam[0], boxes=np.empty((0, 4)))
    common.draw_case(axes, case, heat=True)
    assert [text.get_text() for text in axes.texts] == ["no positive evidence"]


def test_the_surest_cases_of_every_outcome_are_shown():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"label": rng.choice(common.CLASSES, 60), "probability": rng.random(60)})
    table["predicted"] = np.where(table["probability"] >= 0.5, "malignant", "benign")
    cases = common.select_cases(table)
    for outcome, label in (("true_positive", "malignant"), ("false_positive", "benign"),
                           ("true_negative", "benign"), ("false_negative", "malignant")):
        called = "malignant" if outcome.endswith("positive") else "benign"
        group = table[(table["label"] == label) & (table["predicted"] == called)]
        expected = sorted(group["probability"], key=lambda p: -abs(p - 0.5))[:4]
        assert cases.loc[cases["outcome"] == outcome, "probability"].tolist() == expected


def test_the_shown_cases_carry_their_own_image_map_and_boxes(record):
    rng = np.random.default_rng(0)
    inputs = keras.Input((224, 224, 3))
    maps = keras.layers.Conv2D(3, 32, strides=32, activation="relu", name="maps")(inputs / 255)
    logit = keras.layers.Dense(1, name="logit")(keras.layers.GlobalAveragePooling2D()(maps))
    model = keras.Model(inputs, keras.layers.Activation("sigmoid")(logit))
    images = rng.integers(0, 256, (30, 224, 224), np.uint8)
    films = pd.DataFrame({"lesion_box": [f"{n}:0:10:10" for n in range(30)]})
    films[common.CUT] = 0, 0, 100, 50
    held_out = np.arange(5, 30)  # the places in the table are not the places in the validation side
    predictions = pd.DataFrame({"label": rng.choice(common.CLASSES, 25), "probability": rng.random(25)}, held_out)
    predictions["predicted"] = np.take(common.CLASSES, predictions["probability"] >= 0.5)
    metrics = {}
    cases = common.explain(record, model, images, films, predictions, metrics)
    for index, case in zip(cases.index, cases.itertuples(), strict=True):
        assert np.array_equal(case.image, images[index])
        pixels = np.repeat(images[index][None, ..., None], 3, axis=-1).astype(np.float32)
        cam = common.make_gradcam(model, "maps", pixels, np.array([case.predicted == "malignant"]))[0]
        assert np.allclose(case.cam, cam, atol=1e-4)
        assert case.boxes.tolist() == [[index / 100, 0, 0.1, 0.2]]
    assert metrics["pointing_game"]["images"]["images"] == 25
