"""What dirty folders, tables and files are answered with: one sentence each, before training."""
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import cv2
import hypothesis
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, find
from hypothesis import strategies as st
from PIL import Image

import common


@pytest.fixture
def smooth():
    """A smooth 8-bit film of 60 x 40 pixels that spans the grey scale."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 40)).astype(np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX)


# ---- files -------------------------------------------------------------------------------------


def make_bomb(side):
    """A PNG of side x side black pixels of one bit, which takes little room."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 1)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def save(path, image, **options):
    Image.fromarray(image).save(path, **options)


def save_as(mode, path, image, **options):
    Image.fromarray(image).convert(mode).save(path, **options)


def truncate(path, image):
    save(path, image)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD = {  # what is written, its name, and the sentence
    "empty": ("a.png", lambda path, image: path.write_bytes(b""), "an empty file"),
    "text": ("a.png", lambda path, image: path.write_text("film"), "not an image that OpenCV can read"),
    "truncated PNG": ("a.png", truncate, "or one that is cut off"),
    "truncated JPEG": ("a.jpg", truncate, "or one that is cut off"),
    "truncated TIFF": ("a.tif", truncate, "or one that is cut off"),
    "bomb": ("a.png", lambda path, image: path.write_bytes(make_bomb(60_000)), "more than 67,108,864 pixels"),
    "1 x 1": ("a.png", lambda path, image: save(path, image[:1, :1]), "1 x 1 pixels, too small"),
    "all black": ("a.png", lambda path, image: save(path, image * 0), "all its pixels are equal"),
    "NaN": ("a.tif", lambda path, image: save(path, np.where(image > 99, np.nan, image).astype(np.float32)),
            "its pixels are float32; save it with 8 or 16 bits"),
    "CMYK TIFF": ("a.tif", lambda path, image: save_as("CMYK", path, image), "four channels, which may be CMYK"),
    "pages": ("a.tif", lambda path, image: save(path, image, save_all=True,
                                                append_images=[Image.fromarray(image)] * 2),
              "a TIFF of 3 pages; save the one that is the film"),
    "nowhere": ("a.png", lambda path, image: path.symlink_to("nothing.png"), "a link that leads nowhere"),
    "loop": ("a.png", lambda path, image: path.symlink_to("a.png"), "a link that leads nowhere"),
    "pipe": ("a.png", lambda path, image: os.mkfifo(path), "no file: a pipe"),
    "huge": ("a.png", lambda path, image: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**31), "too large"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_have_their_sentence(record, film, smooth, tmp_path, kind):
    name, write, words = BAD[kind]
    for label in common.CLASSES:
        film(tmp_path / label / "good.png")
    write(tmp_path / "benign" / name, smooth)
    with pytest.raises(common.UserError) as caught:
        common.read_images(record, find(record, tmp_path))
    assert str(caught.value).startswith("1 of 3 images cannot be used; mend or remove them (all are in ")
    assert f"\n  benign/{name}: " in str(caught.value)
    assert words in str(caught.value)


GOOD = {  # readable, if odd; and how far grey values may be off
    "CMYK JPEG": ("a.jpg", lambda path, image: save_as("CMYK", path, image, quality=95), 6),
    "palette": ("a.png", lambda path, image: save_as("P", path, image), 1),
    "palette BMP": ("a.bmp", lambda path, image: save_as("P", path, image), 1),
    "grey with alpha": ("a.png", lambda path, image: save_as("LA", path, image), 1),
    "12 in 16 bits": ("a.png", lambda path, image: cv2.imwrite(str(path), image.astype(np.uint16) * 16), 2),
    "a suffix in capitals": ("A.PNG", save, 1),
    "another suffix": ("a.bmp", lambda path, image: save(path, image, format="PNG"), 1),
    "spaces and quotes": ("a 'b' \"c\".png", save, 1),
    "a newline": ("a\nb.png", save, 1),
    "a comma": ("a,b.png", save, 1),
    "emoji": ("\N{SMILING FACE WITH SUNGLASSES} film.png", save, 1),
    "markup": ("<img src=x onerror=alert(1)>.png", save, 1),
    "250 characters": ("x" * 246 + ".png", save, 1),
    "a linked file": ("a.png", lambda path, image: (save(path.with_name(".real.png"), image),
                                                    path.symlink_to(".real.png")), 1),
}


@pytest.mark.parametrize("kind", GOOD)
def test_odd_but_good_files_are_read(record, film, smooth, tmp_path, kind):
    name, write, most = GOOD[kind]
    for label in common.CLASSES:
        film(tmp_path / label / "good.png")
    write(tmp_path / "benign" / name, smooth)
    for _ in range(2):  # read, then from the cache
        films, images, prints = common.read_images(record, find(record, tmp_path))
        (row,) = films.index[films["path"] == f"benign/{name}"]
        expected = cv2.resize(smooth, (224, 224), interpolation=cv2.INTER_AREA)
        assert np.abs(images[row].astype(int) - expected).max() <= most
    common.group_copies(record, films, prints)


def test_one_bit_is_black_and_white(smooth, tmp_path):
    for suffix in ("png", "tif", "bmp"):
        save_as("1", tmp_path / f"a.{suffix}", smooth)
        grey, depth, _ = common.read_film(tmp_path / f"a.{suffix}")
        assert set(np.unique(grey)) == {0, 255}
        assert depth == 8


def test_all_bad_files_are_in_a_file_and_twenty_are_shown(record, film, tmp_path):
    for label in common.CLASSES:
        film(tmp_path / "data" / label / "good.png")
    for number in range(30):
        (tmp_path / "data" / "benign" / f"{number:02d}\n.png").write_text("no film")
    with pytest.raises(common.UserError) as caught:
        common.read_images(record, find(record, tmp_path / "data"))
    assert len(str(caught.value).splitlines()) == 22
    assert "... and 10 more" in str(caught.value)
    listing = common.locate(record["constants"]["OUTPUT_DIR"]) / "bad_images.csv"
    bad = pd.read_csv(listing)
    assert bad["path"].tolist() == [f"benign/{number:02d}\n.png" for number in range(30)]
    assert bad["reason"].str.startswith("not an image").all()
    for path in (tmp_path / "data" / "benign").glob("*\n.png"):
        path.unlink()
    common.read_images(record, find(record, tmp_path / "data"))
    assert not listing.exists()


@pytest.mark.parametrize(("name", "shown"), [(b"\xff.png", r".udcff.png"), (b"a\rb.png", r"a.rb.png")])
def test_names_that_no_table_can_hold_are_refused(record, film, tmp_path, name, shown):
    for label in common.CLASSES:
        film(tmp_path / label / "good.png")
    os.rename(tmp_path / "benign" / "good.png", os.fsencode(tmp_path / "benign") + b"/" + name)
    words = rf"1 names are not in UTF-8 or hold a carriage return; rename them: \n  'benign/{shown}'"
    with pytest.raises(common.UserError, match=words):
        find(record, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="rights work otherwise there")
@pytest.mark.parametrize(("what", "words"), [("film", "benign/good.png: Permission denied"),
                                             ("folder", "benign cannot be opened (Permission denied)")])
def test_what_may_not_be_read_is_said(film, tmp_path, what, words):
    """In a process of its own, as root may read everything until it becomes somebody else."""
    for label in common.CLASSES:
        film(tmp_path / label / "good.png")
    tmp_path.chmod(0o777)
    (tmp_path / "benign" / ("good.png" if what == "film" else "")).chmod(0)
    code = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import common, resnet50
constants = vars(resnet50) | dict(DATA_DIR={str(tmp_path)!r}, OUTPUT_DIR={str(tmp_path / "out")!r})
common.start(constants | dict(OUTPUT_DIR={str(tmp_path / "warm")!r}))  # what is imported late has to be readable
for folder in reversed({[str(parent) for parent in tmp_path.parents][:-2]!r}):
    os.chmod(folder, 0o777)
os.geteuid() or os.setuid(65534)
def main():
    record = common.start(constants)
    common.read_images(record, common.find_images(record, constants["DATA_DIR"]))
common.run(main)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stderr
    assert words in process.stderr
    assert "Traceback" not in process.stderr


# ---- tables ------------------------------------------------------------------------------------


@pytest.fixture
def table_of(record, film, tmp_path):
    """Read a labels.csv of these bytes beside a.png and b.png."""

    def read(content):
        for name in ("a.png", "b.png", "deep/c.png"):
            film(tmp_path / name)
        (tmp_path / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        return find(record, tmp_path)

    return read


@pytest.mark.parametrize(
    "content",
    ["path,label\na.png,Benign \nb.png,MALIGNANT\n", "\ufeffpath,label\na.png,benign\nb.png,malignant\n",
     "path;label\na.png;benign\nb.png;malignant\n", "path\tlabel\na.png\tbenign\nb.png\tmalignant\n",
     "path,label\r\na.png,benign\r\nb.png,malignant\r\n", "Label, Path \nbenign,a.png\nmalignant,b.png\n",
     "path,label\n.\\a.png,benign\ndeep\\c.png,malignant\n",
     "path,label\n{0}/a.png,benign\n{0}/b.png,malignant\n"],
    ids=["spaces and capitals", "byte-order mark", "semicolons", "tabs", "CRLF", "another order", "Windows",
         "absolute"],
)
def test_tables_that_are_accepted(table_of, tmp_path, content):
    assert table_of(content.format(tmp_path))["label"].tolist() == ["benign", "malignant"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,Label,label\na.png,benign,benign\n", "two columns of one name"),
        ("path,label,lesion_box\na.png,benign,1:1:12345678901:5\nb.png,malignant,\n", "lesion_box other than"),
        ("file,class\na.png,benign\n", "has no column path and no column label; it has file, class"),
        ("path,label\na.png,benign\nb.png,malign\n", "label has to be benign or malignant, but there is 'malign'"),
        ("path,label\na.png,0\nb.png,1\n", "label holds 0 and 1; replace them by benign and malignant"),
        ("path,label\na.png,\nb.png,malignant\n", "but there is ''"),
        ("path,label\n,benign\nb.png,malignant\n", "1 paths name no file"),
        ("path,label\n../x.png,benign\nb.png,malignant\n", r"climb out of the folder of the table: \n  ../x.png"),
        ("path,label\na.png,benign\na.png,malignant\n", r"contradict each other: \n  a.png"),
        ("path,label\n\x00,benign\nb.png,malignant\n", "name no file"),
        ("path,label\n" + "x" * 5000 + ",benign\nb.png,malignant\n", "name no file"),
        (b"path,label\n\xff.png,benign\n", "cannot be read as comma-separated values in UTF-8"),
        ("", "cannot be read as comma-separated values"),
        ("path,label\na.png,benign,too,many\nb.png,malignant\n", "cannot be read as comma-separated values"),
        ('path,label\n"a.png,benign\n', "cannot be read as comma-separated values|has to be"),
    ],
)
def test_tables_that_are_refused(table_of, content, words):
    with pytest.raises(common.UserError, match=words):
        table_of(content)


def test_200_000_rows_are_read_in_seconds(record, film, tmp_path):
    for number in range(100):
        film(tmp_path / f"{number}.png")
    rows = (f"{number % 100}.png,{common.CLASSES[number % 2]},p{number % 100}" for number in range(200_000))
    (tmp_path / "labels.csv").write_text("path,label,patient_id\n" + "\n".join(rows))
    started = time.perf_counter()
    assert len(find(record, tmp_path)) == 100
    assert time.perf_counter() - started < 60, "a guard against hours, no measurement"


def test_a_patient_of_both_classes_is_allowed_and_said(record, capsys):
    films = pd.DataFrame({"patient_id": [f"p{n // 2}" for n in range(24)], "split": "", "group": ""})
    films["group"], films["label"] = films["patient_id"], np.take(common.CLASSES, np.arange(24) % 2)
    common.split_patients(record, films, 0, 0)
    assert "12 have benign and malignant images; all of them stay on one side" in capsys.readouterr().out


# ---- properties --------------------------------------------------------------------------------

CELLS = st.sampled_from(["", "a.png", "b.png", "./a.png", "../a.png", "/", "benign", "malignant", "Benign ", "0",
                         "1", "train", "validation", "1:2:3:4", "1:2:3:4|5:6:7:8", "1:2:0:4", '"', "\ufeff",
                         "\x00", "\r"])
COLUMNS = ["path", "label", "patient_id", "split", "lesion_box"]
ROWS = st.tuples(st.sampled_from(["a.png", "./a.png"]), st.sampled_from(["benign", "Benign "]),
                 st.text("ab", max_size=2), st.just(""), st.sampled_from(["", "1:2:3:4"]))
TABLES = st.one_of(
    st.lists(ROWS, min_size=1, max_size=3).map(
        lambda rows: "\n".join(map(",".join, [COLUMNS, *rows, ("b.png", "malignant", "c", "", "")])).encode()),
    st.binary(max_size=300),
    st.text(max_size=300).map(str.encode),
    st.lists(st.lists(CELLS | st.text(max_size=8), min_size=1, max_size=6), max_size=8).map(
        lambda rows: "\n".join(map(",".join, [COLUMNS, *rows])).encode(errors="surrogatepass")),
)
OFTEN = hypothesis.settings(max_examples=150, deadline=None, derandomize=True,
                            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])


