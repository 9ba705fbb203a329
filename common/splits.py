"""Videos of a data set: official lists, own folders, and the scan that counts frames."""
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tqdm import tqdm

from common import UserError, write_json, write_text
from common.toy import make_toy
from common.video import probe

MAX_BAD = 0.05                                                  # failed fraction that stops a run
SUFFIXES = set(".avi .divx .mp4 .m4v .mov .3gp .3g2 .mkv .webm .mpg .mpeg .vob .ts .mts .m2ts .mxf "
               ".wmv .asf .flv .f4v .ogv .gif".split())
VISIBLE = re.compile("[^.@]").match                             # not trash, thumbnails, ._ of macOS
# title of a split -> published number of its videos; Kinetics: Sec. 4
PUBLISHED = {
    "ucf101 train split 1": 9537, "ucf101 test split 1": 3783,
    "ucf101 train split 2": 9586, "ucf101 test split 2": 3734,
    "ucf101 train split 3": 9624, "ucf101 test split 3": 3696,
    "hmdb51 train split 1": 3570, "hmdb51 test split 1": 1530,
    "hmdb51 train split 2": 3570, "hmdb51 test split 2": 1530,
    "hmdb51 train split 3": 3570, "hmdb51 test split 3": 1530,
    "diving48 train split 1": 15027, "diving48 test split 1": 1970,
    "kinetics400": "around 240000", "kinetics400 train": "around 240000"}
# data set -> pattern of its paths, whose first group names the recording
SOURCE = {
    "toy": r"(.*_g\d+)_c\d+\.\w+", "ucf101": r"(.*_g\d+)_c\d+\.\w+",
    "hmdb51": r"(([^/]*)/.*?)_\2_.*", "diving48": r"(.*)_\d+\.\w+", "diving48v1": r"(.*)_\d+\.\w+"}


@dataclass
class Split:
    """Videos of a data set.

    paths are relative to root; labels index classes (None: unlabelled).
    failed has the missing videos, and after the scan the undecodable ones too.
    """
    title: str
    root: Path
    paths: list
    labels: list
    classes: list
    files: dict                                                 # path -> existing file
    shapes: dict = field(default_factory=dict)                  # path -> frames, height, width
    failed: dict = field(default_factory=dict)                  # path -> reason
    notes: list = field(default_factory=list)                   # lines that the scan prints


# ---- Official lists: root, folder of the lists, split, "train" or "test" -> rows, classes ----

def ucf101(root, annotations, number, part):
    """-> [(path, class name), ...], class names. The class of a video is its folder."""
    (file,) = find_lists(root, annotations, "ucfTrainTestlist", f"{part}list{number:02d}.txt")
    classes = [line.split()[1] for line in read_lines(file.with_name("classInd.txt"))]
    paths = [line.split()[0] for line in read_lines(file)]      # a label may follow
    return [(path, path.split("/")[0]) for path in paths], classes


def hmdb51(root, annotations, number, part):
    """One list per class. A line is a video and its use: 1 training, 2 test, 0 neither."""
    ending, use = f"_test_split{number}.txt", {"train": "1", "test": "2"}[part]
    rows, classes = [], []
    for file in find_lists(root, annotations, "testTrainMulti_7030_splits", f"*{ending}"):
        classes.append(file.name.removesuffix(ending))
        lines = [line.rsplit(maxsplit=1) for line in read_lines(file)]
        rows += [(f"{classes[-1]}/{name}", classes[-1]) for name, flag in lines if flag == use]
    return rows, classes


def diving48(root, annotations, number, part, version="_V2"):
    """Labels V2 by default. Classes are the numbers 0 to 47; V2 has no video of class 30."""
    (file,) = find_lists(root, annotations, ".", f"Diving48{version}_{part}.json")
    entries = json.loads(file.read_text())
    rows = [(f"{entry['vid_name']}.mp4", str(entry["label"])) for entry in entries]
    return rows, [str(k) for k in range(48)]


def diving48v1(root, annotations, number, part):
    return diving48(root, annotations, number, part, version="")


