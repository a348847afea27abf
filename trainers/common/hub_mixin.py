"""What our trainers add to publishing: one list of what goes, facts for the card, failures that stop nothing.

transformers 5.24 pushes all of the output folder but what begins with "_" or "checkpoint-": pickled arguments with
tokens in them, caches of texts, whatever lies there; and drops the errors of pushes in the background. Here every push
is an upload of `hf_moe_cpt.hub.publishing`, as that of the command `push`. Source: ours;
`Trainer._push_from_checkpoint`, `Trainer.push_to_hub`.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import shutil
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_moe_cpt.hub.cards import CardOverrides, is_generated, write_card
from hf_moe_cpt.hub.contents import ADAPTER_CONFIG, CARD, CONFIG, RUN_FILE, code_files, weight_files
from hf_moe_cpt.hub.publishing import brief, commit, in_background, make_repository, plan_upload, require_place
from hf_moe_cpt.machine import package_version
from hf_moe_cpt.trainers.common.checkpointing import WriteFailures


logger = logging.getLogger(__name__)

PACKAGES = ("hf_moe_cpt", "transformers", "trl", "peft", "datasets", "accelerate", "torch", "triton")
_OF_THIS_MACHINE = ("hub_", "push_to_hub", "report_to", "run_name", "project", "trackio", "disable_tqdm")
_NAMES_AND_FOLDERS = ("_dir", "_token", "_path", "_kwargs", "_config", "_checkpoint")


class UnsavedToken(str):
    """A token that works as text and that neither a pickle nor a printed configuration reveals."""

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> UnsavedToken:
        return self

    def __repr__(self) -> str:
        return "'<HUB_TOKEN>'"


class HubMixin:
    """For a subclass of `Trainer`, before it among the bases: `class CPTTrainer(HubMixin, Trainer)`.

    Every saved model gets training_run.json and the log so far; with `push_to_hub` every push is a whole model with
    its code and nothing else: those of `hub_strategy="checkpoint"` too, without optimizer. A push that fails is logged
    and made up for by the next one, never raised before training has ended. Overrides `init_hf_repo` (refusals before
    compute, `hub_revision`), `_push_from_checkpoint`, `_finish_current_push`, `push_to_hub` (the same upload, report),
    `create_model_card` and `_save`.
    """

    run_method = ""  # cpt, rainbowpo or surgery
    model_started_from: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failed_pushes: list[str] = []
        self.model_started_from = self.model.config._name_or_path or None
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the parent's, with the branch `hub_revision`; says in one line what is wrong with name, token or Hub."""
        if not self.is_world_process_zero():
            return
        asked = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        token = token or self.args.hub_token
        require_place(asked, token)
        private = self.args.hub_private_repo if private is None else private
        self.hub_model_id = make_repository(asked, private, self.args.hub_revision, token)
        self.push_in_progress = None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        super()._save(str(folder), state_dict)
        if self.args.should_save:
            facts = json.dumps(run_facts(self), indent=1)
            (folder / RUN_FILE).write_text(facts + "\n", encoding="utf-8")
            if not folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # a card needs it, and a checkpoint has it
                state = copy(self.state)
                state.best_model_checkpoint = None  # a folder of this machine
                state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_always_push:  # the files of a push in progress must not be written over
            self._finish_current_push()
        self._collect_failures()
        failures = WriteFailures()  # of a disk that is full; the network's come later, from the background
        failures.call(self._copy_and_push, checkpoint_folder)
        if failures.first is not None:
            self._note(failures.first)
            _remove_cut_weights(Path(self.args.output_dir), Path(checkpoint_folder))

    def _copy_and_push(self, checkpoint_folder: str) -> None:
        """Copy the model out of a checkpoint, which may be removed meanwhile, and upload it in the background."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None:  # it has not ended
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, folder = Path(checkpoint_folder), Path(self.args.output_dir)
        small = {CONFIG, ADAPTER_CONFIG, "generation_config.json", RUN_FILE}
        for name in sorted(small | code_files(checkpoint) | weight_files(checkpoint)):
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, folder / name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        at = f"step {self.state.global_step}"
        if self.args.save_strategy != SaveStrategy.STEPS:
            at = f"epoch {int(self.state.epoch)}"
        below = {HubStrategy.CHECKPOINT: "last-checkpoint/", HubStrategy.ALL_CHECKPOINTS: f"{checkpoint.name}/"}
        places = ["", below[self.args.hub_strategy]] if self.args.hub_strategy in below else [""]
        job = in_background(self._upload, f"Training in progress, {at}", places)
        self.push_in_progress = PushInProgress([job])

    def _upload(
        self,
        message: str,
        places: Sequence[str] = ("",),
        revision: str | None = None,
        token: str | None = None,
    ) -> Any:
        """Commit the model in the output folder. places: folders of the repository that it goes into."""
        upload = plan_upload(self.args.output_dir, needs_tokenizer=False, needs_base=False)
        logger.info("Left at home: %s.", ", ".join(map(repr, upload.left)) or "nothing")
        operations = [operation for place in places for operation in upload.operations(place)]
        revision, token = revision or self.args.hub_revision, token or self.args.hub_token
        return commit(operations, str(self.hub_model_id), message, revision, token)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._collect_failures()

    def _collect_failures(self) -> None:
        """Errors of pushes that have ended in the background, which the parent keeps to itself."""
        pushes = getattr(self, "push_in_progress", None)
        if pushes is None or not pushes.is_done():
            return
        for job in pushes.jobs:
            error = job.exception()
            if error is not None:
                self._note(brief(error))
        self.push_in_progress = None

    def _note(self, failure: str) -> None:
        self.failed_pushes.append(failure)
        logger.warning(
            "Push %d that failed, at step %d (%s): training goes on. `hf-moe-cpt push %s %s` publishes the folder.",
            len(self.failed_pushes),
            self.state.global_step,
            self.failed_pushes[-1],
            self.args.output_dir,
            self.hub_model_id,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """As the parent's, for the files that `push` publishes; tells what failed during training.

        card: for `create_model_card`. Raises ValueError, ConnectionError or OSError in one line, which says whether
        the model is saved.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:  # push_to_hub=False, and the user calls this
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = [*_listed(card.pop("tags", None)), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**{"model_name": self._repository_name(), **card}, tags=list(dict.fromkeys(tags)))
        self._finish_current_push()
        message = commit_message or "End of training"
        if not blocking:
            return in_background(self._upload, message, revision=revision, token=token)
        try:
            pushed = self._upload(message, revision=revision, token=token)
        except (ValueError, ConnectionError) as error:
            raise self._told(error) from error
        if self.failed_pushes:
            logger.warning(
                "%d pushes to %s failed during training (the last: %s): this one brought the model as it is now.",
                len(self.failed_pushes),
                self.hub_model_id,
                self.failed_pushes[-1],
            )
        return pushed

    def _repository_name(self) -> str:
        return str(self.args.hub_model_id or Path(self.args.output_dir).name).rpartition("/")[2]

    def _told(self, error: Exception) -> Exception:
        publish = f"`hf-moe-cpt push {self.args.output_dir} {self.hub_model_id}` publishes it"
        return type(error)(f"{error} The trained model is saved, and {publish}.")

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
        language: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Write README.md from the template of the method, with the numbers of this run."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        if not any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)):  # TRL asks before the first save
            super().create_model_card(model_name=model_name, tags=tags)
            return
        card = folder / CARD
        if card.is_file() and not is_generated(card.read_text(encoding="utf-8")):  # somebody wrote it
            return
        self.save_state()
        told = CardOverrides(
            repository=self.hub_model_id,
            datasets=_listed(dataset_name or dataset),
            license=license,
            language=_listed(language),
            base_model=finetuned_from,
            title=model_name,
            tags=_listed(tags),
        )
        write_card(folder, told, self.run_method)

    def run_details(self) -> dict[str, Any]:
        """What else a method keeps in training_run.json, beside what `run_facts` finds in any trainer."""
        return {}


