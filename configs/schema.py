"""The schema of a run: seven sections and a seed, frozen, every unknown key an error.

Each field's docstring is its documentation: the loader quotes it when a value is wrong, and
`docs/configuration.md` is made from it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Auto = Literal["auto"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
RouteOn = Literal["last_user", "first_user", "conversation"]
Runtime = Literal["auto", "onnx", "torch"]
EngineArg = bool | int | float | str | list[str] | None

PACKAGED_EMBEDDER = "all-MiniLM-L6-v2"


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, docstrings kept as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class BundleConfig(Section):
    """Where the run's artefacts live."""

    path: str
    """Directory or fsspec URL of the bundle: what training publishes and serving reads."""
    work_dir: str | None = None
    """Directory or fsspec URL for shards, checkpoints and finished experts, which all nodes must
    reach; default: the bundle's path with `.work` added."""
    scratch_dir: str | None = None
    """Directory on each machine for logs and copies of what lies behind a URL; default: the
    working directory, or a directory in the user's cache where that is a URL."""

    @property
    def work(self) -> str:
        """The working directory or URL, resolved from `work_dir` or the bundle's own path."""
        return self.work_dir or f"{self.path.rstrip('/')}.work"

    @property
    def scratch(self) -> Path:
        """The local directory, resolved from `scratch_dir` or the working directory."""
        if self.scratch_dir is not None:
            return Path(self.scratch_dir)
        if "://" not in self.work:
            return Path(self.work)
        name = hashlib.sha256(self.work.encode()).hexdigest()[:16]
        return Path.home() / ".cache" / "introvert" / name


class BaseConfig(Section):
    """The frozen base model."""

    model: str
    """Directory or hub name of a causal language model that transformers and vLLM both know."""
    name: str | None = None
    """Model name under which the endpoint serves the base; default: the last part of `model`."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) to pin."""
    dtype: DType = "auto"
    """Weight type; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    trust_remote_code: bool = False
    """Run code that a hub repository ships; leave off unless you have read that code."""

    @property
    def served_name(self) -> str:
        """The name that addresses the base over HTTP."""
        return self.name or self.model.rstrip("/").rsplit("/", 1)[-1]


class DataConfig(Section):
    """The corpus: JSONL or Parquet paths (globs allowed), or hub data sets as `hub:NAME[:SPLIT]`.

    A row is plain text (`text_field`), a chat (`messages`) or a `prompt` with its `completion`.
    """

    train: list[str] = Field(min_length=1)
    """Documents to cluster and train on."""
    valid: list[str] = []
    """Held-out documents for calibration and the gate; empty: split off by `valid_share`."""
    test: list[str] = []
    """Held-out documents for `introvert evaluate`; empty: the validation documents serve."""
    text_field: str = "text"
    """Field that holds a plain document."""
    id_field: str = "id"
    """Field that names a document; rows without it are named FILE:LINE."""
    valid_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share of documents held out, by a hash of the text and the seed, where `valid` is empty."""
    max_bad_share: Share = 0.01
    """Share of unreadable rows above which the run stops."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Jaccard similarity of word 5-grams from which two documents count as duplicates; null: exact
    copies alone do."""


