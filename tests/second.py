"""The reference's way from files to a picture, written a second time, one job at a time and in order.

From the same descriptions as the engine, but of diffusers' and transformers' own modules, Pillow and numpy,
with none of the engine's code below the samplers (whose formulas have tests of their own).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import torchsde
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.stats import beta
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTextModel

from tests.sampling import drive
from tests.weights import TOKENIZER

SCALING = 0.18215
START, END, TOKENS = 49_406, 49_407, 77
GREY_LATENT = (0.8223, -0.6876, 0.6364, 0.1380)
Spec = Mapping[str, Any]


@dataclass
class Painted:
    """What a job came to."""

    levels: np.ndarray
    """uint8 [h, w, 3]."""
    start: Tensor
    """The picture's latent, scaled."""
    end: Tensor
    mask: Tensor | None
    """At the latent's size."""
    sigmas: Tensor


@dataclass
class Networks:
    """The tiny weights, as diffusers and transformers read them."""

    unet: Any
    vae: Any
    text: Any
    control: Any


@cache
def networks(weights: Path, model: str) -> Networks:
    """`weights`: the folder of diffusers folders. The text encoder is rounded to half precision."""
    folder = weights / model
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").half().float().eval()
    return Networks(
        UNet2DConditionModel.from_pretrained(folder / "unet").eval(),
        AutoencoderKL.from_pretrained(folder / "vae").eval(),
        text,
        ControlNetModel.from_pretrained(weights / "controlnet").eval(),
    )


# ------------------------------------------------------------------------------------------- pictures


