"""The tools that draw: their pictures show the data, and say it without colour."""
import ast
import json
import os
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import LENGTHS, ROOT, fails, numbered_frames, write_video
from PIL import Image

from common.splits import load_split, scan
from data import MEAN, STD, Pairs, augment, collate
from tools import curves, neighbours, preview, printable, psi, pyplot

SCRIPTS = [file for file in sorted((ROOT / "tools").glob("*.py")) if "main" in file.read_text()]
STEPS = range(10, 310, 10)


@pytest.fixture
def log(tmp_path):
    """The folder of a run of 30 log lines."""
    rows = [dict(step=n, loss=9 - 0.01 * n, speed=1.4 - 0.001 * n, speed_acc=0.25 + 0.002 * n,
                 speed_chance=0.3, lr=1e-3, clips_per_s=300.0, left_s=9.0) for n in STEPS]
    (tmp_path / "run").mkdir()
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "run" / "log.jsonl").write_text(text)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def pairs(videos, tmp_path_factory):
    """Groups of two of thirteen tiny videos, clips of 4 frames."""
    split = scan(load_split("folder", videos), tmp_path_factory.mktemp("index") / "index.json")
    return Pairs(split, split.paths, 4, 16)


def preview_words(videos, out, *more):
    return [str(word) for word in (
        "--dataset", "folder", "--data", videos, "--frames", 4, "--size", 16, "--workers", 0,
        "--out", out, *more)]


# ---- All tools ----

@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_help_shows_a_command_and_unknown_flags_are_refused(script, monkeypatch, capsys):
    for flag, code in (("--help", "0"), ("--nothing", "2")):
        monkeypatch.setattr(sys, "argv", [str(script), flag])
        with pytest.raises(SystemExit, match=f"^{code}$"):
            runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr()
    assert f"python tools/{script.name}" in printed.out and " error: " in printed.err