class RouterConfig(Section):
    """Text to cluster: embedder, clustering and abstention."""

    embedder: str = PACKAGED_EMBEDDER
    """sentence-transformers model by name or path; `all-MiniLM-L6-v2` is found offline."""
    clusters: PositiveInt = 8
    """Number of clusters before near-duplicates are merged, so of experts at the most."""
    algorithm: Literal["spherical", "balanced"] = "spherical"
    """`spherical` k-means, or `balanced` with cluster sizes bounded by `balance_slack`."""
    balance_slack: Annotated[float, Field(ge=1)] = 1.2
    """Largest cluster over the mean size, with `algorithm: balanced`."""
    iterations: PositiveInt = 25
    """k-means iterations."""
    restarts: PositiveInt = 3
    """k-means restarts; the best objective is kept."""
    merge_cosine: Cosine = 0.98
    """Clusters whose centroids have at least this cosine become one."""
    max_fit_documents: PositiveInt = 1_000_000
    """Documents that the centroids are fitted on, a seeded sample of more."""
    abstain_quantile: Share = 0.01
    """Share of held-out text that the calibrated threshold sends to the base."""
    top_k: PositiveInt = 3
    """Candidates reported with each route."""
    route_on: RouteOn = "last_user"
    """Part of a chat that is embedded."""
    sticky: bool = True
    """Keep a conversation on the expert of its first user turn unless another wins clearly."""
    sticky_margin: NonNegativeFloat = 0.05
    """Cosine by which another expert must win to take over a sticky conversation."""
    max_tokens: PositiveInt = 128
    """Tokens of a text that are embedded; time grows with them, and a topic shows early."""
    batch_size: PositiveInt = 64
    """Texts embedded at once."""
    student: bool = True
    """Distil a fast student of the embedder at fit time, which answers where it is sure."""
    encoder_layers: Annotated[int, Field(ge=0)] = 2
    """Layers of the embedder that a second student keeps, which is asked where the first is not
    sure; 0: there is none. Fitting on a CPU takes minutes longer with it."""
    agreement: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the students' answers that must be the embedder's own: sets how sure is sure."""
    quantized_agreement: Annotated[float, Field(gt=0, le=1)] | None = 0.995
    """Share of texts that must be routed as in 32 bits for ONNX Runtime to compute the embedder in
    8 while serving, in a third of the time. Decisions that are closer than fitting found safe for
    that are made again in 32. null: always in 32."""
    runtime: Runtime = "auto"
    """What computes the embedder while serving; `auto`: ONNX Runtime on a CPU where its vectors
    agree with torch's, else torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device while fitting; `auto`: a GPU where there is one. Serving takes one for `cuda` only."""


