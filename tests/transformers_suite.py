"""Run transformers' own tests of models (common, generation, causal LM, tensor and expert parallel, FSDP) on cpt_moe.

    python tests/transformers_suite.py --transformers 5.24.0 --tests path/to/transformers/tests

The tests come from a checkout of that release (its source distribution has only a part of them) and need httpx and
parameterized; the transformers under test is the installed one. Prints a line for each failure and a table; exits
with 1 if one is not in `KNOWN_FAILURES`.
"""

import argparse
import collections
import importlib
import os
import re
import signal
import sys
import time
import unittest
from pathlib import Path
from types import ModuleType


ATTENTION = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "qk_norm": "head",
    "qkv_bias": True,
}
CONFIGURATIONS = {
    "penalty": {"num_experts": 8, "num_experts_per_tok": 2},
    "penalty_one": {"num_experts": 4, "num_experts_per_tok": 1},
    "sinkhorn": {"num_experts": 8, "num_experts_per_tok": 2, "router_type": "sinkhorn"},
    "sinkhorn_one": {"num_experts": 4, "num_experts_per_tok": 1, "router_type": "sinkhorn"},
    "dense": {"num_experts": 0},
    "grouped_window": {"num_experts": 7, "num_experts_per_tok": 2, **ATTENTION},
    "qwen2_moe": {},  # transformers' own, to tell a fault of the suite from ours
}

SIZES = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
SIZES |= {"pad_token_id", "bos_token_id", "eos_token_id"}
WHOLE_BATCH = (
    "fsdp2_expert_parallel_2d_vs_ddp",
    "hsdp_grad_accumulation_vs_single_device_0_replicate_and_shard",
    "hsdp_grad_accumulation_vs_single_device_1_replicate_only",
    "hsdp_grad_accumulation_vs_single_device_2_expert_parallel",
)

# Test, or configuration::test -> why its failure is left.
KNOWN_FAILURES = {
    "test_output_router_logits_from_config": "wants them recorded in evaluation too; here in training, or when asked",
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "re-entrant checkpointing is refused while a router penalty is on; it passes where none is"
    ),
    **dict.fromkeys(
        (f"dense::test_eager_matches_batched_and_grouped_inference_{n}" for n in ("0_fp16", "1_fp32", "2_bf16")),
        "takes every class that can have experts for a mixture; a dense model of the family has none to run",
    ),
    **dict.fromkeys(
        (f"sinkhorn{one}::test_{test}" for one in ("", "_one") for test in WHOLE_BATCH),
        "compares a batch with its parts; a Sinkhorn plan balances the tokens that it is given (docs/scaling.md)",
    ),
    **dict.fromkeys(
        (f"grouped_window::test_ep_backward_{n}" for n in ("0_eager", "1_grouped_mm", "2_batched_mm")),
        "looks for a rank's experts at rank x its own number; of 7 on two ranks the second has 3, from the fifth on",
    ),
    "grouped_window::test_generate_with_static_cache": (
        "expects a cache as long as the text whatever the window; Mistral with this window fails alike"
    ),
}


def mixins_of_ranks() -> dict[str, ModuleType]:
    """The modules of the mixins that start ranks; each runs for every family, not only for those that it lists."""
    modules = {}
    for kind, file in (("TP", "tensor_parallel"), ("EP", "expert_parallel"), ("FSDP", "fsdp")):
        try:
            modules[kind] = importlib.import_module(f"tests.test_{file}_mixin")
        except ModuleNotFoundError:  # a release before the mixin
            continue
        setattr(modules[kind], f"{kind}_DISTRIBUTED_TEST_MODEL_TYPES", None)
    # gloo needs no core for each of its ranks.
    modules["FSDP"]._get_available_fsdp_workers = lambda: 8
    return modules


def tester_of(causal_lm_tester: type, fields: dict) -> type:
    """transformers' model tester for `cpt_moe` with these fields, for Qwen2-MoE without any."""
    from transformers.models.auto import modeling_auto

    if not fields:
        from transformers import Qwen2MoeModel

        return type("Qwen2MoeTester", (causal_lm_tester,), {"base_model_class": Qwen2MoeModel})
    from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
    from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM, CptMoeForSequenceClassification, CptMoeModel

    # Where the tests look up by a class's name which labels it takes.
    modeling_auto.MODEL_MAPPING_NAMES["cpt_moe"] = "CptMoeModel"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["cpt_moe"] = "CptMoeForCausalLM"
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["cpt_moe"] = "CptMoeForSequenceClassification"

    class CptMoeTester(causal_lm_tester):
        base_model_class = CptMoeModel
        config_class = CptMoeConfig
        causal_lm_class = CptMoeForCausalLM
        sequence_classification_class = CptMoeForSequenceClassification

        def __init__(self, parent: unittest.TestCase) -> None:
            super().__init__(parent, **{name: fields[name] for name in SIZES & fields.keys()})

        def get_config(self) -> CptMoeConfig:
            sizes = {name: getattr(self, name) for name in SIZES}
            width = {"moe_intermediate_size": 16} if fields["num_experts"] else {}
            # Tolerances of half precision are those of transformers' usual initialisation.
            sizes |= {"intermediate_size": 64, "hidden_act": "gelu", "initializer_range": 0.02}
            return CptMoeConfig(**{**sizes, **width, **fields})

    return CptMoeTester


