"""Scenes that nothing was trained on, with true masks, for tests where the emoji font is not installed.

`python -m deploy.miniatures.fixture --out tests/data/miniatures` writes `NUMBER.png` (RGB), `NUMBER-WORD.png`
(one bit: where the object shows), and `scenes.json` with each scene's caption, ground and words. The scenes
are those that come first by number, without the ones that show nothing new.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from deploy.miniatures import world
from deploy.miniatures.measure import UNSEEN

TIMES = 2  # that each object shows at least


def main() -> None:
    """Choose and draw."""
    parser = argparse.ArgumentParser(prog="python -m deploy.miniatures.fixture")
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    scenes = chosen()
    told = {str(number): write(folder, number, scene) for number, scene in scenes.items()}
    (folder / "scenes.json").write_text(json.dumps(told, indent=1) + "\n")


def chosen() -> dict[int, world.Scene]:
    """The first scenes, until every object shows `TIMES`, without those whose objects all do already."""
    shown: Counter[str] = Counter()
    found: dict[int, world.Scene] = {}
    for number in itertools.count(UNSEEN):
        scene = world.scene(number)
        if any(shown[word] < TIMES for word in scene.masks):
            found[number] = scene
            shown.update(list(scene.masks))
        if all(shown[word] >= TIMES for word in world.OBJECTS):
            break
    return found


def write(folder: Path, number: int, scene: world.Scene) -> dict[str, object]:
    """Write a scene's pictures; what there is to say of it."""
    Image.fromarray(scene.pixels).save(folder / f"{number}.png", optimize=True)
    for word, mask in scene.masks.items():
        Image.fromarray(mask > 127).save(folder / f"{number}-{word}.png", optimize=True)
    return {"caption": scene.caption, "ground": scene.ground, "words": sorted(scene.masks)}


if __name__ == "__main__":
    main()
