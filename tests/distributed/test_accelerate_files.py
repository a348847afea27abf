"""The files in scripts/accelerate are read by accelerate, and what the scripts ask for besides is checked first."""

import json

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_moe_cpt.arguments import ParallelArguments, parallel_options
from tests.distributed.jobs import HAS_EP
from tests.helpers.fresh_process import launch
from tests.helpers.rank_runs import ACCELERATE, launcher_environment


FILES = {
    "one_gpu": (DistributedType.NO, 1),
    "ddp_8gpu": (DistributedType.MULTI_GPU, 8),
    "fsdp2_8gpu": (DistributedType.FSDP, 8),
    "hsdp_2x8": (DistributedType.FSDP, 16),
    "zero3": (DistributedType.DEEPSPEED, 8),
    "ep": (DistributedType.MULTI_GPU, 8),
}
needs_ep = pytest.mark.skipif(not HAS_EP, reason="expert parallelism needs transformers 5.23 and torch 2.13")


def test_accelerate_reads_every_file():
    found = {path.stem: load_config_from_file(str(path)) for path in ACCELERATE.glob("*.yaml")}
    assert {name: (read.distributed_type, read.num_processes) for name, read in found.items()} == FILES
    assert {read.mixed_precision for read in found.values()} == {"bf16"}


def test_processes_are_told_what_the_files_say():
    told = launcher_environment(ACCELERATE / "hsdp_2x8.yaml")
    assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2"
    assert told["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2" and told["PARALLELISM_CONFIG_DP_SHARD_SIZE"] == "8"
    assert "FSDP_VERSION" not in launcher_environment(ACCELERATE / "ep.yaml")


REFUSED = {
    "ranks": ({"tp_size": 3}, {}, "--tp_size 3 does not fit 4 rank"),
    "two engines": ({"ep_size": 2}, {"deepspeed": "x"}, "--ep_size 2 and FSDP or DeepSpeed both shard the model"),
    "experts": ({"ep_size": 3}, {}, "--ep_size 3 on 4 data parallel rank"),
    "dtype": ({"gather_dtype": "float32"}, {}, "with no model dealt to ranks"),
}


@pytest.fixture
def training(tmp_path) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no")


@needs_ep
@pytest.mark.parametrize("sizes, settings, text", REFUSED.values(), ids=REFUSED)
def test_what_cannot_run_is_refused(training, sizes, settings, text):
    for name, value in settings.items():
        setattr(training, name, value)
    with pytest.raises(ValueError, match=text):
        parallel_options(ParallelArguments(**sizes), training, num_ranks=4)


@needs_ep
def test_sizes_become_what_transformers_takes(training):
    assert parallel_options(ParallelArguments(), training) == {}
    asked = ParallelArguments(ep_size=4, dp_replicate_size=2)
    found = parallel_options(asked, training, num_ranks=8)["distributed_config"]
    assert (found.fsdp_size, found.ep_size, found.dp_replicate_size, found.tp_size) == (4, 4, 2, 1)
    assert (found.ep_implementation, found.fsdp_mixed_precision) == ("hf_moe_cpt", training.bf16)
    training.bf16 = True
    gathered = [ParallelArguments(dp_replicate_size=1, gather_dtype=dtype) for dtype in ("auto", "float32")]
    found = [parallel_options(asked, training, num_ranks=2)["distributed_config"] for asked in gathered]
    assert [config.fsdp_mixed_precision for config in found] == [True, False]


def test_older_transformers_is_told_what_to_install(training, monkeypatch):
    class Older:
        def __init__(self, tp_size=None, fsdp_size=None, dp_replicate_size=None, ep_size=None) -> None:
            """As transformers 5.22's: experts are dealt, and nobody chooses how tokens reach them."""

    monkeypatch.setattr("transformers.distributed.DistributedConfig", Older)
    with pytest.raises(ValueError, match=r"--ep_size 2 needs transformers 5.23 .* pip install 'transformers>=5.23'"):
        parallel_options(ParallelArguments(ep_size=2), training, num_ranks=2)


@pytest.mark.slow
@needs_ep
def test_a_script_trains_and_saves_with_experts_on_two_ranks(rank_folder, tmp_path):
    text = tmp_path / "text.jsonl"
    rows = [{"text": " ".join(f"w{2 + (7 * row + word) % 40}" for word in range(20))} for row in range(24)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--config_file", str(ACCELERATE / "ep.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    words += ["scripts/cpt.py", "--model_name_or_path", str(rank_folder / "model"), "--dataset_name", str(text)]
    words += ["--max_length", "16", "--max_steps", "2", "--per_device_train_batch_size", "2", "--use_cpu"]
    words += ["--report_to", "none", "--ep_size", "2", "--save_only_model", "--output_dir", str(tmp_path / "out")]
    launch("accelerate.commands.launch", *words)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (rank_folder / "model", tmp_path / "out"))
    for name, weight in before.state_dict().items():
        assert after.state_dict()[name].shape == weight.shape
    assert not after.model.layers[0].mlp.gate.weight.equal(before.model.layers[0].mlp.gate.weight)
