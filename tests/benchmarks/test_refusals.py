"""What the benchmarks refuse: one line, before anything is written."""

import pytest

from hf_moe_cpt.scripts.benchmarks import data, experts, jobs, routing, step, trainers


# program, words, message
REFUSED = (
    (data, "--parts magic", "--parts 'magic' is unknown: choose from document, tokens, step"),
    (data, "--parts step --rounds 0", "--rounds 0 must be at least 1"),
    (data, "--parts tokens", "--text and --tokenizer are missing: name both, or --parts step"),
    (experts, "--peers magic", "--peers 'magic' is unknown: choose from dense, hf_moe_cpt"),
    (experts, "--shapes giant", "--shapes 'giant' is unknown: choose from granular, switch"),
    (experts, "--dtype int8", "--dtype 'int8' is unknown: choose from bfloat16"),
    (experts, "--activation step", "--activation 'step' is unknown"),
    (experts, "--shape a=1,2,3,4", "--shape 'a=1,2,3,4' must read name=T,H,I,E,K with five positive"),
    (experts, "--shape 1,2,3,4,5", "must read name=T,H,I,E,K"),
    (experts, "--shape a=1,8,8,2,3", "a token cannot choose K=3 of E=2 experts"),
    (experts, "--rounds 0", "--rounds 0 must be at least 1"),
    (experts, "--device tpu", "--device 'tpu' is unknown: choose one of auto, cpu, cuda"),
    (step, "--runs gpt-9", "--runs 'gpt-9': no model 'gpt-9'; choose from dense-570m"),
    (step, "--runs dense-tiny:turbo", "'turbo' is neither a switch .fused, plain, compile, checkpoint"),
    (step, "--experts_implementation magic", "--experts_implementation: 'magic' is neither"),
    (step, "--runs dense-tiny dense-tiny", "names a run twice"),
    (step, "--steps 0", "--steps 0 must be at least 1"),
    (step, "--seq_length 1", "--seq_length 1 must be at least 2"),
    (step, "--weights int4", "--weights 'int4' is unknown: choose from float32, bfloat16"),
    (step, "--device tpu", "--device 'tpu' is unknown"),
    (trainers, "--baselines orpo", "--baselines 'orpo' is unknown: choose from rainbowpo, sigmoid"),
    (trainers, "--trainer grpo", "--trainer 'grpo' is unknown: choose from rainbowpo, surgery"),
    (trainers, "--trainer surgery --baselines sigmoid", "--baselines 'sigmoid' is unknown: choose from by-term"),
    (trainers, "--trainer surgery --preset bold", "--preset 'bold' is unknown: choose from paper, safe"),
    (trainers, "--preset safe", "--preset safe goes with --trainer surgery, not rainbowpo"),
    (trainers, "--trainer surgery --lora_rank 2", "--lora_rank 2 goes with --trainer rainbowpo, not surgery"),
    (trainers, "--dtype int4", "--dtype 'int4' is unknown: choose from float32, bfloat16, mixed"),
    (trainers, "--batch_size 0", "--batch_size 0 must be at least 1"),
    (trainers, "--length 4", "--length 4 must be at least 8"),
    (trainers, "--model gpt-9", "--model 'gpt-9' is neither a folder with a config.json nor a Hub id"),
    (trainers, "--overrides {", "--overrides '{' is no JSON"),
    (trainers, ["--overrides", '{"layers": 2}'], "llama-tiny has no field 'layers'"),
    (trainers, "--overrides [2]", "--overrides '.2.' must be a JSON object"),
    (trainers, "--model a/b --overrides {}", "--overrides goes with the names dense-570m, .*, not with 'a/b'"),
    (trainers, "--device tpu", "--device 'tpu' is unknown"),
    (experts, "tune --shapes nonsense", "--shapes 'nonsense' is unknown: choose from granular, switch"),
    (experts, "tune --pieces sideways", "--pieces 'sideways' is unknown: choose from gated_up, down"),
    (experts, "tune --groups 0", r"--groups \[0\] must be at least 1"),
    (experts, "tune --activation tanh", "--activation 'tanh'"),
    (experts, "tune --shape x=1,2", "must read name=T,H,I,E,K"),
    (jobs, "--runs olmoe:auto:fsdp3-2", "'olmoe:auto:fsdp3-2': write an engine with its ranks, ddp or fsdp2: fsdp2-2"),
    (jobs, "--runs llama:auto:ddp", "--runs 'llama:auto:ddp': write an engine"),
    (jobs, "--runs llama:auto:ddp-3 --batch_size 16", "--batch_size 16 does not fall evenly to the 3 ranks of llama"),
    (jobs, "--runs granular:auto", "--runs 'granular' is unknown: choose from olmoe"),
    (jobs, "--runs llama:fast", "--runs 'fast' is unknown: choose from stock"),
    (routing, "--top_k 9 --experts 8", r"--top_k 9 must lie in \[1, --experts 8\]"),
    (routing, "--parts speed", "--parts 'speed' is unknown: choose from analysis, collecting"),
    (routing, "--rounds 1", "--rounds 1 must be at least 2: quartiles need them"),
    (routing, "--tokens 0", "--tokens 0 must be at least 1"),
    (jobs, "prices", "^'prices' is unknown: choose from models, one, speeds, errors"),
)


@pytest.mark.parametrize(
    "program, words, message", REFUSED, ids=lambda value: str(value) if type(value) is str else ""
)
def test_bad_arguments_are_refused_with_one_line(program, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where runs/ would be
    with pytest.raises(ValueError, match=message) as caught:
        program.main(words.split() if isinstance(words, str) else words)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
