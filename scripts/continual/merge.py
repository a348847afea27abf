"""Average the weights of several checkpoints of one model, or of several LoRA adapters.

hf-moe-cpt merge --checkpoints run/checkpoint-800 run/checkpoint-900 run/checkpoint-1000 --output_dir merged \\
    --held_out german=held/german.txt english=held/english.jsonl

The mean of checkpoints saved at a constant rate stands for having let the rate decay over them (arXiv 2507.17634); a
run that starts from it warms up again. With --held_out a table says what the whole is beside its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.hf_argparser import HfArg

from hf_moe_cpt.arguments import parse_arguments
from hf_moe_cpt.cli import run_script
from hf_moe_cpt.data.text import load_text_dataset
from hf_moe_cpt.hub.checkpoint_io import decay_weights, merge
from hf_moe_cpt.reading import read_model, read_tokenizer
from hf_moe_cpt.reports import aligned
from hf_moe_cpt.trainers.cpt.cpt_config import CPTConfig
from hf_moe_cpt.trainers.cpt.cpt_data import Source
from hf_moe_cpt.trainers.cpt.cpt_trainer import CPTTrainer


@dataclass
class MergeArguments:
    """What is merged, and how it is judged"""

    checkpoints: list[str] = HfArg(help="Folders or Hub ids of one model, oldest first, or folders of adapters.")
    output_dir: str = HfArg(help="A new or empty folder.")
    weights: list[float] | None = HfArg(default=None, help="One for each, in any unit; unset: what --decay says.")
    decay: str = HfArg(
        default="linear",
        metadata={"choices": ["linear", "one_minus_sqrt"]},
        help="The decay of the rate that the mean stands for; linear: all weights the same.",
    )
    held_out: list[str] | None = HfArg(default=None, help="Text to judge all of them on, each NAME=PATH.")
    text_column: str = HfArg(default="text", help="Column of that text.")
    max_length: int = HfArg(default=2048, metadata={"range": "[2, inf)"}, help="Tokens of a block of it.")
    per_device_eval_batch_size: int = HfArg(default=4, metadata={"range": "[1, inf)"}, help="Blocks at a time.")
    tokenizer_name_or_path: str | None = HfArg(default=None, help="Tokenizer, if not that of the last checkpoint.")
    use_cpu: bool = HfArg(default=False, help="Judge on the CPU.")


ARGUMENTS = (MergeArguments,)


def main(argv: Sequence[str] | None = None) -> None:
    """Merge, and judge where text is named."""
    (args,) = parse_arguments(ARGUMENTS, argv, program="hf-moe-cpt merge", description=__doc__)
    sources = [Source.of(f"{given}:held_out") for given in args.held_out or ()]
    held_out = {source.name: load_text_dataset(source.path, text_column=args.text_column) for source in sources}
    weights = args.weights or decay_weights(len(args.checkpoints), args.decay)
    folder = merge(args.checkpoints, args.output_dir, weights)
    print(f"{folder}: the mean of {len(args.checkpoints)} with the weights {', '.join(f'{w:.3g}' for w in weights)}")
    if held_out:
        rows = [("held-out loss, nats per token", *held_out)]
        for name in (*args.checkpoints, str(folder)):
            losses = _losses(name, args, held_out)
            rows.append((name, *(f"{losses[f'eval_{text}_loss']:.4f}" for text in held_out)))
        print(*aligned(rows), sep="\n")


def _losses(name: str, args: MergeArguments, held_out: dict) -> dict[str, float]:
    tokenizer = read_tokenizer(args.tokenizer_name_or_path or args.checkpoints[-1])
    shown = {
        name: getattr(args, name) for name in ("max_length", "per_device_eval_batch_size", "text_column", "use_cpu")
    }
    with TemporaryDirectory() as folder:
        quiet = {"report_to": "none", "disable_tqdm": True, "starting_phase": "scratch"}  # it is not trained
        settings = CPTConfig(output_dir=folder, max_steps=1, **quiet, **shown)
        model = read_model(AutoModelForCausalLM, name)
        any_text = next(iter(held_out.values()))
        trainer = CPTTrainer(model, settings, any_text, eval_dataset=held_out, processing_class=tokenizer)
        trainer.pop_callback(PrinterCallback)
        return trainer.evaluate()


if __name__ == "__main__":
    run_script(main)
