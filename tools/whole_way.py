"""The whole way on data of one's own: each command of docs/whole_way.md run, with what it said and how long it took.

python -m tools.whole_way walk FOLDER     draw the data and run every command in a new folder, into the record
python -m tools.whole_way write           docs/whole_way.md, from the committed record
python -m tools.whole_way draw FOLDER     the data alone
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from daft_domainbed.launch.plan_file import read_jobs
from daft_domainbed.methods import STUDENT
from daft_domainbed.runtime.machine import describe_machine
from tools.study import make_table

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "sweeps" / "whole_way" / "record.jsonl"
PAGE = ROOT / "docs" / "whole_way.md"
GROUNDS = {"plain": (235, 235, 225), "noise": (150, 150, 150), "stripes": (210, 190, 150), "dark": (30, 30, 45)}
SHAPES = ("disc", "square", "triangle")
SIDE, N_IMAGES = 40, 30  # pixels; of each shape on each ground
MOST_LINES, SHOWN = 24, 9  # longer output is shown by so many lines of its beginning and of its end


class Step(NamedTuple):
    """A title, what is to be said of it, and the shell commands; RUN stands for the run that is used."""

    title: str
    text: str
    commands: str


STEPS = (
    Step(
        "Data",
        "Four domains of three classes: discs, squares and triangles of random colours on plain, noisy, striped and "
        "dark ground; and three new pictures. Images of your own are there already: a folder a domain, in it a "
        "folder a class ([your own data](own_data.md)).",
        "python -m tools.whole_way draw .",
    ),
    Step(
        "Search",
        "The defaults and two random draws of ERM's and DAFT's hyperparameters, each domain held out in turn.",
        "daft-domainbed sweep launch --datasets folder:shapes --algorithms ERM DAFT --single_test_envs \\\n"
        "    --n_trials 1 --n_hparams 3 --steps 60 --n_checkpoints 3 \\\n"
        """    --hparams '{"input_size": 16, "batch_size": 12}' --output_dir runs/search --skip_confirmation""",
    ),
    Step(
        "What the search found",
        "",
        "daft-domainbed collect_results --input_dir runs/search --selection training-domain --show_hparams",
    ),
    Step(
        "Rerun on three trials that the search has not seen",
        "",
        "daft-domainbed sweep rerun --from runs/search --output_dir runs/paper --n_trials 3 --skip_confirmation",
    ),
    Step(
        "The table",
        "",
        "daft-domainbed collect_results --input_dir runs/paper --selection training-domain --dataset_name Shapes",
    ),
    Step(
        "For the paper",
        "Table, comparison and checklist, compiled; the last line of the output is the number of overfull boxes.",
        "daft-domainbed collect_results --input_dir runs/paper --selection training-domain --dataset_name Shapes \\\n"
        "    --format latex > table.tex\n"
        "daft-domainbed collect_results --input_dir runs/paper --compare DAFT ERM --dataset_name Shapes \\\n"
        "    --format latex > comparison.tex\n"
        "daft-domainbed collect_results --input_dir runs/paper --checklist --dataset_name Shapes \\\n"
        "    --format latex > checklist.tex\n"
        "cat > paper.tex <<'END'\n"
        r"""\documentclass{article}
\usepackage{array,booktabs,graphicx}
\begin{document}
\input{table}
\input{comparison}
\input{checklist}
\end{document}
END
cat comparison.tex
pdflatex -interaction=batchmode paper.tex
grep -c Overfull paper.log || true""",
    ),
    Step(
        "Figures",
        "",
        "daft-domainbed collect_results --input_dir runs/paper --figures figures --dataset_name Shapes",
    ),
    Step(
        "Use the model",
        "A run of DAFT on the first of the new trials, with the dark domain held out, on the three new pictures.",
        "daft-domainbed predict RUN new/disc.png new/square.png new/triangle.png",
    ),
    Step("Give it away", "", "daft-domainbed export RUN exported"),
    Step(
        "ONNX Runtime",
        "The exported file without this package's code, beside the model as `load_model` gives it.",
        """python - <<'END'
import numpy, onnxruntime, torch
from PIL import Image
from daft_domainbed import load_model

