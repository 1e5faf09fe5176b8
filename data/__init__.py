"""Mammograms and results without networks: nothing in this package knows Keras, TensorFlow or common.py.

- films.py: which mammograms there are, and whose: files and folders become one table
- labels.py: labels.csv, as it is written and checked
- patients.py: whose film it is, by all sources
- names.py: what names and ids tell
- reading.py: one file to a 224 x 224 image
- dicom.py: one DICOM file to grey values
- duplicates.py: which films show the same picture
- splits.py: which films are in the training, validation and test set, and which a model was trained on
- runs.py: the files of a finished run, read and checked
- results/: metrics, baseline, figures, files, summary, comparison
- preparing.py: what the prepare.py of public collections (in the other folders) share
"""
import contextlib
import logging
import os
import reprlib
import secrets

CLASSES = ("benign", "malignant")  # 0 and 1 wherever a number stands for the label
MAX_PIXELS = 2**26  # 8192 x 8192: no film has more, and a small file may claim to
os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)  # OpenCV reads these two when it is imported
os.environ["OPENCV_LOG_LEVEL"] = "SILENT"
MAX_SENTENCE = 20_000  # characters of a UserError: a file may hold a name of any length
log = logging.getLogger("mammograms")  # what was found, guessed, converted or excluded; common.py prints it
shortener = reprlib.Repr()
shortener.maxstring = shortener.maxother = 200  # characters of a quoted value


class UserError(Exception):
    """Something that the user can fix: one sentence with what is wrong, where, and what to change."""

    def __init__(self, sentence):
        if len(sentence) > MAX_SENTENCE:
            half = MAX_SENTENCE // 2
            sentence = f"{sentence[:half]} ... {sentence[-half:]}"
        super().__init__(sentence)

    def _render_traceback_(self):
        """The sentence alone, where IPython, Jupyter or Spyder would show a traceback."""
        return [str(self)]


def quote(value):
    """A value as one writes it in Python, for a sentence: in one line, without its middle where it is long."""
    return shortener.repr(value)


def list_some(items):
    """The first 20 items in one line, quoted and shortened, and how many more there are."""
    more = f" and {len(items) - 20} more" if len(items) > 20 else ""
    return ", ".join(map(quote, items[:20])) + more


def warn(problem, items):
    """Warn with the number of items, the problem, and the first of them, if there are any."""
    if len(items):
        log.warning("%d %s: %s", len(items), problem, list_some([*items]))


def cut_name(name, size=100):
    """The start of a file name, at most `size` bytes of UTF-8. File systems allow 255."""
    return name.encode("utf-8", "ignore")[:size].decode("utf-8", "ignore")


@contextlib.contextmanager
def replace(file):
    """A temporary path. At the end it replaces `file`, so that no process reads an incomplete file."""
    temporary = file.with_name(f".{secrets.token_hex(8)}{file.suffix}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def explain_write_errors(place):
    """Turn an OSError while something is written, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror or 'the disk may be full'}): free space, get"
                        " the right to write, or choose another OUTPUT_DIR, and run the command again.") from error
