"""What is run: tasks, ways to train, learning rates, seeds, and the open questions. Each setting is written here once.
"""

from dataclasses import dataclass, replace
from pathlib import Path

STEPS = 25
SFT_RATIO = 6
"""Steps of SFT that take the processor time of one EBFT step: 0.77 s / 0.12 s, measured before the runs."""
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
"""Tried on CHOICE_SEED for each way to train, except those that take the rate of another way."""
CHOICE_SEED = 101
SEEDS = (1, 2, 3, 4, 5)
QUESTION_SEEDS = (1, 2, 3)
"""Seeds of the open questions."""
COLD = ("SFT", "RLVR", "EBFT γ = 0.1", "τ = 0.6")
"""Ways whose answers on QUESTION_SEEDS of `code` are also sampled at temperature 0.6."""
START_STEPS = 800
SAMPLES = 4
"""Sampled answers of each question."""
ASKED = 100
"""Held-out questions that are answered."""
ROWS = 100
"""Held-out rows for cross entropy and CFM."""
LONGEST = 40
"""Tokens of an answer. A right one has fewer."""
SEQ_LENGTH = 128
ASKING = ("code", "dates")
"""Tasks whose texts are questions and answers."""
TASKS = (*ASKING, "text")

START = ("--training-mode", "sft", "--train-iters", START_STEPS, "--num-layers", 4, "--hidden-size", 64,
         "--num-attention-heads", 4, "--init-method-std", 0.05, "--global-batch-size", 16, "--micro-batch-size", 16,
         "--lr", 4e-3, "--lr-decay-style", "cosine", "--eval-interval", 0, "--save-interval", START_STEPS,
         "--log-interval", 50)
"""The start: about 0.24 M parameters."""
LAYOUT = ("--ebft-rollout-length", 8, "--ebft-context-length", 8, "--ebft-num-samples", 4)
"""Of EBFT, and of the held-out CFM of every way to train."""
TRAINING = (*LAYOUT, "--use-checkpoint-args", "--global-batch-size", 8, "--micro-batch-size", 8,
            "--lr-warmup-fraction", 0.1, "--eval-interval", 0, "--save-interval", 100000)
RLVR = ("--ebft-verifier", "exact", "--ebft-verifier-workers", 1, "--ebft-max-new-tokens", LONGEST,
        "--ebft-rollout-rows", 128, "--ebft-rlvr-num-samples", 8)
"""8 questions a step, with 8 completions each."""


def rows(task: str) -> tuple:
    """Flags of the rows of a task."""
    return ("--seq-length", SEQ_LENGTH, "--ebft-document-mask", *(["--ebft-answer-only"] if task in ASKING else []))


def tokenizer(folder: Path) -> tuple:
    """Flags of the tokenizer in a folder of data."""
    return "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "tokenizer.model")


@dataclass(frozen=True)
class Way:
    """A way to train."""

    name: str
    mode: str
    """sft, ebft or rlvr."""
    flags: tuple = ()
    steps: int = STEPS
    after: str = ""
    """The way whose model it continues, at that way's learning rate and the same seed. "": the start."""
    lr_of: str = ""
    """The way whose learning rate it takes. "": chosen for itself."""
    data: str = "train"
    tasks: tuple[str, ...] = TASKS
    encoder: str = ""
    """The way whose model, of the first seed, is the encoder. "": the start."""


def ebft(name: str, ce_coef: float, *flags, **fields) -> Way:
    """EBFT with the settings of the comparison, unless `flags` say otherwise: the last one counts."""
    settings = ("--ebft-ce-coef", ce_coef, "--ebft-stride", 4, "--ebft-temperature", 1.0, "--ebft-whitening", "none")
    return Way(name, "ebft", (*settings, *flags), **fields)


def rlvr(name: str, **fields) -> Way:
    return Way(name, "rlvr", RLVR, tasks=ASKING, **fields)


COMPARED = (
    Way("SFT", "sft"),
    Way("SFT, compute of EBFT", "sft", steps=STEPS * SFT_RATIO),
    rlvr("RLVR"),
    ebft("EBFT γ = 0", 0),
    ebft("EBFT γ = 0.03", 0.03, lr_of="EBFT γ = 0.1"),
    ebft("EBFT γ = 0.1", 0.1),
    ebft("EBFT γ = 1", 1),
    ebft("EBFT γ = 0.1 after SFT", 0.1, after="SFT", lr_of="EBFT γ = 0.1"))
"""The ways of the main table."""
LIKE = dict(lr_of="EBFT γ = 0.1", tasks=("code",))
QUESTIONS = {
    "temperature of sampling": (
        ebft("τ = 0.6", 0.1, "--ebft-temperature", 0.6, **LIKE),),
    "rollouts of a block": tuple(ebft(f"n = {n}", 0.1, "--ebft-num-samples", n, **LIKE) for n in (2, 8, 16)),
    "whitening": (
        ebft("whitening paper", 0.1, "--ebft-whitening", "paper", **LIKE),
        ebft("whitening released", 0.1, "--ebft-whitening", "released", **LIKE)),
    "stride": (ebft("s = 8", 0.1, "--ebft-stride", 8, **LIKE),),
    "layers of the feature": tuple(
        ebft(f"layer {depth:g} L alone", 0.1, "--ebft-feature-layers", depth, **LIKE) for depth in (0.25, 0.5, 0.75)),
    "encoder": (ebft("encoder: SFT, compute of EBFT", 0.1, encoder="SFT, compute of EBFT", **LIKE),),
    "limited data": (
        replace(COMPARED[0], name="SFT, 150 questions, 60 steps", lr_of="SFT", data="few", steps=60, tasks=("code",)),
        ebft("EBFT γ = 0, 150 questions, 60 steps", 0, data="few", steps=60, **(LIKE | {"lr_of": "EBFT γ = 0"})),
        ebft("EBFT γ = 0.1, 150 questions, 60 steps", 0.1, data="few", steps=60, **LIKE))}
"""The open questions, each with the ways that differ from EBFT γ = 0.1 in one setting."""


@dataclass(frozen=True)
class Run:
    """A way at a learning rate, with a seed: of the order of the rows, and of all random numbers."""

    task: str
    way: Way
    lr: float
    seed: int

    def folder(self, output: Path) -> Path:
        name = self.way.name.replace(" ", "-").replace(",", "").replace("=", "").replace("--", "-").replace(":", "")
        return output / self.task / "runs" / f"{name}-lr{self.lr:g}-seed{self.seed}"
