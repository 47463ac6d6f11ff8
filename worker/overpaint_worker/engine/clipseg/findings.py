"""What a job's texts found in its canvas: the masks for `masks.build`, the heat maps for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from overpaint_shared.job import ClipsegMask, JobSpec
from overpaint_shared.spec.masks import leaves
from overpaint_worker.engine.clipseg import maps
from overpaint_worker.engine.clipseg.maps import Levels
from overpaint_worker.engine.clipseg.store import SegmenterStore


@dataclass(frozen=True, eq=False)
class Findings:
    """By the path of each CLIPSeg mask in the job: its map at the model's size; None: nothing was found."""

    by_path: Mapping[str, Levels | None] = field(default_factory=dict)

    def mask(self, path: str, width: int, height: int) -> torch.Tensor | None:
        """The mask [height, width] of one text; None where nothing was found."""
        found = self.by_path[path]
        return None if found is None else maps.mask(found, width, height)

    def heat_maps(self, picture: torch.Tensor) -> list[torch.Tensor]:
        """One heat map [H, W, 3] over the picture for each text, in the job's order."""
        return [maps.heat_map(found, picture) for found in self.by_path.values()]


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
