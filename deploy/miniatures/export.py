"""Write the finished miniatures as diffusers and transformers folders of half precision.

`python -m deploy.miniatures.export --out DIR --to FOLDER`, after all the training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPSegForImageSegmentation, CLIPTextModel

from deploy.miniatures import segmenter, words

SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def main() -> None:
    """Convert what is there; a model that is not finished stops it."""
    parser = argparse.ArgumentParser(prog="python -m deploy.miniatures.export")
    parser.add_argument("--out", type=Path, required=True, help="what training was told")
    parser.add_argument("--to", type=Path, required=True, help="folder of the four models")
    given = parser.parse_args()
    trained, to = given.out, given.to
    parts = {
        "mini/vae": (AutoencoderKL, "vae/model"),
        "mini/unet": (UNet2DConditionModel, "denoiser/unet"),
        "mini/text_encoder": (CLIPTextModel, "denoiser/text_encoder"),
        "mini-inpaint/unet": (UNet2DConditionModel, "inpaint/model"),
        "mini-controlnet-inpaint": (ControlNetModel, "controlnet/model"),
        "mini-clipseg": (CLIPSegForImageSegmentation, "segmenter/model"),
    }
    for name, (kind, folder) in parts.items():
        _empty(to / name)
        kind.from_pretrained(trained / folder, dtype=torch.float32).half().save_pretrained(to / name)
    for config in to.rglob("config.json"):
        _write(config, {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"})
    _write(to / "mini" / "scheduler" / "scheduler_config.json", SCHEDULE)
    _write(to / "mini" / "model_index.json", INDEX)
    _write(to / "mini-clipseg" / "preprocessor_config.json", segmenter.PREPROCESSOR)
    tokenizer = words.load(trained / "tokenizer")
    for folder in ("mini/tokenizer", "mini-clipseg"):
        (to / folder).mkdir(exist_ok=True)
        tokenizer.save(str(to / folder / "tokenizer.json"))
    print(sum(file.stat().st_size for file in to.rglob("*") if file.is_file()) / 1e6, "MB")


def _empty(folder: Path) -> None:
    """Remove an earlier export's weights; a model card stays."""
    if folder.exists():
        for file in folder.glob("*.safetensors"):
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
