"""The model before surgery as copy, adapter and cache: against each other and against the model's own logits.

The states on disk: found again, never those of another model or other rows, whole after a kill; as ranks fill and read
them: tests/distributed.
"""

import copy
from collections import namedtuple

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from hf_moe_cpt.trainers.surgery import reference as reference_module
from hf_moe_cpt.trainers.surgery.chunked import head_of, run_model
from hf_moe_cpt.trainers.surgery.data import collate_rows, row_of
from hf_moe_cpt.trainers.surgery.losses import FORGET_LOSSES, PAIR_LOSSES, next_token_kl
from hf_moe_cpt.trainers.surgery.reference import adapter_off, build_reference, compared_rows, weights_fingerprint
from tests.helpers.tiny_models import SIZES, VOCABULARY, tiny_model, tokenized


MODELS = {
    "llama": lambda: tiny_model("llama", attention_dropout=0.5),
    "tied": lambda: tiny_model("llama", tie_word_embeddings=True),
    "softcap": lambda: _built(Gemma2Config(**SIZES | {"head_dim": 8, "pad_token_id": 0}, final_logit_softcapping=2.0)),
    "mixtral": lambda: tiny_model("mixtral"),
    "cpt_moe": lambda: tiny_model("cpt_moe"),
}


def _built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def _rows(lengths: list[int], seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "completion_mask": [[True] * length for length in lengths]})


UNEQUAL = _rows([7, 12, 3, 9, 12, 5])
EQUAL = _rows([8, 8, 8, 8])


def _batch(rows: Dataset, *places: int) -> dict[str, torch.Tensor]:
    return collate_rows([row_of(rows, place) for place in places], pad_token_id=0)


def _build(kind, model, rows, folder, **options):
    return build_reference(kind, model, {"retain": rows["input_ids"]}, Accelerator(cpu=True), folder, **options)


