"""The page on writing one's own algorithm does what it says."""

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "own_algorithm.md"


def test_code_of_the_page_trains_and_sweeps(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code
    (tmp_path / "feature_kd.py").write_text(code[1])
    command = [
        *(sys.executable, "feature_kd.py", "run", "--dataset", "ColoredDigits", "--algorithms", "FeatureKD"),
        *("--steps", "2", "--n_jobs", "2", "--output_dir", "sweep"),
        *("--hparams", '{"backbone": "resnet8_w2", "teacher_backbone": "resnet8_w4"}'),
    ]

    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "sweep" / "plan.json").read_text())
    students = [job["folder"] for job in plan["jobs"] if job["args"]["algorithm"] == "FeatureKD"]
    assert len(students) == 3
    record = json.loads((tmp_path / "sweep" / students[0] / "results.jsonl").read_text().splitlines()[0])
    assert record["teacher"]["algorithm"] == "ERM"
    assert "FeatureKD" in result.stdout


def test_one_like_daft_gets_an_aft_teacher(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code
    daft_like = code[1].replace('load_teacher("KD"', 'load_teacher("FeatureKD"').replace('like="KD"', 'like="DAFT"')
    (tmp_path / "feature_kd.py").write_text(daft_like)
    command = [
        *(sys.executable, "feature_kd.py", "train", "--dataset", "ColoredDigits", "--algorithm", "FeatureKD"),
        *("--steps", "2", "--output_dir", "run"),
        *("--hparams", '{"backbone": "resnet8_w2", "teacher_backbone": "resnet8_w4"}'),
    ]

    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "run" / "results.jsonl").read_text().splitlines()[0])
    assert record["teacher"]["algorithm"] == "AFT"