@OFTEN
@hypothesis.given(content=TABLES)
def test_any_table_is_read_or_refused(record, film, tmp_path, content):
    for name in ("a.png", "b.png"):
        if not (tmp_path / name).exists():
            film(tmp_path / name)
    (tmp_path / "labels.csv").write_bytes(content)
    try:
        table = find(record, tmp_path)
    except common.UserError:
        return
    assert set(table["label"]) == set(common.CLASSES)
    assert set(table["split"]) <= {"", "train", "validation"}
    assert all((tmp_path / path).is_file() for path in table["path"])
    hypothesis.event("read")


def write_samples(folder, smooth):
    """One small valid file of each format; returns their bytes by suffix."""
    for suffix in (".png", ".jpg", ".tif", ".pgm", ".bmp"):
        cv2.imwrite(str(folder / f"sample{suffix}"), smooth)
    cv2.imwrite(str(folder / "deep.png"), smooth.astype(np.uint16) * 257)
    import pydicom.data

    dicoms = [pydicom.data.get_testdata_file(name, download=False)
              for name in ("MR_small.dcm", "JPEG2000.dcm", "MR_small_RLE.dcm", "CT_small.dcm")]
    samples = {path.suffix: path.read_bytes() for path in folder.iterdir()}
    return [*samples.items(), *((".dcm", open(path, "rb").read()) for path in dicoms if path)]


@OFTEN
@hypothesis.given(data=st.data())
def test_any_mutated_image_is_read_or_refused(smooth, tmp_path, data):
    if not (samples := getattr(test_any_mutated_image_is_read_or_refused, "samples", None)):
        (tmp_path / "samples").mkdir()
        samples = write_samples(tmp_path / "samples", smooth)
        test_any_mutated_image_is_read_or_refused.samples = samples
    suffix, content = data.draw(st.sampled_from(samples))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):  # headers are where it hurts
        place = data.draw(st.integers(0, min(len(content), 400) - 1) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    (tmp_path / f"film{suffix}").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with common.muted_stderr():
            image, cut, words, prints = common.read_image(tmp_path / f"film{suffix}", "breast")
    except common.UserError as error:
        assert str(error)
    else:
        assert (image.shape, image.dtype, prints.shape) == ((224, 224), np.uint8, (2, common.RINGS, common.WAVES))
        assert len(cut) == 4
        assert words
        assert np.isfinite(prints).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6, "kB"
