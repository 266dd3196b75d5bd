#!/usr/bin/env bash
# Install LucidPrune where PyTorch and torchvision already are (NVIDIA's image), without replacing them. DALI, which not
# every image has, comes along where it is missing.
#
#   docker/install.sh [--dry-run] [dependencies | package]     both when neither is named
#
# The Dockerfile and CI run this same script. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python}"
dry_run=""
what="all"
for argument in "$@"; do
    case "$argument" in
        --dry-run) dry_run=1 ;;
        dependencies | package) what="$argument" ;;
        *)
            echo "docker/install.sh: unknown argument '$argument'; use --dry-run, dependencies or package" >&2
            exit 2
            ;;
    esac
done

run() {
    echo "+ $*"
    [ -n "$dry_run" ] || "$@"
}

# Versions of what must stay, as pip constraints: a dependency that wants another torch is an error, not a download.
installed() {
    "$python" docker/requirements.py --provided | "$python" -c '
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.stdin.read().split():
    try:
        print(f"{name}=={version(name)}")
    except PackageNotFoundError:
        continue'
}

constraints="$(mktemp)"
trap 'rm -f "$constraints"' EXIT
installed >"$constraints"
grep -q '^torch==' "$constraints" || {
    echo "docker/install.sh: there is no PyTorch here to keep; use 'make install' instead" >&2
    exit 1
}

if [ "$what" != package ]; then
    mapfile -t requirements < <("$python" docker/requirements.py)
    run "$python" -m pip install --no-cache-dir --constraint "$constraints" "${requirements[@]}"
fi
if [ "$what" != dependencies ]; then
    # The image pins packages through PIP_CONSTRAINT, build tools among them; this installs nothing but ourselves.
    run env -u PIP_CONSTRAINT "$python" -m pip install --no-cache-dir --no-deps --editable .
    run "$python" -c 'import image_classification, explainers, pruning, multiproc, torch; print("torch", torch.__version__)'
fi
now="$(installed)"
if lost="$(grep -vxF "$now" "$constraints")"; then
    echo "docker/install.sh: the installation replaced a package of the image: it had $lost" >&2
    exit 1
fi
