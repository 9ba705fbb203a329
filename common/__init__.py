"""What the stages share: no loss, no sampling, no architecture."""
import json
import os
from pathlib import Path


class UserError(Exception):
    """An error the user can fix: printed as one sentence, without a traceback."""


def write_text(file, text, errors="surrogateescape"):
    """Write UTF-8 to a temporary file, then rename: a reader never sees half a file."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f"{file.name}.{os.getpid()}")
    tmp.write_text(text, "utf-8", errors)
    tmp.replace(file)


def write_json(file, *rows, indent=None):
    """Write one JSON value after another, names as they are; bytes that are not UTF-8 escaped."""
    lines = [json.dumps(row, indent=indent, ensure_ascii=False, allow_nan=False) for row in rows]
    write_text(file, "".join(f"{line}\n" for line in lines), "backslashreplace")
