"""What tools/experiment.py found: its figures, its table, its pictures."""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import write_json
from tools.pictures import pyplot, save

ROWS = {                                                                        # Table 1: flags of pretrain.py
    "random": None,                                                             # no pre-training
    "e": "--losses inst",
    "f": "--losses equi",
    "g": "--losses speed direction order",
    "h": "--losses inst equi",
    "i": "--losses inst speed direction order",
    "j": "--losses equi speed direction order",
    "k": "--losses inst equi speed direction order",
    "b": "--losses inst equi --equivariance spatial",
    "c": "--losses inst equi speed direction order --equivariance both",
    "l": "--losses inst equi speed",
    "m": "--losses inst equi speed order",
    "n": "--losses inst equi speed direction",
    "distinct": "--losses inst distinct speed direction order"}                 # Fig. 5
FINETUNED = ("random", "e", "g", "k")
FOLLOWED = ("e", "g", "k")                                                      # judged on the way, too
JUDGED = {"linear SVM": "linear", "C cross-validated": "auto", "1-NN": "R@1", "R@5": "R@5", "fine-tuned": "finetune"}
PRETEXT = {"speed": "speed_acc", "direction": "direction_acc", "order": "order_acc", "ψ's nearest": "psi_nearest",
           "φ's nearest": "phi_nearest"}
LAST = 10                                                                       # lines of the log whose mean is shown


def read_json(file):
    return json.loads(file.read_text()) if file.exists() else None


def figures(name, settings, out):
    """What is known of a run, from what the scripts wrote -> {name: number}; NAME_chance beside each NAME."""
    folder, dataset = out / name, settings["dataset"]
    who = "random" if ROWS[name.rsplit("-", 1)[0]] is None else "checkpoint"
    found = read_json(folder / "made.json") or {}
    files = {"linear": f"linear_probe-{dataset}.json", "auto": f"auto/linear_probe-{dataset}.json",
             "finetune": f"finetune-{dataset}-4x.json"}
    for key, file in files.items():
        if result := read_json(folder / file):
            found |= {key: result["top1"][who], f"{key}_chance": result["chance"]}
    if result := read_json(folder / f"retrieval-{dataset}.json"):
        for k in ("R@1", "R@5"):
            found |= {k: result["recall"][who][k], f"{k}_chance": result["recall"]["chance"][k]}
    if who == "checkpoint" and "linear" in found:
        found |= pretext(folder, settings)
    return found if "linear" in found else {}


def log_lines(folder):
    """The lines of a run's log that have a loss."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def pretext(folder, settings):
    """The means of the last lines of a run's log, its steps, and the minutes that they took."""
    lines = log_lines(folder)
    trained = read_json(folder / f"linear_probe-{settings['dataset']}.json")["checkpoint"]["trained_with"]
    clips = trained["batch_size"] * (4 if "distinct" in trained["losses"] else 2)
    steps = np.diff([line["step"] for line in lines], prepend=0)
    seconds = np.sum(clips * steps / [line["clips_per_s"] for line in lines])
    last = {key: float(np.mean([line[key] for line in lines[-LAST:]])) for key in lines[-1]}
    return last | dict(steps=lines[-1]["step"], minutes=float(seconds) / 60)


def spread(values, form="{:.1f}", scale=100):
    """Mean and half the range over the seeds that have a value, in words."""
    values = [scale * value for value in values if value is not None]
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return form.format(np.mean(values)) + (f" ± {form.format(half)}" if len(values) > 1 else "")


def line_of(row, runs, keys):
    """A line of a table: the row's name, and mean and spread of each of keys."""
    return f"| {row} | " + " | ".join(spread([run.get(key) for run in runs]) for key in keys) + " |"


def by_row(names, settings, out):
    """{row: [figures of each seed that was judged]}"""
    rows = {}
    for name in names:
        if found := figures(name, settings, out):
            rows.setdefault(name.rsplit("-", 1)[0], []).append(found)
    return {row: rows[row] for row in ROWS if row in rows}


