"""The pictures, masks and composites of ComfyUI workflows."""

from typing import Any

import pytest

from overpaint_producer.workflow import convert
from tests.unit.workflows import (
    SCALE,
    SIZES,
    Graph,
    changed,
    clipseg,
    composed,
    graph,
    grey,
    node,
    noise,
    problem,
    spec,
)

# ------------------------------------------------------------------------------------------- pictures, masks


def prepared(latent: Any = grey, mask: Any = None, **ops: Any) -> Graph:
    """A node 12 between Load Image and the encoder."""
    made: Graph = graph(latent(mask, ["12", 0])) if latent is grey else graph(**latent(mask, ["12", 0]))
    return made | {"12": ops.pop("op"), **{name.removeprefix("n"): value for name, value in ops.items()}}


DOUBLE = node("ImageScaleBy", image=["10", 0], upscale_method="lanczos", scale_by=2.0)
CROP = node("ImageCrop", image=["10", 0], x=8, y=16, width=256, height=256)
PAD = node("ImagePadForOutpaint", image=["10", 0], left=0, top=0, right=128, bottom=0, feathering=40)


@pytest.mark.parametrize(
    ("op", "told"),
    [
        (SCALE, {"op": "scale", "width": 768, "height": 0, "filter": "bicubic", "crop": "disabled"}),
        (DOUBLE, {"op": "scale_by", "factor": 2.0, "filter": "lanczos"}),
        (CROP, {"op": "crop", "x": 8, "y": 16, "width": 256, "height": 256}),
    ],
    ids=["scale", "scale by", "crop"],
)
def test_changes_before_encoding_are_prepared_and_after_decoding_finished(op: Any, told: Any) -> None:
    before = changed(graph(n12=op), "5", pixels=["12", 0])
    assert spec(before)["prepare"] == [told]
    after = changed(graph(n12=op), "12", image=["8", 0])
    assert spec(changed(after, "9", images=["12", 0]))["finish"] == [told]


def test_padding_gives_the_picture_and_the_mask() -> None:
    job = spec(prepared(grey, ["12", 1], op=PAD))
    assert job["prepare"] == [{"op": "pad", "left": 0, "top": 0, "right": 128, "bottom": 0, "feathering": 40}]
    assert job["mask"] == {"from": "pad"}


def test_the_mask_of_one_of_two_pads_is_refused() -> None:
    made = prepared(grey, ["12", 1], op=changed({"12": PAD}, "12", image=["13", 0])["12"], n13=PAD)
    assert problem(made).path == "node 5 (VAEEncodeForInpaint).mask"


def test_the_mask_of_a_pad_goes_with_its_picture_only() -> None:
    later = node("ImageScaleBy", image=["13", 0], upscale_method="lanczos", scale_by=2.0)
    made = prepared(grey, ["13", 1], op=later, n13=PAD)
    assert spec(made)["mask"] == {"from": "pad"}
    assert "prepare" in problem(changed(made, "12", scale_by=1.5) | noise_over(made, ["13", 1])).message
    assert "not the one repainted" in problem(prepared(grey, ["13", 1], op=DOUBLE, n13=PAD)).message


def noise_over(made: Graph, mask: list[Any]) -> Graph:
    """Set Latent Noise Mask instead of node 5, on the picture of node 12."""
    return {name.removeprefix("n"): value for name, value in noise(mask, ["12", 0]).items()}


def test_a_rendered_picture_is_not_padded() -> None:
    made = changed(graph(n12=changed({"12": PAD}, "12", image=["8", 0])["12"]), "9", images=["12", 0])
    assert problem(made).path == "node 12 (ImagePadForOutpaint).image"


def test_mask_nodes_become_operations_in_order_and_inverting_twice_is_nothing() -> None:
    made = graph(
        grey(["15", 0]),
        n11=node("GrowMask", mask=["10", 1], expand=-4, tapered_corners=False),
        n12=node("FeatherMask", mask=["11", 0], left=1, top=2, right=3, bottom=4),
        n13=node("InvertMask", mask=["12", 0]),
        n14=node("InvertMask", mask=["13", 0]),
        n15=node("InvertMask", mask=["14", 0]),
    )
    assert spec(made)["mask"]["ops"] == [
        {"op": "grow", "by": -4, "tapered": False},
        {"op": "feather_borders", "left": 1, "top": 2, "right": 3, "bottom": 4},
        {"op": "invert"},
    ]
    assert "ops" not in spec(changed(made, "5", mask=["16", 0]) | {
        "16": node("InvertMask", mask=["17", 0]), "17": node("InvertMask", mask=["10", 1]),
    })["mask"]  # fmt: skip


def test_one_plain_scaling_carries_a_mask_that_is_stretched_and_only_inverted() -> None:
    assert spec(prepared(grey, ["10", 1], op=DOUBLE))["mask"] == {"from": "alpha"}
    inverted = prepared(grey, ["13", 0], op=DOUBLE, n13=node("InvertMask", mask=["10", 1]))
    assert spec(inverted)["mask"]["ops"] == [{"op": "invert"}]


