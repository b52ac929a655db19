#!/usr/bin/env bash
# install.sh FOLDER [engine]: Penstock from this checkout into FOLDER/venv, from the lock file with hashes; with `engine` also SGLang for the CPU
# (FOLDER/.venv-engine) and the tiny checkpoint. Needs python3 with venv; with gcc and Python.h the gateway is compiled. The Dockerfile
# runs this, and nothing else.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:?where to?}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --disable-pip-version-check --quiet --no-input install)
"${pip[@]}" --no-deps --require-hashes -r "$here/requirements/gateway.txt"
# From a copy: a build leaves files beside its sources, which may be read-only.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$here"/{gateway,backends,middleware,openapi,scripts,pyproject.toml,README.md,LICENSE} "$copy"
(cd "$copy" && HATCH_QUIET=1 "$folder/venv/bin/python" -m hatchling build -t wheel -d "$copy/wheel")  # says so where it stays pure Python
"${pip[@]}" --no-deps "$copy"/wheel/*.whl
if [ "${2:-}" = engine ]; then
  PENSTOCK_HOME="$folder" "$folder/venv/bin/penstock" engine install
  PENSTOCK_HOME="$folder" "$folder/venv/bin/penstock" engine checkpoint
fi
echo "penstock: installed into $folder"
