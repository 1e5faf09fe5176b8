"""The table of mini-MIAS, made of small collections in the form of the real one."""
import hashlib
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

import common

PREPARE = common.HERE / "data" / "mini_mias" / "prepare.py"
HEADER = b"P5\n1024 1024\n255\n"
PROSE = """\
                 A COLLECTION OF FILMS
Invented for tests. Films have names such as mdb001, and mdb001 G CIRC B 1 2 3 is no row here.

2nd column: F, G or D
4th column: B - Benign
            M - Malignant
5th, 6th columns: the centre, with the origin in the bottom-left corner
=================================================================
F CIRC B 535 425 197

"""
ROWS = """\
mdb001 G CIRC B 500 400 100
mdb002 G NORM \n\
mdb003 D NORM \n\
mdb004 D MISC M 300 600 50
mdb005 F CIRC B 480 130 30
mdb005 F CIRC B 500 170 25
mdb006 F NORM \n\
mdb007 F CIRC B
mdb008 F NORM \n\
mdb009 G CALC M *NOTE 3* \n\
mdb010 G ARCH M 20 40 60
mdb011 F MISC B 230 990 30
mdb011 F MISC M 310 540 25
mdb012 F NORM \n\
mdb013 D CALC M *NOTE 3*
mdb013 D CALC M 600 700 40
mdb014 D NORM \n\
mdb015 D ASYM B 1000 1000 50
mdb016 D SPIC M 640 500 45
mdb017 G SPIC B 400 500 35
mdb018 G NORM \n\
mdb019 G ASYM M 520 610 28
mdb020 G NORM \n\
mdb021 F MISC B 455 300 64
mdb022 F NORM \n\
mdb023 F SPIC M 333 222 11
mdb024 F NORM \n\
mdb025 D CIRC B 700 810 90
mdb026 D NORM \n\
"""
TABLE = """\
path,label,patient_id,lesion_box
mdb001.pgm,benign,mias_001,400:524:200:200
mdb004.pgm,malignant,mias_002,250:374:100:100
mdb005.pgm,benign,mias_003,450:864:60:60|475:829:50:50
mdb007.pgm,benign,mias_004,
mdb009.pgm,malignant,mias_005,
mdb010.pgm,malignant,mias_005,0:924:80:100
mdb011.pgm,malignant,mias_006,285:459:50:50
mdb013.pgm,malignant,mias_007,560:284:80:80
mdb015.pgm,benign,mias_008,950:0:74:74
mdb016.pgm,malignant,mias_008,595:479:90:90
mdb017.pgm,benign,mias_009,365:489:70:70
mdb019.pgm,malignant,mias_010,492:386:56:56
mdb021.pgm,benign,mias_011,391:660:128:128
mdb023.pgm,malignant,mias_012,322:791:22:22
mdb025.pgm,benign,mias_013,610:124:180:180
"""
WHOLE = {"films": 26, "benign": 7, "malignant": 8, "patients": 13}


def make_mias(folder, form, seed=0):
    """A small mini-MIAS: 26 films of smooth noise of 13 patients, and Info.txt; its folder, or its archive.

    form: "folder" or "archive". 7 benign films of 7 patients and 8 malignant ones of 7 (one has one of each),
    with a disc where Info.txt has a circle, a brighter one where it is malignant.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row.split() for row in ROWS.splitlines()]
    for film in dict.fromkeys(row[0] for row in rows):
        rng = np.random.default_rng((seed, int(film[3:])))
        pixels = cv2.resize(rng.uniform(40, 140, (9, 9)), (1024, 1024), interpolation=cv2.INTER_CUBIC)
        for name, _, _, severity, *circle in (row for row in rows if len(row) == 7):
            if name == film:
                x, y, radius = map(int, circle)
                cv2.circle(pixels, (x, 1024 - y), radius, 200 if severity == "B" else 250, -1)
        (folder / f"{film}.pgm").write_bytes(HEADER + np.clip(pixels, 0, 255).astype(np.uint8).tobytes())
    (folder / "Info.txt").write_text(PROSE + ROWS)
    (folder / "README").write_text("For tests.\n")
    if form == "folder":
        return folder
    archive = folder / "all-mias.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for file in (*sorted(folder.glob("mdb*.pgm")), folder / "Info.txt", folder / "README"):
            tar.add(file, file.name)
            file.unlink()
    return archive


def pack(archive, members):
    """A tar.gz of names and bytes; a name and a str is a symbolic link to it, None a folder."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            else:
                member.type, member.linkname = (tarfile.SYMTYPE if content else tarfile.DIRTYPE), content or ""
            tar.addfile(member, io.BytesIO(content if isinstance(content, bytes) else b""))
    return archive


