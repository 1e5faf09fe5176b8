"""The table of mini-MIAS, made of small collections in the form of the real one."""
import io
import os
import runpy
import shutil
import tarfile
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY

from data import UserError

PREPARE = REPOSITORY / "data" / "mini_mias" / "prepare.py"
HEADER = b"P5\n1024 1024\n255\n"
PROSE = """\
Invented for tests. Films have names such as mdb001, and mdb001 G CIRC B 1 2 3 is no row here.
4th column: B - Benign
F CIRC B 535 425 197
"""
# Rows of Info.txt, and by hand what becomes of the film
ROWS = """\
mdb001 G CIRC B 500 400 100 > benign,mias_001,400:524:200:200
mdb002 G NORM >
mdb003 D NORM >
mdb004 D MISC M 300 600 50 > malignant,mias_002,250:374:100:100
mdb005 F CIRC B 480 130 30 >
mdb005 F CIRC B 500 170 25 > benign,mias_003,450:864:60:60|475:829:50:50
mdb007 F CIRC B > benign,mias_004,
mdb009 G CALC M *NOTE 3*  > malignant,mias_005,
mdb010 G ARCH M 20 40 60 > malignant,mias_005,0:924:80:100
mdb011 F MISC B 230 990 30 >
mdb011 F MISC M 310 540 25 > malignant,mias_006,285:459:50:50
mdb013 D CALC M *NOTE 3* >
mdb013 D CALC M 600 700 40 > malignant,mias_007,560:284:80:80
mdb015 D ASYM B 1000 1000 50 > benign,mias_008,950:0:74:74
mdb016 D SPIC M 640 500 45 > malignant,mias_008,595:479:90:90
mdb017 G SPIC B 400 500 35 > benign,mias_009,365:489:70:70
mdb019 G ASYM M 520 610 28 > malignant,mias_010,492:386:56:56
mdb021 F MISC B 455 300 64 > benign,mias_011,391:660:128:128
mdb023 F SPIC M 333 222 11 > malignant,mias_012,322:791:22:22
mdb025 D CIRC B 700 810 90 > benign,mias_013,610:124:180:180
mdb026 D NORM >
"""
INFO = "".join(row.split(">")[0] + "\n" for row in ROWS.splitlines())
TABLE = "path,label,patient_id,side,view,lesion_box\n"
for row in ROWS.splitlines():
    if "> " in row:
        label, patient, box = row.split("> ")[1].split(",")
        TABLE += f"{row[:6]}.pgm,{label},{patient},{'right' if row[5] in '13579' else 'left'},MLO,{box}\n"
GREY = {"B": 200, "M": 250}  # of a lesion


