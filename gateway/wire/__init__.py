"""OpenAI's wire: bodies, bounded reading, server-sent events. No engine words, no I/O of its own."""
