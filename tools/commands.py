"""Start every command of README for one step, as it stands but for data and size: python tests/commands.py

Data: a few real videos of ../shared in the layout and lists of each data set (Diving48's names stand for videos of
Kinetics: none of its own are at hand). Networks, frames, pixels and terms are the command's; --epochs, --batch-size and
--windows are made small, torchrun and its processes are left out. Takes more than an hour on two cores.
"""
import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path

from conftest import SHARED, write_lists
from test_readme import SCRIPTS, commands

VIDEOS = SHARED / "videos"
SMALL = {"pretrain.py": "--epochs 1 --batch-size 4 --log-every 1 --warmup-epochs 0", "linear_probe.py": "--windows 1",
         "retrieval.py": "--windows 1 --k 1 2",
         "finetune.py": "--epochs 1 --batch-size 2 --windows 1 --warmup-epochs 0"}


def link(file, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file)


def lay_out(root):
    """UCF-101, HMDB51, K400 and Diving48 below root, as README's commands name them: a few real videos each."""
    lists = {"train": [], "test": []}
    for number, cls in enumerate(("Lunges", "Punch"), 1):
        files = sorted((VIDEOS / "ucf_original" / "UCF-101" / cls).iterdir())
        for part, chosen in (("test", files[:1]), ("train", files[-2:])):
            for file in chosen:
                link(file, root / "UCF-101" / cls / file.name)
                lists[part].append(f"{cls}/{file.name}" + (f" {number}" if part == "train" else ""))
    write_lists(root / "ucfTrainTestlist", ("Lunges", "Punch"), trainlist01=lists["train"], testlist01=lists["test"])

    odd, splits = VIDEOS / "odd", root / "testTrainMulti_7030_splits"
    splits.mkdir()
    hmdb = {"cartwheel": ("cartwheel.avi", "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi"),
            "wave": ("RATRACE_wave_f_nm_np1_fr_goo_37.avi", "TrumanShow_wave_f_nm_np1_fr_med_26.avi")}
    for cls, names in hmdb.items():
        for name in names:
            link(odd / name, root / "HMDB51" / cls / name)
        (splits / f"{cls}_test_split1.txt").write_text(f"{names[0]} 1 \n{names[1]} 2 \n")

    for n, name in enumerate(("R6llTwEh07w.mp4", "SOX5yA1l24A.mp4", "test.mp4", "part_0.mp4", "carphone_pristine.mp4",
                              "realshort.mp4")):
        link(odd / name, root / "K400" / f"class{n % 2}" / name)
        link(odd / name, root / "Diving48" / "rgb" / f"dive_{n:05d}.mp4")
    for version in ("Diving48", "Diving48_V2"):
        for part, numbers in (("train", range(4)), ("test", range(4, 6))):
            rows = [dict(vid_name=f"dive_{n:05d}", label=n % 2, start_frame=0, end_frame=99) for n in numbers]
            (root / "Diving48" / f"{version}_{part}.json").write_text(json.dumps(rows))


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not VIDEOS.is_dir():
        sys.exit(f"{VIDEOS} is not there")
    failed, begun = [], time.monotonic()
    todo = dict.fromkeys((script, " ".join(argv)) for script, argv, _ in commands() if argv)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        lay_out(Path(folder))
        for script, words in sorted(todo, key=lambda command: command[0] != "pretrain.py"):    # checkpoints come first
            words = re.sub(r"--(data|index|out) /(data|shared)/", r"--\1 ", words)
            print(f"==== {script} {words}", flush=True)
            try:
                SCRIPTS[script].main(shlex.split(words) + SMALL[script].split())
            except (Exception, SystemExit) as error:
                failed.append(f"{script} {words}: {error!r}")
                print(failed[-1], flush=True)
    print(f"{len(todo)} commands in {time.monotonic() - begun:.0f} s, {len(failed)} failed", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
