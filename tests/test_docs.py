"""README.md and docs/ are true: their commands parse and split over their processes, what they name is there."""
import importlib
import re

import pytest
from conftest import ROOT

from tools.commands import code_of, commands, module_of, pages

COMMANDS = commands()
PAGES = pages()
STAGES = ("pretrain.py", "finetune.py", "linear_probe.py", "retrieval.py")
GENERATED = (".pt", ".npz", ".jsonl", ".png", ".json")                          # what commands write or are given


def name_of(value):
    return str(value.relative_to(ROOT)) if hasattr(value, "relative_to") else str(value)[:80]


def words_of(page):
    """What stands between backticks outside of blocks of code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", text)


def test_the_pages_name_a_command_for_each_stage():
    assert set(STAGES) <= {command.script for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_each_command_parses_and_its_batch_splits_over_its_processes_with_two_videos_or_more_each(command):
    args = module_of(command.script).parse_args(command.argv)
    processes = command.processes * getattr(args, "accumulate", 1)
    if command.script in ("pretrain.py", "finetune.py"):
        assert args.batch_size % processes == 0 and args.batch_size // processes >= 2
    if command.script == "pretrain.py":
        assert args.batch_size % (2 * processes) == 0                           # whole groups of two
