# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "pillow==13.0.0", "resvg-py==0.5.0", "scikit-learn==1.9.1"]
# ///
"""Build the embedded data sets and the README picture, byte for byte as committed.

    python tools/build_data.py           write daft_domainbed/embedded/data/ and docs/emoji_styles.png
    python tools/build_data.py --check   compare with what is committed instead of writing

Needs npm and the Python packages named above, in those versions (others may compress to other bytes).
LICENSES, beside the data, is written by hand: it credits every source that is read here.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = Path("daft_domainbed/embedded/data")
PICTURE = Path("docs/emoji_styles.png")

VERSIONS = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/openmoji": "1.2.29",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "emojibase-data": "17.0.0",
}
STYLES = {
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
    "openmoji": "@iconify-json/openmoji",
    "contrast": "@iconify-json/fluent-emoji-high-contrast",
}
CLASSES = {  # of Unicode subgroups; people, hands, flags and signs are left out
    "animal": ["animal-*", "cat-face", "monkey-face"],
    "building": ["place-building", "place-religious", "place-other", "place-map", "hotel"],
    "clothing": ["clothing"],
    "face": ["face-*"],
    "food": ["food-*", "drink"],
    "object": [
        *["tool", "office", "household", "light-video", "book-paper", "writing", "computer", "phone", "medical"],
        *["science", "lock", "musical-instrument", "music", "sound", "dishware"],
    ],
    "plant": ["plant-*"],
    "vehicle": ["transport-ground", "transport-water", "transport-air"],
}
TILE = 32
OVERSAMPLING = 4
COLUMNS = 32
DIGIT_COLUMNS = 43

Pixels = npt.NDArray[np.uint8]


def install_packages(folder: Path) -> Path:
    """Install the pinned npm packages below a folder and return the `node_modules` that holds them."""
    flags = ["--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"]
    packages = [f"{name}@{version}" for name, version in VERSIONS.items()]
    subprocess.run(["npm", "install", "--prefix", folder, *flags, *packages], check=True, stdout=sys.stderr)
    return folder / "node_modules"


def read_package(npm_dir: Path, package: str, file: str) -> Any:
    """Read one JSON file of an installed package, which must be of the pinned version."""
    version = json.loads((npm_dir / package / "package.json").read_text("utf-8"))["version"]
    if version != VERSIONS[package]:
        sys.exit(f"build_data: {package} in {npm_dir} is version {version}; install {VERSIONS[package]}.")
    return json.loads((npm_dir / package / file).read_text("utf-8"))


def list_code_points(npm_dir: Path) -> dict[str, list[str]]:
    """Return the code points of each class, in Unicode's own order."""
    subgroups = read_package(npm_dir, "emojibase-data", "meta/groups.json")["subgroups"]
    emojis = sorted(read_package(npm_dir, "emojibase-data", "en/data.json"), key=lambda emoji: emoji.get("order", 0))
    return {
        name: [
            emoji["hexcode"]
            for emoji in emojis
            if any(fnmatchcase(subgroups.get(str(emoji.get("subgroup")), ""), pattern) for pattern in patterns)
        ]
        for name, patterns in CLASSES.items()
    }


def draw_icon(icon_set: Mapping[str, Any], name: str) -> Pixels:
    """Draw one icon on white. Returns [TILE, TILE, 3]."""
    icon = icon_set["icons"][name]
    box = [icon.get(key, icon_set.get(key, 0)) for key in ("left", "top", "width", "height")]
    side = TILE * OVERSAMPLING
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
        f'width="{side}" height="{side}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    return np.asarray(image.resize((TILE, TILE), Image.Resampling.LANCZOS))


def draw_style(npm_dir: Path, style: str, code_points: list[str]) -> dict[str, Pixels]:
    """Draw every code point that a style has. Returns tiles by code point, in the order given."""
    icon_set = read_package(npm_dir, STYLES[style], "icons.json")
    names = read_package(npm_dir, STYLES[style], "chars.json")
    # Iconify leaves out the variation selector that asks for the coloured form.
    keys = {code_point: code_point.lower().replace("-fe0f", "") for code_point in code_points}
    return {code_point: draw_icon(icon_set, names[key]) for code_point, key in keys.items() if key in names}


