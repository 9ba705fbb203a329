"""Which videos: those that the lists name and that are there, and what a scan of them found."""
import hashlib
import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.files import write_json
from common.lists import LISTS, class_numbers, own_folder, refuse_outside
from common.toy import make_toy
from common.tree import each_once, find_files, first, is_video, list_tree, real_files, unread
from common.video import examine, stamp

MAX_BAD = 0.05                                  # a larger share of missing or unreadable videos stops a run
PUBLISHED = {                                   # videos, by a split's title; Kinetics: Sec. 4
    "ucf101 train split 1": 9537, "ucf101 test split 1": 3783,
    "ucf101 train split 2": 9586, "ucf101 test split 2": 3734,
    "ucf101 train split 3": 9624, "ucf101 test split 3": 3696,
    "hmdb51 train split 1": 3570, "hmdb51 test split 1": 1530,
    "hmdb51 train split 2": 3570, "hmdb51 test split 2": 1530,
    "hmdb51 train split 3": 3570, "hmdb51 test split 3": 1530,
    "diving48 train split 1": 15027, "diving48 test split 1": 1970,
    "kinetics400": "around 240000", "kinetics400 train": "around 240000"}
OWN_LABELS = "one's own videos lie in train/CLASS/ and val/CLASS/ below --data"
SOURCE = {                                      # of a path, what names the recording that a clip was cut from
    "toy": r"(.*_g\d+)_c\d+\.\w+", "ucf101": r"(.*_g\d+)_c\d+\.\w+", "hmdb51": r"(([^/]*)/.*?)_\2_.*",
    "diving48": r"(.*)_\d+\.\w+", "diving48v1": r"(.*)_\d+\.\w+"}


@dataclass(frozen=True)
class Split:
    """Some videos of a data set: paths below root, a class number for each (None: unlabelled), the class names.

    paths holds the names that the lists give; found maps each to the file that is there, missing names the rest.
    notes: what one should know of these lists and folders, a sentence each.
    """
    title: str
    root: Path
    paths: list
    labels: list
    classes: list
    found: dict
    missing: list
    notes: tuple = ()


def load_split(dataset: str, data, annotations=None, split: int = 1, part: str = "train") -> Split:
    """The videos of one part ("train" or "test") of one official split of a data set -> Split.

    dataset: one of LISTS. data: the folder of the videos; annotations: the folder of the official lists, looked for
    beside data if None. A file that a list names twice, by two spellings or links, counts once.
    ValueError: a list or folder is not there, or a line is not what the format says.
    """
    root = Path(data)
    if dataset not in LISTS:
        raise ValueError(f"unknown data set {dataset!r}")
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{dataset}: the video folder {root} {what} (--data)")
    title, root, rows, classes, source, notes = LISTS[dataset](dataset, root, annotations, split, part)
    refuse_outside(root, rows)
    labels = class_numbers(rows, classes, source)
    paths = [row.path for row in rows]
    files, bad = find_files(root, paths)
    kept, again = each_once(paths, files)
    if again and LISTS[dataset] is own_folder:
        kept = range(len(paths))
        notes.append(f"links lead to videos that lie there already, which count twice: {len(again)} ({first(again)})")
    elif again:
        notes.append(f"videos that are named twice count once: {len(again)} ({first(again)})")
    notes += unread(root, bad)
    paths = [paths[k] for k in kept]
    found = {path: files[path] for path in paths if path in files}
    missing = [path for path in paths if path not in files]
    return Split(title, root, paths, [labels[k] for k in kept], classes, found, missing, tuple(dict.fromkeys(notes)))


def sources(dataset, paths):
    """What each clip was cut from, so that cross-validation can keep it together: UCF101's group gGG of a class,
    HMDB51's and Diving48's original video; elsewhere each video is its own -> list of str."""
    found = []
    for path in paths:
        match = re.fullmatch(SOURCE.get(dataset, "(.*)"), path, re.DOTALL)
        found.append(match[1] if match else path)
    return found


# ---- The index: what a scan of the files found ----

