"""How `tokenizer.json` was made, once, on 2026-11-24; it is committed, and this is not run again.

Byte-level BPE over the English of Python's own manual (`pydoc_data.topics`, PSF licence) and 120 modules of its standard library.
As in DeepSeek-V3, BOS, EOS and padding are special tokens and every other marker is an added token that is not. Run in the engine's
environment: `python tokenizer_train.py OUT.json`.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
MARKERS = [
    "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<think>", "</think>",
]  # fmt: skip

stdlib = Path(sysconfig.get_paths()["stdlib"])
files = [stdlib / "pydoc_data" / "topics.py", *sorted(stdlib.glob("*.py"))[:120]]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=2000, special_tokens=SPECIAL, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
)
tokenizer.train([str(file) for file in files], trainer)
tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
tokenizer.save(sys.argv[1])
