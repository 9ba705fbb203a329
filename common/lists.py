"""What the official lists of each data set say, a function each, or the folders of one's own videos."""
import codecs
import json
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from common.tree import first, is_video, list_tree, spelling, unread


class Row(NamedTuple):
    """A video as a list names it."""
    path: str                                   # below root
    name: str | None                            # of its class
    where: str                                  # it is named: file and line


class Listed(NamedTuple):
    """What the lists of a data set say, whatever files are there."""
    title: str
    root: Path
    rows: list
    classes: list                               # names, by number; empty: no labels
    source: str                                 # of the classes, in words
    notes: list                                 # what one should know, a sentence each


# ---- A function a data set: its name, root, folder of the lists, number of the split, "train" or "test" -> Listed ----

def ucf101(dataset, root, annotations, split, part):
    """UCF101's lists, and the toy set's. A video's class is the folder that it lies in."""
    (file,) = find_lists(dataset, root, annotations, "ucfTrainTestlist", f"{part}list{split:02d}.txt")
    class_file = file.with_name("classInd.txt")
    classes = [line[1] for line, _ in read_lines(class_file, r"\d+[\s,;]+(.+)", "a number and the name of a class")]
    rows = []
    for line, where in read_lines(file, r"(.*[/\\].*\.\w+)([\s,;]+\d+)?", "CLASS/FILE.avi, with a number or without"):
        path = below_root(line[1], root, classes)
        rows.append(Row(path, path.split("/")[0], where))
    return Listed(f"{dataset} {part} split {split}", root, rows, classes, f"the list of classes {class_file}", [])


def hmdb51(dataset, root, annotations, split, part):
    """HMDB51's lists, a file a class: the name of a video and what it is for, 1 training, 2 test, 0 neither."""
    ending = f"_test_split{split}.txt"
    files = find_lists(dataset, root, annotations, "testTrainMulti_7030_splits", f"*{ending}")
    classes = [file.name.removesuffix(ending) for file in files]
    use = {"train": "1", "test": "2"}[part]
    rows = []
    for name, file in zip(classes, files):
        for line, where in read_lines(file, r"(.+?)[\s,;]+([012])", "FILE.avi and a number: 0, 1 or 2"):
            if line[2] == use:
                path = below_root(line[1], root, classes).removeprefix(f"{name}/")
                rows.append(Row(f"{name}/{path}", name, where))
    return Listed(f"{dataset} {part} split {split}", root, rows, classes, "the names of the lists", [])


def diving48(dataset, root, annotations, split, part):
    """Diving48's list of labels V2, or V1 (diving48v1). Classes are numbers; of 30 there is no video in V2."""
    version = "_V2" if dataset == "diving48" else ""
    (file,) = find_lists(dataset, root, annotations, ".", f"Diving48{version}_{part}.json")
    expected = "objects with vid_name and label"
    text = read_text(file)
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not a list of {expected}: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} is not a list of {expected}, but {entries!r:.100}")
    rows = []
    for n, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not entry.keys() >= {"vid_name", "label"}:
            raise ValueError(f"{file}, entry {n}: {entry!r:.100} is not understood; expected are {expected}")
        rows.append(Row(f"{entry['vid_name']}.mp4", str(entry["label"]), f"{file}, entry {n}"))
    if (root / "rgb").is_dir():
        root = root / "rgb"
    classes = [str(k) for k in range(48)]
    return Listed(f"{dataset} {part} split {split}", root, rows, classes, "the list of 48 classes, 0 to 47,", [])


def own_folder(dataset, root, annotations, split, part):
    """DATA/train/CLASS/FILE and DATA/val (or test)/CLASS/FILE, as torchvision's ImageFolder and Kinetics have them,
    with train's classes for both; without DATA/train, any videos."""
    if not (root / "train").is_dir():
        rows, classes, notes = in_class_folders(root, ".")
        return Listed(dataset, root, rows, classes, f"the folder {root}", notes)
    rows, classes, notes = in_class_folders(root, "train")
    top = "train"
    if part == "test":
        there = [name for name in ("val", "test") if (root / name).is_dir()]
        if not there:
            raise ValueError(f"{dataset}: {root} has a folder train, but neither val nor test with test videos")
        top = there[0]
        rows, _, notes = in_class_folders(root, top)
    notes.append(f"of {root} the videos in {top} alone are taken")
    return Listed(f"{dataset} {top}", root, rows, classes, f"the folder {root / 'train'}", notes)


