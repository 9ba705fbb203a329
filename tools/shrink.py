"""A data set once more, small and quick to read: same tree, same names, same frames; what is no video is copied.

    python tools/shrink.py UCF-101 UCF-101-128
    python tools/shrink.py K400 K400-144 --size 144 --quality 3

Each video becomes MPEG-4 in MP4, whatever its suffix says: FFmpeg, and so every reader here, goes by a file's content.
The same command goes on where it was stopped. DST/shrink.jsonl lists what could not be read, and why.
"""
import argparse
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.files import log_json
from common.flags import Formatter, usable_cores
from common.processes import run
from common.splits import MAX_BAD
from common.tree import REPORT, WORK, is_video, list_tree
from tools.encode import Copy, File, copy_one

PART = 1000                                                                     # files that the pool is given at once


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", help="folder of the data set; nothing in it is changed")
    parser.add_argument("target", metavar="DST", help="folder of the copy, new or left by the same command")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="short side; never enlarged")
    parser.add_argument("--quality", type=int, default=4, metavar="Q", help="MPEG-4's quantiser, 1 (best) to 31")
    parser.add_argument("--intra", action="store_true", help="key frames only")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes")
    args = parser.parse_args(argv)
    for name, least, most in (("size", 8, 1024), ("quality", 1, 31), ("workers", 1, 1024)):
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} must lie between {least} and {most}, but is {getattr(args, name)}")
    if args.size % 2:
        parser.error(f"--size must be even, since most videos' colours have half the resolution, but is {args.size}")
    return args


# ---- What is to be done ----

def check_folders(source, target):
    """ValueError: SRC is not there, a file stands for a folder, or one lies in the other."""
    for folder in (source, target):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: SRC and DST are folders")
    if not source.is_dir():
        raise ValueError(f"the folder {source} does not exist")
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"{source} and {target} must not lie in one another")


def listed_before(target, settings):
    """What the run that this one goes on with wrote to DST/shrink.jsonl -> {path: Copy}.

    ValueError: DST holds something else, or a copy made with other settings.
    """
    report = target / REPORT
    if not report.exists():
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} is not empty and no copy made by this command: give another DST")
        return {}
    rows = []
    for line in report.read_text().splitlines():
        with suppress(ValueError):                                              # a line that a full disk cut
            rows.append(json.loads(line))
    if rows and rows[0] != settings:
        raise ValueError(f"{report} says {rows[0]}, but asked for is {settings}: give another DST")
    return {row["file"]: Copy(row["frames"], row["problem"]) for row in rows[1:]}


def compare(source, target, files, before):
    """Which files are still to be copied, by their time stamps -> list of File, {path: Copy} of the others.

    before: of listed_before. ValueError: a file of DST is one of SRC.
    """
    todo, done = [], {}
    for path in tqdm(files, "compare", unit="file"):
        try:
            was = os.stat(source / path)
            if not (source / path).is_file():                                   # a pipe would be waited for
                raise OSError(errno.EINVAL, "not a regular file")
        except OSError as error:
            done[path] = Copy(0, error.strerror)
            continue
        now = os.stat(target / path) if (target / path).exists() else None
        if now and os.path.samestat(was, now):
            raise ValueError(f"{target / path} is {source / path} itself: give another DST")
        same_time = now and abs(now.st_mtime - was.st_mtime) < 2
        if same_time and (is_video(path) or now.st_size == was.st_size):
            done[path] = before.get(path, Copy(0, ""))._replace(before=was.st_size, after=now.st_size)
        else:
            todo.append(File(path, was.st_size, was.st_mtime_ns))
    return todo, done


def write_report(target, settings, copies):
    """DST/shrink.jsonl: the settings, then a line for each file that could not be read, or not to its end."""
    beside = target / WORK / REPORT
    beside.write_text("")
    log_json(beside, **settings)
    for path, copy in copies.items():
        if copy.problem:
            log_json(beside, file=path, frames=copy.frames, problem=copy.problem)
    beside.replace(target / REPORT)


# ---- Processes ----

