"""What lies around in a run's folder stays at home, by both ways out: 60 planted files, links, pickles and texts."""

import base64
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hf_moe_cpt.hub.contents import MAX_FACT, find_secret, read_contents, without_paths
from hf_moe_cpt.hub.publishing import plan_files, plan_upload
from hf_moe_cpt.scripts.push import main as push
from hf_moe_cpt.trainers.surgery.verdict import Targets, verdict_of
from tests.helpers.tiny_models import word_tokenizer
from tests.hub.test_hub_mixin import TRAIN_OTHERS


MARK = b"planted-and-never-published"
HF, AWS, GITHUB = "hf_" + "Ab3" * 12, "AKIA" + "ABCDEFGHIJKLMNOP", "ghp_" + "aB1" * 12
PICKLE = pickle.dumps({"token": MARK})
# Path below the run's folder -> bytes: what the old ways of publishing took, and its like.
PLANTED = {
    **{
        name: HF.encode() + MARK
        for name in ("id_rsa", "id_ed25519", ".netrc", ".env", "secrets.env", "token", "key.pem")
    },
    **{
        name: json.dumps({"api_key": AWS, "mark": MARK.decode()}).encode()
        for name in ("credentials.json", "service_account.json", "client_secret.json", ".git-credentials", "auth.yaml")
    },
    **{
        name: PICKLE
        for name in (
            "training_args.bin optimizer.bin optimizer.pt scheduler.pt scaler.pt rng_state.pth random_states_0.pkl "
            "ema.pt adapter_model.bin pytorch_model.bin pytorch_model-00001-of-00002.bin model.ckpt state.pickle "
            "cache.joblib scheduler.bin checkpoint-9/optimizer.pt last-checkpoint/optimizer.bin "
            "global_step3/mp_rank_00_states.pt dataset.npy trainer.dill"
        ).split()
    },
    **{
        name: b"a text that nobody is to see " + MARK
        for name in (
            "data/train.jsonl data/eval.csv texts.txt pairs.parquet reference/hidden_states.safetensors core.1234 "
            "wandb/run-1/files/output.log wandb/settings runs/Nov29/events.out.tfevents.1 logs/train.log nohup.out "
            "slurm-77.out train.log debug.log notes.md .bash_history .ipynb_checkpoints/a.ipynb analysis.ipynb "
            "__pycache__/a.pyc train.py upload.py .git/config .cache/huggingface/token model.safetensors.bak "
            "model-00001-of-00002.safetensors plots/private.png"
        ).split()
    },
}
LINKS = {"linked.txt": "file", "vocab.txt": "file", "plots/linked.svg": "file", "more": "folder"}


def _plant(folder: Path) -> None:
    secret = folder.parent / "outside"
    secret.mkdir(exist_ok=True)
    (secret / "file").write_bytes(MARK)
    for name, data in PLANTED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name, kind in LINKS.items():
        (folder / name).symlink_to(secret if kind == "folder" else secret / "file")
    os.mkfifo(folder / "pipe")
    for name in ("cpt_state.json", "trainer_state.json"):
        state = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps({**state, "data_dir": "/home/alice/texts", "said": f"at {folder}/x"}))


def _nothing_of_it(published: dict[str, bytes]) -> None:
    assert not set(published) & (PLANTED.keys() | LINKS.keys() | {"pipe"})
    for name, data in published.items():
        assert MARK not in data and HF.encode() not in data and b"/home/alice" not in data, name
        assert not re.search(rb"pytest-of-|/tmp/", data), name


def test_sixty_planted_files_stay_at_home_and_are_named(folder, hub, command):
    _plant(folder)
    assert len(PLANTED) + len(LINKS) + 1 >= 60
    shown = command("push", folder, "someone/tiny").stdout
    published = hub.files("someone/tiny")
    _nothing_of_it(published)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "cpt_state.json"} <= set(published)
    assert json.loads(published["cpt_state.json"])["data_dir"] == "texts"
    for name in [*PLANTED, *LINKS, "pipe"]:
        top = name.partition("/")[0]
        assert re.search(rf"left at home: '({re.escape(name)}|{re.escape(top)}/)'", shown), name


