"""Which model it is, whatever its folder is called.

A cache is of one model's weights. Its name says little: folders are moved, copied and
named by other paths. What is compared are the config and samples of the weights.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from mlx_lm.utils import hf_repo_to_path

from ..regular import check_regular

#: Where a saved cache has its model's identity, among the file's metadata.
KEY = "mlx_turboquant_model"
#: Parts of a file of weights that are read, and their bytes: any layer has some.
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@functools.lru_cache(maxsize=16)
def identity_of(model: str, adapter: str | None = None) -> str | None:
    """A digest of a model; None if it is not on this machine.

    Args:
        model: A folder or a hub id.
        adapter: A folder of adapters that the model was loaded with.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        folders = [_folder(model), *([Path(adapter)] if adapter else [])]
        for folder in folders:
            for pattern in ("config.json", "adapter_config.json", "*.safetensors"):
                for file in sorted(folder.glob(pattern)):
                    _add(digest, file)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def metadata_of(model: str, adapter: str | None = None) -> dict[str, str]:
    """What a file says of its model: where it is, and its identity if that is known."""
    identity = identity_of(model, adapter)
    if model and Path(model).is_dir():
        model = str(Path(model).resolve())  # found from other folders, too
    return {"model": model, **({} if identity is None else {KEY: identity})}


def is_same(
    metadata: Mapping[str, str], model: str, adapter: str | None = None
) -> bool:
    """Whether a file is of this model; files that do not say are of any.

    Args:
        metadata: The file's, with the model's name and, if it is ours, its identity.
        model: The name of the model at hand.
        adapter: As for `identity_of`.
    """
    made_by, identity = metadata.get("model"), metadata.get(KEY)
    if identity is not None:
        here = identity_of(model, adapter)
        return made_by == model if here is None else identity == here
    if made_by is None or made_by == model:
        return True
    there = identity_of(made_by)
    return there is not None and there == identity_of(model)


def _folder(model: str) -> Path:
    """Where a model is; it is not downloaded."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(hf_repo_to_path(model))
        except Exception as error:  # whatever the hub's client makes of a name
            raise ValueError(f"{model!r} is not on this machine") from error
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model!r} has no config.json")
    return folder


def _add(digest: hashlib.blake2b, path: Path) -> None:
    check_regular(path)
    size = path.stat().st_size
    digest.update(f"{path.suffix} {size} ".encode())
    with path.open("rb") as file:
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        for place in range(0, size, step):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, size - _SAMPLE_BYTES))
        digest.update(file.read())
