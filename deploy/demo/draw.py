"""Draws the demo's picture and mask: `python -m deploy.demo.draw`. A scene that the miniatures never saw."""

from pathlib import Path

from PIL import Image, ImageDraw

from deploy.miniatures import world

OUT = Path(__file__).parents[2] / "producer" / "overpaint_producer" / "demo"
SCENE = 1_018_902  # a cat and a tree on blue
AROUND_THE_CAT = (8, 124, 138, 254)  # left, top, right, bottom, pixels


def main() -> None:
    """Write both files."""
    scene = world.scene(SCENE)
    Image.fromarray(scene.pixels).save(OUT / "scene.png", optimize=True)
    mask = Image.new("L", (world.SIZE, world.SIZE))
    ImageDraw.Draw(mask).ellipse(AROUND_THE_CAT, fill=255)
    mask.save(OUT / "mask.png", optimize=True)


if __name__ == "__main__":
    main()
