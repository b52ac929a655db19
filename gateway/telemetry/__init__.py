"""What is seen of a request: its record, and the metrics, spans, log line and page that are made from it."""
