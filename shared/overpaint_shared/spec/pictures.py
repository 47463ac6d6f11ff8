"""The source picture and the operations on pictures, before (`prepare`) and after (`finish`) rendering."""

from typing import Annotated, Literal

from pydantic import Field

from overpaint_shared.spec.fields import Part, Pixels, Reference, Side

Filter = Literal["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]


class Source(Part):
    """The picture to change."""

    image: Reference = Field(
        description="A path (the producer uploads the file), `s3://bucket/key`, or `sha256:` and "
        "64 hex digits of a stored input; at most 4096 characters."
    )


class Crop(Part):
    """Cut a rectangle out of the picture."""

    op: Literal["crop"] = Field("crop", description="Cut a rectangle out.")
    x: Pixels = Field(0, description="Left edge of the rectangle, pixels, 0 to 16384.")
    y: Pixels = Field(0, description="Top edge of the rectangle, pixels, 0 to 16384.")
    width: Side = Field(description="Width of the rectangle, pixels, 1 to 16384.")
    height: Side = Field(description="Height of the rectangle, pixels, 1 to 16384.")


class Scale(Part):
    """Resize to a width and a height."""

    op: Literal["scale"] = Field("scale", description="Resize to a width and a height.")
    width: Pixels = Field(
        description="New width, pixels, 0 to 16384; 0 keeps the aspect. With both 0 the size stays as it is."
    )
    height: Pixels = Field(description="New height, pixels, 0 to 16384; 0 keeps the aspect.")
    filter: Filter = Field("lanczos", description="Resampling filter.")
    crop: Literal["disabled", "center"] = Field(
        "disabled", description="`center`: first cut to the new aspect; `disabled`: stretch."
    )


class ScaleBy(Part):
    """Resize by a factor."""

    op: Literal["scale_by"] = Field("scale_by", description="Resize by a factor.")
    factor: float = Field(ge=0.01, le=8, description="Factor for both sides, 0.01 to 8.")
    filter: Filter = Field("lanczos", description="Resampling filter.")


class Pad(Part):
    """Extend the canvas; the mask source `pad` is the part that was added."""

    op: Literal["pad"] = Field("pad", description="Extend the canvas.")
    left: Pixels = Field(0, description="Pixels added at the left, 0 to 16384.")
    top: Pixels = Field(0, description="Pixels added at the top, 0 to 16384.")
    right: Pixels = Field(0, description="Pixels added at the right, 0 to 16384.")
    bottom: Pixels = Field(0, description="Pixels added at the bottom, 0 to 16384.")
    feathering: Pixels = Field(
        40,
        description="Width of the soft edge that the mask source `pad` has inside the old picture, pixels, "
        "0 to 16384.",
    )

    @property
    def adds(self) -> bool:
        """Whether any side grows."""
        return bool(self.left or self.top or self.right or self.bottom)


PrepareOp = Annotated[Crop | Scale | ScaleBy | Pad, Field(discriminator="op")]
FinishOp = Annotated[Scale | ScaleBy | Crop, Field(discriminator="op")]
