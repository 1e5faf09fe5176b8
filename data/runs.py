"""The files of a finished run, read back: its settings, tables and arrays.

A run folder may be damaged, or come from another person or version. So each reader names what it uses: the values
of a JSON file, the columns of a table or the shape of an array. A UserError names the file and what is missing or
wrong in it.
"""
import contextlib
import json
import os
import re
import sys
from numbers import Real
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from data import CLASSES, UserError, list_some, quote

REMEDY = "copy the folder of the run again, or delete it and run its script again"
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # which a console obeys, or UTF-8 does not have


def is_number(value, kind=Real, low=-sys.float_info.max, high=sys.float_info.max):
    """Whether a value is a finite number within limits, of a kind: numbers.Real or numbers.Integral."""
    return isinstance(value, kind) and not is_bool(value) and low <= value <= high


def is_text(value):
    """Whether a value is a line of text that may be printed."""
    return isinstance(value, str) and len(value) <= 5000 and not CONTROLS.search(value)


def is_bool(value):
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_cell(value):
    """Whether a value fits into a cell of a table."""
    return value is None or is_bool(value) or is_number(value) or is_text(value)


def is_list_of(value, is_valid):
    """Whether a value is a list with an item at least, all of which are valid."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_valid, value))


def is_dict_of(value, is_valid):
    """Whether a value is a dict from names to what is valid."""
    return isinstance(value, dict) and all(map(is_text, value)) and all(map(is_valid, value.values()))


def is_folder_name(value):
    """Whether a value names a folder beside another one: no path leads out of their place."""
    return is_text(value) and value not in ("", ".", "..") and not re.search(r"[/\\:]", value)


def check(content, shape, file, above=""):
    """Raise UserError unless the content of a JSON file has the values that are used, each of them valid.

    shape: a dict from the name of each value to another such dict, or to a function that says whether it is valid.
    """
    for name, part in shape.items():
        place = f"{above}{name}"
        if not isinstance(content, dict) or name not in content:
            raise UserError(f"{file} has no value for {place}: {REMEDY}.")
        if isinstance(part, dict):
            check(content[name], part, file, f"{place}, ")
        elif not part(content[name]):
            raise UserError(f"{file} has {quote(content[name])} for {place}, which no run writes: {REMEDY}.")


@contextlib.contextmanager
def explain_damage(file):
    """Turn whatever the reading of a file of a run leads to into a UserError."""
    if not os.path.isfile(file):  # a pipe would never end
        raise UserError(f"{file} is missing, or is no file: {REMEDY}.")
    if not os.access(file, os.R_OK):
        raise UserError(f"{file} may not be read: get the right to read it.")
    try:
        yield
    except Exception as error:  # each library has its own for bytes that it does not expect
        raise UserError(f"{file} is damaged, or of another version: {REMEDY}.") from error


def read_json(file, shape):
    """The content of a JSON file of a run, which has to be of a shape: see check. Raises UserError."""
    with explain_damage(file):
        content = json.loads(Path(file).read_bytes())
    check(content, shape, file)
    return content


def is_metric(value):
    """Whether a value is a metric, which may be undefined."""
    return value is None or is_number(value)


def is_interval(value):
    """Whether a value is an interval: two numbers."""
    return is_list_of(value, is_number) and len(value) == 2


def read_results(file):
    """The metrics.json of a result, whose metrics and intervals are checked. Raises UserError."""
    results = read_json(file, {
        "side": lambda v: v in ("validation", "test", "all folds"),
        "ci95": lambda v: is_dict_of(v, is_interval),
    })
    check(results, dict.fromkeys(results["ci95"], is_metric), file)
    if "baseline" in results:  # older versions have none
        check(results["baseline"], {"auc": is_metric, "ci95": {"auc": is_interval}}, file, "baseline, ")
    return results


def read_table(file, columns):
    """A CSV file of a run, all str, which has to have rows and these columns. Raises UserError."""
    with explain_damage(file):  # the header is a row, too: a longer row is an error
        cells = pd.read_csv(file, header=None, dtype=str, na_filter=False)
        table = cells[1:].set_axis(cells.loc[0].tolist(), axis=1).reset_index(drop=True)
    if not {*columns} <= {*table} or not table.columns.is_unique:
        raise UserError(f"{file} needs the columns {list_some(columns)}, and none twice: {REMEDY}.")
    if table.empty:
        raise UserError(f"{file} has no rows: {REMEDY}.")
    return table


def read_predictions(file):
    """The predictions.csv of a result, with float probabilities. Raises UserError."""
    table = read_table(file, ["path", "label", "probability"])
    with explain_damage(file):
        table["probability"] = table["probability"].astype(float)
        if "logit" in table:  # older versions have none; it tells apart what is 1 in nine digits
            table["logit"] = table["logit"].astype(float)
            table["probability"] = special.expit(table["logit"])
    valid = table["label"].isin(CLASSES) & table["probability"].between(0, 1) & ~table["path"].duplicated()
    if not valid.all():
        raise UserError(f"{file}: {(~valid).sum()} rows repeat a mammogram, or lack a class or a probability:"
                        f" {REMEDY}.")
    return table


def read_array(file, dtype, shape):
    """A NumPy file of a run, which has to hold finite numbers in this shape; None: any size. Raises UserError."""
    with explain_damage(file):
        array = np.load(file, allow_pickle=False)
        fits = array.dtype == dtype and array.ndim == len(shape) and np.isfinite(array).all()
    if not fits or any(wanted not in (None, size) for wanted, size in zip(shape, array.shape, strict=True)):
        raise UserError(f"{file} does not fit split.csv or predictions.csv beside it: {REMEDY}.")
    return array
