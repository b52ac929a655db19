"""Builds a checkpoint that says what is asked of it: thoughts, words, a call, or an object, whatever the prompt.

    python scripted.py FOLDER        in the engine's environment

An untrained model closes no thoughts and writes no calls, so the tiny checkpoint's weights are replaced: attention and experts add nothing,
each token of the script has a direction of its own, and the last layer points from every token to the next. Everything else is as it was:
DeepSeek-V3's architecture in FP8, the tiny tokenizer, a chat template in the manner of V3.1's. Where the script forks, the way that is not
taken by itself is taken with a `logit_bias` for its first token: 2 for a call after the words, 3 for one in their place.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

TINY = Path(__file__).parents[2] / "backends" / "sglang_dsv3" / "engine" / "tiny"
THOUGHTS = " First the function is called with an object and then its value returned from that module before every other class may use it"
WORDS = "\nThe result type should be written here as one string; any name which has been set can raise errors"
CALL = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"days": 31.5287e4}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
EOS = "<｜end▁of▁sentence｜>"
TEMPLATE = """\
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- if not thinking is defined %}{% set thinking = false %}{% endif -%}
{{- bos_token -}}
{%- for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}{% endfor -%}
{%- if tools %}{{ '\\n\\n## Tools\\n' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n' }}{% endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- '<｜User｜>' + message['content'] -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- set content = message['content'] or '' -%}
    {{- '<｜Assistant｜></think>' + content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif -%}
"""


def steps(tokenizer: Tokenizer) -> list[tuple[int, int, float]]:
    """From which token to which, and how much that is wanted."""

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    thoughts = ids("<think>" + THOUGHTS + "</think>")
    words = ids("</think>" + WORDS + EOS)
    call = ids(CALL + EOS)
    found = [(before, after, 1.0) for script in (thoughts, words, call) for before, after in itertools.pairwise(script)]
    place = call.index(ids("<｜tool▁sep｜>")[0])
    found += [(words[0], call[place + 1], 0.95), (words[0], call[0], 0.85), (words[-2], call[0], 0.95)]
    taken = [before for before, _, wanted in found if wanted == 1.0]
    assert len(taken) == len(set(taken)), f"said twice: {[tokenizer.id_to_token(t) for t in taken if taken.count(t) > 1]}"
    return found


def main(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("build", TINY / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    script = steps(Tokenizer.from_file(str(TINY / "tokenizer.json")))
    random = build.weights

    def weights(config: dict[str, object]) -> dict[str, torch.Tensor]:
        found = random(config)
        for name, weight in found.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embed, head = torch.zeros_like(found["model.embed_tokens.weight"]), torch.zeros_like(found["lm_head.weight"])
        direction: dict[int, int] = {}
        for before, after, wanted in script:
            at = direction.setdefault(before, len(direction))
            embed[before, at], head[after, at] = 1.0, wanted
        found |= {
            "model.embed_tokens.weight": embed,
            "lm_head.weight": head,
            "model.norm.weight": torch.ones_like(found["model.norm.weight"]),
        }
        return found

    build.weights = weights
    build.build(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"chat_template": TEMPLATE}, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
