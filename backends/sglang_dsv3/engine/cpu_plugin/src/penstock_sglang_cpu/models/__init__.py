"""For SGLANG_EXTERNAL_MODEL_PACKAGE: SGLang imports the models below this package instead of all of its own."""
