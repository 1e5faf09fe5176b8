"""Backbones, weights, freezing, metrics and Grad-CAM, each against a reference."""
import contextlib
import hashlib
import json
import math
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import REPOSITORY

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


def test_a_step_is_traced_once_though_the_last_batch_is_smaller(record, tmp_path):
    _, _, training, validation, steps = feed_noise(record, 4)
    model = common.build_model(record, tiny_backbone(), True, 1.0, 1e-4)
    traces, train_step, test_step = [], model.train_step, model.test_step
    model.train_step = lambda data: traces.append("train") or train_step(data)
    model.test_step = lambda data: traces.append("test") or test_step(data)
    common.train(record, model, training, validation, 2, steps, tmp_path / "new")
    assert traces == ["train", "test"]


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
        _, cams = common.make_classifier(two_channel_net(bias, gain))(red_and_green)
        assert np.allclose(cams[0], expected, atol=1e-5)


def test_gradcam_without_positive_evidence_is_zero_and_said(red_and_green):
    red_and_green[..., 0] = 0  # nothing malignant, yet called so
    cam = common.make_classifier(two_channel_net(bias=10))(red_and_green)[1].numpy()
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
    images = rng.integers(0, 256, (30, 224, 224), np.uint8)
    films = pd.DataFrame({"lesion_box": [f"{n}:0:10:10" for n in range(30)]})
    films[common.CUT] = 0, 0, 100, 50
    held_out = np.arange(5, 30)  # the places in the table are not the places in the validation side
    predictions = pd.DataFrame({"label": rng.choice(common.CLASSES, 25), "probability": rng.random(25)}, held_out)
    predictions["predicted"] = np.take(common.CLASSES, predictions["probability"] >= 0.5)
    maps = rng.random((25, 7, 7), np.float32)
    cases = common.explain(record, images, films, predictions, maps, {})
    assert len(cases) == 16
    for index, case in zip(cases.index, cases.itertuples(), strict=True):
        assert np.array_equal(case.image, images[index])
        assert np.array_equal(case.cam, maps[index - 5])
        assert np.allclose(case.boxes, [[index / 100, 0, 0.1, 0.2]])


# ---- the classifier, several devices, 16-bit floats --------------------------------------------


def feed_noise(record, batch_size, held_out=9):
    """feed() of 26 images to train on and some held out; and the table and the images."""
    images = np.random.default_rng(0).integers(0, 256, (26 + held_out, 224, 224), np.uint8)
    films = pd.DataFrame({"path": [f"{n:02d}.png" for n in range(len(images))], "patient_id": "", "group": range(
        len(images)), "label": np.resize(common.CLASSES, len(images)), "split": "train", "lesion_box": ""})
    films.loc[26:, "split"] = "validation"
    record["patients"] = "patients"
    return films, images, *common.feed(record, images, films, 2, batch_size, 0)


def test_one_pass_gives_what_predict_gives_and_explains_each_image(record):
    films, images, _, validation, _ = feed_noise(record, 4)
    model = common.build_model(record, tiny_backbone(), True, 1.0, 1e-4)
    predictions, maps, metrics, _ = common.evaluate(record, model, validation, films)
    pixels = np.repeat(images[26:, ..., None], 3, axis=-1).astype(np.float32)
    assert np.allclose(predictions["probability"], model.predict(pixels, verbose=0)[:, 0], atol=1e-6)
    assert metrics["validation_images"] == len(maps) == 9
    for one, expected in zip(pixels, maps, strict=True):
        assert np.allclose(common.make_classifier(model)(one[None])[1][0], expected, atol=1e-4)


