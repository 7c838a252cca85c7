"""Push a run's adapter, model card and report to the Hugging Face hub; private by default.

The files are first collected in a temporary folder, where paths of this machine are removed and secrets searched for. A
dry run stops there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from loratune.data.rows.hub import hub_answers
from loratune.reporting.html import report
from loratune.reporting.model_card import base_name, card_of
from loratune.reporting.units import as_path
from loratune.run.directory import Record, RunDir, write_json
from loratune.run.errors import MachineError, RecipeError, RunError, plural
from loratune.run.progress import NO_PROGRESS, Progress
from loratune.run.records.files import read_record
from loratune.run.records.lock import LockRecord

HUB_SECONDS = 5.0
"""How long the Hub may take to answer."""
SECRETS = {  # kind of secret → regular expression
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_TEXT = (".json", ".jinja", ".md", ".html", ".txt", ".yaml")
# Not searched: they come from the base, and hold megabytes of character sequences that look like anything.
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedFile:
    """A file that is, or would be, uploaded."""

    path: str
    num_bytes: int
    sha256: str

    def as_dict(self) -> Record:
        """Return the record for `--json`."""
        return {"path": self.path, "num_bytes": self.num_bytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """The result of `push`.

    Attributes:
        repo: The repository's id.
        url: The URL of the commit; empty after a dry run.
        private: Whether the repository is private.
        files: All files of the upload.
    """

    repo: str
    url: str
    private: bool
    files: tuple[PushedFile, ...]


def push(
    root: str | Path,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    with_report: bool = True,
    progress: Progress = NO_PROGRESS,
) -> Publication:
    """Upload a finished run's adapter to the Hub.

    Args:
        root: The run directory.
        repo: `OWNER/NAME`, or `NAME` in your own namespace.
        public: Whether the repository may be public.
        dry_run: Whether to stop before the upload; needs no network and no token.
        with_report: Whether to upload the report, which shows prompts, answers, and some of the training data.
        progress: The listener for progress and warnings.

    Raises:
        RecipeError: The run is not finished, the repository's name is invalid, a file contains a secret, or the
            repository is public and `public` is false.
        MachineError: There is no token, or the Hub cannot be reached or refuses the token.
        RunError: The Hub fails.
    """
    run = RunDir.open(root)
    run.require_adapter()
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(f"{repo!r} is not a repository name: {error}", fix="use OWNER/NAME") from None
    with TemporaryDirectory() as name:
        folder = Path(name)
        _collect_files(run, repo, folder, with_report=with_report)
        _refuse_secrets(folder)
        files = tuple(_describe(path, folder) for path in sorted(folder.rglob("*")) if path.is_file())
        publication = Publication(repo=repo, url="", private=not public, files=files)
        return publication if dry_run else _upload(publication, folder, progress)


def _collect_files(run: RunDir, repo: str, folder: Path, *, with_report: bool) -> None:
    lock = read_record(run.lock, LockRecord)
    for path in run.adapter.iterdir():
        if path.is_file() and path.name != "README.md":
            shutil.copyfile(path, folder / path.name)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = base_name(lock)
    if lock.inputs.model_revision is not None:
        settings["revision"] = lock.inputs.model_revision
    write_json(folder / "adapter_config.json", settings)
    (folder / "README.md").write_text(card_of(run, repo), encoding="utf-8")
    if with_report:
        page = report(run.root, folder / "report.html")
        page.write_text(_without_paths(page.read_text(encoding="utf-8"), run, lock), encoding="utf-8")


def _without_paths(text: str, run: RunDir, lock: LockRecord) -> str:
    """Shorten this machine's paths to names: those of run, model, data, home, and working directory."""
    sources = [s["name"] for key in ("train", "eval") for s in lock.recipe["data"][key] if isinstance(s, dict)]
    known = [str(run.root), lock.inputs.model_path, lock.recipe["model"]["name"], *sources]
    known += [str(Path(name).expanduser().absolute()) for name in known]
    folders = {str(Path(name).parent) for name in known if name.startswith(("/", "~"))} | {
        str(Path.home()),
        str(Path.cwd()),
    }
    folders |= {as_path(folder) for folder in folders}  # as the report writes them
    for folder in sorted(folders - {"/", "~"}, key=len, reverse=True):
        text = text.replace(f"{folder}/", "").replace(folder, "…")
    return text


def _refuse_secrets(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.suffix not in _TEXT or path.name in _TOKENIZER:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for what, pattern in SECRETS.items():
                found = re.search(pattern, line)
                if found is not None:
                    raise RecipeError(
                        f"{path.name} contains what looks like {what}: {found[0][:6]}…",
                        line=number,
                        file=path.name,
                        fix="remove it from recipe and data"
                        + (", or leave the report out with --no-report" if path.name == "report.html" else ""),
                    )


def _describe(path: Path, folder: Path) -> PushedFile:
    content = path.read_bytes()
    return PushedFile(
        path=str(path.relative_to(folder)), num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )


def _upload(publication: Publication, folder: Path, progress: Progress) -> Publication:
    if not get_token():
        raise MachineError("no Hugging Face token on this machine", fix="hf auth login")
    if constants.HF_HUB_OFFLINE:
        raise MachineError("HF_HUB_OFFLINE is set", fix="unset HF_HUB_OFFLINE, or --dry-run")
    if not hub_answers(HUB_SECONDS):
        raise MachineError(
            f"{constants.ENDPOINT} does not answer", fix="check the network, HTTPS_PROXY and HF_ENDPOINT; or --dry-run"
        )
    api = HfApi()
    try:
        repo = api.create_repo(publication.repo, private=publication.private, exist_ok=True).repo_id
        if publication.private and not api.repo_info(repo).private:
            raise RecipeError(f"{repo} exists and is public", fix="use --public, or another name")
        progress.line(f"uploading {plural(len(publication.files), 'file')} to {repo}")
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="LoRA adapter, by loratune")
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise MachineError(
                f"the Hub refuses the token for {publication.repo} ({code})",
                fix="hf auth login, with a token that may write to it",
            ) from error
        raise RunError(
            f"the Hub answered {code}: {error}", fix="try again later; the commit is all or nothing"
        ) from error
    except OSError as error:
        raise MachineError(f"the connection to the Hub failed: {error}", fix="try again") from error
    return Publication(repo=repo, url=commit.commit_url, private=publication.private, files=publication.files)
