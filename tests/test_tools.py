"""What is run by hand: pictures show what is true and say it without colour; soak and commands find what is wrong."""
import ast
import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LENGTHS, ROOT, fails, forkserver, numbered, write_video
from PIL import Image

import retrieval
from common.splits import load_split, scan
from data import MEAN, STD, Pairs, augmented, collate
from tools import commands, curves, neighbours, pictures, preview, psi, soak

DRAWING = (curves, neighbours, preview, psi)


@pytest.fixture
def log(tmp_path):
    """The folder of a run of 30 log lines; the last one is cut, another tells of a video."""
    rows = [dict(step=10 * n, loss=9 - 0.1 * n, inst=4.0, speed=1.4 - 0.01 * n, speed_acc=0.25 + 0.02 * n,
                 speed_chance=0.3, lr=1e-3, clips_per_s=300.0, waiting_for_data=0.05) for n in range(1, 31)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(7, json.dumps(dict(step=70, unreadable="a.avi", problem="broken")))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 310, "lo')
    return tmp_path / "run"


@pytest.fixture(scope="module")
def pairs(videos, tmp_path_factory):
    """Groups of two of thirteen tiny videos, clips of 4 frames."""
    split = load_split("folder", videos)
    return Pairs(split, split.paths, scan(split, tmp_path_factory.mktemp("index") / "i.json"), 4, 16)


def drawable(tool, log, videos, out):
    """A command line of a drawing tool."""
    words = {"curves": [log], "neighbours": [log / "found.npz"],
             "preview": ["--dataset", "folder", "--data", videos, "--frames", 4, "--size", 16, "--workers", 0],
             "psi": ["--dataset", "folder", "--data", videos, "--checkpoint", "none.pt"]}
    return [*words[tool.__name__.removeprefix("tools.")], "--out", out]


# ---- All tools ----

SCRIPTS = [file for file in sorted((ROOT / "tools").glob("*.py")) if "__main__" in file.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_each_tool_says_its_commands_and_refuses_what_it_does_not_know(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(script), run_name="__main__")
    assert f"python tools/{script.name}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [str(script), "--nothing"])
    with pytest.raises(SystemExit, match="^2$"):
        runpy.run_path(str(script), run_name="__main__")
    assert " error: " in capsys.readouterr().err


def test_a_tool_as_a_script_ends_in_one_sentence_where_its_videos_are_broken(videos, tmp_path, monkeypatch):
    copy = shutil.copytree(videos, tmp_path / "videos")
    words = [ROOT / "tools" / "preview.py", "--dataset", "folder", "--data", copy, "--frames", 4, "--size", 16,
             "--workers", 0, "--out", tmp_path / "a.png"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    runpy.run_path(sys.argv[0], run_name="__main__")
    assert (tmp_path / "a.png").stat().st_size > 1000
    for file in copy.rglob("*.avi"):                                            # broken, but of the same size and time
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(SystemExit, match="^preview.py: error: 10 videos in a row are unreadable, the last: .*Invalid"):
        runpy.run_path(sys.argv[0], run_name="__main__")


# ---- All pictures ----

@pytest.mark.parametrize("tool", DRAWING, ids=lambda tool: tool.__name__)
def test_without_matplotlib_a_picture_is_refused_in_one_sentence_before_any_work(
        tool, log, videos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = fails(tool.main, drawable(tool, log, videos, tmp_path / "new" / "a.png"))
    assert said.endswith("a picture needs matplotlib: pip install matplotlib") and not (tmp_path / "new").exists()


@pytest.mark.parametrize("tool", DRAWING, ids=lambda tool: tool.__name__)
def test_a_picture_that_cannot_be_written_is_refused_before_any_work(tool, log, videos, tmp_path):
    said = fails(tool.main, drawable(tool, log, videos, tmp_path / "figure"))
    assert "--out must end in .png, .jpg, .pdf or .svg, but is" in said
    (tmp_path / "file").write_text("")
    said = fails(tool.main, drawable(tool, log, videos, tmp_path / "file" / "a.png"))
    assert "File exists" in said or "Not a directory" in said


def test_no_file_imports_matplotlib_where_it_is_not_asked_to_draw():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/*.py")):
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "matplotlib" not in "".join(map(ast.unparse, top)), file


def test_curves_of_different_runs_differ_in_marker_and_line_as_well_as_in_colour():
    looks = [pictures.style(number) for number in range(8)]
    assert len({look["color"] for look in looks}) == len({look["marker"] for look in looks}) == 8
    assert all(one["linestyle"] != other["linestyle"] for one, other in zip(looks, looks[1:]))


def test_names_of_any_bytes_can_be_drawn():
    name = os.fsdecode(b"caf\xe9\n$x$ \xe4\xb8\xad")
    assert pictures.printable(name) == "caf\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}$x$ 中"


# ---- A run's log ----

def test_each_value_of_a_log_is_drawn_against_its_steps_and_chance_is_dotted(log):
    figure = curves.draw([curves.read_log(log)])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert len(panels) == 7 and not any("order" in title or "ψ" in title for title in panels)
    ours, chance = panels["speed is right"].lines
    assert ours.get_xdata().tolist() == chance.get_xdata().tolist() == list(range(10, 310, 10))
    assert ours.get_ydata() == pytest.approx([100 * (0.25 + 0.02 * n) for n in range(1, 31)])
    assert set(np.round(chance.get_ydata(), 9)) == {30} and (chance.get_linestyle(), ours.get_linestyle()) == (":", "-")
    assert panels["speed is right"].get_ylabel() == "%"
    assert panels["time spent waiting for data"].get_xlabel() == "step"


def test_the_curves_of_several_runs_are_named_in_the_legend(log, tmp_path):
    second = tmp_path / "_run $2"
    second.mkdir()
    (second / "log.jsonl").write_text('{"step": 5, "loss": 1.0, "lr": 0.1}\n{"step": 10, "loss": 0.5, "lr": 0.1}\n')
    curves.main([str(log), str(second / "log.jsonl"), "--out", str(tmp_path / "a.png")])
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10
    figure = curves.draw([curves.read_log(log), curves.read_log(second)])
    legend, = figure.legends
    assert [text.get_text() for text in legend.texts] == [f"run {log}", f"run {second}", "by chance"]
    panel = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("loss"))
    assert [len(line.get_xdata()) for line in panel.lines] == [30, 2]


def test_a_folder_without_a_logged_step_is_refused_in_one_sentence(tmp_path):
    assert "there is no file" in fails(curves.main, [tmp_path, "--out", tmp_path / "a.png"])
    (tmp_path / "log.jsonl").write_text('{"step": 1, "unreadable": "a.avi"}\n')
    assert "has no line of a step yet" in fails(curves.main, [tmp_path, "--out", tmp_path / "a.png"])


# ---- Figure 2 ----

def test_the_preview_shows_the_frames_as_the_network_gets_them_and_marks_where_they_lie(pairs):
    group = collate([pairs[0, 1]])
    figure = preview.draw(pairs, group)
    clips = augmented(group["clips"], group["seed"])                            # (2, 2, 3, T, H, W)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    shown = []
    for n, (line, *strips) in enumerate((figure.axes[:3], figure.axes[3:])):
        assert f", {pairs.shapes[group['video'][n], 0]} frames" in line.get_title(loc="left")
        marks = [mark.get_xdata() for mark in line.lines]                       # of p: its frames, the last; of q
        for k, strip in enumerate(strips):
            start, speed = group["start"][n, k].item(), pairs.speeds[group["speed"][n, k]]
            frames = [start + speed * t for t in range(pairs.T)]
            frames = frames[::-1] if group["direction"][n, k] else frames
            assert list(marks[2 * k]) == frames and list(np.ravel(marks[2 * k + 1])) == frames[-1:]
            assert [int(text.get_text()) for text in strip.get_xticklabels()] == frames
            image = strip.images[0].get_array()                                 # (16, 4 * 17 - 1, 3)
            wanted = ((clips[n, k] * std + mean).clamp(0, 1) * 255).to(torch.uint8)
            for t in range(pairs.T):
                assert np.array_equal(image[:, 17 * t:17 * t + 16], wanted[:, t].permute(1, 2, 0))
        shown.append(marks[2][0] - marks[0][0])
    assert shown[0] == shown[1]                                                 # one relative transformation
    shift = (group["start"][0, 1] - group["start"][0, 0]).item()
    title = figure.get_suptitle()
    assert f"{shift:+d} source frames from p to q" in title and preview.ORDER[group["order"][0]] in title
    assert title.count("backwards") == group["direction"][0].sum()


def test_the_preview_is_written_the_same_each_time_and_a_group_that_is_not_there_refused(videos, tmp_path):
    words = ["--dataset", "folder", "--data", videos, "--frames", 4, "--size", 16, "--workers", 0, "--group"]
    for name in ("a", "b"):
        preview.main([str(word) for word in (*words, 2, "--out", tmp_path / name / "new" / "a.png")])
    one, other = (Image.open(tmp_path / name / "new" / "a.png") for name in "ab")
    assert np.array_equal(one, other) and np.asarray(one).std() > 10
    assert f"--group must lie between 0 and {len(LENGTHS) // 2 - 1}, but is 15" in fails(
        preview.main, [*words, 15, "--out", tmp_path / "c.png"])
    assert not (tmp_path / "c.png").exists()


def test_a_clip_of_more_frames_than_fit_shows_some_of_them_first_and_last_included(pairs):
    clip = preview.Clip("p", None, list(range(40)), np.zeros((40, 16, 16, 3), np.uint8))
    axes = pictures.pyplot().figure().subplots()
    preview.draw_frames(axes, clip._replace(tau=preview.Tau(0, 1, False)), "black")
    numbers = [int(text.get_text()) for text in axes.get_xticklabels()]
    assert len(numbers) == preview.MOST and numbers[0] == 0 and numbers[-1] == 39


# ---- Contact sheet ----

def found_of(videos, **changed):
    """What retrieval.py --features writes, as far as the contact sheet reads it."""
    paths = sorted(LENGTHS)
    files, classes = [str(videos / path) for path in paths], [path.split("/")[0] for path in paths]
    arrays = dict(query_files=files[:3], query_classes=classes[:3], gallery_files=files, gallery_classes=classes,
                  nearest=[[1, 12, -1], [0, 2, 12], [12, 0, 1]],
                  cosines=[[0.9, 0.2, 0], [0.8, 0.7, 0.1], [0.5, 0.4, 0.3]])
    return {name: np.array(value) for name, value in (arrays | changed).items()}


def test_right_and_wrong_neighbours_differ_in_sign_and_line_and_each_says_its_class_and_cosine(videos):
    arrays = found_of(videos)
    rows = neighbours.rows_of(arrays, queries=10, neighbours=2)
    assert [[cell.verdict for cell in row] for row in rows] == [
        ["query", "right", "wrong"], ["query", "right", "right"], ["query", "wrong", "right"]]
    axes = neighbours.draw(rows).axes[:3]
    looks = [(place.get_xlabel(), place.spines["top"].get_linestyle(), [text.get_text() for text in place.texts])
             for place in axes]
    assert looks == [(" run", "-", []), ("+ run\ncosine 0.90", "-", ["+"]), ("× walk\ncosine 0.20", "--", ["×"])]


def test_neighbours_that_are_not_there_are_left_out_and_classes_that_are_unknown_judged_by_nobody(videos):
    rows = neighbours.rows_of(found_of(videos, query_classes=["", "", ""]), queries=2, neighbours=3)
    verdicts = [[cell.verdict for cell in row] for row in rows]
    assert verdicts == [["query", *["unknown"] * 2], ["query", *["unknown"] * 3]]
    assert rows[1][0].file == str(videos / sorted(LENGTHS)[2])


def test_a_video_that_is_gone_is_said_to_be_unreadable_and_a_frame_is_the_middle_one(videos, tmp_path):
    path = write_video(tmp_path / "a.avi", numbered(201))
    middle = neighbours.middle_frame(path)
    assert middle.shape == (160, 160, 3)
    bits = [int(part.mean() > 127) for part in np.array_split(middle[:, :, 0], 6, axis=1)]
    assert bits == [1, 1, 0, 0, 1, 0]                                           # the middle ones of 100's eight
    rows = neighbours.rows_of(found_of(videos, gallery_files=[str(tmp_path / "none.avi")] * 13), 1, 1)
    axes = neighbours.draw(rows).axes[1]
    assert "cannot be read" in [text.get_text() for text in axes.texts]


def test_a_damaged_video_is_shown_by_a_frame_of_what_can_be_read(shared):
    assert neighbours.middle_frame(shared / "videos" / "odd" / "corrupted.mp4").shape == (160, 160, 3)


def test_a_file_that_is_not_of_retrieval_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    for name, said in (("none", "there is no file"), ("text", "is no file that retrieval.py"),
                       ("other", "lacks cosines, gallery_classes, gallery_files")):
        assert said in fails(neighbours.main, [tmp_path / f"{name}.npz", "--out", tmp_path / "a.png"])


def test_the_sheet_of_what_retrieval_found_is_drawn(world, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                                 # where --data is a relative path
    (tmp_path / "videos").symlink_to(world / "videos")
    retrieval.main(["--dataset", "ucf101", "--data", "videos", "--annotations", str(world), "--checkpoint",
                    str(whole / "backbone.pt"), "--windows", "1", "--workers", "0", "--amp", "off", "--k", "3",
                    "--out", str(tmp_path), "--features", "found.npz"])
    monkeypatch.chdir(ROOT)
    neighbours.main([str(tmp_path / "found.npz"), "--out", str(tmp_path / "new" / "a.png")])
    assert np.asarray(Image.open(tmp_path / "new" / "a.png")).std() > 10
    rows = neighbours.rows_of(neighbours.read_features(tmp_path / "found.npz"), 6, 5)
    assert len(rows) == 6 and all(len(row) == 4 and Path(cell.file).is_file() for row in rows for cell in row)


# ---- Broken files, memory ----

def test_a_worker_that_crashes_or_hangs_is_named_and_the_next_job_done(tmp_path):
    good = soak.Job(write_video(tmp_path / "a.avi", numbered(6)), "flip 1", 1)
    gone = good._replace(file=tmp_path / "none.avi")
    with forkserver():
        found = soak.verdicts([gone, good])
        assert soak.verdicts([good], bound=0) == [soak.Outcome("HANG", 0)]
    assert found[0] == soak.Outcome("CRASH, exit status 1") and not found[1].is_wrong()


def test_memory_or_files_that_grow_are_found_and_others_not():
    flat = [(soak.Held(1000, 9), soak.Held(1500, 9))] * 4
    parents = [soak.Held(5000, 20)] * 4
    assert soak.what_grew(parents, flat) == []
    assert soak.what_grew([*parents[:3], soak.Held(9000, 20)], flat) == ["resident memory grows"]
    assert soak.what_grew(parents, [(soak.Held(1000, 9), soak.Held(9000, 10))] * 4) == [
        "resident memory grows", "open files grow"]


def test_files_of_batches_on_their_way_are_no_growth_and_a_file_that_stays_open_is():
    steps = np.arange(400)
    on_their_way = np.random.default_rng(0).integers(0, 20, 400)
    for leaked, grows in ((0 * steps, False), (steps // 100, True)):
        rows = np.stack([steps % 2, 1000 + on_their_way, 9 + on_their_way + leaked], axis=1)
        found = soak.middle_and_end(rows, 2)
        assert len(found) == 2 and all((end.files > middle.files) == grows for middle, end in found)
        assert all(abs(end.memory - middle.memory) < 9 for middle, end in found)


# ---- Commands of the pages ----

PAGE = '''
With `U="--dataset ucf101 --data UCF-101"` and H, `python linear_probe.py $U --C auto` (`python -m pytest tests`):
```bash
P="torchrun --nproc_per_node=8 pretrain.py" H="--dataset hmdb51 --data HMDB51"
. .venv/bin/activate && python pretrain.py                  # the toy set
srun torchrun --nnodes=4 --nproc_per_node=8 --rdzv_endpoint="$(hostname | head -n 1)" \\
    pretrain.py $H --arch $A --out "a b"; python tools/shrink.py A B
```
```python
python finetune.py
```
| run | `$P $S --epochs 3` |
'''


def test_every_command_of_a_page_is_found_with_its_names_written_out_and_its_processes(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    found = [(str(command), command.processes) for command in commands.commands(tmp_path / "page.md")]
    ucf, hmdb = "--dataset ucf101 --data UCF-101", "--dataset hmdb51 --data HMDB51"
    assert sorted(found) == sorted([
        (f"linear_probe.py {ucf} --C auto", 1), ("pretrain.py ", 1),
        *((f"pretrain.py {hmdb} --arch {arch} --out 'a b'", 32) for arch in ("r3d18", "r2plus1d18", "s3dg")),
        ("tools/shrink.py A B", 1),
        (f"pretrain.py {ucf} --epochs 3", 8), (f"pretrain.py {hmdb} --epochs 3", 8)])


def test_the_data_sets_that_commands_are_started_on_are_whole(shared, tmp_path):
    commands.lay_out(tmp_path)
    for dataset, data, train, test in (("ucf101", "UCF-101", 4, 2), ("hmdb51", "HMDB51", 2, 2),
                                       ("diving48", "Diving48", 4, 2), ("diving48v1", "Diving48", 4, 2)):
        for part, videos in (("train", train), ("test", test)):
            split = load_split(dataset, tmp_path / data, part=part)
            assert len(split.found) == len(split.paths) == videos, (dataset, part)


def test_each_command_is_started_once_and_those_that_fail_are_named(shared, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))                         # both are set by main
    words = ["--dataset", "ucf101", "--data", "UCF-101", "--checkpoint", "random", "--arch", "r3d18_narrow", "--frames",
             "4", "--size", "16", "--workers", "0", "--amp", "off"]
    good, bad = (commands.Command("a.md", "linear_probe.py", [*words, *more], 1) for more in ((), ("--C", "none")))
    monkeypatch.setattr(commands, "commands", lambda: [good, bad, good._replace(page="b.md")])
    assert f"error: {bad}: " in fails(commands.main, [])
    assert "2 commands in" in capsys.readouterr().out