LISTS = dict(toy=ucf101, ucf101=ucf101, hmdb51=hmdb51, diving48=diving48, diving48v1=diving48, kinetics400=own_folder,
             folder=own_folder)


def in_class_folders(root, top):
    """All videos below root/top, the folders of its first level being their classes -> rows, classes, notes.

    No classes: a video lies in none of these folders, or all lie in one.
    """
    _, files, bad = list_tree(root / top)
    rows = []
    for path in filter(is_video, files):
        name, below, _ = path.partition(os.sep)
        rows.append(Row(os.path.normpath(os.path.join(top, path)), name if below else None, str(root / top)))
    classes = sorted({row.name for row in rows} - {None})
    flat = [row.path for row in rows if row.name is None]
    notes = unread(root / top, bad)
    if flat and len(classes) > 1:
        notes.append(f"no labels, since videos lie in no class folder: {len(flat)} ({first(flat)})")
    if flat or len(classes) < 2:
        classes = []
    return rows, classes, notes


# ---- Reading ----

def find_lists(dataset, root, annotations, folder, pattern):
    """The lists of that name, sorted: in `annotations`, else in the videos' folder or beside it; there or in `folder`.
    """
    places = []
    for base in [Path(annotations)] if annotations else [root, root.parent]:
        places += [base, base / folder]
    tried = []
    for place in dict.fromkeys(places):
        try:
            names = sorted(os.listdir(place))
        except OSError as error:
            tried.append(f"{place} ({error.strerror})")
            continue
        files = [place / name for name in names if fnmatchcase(name, pattern) and not name.startswith("._")]
        if files:
            return files
        tried.append(str(place))
    raise ValueError(f"{dataset}: no list {pattern} in {' or '.join(tried)} (--annotations)")


def read_text(file):
    """A list's text; like names of files it may hold any bytes."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the list {file}: {error.strerror} (--annotations)") from None
    return os.fsdecode(content.removeprefix(codecs.BOM_UTF8))


def read_lines(file, pattern, expected):
    """The lines of a list that are not blank -> [(match of the pattern, where it stands in words), ...].

    expected: in words, what the pattern stands for. ValueError: a line does not match, or there is none.
    """
    lines = []
    for n, line in enumerate(re.split(r"\r\n|\r|\n", read_text(file)), 1):
        line = line.strip()
        match = re.fullmatch(pattern, line)
        if match:
            lines.append((match, f"{file}, line {n}"))
        elif line:
            raise ValueError(f"{file}, line {n}: {line!r:.100} is not understood; expected is {expected}")
    if not lines:
        raise ValueError(f"the list {file} is empty; expected are lines of {expected}")
    return lines


def below_root(path, root, classes):
    """A list's path with slashes alone, and from root on: what leads there is cut off, up to root's own name, unless
    a class is called like that."""
    steps = [step for step in path.replace("\\", "/").split("/") if step != "."]
    if len(steps) > 1 and steps[0] not in classes:
        for k, step in enumerate(steps[:-1]):
            if step in (root.absolute().name, root.resolve().name):
                return "/".join(steps[k + 1:])
    return "/".join(steps)


# ---- What rows may say ----

def refuse_outside(root, rows):
    """ValueError: a row leads out of root."""
    for path, _, where in rows:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{where} names {path!r}, which lies outside {root}")


def class_numbers(rows, classes, source):
    """The number of each row's class -> list of ints, or of None where there are no classes.

    Spelling is ignored where that is what it takes. ValueError: a row's class is none of them.
    """
    if not classes:
        return [None] * len(rows)
    number = {spelling(name): k for k, name in enumerate(classes)}
    number |= {name: k for k, name in enumerate(classes)}
    labels = []
    for path, name, where in rows:
        if name is None:
            raise ValueError(f"{where}: {path!r} lies in no class folder, as the videos of {source} do")
        label = number.get(name, number.get(spelling(name)))
        if label is None:
            raise ValueError(f"{where}: {path!r} is of class {name!r}, which {source} lacks")
        labels.append(label)
    return labels
