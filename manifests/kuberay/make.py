"""Writes the manifests beside this file from the job specs above it: `python manifests/kuberay/make.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

from overtone.cluster.kubernetes import IMAGE_FOLDER, Volume, manifest
from overtone.jobs.spec import load_spec

SPECS = Path(__file__).parents[1]


def manifests() -> dict[str, str]:
    """File name to text of every ready manifest."""
    data = Volume("overtone-data", "/data", size="5Gi", access="ReadWriteOnce")
    quickstart = load_spec(
        SPECS / "quickstart.yaml",
        [f"prompts.path={IMAGE_FOLDER}/manifests/quickstart.parquet", "output.path=/data/quickstart"],
    )
    flux = load_spec(SPECS / "flux1-dev.yaml")
    wan = load_spec(SPECS / "wan2.1-t2v.yaml")
    return {
        "quickstart.yaml": manifest(quickstart, volumes=(data,), deadline_s=3600),
        "flux1-dev.yaml": manifest(flux),
        "wan2.1-t2v.yaml": manifest(wan),
        "flux1-dev-spot.yaml": manifest(flux, spot=True, name="overtone-flux1-dev-spot"),
        "flux1-dev-kueue.yaml": manifest(flux, queue="gpu-queue", name="overtone-flux1-dev-kueue"),
        "cluster.yaml": manifest(flux, kind="cluster", name="overtone"),
    }


def main() -> None:
    """Write them, or with --check say which are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check = parser.parse_args().check
    stale = []
    for name, text in manifests().items():
        path = Path(__file__).with_name(name)
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        raise SystemExit(f"not up to date: {', '.join(stale)}; run python manifests/kuberay/make.py")


if __name__ == "__main__":
    main()