def write_table(names, failed, settings, out):
    """Print the table so far; write OUT/table.md and OUT/table.json."""
    rows = by_row(names, settings, out)
    chances = {}
    for runs in rows.values():
        chances |= runs[0]
    lines = ["In per cent, mean ± half the range over seeds. All rows: "
             + ", ".join(f"{key} `{value}`" for key, value in settings.items() if isinstance(value, str)), "",
             "| row | seeds | steps | minutes | " + " | ".join(JUDGED) + " | on, at commit |",
             "|---" * (len(JUDGED) + 5) + "|"]
    for row, runs in rows.items():
        steps = max(run.get("steps", 0) for run in runs)
        minutes = spread([run.get("minutes") for run in runs], "{:.0f}", 1)
        places = sorted({f"{run.get('hardware', '')}, {run.get('commit', '')}".strip(", ") for run in runs})
        line = line_of(f"{row} | {len(runs)} | {steps} | {minutes}", runs, JUDGED.values())
        lines.append(f"{line} {'; '.join(places)} |")
    lines.append(line_of("chance | | |", [chances], [f"{key}_chance" for key in JUDGED.values()]) + " |")
    lines += ["", f"Pre-training, means of the last {LAST} lines of the log (in brackets by chance):", "",
              "| row | " + " | ".join(PRETEXT) + " |", "|---" * (len(PRETEXT) + 1) + "|"]
    for row, runs in rows.items():
        cells = []
        for key in PRETEXT.values():
            chance = key.replace("_acc", "_chance").replace("_nearest", "_chance")
            cell = spread([run.get(key) for run in runs])
            cells.append(f"{cell} ({spread([run.get(chance) for run in runs][:1])})" if cell else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    if failed:
        lines += ["", *(f"{name} failed: {line}" for name, line in failed.items())]
    table = "\n".join(lines) + "\n"
    (out / "table.md").write_text(table)
    write_json(out / "table.json", indent=1, value=dict(settings=settings, failed=failed, rows=rows))
    print(table, end="", flush=True)


# ---- Pictures


def draw_curves(file, settings, out):
    """Linear SVM and ψ's nearest against steps, of the rows judged on the way: what is temporal comes late."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for row, style in zip(FOLLOWED, ("o--", "s-.", "^-")):
        for seed in settings["seeds"]:
            folder = out / f"{row}-{seed}"
            label = f"({row})" if seed == settings["seeds"][0] else None
            judged = sorted((int(path.parent.name.split("-")[1]), read_json(path)["top1"]["checkpoint"])
                            for path in folder.glob("backbone-*/linear_probe-*.json"))
            if judged:
                left.plot(*np.transpose(judged), style, color="black", markerfacecolor="white", label=label)
            lines = log_lines(folder) if (folder / "log.jsonl").exists() else []
            if lines and "psi_nearest" in lines[0]:
                ratio = [line["psi_nearest"] / line["psi_chance"] for line in lines]
                window = min(10, len(ratio))
                steps = [line["step"] for line in lines[window - 1:]]
                right.plot(steps, np.convolve(ratio, np.ones(window) / window, "valid"), style[1:], color="black",
                           label=label)
    names = [f"random-{seed}" for seed in settings["seeds"]]
    random = by_row(names, settings, out).get("random")
    if random:
        left.axhline(np.mean([run["linear"] for run in random]), color="grey", linestyle=":", label="random")
    left.set(xlabel="steps", ylabel="linear SVM, test accuracy")
    right.axhline(1, color="grey", linestyle=":", label="chance")
    right.set(xlabel="steps", ylabel="ψ's nearest has the same pq,\ntimes chance")
    for axis in (left, right):
        axis.legend()
    save(figure, file)


def draw_table(file, settings, out):
    """Linear SVM and 1-NN of each row, a mark a seed, beside random initialisation and chance."""
    plt = pyplot()
    names = [f"{row}-{seed}" for seed in settings["seeds"] for row in ROWS]
    rows = by_row(names, settings, out)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, (title, key) in zip(axes, (("linear SVM", "linear"), ("1-NN", "R@1"))):
        for place, (row, runs) in enumerate(rows.items()):
            values = [100 * run[key] for run in runs]
            axis.plot([place] * len(values), values, "_", color="black", markersize=9)
            axis.plot(place, np.mean(values), "D", color="black", markersize=5)
        axis.axhline(100 * np.mean([run[key] for run in rows["random"]]), linestyle="--", color="grey",
                     label="random initialisation")
        axis.axhline(100 * rows["random"][0][f"{key}_chance"], linestyle=":", color="grey", label="chance")
        axis.set(title=title, xlabel="row of Table 1", xticks=range(len(rows)))
        axis.set_xticklabels(rows, rotation=45)
        axis.legend(loc="upper left")
    axes[0].set_ylabel("test accuracy, %")
    save(figure, file)
