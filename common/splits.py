"""Which videos: the official lists of each data set, the files that are there, and what a scan of them found."""
import hashlib
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from common.files import write_json
from common.toy import make_toy
from common.video import examine, stamp

REPORT, WORK = "shrink.jsonl", ".shrinking"     # what tools/shrink.py leaves in a copy: no videos
MAX_BAD = 0.05                                  # a larger share of missing or unreadable videos stops a run
SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif", ".3gp"}
PUBLISHED = {                                   # videos in the official lists: (train, test)
    ("ucf101", 1): (9537, 3783), ("ucf101", 2): (9586, 3734), ("ucf101", 3): (9624, 3696),
    **{("hmdb51", split): (3570, 1530) for split in (1, 2, 3)}, ("diving48", 1): (15027, 1970)}


@dataclass(frozen=True)
class Split:
    """Some videos of a data set: paths below root, a class number for each (None: unlabelled), the class names.

    paths holds the official names; found maps each to the file that is there, missing names the rest.
    """
    title: str
    root: Path
    paths: list
    labels: list
    classes: list
    found: dict
    missing: list


def load_split(dataset: str, data, annotations=None, split: int = 1, part: str = "train") -> Split:
    """The videos of one part ("train" or "test") of one official split of a data set -> Split.

    dataset: toy, ucf101, hmdb51, diving48 (labels V2), diving48v1, kinetics400 or folder (any videos, recursively).
    data: the folder of the videos; annotations: the folder of the official lists, looked for beside data if None.
    ValueError: a list or folder is not there, or a line is not what the format says.
    """
    root = Path(data)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{dataset}: the video folder {root} {what} (--data)")
    if dataset in ("toy", "ucf101"):
        lists = find_lists(dataset, root, annotations, "ucfTrainTestlist", f"{part}list{split:02d}.txt")
        file = lists / "classInd.txt"
        classes = [two(line.split(maxsplit=1), file)[1] for line in read_lines(file)]
        paths = [line.rsplit(maxsplit=1)[0] if line[-1].isdigit() and " " in line else line
                 for line in read_lines(lists / f"{part}list{split:02d}.txt")]
        names = [path.split("/")[0] for path in paths]
    elif dataset == "hmdb51":
        lists = find_lists(dataset, root, annotations, "testTrainMulti_7030_splits", f"*_test_split{split}.txt")
        files = sorted(lists.glob(f"*_test_split{split}.txt"))
        classes = [file.name.removesuffix(f"_test_split{split}.txt") for file in files]
        keep = {"train": "1", "test": "2"}[part]
        rows = [(name, *two(line.rsplit(maxsplit=1), file)) for name, file in zip(classes, files)
                for line in read_lines(file)]
        names = [name for name, _, use in rows if use == keep]
        paths = [f"{name}/{path}" for name, path, use in rows if use == keep]
    elif dataset in ("diving48", "diving48v1"):
        file = f"Diving48_V2_{part}.json" if dataset == "diving48" else f"Diving48_{part}.json"
        lists = find_lists(dataset, root, annotations, ".", file)
        root = root / "rgb" if (root / "rgb").is_dir() else root
        classes = [str(k) for k in range(48)]                                   # class 30 has no V2 video: still 48
        try:
            rows = json.loads((lists / file).read_text())
            names, paths = [str(row["label"]) for row in rows], [f"{row['vid_name']}.mp4" for row in rows]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{lists / file} is not a list of objects with vid_name and label: {error!r}") from None
    elif dataset in ("kinetics400", "folder"):
        paths = sorted(filter(is_video, list_tree(root)[1]))
        names = [path.split(os.sep)[0] if os.sep in path else None for path in paths]
        classes = sorted(set(names) - {None})
        if None in names or len(classes) < 2:                                   # no class folders: no labels
            names, classes = [None] * len(paths), []
    else:
        raise ValueError(f"unknown data set {dataset!r}")

    number = {name.lower(): k for k, name in enumerate(classes)} | {None: None}
    for path, name in zip(paths, names):
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ValueError(f"{dataset}: the list in {lists} names {path!r}, which lies outside {root}")
        if (name and name.lower()) not in number:
            raise ValueError(f"{dataset}: {path!r} is of class {name!r}, which the list of classes in {lists} lacks")
    found, missing = find_files(root, paths)
    labels = [number[name and name.lower()] for name in names]
    title = dataset if dataset in ("kinetics400", "folder") else f"{dataset} {part} split {split}"
    return Split(title, root, paths, labels, classes, found, missing)


