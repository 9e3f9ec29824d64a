"""Draws the figures of the tutorial anew: python -m tests.docs.figures."""

import os
import shutil
import tempfile
from pathlib import Path

import matplotlib
import torch

from tests.docs import pages

DOCS = Path(__file__).parents[2] / "docs"
FIGURES = DOCS / "figures"


def draw(page: Path) -> None:
    """Run a page in a folder of its own, and keep the pictures that it makes."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        torch.manual_seed(0)
        pages.run(page)
        FIGURES.mkdir(exist_ok=True)
        for picture in Path(folder).glob("*.png"):
            shutil.copy(picture, FIGURES)


if __name__ == "__main__":
    matplotlib.use("Agg")
    draw(DOCS / "tutorial.md")
