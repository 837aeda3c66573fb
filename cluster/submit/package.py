"""What goes to the cluster with a submitted job: the spec and, on request, a tree without its credentials.
Knows no cluster."""

from __future__ import annotations

import fnmatch
import io
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import yaml

from overtone.jobs.errors import UserError
from overtone.jobs.spec import JobSpec

SPEC_NAME = "overtone-spec.yaml"
WORKING_DIR_LIMIT_BYTES = 512 * 2**20
"""Ray refuses larger packages."""

SECRETS = tuple(
    """
    .env* *.env .secrets* *credential* *secret* *password* auth_token token.txt *_token.txt
    *.pem *.key *.p12 *.pfx *.jks *.keystore *.ppk *.kdbx *.ovpn id_rsa* id_dsa* id_ecdsa* id_ed25519*
    .aws .azure .gcloud .kube kubeconfig* .docker .dockercfg .oci .s3cfg .boto *passwd-s3fs *rclone.conf .mc
    *service-account*.json *service_account*.json gha-creds-* .terraform* *.tfstate* *.tfvars* .vault*
    .netrc* _netrc* .npmrc .pypirc .git-credentials hf_token* .huggingface kaggle.json .kaggle .comet.config
    .pgpass pgpass.conf .my.cnf .mylogin.cnf .htpasswd .ssh .gnupg .password-store *_history
    .databrickscfg .dbt .snowflake .modal.toml .runpod .ngc ngc.cfg msal_token_cache* vault.y*ml
    cookies.txt cookies.sqlite
    """.split()
)
"""Names that never leave this machine, wherever in the tree, in any case: files, or whole folders."""
SECRET_TEXTS = re.compile(
    rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY"
    rb"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
    rb"|\bhf_[A-Za-z0-9]{30,}\b"  # Hugging Face
    rb"|\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_[A-Za-z0-9_]{30,}\b"
    rb"|\bglpat-[A-Za-z0-9_-]{20,}\b|\bpypi-[A-Za-z0-9_-]{40,}\b|\bnpm_[A-Za-z0-9]{30,}\b"
    rb"|\bsk-[A-Za-z0-9_-]{20,}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}"
    rb"|\bAIza[A-Za-z0-9_-]{35}\b|\"private_key\"\s*:"
    rb"|(?i:aws_secret_access_key|azure_storage_key|accountkey)\s*[=:]\s*[\"']?[A-Za-z0-9/+]{30,}"
)
"""Shapes of private keys and of tokens: a small file that holds one is not packed, whatever its name."""
_LOOKED_AT_BYTES = 256 * 1024

CLUTTER = (".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
"""Names that no job needs; left out where no git checkout decides that itself."""
FOLDERS = ("cluster", "jobs", "progressive")
"""The folders of an Overtone checkout, which is installed as `overtone.cluster` and so on."""
CHECKOUT = {"cluster/cli/__main__.py", "jobs/__init__.py", "progressive/__init__.py"}
"""Files by which such a checkout is known."""


def package(spec: JobSpec, tree: Path | None = None) -> bytes:
    """A zip of the spec and, where a tree is given, of its files. The same content gives the same bytes, so
    that Ray uploads it once.

    Ray puts the unpacked zip first on the path of the job's processes. The packages of an Overtone checkout
    are therefore packed below `overtone/`, so that its code runs instead of the installed one.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        if tree is not None:
            names = [name for name in tree_files(tree) if name != SPEC_NAME]
            checkout = CHECKOUT.issubset(names)
            for name in names:
                _add(archive, packed_name(name) if checkout else name, (tree / name).read_bytes())
        _add(archive, SPEC_NAME, packed_spec(spec).encode())
    data = packed.getvalue()
    if len(data) > WORKING_DIR_LIMIT_BYTES:
        raise UserError(
            f"the working tree {tree} packs to {len(data) / 2**20:,.0f} MiB and Ray takes "
            f"{WORKING_DIR_LIMIT_BYTES // 2**20} MiB; name large files in .gitignore"
        )
    return data


def tree_files(root: Path) -> Iterator[str]:
    """The paths below `root` to pack, relative to it and sorted: in a git checkout those that git tracks or
    would track, elsewhere all but clutter; never a secret, never a link."""
    return (name for name in _files(root) if not _is_withheld(root, name))


def withheld(root: Path) -> list[str]:
    """The files that would be packed if they neither were called like a credential nor held one."""
    return [name for name in _files(root) if _is_withheld(root, name)]


def _files(root: Path) -> Iterator[str]:
    names = _git_files(root)
    if names is None:
        names = {str(path.relative_to(root)) for path in root.rglob("*")}
        names = {name for name in names if not _matches(name, CLUTTER)}
    for name in sorted(names):
        path = root / name
        if path.is_file() and not path.is_symlink():
            yield name


def _is_withheld(root: Path, name: str) -> bool:
    """A large file is data, or code of others: its text is not looked at."""
    path = root / name
    if is_secret(name):
        return True
    return path.stat().st_size <= _LOOKED_AT_BYTES and SECRET_TEXTS.search(path.read_bytes()) is not None


def _git_files(root: Path) -> set[str] | None:
    """The paths below `root` that git tracks or would track; None without git, or outside a checkout."""
    if shutil.which("git") is None:
        return None
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        return None
    return set(filter(None, os.fsdecode(listed.stdout).split("\0")))


def is_secret(path: str) -> bool:
    """Whether a path relative to the tree names a credential, or lies in a folder of credentials."""
    return _matches(path, SECRETS)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(
        fnmatch.fnmatchcase(part.lower(), pattern) for part in Path(path).parts for pattern in patterns
    )


def packed_name(name: str) -> str:
    """Where a file of an Overtone checkout lies in the zip: `jobs/plan.py` as `overtone/jobs/plan.py`."""
    return f"overtone/{name}" if name.partition("/")[0] in FOLDERS else name


def packed_spec(spec: JobSpec) -> str:
    """The spec as YAML that `load_spec` reads back to the same spec, wherever it lies. Its name is always
    written: unset, it would be that of the file."""
    settings = {"name": spec.name} | spec.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(settings, sort_keys=False)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, data)


def anchored(spec: JobSpec) -> JobSpec:
    """The spec with a local output folder made absolute: on the cluster the current folder is another."""
    path = spec.output.path
    if "://" in path:
        return spec
    output = spec.output.model_copy(update={"path": str(Path(path).expanduser().resolve())})
    return spec.model_copy(update={"output": output})


def notes_on_paths(spec: JobSpec) -> tuple[str, ...]:
    """A sentence for each path in the spec that the cluster must see as this machine does."""
    return tuple(
        f"{key}: {path} is a path on the cluster's machines, not packed with the job; all must "
        "see it (a shared disk, or the image), otherwise use s3://"
        for key, path in spec.files()
    )
