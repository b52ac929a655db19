"""The way of a request below `exchange`: what is asked, who serves it, where it is sent, and how the answer comes back."""
