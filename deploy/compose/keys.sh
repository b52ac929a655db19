#!/usr/bin/env bash
# The operator's key, the one that Prometheus reads /metrics with, and a first client's key; shown once, kept as hashes (keys.env), but for the one
# that Prometheus needs (metrics.key).
set -eu
cd "$(dirname "$0")"
new() { python3 -c 'import secrets; print("sk-penstock-" + secrets.token_urlsafe(32))'; }
hash() { printf 'sha256:%s' "$(printf %s "$1" | sha256sum | cut -d' ' -f1)"; }
admin=$(new) metrics=$(new) client=$(new)
umask 077
printf %s "$metrics" >metrics.key
cat >keys.env <<ENV
PENSTOCK__ADMIN__KEY_HASH=$(hash "$admin")
PENSTOCK__ADMIN__METRICS_KEY_HASH=$(hash "$metrics")
PENSTOCK__KEYS=[{name: first, hash: "$(hash "$client")"}]
ENV
# Prometheus runs as another user.
chmod 644 metrics.key
echo "the operator's key (penstock keys, /admin): $admin"
echo "a client's key:                             $client"
