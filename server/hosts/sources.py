"""What `serve` takes besides bundles: pretrained models, which are converted once and kept.

The conversion needs torch, so processes of their own do it: serving never loads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from concertina.bundle.manifest import MANIFEST, read_manifest, write_manifest
from concertina.codecs.tokenizer_file import TOKENIZER
from server.bundles.bundle import Bundle, load_bundle
from server.errors import BundleError

_GGUF: Final = ".gguf"
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_CACHE: Final = "CONCERTINA_CACHE"
_CONVERSION: Final = "1"  # counts up when the same source has to be converted again
_MADE_OF: Final = ".source"  # in a bundle that `prepared` made
_NEEDED: Final = ("torch", "safetensors", "gguf", "onnx", "onnxscript")
_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "README.md")

Say = Callable[[str], None]


class SourceError(Exception):
    """A model that cannot be served. The message says what to do."""


def is_pretrained(source: Path) -> bool:
    """Whether this is a Hugging Face folder, a GGUF file or a hub id, and not a bundle."""
    if source.is_dir():
        return (source / "config.json").is_file() and not (source / MANIFEST).exists()
    return source.is_file() or is_hub_id(source)


def is_hub_id(source: Path) -> bool:
    """Whether this may name a model of a hub: `owner/name`, where there is no folder `owner`."""
    return not source.exists() and bool(
        _HUB_ID.fullmatch(str(source)) and not source.parent.exists()
    )


def bundle_of(source: Path, say: Say) -> Bundle:
    """The bundle at `source` or, if that is a pretrained model, what it is converted to.

    say: is told what takes long. Raises BundleError, and SourceError for a model that cannot be
    converted.
    """
    if not is_pretrained(source):
        return load_bundle(source.resolve())
    if is_hub_id(source):
        return _converted(fetched(str(source), say), source.name, say)
    name = source.resolve().name
    return _converted(source.resolve(), name.removesuffix(_GGUF), say)


def prepared(source: Path, folder: Path, state: str, say: Say) -> Bundle:
    """The bundle of a pretrained model at `folder`, made unless it is there, whole, and of it.

    state: type of the caches, as for `export`. A model of a hub is not asked for again while its
    bundle is there, so that a pod can start again without the hub. Raises SourceError.
    """
    if not is_pretrained(source):
        raise SourceError(
            f"{source} is neither a Hugging Face folder, nor a GGUF file, nor OWNER/NAME of a hub"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        wanted = f"{source if is_hub_id(source) else _digest(source.resolve())} {state}"
        if folder.exists():
            if not (folder / MANIFEST).exists():
                raise SourceError(
                    f"{folder} exists and is not a bundle: choose another folder, or remove it"
                )
            try:
                bundle = load_bundle(folder)
            except BundleError as error:
                say(f"{error}: it is made again")
            else:
                if _read(folder / _MADE_OF) == wanted:
                    return bundle
                say(f"{folder} was not made of {source} as it is now: it is made again")
        path = fetched(str(source), say) if is_hub_id(source) else source.resolve()
        _make(path, folder, folder.name, wanted, say, "--state", state)
        return load_bundle(folder)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def cache_folder() -> Path:
    """Where converted models are kept: `$CONCERTINA_CACHE`, or below the user's cache folder."""
    if chosen := os.environ.get(_CACHE):
        return Path(chosen).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "concertina"


def _converted(source: Path, name: str, say: Say) -> Bundle:
    folder = cache_folder() / f"{name}-{_digest(source)}"
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _alone(folder):
        if folder.exists():
            try:
                return _named(load_bundle(folder), name)
            except BundleError as error:
                say(f"{error}: it is made again")
        _make(source, folder, name, "", say)
        return load_bundle(folder)


def _make(
    source: Path, folder: Path, name: str, made_of: str, say: Say, *options: Path | str
) -> None:
    """Convert and export `source`, and put the bundle in place of what is at `folder`.

    made_of: noted inside the bundle, if it is not empty. options: of `export`.
    """
    for left in folder.parent.glob(f".{folder.name}.*/"):  # by a process that was killed
        shutil.rmtree(left)
    _require_extra(source)
    say(f"converting {source}, this once: it takes minutes; {folder} will have the bundle")
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        run, made = Path(partial) / "run", Path(partial) / "bundle"
        run_command(source, "convert", source, run)
        if not (run / TOKENIZER).exists():
            raise SourceError(
                f"{source} has no {TOKENIZER}, so that nobody knows what its tokens are: save "
                "its tokenizer there with transformers' save_pretrained"
            )
        run_command(source, "export", run, made, "--name", name, *options)
        if made_of:
            (made / _MADE_OF).write_text(made_of)
        if folder.exists():
            folder.rename(Path(partial) / "old")  # never half of a bundle, whenever this is killed
        made.rename(folder)


def _named(bundle: Bundle, name: str) -> Bundle:
    """The bundle, named after its source; one that was put into the cache may not be."""
    if bundle.name == name:
        return bundle
    manifest = read_manifest(bundle.folder)
    manifest.name = name
    write_manifest(bundle.folder, manifest, [file.path for file in manifest.files])
    return load_bundle(bundle.folder)


def _digest(source: Path) -> str:
    """Changes when a file of the source changes; weights are not read for it."""
    files = [source] if source.is_file() else sorted({f for p in _FILES for f in source.glob(p)})
    digest = hashlib.sha256(_CONVERSION.encode())
    for file in filter(Path.exists, files):  # a link that leads nowhere is refused later
        found = file.stat()
        digest.update(f"\0{file.name}\0{found.st_size}\0{found.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process makes this folder. Leaves nothing behind."""
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(path, lock.fileno()):
                continue  # who had it before has removed it, and another may hold a new one
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _require_extra(source: Path) -> None:
    missing = [module for module in _NEEDED if find_spec(module) is None]
    if missing:
        raise SourceError(
            f"{source} has to be converted first, and that needs {', '.join(missing)}: pip install "
            "'concertina[cpu,train]'; or convert it elsewhere with `concertina convert` and "
            "`concertina export`, and serve the bundle"
        )


def run_command(source: Path, *arguments: Path | str) -> None:
    """Run a command of ours for this source, in a process of its own. Raises SourceError."""
    command = [sys.executable, "-m", "concertina.cli.main", *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise SourceError(f"{source} is not served: it could not be converted, see above")


def fetched(name: str, say: Say) -> Path:
    """The folder of a model of the hub, as huggingface_hub keeps it. Raises SourceError."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise SourceError(
            f"{name} is no folder here; to fetch such a model, pip install 'concertina[hub]'"
        ) from None
    say(f"fetching {name}, unless it is here already")
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES))).resolve()
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(f"{name} is no folder here, and cannot be fetched: {reason}") from None