PLANT = """
from transformers import TrainerCallback
from tests.hub.test_contents import _plant
class Plant(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            _plant(folder)
run.add_callback(Plant())
run.train()"""
PLANT_AND_TRAIN = TRAIN_OTHERS.replace("\nrun.train()", PLANT)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rainbowpo", "surgery"])
def test_what_lies_beside_a_training_stays_at_home_too(hub, elsewhere, tmp_path, method):
    (tmp_path / "run").mkdir()
    elsewhere(PLANT_AND_TRAIN, method, tmp_path / "run", package=True)
    commits = [commit for commit in hub.commits("someone/live") if "config.json" in commit.files]
    assert len(commits) >= 2
    for commit in commits:
        _nothing_of_it(commit.files)


ISSUED = {
    "Hub": HF,
    "AWS": AWS,
    "GitHub": GITHUB,
    "key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "API": "sk-proj-" + "aB3" * 10,
    "Slack": "xoxb-1234567890-abcdef",
    "address": "https://alice:pa55word@host.org/x",
    "signed": "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeK",
    "named": '"wandb_api_key": "0123456789abcdef0123456789abcdef01234567"',
    "password": "password = correct-h0rse",
    "noise": base64.b64encode(bytes(range(7, 250, 5))).decode(),
}


# Every secret in one file and one secret in every file; make test-slow has the others.
SECRETS = [
    pytest.param(
        name, secret, id=f"{name}-{kind}", marks=[pytest.mark.slow] * (name != "config.json" and kind != "Hub")
    )
    for name in ("README.md", "config.json", "modeling_cpt_moe.py", "training_run.json")
    for kind, secret in ISSUED.items()
]


@pytest.mark.parametrize("name, secret", SECRETS)
def test_a_secret_in_what_goes_is_refused_and_not_shown(folder, name, secret):
    path = folder / name
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# Mine\n"
    text = path.read_text() if name != "README.md" else head
    if name.endswith(".json"):
        value = json.loads(text)
        text = json.dumps(value | {"told": secret} if '": "' not in secret else value | json.loads(f"{{{secret}}}"))
        text = text.replace("hf_", "\\u0068f_")  # what JSON may write for h
    else:
        text += f"\n# {secret}\n"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"holds what looks like .* \(line \d+\): remove it, and revoke it"
    ) as refused:
        push([str(folder), "someone/tiny", "--dry_run"])
    assert secret not in str(refused.value) and "\n" not in str(refused.value)