def arrange_tiles(tiles: Pixels, columns: int) -> Pixels:
    """Lay [N, height, width, channels] out row by row; places left over take the brightest value."""
    count, height, width, channels = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, channels), tiles.max(), np.uint8)
    sheet[:count] = tiles
    grid = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def encode_image(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encode_digits(images: Pixels) -> bytes:
    """Return [N, 8, 8] values of 0 to 16 as a palette PNG whose indices are the values."""
    sheet = Image.fromarray(arrange_tiles(images[..., None], DIGIT_COLUMNS)[..., 0])
    sheet.putpalette([255 * value // 16 for value in range(17) for _ in "RGB"])
    return encode_image(sheet, "PNG", optimize=True)


def draw_picture(tiles: Mapping[str, Mapping[str, Pixels]], code_points: Mapping[str, list[str]]) -> Image.Image:
    """Draw a row a style and three columns a class, spread over what every style has."""
    zoom, margin, gap, header, per_class = 2, 96, 6, 28, 3
    side = zoom * TILE
    pitch = side + gap
    group = per_class * pitch + 2 * gap
    size = (margin + len(code_points) * group, header + len(tiles) * pitch)
    picture = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for row, style in enumerate(tiles):
        draw.text((2 * gap, header + row * pitch + side / 2), style, "black", font, anchor="lm")
    for column, (name, members) in enumerate(code_points.items()):
        left = margin + column * group
        draw.text((left + (per_class * pitch - gap) / 2, header / 2), name, "black", font, anchor="mm")
        common = [member for member in members if all(member in drawn for drawn in tiles.values())]
        for place in range(per_class):
            chosen = common[(2 * place + 1) * len(common) // (2 * per_class)]
            for row, drawn in enumerate(tiles.values()):
                tile = Image.fromarray(drawn[chosen]).resize((side, side), Image.Resampling.NEAREST)
                picture.paste(tile, (left + place * pitch, header + row * pitch))
    return picture


def build_files(npm_dir: Path) -> dict[Path, bytes]:
    """Build every generated file. Returns contents by path in the repository."""
    code_points = list_code_points(npm_dir)
    ordered = [code_point for members in code_points.values() for code_point in members]
    tiles = {style: draw_style(npm_dir, style, ordered) for style in STYLES}
    digits = load_digits()
    index = {
        "code_points": code_points,
        "absent": {style: [member for member in ordered if member not in drawn] for style, drawn in tiles.items()},
        "digit_labels": "".join(map(str, digits.target)),
    }
    files = {
        DATA / "index.json": (json.dumps(index, separators=(",", ":")) + "\n").encode(),
        DATA / "digits.png": encode_digits(digits.images.astype(np.uint8)),
        PICTURE: encode_image(draw_picture(tiles, code_points), "PNG", optimize=True),
    }
    for style, drawn in tiles.items():
        sheet = Image.fromarray(arrange_tiles(np.stack(list(drawn.values())), COLUMNS))
        files[DATA / f"{style}.webp"] = encode_image(sheet, "WEBP", lossless=True, quality=100, method=6)
        print(f"{style}: {len(drawn)} drawings", file=sys.stderr)
    return files


def read_file(path: Path) -> bytes | None:
    """Return a file's bytes, or None where there is no file."""
    return path.read_bytes() if path.is_file() else None


def main() -> int:
    """Write the files, or with --check compare them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Build the embedded data sets and the README picture.")
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--npm_dir", type=Path, help="a node_modules folder that already holds the pinned packages")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = build_files(args.npm_dir or install_packages(Path(folder)))
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"build_data: {error}")
    if args.check:
        different = [str(path) for path in files if read_file(REPOSITORY / path) != files[path]]
        if different:
            print(f"build_data: built otherwise than committed: {', '.join(different)}.", file=sys.stderr)
        return 1 if different else 0
    for path, content in files.items():
        (REPOSITORY / path).parent.mkdir(parents=True, exist_ok=True)
        (REPOSITORY / path).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
