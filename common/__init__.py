"""What the stages share: no loss, no sampling, no architecture."""
import os
from pathlib import Path


class UserError(Exception):
    """An error the user can fix: printed as one sentence, without a traceback."""


def write_text(file, text):
    """Write a temporary file, then rename: a reader never sees half a file."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f"{file.name}.{os.getpid()}")
    tmp.write_text(text)
    tmp.replace(file)