KEY_OF_AWS, HEX = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "9f8e7d6c5b4a39281706f5e4d3c2b1a098765432"
DIARY = "dear diary, " * 40
# Made before the looks were read, and held out: file -> what is added to its text or its object, and what must not go.
HELD_OUT = {
    "Markdown": ("README.md", HF.replace("_", "\\_"), "Ab3Ab3"),
    "HTML": ("README.md", HF.replace("_", "&#95;"), "Ab3Ab3"),
    "percent": ("README.md", f"https://x.org/?q={HF.replace('_', '%5F')}", "Ab3Ab3"),
    "unseen letter": ("README.md", HF.replace("_", "_\u200b"), "Ab3Ab3"),
    "Google": ("README.md", "AIza" + "SyD4x9Kq2mZ7Lw0Bv8Nc6Rt5Yh3Jg1Fp-Qe", "SyD4x9"),
    "Slack": ("README.md", "https://hooks.slack.com/services/T01234567/B01234567/abcdefghijklmnopqrst", "B01234567"),
    "header": ("README.md", f'curl -H "Authorization: Bearer {HEX}"', HEX),
    "PGP": ("README.md", "-----BEGIN PGP PRIVATE KEY BLOCK-----\n\nlQOYBF", "lQOYBF"),
    "exported": ("README.md", f"export WANDB_API_KEY={HEX}", HEX),
    "SendGrid": ("README.md", "SG." + "aB3dE6gH9jK2mN5pQ8sT1v." + "wX4yZ7aB0cD3eF6gH9iJ2k", "aB3dE6"),
    "Stripe": ("generation_config.json", "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", "4eC39"),
    "Telegram": ("special_tokens_map.json", "123456789:AA" + "Hk3jL9mNpQ2rStUvWxYz01aBcDeFgHiJk", "Hk3jL9"),
    "Azure": ("config.json", f"AccountName=a;AccountKey={'Ab3+/' * 17}==", "Ab3+/Ab3"),
    "GitLab": ("config.json", "glpat-" + "x9Yz-Kq2mZ7Lw0Bv8Nc6", "x9Yz-"),
    "secret key of AWS": ("config.json", [KEY_OF_AWS], KEY_OF_AWS),
    "npm": ("chat_template.jinja", "{# npm_" + "aB3" * 12 + " #}", "aB3aB3"),
    "PyPI": ("tokenizer_config.json", "pypi-AgEIcHlwaS5vcmc" + "CJDk3NzQ0" * 6, "CJDk3"),
    "data base": ("training_run.json", "postgresql://alice:s3cretpw@db.intern/x", "s3cretpw"),
    "Google Cloud": ("cpt_state.json", {"private_key": "-----BEGIN PRIVATE KEY-----\nMIIEv"}, "MIIEv"),
    "key of a model": ("modeling_cpt_moe.py", "# sk-ant-api03-" + "aB3-dE6_" * 10, "aB3-dE6"),
    "added word": ("tokenizer.json", [{"content": HF}], "Ab3Ab3"),
    "drawing": ("plots/loss.svg", f"<svg><!-- {HF} --></svg>", "Ab3Ab3"),
    "picture": ("plots/loss.png", HF, "Ab3Ab3"),
    "more templates": ("additional_chat_templates/x.jinja", HF, "Ab3Ab3"),
    "words": ("tokenizer.model", f"\n\x05<unk>\x18{HF}\x15", "Ab3Ab3"),
    "network drive": ("tokenizer_config.json", "/mnt/nfs/alice/private/model", "alice"),
    "address of a file": ("config.json", "file:///home/alice/secret/x", "alice"),
    "Windows": ("cpt_state.json", "\\\\nas01\\alice\\texts", "alice"),
    "path in a template": ("chat_template.jinja", "{# from /home/alice/t.jinja #}", "alice"),
    "path in code": ("modeling_cpt_moe.py", "x = 1  # from /home/alice/m.py", "alice"),
    "code of nobody": ("modeling_old.py", "# dear diary", "diary"),
    "text in a configuration": ("config.json", [DIARY], "diary"),
    "text in results": ("all_results.json", [DIARY], "diary"),
    "base64": ("README.md", base64.b64encode(HF.encode()).decode(), "YWJBYjNB"),
    "other width": ("README.md", HF.replace("hf_", "\uff48\uff46\uff3f"), "Ab3Ab3"),
    "percent twice": ("README.md", HF.replace("_", "%255F"), "Ab3Ab3"),
    "escaped twice": ("config.json", HF.replace("_", "\\u005f"), "Ab3Ab3"),
    "DigitalOcean": ("README.md", "dop_v1_" + "0a1b2c3d4e5f6789" * 4, "0a1b2c3d"),
    "named": ("generation_config.json", {"wandb_key": HEX}, HEX),
    "session": ("README.md", "aws_session_token=FwoGZXIvYXdzEJr//////////wEaDHc" + "Ab3dE6" * 10, "FwoGZX"),
    "script in a drawing": ("plots/loss.svg", "<svg><script>alert(1)</script></svg>", "alert"),
    "act in a drawing": ("plots/loss.svg", "<svg onload='alert(1)'></svg>", "alert"),
    "address in a drawing": ("plots/loss.svg", "<svg><a href='https://evil.example'>x</a></svg>", "evil"),
    "text in a drawing": ("plots/loss.svg", f"<svg><desc>{DIARY}</desc></svg>", "dear"),
    "text in a token": ("tokenizer_config.json", [DIARY], "dear"),
    "name of a drawing": (f"plots/{HF}.svg", "<svg></svg>", "<svg></svg>"),
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_what_was_held_out_does_not_go(folder, name):
    file, planted, mark = HELD_OUT[name]
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(before or "{}") | {"planted": planted}))
    else:
        path.write_text(f"{before}\n{planted}\n")
    try:
        gone = read_contents(folder)
    except ValueError as refused:
        assert mark not in str(refused) and "\n" not in str(refused)
    else:
        assert not [file for file, data in gone.texts.items() if mark.encode() in data]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(folder):
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    assert "generation_config.json" in read_contents(folder).left


