"""What one pass of the denoiser costs, by its rows: where batches begin to pay, and where they cease to.

    .venv/bin/python bench/passes.py --shape sd15 --device cuda:0

For each bucket of rows the median milliseconds of a pass, rows per second, and the arithmetic done per second
(a multiply-add counts two). `replayed_ms` is the UNet alone replayed as a CUDA graph, which leaves
the CPU out; `channels_last` the same with the other layout of the weights. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rendering import add_options, device_name, registry_of
from torch.utils.flop_counter import FlopCounterMode

from overpaint_worker.engine.assemble import open_device, set_up_torch
from overpaint_worker.engine.families.sd import SdFamily
from overpaint_worker.engine.rows import BUCKETS
from overpaint_worker.registry import Registry

Pass = Callable[[], Any]


def one_pass(model: Any, rows: int, side: int) -> Pass:
    """A pass on random rows, at noise levels of their own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, *model.latent_shape(side, side), generator=generator).to(model.device)
    sigma = torch.linspace(0.1, 10, rows).to(model.device)
    text = {"text": model.condition("a red hat").tensors["text"].repeat(rows, 1, 1)}
    return lambda: model.denoise(x, sigma, text)


def unet_alone(model: Any, rows: int, side: int) -> Pass:
    """The UNet on random rows that lie there: nothing in it waits for the CPU, so it can be captured."""
    x = torch.randn(rows, *model.latent_shape(side, side)).to(model.device, model.dtype)
    times = torch.linspace(1, 999, rows).to(model.device, torch.int64)
    text = model.condition("a red hat").tensors["text"].repeat(rows, 1, 1).to(model.dtype)
    return lambda: model._unet(x, times, encoder_hidden_states=text, return_dict=False)  # noqa: SLF001


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Pass, device: torch.device, repeat: int) -> float:
    """The median over single calls, the first few not counted."""
    taken = []
    for _ in range(repeat + 3):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        taken.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(taken[3:]), 3)


def operations(call: Pass) -> float:
    """Floating-point operations of one pass."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def replayed(call: Pass, device: torch.device, repeat: int) -> float | None:
    """Milliseconds of the pass as a CUDA graph; None on a CPU."""
    if device.type != "cuda":
        return None
    for _ in range(3):
        call()
    wait(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay, device, repeat)


def measured(model: Any, wish: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of the table for each bucket."""
    device, found = model.device, []
    flops = operations(one_pass(model, 1, wish.side))
    for rows in BUCKETS:
        call = one_pass(model, rows, wish.side)
        ms = milliseconds(call, device, wish.repeat)
        found.append({
            "rows": rows, "ms": ms, "rows_per_s": round(1000 * rows / ms, 1),
            "tflops_per_s": round(flops * rows / ms / 1e9, 1),
            "replayed_ms": replayed(unet_alone(model, rows, wish.side), device, wish.repeat),
        })  # fmt: skip
        print(found[-1], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--side", type=int, default=512, help="pixels (512)")
    parser.add_argument("--repeat", type=int, default=15)
    wish = parser.parse_args()
    set_up_torch(wish.threads)
    device = open_device(wish.device)
    with registry_of(wish) as (registry, name), torch.inference_mode():
        model = SdFamily().load(Registry.load(registry).model(name), device)
        found = {
            "bench": "passes", "device": wish.device, "device_name": device_name(wish.device), "model": name,
            "side": wish.side, "dtype": str(model.dtype), "torch": torch.__version__,
            "passes": measured(model, wish),
        }  # fmt: skip
        model._unet.to(memory_format=torch.channels_last)  # noqa: SLF001 - to see what it would give
        found["channels_last"] = measured(model, wish)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
