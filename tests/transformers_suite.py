"""Run transformers' own tests of models (common, generation, causal LM, tensor and expert parallel, FSDP) on cpt_moe.

    python tests/transformers_suite.py --transformers 5.24.0 --tests path/to/transformers/tests

The tests come from a checkout of that release (its source distribution has only a part of them), the transformers
under test is the installed one. Prints a line for each failure and a table; exits with 1 if one is not in
`KNOWN_FAILURES`.
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


ATTENTION = {"num_key_value_heads": 1, "sliding_window": 16, "qk_norm": "head", "qkv_bias": True}
CONFIGURATIONS = {
    "penalty": {"num_experts": 7, "num_experts_per_tok": 2},
    "penalty_one": {"num_experts": 4, "num_experts_per_tok": 1},
    "sinkhorn": {"num_experts": 7, "num_experts_per_tok": 2, "router_type": "sinkhorn"},
    "sinkhorn_one": {"num_experts": 4, "num_experts_per_tok": 1, "router_type": "sinkhorn"},
    "dense": {"num_experts": 0},
    "grouped_window": {"num_experts": 7, "num_experts_per_tok": 2, **ATTENTION},
}

# Test, or configuration::test -> why its failure is left.
KNOWN_FAILURES = {
    "test_bc_cache_name_forward": "wants a warning of the old name of the cache; here both names are welcome",
    "test_output_router_logits_from_config": "wants them recorded in evaluation too; here in training, or when asked",
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "re-entrant checkpointing is refused while a router penalty is on; it passes where none is"
    ),
    **dict.fromkeys(
        (f"dense::test_eager_matches_batched_and_grouped_inference_{n}" for n in ("0_fp16", "1_fp32", "2_bf16")),
        "takes every class that can have experts for a mixture; a dense model of the family has none to run",
    ),
    "grouped_window::test_generate_with_static_cache": (
        "expects a cache as long as the text whatever the window; Mistral with this window fails alike"
    ),
}


def test_case_of(name: str, fields: dict) -> type[unittest.TestCase]:
    """transformers' CausalLMModelTest for one configuration, with every mixin that the release has."""
    tester = importlib.import_module("tests.causal_lm_tester")
    from transformers.models.auto import modeling_auto

    from hf_moe_cpt.modeling.configuration_cpt_moe import CptMoeConfig
    from hf_moe_cpt.modeling.modeling_cpt_moe import CptMoeForCausalLM, CptMoeForSequenceClassification, CptMoeModel

    # Where the tests look up by a class's name which labels it takes.
    modeling_auto.MODEL_MAPPING_NAMES["cpt_moe"] = "CptMoeModel"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["cpt_moe"] = "CptMoeForCausalLM"
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["cpt_moe"] = "CptMoeForSequenceClassification"

    class CptMoeTester(tester.CausalLMModelTester):
        base_model_class = CptMoeModel
        config_class = CptMoeConfig
        causal_lm_class = CptMoeForCausalLM
        sequence_classification_class = CptMoeForSequenceClassification

        def get_config(self) -> CptMoeConfig:
            names = "vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings"
            names += " pad_token_id bos_token_id eos_token_id"
            sizes = {key: getattr(self, key) for key in names.split()}
            width = {"moe_intermediate_size": 16} if fields["num_experts"] else {}
            # Tolerances of half precision are those of transformers' usual initialisation.
            return CptMoeConfig(
                **sizes, intermediate_size=64, hidden_act="gelu", initializer_range=0.02, **width, **fields
            )

    bases = [tester.CausalLMModelTest]
    try:
        parallel = importlib.import_module("tests.test_expert_parallel_mixin").ExpertParallelTesterMixin
    except ModuleNotFoundError:  # before transformers 5.23
        parallel = None
    if parallel is not None and not issubclass(bases[0], parallel):
        bases.append(parallel)
    # No tiny checkpoint of this family lies on the Hub for the pipelines.
    skip_pipelines = {"is_pipeline_test_to_skip": lambda self, *args, **kwargs: True}
    settings = {"model_tester_class": CptMoeTester, "test_all_params_have_gradient": False, **skip_pipelines}
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
        text = " ".join(str(err[1]).split())[:300]
        print(f"{outcome.upper()} {full_name} {err[0].__name__}: {text}", flush=True)

    addFailure = addError

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: tuple | None) -> None:
        if err is not None:
            self.addError(test, err)


def run_configuration(name: str, pattern: str, limit: int) -> collections.Counter:
    """Outcomes, counted, of the tests of one configuration whose name matches `pattern`."""
    case = test_case_of(name, CONFIGURATIONS[name])
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