def load_image(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Load Image: [H, W, 3] and the mask [H, W], 0..1; None: the mask of 64 x 64 zeros."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if "A" in image.getbands() or (image.mode == "P" and "transparency" in image.info):
        rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / 255
        return rgba[..., :3], 1 - rgba[..., 3]
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255, None


def load_mask(data: bytes, channel: str) -> np.ndarray:
    """Load Image (as Mask)."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    plane = np.asarray(image)[..., "rgba".index(channel[0])].astype(np.float32) / 255
    return 1 - plane if channel == "alpha" else plane


def pad(image: np.ndarray, op: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Pad Image for Outpainting: the picture on grey, and the mask, pixel by pixel."""
    height, width = image.shape[:2]
    left, top, right, bottom = (op.get(side, 0) for side in ("left", "top", "right", "bottom"))
    reach = op.get("feathering", 40)
    canvas = np.full((top + height + bottom, left + width + right, 3), 0.5, np.float32)
    canvas[top : top + height, left : left + width] = image
    mask = np.ones(canvas.shape[:2], np.float32)
    soft = reach > 0 and 2 * reach < height and 2 * reach < width
    for i in range(height):
        for j in range(width):
            ways = (
                [i] * bool(top) + [height - i] * bool(bottom) + [j] * bool(left) + [width - j] * bool(right)
            )
            near = min(ways, default=reach)
            mask[top + i, left + j] = ((reach - near) / reach) ** 2 if soft and near < reach else 0
    return canvas, mask


def scale_by(image: np.ndarray, op: Spec) -> np.ndarray:
    """Upscale Image By, for the filters that torch has."""
    size = round(image.shape[0] * op["factor"]), round(image.shape[1] * op["factor"])
    return F.interpolate(planes(image), size, mode=op["filter"])[0].permute(1, 2, 0).numpy()


def planes(image: np.ndarray) -> Tensor:
    """[1, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].contiguous()


def cropped(array: np.ndarray) -> np.ndarray:
    """To multiples of 8, about the middle."""
    (top, height), (left, width) = ((side % 8 // 2, side // 8 * 8) for side in array.shape[:2])
    return array[top : top + height, left : left + width]


def prepared(spec: Spec, files: Mapping[str, bytes]) -> tuple[np.ndarray, np.ndarray | None]:
    """The canvas and the mask on it."""
    image, alpha = load_image(files[spec["source"]["image"]])
    wanted, padded = spec.get("mask"), None
    for op in spec.get("prepare", ()):
        if op["op"] == "pad":
            image, padded = pad(image, op)
        else:
            image = scale_by(image, op)
    if wanted is None:
        return image, None
    if wanted["from"] == "pad":
        return image, padded
    if wanted["from"] == "image":
        mask = load_mask(files[wanted["image"]], wanted.get("channel", "red"))
    else:
        mask = np.zeros(image.shape[:2], np.float32) if alpha is None else alpha
    return image, changed(mask, wanted.get("ops", ()))


def changed(mask: np.ndarray, ops: Sequence[Spec]) -> np.ndarray:
    """Grow Mask, by so many dilations one after another, and Invert Mask."""
    diamond = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    for op in ops:
        if op["op"] == "invert":
            mask = 1 - mask
        for _ in range(op.get("by", 0)):
            mask = ndimage.grey_dilation(mask, footprint=diamond)
    return mask


# --------------------------------------------------------------------------------------------- latents


def encode(vae: Any, image: np.ndarray) -> Tensor:
    """VAE Encode: the posterior's mean, scaled; laid out pixel by pixel, as the reference's pictures are."""
    px = planes(cropped(image)).contiguous(memory_format=torch.channels_last)
    latent: Tensor = vae.encode(px * 2 - 1).latent_dist.mode() * SCALING
    return latent.contiguous()


def greyed(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Half grey where the mask, rounded to even, is 1."""
    return (image - np.float32(0.5)) * (1 - np.rint(mask))[..., None] + np.float32(0.5)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """VAE Encode (for Inpainting)'s noise mask: as a sum over windows, cut off at 1."""
    if by == 0:
        return np.rint(mask)
    reach = -(-(by - 1) // 2)
    sums = F.conv2d(torch.from_numpy(np.rint(mask))[None, None], torch.ones(1, 1, by, by), padding=reach)
    return sums[0, 0, : mask.shape[0], : mask.shape[1]].clamp(0, 1).numpy()


@dataclass
class Scene:
    """What the sampler begins with."""

    image: np.ndarray
    mask: np.ndarray | None
    start: Tensor
    soft: Tensor | None
    """The mask on the noise, at the latent's size."""


def begin(spec: Spec, files: Mapping[str, bytes], vae: Any) -> Scene:
    """The method's own encoding."""
    image, mask = prepared(spec, files)
    method = spec["method"]
    kind = method.get("latent", "vae_encode_inpaint") if "controlnet" in method else method["kind"]
    if mask is None or kind == "img2img":
        return Scene(image, mask, encode(vae, image), None)
    seen, noise_mask = image, mask if kind == "latent_noise_mask" else cropped(mask)
    if kind == "vae_encode_inpaint":
        seen, noise_mask = greyed(image, mask), grown(cropped(mask), method.get("grow_mask_by", 6))
    start = encode(vae, seen)
    plane = torch.from_numpy(np.ascontiguousarray(noise_mask))[None, None]
    return Scene(image, mask, start, F.interpolate(plane, start.shape[-2:], mode="bilinear"))


# ---------------------------------------------------------------------------------------- noise levels


def training() -> Tensor:
    """Sigmas of the thousand steps of training, float64."""
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    return ((1 - kept) / kept).sqrt()


TABLE = training()
LOGS = TABLE.log().float()
"""Times half-way between two are as near to the one as to the other: which is told hangs on the last bit."""


def at(times: Tensor) -> np.ndarray:
    """Sigma at times, the logarithm interpolated, in float32."""
    low, high, share = times.floor().long(), times.ceil().long(), times.frac()
    levels: np.ndarray = ((1 - share) * LOGS[low] + share * LOGS[high]).exp().numpy()
    return levels


def time_of(sigma: Tensor) -> int:
    """The nearest time."""
    return int((sigma.log() - LOGS).abs().argmin())


def schedule(name: str, n: int) -> np.ndarray:
    """All of it, with the 0 at the end."""
    low, high, table = float(TABLE[0]), float(TABLE[-1]), TABLE.numpy()
    share = np.linspace(0, 1, n)
    quantiles = np.rint(beta.ppf(1 - np.arange(n) / n, 0.6, 0.6) * 999).astype(int)
    levels: Mapping[str, Callable[[], np.ndarray]] = {
        "normal": lambda: at(torch.linspace(999, 0, n)),
        "karras": lambda: (high ** (1 / 7) + share * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        "exponential": lambda: np.exp(np.linspace(np.log(high), np.log(low), n)),
        "sgm_uniform": lambda: at(torch.linspace(999, 0, n + 1)[:-1]),
        "simple": lambda: table[[999 - int(i * 1000 / n) for i in range(n)]],
        "ddim_uniform": lambda: table[1 :: max(1000 // n, 1)][::-1],
        "beta": lambda: table[np.sort(np.unique(quantiles))[::-1]],
    }
    return np.append(levels[name](), 0.0)


def levels_of(sampling: Spec) -> Tensor:
    """Those of a job, float32."""
    steps, denoise = sampling["steps"], sampling["denoise"]
    total = steps if denoise > 0.9999 else int(steps / denoise)
    between = sampling["sampler"] in {"dpm_2", "dpm_2_ancestral"}
    levels = schedule(sampling["scheduler"], total + between)
    if between:
        levels = np.delete(levels, -2)
    if denoise <= 0.9999:
        levels = levels[-(steps + 1) :]
    return torch.from_numpy(levels.astype(np.float32))


class Drawn:
    """A sampler's noise."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed % 2**32)

    def __call__(self, like: Tensor) -> Tensor:
        """The next of the seed."""
        return torch.randn(like.shape, generator=self._generator)

    def path(self, like: Tensor, sigmas: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A Brownian tree's increments."""
        low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        tree = torchsde.BrownianTree(t0=low, w0=torch.zeros_like(like), t1=high, entropy=self._seed)

        def increment(a: Tensor, b: Tensor) -> Tensor:
            ends = sorted(min(max(float(s), round(low, 6)), round(high, 6)) for s in (a, b))
            return (tree(*ends) if a < b else -tree(*ends)) / (b - a).abs().sqrt()

        return increment


# -------------------------------------------------------------------------------------------- the model


WEIGHED = {
    r"a (red:1.3) ((brick)) house \(old\), (worn:0.6)": [
        ("a ", 1.0), ("red", 1.3), (" ", 1.0), ("brick", 1.1 * 1.1), (" house (old), ", 1.0), ("worn", 0.6),
    ],
}  # fmt: skip
"""A prompt with weights, and what it means."""


def text_of(encoder: Any, prompt: str, clip_skip: int) -> Tensor:
    """A prompt in blocks of 75 tokens; a weight moves a token's state away from the empty prompt's."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    read = [
        (token, weight)
        for words, weight in WEIGHED.get(prompt, [(prompt, 1.0)])
        for token in tokenizer.encode(words, add_special_tokens=False).ids
    ]
    blocks = [read[i : i + TOKENS - 2] for i in range(0, max(len(read), 1), TOKENS - 2)]
    empty = states_of(encoder, [], clip_skip)
    made = []
    for block in blocks:
        weights = torch.tensor([1.0, *[weight for _, weight in block], *[1.0] * (TOKENS - 1 - len(block))])
        states = states_of(encoder, [token for token, _ in block], clip_skip)
        made.append((states - empty) * weights[:, None] + empty if prompt in WEIGHED else states)
    return torch.cat(made, 1)


def states_of(encoder: Any, ids: list[int], clip_skip: int) -> Tensor:
    """[1, 77, D]: a layer's states through the final norm."""
    row = torch.tensor([[START, *ids, END, *[END] * (TOKENS - 2 - len(ids))]])
    states = encoder(input_ids=row, output_hidden_states=True).hidden_states[-1 - clip_skip]
    result: Tensor = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    return result


@dataclass
class Control:
    """A ControlNet at work."""

    net: Any
    hint: Tensor
    strength: float
    first: float
    last: float

    def residuals(self, seen: Tensor, time: int, text: Tensor) -> list[Tensor]:
        """What it adds to each skip connection, and last to the middle."""
        down, middle = self.net(seen, time, text, controlnet_cond=self.hint, return_dict=False)
        return [each * self.strength for each in (*down, middle)]


def control_of(net: Any, image: np.ndarray, settings: Spec, like: Tensor) -> Control:
    """The hint is cut to the latent's aspect and scaled by nearest neighbours."""
    height, width = (side * 8 for side in like.shape[-2:])
    old, new = image.shape[1] / image.shape[0], width / height
    x = round((image.shape[1] - image.shape[1] * (new / old)) / 2) if old > new else 0
    y = round((image.shape[0] - image.shape[0] * (old / new)) / 2) if old < new else 0
    cut = image[y : image.shape[0] - y, x : image.shape[1] - x]
    start, end = settings.get("start", 0.0), settings.get("end", 1.0)
    return Control(
        net, F.interpolate(planes(cut), (height, width), mode="nearest-exact"), settings.get("strength", 1.0),
        1e9 if start <= 0 else float(at(torch.tensor((1 - start) * 999))),
        0.0 if end >= 1 else float(at(torch.tensor((1 - end) * 999))),
    )  # fmt: skip


def controls_of(spec: Spec, files: Mapping[str, bytes], net: Any, scene: Scene) -> list[Control]:
    """The method's own, with holes, then the others."""
    shown = [(load_image(files[each["image"]])[0], each) for each in spec.get("controls", ())]
    if "controlnet" in spec["method"] and scene.mask is not None:
        holed = np.where(scene.mask[..., None] > 0.5, np.float32(-1), scene.image)
        shown.insert(0, (holed, spec["method"]))
    found = [control_of(net, image, settings, scene.start) for image, settings in shown]
    return [control for control in found if control.strength != 0]


def more_channels(spec: Spec, vae: Any, scene: Scene) -> Tensor:
    """What a model of nine channels sees beside the latent."""
    if scene.soft is None:
        grey = torch.tensor(GREY_LATENT).view(1, 4, 1, 1).expand_as(scene.start)
        return torch.cat([torch.ones_like(grey[:, :1]), grey], 1)
    if spec["method"]["kind"] == "inpaint_model" and scene.mask is not None:
        return torch.cat([scene.soft.round(), encode(vae, greyed(scene.image, scene.mask))], 1)
    return torch.cat([scene.soft.round(), scene.start], 1)


# ---------------------------------------------------------------------------------------------- a job


@dataclass
class Run:
    """A job under way."""

    unet: Any
    scene: Scene
    controls: list[Control]
    extra: Tensor | None
    texts: list[Tensor]
    """The positive, then the negative."""
    sampling: Spec
    sigmas: Tensor
    blend: Tensor
    """The noise on what the mask spares."""

    def predicted(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """The clean latent under one text."""
        seen, time = x / (sigma**2 + 1) ** 0.5, time_of(sigma)
        acting = [c for c in self.controls if c.last <= float(sigma) <= c.first]
        added = [sum(parts) for parts in zip(*(c.residuals(seen, time, text) for c in acting), strict=True)]
        more = {
            "down_block_additional_residuals": added[:-1] or None,
            "mid_block_additional_residual": added[-1] if added else None,
        }
        shown = seen if self.extra is None else torch.cat([seen, self.extra], 1)
        eps: Tensor = self.unet(shown, time, encoder_hidden_states=text, **more).sample
        return x - sigma * eps

    def mask_at(self, sigma: Tensor) -> Tensor | None:
        """Differential diffusion cuts it anew at each level; the last time of all is 0."""
        if self.scene.soft is None or not self.sampling.get("differential"):
            return self.scene.soft
        return (self.scene.soft >= torch.tensor(time_of(sigma) / time_of(self.sigmas[0]))).float()

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Guided, and what the mask spares put in place before and after."""
        known, m, cfg = self.scene.start, self.mask_at(sigma), self.sampling["cfg"]
        if m is not None:
            x = x * m + (known + self.blend * sigma) * (1 - m)
        den = self.predicted(x, sigma, self.texts[0])
        if cfg != 1:
            empty = self.predicted(x, sigma, self.texts[1])
            den = empty + (den - empty) * cfg
        return den if m is None else den * m + known * (1 - m)

    def end(self, x: Tensor) -> Tensor:
        """All steps."""
        name, seed = self.sampling["sampler"], int(self.sampling["seed"])
        if name not in {"euler", "ddim"}:
            return drive(name, x, self.sigmas, Drawn(seed), self.denoised)[1]
        for sigma, after in pairwise(self.sigmas):
            x = x + (x - self.denoised(x, sigma)) / sigma * (after - sigma)
        return x


def run_of(spec: Spec, files: Mapping[str, bytes], nets: Networks) -> Run:
    """Everything that the steps need."""
    scene, sampling = begin(spec, files, nets.vae), spec["sampling"]
    texts = [text_of(nets.text, spec[key], spec.get("clip_skip", 0)) for key in ("prompt", "negative_prompt")]
    return Run(
        nets.unet, scene, controls_of(spec, files, nets.control, scene),
        more_channels(spec, nets.vae, scene) if nets.unet.config.in_channels == 9 else None,
        texts, sampling, levels_of(sampling),
        Drawn(int(sampling["seed"]) + (sampling["sampler"] == "ddim"))(scene.start),
    )  # fmt: skip


@torch.inference_mode()
def paint(spec: Spec, files: Mapping[str, bytes], nets: Networks) -> Painted:
    """A job from its files to its picture."""
    run = run_of(spec, files, nets)
    first, start = run.sigmas[0], run.scene.start
    full = float(first) > float(TABLE[-1]) * (1 - 1e-5)
    noise = Drawn(int(run.sampling["seed"]))(start)
    end = run.end(start + noise * ((1 + first**2).sqrt() if full else first))
    y = ((nets.vae.decode(end / SCALING).sample + 1) / 2).clamp(0, 1)[0].permute(1, 2, 0).numpy()
    if spec["composite"] and run.scene.mask is not None:
        over = run.scene.mask[..., None]
        y = over * y + (1 - over) * run.scene.image
    return Painted((y * np.float32(255)).astype(np.uint8), start, end, run.scene.soft, run.sigmas)
