"""Training runs: pretraining on text and finetuning on instruction rows.

`pretrain` with `text_task`, and `finetune` with `lora`, build the model and its data, behind the interface in `task`.
`start` refuses what does not fit before data is read; `loop` begins, resumes and finishes a run; `steps` computes its
steps; `trainer` has AMPTrainer, one update in mixed precision. `saving` decides when checkpoints are written and which
are kept. `data_changes` refuses or records data that differs from what a run was begun with. `verify` checks the files
of a run, `replay` computes steps again. Folders: `optim` for optimizers and learning rates, `state` for the contents
of checkpoints, `log` for what a run prints and records, `needs` for what it takes, `planning` for plans, `runtime` for
processes, signals, torch.compile and memory.
"""

import lazy_loader

# The public names, loaded when they are first used.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "finetune": ["finetune"],
        "pretrain": ["train"],
        "trainer": ["AMPTrainer", "UpdateReport"],
    },
)
