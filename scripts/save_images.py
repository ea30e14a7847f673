"""Save the first test images of a data set as PNG files named by position and label.

Use: python scripts/save_images.py DATASET FOLDER [COUNT]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from PIL import Image

from bnexport.data.dataset_table import DATASETS
from bnexport.data.datasets import load_test_images
from bnexport.errors import BnexportError


def save_images(dataset: str, folder: Path, count: int) -> list[Path]:
    """Write ``count`` pictures; files of an earlier call with other names stay."""
    images, labels = load_test_images(dataset)
    names = DATASETS[dataset].labels
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index in range(min(count, len(images))):
        label = re.sub("[^a-z0-9]+", "-", names[labels[index]].lower()).strip("-")
        written.append(folder / f"{dataset}-{index:03d}-{label}.png")
        Image.fromarray(images[index]).save(written[-1])
    return written


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3) or arguments[0] not in DATASETS:
        print(f"use: save_images.py {{{','.join(DATASETS)}}} FOLDER [COUNT]", file=sys.stderr)
        return 2
    try:
        written = save_images(arguments[0], Path(arguments[1]), int(arguments[2]) if len(arguments) == 3 else 6)
    except (BnexportError, OSError) as error:
        print(f"save_images.py: {error}", file=sys.stderr)
        return 3
    print(f"{len(written)} images in {arguments[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
