"""Part 1 of benchmark.py: CPU time for a clip pair on one core, of every reader installed, on the same requests.

Our reader is held to three things, and what is missed is said: every frame is the right one; no other library takes
less CPU time, on the mean of a kind of files; shrunk copies are GOALS times as quick to read, and no larger.
"""
import multiprocessing
import os
import random
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import torch

from common.video import open_container
from tools.readers import Floor, Video, draw_request, exactness, installed, ours, versions

ORIGINALS, LONG, SHRUNK = "originals", "H.264 of Kinetics' size", "shrunk copies"
GOALS = {ORIGINALS: 1.4, LONG: 6}                                               # times as fast on the shrunk copy
TURN = 5                                                                        # clip pairs in a row: loaders read on


def described(path, known, kind=None):
    """-> Video, and its codec; kind: else what the codec and the length say."""
    with open_container(path) as container:
        codec = container.streams.video[0].codec_context
    length, height, width, _, packets = known
    if kind is None and codec.name == "h264" and length >= 250:
        kind = LONG
    if kind is None:
        kind = ORIGINALS if codec.name == "mpeg4" else "others"
    return Video(path, length, height, width, packets, kind), codec.codec_tag.upper()


def sampled(videos, count):
    """Of the videos of each kind and codec up to `count`, evenly by length; videos: [(Video, codec)]."""
    groups = defaultdict(list)
    for video, codec in videos:
        groups[video.kind, codec].append(video)
    chosen = []
    for group in groups.values():
        group.sort(key=lambda video: video.length)
        places = {int((k + 0.5) / count * len(group)) for k in range(count)}
        chosen += [group[place] for place in sorted(places)]
    return chosen


def in_child(function, jobs, timeout=120, anew=False):
    """function(*job) for each job, in another process -> results, or the words of an error.

    The process is started anew for the next job where one hangs or crashes, or always.
    """
    pool, results = None, []
    context = multiprocessing.get_context("forkserver")
    for job in jobs:
        if pool is None:
            pool = context.Pool(1, initializer=repr, initargs=(function,))      # imports what the function needs
            pool.apply(int)                                                     # its start is no part of the time
        lost = anew
        try:
            results.append(pool.apply_async(function, job).get(timeout))
        except multiprocessing.TimeoutError:
            results.append(f"hangs or crashes: nothing within {timeout} s")
            lost = True
        except Exception as error:                                              # any library's
            results.append(f"{type(error).__name__}: {error}"[:200])
        if lost:
            pool.terminate()
            pool = None
    if pool:
        pool.terminate()
    return results


@contextmanager
def one_core():
    """Some libraries take all cores, whatever one says."""
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, cores)


def timed(video, twin, readers, pairs):
    """-> {name: [CPU ms, ms] of a clip pair} of readers, the floor, and our reader on the shrunk copy (twin, or None);
    all answer the same requests in turn, after a turn to warm up."""
    requests = {seed: draw_request(video, seed) for seed in range(-TURN, pairs)}
    entrants = {name: (reader, video) for name, reader in readers.items()}
    for name, floor in (("floor", Floor(video)), ("pictures", Floor(video, pictures=True))):
        if floor.gives(requests.values()):
            entrants[name] = floor, video
    if twin:
        entrants["shrunk"] = ours, twin
    spent = {name: [] for name in entrants}
    for first in range(-TURN, pairs, TURN):
        for name in random.Random(first).sample(sorted(entrants), len(entrants)):
            reader, file = entrants[name]
            for seed in range(first, min(first + TURN, pairs)):
                begun, cpu = time.perf_counter(), time.process_time()
                reader(file, *requests[seed])
                if seed >= 0:
                    spent[name].append((time.process_time() - cpu, time.perf_counter() - begun))
    return {name: [statistics.median(column) * 1e3 for column in zip(*rows)] for name, rows in spent.items()}


def reading(split, known, shrunk, checkout, count, pairs):
    """Part 1, of up to `count` videos of each kind and codec, `pairs` clip pairs each.

    split, known: Split and scan; shrunk: those of the copies, or None; checkout: of an older reader, or None
    -> files {path: {name: dict}}, summary (`summarised`), versions {reader: str}, absent {reader: why it is left out}.
    """
    readers, absent = installed(checkout)
    videos = sampled([described(str(split.found[path]), known[path]) for path in split.paths], count)
    twins = twins_of(videos, *shrunk) if shrunk else {}
    videos += twins.values()
    right = {}
    for name, reader in readers.items():
        right[name] = in_child(exactness, [(reader, video, range(4)) for video in videos])
    files = {}
    for k, video in enumerate(videos):
        exact = {name: right[name][k] for name in readers}                      # (right, asked), or what went wrong
        files[video.path] = compared(video, twins.get(video.path), readers, exact, pairs)
    summary = summarised(videos, twins, files)
    print_summary(summary, absent)
    return dict(files=files, summary=summary, versions=versions(readers), absent=absent)