@pytest.mark.parametrize(
    "made",
    [
        prepared(noise, ["10", 1], op=DOUBLE),
        prepared(grey, ["10", 1], op=CROP),
        prepared(grey, ["10", 1], op=changed({"1": SCALE}, "1", crop="center")["1"]),
        prepared(grey, ["10", 1], op=PAD),
        prepared(
            grey, ["13", 0], op=DOUBLE, n13=node("GrowMask", mask=["10", 1], expand=4, tapered_corners=True)
        ),
        prepared(grey, ["10", 1], op=changed({"1": DOUBLE}, "1", image=["13", 0])["1"], n13=SCALE),
    ],
    ids=["noise mask", "crop", "centre crop", "pad", "grown", "scaled twice"],
)
def test_a_mask_that_a_job_would_carry_elsewhere_is_refused(made: Graph) -> None:
    found = problem(made)
    assert found.path.endswith(".mask")
    assert "prepare" in found.message


def test_a_mask_of_the_prepared_size_is_taken_there_with_all_operations() -> None:
    made = prepared(
        noise,
        ["14", 0],
        op=DOUBLE,
        n13=node("LoadImageMask", image="large.png", channel="red"),
        n14=node("GrowMask", mask=["13", 0], expand=4, tapered_corners=True),
    )
    (job,) = convert(made, size_of=SIZES.get).jobs
    assert (job.spec["mask"]["at"], [note for note in job.notes if "sizes" in note]) == ("canvas", [])


def test_a_mask_of_neither_size_is_refused_and_of_an_unknown_one_noted() -> None:
    made = prepared(grey, ["13", 0], op=DOUBLE, n13=node("LoadImageMask", image="odd.png", channel="red"))
    assert "500 x 512" in problem(made).message
    assert "500 x 512" in problem(changed(graph(grey(["13", 0])) | {"13": made["13"]}, "5")).message
    (job,) = convert(made).jobs
    assert (job.spec["mask"]["at"], any("sizes are not known" in note for note in job.notes)) == (
        "canvas",
        True,
    )


def test_clipseg_is_a_mask_found_in_the_canvas() -> None:
    job = spec(prepared(noise, ["13", 0], op=DOUBLE, n13=clipseg(["12", 0], blur=3.5)))
    assert job["mask"] == {
        "from": "clipseg",
        "text": "the hat",
        "threshold": 0.4,
        "dilation_factor": 4,
        "blur": 3.5,
        "segmenter": "clipseg",
    }
    assert problem(prepared(grey, ["13", 0], op=DOUBLE, n13=clipseg(["10", 0]))).path.endswith(".mask")


def test_load_image_names_only_files_of_the_input_folder() -> None:
    assert spec(changed(graph(), "10", image="clipspace/a 1.png [input]"))["source"] == {
        "image": "clipspace/a 1.png"
    }
    assert problem(changed(graph(), "10", image="a.png [temp]")).path == "node 10 (LoadImage).image"


# ------------------------------------------------------------------------------------------- composite


@pytest.mark.parametrize(
    "made", [graph(), graph(grey()), graph(**noise())], ids=["img2img", "grey", "noise mask"]
)
def test_a_composite_by_the_methods_mask_puts_the_original_back(made: Graph) -> None:
    job = spec(composed(made))
    assert (job["composite"], job["compat"], job["mask"]) == (True, "comfyui", {"from": "alpha"})
    flipped = composed(made, destination=["8", 0], source=["10", 0], mask=["31", 0])
    assert spec(flipped | {"31": node("InvertMask", mask=["10", 1])}) == job


@pytest.mark.parametrize(
    ("made", "path"),
    [
        (composed(graph(grey()), x=8), ".x"),
        (composed(graph(grey()), mask=["31", 0]) | {"31": node("InvertMask", mask=["10", 1])}, ".mask"),
        (composed(graph(grey()), destination=["31", 0]) | {"31": node("LoadImage", image="b.png")}, ")"),
        (
            composed(graph(grey()), source=["31", 0])
            | {"31": changed({"1": DOUBLE}, "1", image=["8", 0])["1"]},
            ")",
        ),
        (composed(graph(grey()), source=["10", 0]), ")"),
        (composed(changed(graph(grey()), "10", image="odd.png")), ")"),
    ],
    ids=["elsewhere", "other mask", "other picture", "scaled", "nothing rendered", "no multiple of 8"],
)
def test_any_other_composite_is_refused(made: Graph, path: str) -> None:
    assert problem(made).path == f"node 30 (ImageCompositeMasked){path}".replace("))", ")")


def test_a_composite_without_a_mask_is_left_out_with_a_note() -> None:
    (job,) = convert(composed(graph(grey()), mask=None), size_of=SIZES.get).jobs
    assert (job.spec["composite"], any("left out" in note for note in job.notes)) == (False, True)
