#!/usr/bin/env bash
# apt.sh : Debian packages that the tests need and no wheel carries. Installs only what is missing; says what and why.
set -eu
# command  package  why
needed="curl curl the README's first command is run as it stands by a test
openssl openssl a host with a certificate of its own is made up by a test
chromium chromium /docs is opened in a browser by a test"
missing=""
while read -r command package why; do
  if ! command -v "$command" >/dev/null; then
    echo "penstock: needs Debian package '$package': $why"
    missing="$missing $package"
  fi
done <<<"$needed"
[ -z "$missing" ] && exit 0
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
$sudo apt-get update -qq
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends $missing
