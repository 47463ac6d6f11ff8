"""What flows between nodes, as values: how a picture, a mask or a latent came to be, not its pixels.

Two values are equal when the same nodes with the same settings made them, whatever their ids are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from overpaint_producer.workflow.graph import Node
from overpaint_shared.job import Crop, FeatherBorders, Grow, Invert, Pad, Scale, ScaleBy

PictureOp = Crop | Scale | ScaleBy | Pad
MaskOp = Grow | FeatherBorders | Invert


@dataclass(frozen=True)
class Placed:
    """An operation, and the node that does it."""

    op: PictureOp | MaskOp
    node: Node = field(compare=False)


@dataclass(frozen=True)
class LoraStep:
    """A LoRA file on the way of a model or of a text encoder."""

    file: str
    weight: float
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Denoiser:
    """MODEL."""

    file: str
    loras: tuple[LoraStep, ...]
    node: Node = field(compare=False)
    """The checkpoint's loader."""
    differential: Node | None = field(default=None, compare=False)
    """The DifferentialDiffusion node, if there is one."""


@dataclass(frozen=True)
class TextEncoder:
    """CLIP."""

    file: str
    loras: tuple[LoraStep, ...]
    node: Node = field(compare=False)
    last_layer: int | None = None
    """-1 is the last; None: the model's own choice."""
    layer_node: Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Autoencoder:
    """VAE: a checkpoint's own, or a file."""

    file: str
    own: bool
    node: Node = field(compare=False)


@dataclass(frozen=True)
class ControlNet:
    """CONTROL_NET."""

    file: str
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Picture:
    """IMAGE: a file, and what was done to it."""

    file: str
    ops: tuple[Placed, ...]
    node: Node = field(compare=False)
    """The last node that made it."""
    loader: Node = field(compare=False)

    def then(self, op: PictureOp, node: Node) -> "Picture":
        """The picture after one more operation."""
        return replace(self, ops=(*self.ops, Placed(op, node)), node=node)


@dataclass(frozen=True)
class FromFile:
    """A mask read from a picture file; `loaded` by Load Image, whose mask is its picture's transparency."""

    file: str
    channel: Literal["red", "green", "blue", "alpha"]
    loaded: bool


@dataclass(frozen=True)
class FromPad:
    """The mask of what Pad Image for Outpainting added; `picture` is the padded one."""

    picture: Picture


@dataclass(frozen=True)
class FromText:
    """What CLIPSeg found in a picture."""

    picture: Picture
    text: str
    threshold: float
    dilation_factor: int
    blur: float


@dataclass(frozen=True)
class MaskValue:
    """MASK."""

    source: FromFile | FromPad | FromText
    ops: tuple[Placed, ...]
    node: Node = field(compare=False)

    def then(self, op: MaskOp, node: Node) -> "MaskValue":
        """The mask after one more operation; inverting twice is nothing."""
        if isinstance(op, Invert) and self.ops and isinstance(self.ops[-1].op, Invert):
            return replace(self, ops=self.ops[:-1])
        return replace(self, ops=(*self.ops, Placed(op, node)), node=node)


@dataclass(frozen=True)
class Hint:
    """IMAGE: what InpaintPreprocessor makes, a picture with -1 under the mask."""

    picture: Picture
    mask: MaskValue
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Shown:
    """IMAGE: CLIPSeg's heat map or its mask as a picture, for people."""

    node: Node = field(compare=False)


@dataclass(frozen=True)
class ControlUse:
    """A ControlNet applied to conditioning."""

    net: ControlNet
    image: Picture | Hint
    strength: float
    start: float
    end: float
    node: Node = field(compare=False)
    spreads: bool = field(default=False, compare=False)
    """From ControlNetApply: put on the positive text, the sampler takes it for the negative one too."""


@dataclass(frozen=True)
class InpaintUse:
    """What InpaintModelConditioning gives the model's further channels."""

    picture: Picture
    mask: MaskValue
    vae: Autoencoder
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Conditioning:
    """CONDITIONING."""

    text: str
    clip: TextEncoder
    node: Node = field(compare=False)
    controls: tuple[ControlUse, ...] = ()
    inpaint: InpaintUse | None = None


@dataclass(frozen=True)
class Encoded:
    """LATENT: a picture, encoded; `grey` by VAE Encode (for Inpainting), `model` for 9-channel models."""

    picture: Picture
    vae: Autoencoder
    kind: Literal["plain", "grey", "model"]
    node: Node = field(compare=False)
    mask: MaskValue | None = None
    grow: int = 0
    mask_node: Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Draw:
    """A sampler's own settings."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float
    seed_input: str = field(default="seed", compare=False)


@dataclass(frozen=True)
class Sampled:
    """LATENT: what a sampler made."""

    model: Denoiser
    positive: Conditioning
    negative: Conditioning
    latent: Encoded
    draw: Draw
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Composed:
    """How a rendered picture was put over the original."""

    mask: MaskValue
    node: Node = field(compare=False)


@dataclass(frozen=True)
class Rendered:
    """IMAGE: a decoded latent, maybe put over the original, and what was done to it then."""

    sampled: Sampled
    vae: Autoencoder
    node: Node = field(compare=False)
    composed: Composed | None = None
    laid: Node | None = field(default=None, compare=False)
    """An ImageCompositeMasked without a mask: it changes nothing where both pictures have one size."""
    ops: tuple[Placed, ...] = ()

    def then(self, op: PictureOp, node: Node) -> "Rendered":
        """The picture after one more operation."""
        return replace(self, ops=(*self.ops, Placed(op, node)))


Image = Picture | Rendered | Hint | Shown
Latent = Encoded | Sampled
Value = (
    Denoiser
    | TextEncoder
    | Autoencoder
    | ControlNet
    | Picture
    | Hint
    | Shown
    | Rendered
    | MaskValue
    | Conditioning
    | Encoded
    | Sampled
)

SAID: dict[type, str] = {
    Denoiser: "a MODEL",
    TextEncoder: "a CLIP",
    Autoencoder: "a VAE",
    ControlNet: "a CONTROL_NET",
    Picture: "an IMAGE",
    Hint: "an IMAGE",
    Shown: "an IMAGE",
    Rendered: "an IMAGE",
    MaskValue: "a MASK",
    Conditioning: "a CONDITIONING",
    Encoded: "a LATENT",
    Sampled: "a LATENT",
}


def said(kinds: Iterable[type]) -> str:
    """The names of types as the editor has them."""
    return " or ".join(dict.fromkeys(SAID[kind] for kind in kinds))
