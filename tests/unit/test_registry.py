from pathlib import Path

import pytest

from overpaint_shared.errors import EXIT_USAGE, OverpaintError, UnsupportedError
from overpaint_worker.registry import Registry, RegistryError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def registry(folder: Path, text: str) -> Registry:
    path = folder / "models.toml"
    path.write_text(text)
    return Registry.load(path)


def problems(folder: Path, text: str) -> dict[str, str]:
    """Each fault's words, by where it stands."""
    with pytest.raises(RegistryError) as caught:
        registry(folder, text)
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_every_kind_of_entry_is_read(tmp_path: Path) -> None:
    found = registry(
        tmp_path,
        """
        [models.sd15]
        family = "sd"
        path = "/models/sd15"
        prediction = "v"
        dtype = "float16"
        text_encoder_dtype = "float16"
        config = "sd15"
        defaults = { steps = 12, cfg = 7, sampler = "dpmpp_2m", scheduler = "karras", size = 768 }
        [controlnets.inpaint]
        path = "/models/control"
        [loras.ink]
        path = "/models/ink.safetensors"
        [segmenters.clipseg]
        path = "/models/clipseg"
        [vaes.soft]
        path = "/models/vae"
        """,
    )

    assert [(entry.table, entry.name) for entry in found.entries()] == [
        ("models", "sd15"),
        ("controlnets", "inpaint"),
        ("vaes", "soft"),
        ("loras", "ink"),
        ("segmenters", "clipseg"),
    ]
    model = found.model("sd15")
    assert (model.prediction, model.dtype, model.text_encoder_dtype) == ("v", "float16", "float16")
    assert (model.defaults.steps, model.defaults.cfg, model.defaults.size) == (12, 7.0, 768)
    assert found.controlnet("inpaint").local_path == Path("/models/control")


def test_what_is_left_out_has_the_documented_default(tmp_path: Path) -> None:
    model = registry(tmp_path, '[models.a]\nfamily = "sd"\npath = "a"').model("a")

    assert (model.prediction, model.config, model.sha256, model.revision) == (None, None, None, None)
    assert (model.dtype, model.text_encoder_dtype) == ("auto", "auto")
    assert model.defaults.sampler == "euler"


def test_a_relative_path_starts_at_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "farm").mkdir()
    (tmp_path / "farm" / "models.toml").write_text('[models.a]\nfamily = "sd"\npath = "./weights/a"')
    monkeypatch.chdir(tmp_path)

    found = Registry.load(Path("farm/models.toml"))

    assert found.model("a").local_path == tmp_path / "farm" / "weights" / "a"


def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path) -> None:
    found = problems(tmp_path, '[models.a]\nfamily = "sd"\npath = "a"\npredicton = "v"\n')

    assert "prediction" in found["models.a.predicton"]
    assert "Did you mean" in found["models.a.predicton"]


def test_a_key_of_any_length_is_told_in_few_words(tmp_path: Path) -> None:
    for text in (f"[models.a.{'x' * 300_000}]", f"[{'x' * 300_000}.a]", f"[models.{'x' * 300_000}]"):
        assert max(map(len, problems(tmp_path, text).values())) < 1000


def test_an_unknown_table_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "Did you mean models?" in problems(tmp_path, '[model.a]\npath = "a"')["model"]


@pytest.mark.parametrize("key", ["name", "base"])
def test_what_the_registry_itself_fills_in_cannot_be_written(tmp_path: Path, key: str) -> None:
    found = problems(tmp_path, f'[models.a]\nfamily = "sd"\npath = "a"\n{key} = "b"')

    assert f"models.a.{key}" in found


@pytest.mark.parametrize("name", ["SD15", "-a", "a/b", "a" * 65, "", "ü"])
def test_a_name_that_no_job_could_write_is_refused(tmp_path: Path, name: str) -> None:
    assert f"models.{name}" in problems(tmp_path, f'[models."{name}"]\nfamily = "sd"\npath = "a"')


def test_every_fault_is_told_at_once_and_where(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        """
        [models.a]
        family = "sdd"
        path = 1
        sha256 = "ABC"
        dtype = "half"
        defaults = { steps = "4", sampler = "eulr", stps = 1 }
        [models.b]
        family = "sd"
        [loras]
        ink = "ink.safetensors"
        """,
    )

    assert set(found) == {
        "models.a.family",
        "models.a.path",
        "models.a.sha256",
        "models.a.dtype",
        "models.a.defaults.steps",
        "models.a.defaults.sampler",
        "models.a.defaults.stps",
        "models.b.path",
        "loras.ink",
    }
    assert "Did you mean euler?" in found["models.a.defaults.sampler"]
    assert "64 lower-case hexadecimal digits" in found["models.a.sha256"]


def test_a_hub_id_without_a_revision_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, '[models.a]\nfamily = "sd"\npath = "owner/name"')

    assert "revision" in found["models.a.path"]


@pytest.mark.parametrize("revision", ["main", "v1.0", REVISION[:7], REVISION.upper()])
def test_a_revision_that_pins_nothing_is_refused(tmp_path: Path, revision: str) -> None:
    found = problems(tmp_path, f'[models.a]\nfamily = "sd"\npath = "owner/name"\nrevision = "{revision}"')

    assert "models.a.revision" in found


def test_a_revision_of_a_path_is_refused(tmp_path: Path) -> None:
    found = problems(tmp_path, f'[models.a]\nfamily = "sd"\npath = "/models/a"\nrevision = "{REVISION}"')

    assert "models.a.path" in found


def test_a_folder_of_two_names_needs_no_revision(tmp_path: Path) -> None:
    (tmp_path / "weights" / "a").mkdir(parents=True)

    assert registry(tmp_path, '[models.a]\nfamily = "sd"\npath = "weights/a"').model("a")


def test_a_missing_registry_names_the_option(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="--registry") as caught:
        Registry.load(tmp_path / "none.toml")

    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    "text", [b"[models.a\n", b"\xff\xfe", b"a = nan\na = 1"], ids=["cut", "binary", "twice"]
)
def test_what_is_no_toml_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "models.toml"
    path.write_bytes(text)

    with pytest.raises(RegistryError, match="no TOML"):
        Registry.load(path)


def test_an_unknown_model_is_unsupported_with_the_nearest_name(tmp_path: Path) -> None:
    found = registry(tmp_path, '[models.sd15]\nfamily = "sd"\npath = "a"')

    with pytest.raises(UnsupportedError, match="sd15") as caught:
        found.model("sd51")

    assert caught.value.field == "model"


def test_an_unknown_model_that_is_like_none_is_told_with_the_first_that_there_are(tmp_path: Path) -> None:
    found = registry(tmp_path, "".join(f'[models.m{i}]\nfamily = "sd"\npath = "a"\n' for i in range(9)))
    with pytest.raises(UnsupportedError) as caught:
        found.model("quite-another")
    assert (
        caught.value.fix == "use m0, m1, m2, m3, m4, m5, m6, m7, ..., or add it to the worker's models.toml"
    )


def test_an_error_keeps_its_faults_across_processes(tmp_path: Path) -> None:
    with pytest.raises(RegistryError) as caught:
        registry(tmp_path, "[model.a]")

    again = OverpaintError.from_json(caught.value.to_json())

    assert isinstance(again, RegistryError)
    assert str(again) == str(caught.value)