def default_index(root):
    """Where the index of a data set is remembered: the user's cache, since the data set may not be writable."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise ValueError("this user has no home folder to keep the index in: give a file, --index FILE") from None
    return cache / "time-equivariance" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"


def scan(split: Split, index=None, workers: int = 1, progress: bool = True) -> dict:
    """Count the frames of every video of a split by decoding it once; remember them in the JSON file `index`.

    An entry holds as long as `stamp` of its file; a lost index, or half of one, is only made anew.
    -> {path: (frames, height, width, problem, packets)} for the files found, as `examine` finds them.
    ValueError: too many files are missing (MAX_BAD), or all; `index` is another file, or cannot be written.
    """
    refuse_missing(split)
    index = Path(index or default_index(split.root))
    known = read_index(index)
    stamps = {path: stamp(file) for path, file in split.found.items()}
    todo = [path for path in split.found if path not in known or known[path][0] != stamps[path]]
    if todo:
        write_index(index, known)                                               # rather than fail after hours
    saved = time.monotonic()
    files = [str(split.found[path]) for path in todo]
    # Decoding releases Python's lock, so threads are enough.
    # Closing the results cancels what is left when the scan is interrupted.
    with ThreadPoolExecutor(workers) as pool, closing(pool.map(examine, files)) as results:
        bar = tqdm(results, f"scan {split.title}", len(todo), unit="video", disable=not progress or not todo)
        for path, result in zip(todo, bar):
            known[path] = [stamps[path], *result]
            if time.monotonic() - saved > 60:                                   # a killed scan goes on where it was
                write_index(index, known)
                saved = time.monotonic()
    if todo:
        write_index(index, known)
    return {path: tuple(known[path][1:]) for path in split.found}


def refuse_missing(split):
    """ValueError where no video of a split is there, or more than MAX_BAD are missing."""
    total, missing = len(split.paths), split.missing
    if split.found and len(missing) <= MAX_BAD * total:
        return
    wanted = f"{total} listed videos" if total else "videos"
    said = [f"{split.title}: looked for {wanted} in {split.root}, found {len(split.found)}"]
    if missing:
        said.append(f"the first missing: {', '.join(missing[:3])}")
    raise ValueError("; ".join(said + list(split.notes)))


def read_index(file):
    """-> {path: entry}, what `scan` wrote; {} where nothing is, or a part of it. ValueError: it is another file."""
    try:
        text = file.read_text(errors="replace") if file.is_file() else ""
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}; give another --index") from None
    text = text.strip("\0")                                                     # a machine that lost power leaves these
    try:
        known = json.loads(text or "{}")
    except ValueError:
        known = {} if text.startswith("{") else None                            # half an index, where a disk was full
    if not isinstance(known, dict) or not all(isinstance(entry, list) for entry in known.values()):
        raise ValueError(f"{file} is no index of a scan, which would be written over it: give another --index")
    return {path: entry for path, entry in known.items() if len(entry) == 6}


def write_index(file, known):
    try:
        write_json(file, known)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror}; give another --index") from None


def unreadable(split, index):
    """{path: problem} of the videos that are not there or give not one frame."""
    bad = {}
    for path in split.paths:
        frames, _, _, problem, _ = index.get(path, (0, 0, 0, "not found", ""))
        if frames == 0:
            bad[path] = problem
    return bad


def usable(split, index, T=16):
    """Which videos of a split can be trained on, and a report of the others in words -> list of paths, str.

    # paper silent: videos of fewer than T frames are left out of pre-training.
    ValueError: more than MAX_BAD of the videos are missing or unreadable, or too few are left.
    """
    good, bad, short = [], [], []
    for path in split.paths:
        frames, _, _, problem, _ = index.get(path, (0, 0, 0, "", ""))
        if frames >= T:
            good.append(path)
        elif problem:
            bad.append(f"{path} ({problem})")
        elif path in index:
            short.append(path)
    published = f" (published: {PUBLISHED[split.title]})" if split.title in PUBLISHED else ""
    report = f"{split.title}: {len(split.paths)} videos{published}, {len(good)} usable"
    for what, names in (("missing", split.missing), ("unreadable", bad), (f"shorter than {T} frames", short)):
        if names:
            report += f"; {len(names)} {what}: {first(names)}"
    if len(split.missing) + len(bad) > MAX_BAD * len(split.paths) or len(good) < 2:
        raise ValueError(f"{report}; too few to train on (at most {MAX_BAD:.0%} may be missing or unreadable)")
    return good, report


# ---- What the stages call ----

def any_videos(folder):
    """All videos below a folder, in whatever order of folders, without labels -> Split."""
    _, files, bad = list_tree(Path(folder))
    paths = [path for path in files if is_video(path)]
    found = {path: Path(folder) / path for path in paths}
    return Split(str(folder), Path(folder), paths, [None] * len(paths), [], found, [], tuple(unread(folder, bad)))


def scan_folder(folder, args):
    """All videos below a folder, for --predict -> Split, what `scan` finds."""
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} (--predict)")
    return scan_with_notes(any_videos(folder), args)


def list_and_scan(args, number, part):
    """One part of an official split, or the folder `part` of one's own videos -> Split, what `scan` finds."""
    if part in ("train", "test"):
        if args.dataset == "toy":
            make_toy(args.data)
        split = load_split(args.dataset, args.data, args.annotations, number, part)
    elif Path(part).is_dir():
        split = replace(load_split("folder", part), title=part)
    else:
        raise ValueError(f"there is no folder {part}; a gallery or query is train, test or a folder of videos")
    return scan_with_notes(split, args)


def scan_with_notes(split, args):
    """Say what one should know of a split, and scan it -> Split, what `scan` finds."""
    for note in split.notes:
        print(f"{split.title}: {note}", file=sys.stderr)
    return split, scan(split, args.index, max(1, args.workers))


def check_parts(train, test):
    """ValueError where there can be no test result: videos without labels, or test videos that were trained on."""
    if not train.classes:
        said = [f"{train.title} has no labels to learn ({OWN_LABELS})"]
        raise ValueError("; ".join(said + list(train.notes)))
    check_apart(train, test)


def check_apart(train, test):
    """ValueError: lists of training and test videos share files, by whatever names and links."""
    both = set(real_files(train.found.values())) & set(real_files(test.found.values()))
    if both:
        raise ValueError(f"{train.title}: {len(both)} of {len(test.paths)} test videos are training videos too, the "
                         f"first: {min(both)} ({OWN_LABELS})")
