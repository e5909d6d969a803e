"""A tiny causal language model over bytes, and text tasks for it."""

import torch

from clkit.tasks.base import Task, TextExamples, TextRecord

WORDS = ("red", "green", "dark blue", "a very long name of a colour", "x")


def tiny_module(model_type: str = "llama", attention: str = "sdpa", vocabulary: int = 260, **config) -> torch.nn.Module:
    """Two layers, width 32, weights large enough that what a token sees matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 256, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    if model_type == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "num_key_value_heads": 4}
    if model_type in ("gpt_neox", "opt"):
        sizes |= {"num_key_value_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32}
    if model_type not in ("gemma", "gemma2", "gemma3_text", "glm", "glm4", "helium", "seed_oss", "qwen3", "qwen3_moe"):
        del sizes["head_dim"]
    if "moe" not in model_type and model_type != "mixtral":
        sizes = {k: v for k, v in sizes.items() if "expert" not in k and not k.startswith("moe")}
    made = AutoConfig.for_model(model_type, **sizes | config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(made, attn_implementation=attention)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def text_task(metric: str, count: int = 7, **record) -> Task:
    """Records with prompts and options of different lengths and counts."""
    records = []
    for i in range(count):
        options = WORDS[: 2 + i % 4]
        fields = {"answer": options[i % len(options)], "options": options} | record
        records.append(TextRecord(prompt="What colour has it? " + "ab " * (5 * i % 11), id=f"r{i}", **fields))
    examples = TextExamples(tuple(records))
    return Task("colours", TextExamples(()), examples, "text", metric)