def _moved(model: nn.Module) -> nn.Module:
    """The model after some surgery: every weight elsewhere, in training mode."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _anchor(model, reference, batch):
    """The KL and its gradient over every weight."""
    model.zero_grad()
    states = run_model(model, batch), head_of(model)
    before = reference.hidden(batch, "retain"), reference.head
    value = next_token_kl(states, before, batch["completion_mask"][:, 1:], chunk_tokens=5)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_a_cached_anchor_is_the_live_one(tmp_path, kind):
    """Bit for bit with the shapes that the cache was made with, up to rounding with other padding."""
    for rows, places, tolerance in ((EQUAL, (0, 1, 2, 3), 0.0), (UNEQUAL, (4, 2, 0), 1e-6)):
        model = MODELS[kind]().train()
        folder = tmp_path / str(len(rows))
        live, cached = (_build(name, model, rows, folder, batch_size=4) for name in ("copy", "cache"))
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())
        _moved(model)
        batch = _batch(rows, *places)
        (want, gradients), (got, found) = (_anchor(model, one, batch) for one in (live, cached))
        assert float(want) > 1e-4
        assert abs(float(got - want)) <= tolerance
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(found[name], gradient, rtol=0.0, atol=tolerance), name


@pytest.mark.parametrize("kind", ["softcap", "cpt_moe"])
@pytest.mark.parametrize("reference", ["copy", "cache"])
def test_answers_are_those_of_the_models_own_logits(tmp_path, kind, reference):
    model = MODELS[kind]()
    before = copy.deepcopy(model).double().eval()
    if hasattr(before.config, "num_experts_per_tok"):
        before.set_experts_implementation("eager")
    batch = _batch(UNEQUAL, 1, 2, 5)
    found = _build(reference, model, UNEQUAL, tmp_path)
    _moved(model)
    got = found.token_logp(batch, "retain")
    logp = before(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    want = logp[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["attention_mask"][:, 1:].bool()
    assert not got.requires_grad
    assert torch.allclose(got[mask].double(), want[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "cpt_moe"])
def test_routers_are_remembered(tmp_path, kind):
    model, batch = MODELS[kind](), _batch(UNEQUAL, 3, 0)
    with torch.no_grad():
        logits = model.eval()(**{k: batch[k] for k in ("input_ids", "attention_mask")}, output_router_logits=True)
    mask = batch["attention_mask"].bool()
    for name in ("copy", "cache"):
        found = _build(name, model, UNEQUAL, tmp_path, with_routers=True)
        found.hidden(batch, "retain")
        probs = found.router_probs(batch, "retain")
        assert len(probs) == len(logits.router_logits) == 2
        for got, raw in zip(probs, logits.router_logits, strict=True):
            want = raw.view(*mask.shape, -1).softmax(-1)
            assert torch.allclose(got.view_as(want)[mask], want[mask], atol=1e-5)


def _lora(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3, **options))


@pytest.mark.parametrize("saved", [None, ["lm_head"], ["lm_head", "embed_tokens"]])
def test_an_adapter_is_switched_off_with_all_that_it_trains(tmp_path, saved):
    base = tiny_model("llama")
    model = _lora(copy.deepcopy(base), modules_to_save=saved).train()
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    found, want = _build("auto", model, UNEQUAL, tmp_path), _build("copy", base, UNEQUAL, tmp_path)
    assert found.is_adapter and not list(tmp_path.iterdir())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    model.model.model.layers[0].eval()  # somebody's own choice
    modes = [module.training for module in model.modules()]
    batch, state = _batch(UNEQUAL, 1, 3), torch.get_rng_state()
    assert torch.equal(found.hidden(batch, "retain"), want.hidden(batch, "retain"))
    assert torch.equal(found.token_logp(batch, "retain"), want.token_logp(batch, "retain"))
    assert torch.equal(found.head.weight, base.lm_head.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not torch.allclose(run_model(model.eval(), batch), want.hidden(batch, "retain"), atol=1e-3)


def test_an_adapter_comes_back_after_a_pass_that_fails(tmp_path, monkeypatch):
    model = _lora(tiny_model("llama")).train()
    found = _build("adapter", model, UNEQUAL, tmp_path)

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(reference_module, "run_model", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        found.hidden(_batch(UNEQUAL, 0), "retain")
    assert model.training and not model._adapters_disabled
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_gradients_are_the_same_with_the_adapters_reference_in_between(tmp_path):
    """Dropout draws the same numbers, and checkpointed layers are computed again with the adapter on."""
    grads = []
    for kind in ("copy", "adapter"):
        model = _lora(tiny_model("llama")).train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.no_grad():
            reference = _build(kind, model, EQUAL, tmp_path)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.add_(0.2)
        torch.manual_seed(3)
        grads.append(_anchor(model, reference, _batch(EQUAL, 0, 1, 2, 3))[1])
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 8
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_an_adapter_that_was_trained_before_is_no_reference_of_its_own(tmp_path, caplog):
    model = _lora(tiny_model("llama"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.2)
    batch = _batch(UNEQUAL, 0, 4)
    want = run_model(model.eval(), batch)
    cached = _build("auto", model, UNEQUAL, tmp_path)
    mask = batch["attention_mask"].bool()
    assert torch.allclose(cached.hidden(batch, "retain")[mask], want[mask], atol=1e-5)
    base = _build("adapter", model, UNEQUAL, tmp_path)
    assert "compares with its base" in caplog.text
    with adapter_off(model), torch.no_grad():
        assert torch.equal(base.hidden(batch, "retain"), run_model(model, batch))


def test_a_given_model_is_the_reference(tmp_path):
    model, given = tiny_model("llama"), _moved(tiny_model("llama")).train()
    batch = _batch(EQUAL, 0, 1, 2, 3)
    want = run_model(copy.deepcopy(given).eval(), batch)
    for kind in ("auto", "cache", "copy"):
        found = _build(kind, model, EQUAL, tmp_path, given=given)
        assert torch.equal(found.hidden(batch, "retain"), want)
        assert torch.equal(found.head.weight, given.lm_head.weight)
    assert not any(p.requires_grad for p in given.parameters())


def test_sets_that_are_compared():
    winners = UNEQUAL.rename_columns({name: f"winner_{name}" for name in UNEQUAL.column_names})
    paired = Dataset.from_dict({**UNEQUAL.to_dict(), **winners.to_dict()})
    sets = {"unlearn": UNEQUAL, "obsolete": paired, "update": UNEQUAL, "retain": EQUAL}
    losses = {"unlearn": FORGET_LOSSES["aim"], "obsolete": PAIR_LOSSES["pair_dpo"]}
    assert list(compared_rows(sets, losses)) == ["obsolete", "retain", "obsolete/winner"]
    assert list(compared_rows(sets, {"unlearn": FORGET_LOSSES["npo"]})) == ["unlearn", "retain"]
    only = {"unlearn": UNEQUAL}
    assert (
        build_reference("auto", tiny_model("llama"), compared_rows(only, losses), Accelerator(cpu=True), "x") is None
    )


def test_what_cannot_be_a_reference_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="needs a PEFT model, not a LlamaForCausalLM: pass peft_config"):
        _build("adapter", model, UNEQUAL, tmp_path)
    with pytest.raises(ValueError, match="leave ref_model out"):
        _build("adapter", _lora(tiny_model("llama")), UNEQUAL, tmp_path, given=model)
    with pytest.raises(ValueError, match="a vocabulary of 48 and ref_model of 50"):
        _build("copy", model, UNEQUAL, tmp_path, given=tiny_model("llama", vocab_size=50))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def bf16_accelerator():
    """An accelerator with mixed precision, which a process may have only once."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_mixed_precision_reaches_the_reference(tmp_path, bf16_accelerator):
    model, batch = tiny_model("llama").eval(), _batch(EQUAL, 0, 1, 2, 3)
    with torch.no_grad():
        plain = run_model(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            want = run_model(model, batch)
    assert not torch.equal(plain, want)
    for kind in ("copy", "cache"):
        found = build_reference(kind, model, {"retain": EQUAL["input_ids"]}, bf16_accelerator, tmp_path)
        assert torch.equal(found.hidden(batch, "retain"), want)


ROWS = tokenized(20, 3).map(lambda row: {"completion_mask": [True] * len(row["input_ids"])})
BYTES_OF_ROW = 20 * 16 * 4  # about: tokens times hidden size times float32


def _cache(folder, model=None, rows=ROWS):
    return _build("cache", model or tiny_model("llama"), rows, folder, batch_size=3)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of about four rows."""
    monkeypatch.setattr(reference_module, "SHARD_BYTES", 4 * BYTES_OF_ROW)


@pytest.fixture
def passes(monkeypatch):
    """How many rows went through the model so far, the probe of two tokens left out."""
    seen = []
    plain = reference_module._padded
    monkeypatch.setattr(
        reference_module, "_padded", lambda tokens, device: seen.append(len(tokens)) or plain(tokens, device)
    )
    return seen


@pytest.mark.usefixtures("small_shards")
def test_every_row_is_found_whatever_its_shard(tmp_path):
    found, model = _cache(tmp_path), tiny_model("llama").eval()
    assert len(list(tmp_path.rglob("states-*.safetensors"))) == len(found.states["retain"].shards) > 3
    for places in ((19, 0, 7), (5,), (3, 3)):
        batch = _batch(ROWS, *places)
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            want = run_model(model, batch)
        got = found.hidden(batch, "retain")
        assert got.dtype == want.dtype and not got[~mask].any()
        assert torch.allclose(got[mask], want[mask], atol=1e-6)


@pytest.mark.usefixtures("small_shards")
def test_a_second_run_computes_nothing_and_a_killed_one_goes_on(tmp_path, passes):
    whole = _cache(tmp_path / "whole")
    assert sum(passes) == 20
    _cache(tmp_path / "whole")
    assert sum(passes) == 20
    number = 2
    states = whole.states["retain"]
    (states.folder / f".states-{number:05d}.safetensors.partial").write_bytes(b"half of it")
    states._path(number).unlink()
    again = _cache(tmp_path / "whole")
    assert sum(passes) == 20 + len(states.shards[number])
    assert not list(states.folder.glob(".*")) and not again.states["retain"].missing()


def test_another_model_and_other_rows_have_a_cache_of_their_own(tmp_path, passes):
    _cache(tmp_path)
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-3
    ids = ROWS["input_ids"][:]
    other_rows = [[*ids[0][:-1], ids[0][-1] % 40 + 1], *ids[1:]]
    cut = [ids[0] + ids[1][:1], ids[1][1:], *ids[2:]]  # the same tokens in rows of other lengths
    other_rows, cut = (
        Dataset.from_dict({"input_ids": rows, "completion_mask": [[True] * len(row) for row in rows]})
        for rows in (other_rows, cut)
    )
    configured = tiny_model("llama", rms_norm_eps=1e-3)
    for options in ({"model": changed}, {"rows": other_rows}, {"rows": cut}, {"model": configured}):
        before = sum(passes)
        found = _cache(tmp_path, **options)
        assert sum(passes) == before + 20
        with torch.no_grad():
            batch = _batch(options.get("rows", ROWS), 0, 3)
            want = run_model(options.get("model", tiny_model("llama")).eval(), batch)
        mask = batch["attention_mask"].bool()
        assert torch.allclose(found.hidden(batch, "retain")[mask], want[mask], atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", ["cut", "other key", "other rows", "a bit"])
def test_a_damaged_shard_is_made_anew(tmp_path, passes, caplog, damage):
    found = _cache(tmp_path)
    path = found.states["retain"]._path(0)
    want = load_file(path)["hidden"].clone()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "a bit":
        content = bytearray(path.read_bytes())
        content[-len(content) // 4] ^= 1  # of the states
        path.write_bytes(content)
    else:
        key = found.states["retain"].key if damage == "other rows" else "0" * 32
        save_file({"hidden": torch.zeros_like(want)[: None if damage == "other key" else -1]}, path, {"key": key})
    _cache(tmp_path)
    assert sum(passes) == 40 and "it is made anew" in caplog.text
    assert torch.equal(load_file(path)["hidden"], want)


def test_batches_of_other_rows_are_refused(tmp_path):
    found = _cache(tmp_path)
    wrong = _batch(ROWS, 0, 1)
    wrong["row"] = [0, 2]
    with pytest.raises(ValueError, match="Row 2 of a batch does not hold the tokens that retain-"):
        found.hidden(wrong, "retain")
    wrong["row"] = [0, 99]
    with pytest.raises(ValueError, match="Row 99 of a batch"):
        found.hidden(wrong, "retain")
    with pytest.raises(ValueError, match="without `row`"):
        found.hidden({name: wrong[name] for name in ("input_ids", "attention_mask")}, "retain")
    with pytest.raises(ValueError, match="The reference cache holds retain, not neighbour"):
        found.hidden(_batch(ROWS, 0), "neighbour")


def test_a_full_disk_is_noticed_before_anything_is_computed(tmp_path, monkeypatch, passes):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(reference_module.shutil, "disk_usage", lambda _: usage(10**6, 0, 10_000))
    with pytest.raises(ValueError, match="needs 0.00 GB and .* has 0.00 GB free: free space, set reference_cache_dir"):
        _cache(tmp_path / "new" / "folder")
    assert not passes and not (tmp_path / "new").exists()
    needed = sum(map(len, ROWS["input_ids"])) * 16 * 4
    monkeypatch.setattr(reference_module.shutil, "disk_usage", lambda _: usage(10**6, 0, needed))
    _cache(tmp_path / "new" / "folder")


def test_the_fingerprint_is_that_of_what_decides_the_states():
    model = tiny_model("mixtral")
    before = weights_fingerprint(model)
    model.config.use_cache, model.config.output_router_logits = False, True
    assert weights_fingerprint(model.train()) == before
    assert weights_fingerprint(model.to(torch.bfloat16)) != before
    assert weights_fingerprint(tiny_model("mixtral", num_experts_per_tok=1)) != before
