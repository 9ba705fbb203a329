"""README.md and docs/ are true: commands parse and split over their processes, code runs, what they name is there."""
import importlib
import json
import re
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_python, stored, words

import finetune
import linear_probe
import pretrain
import retrieval
from tools import curves, neighbours, preview, psi
from tools.commands import commands, module_of, pages

README = (ROOT / "README.md").read_text()
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in pages()}
PROSE = {page: re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) for page, text in PAGES.items()}    # without blocks
COMMANDS = commands()
STAGES = {"pretrain.py", "finetune.py", "linear_probe.py", "retrieval.py"}
FOLDERS = ("common", "docs", "tests", "tools")


def quoted(pattern, text):
    """What stands between backticks in a page and is of this form."""
    return [words for words in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(pattern, words)]


# ---- Commands and code ----

def test_the_pages_name_a_command_for_each_stage():
    assert STAGES <= {command.script for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command}"[:80])
def test_each_command_parses_and_its_batch_splits_over_its_processes_with_two_videos_or_more_each(command):
    args = module_of(command.script).parse_args(command.argv)
    if command.script in ("pretrain.py", "finetune.py"):
        parts = command.processes * vars(args).get("accumulate", 1)
        assert args.batch_size % parts == 0 and args.batch_size // parts >= 2   # what BatchNorm needs
    if command.script == "pretrain.py":
        assert args.batch_size % (2 * parts) == 0                               # groups of two


def test_each_table_of_the_paper_has_its_cells():
    cells = " ".join(re.findall(r"^\| ([^|]*)\|", PAGES["docs/results.md"], re.M))
    assert set(re.findall(r"\((\w)\)", cells)) >= set("abcdefghijklmno")
    assert set(re.findall(r"Table \d|Fig\. \d", cells)) == {"Table 1", "Fig. 5", "Table 2", "Table 3", "Table 4"}


# {section: code}
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n[^#]*?```python\n(.*?)```", README, re.M | re.S))


def test_the_snippets_of_readme_are_three():
    assert SNIPPETS.keys() == {"Use the losses", "Use the features", "Add a backbone"}
    assert README.count("```python") == 3


def test_readmes_snippet_of_the_losses_runs_and_gives_gradients(tmp_path):
    code = SNIPPETS["Use the losses"] + "print(psi.grad.any().item(), phi.grad.any().item())"
    assert run_python("-c", code, cwd=tmp_path) == "True True\n"


def test_readmes_snippet_of_the_features_runs_on_what_retrieval_writes(found, tmp_path):
    np.savez(tmp_path / "found.npz", **found[1])
    accuracy = run_python("-c", SNIPPETS["Use the features"], cwd=tmp_path)
    assert 0 <= float(accuracy) <= 1


def test_a_backbone_added_by_readmes_snippet_trains(world, tmp_path):
    shutil.copytree(ROOT / "common", tmp_path / "common")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    with (tmp_path / "models.py").open("a") as models:
        models.write(SNIPPETS["Add a backbone"])
    argv = words(world, "out", "--epochs", 1)
    argv[argv.index("--arch") + 1] = "mc3"
    run_python("pretrain.py", *argv, cwd=tmp_path)
    assert stored(tmp_path / "out")["args"]["arch"] == "mc3"


def test_a_strangers_path_from_clone_to_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psi, "GROUPS", 8)
    pretrain.main(["--epochs", "1", "--log-every", "2"])                        # makes the toy set, trains, saves
    out = tmp_path / "runs" / "toy-r3d18_narrow"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 1
    preview.main([])
    linear_probe.main(["--windows", "1"])
    retrieval.main(["--windows", "1", "--features", "found.npz"])
    finetune.main(["--windows", "1", "--epochs", "1", "--crops", "centre"])
    curves.main([str(out)])
    neighbours.main(["found.npz"])
    psi.main([])
    said = capsys.readouterr().out
    assert "linear SVM on toy" in said and "R@1" in said and "fine-tuned on toy" in said
    for file in ("figure2.png", "curves.png", "neighbours.png", "psi.png", "psi.json", out / "backbone.pt"):
        assert (tmp_path / file).stat().st_size > 1000


