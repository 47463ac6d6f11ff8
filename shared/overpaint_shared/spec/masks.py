"""Where a mask comes from and what is done to it: 1 (white) is repainted, 0 is kept, greys are in between."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from overpaint_shared.errors import Problem
from overpaint_shared.spec.fields import LARGEST_SIDE, Line, Name, Part, Pixels, Reference, Share, refuse

DEEPEST_MASK = 4
MOST_MASKS = 64
"""Masks of a job, combined ones included."""
MOST_MASK_OPS = 256
"""Operations on all masks of a job together."""


class Grow(Part):
    """Grow or shrink the mask."""

    op: Literal["grow"] = Field("grow", description="Grow or shrink the mask.")
    by: int = Field(
        ge=-LARGEST_SIDE, le=LARGEST_SIDE, description="Pixels, -16384 to 16384; negative values shrink."
    )
    tapered: bool = Field(True, description="Grow as a diamond (true) or as a square (false).")


class Feather(Part):
    """Soften the mask's own edge inward."""

    op: Literal["feather"] = Field("feather", description="Soften the mask's own edge inward.")
    by: Pixels = Field(description="Width of the soft edge, pixels, 0 to 16384.")


class FeatherBorders(Part):
    """Fade the mask out towards the borders of the picture."""

    op: Literal["feather_borders"] = Field(
        "feather_borders", description="Fade the mask towards the borders."
    )
    left: Pixels = Field(0, description="Width of the fade at the left, pixels, 0 to 16384.")
    top: Pixels = Field(0, description="Width of the fade at the top, pixels, 0 to 16384.")
    right: Pixels = Field(0, description="Width of the fade at the right, pixels, 0 to 16384.")
    bottom: Pixels = Field(0, description="Width of the fade at the bottom, pixels, 0 to 16384.")


class Blur(Part):
    """Blur the mask with a Gaussian."""

    op: Literal["blur"] = Field("blur", description="Blur the mask with a Gaussian.")
    radius: float = Field(ge=0, le=1024, description="Standard deviation, pixels, 0 to 1024.")


class Invert(Part):
    """Swap what is repainted and what is kept."""

    op: Literal["invert"] = Field("invert", description="Swap what is repainted and what is kept.")


class Threshold(Part):
    """Make the mask hard: 1 above a value, else 0."""

    op: Literal["threshold"] = Field("threshold", description="Make the mask hard.")
    at: Share = Field(0.5, description="What is greater becomes 1, the rest 0; 0 to 1.")


MaskOp = Annotated[Grow | Feather | FeatherBorders | Blur | Invert | Threshold, Field(discriminator="op")]


class _MaskSource(Part):
    """What every mask has, wherever it comes from."""

    ops: tuple[MaskOp, ...] = Field(
        (), max_length=32, description="Operations on the mask, in order; at most 32."
    )
    min_coverage: Share = Field(
        0.0, description="Smallest share of the canvas that the mask may cover, 0 to 1; less fails the job."
    )
    max_coverage: Share = Field(
        1.0, description="Largest share of the canvas that the mask may cover, 0 to 1; more fails the job."
    )

    @model_validator(mode="after")
    def _coverage_is_a_range(self) -> Self:
        if self.min_coverage > self.max_coverage:
            raise refuse(
                Problem(
                    path="min_coverage",
                    message="is greater than `max_coverage`, so no mask would do",
                    given=f"{self.min_coverage:g}",
                    allowed=f"0 to {self.max_coverage:g}",
                )
            )
        return self


class ImageMask(_MaskSource):
    """A channel of a picture."""

    from_: Literal["image"] = Field("image", alias="from", description="A channel of a picture.")
    image: Reference = Field(description="The picture; as `source.image`, at most 4096 characters.")
    channel: Literal["red", "green", "blue", "alpha"] = Field(
        "red", description="Which channel; of `alpha`, transparent is repainted."
    )
    at: Literal["source", "canvas"] = Field(
        "source", description="Whose size the mask has: the source's, or the canvas's after `prepare`."
    )


class AlphaMask(_MaskSource):
    """The source's own transparency: transparent is repainted."""

    from_: Literal["alpha"] = Field("alpha", alias="from", description="The source's transparency.")
    at: Literal["source"] = Field("source", description="Read before `prepare`.")


class PadMask(_MaskSource):
    """What the `pad` operations of `prepare` added."""

    from_: Literal["pad"] = Field("pad", alias="from", description="What `pad` added.")
    at: Literal["canvas"] = Field("canvas", description="Has the canvas's size.")


class ClipsegMask(_MaskSource):
    """What a text names, found by CLIPSeg in the prepared picture."""

    from_: Literal["clipseg"] = Field(
        "clipseg", alias="from", description="What a text names, found by CLIPSeg."
    )
    text: Line = Field(description="What to find, 1 to 256 characters.")
    threshold: Share = Field(0.4, description="Probabilities up to this count as nothing, 0 to 1.")
    dilation_factor: int = Field(4, ge=0, le=10, description="Growth, pixels of the 352-pixel map, 0 to 10.")
    blur: float = Field(
        7.0, ge=0, le=15, description="Standard deviation of the blur, pixels of the 352-pixel map, 0 to 15."
    )
    segmenter: Name = Field("clipseg", description="Name of the segmenter in the registry.")
    on_empty: Literal["fail", "skip", "full"] = Field(
        "fail", description="When nothing is found: fail, return the source unchanged, or repaint everything."
    )
    at: Literal["canvas"] = Field("canvas", description="Read after `prepare`.")


class CombinedMask(_MaskSource):
    """Several masks made one."""

    from_: Literal["combine"] = Field("combine", alias="from", description="Several masks made one.")
    how: Literal["union", "intersect", "subtract"] = Field(
        description="The largest value, the smallest, or the first less the others."
    )
    masks: tuple["Mask", ...] = Field(
        min_length=2,
        max_length=16,
        description="The masks, 2 to 16, combined at the canvas's size; nested at most 4 deep.",
    )
    at: Literal["canvas"] = Field("canvas", description="Has the canvas's size.")

    @model_validator(mode="after")
    def _is_not_too_deep(self) -> Self:
        if depth(self) > DEEPEST_MASK:
            raise refuse(
                Problem(
                    path="masks",
                    message="combined masks are nested too deep",
                    allowed=f"{DEEPEST_MASK} levels",
                )
            )
        return self


Mask = Annotated[ImageMask | AlphaMask | PadMask | ClipsegMask | CombinedMask, Field(discriminator="from_")]
CombinedMask.model_rebuild()


def depth(mask: Mask) -> int:
    """Levels of combined masks: 0 for a plain one."""
    if isinstance(mask, CombinedMask):
        return 1 + max(depth(part) for part in mask.masks)
    return 0


def nodes(mask: Mask) -> list[Mask]:
    """The mask and all masks in it."""
    inner = mask.masks if isinstance(mask, CombinedMask) else ()
    return [mask, *(node for part in inner for node in nodes(part))]


def leaves(mask: Mask, path: str = "mask") -> list[tuple[str, Mask]]:
    """The plain masks inside, each with its path in the spec."""
    if isinstance(mask, CombinedMask):
        return [leaf for i, part in enumerate(mask.masks) for leaf in leaves(part, f"{path}.masks[{i}]")]
    return [(path, mask)]