class ExpertsConfig(Section):
    """How one expert is trained; the same for all, each on its own cluster."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """LoRA rank."""
    alpha: PositiveFloat = 16
    """LoRA alpha: the update is scaled by alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: names, or every linear layer but the output head."""
    sequence_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens of a packed row."""
    batch_rows: PositiveInt = 8
    """Packed rows in one forward and backward pass."""
    gradient_accumulation: PositiveInt = 1
    """Passes summed into one optimiser step."""
    epochs: PositiveFloat | None = None
    """Passes over the cluster; set this or `tokens_per_expert`, not both; default: 1."""
    tokens_per_expert: PositiveInt | None = None
    """Tokens each expert sees, whatever the size of its cluster."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate of AdamW."""
    warmup_share: Share = 0.05
    """Share of the steps spent warming up; a cosine to zero follows."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    init: Literal["scratch", "shared"] = "scratch"
    """What an expert starts from: an adapter that changes nothing, or one general adapter that is
    first trained over all clusters within the same total of tokens."""
    shared_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of all tokens that `init: shared` spends on the general adapter."""
    fused: PositiveInt | Auto = "auto"
    """Experts trained together over one pass of the base, each on rows of its own; `auto`: as many
    as make a pass large enough for the device."""
    evaluations: PositiveInt = 4
    """Times that an expert's held-out loss is measured while it trains, the last at the end."""
    patience: Count = 2
    """Measurements in a row without a better held-out loss after which training stops; 0: never.
    The values of the best measurement are kept."""
    checkpoint_s: NonNegativeFloat = 60
    """Seconds between two checkpoints of running experts; 0: none."""
    retrain_growth: NonNegativeFloat = 0.05
    """Share by which `train --add-data` must grow a cluster for its expert to be trained again."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the training, over values kept in float32; `auto`: bfloat16 on devices that
    have instructions for it. A base in half precision is always trained on in bfloat16."""
    actors: PositiveInt | Auto = "auto"
    """Training actors at the most, fewer where nodes are missing; `auto`: one per GPU of the
    cluster, or per `cpus_per_actor` cores, as nodes come and go."""
    gpus_per_actor: NonNegativeFloat | Auto = "auto"
    """GPUs held by an actor; `auto`: 1 where the cluster has GPUs, else 0."""
    cpus_per_actor: PositiveInt = 1
    """Cores held by an actor, and pinned to it where there is no GPU."""
    max_retries: Count = 2
    """Times a failed expert is tried again before it is reported and left out."""
    gate_margin: float = 0.0
    """Nats per token by which an expert must beat the base on held-out text to be admitted."""
    heldout_tokens: PositiveInt = 65_536
    """Held-out tokens, at the most, on which a cluster's losses are measured."""
    baseline_learning_rates: list[PositiveFloat] = Field(default=[1e-4, 2e-4, 4e-4], min_length=1)
    """Grid for the single equal-compute LoRA that `introvert evaluate` compares with."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.epochs is not None and self.tokens_per_expert is not None:
            raise ValueError("set 'epochs' or 'tokens_per_expert', not both")
        return self


class ServingConfig(Section):
    """Workers: one vLLM engine each, pinned to its GPUs or core set."""

    workers: PositiveInt | Auto = "auto"
    """Workers; `auto`: as many as the cluster's GPUs (or cores, on a CPU-only cluster) hold."""
    gpus_per_worker: Count | Auto = "auto"
    """GPUs of a worker, its tensor-parallel size; `auto`: 1 where there are GPUs, else 0."""
    cpus_per_worker: PositiveInt = 1
    """Cores of a worker; on a CPU-only cluster its engine is pinned to them."""
    slots: PositiveInt | Auto = "auto"
    """Experts that an engine is asked at once; it has one LoRA place more (`--max-loras`), for the
    next of those that wait or for one being verified. `auto`: as many as are placed on the worker
    and up to 8 more, so that those of a new bundle answer beside the old while all are busy."""
    host_slots: PositiveInt | Auto = "auto"
    """Adapters that an engine keeps in host memory (`--max-cpu-loras`), never fewer than it has
    LoRA places; `auto`: twice as many as are placed on the worker, so that a new version fits
    beside the old."""
    max_rank: Annotated[int, Field(ge=1, le=512)] | Auto = "auto"
    """LoRA rank that engines are sized for; `auto`: the largest of the bundle at the start. A
    bundle of higher rank cannot be published to running engines."""
    max_replicas: PositiveInt = 4
    """Homes of one expert at the most; busy experts get more than one."""
    rebalance_s: NonNegativeFloat = 30.0
    """Seconds between two looks at what experts are asked for, to place them anew; 0: never."""
    rebalance_gain: Share = 0.1
    """Share by which the busiest worker's load must fall for experts to be moved."""
    move_after_s: NonNegativeFloat = 2.0
    """Seconds that a worker is down before its experts get homes on others until it is back."""
    drain_timeout_s: NonNegativeFloat = 60.0
    """Seconds that requests on a replaced bundle get to finish before its experts are unloaded."""
    max_model_len: PositiveInt | None = None
    """Context length; default: the base's own."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that the engine may take."""
    cpu_kv_cache_gib: PositiveInt = 1
    """KV cache of an engine on a CPU, GiB."""
    engine_args: dict[str, EngineArg] = {}
    """More arguments of vLLM's API server, by flag name without dashes; true: a bare flag."""
    engine_env: dict[str, str] = {}
    """Environment variables of the engine process."""
    startup_timeout_s: PositiveFloat = 600
    """Seconds an engine may take to answer its first health check."""
    health_interval_s: PositiveFloat = 1.0
    """Seconds between two looks at an engine."""
    hang_timeout_s: PositiveFloat = 30.0
    """Seconds without an answer to health checks after which an engine is killed and restarted."""
    max_failed_starts: PositiveInt = 3
    """Failed starts in a row after which a worker is reported as failed."""
    verify_fingerprints: bool = True
    """Compare a loaded expert's log-probabilities with its card's; a mismatch is refused."""
    fingerprint_tolerance: PositiveFloat = 0.05
    """Largest mean absolute difference of log-probabilities, in nats, that passes."""


