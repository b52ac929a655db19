"""Going on with an answer whose host died: by its text (`resume`), or over its token ids (`exact`)."""