def list_files(folder):
    """Every file below a folder, with its bytes and the time of its last change."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


class Home:
    """data/mini_mias of a checkout of its own, and its prepare.py."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.labels, self.archive = folder / "labels.csv", folder / "all-mias.tar.gz"
        folder.mkdir(parents=True)
        shutil.copy(PREPARE, folder)

    def whole(self):
        """Take the small collection for the whole one."""
        source = re.sub(r"(?m)^WHOLE = \{.*?\}", f"WHOLE = {WHOLE}", PREPARE.read_text())
        assert str(WHOLE) in source
        (self.folder / "prepare.py").write_text(source)

    def run(self, *arguments):
        """Run the command; what it prints."""
        self.monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments)])
        self.capsys.readouterr()
        runpy.run_path(str(self.folder / "prepare.py"), run_name="__main__")
        return self.capsys.readouterr().out

    def fail(self, *arguments):
        """Run the command, which has to stop; its sentence."""
        with pytest.raises(SystemExit) as stop:
            self.run(*arguments)
        assert isinstance(stop.value.code, str)
        assert len(stop.value.code.strip().splitlines()) == 1
        return stop.value.code

    def left(self):
        """What lies in the folder beside prepare.py."""
        return sorted(path.name for path in self.folder.iterdir() if path.name != "prepare.py")


@pytest.fixture
def home(tmp_path, monkeypatch, capsys):
    def forbidden(*_, **__):
        raise AssertionError("no test may reach for the network")

    monkeypatch.setattr(urllib.request, "urlopen", forbidden)
    return Home((tmp_path / "checkout" / "data" / "mini_mias").resolve(), monkeypatch, capsys)


@pytest.fixture
def serve(monkeypatch):
    """Answer the download with some bytes; `size` is what the server says that they are."""

    def answer(content, size=None):
        def urlopen(url, timeout):
            assert (url, timeout) == ("http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz", 20)
            response = io.BytesIO(content)
            response.headers = {"Content-Length": str(len(content) if size is None else size)} if size != 0 else {}
            return response

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    return answer


# ---- the table ---------------------------------------------------------------------------------


def test_a_folder_elsewhere_is_only_read(home, tmp_path):
    elsewhere = make_mias(tmp_path / "films of mine", "folder")
    before = list_files(elsewhere)
    said = home.run(elsewhere)
    assert home.labels.read_text() == TABLE.replace("mdb", f"{elsewhere.resolve().as_posix()}/mdb")
    assert list_files(elsewhere) == before
    assert home.left() == ["labels.csv"]
    assert "normal films, left out: 11" in said
    assert "no circle for it: mdb007, mdb009\n" in said
    assert "labels.csv: 7 benign and 8 malignant films of 13 patients" in said


def test_an_archive_is_unpacked_beside_the_table(home, tmp_path):
    archive = make_mias(tmp_path / "downloads", "archive")
    before = list_files(archive.parent)
    said = home.run(archive)
    assert home.labels.read_text() == TABLE.replace("mdb", "films/mdb")
    assert list_files(archive.parent) == before
    assert home.left() == ["all-mias.tar.gz.sha256", "films", "labels.csv"]
    assert len(list((home.folder / "films").iterdir())) == 26 + 1
    assert "28 files" in said and "no plain .pgm or .txt file: README" in said


@pytest.mark.parametrize("form, prefix", [("folder", ""), ("archive", "films/")])
def test_without_argument_it_takes_what_is_there(home, form, prefix):
    make_mias(home.folder, form)
    home.run()
    assert home.labels.read_text() == TABLE.replace("mdb", f"{prefix}mdb")


def test_a_folder_unpacked_by_hand_with_its_archive_beside_it(home, tmp_path):
    make_mias(home.folder / "all-mias", "folder")
    shutil.copy(make_mias(tmp_path, "archive"), home.folder)
    home.run()
    assert home.labels.read_text() == TABLE.replace("mdb", "all-mias/mdb")
    assert not (home.folder / "films").exists()
    assert "is in its way" not in home.run()


