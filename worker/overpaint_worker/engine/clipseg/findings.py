"""What a job's texts found in its canvas: the masks for `masks.build`, the heat maps for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from overpaint_shared.job import ClipsegMask, JobSpec
from overpaint_shared.spec.masks import leaves
from overpaint_worker.engine import resample
from overpaint_worker.engine.clipseg import maps
from overpaint_worker.engine.clipseg.maps import Levels
from overpaint_worker.engine.clipseg.store import SegmenterStore

HEAT_PIXELS: Final = 2**26
"""The most that all heat maps of a job have together: a job may have dozens of texts and a large canvas."""


@dataclass(frozen=True, eq=False)
class Findings:
    """By the path of each CLIPSeg mask in the job: its map at the model's size; None: nothing was found."""

    by_path: Mapping[str, Levels | None] = field(default_factory=dict)

    def mask(self, path: str, width: int, height: int) -> torch.Tensor | None:
        """The mask [height, width] of one text; None where nothing was found."""
        found = self.by_path[path]
        return None if found is None else maps.mask(found, width, height)

    def heat_maps(
        self, canvas: torch.Tensor, kept: Callable[[torch.Tensor], torch.Tensor] = lambda whole: whole
    ) -> Iterator[torch.Tensor]:
        """One heat map [h, w, 3] over the canvas [H, W, 3] for each text, in the job's order.

        Each shows what `kept` leaves of the canvas. Where all together had more than HEAT_PIXELS, each is
        smaller and shows the whole canvas. One is made at a time, for each is as large as the canvas.
        """
        shown = _shown(canvas, len(self.by_path))
        for found in self.by_path.values():
            made = maps.heat_map(found, shown)
            yield kept(made) if shown is canvas else made


def _shown(canvas: torch.Tensor, count: int) -> torch.Tensor:
    """The canvas, scaled down where `count` pictures of its size have too many pixels."""
    height, width = canvas.shape[:2]
    pixels = count * height * width
    if pixels <= HEAT_PIXELS:
        return canvas
    factor = math.sqrt(HEAT_PIXELS / pixels)
    return resample.resize(canvas, max(int(width * factor), 1), max(int(height * factor), 1), "area")


def texts(spec: JobSpec) -> list[tuple[str, ClipsegMask]]:
    """The CLIPSeg masks of a job, each with its path."""
    found = leaves(spec.mask) if spec.mask is not None else []
    return [(path, mask) for path, mask in found if isinstance(mask, ClipsegMask)]


def search(spec: JobSpec, picture: torch.Tensor, segmenters: SegmenterStore) -> Iterator[Findings]:
    """Find every text of a job in its canvas [H, W, 3]: one text, and at first its model, each `next`.

    What comes is all that was found so far.
    """
    by_path: dict[str, Levels | None] = {}
    for path, mask in texts(spec):
        logits = segmenters.get(mask.segmenter, path).logits(picture, mask.text, path)
        by_path[path] = maps.indices(
            logits, threshold=mask.threshold, blur=mask.blur, dilation=mask.dilation_factor
        )
        yield Findings(by_path)
