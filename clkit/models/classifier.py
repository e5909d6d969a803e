"""Classifiers: a backbone for images, vectors or texts, and one linear head over all classes."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clkit.cache import RowCache
from clkit.config import LoraConfig, ModelConfig
from clkit.errors import DataError, ModelError
from clkit.models.backbones.base import Backbone
from clkit.models.base import Model
from clkit.models.encoded_examples import EncodedLabelled, EncodedSentences, EncodedTensors
from clkit.models.encoder import TextEncoder
from clkit.models.frozen import feature_recipe, frozen_features
from clkit.models.noise import routed
from clkit.models.positions import learned_positions
from clkit.models.precision import DTYPES, at_least_float32
from clkit.models.seeding import seeded
from clkit.models.vision_encoder import VisionEncoder, read_preprocessor, save_preprocessor
from clkit.registry import STRATEGIES
from clkit.tasks.base import Examples, Kind, LabelledExamples
from clkit.tasks.batch import Batch, Encoded

FORMAT = "clkit-classifier"


class ClassifierNet(nn.Module):
    """Backbone and head.

    Args:
        backbone: gives features (B, D).
        num_classes: width of the head.
        generator: draws the head's weights (uniform, variance 1 / D); its bias is zero.
        frozen: the backbone is not trained: no gradients, no graph, always in evaluation mode (batch norm included).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: Backbone, num_classes: int, generator: torch.Generator, frozen: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        with seeded(generator):
            head = nn.Linear(backbone.out_features, num_classes)
        nn.init.kaiming_uniform_(head.weight, nonlinearity="linear", generator=generator)
        nn.init.zeros_(head.bias)
        self.head: Any = head  # a module with `out_features`, which a method may replace
        self.frozen = frozen
        if frozen:
            backbone.requires_grad_(False)
        mean, std = (torch.tensor(v).view(-1, 1, 1).squeeze() for v in backbone.normalise)
        if mean.dim():
            mean, std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> ClassifierNet:
        """Set the mode of everything that is trained; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    @property
    def constant(self) -> bool:
        """Whether an example's features never change, and can stand for it in a batch (``features``)."""
        return self.frozen

    def description(self) -> dict[str, Any]:
        """JSON that says how a strategy changed this network, for :meth:`Strategy.rebuild`; empty when none did."""
        return {}

    def features(self, x: Tensor | None = None, features: Tensor | None = None, **tokens: Tensor) -> Tensor:
        """The backbone's output (B, D), or the one computed before; uint8 images are scaled and normalised first."""
        if features is not None:
            return features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            out: Tensor = self.backbone(**tokens) if x is None else self.backbone(self.scaled(x))
        return out

    def scaled(self, x: Tensor) -> Tensor:
        """Images as the backbone reads them; anything but uint8 is that already."""
        return x * self.scale + self.shift if x.dtype == torch.uint8 else x

    def forward(self, x: Tensor | None = None, features: Tensor | None = None, **tokens: Tensor) -> Tensor:
        """Inputs, or features (B, D) computed before, to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x, features, **tokens))
        return logits


class Classifier(Model):
    """A network that assigns one of ``num_classes`` classes.

    Args:
        config: what it was built from.
        module: backbone and head.
        provenance: see ``Model``.
        tokenizer: for texts; None for tensors.
        input_shape: of one tensor without the batch; None for texts.

    Attributes:
        autocast_dtype: what the engine computes in; None = float32. Weights are always float32, and so is the
            computation under ``dtype: auto``: these networks are too small to gain by less.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"classification"})
    has_features: ClassVar[bool] = True
    module: ClassifierNet

    def __init__(
        self,
        config: ModelConfig,
        module: ClassifierNet,
        provenance: Mapping[str, Any] | None = None,
        *,
        tokenizer: Any = None,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(config.name, module, {**(provenance or {}), "dtype": "float32"})
        self.config = config
        self.tokenizer = tokenizer
        if tokenizer is not None and tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
        self.input_shape = input_shape
        self.num_classes: int = module.head.out_features
        chosen = DTYPES.get(config.dtype)
        self.autocast_dtype = None if chosen == torch.float32 else chosen

    def encode(self, examples: Examples) -> Encoded:
        """Tokenise texts, or take tensors as they are (anything but uint8 becomes float32).

        Raises:
            DataError: not labelled examples, another input shape or kind, or a label outside the label space.
        """
        if not isinstance(examples, LabelledExamples):
            raise DataError(f"Model '{self.name}' learns classes; it can't read {type(examples).__name__}.")
        labels, inputs = examples.labels, examples.inputs
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            low, high = int(labels.min()), int(labels.max())
            raise DataError(
                f"Labels run from {low} to {high}; model '{self.name}' has classes 0 to {self.num_classes - 1}."
            )
        if isinstance(inputs, tuple) != (self.tokenizer is not None):
            reads = "texts" if self.tokenizer is not None else "images or vectors"
            raise DataError(
                f"Model '{self.name}' reads {reads}; the task has {'texts' if reads != 'texts' else 'tensors'}."
            )
        if isinstance(inputs, tuple):
            return EncodedSentences(inputs, labels, examples.ids, self.tokenizer, self._max_length())
        if isinstance(inputs, Tensor):
            if self.input_shape is not None and tuple(inputs.shape[1:]) != tuple(self.input_shape):
                shape = tuple(inputs.shape[1:])
                raise DataError(f"Model '{self.name}' was built for inputs of shape {self.input_shape}; got {shape}.")
            if inputs.dtype != torch.uint8:
                inputs = inputs.float()
        return EncodedTensors(inputs, labels, examples.ids)

    def precompute(self, encoded: Encoded, cache: RowCache) -> Encoded:
        """Features instead of inputs where the backbone is frozen."""
        if self.module.constant and isinstance(encoded, EncodedLabelled):
            return frozen_features(self, encoded, cache)
        return encoded

    @functools.cached_property
    def feature_recipe(self) -> dict[str, str]:
        """What the features of a frozen backbone depend on besides the input; made once, when the model is in place."""
        return feature_recipe(self)

    def _max_length(self) -> int:
        backbone = cast(TextEncoder, self.module.backbone)
        own = getattr(backbone.config, "max_position_embeddings", None)
        limits = (self.config.max_length, self.tokenizer.model_max_length, own, learned_positions(backbone))
        return int(min(n for n in limits if n is not None))

    def logits(self, batch: Batch) -> Tensor:
        """(B, num_classes)."""
        scores: Tensor = self.module(**batch.inputs)
        return scores

    def features(self, batch: Batch) -> Tensor:
        """(B, D) what the head reads."""
        return self.module.features(**batch.inputs)

    def loss(self, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Mean cross entropy over the rows, in float32 (float64 for a module in float64)."""
        scores = self.module(**batch.inputs) if logits is None else logits
        return F.cross_entropy(at_least_float32(scores), batch.labels)

    def export(self, directory: Path) -> str:
        """Write weights, configuration and (for texts) the tokenizer; return the snippet that loads them."""
        from safetensors.torch import save_file

        from clkit.models.expandable import structure_of

        directory.mkdir(parents=True, exist_ok=True)
        # Copied: under ZeRO-3 on one process they are parts of one long tensor, which would be written with each.
        state = self.module.state_dict()
        whole = {k: v.to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in state.items()}
        save_file(whole, directory / "model.safetensors")
        backbone = self.module.backbone
        encoder = getattr(backbone, "config", None)  # of transformers' encoders, grown ones too
        if encoder is not None:
            with routed():
                encoder.save_pretrained(directory / "encoder")
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(directory / "encoder")
            if self.tokenizer is None:
                save_preprocessor(directory / "encoder", backbone.normalise)
        content = {
            "format": FORMAT,
            "version": 1,
            "num_classes": self.num_classes,
            "input_shape": self.input_shape,
            "model": asdict(self.config),
            "network": self.module.description(),
        }
        if (structure := structure_of(self.module)) is not None:
            content["structure"] = structure
        (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        inputs, read = "x)  # (B, ...)", ""
        if self.tokenizer is not None:
            inputs = "**inputs)"
            read = (
                f"inputs = model.tokenizer(texts, truncation=True, max_length={self._max_length()}, padding=True,\n"
                "    padding_side='right', return_tensors='pt', return_token_type_ids=False)\n"
            )
        return (
            "from clkit.models import load_classifier\n"
            f"model = load_classifier({str(directory)!r})\n"
            f"{read}logits = model.module({inputs}\n"
        )


def load_classifier(directory: Path) -> Classifier:
    """See ``clkit.models.load_classifier``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    from clkit.models.expandable import restructure

    try:
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if content.get("format") != FORMAT:
            raise ModelError(f"{directory} was not written by a clkit classifier's export.")
        saved = content["model"]
        config = ModelConfig(**{**saved, "lora": LoraConfig(**saved["lora"])})
        shape = content["input_shape"]
        model = _rebuild(directory, config, content["num_classes"], None if shape is None else tuple(shape))
        if network := content.get("network"):
            model.module = STRATEGIES.get(network["strategy"]).rebuild(model.module, network)
        if "structure" in content:
            restructure(model.module, content["structure"])
        load_model(model.module, directory / "model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{directory} can't be loaded as a classifier: {type(error).__name__}: {reason}") from error
    model.module.eval()
    return model


def _rebuild(directory: Path, config: ModelConfig, num_classes: int, input_shape: tuple[int, ...] | None) -> Classifier:
    """The classifier with weights that are about to be replaced."""
    from clkit.models.loading import load_tokenizer, prepare
    from clkit.models.resolve import architectures

    generator = torch.Generator().manual_seed(0)
    provenance = {"origin": f"directory:{directory.resolve()}"}
    if not (directory / "encoder").is_dir():
        with seeded(generator):
            backbone = architectures.get(config.name)(config, input_shape, generator)
        net = ClassifierNet(backbone, num_classes, generator, config.freeze_backbone)
        return Classifier(config, net, provenance, input_shape=input_shape)
    import transformers

    auto: Any = transformers.AutoModel

    with seeded(generator), routed():
        module = auto.from_config(transformers.AutoConfig.from_pretrained(directory / "encoder"))
    module = prepare(module, config, generator, None, config.name)
    if input_shape is not None:
        encoder = VisionEncoder(module, config.pooling, read_preprocessor(directory / "encoder"))
        net = ClassifierNet(encoder, num_classes, generator, config.freeze_backbone)
        return Classifier(config, net, provenance, input_shape=input_shape)
    net = ClassifierNet(TextEncoder(module, config.pooling), num_classes, generator, config.freeze_backbone)
    return Classifier(config, net, provenance, tokenizer=load_tokenizer(directory / "encoder", config.name))
