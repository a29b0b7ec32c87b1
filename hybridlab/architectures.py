"""Published dimensions of well-known models, and a small twin of each for tests. Numbers only, no weights."""

from __future__ import annotations

from typing import Any

_LLAMA_2: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}
_LLAMA_3 = _LLAMA_2 | {
    "vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "bos_token_id": 128000, "eos_token_id": 128001,
}
_MISTRAL = _LLAMA_2 | {
    "model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_QWEN_3 = _LLAMA_3 | {  # its attention normalises queries and keys
    "model_type": "qwen3", "vocab_size": 151936, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "bos_token_id": 151643, "eos_token_id": 151645,
}
_SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.16,  # 0.02 * sqrt(4096 / 64): layers act as strongly on their input as in the full model
}


def _tiny(full: dict[str, Any]) -> dict[str, Any]:
    """The same family and flags at test size: grouped queries stay grouped, and a sliding window really slides."""
    grouped = full["num_key_value_heads"] < full["num_attention_heads"]
    small = full | _SMALL | {"num_key_value_heads": 2 if grouped else 4}
    if full.get("sliding_window"):
        small["sliding_window"] = 64
    if "head_dim" in full:
        small["head_dim"] = 32  # wider than hidden_size / heads, so that code which derives it is caught
    return small


FULL = {"llama-2-7b": _LLAMA_2, "llama-3-8b": _LLAMA_3, "mistral-7b": _MISTRAL, "qwen3-8b": _QWEN_3}
# The published dimensions, and for each a "tiny-" twin, also without the size in its name ("tiny-llama-2").
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **FULL,
    **{f"tiny-{name}": _tiny(full) for name, full in FULL.items()},
    **{f"tiny-{name.rpartition('-')[0]}": _tiny(full) for name, full in FULL.items()},
}
