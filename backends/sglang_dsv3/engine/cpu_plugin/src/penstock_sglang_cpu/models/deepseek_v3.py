"""SGLang's own DeepSeek-V3."""

from sglang.srt.models.deepseek_v2 import DeepseekV3ForCausalLM

EntryClass = [DeepseekV3ForCausalLM]
