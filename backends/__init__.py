"""Backends that come with Penstock. Nobody imports them: they are found through the entry points, as a stranger's would be."""