images = [Image.open(f"new/{name}.png").resize((16, 16)) for name in ("disc", "square", "triangle")]
pixels = torch.stack([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255 for image in images])
ours = load_model("RUN")(pixels).detach().numpy()
theirs = onnxruntime.InferenceSession("exported/model.onnx").run(["logits"], {"pixels": pixels.numpy()})[0]
print(theirs.round(3), "largest difference of a logit:", abs(ours - theirs).max(), sep="\\n")
END""",
    ),
)


def draw_picture(ground: str, shape: str, draw: np.random.Generator) -> Image.Image:
    """Return a shape of random place, size and colour on a ground."""
    image = Image.new("RGB", (SIDE, SIDE), GROUNDS[ground])
    pen = ImageDraw.Draw(image)
    for x in range(0, SIDE, 6) if ground == "stripes" else ():
        pen.line([(x, 0), (x, SIDE)], fill=(170, 150, 110), width=2)
    x, y, r = (int(draw.integers(low, high)) for low, high in ((12, 28), (12, 28), (7, 11)))
    color = tuple(int(value) for value in draw.integers(60, 255, 3))
    if shape == "disc":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=color)
    elif shape == "square":
        pen.rectangle([x - r, y - r, x + r, y + r], fill=color)
    else:
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=color)
    noise = draw.integers(-60, 61, (SIDE, SIDE, 3)) if ground == "noise" else 0
    return Image.fromarray((np.array(image) + noise).clip(0, 255).astype(np.uint8))


def draw_data(folder: Path) -> None:
    """Draw the domains, `shapes`, and three new pictures, `new`."""
    draw = np.random.default_rng(0)
    for ground in GROUNDS:
        for shape in SHAPES:
            place = folder / "shapes" / ground / shape
            place.mkdir(parents=True)
            for i in range(N_IMAGES):
                draw_picture(ground, shape, draw).save(place / f"{i:02d}.png")
    (folder / "new").mkdir()
    for shape in SHAPES:
        draw_picture("plain", shape, draw).save(folder / "new" / f"{shape}.png")
    print(f"{N_IMAGES * len(SHAPES)} pictures of {len(SHAPES)} classes in each of {len(GROUNDS)} domains")


def walk(folder: Path, steps: Sequence[Step], record: Path) -> None:
    """Run every step in a new folder, and write what was said and how long it took.

    Raises:
        CalledProcessError: A step failed.
    """
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"machine": describe_machine(torch.device("cpu"), "fp32")}]
    for step in steps:
        commands = step.commands.replace("RUN", find_run(folder)) if "RUN" in step.commands else step.commands
        load, began = os.getloadavg()[0], time.monotonic()
        done = run_commands(commands, folder)
        seconds = round(time.monotonic() - began, 1)
        print(f"{step.title}: {seconds} s, exit {done.returncode}", file=sys.stderr, flush=True)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            raise subprocess.CalledProcessError(done.returncode, commands, done.stdout)
        output = hide_places(done.stdout, folder).splitlines()
        lines.append({"title": step.title, "commands": commands, "seconds": seconds, "load": load, "output": output})
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def run_commands(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a step's commands by a shell that finds this environment's programs and this checkout's code first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-ec", commands],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def find_run(folder: Path) -> str:
    """Return the run of DAFT with the dark domain held out, on the first of the trials."""
    root = folder / "runs" / "paper"
    asked = ("DAFT", [sorted(GROUNDS).index("dark")])
    jobs = [
        job for job in read_jobs(root) if job.stage == STUDENT and (job.args.algorithm, job.args.test_envs) == asked
    ]
    return f"runs/paper/{min(jobs, key=lambda job: job.args.trial_seed).folder}"


def hide_places(text: str, folder: Path) -> str:
    """Return an output without where it came about."""
    for place, name in ((f"{folder.resolve()}/", ""), (f"{ROOT}/", ""), (sys.prefix, "ENVIRONMENT")):
        text = text.replace(place, name)
    return text


def shorten(lines: Sequence[str]) -> list[str]:
    """Return an output's lines; of a long one those of its beginning and its end."""
    if len(lines) <= MOST_LINES:
        return [*lines]
    return [*lines[:SHOWN], f"... {len(lines) - 2 * SHOWN} lines ...", *lines[-SHOWN:]]


def show_page(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of a record."""
    (first, *walked), texts = lines, {step.title: step.text for step in STEPS}
    machine = first["machine"]
    loads = [line["load"] for line in walked]
    rows = [[f"{i}. {line['title']}", f"{line['seconds']:.1f}"] for i, line in enumerate(walked, 1)]
    rows.append(["in all", f"{sum(line['seconds'] for line in walked):.1f}"])
    proof = (
        f"n = 1, by `python -m tools.whole_way walk`; commit {machine['commit']}, Python {machine['python']}, torch "
        f"{machine['torch']}, {machine['cores']} cores of {machine['cpu']} with a load of {min(loads):.1f} to "
        f"{max(loads):.1f} by other work."
    )
    blocks = [
        "<!-- written by python -m tools.whole_way write, from sweeps/whole_way/record.jsonl -->\n"
        "# The whole way, on data of one's own",
        _fill(
            "From a folder of images to the table of a paper and a model for others: every command, how long it took "
            "and what it printed. The pages behind it are [from search to paper](search_to_paper.md) and "
            "[using a trained model](using_a_model.md)."
        ),
        make_table(["step", "seconds"], rows),
        _fill(proof),
        _fill(
            f"Of an output of more than {MOST_LINES} lines the first and the last {SHOWN} are shown; nothing else is "
            "left out. The networks are tiny and trained for seconds: the numbers say how the way goes, not which "
            "method is better."
        ),
    ]
    for i, line in enumerate(walked, 1):
        blocks += [f"## {i}. {line['title']}", _fill(texts.get(line["title"], "")), f"```sh\n{line['commands']}\n```"]
        output = "\n".join(shorten(line["output"]))
        blocks += [f"{line['seconds']:.1f} s:", f"```text\n{output}\n```"]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _fill(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def read_record() -> list[dict[str, Any]]:
    """Return the lines of the committed record."""
    return [json.loads(line) for line in RECORD.read_text(encoding="utf-8").splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, walk, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("draw", "walk"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.add_parser("write")
    args = parser.parse_args(argv)
    if args.command == "draw":
        draw_data(args.folder)
    elif args.command == "walk":
        has_latex = shutil.which("pdflatex") is not None
        walk(args.folder, [step for step in STEPS if has_latex or "pdflatex" not in step.commands], RECORD)
    else:
        PAGE.write_text(show_page(read_record()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
