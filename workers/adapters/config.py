"""PEFT's adapter_config.json, checked: everything in it is applied, neutral or refused with a reason.

Which linears an adapter changes is read off its tensors (format.py); the config says how much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lorafleet.workers.adapters.folder import AdapterFolder
from lorafleet.workers.adapters.foreign import describe, foreign_config
from lorafleet.workers.adapters.patterns import PatternError, first_matches
from lorafleet.workers.errors import AdapterRefusedError, cut, quoted
from lorafleet.workers.found_file import json_object

_T = TypeVar("_T", int, float)

CONFIG_FILE = "adapter_config.json"
_MAX_BYTES = 1 << 20
_MAX_NAMES = 1024  # of `modules_to_save` and the like
_MAX_RANK = 1 << 20
_MAX_TOKEN_ID = (1 << 31) - 1

# Fields of PEFT's LoraConfig (and of those who write it) that say how the adapter was made or which modules it touches
# (its tensors tell that), and change nothing of what it computes.
_NEUTRAL = frozenset(
    [
        "_from_model_config",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "monteclora_config",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "transformers_version",
        "velora_config",
    ]
)
_APPLIED = frozenset(
    [
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    ]
)
# Initialisations that rewrite the base weights, on which the adapter then relies.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST = 3.4e38  # float32, in which scalings are computed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """What a config says about the weights. A module is named as in the base model, `model.layers.0.mlp.up_proj`."""

    base_model_name: str | None
    lora_rank: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool = False  # Liu et al. 2024
    lora_bias: bool = False  # B has a bias
    trains_bias: bool = False  # the base model's biases, where it has some, are the adapter's own
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)  # of modules that a pattern names
    alphas: Mapping[str, float] = field(default_factory=dict, hash=False)
    modules_to_save: tuple[str, ...] = ()  # ends of names of modules whose whole weights are the adapter's own
    trainable_tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()  # by ends of names: the ids whose rows are its own
    ensure_weight_tying: bool = False  # what is the embedding's own is the head's too, if the base model ties them
    # Activated LoRA (Greenewald et al. 2025): it is applied from where these last begin in a prompt. Empty: everywhere.
    invocation_tokens: tuple[int, ...] = ()

    @property
    def other_base(self) -> str:
        """For a message about what does not fit the base model."""
        named = f" {CONFIG_FILE} names {quoted(self.base_model_name)}." if self.base_model_name else ""
        return f"Was it trained for another base model?{named}"

    def saves(self, module: str) -> bool:
        """Whether the module's whole weight is the adapter's own."""
        return any(module.endswith(end) for end in self.modules_to_save)

    def rank(self, module: str) -> int:
        """The first pattern that names the module decides, as in PEFT."""
        return self.ranks.get(module, self.lora_rank)

    def scaling(self, module: str) -> float:
        """What B·A·x is multiplied with: alpha / r, or alpha / √r with rsLoRA (Kalajdzievski 2023)."""
        alpha = self.alphas.get(module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


def read_config(folder: AdapterFolder, modules: Sequence[str]) -> AdapterConfig:
    """modules: of the base model, which patterns may name.

    Raises `AdapterRefusedError`: no adapter, no LoRA, or something that is not applied.
    """
    data = folder.read(CONFIG_FILE, _MAX_BYTES)
    if data is None:
        what, reason = describe(folder.path, folder.names())
        raise AdapterRefusedError(f"{folder.shown} {what}", reason=reason)
    check = _Checks(folder)
    try:
        fields = json_object(data)
    except ValueError as error:
        raise check.refused(f"{error}.") from error
    if fields.get("peft_type") != "LORA":
        foreign = foreign_config(fields)
        if foreign is not None:
            raise check.refused(foreign, "not_peft")
        raise check.refused(
            f"has peft_type {quoted(fields.get('peft_type'))}; only LORA is served.", "unsupported_peft_type"
        )
    check.features(fields)
    name = fields.get("base_model_name_or_path")
    return AdapterConfig(
        base_model_name=cut(name) if isinstance(name, str) else None,
        lora_rank=check.rank("r", fields.get("r")),
        lora_alpha=check.alpha("lora_alpha", fields.get("lora_alpha")),
        use_rslora=check.switch(fields, "use_rslora"),
        use_dora=check.switch(fields, "use_dora"),
        lora_bias=check.switch(fields, "lora_bias"),
        trains_bias=check.trains_bias(fields.get("bias", "none")),
        ranks=check.by_module(fields, "rank_pattern", modules, check.rank),
        alphas=check.by_module(fields, "alpha_pattern", modules, check.alpha),
        modules_to_save=check.names("modules_to_save", fields.get("modules_to_save") or []),
        trainable_tokens=check.trainable_tokens(fields.get("trainable_token_indices") or {}),
        ensure_weight_tying=check.switch(fields, "ensure_weight_tying"),
        invocation_tokens=check.token_ids("alora_invocation_tokens", fields.get("alora_invocation_tokens") or []),
    )


@dataclass(frozen=True, slots=True)
class _Checks:
    """Of the fields of one file: what they mean. All raise `AdapterRefusedError`."""

    folder: AdapterFolder

    def refused(self, what: str, reason: str = "bad_config") -> AdapterRefusedError:
        return self.folder.refused(CONFIG_FILE, what, reason)

    def features(self, fields: Mapping[str, Any]) -> None:
        init = fields.get("init_lora_weights", True)
        if isinstance(init, str) and init[:200].lower().startswith(_BASE_CHANGING_INITS):
            raise self.refused(
                f"has init_lora_weights {quoted(init)}, which changes the base weights. Convert it to a plain LoRA "
                "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
                "unsupported_feature",
            )
        for name, value in fields.items():
            if name in _NEUTRAL or name in _APPLIED or not value:
                continue
            raise self.refused(
                f"asks for {cut(name)}={quoted(value)}, which is not supported (yet).", "unsupported_feature"
            )

    def switch(self, fields: Mapping[str, Any], name: str) -> bool:
        value = fields.get(name)
        if value not in (None, True, False):
            raise self.refused(f"has {name}={quoted(value)}; it must be true or false.")
        return bool(value)

    def trains_bias(self, value: Any) -> bool:
        if value not in ("none", "all", "lora_only"):
            raise self.refused(f"has bias={quoted(value)}; it must be none, all or lora_only.")
        return bool(value != "none")

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 1 <= value <= _MAX_RANK:
            raise self.refused(f"has {name}={quoted(value)}; it must be a positive integer.")
        return value

    def alpha(self, name: str, value: Any) -> float:
        # JSON as Python reads it has NaN, Infinity and integers beyond any float.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
            raise self.refused(f"has {name}={quoted(value)}; it must be a finite number (float32).")
        return float(value)

    def by_module(
        self, fields: Mapping[str, Any], name: str, modules: Sequence[str], check: Callable[[str, Any], _T]
    ) -> dict[str, _T]:
        """The first pattern that names a module decides, as in PEFT."""
        pattern = fields.get(name) or {}
        if not isinstance(pattern, dict):
            raise self.refused(f"has {name}={quoted(pattern)}; it must be an object of module names.")
        values = [check(f"{name}[{quoted(key)}]", value) for key, value in pattern.items()]
        try:
            first = first_matches(list(pattern), modules)
        except PatternError as error:
            raise self.refused(f"has {name} {error}.") from error
        return {module: values[number] for module, number in first.items()}

    def names(self, name: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            raise self.refused(f"has {name}={quoted(value)}; it must be a list of module names.")
        if len(value) > _MAX_NAMES:
            raise self.refused(f"has {len(value):,} {name}; the limit is {_MAX_NAMES:,}.")
        return tuple(dict.fromkeys(value))

    def token_ids(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(token_id) is int and token_id >= 0 for token_id in value):
            raise self.refused(f"has {name}={quoted(value)}; it must be a list of token ids.")
        if value and max(value) > _MAX_TOKEN_ID:
            raise self.refused(f"has {name} with {quoted(max(value))}; no token has that id.")
        return tuple(value)

    def trainable_tokens(self, value: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """A list alone is of the embedding."""
        by_module = {"embed_tokens": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            raise self.refused(f"has trainable_token_indices={quoted(value)}; it must be a list or an object.")
        if len(by_module) > _MAX_NAMES:
            raise self.refused(
                f"has trainable_token_indices of {len(by_module):,} modules; the limit is {_MAX_NAMES:,}."
            )
        own = {}
        for module, ids in by_module.items():
            name = f"trainable_token_indices of {quoted(module)}"
            usable = isinstance(ids, list) and all(type(token_id) is int and token_id >= 0 for token_id in ids)
            if not module or not usable or len(set(ids)) < len(ids):
                raise self.refused(
                    f"has trainable_token_indices={quoted(ids)} for {quoted(module)}; they must be different token ids."
                )
            own[module] = self.token_ids(name, ids)
        return tuple((module, ids) for module, ids in own.items() if ids)