# ---- What the pages name ----

@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_are_there(page):
    links = re.findall(r"\]\(([^)]+)\)", PROSE[page])
    inside = [link.split("#")[0] for link in links if not link.startswith(("http://", "https://", "#"))]
    assert [link for link in inside if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_modules_functions_files_tests_and_flags_that_are_named_are_there(page):
    text = PROSE[page]
    sources = [file.read_text() for folder in ("", *FOLDERS) for file in (ROOT / folder).glob("*.py")]
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    files = [name for name in quoted(r"(\w+/)?\w+\.(py|md|txt)", text) if "/" in name or (ROOT / name).suffix == ".py"]
    assert [name for name in files if not (ROOT / name).is_file()] == []
    for name in quoted(r"[a-z_]\w*(\.\w+)+", text):
        module, _, attribute = name.rpartition(".")
        if (ROOT / f"{module.replace('.', '/')}.py").is_file() and attribute not in ("py", "md"):
            assert hasattr(importlib.import_module(module), attribute), name
    assert [name for name in quoted(r"test_\w+", text) if f"def {name}(" not in tests] == []
    flags = {words.split()[0].split("=")[0] for words in quoted(r"--[a-z].*", text)} - {"--help"}
    assert [flag for flag in sorted(flags) if not any(f'"{flag}"' in source for source in sources)] == []


def test_the_equation_table_names_a_place_for_each_row_and_each_is_there():
    table = README.split("## Equation → code")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    names = re.findall(r"`(\w+)\.(\w+)`", table)
    assert len(rows) >= 6 and len(names) > 10 and all(quoted(r"[\w/]+\.\w+", row) for row in rows)
    for module, name in names:
        assert (ROOT / f"{module}.py").is_file() and hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_each_row_of_what_happens_when_is_backed_by_a_test():
    rows = [row for row in PAGES["docs/faults.md"].splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 20 and [row for row in rows if not quoted(r"test_\w+", row.split(" | ")[2])] == []


# ---- README as a page to be read ----

def test_readme_is_one_page_of_short_lines_paragraphs_and_cells():
    lines = README.splitlines()
    assert len(lines) <= 150 and len(README.split()) <= 1400
    prose = PROSE["README.md"].splitlines()
    rows = [line for line in prose if line.startswith("|")]
    assert [line for line in prose if len(line) > 160 and line not in rows] == []
    assert [cell for row in rows for cell in row.split("|") if len(cell.strip()) > 100] == []
    paragraphs = [part.strip().splitlines() for part in re.split(r"\n\s*\n", PROSE["README.md"])]
    sentences = [part for part in paragraphs if part and not part[0].startswith(("#", "|", "- ", "!"))]
    assert [part for part in sentences if len([line for line in part if not line.startswith("|")]) > 5] == []


@pytest.mark.parametrize("choice", (
    "the swapped pair (q, p)", "all clips of a process go through F together", "counts videos, over all processes",
    "AdamW decays all parameters", "cosine similarity, as Table 3 says", "one run cannot give both 62.1 and 63.6"))
def test_a_choice_that_was_asked_about_is_listed_as_ours(choice):
    assert choice in (ROOT / "docs/choices.md").read_text()


def test_figure_5_gives_each_process_24_videos_whatever_the_batch():
    text = (ROOT / "docs/results.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .*?(?:--nproc_per_node=(\d+)|(python pretrain)|(\$P)).*`", text, re.MULTILINE)
    processes = {int(batch): int(number or (1 if one else 8)) for batch, number, one, _ in rows}
    assert processes == {192: 8, 96: 4, 48: 2, 24: 1}