class GatewayConfig(Section):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    processes: PositiveInt = 1
    """Gateway processes that share the port, the routing table and the metrics."""
    keys_file: str | None = None
    """YAML file of API keys (`introvert keys` makes entries); null: anybody may ask."""
    admin_key_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the key for `/admin/*`; null: a new key at each start, kept in a file that only
    its owner can read, and `/admin/status` open to all."""
    max_body_bytes: PositiveInt = 8 * 1024 * 1024
    """Largest request body."""
    max_prompt_bytes: PositiveInt = 4 * 1024 * 1024
    """Largest prompt: what of a body routing and the engine would read."""
    max_header_bytes: PositiveInt = 32 * 1024
    """Largest total of a request's headers."""
    client_timeout_s: PositiveFloat = 30.0
    """Seconds a client may take to send its request, or to take the next part of its answer."""
    connect_timeout_s: PositiveFloat = 2.0
    """Seconds to reach a worker before another replica is tried."""
    request_timeout_s: PositiveFloat = 600.0
    """Seconds between two reads from a worker before the request is given up."""
    deadline_s: PositiveFloat | None = None
    """Seconds a whole request may take, waiting included; null: no limit. A client may ask for
    less with the header `x-introvert-deadline-ms`."""
    worker_concurrency: PositiveInt = 256
    """Requests in flight on one worker at the most; more wait in the gateway."""
    max_queue: Count = 1024
    """Requests that wait for one worker at the most; more are refused with 429."""
    queue_timeout_s: PositiveFloat = 30.0
    """Seconds a request waits for a worker, for one to hold its expert again, or for a router that
    is being loaded, before a 503."""
    group_wait_s: PositiveFloat = 1.0
    """Where a worker holds more experts than slots: longest that requests for one expert wait
    while those for the experts in the slots are served."""
    spill_wait_s: PositiveFloat | None = 5.0
    """Expected wait, seconds, above which a routed request goes to the runner-up expert or to the
    base instead, and says so; null: never."""
    affinity_slack: Count = 4
    """Requests by which a conversation's usual replica may be busier than another and still get
    the conversation, for the sake of its prefix cache."""
    breaker_failures: PositiveInt = 3
    """Failures of a worker in a row after which it is left alone for a while."""
    breaker_pause_s: PositiveFloat = 1.0
    """Seconds it is left alone, doubled with each failed attempt after that, up to 30."""
    retry_after_s: PositiveInt = 5
    """`Retry-After` of a 503."""
    batch_concurrency: PositiveInt = 32
    """Requests in flight on one worker, of each gateway process, from which requests of batches
    are put off; live ones count and are never put off for them."""
    batches_at_once: PositiveInt = 4
    """Batches that are worked on at the same time; others wait, the oldest first."""
    max_file_bytes: PositiveInt = 1024 * 1024 * 1024
    """Largest file that `/v1/files` takes."""
    drain_timeout_s: NonNegativeFloat = 10.0
    """Seconds that running requests get to finish at shutdown."""
    max_connections: PositiveInt = 4096
    """Upstream connections, over all workers."""
    access_log: bool = False
    """Log every request as a line of JSON, not only what goes wrong."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector (OTLP over HTTP) that gets traces; null: none are made."""
    trace_share: Share = 0.01
    """Share of the requests that are traced, besides those whose caller traces them."""


class RunConfig(Section):
    """One run, from corpus to endpoint."""

    seed: Count = 0
    """Seed of every random choice: sampling, k-means, shuffling, adapters' initial weights."""
    bundle: BundleConfig
    base: BaseConfig
    data: DataConfig
    router: RouterConfig = RouterConfig()
    experts: ExpertsConfig = ExpertsConfig()
    serving: ServingConfig = ServingConfig()
    gateway: GatewayConfig = GatewayConfig()