LISTS = dict(toy=ucf101, ucf101=ucf101, hmdb51=hmdb51, diving48=diving48, diving48v1=diving48v1)


def find_lists(root, annotations, folder, pattern):
    """Find the lists in `annotations`, or else in root or its parent; in each, also in `folder`.

    UserError: no file matches `pattern`.
    """
    bases = [Path(annotations)] if annotations else [root, root.parent]
    places = [place for base in bases for place in (base, base / folder)]
    for place in places:
        files = [file for file in sorted(place.glob(pattern)) if not file.name.startswith("._")]
        if files:
            return files
    # without --annotations, --data is one folder too high
    below = [] if annotations else sorted(root.glob(f"*/{pattern}"))
    hint = f": give --data {below[0].parent}" if below else " (--annotations)"
    raise UserError(f"no list {pattern} in {' or '.join(map(str, dict.fromkeys(places)))}{hint}")


def read_lines(file):
    """Read the non-blank lines of a list; like file names, they may contain any bytes."""
    lines = file.read_text("utf-8-sig", "surrogateescape").split("\n")
    return [line.strip() for line in lines if line.strip()]


# ---- Folders ----

def walk(root):
    """Yield each VISIBLE folder below root, links followed -> its relative path, its files' paths.

    OSError: a folder cannot be read.
    """
    def stop(error):
        raise error                                             # os.walk would skip the folder

    for folder, folders, names in os.walk(root, onerror=stop, followlinks=True):
        folders[:] = filter(VISIBLE, folders)
        below = os.path.relpath(folder, root)
        yield below, [os.path.normpath(os.path.join(below, n)) for n in filter(VISIBLE, names)]


def is_video(path):
    return os.path.splitext(path)[1].lower() in SUFFIXES


def find_files(root):
    """Find all files below a folder -> sorted relative paths: videos, irregular files, others"""
    paths = sorted(path for _, paths in walk(root) for path in paths)
    videos = list(filter(is_video, paths))
    regular = [path for path in videos if os.path.isfile(root / path)]
    return regular, sorted({*videos} - {*regular}), [path for path in paths if not is_video(path)]


def own_folder(dataset, root, part):
    """Load one part of DATA/train/CLASS/FILE and DATA/val/CLASS/FILE, with train's classes -> Split

    Without such parts (see `own_parts`), either is all videos below DATA.
    """
    training, testing = own_parts(root)
    if not training:
        return labelled_folder(dataset, root)
    train = labelled_folder(f"{dataset} {training}", root / training)
    train.notes.append(f"{root}: only the videos in {training} are used")
    if part == "train":
        return train
    if not testing:
        raise UserError(f"{root} has no folder val or test, only {training}")
    return labelled_folder(f"{dataset} {testing}", root / testing, train.classes)


def own_parts(root):
    """Find the folders of training and of test videos in a folder -> their names, "" for none.

    Training: "train", or a similar name if it shares a class, a sub-folder, with another folder.
    Test: "val" or "test", or a similar name likewise. UserError: it is not clear which.
    """
    classes = {name: subfolders(root / name) for name in sorted(subfolders(root))}
    folders = Counter(chain(*classes.values()))                 # class -> number of its folders
    sets = Counter(classes.values())

    def called(word):
        exact = [name for name in classes if re.fullmatch(word, name.lower())]
        similar = [n for n in classes if re.search(f"(?<![a-z ])({word})(?![a-z ])", n.lower())]
        return exact or [name for name in similar if any(folders[c] > 1 for c in classes[name])]

    train = called("train|training")
    test = called("val|valid|validation") + called("test|testing")
    equal = [name for name in classes if classes[name] and sets[classes[name]] > 1]
    if len(train) > 1 or equal and not train:
        raise UserError(f"{root}: {' and '.join((train or equal)[:2])} have sub-folders in common. "
                        'If they are parts, call the training part "train"; if they are classes, '
                        'move all class folders into a folder "train"')
    if not train and len(classes) == 1 and "train" in map(str.lower, classes[one := min(classes)]):
        raise UserError(f"{root} has only {one}, and that has train: give --data {root / one}")
    return (train[0], (*test, "")[0]) if train else ("", "")