def twins_of(videos, split, known):
    """{path of a video: Video of its shrunk copy}; split, known: of the copies."""
    by_name = {Path(path).name: path for path in split.paths}
    twins = {}
    for video in videos:
        path = by_name.get(Path(video.path).name)
        if path and known[path][0] == video.length:
            twins[video.path], _ = described(str(split.found[path]), known[path], SHRUNK)
    return twins


def compared(video, twin, readers, exact, pairs):
    """What each reader does with one video -> {name: dict}; exact: {name: (right, asked), or what went wrong}."""
    able = {name: reader for name, reader in readers.items() if name == "ours" or not isinstance(exact[name], str)}
    with one_core():
        ms = timed(video, twin, able, pairs)
    rows = {name: dict(exact=exact[name]) for name in readers}
    for name, (cpu, wall) in ms.items():
        rows.setdefault(name, {}).update(cpu_ms=cpu, wall_ms=wall, of_ours=cpu / ms["ours"][0])
    print(f"  {Path(video.path).name}, {video.length} frames, {video.kind}:")
    for name, row in rows.items():
        print(f"    {name:12} {row_in_words(row)}")
    return rows


def row_in_words(row):
    exact, words = row.get("exact"), []
    if "cpu_ms" in row:
        words.append(f"{row['cpu_ms']:7.1f} ms CPU {row['wall_ms']:7.1f} ms a pair, {row['of_ours']:5.2f} of ours")
    if exact:
        words.append(exact if isinstance(exact, str) else f"{exact[0]} of {exact[1]} frames right")
    return "; ".join(words)


def summarised(videos, twins, files):
    """-> {kind: {name: dict}}: CPU time in units of ours (geometric mean, least of a file), right and asked frames, the
    number of files; and, where there are shrunk copies, their size in units of the originals'."""
    summary = {}
    for kind in dict.fromkeys(video.kind for video in videos):
        mine = [video for video in videos if video.kind == kind]
        rows = defaultdict(list)
        for video in mine:
            for name, row in files[video.path].items():
                rows[name].append(row)
        summary[kind] = {name: mean_of_files(named) for name, named in rows.items()}
        copied = [video.path for video in mine if video.path in twins]
        if copied:
            sizes = [sum(map(os.path.getsize, paths)) for paths in (copied, [twins[path].path for path in copied])]
            summary[kind]["shrunk"]["size"] = sizes[1] / sizes[0]
    return summary


def mean_of_files(rows):
    """What one reader did on several files."""
    ratios = [row["of_ours"] for row in rows if "of_ours" in row]
    exact = [row["exact"] for row in rows if isinstance(row.get("exact"), tuple)]
    result = dict(files=len(rows), failed=sum(isinstance(row.get("exact"), str) for row in rows))
    if ratios:
        result |= dict(mean=statistics.geometric_mean(ratios), least=min(ratios), most=max(ratios))
    if exact:
        right, asked = zip(*exact)
        result |= dict(right=sum(right), asked=sum(asked))
    return result


def print_summary(summary, absent):
    """Print each kind's ratios, and what falls behind: a reader that is faster than ours, a wrong frame of ours."""
    for kind, by_name in summary.items():
        print(f"  {kind}, {by_name['ours']['files']} files; CPU time, ours = 1 (geometric mean, least):")
        for name, x in by_name.items():
            words = f"{x['mean']:.2f}, {x['least']:.2f}" if "mean" in x else "no file"
            words += f"; {x['right']} of {x['asked']} frames right" if "asked" in x else ""
            words += f"; fails on {x['failed']} of {x['files']} files" if x["failed"] else ""
            words += f"; size {x['size']:.2f}" if "size" in x else ""
            print(f"    {name:12} {words}{missed(kind, name, x)}")
    for name, why in absent.items():
        print(f"  {name}: {why}")


def missed(kind, name, x):
    """" MISSED", where what the benchmark holds our reader to is not reached, or ""."""
    if name == "ours":
        reached = x["failed"] == 0 and x["right"] == x["asked"]
    elif name == "shrunk":
        reached = x["mean"] <= 1 / GOALS.get(kind, 1) and x["size"] <= 1
    elif name in ("floor", "pictures", "old") or "mean" not in x:
        reached = True
    else:
        reached = x["mean"] > 1
    return "" if reached else "  MISSED"