def _remove_cut_weights(folder: Path, checkpoint: Path) -> None:
    """Take out of `folder` the weights that a copy from `checkpoint` left unfinished: they are whole over there."""
    for path in checkpoint.glob("*model*.safetensors"):
        copy = folder / path.name
        if copy.is_file() and copy.stat().st_size != path.stat().st_size:
            copy.unlink()


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def run_facts(trainer: Any) -> dict[str, Any]:
    """What the card needs besides the log: parents, arguments, machine and versions. Nothing names a folder."""
    source = trainer.model_started_from
    is_local = source is not None and Path(source).exists()
    plain = {k: v for k, v in trainer.args.to_dict().items() if isinstance(v, bool | int | float | str)}
    private = [k for k in plain if k.startswith(_OF_THIS_MACHINE) or k.endswith(_NAMES_AND_FOLDERS)]
    arguments = {k: v for k, v in plain.items() if k not in private}
    return {
        "method": trainer.run_method,
        "started_from": Path(source).resolve().name if is_local else source,
        "arguments": arguments | {"world_size": trainer.args.world_size},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "processes": trainer.args.world_size,
        "versions": dict(installed_versions()),
        **trainer.run_details(),
    }


@functools.cache
def installed_versions() -> dict[str, str]:
    """Versions of the packages that a run may depend on, as installed."""
    found = {name: package_version(name) for name in PACKAGES}
    return {"Python": platform.python_version()} | {name: version for name, version in found.items() if version}