def test_code_without_its_paths_does_the_same(folder):
    code = "# /home/alice/x\ntext = '# /home/alice/y'  # ~/z/w\r\nmore = 1\x0c\n"
    (folder / "modeling_cpt_moe.py").write_bytes(code.encode())
    told = "# x\ntext = '# /home/alice/y'  # w\r\nmore = 1\x0c\n"
    assert read_contents(folder).texts["modeling_cpt_moe.py"] == told.encode()


def test_ordinary_files_of_a_model_hold_no_secret(finished):
    """Every file that tiny runs of three methods publish; names that a careless pattern takes for secrets."""
    for run in finished.values():
        assert plan_upload(run).texts
    for text in (
        '"eos_token": "<|endoftext|>", "pad_token_id": 0, "tokenizer_class": "PreTrainedTokenizerFast"',
        "commit 0123456789abcdef0123456789abcdef01234567, sha256:" + "0a" * 32,
        "DeepSeekV3ForCausalLMWithMultiTokenPrediction2 self.token_embedding = nn.Embedding(vocab_size)",
        "password=os.environ['PASSWORD'] token = tokenizer.token_to_id secret: str | None",
        "https://huggingface.co/org/name https://arxiv.org/abs/2503.05029",
    ):
        assert find_secret(text) is None, text


@pytest.mark.parametrize(
    ("text", "reduced"),
    [
        ("at /home/alice/run/checkpoint-2, then", "at checkpoint-2, then"),
        ("~/models/x and C:\\Users\\al\\m", "x and m"),
        ("/home/alice and C:\\Users\\al", "home and home"),
        ("see https://huggingface.co/home/x/y or a/b/c", "see https://huggingface.co/home/x/y or a/b/c"),
        ("1/2 of /tokens/ and </div>", "1/2 of /tokens/ and </div>"),
    ],
)
def test_paths_become_names(text, reduced):
    assert without_paths(text) == reduced


def test_include_takes_by_name_and_no_pickle_link_archive_or_stranger(folder):
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text('{"text": "mine to give"}\n')
    (folder / "data" / "link").symlink_to(folder / "config.json")
    (folder / "hidden.txt").write_bytes(PICKLE)
    (folder / "old.txt").write_bytes(pickle.dumps([1, 2], protocol=0))
    (folder / "key.txt").write_text(HF)
    with zipfile.ZipFile(folder / "zip.txt", "w") as archive:
        archive.writestr("data.pkl", PICKLE)
    assert "data/train.jsonl" in read_contents(folder, ["data/train.jsonl"]).texts
    for name, message in {
        "data/link": "is a link",
        "hidden.txt": "is a pickle or an archive",
        "old.txt": "is a pickle or an archive",
        "zip.txt": "is a pickle or an archive",
        "key.txt": "holds what looks like a Hub token",
        "../outside": "is no file of",
        "data": "is no file of",
        str(folder / "config.json"): "is no file of",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_contents(folder, [name])


PAIRS = ("--responses_column", "answers", "--scores_column", "stars", "--num_accepted", "2", "--tau", "inf")


def test_of_a_data_set_go_the_files_named_and_none_through_a_link(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("data/train.parquet", "README.md", "token", "outside"):
        (tmp_path / name).write_text("at /home/alice/texts/a.jsonl")
    upload = plan_files(tmp_path, ["data/train.parquet"], ["README.md"])
    assert set(upload.sizes()) == {"data/train.parquet", "README.md"} and set(upload.left) == {"token", "outside"}
    assert upload.texts["README.md"] == b"at a.jsonl"
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="README.md' is a link, and nothing is published through a link"):
        plan_files(tmp_path, ["data/train.parquet"], ["README.md"])


@pytest.mark.slow
def test_pairs_leave_by_the_same_way_out(hub, command, tmp_path):
    """Three files and nothing of what lies around; no path, no secret of a text, nothing through a link, a retry."""
    rows = [{"prompt": "Say it.", "answers": ["a word", "two words"], "stars": [1.0, 2.0]}]

    def made(name, planted=()):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, [*rows, *planted])))
        return command(
            *("rejection-sample", "--dataset_name", data, "--output_dir", tmp_path / name, *PAIRS),
            *("--push_to_hub", f"someone/{name}"),
            check=False,
        )

    hub.fail("POST .*someone/pairs/commit/", status=503)
    done = made("pairs")
    assert done.returncode == 0 and "trying again in 1 s" in done.stderr, done.stderr
    published = hub.files("someone/pairs", "dataset")
    assert set(published) == {".gitattributes", "README.md", "summary.json", "data/train.parquet"}
    _nothing_of_it(published)
    _plant(tmp_path / "pairs")
    (tmp_path / "pairs" / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "pairs" / "data").symlink_to(tmp_path / "elsewhere")
    for name, planted, said in (
        ("pairs", (), "train.parquet' is missing, or behind a link, and nothing is published through a link"),
        ("secret", [{"prompt": "Which?", "answers": [HF, "none"], "stars": [2.0, 1.0]}], "a Hub token (row 1)"),
        (
            "escaped",
            [{"prompt": HF.replace("_", "\\_"), "answers": ["a", "b"], "stars": [2.0, 1.0]}],
            "a Hub token (r",
        ),
        ("no name", (), "'someone/no name' cannot be a repository"),
    ):
        done = made(name, planted)
        assert done.returncode == 2 and said in done.stderr and HF not in done.stderr, done.stderr
    assert hub.files("someone/pairs", "dataset") == published