def list_tree(root):
    """-> the folders and the files below root, links followed, as paths below it; {folder: (0, why it is not read)}."""
    folders, files, bad = [], [], {}
    for folder, names, here in os.walk(root, followlinks=True, onerror=lambda error: bad.update(
            {os.path.relpath(error.filename, root): (0, error.strerror)})):
        real = os.path.realpath(folder)                                         # a link to a folder above has no end
        names[:] = sorted(name for name in names if name != WORK and (
            not os.path.islink(path := os.path.join(folder, name))
            or os.path.commonpath([real, os.path.realpath(path)]) != os.path.realpath(path)))
        below = os.path.relpath(folder, root)
        folders.append(below)
        files += [os.path.normpath(os.path.join(below, name)) for name in sorted(here)]
    return folders, [path for path in files if path != REPORT], bad


def is_video(path):
    """Whether a file is one of a data set's videos, by its name ("._" begins what macOS adds)."""
    return os.path.splitext(path)[1].lower() in SUFFIXES and not os.path.basename(path).startswith("._")


def find_lists(dataset, root, annotations, folder, file):
    """The folder that holds the list `file` (a glob pattern): `annotations` or `folder` in it, or beside the videos."""
    bases = [Path(annotations)] if annotations else [root, root.parent]
    places = [place for base in bases for place in (base, base / folder)]
    for place in places:
        if any(place.glob(file)):
            return place
    raise ValueError(f"{dataset}: no list {file} in {' or '.join(dict.fromkeys(map(str, places)))} (--annotations)")


def read_lines(file):
    """Lines of a list file without line ends (CRLF copies circulate) or blank lines."""
    if not file.is_file():
        raise ValueError(f"the list {file} does not exist (--annotations)")
    return [line.strip() for line in file.read_text(errors="surrogateescape").splitlines() if line.strip()]


def two(words, file):
    """The two parts of a list's line, or a ValueError that says where there is but one."""
    if len(words) != 2:
        raise ValueError(f"the list {file} has a line of one word, {words[0]!r}, where two belong")
    return words


def find_files(root, paths):
    """-> {path: the file that is there}, [paths that are not]. Letter case is ignored where that is what it takes:
    UCF101's HandstandPushups is spelt two ways."""
    found, missing, listing = {}, [], None
    for path in paths:
        if (root / path).is_file():
            found[path] = root / path
            continue
        if listing is None:                                                     # one walk, and only if it is needed
            listing = {str((Path(folder) / name).relative_to(root)).lower(): Path(folder) / name
                       for folder, _, files in os.walk(root) for name in files}
        if path.lower() in listing:
            found[path] = listing[path.lower()]
        else:
            missing.append(path)
    return found, missing


def sources(dataset, paths):
    """What each clip was cut from, so that cross-validation can keep it together: UCF101's group gGG of a class,
    HMDB51's and Diving48's original video; elsewhere each video is its own -> list of str."""
    pattern = {"toy": r"(.*_g\d+)_c\d+\.\w+", "ucf101": r"(.*_g\d+)_c\d+\.\w+", "hmdb51": r"(([^/]*)/.*?)_\2_.*",
               "diving48": r"(.*)_\d+\.\w+", "diving48v1": r"(.*)_\d+\.\w+"}.get(dataset, r"(.*)")
    return [match[1] if (match := re.fullmatch(pattern, path, re.DOTALL)) else path for path in paths]


