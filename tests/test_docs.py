"""README.md and docs/ are true: commands parse and split over processes, code runs, names exist."""
import importlib
import itertools
import json
import math
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import ROOT, load_checkpoint, run_python, words

import finetune
import linear_probe
import pretrain
import retrieval
from tools import curves, neighbours, preview, psi

README = (ROOT / "README.md").read_text()
DOCS = sorted(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))
PAGES = {page: (ROOT / page).read_text() for page in ("README.md", *DOCS)}
PROSE = {page: re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S) for page in PAGES}
SEVERAL = dict(S=("$U", "$H"), A=("r3d18", "r2plus1d18", "s3dg"))  # as docs/results.md says
# not python -m ...
START = re.compile(r"(python|torchrun\b[^&\n]*?) ((?:\w+/)*\w+\.py)([^&|;#\n]*)")
FOLDERS = ("common", "docs", "tests", "tools")


def quoted(pattern, text):
    """What stands between backticks in a page and is of this form."""
    return [words for words in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(pattern, words)]


def commands(text):
    """The commands of a page, $U and the like filled in -> {(script, arguments, processes)}"""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    shell = [block for language, block in blocks if language in ("", "bash")]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    code = "\n".join(shell + re.findall(r"`([^`\n]+)`", prose))
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


COMMANDS = sorted(set().union(*map(commands, PAGES.values())))


# ---- Commands and code ----

def test_the_pages_name_a_command_for_each_stage():
    stages = {"pretrain.py", "finetune.py", "linear_probe.py", "retrieval.py"}
    assert stages <= {script for script, *_ in COMMANDS}


@pytest.mark.parametrize("script, argv, processes", COMMANDS)
def test_each_command_parses_and_its_batch_splits_over_its_processes(script, argv, processes):
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    args = module.parse_args(shlex.split(argv))
    if script in ("pretrain.py", "finetune.py"):
        parts = processes * vars(args).get("accumulate", 1)
        groups = 2 if script == "pretrain.py" else 1
        assert args.batch_size % (groups * parts) == 0
        assert args.batch_size // parts >= 2                        # what BatchNorm needs


def test_each_table_of_the_paper_has_its_cells():
    cells = " ".join(re.findall(r"^\| ([^|]*)\|", PAGES["docs/results.md"], re.M))
    tables = {"Table 1", "Fig. 5", "Table 2", "Table 3", "Table 4"}
    assert set(re.findall(r"\((\w)\)", cells)) >= set("abcdefghijklmno")
    assert set(re.findall(r"Table \d|Fig\. \d", cells)) == tables


def test_figure_5_gives_each_process_24_videos_whatever_the_batch():
    pattern = r"^\| (\d+) \| .*?(?:--nproc_per_node=(\d+)|(python pretrain)|(\$P)).*`"
    rows = re.findall(pattern, PAGES["docs/results.md"], re.MULTILINE)
    processes = {int(batch): int(number or (1 if one else 8)) for batch, number, one, _ in rows}
    assert processes == {192: 8, 96: 4, 48: 2, 24: 1}


# {section: code}
SNIPPETS = dict(re.findall(r"^## ([^\n]+)\n[^#]*?```python\n(.*?)```", README, re.M | re.S))


def test_the_snippets_of_readme_are_three():
    assert SNIPPETS.keys() == {"Use the losses", "Use the features", "Add a backbone"}
    assert README.count("```python") == 3


def test_readmes_snippet_of_the_losses_runs_and_gives_gradients(tmp_path):
    code = SNIPPETS["Use the losses"] + "print(psi.grad.any().item(), phi.grad.any().item())"
    assert run_python("-c", code, cwd=tmp_path) == "True True\n"


def test_readmes_snippet_of_the_features_runs_on_what_retrieval_writes(retrieved, tmp_path):
    np.savez(tmp_path / "found.npz", **retrieved[1])
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
    assert load_checkpoint(tmp_path / "out")["args"]["arch"] == "mc3"


def test_a_strangers_path_from_clone_to_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(psi, "GROUPS", 8)
    pretrain.main(["--epochs", "1", "--log-every", "2"])            # generates the toy set, trains
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
    printed = capsys.readouterr().out
    for words_of in ("linear SVM on toy", "R@1", "fine-tuned on toy"):
        assert words_of in printed
    for file in ("figure2.png", "curves.png", "neighbours.png", "psi.png", "psi.json"):
        assert (tmp_path / file).stat().st_size > 1000


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


def test_each_row_of_the_equation_table_names_code():
    table = README.split("## Equation → code")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("|")][2:]
    assert len(rows) >= 6 and all(quoted(r"[\w/]+\.\w+", row) for row in rows)


def test_each_row_of_docs_faults_names_a_test():
    rows = [row for row in PAGES["docs/faults.md"].splitlines() if row.startswith("| ")][1:]
    assert [row for row in rows if not quoted(r"test_\w+", row.split(" | ")[2])] == []


@pytest.mark.parametrize("choice", (
    "the swapped pair (q, p)", "all clips of a process go through F together",
    "counts videos, over all processes", "AdamW decays all parameters",
    "cosine similarity, as Table 3 says", "one run cannot give both 62.1 and 63.6"))
def test_a_choice_that_was_asked_about_is_listed_as_ours(choice):
    assert choice in PAGES["docs/choices.md"]
