"""Compare files or a running server, whoever made them, with a run: `loratune certify`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFReader

from loratune.exporting.endpoint.client import is_address
from loratune.run.errors import RecipeError
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.base import as_json, parse
from loratune.run.records.certificate import CertificateRecord
from loratune.workflows.certify import certificate_of, with_origin
from loratune.workflows.certify_endpoint import certify_endpoint
from loratune.workflows.export_gguf import GgufExport
from loratune.workflows.export_vllm import read_adapter_folder
from loratune.workflows.finished import open_finished
from loratune.workflows.merged_folder import read_merged_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from loratune.exporting.certificate import Written
    from loratune.run.directory import Record
    from loratune.workflows.finished import FinishedRun

_FIX = "give a merged folder, a GGUF file, an adapter's folder, or http://… of a server"


def certify_target(
    root: str | Path,
    target: str | Path,
    *,
    model: str | None = None,
    api_key: str | None = None,
    progress: Progress = NO_PROGRESS,
) -> Record:
    """Compare files or a running server, whoever made them, with a run. Nothing is written.

    Args:
        root: The run directory.
        target: A folder with a merged model, a GGUF file of a merged model or of an adapter, an adapter's folder, an
            export of loratune, or the address of a server with an OpenAI-compatible API.
        model: The name of a server's model; None for the run's, or the only one that the server lists.
        api_key: The key that requests to a server must send; None for none.
        progress: The listener for progress and warnings.

    Returns:
        The certificate, as in `parity.json`.

    Raises:
        RecipeError: The run is not finished, its model changed, or `target` is none of these, or a server without this
            model, or with another key.
        MachineError: The server does not answer.
        RunError: The server fails.
    """
    if is_address(str(target)):
        return certify_endpoint(root, str(target), model=model, api_key=api_key, progress=progress)
    if model is not None:
        raise RecipeError(f"--model {model} names a model of a server, and {target} is none", fix="leave it out")
    path = Path(target).expanduser().absolute()
    kind, find = _find_kind(path)
    finished = open_finished(root, progress)
    certificate = certificate_of(finished, find(finished), stops_required="adapter" not in kind, num_answers=0)
    return as_json(parse(CertificateRecord, with_origin(finished.run, kind, path, certificate)))


def _find_kind(path: Path) -> tuple[str, Callable[[FinishedRun], Written]]:
    """Return what a path holds, such as `merge` or `gguf adapter`, and how it is proven.

    Raises:
        RecipeError: It holds nothing that can be compared.
    """
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "adapter", partial(_read, read_adapter_folder, path)
        if (path / "config.json").is_file():
            return "merge", partial(_read, read_merged_folder, path)
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            found = f"{len(files)} GGUF files" if files else "neither config.json, adapter_config.json nor a GGUF file"
            raise RecipeError(f"it holds {found}", file=path, fix=_FIX)
        path = files[0]
    if not path.is_file():
        raise RecipeError("no such file or folder", file=path, fix=_FIX)
    if path.suffix != ".gguf":
        raise RecipeError(f"{path.suffix or 'a file without a suffix'} cannot be compared", file=path, fix=_FIX)
    try:
        kind = GGUFReader(path).get_field("general.type")
    except (ValueError, OSError) as error:
        raise RecipeError(f"it cannot be read as GGUF: {error}", file=path, fix="export it again") from error
    if kind is not None and kind.contents() == "adapter":
        return "gguf adapter", partial(_read_gguf, path, None)
    return "gguf merged", partial(_read_gguf, path, "")


def _read(read: Callable[[FinishedRun, Path], Written], path: Path, finished: FinishedRun) -> Written:
    return read(finished, path)


def _read_gguf(path: Path, outtype: str | None, finished: FinishedRun) -> Written:
    return GgufExport(finished=finished, target=path.parent, outtype=outtype, template=None).read(path)