def test_relative_paths_on_the_command_line(home, tmp_path, monkeypatch):
    make_mias(tmp_path / "films", "folder")
    monkeypatch.chdir(tmp_path)
    home.run("films")
    assert home.labels.read_text() == TABLE.replace("mdb", f"{(tmp_path / 'films').resolve().as_posix()}/mdb")


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_again_it_writes_the_same_bytes(home, tmp_path, form):
    source = make_mias(tmp_path / "source", form)
    home.run(source)
    first = list_files(home.folder)
    home.labels.unlink()
    home.run(source)
    second = list_files(home.folder)
    assert {path: content for path, (content, _) in first.items()} == {
        path: content for path, (content, _) in second.items()}
    films = [path for path in first if path.suffix == ".pgm"]
    assert all(first[path] == second[path] for path in films), "what is unpacked is not unpacked again"


def test_the_scripts_read_the_table(home, record):
    make_mias(home.folder, "folder")
    home.run()
    table = common.find_images(record, str(home.folder))
    assert table["label"].value_counts().to_dict() == {"malignant": 8, "benign": 7}
    assert table["patient_id"].nunique() == 13
    assert record["patients"] == "patients"
    for row in table.itertuples():
        film = cv2.imread(str(home.folder / row.path), cv2.IMREAD_UNCHANGED)
        for box in filter(None, row.lesion_box.split("|")):
            x, y, width, height = map(int, box.split(":"))
            inside = film[y:y + height, x:x + width]
            assert inside.shape == (height, width), "the box lies within the film"
            corner = x == 0 or y == 0
            middle = film[y + height // 2, x + width // 2]
            assert corner or middle == {"benign": 200, "malignant": 250}[row.label], "and shows the lesion"


def test_file_names_in_any_case_and_other_files(home):
    make_mias(home.folder, "folder")
    (home.folder / "mdb001.pgm").rename(home.folder / "MDB001.PGM")
    (home.folder / "Info.txt").rename(home.folder / "INFO.TXT")
    for name in ("mdb027.pgm.png", "mdb0011.pgm", "._mdb001.pgm", "mdb028.png", "xmdb001.pgm"):
        (home.folder / name).write_bytes(b"no film")
    home.run()
    assert home.labels.read_text() == TABLE.replace("mdb001.pgm", "MDB001.PGM")


def test_a_film_that_is_there_twice(home):
    make_mias(home.folder, "folder")
    (home.folder / "copy").mkdir()
    shutil.copy(home.folder / "mdb004.pgm", home.folder / "copy")
    assert re.search(r"mdb004\.pgm and \S+mdb004\.pgm are the same film", home.fail())


def test_info_beside_the_films_goes_before_one_above_them(home, tmp_path):
    films = make_mias(tmp_path / "top" / "all-mias", "folder")
    (tmp_path / "top" / "Info.txt").write_text("mdb004 D NORM\n")
    home.run(tmp_path / "top")
    assert "mdb004.pgm,malignant" in home.labels.read_text()
    (films / "Info.txt").unlink()
    (tmp_path / "top" / "Info.txt").write_text("mdb004 D CIRC B 300 600 50\r\n")
    home.run(tmp_path / "top")
    assert pd.read_csv(home.labels)["lesion_box"].tolist() == ["250:374:100:100"]


@pytest.mark.parametrize("row", ["mdb001 G CIRC X 500 400 100", "mdb001 G CIRC B 500 400", "mdb001 G CIRC",
                                 "mdb001 G CIRC B 500 -4 100", "mdb001", "mdb001 X NORM"])
def test_a_row_that_cannot_be_read(home, row):
    make_mias(home.folder, "folder")
    (home.folder / "Info.txt").write_text(PROSE + ROWS.replace("mdb001 G CIRC B 500 400 100", row))
    line = PROSE.count("\n") + 1
    assert f"Info.txt, line {line}, has to look like" in home.fail()


def test_a_circle_outside_of_the_film_is_no_box(home):
    make_mias(home.folder, "folder")
    rows = ROWS.replace("B 500 400 100", "B 1200 400 100").replace("M 300 600 50", "M 300 600 0")
    (home.folder / "Info.txt").write_text(PROSE + rows)
    home.run()
    table = pd.read_csv(home.labels, keep_default_na=False, index_col="path")
    assert table["lesion_box"][["mdb001.pgm", "mdb004.pgm"]].tolist() == ["", ""]


# ---- what there is of the collection -----------------------------------------------------------


def test_the_whole_collection(home):
    """322 black films that take no room, in the numbers of the real Info.txt."""
    findings = [*range(1, 216, 2), *range(2, 16, 2)]  # one film of each of 108 patients, both of seven
    rows = [f"mdb{film:03d} G NORM" for film in range(1, 323)]
    for number, film in enumerate(findings):
        rows[film - 1] = f"mdb{film:03d} G CIRC {'B' if number < 63 else 'M'} 500 500 50"
    (home.folder / "Info.txt").write_text(PROSE + "\n".join(rows))
    for film in range(1, 323):
        path = home.folder / f"mdb{film:03d}.pgm"
        path.write_bytes(HEADER)
        os.truncate(path, len(HEADER) + 2**20)
    said = home.run()
    assert said.splitlines() == ["normal films, left out: 207", "the whole collection: 63 benign and 52 malignant"
                                 " films of 108 patients"]
    (home.folder / "mdb322.pgm").unlink()
    said = home.run()
    assert f"missing in {home.folder}: 1 of 322 films: mdb322\n" in said
    assert "the whole collection" not in said
    (home.folder / "Info.txt").write_text("\n".join(rows[:-1]))
    said = home.run()
    assert "Info.txt lists {'films': 321, 'benign': 63, 'malignant': 52, 'patients': 108}, but that" in said
    assert "the whole collection:" not in said


def test_missing_films_are_named_and_left_out(home):
    make_mias(home.folder, "folder")
    kept = ["mdb004.pgm", "mdb005.pgm", "mdb006.pgm"]
    for path in home.folder.glob("*.pgm"):
        if path.name not in kept:
            path.unlink()
    said = home.run()
    assert pd.read_csv(home.labels)["path"].tolist() == ["mdb004.pgm", "mdb005.pgm"]
    first = ["mdb001", "mdb002", "mdb003", *(f"mdb{film:03d}" for film in range(7, 24))]
    assert f": 23 of 26 films: {', '.join(first)} and 3 more\n" in said
    assert "normal films, left out: 1\n" in said
    assert "labels.csv: 1 benign and 1 malignant films of 2 patients" in said


def test_nothing_to_go_by(home, tmp_path):
    elsewhere = make_mias(tmp_path / "films", "folder")
    assert "does not exist" in home.fail(tmp_path / "nowhere")
    (elsewhere / "Info.txt").rename(tmp_path / "Info.txt")
    assert f"{elsewhere} holds no Info.txt" in home.fail(elsewhere)
    for path in elsewhere.glob("*.pgm"):
        path.unlink()
    assert "holds neither films (mdb001.pgm ...) nor all-mias.tar.gz" in home.fail(elsewhere)
    assert "Pass one folder or archive" in home.fail(elsewhere, elsewhere)
    assert home.left() == []


def test_normal_films_alone(home):
    make_mias(home.folder, "folder")
    for path in home.folder.glob("*.pgm"):
        if path.name not in ("mdb002.pgm", "mdb003.pgm"):
            path.unlink()
    assert "none of the films that have a benign or malignant finding" in home.fail()
    assert not home.labels.exists()


@pytest.mark.parametrize("content", [
    HEADER + bytes(2**20 - 1), HEADER + bytes(2**20 + 1), b"", b"P5\n1024 1024\n65535\n" + bytes(2**20),
    b"P5\n512 2048\n255\n" + bytes(2**20)], ids=["too short", "too long", "empty", "16 bits", "512 x 2048"])
def test_films_of_another_size(home, content):
    make_mias(home.folder, "folder")
    for film in ("mdb004", "mdb006"):
        (home.folder / f"{film}.pgm").write_bytes(content)
    assert home.fail().endswith("1024 x 1024 pixels of 8 bits, fetch anew: mdb004, mdb006")
    assert not home.labels.exists()


def test_a_comment_in_the_header_of_a_film(home):
    make_mias(home.folder, "folder")
    (home.folder / "mdb004.pgm").write_bytes(b"P5\n# made by hand\n1024 1024\n255\n" + bytes(2**20))
    home.run()
    assert home.labels.read_text() == TABLE


def test_a_table_stays_whole_when_writing_breaks_off(home, monkeypatch):
    make_mias(home.folder, "folder")
    home.run()

    def break_off(_, path, **__):
        Path(path).write_text("path,la")
        raise OSError("No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", break_off)
    assert home.fail() == "labels.csv could not be made: No space left on device"
    assert home.labels.read_text() == TABLE


# ---- archives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../mdb001.pgm", "../../evil.pgm", "all-mias/../../evil.txt", "{}/evil.pgm"])
def test_an_archive_that_climbs_out(home, tmp_path, name):
    name = name.format(tmp_path.as_posix())
    films = [(f"mdb{film:03d}.pgm", HEADER + bytes(2**20)) for film in (1, 4)]
    archive = pack(tmp_path / "all.tar.gz", [("Info.txt", ROWS.encode()), *films, (name, b"evil")])
    before = list_files(tmp_path)
    assert f"is refused: {name} in it would land outside" in home.fail(archive)
    assert list_files(tmp_path) == before
    assert home.left() == []


def test_links_are_not_unpacked(home, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mdb005.pgm").write_bytes(HEADER + bytes(2**20))
    film = HEADER + bytes(2**20)
    archive = pack(tmp_path / "all.tar.gz", [
        ("all-mias", None), ("all-mias/Info.txt", ROWS.encode()), ("all-mias/mdb001.pgm", film),
        ("all-mias/mdb005.pgm", str(outside / "mdb005.pgm")), ("all-mias/way", str(outside)),
        ("all-mias/way/mdb004.pgm", film)])
    before = list_files(outside)
    said = home.run(archive)
    assert "no plain .pgm or .txt file: all-mias/mdb005.pgm, all-mias/way\n" in said
    assert list_files(outside) == before
    assert {path.name for path in (home.folder / "films").iterdir()} == {"Info.txt", "mdb001.pgm", "mdb004.pgm"}
    assert not any(path.is_symlink() for path in home.folder.rglob("*"))
    assert pd.read_csv(home.labels)["path"].tolist() == ["films/mdb001.pgm", "films/mdb004.pgm"]


@pytest.mark.parametrize("damage", [lambda content: content[:len(content) // 2], lambda content: content[:-4],
                                    lambda content: content[:-8] + bytes(4) + content[-4:],
                                    lambda content: b"<html>Not here</html>", lambda content: b""],
                         ids=["half", "without its end", "another checksum", "a page", "empty"])
def test_damaged_archives(home, tmp_path, damage):
    archive = make_mias(tmp_path / "downloads", "archive")
    archive.write_bytes(damage(archive.read_bytes()))
    assert re.search(r"all-mias\.tar\.gz cannot be unpacked \(.+\): fetch it anew", home.fail(archive))
    assert home.left() == []


@pytest.mark.parametrize("members, sentence", [
    ([("Info.txt", ROWS.encode())], r"all-mias\.tar\.gz holds no film"),
    ([("mdb001.pgm", HEADER + bytes(2**20))], r"all-mias\.tar\.gz holds no Info\.txt"),
    ([("Info.txt", ROWS.encode()), ("mdb001.pgm", b"cut short")], "fetch anew: mdb001"),
    ([("a/mdb001.pgm", b"one"), ("b/mdb001.pgm", b"another")], "cannot be unpacked .*exists"),
], ids=["no film", "no Info.txt", "a film cut short", "a film twice"])
def test_archives_of_something_else(home, tmp_path, members, sentence):
    assert re.search(sentence, home.fail(pack(tmp_path / "all-mias.tar.gz", members)))
    assert home.left() == []


def test_interrupted_unpacking_is_not_taken_for_complete(home, monkeypatch):
    make_mias(home.folder, "archive")
    copy, copied = shutil.copyfileobj, []

    def interrupt(source, target):
        if len(copied) == 5:
            raise KeyboardInterrupt
        copied.append(copy(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            home.run()
    assert home.left() == ["all-mias.tar.gz"]
    (home.folder / "films.part").mkdir()  # as a power cut leaves it
    (home.folder / "films.part" / "mdb001.pgm").write_bytes(b"half")
    (home.folder / "films.part" / "mdb099.pgm").write_bytes(b"half")
    home.run()
    assert home.labels.read_text() == TABLE.replace("mdb", "films/mdb")
    assert home.left() == ["all-mias.tar.gz", "all-mias.tar.gz.sha256", "films", "labels.csv"]
    assert not (home.folder / "films" / "mdb099.pgm").exists()


def test_another_archive_is_refused(home, tmp_path):
    first, second = (make_mias(tmp_path / name, "archive", seed) for seed, name in enumerate(("first", "second")))
    home.run(first)
    digest = hashlib.sha256(first.read_bytes()).hexdigest()
    assert (home.folder / "all-mias.tar.gz.sha256").read_text() == f"{digest}  all-mias.tar.gz\n"
    shutil.copy(second, home.folder)
    before = list_files(home.folder)
    for arguments in ([second], []):
        assert hashlib.sha256(second.read_bytes()).hexdigest() in home.fail(*arguments)
    shutil.rmtree(home.folder / "films")
    assert "if you trust the new one" in home.fail()
    assert not (home.folder / "films").exists()
    (home.folder / "all-mias.tar.gz.sha256").unlink()
    home.run()
    film = home.folder / "films" / "mdb001.pgm"
    assert film.read_bytes() != before[film][0]


def test_films_that_are_in_the_way_of_an_archive_stay(home, tmp_path):
    archive = make_mias(tmp_path / "downloads", "archive")
    (home.folder / "films").mkdir()
    (home.folder / "films" / "mine.txt").write_text("mine")
    assert "is in its way" in home.fail(archive)
    assert (home.folder / "films" / "mine.txt").read_text() == "mine"


# ---- the download ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 0], ids=["of known size", "of unknown size"])
def test_the_download(home, tmp_path, serve, size):
    home.whole()
    content = make_mias(tmp_path, "archive").read_bytes()
    serve(content, size)
    said = home.run()
    assert home.labels.read_text() == TABLE.replace("mdb", "films/mdb")
    assert home.archive.read_bytes() == content
    assert home.left() == ["all-mias.tar.gz", "all-mias.tar.gz.sha256", "films", "labels.csv"]
    assert re.search(r"downloading http://\S+: \d+ of (\d+|\?) MB", said)
    assert "the whole collection: 7 benign and 8 malignant films of 13 patients" in said
    serve(b"not again")
    home.run()
    assert home.labels.read_text() == TABLE.replace("mdb", "films/mdb")


@pytest.mark.parametrize("error", [urllib.error.URLError("Name or service not known"), TimeoutError("timed out"),
                                   urllib.error.HTTPError("http://", 404, "Not Found", {}, None)])
def test_without_network(home, monkeypatch, error):
    def urlopen(*_, **__):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    said = home.fail()
    assert re.search(r"cannot be downloaded \((Name or service not known|timed out|Not Found)\)", said)
    assert said.endswith("python data/mini_mias/prepare.py PATH")
    assert home.left() == []


def test_a_download_that_breaks_off(home, tmp_path, serve):
    content = make_mias(tmp_path, "archive").read_bytes()
    half = len(content) // 2
    serve(content[:half], size=len(content))
    assert f"it broke off after {half} of {len(content)} bytes" in home.fail()
    assert home.left() == []
    serve(content[:half], size=0)  # the server does not say how much it will be
    assert "cannot be unpacked" in home.fail()
    assert home.left() == []


def test_a_download_that_is_not_the_whole_collection(home, tmp_path, serve):
    serve(make_mias(tmp_path, "archive").read_bytes())
    assert "no longer the whole collection, with 0 films missing and Info.txt on {'films': 26" in home.fail()
    assert home.left() == []
    home.whole()
    film = HEADER + bytes(2**20)
    members = [("Info.txt", ROWS.encode()), *((f"mdb{number:03d}.pgm", film) for number in range(2, 27))]
    serve(pack(tmp_path / "all-mias.tar.gz", members).read_bytes())
    assert "collection, with 1 films missing" in home.fail()
    assert home.left() == []


def test_it_starts_without_tensorflow(home):
    """Which takes ten seconds, for nothing."""
    code = f"import runpy, sys; runpy.run_path({str(PREPARE)!r}); sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=common.HERE, timeout=120).returncode == 0
