"""`save_pretrained` of transformers, diffusers and others: the recipe beside what they write.

Their `from_pretrained` builds the original class, which lacks the rewritten layers. So a save gets
the recipe and all tensors besides, for `rewriter.from_pretrained` and `rewriter.load`, and is made
such that their own loader fails, and says what to call, in place of filling in random layers.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from rewriter.capture.hosted import original_class
from rewriter.errors import PATH, OptionError, StoreError, of_type
from rewriter.modules.paths import path_of
from rewriter.modules.tensors import is_sharded
from rewriter.store.reading import load
from rewriter.store.writing import save

__all__ = ["AROUND", "from_pretrained"]

_REFUSAL = (
    "none, as this model was rewritten: load it with rewriter.from_pretrained(its class, "
    "directory), or with rewriter.load(directory, the original model)"
)
_WEIGHTS = (".safetensors", ".bin")
_FIELD = "transformers_weights"
"""Where a config of transformers names its weights; one that is no such file is an error there."""


def from_pretrained(
    cls: type[nn.Module], directory: str | os.PathLike[str], **options: Any
) -> nn.Module:
    """A rewritten model of transformers or diffusers from what its `save_pretrained` wrote.

    Args:
        cls: the model's class, or one of transformers' auto classes.
        directory: what `save_pretrained` wrote.
        options: further ones of `rewriter.load`.

    Returns:
        The rewritten model, in eval mode.

    Raises:
        OptionError: `cls` is no class or `directory` no path, or the class does not say how it is
            built from a config.
        StoreError: as of `rewriter.load`.
    """
    call = "from_pretrained(cls, directory)"
    of_type(call, "cls", cls, type, "the model's class")
    of_type(call, "directory", directory, PATH, "what save_pretrained wrote to, a path")
    original: Any = original_class(cls)
    if not (path_of(directory, "directory") / "config.json").is_file():
        raise StoreError(f"{directory} has no config.json: it was not written by save_pretrained")
    if hasattr(original, "load_config"):
        model = original.from_config(original.load_config(directory))
    else:
        auto = getattr(sys.modules.get("transformers"), "AutoConfig", None)
        own = getattr(original, "config_class", None) or auto
        if own is None or not (hasattr(original, "from_config") or own is not auto):
            raise OptionError(
                f"{original.__name__} does not say how it is built from a config: build the "
                "original model, and pass it to rewriter.load(directory, model)"
            )
        config = own.from_pretrained(directory)
        if _FIELD in vars(config):
            vars(config).pop(_FIELD)  # or it would be in the way of the next save
        model = original(config) if own is not auto else original.from_config(config)
    return load(directory, model.eval(), **options)


def _around(method: Callable[..., Any]) -> Callable[..., Any]:
    """A library's `save_pretrained` such that what it writes can be loaded."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def saved(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__["_rewriter"]
        if state.saving:  # one method of the library calls another
            return method(self, *args, **kwargs)
        given = list(signature.bind(self, *args, **kwargs).arguments.values())
        path = path_of(given[1], "directory")
        if kwargs.get("push_to_hub"):
            raise StoreError(
                "push_to_hub would upload a rewritten model without its recipe: save it, and "
                "upload the directory (huggingface_hub.upload_folder)"
            )
        whole, main = kwargs.get("state_dict"), kwargs.get("is_main_process", True)
        whole = None if whole is None else dict(whole)  # transformers empties it
        before = _files(path)
        state.saving = True
        try:
            result = method(self, *args, **kwargs)
        finally:
            state.saving = False
        written = [f for f, look in _files(path).items() if before.get(f) != look]
        if not main:
            if whole is None and is_sharded(self):
                save(self, path)  # the first process writes what all gather
        elif any(map(_holds_model, written)):
            save(self, path, whole)
            _refuse_plain_loading(written)
        return result

    return saved


AROUND: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "save_pretrained": _around,
    "save": _around,
}
"""What of a class that has `save_pretrained` is wrapped where it is rewritten."""


def _files(path: pathlib.Path) -> dict[pathlib.Path, tuple[int, int]]:
    """Every file below a directory, with what tells that it was written again."""
    stats = {f: f.stat() for f in path.rglob("*") if f.is_file()}
    return {f: (s.st_mtime_ns, s.st_ino) for f, s in stats.items()}


def _holds_model(file: pathlib.Path) -> bool:
    """Whether a file holds a model's weights: those of adapters go on any model, rewritten or
    not."""
    return file.suffix in _WEIGHTS and not file.name.startswith("adapter_")


def _refuse_plain_loading(written: list[pathlib.Path]) -> None:
    configs = [f for f in written if f.name == "config.json"]
    for file in configs:
        config = json.loads(file.read_text(encoding="utf-8"))
        if "model_type" in config:  # of transformers, whose Trainer reads the weights again
            config[_FIELD] = _REFUSAL
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            continue
        for weights in written:  # all of them stand in the save beside them
            if weights.parent == file.parent and _holds_model(weights):
                weights.unlink(missing_ok=True)
                index = weights.parent / f"{weights.name}.index.json"
                index.unlink(missing_ok=True)
