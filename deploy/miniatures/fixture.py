"""Scenes that nothing was trained on, with true masks, for tests where the emoji font is not installed.

`python -m deploy.miniatures.fixture --out tests/data/miniatures` writes `NUMBER.png` (RGB), `NUMBER-WORD.png`
(one bit: where the object shows), and `scenes.json` with each scene's caption, ground and words. The scenes
are the fewest that a simple search finds in which every object shows at least twice.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from deploy.miniatures import world
from deploy.miniatures.measure import UNSEEN

TIMES = 2  # that each object shows at least
SEARCHED = 400  # scenes
SEEN = 1500  # pixels that an object must show to count: one that hides behind another is no fair question


def main() -> None:
    """Choose and draw."""
    parser = argparse.ArgumentParser(prog="python -m deploy.miniatures.fixture")
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    scenes = chosen({number: world.scene(number) for number in range(UNSEEN, UNSEEN + SEARCHED)})
    told = {str(number): write(folder, number, scene) for number, scene in sorted(scenes.items())}
    (folder / "scenes.json").write_text(json.dumps(told, indent=1) + "\n")


def chosen(scenes: dict[int, world.Scene]) -> dict[int, world.Scene]:
    """Greedily the scene that shows most of what is still wanted, the lowest number first."""
    fair = {
        number: scene
        for number, scene in scenes.items()
        if all((mask > 127).sum() > SEEN for mask in scene.masks.values())
    }
    wanted = Counter(dict.fromkeys(world.OBJECTS, TIMES))
    found: dict[int, world.Scene] = {}
    while +wanted:
        number = max(fair, key=lambda n: (sum(wanted[word] > 0 for word in fair[n].masks), -n))
        found[number] = fair.pop(number)
        wanted.subtract(list(found[number].masks))
    return found


def write(folder: Path, number: int, scene: world.Scene) -> dict[str, object]:
    """Write a scene's pictures; what there is to say of it."""
    Image.fromarray(scene.pixels).save(folder / f"{number}.png", optimize=True)
    for word, mask in scene.masks.items():
        Image.fromarray(mask > 127).save(folder / f"{number}-{word}.png", optimize=True)
    return {"caption": scene.caption, "ground": scene.ground, "words": sorted(scene.masks)}


if __name__ == "__main__":
    main()
