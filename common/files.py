"""Small files that a run leaves: JSON, and a log with a JSON object a line."""
import json
import os
import tempfile
from pathlib import Path


def replace_text(file, text):
    """Write beside, then rename: a reader never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(file)


def write_json(file, value, indent=None):
    """A JSON file, whole or as it was before. ValueError: a number that JSON has no word for."""
    replace_text(file, json.dumps(value, indent=indent, allow_nan=False))


def write_json_lines(file, rows):
    """A file with a JSON object a line, whole or as it was before. ValueError: as `write_json`."""
    replace_text(file, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows))


def log_json(path, **values):
    """Append one JSON object as a line."""
    rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
    with Path(path).open("a") as file:
        print(json.dumps(rounded), file=file)


def check_writable(**files):
    """Rather than fail after hours: can these files, {flag: path}, be written? ValueError says which cannot."""
    for flag, file in files.items():
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=Path(file).parent).close()
        except OSError as error:
            raise ValueError(f"cannot write {file} (--{flag}): {error.strerror}") from None
