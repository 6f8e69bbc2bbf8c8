"""The five sizes of Gemma 3, and the check that a file really holds the size it claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemwright.errors import InputError

BOS, EOS, PAD, UNK = 2, 1, 0, 3
START_OF_TURN, END_OF_TURN = 105, 106
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class VisionSpec:
    """The SigLIP tower shared by 4B, 12B and 27B."""

    layers: int = 27
    hidden: int = 1152
    heads: int = 16
    mlp: int = 4304
    patch: int = 14
    image: int = 896
    image_tokens: int = 256


@dataclass(frozen=True)
class ModelSpec:
    """The shape of one decoder.

    Source: Gemma 3 technical report (arXiv 2503.19786), table 1, and the `config.json` published with each size.
    """

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    context: int
    query_scalar: int
    rope_global_scale: float = 1.0
    rope_global_base: float = 1_000_000.0
    rope_local_base: float = 10_000.0
    norm_eps: float = 1e-6
    global_every: int = 6
    vocab: int = 262_144
    vision: VisionSpec | None = None

    def is_global(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) attends to the whole context; the others see `window` tokens."""
        return (layer + 1) % self.global_every == 0

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) = (output, input) features of each linear layer of a block, by our names."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.mlp, self.hidden),
            "up": (self.mlp, self.hidden),
            "down": (self.hidden, self.mlp),
        }

    @property
    def norm_shapes(self) -> dict[str, int]:
        """Length of each norm weight of a block, by our names."""
        wide = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
        return dict.fromkeys(wide, self.hidden) | dict.fromkeys(("q_norm", "k_norm"), self.head_dim)


def _sizes() -> dict[str, ModelSpec]:
    vision = VisionSpec()
    small = ModelSpec("270m", 18, 640, 2048, 4, 1, 256, window=512, context=32_768, query_scalar=256)
    large = replace(small, window=1024, context=131_072, rope_global_scale=8.0, vision=vision)
    return {
        "270m": small,
        "1b": replace(small, name="1b", layers=26, hidden=1152, mlp=6912),
        "4b": replace(large, name="4b", layers=34, hidden=2560, mlp=10_240, heads=8, kv_heads=4),
        "12b": replace(large, name="12b", layers=48, hidden=3840, mlp=15_360, heads=16, kv_heads=8),
        "27b": replace(
            large,
            name="27b",
            layers=62,
            hidden=5376,
            mlp=21_504,
            heads=32,
            kv_heads=16,
            head_dim=128,
            query_scalar=168,
        ),
    }


SPECS: dict[str, ModelSpec] = _sizes()

# Rows of the embedding that files really carry: 262,144 text tokens, with the image soft token, or padded to 64.
VOCAB_ROWS = (262_144, 262_145, 262_208)

_GGUF_FIELDS = {
    "layers": "block_count",
    "hidden": "embedding_length",
    "mlp": "feed_forward_length",
    "heads": "attention.head_count",
    "kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "window": "attention.sliding_window",
    "context": "context_length",
    "rope_global_base": "rope.freq_base",
    "rope_global_scale": "rope.scaling.factor",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
_CONFIG_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "mlp": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "window": "sliding_window",
    "context": "max_position_embeddings",
    "query_scalar": "query_pre_attn_scalar",
    "norm_eps": "rms_norm_eps",
    "global_every": "sliding_window_pattern",
}
RANDOM_KEY = "gemwright.random"


def scalar(metadata: Mapping[str, Any], key: str) -> Any:
    """A single value of a GGUF's metadata, or None; a damaged file may hold a whole array in its place."""
    value = metadata.get(key)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return value if isinstance(value, str) else "a list"


def spec_from_gguf(metadata: Mapping[str, Any], where: object) -> ModelSpec:
    """The spec that a GGUF's metadata describes; `where` is named in errors.

    A file marked `gemwright.random` may have any shape; every other one must be exactly one of the five sizes.
    Raises InputError naming the architecture or the first field that differs.
    """
    arch = scalar(metadata, "general.architecture")
    if arch != "gemma3":
        raise InputError(
            f"architecture is {arch!r:.60}, not 'gemma3'",
            where=where,
            fix="Give a GGUF of Gemma 3 (see 'gemwright pull').",
        )
    said = {field: scalar(metadata, f"gemma3.{key}") for field, key in _GGUF_FIELDS.items()}
    if scalar(metadata, RANDOM_KEY) is True:
        said["query_scalar"] = scalar(metadata, "gemma3.attention.query_scalar")
        tokens = metadata.get("tokenizer.ggml.tokens")
        said["vocab"] = len(tokens) if isinstance(tokens, Sequence) else scalar(metadata, "gemma3.vocab_size")
        name = str(scalar(metadata, "general.name") or "random").removeprefix("Gemma 3 ")
        return _free_spec(said, " ".join(name.split())[:60], where)
    return _match(said, {field: f"gemma3.{key}" for field, key in _GGUF_FIELDS.items()}, where)