def subfolders(folder):
    folders = (entry.name for entry in os.scandir(folder) if entry.is_dir())
    return frozenset(filter(VISIBLE, folders))


def labelled_folder(title, root, classes=None):
    """Load all videos below a folder -> Split

    Labels are the class folders, if there are two or more and every video is in one, or `classes`.
    UserError: there is no video, or one of no class.
    """
    paths, irregular, others = find_files(root)
    notes = []
    for kind, names in (("links or pipes", irregular), ("without a video suffix", others)):
        if names:
            notes.append(f"{title}: skipped {len(names)} {kind}: {', '.join(names[:10])}")
    if not paths:
        raise UserError("; ".join([f"{title}: no videos in {root}", *notes]))
    names = [path.split(os.sep)[0] if os.sep in path else "" for path in paths]
    if classes is None:
        classes = [] if "" in names or len(set(names)) < 2 else sorted(set(names))
    elif classes and not set(names) <= set(classes):
        path = next(path for path, name in zip(paths, names) if name not in classes)
        raise UserError(f"{title}: {root / path} is in no class folder of the training set")
    labels = [classes.index(name) if classes else None for name in names]
    files = {path: root / path for path in paths}
    return Split(title, root, paths, labels, classes, files, notes=notes)


# ---- A split of a data set ----

def load_split(dataset: str, data, annotations=None, split: int = 1, part: str = "train") -> Split:
    """Load one part ("train" or "test") of an official split or of own folders, without a scan.

    data: folder of the videos
    annotations: folder of the official lists; None: in data or its parent
    Letter case is ignored, since UCF101 spells HandstandPushups in two ways.
    UserError: a folder or list is missing, or the videos are one folder further down.
    """
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"the video folder {root} does not exist")
    if dataset not in LISTS:
        return own_folder(dataset, root, part)
    rows, classes = LISTS[dataset](root, annotations, split, part)
    if (root / "rgb").is_dir():                                 # Diving48
        root = root / "rgb"
    place = {name.lower(): k for k, name in enumerate(classes)}
    paths = [path for path, _ in rows]
    labels = [place[name.lower()] for _, name in rows]
    videos, *_ = find_files(root)
    existing = {path.lower(): root / path for path in videos}
    files = {path: existing[path.lower()] for path in paths if path.lower() in existing}
    title = f"{dataset} {part} split {split}"
    if not files:
        names = {path.lower() for path in paths}
        for top, _, path in (video.partition(os.sep) for video in videos):
            if path.lower().removeprefix("rgb/") in names:
                raise UserError(f"{title}: no videos, but in {top}: give --data {root / top}")
    failed = {path: "not found" for path in paths if path not in files}
    return Split(title, root, paths, labels, classes, files, failed=failed)


def load_and_scan(args, number, part):
    """Load and scan one part of a split, or the folder `part` (its train/, if any) -> Split"""
    if args.dataset == "toy":
        make_toy(args.data)
    if part in ("train", "test"):
        split = load_split(args.dataset, args.data, args.annotations, number, part)
        check_failed(split, args.index)                         # before a scan of hours
        check_failed(scan(split, args.index, args.workers), args.index)
    else:
        split = load_split("folder", part)
        split.title = part
        scan(split, args.index, args.workers)
    return split


def check_failed(split, index):
    """UserError: more than MAX_BAD of the videos failed; a file beside the index names them all."""
    if len(split.failed) > MAX_BAD * len(split.paths):
        file = Path(index or default_index(split.root)).with_suffix(".failed.txt")
        rows = (f"{split.root.resolve() / path}\t{split.failed[path]}\n" for path in split.failed)
        write_text(file, "".join(rows))
        raise UserError(f"{split.title}: {len(split.failed)} of {len(split.paths)} videos "
                        f"in {split.root} are missing or undecodable, more than {MAX_BAD:.0%}: "
                        f"{listed(split.failed)}; {file} names all: mend or replace them, or, "
                        "in own folders, delete them")


