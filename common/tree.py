"""The files below a folder: one walk for all uses, links followed, and files that are spelt in two ways."""
import functools
import os
import unicodedata

REPORT, WORK = "shrink.jsonl", ".shrinking"     # what tools/shrink.py leaves in a copy: no videos
SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif", ".3gp"}


def list_tree(root):
    """-> the folders and the files below root, links followed, as sorted paths below it; {folder: (0, why it is not
    read)}. A link back to a folder that it lies in is left out, since it has no end; so is what tools/shrink.py adds.
    """
    folders, files, bad = [], [], {}
    waiting = [(".", [os.path.realpath(root)])]                                 # a folder, and the real ones on the way
    while waiting:
        folder, way = waiting.pop()
        try:
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as error:
            bad[folder] = 0, error.strerror
            continue
        folders.append(folder)
        for entry in entries:
            path = os.path.normpath(os.path.join(folder, entry.name))
            if not is_folder(entry):
                files.append(path)
            elif entry.name != WORK:
                real = os.path.realpath(entry.path)
                if not any(lies_in(passed, real) for passed in way):
                    waiting.append((path, [*way, real]))
    return sorted(folders), sorted(path for path in files if path != REPORT), bad


def is_folder(entry):
    """Whether an os.DirEntry is a folder or a link to one; the file system is asked about links alone."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def lies_in(path, folder):
    """Whether a real path is that of the folder, or below it."""
    return os.path.commonpath([path, folder]) == folder


def is_video(path):
    """Whether a file is one of a data set's videos, by its name ("._" begins what macOS adds)."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not os.path.basename(path).startswith("._")


def spelling(path):
    """What remains of a path where letter case, the way accents are written, Latin-1 and backslashes do not count."""
    content = os.fsencode(path)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return unicodedata.normalize("NFC", text).casefold().replace("\\", "/")


def find_files(root, paths):
    """-> {path: the file that is there}, {folder: (0, why it is not read)}, which is empty where all is found.

    Spelling is ignored where that is what it takes: UCF101's HandstandPushups is spelt two ways.
    """
    found = {path: root / path for path in paths if os.path.isfile(root / path)}
    others = [path for path in paths if path not in found]
    if not others:
        return found, {}
    _, files, bad = list_tree(root)
    there = {spelling(file): root / file for file in files if os.path.isfile(root / file)}
    found |= {path: there[spelling(path)] for path in others if spelling(path) in there}
    return found, bad


def real_files(files):
    """Where each file (Path) is, behind links -> list of str."""
    real_folder = functools.cache(os.path.realpath)                             # many files lie in few folders
    real = []
    for file in files:
        if file.is_symlink():
            real.append(os.path.realpath(file))
        else:
            real.append(os.path.join(real_folder(file.parent), file.name))
    return real


def each_once(paths, found):
    """-> the places of those paths that lead to no file of an earlier one, and the other paths; found: of find_files.
    """
    real = dict(zip(found, real_files(found.values())))
    kept, again, seen = [], [], set()
    for k, path in enumerate(paths):
        file = real.get(path, spelling(path))
        if file in seen:
            again.append(path)
        else:
            seen.add(file)
            kept.append(k)
    return kept, again


# ---- In words ----

def first(names):
    """The first of some names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def unread(root, bad):
    """What list_tree could not read, a sentence each."""
    return [f"the folder {os.path.normpath(os.path.join(root, folder))} cannot be read: {why}"
            for folder, (_, why) in bad.items()]