def test_case_of(name: str) -> type[unittest.TestCase]:
    """transformers' CausalLMModelTest for one configuration, with every mixin that the release has."""
    tester = importlib.import_module("tests.causal_lm_tester")
    bases = [tester.CausalLMModelTest]
    parallel = mixins_of_ranks().get("EP")
    if parallel and not issubclass(bases[0], parallel.ExpertParallelTesterMixin):
        bases.append(parallel.ExpertParallelTesterMixin)
    # No tiny checkpoint of this family lies on the Hub for the pipelines.
    skip_pipelines = {"is_pipeline_test_to_skip": lambda self, *args, **kwargs: True}
    model_tester = tester_of(tester.CausalLMModelTester, CONFIGURATIONS[name])

    def tiny_config(self) -> tuple[type, dict]:
        """Theirs gives every configuration that could have experts a width of experts."""
        config_class, values = tester.CausalLMModelTest._get_tiny_config(self)
        if values.get("num_experts") == 0:
            del values["moe_intermediate_size"]
        return config_class, values

    settings = {"model_tester_class": model_tester, "test_all_params_have_gradient": False}
    settings |= {"_get_tiny_config": tiny_config, **skip_pipelines}
    return type(f"CptMoe_{name}", (*bases, unittest.TestCase), settings)


class Tally(unittest.TestResult):
    """Counts outcomes, names failures as they come, ends a test after `limit` seconds."""

    def __init__(self, configuration: str, limit: int) -> None:
        super().__init__()
        self.configuration = configuration
        self.limit = limit
        self.counts: collections.Counter = collections.Counter()
        self.told: set[str] = set()  # a test of several classes may fail more than once

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.began = time.monotonic()
        signal.alarm(self.limit)

    def stopTest(self, test: unittest.TestCase) -> None:
        signal.alarm(0)
        super().stopTest(test)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.counts["passed"] += 1

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.counts["skipped"] += 1

    def addError(self, test: unittest.TestCase, err: tuple) -> None:
        name = getattr(test, "_testMethodName", str(test))
        if err[0].__name__ == "Skipped":  # pytest.skip
            return self.addSkip(test, str(err[1]))
        full_name = f"{self.configuration}::{name}"
        outcome = "listed" if KNOWN_FAILURES.keys() & {name, full_name} else "failed"
        self.counts[outcome] += name not in self.told
        self.told.add(name)
        text = " ".join(str(err[1]).split())
        text = text if len(text) < 400 else f"{text[:200]} ... {text[-200:]}"  # a rank's error comes last
        print(f"{outcome.upper()} {full_name} {err[0].__name__}: {text}", flush=True)

    addFailure = addError

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: tuple | None) -> None:
        if err is not None:
            self.addError(test, err)


def run_configuration(name: str, pattern: str, limit: int) -> collections.Counter:
    """Outcomes, counted, of the tests of one configuration whose name matches `pattern`."""
    case = test_case_of(name)
    names = [test for test in unittest.TestLoader().getTestCaseNames(case) if re.search(pattern, test)]
    result = Tally(name, limit)
    unittest.TestSuite(case(test) for test in names).run(result)
    return result.counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", required=True, help="version that must be the installed one")
    parser.add_argument("--tests", required=True, type=Path, help="the folder tests/ of its checkout")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("-k", dest="pattern", default="", help="regular expression to find in the names of tests")
    parser.add_argument("--limit", type=int, default=120, help="seconds for a test")
    args = parser.parse_args()

    # Both projects call the folder `tests`: here it is theirs, in processes that tests start as well.
    sys.path[0] = str(args.tests.resolve().parent)
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    if transformers.__version__ != args.transformers:
        parser.error(f"transformers {transformers.__version__} is installed, not {args.transformers}.")

    def too_slow(*_) -> None:
        raise TimeoutError(f"longer than {args.limit} s")

    signal.signal(signal.SIGALRM, too_slow)
    outcomes = ("passed", "failed", "listed", "skipped")
    total: collections.Counter = collections.Counter()
    for name in args.configurations:
        counts = run_configuration(name, args.pattern, args.limit)
        total += counts
        table = "  ".join(f"{outcome} {counts[outcome]:4d}" for outcome in outcomes)
        print(f"transformers {args.transformers}  {name:15s} {table}", flush=True)
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