TWO_DEVICES = """if True:
    import json, sys
    import numpy as np
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    sys.path[:0] = ["tests"]
    import conftest, common, pathlib, tempfile, resnet50, test_model
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    place = pathlib.Path(folder.name)
    record = common.start(vars(resnet50) | {"OUTPUT_DIR": str(place)})
    common.DROPOUT = 0.0  # every device draws its own
    devices, batch_size, epochs = json.loads(sys.argv[1])
    common.spread(devices)
    films, images, training, validation, steps = test_model.feed_noise(record, batch_size)
    model = common.build_model(record, test_model.tiny_backbone(), True, 1.0, 1e-2)
    (place / "run").mkdir()
    common.train(record, model, training, validation, epochs[0], steps, place / "run")
    if epochs[1:]:  # once more from its state
        model = common.build_model(record, test_model.tiny_backbone(), True, 1.0, 1e-2)
        history = common.train(record, model, training, validation, epochs[1], steps, place / "run")
        predictions, *_ = common.evaluate(record, model, validation, films)
        print(json.dumps([history.to_numpy().tolist(), predictions["probability"].tolist(),
                          record["batch"], record["model"]["devices"]]))
"""


def test_two_devices_share_a_batch_of_13_and_learn_what_one_learns():
    """26 draws: two batches of 13 on one device, on two of 14 and 12 and, to be full, 2 of them again."""
    found = []
    for devices, batch_size in ((["CPU:0", "CPU:1"], 13), (["CPU:0", "CPU:1"], 2), (["CPU:0"], 2)):
        process = subprocess.run([sys.executable, "-c", TWO_DEVICES, json.dumps([devices, batch_size, [1, 2]])],
                                 cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        assert "continuing  at epoch 2 of 2" in process.stdout
        found.append(json.loads(process.stdout.splitlines()[-1]))
    assert [result[2:] for result in found] == [[14, 2], [2, 2], [2, 1]]
    assert len(found[0][1]) == 9, "padded, and cut off again"
    assert np.allclose(found[1][0], found[2][0], atol=1e-4), "loss and accuracy of both sides"
    assert np.allclose(found[1][1], found[2][1], atol=1e-4), "probabilities"
    start, end = np.array(found[2][0])[:, 1]
    assert abs(start - end) > 1e-3, "it learned something"


def test_mixed_precision_keeps_weights_probabilities_and_metrics_in_32_bits(tmp_path):
    constants = vars(resnet50) | {"OUTPUT_DIR": str(tmp_path), "MIXED_PRECISION": True}
    try:
        record = common.start(constants)
        films, _, training, validation, steps = feed_noise(record, 13)
        model = common.build_model(record, tiny_backbone(), True, 1.0, 1e-3)
        assert (record["model"]["floats"], record["model"]["xla"]) == ("mixed_float16", True)
        assert {weight.dtype for weight in model.weights} == {"float32"}
        assert model.get_layer("high").compute_dtype == "float16"
        assert model.output.dtype == "float32"
        (tmp_path / "run").mkdir()
        common.train(record, model, training, validation, 1, steps, tmp_path / "run")
        first = common.evaluate(record, model, validation, films)[0]
        again = common.build_model(record, tiny_backbone(), True, 1.0, 1e-3)
        common.train(record, again, training, validation, 1, steps, tmp_path / "run")
        assert first.equals(common.evaluate(record, again, validation, films)[0]), "from its state"
        assert "after the last epoch of 1" in record["continued"]
        assert len(common.state_of(again)) > 2 * len(again.trainable_variables) + len(again.variables)
    finally:
        record = common.start(constants | {"MIXED_PRECISION": "auto"})
    assert keras.config.dtype_policy().name == "float32", "the processor has no tensor cores"


@pytest.mark.parametrize(("capabilities", "floats"), [
    ([(7, 0)], "mixed_float16"), ([(6, 1)], "float32"), ([(8, 6), (6, 1)], "float32"), ([], "float32")])
def test_auto_is_on_where_all_gpus_have_tensor_cores(monkeypatch, tmp_path, capabilities, floats):
    gpus = [SimpleNamespace(capability=capability) for capability in capabilities]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: {
        "device_name": "GPU", "compute_capability": gpu.capability})
    try:
        common.start(vars(resnet50) | {"OUTPUT_DIR": str(tmp_path)})
        assert keras.config.dtype_policy().name == floats
    finally:
        keras.config.set_dtype_policy("float32")
