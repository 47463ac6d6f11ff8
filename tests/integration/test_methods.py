"""The repaint methods and ControlNets in company, and what a ControlNet is shown and when."""

import io
import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

from overpaint_shared.errors import ModelLoadError
from overpaint_worker.engine.controls import Control, residuals
from overpaint_worker.engine.families import Residuals
from overpaint_worker.engine.families.controlnet import ControlNet
from overpaint_worker.engine.rows import Row, RowBuffers
from tests.extra_weights import build
from tests.rendering import DEVICE, INPUTS, house, img2img, pixels, render, request

MASKED = {"mask": {"from": "image", "image": "mask64.png"}}
SOFT = {"mask": {**MASKED["mask"], "ops": [{"op": "blur", "radius": 6}]}}
CONTROLS = [
    {"controlnet": "tiny", "image": "img64.png", "strength": 0.7, "end": 0.8},
    {"controlnet": "other", "image": "mask64.png", "strength": 0.4},
]


def repaint(kind, seed, mask=SOFT, controls=(), **settings):
    """A job that repaints with a method."""
    spec = {**img2img(seed=seed, steps=4 + seed % 3, denoise=1.0 if settings else 0.8), **mask}
    return {**spec, "method": {"kind": kind, **settings}, "controls": list(controls)}


JOBS = {
    "img2img": repaint("img2img", 1),
    "vae_encode_inpaint": repaint("vae_encode_inpaint", 2, grow_mask_by=6),
    "latent_noise_mask": repaint("latent_noise_mask", 3),
    "controlnet_inpaint": repaint("controlnet_inpaint", 4, controlnet="tiny", strength=0.8, end=0.6),
    "over_latent": repaint("controlnet_inpaint", 5, controlnet="other", latent="latent_noise_mask"),
    "controls": repaint("latent_noise_mask", 6, controls=CONTROLS),
    "differential": {
        **repaint("latent_noise_mask", 7), "sampling": {**img2img(seed=7)["sampling"], "differential": True},
    },
    "inpaint_model": repaint("inpaint_model", 8),
}  # fmt: skip
CASES = [
    (model, name)
    for model in ("tiny", "inpaint")
    for name in JOBS
    if (model, name) != ("tiny", "inpaint_model")
]


@pytest.fixture(scope="module")
def registry(tiny_registry, tmp_path_factory):
    return build(tiny_registry, tmp_path_factory.mktemp("methods"))


def of(model, name):
    return request(f"{model}-{name}", {**JOBS[name], "model": model})


@pytest.fixture(scope="module")
def together(registry):
    return render(registry, [of(*case) for case in CASES])


@pytest.fixture(scope="module")
def alone(registry):
    return {f"{m}-{n}": render(registry, [of(m, n)])[f"{m}-{n}"] for m, n in CASES}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_job_among_jobs_of_all_methods_paints_what_it_paints_alone(case, alone, together):
    name = "-".join(case)
    for run in (alone, together):
        assert hasattr(run[name], "files"), run[name]
    off = np.abs(pixels(alone[name].files["image.png"]) - pixels(together[name].files["image.png"]))
    assert off.max() <= 1


def test_the_jobs_did_share_passes_and_paint_different_pictures(together):
    for model in ("tiny", "inpaint"):
        of_model = {name: done for name, done in together.items() if name.startswith(f"{model}-")}
        companies = [
            json.loads(d.files["receipt.json"])["evaluations"]["by_company"] for d in of_model.values()
        ]
        assert all(max(map(int, company)) == len(of_model) for company in companies)
        pictures = [pixels(done.files["image.png"]) for done in of_model.values()]
        assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_a_deterministic_job_has_its_bits_next_to_one_with_controlnets(registry):
    def job(name, **more):
        return request(name, {**img2img(deterministic=True), **more})

    for more in ({}, {"controls": CONTROLS}):
        by_itself = render(registry, [job("a", **more)])["a"]
        other = job("b", controls=[CONTROLS[1]])
        for order in ([job("a", **more), other], [other, job("a", **more)]):
            done = render(registry, order)["a"]
            assert np.array_equal(pixels(done.files["image.png"]), pixels(by_itself.files["image.png"]))


# ------------------------------------------------------------------------------------------ residuals


def some_rows(model, nets, controls):
    """Rows of one pass, and their buffers; `controls[i]` are the nets and strengths of row i."""
    generator = torch.Generator().manual_seed(1)
    text = model.condition("a house")
    hint = torch.rand(1, 3, 64, 64, generator=generator).to(DEVICE)
    rows = [
        Row(
            torch.randn(1, 4, 8, 8, generator=generator).to(DEVICE), torch.tensor(2.0 + i), text,
            controls=tuple(Control(nets[n], hint + n, strength, 1e9, 0.0) for n, strength in row),
        )
        for i, row in enumerate(controls)
    ]  # fmt: skip
    inputs = RowBuffers(rows[0], 4, 77)
    inputs.fill(rows)
    return rows, inputs


