"""README.md and docs/ are true: commands parse and split over processes, code runs, names exist."""
import importlib
import itertools
import math
import re
import shlex

import av
import numpy as np
import pytest
from conftest import ROOT, log_lines, numbered_frames, numbers, read_rows, train, write_video

import finetune
import linear_probe
import models
import pretrain
import retrieval
from common import toy
from common.video import decode, probe
from tools import curves, neighbours, preview, psi

README = (ROOT / "README.md").read_text()
DOCS = sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", *DOCS)}
PROSE = {page: re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S) for page in PAGES}
SEVERAL = dict(S=("$U", "$H"), A=("r3d18", "r2plus1d18", "s3dg"))  # as docs/results.md says
# does not match python -m
START = re.compile(r"(python|torchrun\b[^&\n]*?) ((?:\w+/)*\w+\.py)([^&|;#\n]*)")
FOLDERS = ("common", "docs", "tests", "tools")


def quoted(pattern, text):
    """The code spans of a page that match a pattern."""
    return [words for words in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(pattern, words)]


def commands(page):
    """The commands of a page, $U and the like filled in -> {(script, arguments, processes)}"""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page].replace("\\\n", " "), re.M | re.S)
    shell = [block for language, block in blocks if language in ("", "bash")]
    code = "\n".join(shell + quoted(".*", PROSE[page]))
    names = dict(re.findall(r'(?<![-\w])([A-Z])="([^"]*)"', code))  # U="--dataset ucf101 ..."
    found = set()
    for choice in itertools.product(*SEVERAL.values()):
        filled = re.sub(r'(?<![-\w])[A-Z]="[^"]*"', "", code)
        for _ in range(3):                                          # $S is $U, which is ...
            meaning = names | dict(zip(SEVERAL, choice))
            filled = re.sub(r"\$(\w+)", lambda name: meaning.get(name[1], name[0]), filled)
        for start, script, rest in START.findall(filled):
            counts = map(int, re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", start))
            found.add((script, rest.strip(), math.prod(counts)))
    return found


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


COMMANDS = sorted(set().union(*map(commands, PAGES)))


# ---- Commands and code ----

def test_the_pages_name_a_command_for_each_stage():
    stages = {"pretrain.py", "finetune.py", "linear_probe.py", "retrieval.py"}
    assert stages <= {script for script, *_ in COMMANDS}


@pytest.mark.parametrize("script, argv, processes", COMMANDS)
def test_each_command_parses_and_its_batch_splits_over_its_processes(script, argv, processes):
    args = module_of(script).parse_args(shlex.split(argv))
    if script in ("pretrain.py", "finetune.py"):
        parts = processes * vars(args).get("accumulate", 1)
        groups = 2 if script == "pretrain.py" else 1
        assert args.batch_size % (groups * parts) == 0
        assert args.batch_size // parts >= 2                        # what BatchNorm needs


# {section: code}
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n[^#]*?```python\n(.*?)```", README, re.M | re.S))


def test_readmes_commands_for_own_videos_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, count in (("MY_VIDEOS/train", 8), ("MY_VIDEOS/val", 1), ("OTHER_VIDEOS", 1)):
        for seed, cls in enumerate(toy.TOY_CLASSES[:2] * count):
            file = tmp_path / part / cls / f"{seed}.avi"
            toy.write_video(file, toy.toy_video(cls, np.random.default_rng(seed)))
    section = README.split("## Your own videos")[1].split("\n## ")[0]
    for _, script, argv in START.findall(section):
        module_of(script).main(shlex.split(argv))
    out = tmp_path / "runs" / "folder-r3d18_narrow"
    assert log_lines(out)[-1]["epoch"] == 50 and (tmp_path / "neighbours.png").exists()
    rows = read_rows(out / "finetune-folder-4x-1" / "predictions.jsonl")
    assert {row["predicted"] for row in rows} <= {*toy.TOY_CLASSES[:2]} and len(rows) == 2


def test_readmes_snippet_of_the_losses_runs_and_gives_gradients():
    names = {}
    exec(SNIPPETS["Use the losses"], names)
    assert names["psi"].grad.any() and names["phi"].grad.any()


def test_readmes_snippet_of_the_features_runs_on_what_retrieval_writes(
        retrieved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savez("found.npz", **retrieved[1])
    exec(SNIPPETS["Use the features"], {})
    assert 0 <= float(capsys.readouterr().out) <= 1


def test_a_backbone_added_by_readmes_snippet_trains(world, tmp_path, monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "mc3", None)              # removed after the test
    exec(SNIPPETS["Add a backbone"], dict(vars(models)))            # at the end of models.py
    assert train(world, tmp_path, "--epochs", 1, "--arch", "mc3")["args"]["arch"] == "mc3"


def test_a_strangers_path_from_clone_to_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psi, "GROUPS", 8)
    monkeypatch.setattr(toy, "VIDEOS", toy.VIDEOS[::4])             # two of each class and part
    pretrain.main(["--epochs", "1", "--log-every", "2"])            # generates the toy set, trains
    out = tmp_path / "runs" / "toy-r3d18_narrow"
    assert log_lines(out)[-1]["epoch"] == 1
    preview.main([])
    linear_probe.main(["--windows", "1"])
    retrieval.main(["--windows", "1", "--features", "found.npz"])
    finetune.main(["--windows", "1", "--epochs", "1", "--crops", "centre"])
    curves.main([str(out)])
    neighbours.main(["found.npz"])
    psi.main([])
    printed = capsys.readouterr().out
    for words_of in ("linear SVM on toy", "R@1", "fine-tuned on toy"):
        assert words_of in printed
    for file in ("figure2.png", "curves.png", "neighbours.png", "psi.png", "psi.json"):
        assert (tmp_path / file).stat().st_size > 1000


def test_a_long_video_is_cut_as_data_md_says_without_losing_a_frame(tmp_path):
    command = re.search(r"ffmpeg (-i .*)", PAGES["docs/data.md"])[1]
    words = dict(zip(*[iter(shlex.split(command)[:-1])] * 2))       # all flags have a value
    assert words["-c"] == "copy" and words["-map"] == "0:V:0"       # as below
    frames = numbered_frames(200)
    long = write_video(tmp_path / "long.mp4", frames, "libx264", preset="ultrafast", g="50")
    muxer = dict(segment_time="3", reset_timestamps=words["-reset_timestamps"])
    with av.open(str(long)) as source, av.open(
            str(tmp_path / "%05d.mp4"), "w", format=words["-f"], options=muxer) as pieces:
        stream = pieces.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                pieces.mux(packet)
    files = sorted(tmp_path.glob("0*.mp4"))
    lengths = [probe(file)[0] for file in files]
    assert lengths == [100, 50, 50]                                 # after 3 and 6 s, at key frames
    shown = [numbers(decode(file, range(n))) for file, n in zip(files, lengths)]
    assert sum(shown, []) == list(range(200))


# ---- What the pages name ----

@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\(([^)]+)\)", PROSE[page])
    inside = [link.split("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert [link for link in inside if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_modules_functions_files_tests_and_flags_that_are_named_exist(page):
    text = "\n".join(line for line in PROSE[page].splitlines() if "88ffee0" not in line)
    files = [file for folder in ("", *FOLDERS) for file in (ROOT / folder).glob("*.py")]
    source = "".join(file.read_text() for file in files)
    named = quoted(r"(\w+/)?\w+\.(py|md|txt)", text)
    missing = [name for name in named if not (ROOT / name).is_file()
               and ("/" in name or name.endswith(".py"))]
    for name in quoted(r"[a-z_]\w*(\.\w+)+", text):
        module, _, attribute = name.rpartition(".")
        if (ROOT / f"{module.replace('.', '/')}.py").is_file() and attribute not in ("py", "md"):
            if not hasattr(importlib.import_module(module), attribute):
                missing.append(name)
    missing += [name for name in quoted(r"test_\w+", text) if f"def {name}(" not in source]
    flags = {words.split()[0].split("=")[0] for words in quoted(r"--[a-z].*", text)} - {"--help"}
    missing += [flag for flag in sorted(flags) if f'"{flag}"' not in source]
    assert missing == []
