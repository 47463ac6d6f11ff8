"""The pictures of one job: each is decoded once, and let go when nothing of the job needs it any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from overpaint_shared.errors import InputError
from overpaint_shared.headers import look
from overpaint_shared.headers.together import check_together
from overpaint_shared.job import ImageMask, JobSpec
from overpaint_shared.settings import Limits
from overpaint_shared.spec.masks import leaves

from . import picture, time_limit
from .decoding import Decode, Decoded
from .picture import Picture, Plane

Wanted = tuple[str, bool]
"""A reference, and whether one transparent colour of it counts for nothing."""


class Album:
    """A job's pictures. `inputs` maps each reference of the spec to the encoded file.

    Raises:
        InputError: a picture was not sent, or all of them together are beyond the operator's limit.

    """

    def __init__(self, spec: JobSpec, inputs: Mapping[str, bytes], limits: Limits, decode: Decode) -> None:
        self._spec, self._inputs, self._limits, self._decode = spec, inputs, limits, decode
        self._compat = spec.compat == "comfyui"
        self._kept: dict[Wanted, Decoded] = {}
        self._planes: dict[tuple[str, str], Plane] = {}
        self._needed = Counter(
            [self._wanted(spec.source.image)]
            + [self._wanted(reference, keyed=True) for reference in {mask.image for _, mask in self._masks()}]
            + [self._wanted(reference) for reference in {control.image for control in spec.controls}]
        )
        self._check()

    @property
    def kept(self) -> list[str]:
        """References of the pictures that are held decoded, until they are asked for again."""
        return [reference for reference, _ in self._kept]

    def source(self) -> Picture:
        """The picture to change."""
        return self._picture(self._spec.source.image, "source.image")

    def control(self, reference: str, field: str) -> Picture:
        """What a ControlNet is shown; asked for once for each reference."""
        return self._picture(reference, field)

    def read_masks(self) -> None:
        """Decode what the mask's own pictures hold. Raises MaskError, InputError."""
        for path, mask in self._masks():
            if (mask.image, mask.channel) in self._planes:
                continue
            decoded = self._take(self._wanted(mask.image, keyed=True), f"{path}.image")
            for other, each in self._masks():
                if each.image == mask.image:
                    plane = picture.plane_of(decoded, each.channel, f"{other}.image", compat=self._compat)
                    self._planes[each.image, each.channel] = plane

    def mask(self, path: str) -> torch.Tensor:
        """What the picture of the mask at this path holds, float32 [H, W]; made anew each time."""
        mask = next(mask for each, mask in self._masks() if each == path)
        return self._planes[mask.image, mask.channel].mask()

    def _masks(self) -> Iterator[tuple[str, ImageMask]]:
        for path, mask in leaves(self._spec.mask) if self._spec.mask is not None else ():
            if isinstance(mask, ImageMask):
                yield path, mask

    def _wanted(self, reference: str, *, keyed: bool = False) -> Wanted:
        """Only the reference treats one transparent colour in two ways."""
        return reference, self._compat and not keyed

    def _picture(self, reference: str, field: str) -> Picture:
        return picture.of(self._take(self._wanted(reference), field), compat=self._compat)

    def _take(self, wanted: Wanted, field: str) -> Decoded:
        reference, drop_keyed = wanted
        time_limit.check(field, computed_s=0)  # a process of its own decodes, while this thread waits
        found = self._kept.pop(wanted, None) or self._decode(
            self._input(reference, field), self._limits, field, compat=self._compat, drop_keyed=drop_keyed
        )
        self._needed[wanted] -= 1
        if self._needed[wanted] > 0:
            self._kept[wanted] = found
        return found

    def _input(self, reference: str, field: str) -> bytes:
        if reference not in self._inputs:
            raise InputError(
                "the picture was not sent", field=field, value=reference, fix="submit the job again"
            )
        return self._inputs[reference]

    def _check(self) -> None:
        most, costs = self._limits.max_frames, dict[str, int]()
        for field, reference in self._spec.image_refs():
            if reference not in costs:
                header = look(self._input(reference, field), field, max_frames=most)
                costs[reference] = header.decoded_bytes if header else 0
        check_together(self._spec, costs, self._limits.max_decoded_bytes, "max_decoded_bytes")
