"""The commands that README.md and docs/ name: each of the four stages' is started for one step on real videos.

    python tools/commands.py                        # takes more than an hour on two cores
    python tools/commands.py --list                 # only say them, with $U and the like written out

Data: a few real videos of ../shared in the layout and lists of each data set (Diving48's names stand for videos of
Kinetics: none of its own are at hand). Networks, frames, pixels and terms are the command's; --epochs, --batch-size and
--windows are made small, torchrun and its processes are left out.
"""
import argparse
import importlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.flags import Formatter
from common.processes import run

VIDEOS = ROOT.parent / "shared" / "videos"
SMALL = {"pretrain.py": "--epochs 1 --batch-size 4 --log-every 1 --warmup-epochs 0", "linear_probe.py": "--windows 1",
         "retrieval.py": "--windows 1 --k 1 2",
         "finetune.py": "--epochs 1 --batch-size 2 --windows 1 --warmup-epochs 0"}
SEVERAL = dict(S=("$U", "$H"), A=("r3d18", "r2plus1d18", "s3dg"))               # what docs say that these stand for
MEANING = re.compile(r'(?<![-\w])([A-Z])="([^"]*)"')                             # U="--dataset ucf101 ..."
START = re.compile(r"(python|torchrun\b[^&]*?) ((?:\w+/)*\w+\.py)([^&|;#]*)")   # not python -m ...


class Command(NamedTuple):
    """A command that a page names."""
    page: str                                                                   # below the repository's root
    script: str                                                                 # likewise
    argv: list                                                                  # of the script
    processes: int                                                              # that torchrun starts

    def __str__(self):
        return f"{self.script} {shlex.join(self.argv)}"


def pages():
    """README.md and what lies in docs/ -> paths."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(*files):
    """Every command of these pages (without any: of all) that starts a script, in their order, each once.

    They stand in blocks of code and between backticks; $U is what the page says it is (U="..."), $S and $A are several
    (SEVERAL), of which each makes a command -> list of Command.
    """
    found = []
    for file in files or pages():
        for text in code_of(file):
            for match in START.finditer(text):
                command = as_command(file, *match.groups())
                if command not in found:
                    found.append(command)
    return found


def code_of(file):
    """A page's lines of shell, and what stands between backticks, with what the page says of $U put in -> strings."""
    code, language = [], None                                                   # None: outside of a block
    for line in file.read_text().replace("\\\n", " ").splitlines():            # a command's lines joined
        if line.startswith("```"):
            language = line.strip("` ") if language is None else None
        elif language is None:
            code += re.findall(r"`([^`]+)`", line)
        elif language in ("", "bash"):
            code.append(line)
    names = dict(MEANING.findall("\n".join(code)))
    found = []
    for line in code:
        found += written_out(MEANING.sub("", line), names)
    return found


def written_out(line, names):
    """A line with the names' meanings put in, several where SEVERAL gives a name several."""
    lines = []
    for choice in itertools.product(*SEVERAL.values()):
        meanings = names | dict(zip(SEVERAL, choice))
        text = line
        for _ in range(3):                                                      # $S stands for $U, which stands for ...
            text = re.sub(r"\$(\w+)", lambda name: meanings.get(name[1], name[0]), text)
        lines.append(text)
    return lines


def as_command(file, start, script, rest):
    """One match of START -> Command."""
    counts = [int(count) for count in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", start)]
    return Command(os.path.relpath(file, ROOT), script, shlex.split(rest), math.prod(counts))


def module_of(script):
    """The module of a script, tools/NAME.py or NAME.py. ModuleNotFoundError: there is none."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


# ---- Starting them ----

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="only say the commands")
    return parser.parse_args(argv)


def link(file, place):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(file)


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def lay_out(root):
    """UCF-101, HMDB51, K400 and Diving48 below root, as the commands name them: a few real videos each."""
    lay_out_ucf101(root)
    lay_out_hmdb51(root)
    names = ("R6llTwEh07w.mp4", "SOX5yA1l24A.mp4", "test.mp4", "part_0.mp4", "carphone_pristine.mp4", "realshort.mp4")
    for n, name in enumerate(names):
        link(VIDEOS / "odd" / name, root / "K400" / f"class{n % 2}" / name)
        link(VIDEOS / "odd" / name, root / "Diving48" / "rgb" / f"dive_{n:05d}.mp4")
    for version in ("Diving48", "Diving48_V2"):
        for part, numbers in (("train", range(4)), ("test", range(4, 6))):
            rows = [dict(vid_name=f"dive_{n:05d}", label=n % 2, start_frame=0, end_frame=99) for n in numbers]
            (root / "Diving48" / f"{version}_{part}.json").write_text(json.dumps(rows))


def lay_out_ucf101(root):
    lists = {"train": [], "test": []}
    for number, cls in enumerate(("Lunges", "Punch"), 1):
        files = sorted((VIDEOS / "ucf_original" / "UCF-101" / cls).iterdir())
        for file in (files[0], *files[-2:]):
            link(file, root / "UCF-101" / cls / file.name)
        lists["test"].append(f"{cls}/{files[0].name}")
        lists["train"] += [f"{cls}/{file.name} {number}" for file in files[-2:]]
    folder = root / "ucfTrainTestlist"
    write_lines(folder / "classInd.txt", ["1 Lunges", "2 Punch"])
    write_lines(folder / "trainlist01.txt", lists["train"])
    write_lines(folder / "testlist01.txt", lists["test"])


def lay_out_hmdb51(root):
    names = {"cartwheel": ("cartwheel.avi", "hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi"),
             "wave": ("RATRACE_wave_f_nm_np1_fr_goo_37.avi", "TrumanShow_wave_f_nm_np1_fr_med_26.avi")}
    for cls, (train, test) in names.items():
        for name in (train, test):
            link(VIDEOS / "odd" / name, root / "HMDB51" / cls / name)
        write_lines(root / "testTrainMulti_7030_splits" / f"{cls}_test_split1.txt", [f"{train} 1 ", f"{test} 2 "])


def made_small(command):
    """The arguments with which a command is started here: below this folder, and one step."""
    argv = [re.sub(r"^/(data|shared)/", "", word) for word in command.argv]
    return argv + SMALL[command.script].split()


def main(argv=None):
    args = parse_args(argv)
    found = commands()
    if args.list:
        print(*(f"{command.page}: {command}" for command in found), sep="\n")
        return
    if not VIDEOS.is_dir():
        raise ValueError(f"{VIDEOS} is not there, whose videos the commands are started on")
    todo = {(command.script, *command.argv): command for command in found if command.script in SMALL and command.argv}
    todo = sorted(todo.values(), key=lambda command: command.script != "pretrain.py")   # checkpoints come first
    failed, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        lay_out(Path(folder))
        for command in todo:
            print(f"==== {command}", flush=True)
            try:
                module_of(command.script).main(made_small(command))
            except (Exception, SystemExit) as error:
                failed.append(f"{command}: {error!r}")
                print(failed[-1], flush=True)
    print(f"{len(todo)} commands in {time.monotonic() - begun:.0f} s, {len(failed)} failed")
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    run(main)
