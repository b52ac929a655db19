"""Who may call, how much, and what it costs."""