def listed(failed):
    """Format the first ten of {path: reason}."""
    names = [f"{path} ({reason})" for path, reason in failed.items()]
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def usable(split, T=16):
    """Select the videos for training -> their paths, a report that names the failed ones.

    # paper silent: videos of fewer than T frames are left out of pre-training.
    """
    good = [path for path in split.paths if path in split.shapes and split.shapes[path][0] >= T]
    published = f" (published: {PUBLISHED[split.title]})" if split.title in PUBLISHED else ""
    report = f"{split.title}: {len(split.paths)} videos{published}, {len(good)} usable"
    if split.failed:
        report += f"; {len(split.failed)} failed: {listed(split.failed)}"
    short = [path for path, (frames, *_) in split.shapes.items() if frames < T]
    if short:
        report += f"; {len(short)} shorter than {T} frames: {', '.join(short[:10])}"
    return good, report


def check_test(train, test):
    """UserError: the videos have no labels, or training and test have videos in common."""
    hint = "own videos lie in train/CLASS/ and val/CLASS/ below --data"
    if not train.classes:
        raise UserError(f"{train.title} has no labels to learn ({hint})")
    both = set(train.files.values()) & set(test.files.values())
    if both:
        raise UserError(f"{len(both)} test videos are also training videos, "
                        f"the first: {min(both)} ({hint})")


def sources(dataset, paths):
    """Recording of each clip -> list of str. Cross-validation keeps the clips of one together.

    UCF101: the group of a class; HMDB51, Diving48: the original video; others: the video itself.
    """
    matches = [re.fullmatch(SOURCE.get(dataset, "(.*)"), path, re.DOTALL) for path in paths]
    return [match[1] if match else path for match, path in zip(matches, paths)]


# ---- The scan ----

def scan(split: Split, index=None, workers: int = 1) -> Split:
    """Decode each video once, to fill in split.shapes and split.failed.

    index: JSON file that caches {absolute path: [[size, mtime], frames, height, width]} of whole
           videos; an error may not last. An entry is valid while the size and modification time of
           the video are unchanged.
    """
    index = Path(index or default_index(split.root))
    entries = json.loads(index.read_text("utf-8")) if index.exists() else {}
    stamps, reasons = {}, {}
    for path, file in split.files.items():
        key, stat = os.path.abspath(file), file.stat()
        stamps[path] = key, [stat.st_size, stat.st_mtime_ns]
        stamp, *shape = entries.get(key, [None])
        if stamp == stamps[path][1]:
            split.shapes[path] = tuple(shape)
    todo = [path for path in split.files if path not in split.shapes]
    saved = time.monotonic()
    # Decoding releases the GIL, so threads suffice. Closing the results cancels what is pending.
    with ThreadPoolExecutor(max(1, workers)) as pool, \
            closing(pool.map(probe, [str(split.files[path]) for path in todo])) as results, \
            tqdm(results, f"scan {split.title}", len(todo), unit="video", disable=not todo) as bar:
        for (*shape, reason), path in zip(bar, todo):
            if shape[0]:
                split.shapes[path] = tuple(shape)
            if reason:
                reasons[path] = reason
            else:
                key, stamp = stamps[path]
                entries[key] = [stamp, *shape]
            if time.monotonic() - saved > 60:
                write_json(index, entries)
                saved = time.monotonic()
    if todo:
        write_json(index, entries)
    early = {path: reasons.pop(path) for path in [*reasons] if path in split.shapes}
    split.failed |= reasons
    if early:
        split.notes.append(f"{split.title}: {len(early)} videos end early: {listed(early)}")
    for note in split.notes:
        print(note, file=sys.stderr)
    return split


def default_index(root):
    """Default cache file of a scan, in the user's cache folder, since the data may be read-only."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return cache / "time-equivariance" / f"{name}.json"
