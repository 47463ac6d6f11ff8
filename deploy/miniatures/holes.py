"""Holes to learn repainting with, new ones whenever a scene is shown, and what is said of what they hide."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn import functional as F

from deploy.miniatures import world
from deploy.miniatures.data import Scenes

SIZE = world.SIZE
KINDS = ("object", "object", "box", "box", "anywhere")


def holes(scenes: Scenes, chosen: Tensor, dice: random.Random) -> tuple[Tensor, list[str]]:
    """Masks [B, 1, 256, 256] of 0 and 1, and a caption each: of what it hides, or of the whole scene."""
    device, count = scenes.labels.device, len(chosen)
    numbers = chosen.tolist()
    places = [dice.randrange(len(scenes.words[n])) for n in numbers]
    kinds = [dice.choice(KINDS) for _ in numbers]
    shown = (scenes.labels[chosen] == torch.tensor(places, device=device).view(-1, 1, 1) + 1).unsqueeze(1)
    anywhere = torch.tensor([kind == "anywhere" for kind in kinds], device=device)
    boxes = torch.where(anywhere.view(-1, 1), _anywhere(count, device), _around(shown))
    outlined = torch.tensor([kind == "object" for kind in kinds], device=device).view(-1, 1, 1, 1)
    masks = torch.where(outlined, _grown(shown, dice), _filled(boxes))
    said = [
        _said(scenes, n, place, kind, dice) for n, place, kind in zip(numbers, places, kinds, strict=True)
    ]
    return masks, said


def _said(scenes: Scenes, number: int, place: int, kind: str, dice: random.Random) -> str:
    word = world.article(scenes.words[number][place])
    own = dice.choice((word, f"{word} on a {scenes.grounds[number]} background"))
    return own if kind != "anywhere" and dice.random() < 0.6 else scenes.captions[number]


def _grown(shown: Tensor, dice: random.Random) -> Tensor:
    """The object's outline, grown by 4 to 16 pixels: one growth for the batch, another each time."""
    reach = dice.randint(4, 16)
    return F.max_pool2d(shown.float(), 2 * reach + 1, 1, reach)


def _around(shown: Tensor) -> Tensor:
    """Boxes (left, top, right, bottom) [B, 4] around what shows, with 4 to 32 pixels to spare."""
    line = torch.arange(SIZE, device=shown.device)
    ends = []
    for axis in (2, 3):  # over rows: where it lies along x; over columns: along y
        there = shown.any(axis).squeeze(1)
        ends.append(torch.where(there, line, SIZE).amin(1))
        ends.append(torch.where(there, line, -1).amax(1))
    box = torch.stack([ends[0], ends[2], ends[1], ends[3]], 1).float()
    spare = torch.randint(4, 33, box.shape, device=shown.device).float()
    return box + spare * box.new_tensor([-1, -1, 1, 1])


def _anywhere(count: int, device: torch.device) -> Tensor:
    sides = torch.randint(48, 193, (count, 2), device=device).float()
    corner = torch.rand(count, 2, device=device) * (SIZE - sides)
    return torch.cat([corner, corner + sides], 1)


def _filled(boxes: Tensor) -> Tensor:
    """Rectangles, and as often as not the ellipses in them, [B, 1, 256, 256]."""
    line = torch.arange(SIZE, device=boxes.device).float()
    left, top, right, bottom = (edge.view(-1, 1, 1) for edge in boxes.unbind(1))
    x, y = line.view(1, 1, -1), line.view(1, -1, 1)
    across, down = (2 * x - left - right) / (right - left), (2 * y - top - bottom) / (bottom - top)
    round_ones = torch.rand(len(boxes), 1, 1, device=boxes.device) < 0.4
    inside = torch.where(round_ones, across**2 + down**2, torch.maximum(across.abs(), down.abs()))
    return (inside <= 1).float().unsqueeze(1)