@pytest.fixture
def nets(registry):
    return [house(registry).models.controlnet(name) for name in ("tiny", "other")]


def test_controls_are_summed_by_strength_and_a_row_without_gets_zeros(registry, nets):
    model = house(registry).models.get("tiny")
    with torch.inference_mode():
        rows, inputs = some_rows(model, nets, [[(0, 0.5), (1, 2.0)], [], [(1, 1.0)]])
        found = residuals(model, rows, inputs, [1, 2, 4])
        for i, row in enumerate(rows):
            expected = [torch.zeros_like(t[:1]) for t in (*found.down, found.mid)]
            for control in row.controls:
                own = model.control(
                    control.net, row.x, row.sigma[None], row.conditioning.tensors, control.hint
                )
                expected = [
                    e + t * control.strength for e, t in zip(expected, (*own.down, own.mid), strict=True)
                ]
            for got, wanted in zip((*found.down, found.mid), expected, strict=True):
                assert float((got[i : i + 1] - wanted).abs().max()) < 1e-4
        assert all(not t[1].any() and not t[3].any() for t in (*found.down, found.mid))
        assert float(found.mid[0].abs().max()) > 0.1


def test_zero_residuals_change_no_bit(registry, nets):
    model = house(registry).models.get("tiny")
    with torch.inference_mode():
        rows, inputs = some_rows(model, nets, [[], [(0, 1.0)], []])
        with_net = model.denoise(
            inputs.x, inputs.sigma, inputs.conditioning, residuals(model, rows, inputs, [1, 2, 4])
        )
        without = model.denoise(inputs.x, inputs.sigma, inputs.conditioning)
    assert torch.equal(with_net[0], without[0])
    assert torch.equal(with_net[2], without[2])
    assert not torch.equal(with_net[1], without[1])


def test_a_pass_without_an_acting_controlnet_runs_none(registry, nets):
    model = house(registry).models.get("tiny")
    rows, inputs = some_rows(model, nets, [[], []])
    assert residuals(model, rows, inputs, [1, 2, 4]) is None


def test_more_rows_than_a_pass_may_hold_are_taken_in_parts(registry, nets):
    model = house(registry).models.get("tiny")
    sizes = []

    def counted(self, seen, *rest):
        sizes.append(len(seen))
        return original(self, seen, *rest)

    original = ControlNet.residuals
    with torch.inference_mode(), patch.object(ControlNet, "residuals", counted):
        rows, inputs = some_rows(model, nets, [[(0, 1.0), (0, 0.5)], [(0, 1.0)], [(1, 1.0)]])
        residuals(model, rows, inputs, [1, 2])
    assert sizes == [2, 1, 1]


# --------------------------------------------------------------------------------- what a net is shown


@pytest.fixture
def shown(monkeypatch):
    """The hints and timesteps of every run of a ControlNet."""
    seen, original = [], ControlNet.residuals

    def spy(self, x, timestep, conditioning, hints):
        seen.append((timestep.tolist(), hints.to("cpu", copy=True)))
        return original(self, x, timestep, conditioning, hints)

    monkeypatch.setattr(ControlNet, "residuals", spy)
    return seen


def test_a_net_acts_in_its_share_of_the_full_schedule_whatever_part_of_it_runs(registry, shown):
    control = {"controlnet": "tiny", "image": "img64.png", "start": 0.5, "end": 0.8}
    render(registry, [request("j", {**img2img(steps=10, denoise=0.7), "controls": [control]})])
    steps = [t for timesteps, _ in shown for t in set(timesteps)]
    # of the levels 999 * (1 - 0.5) down to 999 * (1 - 0.8), not of the part from 0.7 on
    assert steps == sorted(steps, reverse=True)
    assert max(steps) <= 499
    assert min(steps) >= 200
    assert len(steps) == 4


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"end": 0.0}])
def test_a_net_that_never_acts_is_never_run_and_changes_nothing(registry, shown, changes):
    control = {"controlnet": "tiny", "image": "img64.png", **changes}
    jobs = [request("with", {**img2img(), "controls": [control]}), request("without", img2img())]
    done = {job.job: render(registry, [job])[job.job] for job in jobs}
    assert shown == []
    assert np.array_equal(*(pixels(end.files["image.png"]) for end in done.values()))


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def test_the_inpainting_net_sees_minus_one_where_the_mask_is_above_one_half(registry, shown):
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 8:40], mask[40:48, :] = 255, 127
    spec = repaint("controlnet_inpaint", 1, MASKED, controlnet="tiny")
    source = (INPUTS / "img64.png").read_bytes()
    render(registry, [request("j", spec, {"img64.png": source, "mask64.png": png(mask)})])
    _, hints = shown[0]
    expected = torch.from_numpy(pixels(source)[..., :3].copy()).float() / 255
    expected[8:40, 8:40] = -1
    assert torch.equal(hints[0], expected.permute(2, 0, 1))
    assert torch.equal(hints[0], hints[1])  # the positive and the negative row see the same


