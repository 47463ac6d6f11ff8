"""How `references.npz` was made: OpenCV 5.0.0, matplotlib 3.11.2 and SciPy, on the logits of the parity file.

    python make_references.py ../parity/clipseg/clipseg_7.0_0.4_4.npz
"""

import sys

import cv2
import matplotlib
import numpy as np
from scipy.ndimage import gaussian_filter

SETTINGS = [(7.0, 0.4, 4, 203, 181), (0.0, 0.05, 0, 31, 17), (3.3, 0.75, 10, 353, 97), (15.0, 0.1, 1, 64, 352)]
SIZES = [(1, 1), (5, 9), (23, 17), (46, 34), (11, 8), (100, 3)]


def main() -> None:
    logits = np.load(sys.argv[1])["logits"]
    dice = np.random.default_rng(0)
    kept: dict[str, np.ndarray] = {}
    for number, (blur, threshold, dilation, width, height) in enumerate(SETTINGS):
        likely = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
        likely = np.where(likely > threshold, likely, np.float32(0))
        likely = gaussian_filter(likely, blur) if blur else likely
        likely = (likely - likely.min()) / (likely.max() - likely.min())
        likely = cv2.dilate(likely, np.ones((2 * dilation + 1, 2 * dilation + 1), np.uint8))
        y, x, channel = np.ogrid[:height, :width, :3]
        picture = ((3 * x + 5 * y + 85 * channel) % 256).astype(np.uint8)
        grey, false = (
            cv2.resize((matplotlib.colormaps[name](likely)[..., :3] * 255).astype(np.uint8), (width, height))
            for name in ("Greys_r", "viridis")
        )
        kept |= {f"picture{number}": picture, f"grey{number}": grey[..., 0]}
        kept[f"heat{number}"] = cv2.addWeighted(picture, 0.5, false, 0.5, 0)
        kept[f"settings{number}"] = np.array([blur, threshold, dilation])
    source = kept["source"] = dice.integers(0, 256, (17, 23), dtype=np.uint8)
    for width, height in SIZES:
        kept[f"resized_{width}x{height}"] = cv2.resize(source, (width, height), interpolation=cv2.INTER_LINEAR)
    np.savez_compressed("references.npz", **kept)


main()