def start_process():
    """In a process of the pool: a Ctrl-C is the parent's to answer; where the parent is gone, this process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def copy_all(source, target, todo, settings, workers, bar):
    """Copy files in several processes -> {path: Copy}. A copy is written to DST's work folder, listed, then renamed.

    ValueError: a process was killed. OSError: DST cannot be written to.
    """
    copies, before, after = {}, 0, 0
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), start_process)
    try:
        for start in range(0, len(todo), PART):
            futures = {}
            for n, file in enumerate(todo[start:start + PART]):
                beside = target / WORK / f"{n}{Path(file.path).suffix[:5]}"
                futures[pool.submit(copy_one, source, file, beside, settings)] = file, beside
            for future in as_completed(futures):
                file, beside = futures[future]
                if isinstance(future.exception(), BrokenProcessPool):
                    raise ValueError(why_broken(futures))
                copy = copies[file.path] = future.result()
                finish(target, file.path, beside, copy)
                before += copy.before
                after += copy.after
                bar.set_postfix_str(megabytes(before, after), refresh=False)
                bar.update()
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown(cancel_futures=True)
    return copies


def why_broken(futures):
    """A process of the pool was killed: which files were being read, as a sentence."""
    names = []
    for future, (file, beside) in futures.items():
        if beside.exists() and isinstance(future.exception(), BrokenProcessPool):
            names.append(file.path)
    return ("a process was killed (memory full, or a video that FFmpeg dies of) while one of these was read: "
            + (", ".join(names) or "none yet"))


def finish(target, path, beside, copy):
    """List what went wrong with a file; then give its copy its name, or take away what an earlier run left of it."""
    if copy.problem:
        log_json(target / REPORT, file=path, frames=copy.frames, problem=copy.problem)
    if copy.problem and not copy.frames:
        beside.unlink()
        (target / path).unlink(missing_ok=True)                                 # it could be read once
    else:
        beside.replace(target / path)


def megabytes(before, after):
    return f"{before / 1e6:.1f} -> {after / 1e6:.1f} MB"


# ---- What came of it ----

def summary(target, files, copies):
    """What was copied and what could not be, in words. ValueError: too many of the videos are lost."""
    of_videos = [copies[path] for path in filter(is_video, files)]
    videos = len(of_videos)
    sizes = megabytes(sum(copy.before for copy in of_videos), sum(copy.after for copy in of_videos))
    words = [f"{target}: {videos} videos, {sizes}; {len(files) - videos} others"]
    lost = {path: copy for path, copy in copies.items() if copy.problem and not copy.frames}
    short = {path: copy for path, copy in copies.items() if copy.problem and copy.frames}
    for what, found in (("could not be read", lost), ("end early", short)):
        if found:
            words.append(f"{len(found)} {what}: {named(found)}")
    if sum(map(is_video, lost)) > MAX_BAD * videos:
        words.append(f"{target / REPORT} names all (at most {MAX_BAD:.0%} of the videos may be unreadable)")
        raise ValueError("; ".join(words))
    if lost or short:
        words.append(f"{target / REPORT} names all")
    return "; ".join(words)


def named(copies, most=10):
    """The first files and what is wrong with them."""
    names = []
    for path, copy in list(copies.items())[:most]:
        after = f"after {copy.frames} frames: " if copy.frames else ""
        names.append(f"{path} ({after}{copy.problem})")
    return ", ".join(names) + (", ..." if len(copies) > most else "")


def main(argv=None):
    args = parse_args(argv)
    source, target = Path(args.source).resolve(), Path(args.target).resolve()
    check_folders(source, target)
    settings = dict(size=args.size, quality=args.quality, intra=args.intra)
    before = listed_before(target, settings)
    folders, files, bad = list_tree(source)
    todo, done = compare(source, target, files, before)
    copies = {path: Copy(*problem) for path, problem in bad.items()} | done
    bar = tqdm(total=len(files), initial=len(done), desc=f"shrink {source.name}", unit="file")
    work = target / WORK
    try:
        shutil.rmtree(work, ignore_errors=True)                                 # a killed run left it
        for folder in (work, *(target / folder for folder in folders)):
            folder.mkdir(parents=True, exist_ok=True)
        write_report(target, settings, copies)
        copies |= copy_all(source, target, todo, settings, args.workers, bar)
    except OSError as error:
        raise OSError(f"cannot write to {target} (disk full?): {error}; the same command goes on from here") from None
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from here")
    finally:
        bar.close()
        shutil.rmtree(work, ignore_errors=True)
    print(summary(target, files, copies))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)                   # as Ctrl-C
    run(main)
