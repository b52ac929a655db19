"""The one place that knows Redis: limits, leases, the ledger and stored keys, shared by all workers and gateways of a deployment.

Every key begins with `penstock:{PREFIX}:`; the braces put a deployment's keys into one slot of a Redis Cluster, so that one script can
decide over all limits of a request. Everything expires but the stored keys, which operators make and revoke.
"""
