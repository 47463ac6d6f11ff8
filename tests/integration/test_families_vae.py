"""The VAE in units of work: the same bits as the whole network, and tiles that leave no seams."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from overpaint_shared.errors import PrecisionError
from overpaint_worker.engine.families import Work, finish
from overpaint_worker.engine.families.vae import Tiling, Vae, spans

CPU = torch.device("cpu")
SMALL = Tiling(above=64 * 64, tile=64, overlap=32)


@pytest.fixture
def network(tiny_registry: Path) -> AutoencoderKL:
    folder = tiny_registry.parent / "weights/diffusers/sd15/vae"
    return AutoencoderKL.from_pretrained(str(folder)).eval().requires_grad_(False)


@pytest.fixture
def px() -> Tensor:
    noise = torch.rand(1, 3, 12, 15, generator=torch.Generator().manual_seed(4))
    return functional.interpolate(noise, size=(96, 120), mode="bilinear")


def units(work: Work[Tensor]) -> int:
    """How often the work lets others in, plus one."""
    return len(list(work)) + 1


def test_the_units_of_an_encode_are_the_networks_own_posterior_mean(
    network: AutoencoderKL, px: Tensor
) -> None:
    expected = network.encode(px * 2 - 1).latent_dist.mode() * network.config.scaling_factor

    assert torch.equal(finish(Vae(network, CPU).encode(px)), expected)


def test_the_units_of_a_decode_are_the_networks_own_picture(network: AutoencoderKL, px: Tensor) -> None:
    latent = torch.randn(1, 4, 12, 15, generator=torch.Generator().manual_seed(4))
    expected = ((network.decode(latent / network.config.scaling_factor).sample + 1) / 2).clamp(0, 1)

    found = finish(Vae(network, CPU).decode(latent))

    assert torch.equal(found, expected)
    assert float(found.min()) == 0.0 or float(found.max()) == 1.0, "the clamp has nothing to do here"


def test_a_decode_lets_others_in_between_layers(network: AutoencoderKL, px: Tensor) -> None:
    vae = Vae(network, CPU)

    assert units(vae.decode(torch.zeros(1, 4, 8, 8))) == 1 + 1 + 4 * 3 + 3 + 1
    assert units(vae.encode(px)) == 1 + 4 * 2 + 3 + 1 + 1


@pytest.mark.parametrize("size", [(60, 64), (64, 63)])
def test_sides_that_are_no_multiples_of_8_are_refused(network: AutoencoderKL, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        next(Vae(network, CPU).encode(torch.zeros(1, 3, *size)))


# --- tiles


@given(length=st.integers(1, 700), tile=st.integers(2, 130), data=st.data())
@settings(deadline=None)
def test_tiles_cover_a_side_and_share_what_they_must(length: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))

    found = spans(length, tile, overlap)

    covered = {cell for span in found for cell in range(span.start, span.start + span.length)}
    assert covered == set(range(length))
    for left, right in pairwise(found):
        shared = left.start + left.length - right.start
        assert shared >= overlap
        assert shared == left.fade_out == right.fade_in
    for span in found:
        assert bool((span.window(3) > 0).all())
        assert len(span.window(3)) == span.length * 3


def test_tiles_follow_the_size_rule() -> None:
    rule = Tiling()

    assert not rule.applies(1536, 1536)
    assert rule.applies(1536, 1544)
    assert not rule.applies(1024, 2048)


def test_tiling_a_pointwise_network_changes_nothing(
    network: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What only looks at its own place cannot tell tiles: any seam would be the blending's fault."""
    vae = Vae(network, CPU, SMALL)
    grow: Callable[[Tensor], Tensor] = lambda x: functional.interpolate(x[:, :3], scale_factor=8) * 3  # noqa: E731
    monkeypatch.setattr(vae, "_decoder", lambda: [grow, torch.tanh])
    latent = torch.randn(1, 4, 19, 33, generator=torch.Generator().manual_seed(4))
    expected = ((torch.tanh(grow(latent / 0.18215)) + 1) / 2).clamp(0, 1)

    work = vae.decode(latent)

    torch.testing.assert_close(finish(work), expected, rtol=0, atol=1e-6)
    assert units(vae.decode(latent)) == 2 * len(spans(19, 8, 4)) * len(spans(33, 8, 4))


def test_tiling_an_encode_keeps_every_cell_in_its_place(
    network: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = Vae(network, CPU, SMALL)
    shrink: Callable[[Tensor], Tensor] = lambda x: functional.avg_pool2d(x, 8).repeat(1, 3, 1, 1)  # noqa: E731
    monkeypatch.setattr(vae, "_encoder", lambda: [shrink])
    px = torch.rand(1, 3, 152, 264, generator=torch.Generator().manual_seed(4))

    found = finish(vae.encode(px))

    torch.testing.assert_close(found, shrink(px * 2 - 1)[:, :4] * 0.18215, rtol=0, atol=1e-6)


def test_a_tiled_picture_is_near_the_whole_one(network: AutoencoderKL, px: Tensor) -> None:
    whole, tiled = Vae(network, CPU), Vae(network, CPU, Tiling(above=64, tile=80, overlap=48))
    latent = finish(whole.encode(px))

    difference = finish(tiled.decode(latent)) - finish(whole.decode(latent))

    assert 0 < float(difference.square().mean().sqrt()) < 0.1


# --- half precision


def test_half_precision_that_overflows_goes_on_in_float32(network: AutoencoderKL, px: Tensor) -> None:
    network.decoder.conv_in.weight.mul_(1e5)
    network.half()
    whole = AutoencoderKL.from_config(network.config).eval().requires_grad_(False)
    whole.load_state_dict(network.state_dict())
    latent = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    assert not bool(torch.isfinite(network.decode((latent / 0.18215).half()).sample).all())

    vae = Vae(network, CPU)
    found = finish(vae.decode(latent))

    assert network.dtype is torch.float32
    assert torch.equal(found, finish(Vae(whole, CPU).decode(latent)))
    assert found.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_no_precision_holds_is_refused(network: AutoencoderKL, px: Tensor, dtype: torch.dtype) -> None:
    network.decoder.conv_out.bias.fill_(float("nan"))
    vae = Vae(network.to(dtype), CPU)
    latent = finish(vae.encode(px))
    computed = "float32" if dtype is torch.float16 else str(dtype).removeprefix("torch.")
    with pytest.raises(PrecisionError, match=f"computed in {computed}") as caught:
        finish(vae.decode(latent))
    assert caught.value.field == "vae"


def test_half_precision_that_holds_is_kept(network: AutoencoderKL, px: Tensor) -> None:
    exact = finish(Vae(network, CPU).encode(px))

    found = finish(Vae(network.half(), CPU).encode(px))

    assert network.dtype is torch.float16
    assert 0 < float((found - exact).abs().max()) < 0.05
