"""Which part is worked on, what must stay, and how the result is written."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from overpaint_shared.errors import Problem
from overpaint_shared.spec.fields import Key, Part, Pixels, Share, refuse


class FullRegion(Part):
    """Work on the whole canvas."""

    kind: Literal["full"] = Field("full", description="Work on the whole canvas.")


class OnlyMasked(Part):
    """Work on a rectangle around the mask, at a size of its own, and stitch it back."""

    kind: Literal["only_masked"] = Field("only_masked", description="Work on a rectangle around the mask.")
    padding: Pixels = Field(32, description="Pixels around the mask that the rectangle includes, 0 to 16384.")
    size: int | None = Field(
        None,
        ge=64,
        le=8192,
        description="Longer side at which the rectangle is worked on, pixels, 64 to 8192; null: the model's "
        "own size.",
    )
    threshold: Share = Field(
        0.5, description="Where the mask is greater, it counts for the rectangle; 0 to 1."
    )


Region = Annotated[FullRegion | OnlyMasked, Field(discriminator="kind")]


class Preserve(Part):
    """Fail rather than change what the mask spares."""

    max_outside: int = Field(
        0,
        ge=0,
        le=255,
        description="Largest change outside the mask that is let pass, 8-bit levels, 0 to 255.",
    )


def _lossless_by_format(data: dict[str, Any]) -> bool:
    return data.get("format") != "jpeg"


class Output(Part):
    """How the result is written."""

    format: Literal["png", "webp", "jpeg"] = Field("png", description="Format of the picture.")
    lossless: bool = Field(
        default_factory=_lossless_by_format,
        description="Whether the picture is stored without loss; always true for png, always false for jpeg; "
        "absent: true except for jpeg.",
    )
    quality: int | None = Field(
        None, ge=1, le=100, description="Quality of a lossy picture, 1 to 100; null: the encoder's default."
    )
    previews: bool = Field(True, description="Also store the mask in black and white and as a heat map.")
    key: Key | None = Field(
        None,
        description="Name under which the farm also stores the picture, over what was there: a relative key, "
        "at most 512 characters and 800 bytes, below `named/OWNER/`; null: none.",
    )

    @property
    def lossy(self) -> bool:
        """Whether pixels change when they are written."""
        return not self.lossless

    @model_validator(mode="after")
    def _format_and_loss_agree(self) -> Self:
        problems = []
        if self.format == "png" and not self.lossless:
            problems.append(_disagrees("png is always lossless", given="false", allowed="true"))
        if self.format == "jpeg" and self.lossless:
            problems.append(_disagrees("jpeg is always lossy", given="true", allowed="false"))
        if self.quality is not None and self.lossless and not problems:
            problems.append(
                Problem(
                    path="quality",
                    message="means nothing for a lossless picture",
                    given=str(self.quality),
                    allowed="null, or `lossless`: false with webp or jpeg",
                )
            )
        if problems:
            raise refuse(*problems)
        return self


def _disagrees(message: str, *, given: str, allowed: str) -> Problem:
    return Problem(path="lossless", message=message, given=given, allowed=allowed)