def test_without_matplotlib_a_tool_that_draws_ends_in_one_sentence(
        log, videos, retrieved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    np.savez(tmp_path / "features.npz", **retrieved[1])
    for tool, words in (
            (curves, [log]),
            (neighbours, [tmp_path / "features.npz"]),
            (preview, preview_words(videos, tmp_path / "figure2.png")),
            (psi, ["--checkpoint", "none.pt"])):                # before any work
        assert fails(tool.main, words).endswith("pictures need matplotlib: pip install matplotlib")


def test_matplotlib_is_imported_only_where_a_picture_is_drawn():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("common/*.py"), *ROOT.glob("tools/*.py")):
        imports = [ast.unparse(node) for node in ast.parse(file.read_text()).body
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert "matplotlib" not in "".join(imports), file


def test_names_of_any_bytes_can_be_drawn(tmp_path):
    name = printable(os.fsdecode(b"caf\xe9 $^$ \xc3\xa9"))
    assert name == "caf\N{REPLACEMENT CHARACTER} $^$ é"
    pyplot().figure().suptitle(name).figure.savefig(tmp_path / "a.png")


# ---- A run's log ----

def test_each_value_of_a_log_is_drawn_against_its_steps_and_chance_is_dotted(log):
    figure = curves.draw([curves.read_log(log)])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert panels.keys() == {curves.TITLES[key] for key in (
        "loss", "speed", "speed_acc", "lr", "clips_per_s")}
    assert len(panels["L_speed (Sec. 3.2)"].lines) == 1
    values, chance = panels["Accuracy of speed"].lines
    assert values.get_xdata().tolist() == chance.get_xdata().tolist() == list(STEPS)
    assert values.get_ydata() == pytest.approx([0.25 + 0.002 * n for n in STEPS])
    assert set(chance.get_ydata()) == {0.3} and chance.get_linestyle() == ":"


def test_the_curves_of_several_runs_are_named_and_differ_without_colour(log, tmp_path):
    other = tmp_path / "_run $2" / "log.jsonl"
    other.parent.mkdir()
    other.write_text('{"step": 5, "loss": 1.0}\n{"step": 10, "loss": 0.5}\n')
    curves.main([str(log), str(other), "--out", str(tmp_path / "a.png")])
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10
    figure = curves.draw([curves.read_log(log), curves.read_log(other)])
    legend, = figure.legends
    assert [text.get_text() for text in legend.texts] == [str(log), str(other.parent)]
    panel = next(axes for axes in figure.axes if "Loss" in axes.get_title(loc="left"))
    assert panel.lines[1].get_ydata().tolist() == [1.0, 0.5]
    assert len({(line.get_marker(), line.get_linestyle()) for line in panel.lines}) == 2


# ---- Figure 2 ----

def test_the_preview_shows_the_frames_that_the_network_gets_and_marks_where_they_lie(pairs):
    group = collate([pairs[0, 1]])
    figure = preview.draw(pairs, group)
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    clips = augment(group["clips"], group["colour"]) * std + mean           # (2, 2, 3, T, H, W)
    for n, (line, *strips) in enumerate((figure.axes[:3], figure.axes[3:])):
        assert f", {pairs.shapes[group['video'][n], 0]} frames" in line.get_title(loc="left")
        marks = [mark.get_xdata() for mark in line.lines]       # of p: its frames, the last; of q
        for k, strip in enumerate(strips):
            start, speed = group["start"][n, k].item(), pairs.speeds[group["speed"][n, k]]
            frames = [start + speed * t for t in range(pairs.T)]
            frames = frames[::-1] if group["direction"][n, k] else frames
            assert list(marks[2 * k]) == frames
            assert list(np.ravel(marks[2 * k + 1])) == frames[-1:]
            assert [int(text.get_text()) for text in strip.get_xticklabels()] == frames
            image = strip.images[0].get_array()                 # (16, 4 * 17, 3)
            for t in range(pairs.T):
                shown = torch.tensor(image[:, 17 * t:17 * t + 16]) / 255
                wanted = clips[n, k, :, t].permute(1, 2, 0)
                torch.testing.assert_close(shown, wanted, atol=0.01, rtol=0)
    shift = (group["start"][0, 1] - group["start"][0, 0]).item()
    title = figure.get_suptitle()
    assert f"{shift:+d} source frames from p to q" in title
    assert preview.ORDER[group["order"][0]] in title
    assert title.count("backwards") == group["direction"][0].sum()


def test_the_preview_is_written_and_a_group_that_does_not_exist_refused(videos, tmp_path):
    preview.main(preview_words(videos, tmp_path / "a.png", "--group", 2))
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10
    assert f"--group must lie between 0 and {len(LENGTHS) // 2 - 1}, but is 15" in fails(
        preview.main, preview_words(videos, tmp_path / "b.png", "--group", 15))


def test_of_a_long_clip_some_frames_are_shown_with_the_first_and_the_last():
    axes = pyplot().figure().subplots()
    preview.draw_frames(axes, np.zeros((40, 16, 16, 3), np.uint8), list(range(40)), "p", "black")
    numbers = [int(text.get_text()) for text in axes.get_xticklabels()]
    assert len(numbers) == preview.MOST and numbers[0] == 0 and numbers[-1] == 39


# ---- Contact sheet ----

def features_of(videos, **changed):
    """What the contact sheet reads of retrieval.py --features."""
    paths = sorted(LENGTHS)
    files, classes = [str(videos / path) for path in paths], [path.split("/")[0] for path in paths]
    arrays = dict(
        query_files=files[:3], query_classes=classes[:3], gallery_files=files,
        gallery_classes=classes, nearest=[[1, 12, -1], [0, 2, 12], [12, 0, 1]],
        cosines=[[0.9, 0.2, 0], [0.8, 0.7, 0.1], [0.5, 0.4, 0.3]])
    return {name: np.array(value) for name, value in (arrays | changed).items()}


def looks(figure, row, columns):
    places = figure.axes[row * columns:(row + 1) * columns]
    return [(axes.get_xlabel(), axes.spines["top"].get_linestyle()) for axes in places]


def test_right_and_wrong_neighbours_differ_in_sign_and_border(videos):
    figure = neighbours.draw(features_of(videos), queries=10, neighbours=2)
    assert len(figure.axes) == 9
    assert looks(figure, 0, 3) == [
        ("run", "-"), ("+ run\ncosine 0.90", "-"), ("× walk\ncosine 0.20", "--")]


def test_videos_without_classes_have_their_name_and_no_sign_and_missing_neighbours_no_place(videos):
    arrays = features_of(videos, query_classes=[""] * 3, gallery_classes=[""] * 13)
    figure = neighbours.draw(arrays, queries=1, neighbours=3)
    assert looks(figure, 0, 3) == [
        ("00.avi", "-"), ("02.avi\ncosine 0.90", "-"), ("11.avi\ncosine 0.20", "-")]
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]


def test_the_middle_frame_is_shown_and_a_video_that_is_gone_is_said_to_be(videos, tmp_path):
    middle = neighbours.middle_frame(write_video(tmp_path / "a.avi", numbered_frames(201)))
    assert middle.shape == (160, 160, 3)
    bits = [int(part.mean() > 127) for part in np.array_split(middle[:, :, 0], 6, axis=1)]
    assert bits == [1, 1, 0, 0, 1, 0]                           # the middle ones of 100's eight
    arrays = features_of(videos, gallery_files=[str(tmp_path / "none.avi")] * 13)
    axes = neighbours.draw(arrays, 1, 1).axes[1]
    assert [text.get_text() for text in axes.texts] == ["cannot be read"]


def test_a_damaged_video_is_shown_by_a_frame_that_decodes(shared):
    file = shared / "videos" / "odd" / "corrupted.mp4"
    assert neighbours.middle_frame(file).shape == (160, 160, 3)


def test_the_sheet_of_retrievals_features_is_written(retrieved, tmp_path):
    np.savez(tmp_path / "features.npz", **retrieved[1])
    words = tmp_path / "features.npz", "--queries", 2, "--out", tmp_path / "a.png"
    neighbours.main([str(word) for word in words])
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 10