def make_mias(folder, form, compression="gz"):
    """A small mini-MIAS, as a "folder" or an "archive": noise with a disc for each circle of Info.txt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row.split() for row in INFO.splitlines()]
    for film in dict.fromkeys(row[0] for row in rows):
        rng = np.random.default_rng(int(film[3:]))
        pixels = cv2.resize(rng.uniform(40, 140, (9, 9)), (1024, 1024), interpolation=cv2.INTER_CUBIC)
        for severity, x, y, radius in (row[3:] for row in rows if row[0] == film and len(row) == 7):
            cv2.circle(pixels, (int(x), 1024 - int(y)), int(radius), GREY[severity], -1)
        (folder / f"{film}.pgm").write_bytes(HEADER + np.clip(pixels, 0, 255).astype(np.uint8).tobytes())
    (folder / "Info.txt").write_text(PROSE + INFO)
    return folder if form == "folder" else pack(folder, compression)


def pack(folder, compression="gz"):
    """Move the files of a folder into all-mias.tar in it; returns the archive."""
    archive = folder / f"all-mias.tar.{compression}"
    fast = {"compresslevel": 1} if compression == "gz" else {"preset": 0}
    with tarfile.open(archive, f"w:{compression}", **fast) as tar:
        for file in sorted({*folder.iterdir()} - {archive}):
            tar.add(file, file.name.replace("evil", "../evil"))
            file.unlink()
    return archive


def list_files(folder):
    """Every file below a folder, with its size and the time of its last change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def collections(tmp_path_factory):
    """{form: the folder or archive of a collection}, not to be changed."""
    folder = make_mias(tmp_path_factory.mktemp("mias"), "folder")
    archives = {form: pack(Path(shutil.copytree(folder, folder.with_name(form))), form) for form in ("gz", "xz")}
    return {"folder": folder, **archives}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty folder for labels.csv, and no network."""
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Path("no network").read_bytes())
    (tmp_path / "home").mkdir()
    return (tmp_path / "home").resolve()


@pytest.fixture
def prepare(home):
    """Run prepare.py for a source; returns the text of labels.csv, or the sentence with which it stops."""
    script = runpy.run_path(str(PREPARE))["prepare"]

    def run(source=""):
        before = list_files(home)
        try:
            script(source, home)
        except UserError as error:
            assert "\n" not in str(error)
            assert list_files(home) == before, "what is there stays as it is"
            return str(error)
        return (home / "labels.csv").read_text()

    return run


@pytest.mark.parametrize("form", ["folder", "gz", "xz"])
def test_every_form_gives_the_table_and_is_only_read(prepare, collections, home, form, capsys):
    source = collections[form]
    folder, place = (source, source.as_posix()) if form == "folder" else (source.parent, "films")
    before = list_files(folder)
    assert prepare(source) == prepare(source) == TABLE.replace("mdb", f"{place}/mdb")
    assert list_files(folder) == before
    assert sorted(os.listdir(home)) == ["films", "labels.csv"][form == "folder" :]
    printed = capsys.readouterr().out
    assert "18 films, 15 with a finding; 0 missing" in printed, "normal films are not needed"
    assert "no circle: mdb007 mdb009\n" in printed
    assert "outside of the breast" not in printed
    assert "{'benign': 7, 'malignant': 8, 'patients': 13}, but published were {'benign': 63, 'mal" in printed


def test_boxes_show_the_lesions(prepare, collections):
    for row in pd.read_csv(io.StringIO(prepare(collections["folder"])), keep_default_na=False).itertuples():
        film = cv2.imread(row.path, cv2.IMREAD_UNCHANGED)
        for box in filter(None, row.lesion_box.split("|")):
            x, y, width, height = map(int, box.split(":"))
            assert film[y : y + height, x : x + width].shape == (height, width), "the box lies within the film"
            assert 0 in (x, y) or film[y + height // 2, x + width // 2] == GREY[row.label[0].upper()]


def edit(old, new):
    return lambda home: (home / "Info.txt").write_text((home / "Info.txt").read_text().replace(old, new))


def write(name, content):
    return lambda home: ((home / name).unlink(missing_ok=True), (home / name).write_bytes(content))


def keep(*names):
    return lambda home: [path.unlink() for path in home.glob("mdb*") if path.stem not in names]


def rename(home):
    (home / "mdb001.pgm").rename(home / "MDB001.PGM")
    (home / "Info.txt").rename(home / "INFO.TXT")
    for name in ("mdb027.pgm.png", "mdb0011.pgm", "._mdb001.pgm", "xmdb001.pgm"):
        (home / name).touch()


FIRST, BOX = "mdb001 G CIRC B 500 400 100", "400:524:200:200"
CASES = {  # what is done to the folder, and the table or sentence that comes of it
    "capitals": (rename, TABLE.replace("mdb001.pgm", "MDB001.PGM")),
    "a byte-order mark and CRLF": (edit(PROSE, "\ufeff" + PROSE.replace("\n", "\r\n")), TABLE),
    "a circle outside": (edit(FIRST, "mdb001 G CIRC B 1200 400 100"), TABLE.replace(BOX, "")),
    "missing films": (keep("mdb002", "mdb004"), "2 films, 1 with a finding; 14 missing"),
    "normal films alone": (keep("mdb002", "mdb003"), "No films were found for labels.csv"),
    "a long header": (write("mdb004.pgm", b"P5\n# scan\n1024 1024\n255\n" + bytes(range(256)) * 4096), TABLE),
    "a film twice": (lambda home: shutil.copytree(home, home / "copy"), "are the same mammogram: remove one"),
    **{row: (edit(FIRST, row), f"Info.txt, line {PROSE.count(chr(10)) + 1}, has to look like")
       for row in ("mdb001 G CIRC X 5 4 1", "mdb001 G CIRC B 500 400", "mdb001 G CIRC B 500 -4 100", "mdb001")},
    **{f"{size} bytes": (write("mdb004.pgm", HEADER + bytes(size)), "8 bits, fetch anew: mdb004")
       for size in (0, 2**20 - 1 - len(HEADER), 2**20 + 200)},
}


@pytest.mark.parametrize("kind", CASES)
def test_odd_and_wrong_collections(prepare, collections, home, kind, capsys):
    for film in collections["folder"].glob("mdb*"):
        (home / film.name).symlink_to(film)
    shutil.copy(collections["folder"] / "Info.txt", home)
    CASES[kind][0](home)
    assert CASES[kind][1] in prepare() + capsys.readouterr().out


def test_bad_archives_and_what_is_no_source_leave_nothing(prepare, tmp_path):
    for source in (tmp_path / "nowhere", tmp_path):
        assert "holds neither films (mdb001.pgm ...) nor all-mias.tar.gz" in prepare(source)
    for content in (b"", b"<html>Not here</html>"):
        (tmp_path / "all-mias.tar.gz").write_bytes(content)
        assert "cannot be unpacked" in prepare(tmp_path)
    for names, words in (("mdb001.pgm Info.txt evil", "cannot be unpacked"), ("Info.txt", "gz holds no film"),
                         ("mdb001.pgm", "gz holds no Info.txt")):
        (folder := tmp_path / words).mkdir()
        for name in names.split():
            (folder / name).write_bytes(b"")
        assert words in prepare(pack(folder))
    assert not list(tmp_path.rglob("evil*"))


def test_the_download(prepare, collections, home, monkeypatch):
    assert "all-mias.tar.gz cannot be unpacked (" in prepare()
    content, asked = collections["gz"].read_bytes(), []

    def serve(url, timeout):
        asked.append((url, timeout))
        return io.BytesIO(content[: len(content) // 2] if len(asked) == 1 else content)

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    assert "cannot be unpacked" in prepare(), "it broke off"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare()
    assert not os.listdir(home), "nothing half unpacked is taken for complete"
    assert prepare() == prepare() == TABLE.replace("mdb", "films/mdb")
    assert asked == [("http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz", 20)] * 3, "what is there is not fetched"
    assert sorted(os.listdir(home)) == ["films", "labels.csv"]


def test_missing_films_are_listed(prepare, collections, home):
    for file in collections["folder"].iterdir():
        (home / file.name).symlink_to(file)
    (home / "mdb004.pgm").unlink()
    assert prepare() == "".join(row for row in TABLE.splitlines(keepends=True) if not row.startswith("mdb004"))
    assert (home / "missing.csv").read_text() == "path,reason\nmdb004.pgm,not in the download\n"
    (home / "mdb004.pgm").symlink_to(collections["folder"] / "mdb004.pgm")
    assert prepare() == TABLE
    assert not (home / "missing.csv").exists(), "that of the earlier run is gone"


def test_labels_are_written_whole_or_not_at_all(prepare, collections, home, monkeypatch):
    def break_off(_, path, **__):
        Path(path).write_text("path,la")
        raise OSError("no space left")

    table = prepare(collections["folder"])
    monkeypatch.setattr(pd.DataFrame, "to_csv", break_off)
    with pytest.raises(OSError, match="no space left"):
        prepare(collections["folder"])
    assert (home / "labels.csv").read_text() == table
    assert os.listdir(home) == ["labels.csv"]


@pytest.mark.parametrize(("x", "outside"), [(512, False), (230, False), (150, True), (60, True)])
def test_boxes_outside_of_the_breast_are_named(prepare, home, x, outside, capsys):
    """The breast is a disc that reaches from the right edge to column 200; the lesion is 80 pixels wide."""
    pixels = np.zeros((1024, 1024), np.uint8)
    cv2.circle(pixels, (1023, 512), 823, 150, -1)
    (home / "mdb004.pgm").write_bytes(HEADER + pixels.tobytes())
    (home / "Info.txt").write_text(f"mdb004 D MISC M {x} 512 40\n")
    prepare()
    assert ("outside of the breast, as Info.txt has it: mdb004\n" in capsys.readouterr().out) == outside