NO_FACTS = {
    "a log": (
        "trainer_state.json",
        {"log_history": [{"step": 1, "sample": "dear diary"}]},
        "log_history.0.sample is a",
    ),
    "trials": (
        "trainer_state.json",
        {"trial_params": {"prompt": "dear diary " * 40}},
        "trial_params.prompt is a text",
    ),
    "a name": ("cpt_state.json", {"dear diary " * 40: 1}, "a name is a text"),
}


@pytest.mark.parametrize(("name", "value", "said"), NO_FACTS.values(), ids=NO_FACTS)
def test_a_text_among_facts_is_refused(folder, name, value, said):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | value))
    with pytest.raises(ValueError, match=f"{name}': {said}.* take it out of the file") as refused:
        read_contents(folder)
    assert "diary" not in str(refused.value).partition("is a text")[2]


def test_the_longest_verdict_is_a_fact_and_a_text_in_it_is_none(folder):
    names = ("unlearn", "obsolete", "update", "retain", "neighbour", "unseen")
    worst = {f"{name}_{what}": 9.87654 for name in names for what in ("ce", "kl")} | {
        f"{name}_top1": 1.0 for name in names
    }
    start = {f"{name}_ce": 0.12345 for name in names} | {f"{name}_top1": 0.0 for name in names} | {"unlearn_top1": 1.0}
    verdict = verdict_of(worst | {"fluency": 0.01}, Targets(2.34567, 1.23456, 0.05, start, 500))
    assert len(verdict) > MAX_FACT  # the demo's last act failed on such a one
    facts = json.loads((folder / "surgery.json").read_text()) if (folder / "surgery.json").exists() else {}
    (folder / "surgery.json").write_text(json.dumps(facts | {"verdict": verdict}))
    read_contents(folder)
    (folder / "surgery.json").write_text(json.dumps(facts | {"verdict": "dear diary " * 40}))
    with pytest.raises(ValueError, match="surgery.json': verdict is a text"):
        read_contents(folder)


def test_a_tensor_that_the_model_does_not_use_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.notes"] = torch.tensor(list(MARK), dtype=torch.uint8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="'model.notes' is in its weights, and the model has no such tensor"):
        plan_upload(folder)


def test_a_card_behind_a_link_is_not_read(folder):
    (folder.parent / "secret").write_bytes(MARK)
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").symlink_to(folder.parent / "secret")
    with pytest.raises(ValueError, match=r"README.md' is a link, and nothing is published through one"):
        push([str(folder), "someone/tiny", "--dry_run"])


@pytest.mark.parametrize("name", ["a/b/c", "some one/x", "a/" + "b" * 100, "../x"])
def test_names_are_checked_before_anything_is_read(name):
    with pytest.raises(ValueError, match=r"cannot be a repository: write it as owner/name"):
        push(["/nowhere", name, "--dry_run"])


def test_how_a_tokenizer_was_read_is_not_published_with_it(tmp_path):
    """transformers saves the options of `from_pretrained`: whoever loads what is published would be offline too."""
    word_tokenizer().save_pretrained(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first", local_files_only=True).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    published = json.loads(read_contents(tmp_path / "again").texts["tokenizer_config.json"])
    assert saved["local_files_only"] and {*saved} - {*published} == {"is_local", "local_files_only"}
    assert published == {name: value for name, value in saved.items() if name in published}