def test_a_hint_of_another_size_is_cut_and_scaled_to_the_canvas_and_the_receipt_says_so(registry, shown):
    hint = np.zeros((32, 48, 3), np.uint8)
    hint[:, 8:40] = np.arange(32, dtype=np.uint8)[None, :, None] * 4
    control = {"controlnet": "tiny", "image": "h.png"}
    spec = {**img2img(), "controls": [control]}
    inputs = {"img64.png": (INPUTS / "img64.png").read_bytes(), "h.png": png(hint)}
    done = render(registry, [request("j", spec, inputs)])["j"]
    expected = hint[:, 8:40].repeat(2, 0).repeat(2, 1)
    assert np.array_equal(shown[0][1][0].permute(1, 2, 0).numpy() * 255, expected)
    receipt = json.loads(done.files["receipt.json"])
    assert "controls[0].image was scaled from 48 x 32 to the canvas, 64 x 64" in receipt["notes"]
    (weights,) = receipt["weights"]
    assert (weights["field"], weights["kind"], weights["name"]) == (
        "controls[0].controlnet",
        "controlnet",
        "tiny",
    )
    assert len(weights["sha256"]) == 64


# ------------------------------------------------------------------------------------------- entries


def test_a_single_file_and_a_folder_are_the_same_net(registry, nets):
    models = house(registry).models
    model, single = models.get("tiny"), models.controlnet("single")
    with torch.inference_mode():
        rows, inputs = some_rows(model, [nets[0]], [[(0, 1.0)], [(0, 0.3)]])
        _, others = some_rows(model, [single], [[(0, 1.0)], [(0, 0.3)]])
        hints = torch.cat([row.controls[0].hint for row in rows])
        one, two = (
            model.control(
                net, inputs.x[:2], inputs.sigma[:2], {n: t[:2] for n, t in inputs.conditioning.items()}, hints
            )
            for net in (nets[0], single)
        )
    assert torch.equal(inputs.x[:2], others.x[:2])
    assert all(torch.equal(a, b) for a, b in zip((*one.down, one.mid), (*two.down, two.mid), strict=True))


def test_a_shuffle_nets_residuals_are_their_means(registry, nets):
    model = house(registry).models.get("tiny")
    pooled = ControlNet("p", nets[0]._net, pooled=True)
    with torch.inference_mode():
        rows, inputs = some_rows(model, nets, [[(0, 1.0)]])
        arguments = (
            inputs.x[:1],
            inputs.sigma[:1],
            {n: t[:1] for n, t in inputs.conditioning.items()},
            rows[0].controls[0].hint,
        )
        plain, mean = (model.control(net, *arguments) for net in (nets[0], pooled))
    assert isinstance(mean, Residuals)
    for a, b in zip((*plain.down, plain.mid), (*mean.down, mean.mid), strict=True):
        assert torch.allclose(b, a.mean((2, 3), keepdim=True).expand_as(a))


def test_traits_of_controlnets_are_read_from_their_headers(registry):
    traits = {t.name: t for t in house(registry).models.catalogue() if t.kind == "controlnet"}
    assert {name: t.context_width for name, t in traits.items()} == {
        "tiny": 32,
        "single": 32,
        "other": 32,
        "wide": 48,
    }
    assert all(t.family == "sd" and len(t.sha256) == 64 for t in traits.values())


@pytest.mark.parametrize(
    ("spec", "field", "said"),
    [
        (repaint("inpaint_model", 1), "method.kind", "4 input channels"),
        (repaint("controlnet_inpaint", 1, controlnet="wide"), "method.controlnet", "text feature width 48"),
        ({**img2img(), "controls": [{"controlnet": "tinny", "image": "img64.png"}]}, "controls[0].controlnet",
         "no ControlNet 'tinny'"),
    ],
)  # fmt: skip
def test_a_job_whose_weights_do_not_go_together_is_refused_before_anything_is_loaded(
    registry, spec, field, said
):
    failed = render(registry, [request("j", spec)])["j"]
    assert failed.error["field"] == field
    assert said in failed.error["message"]


def test_what_is_no_controlnet_is_refused(registry, tmp_path):
    (tmp_path / "models.toml").write_text(f'[controlnets.it]\npath = "{registry.parent}/ink.safetensors"\n')
    with pytest.raises(ModelLoadError, match="it is no ControlNet"):
        house(tmp_path / "models.toml").models.controlnet("it")
