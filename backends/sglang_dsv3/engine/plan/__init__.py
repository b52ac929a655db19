"""What a model needs, what GPUs have, whether the one fits the other, how fast that could be: arithmetic, nothing is started.

`models`, `published` and `gpus` hold facts, `weights`, `memory` and `roofline` compute, `verdict` and `fleet` judge, `display` and `chart`
show.
"""
