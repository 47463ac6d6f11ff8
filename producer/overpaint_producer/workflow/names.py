"""From the names of files, which workflows have, to the names of registry entries, which jobs have."""

import re
from collections.abc import Mapping
from typing import Final

from overpaint_producer.workflow.graph import Node
from overpaint_shared.offers import Catalogue, Kind, ModelTraits
from overpaint_shared.spec.fields import is_name, nearest

SUFFIXES: Final = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")

_SAID: Final[dict[Kind, str]] = {
    "model": "model",
    "controlnet": "ControlNet",
    "lora": "LoRA",
    "vae": "VAE",
    "segmenter": "segmenter",
}


def parse_mapping(text: str) -> tuple[str, str]:
    """`file=name` of `--model-map`. Raises ValueError."""
    file, equals, name = text.rpartition("=")
    file, name = file.strip().replace("\\", "/"), name.strip()
    if not equals or not file or not is_name(name):
        raise ValueError(
            f"{text!r} maps nothing; write FILE=NAME, with a name of the registry (a-z 0-9 . _ -), "
            "as in v1-5-pruned.safetensors=sd15"
        )
    return file, name


def stem(file: str) -> str:
    """The file's own name: no folder, no ending."""
    base = file.rpartition("/")[2]
    for suffix in SUFFIXES:
        if base.lower().endswith(suffix):
            return base[: -len(suffix)]
    return base


def as_name(file: str) -> str:
    """The registry name most like the file's: `SD 1.5 (pruned).ckpt` is `sd-1.5-pruned`; may be empty."""
    text = re.sub(r"[^a-z0-9._]+", "-", stem(file).lower())
    return text.strip("-._")[:64].rstrip("-._")


def _folded(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


class Names:
    """Looks names up: first in what the user mapped, then among what the live workers have.

    Without workers to ask (`catalogue` None or empty) a name is made of the file's and a note says so, or,
    unless it `may_guess`, that is refused.
    """

    def __init__(
        self,
        catalogue: Catalogue | None = None,
        mapped: Mapping[str, str] | None = None,
        *,
        may_guess: bool = True,
    ) -> None:
        self._catalogue = catalogue if catalogue is not None and catalogue.offers else None
        self._mapped = dict(mapped or {})
        self._may_guess = may_guess

    def find(self, kind: Kind, file: str, node: Node, field: str) -> tuple[str, str | None]:
        """The registry's name for a file, and what people should know of how it was found.

        Raises `Refused` where no entry's name is the file's, or more than one is.
        """
        given = self._by_map(file)
        if given is not None:
            return given, None
        if self._catalogue is None:
            return self._made_up(kind, file, node, field)
        known = self._catalogue.names(kind)
        found = [name for name in known if _folded(name) == _folded(stem(file))]
        if len(found) != 1:
            node.refuse(
                field,
                f"is like the names of {len(found)} entries of the registry"
                if found
                else f"is not the name of a {_SAID[kind]} that the live workers have",
                given=f'"{file}"',
                allowed=_offer(found or known, file),
                suggestion=None if found else nearest(as_name(file), known),
            )
        return found[0], None

    def traits(self, kind: Kind, name: str) -> ModelTraits | None:
        """What the live workers tell of an entry; None if nobody was asked, or nobody has it."""
        found = self._catalogue.find(kind, name) if self._catalogue is not None else []
        return found[0][1] if found else None

    def _by_map(self, file: str) -> str | None:
        return next((self._mapped[key] for key in _keys(file) if key in self._mapped), None)

    def _made_up(self, kind: Kind, file: str, node: Node, field: str) -> tuple[str, str | None]:
        if not self._may_guess:
            node.refuse(
                field,
                "cannot be looked up: no worker is alive",
                given=f'"{file}"',
                allowed=f"a live worker, or {_offer([], file)}",
            )
        name = as_name(file)
        if not name:
            node.refuse(
                field,
                "holds nothing to make a name of the registry from",
                given=f'"{file}"',
                allowed=_offer([], file),
            )
        return name, (
            f"{node.said}.{field}: no worker was asked, so the {_SAID[kind]} is called {name!r} after the "
            f"file {file!r}; --model-map {_quoted(file)}=NAME says another name"
        )


def _keys(file: str) -> tuple[str, str, str]:
    """How `--model-map` may name a file: as the workflow does, without its folder, without its ending."""
    return file, file.rpartition("/")[2], stem(file)


def _offer(names: list[str], file: str) -> str:
    listed = ", ".join(names[:20])
    return (f"{listed}; or " if listed else "") + f"--model-map {_quoted(file)}=NAME"


def _quoted(file: str) -> str:
    return f"'{file}'" if re.search(r"[^\w./@%+-]", file) else file
