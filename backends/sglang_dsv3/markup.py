"""What DeepSeek's chat templates put around calls of tools and around reasoning, which SGLang's parsers take out of an answer."""

from __future__ import annotations

from gateway.plugin import Markup

# As the templates of DeepSeek V3, R1 and V3.1 (marks of its tokenizer), and of V3.2 and V4 (DSML) write them.
MARKUP = Markup(
    tools=(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
        "<｜DSML｜",
        "</｜DSML｜",
    ),
    opens=("<think>",),
    closes=("</think>",),
)
