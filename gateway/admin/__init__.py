"""The operator's door: metrics, processes, hosts, keys, usage, reload."""
