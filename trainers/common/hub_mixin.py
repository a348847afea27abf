"""What our trainers add to publishing: code files in every push, facts for the card, failures that stop nothing.

transformers 5.24 copies configuration and weights of a checkpoint before it pushes it, but not the code that
`auto_map` names, drops the errors of pushes in the background, and pickles the token into training_args.bin. Source:
ours; `Trainer._push_from_checkpoint`, `Trainer._finish_current_push`.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from copy import copy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_moe_cpt.hub.cards import CardOverrides, is_generated, write_card
from hf_moe_cpt.hub.folder import ADAPTER_CONFIG, CONFIG, RUN_FILE
from hf_moe_cpt.hub.publishing import CARD, brief, explained, make_branch, may_pass, require_place, upload_run
from hf_moe_cpt.trainers.common.checkpointing import WriteFailures, free_space


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

    Every saved model gets training_run.json and the log so far; with `push_to_hub` every push carries the code, and a
    push that fails is logged and made up for by the next one, never raised before training has ended. Overrides
    `init_hf_repo` (refusals before compute, `hub_revision`), `_push_from_checkpoint`, `_finish_current_push`,
    `push_to_hub` (retries, report), `create_model_card` and `_save`.
    """

    run_method = ""  # cpt, rainbowpo or surgery
    model_started_from: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failed_pushes: list[str] = []
        self.model_started_from = self.model.config._name_or_path or None
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    def init_hf_repo(self, token: str | None = None, **kwargs: Any) -> None:
        """As the parent's, with the branch `hub_revision`; says in one line what is wrong with name, token or Hub."""
        if not self.is_world_process_zero():
            return
        asked = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        token = token or self.args.hub_token
        require_place(asked, token)
        try:
            super().init_hf_repo(token=token, **kwargs)
            if self.args.hub_revision is not None:
                make_branch(self.hub_model_id, self.args.hub_revision, token)
        except Exception as error:
            raise explained(error, asked) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder, failures = Path(output_dir or self.args.output_dir), WriteFailures()
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):  # whoever writes checkpoints tells what went wrong
            self._save_with_facts(folder, state_dict)
            return
        failures.call(self._save_with_facts, folder, state_dict, log=True)
        if failures.first is not None:
            raise OSError(
                f"the model was not saved to {str(folder)!r} ({failures.first}; {free_space(folder)}): make room, "
                "then save again; checkpoints and what is on the Hub stand."
            )

    def _save_with_facts(self, folder: Path, state_dict: dict | None, log: bool = False) -> None:
        super()._save(str(folder), state_dict)
        if self.args.should_save:
            facts = json.dumps(run_facts(self), indent=1)
            (folder / RUN_FILE).write_text(facts + "\n", encoding="utf-8")
            if log:  # a card needs it, and a checkpoint has it
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
        if self.is_world_process_zero() and self.push_in_progress is None:
            for path in (*Path(checkpoint_folder).glob("*.py"), Path(checkpoint_folder) / RUN_FILE):
                if path.is_file():
                    shutil.copy(path, Path(self.args.output_dir) / path.name)
        super()._push_from_checkpoint(checkpoint_folder)

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

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, tried again while what went wrong may pass; tells what failed during training.

        Raises ValueError, ConnectionError or OSError in one line, which says whether the model is saved.
        """
        try:
            commit = super().push_to_hub(*args, **kwargs)
        except Exception as error:
            if not may_pass(error):
                raise self._told(error) from error
            commit = self._upload_again(*args, **kwargs)
        if self.failed_pushes and self.is_world_process_zero():
            logger.warning(
                "%d pushes to %s failed during training (the last: %s): this one brought the model as it is now.",
                len(self.failed_pushes),
                self.hub_model_id,
                self.failed_pushes[-1],
            )
        return commit

    def _upload_again(self, commit_message: str = "End of training", *_: Any, **kwargs: Any) -> Any:
        """The upload of the parent's `push_to_hub`, which has saved the model and written the card already."""
        revision = kwargs.get("revision") or self.args.hub_revision
        token = kwargs.get("token") or self.args.hub_token
        try:
            return upload_run(self.args.output_dir, self.hub_model_id, commit_message, revision, token)
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        told = explained(error, str(self.hub_model_id))
        if told is error:
            return error
        publish = f"`hf-moe-cpt push {self.args.output_dir} {self.hub_model_id}` publishes it"
        return type(told)(f"{told} The trained model is saved, and {publish}.")

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
        "versions": installed_versions(),
        **trainer.run_details(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a run may depend on, as installed."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