def spec_from_config(config: Mapping[str, Any], where: object) -> ModelSpec:
    """The spec that a Hugging Face `config.json` describes (text-only or with vision); errors as `spec_from_gguf`."""
    kind = config.get("model_type")
    if kind not in ("gemma3", "gemma3_text"):
        raise InputError(
            f"model_type is {kind!r:.60}, not 'gemma3' or 'gemma3_text'",
            where=where,
            fix="Give a Gemma 3 model folder.",
        )
    text = config.get("text_config", config)
    said = {field: text.get(key, text.get(f"_{key}")) for field, key in _CONFIG_FIELDS.items()}
    ropes = text.get("rope_parameters") or {}
    whole, local = ropes.get("full_attention", {}), ropes.get("sliding_attention", {})
    said["rope_global_base"] = whole.get("rope_theta", text.get("rope_theta"))
    said["rope_local_base"] = local.get("rope_theta", text.get("rope_local_base_freq"))
    said["rope_global_scale"] = whole.get("factor", (text.get("rope_scaling") or {}).get("factor"))
    if config.get(RANDOM_KEY) is True:
        return _free_spec(said | {"vocab": text.get("vocab_size")}, "random", where)
    return _match(said, _CONFIG_FIELDS, where)


def _match(said: Mapping[str, Any], names: Mapping[str, str], where: object) -> ModelSpec:
    """The one size whose layer count (or, failing that, width) `said` names, after comparing every stated field."""
    by_layers = [spec for spec in SPECS.values() if spec.layers == said["layers"]]
    by_width = [spec for spec in SPECS.values() if spec.hidden == said["hidden"]]
    if not by_layers and not by_width:
        sizes = ", ".join(f"{s.name} has {s.layers} x {s.hidden}" for s in SPECS.values())
        counts = " and ".join(f"{names[field]} = {said[field]!r:.60}" for field in ("layers", "hidden"))
        raise InputError(
            f"{counts} match no size of Gemma 3",
            where=where,
            fix=f"Known: {sizes}.",
        )
    spec = (by_layers or by_width)[0]
    wanted = asdict(spec)
    for field, value in said.items():
        if value is not None and not _same(value, wanted[field]):
            raise InputError(
                f"{names.get(field, field)} is {value!r:.60}, but Gemma 3 {spec.name} has {wanted[field]}",
                where=where,
                fix="The file is damaged or not the model it says it is; fetch it again.",
            )
    return spec


def _same(said: Any, wanted: Any) -> bool:
    if isinstance(said, bool) or not isinstance(said, (int, float)):
        return False
    return bool(abs(said - wanted) <= 1e-6 * abs(wanted))


def _free_spec(said: Mapping[str, Any], name: str, where: object) -> ModelSpec:
    """The spec of a file of random weights: any shape, as long as every number is a sensible one."""
    known = {field: value for field, value in said.items() if value is not None}
    needed = ("layers", "hidden", "mlp", "heads", "kv_heads", "head_dim", "window")
    if missing := [field for field in needed if field not in known]:
        raise InputError(f"metadata lacks {', '.join(missing)}", where=where, fix="Write the file again.")
    known = {"context": 32_768, "query_scalar": known["head_dim"]} | known
    for field, value in known.items():
        whole = isinstance(getattr(SPECS["270m"], field), int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not 0 < value < 1 << 24:
            raise InputError(f"{field} is {value!r:.60}", where=where, fix="Write the file again.")
    if known["heads"] % known["kv_heads"]:
        what = f"{known['heads']} heads cannot share {known['kv_heads']} kv_heads"
        raise InputError(what, where=where, fix="Write the file again.")
    # A GGUF keeps fp32: 1e-6 comes back as 9.99999997e-07.
    rounded: dict[str, Any] = {field: float(f"{v:.7g}") if isinstance(v, float) else v for field, v in known.items()}
    return ModelSpec(name=name, **rounded)
