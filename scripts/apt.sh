#!/usr/bin/env bash
# apt.sh [bench] : Debian packages that the tests (or the bench) need and no wheel carries. Installs only what is missing; says what and why.
set -eu
# command  package  why
needed="curl curl the README's first command is run as it stands by a test
openssl openssl a host with a certificate of its own is made up by a test
unshare util-linux being process 1 is tested in a namespace of its own
redis-server redis-server limits and keys are shared through a real Redis in tests, some over TLS
promtool prometheus alert rules are checked and tested, and a real Prometheus scrapes a gateway
chromium chromium /docs is opened in a browser by a test
javac default-jdk-headless the JDK's own HTTP client offers HTTP/2 with every request, and is one of the clients in tests
faketime faketime sets the clock of a gateway an hour forward and back in a test
systemd-analyze systemd judges how well the units are confined
ibv_devices ibverbs-utils brings the library that SGLang's KV transfer is linked to, also where it goes over TCP
nginx nginx-light stands in front of a gateway in tests, and both must see the same requests"
[ "${1:-}" = bench ] && needed="wrk wrk puts the load on every gateway
nginx nginx-light is the peer that shows what a proxy costs at least
redis-server redis-server limits are measured in memory and in a real Redis
valgrind valgrind counts the instructions of each stage of a request
strace strace counts the system calls of a request"
missing=""
waited=0
while read -r command package why; do
  if ! command -v "$command" >/dev/null; then
    echo "penstock: needs Debian package '$package': $why"
    missing="$missing $package"
  fi
done <<<"$needed"
[ -z "$missing" ] && exit 0
sudo=""
[ "$(id -u)" = 0 ] || sudo=sudo
# On the first boot of a cloud machine somebody else installs already. apt waits for dpkg's locks where it is told to, for that of the package
# lists it does not.
until said=$($sudo apt-get update -qq 2>&1); do
  case $said in *"Could not get lock"* | *"is another process using it"*) ;; *) echo "$said" >&2; exit 100 ;; esac
  [ $((waited += 1)) -le "${APT_WAIT_S:-600}" ] || { echo "$said" >&2; exit 100; }
  [ $waited -gt 1 ] || echo "penstock: waiting for another apt-get to end"
  sleep 1
done
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive $sudo apt-get -o "DPkg::Lock::Timeout=${APT_WAIT_S:-600}" install -y -qq --no-install-recommends $missing
