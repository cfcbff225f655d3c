"""Uploads of `Trainer`: a model with its code, without tokens of the Hub and `training_args.bin`."""

import shutil
from pathlib import Path

from huggingface_hub import upload_folder
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress


ARGUMENTS = "training_args.bin"  # a pickle of all arguments
NOT_PUSHED = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]
# Files of a checkpoint that only a resumed run needs.
TRAINING_STATE = ["optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "pytorch_model_fsdp*"]
TRAINING_STATE += ["run.json", "checksums.json"]


def check_links_below(folder: Path) -> None:
    """Raise a ValueError for a link below a folder that points out of it."""
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--push_to_hub: {path} is a link to {path.resolve()}, which would be pushed; remove it")


class CleanPushes:
    """Mixin before `Trainer`.

    `Trainer` pickles its arguments, with the `hub_token`, beside the weights and pushes them; here they are not written. A
    checkpoint is pushed with the model's code, which loading needs.
    """

    def _save(self, output_dir=None, state_dict=None):
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, ARGUMENTS).unlink(missing_ok=True)

    def init_hf_repo(self, *args, **kwargs):
        """Like `Trainer`'s, after a check that no link points out of the folder: its target would be pushed."""
        if self.is_world_process_zero():
            check_links_below(Path(self.args.output_dir))
        super().init_hf_repo(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder):
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        is_busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_busy and not self.args.hub_always_push:
            return
        checkpoint = Path(checkpoint_folder)
        for path in checkpoint.iterdir():  # files may be deleted during the upload
            if path.is_file() and not any(path.match(pattern) for pattern in TRAINING_STATE):
                shutil.copy(path, self.args.output_dir)
        jobs = [self._upload(Path(self.args.output_dir), NOT_PUSHED, None)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            jobs.append(self._upload(checkpoint, None, name))
        if is_busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def _upload(self, folder, ignored, path_in_repo):
        return upload_folder(
            repo_id=self.hub_model_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=f"Training in progress, step {self.state.global_step}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            ignore_patterns=ignored,
            run_as_future=True,
        )