def default_index(root):
    """Where the index of a data set is remembered: the user's cache, since the data set may not be writable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "time-equivariance"
    return cache / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"


def scan(split: Split, index=None, workers: int = 1, progress: bool = True) -> dict:
    """Count the frames of every video of a split by decoding it once; remember them in the JSON file `index`.

    An entry holds for one file size and modification time; a lost index, or half of one, is only made anew.
    -> {path: (frames, height, width, problem, packets)} for the files found, as `examine` finds them.
    ValueError: too many files are missing (MAX_BAD), or all; `index` is another file, or cannot be written.
    """
    total, missing = len(split.paths), split.missing
    if not split.found or len(missing) > MAX_BAD * total:
        where = f"looked for {total} listed videos in {split.root}" if total else f"looked for videos in {split.root}"
        first = f"; the first missing: {', '.join(missing[:3])}" if missing else ""
        raise ValueError(f"{split.title}: {where}, found {len(split.found)}{first}")
    index = Path(index or default_index(split.root))
    known = read_index(index)
    stamps = {path: stamp(file) for path, file in split.found.items()}
    todo = [path for path in split.found if known.get(path, [None])[0] != stamps[path]]
    if todo:
        try:
            write_json(index, known)                                            # rather than fail after hours
        except OSError as error:
            raise ValueError(f"cannot write {index}: {error.strerror}; give another --index") from None
    saved = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:                                   # decoding releases Python's lock
        counts = pool.map(examine, [str(split.found[path]) for path in todo])
        for path, count in zip(todo, tqdm(counts, f"scan {split.title}", len(todo), unit="video",
                                          disable=not progress or not todo)):
            known[path] = [stamps[path], *count]
            if time.monotonic() - saved > 60:                                   # a killed scan goes on where it was
                write_json(index, known)
                saved = time.monotonic()
    if todo:
        write_json(index, known)
    return {path: tuple(known[path][1:]) for path in split.found}


def read_index(file):
    """-> {path: entry}, what `scan` wrote; {} where nothing is, or a part of it. ValueError: it is another file."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    try:
        known = json.loads(text)
    except ValueError:
        known = {} if text.strip("\0")[:1] in ("", "{") else None               # a machine that lost power leaves \0
    if not isinstance(known, dict) or not all(isinstance(entry, list) for entry in known.values()):
        raise ValueError(f"{file} is no index of a scan, which would be written over it: give another --index")
    return {path: entry for path, entry in known.items() if len(entry) == 6}


def unreadable(split, index):
    """{path: problem} of the videos that are not there or give not one frame."""
    known = {path: index.get(path, (0, 0, 0, "not found", "")) for path in split.paths}
    return {path: problem for path, (n, _, _, problem, _) in known.items() if n == 0}


def usable(split, index, T=16):
    """Which videos of a split can be trained on, and a report of the others in words -> list of paths, str.

    # paper silent: videos of fewer than T frames are left out of pre-training.
    ValueError: more than MAX_BAD of the videos are missing or unreadable, or too few are left.
    """
    bad = {path: problem for path, (n, _, _, problem, _) in index.items() if problem and n < T}
    short = [path for path, (n, *_) in index.items() if n < T and path not in bad]
    good = [path for path in split.paths if path in index and path not in bad and index[path][0] >= T]
    totals = {f"{dataset} {part} split {number}": counts[k] for (dataset, number), counts in PUBLISHED.items()
              for k, part in enumerate(("train", "test"))} | {"kinetics400": "around 240000"}     # Sec. 4
    published = f" (published: {totals[split.title]})" if split.title in totals else ""
    report = f"{split.title}: {len(split.paths)} videos{published}, {len(good)} usable"
    for what, names in (("missing", split.missing), ("unreadable", [f"{p} ({bad[p]})" for p in bad]),
                        (f"shorter than {T} frames", short)):
        if names:
            report += f"; {len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    if len(split.missing) + len(bad) > MAX_BAD * len(split.paths) or len(good) < 2:
        raise ValueError(f"{report}; too few to train on (at most {MAX_BAD:.0%} may be missing or unreadable)")
    return good, report


def list_and_scan(args, number, part):
    """One part of an official split, or the folder `part` of one's own videos -> Split, what `scan` finds."""
    if part not in ("train", "test"):
        if not Path(part).is_dir():
            raise ValueError(f"there is no folder {part}; a gallery or query is train, test or a folder of videos")
        split = replace(load_split("folder", part), title=part)
    else:
        if args.dataset == "toy":
            make_toy(args.data)
        split = load_split(args.dataset, args.data, args.annotations, number, part)
    return split, scan(split, args.index, max(1, args.workers))


def check_parts(train, test):
    """Refuse what gives no test result: videos without labels, and test videos that were trained on."""
    if not train.classes:
        raise ValueError(f"{train.title} has no labels to learn (one's own videos can be listed as UCF101's are)")
    both = set(train.found.values()) & set(test.found.values())
    if both:
        raise ValueError(f"{train.title}: {len(both)} of {len(test.paths)} test videos are training videos too (one's "
                         f"own videos can be listed as UCF101's are)")
