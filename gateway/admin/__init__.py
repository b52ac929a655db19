"""The admin API: metrics, workers, hosts, keys, usage, what happened to a request, reload."""
